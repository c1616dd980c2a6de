//! Which requests of a simulated disk fail, and which wait.

use super::disk::SimDisk;
use crate::event::Event;
use coblock_coroutine::{Co, ThreadLock, WakeHandle};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What a request asks of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Op {
    Read,
    Write,
    Zero,
    Discard,
    Resize,
    Flush,
    Status,
}

/// A choice of requests.
#[derive(Clone, Debug)]
pub struct Match {
    ops: Vec<Op>,
    range: Option<Range<u64>>,
}

impl Match {
    /// All requests of these kinds.
    pub fn ops(ops: &[Op]) -> Match {
        Match {
            ops: ops.to_vec(),
            range: None,
        }
    }

    /// All requests.
    pub fn any() -> Match {
        Match::ops(&[
            Op::Read,
            Op::Write,
            Op::Zero,
            Op::Discard,
            Op::Resize,
            Op::Flush,
            Op::Status,
        ])
    }

    /// Reads.
    pub fn reads() -> Match {
        Match::ops(&[Op::Read])
    }

    /// Writes.
    pub fn writes() -> Match {
        Match::ops(&[Op::Write])
    }

    /// Flushes.
    pub fn flushes() -> Match {
        Match::ops(&[Op::Flush])
    }

    /// Questions about block status.
    pub fn statuses() -> Match {
        Match::ops(&[Op::Status])
    }

    /// Of these, the ones that touch `range`; flushes touch nothing.
    #[must_use]
    pub fn touching(mut self, range: Range<u64>) -> Match {
        self.range = Some(range);
        self
    }

    pub(super) fn matches(&self, op: Op, offset: u64, len: u64) -> bool {
        let touches =
            |range: &Range<u64>| offset < range.end && range.start < offset.saturating_add(len);
        self.ops.contains(&op) && self.range.as_ref().is_none_or(touches)
    }
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fails {
    Errno(i32),
    /// It transfers half of what it was asked to.
    Short,
}

/// Requests that fail.
///
/// `EINTR`, `EAGAIN` and short transfers are between the simulated file and its driver, which goes on
/// as the driver of real files does: whoever asked must not notice.
#[derive(Clone, Debug)]
pub struct Fault {
    what: Match,
    fails: Fails,
    /// So many that match go through first.
    skip: u64,
    /// So many fail then.
    times: u64,
    torn: u64,
    /// Not the requests themselves are counted but how often this point is reached; the next request
    /// that matches fails then.
    event: Option<Event>,
    armed: bool,
}

impl Fault {
    /// The first request that matches fails with `errno`; it only.
    pub fn new(what: Match, errno: i32) -> Fault {
        Fault::with(what, Fails::Errno(errno))
    }

    /// The first read or write that matches transfers half of what it was asked to; it only.
    pub fn short(what: Match) -> Fault {
        Fault::with(what, Fails::Short)
    }

    fn with(what: Match, fails: Fails) -> Fault {
        Fault {
            what,
            fails,
            skip: 0,
            times: 1,
            torn: 0,
            event: None,
            armed: false,
        }
    }

    /// `n` requests that match go through first.
    #[must_use]
    pub fn after(mut self, n: u64) -> Fault {
        self.skip = n;
        self
    }

    /// The next request that matches fails after the driver above came to `event`.
    #[must_use]
    pub fn at(mut self, event: Event) -> Fault {
        self.event = Some(event);
        self
    }

    /// The driver above has come to `event`.
    pub(super) fn reach(&mut self, event: Event) {
        if self.event == Some(event) {
            self.armed |= self.count();
        }
    }

    /// Is it the turn of this one?
    fn count(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if self.times == 0 {
            return false;
        }
        if self.times != u64::MAX {
            self.times -= 1;
        }
        true
    }

    /// `n` in a row fail.
    #[must_use]
    pub fn times(mut self, n: u64) -> Fault {
        self.times = n;
        self
    }

    /// From the first one on all fail.
    #[must_use]
    pub fn from_then_on(self) -> Fault {
        self.times(u64::MAX)
    }

    /// The first `bytes` of a write that fails arrive.
    #[must_use]
    pub fn torn(mut self, bytes: u64) -> Fault {
        self.torn = bytes;
        self
    }

    /// Does this request fail? How, and how much arrives.
    pub(super) fn hits(&mut self, op: Op, offset: u64, len: u64) -> Option<(Fails, u64)> {
        if !self.what.matches(op, offset, len) {
            return None;
        }
        let hits = match self.event {
            Some(_) => std::mem::take(&mut self.armed),
            None => self.count(),
        };
        if !hits {
            return None;
        }
        Some((self.fails, self.torn))
    }
}

#[derive(Default)]
struct Waiting {
    /// First sent, first released.
    queue: BTreeMap<u64, WakeHandle>,
    next: u64,
    /// Nobody waits here any more.
    open: bool,
}

/// Requests that wait.
pub(super) struct Held {
    pub(super) what: Match,
    waiting: ThreadLock<Waiting>,
}

impl Held {
    pub(super) fn new(what: Match) -> Held {
        Held {
            what,
            waiting: ThreadLock::new(Waiting::default()),
        }
    }

    pub(super) fn wait(&self, co: &Co) {
        let ticket = {
            let mut waiting = self.waiting.lock();
            if waiting.open {
                return;
            }
            let ticket = waiting.next;
            waiting.next += 1;
            waiting.queue.insert(ticket, co.wake_handle());
            ticket
        };
        while self.waiting.lock().queue.contains_key(&ticket) {
            co.suspend();
        }
    }
}

/// Keeps requests of a simulated disk waiting. Dropping it lets all of them go.
#[must_use = "dropped at once, it holds nothing"]
pub struct Hold {
    disk: Arc<SimDisk>,
    held: Arc<Held>,
}

impl Hold {
    pub(super) fn new(disk: Arc<SimDisk>, held: Arc<Held>) -> Hold {
        Hold { disk, held }
    }

    /// How many requests wait here.
    pub fn waiting(&self) -> usize {
        self.held.waiting.lock().queue.len()
    }

    /// Lets the `n`th of those that wait go, the oldest is 0. `false` if there is none.
    pub fn release(&self, n: usize) -> bool {
        let handle = {
            let mut waiting = self.held.waiting.lock();
            let Some(ticket) = waiting.queue.keys().nth(n).copied() else {
                return false;
            };
            waiting.queue.remove(&ticket)
        };
        handle.inspect(WakeHandle::wake).is_some()
    }

    /// Lets all that wait go; new ones wait again.
    pub fn release_all(&self) {
        let queue = std::mem::take(&mut self.held.waiting.lock().queue);
        queue.values().for_each(WakeHandle::wake);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.held.waiting.lock().open = true;
        self.disk
            .state
            .lock()
            .holds
            .retain(|held| !Arc::ptr_eq(held, &self.held));
        self.release_all();
    }
}
