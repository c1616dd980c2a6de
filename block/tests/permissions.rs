//! Permissions on a graph that changes, and nodes that get other options.

mod support;

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    BlockBackend, Child, ChildRole, DenyAll, Driver, ErrorKind, Node, OpenDriver, Opening, Options,
    Perm, Permissions, Reopen, Result, close_unused, open_unused,
};
use coblock_coroutine::Co;
use std::sync::Arc;
use support::change::*;
use support::{PLAIN, World, end, sim};

/// A driver with two children, `file` and `target`.
struct OpenPair;

struct Pair(Arc<Child>);

impl OpenDriver for OpenPair {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        opening.open_child(co, "target", ChildRole::Filtered)?;
        Ok(Box::new(Pair(file)))
    }
}

impl Driver for Pair {
    fn format(&self) -> &'static str {
        "pair"
    }

    support::requests::passes_requests_on!(0);

    fn len(&self) -> u64 {
        64 << 10
    }
}

/// A node that comes above another one does not get between that one and what it stands on itself:
/// no loop arises.
#[test]
fn what_stands_below_a_new_node_keeps_its_edges() {
    let mut world = world();
    world.registry.register("pair", Box::new(OpenPair));
    let (_, backend) = disk(&world, "disk");
    let (target, _) = filter(&world, "target", "disk");
    let options = Options::new()
        .with("driver", "pair")
        .with("node-name", "pair")
        .with("file", "disk")
        .with("target", "target");
    let pair = open_node(&world, options).unwrap();
    run(&world, |t| t.insert(&pair)).unwrap();
    assert!(Arc::ptr_eq(&backend.node(), &pair));
    let below = world.home.with(|| {
        world
            .graph
            .read_in_main(|main| target.children(main)[0].node(main).name().to_owned())
    });
    assert_eq!(below, "disk");
    drop((target, pair));
    end(world, backend);
}

fn exclusive() -> Permissions {
    Permissions {
        held: Perm::CONSISTENT_READ | Perm::WRITE,
        shared: Perm::all() - Perm::WRITE,
    }
}

fn unused(world: &World, name: &str, file: &str) -> Arc<Node> {
    let options = Options::new()
        .with("driver", "counted")
        .with("node-name", name)
        .with("file", file);
    world
        .run(|co| open_unused(co, &world.graph, &world.registry, &DenyAll, options))
        .unwrap()
}

/// Permissions are computed on the graph as it will be: two users swap which one of two paths to a
/// common node holds exclusive write, in both directions.
#[test]
fn exclusive_write_changes_sides() {
    let world = world();
    let base = open_node(
        &world,
        sim(&SimDisk::new(64 << 10)).with("node-name", "base"),
    )
    .unwrap();
    let (left, right) = (
        unused(&world, "left", "base"),
        unused(&world, "right", "base"),
    );
    let writer = BlockBackend::with_permissions(&world.graph, left.clone(), exclusive()).unwrap();
    let reads = Permissions {
        held: Perm::CONSISTENT_READ,
        shared: Perm::all(),
    };
    let reader = BlockBackend::with_permissions(&world.graph, right.clone(), reads).unwrap();
    for (of_writer, of_reader) in [(&right, &left), (&left, &right)] {
        run(&world, |t| {
            t.set_node(&writer, of_writer).set_node(&reader, of_reader)
        })
        .unwrap();
        let holds = |node: &Arc<Node>| node.permissions().held.contains(Perm::WRITE);
        assert_eq!(
            (holds(of_writer), holds(of_reader), holds(&base)),
            (true, false, true)
        );
    }
    let both = reader.set_permissions(exclusive()).unwrap_err();
    assert_eq!(both.kind(), ErrorKind::Conflict);
    assert_eq!(left.permissions(), exclusive());
    drop((left, right, base));
    world.run(|co| writer.close(co)).unwrap();
    world.run(|co| reader.close(co)).unwrap();
    drop((writer, reader));
    world.end();
}

/// What is being removed does not count: a filter takes the place of another one over the same node,
/// although that one holds exclusive write there.
#[test]
fn a_filter_takes_the_place_of_another_one() {
    let world = world();
    let base = open_node(
        &world,
        sim(&SimDisk::new(64 << 10)).with("node-name", "base"),
    )
    .unwrap();
    let (old, new) = (unused(&world, "old", "base"), unused(&world, "new", "base"));
    let writer = BlockBackend::with_permissions(&world.graph, old.clone(), exclusive()).unwrap();
    run(&world, |t| t.replace(&old, &new)).unwrap();
    assert!(Arc::ptr_eq(&writer.node(), &new));
    assert_eq!((base.users(), base.permissions()), (1, exclusive()));
    drop((old, new, base));
    assert_eq!(world.graph.node_names(), ["base", "new"]);
    world.run(|co| writer.close(co)).unwrap();
    drop(writer);
    world.end();
}

/// Two edges that write to a node that neither shares for writing do not go together, when both are
/// new ones, too.
#[test]
fn new_permissions_are_checked_against_new_ones() {
    let world = world();
    let base = open_node(
        &world,
        sim(&SimDisk::new(64 << 10)).with("node-name", "base"),
    )
    .unwrap();
    let (other, _) = {
        let other = open_node(
            &world,
            sim(&SimDisk::new(64 << 10)).with("node-name", "other"),
        );
        (other.unwrap(), ())
    };
    let (left, right) = (
        unused(&world, "left", "base"),
        unused(&world, "right", "other"),
    );
    let one = BlockBackend::with_permissions(&world.graph, left.clone(), exclusive()).unwrap();
    let two = BlockBackend::with_permissions(&world.graph, right.clone(), exclusive()).unwrap();
    let before = dump(&world);
    let edge = world.home.with(|| {
        world
            .graph
            .read_in_main(|main| right.children(main)[0].clone())
    });
    let error = run(&world, |t| t.set_child(&edge, &base)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(dump(&world), before);
    drop((edge, left, right, base, other));
    for backend in [one, two] {
        world.run(|co| backend.close(co)).unwrap();
    }
    world.end();
}

/// A node becomes read-only and writable again; lock bytes of its file say so to others, and a user
/// that writes stands in the way.
#[test]
fn rule_8_2_a_node_gets_other_options() {
    let world = World::with_engine(EngineKind::Threads);
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(1 << 20).unwrap();
    let name = path.path().to_str().unwrap();
    let options = Options::new()
        .with("driver", "raw")
        .with("file.driver", "file");
    let options = options
        .with("file.filename", name)
        .with("file.node-name", "file");
    let backend = Arc::new(world.open(options).unwrap());
    let (raw, file) = (backend.node(), world.graph.find_node("file").unwrap());
    let alone = || {
        Options::file(name)
            .with("read-only", "on")
            .with("share-rw", "off")
    };
    let reopen = |read_only: bool| {
        let to = Reopen {
            read_only: Some(read_only),
            ..Reopen::default()
        };
        run(&world, |t| t.reopen(&raw, to.clone()).reopen(&file, to))
    };
    let error = reopen(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(
        error
            .to_string()
            .contains("cannot support read-write users"),
        "{error}"
    );
    assert!(!raw.is_read_only() && !file.is_read_only());
    assert_eq!(
        open_node(&world, alone()).unwrap_err().kind(),
        ErrorKind::Locked
    );

    let reads = |held| Permissions {
        held,
        shared: Perm::all(),
    };
    backend
        .set_permissions(reads(Perm::CONSISTENT_READ))
        .unwrap();
    reopen(true).unwrap();
    let refused = world
        .run(|co| backend.pwrite(co, 0, &[1; 512][..], PLAIN))
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    let other = open_node(&world, alone()).unwrap();
    let first = reopen(false);
    let taken = backend.set_permissions(reads(Perm::CONSISTENT_READ | Perm::WRITE));
    assert!(first.is_ok() && taken.unwrap_err().kind() == ErrorKind::Locked);
    world
        .run(|co| close_unused(co, &world.graph, other))
        .unwrap();
    backend
        .set_permissions(reads(Perm::CONSISTENT_READ | Perm::WRITE))
        .unwrap();
    write(&world, &backend, 5);
    assert_eq!(read(&world, &backend), 5);
    drop((raw, file));
    end(world, backend);
}

/// A file that was opened for reading is opened anew to be written; a name that means another file
/// now is refused.
#[test]
fn rule_8_2_a_file_becomes_writable() {
    let world = World::with_engine(EngineKind::Threads);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 64 << 10]).unwrap();
    let name = path.to_str().unwrap().to_owned();
    let backend = Arc::new(
        world
            .open(Options::file(name).with("read-only", "on"))
            .unwrap(),
    );
    let node = backend.node();
    let to = Reopen {
        read_only: Some(false),
        ..Reopen::default()
    };
    std::fs::rename(&path, dir.path().join("away")).unwrap();
    std::fs::write(&path, b"another one").unwrap();
    let error = run(&world, |t| t.reopen(&node, to.clone())).unwrap_err();
    assert!(
        error.to_string().contains("Another file has this name now"),
        "{error}"
    );
    assert!(node.is_read_only());
    std::fs::rename(dir.path().join("away"), &path).unwrap();
    run(&world, |t| t.reopen(&node, to)).unwrap();
    backend.set_permissions(exclusive()).unwrap();
    write(&world, &backend, 9);
    assert_eq!(read(&world, &backend), 9);
    drop(node);
    end(world, backend);
}
