//! The right to drive a context, and one pass of its loop (rule 3.1).
//!
//! ```text
//!   poll(blocking):  submit, and wait if nothing is to be done   announce, fence, look (rule 3.4)
//!                    accept notifications
//!                    bottom halves                               what was scheduled before this line
//!                    ready descriptors                           completions of the ring, then handlers
//!                    timers                                      armed before, due now
//! ```
//!
//! A handler may poll again, since callbacks are `Fn`. A coroutine may not: it suspends.

use crate::bh_state::Entry;
use crate::bottom_half::WorkList;
use crate::busy_poll::BusyPoll;
use crate::context::{AioContext, ContextOptions};
use crate::current::{self, Driving, Live};
use crate::engine::{Engine, Lanes};
use crate::fd_handler::ReadyList;
use crate::notifier::EventNotifier;
use crate::sys::event::{Epoll, PollFd, ready};
use crate::trimmer::Trimmer;
use coblock_coroutine::{Co, Error, Hold, Schedule};
use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Longest wait while an idle bottom half is scheduled (rule 3.2).
const IDLE_NS: u64 = 10_000_000;

/// What a home has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopStats {
    /// Passes of the loop.
    pub passes: u64,
    /// Requests that went into the ring.
    pub ring_requests: u64,
    /// `io_uring_enter` calls: submitting and waiting in one.
    pub ring_enters: u64,
}

/// What a foreign loop watches of a home with a ring.
struct Foreign {
    both: Epoll,
    /// Raised by the kernel for completions; in `both`, and lowered by each dispatch. Not in the
    /// context's set: the ring watches that, and would raise it for ever.
    completions: EventNotifier,
}

/// What only the home touches.
pub(crate) struct Core {
    pub context: Arc<AioContext>,
    /// The same, as the coroutine crate wants it.
    pub schedule: Arc<dyn Schedule>,
    pub work: WorkList,
    pub ready: ReadyList,
    pub engine: Engine,
    pub busy_poll: BusyPoll,
    /// Buffered writes.
    pub lanes: Lanes,
    trimmer: Trimmer,
    /// Requests that the loop did itself, in a row (`engine::at_once`).
    pub at_once: Cell<u32>,
    passes: Cell<u64>,
    /// Name and number of live coroutines; names that ended stay, with zero.
    pub live_names: RefCell<Vec<(&'static str, usize)>>,
    /// Made when a foreign loop first asks, if there is a ring.
    foreign: OnceCell<Foreign>,
}

/// The right to drive one context: whoever has it is the context's home.
///
/// Not `Send`: a home stays on the thread that made it. One thread may have several.
pub struct Home {
    core: Rc<Core>,
}

impl Home {
    /// Makes a context and the right to drive it.
    ///
    /// # Errors
    /// When descriptors run out, or io_uring was asked for by name and is not to be had.
    pub fn new(options: ContextOptions) -> io::Result<Home> {
        crate::sys::fence::prepare_fences();
        let engine = Engine::new(&options)?;
        let context = AioContext::new(&options, engine.name())?;
        if let Some(epoll) = context.monitor.epoll() {
            engine.watch(epoll)?;
        } else {
            engine.raise(&context.notifier)?;
        }
        let (engine_name, monitor) = (engine.name(), context.monitor_name());
        log::debug!("context '{}': {engine_name} and {monitor}", options.name);
        let core = Core {
            schedule: context.clone(),
            context,
            work: WorkList::default(),
            ready: ReadyList::default(),
            engine,
            busy_poll: BusyPoll::default(),
            lanes: Lanes::default(),
            trimmer: Trimmer::default(),
            at_once: Cell::new(0),
            passes: Cell::new(0),
            live_names: RefCell::new(Vec::new()),
            foreign: OnceCell::new(),
        };
        Ok(Home {
            core: Rc::new(core),
        })
    }

    /// The part that any thread may use.
    pub fn context(&self) -> &Arc<AioContext> {
        &self.core.context
    }

    /// One pass (rule 3.1). `blocking`: waits until there is something to do, was notified, or a
    /// signal came. Tells whether a non-idle bottom half, a completion, a descriptor handler or a
    /// timer ran.
    ///
    /// May be called in a handler (nested), also for the context whose handler it is.
    ///
    /// # Panics
    /// In a coroutine. And with the panic of whatever ran: the rest of the pass is then done by the
    /// next one.
    #[track_caller]
    pub fn poll(&self, blocking: bool) -> bool {
        refuse_in_coroutine(&self.core.context);
        let _driving = Driving::new(&self.core);
        self.core.pass(blocking, blocking)
    }

    /// Calls `f` with this context as the current one (rule 3.9).
    pub fn with<R>(&self, f: impl FnOnce() -> R) -> R {
        let _driving = Driving::telling_time(&self.core);
        f()
    }

    /// Starts a coroutine and enters it now; it belongs to this context, and `f` owns what it
    /// needs.
    ///
    /// # Panics
    /// When there is no memory for its stack; [`try_spawn`](Self::try_spawn) returns that. And with
    /// the panic of `f`, if it comes before the first suspend.
    pub fn spawn<F>(&self, name: &'static str, f: F)
    where
        F: for<'a> FnOnce(&'a Co) + 'static,
    {
        self.try_spawn(name, f)
            .expect("memory for the stack of a coroutine");
    }

    /// The same.
    ///
    /// # Errors
    /// When there is no memory for its stack.
    pub fn try_spawn<F>(&self, name: &'static str, f: F) -> Result<(), Error>
    where
        F: for<'a> FnOnce(&'a Co) + 'static,
    {
        let _driving = Driving::telling_time(&self.core);
        start(&self.core, name, f)
    }

    /// Runs `f` as a coroutine and polls until it returned; `f` may borrow.
    ///
    /// # Panics
    /// In a coroutine; when there is no memory for its stack; with the panic of `f`.
    #[track_caller]
    pub fn run<R>(&self, f: impl FnOnce(&Co) -> R) -> R {
        refuse_in_coroutine(&self.core.context);
        let _driving = Driving::telling_time(&self.core);
        let core = &self.core;
        let body = |co: &Co| {
            let _live = Live::begin(core, "run");
            f(co)
        };
        let turn = || {
            core.pass(true, true);
        };
        coblock_coroutine::run_scoped(Some(&core.schedule), body, turn)
            .expect("memory for the stack of a coroutine")
    }

    /// What this home has done so far.
    pub fn stats(&self) -> LoopStats {
        let (ring_requests, ring_enters) = self.core.engine.counts();
        LoopStats {
            passes: self.core.passes.get(),
            ring_requests,
            ring_enters,
        }
    }

    /// Asks instead of waiting for up to `max` before each wait, if all handlers can be asked. It
    /// adapts: waits that end soon make it ask longer, long ones make it stop. Zero, the default,
    /// never asks.
    pub fn set_busy_poll(&self, max: Duration) {
        self.core.busy_poll.set_max(max);
    }

    /// For a loop of somebody else: readable when [`dispatch`](Self::dispatch) has something to do.
    ///
    /// Before each wait that loop calls [`timeout_ns`](Self::timeout_ns) and waits no longer than
    /// that; afterwards it calls `dispatch`.
    ///
    /// # Panics
    /// Where the context watches with poll(2), nothing stands for all its descriptors; such a loop
    /// watches [`descriptors`](Self::descriptors).
    #[track_caller]
    pub fn fd(&self) -> BorrowedFd<'_> {
        let epoll = self.core.context.monitor.epoll();
        let epoll = epoll.expect("a context that watches with epoll; others have a list");
        let Engine::Uring(ring) = &self.core.engine else {
            return epoll.as_fd();
        };
        let foreign = self.core.foreign.get_or_init(|| {
            let both = Epoll::new().expect("a descriptor for a foreign loop");
            let completions = EventNotifier::new().expect("a descriptor for a foreign loop");
            ring.raise(&completions).expect("a ring takes one eventfd");
            for fd in [completions.as_fd(), epoll.as_fd()] {
                both.add(fd.as_raw_fd(), ready::READ, 0)
                    .expect("both can be watched");
            }
            // What completed before is not told: the first wait ends at once.
            completions.set();
            Foreign { both, completions }
        });
        foreign.both.as_fd()
    }

    /// The same for a loop that watches a list, whatever this context watches with: what to poll
    /// now. To be asked before each wait, after [`timeout_ns`](Self::timeout_ns).
    pub fn descriptors(&self) -> Vec<PollFd> {
        match self.core.context.monitor.epoll() {
            Some(_) => vec![PollFd::new(self.fd().as_raw_fd(), ready::READ)],
            None => self.core.context.monitor.watched(),
        }
    }

    /// For a loop of somebody else: submits what is queued, and tells how long that loop may wait
    /// for [`fd`](Self::fd); `Some(0)`: not at all; `None`: for ever.
    pub fn timeout_ns(&self) -> Option<u64> {
        let _driving = Driving::new(&self.core);
        self.core.engine.submit();
        let timeout = self.core.timeout_ns();
        if timeout == Some(0) || !self.core.context.notify.announce() {
            Some(0)
        } else {
            timeout
        }
    }

    /// For a loop of somebody else: one pass that does not wait, and accepts notifications as a
    /// blocking one does.
    #[track_caller]
    pub fn dispatch(&self) -> bool {
        refuse_in_coroutine(&self.core.context);
        let _driving = Driving::new(&self.core);
        if let Some(foreign) = self.core.foreign.get() {
            foreign.completions.test_and_clear();
        }
        self.core.pass(false, true)
    }

    /// Ends the context (rule 3.3): what was posted still runs, then everything must be gone.
    ///
    /// # Panics
    /// When bottom halves, coroutines, armed timers, descriptor handlers, postponed actions or
    /// [residents](AioContext::reside) are left; names them.
    /// Dropping a home does the same.
    pub fn close(self) {
        drop(self);
    }

    fn refuse_leftovers(&self) {
        let core = &self.core;
        let _driving = Driving::new(core);
        let context = &core.context;
        // One-shots and late completions; bounded, since something that goes on for ever is a
        // leftover.
        for _ in 0..1000 {
            if !core.pass(false, true) && core.work.look() == Entry::Dead {
                break;
            }
        }
        let mut left: Vec<String> = Vec::new();
        left.extend(
            context
                .halves
                .names()
                .iter()
                .map(|name| format!("bottom half '{name}'")),
        );
        let names = core.live_names.borrow();
        for (name, count) in names.iter().filter(|(_, count)| *count > 0) {
            left.push(format!("{count} coroutine(s) '{name}'"));
        }
        let arriving = context.arriving.load(Ordering::Relaxed);
        if arriving > 0 {
            left.push(format!("{arriving} coroutine(s) that did not begin"));
        }
        left.extend(context.timers.armed());
        left.extend(context.handlers.describe());
        left.extend(core.work.describe());
        left.extend(context.postponed.describe());
        left.extend(context.residents.end());
        assert!(
            left.is_empty(),
            "context '{}' closed with live {} (rule 3.3)",
            context.name(),
            left.join(", ")
        );
        context.closed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.core.context.closed.store(true, Ordering::Relaxed);
        } else {
            self.refuse_leftovers();
        }
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home")
            .field("context", &self.core.context)
            .field("live", &self.core.live_names.borrow())
            .finish_non_exhaustive()
    }
}

/// One pass of the current context: for handlers that poll (nested), which cannot own a [`Home`].
///
/// # Panics
/// In a coroutine, or where no context is current.
#[track_caller]
pub fn poll(blocking: bool) -> bool {
    let core = current::core().expect("poll on a thread that drives no context");
    refuse_in_coroutine(&core.context);
    core.pass(blocking, blocking)
}

/// Starts a coroutine in the current context and enters it now.
///
/// # Errors
/// When there is no memory for its stack.
///
/// # Panics
/// Where no context is current; with the panic of `f`, if it comes before the first suspend.
#[track_caller]
pub fn spawn<F>(name: &'static str, f: F) -> Result<(), Error>
where
    F: for<'a> FnOnce(&'a Co) + 'static,
{
    let core = current::core().expect("spawn on a thread that drives no context");
    start(&core, name, f)
}

fn start<F>(core: &Rc<Core>, name: &'static str, f: F) -> Result<(), Error>
where
    F: for<'a> FnOnce(&'a Co) + 'static,
{
    let live = Live::begin(core, name);
    coblock_coroutine::start(&core.schedule, name, move |co| {
        let _live = live;
        f(co);
    })
}

/// Rules 3.1 and 4.4: a coroutine suspends, it does not poll.
#[track_caller]
pub(crate) fn refuse_in_coroutine(context: &AioContext) {
    coblock_coroutine::with_current(|co| {
        if let Some(co) = co {
            panic!(
                "poll of context '{}' in {co:?}, which holds {} coroutine lock(s): a coroutine \
                 suspends (rules 3.1, 4.4)",
                context.name(),
                co.holds(Hold::Lock)
            );
        }
    });
}

impl Core {
    /// How long a pass may wait; `None`: for ever.
    fn timeout_ns(&self) -> Option<u64> {
        let idle = match self.work.look() {
            Entry::Regular => return Some(0),
            Entry::Idle => Some(IDLE_NS),
            Entry::Dead => None,
        };
        if !self.ready.is_empty() || self.engine.has_completions() {
            return Some(0);
        }
        idle.into_iter()
            .chain(self.context.timers.timeout_ns())
            .min()
    }

    #[track_caller]
    fn pass(&self, blocking: bool, consume: bool) -> bool {
        current::may_poll(&self.context);
        self.passes.set(self.passes.get() + 1);
        let context = &self.context;
        let mut timeout = if blocking { self.timeout_ns() } else { Some(0) };
        if timeout != Some(0) && self.busy_poll.ask(context, &self.ready, timeout) {
            timeout = Some(0);
        }
        if timeout != Some(0) && !context.notify.announce() {
            timeout = Some(0);
        }
        match &context.park {
            Some(park) if timeout != Some(0) => {
                park.park(context, context.timers.deadline_ns());
                timeout = Some(0);
            }
            _ => {}
        }
        if timeout != Some(0) {
            timeout = self.trimmer.before_sleep(timeout);
        }
        let slept = self.busy_poll.sleep_begins(timeout);
        self.engine.wait(context, &self.ready, timeout);
        self.busy_poll.sleep_ended(slept);
        context.note_time();
        if consume {
            context.notify.accept();
        }
        let halves = self.work.run(&context.remote);
        let completions = self.engine.complete(context, &self.ready);
        let descriptors = self.ready.dispatch(&context.handlers);
        let timers = context.timers.fire();
        let progress = halves | completions | descriptors | timers;
        if progress {
            self.trimmer.progress();
        }
        progress
    }
}
