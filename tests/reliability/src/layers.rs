//! The images of a disk, one above the other: the one that a run began with, and what snapshots put
//! above it. Each lies on a simulated disk of its own; one order numbers what all of them are sent, so
//! that a power cut meets them at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coblock::block::drivers::sim::{Counts, Keep, LogEntry, PowerCuts, SimDisk};
use coblock::coroutine::ThreadLock;

use super::crash;
use super::play::Stage;
use super::rng::{Rng, mix};

/// Name of image `layer` in the header of the one above it.
pub fn file_name(layer: usize) -> String {
    format!("layer-{layer}.qcow2")
}

/// An image that became the disk's while a run went on.
#[derive(Clone)]
struct Overlay {
    disk: Arc<SimDisk>,
    /// Entries that all logs had then.
    from: usize,
}

/// What snapshots put above the first image. Copies are the same list.
#[derive(Clone, Default)]
pub struct Overlays {
    list: Arc<ThreadLock<Vec<Overlay>>>,
    order: Arc<AtomicU64>,
    /// How often the images were opened.
    openings: Arc<AtomicU64>,
}

impl Overlays {
    /// The images are opened once more: nodes of before may live a little longer, with their names.
    pub fn open(&self) {
        self.openings.fetch_add(1, Ordering::Relaxed);
    }

    /// Name of image `layer` in the graph.
    pub fn node_name(&self, layer: usize) -> String {
        format!("layer-{layer}-{}", self.openings.load(Ordering::Relaxed))
    }

    /// Those of a state that a power cut left, the lowest first.
    pub fn of(disks: &[Arc<SimDisk>]) -> Self {
        let overlays = Overlays::default();
        disks.iter().for_each(|disk| overlays.push(disk.clone()));
        overlays
    }

    /// Numbers what `first` is sent.
    pub fn begin(&self, first: &SimDisk) {
        self.order.store(first.log_len() as u64, Ordering::Relaxed);
        first.number_by(&self.order);
    }

    /// Numbers what `next` is sent, which may become the disk's image.
    pub fn number(&self, next: &SimDisk) {
        next.number_by(&self.order);
    }

    /// From now on this is the disk's image.
    pub fn push(&self, disk: Arc<SimDisk>) {
        let from = self.log_len();
        self.list.lock().push(Overlay { disk, from });
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list.lock().len()
    }

    /// Their disks, the lowest first.
    pub fn disks(&self) -> Vec<Arc<SimDisk>> {
        let list = self.list.lock();
        list.iter().map(|overlay| overlay.disk.clone()).collect()
    }

    /// Entries that all logs have.
    pub fn log_len(&self) -> usize {
        usize::try_from(self.order.load(Ordering::Relaxed)).expect("a short log")
    }
}

/// Requests that the disks were sent.
pub fn asked(disks: &[Arc<SimDisk>]) -> u64 {
    let sum = |counts: Counts| {
        counts.reads + counts.writes + counts.flushes + counts.zeroes + counts.discards
    };
    disks.iter().map(|disk| sum(disk.counts())).sum()
}

/// What all of them were sent.
pub fn log(disks: &[Arc<SimDisk>]) -> Vec<LogEntry> {
    disks.iter().flat_map(|disk| disk.log()).collect()
}

/// Power cuts of all images at once.
pub struct Cuts {
    stage: Stage,
    layers: Vec<Layer>,
    /// Entries that all logs have.
    len: usize,
    at: usize,
}

struct Layer {
    cuts: PowerCuts,
    numbers: Vec<u64>,
    from: usize,
}

impl Layer {
    /// Entries of its own log among the first `at` of all.
    fn place(&self, at: usize) -> usize {
        self.numbers.partition_point(|number| *number < at as u64)
    }
}

impl Cuts {
    /// Of a run on `stage`.
    pub fn new(stage: &Stage) -> Self {
        let layer = |disk: &SimDisk, from| Layer {
            cuts: disk.power_cuts(),
            numbers: disk.numbers(),
            from,
        };
        let mut layers = vec![layer(&stage.disk, 0)];
        let overlays = stage.overlays.list.lock();
        layers.extend(overlays.iter().map(|one| layer(&one.disk, one.from)));
        Cuts {
            len: layers.iter().map(|layer| layer.numbers.len()).sum(),
            stage: stage.clone(),
            layers,
            at: 0,
        }
    }

    /// Entries of all logs.
    pub fn log_len(&self) -> usize {
        self.len
    }

    /// Goes on to the place after the first `at` entries.
    pub fn go_to(&mut self, at: usize) {
        self.at = at;
        for layer in &mut self.layers {
            let place = layer.place(at);
            layer.cuts.go_to(place);
        }
    }

    /// Images that the disk consisted of.
    fn live(&self) -> &[Layer] {
        let live = self.layers.iter().filter(|layer| layer.from <= self.at);
        &self.layers[..live.count()]
    }

    /// What may have arrived at the newest of them.
    pub fn choices(&self, rng: &mut Rng) -> Vec<Keep> {
        let top = self.live().last().expect("there is one");
        crash::choices(&top.cuts, top.place(self.at), rng)
    }

    /// What is left, and a digest of it. Of the lower images everything survives, or nothing, or as
    /// the same seed says.
    pub fn left(&self, keep: &Keep) -> (Stage, u64) {
        let below = match keep {
            Keep::AllBut(_) | Keep::Torn(_) => &Keep::Everything,
            Keep::Nothing | Keep::Everything | Keep::Seed(_) => keep,
        };
        let (top, lower) = self.live().split_last().expect("there is one");
        let (disk, mut digest) = top.cuts.left(keep);
        let mut disks = Vec::new();
        for layer in lower {
            let (disk, its) = layer.cuts.left(below);
            digest = mix(digest ^ its.rotate_left(32));
            disks.push(disk);
        }
        disks.push(disk);
        (self.stage.of(&disks), digest)
    }
}
