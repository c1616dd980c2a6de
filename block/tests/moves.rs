//! Nodes move to another home context (rule 8.3), and what that has to do with contexts (rule 3.10):
//! several contexts, stepped by hand.

mod support;

use coblock_aio::{AioContext, ContextOptions, Home};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock_block::{
    Action, BlockBackend, Device, Drain, Error, ErrorKind, GraphWrite, Options, Result, Transaction,
};
use coblock_coroutine::{Co, ThreadLock};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::change::filter_options;
use support::contexts::Contexts;
use support::counted::Calls;
use support::{PLAIN, sim};

fn named(name: &str) -> Options {
    sim(&SimDisk::new(64 << 10)).with("node-name", name)
}

fn homes(want: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(node, home): &(&str, &str)| ((*node).to_owned(), (*home).to_owned());
    want.iter().map(owned).collect()
}

/// Two disks on one base, and one beside them.
struct Shared {
    contexts: Contexts,
    a: Arc<BlockBackend>,
    b: Arc<BlockBackend>,
    beside: Arc<BlockBackend>,
    calls: [Arc<Calls>; 2],
}

fn shared() -> Shared {
    let contexts = Contexts::new(1, &["main", "io", "other"]);
    let base = contexts.open(named("base")).unwrap();
    let calls = [Arc::new(Calls::default()), Arc::new(Calls::default())];
    let a = contexts
        .open(filter_options("a", "base", &calls[0]))
        .unwrap();
    let b = contexts
        .open(filter_options("b", "base", &calls[1]))
        .unwrap();
    let beside = contexts.open(named("beside")).unwrap();
    contexts.run(0, |co| base.close(co)).unwrap();
    Shared {
        contexts,
        a,
        b,
        beside,
        calls,
    }
}

/// Rule 8.3: all that is connected moves, siblings under a common node too, each node once; what is
/// not connected stays. A user that does not allow it is named, and nothing has changed: not even a
/// section began.
#[test]
fn rule_8_3_a_whole_component_moves() {
    let Shared {
        contexts,
        a,
        b,
        beside,
        calls,
    } = shared();
    let before = contexts.dump();
    let io = contexts.context(1).clone();
    let refused = contexts.run(0, |co| a.move_to(co, &io)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    let words = "Node 'b' cannot move to context 'io': an unnamed block device does not allow it";
    assert!(refused.to_string().contains(words), "{refused}");
    assert_eq!(contexts.dump(), before);
    assert_eq!((calls[0].get(), calls[1].get()), ((0, 0), (0, 0)));

    b.allow_moves(true);
    contexts.run(0, |co| a.move_to(co, &io)).unwrap();
    let there = [("a", "io"), ("b", "io"), ("base", "io"), ("beside", "main")];
    assert_eq!(contexts.homes_of_nodes(), homes(&there));
    assert!(contexts.dump().contains(r#""home":"io""#));
    assert_eq!(a.home_context().id(), io.id());
    // Requests come from any context, as before.
    for n in 0..3 {
        let byte = u8::try_from(n).unwrap();
        contexts.run(n, |co| {
            b.pwrite(co, 0, &[byte; 512][..], PLAIN).unwrap();
            let mut data = [9; 512];
            a.pread(co, 0, &mut data[..]).unwrap();
            assert_eq!(data, [byte; 512]);
        });
    }
    a.allow_moves(true);
    let (node, main) = (b.node(), contexts.context(0).clone());
    let graph = contexts.graph.clone();
    contexts
        .run(2, |co| {
            Transaction::new(&graph).move_to(&node, &main).run(co)
        })
        .unwrap();
    drop(node);
    assert_eq!(contexts.dump(), before, "moved back, as it was");
    contexts.end(vec![a, b, beside]);
}

/// Rule 8.3: where two ways lead to one node, each node moves once. (The filter asserts that it is not
/// attached twice.)
#[test]
fn rule_8_3_a_diamond_moves_once() {
    let contexts = Contexts::new(6, &["main", "io"]);
    let calls: [Arc<Calls>; 3] = Default::default();
    let reads = |options: Options| contexts.open_node(options.with("read-only", "on")).unwrap();
    let base = reads(named("base"));
    let left = reads(filter_options("left", "base", &calls[0]));
    let right = reads(filter_options("right", "base", &calls[1]));
    let top = reads(filter_options("top", "left", &calls[2]).with("beside", "right"));
    let backend = Arc::new(BlockBackend::new(&contexts.graph, top));
    drop((base, left, right));
    for (home, name) in [(1, "io"), (0, "main")] {
        let to = contexts.context(home).clone();
        contexts.run(0, |co| backend.move_to(co, &to)).unwrap();
        let moved = contexts.homes_of_nodes();
        assert!(moved.iter().all(|(_, home)| home == name), "{moved:?}");
        for calls in &calls {
            assert_eq!(calls.notes().matches("attach").count(), 1);
        }
    }
    contexts.end(vec![backend]);
}

/// Rule 8.3: sections begin in the old home and end in the new one; handlers leave the one and come to
/// the other, each in its own home. Also from the new home, and inside of sections of others.
#[test]
fn rule_8_3_begin_in_the_old_end_in_the_new() {
    let contexts = Contexts::new(2, &["main", "io", "other"]);
    let calls = Arc::new(Calls::default());
    let options = Options::new()
        .with("driver", "counted")
        .with_object("calls", calls.clone())
        .with("file.driver", "sim")
        .with_object("file.disk", SimDisk::new(4096));
    let backend = contexts.open(options).unwrap();
    let move_from = |n: usize, to: usize| {
        let to = contexts.context(to).clone();
        contexts.run(n, |co| backend.move_to(co, &to)).unwrap();
        calls.notes()
    };
    assert_eq!(
        move_from(0, 1),
        "begin main, detach main, attach io, end io"
    );
    assert_eq!(move_from(1, 1), "", "it is there");
    assert_eq!(
        move_from(1, 2),
        "begin io, detach io, attach other, end other"
    );
    // Inside a section: nothing begins or ends.
    let section = contexts.run(0, |co| backend.drain(co));
    assert_eq!(calls.notes(), "begin other");
    assert_eq!(move_from(0, 1), "detach other, attach io");
    assert_eq!(move_from(2, 0), "detach io, attach main");
    assert!(backend.is_quiesced());
    drop(section);
    assert_eq!(calls.notes(), "end main");
    contexts.end(vec![backend]);
}

/// Where a device was told to be, and whether it lets its node go.
#[derive(Default)]
struct Told {
    stays: AtomicBool,
    moved: ThreadLock<Vec<String>>,
    resized_in: ThreadLock<Vec<(u64, String)>>,
}

impl Device for Told {
    fn may_move(&self, _to: &Arc<AioContext>) -> bool {
        !self.stays.load(Ordering::Relaxed)
    }

    fn moved(&self, to: &Arc<AioContext>) {
        self.moved.lock().push(to.name().to_owned());
    }

    fn resized(&self, len: u64) {
        let context = coblock_aio::current().expect("in the home of the node");
        self.resized_in
            .lock()
            .push((len, context.name().to_owned()));
    }
}

/// Rule 8.3: drivers, devices and limits may refuse, each with an error that says who; then nothing
/// has changed. A device is told where its node lives.
#[test]
fn rule_8_3_whoever_refuses_is_named() {
    let Shared {
        contexts,
        a,
        b,
        beside,
        calls,
    } = shared();
    b.allow_moves(true);
    let device = Arc::new(Told::default());
    b.set_device(Some(device.clone()));
    let io = contexts.context(1).clone();
    let before = contexts.dump();
    let refused = |kind, words: &str, to: &Arc<AioContext>| {
        let error = contexts.run(0, |co| a.move_to(co, to)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(contexts.dump(), before);
        assert_eq!(calls[0].get(), (0, 0), "no section began");
    };
    device.stays.store(true, Ordering::Relaxed);
    let words = "the device of an unnamed block device does not allow it";
    refused(ErrorKind::Conflict, words, &io);
    device.stays.store(false, Ordering::Relaxed);
    calls[1].stays.store(true, Ordering::Relaxed);
    refused(ErrorKind::NotSupported, "told to stay", &io);
    calls[1].stays.store(false, Ordering::Relaxed);
    let home = Home::new(ContextOptions::named("gone")).unwrap();
    let gone = home.context().clone();
    home.close();
    let error = contexts.run(0, |co| a.move_to(co, &gone)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    assert_eq!(contexts.dump(), before);
    assert!(device.moved.lock().is_empty());
    contexts.run(0, |co| a.move_to(co, &io)).unwrap();
    assert_eq!(*device.moved.lock(), ["io"]);
    contexts.end(vec![a, b, beside]);
}

/// Rule 8.3: who comes while the nodes are drained for a move is asked too; if it does not allow it,
/// nothing has changed.
#[test]
fn rule_8_3_whoever_comes_meanwhile_is_asked() {
    for allows in [false, true] {
        let contexts = Contexts::new(7, &["main", "io"]);
        let disk = SimDisk::new(4096);
        let backend = contexts.open(sim(&disk).with("node-name", "disk")).unwrap();
        let hold = disk.hold(Match::reads());
        let reader = backend.clone();
        contexts.homes[0].spawn("reader", move |co| {
            reader.pread(co, 0, &mut [0; 512][..]).unwrap();
        });
        let moved = Rc::new(RefCell::new(None));
        contexts.homes[0].spawn("mover", {
            let (backend, moved) = (backend.clone(), moved.clone());
            let io = contexts.context(1).clone();
            move |co| *moved.borrow_mut() = Some(backend.move_to(co, &io))
        });
        contexts.world.run_until(|| backend.node().is_drained());
        let late = Arc::new(BlockBackend::new(&contexts.graph, backend.node()));
        late.allow_moves(allows);
        assert!(moved.borrow().is_none(), "it waits for the read");
        drop(hold);
        contexts.world.run_until(|| moved.borrow().is_some());
        let moved = moved.take().unwrap().map_err(|error| error.kind());
        let (want, home) = match allows {
            true => (Ok(()), "io"),
            false => (Err(ErrorKind::Conflict), "main"),
        };
        assert_eq!(moved, want);
        assert_eq!(contexts.homes_of_nodes(), homes(&[("disk", home)]));
        contexts.end(vec![backend, late]);
    }
}

/// Rules 8.1, 8.3: limits go by one clock, so a node with limits does not move to a context with
/// another one. Its timers are where its requests are: none stays in the old home.
#[test]
fn rule_8_3_limits_move_along() {
    let contexts = Contexts::new(3, &["main", "io"]);
    let config = ThrottleConfig {
        iops_total: coblock_block::throttle::Limit::average(10),
        ..ThrottleConfig::default()
    };
    let group = ThrottleGroup::new("limits", contexts.context(0).clock(), config).unwrap();
    contexts.graph.add_throttle_group(&group).unwrap();
    let options = Options::new()
        .with("driver", "throttle")
        .with("node-name", "limited")
        .with("throttle-group", "limits")
        .with("file.driver", "sim")
        .with_object("file.disk", SimDisk::new(4096));
    let backend = contexts.open(options).unwrap();
    let real = Home::new(ContextOptions::named("real")).unwrap();
    let error = contexts
        .run(0, |co| backend.move_to(co, real.context()))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("another clock"), "{error}");
    let ended = Arc::new(AtomicUsize::new(0));
    for _ in 0..4 {
        let (backend, ended) = (backend.clone(), ended.clone());
        contexts.homes[1].spawn("limited", move |co| {
            backend.pread(co, 0, &mut [0; 512][..]).unwrap();
            ended.fetch_add(1, Ordering::Relaxed);
        });
    }
    assert!(group.waiting() > 0, "there is a timer in 'io'");
    let io = contexts.context(1).clone();
    contexts.run(0, |co| backend.move_to(co, &io)).unwrap();
    assert_eq!((ended.load(Ordering::Relaxed), group.waiting()), (4, 0));
    let main = contexts.context(0).clone();
    contexts.run(0, |co| backend.move_to(co, &main)).unwrap();
    real.close();
    // The end of the contexts refuses timers that are left.
    contexts.end(vec![backend]);
}

struct Fails;

impl Action for Fails {
    fn prepare(&mut self, _co: &Co) -> Result<()> {
        Err(Error::new(ErrorKind::Invalid, "told to fail"))
    }

    fn commit(&mut self, _graph: &mut GraphWrite<'_>) {}
}

/// Rules 8.2, 8.3: a move is part of a transaction. Where that fails at the very end, drivers are back
/// in the old home; edges never join two homes.
#[test]
fn rule_8_3_a_move_is_part_of_a_transaction() {
    let Shared {
        contexts,
        a,
        b,
        beside,
        calls,
    } = shared();
    b.allow_moves(true);
    a.allow_moves(true);
    let (io, graph) = (contexts.context(1).clone(), contexts.graph.clone());
    let before = contexts.dump();
    let (node, other) = (a.node(), beside.node());
    let edge = contexts.homes[0].with(|| graph.read_in_main(|main| node.children(main)[0].clone()));

    // A cycle is found when the graph is locked.
    let mut cycle = Transaction::new(&graph);
    cycle.move_to(&node, &io).set_child(&edge, &node);
    let error = contexts.run(0, |co| cycle.run(co)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Chain, "{error}");
    assert_eq!(
        calls[0].notes(),
        "begin main, detach main, attach main, end main"
    );
    assert_eq!(contexts.dump(), before);

    let mut fails = Transaction::new(&graph);
    fails.move_to(&node, &io).action(&[], Box::new(Fails));
    assert!(contexts.run(0, |co| fails.run(co)).is_err());
    assert_eq!(calls[0].notes(), "begin main, end main");

    let mut twice = Transaction::new(&graph);
    twice
        .move_to(&node, &io)
        .move_to(&b.node(), contexts.context(2));
    let error = contexts.run(0, |co| twice.run(co)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");

    // One of two edges would join two homes.
    let mut apart = Transaction::new(&graph);
    apart.move_to(&node, &io).set_child(&edge, &other);
    let error = contexts.run(0, |co| apart.run(co)).unwrap_err();
    let words =
        "Node 'a' lives in context 'io' and node 'beside' in 'main': one of them moves first";
    assert_eq!(
        (error.kind(), error.to_string()),
        (ErrorKind::Conflict, words.to_owned())
    );
    assert_eq!(contexts.dump(), before);

    // A backend goes where its new node lives, if it may.
    beside.allow_moves(false);
    contexts.run(0, |co| beside.move_to(co, &io)).unwrap();
    let goes = |backend: &BlockBackend| {
        let mut transaction = Transaction::new(&graph);
        transaction.set_node(backend, &node);
        contexts.run(0, |co| transaction.run(co))
    };
    assert_eq!(goes(&beside).unwrap_err().kind(), ErrorKind::Conflict);
    beside.allow_moves(true);
    goes(&beside).unwrap();
    assert_eq!(beside.home_context().name(), "main");
    drop((cycle, fails, twice, apart));
    drop((node, other, edge));
    contexts.end(vec![a, b, beside]);
}

/// Rule 8.3: what is opened on a node that moved goes where that lives; on nodes of two homes it is
/// not opened, and nothing stays open.
#[test]
fn rule_8_3_new_nodes_go_where_theirs_live() {
    let contexts = Contexts::new(4, &["main", "io"]);
    let disk = contexts.open(named("disk")).unwrap();
    let stays = contexts.open(named("stays")).unwrap();
    let io = contexts.context(1).clone();
    contexts.run(0, |co| disk.move_to(co, &io)).unwrap();
    let calls = Arc::new(Calls::default());
    let above = contexts
        .open_node(filter_options("above", "disk", &calls))
        .unwrap();
    assert_eq!(above.home_context().name(), "io");
    assert_eq!(calls.notes(), "begin main, detach main, attach io, end io");
    contexts.close_node(above);
    let both = filter_options("both", "disk", &calls).with("beside", "stays");
    let error = contexts.open_node(both).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(
        error.to_string().contains("one of them moves first"),
        "{error}"
    );
    assert_eq!(
        contexts.homes_of_nodes(),
        homes(&[("disk", "io"), ("stays", "main")])
    );
    contexts.run(0, |co| disk.close(co)).unwrap();
    // A closed node lives nowhere: its context may end.
    contexts.end(vec![disk, stays]);
}

/// Rules 8.2, 8.3, 3.10: a node is resized in its home, where its device is told; who asked goes on in
/// its own context, after an error too.
#[test]
fn rule_8_2_a_resize_is_in_the_nodes_context() {
    let contexts = Contexts::new(5, &["main", "io", "other"]);
    let backend = contexts.open(named("disk")).unwrap();
    let device = Arc::new(Told::default());
    backend.set_device(Some(device.clone()));
    let contexts_of = [(1, "io"), (2, "other"), (0, "main")];
    for (len, (home, name)) in (2..).zip(contexts_of) {
        let to = contexts.context(home).clone();
        contexts.run(0, |co| backend.move_to(co, &to)).unwrap();
        for from in 0..3 {
            let len = (len * 10 + from as u64) << 12;
            contexts.run(from, |co| {
                backend.resize(co, len).unwrap();
                assert!(contexts.context(from).is_current(), "back again");
                let error = backend.resize(co, 1 << 63).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Invalid);
                assert!(contexts.context(from).is_current(), "also with an error");
            });
            assert_eq!(
                device.resized_in.lock().last(),
                Some(&(len, name.to_owned()))
            );
        }
    }
    assert_eq!(contexts.graph.readers(), 0);
    contexts.end(vec![backend]);
}
