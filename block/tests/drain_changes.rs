//! Drained sections while something else goes on: the graph changes in the midst of them, requests
//! run on another thread, a backend has no node any more.

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{BlockBackend, Drain, Drained, ErrorKind, Transaction};
use coblock_coroutine::Co;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use support::change::{disk, filter, world};
use support::load::io_thread;
use support::{PLAIN, World, end, null, read_sector, settle, sim_world, start};

/// Of all nodes, or of one; begun in a coroutine, or outside.
const WAYS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

fn section(world: &World, one: &impl Drain, (all, in_coroutine): (bool, bool)) -> Drained {
    match (all, in_coroutine) {
        (true, true) => world.run(|co| world.graph.drain(co)),
        (true, false) => world.home.with(|| world.graph.drain_blocking()),
        (false, true) => world.run(|co| one.drain(co)),
        (false, false) => world.home.with(|| one.drain_blocking()),
    }
}

/// Starts a read, and what follows it in the same coroutine.
fn read_then(
    world: &World,
    backend: &Arc<BlockBackend>,
    then: impl FnOnce(&Co, &BlockBackend) + 'static,
) {
    start(world, backend, move |co, backend| {
        read_sector(co, backend)?;
        then(co, backend);
        Ok(())
    });
}

fn read(world: &World, backend: &BlockBackend) {
    world.run(|co| read_sector(co, backend)).unwrap();
}

/// Rules 5.1, 5.3: a section of one node tells its driver, one of all tells each, once; it begins
/// when the read that was under way has ended. (/bdrv-drain/driver-cb)
#[test]
fn rule_5_3_sections_tell_each_driver_once() {
    let world = world();
    let (sim, user) = disk(&world, "disk");
    let (below, below_calls) = filter(&world, "below", "disk");
    let (top, top_calls) = filter(&world, "top", "below");
    let backend = Arc::new(BlockBackend::new(&world.graph, top.clone()));
    for way in WAYS {
        sim.delay(7, Duration::from_millis(5));
        let over = Rc::new(Cell::new(false));
        let told = over.clone();
        read_then(&world, &backend, move |_, _| told.set(true));
        assert!(!over.get());
        let (top_before, below_before) = (top_calls.get(), below_calls.get());
        let since =
            |calls: (u32, u32), before: (u32, u32)| (calls.0 - before.0, calls.1 - before.1);
        let section = section(&world, &top, way);
        assert!(over.get(), "all, in a coroutine: {way:?}");
        let of_all = u32::from(way.0);
        assert_eq!(since(top_calls.get(), top_before), (1, 0), "{way:?}");
        assert_eq!(
            since(below_calls.get(), below_before),
            (of_all, 0),
            "{way:?}"
        );
        drop(section);
        assert_eq!(since(top_calls.get(), top_before), (1, 1), "{way:?}");
        assert_eq!(
            since(below_calls.get(), below_before),
            (of_all, of_all),
            "{way:?}"
        );
    }
    drop((top, below));
    world.run(|co| user.close(co)).unwrap();
    drop(user);
    end(world, backend);
}

/// A request that ends in the midst of a section closes what it went through: the parent of the node
/// that is being drained is gone when the section begins. (/bdrv-drain/deletion)
#[test]
fn a_parent_goes_while_its_child_is_being_drained() {
    for way in WAYS {
        let world = world();
        let (sim, user) = disk(&world, "disk");
        let (top, calls) = filter(&world, "top", "disk");
        let above = Arc::new(BlockBackend::new(&world.graph, top));
        sim.delay(7, Duration::from_millis(5));
        read_then(&world, &above, |co, above| above.close(co).unwrap());
        let section = section(&world, &user.node(), way);
        settle(&world);
        assert_eq!(above.node().users(), 0, "{way:?}");
        // A section of all has it as long as it lives.
        assert_eq!(calls.get(), (1, u32::from(!way.0)), "let go when it went");
        assert_eq!(user.node().drained_sections(), 1);
        drop(section);
        assert_eq!(calls.get(), (1, 1));
        assert!(!user.is_quiesced());
        read(&world, &user);
        drop(above);
        end(world, user);
    }
}

/// The same where the request takes a filter out of the graph: its user, which the section had
/// quiesced through it, stays so until the end. (/bdrv-drain/detach)
#[test]
fn a_filter_is_taken_out_while_its_child_is_being_drained() {
    for way in WAYS {
        let world = world();
        let (sim, user) = disk(&world, "disk");
        let (top, _calls) = filter(&world, "top", "disk");
        let above = Arc::new(BlockBackend::new(&world.graph, top.clone()));
        let gone = Rc::new(Cell::new(false));
        sim.delay(7, Duration::from_millis(5));
        read_then(&world, &above, {
            let (graph, gone) = (world.graph.clone(), gone.clone());
            move |co, _| {
                Transaction::new(&graph).remove(&top).run(co).unwrap();
                drop(top);
                gone.set(true);
            }
        });
        let section = section(&world, &user.node(), way);
        settle(&world);
        assert!(
            gone.get() && world.graph.find_node("top").is_none(),
            "{way:?}"
        );
        assert!(Arc::ptr_eq(&above.node(), &user.node()));
        assert!(above.is_quiesced() && user.is_quiesced());
        assert_eq!(user.node().drained_sections(), 1, "{way:?}");
        drop(section);
        assert!(!above.is_quiesced() && !user.is_quiesced());
        read(&world, &above);
        world.run(|co| above.close(co)).unwrap();
        drop(above);
        end(world, user);
    }
}

/// Is busy with something that is no request.
#[derive(Default)]
struct Device(AtomicBool);

impl coblock_block::Device for Device {
    fn drained_poll(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Rules 5.1, 5.11: who comes above a node while a section of it waits is waited for, too.
#[test]
fn rule_5_11_a_section_waits_for_who_comes_meanwhile() {
    let disk = SimDisk::new(4096);
    let (world, user) = sim_world(&disk, &[]);
    let hold = disk.hold(Match::reads());
    read_then(&world, &user, |_, _| ());
    let begun = Rc::new(Cell::new(false));
    world.home.spawn("drainer", {
        let (node, begun) = (user.node(), begun.clone());
        move |co| {
            let section = node.drain(co);
            begun.set(true);
            drop(section);
        }
    });
    settle(&world);
    let late = BlockBackend::new(&world.graph, user.node());
    let device = Arc::new(Device(AtomicBool::new(true)));
    late.set_device(Some(device.clone()));
    drop(hold);
    settle(&world);
    assert!(!begun.get(), "the device is busy still");
    device.0.store(false, Ordering::Relaxed);
    late.kick();
    settle(&world);
    assert!(begun.get());
    world.close(late).unwrap();
    end(world, user);
}

/// Who goes on at the end of a section takes two of the node's three users away at once: the end
/// wakes after it has told all of them. (/bdrv-drain/blockjob/commit_by_drained_end)
#[test]
fn who_goes_on_at_the_end_takes_users_away() {
    let (world, first) = sim_world(&SimDisk::new(4096), &[]);
    let more = || Arc::new(BlockBackend::new(&world.graph, first.node()));
    let (second, third) = (more(), more());
    let section = world.home.with(|| first.node().drain_blocking());
    let closed = Rc::new(Cell::new(false));
    read_then(&world, &first, {
        let (second, closed) = (second.clone(), closed.clone());
        move |co, first| {
            second.close(co).unwrap();
            first.close(co).unwrap();
            closed.set(true);
        }
    });
    settle(&world);
    assert!(!closed.get(), "not before the end");
    drop(section);
    settle(&world);
    assert!(closed.get());
    assert!(!third.is_quiesced());
    read(&world, &third);
    assert_eq!(third.node().users(), 1);
    drop((first, second));
    end(world, third);
}

/// Rule 5.4: what a section holds back goes to the node that its user has got meanwhile, and not
/// before that one is let go as well. (/bdrv-drain/replace_child/mid-drain)
#[test]
fn rule_5_4_what_was_held_back_reaches_the_new_node() {
    let world = world();
    let (old_sim, old) = disk(&world, "old");
    let (new_sim, new) = disk(&world, "new");
    let user = Arc::new(BlockBackend::new(&world.graph, old.node()));
    let sections = world
        .home
        .with(|| (old.node().drain_blocking(), new.node().drain_blocking()));
    let ended = start(&world, &user, |co, backend| {
        backend.pwrite(co, 0, &[9; 512][..], PLAIN)
    });
    let to = new.node();
    world
        .run(|co| Transaction::new(&world.graph).set_node(&user, &to).run(co))
        .unwrap();
    drop(to);
    drop(sections.0);
    settle(&world);
    assert_eq!((user.queued(), ended.borrow().is_none()), (1, true));
    drop(sections.1);
    settle(&world);
    assert!(matches!(*ended.borrow(), Some(Ok(()))));
    assert_eq!(new_sim.contents()[..512], [9; 512]);
    assert_eq!(old_sim.contents()[..512], [0; 512]);
    for backend in [user, old] {
        world.run(|co| backend.close(co)).unwrap();
    }
    end(world, new);
}

/// Rule 5.1: requests that run on another thread are waited for, from the main home, and from a
/// coroutine of that thread. (/bdrv-drain/iothread)
#[test]
fn rule_5_1_requests_of_another_thread_are_waited_for() {
    let world = World::with_engine(EngineKind::None);
    let thread = io_thread("io", EngineKind::None);
    let backend = null(&world, 200_000);
    let over = Arc::new(AtomicUsize::new(0));
    // In flight until its callback has returned, so that there is nothing to be seen in between.
    let request = || {
        let (backend, told) = (backend.clone(), over.clone());
        move || {
            let done = move |result: coblock_block::Result<()>, _buf| {
                result.unwrap();
                told.fetch_add(1, Ordering::SeqCst);
            };
            backend.aio_pread(0, vec![0; 512], done).unwrap();
        }
    };
    for round in 1..=50 {
        let (tell, hear) = mpsc::channel();
        let begin = request();
        thread.context().oneshot(move || {
            begin();
            tell.send(()).unwrap();
        });
        hear.recv().unwrap();
        let section = section(&world, &backend.node(), WAYS[round % WAYS.len()]);
        assert_eq!(over.load(Ordering::SeqCst), round);
        assert_eq!((backend.in_flight(), backend.node().in_flight()), (0, 0));
        drop(section);
    }
    // From a coroutine of the thread itself; the main home begins its sections.
    let drained = Arc::new(AtomicBool::new(false));
    let (node, told, seen) = (backend.node(), drained.clone(), over.clone());
    let begin = request();
    let main = world.home.context().clone();
    thread.context().oneshot(move || {
        begin();
        let drain = move |co: &Co| {
            let section = node.drain(co);
            assert_eq!(seen.load(Ordering::SeqCst), 51);
            drop((section, node));
            told.store(true, Ordering::SeqCst);
            main.notify();
        };
        coblock_aio::spawn("drainer", drain).unwrap();
    });
    while !drained.load(Ordering::SeqCst) {
        world.home.poll(true);
    }
    drop(thread);
    end(world, backend);
}

/// A backend that has no node any more: its requests fail later, and its own section and one of all
/// wait for their callbacks. (/block-backend/drain_aio_error and drain_all_aio_error)
#[test]
fn sections_wait_for_callbacks_of_a_backend_without_a_node() {
    for way in WAYS {
        let (world, backend) = sim_world(&SimDisk::new(4096), &[]);
        world.run(|co| backend.close(co)).unwrap();
        let failed = Arc::new(AtomicBool::new(false));
        let told = failed.clone();
        world.home.with(|| {
            let done = move |result: coblock_block::Result<()>, _buf| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::Closed);
                told.store(true, Ordering::Relaxed);
            };
            backend.aio_pread(0, vec![0; 512], done).unwrap();
        });
        assert!(!failed.load(Ordering::Relaxed));
        let section = section(&world, &*backend, way);
        assert!(
            failed.load(Ordering::Relaxed),
            "all, in a coroutine: {way:?}"
        );
        drop((section, backend));
        world.end();
    }
}

/// Rules 5.1, 5.11: a section of a backend is one of the node that the backend has when it begins. A
/// coroutine elsewhere once chose the node when it asked, so that a transaction that came first left
/// the backend unquiesced.
#[test]
fn rule_5_11_a_backend_that_gets_another_node_is_drained_there() {
    // At every moment of the transaction.
    for moment in 0..16 {
        let world = world();
        let (_, backend) = disk(&world, "disk");
        let (to, _) = filter(&world, "to", "disk");
        let other = Home::new(ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named("other")
        })
        .unwrap();
        world.home.spawn("transaction", {
            let (graph, to) = (world.graph.clone(), to.clone());
            move |co| Transaction::new(&graph).insert(&to).run(co).unwrap()
        });
        for _ in 0..moment {
            world.home.poll(false);
        }
        let drained = Rc::new(Cell::new(false));
        other.spawn("drainer", {
            let (backend, drained) = (backend.clone(), drained.clone());
            move |co| {
                let section = backend.drain(co);
                assert!(backend.is_quiesced(), "at moment {moment}");
                drop(section);
                drained.set(true);
            }
        });
        while world.home.poll(false) | other.poll(false) {}
        assert!(drained.get());
        assert!(Arc::ptr_eq(&backend.node(), &to) && !backend.is_quiesced());
        other.close();
        drop(to);
        end(world, backend);
    }
}

/// Rule 5.11: a resize with a graph guard held is refused, also while a transaction waits for just this
/// reader. It once waited for the transaction, which waited for it.
#[test]
fn rule_5_11_a_reader_that_resizes_is_refused_at_once() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "top", "disk");
    let leave = Rc::new(Cell::new(false));
    let refused = Rc::new(RefCell::new(String::new()));
    world.home.spawn("reader", {
        let (graph, backend) = (world.graph.clone(), backend.clone());
        let (leave, refused) = (leave.clone(), refused.clone());
        move |co| {
            let guard = graph.read(co);
            while !leave.get() {
                coblock_aio::co::reschedule(co);
            }
            let resize = std::panic::AssertUnwindSafe(|| backend.resize(co, 4096));
            let panic = std::panic::catch_unwind(resize).expect_err("it is refused");
            *refused.borrow_mut() = *panic.downcast::<String>().expect("a message");
            drop(guard);
        }
    });
    world.home.spawn("transaction", {
        let (graph, top) = (world.graph.clone(), top.clone());
        move |co| Transaction::new(&graph).insert(&top).run(co).unwrap()
    });
    for _ in 0..20 {
        world.home.poll(false);
    }
    assert!(
        !Arc::ptr_eq(&backend.node(), &top),
        "it waits for the reader"
    );
    leave.set(true);
    settle(&world);
    assert!(refused.borrow().contains("rule 5.11"), "{refused:?}");
    assert!(Arc::ptr_eq(&backend.node(), &top));
    drop(top);
    end(world, backend);
}
