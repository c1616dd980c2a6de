//! Rules 7.5, 7.6 and 7.8 from outside: the graph is locked for writing while requests come from
//! several threads.

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home, IoThread};
use coblock_block::{BlockBackend, Graph, Options};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::{PLAIN, World};

/// Rule 7.6: what readers of the main context waited for has been done when the section has ended.
#[test]
fn rule_7_6_what_was_put_off_is_done_on_return() {
    let world = World::simulated();
    let done = Arc::new(AtomicBool::new(false));
    world.home.with(|| {
        let written = world.graph.write();
        world.home.context().oneshot({
            let done = done.clone();
            move || done.store(true, Ordering::Relaxed)
        });
        assert!(!done.load(Ordering::Relaxed), "a writer does not poll");
        drop(written);
    });
    assert!(done.load(Ordering::Relaxed));
    world.end();
}

/// Rule 7.5: only the main home writes.
#[test]
#[should_panic(expected = "outside of its main context 'main'")]
fn rule_7_5_another_context_does_not_write() {
    let options = |name: &str| ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named(name)
    };
    let (main, other) = (
        Home::new(options("main")).unwrap(),
        Home::new(options("other")).unwrap(),
    );
    let graph = Graph::new(main.context());
    other.with(|| drop(graph.write()));
}

/// Rule 7.5: while a writer waits for readers, nodes are quiesced: what comes from users is held back,
/// or it could wait for ever.
#[test]
fn rule_7_5_no_request_comes_while_a_writer_waits() {
    let world = World::simulated();
    let options = Options::new().with("driver", "null-co");
    let backend = Arc::new(world.open(options).unwrap());
    let drained = Arc::new(AtomicBool::new(false));
    world.home.spawn("reader", {
        let (backend, drained) = (backend.clone(), drained.clone());
        move |co| {
            let guard = backend.graph().read(co);
            coblock_aio::co::reschedule(co);
            drained.store(backend.node().is_drained(), Ordering::Relaxed);
            drop(guard);
        }
    });
    world.home.with(|| drop(world.graph.write()));
    assert!(drained.load(Ordering::Relaxed));
    assert!(!backend.node().is_drained());
    support::end(world, backend);
}

/// Lets the threads go, also when the test fails.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Rules 7.2, 7.5: three threads send requests without a pause while the main home writes again
/// and again; every request succeeds, and no write waits for ever.
#[test]
fn rule_7_5_writers_against_endless_readers() {
    let world = World::with_engine(EngineKind::None);
    let options = Options::new().with("driver", "null-co");
    let backend: Arc<BlockBackend> = Arc::new(world.open(options).unwrap());
    let (stop, requests) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let threads: Vec<IoThread> = (0..3)
        .map(|n| {
            IoThread::new(ContextOptions {
                engine: EngineKind::None,
                ..ContextOptions::named(format!("queue {n}"))
            })
            .unwrap()
        })
        .collect();
    let left = Arc::new(AtomicU64::new(6));
    let (writing, met) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    for (n, offset) in [0, 4096, 8192, 0, 4096, 8192].into_iter().enumerate() {
        let (backend, stop, requests) = (backend.clone(), stop.clone(), requests.clone());
        let (left, seen, met) = (left.clone(), writing.clone(), met.clone());
        let body = move |co: &coblock_coroutine::Co| {
            while !stop.load(Ordering::Relaxed) {
                let mut buf = [0; 512];
                backend.pread(co, offset, &mut buf[..]).unwrap();
                backend.pwrite(co, offset, &buf[..], PLAIN).unwrap();
                let guard = backend.graph().read(co);
                if seen.load(Ordering::SeqCst) {
                    met.fetch_add(1, Ordering::Relaxed);
                }
                drop(guard);
                requests.fetch_add(2, Ordering::Relaxed);
                coblock_aio::co::reschedule(co);
            }
            left.fetch_sub(1, Ordering::Release);
        };
        let context = threads[n % 3].context();
        context.spawn("queue", body).unwrap();
    }
    let stopping = Stop(stop);
    let mut writes = 0;
    while writes < 50 || requests.load(Ordering::Relaxed) < 1000 {
        world.home.with(|| {
            let written = world.graph.write();
            writing.store(true, Ordering::SeqCst);
            std::thread::yield_now();
            writing.store(false, Ordering::SeqCst);
            drop(written);
        });
        writes += 1;
        std::thread::yield_now();
    }
    drop(stopping);
    while left.load(Ordering::Acquire) > 0 {
        std::thread::yield_now();
    }
    for thread in threads {
        thread.stop();
    }
    let met = met.load(Ordering::Relaxed);
    assert_eq!(met, 0, "readers beside the writer");
    support::end(world, backend);
}
