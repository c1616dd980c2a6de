//! A bounded pool of threads for work that blocks.
//!
//! Threads are made when work waits and none is idle, up to a limit, and end after a few idle
//! seconds. Work is started in the order submitted. Whoever wants to hear about the end submits
//! through a context: the callback runs there, in a later pass, never before the submitting call
//! returned.
//!
//! ```text
//!   submit_work:  WAITING --pool thread--> RUNNING --> DONE     done(result of the work)
//!                    |
//!                    +--cancel--> CANCELLED                     done(-ECANCELED)
//! ```

use crate::context::AioContext;
use coblock_coroutine::ThreadLock;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Work for a pool: to be run once, or dropped.
pub struct Job(Option<Kind>);

enum Kind {
    Once(Box<dyn FnOnce() + Send>),
    Lasting(Arc<dyn Lasting>),
}

/// Work that exists before and after it is submitted, so that submitting allocates nothing.
pub(crate) trait Lasting: Send + Sync {
    fn run(&self);
    /// The pool dropped the job.
    fn dropped(&self);
}

impl Job {
    /// A job that runs `work`.
    pub fn new(work: impl FnOnce() + Send + 'static) -> Self {
        Job(Some(Kind::Once(Box::new(work))))
    }

    pub(crate) fn boxed(work: Box<dyn FnOnce() + Send>) -> Self {
        Job(Some(Kind::Once(work)))
    }

    pub(crate) fn lasting(work: Arc<dyn Lasting>) -> Self {
        Job(Some(Kind::Lasting(work)))
    }

    /// Does the work, on the calling thread.
    pub fn run(mut self) {
        match self.0.take() {
            Some(Kind::Once(work)) => work(),
            Some(Kind::Lasting(work)) => work.run(),
            None => {}
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(Kind::Lasting(work)) = self.0.take() {
            work.dropped();
        }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Job")
    }
}

/// Runs blocking work somewhere else: threads, or a simulator at a virtual time.
pub trait WorkPool: Send + Sync {
    /// Takes the work and returns at once. It must be run once, or dropped; never inside this call.
    fn submit(&self, work: Job);
}

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(10);

/// Threads that take work from one queue.
pub struct ThreadPool {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    max_threads: usize,
    state: Mutex<State>,
    work_came: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// Threads that wait for work.
    idle: usize,
    /// Threads that exist; their number never exceeds the limit.
    threads: usize,
    handles: Vec<JoinHandle<()>>,
    next_name: u64,
    stopping: bool,
}

impl ThreadPool {
    /// Limit of the pool that a context makes for itself.
    pub const DEFAULT_THREADS: usize = 64;

    /// A pool without threads yet; at most `max_threads` (at least 1) will exist at a time. Their
    /// names begin with `name`.
    pub fn new(name: &str, max_threads: usize) -> Self {
        assert!(max_threads > 0, "a pool of no threads never does anything");
        let shared = Shared {
            name: name.to_owned(),
            max_threads,
            state: Mutex::new(State::default()),
            work_came: Condvar::new(),
        };
        ThreadPool {
            shared: Arc::new(shared),
        }
    }

    /// Threads that exist now.
    pub fn threads(&self) -> usize {
        self.shared.state().threads
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no work runs under the lock of the pool")
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                // A panic of the work is its own affair: it is reported, and the thread goes on.
                let run = std::panic::AssertUnwindSafe(|| job.run());
                if std::panic::catch_unwind(run).is_err() {
                    log::error!("work panicked on a thread of pool '{}'", self.name);
                }
                state = self.state();
                continue;
            }
            if state.stopping {
                break;
            }
            state.idle += 1;
            let (woken, wait) = self
                .work_came
                .wait_timeout(state, IDLE)
                .expect("no work runs under the lock");
            state = woken;
            state.idle -= 1;
            if wait.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

impl WorkPool for ThreadPool {
    fn submit(&self, work: Job) {
        let shared = &self.shared;
        let mut state = shared.state();
        assert!(!state.stopping, "work for a pool that ends");
        state.queue.push_back(work);
        if state.queue.len() <= state.idle {
            shared.work_came.notify_one();
            return;
        }
        if state.threads == shared.max_threads {
            return;
        }
        state.threads += 1;
        state.next_name += 1;
        state.handles.retain(|handle| !handle.is_finished());
        let name = format!("{}-pool-{}", shared.name, state.next_name);
        let in_thread = shared.clone();
        match thread::Builder::new()
            .name(name)
            .spawn(move || in_thread.run())
        {
            Ok(handle) => state.handles.push(handle),
            Err(error) => {
                state.threads -= 1;
                // The threads that exist take the work sooner or later.
                assert!(
                    state.threads > 0,
                    "pool '{}' got not one thread: {error}",
                    shared.name
                );
                log::warn!(
                    "pool '{}' stays at {} threads: {error}",
                    shared.name,
                    state.threads
                );
            }
        }
    }
}

impl Drop for ThreadPool {
    /// Waits until all work is done.
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.stopping = true;
        let handles = std::mem::take(&mut state.handles);
        drop(state);
        self.shared.work_came.notify_all();
        for handle in handles {
            // The last owner may be some work on one of these threads, which cannot wait for
            // itself.
            if handle.thread().id() != thread::current().id() {
                handle.join().expect("a thread of a pool catches panics");
            }
        }
    }
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state();
        f.debug_struct("ThreadPool")
            .field("name", &self.shared.name)
            .field("threads", &state.threads)
            .field("idle", &state.idle)
            .field("queued", &state.queue.len())
            .finish()
    }
}

const WAITING: u8 = 0;
const RUNNING: u8 = 1;
const CANCELLED: u8 = 2;
const DONE: u8 = 3;

type Done = Box<dyn FnOnce(i32) + Send>;

struct Ticket {
    /// Moved by whoever finds it `WAITING`: the pool to `RUNNING`, a canceller to `CANCELLED`.
    state: AtomicU8,
    context: Arc<AioContext>,
    done: ThreadLock<Option<Done>>,
}

impl Ticket {
    fn take(&self, to: u8) -> bool {
        self.state
            .compare_exchange(WAITING, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    fn finish(self: &Arc<Self>, result: i32) {
        let ticket = self.clone();
        self.context.oneshot(move || {
            let done = ticket.done.lock().take();
            ticket.state.store(DONE, Ordering::Release);
            if let Some(done) = done {
                done(result);
            }
        });
    }
}

/// Work that was submitted with [`AioContext::submit_work`]. Dropping it changes nothing.
pub struct WorkHandle(Arc<Ticket>);

impl WorkHandle {
    /// Does not start the work if it has not started; the callback then gets `-ECANCELED`, in a
    /// later pass. Tells whether that was so. Any thread.
    pub fn cancel(&self) -> bool {
        let cancelled = self.0.take(CANCELLED);
        if cancelled {
            self.0.finish(-libc::ECANCELED);
        }
        cancelled
    }

    /// Was the callback called?
    pub fn is_done(&self) -> bool {
        self.0.state.load(Ordering::Acquire) == DONE
    }
}

impl fmt::Debug for WorkHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.0.state.load(Ordering::Relaxed) {
            WAITING => "waiting",
            RUNNING => "running",
            CANCELLED => "cancelled",
            _ => "done",
        };
        write!(f, "WorkHandle({word})")
    }
}

impl AioContext {
    /// Runs `work` on the pool of this context, then `done` with its result here, in a later pass,
    /// outside coroutines. Any thread. Work that panics has the result `-EIO`.
    pub fn submit_work(
        self: &Arc<Self>,
        work: impl FnOnce() -> i32 + Send + 'static,
        done: impl FnOnce(i32) + Send + 'static,
    ) -> WorkHandle {
        let ticket = Arc::new(Ticket {
            state: AtomicU8::new(WAITING),
            context: self.clone(),
            done: ThreadLock::new(Some(Box::new(done))),
        });
        let on_pool = ticket.clone();
        self.pool().submit(Job::new(move || {
            if on_pool.take(RUNNING) {
                let work = std::panic::AssertUnwindSafe(work);
                let result = std::panic::catch_unwind(work).unwrap_or_else(|_reported| {
                    log::error!("work panicked on a pool thread; its result is EIO");
                    -libc::EIO
                });
                on_pool.finish(result);
            }
        }));
        WorkHandle(ticket)
    }
}
