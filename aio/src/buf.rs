//! Memory that requests read into and write from: borrowed slices, scatter lists, aligned buffers.
//!
//! An [`IoVec`] is the source of a write and an [`IoVecMut`] the destination of a read. Both are
//! the same three words: the first segment, already cut to size, then the segments after it, then
//! the length in bytes of the whole. So one plain slice costs no memory outside the value, and a
//! part of a long scatter list is made without copying the list:
//!
//! ```text
//!   list:     [ aaaaaaaa ][ bbbb ][ cccccccccc ][ dd ]
//!   slice:        ^--------------------^
//!   first:        aaaa        cut at the front
//!   rest:                 [ bbbb ][ cccccccccc ][ dd ]      as it stands in the list
//!   len:          4 + 4 + 5   everything behind it is not part of the slice
//! ```
//!
//! [`segments`](IoVec::segments) cuts the last one while it walks.
//!
//! The memory may belong to a guest that writes to it at the same time, so nothing here forms a
//! reference to the bytes behind a segment: they are reached through raw pointers only, and every
//! byte is read at most once per call. Whoever needs a stable view copies first.

mod aligned;
mod gather;
mod span;
mod words;

pub use aligned::AlignedBuf;
pub use gather::{Gather, Scatter};
pub use span::{RawSegment, Segments};
pub use words::AtomicWords;

use span::Span;

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::ptr;

/// Source of a write: bytes that stay readable for `'a`.
///
/// Made from a slice, from a list of [`IoSlice`], or from raw segments of guest memory.
#[derive(Clone, Copy)]
pub struct IoVec<'a> {
    span: Span<'a>,
}

// SAFETY: made from `&[u8]`, which may be sent, or by `from_raw_parts`, whose caller promises that
// the memory may be read from any thread.
unsafe impl Send for IoVec<'_> {}
// SAFETY: no method changes anything through `&IoVec`, and the memory may be read from any thread.
unsafe impl Sync for IoVec<'_> {}

impl<'a> From<&'a [u8]> for IoVec<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        IoVec {
            span: Span::one(bytes.as_ptr().cast_mut(), bytes.len()),
        }
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for IoVec<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        IoVec::from(bytes.as_slice())
    }
}

impl<'a> From<&'a [IoSlice<'a>]> for IoVec<'a> {
    fn from(list: &'a [IoSlice<'a>]) -> Self {
        // SAFETY: std promises that `IoSlice` has the layout of `iovec` on Unix, and so has
        // `RawSegment` (asserted in `span`); the list lives for `'a` and is only read.
        let segments = unsafe { &*(ptr::from_ref(list) as *const [RawSegment]) };
        IoVec {
            span: Span::list(segments),
        }
    }
}

impl<'a> IoVec<'a> {
    /// A scatter list of memory that is not described by references, such as a guest's.
    ///
    /// # Safety
    /// Every segment must stay mapped and readable, from any thread, for `'a`. Others may write to
    /// it meanwhile (a guest does): what is then read is unspecified, byte by byte.
    pub unsafe fn from_raw_parts(segments: &'a [RawSegment]) -> Self {
        IoVec {
            span: Span::list(segments),
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// No bytes at all?
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    #[inline(always)]
    pub(crate) fn single(&self) -> Option<RawSegment> {
        self.span.single()
    }

    /// The pieces in order, empty ones left out.
    pub fn segments(&self) -> Segments<'a> {
        self.span.segments()
    }

    /// Do all segments begin and end at a multiple of `mem_align` bytes (a power of two)?
    pub fn is_aligned(&self, mem_align: usize) -> bool {
        self.span.is_aligned(mem_align)
    }

    /// The `len` bytes at `offset`; panics when they leave the buffer.
    #[inline(always)]
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> IoVec<'a> {
        IoVec {
            span: self.span.slice(offset, len),
        }
    }

    /// Copies the bytes at `offset` into all of `to`; panics when they leave the buffer.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) {
        let mut done = 0;
        for piece in self.span.slice(offset, to.len()).segments() {
            let target = to[done..done + piece.len].as_mut_ptr();
            // SAFETY: the segment is readable (promised where the IoVec was made) and the target is
            // a part of `to` with the same length. Nobody else may hold `to`, so they do not
            // overlap unless a guest was given our own memory, which from_raw_parts excludes.
            unsafe { ptr::copy_nonoverlapping(piece.base, target, piece.len) };
            done += piece.len;
        }
    }

    /// Are all bytes zero? Stops at the first that is not.
    pub fn is_zero(&self) -> bool {
        let mut window = [0u8; 512];
        let mut at = 0;
        while at < self.len() {
            let part = &mut window[..(self.len() - at).min(512)];
            self.copy_to(at, part);
            if part.iter().any(|&b| b != 0) {
                return false;
            }
            at += part.len();
        }
        true
    }

    /// An owned copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(0, &mut bytes);
        bytes
    }
}

impl fmt::Debug for IoVec<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoVec({} bytes, {} segments)",
            self.len(),
            self.segments().count()
        )
    }
}

/// Destination of a read: bytes that nobody else of this program touches for `'a`.
///
/// Not `Copy`: [`reborrow`](Self::reborrow) or [`slice`](Self::slice) it like a `&mut [u8]`.
pub struct IoVecMut<'a> {
    span: Span<'a>,
    /// Invariant in what it borrows, as `&mut` is.
    unique: PhantomData<&'a mut [u8]>,
}

// SAFETY: made from `&mut [u8]`, which may be sent, or by `from_raw_parts`, whose caller promises
// that the memory may be written from any thread.
unsafe impl Send for IoVecMut<'_> {}
// SAFETY: through `&IoVecMut` the memory is only read, which any thread may do; every method that
// writes takes `&mut self`.
unsafe impl Sync for IoVecMut<'_> {}

impl<'a> From<&'a mut [u8]> for IoVecMut<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        IoVecMut {
            span: Span::one(bytes.as_mut_ptr(), bytes.len()),
            unique: PhantomData,
        }
    }
}

impl<'a, const N: usize> From<&'a mut [u8; N]> for IoVecMut<'a> {
    fn from(bytes: &'a mut [u8; N]) -> Self {
        IoVecMut::from(bytes.as_mut_slice())
    }
}

impl<'a> From<&'a mut [IoSliceMut<'_>]> for IoVecMut<'a> {
    fn from(list: &'a mut [IoSliceMut<'_>]) -> Self {
        // SAFETY: std promises that `IoSliceMut` has the layout of `iovec` on Unix, and so has
        // `RawSegment` (asserted in `span`); the list is borrowed for `'a`, so the slices behind it
        // are.
        let segments = unsafe { &*(ptr::from_mut(list) as *const [RawSegment]) };
        IoVecMut {
            span: Span::list(segments),
            unique: PhantomData,
        }
    }
}

impl<'a> IoVecMut<'a> {
    /// A scatter list of memory that is not described by references, such as a guest's.
    ///
    /// # Safety
    /// Every segment must stay mapped, readable and writable, from any thread, for `'a`, and no
    /// reference of this program may point into it meanwhile. Others may read and write it (a guest
    /// does): what is then read is unspecified, byte by byte.
    pub unsafe fn from_raw_parts(segments: &'a [RawSegment]) -> Self {
        IoVecMut {
            span: Span::list(segments),
            unique: PhantomData,
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// No bytes at all?
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    #[inline(always)]
    pub(crate) fn single(&mut self) -> Option<RawSegment> {
        self.span.single()
    }

    /// The pieces in order, empty ones left out.
    pub fn segments(&self) -> Segments<'_> {
        self.span.segments()
    }

    /// Do all segments begin and end at a multiple of `mem_align` bytes (a power of two)?
    pub fn is_aligned(&self, mem_align: usize) -> bool {
        self.span.is_aligned(mem_align)
    }

    /// The same buffer, lent for a shorter time.
    #[must_use]
    pub fn reborrow(&mut self) -> IoVecMut<'_> {
        IoVecMut {
            span: self.span,
            unique: PhantomData,
        }
    }

    /// The `len` bytes at `offset`, lent; panics when they leave the buffer.
    #[inline(always)]
    #[must_use]
    pub fn slice(&mut self, offset: usize, len: usize) -> IoVecMut<'_> {
        IoVecMut {
            span: self.span.slice(offset, len),
            unique: PhantomData,
        }
    }

    /// The bytes from `at` on, for as long as the whole was lent; panics when `at` is past the end.
    #[must_use]
    pub fn skip(self, at: usize) -> IoVecMut<'a> {
        let len = self
            .len()
            .checked_sub(at)
            .expect("skip past the end of a buffer");
        IoVecMut {
            span: self.span.slice(at, len),
            unique: PhantomData,
        }
    }

    /// The first `at` bytes and those after them; panics when `at` is past the end.
    #[must_use]
    pub fn split_at(self, at: usize) -> (IoVecMut<'a>, IoVecMut<'a>) {
        let (head, tail) = (
            self.span.slice(0, at),
            self.span.slice(at, self.span.len - at),
        );
        (
            IoVecMut {
                span: head,
                unique: PhantomData,
            },
            IoVecMut {
                span: tail,
                unique: PhantomData,
            },
        )
    }

    /// Copies all of `from` to `offset`; panics when it leaves the buffer.
    pub fn copy_from(&mut self, offset: usize, from: &[u8]) {
        let mut done = 0;
        for piece in self.span.slice(offset, from.len()).segments() {
            let source = from[done..done + piece.len].as_ptr();
            // SAFETY: the segment is writable and not referred to elsewhere (promised where the
            // IoVecMut was made); the source is a part of `from` with the same length, a shared
            // reference, so it cannot overlap with memory that is borrowed exclusively.
            unsafe { ptr::copy_nonoverlapping(source, piece.base, piece.len) };
            done += piece.len;
        }
    }

    /// Copies all of `from` to `offset`; panics when it leaves the buffer.
    ///
    /// The two may overlap when both describe guest memory; what arrives is then unspecified.
    pub fn copy_from_iovec(&mut self, offset: usize, from: &IoVec<'_>) {
        let mut done = 0;
        for source in from.segments() {
            let mut taken = 0;
            for piece in self.span.slice(offset + done, source.len).segments() {
                let start = source.base.wrapping_add(taken).cast_const();
                // SAFETY: the target is writable, the source readable (promised where they were
                // made), each for `piece.len` bytes: the pieces add up to the length of `source`.
                // `copy` allows them to overlap.
                unsafe { ptr::copy(start, piece.base, piece.len) };
                taken += piece.len;
            }
            done += source.len;
        }
    }

    /// Sets `len` bytes at `offset` to `byte`; panics when they leave the buffer.
    pub fn fill(&mut self, offset: usize, len: usize, byte: u8) {
        for piece in self.span.slice(offset, len).segments() {
            // SAFETY: the segment is writable (promised where the IoVecMut was made) for its
            // length.
            unsafe { ptr::write_bytes(piece.base, byte, piece.len) };
        }
    }

    /// What the buffer holds now, as the source of a write.
    pub fn as_source(&self) -> IoVec<'_> {
        IoVec { span: self.span }
    }
}

impl fmt::Debug for IoVecMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoVecMut({} bytes, {} segments)",
            self.len(),
            self.segments().count()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    const DIGITS: &[u8; 10] = b"0123456789";

    /// Slices of a scatter list give the same bytes as slices of the whole, at every cut.
    #[test]
    fn every_slice_of_every_partition() {
        let lists: &[&[&[u8]]] = &[
            &[b"0123456789"],
            &[b"0123", b"456", b"789"],
            &[b"", b"0", b"", b"12345678", b"", b"9", b""],
        ];
        for list in lists {
            let parts: Vec<IoSlice> = list.iter().map(|p| IoSlice::new(p)).collect();
            let whole = IoVec::from(&parts[..]);
            assert_eq!(whole.len(), 10);
            for start in 0..=10 {
                for end in start..=10 {
                    let cut = whole.slice(start, end - start);
                    assert_eq!(cut.to_vec(), &DIGITS[start..end], "{list:?} {start}..{end}");
                    assert_eq!(cut.segments().map(|s| s.len).sum::<usize>(), cut.len());
                    for inner in 0..=cut.len() {
                        let tail = cut.slice(inner, cut.len() - inner).to_vec();
                        assert_eq!(tail, &DIGITS[start + inner..end]);
                    }
                }
            }
        }
    }

    #[test]
    fn writes_reach_the_right_bytes() {
        let (mut a, mut b, mut c) = ([0u8; 3], [0u8; 1], [0u8; 6]);
        let mut list = Scatter::new();
        list.push(&mut a);
        list.push(&mut b);
        list.push(&mut c);
        let mut vec = list.as_iovec_mut();
        vec.copy_from(0, DIGITS);
        assert_eq!(vec.as_source().to_vec(), DIGITS);
        vec.slice(2, 5).fill(1, 3, b'x');
        assert_eq!(vec.as_source().to_vec(), b"012xxx6789");
        vec.copy_from_iovec(1, &IoVec::from(b"ABCDEFGH"));
        let (head, mut tail) = vec.split_at(4);
        assert_eq!(head.as_source().to_vec(), b"0ABC");
        tail.fill(0, 6, b'-');
        assert_eq!((&a, &b, &c), (b"0AB", b"C", b"------"));
    }

    #[test]
    fn gathered_sources_keep_their_order() {
        let pad = [7u8; 2];
        let mut list = Gather::new();
        list.push(&pad);
        list.push(IoVec::from(DIGITS).slice(3, 4));
        list.push(&pad);
        assert_eq!(list.as_iovec().to_vec(), b"\x07\x073456\x07\x07");
        assert_eq!(Gather::new().as_iovec().len(), 0);
    }

    #[test]
    fn alignment_counts_addresses_and_lengths() {
        let buf = AlignedBuf::try_new(8192, 4096).unwrap();
        let whole = IoVec::from(&buf);
        assert!(whole.is_aligned(4096));
        assert!(whole.slice(4096, 4096).is_aligned(4096));
        assert!(!whole.slice(1, 4096).is_aligned(512), "address");
        assert!(!whole.slice(0, 4095).is_aligned(512), "length");
        assert!(whole.slice(512, 512).is_aligned(512));
        assert!(
            whole.slice(17, 0).is_aligned(4096),
            "nothing is always aligned"
        );
    }

    #[test]
    fn aligned_memory_is_zeroed_and_errors_are_values() {
        let mut buf = AlignedBuf::try_new(100, 64).unwrap();
        assert!(IoVec::from(&buf).is_zero());
        buf[99] = 1;
        assert!(!IoVec::from(&buf).is_zero());
        assert!(IoVec::from(&buf).slice(0, 99).is_zero());
        assert_eq!(AlignedBuf::try_new(0, 4096).unwrap().len(), 0);
        let error = AlignedBuf::try_new(isize::MAX as usize, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    #[should_panic(expected = "slice of 3 bytes at 8 leaves a buffer of 10 bytes")]
    fn slicing_past_the_end_is_refused() {
        let _ = IoVec::from(DIGITS).slice(8, 3);
    }

    #[test]
    fn buffers_may_cross_threads() {
        fn send_and_sync<T: Send + Sync>() {}
        send_and_sync::<IoVec<'static>>();
        send_and_sync::<IoVecMut<'static>>();
        send_and_sync::<AlignedBuf>();
    }
}
