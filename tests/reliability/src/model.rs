//! The disk that is too simple to be wrong: what may a byte of the guest's disk read as, now and
//! after a power cut?
//!
//! The disk is cut into *units* (512 bytes; smaller ones where a script wants unaligned requests).
//! Each write has a number, and stamps every unit it covers with that number and the unit's own
//! place. So the content of a unit tells which write put it there, and a unit that came from
//! elsewhere (another place, another run, half of one write and half of another) is no content at
//! all.
//!
//! Requests overlap in time, so a unit has a *set* of legal contents. Time is a counter that steps
//! at every begin and end. Write `a` is *before* write `b` if it ended before `b` began. A read
//! that began at `t` may return any write that began before the read's end, unless another write
//! came after it and ended before `t`. After a power cut the same holds with "was made durable" in
//! place of "ended": a flush that succeeded made durable what had ended before it began.
//!
//! ```text
//!   write 1  |------|                      a read in  (x)  may see 1 or 2: they overlap, both had ended
//!   write 2     |--------|                 a read in  (y)  may see 2 or 3, and 1, since 1 and 2 overlap
//!   write 3                    |------|    a read in  (z)  must see 3
//!                          (x)    (y)    (z)
//! ```
//!
//! Reads bind later reads, too: who has seen 2 at (x) shall not see 2, 1 and 2 again. So each unit is
//! a linearizable register; `model/order.rs` has the rule.
//!
//! Log positions tie this to a power cut: the simulated file counts what was sent to it, and every
//! event here notes that count.

mod content;
mod flat;
mod violation;

pub use content::{Content, MIN_UNIT, content, stamp};
pub use flat::{FlatDisk, assert_same};
pub use violation::Violation;

mod order;

use order::{Seen, Zone};

/// Number of a write. 0 is what the disk held before: zeros, or the stamp of a backing file.
pub type WriteId = u64;

/// What a write puts on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Puts {
    /// Its stamp.
    Stamp,
    /// Zeros.
    Zeros,
    /// Zeros where the disk likes, and what was there elsewhere: a discard.
    ZerosOrNothing,
    /// Zeros, once the disk is longer again: it was cut off. As long as that is not durable, the
    /// backing file may show instead.
    CutOff,
}

/// One write, as the model knows it.
#[derive(Clone, Copy, Debug)]
struct Write {
    puts: Puts,
    began: u64,
    /// Log position at its begin: nothing of it can be in the log before.
    began_log: usize,
    /// None while it is in flight.
    ended: Option<u64>,
    /// Log position from which it is durable by itself, without a flush.
    durable_log: Option<usize>,
    /// It failed, or nobody flushed it before the image was lost: its content may be there, wholly
    /// or in part, until another write came after its end.
    failed: bool,
}

/// A flush that succeeded.
#[derive(Clone, Copy, Debug)]
struct Flush {
    began: u64,
    /// Log position at its end: cut at or after it, it counts.
    ended_log: usize,
}

/// The history of a disk: [`FlatDisk`] says what the newest content is, this says what is allowed.
pub struct History {
    unit: usize,
    salt: u64,
    now: u64,
    /// By number; 0 is the content before the run.
    writes: Vec<Write>,
    /// For each unit, the writes that cover it, oldest begin first.
    units: Vec<Vec<WriteId>>,
    flushes: Vec<Flush>,
    /// For each unit, what reads have returned.
    seen: Vec<Seen>,
    /// What a unit holds before the first write: zeros, or a backing file's stamp.
    base: Vec<bool>,
    /// The disk's length in bytes is one more thing that is written, by resizes.
    lens: Vec<(WriteId, u64)>,
    /// Units that a backing file has.
    backing: usize,
    /// Snapshots are taken: a lower image may have any older write.
    layered: bool,
    /// May a read see half of a write that goes on at the same time?
    racing_reads: bool,
}

/// A read that has begun: what it may return is decided at its end.
#[must_use]
pub struct ReadToken {
    began: u64,
}

impl History {
    /// A disk of `size` bytes that reads as zeros.
    pub fn new(size: u64, unit: usize, salt: u64) -> Self {
        assert!(unit >= MIN_UNIT && unit.is_multiple_of(8) && size.is_multiple_of(unit as u64));
        let units = usize::try_from(size / unit as u64).expect("a small disk");
        History {
            unit,
            salt,
            now: 1,
            writes: vec![Write {
                puts: Puts::Stamp,
                began: 0,
                began_log: 0,
                ended: Some(0),
                durable_log: None,
                failed: false,
            }],
            lens: vec![(0, size)],
            backing: 0,
            layered: false,
            units: vec![vec![0]; units],
            seen: vec![Seen::default(); units],
            flushes: Vec::new(),
            base: vec![false; units],
            racing_reads: false,
        }
    }

    /// Says that a unit may read as a mixture while a write to it is in flight, and only then: so
    /// it is on the page cache, whose readers Linux does not keep out while it copies a writer's
    /// bytes.
    pub fn allow_racing_reads(&mut self) {
        self.racing_reads = true;
    }

    /// Says that the first `len` bytes held a backing file's stamp (write 0) before the run.
    pub fn set_base(&mut self, len: u64) {
        self.backing = usize::try_from(len / self.unit as u64).expect("a small disk");
        self.base[..self.backing].fill(true);
    }

    /// Says that snapshots are taken.
    pub fn set_layered(&mut self, layered: bool) {
        self.layered = layered;
    }

    /// Says that the units of `content` at `offset` were there before the run: stamps of write 0, or
    /// zeros.
    pub fn set_initial(&mut self, offset: u64, content: &[u8]) {
        let units = self.decode(offset, content);
        for (unit, found) in self.range(offset, content.len()).zip(units) {
            assert!(found != Content::Foreign, "nobody's content at {offset:#x}");
            self.base[unit] = found != Content::Zero;
        }
    }

    /// Bytes of one unit.
    pub fn unit(&self) -> usize {
        self.unit
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        (self.units.len() * self.unit) as u64
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn range(&self, offset: u64, len: usize) -> std::ops::Range<usize> {
        let first = usize::try_from(offset / self.unit as u64).expect("a small disk");
        first..first + len / self.unit
    }

    /// A write begins: gives its number and fills `buf` with its stamp.
    pub fn begin_write(&mut self, offset: u64, buf: &mut [u8], log: usize) -> WriteId {
        let id = self.begin(offset, buf.len(), log, Puts::Stamp);
        stamp(buf, offset, self.unit, self.salt, id);
        id
    }

    /// A request begins that writes zeros, or discards.
    pub fn begin_zeros(&mut self, offset: u64, len: usize, log: usize, puts: Puts) -> WriteId {
        assert!(puts != Puts::Stamp, "a stamp needs a buffer");
        self.begin(offset, len, log, puts)
    }

    fn begin(&mut self, offset: u64, len: usize, log: usize, puts: Puts) -> WriteId {
        let began = self.tick();
        let id = self.writes.len() as WriteId;
        self.writes.push(Write {
            puts,
            began,
            began_log: log,
            ended: None,
            durable_log: None,
            failed: false,
        });
        for unit in self.range(offset, len) {
            self.units[unit].push(id);
        }
        id
    }

    /// The write ended well.
    pub fn end_write(&mut self, id: WriteId) {
        let now = self.tick();
        self.writes[index(id)].ended = Some(now);
    }

    /// A resize to `len` bytes begins.
    pub fn begin_resize(&mut self, len: u64, log: usize) -> WriteId {
        let cut = usize::try_from(self.size().saturating_sub(len)).expect("a small disk");
        let id = self.begin(len.min(self.size()), cut, log, Puts::CutOff);
        self.lens.push((id, len));
        id
    }

    /// The write ended well, and is durable without a flush.
    pub fn end_durable_write(&mut self, id: WriteId, log: usize) {
        self.end_write(id);
        self.writes[index(id)].durable_log = Some(log);
    }

    /// The write was refused: nothing of it is there.
    pub fn take_back(&mut self, id: WriteId, offset: u64, len: usize) {
        self.end_write(id);
        for unit in self.range(offset, len) {
            self.units[unit].retain(|other| *other != id);
        }
    }

    /// The write failed: any part of it may be there, and may be gone at any time.
    pub fn fail_write(&mut self, id: WriteId) {
        self.end_write(id);
        self.writes[index(id)].failed = true;
    }

    /// The image was closed and could not write everything out: what no flush has made durable may
    /// be there or not.
    pub fn lose_unflushed(&mut self) {
        let now = self.tick();
        let durable = self.flushes.iter().map(|f| f.began).max().unwrap_or(1);
        for write in &mut self.writes {
            if write.ended.is_some_and(|e| e >= durable) && write.durable_log.is_none() {
                write.ended = Some(now);
                write.failed = true;
            }
        }
    }

    /// A read begins.
    pub fn begin_read(&mut self) -> ReadToken {
        ReadToken { began: self.tick() }
    }

    /// The read ended with `buf`: each unit must be something that it may see.
    pub fn end_read(
        &mut self,
        token: &ReadToken,
        offset: u64,
        buf: &[u8],
    ) -> Result<(), Violation> {
        let before = |w: &Write| w.ended.is_some_and(|e| e < token.began);
        let racing = |w: &Write| self.racing_reads && w.ended.is_none_or(|e| e > token.began);
        let units = self.decode(offset, buf);
        self.compare(offset, &units, usize::MAX, before, racing)
            .map_err(|mut violation| {
                if violation.found == Content::Foreign {
                    let at = usize::try_from(violation.offset - offset).expect("in the buffer");
                    let piece = &buf[at..at + self.unit];
                    let ids = &self.units[self.range(violation.offset, self.unit).start];
                    violation.mixture = self.mixture(piece, violation.offset, ids);
                }
                violation
            })?;
        let ended = self.tick();
        for (unit, &found) in self.range(offset, buf.len()).zip(&units) {
            if let Content::Stamp(id) = found {
                self.seen[unit].add(id, token.began, ended);
                self.in_order(unit, id)?;
            }
        }
        Ok(())
    }

    /// Is there an order of everything that went on at `unit` in which each read returned the newest
    /// write? `id` is what was seen last.
    fn in_order(&self, unit: usize, id: WriteId) -> Result<(), Violation> {
        let ids = &self.units[unit];
        let of = |id: WriteId| &self.writes[index(id)];
        // What was cut off may show what lies below until the resize has ended.
        if of(id).failed || ids.iter().any(|id| of(*id).puts == Puts::CutOff) {
            return Ok(());
        }
        let zone = |id| {
            let write = of(id);
            self.seen[unit].zone(id, Zone::of_write(write.began, write.ended))
        };
        // Zeros do not say who put them there, and a write that failed may come and go.
        let others = ids
            .iter()
            .filter(|other| **other != id && !of(**other).failed && !self.zeros(**other, unit));
        let its = zone(id);
        match others.copied().find(|other| its.conflicts(zone(*other))) {
            None => Ok(()),
            Some(other) => Err(Violation {
                offset: (unit * self.unit) as u64,
                found: Content::Stamp(id),
                allowed: vec![other],
                mixture: format!(" again, {its:?} around {:?}", zone(other)),
            }),
        }
    }

    /// What every unit of `buf` holds, which begins at `offset`.
    fn decode(&self, offset: u64, buf: &[u8]) -> Vec<Content> {
        let limit = self.writes.len() as WriteId;
        (offset..)
            .step_by(self.unit)
            .zip(buf.chunks_exact(self.unit))
            .map(|(at, piece)| content(piece, at, self.salt, limit))
            .collect()
    }

    /// What every unit of a whole disk holds.
    pub fn contents(&self, disk: &[u8]) -> Vec<Content> {
        self.decode(0, disk)
    }

    /// A flush begins: returns the time to hand to [`History::end_flush`].
    pub fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// A flush that began at `began` succeeded.
    pub fn end_flush(&mut self, began: u64, log: usize) {
        self.flushes.push(Flush {
            began,
            ended_log: log,
        });
    }

    /// The power went after `log` entries of the file's log; `units` is what a reader finds on the
    /// whole disk afterwards.
    pub fn units_after_power_cut(&self, log: usize, units: &[Content]) -> Result<(), Violation> {
        self.cut(log, 0, units)
    }

    /// The same for the bytes at `offset`.
    pub fn after_power_cut(&self, log: usize, offset: u64, buf: &[u8]) -> Result<(), Violation> {
        self.cut(log, offset, &self.decode(offset, buf))
    }

    fn cut(&self, log: usize, offset: u64, units: &[Content]) -> Result<(), Violation> {
        self.compare(offset, units, log, self.durable_at(log), |_| false)
    }

    /// Which writes are durable when the power goes after `log` entries?
    fn durable_at(&self, log: usize) -> impl Fn(&Write) -> bool {
        let flushes = self.flushes.iter().filter(|f| f.ended_log <= log);
        let durable = flushes.map(|f| f.began).max();
        move |w| {
            w.ended.is_some_and(|e| Some(e) < durable || e == 0)
                || w.durable_log.is_some_and(|at| at <= log)
        }
    }

    /// May the disk be `len` bytes long, when nothing is in flight?
    ///
    /// # Errors
    /// Which lengths it may have.
    pub fn len_now(&self, len: u64) -> Result<(), String> {
        self.len(len, usize::MAX, |w| w.ended.is_some())
    }

    /// The same when the power went after `log` entries.
    ///
    /// # Errors
    /// Which lengths it may have.
    pub fn len_after_power_cut(&self, log: usize, len: u64) -> Result<(), String> {
        self.len(len, log, self.durable_at(log))
    }

    fn len(&self, found: u64, log: usize, settled: impl Fn(&Write) -> bool) -> Result<(), String> {
        let ids: Vec<WriteId> = self.lens.iter().map(|(id, _)| *id).collect();
        let newest = self.newest(&ids, &settled);
        let allowed = self.lens.iter().filter(|(id, _)| {
            let w = &self.writes[index(*id)];
            w.began_log <= log && w.ended.is_none_or(|e| e >= newest)
        });
        let allowed: Vec<u64> = allowed.map(|(_, len)| *len).collect();
        match allowed.contains(&found) {
            true => Ok(()),
            false => Err(format!("{found} bytes long, allowed {allowed:?}")),
        }
    }

    /// When the newest of these began that makes outdated what had ended before: it is settled, and
    /// did not fail.
    fn newest(&self, ids: &[WriteId], settled: impl Fn(&Write) -> bool) -> u64 {
        let writes = ids.iter().map(|id| &self.writes[index(*id)]);
        writes
            // A discard makes nothing outdated: what was there may still be.
            .filter(|w| settled(w) && !w.failed && w.puts != Puts::ZerosOrNothing)
            .map(|w| w.began)
            .max()
            .unwrap_or(0)
    }

    /// Everything that has ended is durable, and the file has a new log.
    pub fn log_begins_anew(&mut self) {
        let began = self.tick();
        self.flushes = vec![Flush {
            began,
            ended_log: 0,
        }];
        for write in &mut self.writes {
            write.began_log = 0;
        }
    }

    /// Does this write leave zeros in `unit`?
    fn zeros(&self, id: WriteId, unit: usize) -> bool {
        if id == 0 {
            !self.base[unit]
        } else {
            self.writes[index(id)].puts != Puts::Stamp
        }
    }

    /// Compares `units` with what is allowed if exactly the writes with `settled` are over and done,
    /// and those with `racing` went on meanwhile.
    fn compare(
        &self,
        offset: u64,
        units: &[Content],
        log: usize,
        settled: impl Fn(&Write) -> bool,
        racing: impl Fn(&Write) -> bool,
    ) -> Result<(), Violation> {
        let range = self.range(offset, units.len() * self.unit);
        for (unit, &found) in range.zip(units) {
            let at = (unit * self.unit) as u64;
            let ids = &self.units[unit];
            // A write is outdated when another one began after its end and is settled.
            let newest = self.newest(ids, &settled);
            let allowed = |id: WriteId| {
                let w = &self.writes[index(id)];
                w.began_log <= log && w.ended.is_none_or(|e| e >= newest)
            };
            // Cut off and longer again, with what lies below not hidden yet.
            let shows = |id: WriteId| {
                let w = &self.writes[index(id)];
                w.puts == Puts::CutOff && (w.failed || !settled(w)) && allowed(id)
            };
            let fine = match found {
                Content::Foreign => ids.iter().any(|id| racing(&self.writes[index(*id)])),
                Content::Zero => ids.iter().any(|id| self.zeros(*id, unit) && allowed(*id)),
                Content::Stamp(0) => {
                    let below = unit < self.backing || self.layered && self.base[unit];
                    self.base[unit] && allowed(0) || below && ids.iter().any(|id| shows(*id))
                }
                Content::Stamp(id) => {
                    let below = |cut: &WriteId| self.layered && *cut > id && shows(*cut);
                    ids.contains(&id)
                        && !self.zeros(id, unit)
                        && (allowed(id) || ids.iter().any(below))
                }
            };
            if !fine {
                let allowed = ids.iter().copied().filter(|id| allowed(*id)).collect();
                return Err(Violation {
                    mixture: String::new(),
                    offset: at,
                    found,
                    allowed,
                });
            }
        }
        Ok(())
    }
}

fn index(id: WriteId) -> usize {
    usize::try_from(id).expect("a number that this model gave out")
}

#[cfg(test)]
mod tests;
