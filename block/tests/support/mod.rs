//! What the tests of this crate share: a loop, a graph, and the promise that nothing is left.

#![allow(dead_code, reason = "each test uses its part")]

pub mod change;
pub mod contexts;
pub mod counted;
pub mod load;
pub mod net;
pub mod requests;
pub mod storage;

use coblock_aio::{AioContext, Clock, ContextOptions, EngineKind, Home, Park, VirtualClock};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    BlockBackend, DenyAll, DriverRegistry, Graph, OpenGate, Options, RequestFlags, Result, open,
};
use coblock_coroutine::Co;
use std::cell::RefCell;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The body of one of many coroutines.
pub type Start = Box<dyn FnOnce(&Co)>;

/// A loop and a graph.
pub struct World {
    pub home: Home,
    pub graph: Arc<Graph>,
    pub registry: DriverRegistry,
    pub clock: Option<VirtualClock>,
}

/// Lets virtual time jump to the next timer instead of waiting.
struct Jump(VirtualClock);

impl Park for Jump {
    fn park(&self, _context: &Arc<AioContext>, deadline_ns: Option<u64>) {
        match deadline_ns {
            Some(deadline) => self.0.advance_to(deadline),
            None => panic!("the simulation stands still: everybody waits and no timer is armed"),
        }
    }
}

impl World {
    /// With the engine of that kind and real time.
    pub fn with_engine(engine: EngineKind) -> World {
        World::with_options(
            ContextOptions {
                engine,
                ..ContextOptions::named("test")
            },
            None,
        )
    }

    /// For simulated disks: no engine, virtual time.
    pub fn simulated() -> World {
        let clock = VirtualClock::new();
        let options = ContextOptions {
            engine: EngineKind::None,
            clock: Clock::Virtual(clock.clone()),
            park: Some(Arc::new(Jump(clock.clone()))),
            ..ContextOptions::named("sim")
        };
        World::with_options(options, Some(clock))
    }

    fn with_options(options: ContextOptions, clock: Option<VirtualClock>) -> World {
        let home = Home::new(options).expect("a context");
        let graph = Graph::new(home.context());
        World {
            home,
            graph,
            registry: DriverRegistry::with_builtin(),
            clock,
        }
    }

    /// Opens a node and makes a backend for it.
    pub fn open(&self, options: Options) -> Result<BlockBackend> {
        self.open_through(&DenyAll, options)
    }

    /// The same with a gate.
    pub fn open_through(&self, gate: &dyn OpenGate, options: Options) -> Result<BlockBackend> {
        let node = self
            .home
            .run(|co| open(co, &self.graph, &self.registry, gate, options))?;
        Ok(BlockBackend::new(&self.graph, node))
    }

    /// Runs `f` as a coroutine.
    pub fn run<R>(&self, f: impl FnOnce(&Co) -> R) -> R {
        self.home.run(f)
    }

    /// Starts coroutines that all take part in one scenario, and polls until all have ended.
    pub fn run_all(&self, starts: Vec<Start>) {
        let left = Arc::new(AtomicUsize::new(starts.len()));
        for start in starts {
            let left = left.clone();
            self.home.spawn("test", move |co| {
                start(co);
                left.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while left.load(Ordering::Relaxed) > 0 {
            self.home.poll(true);
        }
    }

    /// Closes a backend and drops it.
    pub fn close(&self, backend: BlockBackend) -> Result<()> {
        self.run(|co| backend.close(co))
    }

    /// Every test ends here: nothing is left.
    pub fn end(self) {
        assert_eq!(
            self.graph.live_nodes(),
            0,
            "nodes are left: {:?}",
            self.graph.node_names()
        );
        assert_eq!(
            self.home.context().live_coroutines(),
            0,
            "coroutines are left"
        );
        drop(self.graph);
        self.home.close();
    }
}

/// Both engines, as far as this machine has them.
pub fn engines() -> Vec<EngineKind> {
    let mut engines = vec![EngineKind::Threads];
    let ring = ContextOptions {
        engine: EngineKind::IoUring,
        ..ContextOptions::named("probe")
    };
    match Home::new(ring) {
        Ok(home) => {
            home.close();
            engines.push(EngineKind::IoUring);
        }
        Err(error) => writeln!(
            std::io::stderr(),
            "SKIPPED: io_uring is not to be had here: {error}"
        )
        .expect("standard error"),
    }
    engines
}

/// Bytes that tell where they belong: no two blocks of a pattern are alike.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 7).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Nothing beyond the bytes.
pub const PLAIN: RequestFlags = RequestFlags::empty();

/// Options of a node on a simulated disk.
pub fn sim(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone())
}

/// A backend whose requests take so long, and do nothing.
pub fn null(world: &World, latency_ns: u64) -> Arc<BlockBackend> {
    let options = Options::new()
        .with("driver", "null-co")
        .with("latency-ns", latency_ns.to_string());
    Arc::new(world.open(options).unwrap())
}

/// Reads the first 512 bytes.
pub fn read_sector(co: &Co, backend: &BlockBackend) -> Result<()> {
    backend.pread(co, 0, &mut [0; 512][..])
}

/// The message with which `f` panics.
pub fn panics(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("it is refused");
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => (*panic.downcast::<&str>().expect("a message")).to_owned(),
    }
}

/// A world with one simulated disk behind a `sim` node.
pub fn sim_world(disk: &Arc<SimDisk>, more: &[(&str, &str)]) -> (World, Arc<BlockBackend>) {
    let world = World::simulated();
    let options = more
        .iter()
        .fold(sim(disk), |options, (key, value)| options.with(key, *value));
    let backend = Arc::new(world.open(options).unwrap());
    (world, backend)
}

/// Closes the backend; nothing is left.
pub fn end(world: World, backend: Arc<BlockBackend>) {
    world.run(|co| backend.close(co)).unwrap();
    drop(backend);
    world.end();
}

/// Starts a request; tells how it ended, once it has.
pub fn start(
    world: &World,
    backend: &Arc<BlockBackend>,
    f: impl FnOnce(&Co, &BlockBackend) -> Result<()> + 'static,
) -> Ended {
    let (backend, result) = (backend.clone(), Rc::new(RefCell::new(None)));
    let told = result.clone();
    world.home.spawn("request", move |co| {
        let ended = f(co, &backend);
        *told.borrow_mut() = Some(ended);
    });
    result
}

/// Polls until nothing happens any more.
pub fn settle(world: &World) {
    while world.home.poll(false) {}
}

/// How a request ended, once it has.
pub type Ended = Rc<RefCell<Option<Result<()>>>>;

/// Closes the backend, whose node lives in `thread`, before that ends.
pub fn end_after(world: World, backend: Arc<BlockBackend>, thread: coblock_aio::IoThread) {
    world.run(|co| backend.close(co)).unwrap();
    thread.stop();
    end(world, backend);
}
