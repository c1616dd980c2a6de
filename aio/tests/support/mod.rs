//! What the tests of this crate share.
#![allow(dead_code)] // Each test program uses a part of it.

use coblock_aio::{ContextOptions, EngineKind, Home, RingDelivery};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Options with the engine of this name.
pub fn options(engine: &str) -> ContextOptions {
    let engine = engine.parse::<EngineKind>().unwrap();
    ContextOptions {
        engine,
        ..ContextOptions::named("test")
    }
}

/// A home with a ring, unless the kernel has none, which is said aloud.
pub fn ring(depth: u32) -> Option<Home> {
    let made = Home::new(ContextOptions {
        ring_depth: depth,
        ..options("io_uring")
    });
    made.inspect_err(|why| println!("skipped: no io_uring: {why}"))
        .ok()
}

/// A home with this engine that watches with poll(2).
fn with_poll(engine: &str) -> Option<Home> {
    let monitor = coblock_aio::MonitorKind::Poll;
    let options = ContextOptions {
        ring_depth: 64,
        monitor,
        ..options(engine)
    };
    let home = Home::new(options).ok()?;
    assert_eq!(home.context().monitor_name(), "poll");
    Some(home)
}

/// A home with a ring as an older kernel has it.
fn older_ring(ring_delivery: RingDelivery) -> Option<Home> {
    let options = ContextOptions {
        ring_depth: 64,
        ring_delivery,
        ..options("io_uring")
    };
    Home::new(options).ok()
}

/// Runs a test with each engine that this machine has, its fallbacks, and each way of watching
/// descriptors, on a home of its own, and closes it.
pub fn each_engine(test: impl Fn(&Home, &str)) {
    let threads = Home::new(options("threads")).unwrap();
    let homes = [
        Some(threads),
        ring(64),
        older_ring(RingDelivery::Cooperative),
        older_ring(RingDelivery::Interrupting),
        with_poll("threads"),
        with_poll("io_uring"),
    ];
    for home in homes.into_iter().flatten() {
        assert_eq!(home.context().live_coroutines(), 0);
        test(&home, home.context().engine_name());
        home.close();
    }
}

/// How a test drives a home: by its own poll, or as a foreign loop with poll(2) would.
pub struct Drive<'a> {
    home: &'a Home,
    foreign: bool,
}

impl Drive<'_> {
    /// One pass.
    pub fn poll(&self, blocking: bool) -> bool {
        if !self.foreign {
            return self.home.poll(blocking);
        }
        let timeout = self.home.timeout_ns();
        if !blocking {
            return self.home.dispatch();
        }
        if self.home.context().monitor_name() == "poll" {
            let mut list = self.home.descriptors();
            coblock_aio::sys::event::poll_all(&mut list, timeout).unwrap();
        } else {
            coblock_aio::sys::event::poll_readable(self.home.fd(), timeout).unwrap();
        }
        self.home.dispatch()
    }
}

impl std::fmt::Debug for Drive<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.foreign {
            "foreign loop"
        } else {
            "own poll"
        };
        let context = self.home.context();
        let (engine, monitor) = (context.engine_name(), context.monitor_name());
        write!(f, "{engine}, {monitor}, {how}")
    }
}

/// Runs a test with each engine, by its own poll and in a foreign loop.
pub fn each_drive(test: impl Fn(&Home, &Drive<'_>)) {
    for foreign in [false, true] {
        each_engine(|home, _| test(home, &Drive { home, foreign }));
    }
}

/// Nothing is left to do.
#[track_caller]
pub fn quiet(drive: &Drive<'_>) {
    assert!(!drive.poll(false), "{drive:?}: something was left to do");
}

/// Something that callbacks count and tests read.
#[derive(Clone, Default, Debug)]
pub struct Count(Arc<AtomicUsize>);

impl Count {
    /// One more; tells how many now.
    pub fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// How many.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// What happened, in order.
#[derive(Clone, Default, Debug)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    /// Appends.
    pub fn say(&self, word: impl Into<String>) {
        self.0.lock().unwrap().push(word.into());
    }

    /// All of it; empty afterwards.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        })
        .collect()
}

/// A file for one test, gone afterwards.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Scratch {
    fn in_dir(dir: &str, name: &str) -> Option<Self> {
        let dir = tempfile::Builder::new()
            .prefix("coblock-aio")
            .tempdir_in(dir)
            .ok()?;
        Some(Scratch {
            path: dir.path().join(name),
            _dir: dir,
        })
    }

    /// On whatever the build directory lies on: a disk, mostly.
    pub fn on_disk(name: &str) -> Self {
        Self::in_dir(env!("CARGO_TARGET_TMPDIR"), name).expect("the build directory can be written")
    }

    /// On disk, and in memory where the machine has that.
    pub fn all(name: &str) -> Vec<Self> {
        let disk = Self::on_disk(name);
        [Some(disk), Self::in_dir("/dev/shm", name)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// An empty file.
    pub fn create(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&self.path)
            .unwrap()
    }

    /// An empty file, opened for reading only.
    pub fn create_read_only(&self) -> File {
        drop(self.create());
        File::open(&self.path).unwrap()
    }

    /// An empty file for direct I/O, where the file system has that.
    pub fn create_direct(&self) -> Option<File> {
        drop(self.create());
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        options.open(&self.path).ok()
    }
}
