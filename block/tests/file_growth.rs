//! The `file` driver grows a file ahead of its writers, and nobody sees it afterwards.

mod support;

use coblock_aio::{EngineKind, Medium};
use coblock_block::{
    BlockBackend, Child, ChildRole, Driver, GraphRead, Limits, OpenDriver, Opening, Options,
    RequestFlags, Result,
};
use coblock_coroutine::Co;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use support::{World, engines, pattern};

/// A format whose guest sees a terabyte and whose file grows as the guest writes.
struct Growing(Arc<Child>);

struct OpenGrowing;

impl OpenDriver for OpenGrowing {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let file = opening.open_child(co, "file", ChildRole::Storage)?;
        Ok(Box::new(Growing(file)))
    }
}

impl Driver for Growing {
    fn format(&self) -> &'static str {
        "growing"
    }
    support::requests::passes_requests_on!(0);
    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        self.0.truncate(co, graph, len, exact)
    }
    fn len(&self) -> u64 {
        1 << 40
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn is_format(&self) -> bool {
        true
    }
}

fn open(path: &Path, engine: EngineKind) -> (World, BlockBackend) {
    let mut world = World::with_engine(engine);
    world.registry.register("growing", Box::new(OpenGrowing));
    let options = Options::format_on_file("growing", path.to_str().unwrap());
    let backend = world.open(options).unwrap();
    (world, backend)
}

const NONE: RequestFlags = RequestFlags::empty();
const BLOCK: usize = 64 << 10;

/// Does the file system of this folder set space aside? Said aloud if not.
fn sets_aside(dir: &Path) -> bool {
    let file = File::create(dir.join("probe")).unwrap();
    let in_memory = matches!(Medium::of(file.as_fd(), false), Ok(Medium::Memory));
    let flags = rustix::fs::FallocateFlags::empty();
    let does = !in_memory && rustix::fs::fallocate(&file, flags, 0, 1 << 20).is_ok();
    if !does {
        writeln!(
            std::io::stderr(),
            "SKIPPED: {} sets no space aside",
            dir.display()
        )
        .expect("standard error");
    }
    does
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// The file is longer meanwhile, the disk is not; the end has what was written and no more.
#[test]
fn grown_ahead_and_cut_back() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let grows = sets_aside(dir.path());
    for engine in engines() {
        let path = dir.path().join(format!("{engine:?}"));
        fs::write(&path, b"").unwrap();
        let (world, backend) = open(&path, engine);
        let blocks = 100;
        world.run(|co| {
            for n in 0..blocks {
                let data = pattern(n, BLOCK);
                backend
                    .pwrite(co, n * BLOCK as u64, &data[..], NONE)
                    .unwrap();
            }
        });
        let written = blocks * BLOCK as u64;
        assert!(length(&path) >= written);
        assert_eq!(length(&path) > written, grows, "with {engine:?}");
        // What a crash would leave: the content, and zeros.
        let crashed = fs::read(&path).unwrap();
        assert!(
            crashed[usize::try_from(written).unwrap()..]
                .iter()
                .all(|byte| *byte == 0)
        );
        world.close(backend).unwrap();
        world.end();
        let kept = fs::read(&path).unwrap();
        assert_eq!(kept.len() as u64, written, "with {engine:?}");
        for n in 0..blocks {
            let at = usize::try_from(n).unwrap() * BLOCK;
            assert!(
                kept[at..at + BLOCK] == pattern(n, BLOCK),
                "block {n} with {engine:?}"
            );
        }
    }
}

/// Small files, and writes inside a file, set nothing aside; a write far past the end leaves a
/// hole.
#[test]
fn only_where_it_is_worth_it() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if !sets_aside(dir.path()) {
        return;
    }
    let engine = engines()[0];
    let path = dir.path().join("disk");
    fs::write(&path, b"").unwrap();
    let (world, backend) = open(&path, engine);
    let write = |offset: u64| {
        world.run(|co| {
            backend
                .pwrite(co, offset, &pattern(1, 4096)[..], NONE)
                .unwrap()
        });
        length(&path)
    };
    assert_eq!(write(0), 4096);
    assert_eq!(write(4096), 8192, "a small file stays small");
    let far = 1 << 30;
    assert!(write(far) > far + 4096);
    let blocks = fs::metadata(&path).unwrap().blocks();
    assert!(
        blocks * 512 < 100 << 20,
        "{blocks} blocks: the gap is a hole"
    );
    let before = length(&path);
    assert_eq!(write(far + 4096), before, "inside what was set aside");
    world.close(backend).unwrap();
    world.end();
    assert_eq!(length(&path), far + 8192);
}

/// A resize is what the caller says, and what somebody else did to the file is not undone.
#[test]
fn resized_meanwhile() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if !sets_aside(dir.path()) {
        return;
    }
    let engine = engines()[0];
    for (by_us, expected) in [(true, 5 << 20), (false, 100 << 20)] {
        let path = dir.path().join(format!("disk-{by_us}"));
        fs::write(&path, vec![1; 4 << 20]).unwrap();
        let (world, backend) = open(&path, engine);
        world.run(|co| backend.pwrite(co, 4 << 20, &[2; 4096][..], NONE).unwrap());
        assert!(length(&path) > (4 << 20) + 4096);
        if by_us {
            world.run(|co| backend.truncate(co, 5 << 20, true).unwrap());
            assert_eq!(length(&path), 5 << 20);
        } else {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(100 << 20).unwrap();
        }
        world.close(backend).unwrap();
        world.end();
        assert_eq!(length(&path), expected);
    }
}
