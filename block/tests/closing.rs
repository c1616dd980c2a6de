//! A node that is closed, or is being closed, takes no users (rule 5.7).

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{
    BlockBackend, Child, ChildRole, Driver, Error, ErrorKind, GraphRead, Node, OpenDriver, Opening,
    Options, Perm, Permissions, Result, Transaction, close_unused,
};
use coblock_coroutine::Co;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use support::change::{disk, filter, open_node, world};
use support::{World, end, settle, sim};

fn reads() -> Permissions {
    Permissions {
        held: Perm::CONSISTENT_READ,
        shared: Perm::all(),
    }
}

fn user(world: &World, node: &Arc<Node>) -> Result<BlockBackend> {
    BlockBackend::with_permissions(&world.graph, node.clone(), reads())
}

fn on_top(file: &str) -> Options {
    Options::new()
        .with("driver", "counted")
        .with("node-name", "late")
        .with("file", file)
}

/// Every way to become a user of `node` is refused, and leaves nothing.
fn refuses_users(world: &World, node: &Arc<Node>, other: &Arc<BlockBackend>) {
    let found = world.graph.find_node(node.name()).unwrap();
    assert!(Arc::ptr_eq(&found, node));
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(
        kind(user(world, node).map(drop)),
        ErrorKind::Closed,
        "a backend"
    );
    let opened = open_node(world, on_top(node.name()));
    assert_eq!(kind(opened.map(drop)), ErrorKind::Closed, "an edge");
    let mut transaction = Transaction::new(&world.graph);
    transaction.set_node(other, node);
    assert_eq!(
        kind(world.run(|co| transaction.run(co))),
        ErrorKind::Closed,
        "a transaction"
    );
    assert_eq!(node.users(), 0);
    assert!(world.graph.find_node("late").is_none());
}

/// While it is being closed, which may take long, and afterwards as long as somebody keeps it.
#[test]
fn a_node_that_is_being_closed_takes_no_users() {
    let world = world();
    let (_, other) = disk(&world, "other");
    let slow = SimDisk::new(64 << 10);
    let node = open_node(&world, sim(&slow).with("node-name", "slow")).unwrap();
    let first = user(&world, &node).unwrap();
    let writes = Permissions {
        held: Perm::WRITE,
        shared: Perm::all(),
    };
    first.set_permissions(writes).unwrap();
    world
        .run(|co| first.pwrite(co, 0, &[1; 512][..], support::PLAIN))
        .unwrap();
    let hold = slow.hold(Match::flushes());
    let closed = Rc::new(RefCell::new(None));
    world.home.spawn("close", {
        let closed = closed.clone();
        move |co| {
            let result = first.close(co);
            *closed.borrow_mut() = Some(result);
        }
    });
    settle(&world);
    assert_eq!(hold.waiting(), 1);
    assert!(closed.borrow().is_none());
    refuses_users(&world, &node, &other);
    drop(hold);
    settle(&world);
    assert!(matches!(closed.borrow_mut().take(), Some(Ok(()))));
    refuses_users(&world, &node, &other);
    // Once more is no harm.
    world
        .run(|co| close_unused(co, &world.graph, node.clone()))
        .unwrap();
    drop(node);
    end(world, other);
}

/// The test for users and the closing are one step: who closed was once past the test, waited for the
/// graph, and then closed the node under a user that had come meanwhile.
#[test]
fn no_user_comes_while_closing_waits_for_the_graph() {
    let world = world();
    let (_, other) = disk(&world, "other");
    let (node, _) = filter(&world, "unused", "other");
    let (waits, waiting) = mpsc::channel();
    let closer = world.home.with(|| {
        let write = world.graph.write();
        let closer = std::thread::spawn({
            let (graph, node) = (world.graph.clone(), node.clone());
            move || {
                let home = Home::new(ContextOptions {
                    engine: EngineKind::None,
                    ..ContextOptions::named("closer")
                })
                .unwrap();
                let result = Rc::new(RefCell::new(None));
                home.spawn("close", {
                    let result = result.clone();
                    move |co| *result.borrow_mut() = Some(close_unused(co, &graph, node))
                });
                // It stands where it waits for the writer.
                assert!(result.borrow().is_none());
                waits.send(()).unwrap();
                while result.borrow().is_none() {
                    home.poll(true);
                }
                home.close();
                result.take().unwrap()
            }
        });
        waiting.recv().unwrap();
        assert_eq!(user(&world, &node).unwrap_err().kind(), ErrorKind::Closed);
        drop(write);
        closer
    });
    closer.join().unwrap().unwrap();
    drop(node);
    end(world, other);
}

/// A file that is closed is not locked again: its node lives as long as somebody keeps it.
#[test]
fn a_closed_file_is_not_locked_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let options = || {
        Options::new()
            .with("driver", "file")
            .with("filename", path.to_str().unwrap())
    };
    let world = World::with_engine(EngineKind::Threads);
    let backend = world.open(options()).unwrap();
    let node = backend.node();
    world.close(backend).unwrap();
    let exclusive = Permissions {
        held: Perm::CONSISTENT_READ | Perm::WRITE,
        shared: Perm::empty(),
    };
    let again = BlockBackend::with_permissions(&world.graph, node.clone(), exclusive);
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Closed);
    let elsewhere = World::with_engine(EngineKind::Threads);
    let backend = elsewhere.open(options()).unwrap();
    elsewhere.close(backend).unwrap();
    elsewhere.end();
    drop(node);
    world.end();
}

/// An edge that is refused was no user: it once counted one down when it was dropped.
#[test]
fn an_edge_that_is_refused_counts_nobody_down() {
    let world = world();
    let base = SimDisk::new(64 << 10);
    let node = open_node(&world, sim(&base).with("node-name", "base")).unwrap();
    let exclusive = Permissions {
        held: Perm::CONSISTENT_READ,
        shared: Perm::empty(),
    };
    let backend = BlockBackend::with_permissions(&world.graph, node.clone(), exclusive).unwrap();
    let refused = open_node(&world, on_top("base")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    assert_eq!(node.users(), 1);
    drop(node);
    end(world, Arc::new(backend));
}

/// A filter that cannot write out what it holds.
struct OpenFull;

struct Full(Arc<Child>);

impl OpenDriver for OpenFull {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        Ok(Box::new(Full(file)))
    }
}

impl Driver for Full {
    fn format(&self) -> &'static str {
        "full"
    }

    support::requests::passes_requests_on!(0);

    fn len(&self) -> u64 {
        64 << 10
    }

    fn close(&self, _co: &Co, _graph: &GraphRead<'_>) -> Result<()> {
        Err(Error::new(ErrorKind::OutOfMemory, "no room"))
    }
}

/// A node that a transaction takes out and that cannot be closed is told beside the success: it was a
/// line of the log.
#[test]
fn a_transaction_tells_what_it_could_not_close() {
    for blocking in [false, true] {
        let mut world = world();
        world.registry.register("full", Box::new(OpenFull));
        let (_, backend) = disk(&world, "disk");
        let options = Options::new()
            .with("driver", "full")
            .with("node-name", "filter")
            .with("file", "disk");
        let top = open_node(&world, options).unwrap();
        let mut transaction = Transaction::new(&world.graph);
        world
            .run(|co| transaction.insert(&top).run(co))
            .expect("it is above the disk");
        assert!(transaction.not_closed().is_empty());
        let mut transaction = Transaction::new(&world.graph);
        transaction.remove(&top);
        match blocking {
            true => world.home.with(|| transaction.run_blocking()),
            false => world.run(|co| transaction.run(co)),
        }
        .expect("it is taken out");
        let told = transaction.not_closed();
        assert_eq!(told.len(), 1);
        let told = told[0].to_string();
        assert!(
            told.contains("'filter'") && told.contains("no room"),
            "{told}"
        );
        drop((transaction, top));
        end(world, backend);
    }
}
