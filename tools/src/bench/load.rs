//! The load: so many requests in flight, each in a coroutine of its own, until time is up.
//!
//! ```text
//!   refill    for each free slot: choose a block, start a coroutine    it runs until its request is with the kernel
//!   poll      one pass of the loop                                     completions resume the coroutines; each checks,
//!                                                                      records and gives its slot back
//! ```
//!
//! Several loads may run on one image, each in a thread with its own loop (`queues.rs`).
//!
//! Nothing is allocated for a request: slots keep their buffers, stacks come from the pool. The
//! clock is read once a pass and every [`CLOCK_USES`] requests, so a latency may be wrong by what
//! that many requests take in memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coblock::aio::{AlignedBuf, Home};
use coblock::block::{self, BlockBackend, RequestFlags};
use coblock::coroutine::Co;

use super::cli::{Config, Pattern};
use super::histogram::Histogram;
use super::ledger::{Expected, Ledger, Mismatch};
use super::pattern::{Numbers, mix};

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
    /// Completed discards.
    pub discards: u64,
    /// Completed flushes.
    pub flushes: u64,
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
        self.reads + self.writes + self.discards + self.flushes
    }

    /// Adds what another load on the same image did at the same time.
    pub fn add(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.discards += other.discards;
        self.flushes += other.flushes;
        self.errors += other.errors;
        self.verify_errors += other.verify_errors;
        for message in other.messages {
            self.keep(message);
        }
        self.elapsed = self.elapsed.max(other.elapsed);
        self.latency.add(&other.latency);
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
    backend: Arc<BlockBackend>,
    path: String,
    /// `None` when nothing is written and nothing verified.
    ledger: Option<Arc<Ledger>>,
    verify: bool,
    flags: RequestFlags,
    block_size: usize,
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
    /// Most blocks a request.
    most: usize,
    next: usize,
    numbers: Numbers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Discard,
    Flush,
}

/// One request. Who writes or discards has begun that in the ledger.
#[derive(Clone, Copy)]
struct Request {
    kind: Kind,
    first: usize,
    blocks: usize,
}

impl Chooser {
    fn new(config: &Config, blocks: usize, queue: usize) -> Self {
        let queues = config.queues.unwrap_or(1);
        let seed = match queue {
            0 => config.seed,
            _ => mix(config.seed ^ mix(queue as u64)),
        };
        Self {
            rw: config.rw,
            read_share: config.read_share,
            blocks,
            most: config.blocks_per_request().min(blocks),
            next: blocks / queues * queue,
            numbers: Numbers::new(seed),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.numbers.below(bound as u64)).unwrap_or(0)
    }

    /// The next request; `None` when every block is being written.
    fn choose(&mut self, ledger: Option<&Ledger>) -> Option<Request> {
        let kind = match self.rw {
            Pattern::Read | Pattern::RandRead => Kind::Read,
            Pattern::Write | Pattern::RandWrite => Kind::Write,
            Pattern::RandRw => match self.numbers.below(100) >= self.read_share {
                true => Kind::Write,
                false => Kind::Read,
            },
            Pattern::Mixed => return self.choose_mixed(ledger),
        };
        let mut first = match self.rw.is_random() {
            true => self.below(self.blocks),
            false => self.next,
        };
        if kind == Kind::Write
            && let Some(ledger) = ledger
        {
            let tried_first = first;
            while !ledger.begin_write(first) {
                first = (first + 1) % self.blocks;
                if first == tried_first {
                    return None;
                }
            }
        }
        self.next = (first + 1) % self.blocks;
        Some(Request {
            kind,
            first,
            blocks: 1,
        })
    }

    /// Seven of eight requests go to a small part of the image, where those of all queues meet: a
    /// cluster is discarded and given to somebody else while another request is on its way to it.
    fn choose_mixed(&mut self, ledger: Option<&Ledger>) -> Option<Request> {
        let kind = match self.numbers.below(100) {
            0..4 => Kind::Flush,
            4..22 => Kind::Discard,
            22..64 => Kind::Write,
            _ => Kind::Read,
        };
        let range = match self.numbers.below(8) {
            0 => self.blocks,
            _ => (8 * self.most).min(self.blocks),
        };
        let mut first = self.below(range);
        let mut blocks = 1 + self.below(self.most);
        if kind == Kind::Discard {
            // Clusters are aligned; parts of them are not discarded.
            blocks = blocks.next_power_of_two();
            first = first / blocks * blocks;
        }
        blocks = blocks.min(self.blocks - first);
        let claimed = |begin: &dyn Fn(usize) -> bool| {
            let busy = (first..first + blocks).find(|&block| !begin(block));
            busy.map_or(blocks, |busy| busy - first)
        };
        let claimed = match (kind, ledger) {
            (Kind::Flush, _) => 0,
            (Kind::Write, Some(ledger)) => claimed(&|block| ledger.begin_write(block)),
            (Kind::Discard, Some(ledger)) => claimed(&|block| ledger.begin_discard(block)),
            _ => blocks,
        };
        let busy = claimed == 0 && kind != Kind::Flush;
        Some(Request {
            // Somebody else has the first block: look at it.
            kind: if busy { Kind::Read } else { kind },
            first,
            blocks: if busy { 1 } else { claimed },
        })
    }
}

/// What the load runs on.
#[derive(Clone)]
pub struct Target<'a> {
    /// The open image.
    pub backend: Arc<BlockBackend>,
    /// Its path, for messages.
    pub path: &'a str,
    /// Blocks that may be used, from the start of the image.
    pub blocks: usize,
    /// What it holds; needed to write or to verify.
    pub ledger: Option<Arc<Ledger>>,
    /// Which of several loads this is, from 0.
    pub queue: usize,
    /// At most so many requests.
    pub requests: Option<u64>,
    /// Set from outside to end early.
    pub interrupted: &'a Arc<AtomicBool>,
}

/// Runs the load in the loop that `home` drives.
///
/// # Errors
/// There is no memory for the buffers.
pub fn run(
    config: &Config,
    home: &Home,
    target: Target<'_>,
    mut progress: impl FnMut(Duration, u64),
) -> Result<Outcome, String> {
    let Target {
        backend,
        path,
        blocks,
        ledger,
        queue,
        requests,
        interrupted,
    } = target;
    let buffer_len = config.block_size * config.blocks_per_request().min(blocks);
    let alignment = backend.node().limits().mem_alignment.max(4096);
    let mut free = Vec::new();
    for _ in 0..config.depth {
        free.push(AlignedBuf::try_new(buffer_len, alignment).map_err(|_| {
            format!(
                "no memory for {} buffers of {buffer_len} bytes",
                config.depth
            )
        })?);
    }
    let shared = Rc::new(Shared {
        backend,
        path: path.to_owned(),
        ledger,
        verify: config.verify,
        flags: match config.cache.is_write_through() {
            true => RequestFlags::FUA,
            false => RequestFlags::empty(),
        },
        block_size: config.block_size,
        free: RefCell::new(free),
        outcome: RefCell::new(Outcome::default()),
        clock: Clock::new(),
        stop: Cell::new(false),
    });
    let mut chooser = Chooser::new(config, blocks, queue);
    let runtime_ns = u64::try_from(config.runtime.as_nanos()).unwrap_or(u64::MAX);
    let mut left = requests.unwrap_or(u64::MAX);
    loop {
        let mut started = 0;
        while !shared.stop.get() && left > 0 && started < 4 * config.depth {
            let Some(buffer) = shared.free.borrow_mut().pop() else {
                break;
            };
            let Some(request) = chooser.choose(shared.ledger.as_deref()) else {
                shared.free.borrow_mut().push(buffer);
                break;
            };
            let here = shared.clone();
            let spawned = home.try_spawn("bench", move |co| here.request(co, request, buffer));
            if let Err(error) = spawned {
                shared.give_up(format!("a request could not be started: {error}"));
            }
            started += 1;
            left -= 1;
        }
        let in_flight = home.context().live_coroutines();
        if in_flight == 0 && (started == 0 || left == 0) {
            break;
        }
        shared.clock.forget();
        // Where nothing waits (a device in memory), there is nothing to block for.
        home.poll(in_flight > 0 && shared.free.borrow().is_empty());
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
    Ok(outcome)
}

impl Shared {
    /// One request from start to end.
    fn request(&self, co: &Co, request: Request, mut buffer: AlignedBuf) {
        let began = self.clock.now_ns();
        let len = request.blocks * self.block_size;
        let offset = request.first as u64 * self.block_size as u64;
        let ledger = self.ledger.as_deref();
        let result = match request.kind {
            Kind::Read => self.read(co, request, &mut buffer[..len]),
            Kind::Write => {
                for (block, piece) in self.pieces(request, &mut buffer[..len]) {
                    if let Some(ledger) = ledger {
                        ledger.fill(block, piece);
                    }
                }
                self.backend.pwrite(co, offset, &buffer[..len], self.flags)
            }
            Kind::Discard => self.backend.pdiscard(co, offset, len as u64),
            Kind::Flush => self.backend.flush(co),
        };
        let latency = self.clock.now_ns() - began;
        for block in request.first..request.first + request.blocks {
            match (request.kind, ledger) {
                (Kind::Write, Some(ledger)) if result.is_ok() => ledger.end_write(block),
                (Kind::Discard, Some(ledger)) => ledger.end_discard(block),
                _ => {}
            }
        }
        match result {
            Ok(()) => {
                let mut outcome = self.outcome.borrow_mut();
                match request.kind {
                    Kind::Read => outcome.reads += 1,
                    Kind::Write => outcome.writes += 1,
                    Kind::Discard => outcome.discards += 1,
                    Kind::Flush => outcome.flushes += 1,
                }
                outcome.latency.record(latency);
            }
            Err(error) => self.failed(request, offset, &error),
        }
        self.free.borrow_mut().push(buffer);
    }

    /// The blocks of a request, each with its part of the buffer.
    fn pieces<'b>(
        &self,
        request: Request,
        buffer: &'b mut [u8],
    ) -> impl Iterator<Item = (usize, &'b mut [u8])> {
        (request.first..).zip(buffer.chunks_exact_mut(self.block_size))
    }

    fn read(&self, co: &Co, request: Request, buffer: &mut [u8]) -> block::Result<()> {
        let offset = request.first as u64 * self.block_size as u64;
        let Some(ledger) = self.ledger.as_deref().filter(|_| self.verify) else {
            return self.backend.pread(co, offset, buffer);
        };
        match request.blocks {
            1 => {
                let expected = ledger.begin_read(request.first);
                self.backend.pread(co, offset, &mut *buffer)?;
                self.check(ledger, request.first, expected, buffer);
            }
            blocks => {
                let expected: Vec<_> = (request.first..request.first + blocks)
                    .map(|block| ledger.begin_read(block))
                    .collect();
                self.backend.pread(co, offset, &mut *buffer)?;
                for ((block, piece), expected) in self.pieces(request, buffer).zip(expected) {
                    self.check(ledger, block, expected, piece);
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn check(&self, ledger: &Ledger, block: usize, expected: Expected, content: &[u8]) {
        if let Err(mismatch) = ledger.check(block, expected, content) {
            self.outcome.borrow_mut().mismatched(&self.path, &mismatch);
        }
    }

    #[cold]
    fn failed(&self, request: Request, offset: u64, error: &block::Error) {
        let what = match request.kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Discard => "discard",
            Kind::Flush => "flush",
        };
        let message = format!(
            "{}: {what} of {} bytes at offset {offset}: {error}",
            self.path,
            request.blocks * self.block_size
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
            queues: None,
            backing: false,
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
        let ledger = Ledger::new(8, 512, 1).unwrap();
        for rw in [Pattern::Write, Pattern::RandWrite] {
            let mut chooser = Chooser::new(&config(rw), 8, 0);
            let mut chosen = Vec::new();
            while let Some(request) = chooser.choose(Some(&ledger)) {
                assert_eq!(request.kind, Kind::Write, "{rw:?}");
                assert!(!chosen.contains(&request.first), "{rw:?}");
                chosen.push(request.first);
            }
            assert_eq!(chosen.len(), 8, "{rw:?}");
            for block in chosen {
                ledger.end_write(block);
            }
        }
    }

    #[test]
    fn sequential_patterns_go_around() {
        let mut chooser = Chooser::new(&config(Pattern::Read), 3, 0);
        let blocks: Vec<_> = (0..5)
            .map(|_| chooser.choose(None).unwrap().first)
            .collect();
        assert_eq!(blocks, [0, 1, 2, 0, 1]);
    }

    #[test]
    fn a_mix_has_its_share_of_reads() {
        let mut config = config(Pattern::RandRw);
        config.read_share = 70;
        let mut chooser = Chooser::new(&config, 1000, 0);
        let reads = (0..10_000)
            .filter(|_| chooser.choose(None).unwrap().kind == Kind::Read)
            .count();
        assert!((6700..7300).contains(&reads), "{reads}");
    }

    /// What a mixed load has begun is disjoint, inside the image, and all of it is told.
    #[test]
    fn mixed_requests_take_blocks_that_nobody_has() {
        let (ledger, blocks) = (Ledger::new(100, 512, 1).unwrap(), 100);
        let mut config = config(Pattern::Mixed);
        config.block_size = 4096;
        let mut choosers = [0, 1].map(|queue| Chooser::new(&config, blocks, queue));
        let mut seen = std::collections::HashSet::new();
        let mut taken = [vec![0; blocks], vec![0; blocks]];
        for turn in 0..2000 {
            let request = choosers[turn % 2].choose(Some(&ledger)).unwrap();
            seen.insert(format!("{:?}", request.kind));
            assert!(request.first + request.blocks <= blocks && request.blocks <= 16);
            let begun = match request.kind {
                Kind::Write => &mut taken[0],
                Kind::Discard => &mut taken[1],
                Kind::Read | Kind::Flush => continue,
            };
            for times in &mut begun[request.first..][..request.blocks] {
                *times += 1;
            }
        }
        assert_eq!(seen.len(), 4, "every kind: {seen:?}");
        assert!(taken.iter().flatten().all(|&times| times <= 1));
        for (block, (&write, &discard)) in taken[0].iter().zip(&taken[1]).enumerate() {
            assert_eq!(ledger.begin_write(block), write == 0, "block {block}");
            assert_eq!(ledger.begin_discard(block), discard == 0, "block {block}");
        }
    }
}
