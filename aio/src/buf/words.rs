//! Words that many threads read and change, in memory that can be given back and used again.
//!
//! Readers that look without any lock may come at any time, so such memory is never unmapped while
//! its owner lives. But its pages can be taken from the process: they read as zeros then, and come
//! back when they are written.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A fixed number of atomic words, zero when made.
pub struct AtomicWords {
    base: NonNull<AtomicU64>,
    len: usize,
    /// What they lie in, with others.
    _memory: Arc<Memory>,
}

// SAFETY: these words have this one owner, and atomic words may be used from any thread.
unsafe impl Send for AtomicWords {}
// SAFETY: `&AtomicWords` gives only `&[AtomicU64]`, which may be shared.
unsafe impl Sync for AtomicWords {}

impl AtomicWords {
    /// `count` times `len` words of zero; each on pages of their own where they fill whole pages.
    ///
    /// They are one mapping, whose pages are there at once (each would cost a page fault at its first
    /// word), and which goes when all of them are gone.
    ///
    /// # Panics
    /// None asked for, or more than a machine can have.
    pub fn several(count: usize, len: usize) -> impl Iterator<Item = AtomicWords> {
        let words = count.checked_mul(len);
        let words = words.expect("more words than a machine can have");
        let memory = Arc::new(Memory::new(words));
        (0..count).map(move |nth| {
            // SAFETY: the memory has room for `count` times `len` words, and `nth` is below `count`.
            let base = unsafe { memory.base.add(nth * len) };
            AtomicWords {
                base,
                len,
                _memory: memory.clone(),
            }
        })
    }

    /// Gives the pages back to the system: all words are zero afterwards. Who reads meanwhile sees
    /// old words or zeros. `false`: nothing happened, because they do not fill whole pages, or the
    /// system refused.
    pub fn give_back(&self) -> bool {
        // SAFETY: sysconf takes an integer and touches no memory of ours.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let bytes = size_of_val::<[AtomicU64]>(self);
        if !usize::try_from(page).is_ok_and(|page| page > 0 && bytes.is_multiple_of(page)) {
            return false;
        }
        let base = self.base.as_ptr().cast();
        // SAFETY: the range is a part of a mapping of ours, anonymous memory, and whole pages of it,
        // since all pieces have this size; it holds nothing but these words. To the program it is as
        // if another thread stored zeros to them, which atomic words allow.
        unsafe { libc::madvise(base, bytes, libc::MADV_DONTNEED) == 0 }
    }
}

/// The memory of several [`AtomicWords`].
struct Memory {
    base: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: as for `AtomicWords`: atomic words may be used, and the memory freed, from any thread.
unsafe impl Send for Memory {}
// SAFETY: nothing changes through `&Memory`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeros for so many words.
    fn new(words: usize) -> Self {
        let layout = Layout::array::<AtomicU64>(words).expect("more words than a machine can have");
        assert!(layout.size() > 0, "no words");
        // SAFETY: a new anonymous mapping touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                layout.size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        let base = if base == libc::MAP_FAILED {
            None
        } else {
            NonNull::new(base.cast())
        };
        let Some(base) = base else {
            handle_alloc_error(layout);
        };
        Memory {
            base,
            bytes: layout.size(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and unmapped only here, when no `AtomicWords` is
        // left that lies in it.
        let unmapped = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(unmapped, 0, "a mapping of ours");
    }
}

impl Deref for AtomicWords {
    type Target = [AtomicU64];

    #[inline(always)]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `base` is valid for `len` words, which were zeroed when allocated, as long as
        // `_memory` lives, which `self` owns a part of.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
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
            let several: Vec<AtomicWords> = AtomicWords::several(3, len).collect();
            let all = |words: &AtomicWords, is| words.iter().all(|w| w.load(Relaxed) == is);
            assert!(
                several
                    .iter()
                    .all(|words| words.len() == len && all(words, 0))
            );
            let [before, words, after] = &several[..] else {
                panic!("three were asked for");
            };
            for round in 1..3 {
                for words in &several {
                    words.iter().for_each(|w| w.store(round, Relaxed));
                }
                // On larger pages nothing is whole.
                let given = words.give_back();
                assert!(whole || !given, "{len}");
                let left = if given { 0 } else { round };
                assert!(all(words, left), "{len}");
                assert!(all(before, round) && all(after, round), "{len}: beside it");
            }
        }
    }
}
