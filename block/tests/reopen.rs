//! Nodes that get other options while they are open, all of them together or none.

mod support;

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    BlockBackend, ErrorKind, Options, Perm, Permissions, Reopen, Transaction, close_unused,
};
use std::io::Write as _;
use std::sync::Arc;
use support::change::*;
use support::counted::{Calls, OpenCounted};
use support::{World, end, sim};

fn reopen(world: &World, backend: &BlockBackend, changes: Options) -> coblock_block::Result<()> {
    let mut transaction = Transaction::new(&world.graph);
    transaction.reopen_options(&backend.node(), changes)?;
    world.run(|co| transaction.run(co))
}

fn reads() -> Permissions {
    Permissions {
        held: Perm::CONSISTENT_READ,
        shared: Perm::all(),
    }
}

fn writes() -> Permissions {
    Permissions {
        held: Perm::CONSISTENT_READ | Perm::WRITE,
        ..reads()
    }
}

/// `raw` on a file of 64 KiB, with the file's node named `file`.
fn on_file(path: &std::path::Path) -> Options {
    Options::format_on_file("raw", path.to_str().unwrap())
        .with("node-name", "raw")
        .with("file.node-name", "file")
}

fn image() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 64 << 10]).unwrap();
    (dir, path)
}

/// Rule 8.2: a file goes around the page cache and back while it is open, with what that asks of
/// requests; a child that was not told otherwise follows its parent.
#[test]
fn rule_8_2_a_file_goes_around_the_cache_and_back() {
    let world = World::with_engine(EngineKind::Threads);
    let (_dir, path) = image();
    let backend = Arc::new(world.open(on_file(&path)).unwrap());
    let file = world.graph.find_node("file").unwrap();
    write(&world, &backend, 1);
    assert_eq!(file.limits().request_alignment, 1);
    let direct = |to: &str| reopen(&world, &backend, Options::new().with("cache.direct", to));
    match direct("on") {
        Ok(()) => {
            assert!(file.is_direct() && backend.node().is_direct());
            assert!(file.limits().request_alignment > 1);
            assert_eq!(backend.node().whole_limits(), {
                let mut below = file.limits();
                below.max_transfer = backend.node().whole_limits().max_transfer;
                below
            });
        }
        Err(error) => {
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
            writeln!(
                std::io::stderr(),
                "SKIPPED: this file system has no O_DIRECT"
            )
            .expect("standard error");
            assert!(!file.is_direct() && !backend.node().is_direct());
        }
    }
    // An odd request: padded, where that is needed.
    world
        .run(|co| backend.pwrite(co, 8191, &[7; 3][..], support::PLAIN))
        .unwrap();
    direct("off").unwrap();
    assert!(!file.is_direct());
    assert_eq!(file.limits().request_alignment, 1);
    drop(file);
    end(world, backend);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 64 << 10);
    assert_eq!(bytes[8190..8195], [1, 7, 7, 7, 0]);
}

/// Rule 8.2: the file below a filter is locked by somebody else, so the filter gets no writer, and its
/// driver, which was asked before, is told.
#[test]
fn rule_8_2_a_refused_writer_is_given_up_by_all() {
    let mut world = World::with_engine(EngineKind::Threads);
    world.registry.register("counted", Box::new(OpenCounted));
    let (_dir, path) = image();
    let calls = Arc::new(Calls::default());
    let options = Options::new()
        .with("driver", "counted")
        .with_object("calls", calls.clone())
        .with("file.driver", "file")
        .with("file.filename", path.to_str().unwrap());
    let node = open_node(&world, options).unwrap();
    let backend = BlockBackend::with_permissions(&world.graph, node, reads()).unwrap();
    let alone = Options::file(path.to_str().unwrap()).with("share-rw", "off");
    let guard = open_node(&world, alone).unwrap();
    let error = backend.set_permissions(writes()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert_eq!(calls.prepared(), 0);
    world
        .run(|co| close_unused(co, &world.graph, guard))
        .unwrap();
    backend.set_permissions(writes()).unwrap();
    assert_eq!(calls.prepared(), 0);
    world.close(backend).unwrap();
    world.end();
}

/// Rule 8.2: somebody else has the file for himself alone, so it does not become writable; nothing
/// has changed, also not what came before in the same transaction.
#[test]
fn rule_8_2_nothing_is_reopened_when_somebody_holds_the_lock() {
    let world = World::with_engine(EngineKind::Threads);
    let (_dir, path) = image();
    let backend = Arc::new(world.open(on_file(&path).with("read-only", "on")).unwrap());
    let disk = SimDisk::new(64 << 10);
    let other = Arc::new(world.open(sim(&disk).with("node-name", "sim")).unwrap());
    // Another writer does not share writing with anybody.
    let alone = Options::file(path.to_str().unwrap()).with("share-rw", "off");
    let guard = open_node(&world, alone).unwrap();
    let before = dump(&world);

    let off = Reopen {
        discard: Some(true),
        ..Reopen::default()
    };
    let writable = Reopen {
        read_only: Some(false),
        ..Reopen::default()
    };
    // The node itself may become writable: nobody writes yet.
    let (raw, file) = (backend.node(), world.graph.find_node("file").unwrap());
    let sim_node = other.node();
    run(&world, |t| {
        t.reopen(&raw, writable.clone())
            .reopen(&file, writable.clone())
    })
    .unwrap();
    let taken = backend.set_permissions(writes()).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Locked, "{taken}");
    let back = Reopen {
        read_only: Some(true),
        ..Reopen::default()
    };
    run(&world, |t| t.reopen(&raw, back.clone()).reopen(&file, back)).unwrap();
    assert_eq!(dump(&world), before);

    // The file is another one now: the last step of three fails, and the first two did not happen.
    std::fs::rename(&path, path.with_extension("away")).unwrap();
    std::fs::write(&path, b"another one").unwrap();
    let direct = Reopen {
        direct: Some(true),
        ..Reopen::default()
    };
    let error = run(&world, |t| {
        t.reopen(&sim_node, off)
            .reopen(&raw, writable)
            .reopen(&file, direct)
    })
    .unwrap_err();
    assert!(error.to_string().contains("disk"), "{error}");
    assert!(!sim_node.passes_discards() && raw.is_read_only() && !file.is_direct());
    assert_eq!(dump(&world), before);
    drop((raw, file, sim_node));
    world
        .run(|co| close_unused(co, &world.graph, guard))
        .unwrap();
    world.run(|co| other.close(co)).unwrap();
    drop(other);
    end(world, backend);
}

/// Options that no open node can get are refused by name, and so are words that are none.
#[test]
fn options_that_stay_are_named() {
    let world = World::with_engine(EngineKind::Threads);
    let (_dir, path) = image();
    let backend = Arc::new(world.open(on_file(&path)).unwrap());
    for (key, value, want) in [
        ("driver", "qcow2", "Cannot change the option 'driver'"),
        ("node-name", "x", "Cannot change the option 'node-name'"),
        ("file.filename", "y", "Cannot change the option 'filename'"),
        ("file.locking", "off", "Cannot change the option 'locking'"),
        ("offset", "512", "Cannot change the option 'offset'"),
        (
            "force-share",
            "on",
            "Cannot change the option 'force-share'",
        ),
        ("file", "elsewhere", "Cannot change the option 'file'"),
        ("foo", "bar", "Cannot change the option 'foo'"),
        ("backing", "raw", "does not support backing files"),
        ("read-only", "maybe", "expects 'on' or 'off'"),
        ("discard", "often", "Invalid discard option"),
    ] {
        let error = reopen(&world, &backend, Options::new().with(key, value)).unwrap_err();
        assert!(error.to_string().contains(want), "{key}={value}: {error}");
    }
    let same = Options::new()
        .with("driver", "raw")
        .with("node-name", "raw")
        .with("file", "file")
        .with("file.filename", path.to_str().unwrap());
    reopen(&world, &backend, same).unwrap();
    end(world, backend);
}

/// Only what the caller told a child itself outlives a change of its parent.
#[test]
fn children_follow_their_parent_unless_they_were_told_otherwise() {
    let world = World::simulated();
    let disk = SimDisk::new(64 << 10);
    let mut options = Options::new().with("driver", "raw");
    options.nest(
        "file",
        sim(&disk)
            .with("node-name", "sim")
            .with("cache.no-flush", "off"),
    );
    let backend = Arc::new(world.open(options).unwrap());
    let below = world.graph.find_node("sim").unwrap();
    backend.set_permissions(reads()).unwrap();
    let changes = Options::new()
        .with("read-only", "on")
        .with("cache.no-flush", "on")
        .with("discard", "unmap");
    reopen(&world, &backend, changes).unwrap();
    let node = backend.node();
    assert!(node.is_read_only() && node.skips_flushes() && node.passes_discards());
    assert!(below.is_read_only() && !below.skips_flushes());
    let changes = Options::new()
        .with("read-only", "off")
        .with("file.cache.no-flush", "on");
    reopen(&world, &backend, changes).unwrap();
    assert!(!below.is_read_only() && below.skips_flushes());
    backend.set_permissions(writes()).unwrap();
    write(&world, &backend, 3);
    drop((node, below));
    end(world, backend);
}
