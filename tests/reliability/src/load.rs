//! A script, sent to an open disk by many coroutines at once, and judged by the history as it goes.
//!
//! Each of the workers takes the next request of the script, so that as many are in flight as there
//! are workers, and a slow one holds up nobody. They may run at several homes, which one thread
//! steps; the model lies between them and needs no lock.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::{AlignedBuf, Home};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::{self, BlockBackend, DenyAll, DriverRegistry, Options, RequestFlags};
use coblock::coroutine::{Co, CoQueue};

use super::model::{History, Puts, Violation, WriteId};
use super::rng::Rng;
use super::script::{Op, Script};

/// How a request ended.
#[derive(Debug)]
pub enum Failed {
    /// It said so.
    Error(block::Error),
    /// It returned what it must not.
    Wrong(Violation),
}

impl From<block::Error> for Failed {
    fn from(error: block::Error) -> Self {
        Failed::Error(error)
    }
}

/// A request that has ended, as [`Load::after_each`] is told.
pub struct Ended<'a> {
    /// Place in the script.
    pub index: usize,
    pub op: Op,
    /// The coroutine that sent it.
    pub co: &'a Co,
    pub backend: &'a Arc<BlockBackend>,
    /// The error that it said, if any.
    pub error: Option<&'a block::Error>,
}

/// What a load does about a request that fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Ends the test.
    Panic,
    /// Counts it. A write that failed may be there in part, a flush that failed has made nothing
    /// durable.
    Count,
}

/// What came of a load.
pub struct Loaded {
    /// The image as it is open now; nothing after [`run`], whose caller has it.
    pub backend: Option<Arc<BlockBackend>>,
    /// Requests that failed.
    pub errors: usize,
    /// Requests that were sent.
    pub requests: usize,
    /// What the disk may hold now.
    pub history: History,
    /// Most requests that were in flight at once.
    pub peak: usize,
    /// Length of the file's log at the last `mark`.
    pub mark: usize,
}

type Reopen = dyn Fn(&Co) -> block::Result<Arc<BlockBackend>>;

/// A script on its way.
pub struct Load {
    shared: Rc<Shared>,
}

/// What the workers share.
struct Shared {
    state: RefCell<State>,
    /// Waits for those in flight to end, or for the one that must be alone.
    turn: CoQueue,
    log: Box<dyn Fn() -> usize>,
    reopen: Option<Box<Reopen>>,
    watch: Box<dyn Fn(&Ended<'_>)>,
    after_each: Box<dyn Fn(&Ended<'_>)>,
    on_error: OnError,
    workers: Cell<usize>,
    /// Length of the file's log at the last `mark`.
    mark: Cell<usize>,
}

struct State {
    backend: Arc<BlockBackend>,
    history: History,
    ops: Vec<Op>,
    /// What to say in front of a message.
    story: String,
    next: usize,
    in_flight: usize,
    /// A request that must be alone is under way.
    alone: bool,
    /// Most requests that were in flight at once.
    peak: usize,
    errors: usize,
    rng: Rng,
}

impl Load {
    /// `script`, to be sent to `backend`. `history` says what the disk may hold.
    pub fn new(backend: &Arc<BlockBackend>, script: &Script, history: History) -> Self {
        let seed = script.setting.seed;
        let state = State {
            backend: backend.clone(),
            history,
            ops: script.ops.clone(),
            story: format!("seed {seed}"),
            next: 0,
            in_flight: 0,
            alone: false,
            peak: 0,
            errors: 0,
            rng: Rng::new(!seed),
        };
        Load {
            shared: Rc::new(Shared {
                state: RefCell::new(state),
                turn: CoQueue::new(),
                log: Box::new(|| 0),
                reopen: None,
                watch: Box::new(|_| {}),
                after_each: Box::new(|_| {}),
                on_error: OnError::Panic,
                workers: Cell::new(script.setting.in_flight),
                mark: Cell::new(0),
            }),
        }
    }

    fn shared(&mut self) -> &mut Shared {
        Rc::get_mut(&mut self.shared).expect("it has not started")
    }

    /// How many entries the file below was sent so far, for a power cut.
    #[must_use]
    pub fn log(mut self, log: impl Fn() -> usize + 'static) -> Self {
        self.shared().log = Box::new(log);
        self
    }

    /// How the image is opened again; without it, `reopen` is refused.
    #[must_use]
    pub fn reopen(
        mut self,
        reopen: impl Fn(&Co) -> block::Result<Arc<BlockBackend>> + 'static,
    ) -> Self {
        self.shared().reopen = Some(Box::new(reopen));
        self
    }

    /// Is called when a request has ended, in its coroutine, before [`Load::after_each`]: for oracles
    /// that every run has.
    #[must_use]
    pub fn watch(mut self, call: impl Fn(&Ended<'_>) + 'static) -> Self {
        self.shared().watch = Box::new(call);
        self
    }

    /// Is called when a request has ended, in its coroutine.
    #[must_use]
    pub fn after_each(mut self, call: impl Fn(&Ended<'_>) + 'static) -> Self {
        self.shared().after_each = Box::new(call);
        self
    }

    /// What to do about errors; [`OnError::Panic`] unless told.
    #[must_use]
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.shared().on_error = on_error;
        self
    }

    /// Starts the workers, in turn at each of `homes`. They run while somebody polls these.
    pub fn start(&self, homes: &[&Home]) {
        for nth in 0..self.shared.workers.get() {
            let shared = self.shared.clone();
            homes[nth % homes.len()].spawn("worker", move |co| {
                while let Some((index, op)) = shared.take(co) {
                    shared.serve(co, index, op);
                }
                shared.workers.set(shared.workers.get() - 1);
            });
        }
    }

    /// Has every request ended?
    pub fn is_done(&self) -> bool {
        self.shared.workers.get() == 0
    }

    /// How far it came: requests sent, and ended with an error.
    pub fn progress(&self) -> (usize, usize) {
        let state = self.shared.state.borrow();
        (state.next, state.errors)
    }

    /// What came of it.
    pub fn end(self) -> Loaded {
        let shared = Rc::into_inner(self.shared).expect("every worker has ended");
        let mark = shared.mark.get();
        let state = shared.state.into_inner();
        Loaded {
            backend: Some(state.backend),
            errors: state.errors,
            requests: state.next,
            history: state.history,
            peak: state.peak,
            mark,
        }
    }
}

/// Sends a whole script to `backend` and returns when every request is done.
///
/// Panics when a request fails or a read returns what it must not.
pub fn run(home: &Home, backend: &Arc<BlockBackend>, script: &Script, history: History) -> Loaded {
    let loaded = run_load(home, Load::new(backend, script, history));
    Loaded {
        backend: None,
        ..loaded
    }
}

/// The same with a load that was told more.
pub fn run_load(home: &Home, load: Load) -> Loaded {
    load.start(&[home]);
    while !load.is_done() {
        home.poll(true);
    }
    load.end()
}

impl Shared {
    /// The next request, when its turn has come.
    fn take(&self, co: &Co) -> Option<(usize, Op)> {
        loop {
            let mut s = self.state.borrow_mut();
            let index = s.next;
            let op = *s.ops.get(index)?;
            if s.alone || (op.alone() && s.in_flight > 0) {
                drop(s);
                self.turn.wait(co);
                continue;
            }
            s.next += 1;
            s.in_flight += 1;
            s.alone = op.alone();
            s.peak = s.peak.max(s.in_flight);
            return Some((index, op));
        }
    }

    fn serve(&self, co: &Co, index: usize, op: Op) {
        let backend = self.state.borrow().backend.clone();
        let result = if op.alone() {
            self.step(co, op, backend)
        } else {
            request(co, &backend, self, op)
        };
        let error = match &result {
            Ok(()) => None,
            Err(Failed::Wrong(violation)) => {
                panic!("{}: {index}: {op}: {violation}", self.state.borrow().story)
            }
            Err(Failed::Error(error)) => Some(error),
        };
        if let (Some(error), OnError::Panic) = (error, self.on_error) {
            panic!("{}: {index}: {op}: {error}", self.state.borrow().story);
        }
        let backend = {
            let mut s = self.state.borrow_mut();
            s.in_flight -= 1;
            s.alone = false;
            s.errors += usize::from(error.is_some());
            s.backend.clone()
        };
        let ended = Ended {
            index,
            op,
            co,
            backend: &backend,
            error,
        };
        (self.watch)(&ended);
        (self.after_each)(&ended);
        drop(backend);
        self.turn.wake_all();
    }

    /// A write has ended.
    fn written(&self, id: WriteId, result: block::Result<()>) -> Result<(), Failed> {
        let history = &mut self.state.borrow_mut().history;
        match result {
            Ok(()) => history.end_write(id),
            Err(_) => history.fail_write(id),
        }
        Ok(result?)
    }

    /// A step between requests: nothing is in flight.
    fn step(&self, co: &Co, op: Op, backend: Arc<BlockBackend>) -> Result<(), Failed> {
        match op {
            Op::Wait => return Ok(()),
            Op::Mark => {
                self.mark.set((self.log)());
                return Ok(());
            }
            _ => {}
        }
        let reopen = self.reopen.as_ref().expect("a load that knows how");
        let began = self.state.borrow_mut().history.begin_flush();
        // Closing writes everything back; whether or not it can, the image is open no more.
        let closed = backend.close(co);
        let ended = (self.log)();
        drop(backend);
        {
            let history = &mut self.state.borrow_mut().history;
            match &closed {
                Ok(()) => history.end_flush(began, ended),
                Err(_) => history.lose_unflushed(),
            }
        }
        let opened = reopen(co)?;
        self.state.borrow_mut().backend = opened;
        Ok(closed?)
    }
}

/// A buffer, sometimes aligned for direct I/O and sometimes just not, so that the bounce buffers
/// have work.
enum Buffer {
    Aligned(AlignedBuf),
    Ragged(Vec<u8>),
}

impl Buffer {
    fn new(len: usize, ragged: bool) -> Self {
        if ragged {
            Buffer::Ragged(vec![0xa5; len + 1])
        } else {
            Buffer::Aligned(AlignedBuf::try_new(len, 4096).expect("a small buffer"))
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Buffer::Aligned(buf) => buf,
            Buffer::Ragged(buf) => &mut buf[1..],
        }
    }
}

fn request(co: &Co, backend: &BlockBackend, load: &Shared, op: Op) -> Result<(), Failed> {
    let (shared, log) = (&load.state, &load.log);
    let ragged = shared.borrow_mut().rng.chance(25);
    match op {
        Op::Read { offset, len } => {
            let mut buf = Buffer::new(len, ragged);
            let token = shared.borrow_mut().history.begin_read();
            backend.pread(co, offset, buf.bytes())?;
            let judged = shared
                .borrow_mut()
                .history
                .end_read(&token, offset, buf.bytes());
            judged.map_err(Failed::Wrong)
        }
        Op::Write { offset, len } => {
            let mut buf = Buffer::new(len, ragged);
            let id = shared
                .borrow_mut()
                .history
                .begin_write(offset, buf.bytes(), log());
            let result = backend.pwrite(co, offset, &*buf.bytes(), RequestFlags::empty());
            load.written(id, result)
        }
        Op::Zero { offset, len, unmap } => {
            let id = shared
                .borrow_mut()
                .history
                .begin_zeros(offset, len, log(), Puts::Zeros);
            let flags = if unmap {
                RequestFlags::MAY_UNMAP
            } else {
                RequestFlags::empty()
            };
            load.written(id, backend.pwrite_zeroes(co, offset, len as u64, flags))
        }
        Op::Discard { offset, len } => {
            let id =
                shared
                    .borrow_mut()
                    .history
                    .begin_zeros(offset, len, log(), Puts::ZerosOrNothing);
            load.written(id, backend.pdiscard(co, offset, len as u64))
        }
        Op::Copy { offset, len } => {
            let mut buf = vec![0; len];
            let id = shared
                .borrow_mut()
                .history
                .begin_write(offset, &mut buf, log());
            let options = Options::new()
                .with("driver", "sim")
                .with_object("disk", SimDisk::with_contents(&buf));
            let registry = DriverRegistry::with_builtin();
            let node = block::open(co, backend.graph(), &registry, &DenyAll, options)
                .expect("a disk in memory");
            let source = BlockBackend::new(backend.graph(), node);
            let copied = source.copy_range(co, 0, backend, offset, len as u64);
            source.close(co).expect("nothing happens to the source");
            load.written(id, copied)
        }
        Op::Grow { len } => {
            // Where somebody else has made it longer, it is to stay so.
            if backend.len() < len {
                backend.truncate(co, len, true)?;
            }
            Ok(())
        }
        Op::Flush => {
            let began = shared.borrow_mut().history.begin_flush();
            backend.flush(co)?;
            shared.borrow_mut().history.end_flush(began, log());
            Ok(())
        }
        Op::Wait | Op::Reopen | Op::Mark => unreachable!("steps are no requests"),
    }
}

/// Reads the first `size` bytes of the disk like [`read_all`]; a disk that has grown has zeros
/// behind.
pub fn read_size(co: &Co, backend: &BlockBackend, step: usize, size: u64) -> Vec<u8> {
    let mut bytes = read_all(co, backend, step);
    let behind = bytes.split_off(usize::try_from(size).expect("a small disk"));
    assert!(
        behind.iter().all(|b| *b == 0),
        "what was added is not zeros"
    );
    bytes
}

/// Reads the whole disk in pieces of `step` bytes, one after the other.
pub fn read_all(co: &Co, backend: &BlockBackend, step: usize) -> Vec<u8> {
    let size = usize::try_from(backend.len()).expect("a small disk");
    let mut bytes = vec![0xa5; size];
    for (index, piece) in bytes.chunks_mut(step).enumerate() {
        let offset = (index * step) as u64;
        backend
            .pread(co, offset, &mut *piece)
            .unwrap_or_else(|e| panic!("reading {} bytes at {offset:#x}: {e}", step));
    }
    bytes
}
