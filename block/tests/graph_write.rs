//! Rules 7.5, 7.6 and 7.8 from outside: the graph is locked for writing while requests come from
//! several threads, and is read in the main home.

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::Graph;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::change::{disk, world};
use support::load::Load;
use support::{PLAIN, World, null, panics};

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
    let backend = null(&world, 0);
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

/// Rules 7.2, 7.5: three threads send requests without a pause while the main home writes again
/// and again; every request succeeds, and no write waits for ever.
#[test]
fn rule_7_5_writers_against_endless_readers() {
    let world = World::with_engine(EngineKind::None);
    let backend = null(&world, 0);
    let load = Load::new(3, EngineKind::None);
    let (writing, met) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    for (n, offset) in [0, 4096, 8192, 0, 4096, 8192].into_iter().enumerate() {
        let (backend, seen, met) = (backend.clone(), writing.clone(), met.clone());
        load.start(n, move |co, _| {
            let mut buf = [0; 512];
            backend.pread(co, offset, &mut buf[..]).unwrap();
            backend.pwrite(co, offset, &buf[..], PLAIN).unwrap();
            let guard = backend.graph().read(co);
            if seen.load(Ordering::SeqCst) {
                met.fetch_add(1, Ordering::Relaxed);
            }
            drop(guard);
        });
    }
    let mut writes = 0;
    while !load.has_failed() && (writes < 50 || load.rounds() < 500) {
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
    load.end(&world);
    let met = met.load(Ordering::Relaxed);
    assert_eq!(met, 0, "readers beside the writer");
    support::end(world, backend);
}

/// Rule 7.8: the main home reads without counting, and neither polls nor lets a writer in meanwhile.
#[test]
fn rule_7_8_the_main_home_reads_without_counting() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let names = world.home.with(|| {
        world.graph.read_in_main(|main| {
            assert_eq!(world.graph.readers(), 0);
            world.graph.dump(main).nodes.len()
        })
    });
    assert_eq!(names, 1);
    support::end(world, backend);
}

/// Rules 7.8, 7.7: misuse is refused, with both places named.
#[test]
fn rule_7_8_polls_and_writers_are_refused_meanwhile() {
    let world = world();
    let refused = |f: &dyn Fn()| panics(|| world.home.with(f));
    let graph = &world.graph;
    let here = file!();
    let poll = refused(&|| {
        graph.read_in_main(|_| world.home.poll(false));
    });
    assert!(poll.contains("rule 7.8") && poll.contains(here), "{poll}");
    let write = refused(&|| graph.read_in_main(|_| drop(graph.write())));
    let words = "rule 7.8: the graph is locked for writing at ";
    assert!(
        write.contains(words) && write.matches(here).count() == 2,
        "{write}"
    );
    let read = refused(&|| {
        let _write = graph.write();
        graph.read_in_main(|_| ());
    });
    assert_eq!(read.matches(here).count(), 2, "{read}");
    let under_write = refused(&|| {
        let _write = graph.write();
        world.home.poll(false);
    });
    assert!(under_write.contains("rule 7.5"), "{under_write}");
    let in_coroutine = panics(|| {
        world.run(|_| world.graph.read_in_main(|_| ()));
    });
    assert!(in_coroutine.contains("in a coroutine"), "{in_coroutine}");
    // All of it has been let go.
    world.home.with(|| drop(world.graph.write()));
    world.end();
}
