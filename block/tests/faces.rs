//! Rules 2.2, 2.3: the two faces of a backend do the same, and the outside one is refused where it
//! must not wait.
#![expect(
    clippy::disallowed_methods,
    reason = "the mixed face is what is tested"
)]

mod support;

use coblock_aio::{EngineKind, IoThread};
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{BlockBackend, Mixed, Options, RequestFlags, Result};
use coblock_coroutine::CoMutex;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{World, pattern};

const PLAIN: RequestFlags = RequestFlags::empty();

fn sim(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone())
}

/// Everything that the faces have in common, and what it leaves on the disk.
fn script(face: &Mixed<'_>, disk: &Arc<SimDisk>) -> Vec<(&'static str, Option<(i32, String)>)> {
    let mut told = Vec::new();
    let mut note = |what, result: Result<()>| {
        told.push((
            what,
            result.err().map(|error| (error.errno(), error.to_string())),
        ));
    };
    let mut buf = vec![0; 700];
    note("flush of nothing", face.flush());
    note("write", face.pwrite(100, &pattern(1, 700), PLAIN));
    note("read", face.pread(100, &mut buf));
    note("write and flush", face.pwrite_sync(5000, &buf));
    note("flush again", face.flush());
    note("fua", face.pwrite(0, &buf, RequestFlags::FUA));
    note("zeroes", face.pwrite_zeroes(200, 1000, PLAIN));
    note("discard", face.pdiscard(0, 4096));
    note("past the end", face.pread(8000, &mut buf));
    note("minus one", face.pwrite(u64::MAX, &buf, PLAIN));
    note("negative length", face.truncate(u64::MAX, true));
    disk.fail(Fault::new(Match::writes(), libc::ENOSPC));
    note("fails", face.pwrite(100, &buf, PLAIN));
    note("resize", face.truncate(4096, true));
    disk.fail(Fault::new(Match::flushes(), libc::EIO));
    note("flush fails", face.flush());
    note("flush is poisoned", face.flush());
    told
}

/// Rule 2.2: inside and outside of a coroutine: the same checks, limits, errors, bytes and skipped
/// flushes.
#[test]
fn both_faces_do_the_same() {
    let outside = {
        let disk = SimDisk::new(8192);
        let world = World::simulated();
        let backend = world
            .open(sim(&disk).with("request-alignment", "512"))
            .unwrap();
        let told = script(&Mixed::new(&backend, &world.home), &disk);
        assert!(
            Mixed::new(&backend, &world.home).close().is_err(),
            "poisoned"
        );
        drop(backend);
        world.end();
        (told, disk.log(), disk.counts())
    };
    let inside = {
        let disk = SimDisk::new(8192);
        let world = World::simulated();
        let backend = world
            .open(sim(&disk).with("request-alignment", "512"))
            .unwrap();
        let told = world.run(|_co| {
            let face = Mixed::new(&backend, &world.home);
            let told = script(&face, &disk);
            assert!(face.close().is_err(), "poisoned");
            told
        });
        drop(backend);
        world.end();
        (told, disk.log(), disk.counts())
    };
    assert_eq!(outside, inside);
    let failed: Vec<_> = outside
        .0
        .iter()
        .filter(|(_, error)| error.is_some())
        .map(|(what, _)| *what)
        .collect();
    assert_eq!(
        failed,
        [
            "past the end",
            "minus one",
            "negative length",
            "fails",
            "flush fails",
            "flush is poisoned"
        ]
    );
    assert_eq!(
        outside.2.flushes, 3,
        "write and flush, FUA, and the one that fails"
    );
}

/// Rule 2.2: inside a coroutine the mixed face suspends it: others run meanwhile.
#[test]
fn inside_a_coroutine_it_suspends() {
    let disk = SimDisk::new(8192);
    let world = World::simulated();
    let backend = Arc::new(world.open(sim(&disk)).unwrap());
    let hold = disk.hold(Match::writes());
    let events = Rc::new(RefCell::new(Vec::new()));
    let (noted, used) = (events.clone(), backend.clone());
    world.home.spawn("mixed", move |_co| {
        Mixed::nested(&used).pwrite(0, &[1; 512], PLAIN).unwrap();
        noted.borrow_mut().push("written");
    });
    events.borrow_mut().push("suspended");
    assert_eq!(hold.waiting(), 1);
    drop(hold);
    while world.home.poll(false) {}
    assert_eq!(*events.borrow(), ["suspended", "written"]);
    Mixed::new(&backend, &world.home).close().unwrap();
    drop(backend);
    world.end();
}

fn opened() -> (World, BlockBackend) {
    let world = World::simulated();
    let backend = world.open(sim(&SimDisk::new(8192))).unwrap();
    (world, backend)
}

/// Rule 2.3: never while a graph guard is held.
#[test]
#[should_panic(expected = "rule 2.3: a mixed call")]
fn it_is_refused_while_a_graph_guard_is_held() {
    let (world, backend) = opened();
    world.run(|co| {
        let _guard = world.graph.read(co);
        let _ = Mixed::new(&backend, &world.home).flush();
    });
}

/// Rule 2.3: never while a coroutine lock is held.
#[test]
#[should_panic(expected = "rule 2.3: a mixed call")]
fn it_is_refused_while_a_coroutine_lock_is_held() {
    let (world, backend) = opened();
    let mutex = CoMutex::new(());
    world.run(|co| {
        let _guard = mutex.lock(co);
        let _ = Mixed::new(&backend, &world.home).flush();
    });
}

/// Rule 2.3: never in a bottom half of the context that it would wait for.
#[test]
#[should_panic(expected = "in a callback of context")]
fn it_is_refused_in_a_callback_of_its_context() {
    let (world, backend) = opened();
    // What a bottom half sees: its context is the current one, and it is on the leader.
    world.home.with(|| {
        let _ = Mixed::new(&backend, &world.home).flush();
    });
}

/// Rule 2.3: in a bottom half with nesting declared it works, and what else is scheduled runs
/// meanwhile.
#[test]
fn a_bottom_half_may_declare_nesting() {
    let disk = SimDisk::new(8192);
    let world = World::simulated();
    let backend = Arc::new(world.open(sim(&disk)).unwrap());
    disk.delay(1, std::time::Duration::from_millis(1));
    let (ran, used) = (Arc::new(AtomicUsize::new(0)), backend.clone());
    let counted = ran.clone();
    world.home.context().oneshot(move || {
        Mixed::nested(&used).pwrite_sync(0, &[1; 512]).unwrap();
        assert_eq!(
            counted.load(Ordering::Relaxed),
            1,
            "the other one ran meanwhile"
        );
    });
    let counted = ran.clone();
    world.home.context().oneshot(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    while world.home.poll(false) {}
    assert_eq!(disk.peek(0, 512), [1; 512]);
    Mixed::new(&backend, &world.home).close().unwrap();
    drop(backend);
    world.end();
}

/// Rule 3.9: requests of one backend come from several contexts; each counts in its own row, and
/// close sees them all.
#[test]
fn requests_come_from_any_context() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    for engine in support::engines() {
        let world = World::with_engine(engine);
        let options = Options::format_on_file("raw", path.to_str().unwrap());
        let backend = Arc::new(world.open(options).unwrap());
        let threads: Vec<IoThread> = (0..3)
            .map(|n| io_thread(&format!("queue {n}"), engine))
            .collect();
        let left = Arc::new(AtomicUsize::new(threads.len() * 8));
        for (t, thread) in threads.iter().enumerate() {
            for k in 0..8 {
                let (backend, left) = (backend.clone(), left.clone());
                let home = world.home.context().clone();
                thread
                    .context()
                    .spawn("request", move |co| {
                        let n = u8::try_from(t * 8 + k).unwrap();
                        for round in 0..20 {
                            let offset = (u64::from(n) * 20 + round) * 1024;
                            let data = [n; 1024];
                            backend.pwrite(co, offset, &data[..], PLAIN).unwrap();
                            let mut seen = [0; 1024];
                            backend.pread(co, offset, &mut seen[..]).unwrap();
                            assert_eq!(seen, data);
                        }
                        backend.flush(co).unwrap();
                        drop(backend);
                        left.fetch_sub(1, Ordering::Release);
                        home.notify();
                    })
                    .unwrap();
            }
        }
        while left.load(Ordering::Acquire) > 0 {
            world.home.poll(true);
        }
        assert_eq!(backend.in_flight(), 0);
        Mixed::new(&backend, &world.home).close().unwrap();
        for thread in threads {
            thread.stop();
        }
        drop(backend);
        world.end();
    }
}

fn io_thread(name: &str, engine: EngineKind) -> IoThread {
    let options = coblock_aio::ContextOptions {
        engine,
        ..coblock_aio::ContextOptions::named(name)
    };
    IoThread::new(options).unwrap()
}
