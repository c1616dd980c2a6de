//! Transactions while requests of other threads, and of other homes on this one, go on (rules 7.5 and
//! 8.2).

mod support;

use coblock_aio::{Clock, ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::Match;
use coblock_block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock_block::{BlockBackend, Options, Transaction};
use coblock_coroutine::{Co, ThreadLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::change::*;
use support::counted::OpenCounted;
use support::load::{Load, io_thread};
use support::{PLAIN, World, end, settle};

/// A file of 1 MiB, open as the node `disk`.
fn file(world: &World) -> (tempfile::NamedTempFile, Arc<BlockBackend>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options = Options::file(file.path().to_str().unwrap());
    let backend = world.open(options.with("node-name", "disk")).unwrap();
    (file, Arc::new(backend))
}

/// Rules 8.2, 7.5: requests come from two threads without a pause while filters come and go under
/// them: each reads what it wrote, and none is lost.
#[test]
fn rule_8_2_filters_come_and_go_under_load() {
    let mut world = World::with_engine(EngineKind::Threads);
    world.registry.register("counted", Box::new(OpenCounted));
    let group = ThrottleGroup::new(
        "limits",
        world.home.context().clock(),
        ThrottleConfig::default(),
    )
    .unwrap();
    world.graph.add_throttle_group(&group).unwrap();
    let (_file, backend) = file(&world);
    let load = Load::new(2, EngineKind::Threads);
    for n in 0..4 {
        let backend = backend.clone();
        load.start(n, move |co, round| {
            let at = n as u64 * 4096;
            let (data, mut back) = ([round.to_le_bytes()[0]; 4096], [0; 4096]);
            backend.pwrite(co, at, &data[..], PLAIN).unwrap();
            backend.pread(co, at, &mut back[..]).unwrap();
            assert!(data == back, "queue {n}, round {round}");
        });
    }
    for round in 0..20 {
        let options = match round % 2 {
            0 => Options::new().with("driver", "counted"),
            _ => Options::new()
                .with("driver", "throttle")
                .with("throttle-group", "limits"),
        };
        let top = open_node(&world, options.with("file", "disk")).unwrap();
        run(&world, |t| t.insert(&top)).unwrap();
        load.goes_on(&world, 5);
        run(&world, |t| t.remove(&top)).unwrap();
    }
    load.end(&world);
    assert_eq!(world.graph.live_nodes(), 1);
    end(world, backend);
}

/// Rule 8.2: a disk is resized from the thread of its queue while that queue goes on; the device is
/// told before the next request starts.
#[test]
fn rule_8_2_resize_under_load_from_an_io_thread() {
    let world = World::with_engine(EngineKind::Threads);
    let (_file, backend) = file(&world);
    let sizes = Arc::new(Sizes::default());
    backend.set_device(Some(sizes.clone()));
    let load = Load::new(1, EngineKind::Threads);
    let (inner, told) = (backend.clone(), sizes.clone());
    load.start(0, move |co, _| {
        // What the device was told is there.
        let end = told.get().last().copied().unwrap_or(1 << 20);
        inner.pwrite(co, end - 512, &[1; 512][..], PLAIN).unwrap();
    });
    let want: Vec<u64> = (2..20).map(|mib| mib << 20).collect();
    let (inner, lens) = (backend.clone(), want.clone());
    load.start(0, move |co, round| {
        if let Some(len) = lens.get(usize::try_from(round).unwrap()) {
            inner.resize(co, *len).unwrap();
        }
    });
    while sizes.get().len() < want.len() && !load.has_failed() {
        world.home.poll(false);
        std::thread::yield_now();
    }
    load.end(&world);
    assert_eq!(sizes.get(), want);
    assert_eq!(backend.len(), 19 << 20);
    end(world, backend);
}

/// A transaction is run by a coroutine of another thread, and by the main home outside of coroutines.
#[test]
fn a_transaction_is_run_from_anywhere() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "filter", "disk");
    let thread = io_thread("other", EngineKind::None);
    let done = Arc::new(ThreadLock::new(None));
    let body = {
        let (graph, top, done) = (world.graph.clone(), top.clone(), done.clone());
        move |co: &Co| {
            let result = Transaction::new(&graph).insert(&top).run(co);
            *done.lock() = Some(result);
        }
    };
    thread.context().spawn("changer", body).unwrap();
    while done.lock().is_none() {
        world.home.poll(false);
        std::thread::yield_now();
    }
    done.lock().take().unwrap().unwrap();
    assert!(Arc::ptr_eq(&backend.node(), &top));
    world.home.with(|| {
        let mut transaction = Transaction::new(&world.graph);
        transaction.remove(&top);
        transaction.run_blocking().unwrap();
    });
    drop(top);
    thread.stop();
    assert_eq!(world.graph.node_names(), ["disk"]);
    end(world, backend);
}

/// Another home on this thread, stepped by the test, by the clock of `world`.
fn queue(world: &World) -> Home {
    Home::new(ContextOptions {
        engine: EngineKind::None,
        clock: Clock::Virtual(world.clock.clone().unwrap()),
        ..ContextOptions::named("queue")
    })
    .unwrap()
}

/// Several homes stepped on one thread: a home that is not stepped does not hold a transaction up
/// unless it reads, and then no longer than it does.
#[test]
fn a_transaction_waits_for_readers_of_homes_that_are_stepped() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "filter", "disk");
    let (sim_disk, reader) = disk(&world, "unrelated");
    let queue = queue(&world);
    let hold = sim_disk.hold(Match::reads());
    queue.spawn("reader", {
        let reader = reader.clone();
        move |co| reader.pread(co, 0, &mut [0; 512][..]).unwrap()
    });
    let done = Arc::new(AtomicBool::new(false));
    world.home.spawn("changer", {
        let (graph, top, done) = (world.graph.clone(), top.clone(), done.clone());
        move |co| {
            Transaction::new(&graph).insert(&top).run(co).unwrap();
            done.store(true, Ordering::Relaxed);
        }
    });
    settle(&world);
    assert!(!done.load(Ordering::Relaxed), "a reader holds the edges");
    drop(hold);
    while !done.load(Ordering::Relaxed) {
        queue.poll(false);
        world.home.poll(false);
    }
    assert!(Arc::ptr_eq(&backend.node(), &top));
    drop(top);
    queue.close();
    world.run(|co| reader.close(co)).unwrap();
    drop(reader);
    end(world, backend);
}

/// Rule 7.5: two readers leave, one before a transaction tries to lock the graph and one after it: the
/// second one wakes it, though the first one did so already.
#[test]
fn rule_7_5_the_last_reader_wakes_a_transaction() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "filter", "disk");
    let (sim_disk, reader) = disk(&world, "unrelated");
    let queue = queue(&world);
    let settle_queue = || while queue.poll(false) {};
    let [first, second] = [0, 512].map(|offset| {
        let hold = sim_disk.hold(Match::reads().touching(offset..offset + 512));
        let reader = reader.clone();
        queue.spawn("reader", move |co| {
            reader.pread(co, offset, &mut [0; 512][..]).unwrap();
        });
        hold
    });
    settle_queue();
    let done = Arc::new(AtomicBool::new(false));
    queue.spawn("changer", {
        let (graph, top, done) = (world.graph.clone(), top.clone(), done.clone());
        move |co| {
            Transaction::new(&graph).insert(&top).run(co).unwrap();
            done.store(true, Ordering::Relaxed);
        }
    });
    settle_queue();
    // All nodes are quiesced; then it asks for the lock.
    settle(&world);
    settle_queue();
    drop(first);
    settle_queue();
    settle(&world);
    settle_queue();
    assert!(!done.load(Ordering::Relaxed), "a reader holds the edges");
    drop(second);
    for _ in 0..8 {
        settle_queue();
        settle(&world);
    }
    assert!(done.load(Ordering::Relaxed), "nobody woke it");
    drop(top);
    queue.close();
    world.run(|co| reader.close(co)).unwrap();
    drop(reader);
    end(world, backend);
}
