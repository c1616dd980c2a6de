//! A loop, a graph, the drivers of this program, and the gate through which images open what they
//! name.
//!
//! The library opens no file that an image names unless its caller lets it. Here that is done as in
//! the reference's tool: local files, relative to the image; where the image does not say their
//! format, [`probe`] guesses it.

use std::sync::Arc;

use coblock::aio::{ContextOptions, EngineKind, Home};
use coblock::block::{
    self, BlockBackend, Dependent, DriverRegistry, Graph, LikeReference, Node, OpenGate, Options,
    drivers,
};
use coblock::coroutine::Co;
use coblock::qcow2;

use crate::spec::{Access, ImageSpec, probe};

/// Who talks to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where the kernel has it.
    Auto,
    /// io_uring or an error.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl Engine {
    /// Words of the command line.
    pub const NAMES: [(&str, Self); 3] = [
        ("auto", Self::Auto),
        ("io_uring", Self::IoUring),
        ("threads", Self::Threads),
    ];

    /// The library's word for it.
    pub fn kind(self) -> EngineKind {
        match self {
            Self::Auto => EngineKind::Auto,
            Self::IoUring => EngineKind::IoUring,
            Self::Threads => EngineKind::Threads,
        }
    }
}

/// As the library has it; and a disk without a file is opened too, because it opens nothing.
struct Gate(LikeReference);

impl OpenGate for Gate {
    fn dependent(&self, wanted: &Dependent<'_>) -> block::Result<Options> {
        if wanted.name == "null-co://" {
            return Ok(Options::new()
                .with("driver", wanted.format.unwrap_or("raw"))
                .with("file.driver", "null-co"));
        }
        self.0.dependent(wanted)
    }

    fn max_depth(&self) -> usize {
        self.0.max_depth()
    }
}

/// A loop, a graph, and the drivers of this program.
pub struct Session {
    /// Drives everything.
    pub home: Home,
    /// Holds all nodes.
    pub graph: Arc<Graph>,
    registry: DriverRegistry,
    gate: Gate,
}

impl Session {
    /// A new one.
    ///
    /// # Errors
    /// The loop could not be made: why.
    pub fn new(engine: Engine) -> Result<Self, String> {
        let options = ContextOptions {
            engine: engine.kind(),
            ..ContextOptions::named("main")
        };
        let home = Home::new(options).map_err(|error| {
            format!(
                "Could not set up I/O: {}",
                crate::output::os_message(&error)
            )
        })?;
        let graph = Graph::new(home.context());
        let mut registry = DriverRegistry::new();
        registry.register(
            "copy-on-read",
            Box::new(drivers::copy_on_read::OpenCopyOnRead),
        );
        registry.register("file", Box::new(drivers::file::OpenFile));
        registry.register("null-co", Box::new(drivers::null::OpenNull));
        registry.register("raw", Box::new(drivers::raw::OpenRaw));
        registry.register("qcow2", Box::new(qcow2::OpenQcow2));
        registry.register("throttle", Box::new(drivers::throttle::OpenThrottle));
        let gate = Gate(LikeReference::with_guess(|path| Ok(probe(path).to_owned())));
        Ok(Self {
            home,
            graph,
            registry,
            gate,
        })
    }

    /// Opens a node from options.
    ///
    /// # Errors
    /// What the library says.
    pub fn open_node(&self, co: &Co, options: Options) -> block::Result<Arc<Node>> {
        block::open(co, &self.graph, &self.registry, &self.gate, options)
    }

    /// Opens an image.
    ///
    /// # Errors
    /// What the library says.
    pub fn open(&self, co: &Co, spec: &ImageSpec, access: Access) -> block::Result<BlockBackend> {
        let node = self.open_node(co, spec.options(access))?;
        Ok(BlockBackend::new(&self.graph, node))
    }

    /// Ends the session: nothing may be left in it.
    pub fn close(self) {
        assert_eq!(self.graph.live_nodes(), 0, "a command ends with open nodes");
        drop(self.graph);
        self.home.close();
    }
}
