//! What a format holds of its storage, and keeps others from, while both are open: it changes with the
//! format's options and is asked of everybody who comes later.

mod support;

use coblock_block::Options;
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    BlockBackend, ErrorKind, Node, Perm, Permissions, Reopen, Result, Transaction,
};
use std::sync::Arc;
use support::change::*;
use support::storage::OpenStorage;
use support::{PLAIN, World, end, sim};

const READS: Permissions = Permissions {
    held: Perm::CONSISTENT_READ,
    shared: Perm::all(),
};

const WRITES: Permissions = Permissions {
    held: Perm::CONSISTENT_READ.union(Perm::WRITE),
    shared: Perm::all(),
};

/// A node `file`, and a format on it.
struct Fixture {
    world: World,
    file: Arc<Node>,
    format: Arc<BlockBackend>,
}

fn format(world: &World, name: &str, read_only: bool) -> Result<Arc<BlockBackend>> {
    let options = Options::new()
        .with("driver", "storage")
        .with("node-name", name)
        .with("read-only", if read_only { "on" } else { "off" })
        .with("file", "file");
    world.open(options).map(Arc::new)
}

fn fixture(read_only: bool) -> Fixture {
    let mut world = world();
    world.registry.register("storage", Box::new(OpenStorage));
    let file = sim(&SimDisk::new(64 << 10)).with("node-name", "file");
    let file = open_node(&world, file).unwrap();
    let format = format(&world, "format", read_only).unwrap();
    Fixture {
        world,
        file,
        format,
    }
}

impl Fixture {
    fn attach(&self, permissions: Permissions) -> Result<BlockBackend> {
        BlockBackend::with_permissions(&self.world.graph, self.file.clone(), permissions)
    }

    fn reopen(&self, read_only: bool) -> Result<()> {
        let mut transaction = Transaction::new(&self.world.graph);
        let to = Reopen {
            read_only: Some(read_only),
            ..Reopen::default()
        };
        let permissions = if read_only { READS } else { WRITES };
        transaction
            .reopen(&self.format.node(), to)
            .set_permissions(&self.format, permissions);
        self.world.run(|co| transaction.run(co))
    }

    /// Which of writing and resizing are held by the format, as its storage tells.
    fn holds(&self) -> Perm {
        self.file.permissions().held & (Perm::WRITE | Perm::RESIZE)
    }

    fn close(&self, backend: BlockBackend) {
        self.world.run(|co| backend.close(co)).unwrap();
    }

    fn end(self) {
        drop(self.file);
        end(self.world, self.format);
    }
}

fn conflict(result: Result<impl Sized>, words: &str) {
    let error = result.err().expect("it is refused");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

/// Who comes to the storage later is asked what the format shares: readers may, writers may not, and
/// nothing has changed after a refusal. A second format may read beside one that reads.
#[test]
fn who_comes_later_goes_together_with_the_format() {
    for read_only in [false, true] {
        let f = fixture(read_only);
        let before = dump(&f.world);
        let words = "permissions 'write' are both required by";
        conflict(f.attach(WRITES), words);
        assert_eq!(dump(&f.world), before, "read-only {read_only}");
        let reader = f.attach(READS).unwrap();
        conflict(reader.set_permissions(WRITES), words);
        assert_eq!(reader.node().permissions(), f.file.permissions());
        f.close(reader);
        match (read_only, format(&f.world, "second", true)) {
            (true, second) => f.world.run(|co| second.unwrap().close(co)).unwrap(),
            (false, second) => conflict(second, "permissions 'write, resize'"),
        }
        conflict(format(&f.world, "second", false), "write");
        assert_eq!(dump(&f.world), before, "read-only {read_only}");
        f.end();
    }
}

/// A format that becomes read-only gives up writing and resizing of its storage, though that stays
/// writable; it takes both again when it becomes writable, and cannot where somebody else does not
/// share them. Either all of it happens or nothing.
#[test]
fn storage_follows_the_formats_options() {
    let f = fixture(false);
    let all = Perm::WRITE | Perm::RESIZE;
    assert_eq!(f.holds(), all);
    f.reopen(true).unwrap();
    assert_eq!((f.holds(), f.file.is_read_only()), (Perm::empty(), false));
    // Others may rely now on nobody writing.
    let alone = Permissions {
        shared: Perm::all() - Perm::WRITE,
        ..READS
    };
    let guard = f.attach(alone).unwrap();
    let before = dump(&f.world);
    conflict(
        f.reopen(false),
        "permissions 'write' are both required by node 'format'",
    );
    assert_eq!(dump(&f.world), before);
    assert!(f.format.node().is_read_only());
    f.close(guard);
    // Two who only read: one of them cannot become a writer.
    let second = format(&f.world, "second", true).unwrap();
    conflict(f.reopen(false), "write");
    f.world.run(|co| second.close(co)).unwrap();
    drop(second);
    f.reopen(false).unwrap();
    assert_eq!(f.holds(), all);
    write(&f.world, &f.format, 1);
    f.end();
}

/// A format does not become writable on storage that stays read-only, nor is it opened so.
#[test]
fn no_writer_on_read_only_storage() {
    let mut world = world();
    world.registry.register("storage", Box::new(OpenStorage));
    let file = sim(&SimDisk::new(64 << 10))
        .with("node-name", "file")
        .with("read-only", "on");
    let file = open_node(&world, file).unwrap();
    let before = dump(&world);
    let refused = format(&world, "format", false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{refused}");
    assert!(
        refused.to_string().contains("Block node is read-only"),
        "{refused}"
    );
    assert_eq!(dump(&world), before);
    let writer = BlockBackend::with_permissions(&world.graph, file.clone(), WRITES);
    assert_eq!(writer.unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(dump(&world), before);
    let format = format(&world, "format", true).unwrap();
    let f = Fixture {
        world,
        file,
        format,
    };
    let refused = f.reopen(false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{refused}");
    assert!(f.format.node().is_read_only());
    f.end();
}

/// A backend that does not hold the permission to write does not write, discard or resize, though its
/// node is writable: no lock says so to others. Reads go on.
#[test]
fn who_does_not_hold_writing_does_not_write() {
    let f = fixture(false);
    let (world, backend) = (&f.world, &f.format);
    backend.set_permissions(READS).unwrap();
    let refusals = world.run(|co| {
        let data = [1; 512];
        [
            ("pwrite", backend.pwrite(co, 0, &data[..], PLAIN)),
            ("pwrite_sync", backend.pwrite_sync(co, 0, &data[..])),
            ("pwrite_zeroes", backend.pwrite_zeroes(co, 0, 512, PLAIN)),
            ("pdiscard", backend.pdiscard(co, 0, 512)),
            ("truncate", backend.truncate(co, 4096, true)),
            ("resize", backend.resize(co, 4096)),
            ("copy_range", backend.copy_range(co, 0, backend, 4096, 512)),
        ]
    });
    for (name, refused) in refusals {
        let error = refused.expect_err(name);
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{name}: {error}");
        let words = "does not hold the permission 'write'";
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    world
        .run(|co| {
            backend.pread(co, 0, &mut [0; 512][..])?;
            backend.flush(co)
        })
        .unwrap();
    backend.set_permissions(WRITES).unwrap();
    write(world, backend, 1);
    f.end();
}
