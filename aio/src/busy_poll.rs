//! Asking descriptors instead of waiting for them: less latency for more CPU (rule 3.5).
//!
//! Off unless [`Home::set_busy_poll`](crate::Home::set_busy_poll) gives a limit, and only while
//! every handler of the context can be asked. The time tunes itself as in the original: a wait that
//! ended within the limit would have been found by asking, so the time grows (from 4 us, doubling);
//! one that took longer would not, so the time falls back to zero.

use crate::context::AioContext;
use crate::fd_handler::ReadyList;
use crate::sys::event::monotonic_ns;
use std::cell::Cell;
use std::time::Duration;

/// First step of the time, in nanoseconds.
const FIRST_NS: u64 = 4_000;

/// State of one home.
#[derive(Default)]
pub(crate) struct BusyPoll {
    max_ns: Cell<u64>,
    /// How long to ask at present.
    now_ns: Cell<u64>,
}

impl BusyPoll {
    pub fn set_max(&self, max: Duration) {
        self.max_ns
            .set(u64::try_from(max.as_nanos()).unwrap_or(u64::MAX));
        self.now_ns.set(0);
    }

    /// Asks for a while; tells whether one is ready. `timeout`: as long as the loop would wait.
    pub fn ask(&self, context: &AioContext, ready: &ReadyList, timeout: Option<u64>) -> bool {
        if self.max_ns.get() == 0 || !context.handlers.can_busy_poll() {
            return false;
        }
        let slots = context.handlers.askable();
        let end = monotonic_ns().saturating_add(self.now_ns.get().min(timeout.unwrap_or(u64::MAX)));
        loop {
            if ready.ask(&context.handlers, &slots) {
                return true;
            }
            if !context.remote.is_empty() || monotonic_ns() >= end {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// A wait with this time-out begins; gives what [`sleep_ended`](Self::sleep_ended) wants.
    pub fn sleep_begins(&self, timeout: Option<u64>) -> Option<u64> {
        (self.max_ns.get() > 0 && timeout != Some(0)).then(monotonic_ns)
    }

    pub fn sleep_ended(&self, began: Option<u64>) {
        let Some(began) = began else { return };
        let slept = monotonic_ns().saturating_sub(began);
        let next = match slept {
            _ if slept > self.max_ns.get() => 0,
            _ => (self.now_ns.get() * 2).clamp(FIRST_NS.min(self.max_ns.get()), self.max_ns.get()),
        };
        self.now_ns.set(next);
    }
}
