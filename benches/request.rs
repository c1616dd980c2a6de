//! One request after the other, for counting its instructions: `once ROW N` sends exactly N.
//!
//! ```text
//!   null        handle -> null-co                      what the block layer costs
//!   sim         handle -> simulated disk
//!   qcow2       handle -> qcow2 -> simulated disk      less the row above: what qcow2 and a node cost
//! ```
//! Each request is a coroutine of its own, as a device sends it. They are of 512 bytes: longer ones
//! take the same path, and the disk's copies would hide it. Nothing is measured here; `cargo xtask
//! counts` runs these under callgrind and compares with `docs/counts.json`.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::{ContextOptions, EngineKind, Home};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::{BlockBackend, DenyAll, DriverRegistry, Graph, Options, RequestFlags, open};
use coblock::qcow2::OpenQcow2;
use coblock::qcow2::create::{CreateOptions, create};
use coblock::qcow2::image_file::ImageFile;

/// Bytes of one request.
const REQUEST: usize = 512;
/// Bytes that requests go round in.
const SIZE: usize = 1 << 20;
/// Between two requests: an odd number of requests, so that every place has its turn.
const STEP: u64 = 613 * REQUEST as u64;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["once", row, n] => Bench::new().once(row, n.parse().expect("how many requests")),
        // Cargo passes options of its own.
        _ => println!("once ROW N, with null, sim or qcow2 and -read or -write for ROW"),
    }
}

struct Bench {
    home: Home,
    graph: Arc<Graph>,
    registry: DriverRegistry,
}

impl Bench {
    fn new() -> Self {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named("bench")
        };
        let home = Home::new(options).expect("a context");
        let graph = Graph::new(home.context());
        let mut registry = DriverRegistry::with_builtin();
        registry.register("qcow2", Box::new(OpenQcow2));
        Bench {
            home,
            graph,
            registry,
        }
    }

    fn open(&self, options: Options) -> Arc<BlockBackend> {
        let node = self
            .home
            .run(|co| open(co, &self.graph, &self.registry, &DenyAll, options));
        Arc::new(BlockBackend::new(&self.graph, node.expect("it opens")))
    }

    /// What `driver` stands for, with everything allocated and in the cache.
    fn disk(&self, driver: &str) -> Arc<BlockBackend> {
        let disk = SimDisk::new(if driver == "sim" { SIZE as u64 } else { 0 });
        let sim = || {
            Options::new()
                .with("driver", "sim")
                .with_object("disk", disk.clone())
        };
        let backend = match driver {
            "null" => self.open(Options::new().with("driver", "null-co")),
            "sim" => self.open(sim()),
            "qcow2" => {
                let file = self.open(sim());
                self.home.run(|co| {
                    let created = create(
                        &ImageFile::of_backend(co, &file),
                        &CreateOptions::new(SIZE as u64),
                    );
                    created
                        .and_then(|()| file.close(co))
                        .expect("an empty image");
                });
                self.open(
                    Options::new()
                        .with("driver", "qcow2")
                        .with("file.driver", "sim")
                        .with_object("file.disk", disk.clone()),
                )
            }
            _ => panic!("no such driver: {driver}"),
        };
        self.home.run(|co| {
            let full = vec![7; SIZE];
            let written = backend.pwrite(co, 0, &full[..], RequestFlags::empty());
            written.and_then(|()| backend.flush(co)).expect("a write");
        });
        backend
    }

    fn once(self, row: &str, n: u64) {
        let (driver, op) = row.split_once('-').expect("driver and operation");
        let backend = self.disk(driver);
        let buffer = Rc::new(Cell::new(Some(Box::new([0; REQUEST]))));
        for request in 0..n {
            let (backend, buffer) = (backend.clone(), buffer.clone());
            let offset = request * STEP % SIZE as u64;
            match op {
                "read" => self.home.spawn("read", move |co| {
                    let mut bytes = buffer.take().expect("one at a time");
                    backend.pread(co, offset, &mut *bytes).expect("a read");
                    buffer.set(Some(bytes));
                }),
                "write" => self.home.spawn("write", move |co| {
                    let bytes = buffer.take().expect("one at a time");
                    let none = RequestFlags::empty();
                    backend.pwrite(co, offset, &*bytes, none).expect("a write");
                    buffer.set(Some(bytes));
                }),
                _ => panic!("no such operation: {op}"),
            }
        }
        self.home.run(|co| backend.close(co)).expect("it closes");
        drop(self.graph);
        self.home.close();
    }
}
