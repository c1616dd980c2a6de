//! Rules 5.1 and 5.5 on real threads: queues that never stop, and sections of one node and of all.

mod support;

use coblock_aio::{ContextOptions, EngineKind, IoThread};
use coblock_block::{BlockBackend, Drain, Options};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use support::{PLAIN, World, end};

/// Lets the threads go, also when the test fails.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// In a section no request is in flight and none completes; afterwards every queue goes on, in
/// order and without a loss.
#[test]
fn rule_5_5_sections_against_queues_that_never_stop() {
    const QUEUES: usize = 6;
    const LIMIT: Duration = Duration::from_secs(120);
    let world = World::with_engine(EngineKind::None);
    let options = Options::new().with("driver", "null-co");
    let backend: Arc<BlockBackend> = Arc::new(world.open(options).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let done: Arc<[AtomicU64; QUEUES]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
    let left = Arc::new(AtomicU64::new(QUEUES as u64));
    let threads: Vec<IoThread> = (0..3)
        .map(|n| {
            IoThread::new(ContextOptions {
                engine: EngineKind::None,
                ..ContextOptions::named(format!("queue {n}"))
            })
            .unwrap()
        })
        .collect();
    for queue in 0..QUEUES {
        let (backend, stop, done, left) =
            (backend.clone(), stop.clone(), done.clone(), left.clone());
        let body = move |co: &coblock_coroutine::Co| {
            while !stop.load(Ordering::Relaxed) {
                let mut buf = [0; 512];
                backend.pread(co, 0, &mut buf[..]).unwrap();
                done[queue].fetch_add(1, Ordering::Relaxed);
                backend.pwrite(co, 0, &buf[..], PLAIN).unwrap();
                done[queue].fetch_add(1, Ordering::Relaxed);
                coblock_aio::co::reschedule(co);
            }
            left.fetch_sub(1, Ordering::Release);
        };
        threads[queue % 3].context().spawn("queue", body).unwrap();
    }
    let stopping = Stop(stop);
    let total = || done.iter().map(|n| n.load(Ordering::Relaxed)).sum::<u64>();
    let mut sections = 0;
    while sections < 300 || done.iter().any(|n| n.load(Ordering::Relaxed) < 100) {
        // Who does not become idle is told, instead of waiting for ever.
        let section = world.home.with(|| match sections % 3 {
            0 => world.graph.drain_blocking_within(LIMIT),
            1 => backend.node().drain_blocking_within(LIMIT),
            _ => backend.drain_blocking_within(LIMIT),
        });
        let section = section.unwrap_or_else(|busy| panic!("section {sections}: {busy}"));
        // Of the backend's own count one may be on its way into the queue.
        assert_eq!(backend.node().in_flight(), 0);
        // A count of what had ended just before may still be on its way; a request cannot be.
        let before = total();
        std::thread::yield_now();
        assert!(
            total() <= before + QUEUES as u64,
            "requests go on in a section"
        );
        assert_eq!(backend.node().in_flight(), 0);
        drop(section);
        sections += 1;
    }
    drop(stopping);
    while left.load(Ordering::Acquire) > 0 {
        std::thread::yield_now();
    }
    for thread in threads {
        thread.stop();
    }
    end(world, backend);
}
