//! Runs on the simulated disk: virtual time, one thread, and an order that the seed decides.

use std::sync::Arc;
use std::time::Duration;

use coblock::aio::{AioContext, Clock, ContextOptions, EngineKind, Park, VirtualClock};
use coblock::block::drivers::sim::{LogEntry, SimDisk};
use coblock::block::{BlockBackend, DenyAll, Options};
use coblock::qcow2::{CacheSizes, Qcow2, Qcow2Stats};

use super::image;
use super::load;
use super::model::History;
use super::script::Params;
use super::session::Session;

/// Nothing is waited for: time jumps to the next timer. Where there is none, nothing will ever
/// happen again.
struct Jump(VirtualClock);

impl Park for Jump {
    fn park(&self, context: &Arc<AioContext>, deadline_ns: Option<u64>) {
        match deadline_ns {
            Some(at) => self.0.advance_to(at),
            None => panic!("the simulation stands still: {context:?}"),
        }
    }
}

/// A session in virtual time.
pub fn session() -> Session {
    let clock = VirtualClock::new();
    Session::with(ContextOptions {
        engine: EngineKind::None,
        park: Some(Arc::new(Jump(clock.clone()))),
        clock: Clock::Virtual(clock),
        ..ContextOptions::named("simulation")
    })
}

/// Options of a qcow2 image on a simulated disk.
pub fn image(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "qcow2")
        .with("discard", "unmap")
        .with("file.driver", "sim")
        .with_object("file.disk", disk.clone())
}

/// The same with the smallest legal caches.
pub fn image_with_smallest_caches(disk: &Arc<SimDisk>) -> Options {
    let caches = CacheSizes::smallest_for(super::soundness::header(disk).geometry);
    image(disk)
        .with("l2-cache-size", caches.l2.to_string())
        .with("refcount-cache-size", caches.refcounts.to_string())
}

/// What the qcow2 driver of a disk counted.
pub fn stats(backend: &BlockBackend) -> Qcow2Stats {
    let driver = backend
        .node()
        .driver()
        .as_any()
        .expect("qcow2 shows itself");
    driver
        .downcast_ref::<Qcow2>()
        .expect("a qcow2 node")
        .stats()
}

/// What a run has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub peak: usize,
    pub stats: Qcow2Stats,
    /// Everything that the disk was sent, in order: two runs of one seed must agree.
    pub log: Vec<LogEntry>,
    /// Virtual time that it took.
    pub now_ns: u64,
    pub contents: Vec<u8>,
}

/// One run of the swarm, judged against the model: every read as it returns, and the whole disk
/// after a reopen.
pub fn run(params: &Params) -> Seen {
    let seed = params.seed;
    let session = session();
    let disk = SimDisk::with_contents(&image::empty(params, None));
    disk.delay(seed, Duration::from_micros(200));
    let mode = if params.serial { "serial" } else { "mutex" };
    let options = image_with_smallest_caches(&disk).with("request-mode", mode);
    let backend = session
        .open(options, &DenyAll)
        .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let history = History::new(params.size, params.unit, seed);
    let mut loaded = load::run(&session.home, &backend, params, history, || 0);
    let stats = stats(&backend);
    session.close(backend);
    let now_ns = session.home.context().now_ns();
    let log = disk.log();

    assert_eq!(
        super::soundness::check(&session, &disk),
        Ok((0, 0)),
        "seed {seed}: corruptions and leaks"
    );
    disk.delay(0, Duration::ZERO);
    let backend = session
        .open(image(&disk).with("read-only", "on"), &DenyAll)
        .expect("reopen");
    let bytes = session
        .home
        .run(|co| load::read_size(co, &backend, 1 << 20, params.size));
    session.close(backend);
    session.end();
    let token = loaded.history.begin_read();
    let judged = loaded.history.end_read(&token, 0, &bytes);
    judged.unwrap_or_else(|v| panic!("seed {seed}, after reopening: {v}"));
    Seen {
        peak: loaded.peak,
        stats,
        log,
        now_ns,
        contents: disk.contents(),
    }
}
