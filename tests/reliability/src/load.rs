//! A script, sent to an open disk by many coroutines at once, and judged by the history as it goes.
//!
//! Each of the workers takes the next request of the script, so that as many are in flight as there
//! are workers, and a slow one holds up nobody. They may run at several homes, which one thread
//! steps; the model lies between them and needs no lock.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::{AioContext, Home};
use coblock::block::{self, BlockBackend, Node};
use coblock::coroutine::{Co, CoMutex, CoQueue, CoRwLock};

use super::layers;
use super::model::{History, Violation};
use super::play::Stage;
use super::request::Sender;
use super::rng::Rng;
use super::script::{Op, Script, Setting};

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
    /// Mechanisms that had an effect.
    pub effects: BTreeSet<Effect>,
}

/// What a step can have done, which is less often than it is asked for: a move to where it already
/// is does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// A drained section began, and ended.
    Section,
    /// A transaction changed what is connected to what.
    GraphChange,
    /// The nodes have another context than before as their home. (Rule 8.3.)
    HomeMove,
    /// A request ran in another context than the one that sent it. (Rule 3.10.)
    Elsewhere,
    /// A limit above zero was set. (Rule 8.1.)
    Limit,
    /// The disk failed a request.
    Fault,
}

type Reopen = dyn Fn(&Co) -> block::Result<Arc<BlockBackend>>;

/// A script on its way.
pub struct Load {
    shared: Rc<Shared>,
}

/// What the workers share.
pub(crate) struct Shared {
    pub(crate) state: RefCell<State>,
    /// Waits for those in flight to end, or for the one that must be alone.
    turn: CoQueue,
    stage: Option<Stage>,
    /// The contexts of the queues.
    contexts: OnceCell<Vec<Arc<AioContext>>>,
    pub(crate) setting: Setting,
    /// One takes the graph lock for writing at a time.
    pub(crate) writer: CoMutex<()>,
    /// Filters that came while the image is open, the newest last; one changes the graph at a time.
    pub(crate) inserted: CoMutex<Vec<Arc<Node>>>,
    /// Resizes hold it for reading, and who needs the length to stay for writing.
    pub(crate) layout: CoRwLock<()>,
    reopen: Option<Box<Reopen>>,
    watch: Box<dyn Fn(&Ended<'_>)>,
    after_each: Box<dyn Fn(&Ended<'_>)>,
    on_error: OnError,
    workers: Cell<usize>,
    /// Length of the file's log at the last `mark`.
    mark: Cell<usize>,
}

pub(crate) struct State {
    backend: Arc<BlockBackend>,
    pub(crate) history: History,
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
    pub(crate) effects: BTreeSet<Effect>,
    pub(crate) resizes: Ongoing,
    pub(crate) changes: Ongoing,
    pub(crate) rng: Rng,
}

/// Operations that have begun, and that are under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ongoing {
    begun: u64,
    under_way: u64,
}

impl Ongoing {
    pub(crate) fn begin(&mut self) {
        self.begun += 1;
        self.under_way += 1;
    }

    pub(crate) fn end(&mut self) {
        self.under_way -= 1;
    }

    /// Was there none since it was `before`?
    pub(crate) fn none_since(self, before: Ongoing) -> bool {
        before.under_way == 0 && self == before
    }
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
            effects: BTreeSet::new(),
            resizes: Ongoing::default(),
            changes: Ongoing::default(),
            rng: Rng::new(!seed),
        };
        Load {
            shared: Rc::new(Shared {
                state: RefCell::new(state),
                turn: CoQueue::new(),
                stage: None,
                contexts: OnceCell::new(),
                setting: script.setting.clone(),
                writer: CoMutex::new(()),
                inserted: CoMutex::new(Vec::new()),
                layout: CoRwLock::new(()),
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

    /// What lies below: how much that was sent so far, and where snapshots put their overlays.
    #[must_use]
    pub fn stage(mut self, stage: &Stage) -> Self {
        self.shared().stage = Some(stage.clone());
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
        let contexts = homes.iter().map(|home| home.context().clone()).collect();
        let known = self.shared.contexts.set(contexts);
        known.expect("a load starts once");
        for nth in 0..self.shared.workers.get() {
            let shared = self.shared.clone();
            homes[nth % homes.len()].spawn("worker", move |co| {
                // Where its requests are sent, if not here.
                let mut queue = None;
                while let Some((index, op)) = shared.take(co) {
                    if let Op::Move { queue: there } = op {
                        queue = Some(there);
                    }
                    shared.serve(co, index, op, queue);
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
            effects: state.effects,
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
    /// How many entries the disks below were sent so far, for a power cut.
    pub(crate) fn log(&self) -> usize {
        let stage = self.stage.as_ref();
        stage.map_or(0, |stage| stage.overlays.log_len())
    }

    /// How many requests the disks below were sent so far: none comes in a drained section.
    pub(crate) fn asked(&self) -> u64 {
        let stage = self.stage.as_ref();
        stage.map_or(0, |stage| layers::asked(&stage.layers()))
    }

    /// The context of a queue.
    pub(crate) fn context(&self, queue: usize) -> &Arc<AioContext> {
        &self.contexts.get().expect("it has started")[queue]
    }

    /// What lies below.
    pub(crate) fn stage(&self) -> Stage {
        self.stage.clone().expect("a load that knows its stage")
    }

    /// Notes that something had an effect.
    pub(crate) fn happened(&self, effect: Effect) {
        self.state.borrow_mut().effects.insert(effect);
    }

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

    fn serve(&self, co: &Co, index: usize, op: Op, queue: Option<usize>) {
        let backend = self.state.borrow().backend.clone();
        let result = if op.alone() {
            self.step(co, op, backend)
        } else {
            let sender = Sender {
                co,
                backend: &backend,
                elsewhere: queue.map(|there| self.context(there)),
            };
            if op.range().is_some() && sender.is_elsewhere() {
                self.happened(Effect::Elsewhere);
            }
            self.request(&sender, op)
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

    /// A step between requests: nothing is in flight.
    fn step(&self, co: &Co, op: Op, backend: Arc<BlockBackend>) -> Result<(), Failed> {
        match op {
            Op::Wait => return Ok(()),
            Op::Mark => {
                self.mark.set(self.log());
                return Ok(());
            }
            _ => {}
        }
        let reopen = self.reopen.as_ref().expect("a load that knows how");
        self.inserted.lock(co).clear();
        let began = self.state.borrow_mut().history.begin_flush();
        // Closing writes everything back; whether or not it can, the image is open no more.
        let closed = backend.close(co);
        let ended = self.log();
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
