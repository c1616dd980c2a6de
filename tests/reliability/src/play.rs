//! A script on a simulated disk, from the empty image to the closed one.
//!
//! ```text
//!   Stage    the disk, the backing file, the options         what a script's setting says
//!   play     open, send all requests, close                  with what the caller wants to watch or break
//!   Played   the disk's log, the history, what was counted   for the oracles
//! ```

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use coblock::block::drivers::sim::{LogEntry, SimDisk};
use coblock::block::{self, BlockBackend, Explicit, Node, Options};
use coblock::coroutine::Co;
use coblock::qcow2::{Qcow2, Qcow2Stats};

use super::judge::Verdict;
use super::layers::{self, Overlays};
use super::load::{Effect, Ended, Load, Loaded};
use super::model::{History, stamp};
use super::request::LIMITS;
use super::script::{Script, Setting};
use super::sim::{self, Simulation};
use super::{compressed, image, kept};

/// Name of the backing file, as the image has it.
pub const BACKING: &str = "base.raw";

/// One image on a simulated disk, and what lies below it.
#[derive(Clone)]
pub struct Stage {
    pub setting: Setting,
    pub disk: Arc<SimDisk>,
    /// What snapshots put above it.
    pub overlays: Overlays,
    /// The backing file; empty where there is none.
    pub base: Arc<SimDisk>,
    /// What the internal snapshot owns of the image.
    pub kept: Arc<kept::Snapshot>,
    /// Compare counts with references after each request.
    pub audit: bool,
}

impl Stage {
    /// The image that `setting` describes; its disk answers at once.
    pub fn new(setting: &Setting) -> Self {
        let mut base = vec![0; usize::try_from(setting.backing).expect("a small disk")];
        stamp(&mut base, 0, setting.unit, setting.seed, 0);
        let backing = (setting.backing > 0).then_some(BACKING);
        let mut image = image::empty(setting, backing);
        compressed::add(&mut image, setting);
        let kept = Arc::new(kept::add(&mut image, setting));
        Stage {
            setting: setting.clone(),
            disk: SimDisk::with_contents(&image),
            overlays: Overlays::default(),
            base: SimDisk::with_contents(&base),
            kept,
            audit: true,
        }
    }

    /// The same with other images, the lowest first.
    pub fn of(&self, layers: &[Arc<SimDisk>]) -> Self {
        let (disk, above) = layers.split_first().expect("there is one");
        Stage {
            disk: disk.clone(),
            overlays: Overlays::of(above),
            ..self.clone()
        }
    }

    /// The disks of all images, the lowest first.
    pub fn layers(&self) -> Vec<Arc<SimDisk>> {
        let mut layers = vec![self.disk.clone()];
        layers.extend(self.overlays.disks());
        layers
    }

    /// The one that is written to.
    pub fn top(&self) -> Arc<SimDisk> {
        self.overlays.disks().pop().unwrap_or(self.disk.clone())
    }

    /// An empty image of `len` bytes for a snapshot, and how it is opened.
    pub fn overlay(&self, len: u64) -> (Arc<SimDisk>, Options) {
        let layer = self.overlays.count() + 1;
        let setting = Setting {
            version: 3,
            size: len,
            lazy: false,
            zstd: false,
            kept: 0,
            ..self.setting.clone()
        };
        let below = layers::file_name(layer - 1);
        let disk = SimDisk::with_contents(&image::empty(&setting, Some(&below)));
        self.overlays.number(&disk);
        disk.delay(self.setting.seed + layer as u64, self.most_delay());
        let options = self.layer(&disk, layer);
        (disk, options)
    }

    /// What the disk may hold at first.
    pub fn history(&self) -> History {
        let Setting {
            size,
            unit,
            seed,
            backing,
            ..
        } = self.setting;
        let mut history = History::new(size, unit, seed);
        history.set_base(backing);
        let plain = kept::clusters(&self.setting);
        for cluster in compressed::clusters(&self.setting).iter().chain(&plain) {
            history.set_initial(cluster.offset, &cluster.content);
        }
        history
    }

    /// Is the internal snapshot that the image began with as it was?
    ///
    /// # Errors
    /// Where it is not.
    pub fn snapshot_is_whole(&self) -> Verdict {
        self.kept.is_whole(&self.disk)
    }

    /// From now on the disk answers late and in any order, as the setting says.
    pub fn delay(&self) {
        self.disk.delay(self.setting.seed, self.most_delay());
    }

    fn most_delay(&self) -> Duration {
        Duration::from_micros(self.setting.delay_us)
    }

    /// How the setting opens image `layer`.
    fn layer(&self, disk: &Arc<SimDisk>, layer: usize) -> Options {
        let setting = &self.setting;
        let options = if setting.small_caches {
            sim::image_with_smallest_caches(disk)
        } else {
            sim::image(disk)
        };
        let word = |on: bool, [yes, no]: [&'static str; 2]| if on { yes } else { no };
        options
            .with("node-name", self.overlays.node_name(layer))
            .with("request-mode", word(setting.serial, ["serial", "mutex"]))
            .with(
                "discard",
                word(setting.ignore_discards, ["ignore", "unmap"]),
            )
    }

    /// How the setting opens the disk.
    pub fn options(&self) -> Options {
        let setting = &self.setting;
        let mut options = self.layer(&self.top(), self.overlays.count());
        let mut put_above = |filter: Options| {
            let image = std::mem::replace(&mut options, filter);
            options.nest("file", image);
        };
        if setting.copy_on_read {
            put_above(Options::new().with("driver", "copy-on-read"));
        }
        if setting.throttle_node {
            let filter = Options::new().with("driver", "throttle");
            put_above(filter.with("throttle-group", LIMITS));
        }
        options
    }

    /// Lets images have the backing files that they name.
    pub fn gate(&self) -> Explicit {
        let base = Options::new()
            .with("driver", "raw")
            .with("file.driver", "sim")
            .with_object("file.disk", self.base.clone());
        let mut gate = Explicit::new().allow(BACKING, base);
        for (nth, disk) in self.layers().iter().enumerate() {
            gate = gate.allow(&layers::file_name(nth), self.layer(disk, nth));
        }
        gate
    }

    /// Opens it again and again.
    pub fn opener(
        &self,
        sim: &Simulation,
    ) -> impl Fn(&Co) -> block::Result<Arc<BlockBackend>> + 'static {
        let (stage, graph, registry) = (self.clone(), sim.graph.clone(), sim.registry.clone());
        move |co| {
            stage.overlays.open();
            let gate = stage.gate();
            let node = block::open(co, &graph, &registry, &gate, stage.options())?;
            Ok(Arc::new(BlockBackend::new(&graph, node)))
        }
    }
}

/// What came of a script.
pub struct Played {
    pub stage: Stage,
    pub history: History,
    /// What a flush after the last request said.
    pub flushed: block::Result<()>,
    /// What closing the image said.
    pub closed: block::Result<()>,
    /// Requests that failed, and that were sent.
    pub errors: usize,
    pub requests: usize,
    /// Most requests in flight at once.
    pub peak: usize,
    /// Length of the log at the last `mark`.
    pub mark: usize,
    /// What the driver counted since the image was opened last.
    pub stats: Qcow2Stats,
    /// How often counts were compared with references.
    pub audits: u64,
    /// Everything that each disk was sent, in order.
    pub log: Vec<LogEntry>,
    /// Virtual time that it took.
    pub now_ns: u64,
    /// Mechanisms that had an effect.
    pub effects: BTreeSet<Effect>,
}

/// Plays `script` on a fresh stage; nothing may fail.
pub fn play(script: &Script) -> Played {
    let played = play_with(script, |_, load| load);
    for (what, result) in [("flush", &played.flushed), ("close", &played.closed)] {
        if let Err(error) = result {
            panic!("seed {}: {what}: {error}", script.setting.seed);
        }
    }
    played
}

/// The same; `prepare` breaks the disk or tells the load what to watch, once the image is open.
pub fn play_with(script: &Script, prepare: impl FnOnce(&Stage, Load) -> Load) -> Played {
    let stage = Stage::new(&script.setting);
    let history = stage.history();
    play_on(stage, history, script, prepare)
}

/// The same on a stage that holds what `history` says.
pub fn play_on(
    stage: Stage,
    mut history: History,
    script: &Script,
    prepare: impl FnOnce(&Stage, Load) -> Load,
) -> Played {
    let setting = &script.setting;
    history.set_layered(script.ops.iter().any(|op| op.is_snapshot()));
    stage.delay();
    stage.overlays.begin(&stage.disk);
    let sim = Simulation::new(setting.seed, setting.queues);
    if setting.throttle_node {
        sim.add_limits(LIMITS);
    }
    let open = Rc::new(stage.opener(&sim));
    let first = open.clone();
    let backend = sim
        .run(move |co| first(co))
        .unwrap_or_else(|e| panic!("seed {}: open: {e}", setting.seed));
    let audits = Rc::new(Cell::new(0));
    let load = Load::new(&backend, script, history)
        .watch(auditor(&stage, audits.clone()))
        .stage(&stage)
        .reopen(move |co| open(co));
    drop(backend);
    let load = prepare(&stage, load);
    load.start(&sim.homes());
    sim.run_until(|| load.is_done());
    let Loaded {
        backend,
        errors,
        requests,
        mut history,
        peak,
        mark,
        mut effects,
    } = load.end();
    let backend = backend.expect("the last one that was opened");
    let stats = stats(&backend);
    let began = history.begin_flush();
    let last = backend.clone();
    let flushed = sim.run(move |co| last.flush(co));
    if flushed.is_ok() {
        history.end_flush(began, stage.overlays.log_len());
    }
    let closed = sim.run(move |co| backend.close(co));
    let now_ns = sim.now_ns();
    sim.end();
    let in_flight: usize = stage.layers().iter().map(|disk| disk.in_flight()).sum();
    assert_eq!(in_flight, 0, "requests that outlive their run");
    let hits = stage.disk.take_hits();
    if !hits.is_empty() {
        effects.insert(Effect::Fault);
    }
    stage.disk.put_hits(hits);
    Played {
        audits: audits.get(),
        log: layers::log(&stage.layers()),
        stage,
        history,
        flushed,
        closed,
        errors,
        requests,
        peak,
        mark,
        stats,
        now_ns,
        effects,
    }
}

/// Compares counts with references where no change of metadata is under way, and counts how often.
/// (R7.)
fn auditor(stage: &Stage, audits: Rc<Cell<u64>>) -> impl Fn(&Ended<'_>) + 'static {
    let (stage, seed) = (stage.clone(), stage.setting.seed);
    move |ended| {
        if !stage.audit {
            return;
        }
        for (nth, disk) in stage.layers().iter().enumerate() {
            let peek =
                |offset: u64, into: &mut [u8]| into.copy_from_slice(&disk.peek(offset, into.len()));
            let node = ended
                .backend
                .graph()
                .find_node(&stage.overlays.node_name(nth));
            let audited =
                node.and_then(|node| of_node(&node, |image| image.audit(ended.co, &peek)));
            match audited.flatten() {
                None => {}
                Some(Ok(_)) => audits.set(audits.get() + 1),
                Some(Err(why)) => panic!("seed {seed}: after {}: {}: {why}", ended.index, ended.op),
            }
        }
    }
}

/// What the qcow2 driver of a disk counted.
pub fn stats(backend: &BlockBackend) -> Qcow2Stats {
    with_image(backend, Qcow2::stats).unwrap_or_default()
}

/// Calls `f` with the driver of the disk's first image, below any filters; unless that is closed.
fn with_image<R>(backend: &BlockBackend, f: impl FnOnce(&Qcow2) -> R) -> Option<R> {
    let graph = backend.graph();
    let names = graph.node_names();
    let mut nodes = names.iter().filter_map(|name| graph.find_node(name));
    let node = nodes.find(|node| node.format() == "qcow2");
    of_node(node.as_ref()?, f)
}

/// Calls `f` with the driver of an image; unless that is closed.
fn of_node<R>(node: &Node, f: impl FnOnce(&Qcow2) -> R) -> Option<R> {
    let driver = node.driver();
    let driver = driver.as_any();
    driver.and_then(|any| any.downcast_ref()).map(f)
}
