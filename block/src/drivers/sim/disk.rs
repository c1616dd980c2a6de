//! A disk in memory that remembers everything: contents, the log of what it was sent, and what a
//! power cut would leave.
//!
//! ```text
//!   log      W1 W2 W3 F(1,2) W4 W5 | cut          durable W1 W2, pending W3 W4 W5
//!   after    durable, and of the pending any choice of 512-byte sectors ([`Keep`])
//! ```
//! A write is logged when it is *sent*: it may arrive before it is reported. A flush is logged at
//! its *end*, with the writes that had ended when it *began*: those it covers. A write that failed
//! stays pending for ever. `request` has one request's way through the disk.

mod request;

pub(super) use request::Action;

use super::cut::PowerCuts;
use super::fault::{Fault, Held, Match, Op};
use super::log::{Keep, LogEntry, Rng};
use super::pages::Pages;
use crate::event::Event;
use coblock_coroutine::ThreadLock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// How many requests the disk has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Zero requests.
    pub zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Changes of the length.
    pub resizes: u64,
    /// Questions about block status.
    pub statuses: u64,
}

#[derive(Clone)]
pub(super) struct Logged {
    pub(super) entry: LogEntry,
    number: u64,
    /// Place in the order in which requests ended; `None` while in flight.
    pub(super) ended: Option<u64>,
    /// Ended well: a flush that begins now covers it.
    done: bool,
}

#[derive(Default)]
pub(super) struct State {
    /// What was durable before the log begins.
    pub(super) base: Pages,
    pub(super) base_len: u64,
    now: Pages,
    len: u64,
    pub(super) log: Vec<Logged>,
    /// Numbers the log's entries.
    order: Option<Arc<AtomicU64>>,
    ended: u64,
    pub(super) faults: Vec<Fault>,
    pub(super) holds: Vec<Arc<Held>>,
    delay: Option<(Rng, u64)>,
    powered_off: bool,
    counts: Counts,
    in_flight: usize,
    most_in_flight: usize,
    /// How often the driver above came to each point.
    events: BTreeMap<Event, u64>,
    /// Coroutines whose requests a fault has hit.
    hits: Vec<(u64, Op)>,
}

/// A simulated disk. Shared: nodes come and go, the disk and its log stay.
#[derive(Default)]
pub struct SimDisk {
    pub(super) state: ThreadLock<State>,
}

impl SimDisk {
    /// Zeros, `len` bytes of them.
    pub fn new(len: u64) -> Arc<SimDisk> {
        SimDisk::from_state(State {
            base_len: len,
            len,
            ..State::default()
        })
    }

    /// Holding `contents`, all durable.
    pub fn with_contents(contents: &[u8]) -> Arc<SimDisk> {
        let mut now = Pages::default();
        now.write(0, contents);
        let len = contents.len() as u64;
        SimDisk::from_state(State::holding(now, len))
    }

    pub(super) fn from_state(state: State) -> Arc<SimDisk> {
        Arc::new(SimDisk {
            state: ThreadLock::new(state),
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.state.lock().len
    }

    /// Is it zero bytes long?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a read of `len` bytes at `offset` would return now, past any request in flight.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.state.lock().now.read(offset, &mut bytes);
        bytes
    }

    /// Was anything written at `offset`, and of how many of the bytes up to the end is that true?
    /// Nothing at the end. A disk of many holes can be copied with this.
    pub fn extent(&self, offset: u64) -> Option<(bool, u64)> {
        let state = self.state.lock();
        let left = state.len.checked_sub(offset).filter(|left| *left > 0)?;
        Some(state.now.status(offset, left))
    }

    /// Everything on it now.
    ///
    /// # Panics
    /// When it is longer than memory.
    pub fn contents(&self) -> Vec<u8> {
        let len = usize::try_from(self.len()).expect("a disk that fits into memory");
        self.peek(0, len)
    }

    /// Changes contents behind everybody's back, durably.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state.lock();
        state.now.write(offset, bytes);
        state.base.write(offset, bytes);
        let end = offset + bytes.len() as u64;
        state.len = state.len.max(end);
        state.base_len = state.base_len.max(end);
    }

    /// How many requests it has seen.
    pub fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// The most requests that were in it at the same time.
    pub fn most_in_flight(&self) -> usize {
        self.state.lock().most_in_flight
    }

    /// How many requests are in it now.
    pub fn in_flight(&self) -> usize {
        self.state.lock().in_flight
    }

    /// How many entries the log has.
    pub fn log_len(&self) -> usize {
        self.state.lock().log.len()
    }

    /// The log: writes in the order in which they were sent, flushes at their end.
    pub fn log(&self) -> Vec<LogEntry> {
        self.state
            .lock()
            .log
            .iter()
            .map(|logged| logged.entry.clone())
            .collect()
    }

    /// From now on entries of the log get their numbers from `order`, which other disks may share.
    pub fn number_by(&self, order: &Arc<AtomicU64>) {
        self.state.lock().order = Some(order.clone());
    }

    /// The number of each entry of the log: its place, unless [`SimDisk::number_by`] says otherwise.
    pub fn numbers(&self) -> Vec<u64> {
        let state = self.state.lock();
        state.log.iter().map(|logged| logged.number).collect()
    }

    /// Forgets the log: everything on the disk now counts as durable.
    ///
    /// # Panics
    /// With requests in flight.
    pub fn checkpoint(&self) {
        let mut state = self.state.lock();
        assert_eq!(state.in_flight, 0, "a checkpoint with requests in flight");
        state.base = state.now.clone();
        state.base_len = state.len;
        state.log.clear();
    }

    /// From now on every request takes up to `most` of its context's time, by seed: so they end in
    /// another order than they were sent. Zero ends that.
    pub fn delay(&self, seed: u64, most: Duration) {
        let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        self.state.lock().delay = (most > 0).then_some((Rng(seed), most));
    }

    /// From now on requests fail as `fault` says; earlier faults go first.
    pub fn fail(&self, fault: Fault) {
        self.state.lock().faults.push(fault);
    }

    /// How often the driver above came to each named point.
    pub fn events(&self) -> BTreeMap<Event, u64> {
        self.state.lock().events.clone()
    }

    pub(super) fn event(&self, event: Event) {
        let mut state = self.state.lock();
        *state.events.entry(event).or_default() += 1;
        state.faults.iter_mut().for_each(|fault| fault.reach(event));
    }

    /// Coroutines whose requests faults have hit since the last call, by number, and what these
    /// requests were.
    pub fn take_hits(&self) -> Vec<(u64, Op)> {
        std::mem::take(&mut self.state.lock().hits)
    }

    /// Gives back what [`SimDisk::take_hits`] returned, for somebody else.
    pub fn put_hits(&self, hits: Vec<(u64, Op)>) {
        self.state.lock().hits.extend(hits);
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        self.state.lock().faults.clear();
    }

    /// From now on requests that match wait until the answer lets them go. Dropping it lets all go.
    pub fn hold(self: &Arc<Self>, what: Match) -> super::Hold {
        let held = Arc::new(Held::new(what));
        self.state.lock().holds.push(held.clone());
        super::Hold::new(self.clone(), held)
    }

    /// Loses power: requests in flight and all later ones fail. What is left is on
    /// [`SimDisk::after_power_cut`].
    pub fn power_off(&self) {
        self.state.lock().powered_off = true;
    }

    /// How many entries of the first `at` of the log are pending.
    pub fn pending_at(&self, at: usize) -> usize {
        let mut cuts = self.power_cuts();
        cuts.go_to(at);
        cuts.pending()
    }

    /// The disk after a power cut when it had been sent the first `at` entries of the log: what was
    /// durable then, and of the rest what `keep` says. A disk of its own, with an empty log.
    pub fn after_power_cut(&self, at: usize, keep: &Keep) -> Arc<SimDisk> {
        let mut cuts = self.power_cuts();
        cuts.go_to(at);
        cuts.left(keep).0
    }

    /// All power cuts of the log as it is now.
    pub fn power_cuts(&self) -> PowerCuts {
        PowerCuts::new(&self.state.lock())
    }
}

impl State {
    /// With these contents, all durable.
    pub(super) fn holding(contents: Pages, len: u64) -> State {
        State {
            base: contents.clone(),
            base_len: len,
            now: contents,
            len,
            ..State::default()
        }
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("SimDisk")
            .field("len", &state.len)
            .field("log", &state.log.len())
            .field("in_flight", &state.in_flight)
            .field("powered_off", &state.powered_off)
            .finish_non_exhaustive()
    }
}
