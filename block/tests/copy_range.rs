//! Copying between nodes: the bytes, who copies them, what is in flight meanwhile, and errors.

mod support;

use coblock_aio::{EngineKind, IoVec, IoVecMut};
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{
    BlockBackend, Copied, CopySource, CopyTarget, Driver, Error, ErrorKind, GraphRead, Limits,
    Mixed, OpenDriver, Opening, Options, RequestFlags, Result,
};
use coblock_coroutine::Co;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use support::{World, end, engines, pattern, settle, sim, start};

/// Bytes in memory that take part in copies by the host.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Bytes that came from a file of the host, and bytes that were written.
    taken: AtomicU64,
    written: AtomicU64,
    /// Makes [`Driver::copy_range_to`] fail.
    fails: bool,
}

struct OpenMemory;

impl OpenDriver for OpenMemory {
    fn open(&self, _co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let memory = opening.options().take_object::<Memory>("memory")?.unwrap();
        let align = opening.options().take_u64("align")?.unwrap_or(1);
        Ok(Box::new(Handle { memory, align }))
    }
}

struct Handle {
    memory: Arc<Memory>,
    align: u64,
}

impl Driver for Handle {
    fn format(&self) -> &'static str {
        "memory"
    }

    fn pread(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let at = usize::try_from(offset).unwrap();
        let bytes = self.memory.bytes.lock().unwrap();
        buf.copy_from(0, &bytes[at..at + buf.len()]);
        Ok(())
    }

    fn pwrite(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let at = usize::try_from(offset).unwrap();
        let mut bytes = self.memory.bytes.lock().unwrap();
        buf.copy_to(0, &mut bytes[at..at + buf.len()]);
        self.memory
            .written
            .fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self, _co: &Co, _graph: &GraphRead<'_>) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> u64 {
        self.memory.bytes.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.align,
            ..Limits::default()
        }
    }

    /// At most 1000 bytes at a time.
    fn copy_range_to(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        if self.memory.fails {
            return Err(Error::new(ErrorKind::NoSpace, "full"));
        }
        let len = source.len.min(1024);
        let at = usize::try_from(offset).unwrap();
        let mut bytes = self.memory.bytes.lock().unwrap();
        let file = File::from(source.file.try_clone_to_owned().unwrap());
        let into = &mut bytes[at..at + usize::try_from(len).unwrap()];
        file.read_exact_at(into, source.offset).unwrap();
        self.memory.taken.fetch_add(len, Ordering::Relaxed);
        Ok(len)
    }

    /// A source that says that all is zeros, whatever its bytes are.
    fn copy_range_from(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        _offset: u64,
        len: u64,
        _to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        Ok(Copied::Zeros(len.min(100)))
    }
}

fn memory(len: usize) -> Arc<Memory> {
    Arc::new(Memory {
        bytes: Mutex::new(vec![0xee; len]),
        ..Memory::default()
    })
}

fn world(engine: EngineKind) -> World {
    let mut world = World::with_engine(engine);
    world.registry.register("memory", Box::new(OpenMemory));
    world
}

fn of_memory(memory: &Arc<Memory>) -> Options {
    Options::new()
        .with("driver", "memory")
        .with_object("memory", memory.clone())
}

fn of_file(path: &Path) -> Options {
    Options::file(path.to_str().unwrap())
}

fn contents(world: &World, backend: &BlockBackend) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(backend.len()).unwrap()];
    world
        .run(|co| backend.pread(co, 0, &mut bytes[..]))
        .unwrap();
    bytes
}

const LEN: usize = 300_000;

/// Whatever the two ends are, and wherever the range begins: the bytes arrive, those around stay,
/// the source too.
#[test]
fn bytes_arrive() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines() {
        let world = world(engine);
        let make = |name: &str, seed: u64| {
            let bytes = pattern(seed, LEN);
            let path = folder.path().join(format!("{seed}"));
            let options = match name {
                "file" => {
                    std::fs::write(&path, &bytes).unwrap();
                    of_file(&path)
                }
                "part of a file" => {
                    let mut longer = vec![0xcc; 1024];
                    longer.extend(&bytes);
                    longer.resize(LEN + 2048 + 512 - LEN % 512, 0xcc);
                    std::fs::write(&path, &longer).unwrap();
                    Options::format_on_file("raw", path.to_str().unwrap()).with("offset", "1024")
                }
                "sim" => sim(&SimDisk::with_contents(&bytes)),
                "odd sim" => sim(&SimDisk::with_contents(&bytes[..LEN - LEN % 512]))
                    .with("request-alignment", "512")
                    .with("growable", "off"),
                other => panic!("{other}"),
            };
            world.open(options).unwrap()
        };
        let kinds = ["file", "part of a file", "sim", "odd sim"];
        for (from_kind, to_kind) in kinds.iter().flat_map(|a| kinds.map(|b| (*a, b))) {
            let (from, to) = (make(from_kind, 1), make(to_kind, 2));
            let source = contents(&world, &from);
            for (offset, to_offset, len) in [
                (0, 0, 4096),
                (100, 7000, 250_001),
                (8192, 512, 65536),
                (9, 9, 0),
            ] {
                let mut want = contents(&world, &to);
                want[to_offset..to_offset + len].copy_from_slice(&source[offset..offset + len]);
                let copy =
                    |co: &Co| from.copy_range(co, offset as u64, &to, to_offset as u64, len as u64);
                world.run(copy).unwrap();
                let story = format!("{from_kind} to {to_kind}: {len} bytes at {offset}");
                assert!(contents(&world, &to) == want, "{story}");
            }
            assert!(
                contents(&world, &from) == source,
                "{from_kind} to {to_kind}"
            );
            world.close(from).unwrap();
            world.close(to).unwrap();
        }
        world.end();
    }
}

/// Within one node, side by side; and from a node to another one on the same file.
#[test]
fn copies_within_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let bytes = pattern(3, 200_000);
    std::fs::write(&path, &bytes).unwrap();
    let world = world(EngineKind::Threads);
    let file = world.open(of_file(&path).with("locking", "off")).unwrap();
    let again = world.open(of_file(&path).with("locking", "off")).unwrap();
    world.run(|co| {
        file.copy_range(co, 0, &file, 100_000, 100_000).unwrap();
        file.copy_range(co, 5, &again, 100, 50).unwrap();
        for (from, to) in [(0, 99), (99, 0), (7, 7)] {
            let error = file.copy_range(co, from, &file, to, 100).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{from} {to}: {error}");
            assert_eq!((error.errno(), error.offset()), (libc::EINVAL, Some(to)));
        }
    });
    world.close(file).unwrap();
    world.close(again).unwrap();
    world.end();
    let mut want = [&bytes[..100_000], &bytes[..100_000]].concat();
    let part = want[5..55].to_vec();
    want[100..150].copy_from_slice(&part);
    assert!(std::fs::read(&path).unwrap() == want);
}

/// The bytes of a file go to a target that takes them from the file, piece by piece; what is not
/// aligned for it is read and written.
#[test]
fn the_host_copies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let bytes = pattern(4, 10_000);
    std::fs::write(&path, &bytes).unwrap();
    let world = world(EngineKind::Threads);
    let file = Options::format_on_file("raw", path.to_str().unwrap());
    let file = world.open(file).unwrap();
    for (align, taken) in [("1", 10_000), ("512", 9728)] {
        let memory = memory(20_480);
        let target = world.open(of_memory(&memory).with("align", align)).unwrap();
        world
            .run(|co| file.copy_range(co, 0, &target, 1024, 10_000))
            .unwrap();
        assert!(memory.bytes.lock().unwrap()[1024..11_024] == bytes);
        assert_eq!(memory.taken.load(Ordering::Relaxed), taken, "{align}");
        let written = memory.written.load(Ordering::Relaxed);
        assert_eq!(written, if align == "1" { 0 } else { 512 }, "{align}");
        world.close(target).unwrap();
    }
    world.close(file).unwrap();
    world.end();
}

/// `file` asks the host: holes of the target and of the source, and a file that becomes longer.
#[test]
fn files_are_copied_by_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
    let mut bytes = pattern(5, 3 << 20);
    bytes[1 << 20..2 << 20].fill(0);
    std::fs::write(&from, &bytes).unwrap();
    std::fs::write(&to, vec![1; 4 << 20]).unwrap();
    let world = world(EngineKind::Threads);
    let [from, to_file] = [&from, &to].map(|path| world.open(of_file(path)).unwrap());
    let copy = |co: &Co| from.copy_range(co, 0, &to_file, 1 << 20, 3 << 20);
    world.run(copy).unwrap();
    world.close(from).unwrap();
    world.close(to_file).unwrap();
    world.end();
    let now = std::fs::read(&to).unwrap();
    assert!(now[..1 << 20].iter().all(|b| *b == 1) && now[1 << 20..] == bytes);
}

/// What the source knows to be zeros is not read, and is made zeros.
#[test]
fn zeros_stay_zeros() {
    let world = world(EngineKind::Threads);
    let (from, to) = (memory(1000), memory(1000));
    let source = world.open(of_memory(&from)).unwrap();
    let target = world.open(of_memory(&to)).unwrap();
    world
        .run(|co| source.copy_range(co, 0, &target, 100, 250))
        .unwrap();
    let bytes = to.bytes.lock().unwrap().clone();
    assert!(bytes[100..350].iter().all(|b| *b == 0) && bytes[99] == 0xee && bytes[350] == 0xee);
    world.close(source).unwrap();
    world.close(target).unwrap();
    world.end();
}

/// Both ends are checked before anything is done, as by a read and a write.
#[test]
fn wrong_copies_are_refused() {
    let world = World::simulated();
    let other = World::simulated();
    let disk = SimDisk::with_contents(&[7; 8192]);
    let target = SimDisk::with_contents(&[1; 4096]);
    let source = world.open(sim(&disk)).unwrap();
    let to = world.open(sim(&target)).unwrap();
    let read_only = world.open(sim(&target).with("read-only", "on")).unwrap();
    let elsewhere = other.open(sim(&target)).unwrap();
    world.run(|co| {
        for (name, to, offset, to_offset, len, kind, errno) in [
            (
                "past the source",
                &to,
                8192 - 10,
                0,
                11,
                ErrorKind::OutOfBounds,
                libc::EIO,
            ),
            (
                "past the target",
                &to,
                0,
                4096 - 10,
                11,
                ErrorKind::OutOfBounds,
                libc::EIO,
            ),
            (
                "far past",
                &to,
                u64::MAX,
                0,
                2,
                ErrorKind::OutOfBounds,
                libc::EIO,
            ),
            (
                "too long",
                &to,
                0,
                0,
                u64::MAX,
                ErrorKind::OutOfBounds,
                libc::EIO,
            ),
            (
                "read-only",
                &read_only,
                0,
                0,
                10,
                ErrorKind::ReadOnly,
                libc::EPERM,
            ),
            (
                "another graph",
                &elsewhere,
                0,
                0,
                10,
                ErrorKind::Invalid,
                libc::EINVAL,
            ),
        ] {
            let error = source
                .copy_range(co, offset, to, to_offset, len)
                .unwrap_err();
            assert_eq!(
                (error.kind(), error.errno()),
                (kind, errno),
                "{name}: {error}"
            );
        }
    });
    assert_eq!(target.contents(), [1; 4096]);
    for backend in [source, to, read_only] {
        world.close(backend).unwrap();
    }
    other.close(elsewhere).unwrap();
    world.end();
    other.end();
}

/// A failure of either end is the copy's, and tells where; a full target is told too when the host
/// copies.
#[test]
fn errors_tell_where() {
    let world = World::simulated();
    let [from, to] = [1, 2].map(|byte| SimDisk::with_contents(&vec![byte; 3 << 20]));
    let source = world.open(sim(&from)).unwrap();
    let target = world.open(sim(&to)).unwrap();
    for (disk, what, at) in [
        (&from, Match::reads(), 1 << 20),
        (&to, Match::writes(), 1 << 20),
    ] {
        disk.fail(Fault::new(what, libc::EIO).after(1));
        let copy = |co: &Co| source.copy_range(co, 0, &target, 0, 3 << 20);
        let error = world.run(copy).unwrap_err();
        assert_eq!(
            (error.errno(), error.offset()),
            (libc::EIO, Some(at)),
            "{error}"
        );
        disk.clear_faults();
    }
    world.close(source).unwrap();
    world.close(target).unwrap();
    world.end();

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, [1; 4096]).unwrap();
    let world = self::world(EngineKind::Threads);
    let full = Arc::new(Memory {
        bytes: Mutex::new(vec![0; 4096]),
        fails: true,
        ..Memory::default()
    });
    let source = world.open(of_file(&path)).unwrap();
    let target = world.open(of_memory(&full)).unwrap();
    let error = world
        .run(|co| source.copy_range(co, 0, &target, 96, 4000))
        .unwrap_err();
    assert_eq!(
        (error.errno(), error.offset()),
        (libc::ENOSPC, Some(96)),
        "{error}"
    );
    world.close(source).unwrap();
    world.close(target).unwrap();
    world.end();
}

/// A copy is in flight at both ends until it is over, and a request that must be alone on a part of
/// either waits for it (hazard Q21).
#[test]
fn both_ends_are_in_flight() {
    let world = World::simulated();
    let [from, to] = [1, 2].map(|byte| SimDisk::with_contents(&[byte; 8192]));
    let source = Arc::new(world.open(sim(&from)).unwrap());
    let target = Arc::new(world.open(sim(&to)).unwrap());
    for (disk, alone, what) in [
        (&from, &source, Match::reads()),
        (&to, &target, Match::writes()),
    ] {
        let hold = disk.hold(what);
        let to = target.clone();
        let copy = start(&world, &source, move |co, source| {
            source.copy_range(co, 0, &to, 4096, 4096)
        });
        settle(&world);
        assert_eq!(
            (hold.waiting(), source.in_flight(), target.in_flight()),
            (1, 1, 1)
        );
        let write = start(&world, alone, |co, alone| {
            alone.pwrite(co, 0, &[3; 8192][..], RequestFlags::SERIALISING)
        });
        settle(&world);
        assert!(copy.borrow().is_none() && write.borrow().is_none());
        drop(hold);
        settle(&world);
        copy.borrow_mut().take().unwrap().unwrap();
        write.borrow_mut().take().unwrap().unwrap();
    }
    world.close(Arc::into_inner(source).unwrap()).unwrap();
    end(world, target);
}

/// A request that is alone on the target is waited for with nothing of the source held: it might
/// itself be waiting for that.
#[test]
fn the_target_is_waited_for_with_the_source_free() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, [1; 4096]).unwrap();
    let world = world(EngineKind::Threads);
    let disk = SimDisk::with_contents(&[2; 4096]);
    let source = Arc::new(world.open(of_file(&path)).unwrap());
    let target = Arc::new(world.open(sim(&disk)).unwrap());
    let hold = disk.hold(Match::writes());
    let alone = start(&world, &target, |co, target| {
        target.pwrite(co, 0, &[3; 4096][..], RequestFlags::SERIALISING)
    });
    settle(&world);
    let to = target.clone();
    let copy = start(&world, &source, move |co, source| {
        source.copy_range(co, 0, &to, 0, 4096)
    });
    while target.node().in_flight() < 2 || source.node().in_flight() > 0 {
        world.home.poll(true);
    }
    assert!(copy.borrow().is_none());
    drop(hold);
    while copy.borrow().is_none() || alone.borrow().is_none() {
        world.home.poll(true);
    }
    copy.borrow_mut().take().unwrap().unwrap();
    alone.borrow_mut().take().unwrap().unwrap();
    assert_eq!(disk.contents(), [1; 4096]);
    world.close(Arc::into_inner(source).unwrap()).unwrap();
    end(world, target);
}

/// The mixed face and the one with callbacks do the same as the suspending one.
#[test]
fn all_faces_copy() {
    let world = World::simulated();
    let [from, to] = [1, 2].map(|byte| SimDisk::with_contents(&[byte; 8192]));
    let source = Arc::new(world.open(sim(&from)).unwrap());
    let target = Arc::new(world.open(sim(&to)).unwrap());
    let mixed = Mixed::new(&source, &world.home);
    mixed.copy_range(0, &target, 100, 50).unwrap();
    let late = mixed.copy_range(0, &target, 8000, 500).unwrap_err();
    let results = Arc::new(Mutex::new(Vec::new()));
    for (to_offset, len) in [(200, 50), (8000, 500)] {
        let told = results.clone();
        let done = move |result: Result<()>| told.lock().unwrap().push(result);
        let submit = || source.aio_copy_range(0, &target, to_offset, len, done);
        let request = world.home.with(submit).unwrap();
        assert!(!request.is_over());
        settle(&world);
        assert!(request.is_over());
    }
    let results = std::mem::take(&mut *results.lock().unwrap());
    assert!(results[0].is_ok());
    let error = results[1].as_ref().unwrap_err();
    assert_eq!((error.kind(), error.errno()), (late.kind(), late.errno()));
    let mut want = [2; 8192];
    want[100..150].fill(1);
    want[200..250].fill(1);
    assert_eq!(to.contents(), want);
    world.close(Arc::into_inner(source).unwrap()).unwrap();
    end(world, target);
}
