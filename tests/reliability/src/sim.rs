//! Virtual time: contexts that one thread steps, in an order that a seed decides, and how long
//! anything may take there.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::sim::{VirtualPool, World};
use coblock::aio::{AioContext, Clock, ContextOptions, EngineKind, Home, Park, VirtualClock};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock::block::{DriverRegistry, Graph, Options};
use coblock::coroutine::Co;
use coblock::qcow2::CacheSizes;

use super::session::{self, Session};

/// Virtual time after which a run is taken to hang.
const WATCHDOG_NS: u64 = 60_000_000_000;

/// Steps without an end after which it is taken to run in circles.
const WATCHDOG_STEPS: u64 = 20_000_000;

/// Nothing is waited for: time jumps to the next timer. Where there is none, nothing will ever
/// happen again.
struct Jump(VirtualClock);

impl Park for Jump {
    fn park(&self, context: &Arc<AioContext>, deadline_ns: Option<u64>) {
        match deadline_ns {
            Some(at) => self.0.advance_to(at),
            None => panic!("the simulation stands still: {context:?}"),
        }
    }
}

/// A session with one context in virtual time.
pub fn session() -> Session {
    let clock = VirtualClock::new();
    // Compressed clusters are inflated there.
    let pool = Arc::new(VirtualPool::new(1_000));
    let session = Session::with(ContextOptions {
        engine: EngineKind::None,
        pool: Some(pool.clone()),
        park: Some(Arc::new(Jump(clock.clone()))),
        clock: Clock::Virtual(clock),
        ..ContextOptions::named("simulation")
    });
    pool.run_in(session.home.context());
    session
}

/// Several contexts and one graph in virtual time.
pub struct Simulation {
    world: World,
    homes: Vec<Rc<Home>>,
    pub graph: Arc<Graph>,
    pub registry: Rc<DriverRegistry>,
}

impl Simulation {
    /// With `queues` contexts, which take turns as `seed` says.
    pub fn new(seed: u64, queues: usize) -> Self {
        let world = World::new(seed);
        let homes: Vec<_> = (0..queues)
            .map(|nth| world.add(&format!("queue-{nth}")).expect("a context"))
            .collect();
        Simulation {
            graph: Graph::new(homes[0].context()),
            registry: Rc::new(session::registry()),
            world,
            homes,
        }
    }

    /// The contexts.
    pub fn homes(&self) -> Vec<&Home> {
        self.homes.iter().map(|home| &**home).collect()
    }

    /// A group of limits, none of which is set.
    pub fn add_limits(&self, name: &str) {
        let clock = self.homes[0].context().clock();
        let group = ThrottleGroup::new(name, clock, ThrottleConfig::default());
        let added = self.graph.add_throttle_group(&group.expect("no limits"));
        added.expect("the only group of that name");
    }

    /// Virtual time so far.
    pub fn now_ns(&self) -> u64 {
        self.world.clock().now_ns()
    }

    /// Steps all contexts until `done`.
    ///
    /// # Panics
    /// When nothing can ever happen again; when it takes a minute of virtual time, or runs in
    /// circles.
    pub fn run_until(&self, done: impl Fn() -> bool) {
        let limit = self.now_ns() + WATCHDOG_NS;
        let steps = std::cell::Cell::new(0);
        self.world.run_until(|| {
            steps.set(steps.get() + 1);
            assert!(
                self.now_ns() < limit && steps.get() < WATCHDOG_STEPS,
                "watchdog: no end after a minute or {} steps: {:?}",
                steps.get(),
                self.world
            );
            done()
        });
    }

    /// Runs `f` as a coroutine of the first context.
    pub fn run<R: 'static>(&self, f: impl FnOnce(&Co) -> R + 'static) -> R {
        let result = Rc::new(RefCell::new(None));
        let into = result.clone();
        self.homes[0].spawn("run", move |co| {
            let value = f(co);
            *into.borrow_mut() = Some(value);
        });
        self.run_until(|| result.borrow().is_some());
        let value = result.borrow_mut().take();
        value.expect("it has ended")
    }

    /// The end: no node lives, and no coroutine.
    pub fn end(self) {
        let Simulation {
            world,
            homes,
            graph,
            registry: _,
        } = self;
        assert_eq!(graph.live_nodes(), 0, "nodes that outlive their run");
        drop(graph);
        world.settle();
        for home in &homes {
            assert_eq!(
                home.context().live_coroutines(),
                0,
                "coroutines that outlive their run: {home:?}"
            );
        }
        drop(world);
        for home in homes {
            Rc::into_inner(home).expect("the world is gone").close();
        }
    }
}

/// Options of a qcow2 image on a simulated disk.
pub fn image(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "qcow2")
        .with("discard", "unmap")
        // The clock jumps to the next timer: with one that never ends, a hang would go unseen.
        .with("cache-clean-interval", "0")
        .with("file.driver", "sim")
        .with_object("file.disk", disk.clone())
}

/// The same with the smallest legal caches.
pub fn image_with_smallest_caches(disk: &Arc<SimDisk>) -> Options {
    let caches = CacheSizes::smallest_for(super::soundness::header(disk).geometry);
    image(disk)
        .with("l2-cache-size", caches.l2.to_string())
        .with("refcount-cache-size", caches.refcounts.to_string())
}
