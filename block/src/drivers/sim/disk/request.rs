//! A request to a simulated disk, from being sent to its end: counted, hit by faults, held, delayed,
//! and done.

use super::{Logged, SimDisk, State};
use crate::drivers::sim::fault::{Fails, Op};
use crate::drivers::sim::log::{LogEntry, SECTOR, Sectors, apply};
use coblock_coroutine::Co;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What a request does to the disk.
pub(in crate::drivers::sim) enum Action<'a> {
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
    pub(in crate::drivers::sim) fn perform(
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

    fn end_entry(&mut self, index: usize, done: bool) {
        self.ended += 1;
        let ended = self.ended;
        let logged = &mut self.log[index];
        logged.ended = Some(ended);
        logged.done = done;
    }
}
