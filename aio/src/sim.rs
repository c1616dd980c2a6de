//! Several contexts in one thread, on one virtual clock, in an order that a seed decides.
//!
//! A [`World`] steps its homes with polls that do not wait. When nobody can run it moves the clock
//! to the earliest timer, and when there is none it panics and names what waits: nothing can ever
//! happen again. A blocking poll inside (a nested one, in a handler) parks in the world, which
//! steps the others meanwhile. So a test of many "threads" is one thread, and a seed replays it.
//!
//! [`VirtualPool`] runs "blocking" work at a virtual time, in the order that its delays give.

use crate::clock::{Clock, VirtualClock};
use crate::context::{AioContext, ContextOptions, EngineKind, Park};
use crate::home::Home;
use crate::thread_pool::{Job, WorkPool};
use coblock_coroutine::ThreadLock;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Weak};

thread_local! {
    /// The world that this thread steps now, for blocking polls inside; as the current context is.
    static STEPPING: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

/// Contexts that one thread steps.
pub struct World {
    inner: Rc<Inner>,
}

struct Inner {
    clock: VirtualClock,
    homes: RefCell<Vec<Rc<Home>>>,
    /// State of a small generator; decides who is stepped next.
    random: Cell<u64>,
    /// Homes that are parked in a blocking poll: stepped by nobody but their own poll.
    parked: RefCell<Vec<u64>>,
}

/// Parks a blocking poll by stepping the rest of the world.
struct ParkInWorld;

impl Park for ParkInWorld {
    fn park(&self, context: &Arc<AioContext>, _deadline_ns: Option<u64>) {
        let stepping = STEPPING.with(|world| world.borrow().clone());
        let world = stepping.expect("a context of a simulated world waits only while that steps");
        world.parked.borrow_mut().push(context.id());
        if !world.step_one() {
            world.move_clock();
        }
        world.parked.borrow_mut().pop();
    }
}

impl World {
    /// An empty world at time zero.
    pub fn new(seed: u64) -> Self {
        let inner = Inner {
            clock: VirtualClock::new(),
            homes: RefCell::new(Vec::new()),
            random: Cell::new(seed.wrapping_mul(2).wrapping_add(1)),
            parked: RefCell::new(Vec::new()),
        };
        World {
            inner: Rc::new(inner),
        }
    }

    /// The clock of all its contexts.
    pub fn clock(&self) -> &VirtualClock {
        &self.inner.clock
    }

    /// A new context in it, without a real engine; blocking work runs on a [`VirtualPool`].
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn add(&self, name: &str) -> io::Result<Rc<Home>> {
        let pool = Arc::new(VirtualPool::new(1_000));
        let home = Home::new(ContextOptions {
            engine: EngineKind::Threads,
            clock: Clock::Virtual(self.inner.clock.clone()),
            park: Some(Arc::new(ParkInWorld)),
            pool: Some(pool.clone()),
            ..ContextOptions::named(name)
        })?;
        pool.run_in(home.context());
        let home = Rc::new(home);
        self.inner.homes.borrow_mut().push(home.clone());
        Ok(home)
    }

    /// Steps until `done`; panics, naming what waits, when nothing can ever happen again.
    #[track_caller]
    pub fn run_until(&self, done: impl Fn() -> bool) {
        let _stepping = Stepping::begin(&self.inner);
        while !done() {
            if !self.inner.step_one() && !done() {
                self.inner.move_clock();
            }
        }
    }

    /// Steps while anybody can run; the clock stands.
    pub fn settle(&self) {
        let _stepping = Stepping::begin(&self.inner);
        while self.inner.step_one() {}
    }
}

/// While it lives, blocking polls of this thread park in a world.
struct Stepping {
    before: Option<Rc<Inner>>,
}

impl Stepping {
    fn begin(inner: &Rc<Inner>) -> Self {
        Stepping {
            before: STEPPING.with(|world| world.replace(Some(inner.clone()))),
        }
    }
}

impl Drop for Stepping {
    fn drop(&mut self) {
        let before = self.before.take();
        STEPPING.with(|world| world.replace(before));
    }
}

impl Inner {
    fn random(&self, below: usize) -> usize {
        let next = self
            .random
            .get()
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        self.random.set(next);
        let below = below as u64;
        usize::try_from((next >> 33) % below).expect("below a usize")
    }

    /// Steps one home that makes progress, tried from a random one on; false: nobody does.
    fn step_one(&self) -> bool {
        let parked = self.parked.borrow().clone();
        let mut homes: Vec<_> = self.homes.borrow().clone();
        homes.retain(|home| !parked.contains(&home.context().id()));
        if homes.is_empty() {
            return false;
        }
        let start = self.random(homes.len());
        homes.rotate_left(start);
        homes.iter().any(|home| home.poll(false))
    }

    /// To the earliest timer of anybody.
    #[track_caller]
    fn move_clock(&self) {
        let homes = self.homes.borrow();
        let deadlines = homes
            .iter()
            .filter_map(|home| home.context().timers.deadline_ns());
        match deadlines.min() {
            Some(at) => self.clock.advance_to(at),
            None => {
                let waiting: Vec<String> = homes.iter().map(|home| format!("{home:?}")).collect();
                panic!(
                    "nothing can ever happen again; waiting: {}",
                    waiting.join("; ")
                );
            }
        }
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World")
            .field("clock", &self.inner.clock)
            .field("homes", &self.inner.homes.borrow())
            .finish_non_exhaustive()
    }
}

/// Runs blocking work on its context's own thread, one item after another, each some virtual time
/// after it was submitted.
pub struct VirtualPool {
    delay_ns: u64,
    queue: Arc<ThreadLock<VecDeque<Job>>>,
    context: ThreadLock<Weak<AioContext>>,
}

impl VirtualPool {
    /// A pool whose work takes `delay_ns`; it has to be told its context.
    pub fn new(delay_ns: u64) -> Self {
        VirtualPool {
            delay_ns,
            queue: Arc::default(),
            context: ThreadLock::new(Weak::new()),
        }
    }

    /// Work will be run by this context's loop, outside coroutines.
    pub fn run_in(&self, context: &Arc<AioContext>) {
        *self.context.lock() = Arc::downgrade(context);
    }
}

impl WorkPool for VirtualPool {
    fn submit(&self, work: Job) {
        let context = self
            .context
            .lock()
            .upgrade()
            .expect("a pool that was told its context");
        self.queue.lock().push_back(work);
        let queue = self.queue.clone();
        let at_ns = context.now_ns().saturating_add(self.delay_ns);
        context.timers.arm_once(at_ns, move || {
            let next = queue.lock().pop_front();
            if let Some(work) = next {
                work.run();
            }
        });
        // From another thread the loop must look at its timers anew.
        context.kick();
    }
}

impl fmt::Debug for VirtualPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VirtualPool({} queued)", self.queue.lock().len())
    }
}
