//! What time it is: the machine's monotonic clock, or one that a simulator turns.
//!
//! All times are nanoseconds since some start that never changes within a process.

use crate::context::AioContext;
use crate::sys::event::monotonic_ns;
use coblock_coroutine::ThreadLock;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// A clock that timers can run by.
#[derive(Clone, Debug, Default)]
pub enum Clock {
    /// The machine's monotonic clock.
    #[default]
    Real,
    /// One that stands until somebody advances it.
    Virtual(VirtualClock),
}

impl Clock {
    /// Nanoseconds. Any thread.
    pub fn now_ns(&self) -> u64 {
        match self {
            Clock::Real => monotonic_ns(),
            Clock::Virtual(clock) => clock.now_ns(),
        }
    }

    /// Do both show the same time at all times?
    pub fn is_same(&self, other: &Clock) -> bool {
        match (self, other) {
            (Clock::Real, Clock::Real) => true,
            (Clock::Virtual(a), Clock::Virtual(b)) => Arc::ptr_eq(&a.shared, &b.shared),
            _ => false,
        }
    }
}

/// A clock that starts at zero and stands until somebody advances it. Clones show the same time.
#[derive(Clone, Default)]
pub struct VirtualClock {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    now_ns: AtomicU64,
    /// Contexts with timers on this clock, to be woken when it moves.
    contexts: ThreadLock<Vec<Weak<AioContext>>>,
}

impl VirtualClock {
    /// A new one, at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nanoseconds since it was made. Any thread.
    pub fn now_ns(&self) -> u64 {
        self.shared.now_ns.load(Ordering::Acquire)
    }

    /// Moves it forward and wakes the contexts that have timers on it. Any thread.
    pub fn advance(&self, by_ns: u64) {
        self.shared.now_ns.fetch_add(by_ns, Ordering::AcqRel);
        self.wake();
    }

    /// Moves it forward to `at_ns`; a clock that is there already stays.
    pub fn advance_to(&self, at_ns: u64) {
        self.shared.now_ns.fetch_max(at_ns, Ordering::AcqRel);
        self.wake();
    }

    fn wake(&self) {
        let contexts: Vec<_> = self
            .shared
            .contexts
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for context in contexts {
            context.notify();
        }
    }

    /// `context` has timers on this clock from now on.
    pub(crate) fn register(&self, context: &Arc<AioContext>) {
        let mut contexts = self.shared.contexts.lock();
        contexts.retain(|known| known.strong_count() > 0);
        if !contexts
            .iter()
            .any(|known| known.as_ptr() == Arc::as_ptr(context))
        {
            contexts.push(Arc::downgrade(context));
        }
    }
}

impl fmt::Debug for VirtualClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VirtualClock({} ns)", self.now_ns())
    }
}
