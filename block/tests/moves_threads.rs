//! Nodes move between contexts of real threads (rule 8.3), and so do coroutines (rule 3.10); who waits
//! waits in the right place (rule 3.8).

mod support;

use coblock_aio::{EngineKind, move_to};
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{ErrorKind, Options, Result, Transaction};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::change::filter_options;
use support::counted::{Calls, OpenCounted};
use support::load::{Load, io_thread};
use support::{PLAIN, World, null, panics, pattern, sim};

/// Rule 8.3: requests come from three threads without a pause while a component of two disks with a
/// common base moves round between four contexts; each reads what it wrote, and none is lost.
#[test]
fn rule_8_3_moves_under_load() {
    let mut world = World::with_engine(EngineKind::Threads);
    world.registry.register("counted", Box::new(OpenCounted));
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(1 << 20).unwrap();
    let file = Options::file(path.path().to_str().unwrap()).with("node-name", "base");
    let base = world.open(file).unwrap();
    // Notes of two would mix.
    let (calls, others) = (Arc::new(Calls::default()), Arc::default());
    let disks = [("a", &calls), ("b", &others)].map(|(name, calls)| {
        let disk = world.open(filter_options(name, "base", calls)).unwrap();
        disk.allow_moves(true);
        Arc::new(disk)
    });
    world.close(base).unwrap();
    let load = Load::new(3, EngineKind::Threads);
    for n in 0..6_usize {
        let disk = disks[n % 2].clone();
        load.start(n, move |co, round| {
            let (wrote, mut read) = (pattern(round, 4096), vec![0; 4096]);
            let at = (n as u64) << 16;
            disk.pwrite(co, at, &wrote[..], PLAIN).unwrap();
            disk.pread(co, at, &mut read[..]).unwrap();
            assert_eq!(read, wrote);
        });
    }
    let mut homes: Vec<_> = load.contexts().cloned().collect();
    homes.push(world.home.context().clone());
    for round in 0..100 {
        let (disk, home) = (&disks[round % 2], &homes[round % 4]);
        world.run(|co| disk.move_to(co, home)).unwrap();
        for disk in &disks {
            assert_eq!(disk.home_context().id(), home.id());
        }
        load.goes_on(&world, 1);
    }
    load.stop(&world);
    let begun = calls.get();
    assert!(begun.0 >= 100 && begun.0 == begun.1, "{begun:?}");
    for disk in disks {
        world.run(|co| disk.close(co)).unwrap();
    }
    load.end(&world);
    world.end();
}

/// Rules 3.3, 8.3: a context does not end with a node in it; the refusal names the node and where it
/// was moved. After that nothing moves away from it, or to it.
#[test]
fn rule_8_3_a_context_ends_without_nodes() {
    let world = World::with_engine(EngineKind::Threads);
    let backend = world
        .open(sim(&SimDisk::new(64 << 10)).with("node-name", "disk"))
        .unwrap();
    let thread = io_thread("io", EngineKind::None);
    let context = thread.context().clone();
    world.home.with(|| {
        let mut transaction = Transaction::new(&world.graph);
        backend.allow_moves(true);
        transaction.move_to(&backend.node(), &context);
        transaction.run_blocking().unwrap();
    });
    let line = line!() - 3;
    let refused = panics(|| thread.stop());
    for words in [
        "context 'io' closed with live node 'disk', moved at ",
        &format!("{}:{line}:", file!()),
        "rule 3.3",
    ] {
        assert!(refused.contains(words), "{refused} does not say {words}");
    }
    let main = world.home.context().clone();
    let error = world.run(|co| backend.move_to(co, &main)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    assert!(
        error.to_string().contains("event loop 'io' has ended"),
        "{error}"
    );
    // It reads, is resized and is closed as ever.
    world
        .run(|co| backend.pread(co, 0, &mut [0; 512][..]))
        .unwrap();
    world.run(|co| backend.resize(co, 128 << 10)).unwrap();
    assert_eq!(backend.len(), 128 << 10);
    world.close(backend).unwrap();
    world.end();
}

/// Rules 3.3, 8.3: a closed node lives nowhere, whoever still holds it: the context that it was in may
/// end.
#[test]
fn rule_8_3_a_context_ends_with_closed_nodes() {
    let world = World::with_engine(EngineKind::Threads);
    let backend = world.open(sim(&SimDisk::new(4096))).unwrap();
    let node = backend.node();
    let thread = io_thread("io", EngineKind::None);
    let context = thread.context().clone();
    world.run(|co| backend.move_to(co, &context)).unwrap();
    world.close(backend).unwrap();
    assert_eq!(node.home_context().id(), world.home.context().id());
    thread.stop();
    drop(node);
    world.end();
}

/// Rule 3.10, by the unsafe move: a coroutine goes to the home of a node, does a request there that
/// fails, comes back and goes on; counts are right in both contexts.
#[test]
fn rule_3_10_there_and_back_with_an_error() {
    let world = World::with_engine(EngineKind::Threads);
    let disk = SimDisk::new(4096);
    let backend = Arc::new(world.open(sim(&disk)).unwrap());
    let thread = io_thread("io", EngineKind::Threads);
    let there = thread.context().clone();
    world.run(|co| backend.move_to(co, &there)).unwrap();
    let over = Arc::new(AtomicUsize::new(0));
    let body = {
        let (backend, over, here) = (backend.clone(), over.clone(), world.home.context().clone());
        let (disk, there) = (disk.clone(), there.clone());
        move |co: &Co| {
            for round in 0..20 {
                // SAFETY: the frames of this coroutine hold what is `Send` and `Sync`, no guard, and
                // no handle of a coroutine; it was spawned from a `Send` closure.
                unsafe { move_to(co, &there) };
                assert!(there.is_current());
                if round % 2 == 0 {
                    disk.fail(Fault::new(Match::writes(), libc::EIO));
                }
                let wrote = backend.pwrite(co, 0, &[1; 512][..], PLAIN);
                let errno = wrote.map_or_else(|error| error.errno(), |()| 0);
                assert_eq!(errno, if round % 2 == 0 { libc::EIO } else { 0 });
                // SAFETY: as above.
                unsafe { move_to(co, &here) };
                assert!(here.is_current());
                let mut data = [0; 512];
                backend.pread(co, 0, &mut data[..]).unwrap();
                over.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    world.home.context().spawn("there and back", body).unwrap();
    while over.load(Ordering::Relaxed) < 20 {
        world.home.poll(true);
    }
    world.home.poll(false);
    assert_eq!((backend.in_flight(), world.graph.readers()), (0, 0));
    assert_eq!(there.live_coroutines(), 0);
    support::end_after(world, backend, thread);
}

/// Rules 3.8, 3.9, 2.4: a request is waited for in its own home and in the main one, wherever its node
/// lives; its callback runs where it was submitted.
#[test]
fn rule_3_8_waiting_while_the_node_lives_elsewhere() {
    let world = World::with_engine(EngineKind::Threads);
    let backend = null(&world, 100_000);
    let threads = ["one", "two"].map(|name| io_thread(name, EngineKind::Threads));
    let homes = [
        threads[0].context().clone(),
        threads[1].context().clone(),
        world.home.context().clone(),
    ];
    let waited = Arc::new(AtomicUsize::new(0));
    for round in 0..30 {
        world
            .run(|co| backend.move_to(co, &homes[round % 3]))
            .unwrap();
        let (inner, submitter) = (backend.clone(), threads[round % 2].context().clone());
        let (waited_in, called) = (waited.clone(), Arc::new(AtomicBool::new(false)));
        let body = move || {
            let (at, told) = (submitter.clone(), called.clone());
            let done = move |result: Result<()>, _buf| {
                result.unwrap();
                assert!(at.is_current() && !coblock_coroutine::in_coroutine());
                told.store(true, Ordering::Relaxed);
            };
            inner.aio_pread(0, vec![0; 512], done).unwrap();
            inner.wait_idle(&submitter);
            assert!(called.load(Ordering::Relaxed), "waited for the callback");
            waited_in.fetch_add(1, Ordering::Release);
        };
        threads[round % 2].context().oneshot(body);
        let context = threads[round % 2].context();
        while waited.load(Ordering::Acquire) <= round {
            world.home.with(|| backend.wait_idle(context));
            world.home.poll(false);
        }
    }
    world.run(|co| backend.move_to(co, &homes[2])).unwrap();
    drop(threads);
    support::end(world, backend);
}
