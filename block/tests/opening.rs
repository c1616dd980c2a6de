//! Opening nodes: options, names, chains that images name, and what is left when it fails.

mod support;

use coblock_aio::{IoVec, IoVecMut};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{
    Child, ChildRole, Dependent, Driver, ErrorKind, Explicit, GraphRead, LikeReference, Limits,
    OpenDriver, OpenGate, Opening, Options, RequestFlags, Result,
};
use coblock_coroutine::Co;
use std::sync::{Arc, OnceLock};
use support::World;

const PLAIN: RequestFlags = RequestFlags::empty();

/// The smallest format: the first 64 bytes of the file name a backing file, padded with spaces;
/// then comes data. A block of zeros is not there, and reads from the backing file.
struct Chain {
    file: Arc<Child>,
    backing: OnceLock<Arc<Child>>,
    len: u64,
}

struct OpenChain;

impl OpenDriver for OpenChain {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let file = opening.open_child(co, "file", ChildRole::Storage)?;
        let (name, len) = {
            let graph = opening.graph().read(co);
            let mut name = [0; 64];
            file.pread(co, &graph, 0, &mut name[..], PLAIN)?;
            (
                String::from_utf8_lossy(&name).trim().to_owned(),
                file.len(&graph).max(64) - 64,
            )
        };
        if !name.is_empty() {
            opening.dependent("backing", ChildRole::Backing, &name, Some("chain"))?;
        }
        Ok(Box::new(Chain {
            file,
            backing: OnceLock::new(),
            len,
        }))
    }
}

impl Driver for Chain {
    fn format(&self) -> &'static str {
        "chain"
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file
            .pread(co, graph, 64 + offset, buf.reborrow(), flags)?;
        match self.backing.get() {
            Some(backing) if buf.as_source().is_zero() => {
                backing.pread(co, graph, offset, buf, flags)
            }
            _ => Ok(()),
        }
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file.pwrite(co, graph, 64 + offset, buf, flags)
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.file.flush(co, graph)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn attach(&self, role: ChildRole, child: Arc<Child>) -> Result<()> {
        assert_eq!(role, ChildRole::Backing);
        assert!(self.backing.set(child).is_ok());
        Ok(())
    }

    fn is_format(&self) -> bool {
        true
    }
}

fn world() -> World {
    let mut world = World::with_engine(coblock_aio::EngineKind::Threads);
    world.registry.register("chain", Box::new(OpenChain));
    world
}

/// An image whose data are `len` times `byte`.
fn image(dir: &std::path::Path, name: &str, backing: &str, byte: u8, len: usize) -> String {
    let mut bytes = format!("{backing:64}").into_bytes();
    bytes.resize(64 + len, byte);
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn fails(world: &World, gate: &dyn OpenGate, options: Options, kind: ErrorKind, words: &str) {
    let error = world.open_through(gate, options).map(drop).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(
        error.to_string().contains(words),
        "{error:?} does not say {words:?}"
    );
    assert_eq!(world.graph.live_nodes(), 0, "after {error}");
    assert!(world.graph.node_names().is_empty());
}

/// Bad input: an unknown, missing or wrong option is an error that names it, and nothing stays
/// open. Rule 2.7: a node that would be its own child is not there yet.
#[test]
fn wrong_options_are_named() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a", "", 1, 512);
    let deny = &coblock_block::DenyAll;
    let raw = || Options::format_on_file("raw", &path);
    let disk = SimDisk::new(512);
    let sim = || {
        Options::new()
            .with("driver", "sim")
            .with_object("disk", disk.clone())
    };
    use ErrorKind::{Chain, InUse, Invalid, MissingOption, NotFound, UnknownDriver, UnknownOption};
    for (options, kind, words) in [
        (
            Options::new(),
            MissingOption,
            "Must specify either driver or file",
        ),
        (
            Options::new().with("driver", "qcow3"),
            UnknownDriver,
            "Unknown driver 'qcow3'",
        ),
        (
            Options::new().with("driver", "raw"),
            MissingOption,
            "\"file\"",
        ),
        (
            Options::new().with("driver", "file"),
            MissingOption,
            "requires a file name",
        ),
        (
            raw().with("colour", "red"),
            UnknownOption,
            "Block format 'raw' does not support the option 'colour'",
        ),
        (
            raw().with("file.colour", "red"),
            UnknownOption,
            "'file' doesn't support the option 'colour'",
        ),
        (
            Options::format_on_file("chain", &path).with("x", "y"),
            UnknownOption,
            "Block format 'chain' does not support the option 'x'",
        ),
        (raw().with("read-only", "perhaps"), Invalid, "read-only"),
        (raw().with("size", "2k"), Invalid, "size (2048)"),
        (raw().with("size", "500"), Invalid, "multiple of 512"),
        (raw().with("offset", "64k"), Invalid, "Offset (65536)"),
        (
            raw().with("node-name", "7up"),
            Invalid,
            "Invalid node-name: '7up'",
        ),
        (
            raw().with("node-name", "a").with("file.node-name", "a"),
            InUse,
            "node-name='a'",
        ),
        (raw().with("force-share", "on"), Invalid, "force-share"),
        (raw().with("discard", "maybe"), Invalid, "discard"),
        (raw().with("file.locking", "maybe"), Invalid, "locking"),
        (
            Options::new().with("driver", "raw").with("file", "nobody"),
            NotFound,
            "node-name='nobody'",
        ),
        (
            Options::new()
                .with("driver", "raw")
                .with("node-name", "itself")
                .with("file", "itself"),
            NotFound,
            "node-name='itself'",
        ),
        (
            Options::new().with("driver", "sim"),
            MissingOption,
            "'disk'",
        ),
        (sim().with("request-alignment", "3"), Invalid, "limits"),
        (
            Options::file("/nonexistent/x"),
            NotFound,
            "Could not open '/nonexistent/x': No such file",
        ),
        (
            Options::file("/dev/null"),
            Invalid,
            "requires '/dev/null' to be a regular file",
        ),
    ] {
        fails(&world, deny, options, kind, words);
    }
    let mut nested = Options::file(&path);
    for _ in 0..20 {
        let mut outer = Options::new().with("driver", "raw");
        outer.nest("file", nested);
        nested = outer;
    }
    fails(&world, deny, nested, Chain, "deep");
    world.end();
}

/// Nodes have names: given ones, or automatic ones; a child may be a node that exists, and lives as
/// long as its users.
#[test]
fn a_child_may_be_a_node_that_exists() {
    let world = world();
    let disk = SimDisk::with_contents(&[7; 4096]);
    let sim = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk)
        .with("node-name", "base");
    let base = world.open(sim).unwrap();
    let part = |offset: &str| {
        Options::new()
            .with("driver", "raw")
            .with("file", "base")
            .with("offset", offset)
    };
    let one = world.open(part("512")).unwrap();
    let two = world.open(part("1024")).unwrap();
    assert_eq!(world.graph.node_names(), ["#block000", "#block001", "base"]);
    assert_eq!((base.node().users(), one.len(), two.len()), (3, 3584, 3072));
    world.close(base).unwrap();
    world.run(|co| {
        two.pwrite(co, 0, &[1; 512][..], PLAIN).unwrap();
        let mut seen = [0; 1024];
        one.pread(co, 0, &mut seen[..]).unwrap();
        assert_eq!((seen[0], seen[512]), (7, 1));
        let graph = world.graph.read(co);
        let node = one.node();
        let edge = &node.children(&graph)[0];
        assert_eq!((edge.name(), edge.role()), ("file", ChildRole::Filtered));
        assert!(Arc::ptr_eq(&edge.parent(&graph).unwrap(), &one.node()));
        assert_eq!(edge.node(&graph).name(), "base");
    });
    world.close(one).unwrap();
    assert_eq!(world.graph.live_nodes(), 2);
    world.close(two).unwrap();
    world.end();
}

/// The gate decides: nothing by default, only what was named, or as the reference does.
#[test]
fn files_that_an_image_names_go_through_the_gate() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path(), "base", "", 5, 1024);
    let top = image(dir.path(), "top", "base", 0, 1024);
    let options = || Options::format_on_file("chain", &top);
    fails(
        &world,
        &coblock_block::DenyAll,
        options(),
        ErrorKind::Denied,
        "'base'",
    );
    fails(
        &world,
        &Explicit::new(),
        options(),
        ErrorKind::Denied,
        "'base'",
    );
    let explicit = Explicit::new().allow("base", Options::format_on_file("chain", &base));
    let like_reference = LikeReference::new();
    let gates: [(&str, &dyn OpenGate); 2] = [
        ("explicit", &explicit),
        ("like the reference", &like_reference),
    ];
    for (name, gate) in gates {
        let backend = world.open_through(gate, options()).unwrap();
        world.run(|co| {
            let mut seen = [0; 1024];
            backend.pread(co, 0, &mut seen[..]).unwrap();
            assert_eq!(seen, [5; 1024], "{name}");
            let graph = world.graph.read(co);
            let node = backend.node();
            let below = node.children(&graph)[1].node(&graph);
            assert!(below.is_read_only(), "a backing file is opened read-only");
        });
        assert_eq!(world.graph.live_nodes(), 4);
        world.close(backend).unwrap();
    }
    // The caller's own options go before what the image says, and need no gate.
    let given = options()
        .with("backing.driver", "chain")
        .with("backing.file.driver", "file");
    let backend = world
        .open(given.with("backing.file.filename", base))
        .unwrap();
    world.close(backend).unwrap();
    let backend = world.open(options().with("backing", "")).unwrap();
    assert_eq!(world.graph.live_nodes(), 2, "without the backing file");
    world.close(backend).unwrap();
    world.end();
}

/// Bad input: a chain that comes back to itself is an error, whatever names it goes by.
#[test]
fn loops_are_found() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    let own = image(dir.path(), "own", "./own", 0, 512);
    image(dir.path(), "a", "b", 0, 512);
    image(dir.path(), "b", "link", 0, 512);
    std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
    let a = dir.path().join("a");
    for path in [own.as_str(), a.to_str().unwrap()] {
        let options = Options::format_on_file("chain", path);
        fails(
            &world,
            &LikeReference::new(),
            options,
            ErrorKind::Chain,
            "already part of this chain",
        );
    }
    world.end();
}

/// Bad input: how deep a chain may be is bounded, at 16 in the library; long ones are opened, read
/// and closed without a stack that grows with them when they are opened.
#[test]
fn depth_is_bounded() {
    struct Unbounded(LikeReference);
    impl OpenGate for Unbounded {
        fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options> {
            self.0.dependent(wanted)
        }
        fn max_depth(&self) -> usize {
            coblock_block::gate::DEFAULT_DEPTH
        }
    }
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "0", "", 9, 512);
    for n in 1..=200 {
        image(dir.path(), &n.to_string(), &(n - 1).to_string(), 0, 512);
    }
    let top = |n: usize| {
        Options::format_on_file("chain", dir.path().join(n.to_string()).to_str().unwrap())
    };
    let sixteen = Unbounded(LikeReference::new());
    fails(
        &world,
        &sixteen,
        top(17),
        ErrorKind::Chain,
        "more than 16 images deep",
    );
    for (n, gate) in [
        (16, &sixteen as &dyn OpenGate),
        (200, &LikeReference::new()),
    ] {
        let backend = world.open_through(gate, top(n)).unwrap();
        assert_eq!(world.graph.live_nodes(), 2 * (n + 1));
        world.run(|co| {
            let mut seen = [0; 512];
            backend.pread(co, 0, &mut seen[..]).unwrap();
            assert_eq!(seen, [9; 512], "{n} images deep");
        });
        world.close(backend).unwrap();
        assert_eq!(world.graph.live_nodes(), 0);
    }
    image(dir.path(), "201", "200", 0, 512);
    fails(
        &world,
        &LikeReference::new(),
        top(201),
        ErrorKind::Chain,
        "more than 200 images deep",
    );
    world.end();
}

/// A file deep in the chain that is missing: the message tells which, and what had been opened is
/// closed.
#[test]
fn a_missing_backing_file_is_named() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "base", "gone", 0, 512);
    let top = image(dir.path(), "top", "base", 0, 512);
    let gate = LikeReference::new();
    let options = Options::format_on_file("chain", &top);
    fails(
        &world,
        &gate,
        options,
        ErrorKind::NotFound,
        "Could not open backing file: Could not open '",
    );
    world.end();
}

/// Reads past the end of a child are zeros; writes there grow what can grow, and are refused
/// elsewhere.
#[test]
fn past_the_end_of_a_child() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "short", "", 3, 512);
    let top = image(dir.path(), "top", "short", 0, 2048);
    let backend = world
        .open_through(
            &LikeReference::new(),
            Options::format_on_file("chain", &top),
        )
        .unwrap();
    world.run(|co| {
        let mut seen = [1; 1024];
        backend.pread(co, 0, &mut seen[..]).unwrap();
        assert_eq!(
            (seen[511], seen[512], seen[1023]),
            (3, 0, 0),
            "the backing file is shorter"
        );
        let graph = world.graph.read(co);
        let node = backend.node();
        let file = &node.children(&graph)[0];
        assert!(file.is_growable(&graph));
        file.pwrite(co, &graph, 10_000, &[1; 10][..], PLAIN)
            .unwrap();
        assert_eq!(file.len(&graph), 10_010);
        let mut far = [1; 20];
        file.pread(co, &graph, 10_000, &mut far[..], PLAIN).unwrap();
        assert_eq!((far[9], far[10]), (1, 0));
        file.pread(co, &graph, 1 << 40, &mut far[..], PLAIN)
            .unwrap();
        assert_eq!(far, [0; 20]);
        let error = file
            .pread(co, &graph, u64::MAX - 5, &mut far[..], PLAIN)
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::OutOfBounds, libc::EIO)
        );
    });
    world.close(backend).unwrap();
    assert_eq!(std::fs::metadata(&top).unwrap().len(), 10_010);
    world.end();
}
