//! A disk in memory that remembers everything: contents, the log of what it was sent, and what a
//! power cut would leave.
//!
//! ```text
//!   log      W1 W2 W3 F(1,2) W4 W5 | cut          durable W1 W2, pending W3 W4 W5
//!   after    durable, and of the pending any choice of 512-byte sectors ([`Keep`])
//! ```
//! A write is logged when it is *sent*: it may arrive before it is reported. A flush is logged at
//! its *end*, with the writes that had ended when it *began*: those it covers. A write that failed
//! stays pending for ever.

use super::cut::PowerCuts;
use super::fault::{Fails, Fault, Held, Match, Op};
use super::pages::Pages;
use crate::event::Event;
use coblock_coroutine::{Co, ThreadLock};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a disk writes in one piece, in bytes.
pub const SECTOR: u64 = 512;

/// What a disk was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// These bytes.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Zeros without bytes; also a discard.
    Zero {
        /// Where, in bytes.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The length became this.
    Resize {
        /// In bytes.
        len: u64,
    },
    /// The entries with these places in the log are on stable storage.
    Flush {
        /// In ascending order.
        covered: Vec<usize>,
    },
}

/// Which pending sectors survive a power cut.
#[derive(Clone, Debug)]
pub enum Keep {
    /// None.
    Nothing,
    /// All.
    Everything,
    /// All but the pending entry of that number.
    AllBut(usize),
    /// Everything but of the last write all after that many sectors.
    Torn(u64),
    /// Each sector for itself, by a seed.
    Seed(u64),
}

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

/// Numbers that depend on a seed and on nothing else.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    /// The next of a SplitMix64 sequence.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
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

pub(super) enum Sectors {
    All,
    First(u64),
    Seed(Rng),
}

impl Sectors {
    /// Each sector of entry `index` for itself.
    pub(super) fn by_seed(seed: u64, index: usize) -> Sectors {
        Sectors::Seed(Rng(
            seed ^ (index as u64).wrapping_mul(0x2545_f491_4f6c_dd1d)
        ))
    }

    fn keeps(&mut self, number: u64) -> bool {
        match self {
            Sectors::All => true,
            Sectors::First(count) => number < *count,
            Sectors::Seed(rng) => rng.next() & 1 == 0,
        }
    }
}

pub(super) fn apply(entry: &LogEntry, mut sectors: Sectors, pages: &mut Pages, len: &mut u64) {
    let (offset, count) = match entry {
        LogEntry::Write { offset, data } => (*offset, data.len() as u64),
        LogEntry::Zero { offset, len } => (*offset, *len),
        LogEntry::Resize { len: new } => {
            if sectors.keeps(0) {
                pages.zero(*new, u64::MAX);
                *len = *new;
            }
            return;
        }
        LogEntry::Flush { .. } => return,
    };
    if matches!(sectors, Sectors::All) {
        match entry {
            LogEntry::Write { data, .. } => pages.write(offset, data),
            _ => pages.zero(offset, offset + count),
        }
        *len = (*len).max(offset + count);
        return;
    }
    let mut at = 0;
    let mut number = 0;
    while at < count {
        // Sectors of the disk, not of the request.
        let next = ((offset + at) / SECTOR + 1) * SECTOR - offset;
        let end = next.min(count);
        if sectors.keeps(number) {
            match entry {
                LogEntry::Write { data, .. } => {
                    let part = usize::try_from(at).expect("in memory")
                        ..usize::try_from(end).expect("in memory");
                    pages.write(offset + at, &data[part]);
                }
                _ => pages.zero(offset + at, offset + end),
            }
            *len = (*len).max(offset + end);
        }
        at = end;
        number += 1;
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

    fn end_entry(&mut self, index: usize, done: bool) {
        self.ended += 1;
        let ended = self.ended;
        let logged = &mut self.log[index];
        logged.ended = Some(ended);
        logged.done = done;
    }
}

/// What a request does to the disk.
pub(super) enum Action<'a> {
    Read(&'a mut [u8]),
    Write {
        data: Vec<u8>,
        fua: bool,
    },
    Zero {
        len: u64,
    },
    Discard {
        len: u64,
    },
    Resize,
    Flush,
    /// What the first of `len` bytes are: data or not, and of how many that is true.
    Status {
        len: u64,
        answer: &'a mut (bool, u64),
    },
}

impl Action<'_> {
    fn op(&self) -> Op {
        match self {
            Action::Read(_) => Op::Read,
            Action::Write { .. } => Op::Write,
            Action::Zero { .. } => Op::Zero,
            Action::Discard { .. } => Op::Discard,
            Action::Resize => Op::Resize,
            Action::Flush => Op::Flush,
            Action::Status { .. } => Op::Status,
        }
    }

    /// Leaves about half of a transfer at `offset`, up to the end of a sector; returns how many
    /// bytes.
    fn shorten(&mut self, offset: u64) -> u64 {
        let middle = (offset + self.len() / 2).next_multiple_of(SECTOR);
        let half = usize::try_from(middle - offset).expect("in memory");
        match self {
            Action::Read(buf) => {
                let half = half.min(buf.len());
                *buf = &mut std::mem::take(buf)[..half];
            }
            Action::Write { data, .. } => data.truncate(half),
            _ => {}
        }
        self.len()
    }

    fn len(&self) -> u64 {
        match self {
            Action::Read(buf) => buf.len() as u64,
            Action::Write { data, .. } => data.len() as u64,
            Action::Zero { len } | Action::Discard { len } | Action::Status { len, .. } => *len,
            Action::Resize | Action::Flush => 0,
        }
    }
}

/// Counts a request while it is in the disk.
struct InDisk<'a>(&'a SimDisk);

impl Drop for InDisk<'_> {
    fn drop(&mut self) {
        self.0.state.lock().in_flight -= 1;
    }
}

impl SimDisk {
    /// One attempt at a request, from being sent to its end. `Err` is the errno, `Ok` what was
    /// transferred. `patient`: it waits rather than be interrupted or put off.
    pub(super) fn perform(
        &self,
        co: &Co,
        offset: u64,
        mut action: Action<'_>,
        patient: bool,
    ) -> Result<u64, i32> {
        let (op, mut len) = (action.op(), action.len());
        let (sent, fault, hold, pause) = {
            let mut state = self.state.lock();
            if state.powered_off {
                return Err(libc::EIO);
            }
            let count = match op {
                Op::Read => &mut state.counts.reads,
                Op::Write => &mut state.counts.writes,
                Op::Zero => &mut state.counts.zeroes,
                Op::Discard => &mut state.counts.discards,
                Op::Resize => &mut state.counts.resizes,
                Op::Flush => &mut state.counts.flushes,
                Op::Status => &mut state.counts.statuses,
            };
            *count += 1;
            state.in_flight += 1;
            state.most_in_flight = state.most_in_flight.max(state.in_flight);
            let fault = state
                .faults
                .iter_mut()
                .find_map(|fault| fault.hits(op, offset, len));
            let put_off = |fails| matches!(fails, Fails::Errno(libc::EINTR | libc::EAGAIN));
            let fault = fault.filter(|(fails, _)| !(patient && put_off(*fails)));
            if fault.is_some() {
                state.hits.push((co.id(), op));
            }
            if let Some((Fails::Short, _)) = fault {
                len = action.shorten(offset);
            }
            let hold = state
                .holds
                .iter()
                .find(|held| held.what.matches(op, offset, len))
                .cloned();
            let pause = state
                .delay
                .as_mut()
                .map(|(rng, most)| Duration::from_nanos(rng.next() % *most));
            let sent = state.send(&action, offset);
            (sent, fault, hold, pause)
        };
        let _in_disk = InDisk(self);
        if let Some(hold) = hold {
            hold.wait(co);
        }
        if let Some(pause) = pause {
            coblock_aio::co::sleep(co, pause);
        }
        let mut state = self.state.lock();
        if state.powered_off {
            return Err(libc::EIO);
        }
        if let Some((Fails::Errno(errno), torn)) = fault {
            state.tear(&sent, offset, torn);
            return Err(errno);
        }
        state.finish(sent, offset, &mut action);
        Ok(len)
    }
}

/// What was noted when a request was sent.
enum Sent {
    Nothing,
    /// Place in the log.
    Entry(usize),
    /// What a flush covers when it ends well.
    Covers(Vec<usize>),
}

impl State {
    fn send(&mut self, action: &Action<'_>, offset: u64) -> Sent {
        let entry = match action {
            Action::Read(_) | Action::Status { .. } => return Sent::Nothing,
            Action::Flush => {
                let done = self
                    .log
                    .iter()
                    .enumerate()
                    .filter(|(_, logged)| logged.done);
                return Sent::Covers(done.map(|(index, _)| index).collect());
            }
            Action::Write { data, .. } => LogEntry::Write {
                offset,
                data: data.clone(),
            },
            Action::Zero { len } | Action::Discard { len } => LogEntry::Zero { offset, len: *len },
            Action::Resize => LogEntry::Resize { len: offset },
        };
        let number = self.next_number();
        self.log.push(Logged {
            entry,
            number,
            ended: None,
            done: false,
        });
        Sent::Entry(self.log.len() - 1)
    }

    fn next_number(&self) -> u64 {
        match &self.order {
            Some(order) => order.fetch_add(1, Ordering::Relaxed),
            None => self.log.len() as u64,
        }
    }

    fn finish(&mut self, sent: Sent, offset: u64, action: &mut Action<'_>) {
        match action {
            Action::Read(buf) => return self.now.read(offset, buf),
            Action::Status { len, answer } => {
                **answer = self.now.status(offset, *len);
                return;
            }
            _ => {}
        }
        let covered = match sent {
            Sent::Nothing => return,
            Sent::Covers(covered) => covered,
            Sent::Entry(index) => {
                // A discard does not make the disk longer; the node keeps it inside.
                apply(
                    &self.log[index].entry,
                    Sectors::All,
                    &mut self.now,
                    &mut self.len,
                );
                self.end_entry(index, true);
                match action {
                    Action::Write { fua: true, .. } => vec![index],
                    _ => return,
                }
            }
        };
        self.ended += 1;
        let (ended, number) = (Some(self.ended), self.next_number());
        self.log.push(Logged {
            entry: LogEntry::Flush { covered },
            number,
            ended,
            done: false,
        });
    }

    /// A write failed: its first `torn` bytes arrived.
    fn tear(&mut self, sent: &Sent, offset: u64, torn: u64) {
        let Sent::Entry(index) = *sent else { return };
        if let LogEntry::Write { data, .. } = &self.log[index].entry {
            let arrived = data.len().min(usize::try_from(torn).unwrap_or(usize::MAX));
            if arrived > 0 {
                let part = data[..arrived].to_vec();
                self.now.write(offset, &part);
                self.len = self.len.max(offset + arrived as u64);
            }
        }
        self.end_entry(index, false);
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
