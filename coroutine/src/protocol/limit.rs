//! How many stacks there may be: taken before they are made, given back where making them failed.
//!
//! Several threads may take at once (each size has a lock of its own), and the limit may change at
//! any time. What counts is one word, so that never more are taken than the limit leaves.

use super::sync::{AtomicU64, Ordering};

/// A limit, and how much of it is taken.
pub(crate) struct Limit {
    pub(crate) taken: AtomicU64,
    pub(crate) most: AtomicU64,
}

impl Limit {
    /// Takes up to `want`; how many there were to be had.
    pub(crate) fn take(&self, want: u64) -> u64 {
        let most = self.most.load(Ordering::Relaxed);
        let mut got = 0;
        let _ = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                got = most.saturating_sub(taken).min(want);
                Some(taken + got)
            });
        got
    }

    /// Gives back some of what was taken.
    pub(crate) fn give_back(&self, unused: u64) {
        self.taken.fetch_sub(unused, Ordering::Relaxed);
    }

    /// The limit as it is now.
    pub(crate) fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}
