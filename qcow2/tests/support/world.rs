//! A loop, a graph and the drivers of a program that reads images.

use std::path::Path;
use std::sync::Arc;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    BlockBackend, DriverRegistry, Graph, LikeReference, OpenGate, Options, Result, open,
};
use coblock_coroutine::Co;
use coblock_qcow2::OpenQcow2;

use super::text;

pub struct World {
    pub home: Home,
    pub graph: Arc<Graph>,
    pub registry: DriverRegistry,
}

impl World {
    pub fn new(engine: EngineKind) -> World {
        let home = Home::new(ContextOptions {
            engine,
            ..ContextOptions::default()
        })
        .unwrap();
        World {
            graph: Graph::new(home.context()),
            home,
            registry: registry(),
        }
    }

    pub fn open(&self, co: &Co, gate: &dyn OpenGate, options: Options) -> Result<BlockBackend> {
        let node = open(co, &self.graph, &self.registry, gate, options)?;
        Ok(BlockBackend::new(&self.graph, node))
    }

    /// Every test ends here: nothing is left.
    pub fn end(self) {
        assert_eq!(self.graph.live_nodes(), 0);
        assert_eq!(self.home.context().live_coroutines(), 0);
        self.home.close();
    }
}

/// The drivers of the block layer, and this one.
pub fn registry() -> DriverRegistry {
    let mut registry = DriverRegistry::with_builtin();
    registry.register("qcow2", Box::new(OpenQcow2));
    registry
}

/// Options of the bytes of a simulated disk.
pub fn sim(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone())
}

/// Options of the image on a simulated disk.
pub fn image_on(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "qcow2")
        .with("file.driver", "sim")
        .with_object("file.disk", disk.clone())
}

/// Opens an image with its chain, calls `f`, closes.
pub fn with_image<R>(path: &Path, f: impl FnOnce(&Co, &BlockBackend) -> R) -> R {
    let world = World::new(EngineKind::Threads);
    let options = Options::format_on_file("qcow2", text(path)).with("discard", "unmap");
    let result = world.home.run(|co| {
        let backend = world.open(co, &LikeReference::new(), options).unwrap();
        let result = f(co, &backend);
        backend.close(co).unwrap();
        result
    });
    world.end();
    result
}
