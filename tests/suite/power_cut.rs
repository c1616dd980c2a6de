//! Promise: the power may go at any write. Whatever part of the unflushed writes arrived, the image
//! then has no corruption (leaked clusters are allowed), and every sector reads as its last flushed
//! content or as something written to it since: never zeros again, never another sector's, never
//! half of one write. (Rule 9.3.)

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{BlockBackend, Explicit, Options, RequestFlags};
use coblock::qcow2::header::Incompatible;

use crate::support::load::Load;
use crate::support::model::{History, assert_same, stamp};
use crate::support::rng::Rng;
use crate::support::session::Session;
use crate::support::swarm::Params;
use crate::support::{crash, image, load, peer, play, sim, soundness};

/// Every so many states one is written to, and judged by the reference.
const SAMPLE: u64 = 401;

/// Name of the backing file, as the image has it.
const BACKING: &str = "base.raw";

/// What is cut.
struct Workload {
    name: &'static str,
    params: Params,
    /// Requests of a load before the one that is cut; all of it is durable.
    before: Option<Params>,
    backing: bool,
    snapshot: bool,
}

/// What came of it.
#[derive(Debug)]
struct Judged {
    cuts: usize,
    states: u64,
    refcount_blocks_added: u64,
    tables_grown: u64,
}

/// One image and what lies around it.
struct Bench {
    session: Session,
    base: Arc<SimDisk>,
    folder: tempfile::TempDir,
    /// What the snapshot holds.
    kept: Option<Vec<u8>>,
}

fn params(seed: u64, cluster_bits: u32, refcount_order: u32, size: u64) -> Params {
    Params {
        seed,
        version: 3,
        cluster_bits,
        refcount_order,
        size,
        unit: 512,
        max_len: 16 << 10,
        in_flight: 8,
        writes: 75,
        flushes: 15,
        zeros: 20,
        hot: 40,
        requests: 80,
        fill: 0,
        copies: 5,
        lazy: false,
        serial: false,
    }
}

impl Workload {
    fn new(name: &'static str, params: Params) -> Self {
        Workload {
            name,
            params,
            before: None,
            backing: false,
            snapshot: false,
        }
    }

    /// Runs it, then cuts the power at every entry of the log and judges every state.
    fn run(&self) -> Judged {
        let Params {
            seed, size, unit, ..
        } = self.params;
        let mut history = History::new(size, unit, seed);
        let mut base = vec![0; usize::try_from(size / 2).expect("a small disk")];
        if self.backing {
            stamp(&mut base, 0, unit, seed, 0);
            history.set_base(base.len() as u64);
        }
        let mut bench = Bench {
            session: sim::session(),
            base: SimDisk::with_contents(&base),
            folder: tempfile::tempdir().expect("a folder"),
            kept: None,
        };
        let mut disk = SimDisk::with_contents(&image::empty(
            &self.params.setting(),
            self.backing.then_some(BACKING),
        ));
        if let Some(before) = &self.before {
            let backend = bench.open(sim::image(&disk));
            history = load::run(&bench.session.home, &backend, &before.script(), history).history;
            bench.session.home.run(|co| {
                let began = history.begin_flush();
                backend.flush(co).expect("flush");
                history.end_flush(began, 0);
            });
            bench.session.close(backend);
        }
        if self.snapshot {
            disk = bench.with_snapshot(&disk);
        }
        disk.checkpoint();
        disk.delay(seed, Duration::from_micros(200));

        let mode = if self.params.serial {
            "serial"
        } else {
            "mutex"
        };
        let options = sim::image_with_smallest_caches(&disk).with("request-mode", mode);
        let backend = bench.open(options);
        let sent = disk.clone();
        let load = Load::new(&backend, &self.params.script(), history).log(move || sent.log_len());
        let mut loaded = load::run_load(&bench.session.home, load);
        loaded.backend = None;
        let stats = play::stats(&backend);
        bench.session.close(backend);

        let log = disk.log();
        let mut judged = Judged {
            cuts: 0,
            states: 0,
            refcount_blocks_added: stats.refcount_blocks_added,
            tables_grown: stats.tables_grown,
        };
        let mut rng = Rng::new(!seed);
        for at in 0..=log.len() {
            for keep in crash::choices(&disk, &log, at, &mut rng) {
                let left = disk.after_power_cut(at, &keep);
                judged.states += 1;
                let story = format!(
                    "{}: cut after {at} of {} entries, kept {keep:?}",
                    self.name,
                    log.len()
                );
                bench.judge(&left, &loaded.history, at, &story);
                if judged.states.is_multiple_of(SAMPLE) {
                    bench.go_on(&left, &self.params, &story);
                }
            }
            judged.cuts += 1;
        }
        bench.session.end();
        assert!(
            judged.cuts > 100,
            "{}: only {} cuts",
            self.name,
            judged.cuts
        );
        println!(
            "{}: {} cuts, {} states",
            self.name, judged.cuts, judged.states
        );
        judged
    }
}

impl Bench {
    fn open(&self, options: Options) -> Arc<BlockBackend> {
        let base = Options::new()
            .with("driver", "raw")
            .with("file.driver", "sim")
            .with_object("file.disk", self.base.clone());
        self.session
            .open(options, &Explicit::new().allow(BACKING, base))
            .expect("open")
    }

    /// What a power cut left: sound but for leaks, and every unit as the history allows.
    fn judge(&self, left: &Arc<SimDisk>, history: &History, at: usize, story: &str) {
        let dirty = soundness::header(left)
            .incompatible
            .contains(Incompatible::DIRTY);
        if !dirty {
            self.judge_soundness(left, story);
        }
        let backend = self.open(sim::image(left).with("read-only", "on"));
        let bytes = self
            .session
            .home
            .run(|co| load::read_size(co, &backend, 1 << 18, history.size()));
        self.session.close(backend);
        if let Err(violation) = history.after_power_cut(at, 0, &bytes) {
            self.fail(left, &format!("{story}: {violation}"));
        }
        if dirty {
            // What opening it for writing makes of it is sound, and reads the same.
            let repaired = SimDisk::with_contents(&left.contents());
            let backend = self.open(sim::image(&repaired));
            let again = self
                .session
                .home
                .run(|co| load::read_size(co, &backend, 1 << 18, history.size()));
            self.session.close(backend);
            assert_same(&format!("{story}: repaired"), &again, &bytes);
            self.judge_soundness(&repaired, &format!("{story}: repaired"));
        }
    }

    fn judge_soundness(&self, left: &Arc<SimDisk>, story: &str) {
        match soundness::check(&self.session, left) {
            Ok((0, _leaks)) => {}
            other => self.fail(left, &format!("{story}: corruptions and leaks {other:?}")),
        }
    }

    /// Leaves the image where somebody can look at it.
    fn fail(&self, left: &SimDisk, story: &str) -> ! {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("power-cut.qcow2");
        std::fs::write(&path, left.contents()).expect("a file below the target folder");
        panic!("{story}\nthe image is in {}", path.display());
    }

    /// The reference agrees, the snapshot is whole, and the image can be written to as if nothing
    /// had happened.
    fn go_on(&self, left: &Arc<SimDisk>, params: &Params, story: &str) {
        self.ask_the_reference(left, story);
        let mut history = History::new(params.size, 512, params.seed + 1);
        let backend = self.open(sim::image(left));
        self.session.home.run(|co| {
            let mut buf = vec![0; 1 << 16];
            for offset in (0..params.size).step_by(buf.len()) {
                let id = history.begin_write(offset, &mut buf, 0);
                backend
                    .pwrite(co, offset, &*buf, RequestFlags::empty())
                    .expect("write");
                history.end_write(id);
            }
            let token = history.begin_read();
            let bytes = load::read_size(co, &backend, 1 << 18, history.size());
            history
                .end_read(&token, 0, &bytes)
                .unwrap_or_else(|v| panic!("{story}, written to again: {v}"));
        });
        self.session.close(backend);
        self.ask_the_reference(left, &format!("{story}, written to again"));
    }

    fn ask_the_reference(&self, left: &Arc<SimDisk>, story: &str) {
        let dirty = soundness::header(left)
            .incompatible
            .contains(Incompatible::DIRTY);
        if !dirty {
            self.judge_soundness(left, story);
        }
        if !peer::present("power cuts") {
            return;
        }
        let path = self.folder.path().join("left.qcow2");
        std::fs::write(&path, left.contents()).expect("a file in our folder");
        if dirty {
            // The reference repairs it too.
            peer::qemu_img(&["check", "-q", "-r", "all", path.to_str().expect("text")]);
        }
        std::fs::write(self.folder.path().join(BACKING), self.base.contents())
            .expect("a file in our folder");
        assert_eq!(peer::check(&path).corruptions, 0, "{story}: qemu-img check");
        if let Some(kept) = &self.kept {
            let raw = path.with_extension("kept");
            let [from, to] = [&path, &raw].map(|p| p.to_str().expect("text"));
            peer::qemu_img(&[
                "convert",
                "-l",
                "snapshot.name=kept",
                "-f",
                "qcow2",
                "-O",
                "raw",
                from,
                to,
            ]);
            assert_same(
                &format!("{story}: the snapshot"),
                &std::fs::read(&raw).expect("written"),
                kept,
            );
        }
    }

    /// The same image with an internal snapshot of it, made by the reference.
    fn with_snapshot(&mut self, disk: &SimDisk) -> Arc<SimDisk> {
        let path = self.folder.path().join("snapshot.qcow2");
        std::fs::write(&path, disk.contents()).expect("a file in our folder");
        peer::qemu_img(&["snapshot", "-c", "kept", path.to_str().expect("text")]);
        self.kept = Some(peer::content("qcow2", &path));
        SimDisk::with_contents(&std::fs::read(&path).expect("it is ours"))
    }
}

/// New clusters in an empty image, with requests that meet in them.
#[test]
fn fresh_image() {
    Workload::new("fresh", params(1, 12, 4, 1 << 20)).run();
}

/// Small clusters and wide counts: refcount blocks are added all the time, and the refcount table
/// moves.
#[test]
fn growing_refcount_table() {
    let params = Params {
        requests: 60,
        hot: 0,
        zeros: 0,
        ..params(2, 9, 6, 3 << 20)
    };
    // 64 counts in a block and 64 blocks in the table: 2 MiB. What is before the cuts stops a
    // little short of that.
    let before = Params {
        requests: 4,
        fill: 1920 << 10,
        ..params.clone()
    };
    let judged = Workload {
        before: Some(before),
        ..Workload::new("growing", params)
    }
    .run();
    assert!(judged.refcount_blocks_added > 1, "{judged:?}");
    assert!(judged.tables_grown > 0, "{judged:?}");
}

/// Copies from a backing file that is half as long as the image.
#[test]
fn overlay() {
    Workload {
        backing: true,
        ..Workload::new("overlay", params(3, 13, 4, 1 << 20))
    }
    .run();
}

/// Clusters that a snapshot shares are copied, and the snapshot keeps what it had.
#[test]
fn image_with_snapshot() {
    if !peer::present("image_with_snapshot") {
        return;
    }
    let params = params(4, 12, 3, 1 << 20);
    let before = Params {
        requests: 120,
        flushes: 0,
        ..params.clone()
    };
    Workload {
        before: Some(before),
        snapshot: true,
        ..Workload::new("snapshot", params)
    }
    .run();
}

/// Requests that begin and end anywhere, on counts of one bit.
#[test]
fn ragged_requests() {
    let params = Params {
        unit: 16,
        max_len: 6 << 10,
        ..params(5, 9, 0, 1 << 20)
    };
    Workload::new("ragged", params).run();
}

/// Counts that stay in memory, and the dirty bit that says so: opening for writing counts anew.
#[test]
fn lazy_refcounts() {
    let params = Params {
        lazy: true,
        ..params(6, 12, 4, 1 << 20)
    };
    Workload::new("lazy", params).run();
}

/// The same with refcount blocks and tables that are added meanwhile.
#[test]
fn lazy_refcounts_growing() {
    let params = Params {
        lazy: true,
        requests: 40,
        hot: 0,
        zeros: 10,
        ..params(7, 9, 6, 3 << 20)
    };
    let before = Params {
        requests: 4,
        fill: 1920 << 10,
        ..params.clone()
    };
    Workload {
        before: Some(before),
        ..Workload::new("lazy, growing", params)
    }
    .run();
}

/// One request at a time.
#[test]
fn serial_mode() {
    let params = Params {
        serial: true,
        ..params(8, 12, 4, 1 << 20)
    };
    Workload::new("serial", params).run();
}
