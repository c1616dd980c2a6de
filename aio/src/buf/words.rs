//! Words that many threads read and change, in memory that can be given back and used again.
//!
//! Readers that look without any lock may come at any time, so such memory is never unmapped while
//! its owner lives. But its pages can be taken from the process: they read as zeros then, and come
//! back when they are written.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// Whole pages are given back; this is a multiple of a page's size nearly everywhere, and where it
/// is not, nothing is given back.
const PAGE: usize = 4096;

/// A fixed number of atomic words, zero when made.
pub struct AtomicWords {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the memory has this one owner, and atomic words may be used from any thread.
unsafe impl Send for AtomicWords {}
// SAFETY: `&AtomicWords` gives only `&[AtomicU64]`, which may be shared.
unsafe impl Sync for AtomicWords {}

impl AtomicWords {
    /// `len` words of zero; on a page of their own where they fill whole pages.
    ///
    /// # Panics
    /// None asked for, or more than a machine can have.
    pub fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base.cast()) else {
            handle_alloc_error(layout);
        };
        AtomicWords { base, len }
    }

    fn layout(len: usize) -> Layout {
        assert!(len > 0, "no words");
        let size = len
            .checked_mul(size_of::<AtomicU64>())
            .expect("more words than a machine can have");
        let align = if size.is_multiple_of(PAGE) {
            PAGE
        } else {
            align_of::<AtomicU64>()
        };
        Layout::from_size_align(size, align).expect("more words than a machine can have")
    }

    /// Gives the pages back to the system: all words are zero afterwards. Who reads meanwhile sees
    /// old words or zeros. `false`: nothing happened, because they do not fill whole pages, or the
    /// system refused.
    pub fn give_back(&self) -> bool {
        let layout = Self::layout(self.len);
        // SAFETY: sysconf takes an integer and touches no memory of ours.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let whole = usize::try_from(page).is_ok_and(|page| page > 0 && PAGE.is_multiple_of(page));
        if layout.align() != PAGE || !whole {
            return false;
        }
        let base = self.base.as_ptr().cast();
        // SAFETY: the range is an allocation of ours, anonymous memory of whole pages that holds
        // nothing but these words. To the program it is as if another thread stored zeros to them,
        // which atomic words allow.
        unsafe { libc::madvise(base, layout.size(), libc::MADV_DONTNEED) == 0 }
    }
}

impl Deref for AtomicWords {
    type Target = [AtomicU64];

    #[inline(always)]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `base` is valid for `len` words, which were zeroed when allocated, and is
        // borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for AtomicWords {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with exactly this layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr().cast(), Self::layout(self.len)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    /// What was given back reads as zeros and can be used again; less than a page stays as it is.
    #[test]
    fn pages_come_back_as_zeros() {
        for (len, whole) in [(512, true), (1024, true), (64, false)] {
            let words = AtomicWords::new(len);
            assert!(words.len() == len && words.iter().all(|w| w.load(Relaxed) == 0));
            for round in 1..3 {
                words.iter().for_each(|w| w.store(round, Relaxed));
                // On larger pages nothing is whole.
                let given = words.give_back();
                assert!(whole || !given, "{len}");
                let left = if given { 0 } else { round };
                assert!(words.iter().all(|w| w.load(Relaxed) == left), "{len}");
            }
        }
    }
}
