//! Drained sections (rules 5.1 to 5.5, 5.10 and 5.11), one context or several stepped by hand: whom they
//! reach, when they begin, how they nest.

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{BlockBackend, Device, Drain, Node, Options, RequestFlags, RequestKind};
use coblock_coroutine::ThreadLock;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::counted::{Calls, OpenCounted};
use support::{PLAIN, World, end, read_sector, settle, sim, sim_world, start};

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

/// Rule 5.1: a section reaches all parents, not the children, and begins when what was in flight
/// has ended.
#[test]
fn rule_5_1_a_section_reaches_upward_and_waits_once() {
    let chain = chain();
    let hold = Rc::new(RefCell::new(Some(chain.sim.hold(Match::reads()))));
    let ended = start(&chain.world, &chain.backend, read_sector);
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
        let ended = start(&chain.world, &chain.backend, read_sector);
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
    chain.world.run(|co| read_sector(co, &inside)).unwrap();
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
        read_sector(co, &chain.backend).unwrap();
        let own = chain.disk.drain(co);
        read_sector(co, &chain.backend).unwrap();
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
