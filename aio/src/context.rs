//! The part of an event loop that any thread may use (rules 3.1 to 3.4, 3.9).
//!
//! ```text
//!   any thread --- post, arm, set_fd_handler, spawn ---> AioContext  <--- drives --- Home (one, !Send)
//! ```
//!
//! Who drives a context is a role, [`Home`](crate::Home), not an OS thread: an [`IoThread`] holds
//! one for its whole life, a simulator steps several in one thread. Work from the home itself goes
//! to a plain list; work from elsewhere to a lock-free one, followed by a notification.
//!
//! [`IoThread`]: crate::IoThread

use crate::bottom_half::{BottomHalf, Work};
use crate::clock::Clock;
use crate::current;
use crate::fd_handler::{FdHandler, Handlers};
use crate::monitor::{Monitor, MonitorKind};
use crate::notifier::EventNotifier;
use crate::notify::Notify;
use crate::postpone::Postponed;
use crate::resident::Residents;
use crate::sys::pending::Pending;
use crate::thread_pool::{ThreadPool, WorkPool};
use crate::timer::{Timer, Timers};
use coblock_coroutine::{Co, Error, Ready, Schedule, ThreadLock};
use crossbeam_queue::SegQueue;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;

/// How a context does I/O on files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the kernel has it, else threads; the log says why not.
    #[default]
    Auto,
    /// io_uring, or making the context fails.
    IoUring,
    /// A pool of threads; works everywhere.
    Threads,
    /// None: a request is refused with `Unsupported`. For loops that only run timers and callbacks.
    None,
}

impl std::str::FromStr for EngineKind {
    type Err = io::Error;

    fn from_str(word: &str) -> io::Result<Self> {
        Ok(match word {
            "auto" => EngineKind::Auto,
            "io_uring" => EngineKind::IoUring,
            "threads" => EngineKind::Threads,
            "none" => EngineKind::None,
            _ => {
                let message = format!("unknown engine '{word}': auto, io_uring, threads or none");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        })
    }
}

/// How the ring delivers completions, from the best to what every kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum RingDelivery {
    /// When the loop enters the kernel (`DEFER_TASKRUN`, Linux 6.1).
    #[default]
    Deferred,
    /// When the thread enters the kernel for anything (`COOP_TASKRUN`, Linux 5.19).
    Cooperative,
    /// At once, with an interrupt of the thread.
    Interrupting,
}

/// Replaces the wait of a blocking poll, for simulation.
pub trait Park: Send + Sync {
    /// Called on the home where it would wait. Returns when something may have happened, or time
    /// has reached `deadline_ns` of the context's clock (`None`: no timer is armed). May return
    /// early.
    fn park(&self, context: &Arc<AioContext>, deadline_ns: Option<u64>);
}

/// What a context is made with.
#[derive(Clone)]
pub struct ContextOptions {
    /// For messages and names of threads.
    pub name: String,
    /// How it does I/O.
    pub engine: EngineKind,
    /// How it watches descriptors.
    pub monitor: MonitorKind,
    /// What its timers and sleeping coroutines go by.
    pub clock: Clock,
    /// Replaces waiting.
    pub park: Option<Arc<dyn Park>>,
    /// Runs blocking work; `None`: a pool of its own, made when it is first needed.
    pub pool: Option<Arc<dyn WorkPool>>,
    /// Entries of the submission ring, 1 to 32768. More requests than that may be in flight.
    pub ring_depth: u32,
    /// The best delivery to try; what the kernel refuses is followed by the next one. For tests of
    /// what older kernels do.
    pub ring_delivery: RingDelivery,
}

impl Default for ContextOptions {
    fn default() -> Self {
        ContextOptions {
            name: "main".to_owned(),
            engine: EngineKind::Auto,
            monitor: MonitorKind::Auto,
            clock: Clock::Real,
            park: None,
            pool: None,
            ring_depth: 256,
            ring_delivery: RingDelivery::Deferred,
        }
    }
}

impl ContextOptions {
    /// The default ones, with a name.
    pub fn named(name: impl Into<String>) -> Self {
        ContextOptions {
            name: name.into(),
            ..Default::default()
        }
    }
}

impl fmt::Debug for ContextOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextOptions")
            .field("name", &self.name)
            .field("engine", &self.engine)
            .field("monitor", &self.monitor)
            .field("clock", &self.clock)
            .field("park", &self.park.is_some())
            .field("pool", &self.pool.is_some())
            .field("ring_depth", &self.ring_depth)
            .field("ring_delivery", &self.ring_delivery)
            .finish()
    }
}

/// Names of the live things of one kind, so that a refusal can name them.
#[derive(Default)]
pub(crate) struct Register(ThreadLock<Names>);

#[derive(Default)]
struct Names {
    live: BTreeMap<u64, &'static str>,
    next: u64,
}

impl Register {
    pub fn insert(&self, name: &'static str) -> u64 {
        let mut names = self.0.lock();
        names.next += 1;
        let key = names.next;
        names.live.insert(key, name);
        key
    }

    pub fn remove(&self, key: u64) {
        self.0.lock().live.remove(&key);
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.0.lock().live.values().copied().collect()
    }
}

/// An event loop, seen from any thread.
pub struct AioContext {
    name: String,
    id: u64,
    clock: Clock,
    engine_name: &'static str,
    /// Where its home is: homes stay on their threads.
    home_thread: ThreadId,
    /// Work from other threads.
    pub(crate) remote: SegQueue<Work>,
    pub(crate) notify: Notify,
    pub(crate) notifier: EventNotifier,
    /// Watches the notifier and the descriptors that have handlers.
    pub(crate) monitor: Monitor,
    pub(crate) handlers: Handlers,
    pub(crate) timers: Timers,
    pub(crate) halves: Register,
    pub(crate) postponed: Postponed,
    pub(crate) residents: Residents,
    pub(crate) park: Option<Arc<dyn Park>>,
    pool: OnceLock<Arc<dyn WorkPool>>,
    /// Coroutines that began here and have not finished. Written by the home alone, with plain
    /// stores.
    pub(crate) live: AtomicUsize,
    /// Coroutines posted from elsewhere that did not begin yet.
    pub(crate) arriving: AtomicUsize,
    /// The home has ended; nothing runs here any more.
    pub(crate) closed: AtomicBool,
}

/// For [`AioContext::id`] only; nothing is decided by it.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl AioContext {
    pub(crate) fn new(
        options: &ContextOptions,
        engine_name: &'static str,
    ) -> io::Result<Arc<Self>> {
        let notifier = EventNotifier::new()?;
        let monitor = Monitor::new(options.monitor, &options.name, &notifier)?;
        let context = Arc::new(AioContext {
            name: options.name.clone(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            clock: options.clock.clone(),
            engine_name,
            home_thread: std::thread::current().id(),
            remote: SegQueue::new(),
            notify: Notify::new(),
            notifier,
            monitor,
            handlers: Handlers::new(),
            timers: Timers::new(options.clock.clone()),
            halves: Register::default(),
            postponed: Postponed::default(),
            residents: Residents::default(),
            park: options.park.clone(),
            pool: options
                .pool
                .clone()
                .map_or_else(OnceLock::new, OnceLock::from),
            live: AtomicUsize::new(0),
            arriving: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        });
        if let Clock::Virtual(clock) = &options.clock {
            clock.register(&context);
        }
        Ok(context)
    }

    /// The name that it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A number that no other context of this process has or had.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// `io_uring`, `threads` or `none`.
    pub fn engine_name(&self) -> &'static str {
        self.engine_name
    }

    /// `epoll` or `poll`.
    pub fn monitor_name(&self) -> &'static str {
        self.monitor.name()
    }

    /// The clock that its timers go by, unless they name another.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Nanoseconds of its clock. Any thread. Reads the clock: not for each request.
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Coroutines that were spawned here and have not finished. Any thread; exact on the home.
    pub fn live_coroutines(&self) -> usize {
        self.live.load(Ordering::Relaxed) + self.arriving.load(Ordering::Relaxed)
    }

    /// Is the calling thread driving this context now? (Rule 3.9.)
    pub fn is_current(&self) -> bool {
        current::is_current(self)
    }

    /// Makes a bottom half (rule 3.2). `f` runs on the home, outside coroutines, and may poll.
    pub fn bottom_half(
        self: &Arc<Self>,
        name: &'static str,
        f: impl Fn() + Send + Sync + 'static,
    ) -> BottomHalf {
        BottomHalf::new(self, name, Box::new(f))
    }

    /// Calls `f` once, in the next pass, outside coroutines (rule 3.2). Any thread.
    pub fn oneshot(&self, f: impl FnOnce() + Send + 'static) {
        self.post(Work::Once(Box::new(f)));
    }

    /// Tells the coroutines of the calling thread what time it is: since when they wait, and how
    /// long requests take. Once a pass of the loop, and where it is entered from outside.
    pub(crate) fn note_time(&self) {
        coblock_coroutine::note_time(self.clock.now_ns());
    }

    /// Makes a timer on the context's clock (rule 3.7). `f` runs on the home, outside coroutines,
    /// and may poll. Not armed yet.
    pub fn timer(
        self: &Arc<Self>,
        name: &'static str,
        f: impl Fn() + Send + Sync + 'static,
    ) -> Timer {
        self.timer_on(&self.clock.clone(), name, f)
    }

    /// Makes a timer on another clock. It runs in this context all the same.
    pub fn timer_on(
        self: &Arc<Self>,
        clock: &Clock,
        name: &'static str,
        f: impl Fn() + Send + Sync + 'static,
    ) -> Timer {
        Timer::new(self, self.timers.list(self, clock), name, Box::new(f))
    }

    /// Sets what is called when `fd` is ready, in place of what was set before; an empty handler
    /// removes (rule 3.5). Any thread. Remove it before closing the descriptor.
    ///
    /// # Errors
    /// When the descriptor is not open, or of a kind that is always ready (regular files).
    pub fn set_fd_handler(&self, fd: RawFd, handler: FdHandler) -> io::Result<()> {
        self.handlers.set(&self.monitor, fd, handler)?;
        self.watched_changed();
        Ok(())
    }

    /// Removes the handler of `fd`, if there is one; it is not called any more. Any thread.
    pub fn remove_fd_handler(&self, fd: RawFd) {
        let removed = self.set_fd_handler(fd, FdHandler::new());
        removed.expect("removing a handler does not fail");
    }

    /// Wakes a loop that would see only at its next wait what it has to watch.
    fn watched_changed(&self) {
        if self.monitor.must_wake() {
            self.kick();
        }
    }

    /// External handlers rest from now on: neither waited for nor called (rule 3.6). Any thread;
    /// counts, so each call needs its [`enable_external`](Self::enable_external).
    ///
    /// On the home no external handler is called after this returned. From another thread, one that
    /// is being called goes on, and one that the loop is just about to call is still called.
    pub fn disable_external(&self) {
        self.handlers.disable_external(&self.monitor);
        self.watched_changed();
    }

    /// Undoes one [`disable_external`](Self::disable_external). Any thread. The last one wakes the
    /// loop, which then sees what became ready meanwhile and still is.
    ///
    /// # Panics
    /// Without such a call before it; names the place where the last one was undone.
    #[track_caller]
    pub fn enable_external(&self) {
        let here = Location::caller();
        match self.handlers.enable_external(&self.monitor, here) {
            Ok(true) => {
                self.kick();
                if !coblock_coroutine::mutant!("the end of a section runs no postponed action") {
                    self.run_postponed();
                }
            }
            Ok(false) => {}
            Err(undone) => {
                let before = undone.map_or_else(
                    || "they never were disabled".to_owned(),
                    |place| format!("the last section ended at {place}"),
                );
                panic!(
                    "external handlers of context '{}' enabled at {here} without having been \
                     disabled: {before} (rule 3.6)",
                    self.name
                );
            }
        }
    }

    /// How many calls of [`disable_external`](Self::disable_external) are not undone. Any thread.
    pub fn external_disabled(&self) -> u32 {
        self.handlers.external_disabled()
    }

    /// Starts a coroutine here, from any thread: it begins in the next pass.
    ///
    /// # Errors
    /// When there is no memory for its stack.
    pub fn spawn<F>(self: &Arc<Self>, name: &'static str, f: F) -> Result<(), Error>
    where
        F: for<'a> FnOnce(&'a Co) + Send + 'static,
    {
        let home: Arc<dyn Schedule> = self.clone();
        let arriving = Arriving::new(self.clone());
        coblock_coroutine::start_remote(&home, name, move |co| {
            let _live = current::Live::begin_here(name);
            drop(arriving);
            f(co);
        })
    }

    /// Ends the current or the next wait of the loop (rule 3.4). Any thread; by itself no progress.
    pub fn notify(&self) {
        if self.notify.publish() {
            self.notifier.set();
        }
    }

    /// Notifies unless the caller is the home, which does not wait now.
    pub(crate) fn kick(&self) {
        if !self.is_current() {
            self.notify();
        }
    }

    /// The same for what the loop looks at before each wait. On the home's own thread it does not
    /// wait now either, unless that thread is inside of another home's pass, or a loop of somebody
    /// else has been told how long it may wait.
    pub(crate) fn kick_if_waiting(&self) {
        let is_between_passes = current::current_id().is_none()
            && self.home_thread == std::thread::current().id()
            && !self.notify.is_announced();
        if !is_between_passes {
            self.kick();
        }
    }

    /// Runs `work` in the next pass (rules 3.2, 3.10), after all that was posted before.
    pub(crate) fn post(&self, work: Work) {
        let Some(work) = current::post_local(self, work) else {
            return;
        };
        assert!(
            !self.closed.load(Ordering::Relaxed),
            "{work:?} posted to context '{}', which is closed",
            self.name
        );
        self.remote.push(work);
        self.notify();
    }

    /// Completes operations in the next pass. From threads that are not the home.
    pub(crate) fn post_completions(&self, done: impl Iterator<Item = (Pending, i32)>) {
        let mut any = false;
        for (pending, result) in done {
            self.remote.push(Work::Done(pending, result));
            any = true;
        }
        if any {
            self.notify();
        }
    }

    /// Where blocking work of this context runs.
    pub fn pool(&self) -> &Arc<dyn WorkPool> {
        self.pool
            .get_or_init(|| Arc::new(ThreadPool::new(&self.name, ThreadPool::DEFAULT_THREADS)))
    }
}

/// A coroutine on its way to its context.
pub(crate) struct Arriving(Arc<AioContext>);

impl Arriving {
    pub fn new(context: Arc<AioContext>) -> Self {
        context.arriving.fetch_add(1, Ordering::Relaxed);
        Arriving(context)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.0.arriving.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Schedule for AioContext {
    fn schedule(&self, ready: Ready) {
        self.post(Work::Enter(ready));
    }

    fn is_home(&self) -> bool {
        self.is_current()
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for AioContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AioContext")
            .field("name", &self.name)
            .field("engine", &self.engine_name)
            .field("monitor", &self.monitor_name())
            .field("live_coroutines", &self.live_coroutines())
            .field("bottom_halves", &self.halves.names())
            .field("armed", &self.timers.armed())
            .field("handlers", &self.handlers.describe())
            .field("external_disabled", &self.external_disabled())
            .field("closed", &self.closed.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}
