//! Owned memory with an alignment, for direct I/O and bounce buffers.

use super::{IoVec, IoVecMut};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// Owned memory with an alignment, zeroed when made.
pub struct AlignedBuf {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory has this one owner, and bytes may be used from any thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: `&AlignedBuf` gives only `&[u8]`, which may be shared.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes at a multiple of `align` (a power of two, else it panics).
    ///
    /// # Errors
    /// `OutOfMemory` when the memory is not to be had, also for lengths that no machine can have.
    pub fn try_new(len: usize, align: usize) -> io::Result<Self> {
        assert!(
            align.is_power_of_two(),
            "memory alignment {align} is no power of two"
        );
        let out_of_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
        let layout = Layout::from_size_align(len, align).map_err(|_| out_of_memory())?;
        if len == 0 {
            let base =
                NonNull::new(ptr::without_provenance_mut(align)).ok_or_else(out_of_memory)?;
            return Ok(AlignedBuf { base, layout });
        }
        // SAFETY: the layout has a non-zero size.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        Ok(AlignedBuf { base, layout })
    }

    /// The alignment that it was made with, in bytes.
    pub fn align(&self) -> usize {
        self.layout.align()
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `base` is valid for the layout's size (or dangling, aligned and of size zero),
        // was zeroed when allocated, and is borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated in `try_new` with exactly this layout, and freed only here.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}

impl<'a> From<&'a AlignedBuf> for IoVec<'a> {
    fn from(buf: &'a AlignedBuf) -> Self {
        IoVec::from(&**buf)
    }
}

impl<'a> From<&'a mut AlignedBuf> for IoVecMut<'a> {
    fn from(buf: &'a mut AlignedBuf) -> Self {
        IoVecMut::from(&mut **buf)
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "AlignedBuf({} bytes at a multiple of {})",
            self.len(),
            self.align()
        )
    }
}
