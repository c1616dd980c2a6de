//! Drained sections (rules 5.1 to 5.11), one context or several stepped by hand.

mod support;

use coblock_aio::{Clock, ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{
    BlockBackend, Device, Drain, ErrorKind, Node, Options, RequestFlags, RequestKind,
};
use coblock_coroutine::{Co, ThreadLock};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use support::counted::{Calls, OpenCounted};
use support::{PLAIN, World, end, settle, sim, sim_world, start};

/// `top` over `mid` over `disk`, with a backend on `top`.
struct Chain {
    world: World,
    backend: Arc<BlockBackend>,
    sim: Arc<SimDisk>,
    calls: Arc<Calls>,
    top: Arc<Node>,
    mid: Arc<Node>,
    disk: Arc<Node>,
}

fn chain() -> Chain {
    let mut world = World::simulated();
    world.registry.register("counted", Box::new(OpenCounted));
    let sim = SimDisk::new(64 << 10);
    let calls = Arc::new(Calls::default());
    let options = Options::new()
        .with("driver", "counted")
        .with("node-name", "top")
        .with("file.driver", "counted")
        .with("file.node-name", "mid")
        .with_object("file.calls", calls.clone())
        .with("file.file.driver", "sim")
        .with("file.file.node-name", "disk")
        .with_object("file.file.disk", sim.clone());
    let backend = Arc::new(world.open(options).unwrap());
    let node = |name: &str| world.graph.find_node(name).unwrap();
    let (top, mid, disk) = (node("top"), node("mid"), node("disk"));
    Chain {
        world,
        backend,
        sim,
        calls,
        top,
        mid,
        disk,
    }
}

impl Chain {
    fn sections(&self) -> [u32; 3] {
        [&self.top, &self.mid, &self.disk].map(|node| node.drained_sections())
    }

    fn end(self) {
        drop((self.top, self.mid, self.disk));
        end(self.world, self.backend);
    }
}

fn read(co: &Co, backend: &BlockBackend) -> coblock_block::Result<()> {
    backend.pread(co, 0, &mut [0; 512][..])
}

/// Rule 5.1: a section reaches all parents, not the children, and begins when what was in flight
/// has ended.
#[test]
fn rule_5_1_a_section_reaches_upward_and_waits_once() {
    let chain = chain();
    let hold = Rc::new(RefCell::new(Some(chain.sim.hold(Match::reads()))));
    let ended = start(&chain.world, &chain.backend, read);
    let begun = Rc::new(Cell::new(false));
    chain.world.home.spawn("drainer", {
        let (mid, ended, begun) = (chain.mid.clone(), ended.clone(), begun.clone());
        move |co| {
            let section = mid.drain(co);
            assert!(matches!(*ended.borrow(), Some(Ok(()))), "the read is over");
            begun.set(true);
            drop(section);
        }
    });
    settle(&chain.world);
    assert_eq!(chain.sections(), [1, 1, 0], "parents, and no child");
    assert!(chain.backend.is_quiesced() && !begun.get());
    drop(hold.borrow_mut().take());
    settle(&chain.world);
    assert!(begun.get());
    assert_eq!((chain.sections(), chain.calls.get()), ([0, 0, 0], (1, 1)));
    assert!(!chain.backend.is_quiesced());
    chain.end();
}

/// Rule 5.1, from outside of coroutines, of one node and of all.
#[test]
fn rule_5_1_the_main_home_polls_until_nothing_is_in_flight() {
    let chain = chain();
    for all in [false, true] {
        chain.sim.delay(7, Duration::from_millis(5));
        let ended = start(&chain.world, &chain.backend, read);
        assert!(ended.borrow().is_none());
        chain.world.home.with(|| {
            let _section = if all {
                chain.world.graph.drain_blocking()
            } else {
                chain.disk.drain_blocking()
            };
            assert!(matches!(*ended.borrow(), Some(Ok(()))));
            assert_eq!(chain.top.in_flight() + chain.disk.in_flight(), 0);
        });
    }
    chain.end();
}

/// Rule 5.2: counts of all nestings add up; drivers are told of the first begin and the last end.
#[test]
fn rule_5_2_sections_nest() {
    let chain = chain();
    chain.world.home.with(|| {
        for (outer_all, inner_all, both) in [
            (false, false, [1, 2, 0]),
            (false, true, [2, 3, 1]),
            (true, false, [2, 3, 1]),
            (true, true, [3, 3, 2]),
        ] {
            let before = chain.calls.get();
            let begin = |all: bool| {
                if all {
                    chain.world.graph.drain_blocking()
                } else {
                    chain.mid.drain_blocking()
                }
            };
            let outer = begin(outer_all);
            let inner = begin(inner_all);
            assert_eq!(
                chain.sections(),
                both,
                "outer {outer_all} inner {inner_all}"
            );
            // Guards end in any order.
            if outer_all {
                drop((outer, inner));
            } else {
                drop((inner, outer));
            }
            assert_eq!(chain.sections(), [0; 3]);
            assert_eq!(chain.calls.get(), (before.0 + 1, before.1 + 1));
        }
    });
    chain.end();
}

/// Rule 5.3: all nodes are quiesced; a parent is so through each child, too. Nodes made inside
/// are born drained, and nodes may go.
#[test]
fn rule_5_3_nodes_come_and_go_in_a_section_of_all() {
    let chain = chain();
    let section = chain.world.home.with(|| chain.world.graph.drain_blocking());
    assert_eq!(chain.sections(), [2, 2, 1]);
    let disk = SimDisk::new(4096);
    let inside = chain
        .world
        .open(sim(&disk).with("node-name", "new"))
        .unwrap();
    assert_eq!(inside.node().drained_sections(), 1);
    assert!(inside.is_quiesced(), "its user, too");
    let gone = chain.world.open(sim(&SimDisk::new(512))).unwrap();
    chain.world.close(gone).unwrap();
    drop(section);
    assert_eq!(
        (chain.sections(), inside.node().drained_sections()),
        ([0; 3], 0)
    );
    assert!(!inside.is_quiesced());
    chain.world.run(|co| read(co, &inside)).unwrap();
    chain.world.close(inside).unwrap();
    chain.end();
}

/// Rule 5.3: a section is no lock: who does not queue sends requests in it, and others open their
/// own.
#[test]
fn rule_5_3_the_owner_of_a_section_does_requests() {
    let chain = chain();
    chain.backend.set_request_queueing(false);
    chain.world.run(|co| {
        let section = chain.mid.drain(co);
        read(co, &chain.backend).unwrap();
        let own = chain.disk.drain(co);
        read(co, &chain.backend).unwrap();
        drop(section);
        assert_eq!(chain.sections(), [1, 1, 1]);
        drop(own);
    });
    chain.end();
}

/// Rule 5.4: an edge to a drained node quiesces its parent, and lets it go afterwards; one that is
/// taken away lets it go at once.
#[test]
fn rule_5_4_edges_remember_whom_they_quiesced() {
    let chain = chain();
    let section = chain.world.home.with(|| chain.disk.drain_blocking());
    assert_eq!(chain.sections(), [1, 1, 1]);
    let calls = Arc::new(Calls::default());
    let overlay = Options::new()
        .with("driver", "counted")
        .with("node-name", "overlay")
        .with_object("calls", calls.clone())
        .with("file", "disk");
    let (kept, taken) = (
        chain.world.open(overlay.clone()).unwrap(),
        chain
            .world
            .open(overlay.with("node-name", "second"))
            .unwrap(),
    );
    let sections = |backend: &BlockBackend| backend.node().drained_sections();
    assert_eq!(
        (sections(&kept), sections(&taken), calls.get()),
        (1, 1, (2, 0))
    );
    assert!(kept.is_quiesced());
    chain.world.close(taken).unwrap();
    assert_eq!(calls.get(), (2, 1), "let go when the edge went");
    // A backend alone does the same.
    let user = BlockBackend::new(&chain.world.graph, chain.disk.clone());
    assert!(user.is_quiesced());
    drop(section);
    assert_eq!(
        (sections(&kept), calls.get(), chain.sections()),
        (0, (2, 2), [0; 3])
    );
    assert!(!user.is_quiesced() && !kept.is_quiesced());
    chain.world.close(user).unwrap();
    chain.world.close(kept).unwrap();
    chain.end();
}

/// Rule 5.5: requests wait in order, are not in flight meanwhile, and go on when the last section
/// has ended.
#[test]
fn rule_5_5_requests_queue_in_order() {
    let disk = SimDisk::new(64 << 10);
    let (world, backend) = sim_world(&disk, &[]);
    let sections = world
        .home
        .with(|| (backend.drain_blocking(), backend.node().drain_blocking()));
    let order = Rc::new(RefCell::new(Vec::new()));
    for n in 0..5u64 {
        let order = order.clone();
        start(&world, &backend, move |co, backend| {
            backend.pwrite(co, n * 512, &[1; 512][..], PLAIN)?;
            order.borrow_mut().push(n);
            Ok(())
        });
    }
    settle(&world);
    assert_eq!((backend.queued(), backend.in_flight()), (5, 0));
    drop(sections.0);
    settle(&world);
    assert_eq!(backend.queued(), 5, "one section is left");
    drop(sections.1);
    settle(&world);
    assert_eq!(*order.borrow(), [0, 1, 2, 3, 4]);
    end(world, backend);
}

/// Rule 5.5: a request that may go on is counted before it is woken: a section that begins before
/// it ran waits for it.
#[test]
fn rule_5_5_a_woken_request_is_counted_before_it_runs() {
    let disk = SimDisk::new(64 << 10);
    let (world, backend) = sim_world(&disk, &[]);
    let other = Home::new(ContextOptions {
        engine: EngineKind::None,
        clock: Clock::Virtual(world.clock.clone().unwrap()),
        ..ContextOptions::named("other")
    })
    .unwrap();
    let section = world.home.with(|| backend.drain_blocking());
    let done = Rc::new(Cell::new(false));
    other.spawn("request", {
        let (backend, done) = (backend.clone(), done.clone());
        move |co| {
            read(co, &backend).unwrap();
            done.set(true);
        }
    });
    assert_eq!(backend.queued(), 1);
    drop(section);
    assert!(!done.get(), "its context was not polled");
    let late = world
        .home
        .with(|| backend.drain_blocking_within(Duration::from_secs(1)));
    let busy = late.unwrap_err().busy;
    assert_eq!((busy.len(), busy[0].otherwise), (1, true), "{busy:?}");
    other.poll(false);
    assert!(done.get());
    drop(world.home.with(|| backend.drain_blocking()));
    end(world, backend);
    other.close();
}

/// Rule 5.5: the user is told of the first begin and the last end, and may be busy with what is no
/// request.
#[test]
fn rule_5_5_a_device_is_told() {
    #[derive(Default)]
    struct Told {
        calls: ThreadLock<Vec<&'static str>>,
        busy: AtomicBool,
    }
    impl Device for Told {
        fn drained_begin(&self) {
            self.calls.lock().push("begin");
        }
        fn drained_end(&self) {
            self.calls.lock().push("end");
        }
        fn drained_poll(&self) -> bool {
            self.busy.load(Ordering::Relaxed)
        }
    }
    let chain = chain();
    let device = Arc::new(Told::default());
    chain.backend.set_device(Some(device.clone()));
    device.busy.store(true, Ordering::Relaxed);
    chain.world.home.context().oneshot({
        let (device, backend) = (device.clone(), chain.backend.clone());
        move || {
            device.busy.store(false, Ordering::Relaxed);
            backend.kick();
        }
    });
    chain.world.home.with(|| {
        let section = chain.disk.drain_blocking();
        assert!(!device.busy.load(Ordering::Relaxed), "it was waited for");
        let all = chain.world.graph.drain_blocking();
        assert_eq!(*device.calls.lock(), ["begin"]);
        drop((section, all));
    });
    assert_eq!(*device.calls.lock(), ["begin", "end"]);
    chain.backend.set_device(None);
    chain.end();
}

/// Rule 5.6: who does not queue is not held back, and turning that off lets those go on that wait.
#[test]
fn rule_5_6_queueing_is_off_for_some_users() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let section = world.home.with(|| backend.drain_blocking());
    let ended = start(&world, &backend, read);
    settle(&world);
    assert!(ended.borrow().is_none());
    backend.set_request_queueing(false);
    settle(&world);
    assert!(matches!(*ended.borrow(), Some(Ok(()))));
    world.run(|co| read(co, &backend)).unwrap();
    drop(section);
    end(world, backend);
}

/// Rule 5.6: an operation made of several requests: the device's own section waits for its end, a
/// node's section holds its next request back.
#[test]
fn rule_5_6_operations_of_several_requests() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let step = Rc::new(Cell::new(0));
    let go_on = Arc::new(AtomicBool::new(false));
    world.home.spawn("operation", {
        let (backend, step, go_on) = (backend.clone(), step.clone(), go_on.clone());
        move |co| {
            let operation = backend.operation();
            read(co, &backend).unwrap();
            step.set(1);
            while !go_on.load(Ordering::Relaxed) {
                coblock_aio::co::reschedule(co);
            }
            read(co, &backend).unwrap();
            step.set(2);
            drop(operation);
        }
    });
    assert_eq!(step.get(), 1);
    let late = world
        .home
        .with(|| backend.drain_blocking_within(Duration::ZERO));
    assert!(late.unwrap_err().busy[0].otherwise);
    let section = world.home.with(|| backend.node().drain_blocking());
    go_on.store(true, Ordering::Relaxed);
    settle(&world);
    assert_eq!(
        (step.get(), backend.queued()),
        (1, 1),
        "held back in the middle"
    );
    drop(section);
    settle(&world);
    assert_eq!(step.get(), 2);
    drop(world.home.with(|| backend.drain_blocking()));
    end(world, backend);
}

/// Rule 5.7: a request with a callback is waited for until the callback returned.
#[test]
fn rule_5_7_a_section_waits_for_callbacks() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let called = Arc::new(AtomicBool::new(false));
    world.home.with(|| {
        let told = called.clone();
        backend
            .aio_pread(0, vec![0; 512], move |result, _| {
                result.unwrap();
                told.store(true, Ordering::Relaxed);
            })
            .unwrap();
        let _section = backend.drain_blocking();
        assert!(called.load(Ordering::Relaxed));
    });
    end(world, backend);
}

/// Rules 5.5, 5.7: requests with callbacks and copies between backends are held back, too.
#[test]
fn rule_5_5_callbacks_and_copies_are_held_back() {
    let (from_disk, to_disk) = (SimDisk::with_contents(&[7; 4096]), SimDisk::new(4096));
    let (world, from) = sim_world(&from_disk, &[]);
    let to = Arc::new(world.open(sim(&to_disk)).unwrap());
    let done = Arc::new(AtomicU32::new(0));
    for drained in [&from, &to] {
        let section = world.home.with(|| drained.drain_blocking());
        let ended = start(&world, &from, {
            let to = to.clone();
            move |co, from| from.copy_range(co, 0, &to, 0, 4096)
        });
        world.home.with(|| {
            let done = done.clone();
            let told = move |result: coblock_block::Result<()>| {
                result.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            };
            from.aio_copy_range(0, &to, 0, 4096, told).unwrap();
        });
        settle(&world);
        assert!(ended.borrow().is_none());
        assert_eq!((from.in_flight(), to.in_flight()), (0, 0));
        drop(section);
        settle(&world);
        assert!(matches!(*ended.borrow(), Some(Ok(()))));
    }
    assert_eq!(done.load(Ordering::Relaxed), 2);
    assert_eq!(to_disk.contents(), [7; 4096]);
    world.run(|co| to.close(co)).unwrap();
    drop(to);
    end(world, from);
}

/// Rule 5.9: a device with a thread of its own stops it, keeps where it was in its queue, and goes
/// on from there with the guest's next notification.
#[test]
fn rule_5_9_threads_of_devices_stop() {
    struct Queue {
        /// Position in the guest's queue, kept over sections.
        position: AtomicU32,
        running: ThreadLock<Option<std::thread::JoinHandle<()>>>,
        stop: AtomicBool,
    }
    impl Device for Queue {
        fn drain_threads(&self) {
            self.stop.store(true, Ordering::Relaxed);
            let thread = self.running.lock().take();
            if let Some(thread) = thread {
                thread.join().unwrap();
            }
        }
    }
    fn notify(device: &Arc<Queue>, backend: &Arc<BlockBackend>) {
        device.stop.store(false, Ordering::Relaxed);
        let (queue, backend) = (device.clone(), backend.clone());
        let thread = std::thread::spawn(move || {
            let home = Home::new(ContextOptions {
                engine: EngineKind::None,
                ..ContextOptions::named("vring")
            })
            .unwrap();
            while !queue.stop.load(Ordering::Relaxed) {
                home.run(|co| read(co, &backend)).unwrap();
                queue.position.fetch_add(1, Ordering::Relaxed);
            }
            home.close();
        });
        *device.running.lock() = Some(thread);
    }
    let world = World::with_engine(EngineKind::None);
    let options = Options::new().with("driver", "null-co");
    let backend = Arc::new(world.open(options).unwrap());
    // Its requests are not held back: only stopping the thread stops them.
    backend.set_request_queueing(false);
    let device = Arc::new(Queue {
        position: AtomicU32::new(0),
        running: ThreadLock::new(None),
        stop: AtomicBool::new(true),
    });
    backend.set_device(Some(device.clone()));
    let mut before = 0;
    for _ in 0..3 {
        notify(&device, &backend);
        while device.position.load(Ordering::Relaxed) < before + 10 {
            std::thread::yield_now();
        }
        let section = world.home.with(|| world.graph.drain_blocking());
        assert!(device.running.lock().is_none());
        assert_eq!(backend.in_flight(), 0);
        before = device.position.load(Ordering::Relaxed);
        drop(section);
    }
    backend.set_device(None);
    end(world, backend);
}

/// Rule 5.10: what has started ends, also where it waits for another: completions are never held
/// back.
#[test]
fn rule_5_10_requests_that_wait_for_each_other_end() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let hold = disk.hold(Match::writes());
    let write = |byte: u8| {
        start(&world, &backend, move |co, backend| {
            backend.pwrite(co, 0, &[byte; 512][..], RequestFlags::SERIALISING)
        })
    };
    let ended = [write(1), write(2), write(3)];
    settle(&world);
    assert_eq!((hold.waiting(), backend.in_flight()), (1, 3));
    let drained = Rc::new(Cell::new(false));
    world.home.spawn("drainer", {
        let (node, drained) = (backend.node().clone(), drained.clone());
        move |co| {
            drop(node.drain(co));
            drained.set(true);
        }
    });
    for _ in 0..3 {
        assert!(!drained.get());
        hold.release_all();
        settle(&world);
    }
    assert!(drained.get());
    for result in ended {
        assert!(matches!(*result.borrow(), Some(Ok(()))));
    }
    drop(hold);
    end(world, backend);
}

/// Rule 5.11: a graph guard held over a section would keep out what the section is for.
#[test]
#[should_panic(expected = "rule 5.11")]
fn rule_5_11_no_section_with_a_graph_guard() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    world.run(|co| {
        let _guard = world.graph.read(co);
        drop(backend.node().drain(co));
    });
}

/// Rule 5.1: a coroutine of another context has the main one begin its section, and counts as in
/// flight until then.
#[test]
fn rule_5_1_from_another_context() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let other = Home::new(ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named("other")
    })
    .unwrap();
    let inside = Rc::new(Cell::new(false));
    let leave = Rc::new(Cell::new(false));
    other.spawn("drainer", {
        let (node, inside, leave) = (backend.node().clone(), inside.clone(), leave.clone());
        move |co| {
            let section = node.drain(co);
            inside.set(true);
            while !leave.get() {
                coblock_aio::co::reschedule(co);
            }
            drop(section);
        }
    });
    other.poll(false);
    assert_eq!(
        backend.node().drained_sections(),
        0,
        "the main context begins"
    );
    assert!(!inside.get());
    world.home.with(|| {
        // Polls, so that section begins before this one is complete.
        let section = backend.node().drain_blocking();
        assert_eq!(backend.node().drained_sections(), 2);
        drop(section);
    });
    other.poll(false);
    assert!(inside.get());
    leave.set(true);
    other.poll(false);
    assert_eq!(backend.node().drained_sections(), 0);
    other.close();
    end(world, backend);
}

/// A section with a limit tells who is busy, and leaves nothing behind.
#[test]
fn a_section_that_takes_too_long_tells_who_is_busy() {
    let chain = chain();
    let hold = chain.sim.hold(Match::writes());
    let ended = start(&chain.world, &chain.backend, |co, backend| {
        backend.pwrite(co, 4096, &[1; 512][..], PLAIN)
    });
    let limit = Duration::from_secs(3);
    let before = chain.world.home.context().now_ns();
    let outside = chain
        .world
        .home
        .with(|| chain.disk.drain_blocking_within(limit))
        .unwrap_err();
    assert_eq!(
        chain.world.home.context().now_ns() - before,
        3_000_000_000,
        "exactly then"
    );
    let inside = chain
        .world
        .run(|co| chain.disk.drain_within(co, limit))
        .unwrap_err();
    assert_eq!(outside, inside);
    let busy: Vec<_> = outside.busy.iter().map(|busy| busy.who.as_str()).collect();
    assert_eq!(
        busy,
        [
            "node 'disk'",
            "node 'mid'",
            "node 'top'",
            "a backend of node 'top'"
        ]
    );
    for busy in &outside.busy {
        let request = busy.requests[0];
        assert_eq!(
            (request.kind, request.range),
            (RequestKind::Write, Some((4096, 512)))
        );
    }
    assert!(
        outside
            .to_string()
            .contains("node 'disk' (Write of 512 bytes at 4096)")
    );
    assert_eq!(chain.sections(), [0; 3], "nothing is drained");
    drop(hold);
    settle(&chain.world);
    assert!(matches!(*ended.borrow(), Some(Ok(()))));
    chain.end();
}

/// A backend that is closed in a section lets those go that wait, with an error.
#[test]
fn closing_in_a_section_ends_who_waits() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let section = world.home.with(|| backend.drain_blocking());
    let ended = start(&world, &backend, read);
    settle(&world);
    assert!(ended.borrow().is_none());
    world.run(|co| backend.close(co)).unwrap();
    let error = ended.borrow_mut().take().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    drop(section);
    drop(backend);
    world.end();
}
