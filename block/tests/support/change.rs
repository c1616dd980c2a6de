//! Helpers of tests that change a graph.

use super::counted::{Calls, OpenCounted};
use super::{PLAIN, World, sim};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{BlockBackend, DenyAll, Device, Node, Options, Result, Transaction, open};
use coblock_coroutine::ThreadLock;
use std::sync::Arc;

pub fn world() -> World {
    let mut world = World::simulated();
    world.registry.register("counted", Box::new(OpenCounted));
    world
}

/// A disk named `name` with a backend.
pub fn disk(world: &World, name: &str) -> (Arc<SimDisk>, Arc<BlockBackend>) {
    let disk = SimDisk::new(64 << 10);
    let options = sim(&disk).with("node-name", name);
    (disk, Arc::new(world.open(options).unwrap()))
}

pub fn open_node(world: &World, options: Options) -> Result<Arc<Node>> {
    world.run(|co| open(co, &world.graph, &world.registry, &DenyAll, options))
}

/// Options of a filter on the node `file`, which counts in `calls`.
pub fn filter_options(name: &str, file: &str, calls: &Arc<Calls>) -> Options {
    Options::new()
        .with("driver", "counted")
        .with("node-name", name)
        .with("file", file)
        .with_object("calls", calls.clone())
}

/// A filter on the node `file`.
pub fn filter(world: &World, name: &str, file: &str) -> (Arc<Node>, Arc<Calls>) {
    let calls = Arc::new(Calls::default());
    let options = filter_options(name, file, &calls);
    (open_node(world, options).unwrap(), calls)
}

pub fn run(world: &World, f: impl FnOnce(&mut Transaction) -> &mut Transaction) -> Result<()> {
    let mut transaction = Transaction::new(&world.graph);
    f(&mut transaction);
    world.run(|co| transaction.run(co))
}

pub fn dump(world: &World) -> String {
    world.home.with(|| {
        world
            .graph
            .read_in_main(|main| world.graph.dump(main).to_json())
    })
}

pub fn write(world: &World, backend: &BlockBackend, byte: u8) {
    let data = [byte; 4096];
    world
        .run(|co| backend.pwrite(co, 4096, &data[..], PLAIN))
        .unwrap();
}

pub fn read(world: &World, backend: &BlockBackend) -> u8 {
    let mut data = [0; 4096];
    world
        .run(|co| backend.pread(co, 4096, &mut data[..]))
        .unwrap();
    assert!(data.iter().all(|byte| *byte == data[0]));
    data[0]
}

/// A device that notes which lengths it is told.
#[derive(Default)]
pub struct Sizes(ThreadLock<Vec<u64>>);

impl Sizes {
    pub fn get(&self) -> Vec<u64> {
        self.0.lock().clone()
    }
}

impl Device for Sizes {
    fn resized(&self, len: u64) {
        self.0.lock().push(len);
    }
}
