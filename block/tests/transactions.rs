//! The graph changes, step by step (rules 5.4, 7.9 and 8.2): what each step does, what it refuses, and
//! what is undone.

mod support;

use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{
    Action, BlockBackend, Device, Drain, ErrorKind, GraphWrite, Node, Options, Perm, Permissions,
    Result, Transaction, close_unused,
};
use coblock_coroutine::{Co, ThreadLock};
use std::sync::Arc;
use std::time::Duration;
use support::change::*;
use support::{PLAIN, end, panics, settle, sim, start};

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

/// Rule 8.2: a transaction is run once. What had failed was gone, and a second run of nothing went well.
#[test]
fn rule_8_2_a_transaction_is_run_once() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let (top, _) = filter(&world, "filter", "disk");
    let notes = Arc::new(ThreadLock::new(Vec::new()));
    for fails in [true, false] {
        let mut transaction = Transaction::new(&world.graph);
        let action = Box::new(Noted {
            name: "a",
            fails,
            notes: notes.clone(),
        });
        transaction.insert(&top).action(&[], action);
        let first = world.run(|co| transaction.run(co));
        assert_eq!(first.is_err(), fails);
        let again = world.run(|co| transaction.run(co)).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Invalid);
        assert!(again.to_string().contains("run again"), "{again}");
    }
    assert!(Arc::ptr_eq(&backend.node(), &top));
    drop(top);
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
        let (parent, calls) = filter(&world, "parent", "old");
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

/// Rule 8.2: a backend gets a longer node, and its device is told.
#[test]
fn rule_8_2_a_device_is_told_the_new_length() {
    let world = world();
    let (_, backend) = disk(&world, "disk");
    let sizes = Arc::new(Sizes::default());
    backend.set_device(Some(sizes.clone()));
    let long = open_node(&world, sim(&SimDisk::new(128 << 10))).unwrap();
    run(&world, |t| t.set_node(&backend, &long)).unwrap();
    assert_eq!((backend.len(), sizes.get()), (128 << 10, vec![128 << 10]));
    assert_eq!(
        world.graph.live_nodes(),
        1,
        "nobody used the old one any more"
    );
    drop(long);
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
    let message = panics(begin);
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
