//! One of those that send requests, each one after the other: what it draws, sends and compares.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use coblock::aio::AlignedBuf;
use coblock::aio::co::run_in;
use coblock::block::throttle::{Limit, ThrottleConfig};
use coblock::block::{self, BlockBackend, Drain, RequestFlags};
use coblock::coroutine::Co;

use super::{LONGEST, SECTOR, Shared, THREADS, WORKERS, judge};
use crate::judge::Verdict;
use crate::model::stamp;
use crate::rng::Rng;
use crate::script::Op;

/// One that sends requests, one after the other.
pub(super) struct Worker {
    shared: Arc<Shared>,
    nth: usize,
    rng: Rng,
    /// Number of its last write.
    last: u64,
    buf: AlignedBuf,
    floors: Vec<u64>,
    /// Where its requests are sent, if not here; and for how many more.
    elsewhere: Option<(usize, u32)>,
    compared: u64,
    racing: u64,
    moved: u64,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, nth: usize) -> Self {
        Worker {
            rng: Rng::new(shared.setting.seed << 32 | nth as u64),
            shared,
            nth,
            last: 0,
            buf: AlignedBuf::try_new(LONGEST, 4096).expect("a small buffer"),
            floors: Vec::new(),
            elsewhere: None,
            compared: 0,
            racing: 0,
            moved: 0,
        }
    }

    pub(super) fn work(&mut self, co: &Co, quota: u64) {
        let shared = self.shared.clone();
        let _alive = Alive(&shared);
        for _ in 0..quota {
            if shared.stop.load(SeqCst) {
                return;
            }
            let op = self.draw();
            if let Err(why) = self.send(co, op) {
                let story = format!("worker {}: {op}: {why}", self.nth);
                let mut wrong = shared.wrong.lock().expect("no panic under it");
                wrong.get_or_insert(story);
                shared.stop.store(true, SeqCst);
            }
            shared.requests.fetch_add(1, SeqCst);
        }
        shared.compared.fetch_add(self.compared, SeqCst);
        shared.racing.fetch_add(self.racing, SeqCst);
        shared.moved.fetch_add(self.moved, SeqCst);
    }

    /// The next request: reads anywhere, and writes where nobody else does.
    fn draw(&mut self) -> Op {
        let rng = &mut self.rng;
        let size = self.shared.setting.size;
        let (kind, flags) = (rng.below(100_000), RequestFlags::empty());
        let pieces = rng.between(1, rng.clone().pick(&[1, 8, 8, 8, 16, 64]));
        if kind < 55_000 {
            let len = pieces * SECTOR as u64;
            let offset = rng.below((size - len) / SECTOR as u64 + 1) * SECTOR as u64;
            let len = usize::try_from(len).expect("short");
            return Op::Read { offset, len };
        }
        match kind {
            99_999 => return Op::DrainAll,
            99_996..99_999 => return Op::Drain,
            99_980..99_996 => {
                let queue = usize::try_from(rng.below(THREADS as u64)).expect("few");
                return Op::Move { queue };
            }
            99_970..99_980 => {
                let iops = rng.pick(&[0, 200_000]);
                return Op::Throttle { iops, bps: 0 };
            }
            99_960..99_970 => return Op::Flush,
            _ => {}
        }
        let stripe = self.shared.stripe as u64;
        let writers = (THREADS * WORKERS) as u64;
        let mine = rng.below(size / stripe / writers) * writers + self.nth as u64;
        let most = stripe / SECTOR as u64;
        let pieces = pieces.min(most);
        let whole = rng.chance(20);
        let first = if whole {
            0
        } else {
            rng.below(most - pieces + 1)
        };
        let pieces = if whole { most } else { pieces };
        let offset = mine * stripe + first * SECTOR as u64;
        let len = usize::try_from(pieces).expect("few") * SECTOR;
        match kind {
            55_000..58_000 => Op::Discard { offset, len },
            58_000..61_000 => Op::Zero { offset, len, flags },
            61_000..64_000 => Op::Zero {
                offset,
                len,
                flags: RequestFlags::MAY_UNMAP,
            },
            _ => Op::Write { offset, len, flags },
        }
    }

    fn send(&mut self, co: &Co, op: Op) -> Verdict {
        let shared = self.shared.clone();
        match op {
            Op::Read { offset, len } => self.read(co, offset, len),
            Op::Write { offset, len, flags } => {
                let number = self.begin(offset, len, false);
                stamp(
                    &mut self.buf[..len],
                    offset,
                    SECTOR,
                    shared.setting.seed,
                    number,
                );
                let buf = &self.buf[..len];
                call(
                    &mut self.elsewhere,
                    &mut self.moved,
                    &shared,
                    co,
                    |co, backend| backend.pwrite(co, offset, buf, flags),
                )?;
                self.end(offset, len, number);
                Ok(())
            }
            Op::Zero { offset, len, flags } => {
                let number = self.begin(offset, len, true);
                call(
                    &mut self.elsewhere,
                    &mut self.moved,
                    &shared,
                    co,
                    |co, backend| backend.pwrite_zeroes(co, offset, len as u64, flags),
                )?;
                self.end(offset, len, number);
                Ok(())
            }
            Op::Discard { offset, len } => self.discard(co, offset, len),
            Op::Flush => call(
                &mut self.elsewhere,
                &mut self.moved,
                &shared,
                co,
                |co, backend| backend.flush(co),
            ),
            Op::Move { queue } => {
                self.elsewhere = Some((queue, 20));
                Ok(())
            }
            Op::Throttle { iops, .. } => {
                let config = ThrottleConfig {
                    iops_total: Limit::average(iops),
                    ..ThrottleConfig::default()
                };
                shared.group.set_config(config).map_err(|e| e.to_string())
            }
            Op::Drain | Op::DrainAll => {
                let drained = match op {
                    Op::Drain => shared.backend.node().drain(co),
                    _ => shared.backend.graph().drain(co),
                };
                let many = shared.backend.in_flight();
                drop(drained);
                shared.drains.fetch_add(1, SeqCst);
                match many {
                    0 => Ok(()),
                    _ => Err(format!("{many} requests in flight in a section")),
                }
            }
            _ => unreachable!("it is not drawn"),
        }
    }

    fn sectors(&self, offset: u64, len: usize) -> std::ops::Range<usize> {
        let first = usize::try_from(offset).expect("small") / SECTOR;
        first..first + len / SECTOR
    }

    /// Reads into the buffer and looks at every sector.
    fn read(&mut self, co: &Co, offset: u64, len: usize) -> Verdict {
        let shared = self.shared.clone();
        let range = self.sectors(offset, len);
        let sectors = &shared.sectors[range.clone()];
        self.floors.clear();
        self.floors
            .extend(sectors.iter().map(|s| s.ended.load(SeqCst)));
        let buf = &mut self.buf[..len];
        call(
            &mut self.elsewhere,
            &mut self.moved,
            &shared,
            co,
            |co, backend| backend.pread(co, offset, buf),
        )?;
        for (index, piece) in self.buf[..len].chunks(SECTOR).enumerate() {
            let between = (self.floors[index], sectors[index].begun.load(SeqCst));
            judge(&shared.setting, range.start + index, piece, between)?;
            self.compared += 1;
            self.racing += u64::from(between.0 != between.1);
        }
        Ok(())
    }

    /// A write begins; zeros have odd numbers.
    fn begin(&mut self, offset: u64, len: usize, zeros: bool) -> u64 {
        self.last = (self.last / 2 + 1) * 2 + u64::from(zeros);
        for sector in self.sectors(offset, len) {
            self.shared.sectors[sector].begun.store(self.last, SeqCst);
        }
        self.last
    }

    fn end(&self, offset: u64, len: usize, number: u64) {
        for sector in self.sectors(offset, len) {
            self.shared.sectors[sector].ended.store(number, SeqCst);
        }
    }

    /// A discard leaves zeros, or what was there: the writer looks which.
    fn discard(&mut self, co: &Co, offset: u64, len: usize) -> Verdict {
        let shared = self.shared.clone();
        let number = self.begin(offset, len, true);
        let many = len as u64;
        call(
            &mut self.elsewhere,
            &mut self.moved,
            &shared,
            co,
            |co, backend| backend.pdiscard(co, offset, many),
        )?;
        self.read(co, offset, len)?;
        let range = self.sectors(offset, len);
        for (sector, piece) in range.zip(self.buf[..len].chunks(SECTOR)) {
            let sector = &shared.sectors[sector];
            if piece.iter().all(|b| *b == 0) {
                sector.ended.store(number, SeqCst);
            } else {
                let before = sector.ended.load(SeqCst);
                sector.begun.store(before, SeqCst);
            }
        }
        Ok(())
    }
}

/// Sends a request from here, or through another thread. (Rule 3.10.)
fn call(
    elsewhere: &mut Option<(usize, u32)>,
    moved: &mut u64,
    shared: &Shared,
    co: &Co,
    f: impl FnOnce(&Co, &BlockBackend) -> block::Result<()> + Send,
) -> Verdict {
    let backend = &*shared.backend;
    let result = match elsewhere.take() {
        None => f(co, backend),
        Some((queue, more)) => {
            *moved += 1;
            *elsewhere = (more > 1).then_some((queue, more - 1));
            run_in(co, &shared.contexts[queue], "elsewhere", |co| {
                f(co, backend)
            })
            .expect("memory for a stack")
        }
    };
    result.map_err(|e| e.to_string())
}

/// A worker, until it ends in any way.
struct Alive<'a>(&'a Shared);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop.store(true, SeqCst);
            self.0.panicked.store(true, SeqCst);
        }
        self.0.alive.fetch_sub(1, SeqCst);
    }
}
