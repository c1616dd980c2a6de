//! Gives the memory of idle coroutine stacks back when the loop has been quiet for a while.
//!
//! ```text
//!   about to sleep, many idle stacks --> sleeps 100 ms at most --> nothing came: a batch is trimmed,
//!             ^                                                    events are looked for, and so on
//!             +---- anything that is progress <------------------- until nothing is left to trim
//! ```
//! A loop of somebody else's ([`Home::dispatch`](crate::Home::dispatch)) does not sleep here, and
//! calls `coblock_coroutine::trim_idle` itself.

use std::cell::Cell;

/// How long nothing must happen.
const QUIET_NS: u64 = 100_000_000;
/// Fewer idle stacks than this are not worth waking up for.
const WORTH: usize = 64;
/// Stacks that are trimmed before events are looked for again: some 20 us.
const BATCH: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Something happened since the last look.
    #[default]
    Busy,
    /// This sleep is a short one, to see whether nothing happens.
    Waits,
    /// It was quiet, and everything is trimmed.
    Clean,
}

/// State of one home.
#[derive(Default)]
pub(crate) struct Trimmer {
    state: Cell<State>,
}

impl Trimmer {
    /// The loop is about to wait so long (`None`: for ever); tells how long it may.
    #[inline]
    pub fn before_sleep(&self, timeout: Option<u64>) -> Option<u64> {
        let short = timeout.is_some_and(|ns| ns <= QUIET_NS);
        match self.state.get() {
            State::Clean => timeout,
            State::Busy if short || coblock_coroutine::idle_stacks() < WORTH => timeout,
            State::Busy => self.wait_and_see(),
            State::Waits => self.trim(timeout),
        }
    }

    #[cold]
    fn wait_and_see(&self) -> Option<u64> {
        self.state.set(State::Waits);
        Some(QUIET_NS)
    }

    #[cold]
    fn trim(&self, timeout: Option<u64>) -> Option<u64> {
        if coblock_coroutine::trim_idle(BATCH) == BATCH {
            return Some(0);
        }
        self.state.set(State::Clean);
        timeout
    }

    /// A pass has made progress.
    #[inline]
    pub fn progress(&self) {
        self.state.set(State::Busy);
    }
}
