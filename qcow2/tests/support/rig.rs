//! An image on a simulated disk that holds back what a test says.
//!
//! It has clusters of 4 KiB: header, refcount table, one refcount block and the L1 table in the
//! first four, so the first cluster that the allocator hands out is at 0x4000 (an L2 table) and the
//! first data cluster at 0x5000.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    BlockBackend, DenyAll, DriverRegistry, Graph, Options, RequestFlags, Result, open,
};
use coblock_qcow2::{Qcow2, Qcow2Stats};

use super::world::{image_on, registry};

pub const CLUSTER: u64 = 4096;
pub const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
pub const L1: u64 = 3 * CLUSTER;
pub const FIRST_L2: u64 = 4 * CLUSTER;
/// Everything that is not metadata of the fresh image.
pub const BEHIND_TABLES: Range<u64> = 5 * CLUSTER..1 << 30;

pub const COPIED: u64 = 1 << 63;

pub struct Fixture {
    pub home: Home,
    pub graph: Arc<Graph>,
    pub registry: DriverRegistry,
    pub disk: Arc<SimDisk>,
}

/// Version 3, 4 KiB clusters, 16-bit refcounts, 1 MiB.
pub fn fresh_image() -> Vec<u8> {
    let mut image = vec![0; FIRST_L2 as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &12u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &L1.to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &REFCOUNT_BLOCK.to_be_bytes());
    for cluster in 0..4 {
        put(REFCOUNT_BLOCK + 2 * cluster, &1u16.to_be_bytes());
    }
    image
}

impl Fixture {
    pub fn new() -> Fixture {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::default()
        };
        let home = Home::new(options).unwrap();
        let graph = Graph::new(home.context());
        Fixture {
            home,
            graph,
            registry: registry(),
            disk: SimDisk::with_contents(&fresh_image()),
        }
    }

    pub fn open(&self) -> Rc<BlockBackend> {
        self.open_in("mutex")
    }

    pub fn open_in(&self, mode: &str) -> Rc<BlockBackend> {
        self.open_with(self.options().with("request-mode", mode))
            .unwrap()
    }

    /// Options of the image on the disk.
    pub fn options(&self) -> Options {
        image_on(&self.disk).with("discard", "unmap")
    }

    pub fn open_with(&self, options: Options) -> Result<Rc<BlockBackend>> {
        let opened = |co: &_| open(co, &self.graph, &self.registry, &DenyAll, options);
        let node = self.home.run(opened)?;
        Ok(Rc::new(BlockBackend::new(&self.graph, node)))
    }

    /// Starts a write and returns where its result will be.
    pub fn start_write(&self, disk: &Rc<BlockBackend>, at: u64, len: u64, byte: u8) -> Outcome {
        let (disk, outcome) = (disk.clone(), Outcome::default());
        let result = outcome.clone();
        self.home.spawn("write", move |co| {
            let data = vec![byte; len as usize];
            result.set(disk.pwrite(co, at, &data[..], RequestFlags::empty()));
        });
        outcome
    }

    /// Starts an emptying request and returns where its result will be.
    pub fn start_empty(
        &self,
        disk: &Rc<BlockBackend>,
        at: u64,
        len: u64,
        discard: bool,
    ) -> Outcome {
        let (disk, outcome) = (disk.clone(), Outcome::default());
        let result = outcome.clone();
        self.home.spawn("empty", move |co| {
            result.set(if discard {
                disk.pdiscard(co, at, len)
            } else {
                disk.pwrite_zeroes(co, at, len, RequestFlags::MAY_UNMAP)
            });
        });
        outcome
    }

    pub fn write(&self, disk: &Rc<BlockBackend>, at: u64, len: u64, byte: u8) {
        let outcome = self.start_write(disk, at, len, byte);
        self.wait(&outcome).unwrap();
    }

    pub fn read(&self, disk: &BlockBackend, at: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0xee; len as usize];
        self.home
            .run(|co| disk.pread(co, at, &mut data[..]))
            .unwrap();
        data
    }

    pub fn flush(&self, disk: &BlockBackend) {
        self.home.run(|co| disk.flush(co)).unwrap();
    }

    /// Lets everything run that can.
    pub fn settle(&self) {
        while self.home.poll(false) {}
    }

    pub fn wait(&self, outcome: &Outcome) -> Result<()> {
        self.settle();
        outcome.take().expect("the request is held back by nothing")
    }

    pub fn close(&self, disk: Rc<BlockBackend>) {
        self.home.run(|co| disk.close(co)).unwrap();
        drop(disk);
        assert_eq!(self.graph.live_nodes(), 0);
        assert_eq!(self.home.context().live_coroutines(), 0);
    }

    pub fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.disk.peek(at, 8).try_into().unwrap())
    }

    /// Host offset of a guest cluster, as the file says.
    pub fn host_of(&self, guest: u64) -> u64 {
        let table = self.word(L1) & !COPIED;
        self.word(table + guest / CLUSTER * 8) & !COPIED
    }

    pub fn refcount(&self, host: u64) -> u16 {
        let at = REFCOUNT_BLOCK + host / CLUSTER * 2;
        u16::from_be_bytes(self.disk.peek(at, 2).try_into().unwrap())
    }
}

/// Result of a request that was started.
#[derive(Clone, Default)]
pub struct Outcome(Rc<RefCell<Option<Result<()>>>>);

impl Outcome {
    pub fn set(&self, result: Result<()>) {
        *self.0.borrow_mut() = Some(result);
    }

    pub fn take(&self) -> Option<Result<()>> {
        self.0.borrow_mut().take()
    }

    pub fn is_done(&self) -> bool {
        self.0.borrow().is_some()
    }
}

pub fn stats(disk: &BlockBackend) -> Qcow2Stats {
    let driver = disk.node().driver();
    driver
        .as_any()
        .unwrap()
        .downcast_ref::<Qcow2>()
        .unwrap()
        .stats()
}
