//! "This life has been handed to its home": many wakers, one hand-over.
//!
//! ```text
//!   waker (any thread)                          home
//!     1. makes its condition true                 4. clears the mark
//!     2. set(life)                                5. resumes: the coroutine looks at its condition
//!     3. first one: schedules
//! ```
//! Either a waker finds no mark and schedules, or it finds one that the home has not cleared yet;
//! then 1 happens before 5, because 2 and 4 are read-modify-writes of the same word. So no wake is
//! lost, and at most one hand-over per life is under way from here.
//!
//! The slot may be living its next life when a late waker comes by: a mark of another life is no
//! mark. Overwriting one costs at most a second, spurious hand-over.

use super::sync::{AtomicU64, Ordering};

/// The life that is on its way to its home, or 0.
pub(crate) struct WakeMark(AtomicU64);

impl WakeMark {
    pub(crate) fn new() -> WakeMark {
        WakeMark(AtomicU64::new(0))
    }

    /// Marks `life`. True: it was not marked, the caller hands it over.
    pub(crate) fn set(&self, life: u64) -> bool {
        self.0.swap(life, Ordering::AcqRel) != life
    }

    /// Takes the mark of `life` away, if it is there: on the home, before the resume.
    pub(crate) fn clear(&self, life: u64) {
        // A mark of another life is not ours to clear.
        let _ = self
            .0
            .compare_exchange(life, 0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether `life` is on its way to its home.
    pub(crate) fn is_set(&self, life: u64) -> bool {
        self.0.load(Ordering::Acquire) == life
    }
}
