//! The graph changes while requests go through it (rules 5.4, 7.8, 7.9, 8.2).

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home, IoThread};
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock_block::{
    Action, BlockBackend, Device, Drain, ErrorKind, GraphWrite, Node, Options, Perm, Permissions,
    Result, Transaction, close_unused,
};
use coblock_coroutine::{Co, ThreadLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use support::change::*;
use support::counted::{Calls, OpenCounted};
use support::{PLAIN, World, end, settle, sim, start};

/// Rule 8.2: a filter comes and goes; the users above do not notice, and it is closed at the end.
#[test]
fn rule_8_2_a_filter_is_inserted_and_removed() {
    let world = world();
    let (sim, backend) = disk(&world, "disk");
    write(&world, &backend, 1);
    let before = dump(&world);
    let (top, calls) = filter(&world, "filter", "disk");
    run(&world, |t| t.insert(&top)).unwrap();
    assert!(Arc::ptr_eq(&backend.node(), &top));
    assert_eq!(
        (top.users(), world.graph.find_node("disk").unwrap().users()),
        (1, 1)
    );
    assert_eq!(read(&world, &backend), 1);
    write(&world, &backend, 2);
    assert_eq!(calls.get(), (1, 1), "one section each, begun and ended");
    run(&world, |t| t.remove(&top)).unwrap();
    drop(top);
    assert_eq!(read(&world, &backend), 2);
    assert_eq!(dump(&world), before);
    assert_eq!(world.graph.live_nodes(), 1, "the filter is closed");
    drop(sim);
    end(world, backend);
}

/// An action that notes what is called, and fails where it is told to.
struct Noted {
    name: &'static str,
    fails: bool,
    notes: Arc<ThreadLock<Vec<String>>>,
}

impl Noted {
    fn note(&self, what: &str) {
        self.notes.lock().push(format!("{what} {}", self.name));
    }
}

impl Action for Noted {
    fn prepare(&mut self, _co: &Co) -> Result<()> {
        self.note("prepare");
        match self.fails {
            true => Err(coblock_block::Error::new(
                ErrorKind::Invalid,
                "told to fail",
            )),
            false => Ok(()),
        }
    }

    fn commit(&mut self, _graph: &mut GraphWrite<'_>) {
        self.note("commit");
    }

    fn abort(&mut self, _co: &Co) {
        self.note("abort");
    }

    fn clean(&mut self, _co: &Co) {
        self.note("clean");
    }
}

/// Rule 8.2: prepare all, then commit all, or abort in reverse; clean always. After a failure the
/// graph is the same, whichever part failed.
#[test]
fn rule_8_2_all_or_nothing() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (_, other) = disk(&world, "other");
    let (top, _) = filter(&world, "filter", "disk");
    let before = dump(&world);
    let notes = Arc::new(ThreadLock::new(Vec::new()));
    let noted = |name, fails| {
        Box::new(Noted {
            name,
            fails,
            notes: notes.clone(),
        })
    };
    let node = backend.node();
    for (name, fails, cycle, want) in [
        (
            "all go well",
            [false; 3],
            false,
            "prepare a, prepare b, prepare c, commit a, commit b, commit c, clean a, clean b, clean c",
        ),
        (
            "the second fails",
            [false, true, false],
            false,
            "prepare a, prepare b, abort a, clean a",
        ),
        (
            "the graph refuses",
            [false; 3],
            true,
            "prepare a, prepare b, prepare c, abort c, abort b, abort a, clean a, clean b, clean c",
        ),
    ] {
        let result = run(&world, |t| {
            for (name, fails) in ["a", "b", "c"].into_iter().zip(fails) {
                t.action(std::slice::from_ref(&node), noted(name, fails));
            }
            if cycle {
                let edge = world.home.with(|| {
                    world
                        .graph
                        .read_in_main(|main| top.children(main)[0].clone())
                });
                t.set_node(&backend, &top).set_child(&edge, &top);
            }
            t
        });
        assert_eq!(
            std::mem::take(&mut *notes.lock()).join(", "),
            want,
            "{name}"
        );
        assert_eq!(result.is_ok(), name == "all go well", "{name}");
        assert_eq!(dump(&world), before, "{name}");
        assert!(!backend.is_quiesced(), "{name}");
    }
    drop(node);
    world.run(|co| close_unused(co, &world.graph, top)).unwrap();
    world.run(|co| other.close(co)).unwrap();
    drop(other);
    end(world, backend);
}

/// Rule 8.2: what an embedder cannot know beforehand is a typed error, and nothing has changed.
#[test]
fn rule_8_2_refusals_are_typed() {
    let world = world();
    let (sim_disk, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "filter", "disk");
    let short = open_node(&world, sim(&SimDisk::new(4096)).with("node-name", "short")).unwrap();
    let edge = world.home.with(|| {
        world
            .graph
            .read_in_main(|main| top.children(main)[0].clone())
    });
    let before = dump(&world);
    let refused = |kind, words: &str, result: Result<()>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(dump(&world), before);
    };

    let cycle = run(&world, |t| t.set_child(&edge, &top));
    refused(
        ErrorKind::Chain,
        "Making 'filter' a file child of 'filter' would create a cycle",
        cycle,
    );
    let other_length = run(&world, |t| t.set_child(&edge, &short));
    refused(
        ErrorKind::Invalid,
        "cannot get node 'short' of 4096 bytes",
        other_length,
    );

    let alone = Permissions {
        held: Perm::CONSISTENT_READ,
        shared: Perm::all() - Perm::WRITE,
    };
    let taken = BlockBackend::with_permissions(&world.graph, backend.node(), alone);
    refused(
        ErrorKind::Conflict,
        "Permission conflict on node 'disk': permissions 'write' are both required by node 'filter' \
         (uses node 'disk' as 'file' child) and unshared by an unnamed block device (uses node \
         'disk' as 'root' child).",
        taken.map(drop),
    );
    let name = Options::new()
        .with("driver", "counted")
        .with("node-name", "filter")
        .with("file", "disk");
    refused(
        ErrorKind::InUse,
        "Duplicate nodes with node-name='filter'",
        open_node(&world, name).map(drop),
    );

    let hold = sim_disk.hold(Match::writes());
    let held = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[1; 512][..], PLAIN)
    });
    settle(&world);
    let busy = run(&world, |t| t.within(Duration::from_secs(1)).insert(&top));
    drop(hold);
    settle(&world);
    assert!(matches!(*held.borrow(), Some(Ok(()))));
    refused(ErrorKind::InUse, "Node 'disk' is busy", busy);

    drop(edge);
    for node in [top, short] {
        world
            .run(|co| close_unused(co, &world.graph, node))
            .unwrap();
    }
    end(world, backend);
}

/// Rule 5.4: the parent is quiesced exactly when the state of its node says so, and never in between:
/// an edge moves between nodes that the test drains or not.
#[test]
fn rule_5_4_counts_move_with_an_edge() {
    for (old_drained, new_drained) in [(false, false), (true, false), (false, true), (true, true)] {
        let name = format!("old drained {old_drained}, new drained {new_drained}");
        let world = world();
        let (_, old) = disk(&world, "old");
        let (_, new) = disk(&world, "new");
        let calls = Arc::new(Calls::default());
        let options = Options::new()
            .with("driver", "counted")
            .with("node-name", "parent")
            .with("file", "old")
            .with_object("calls", calls.clone());
        let parent = open_node(&world, options).unwrap();
        let user = BlockBackend::new(&world.graph, parent.clone());
        let edge = world.home.with(|| {
            world
                .graph
                .read_in_main(|main| parent.children(main)[0].clone())
        });
        let section = |backend: &BlockBackend, wanted: bool| {
            wanted.then(|| world.home.with(|| backend.node().drain_blocking()))
        };
        let of_old = section(&old, old_drained);
        let of_new = section(&new, new_drained);
        assert_eq!(parent.drained_sections(), u32::from(old_drained), "{name}");
        run(&world, |t| t.set_child(&edge, &new.node())).unwrap();
        let level = |backend: &BlockBackend| backend.node().drained_sections();
        assert_eq!(parent.drained_sections(), u32::from(new_drained), "{name}");
        assert_eq!(
            (level(&old), level(&new)),
            (u32::from(old_drained), u32::from(new_drained)),
            "{name}"
        );
        assert_eq!(user.is_quiesced(), new_drained, "{name}");
        // Drained all the time while it moved: it was never let go in between.
        assert_eq!(calls.get().0, 1, "{name}");
        drop(of_old);
        assert_eq!(
            user.is_quiesced(),
            new_drained,
            "{name}: the old node is another one now"
        );
        drop(of_new);
        assert!(!user.is_quiesced(), "{name}");
        assert_eq!(calls.get(), (1, 1), "{name}");
        write(&world, &user, 7);
        assert_eq!((read(&world, &old), read(&world, &new)), (0, 7), "{name}");
        drop((edge, parent));
        world.run(|co| user.close(co)).unwrap();
        drop(user);
        world.run(|co| old.close(co)).unwrap();
        drop(old);
        end(world, new);
    }
}

/// Rule 5.4: an overlay above a node that is drained is drained, and let go with it.
#[test]
fn rule_5_4_what_comes_above_a_drained_node_is_drained() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let below = backend.node();
    let section = world.home.with(|| below.drain_blocking());
    let (top, calls) = filter(&world, "filter", "disk");
    run(&world, |t| t.insert(&top)).unwrap();
    assert_eq!((top.drained_sections(), calls.get()), (1, (1, 0)));
    let held = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[3; 512][..], PLAIN)
    });
    settle(&world);
    assert_eq!((backend.queued(), held.borrow().is_none()), (1, true));
    drop(section);
    settle(&world);
    assert!(matches!(*held.borrow(), Some(Ok(()))));
    assert_eq!((top.drained_sections(), calls.get()), (0, (1, 1)));
    assert_eq!((backend.in_flight(), below.in_flight()), (0, 0));
    drop((top, below));
    end(world, backend);
}

/// Rule 8.2: what leaves the graph is flushed before anything changes; where that fails, so does all.
#[test]
fn rule_8_2_what_cannot_be_flushed_stays() {
    let world = world();
    let (old_disk, backend) = disk(&world, "old");
    let (_, other) = disk(&world, "new");
    write(&world, &backend, 7);
    let before = dump(&world);
    old_disk.fail(Fault::new(Match::flushes(), libc::EIO));
    let new = other.node();
    let error = run(&world, |t| t.set_node(&backend, &new)).unwrap_err();
    assert_eq!(error.errno(), libc::EIO, "{error}");
    assert_eq!(dump(&world), before);
    assert_eq!(read(&world, &backend), 7);
    drop(new);
    let closed = world.run(|co| backend.close(co));
    assert_eq!(closed.unwrap_err().kind(), ErrorKind::Poisoned);
    drop(backend);
    end(world, other);
}

/// What requests may be follows a child that is replaced, up to the nodes above.
#[test]
fn limits_are_those_of_the_new_child() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (below, _) = filter(&world, "below", "disk");
    let (top, _) = filter(&world, "top", "below");
    let small = sim(&SimDisk::new(64 << 10)).with("max-transfer", "8192");
    let small = open_node(&world, small).unwrap();
    let edge = world.home.with(|| {
        world
            .graph
            .read_in_main(|main| below.children(main)[0].clone())
    });
    assert_ne!(top.whole_limits().max_transfer, 8192);
    run(&world, |t| t.set_child(&edge, &small)).unwrap();
    assert_eq!(top.whole_limits().max_transfer, 8192);
    drop((edge, below, small));
    world.run(|co| close_unused(co, &world.graph, top)).unwrap();
    end(world, backend);
}

/// Tells which sizes a device was told.
#[derive(Default)]
struct Sizes(ThreadLock<Vec<u64>>);

impl Device for Sizes {
    fn resized(&self, len: u64) {
        self.0.lock().push(len);
    }
}

/// Rule 8.2: a backend gets a longer node, and its device is told.
#[test]
fn rule_8_2_a_device_is_told_the_new_length() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let sizes = Arc::new(Sizes::default());
    backend.set_device(Some(sizes.clone()));
    let long = open_node(&world, sim(&SimDisk::new(128 << 10))).unwrap();
    run(&world, |t| t.set_node(&backend, &long)).unwrap();
    assert_eq!(
        (backend.len(), &**sizes.0.lock()),
        (128 << 10, &[128 << 10][..])
    );
    assert_eq!(
        world.graph.live_nodes(),
        1,
        "nobody used the old one any more"
    );
    drop(long);
    end(world, backend);
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
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(1 << 20).unwrap();
    let name = path.path().to_str().unwrap();
    let options = Options::file(name).with("node-name", "disk");
    let backend = Arc::new(world.open(options).unwrap());
    let threads: Vec<IoThread> = (0..2)
        .map(|n| {
            IoThread::new(ContextOptions {
                engine: EngineKind::Threads,
                ..ContextOptions::named(format!("queue {n}"))
            })
            .unwrap()
        })
        .collect();
    let stop = Arc::new(AtomicBool::new(false));
    let (left, requests) = (Arc::new(AtomicU64::new(4)), Arc::new(AtomicU64::new(0)));
    for n in 0..4_u64 {
        let (backend, stop) = (backend.clone(), stop.clone());
        let (left, requests) = (left.clone(), requests.clone());
        let body = move |co: &Co| {
            let mut round = 0_u8;
            while !stop.load(Ordering::Relaxed) {
                round = round.wrapping_add(1);
                let (data, mut back) = ([round; 4096], [0; 4096]);
                backend.pwrite(co, n * 4096, &data[..], PLAIN).unwrap();
                backend.pread(co, n * 4096, &mut back[..]).unwrap();
                assert!(data == back, "queue {n}, round {round}");
                requests.fetch_add(2, Ordering::Relaxed);
                coblock_aio::co::reschedule(co);
            }
            left.fetch_sub(1, Ordering::Release);
        };
        let context = threads[usize::try_from(n % 2).unwrap()].context();
        context.spawn("queue", body).unwrap();
    }
    for round in 0..20 {
        let before = requests.load(Ordering::Relaxed);
        let options = match round % 2 {
            0 => Options::new().with("driver", "counted"),
            _ => Options::new()
                .with("driver", "throttle")
                .with("throttle-group", "limits"),
        };
        let top = open_node(&world, options.with("file", "disk")).unwrap();
        run(&world, |t| t.insert(&top)).unwrap();
        while requests.load(Ordering::Relaxed) < before + 10 {
            world.home.poll(false);
            std::thread::yield_now();
        }
        run(&world, |t| t.remove(&top)).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    while left.load(Ordering::Acquire) > 0 {
        world.home.poll(false);
        std::thread::yield_now();
    }
    for thread in threads {
        thread.stop();
    }
    assert_eq!(world.graph.live_nodes(), 1);
    end(world, backend);
}

/// A transaction is run by a coroutine of another thread, and by the main home outside of coroutines.
#[test]
fn a_transaction_is_run_from_anywhere() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "filter", "disk");
    let thread = IoThread::new(ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named("other")
    })
    .unwrap();
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
        clock: coblock_aio::Clock::Virtual(world.clock.clone().unwrap()),
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
    end(world, backend);
}

fn panics(f: impl FnOnce() + std::panic::UnwindSafe) -> String {
    let panic = std::panic::catch_unwind(f).expect_err("it is refused");
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => (*panic.downcast::<&str>().expect("a message")).to_owned(),
    }
}

/// Rules 7.8, 7.7: misuse is refused, with both places named.
#[test]
fn rule_7_8_polls_and_writers_are_refused_meanwhile() {
    let world = world();
    let refused = |f: &dyn Fn()| panics(std::panic::AssertUnwindSafe(|| world.home.with(f)));
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
    let in_coroutine = panics(std::panic::AssertUnwindSafe(|| {
        world.run(|_| world.graph.read_in_main(|_| ()));
    }));
    assert!(in_coroutine.contains("in a coroutine"), "{in_coroutine}");
    // All of it has been let go.
    world.home.with(|| drop(world.graph.write()));
    world.end();
}

/// Rule 8.2: a disk is resized from the thread of its queue while that queue goes on; the device is
/// told before the next request starts.
#[test]
fn rule_8_2_resize_under_load_from_an_io_thread() {
    let world = World::with_engine(EngineKind::Threads);
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(1 << 20).unwrap();
    let backend = Arc::new(
        world
            .open(Options::file(path.path().to_str().unwrap()))
            .unwrap(),
    );
    let sizes = Arc::new(Sizes::default());
    backend.set_device(Some(sizes.clone()));
    let thread = IoThread::new(ContextOptions {
        engine: EngineKind::Threads,
        ..ContextOptions::named("queue")
    })
    .unwrap();
    let (stop, left) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(2)),
    );
    let load = {
        let (backend, sizes) = (backend.clone(), sizes.clone());
        let (stop, left) = (stop.clone(), left.clone());
        move |co: &Co| {
            while !stop.load(Ordering::Relaxed) {
                // What the device was told is there.
                let end = sizes.0.lock().last().copied().unwrap_or(1 << 20);
                backend.pwrite(co, end - 512, &[1; 512][..], PLAIN).unwrap();
                coblock_aio::co::reschedule(co);
            }
            left.fetch_sub(1, Ordering::Release);
        }
    };
    let resizes = {
        let backend = backend.clone();
        let (stop, left) = (stop.clone(), left.clone());
        move |co: &Co| {
            for mib in 2..20_u64 {
                backend.resize(co, mib << 20).unwrap();
                coblock_aio::co::reschedule(co);
            }
            stop.store(true, Ordering::Relaxed);
            left.fetch_sub(1, Ordering::Release);
        }
    };
    thread.context().spawn("load", load).unwrap();
    thread.context().spawn("resizes", resizes).unwrap();
    while left.load(Ordering::Acquire) > 0 {
        world.home.poll(false);
        std::thread::yield_now();
    }
    thread.stop();
    let want: Vec<u64> = (2..20).map(|mib| mib << 20).collect();
    assert_eq!(*sizes.0.lock(), want);
    assert_eq!(backend.len(), 19 << 20);
    end(world, backend);
}

/// A device that calls the graph when it is told of a section is refused, with both places named.
#[test]
fn a_callback_of_a_section_does_not_call_the_graph() {
    struct Calls(Arc<Node>);
    impl Device for Calls {
        fn drained_begin(&self) {
            drop(self.0.drain_blocking());
        }
    }
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (_, other) = disk(&world, "other");
    backend.set_device(Some(Arc::new(Calls(other.node()))));
    let begin = || drop(world.home.with(|| backend.drain_blocking()));
    let message = panics(std::panic::AssertUnwindSafe(begin));
    assert!(
        message.contains("from a callback of the change of sections"),
        "{message}"
    );
    assert_eq!(message.matches(file!()).count(), 2, "{message}");
    // The graph is poisoned: whoever uses it next is told, and nothing of it is used again.
    std::mem::forget((backend, other, world));
}

/// Steps see what those before them did: two filters come above one node in one transaction, and what
/// was closed meanwhile is an error.
#[test]
fn rule_8_2_steps_build_on_each_other() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (one, _) = filter(&world, "one", "disk");
    let (two, _) = filter(&world, "two", "disk");
    run(&world, |t| t.insert(&one).insert(&two)).unwrap();
    let below = |node: &Arc<Node>| {
        let read = || {
            world
                .graph
                .read_in_main(|main| node.children(main)[0].node(main).name().to_owned())
        };
        world.home.with(read)
    };
    assert!(Arc::ptr_eq(&backend.node(), &two));
    assert_eq!(
        (below(&two), below(&one)),
        ("one".to_owned(), "disk".to_owned())
    );
    write(&world, &backend, 4);
    run(&world, |t| t.remove(&one).remove(&two)).unwrap();
    drop((one, two));
    assert_eq!(world.graph.node_names(), ["disk"]);
    assert_eq!(read(&world, &backend), 4);

    let (top, _) = filter(&world, "filter", "disk");
    let (_, other) = disk(&world, "other");
    let gone = BlockBackend::new(&world.graph, other.node());
    let mut transaction = Transaction::new(&world.graph);
    transaction.set_node(&gone, &top);
    world.run(|co| gone.close(co)).unwrap();
    let error = world.run(|co| transaction.run(co)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    world.run(|co| close_unused(co, &world.graph, top)).unwrap();
    world.run(|co| other.close(co)).unwrap();
    drop((gone, other, transaction));
    end(world, backend);
}

/// Rule 8.2: a filter that was opened before its child got another length, by another user, is as long as
/// the child: when it comes above it, and when it stands there already.
#[test]
fn rule_8_2_filters_are_as_long_as_their_child() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let filter = || {
        let options = Options::new().with("driver", "copy-on-read");
        open_node(&world, options.with("file", "disk")).unwrap()
    };
    let (top, beside) = (filter(), filter());
    let other = BlockBackend::new(&world.graph, beside);
    for (len, inserted) in [(32 << 10, false), (128 << 10, false), (96 << 10, true)] {
        if inserted {
            run(&world, |t| t.insert(&top)).unwrap();
        }
        world.run(|co| backend.truncate(co, len, true)).unwrap();
        assert_eq!((backend.len(), top.len(), other.len()), (len, len, len));
        let last = world.run(|co| other.pread(co, len - 512, &mut [0; 512][..]));
        last.unwrap();
    }
    world.run(|co| other.close(co)).unwrap();
    drop((top, other));
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
