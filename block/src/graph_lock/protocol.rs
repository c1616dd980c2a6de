//! The words of the graph lock that its fast path touches, and in which order.
//!
//! This file is compiled twice: in the crate over the real atomics with asymmetric fences, and in
//! `tests/loom_graph_lock.rs` over loom's with sequentially consistent fences on both sides, which
//! is what the pair amounts to. The includer provides `super::sync`.
//!
//! ```text
//!   reader                                     writer (slow, rare)
//!   count += 1        plain, own context's     owns = true
//!   light_fence       compiler only            heavy_fence      membarrier: as if every reader had fenced
//!   owns?  no: in                              sum == 0?  yes: alone
//!   ...
//!   count -= 1        of the context it is in now
//!   light_fence
//!   waits? yes: kick the writer
//! ```
//! Either the reader sees `owns`, or the writer sees its count (rule 7.2). Counts wrap, and one
//! alone means nothing: a coroutine may have moved between its raise and its lower (rule 7.3).

use super::sync::{AtomicBool, AtomicU32, Ordering, light_fence};
use coblock_coroutine::mutant;

/// Readers that one context let in, less those that left in it. Stored to by its home only.
pub(crate) struct ReaderCount(AtomicU32);

impl ReaderCount {
    /// Of a new context: zero (rule 7.1).
    pub(crate) fn new() -> Self {
        ReaderCount(AtomicU32::new(0))
    }

    #[inline]
    fn add(&self, change: u32) {
        // A plain load and store, no read-modify-write: only the home of this context stores here.
        let count = self.0.load(Ordering::Relaxed).wrapping_add(change);
        self.0.store(count, Ordering::Release);
    }

    /// The count of a context that died, leaving zero for the next one (rule 7.4). Its home is
    /// gone.
    pub(crate) fn retire(&self) -> u32 {
        let count = self.0.load(Ordering::Acquire);
        self.0.store(0, Ordering::Relaxed);
        count
    }

    /// For a sum.
    pub(crate) fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}

/// "A writer waits" and "a writer owns" are two flags (rule 7.5).
pub(crate) struct WriterFlags {
    /// How many writers wait: readers that leave kick them. More than one where a callback that
    /// runs while one waits wants to write, too.
    waits: AtomicU32,
    /// Readers do not come in.
    owns: AtomicBool,
}

impl WriterFlags {
    pub(crate) fn new() -> Self {
        WriterFlags {
            waits: AtomicU32::new(0),
            owns: AtomicBool::new(false),
        }
    }

    /// Does a writer own the graph?
    #[inline]
    pub(crate) fn owned(&self) -> bool {
        self.owns.load(Ordering::Acquire)
            || mutant!("readers wait for a writer that waits") && self.waited()
    }

    /// Does a writer want to be kicked?
    #[inline]
    pub(crate) fn waited(&self) -> bool {
        self.waits.load(Ordering::Acquire) != 0
    }
}

/// Rule 7.2, fast path: raises the context's own count. `false` means that a writer was seen and
/// that the caller, still counted, goes the slow way.
#[inline]
pub(crate) fn enter(count: &ReaderCount, flags: &WriterFlags) -> bool {
    count.add(1);
    light_fence();
    !flags.owned()
}

/// Rule 7.3: lowers the count of the context that the reader runs in now. `true`: kick the writer.
#[inline]
#[must_use]
pub(crate) fn leave(count: &ReaderCount, flags: &WriterFlags) -> bool {
    count.add(u32::MAX);
    light_fence();
    flags.waited()
}

/// Readers of all contexts, and those that dead ones left behind. Wrapping, and exact only with the
/// writer's flag set; before that it is a hint, and may be low (rule 7.3).
pub(crate) fn sum<'a>(counts: impl Iterator<Item = &'a ReaderCount>, orphans: u32) -> u32 {
    counts.fold(orphans, |sum, count| sum.wrapping_add(count.get()))
}

/// The writer's half: what rule 7.5 does with these words.
pub(crate) mod writer {
    use super::super::sync::heavy_fence;
    use super::{Ordering, ReaderCount, WriterFlags, mutant, sum};

    /// One more writer waits: from here on every reader that leaves kicks.
    pub(crate) fn announce(flags: &WriterFlags) {
        flags.waits.fetch_add(1, Ordering::SeqCst);
        heavy_fence();
    }

    /// One writer less waits.
    pub(crate) fn retract(flags: &WriterFlags) {
        flags.waits.fetch_sub(1, Ordering::SeqCst);
    }

    /// Is it worth trying? A scan that reads low says yes, and the exact one then decides (rule
    /// 7.3).
    pub(crate) fn looks_free(sum: u32) -> bool {
        sum.cast_signed() <= 0
    }

    /// Sets the flag, fences, sums again; not zero: takes the flag back, and the caller wakes the
    /// queue. Under the mutex: no context dies between its count and the orphans.
    pub(crate) fn try_own<'a>(
        flags: &WriterFlags,
        counts: impl Iterator<Item = &'a ReaderCount>,
        orphans: u32,
    ) -> bool {
        flags.owns.store(true, Ordering::SeqCst);
        heavy_fence();
        let readers = match mutant!("a writer does not look again with its flag set") {
            true => 0,
            false => sum(counts, orphans),
        };
        // Exact with the flag set, so it can be read as a signed number: never below zero.
        assert!(
            readers < u32::MAX / 2,
            "the graph lock counts {readers:#x} readers"
        );
        if readers != 0 {
            flags.owns.store(false, Ordering::SeqCst);
        }
        readers == 0
    }

    /// Under the mutex of the queue; the caller wakes the queue afterwards.
    pub(crate) fn release(flags: &WriterFlags) {
        flags.owns.store(false, Ordering::SeqCst);
    }
}
