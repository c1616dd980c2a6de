//! What does a request cost, from the user's handle to a driver that does nothing?
//!
//! One coroutine each, as a device would do it; the coroutine alone is printed for comparison. And
//! what do the graph lock and drained sections cost?
//!
//! Words choose rows. `--once`: one sample of each instead of the least of three, for who takes
//! medians; `--full-fences`: as where `membarrier` is missing.

use coblock_aio::{ContextOptions, EngineKind, Home, use_full_fences};
use coblock_block::{
    BlockBackend, DenyAll, Drain, DriverRegistry, Graph, Options, RequestFlags, open,
};
use std::sync::Arc;
use std::time::Instant;

const REQUESTS: u32 = 1_000_000;

fn measure(name: &str, f: impl FnMut()) {
    measure_few(name, REQUESTS, f);
}

fn measure_few(name: &str, count: u32, mut f: impl FnMut()) {
    // Words after `--` choose: for counting the instructions of one.
    let mut words = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .peekable();
    if words.peek().is_some() && !words.any(|word| word == name) {
        return;
    }
    for _ in 0..count / 10 {
        f();
    }
    let samples = if has_flag("--once") { 1 } else { 3 };
    let mut best = f64::INFINITY;
    for _ in 0..samples {
        let start = Instant::now();
        for _ in 0..count {
            f();
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{name:40} {:6.1} ns", best * 1e9 / f64::from(count));
}

fn has_flag(flag: &str) -> bool {
    std::env::args().any(|word| word == flag)
}

fn main() {
    if has_flag("--full-fences") {
        assert!(use_full_fences(), "no context was made before");
    }
    let options = ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named("bench")
    };
    let home = Home::new(options).expect("a context");
    let graph = Graph::new(home.context());
    let registry = DriverRegistry::with_builtin();
    let backend = |options: Options| {
        let node = home
            .run(|co| open(co, &graph, &registry, &DenyAll, options))
            .expect("null opens");
        Arc::new(BlockBackend::new(&graph, node))
    };
    let null = backend(Options::new().with("driver", "null-co"));
    let raw = backend(
        Options::new()
            .with("driver", "raw")
            .with("file.driver", "null-co"),
    );

    home.with(|| {
        measure("coroutine alone", || home.spawn("bench", |_co| {}));
    });
    for (name, backend) in [("null", &null), ("raw on null", &raw)] {
        measure(&format!("coroutine, read of {name}"), || {
            let backend = backend.clone();
            home.spawn("bench", move |co| {
                let mut buf = [0; 512];
                backend.pread(co, 4096, &mut buf[..]).expect("null reads");
            });
        });
        home.run(|co| {
            let mut buf = [0; 512];
            measure(&format!("read of {name}"), || {
                backend.pread(co, 4096, &mut buf[..]).expect("null reads");
            });
            measure(&format!("write of {name}"), || {
                backend
                    .pwrite(co, 4096, &buf[..], RequestFlags::empty())
                    .expect("null writes");
            });
        });
    }
    home.run(|co| {
        measure_few("graph lock, read, and unlock", 20 * REQUESTS, || {
            drop(graph.read(co));
        });
    });
    home.with(|| {
        measure("drain of an idle node", || {
            drop(raw.node().drain_blocking())
        });
        measure_few("graph lock, write, and unlock", 100_000, || {
            drop(graph.write())
        });
    });
    let many: Vec<_> = (0..10_000)
        .map(|_| backend(Options::new().with("driver", "null-co")))
        .collect();
    home.with(|| {
        measure_few("drain of 10 000 nodes", 20, || drop(graph.drain_blocking()));
    });
    for backend in many {
        home.run(|co| backend.close(co)).expect("null closes");
    }
    for backend in [null, raw] {
        home.run(|co| backend.close(co)).expect("null closes");
    }
    drop(graph);
    home.close();
}
