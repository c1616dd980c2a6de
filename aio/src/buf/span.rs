//! Which bytes a buffer is made of, and in which order: what sources and destinations share.

use std::ptr;

/// One contiguous piece of memory, laid out like `struct iovec`.
///
/// Only a description: copying it around is harmless, and using the address is `unsafe` everywhere.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RawSegment {
    /// Address of the first byte.
    pub base: *mut u8,
    /// Bytes.
    pub len: usize,
}

const _: () = {
    assert!(size_of::<RawSegment>() == size_of::<libc::iovec>());
    assert!(align_of::<RawSegment>() == align_of::<libc::iovec>());
    assert!(std::mem::offset_of!(RawSegment, base) == std::mem::offset_of!(libc::iovec, iov_base));
    assert!(std::mem::offset_of!(RawSegment, len) == std::mem::offset_of!(libc::iovec, iov_len));
};

// SAFETY: an address and a length are plain numbers; every access through them is unsafe on its
// own.
unsafe impl Send for RawSegment {}
// SAFETY: as for Send, there is nothing shared behind a `&RawSegment` but two numbers.
unsafe impl Sync for RawSegment {}

impl RawSegment {
    const EMPTY: RawSegment = RawSegment {
        base: ptr::null_mut(),
        len: 0,
    };
}

/// What [`IoVec`](super::IoVec) and [`IoVecMut`](super::IoVecMut) have in common: which bytes, in
/// which order.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    /// Cut at the front and at the back, so its length never exceeds `len`.
    first: RawSegment,
    /// May reach beyond the end of the span: only `len` says where that is.
    rest: &'a [RawSegment],
    pub(super) len: usize,
}

impl<'a> Span<'a> {
    pub(super) fn one(base: *mut u8, len: usize) -> Self {
        Span {
            first: RawSegment { base, len },
            rest: &[],
            len,
        }
    }

    pub(super) fn list(segments: &'a [RawSegment]) -> Self {
        let len = segments.iter().fold(0usize, |sum, s| {
            sum.checked_add(s.len)
                .expect("a scatter list is shorter than the address space")
        });
        match segments.split_first() {
            Some((first, rest)) => Span {
                first: *first,
                rest,
                len,
            },
            None => Span {
                first: RawSegment::EMPTY,
                rest: &[],
                len: 0,
            },
        }
    }

    #[inline(always)]
    pub(super) fn slice(self, offset: usize, len: usize) -> Self {
        // What most requests ask for.
        if offset == 0 && len == self.len {
            return self;
        }
        self.part(offset, len)
    }

    fn part(self, offset: usize, len: usize) -> Self {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "slice of {len} bytes at {offset} leaves a buffer of {} bytes",
            self.len
        );
        let (mut first, mut rest, mut skip) = (self.first, self.rest, offset);
        while skip >= first.len {
            skip -= first.len;
            match rest.split_first() {
                Some((next, tail)) => (first, rest) = (*next, tail),
                // Only an empty slice at the very end comes here: the bounds were checked above.
                None => {
                    return Span {
                        first: RawSegment::EMPTY,
                        rest: &[],
                        len: 0,
                    };
                }
            }
        }
        let first_len = (first.len - skip).min(len);
        let base = first.base.wrapping_add(skip);
        let rest = if first_len == len { &[] } else { rest };
        Span {
            first: RawSegment {
                base,
                len: first_len,
            },
            rest,
            len,
        }
    }

    /// The whole, if it is one piece.
    #[inline(always)]
    pub(super) fn single(self) -> Option<RawSegment> {
        (self.first.len == self.len).then_some(self.first)
    }

    pub(super) fn segments(self) -> Segments<'a> {
        Segments {
            next: self.first,
            rest: self.rest,
            left: self.len,
        }
    }

    pub(super) fn is_aligned(self, mem_align: usize) -> bool {
        assert!(
            mem_align.is_power_of_two(),
            "memory alignment {mem_align} is no power of two"
        );
        self.segments()
            .all(|s| (s.base.addr() | s.len) & (mem_align - 1) == 0)
    }
}

/// The segments of a buffer in order, cut to it; empty ones are left out.
#[derive(Clone)]
pub struct Segments<'a> {
    next: RawSegment,
    rest: &'a [RawSegment],
    left: usize,
}

impl Iterator for Segments<'_> {
    type Item = RawSegment;

    fn next(&mut self) -> Option<RawSegment> {
        while self.left > 0 {
            let now = RawSegment {
                base: self.next.base,
                len: self.next.len.min(self.left),
            };
            self.left -= now.len;
            if let Some((next, tail)) = self.rest.split_first() {
                (self.next, self.rest) = (*next, tail);
            }
            if now.len > 0 {
                return Some(now);
            }
        }
        None
    }
}
