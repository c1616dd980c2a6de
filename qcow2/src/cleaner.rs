//! Slices that nobody used for a while give their memory back.
//!
//! A timer of the graph's main context looks at both caches once an interval. A slice that was
//! neither used nor changed since the look before goes; so one stays for at least an interval after
//! its last use, and for two at most. (The reference's `cache-clean-interval`.)

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use coblock_aio::{AioContext, Timer};

use crate::cache::SliceCache;

/// The timer, while it lives.
pub(crate) struct Cleaner {
    caches: [Arc<SliceCache>; 2],
    interval: Duration,
    /// Set once, when it is made.
    timer: OnceLock<Timer>,
}

impl Cleaner {
    /// Looks at `caches` every `interval`; never, if that is zero.
    pub(crate) fn start(
        context: &Arc<AioContext>,
        caches: [Arc<SliceCache>; 2],
        interval: Duration,
    ) -> Option<Arc<Cleaner>> {
        if interval.is_zero() {
            return None;
        }
        let cleaner = Arc::new(Cleaner {
            caches,
            interval,
            timer: OnceLock::new(),
        });
        let weak = Arc::downgrade(&cleaner);
        let timer = context.timer("cache-clean-interval", move || {
            if let Some(cleaner) = weak.upgrade() {
                cleaner.look();
            }
        });
        timer.arm_in(interval);
        assert!(cleaner.timer.set(timer).is_ok(), "made a line above");
        Some(cleaner)
    }

    fn look(&self) {
        for cache in &self.caches {
            cache.clean_unused();
        }
        if let Some(timer) = self.timer.get() {
            timer.arm_in(self.interval);
        }
    }

    /// No look comes after this one, if one is under way.
    pub(crate) fn stop(&self) {
        if let Some(timer) = self.timer.get() {
            timer.disarm();
        }
    }
}
