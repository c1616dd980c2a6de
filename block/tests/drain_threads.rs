//! Rules 5.1 and 5.5 on real threads: queues that never stop, and sections of one node and of all.

mod support;

use coblock_aio::EngineKind;
use coblock_block::Drain;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use support::load::Load;
use support::{PLAIN, World, end, null};

/// In a section no request is in flight and none completes; afterwards every queue goes on, in
/// order and without a loss.
#[test]
fn rule_5_5_sections_against_queues_that_never_stop() {
    const QUEUES: usize = 6;
    const LIMIT: Duration = Duration::from_secs(120);
    let world = World::with_engine(EngineKind::None);
    let backend = null(&world, 0);
    let done: Arc<[AtomicU64; QUEUES]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
    let load = Load::new(3, EngineKind::None);
    for queue in 0..QUEUES {
        let (backend, done) = (backend.clone(), done.clone());
        load.start(queue, move |co, _| {
            let mut buf = [0; 512];
            backend.pread(co, 0, &mut buf[..]).unwrap();
            done[queue].fetch_add(1, Ordering::Relaxed);
            backend.pwrite(co, 0, &buf[..], PLAIN).unwrap();
            done[queue].fetch_add(1, Ordering::Relaxed);
        });
    }
    let total = || done.iter().map(|n| n.load(Ordering::Relaxed)).sum::<u64>();
    let mut sections = 0;
    let few = || done.iter().any(|n| n.load(Ordering::Relaxed) < 100);
    while !load.has_failed() && (sections < 300 || few()) {
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
    load.end(&world);
    end(world, backend);
}
