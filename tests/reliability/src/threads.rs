//! Part: real threads. Four I/O threads send the operations of the script language to one image in a
//! real file, some of them through each other, while it is drained and throttled.
//!
//! Every sector says which write put it there. A sector has one writer, which sends one request at a
//! time, so two counters tell all readers what they may find, without a lock:
//!
//! ```text
//!   begun, ended    number of the last write that began, and that ended, on this sector
//!   a reader        looks at `ended`, reads, looks at `begun`: the sector is one of these
//! ```
//! Writers' sectors alternate in stripes that are shorter than a cluster (or longer, for discards), so
//! that threads meet in clusters, tables and refcount blocks. At the end the image checks clean, and
//! every sector is compared once more.

mod worker;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coblock::aio::co::sleep;
use coblock::aio::{AioContext, ContextOptions, EngineKind, IoThread};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock::block::{BlockBackend, LikeReference};
use coblock::coroutine::Co;

use super::judge::Verdict;
use super::model::{Content, content, stamp};
use super::part::{Figure, Part, Plan, Report};
use super::play::BACKING;
use super::script::Setting;
use super::session::{self, Session};
use super::{image, load, sim, soundness};
use worker::Worker;

/// This part.
pub const PART: Part = Part {
    name: "threads",
    promise: "four threads on one image in a real file, drained and throttled meanwhile: every sector of \
              every read is one that it may see, and the image is sound",
    run: |plan, report| run(plan, report),
};

const THREADS: usize = 4;

/// Requests in flight of each thread.
const WORKERS: usize = 8;

const SECTOR: usize = 512;

/// Longest request in bytes.
const LONGEST: usize = 32 << 10;

/// A run without any progress for so long hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// An image, and how it is shared.
struct Shape {
    name: &'static str,
    setting: Setting,
    /// Bytes in a row that have the same writer.
    stripe: usize,
    /// Bytes of the cache of L2 tables; 0: the default.
    l2_cache: u64,
}

fn shapes() -> [Shape; 2] {
    [
        Shape {
            name: "clusters of 64 KiB over a backing file",
            setting: Setting {
                seed: 1,
                cluster_bits: 16,
                size: 64 << 20,
                backing: 48 << 20,
                small_caches: false,
                ..Setting::default()
            },
            stripe: 4096,
            l2_cache: 0,
        },
        Shape {
            name: "clusters of 4 KiB, few tables in memory",
            setting: Setting {
                seed: 2,
                size: 32 << 20,
                ..Setting::default()
            },
            stripe: 16 << 10,
            l2_cache: 32 << 10,
        },
    ]
}

fn run(plan: &Plan, report: &mut Report) {
    let most: u64 = plan.scale.pick(200_000, 10_000_000, 100_000_000);
    let requests = if plan.quick { most / 10 } else { most };
    let shapes = shapes();
    for shape in &shapes {
        match run_shape(shape, requests.div_ceil(shapes.len() as u64)) {
            Ok(done) => {
                report.count(Figure::Requests, done.requests);
                report.say(format!("{}: {done}", shape.name));
            }
            Err(why) => report.fail("cargo xtask reliability --part threads", &why),
        }
    }
}

/// What was done.
struct Done {
    requests: u64,
    sectors: u64,
    racing: u64,
    drains: u64,
    moved: u64,
    engine: EngineKind,
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} requests of {THREADS} threads ({:?}), {} of them through another thread, {} drained \
             sections; {} sectors compared, {} of them while they were written",
            self.requests, self.engine, self.moved, self.drains, self.sectors, self.racing
        )
    }
}

/// What all workers share.
struct Shared {
    backend: Arc<BlockBackend>,
    contexts: Vec<Arc<AioContext>>,
    group: Arc<ThrottleGroup>,
    sectors: Vec<Sector>,
    setting: Setting,
    stripe: usize,
    /// Workers that have not ended.
    alive: AtomicUsize,
    /// Something is wrong: everybody stops.
    stop: AtomicBool,
    panicked: AtomicBool,
    wrong: Mutex<Option<String>>,
    requests: AtomicU64,
    compared: AtomicU64,
    racing: AtomicU64,
    drains: AtomicU64,
    moved: AtomicU64,
}

/// Numbers of writes: odd ones leave zeros; 0 is what was there before.
#[derive(Default)]
struct Sector {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// Sends about `requests` to an image of this shape.
fn run_shape(shape: &Shape, requests: u64) -> Verdict<Done> {
    let folder = session::folder();
    let path = folder.path().join("threads.qcow2");
    let setting = &shape.setting;
    let mut base = vec![0; usize::try_from(setting.backing).expect("small")];
    stamp(&mut base, 0, SECTOR, setting.seed, 0);
    let backing = (setting.backing > 0).then_some(BACKING);
    let put = |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).map_err(|e| e.to_string());
    put(&folder.path().join(BACKING), &base)?;
    put(&path, &image::empty(setting, backing))?;

    let engine = session::engine();
    let session = Session::new(engine);
    let mut options = session::image("qcow2", &path, false);
    if shape.l2_cache > 0 {
        options = options.with("l2-cache-size", shape.l2_cache.to_string());
    }
    let backend = session
        .open(options, &LikeReference::new())
        .map_err(|e| e.to_string())?;
    let done = send_all(&session, &backend, shape, requests)?;
    session.close(backend);
    session.end();
    let compared = compare_all(&path, shape, &done.1)?;
    let disk = SimDisk::with_contents(&std::fs::read(&path).map_err(|e| e.to_string())?);
    let session = sim::session();
    let sound = soundness::check(&session, &disk)?;
    session.end();
    match sound {
        (0, 0) => Ok(Done {
            sectors: done.0.sectors + compared,
            engine,
            ..done.0
        }),
        (corruptions, leaks) => Err(format!("{corruptions} corruptions, {leaks} leaks")),
    }
}

/// Starts threads and workers, and waits for them. Also gives what every sector was written by.
fn send_all(
    session: &Session,
    backend: &Arc<BlockBackend>,
    shape: &Shape,
    requests: u64,
) -> Verdict<(Done, Vec<u64>)> {
    let engine = session::engine();
    let threads: Vec<IoThread> = (0..THREADS)
        .map(|nth| {
            let options = ContextOptions {
                engine,
                ..ContextOptions::named(format!("queue-{nth}"))
            };
            IoThread::new(options).map_err(|e| e.to_string())
        })
        .collect::<Verdict<_>>()?;
    let clock = session.home.context().clock();
    let group = ThrottleGroup::new("threads", clock, ThrottleConfig::default());
    let group = group.map_err(|e| e.to_string())?;
    backend.set_throttle(Some(&group));
    let sectors = usize::try_from(shape.setting.size).expect("small") / SECTOR;
    let shared = session.home.run(|co| {
        let shared = Arc::new(Shared {
            backend: backend.clone(),
            contexts: threads.iter().map(|t| t.context().clone()).collect(),
            group,
            sectors: (0..sectors).map(|_| Sector::default()).collect(),
            setting: shape.setting.clone(),
            stripe: shape.stripe,
            alive: AtomicUsize::new(THREADS * WORKERS),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            wrong: Mutex::new(None),
            requests: AtomicU64::new(0),
            compared: AtomicU64::new(0),
            racing: AtomicU64::new(0),
            drains: AtomicU64::new(0),
            moved: AtomicU64::new(0),
        });
        for nth in 0..THREADS * WORKERS {
            let mut worker = Worker::new(shared.clone(), nth);
            let quota = requests.div_ceil((THREADS * WORKERS) as u64);
            shared.contexts[nth % THREADS]
                .spawn("worker", move |co| worker.work(co, quota))
                .expect("memory for a stack");
        }
        wait(co, &shared);
        shared
    });
    for thread in threads {
        // With the panic of the thread, if it had one.
        thread.stop();
    }
    let shared = Arc::into_inner(shared).ok_or("a worker has not ended")?;
    backend.set_throttle(None);
    if let Some(wrong) = shared.wrong.into_inner().expect("no panic under it") {
        return Err(wrong);
    }
    let numbers = shared
        .sectors
        .iter()
        .map(|s| s.ended.load(SeqCst))
        .collect();
    let done = Done {
        requests: shared.requests.load(SeqCst),
        sectors: shared.compared.load(SeqCst),
        racing: shared.racing.load(SeqCst),
        drains: shared.drains.load(SeqCst),
        moved: shared.moved.load(SeqCst),
        engine,
    };
    Ok((done, numbers))
}

/// Until every worker has ended, or a thread panics.
fn wait(co: &Co, shared: &Shared) {
    let step = Duration::from_millis(20);
    let (mut before, mut still) = (u64::MAX, Duration::ZERO);
    while shared.alive.load(SeqCst) > 0 && !shared.panicked.load(SeqCst) {
        sleep(co, step);
        let now = shared.requests.load(SeqCst);
        still = if now == before {
            still + step
        } else {
            Duration::ZERO
        };
        before = now;
        assert!(still < PATIENCE, "nothing goes on: {:?}", shared.contexts);
    }
}

/// Reads the whole image once more, by itself.
fn compare_all(path: &Path, shape: &Shape, numbers: &[u64]) -> Verdict<u64> {
    let session = Session::new(session::engine());
    let options = session::image("qcow2", path, false).with("read-only", "on");
    let backend = session
        .open(options, &LikeReference::new())
        .map_err(|e| e.to_string())?;
    let bytes = session.home.run(|co| load::read_all(co, &backend, 1 << 20));
    session.close(backend);
    session.end();
    for (sector, (&number, piece)) in numbers.iter().zip(bytes.chunks(SECTOR)).enumerate() {
        judge(&shape.setting, sector, piece, (number, number))
            .map_err(|why| format!("read back: {why}"))?;
    }
    Ok(numbers.len() as u64)
}

/// Is `piece` something that this sector may hold, if the last write that had ended is the first of
/// `between` and the last that had begun is the second?
fn judge(setting: &Setting, sector: usize, piece: &[u8], between: (u64, u64)) -> Verdict {
    let (oldest, newest) = between;
    let offset = (sector * SECTOR) as u64;
    let found = content(piece, offset, setting.seed, newest + 1);
    let base = offset < setting.backing;
    let fits = match found {
        Content::Stamp(0) => oldest == 0 && base,
        Content::Stamp(number) => number >= oldest && number & 1 == 0,
        Content::Zero => match oldest == newest {
            true if oldest == 0 => !base,
            true => oldest & 1 == 1,
            // Numbers of both kinds lie between.
            false => true,
        },
        // On the page cache a reader may see half of a write, while that goes on.
        Content::Foreign => oldest != newest,
    };
    match fits {
        true => Ok(()),
        false => Err(format!(
            "sector {sector}: found {found:?}, may be {oldest}..={newest}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The judge of sectors tells each kind of wrong one from each right one.
    #[test]
    fn wrong_sectors_are_told() {
        let setting = Setting {
            seed: 3,
            backing: 512,
            ..Setting::default()
        };
        let sector = |place: usize, number: u64| {
            let mut piece = vec![0; SECTOR];
            if number != 1 {
                let offset = (place * SECTOR) as u64;
                stamp(&mut piece, offset, SECTOR, setting.seed, number);
            }
            piece
        };
        for (name, place, number, between, fits) in [
            ("what was there", 0, 0, (0, 0), true),
            ("nothing was there", 1, 0, (0, 0), false),
            ("lost: the backing file shows", 0, 0, (4, 4), false),
            ("the last write", 5, 4, (4, 4), true),
            ("the one before", 5, 2, (4, 4), false),
            ("one that goes on", 5, 6, (4, 6), true),
            ("one that has not begun", 5, 6, (4, 4), false),
            ("zeros", 5, 1, (5, 5), true),
            ("no zeros", 5, 1, (4, 4), false),
        ] {
            let judged = judge(&setting, place, &sector(place, number), between);
            assert_eq!(judged.is_ok(), fits, "{name}: {judged:?}");
        }
        let moved = judge(&setting, 6, &sector(5, 4), (4, 4));
        assert!(moved.is_err(), "another sector's content");
    }
}
