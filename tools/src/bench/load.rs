//! The load: so many requests in flight, each in a coroutine of its own, until time is up.
//!
//! ```text
//!   refill    for each free slot: choose a block, start a coroutine    it runs until its request is with the kernel
//!   poll      one pass of the loop                                     completions resume the coroutines; each checks,
//!                                                                      records and gives its slot back
//! ```
//!
//! Nothing is allocated for a request: slots keep their buffers, stacks come from the pool. The
//! clock is read once a pass and every [`CLOCK_USES`] requests, so a latency may be wrong by what
//! that many requests take in memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coblock::aio::AlignedBuf;
use coblock::block::{self, BlockBackend, RequestFlags};
use coblock::coroutine::Co;

use super::cli::{Config, Pattern};
use super::histogram::Histogram;
use super::ledger::{Ledger, Mismatch};
use super::pattern::Numbers;
use crate::open::Session;

/// How many requests share one reading of the clock at most.
const CLOCK_USES: u32 = 16;
/// How many messages about failures are kept.
const MESSAGES: usize = 5;

/// What a load did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Completed reads and writes.
    pub reads: u64,
    /// Completed writes.
    pub writes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Reads that found something wrong.
    pub verify_errors: u64,
    /// The first failures, in words.
    pub messages: Vec<String>,
    /// From the first request to the last completion.
    pub elapsed: Duration,
    /// Of completed requests.
    pub latency: Histogram,
}

impl Outcome {
    /// Completed requests.
    pub fn requests(&self) -> u64 {
        self.reads + self.writes
    }

    /// Adds a failure.
    pub fn failed(&mut self, message: String) {
        self.errors += 1;
        self.keep(message);
    }

    /// Adds a mismatch.
    pub fn mismatched(&mut self, path: &str, mismatch: &Mismatch) {
        self.verify_errors += 1;
        self.keep(format!(
            "{path}: offset {}: {}",
            mismatch.offset, mismatch.what
        ));
    }

    fn keep(&mut self, message: String) {
        if self.messages.len() < MESSAGES {
            self.messages.push(message);
        }
    }
}

/// What coroutines share.
struct Shared {
    backend: Rc<BlockBackend>,
    path: String,
    /// `None` when nothing is written and nothing verified.
    ledger: Option<RefCell<Ledger>>,
    verify: bool,
    flags: RequestFlags,
    block_size: u64,
    free: RefCell<Vec<AlignedBuf>>,
    outcome: RefCell<Outcome>,
    clock: Clock,
    stop: Cell<bool>,
}

/// Time since the start, read rarely.
struct Clock {
    start: Instant,
    last_ns: Cell<u64>,
    uses_left: Cell<u32>,
}

impl Clock {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            last_ns: Cell::new(0),
            uses_left: Cell::new(0),
        }
    }

    #[inline]
    fn now_ns(&self) -> u64 {
        match self.uses_left.get() {
            0 => self.read_ns(),
            left => {
                self.uses_left.set(left - 1);
                self.last_ns.get()
            }
        }
    }

    fn read_ns(&self) -> u64 {
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last_ns.set(now);
        self.uses_left.set(CLOCK_USES);
        now
    }

    /// Time may have passed: the next use reads anew.
    fn forget(&self) {
        self.uses_left.set(0);
    }
}

/// Chooses what the next request does.
struct Chooser {
    rw: Pattern,
    read_share: u64,
    blocks: usize,
    next: usize,
    numbers: Numbers,
}

/// One request.
#[derive(Clone, Copy)]
struct Request {
    write: bool,
    block: usize,
}

impl Chooser {
    fn new(config: &Config, blocks: usize) -> Self {
        Self {
            rw: config.rw,
            read_share: config.read_share,
            blocks,
            next: 0,
            numbers: Numbers::new(config.seed),
        }
    }

    /// The next request; `None` when every block is being written.
    fn choose(&mut self, ledger: Option<&RefCell<Ledger>>) -> Option<Request> {
        let write = match self.rw {
            Pattern::Read | Pattern::RandRead => false,
            Pattern::Write | Pattern::RandWrite => true,
            Pattern::RandRw => self.numbers.below(100) >= self.read_share,
        };
        let mut block = if self.rw.is_random() {
            usize::try_from(self.numbers.below(self.blocks as u64)).unwrap_or(0)
        } else {
            self.next
        };
        if write && let Some(ledger) = ledger {
            let ledger = ledger.borrow();
            let first = block;
            while ledger.is_begun(block) {
                block = (block + 1) % self.blocks;
                if block == first {
                    return None;
                }
            }
        }
        self.next = (block + 1) % self.blocks;
        Some(Request { write, block })
    }
}

/// What the load runs on.
pub struct Target<'a> {
    /// The loop.
    pub session: &'a Session,
    /// The open image.
    pub backend: Rc<BlockBackend>,
    /// Its path, for messages.
    pub path: &'a str,
    /// Blocks that may be used, from the start of the image.
    pub blocks: usize,
    /// What it holds; needed to write or to verify.
    pub ledger: Option<Ledger>,
    /// Set from outside to end early.
    pub interrupted: &'a Arc<AtomicBool>,
}

/// Runs the load; the ledger comes back with what the image must hold now.
///
/// # Errors
/// There is no memory for the buffers.
pub fn run(
    config: &Config,
    target: Target<'_>,
    mut progress: impl FnMut(Duration, u64),
) -> Result<(Outcome, Option<Ledger>), String> {
    let Target {
        session,
        backend,
        path,
        blocks,
        ledger,
        interrupted,
    } = target;
    let alignment = backend.node().limits().mem_alignment.max(4096);
    let mut free = Vec::new();
    for _ in 0..config.depth {
        free.push(
            AlignedBuf::try_new(config.block_size, alignment).map_err(|_| {
                format!(
                    "no memory for {} buffers of {} bytes",
                    config.depth, config.block_size
                )
            })?,
        );
    }
    let shared = Rc::new(Shared {
        backend,
        path: path.to_owned(),
        ledger: ledger.map(RefCell::new),
        verify: config.verify,
        flags: match config.cache.is_write_through() {
            true => RequestFlags::FUA,
            false => RequestFlags::empty(),
        },
        block_size: config.block_size as u64,
        free: RefCell::new(free),
        outcome: RefCell::new(Outcome::default()),
        clock: Clock::new(),
        stop: Cell::new(false),
    });
    let mut chooser = Chooser::new(config, blocks);
    let runtime_ns = u64::try_from(config.runtime.as_nanos()).unwrap_or(u64::MAX);
    let mut left = config.requests.unwrap_or(u64::MAX);
    loop {
        let mut started = 0;
        while !shared.stop.get() && left > 0 && started < 4 * config.depth {
            let Some(buffer) = shared.free.borrow_mut().pop() else {
                break;
            };
            let Some(request) = chooser.choose(shared.ledger.as_ref()) else {
                shared.free.borrow_mut().push(buffer);
                break;
            };
            let here = shared.clone();
            let spawned = session
                .home
                .try_spawn("bench", move |co| here.request(co, request, buffer));
            if let Err(error) = spawned {
                shared.give_up(format!("a request could not be started: {error}"));
            }
            started += 1;
            left -= 1;
        }
        let in_flight = session.home.context().live_coroutines();
        if in_flight == 0 && (started == 0 || left == 0) {
            break;
        }
        shared.clock.forget();
        // Where nothing waits (a device in memory), there is nothing to block for.
        session
            .home
            .poll(in_flight > 0 && shared.free.borrow().is_empty());
        let now = shared.clock.read_ns();
        if now >= runtime_ns || interrupted.load(Ordering::Relaxed) {
            shared.stop.set(true);
        }
        progress(
            Duration::from_nanos(now),
            shared.outcome.borrow().requests(),
        );
    }
    let elapsed = shared.clock.start.elapsed();
    let Ok(shared) = Rc::try_unwrap(shared) else {
        panic!("a request of the load outlives it");
    };
    let mut outcome = shared.outcome.into_inner();
    outcome.elapsed = elapsed;
    Ok((outcome, shared.ledger.map(RefCell::into_inner)))
}

impl Shared {
    /// One request from start to end.
    fn request(&self, co: &Co, request: Request, mut buffer: AlignedBuf) {
        let began = self.clock.now_ns();
        let offset = request.block as u64 * self.block_size;
        let result = if request.write {
            if let Some(ledger) = &self.ledger {
                ledger.borrow_mut().begin_write(request.block, &mut buffer);
            }
            self.backend.pwrite(co, offset, &*buffer, self.flags)
        } else {
            let expected = self
                .ledger
                .as_ref()
                .map(|l| l.borrow().begin_read(request.block));
            let result = self.backend.pread(co, offset, &mut *buffer);
            if self.verify
                && result.is_ok()
                && let (Some(ledger), Some(expected)) = (&self.ledger, expected)
            {
                let checked = ledger.borrow().check(request.block, expected, &buffer);
                if let Err(mismatch) = checked {
                    self.outcome.borrow_mut().mismatched(&self.path, &mismatch);
                }
            }
            result
        };
        let latency = self.clock.now_ns() - began;
        match result {
            Ok(()) => {
                let mut outcome = self.outcome.borrow_mut();
                if request.write {
                    outcome.writes += 1;
                    if let Some(ledger) = &self.ledger {
                        ledger.borrow_mut().end_write(request.block);
                    }
                } else {
                    outcome.reads += 1;
                }
                outcome.latency.record(latency);
            }
            Err(error) => self.failed(request, offset, &error),
        }
        self.free.borrow_mut().push(buffer);
    }

    #[cold]
    fn failed(&self, request: Request, offset: u64, error: &block::Error) {
        let what = if request.write { "write" } else { "read" };
        let message = format!(
            "{}: {what} of {} bytes at offset {offset}: {error}",
            self.path, self.block_size
        );
        self.give_up(message);
    }

    /// Counts a failure; nothing more is sent.
    #[cold]
    fn give_up(&self, message: String) {
        self.outcome.borrow_mut().failed(message);
        self.stop.set(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open::Engine;
    use crate::spec::Cache;

    fn config(rw: Pattern) -> Config {
        Config {
            image: None,
            format: None,
            rw,
            read_share: 50,
            block_size: 512,
            depth: 4,
            size: None,
            runtime: Duration::from_secs(1),
            requests: None,
            verify: true,
            engine: Engine::Auto,
            cache: Cache::Writeback,
            seed: 1,
            json: false,
            allow_write: false,
        }
    }

    /// No two writes to one block are in flight.
    #[test]
    fn a_block_that_is_being_written_is_not_chosen_for_a_write() {
        let ledger = RefCell::new(Ledger::new(8, 512, 1).unwrap());
        for rw in [Pattern::Write, Pattern::RandWrite] {
            let mut chooser = Chooser::new(&config(rw), 8);
            let mut chosen = Vec::new();
            while let Some(request) = chooser.choose(Some(&ledger)) {
                assert!(request.write && !chosen.contains(&request.block), "{rw:?}");
                ledger
                    .borrow_mut()
                    .begin_write(request.block, &mut [0; 512]);
                chosen.push(request.block);
            }
            assert_eq!(chosen.len(), 8, "{rw:?}");
            for block in chosen {
                ledger.borrow_mut().end_write(block);
            }
        }
    }

    #[test]
    fn sequential_patterns_go_around() {
        let mut chooser = Chooser::new(&config(Pattern::Read), 3);
        let blocks: Vec<_> = (0..5)
            .map(|_| chooser.choose(None).unwrap().block)
            .collect();
        assert_eq!(blocks, [0, 1, 2, 0, 1]);
    }

    #[test]
    fn a_mix_has_its_share_of_reads() {
        let mut config = config(Pattern::RandRw);
        config.read_share = 70;
        let mut chooser = Chooser::new(&config, 1000);
        let reads = (0..10_000)
            .filter(|_| !chooser.choose(None).unwrap().write)
            .count();
        assert!((6700..7300).contains(&reads), "{reads}");
    }
}
