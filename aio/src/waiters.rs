//! Is there anybody whom a change has to wake? (Rule 3.8.)
//!
//! ```text
//!   waiter, rare                          changer, frequent
//!   count itself                          publish the change
//!   heavy fence                           light fence
//!   test the condition; wait while true   counted? wake the waiters
//! ```
//!
//! Of the two stores at least one is seen by the other side: either the waiter's test sees the
//! change, or the changer sees the count. Testing first and counting then would lose a change that
//! comes between.
//!
//! `super::sync` has the atomics and fences of this crate, or loom's where the protocol is
//! model-checked.

use super::sync::{AtomicU32, Ordering, heavy_fence, light_fence};

/// How many wait. Any thread.
#[derive(Debug)]
pub struct Waiters(AtomicU32);

impl Waiters {
    /// Nobody.
    pub fn new() -> Self {
        Waiters(AtomicU32::new(0))
    }

    /// Waiter: before its first test of the condition. It can be woken already.
    pub fn enter(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
        heavy_fence();
    }

    /// Waiter: after its last test.
    pub fn leave(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// Changer: what was to be published is published. True: somebody is to be woken.
    #[must_use]
    #[inline(always)]
    pub fn must_wake(&self) -> bool {
        light_fence();
        self.0.load(Ordering::Relaxed) > 0
    }
}
