//! Promise: what we wrote with 64 requests in flight, many of them overlapping, is sound in the
//! eyes of `qemu-img check` (no error, no leak), and `qemu-img convert` finds in it what the model
//! allows and what we read back ourselves. With both engines, buffered and direct.

use std::path::{Path, PathBuf};

use coblock::aio::EngineKind;
use coblock::block::{LikeReference, RequestFlags};

use crate::support::model::{History, assert_same, stamp};
use crate::support::session::{self, Session};
use crate::support::swarm::Params;
use crate::support::{files, peer};

/// One kind of image.
#[derive(Clone, Copy, Debug)]
struct Kind {
    seed: u64,
    version: u8,
    cluster_bits: u32,
    refcount_order: u32,
    /// Bytes of a unit: 16 makes requests ragged.
    unit: usize,
}

impl Kind {
    fn params(self) -> Params {
        let cluster = 1u64 << self.cluster_bits;
        Params {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            size: (cluster * 40).clamp(2 << 20, 16 << 20),
            unit: self.unit,
            max_len: (2 * cluster).clamp(8192, 256 << 10),
            in_flight: 64,
            writes: 70,
            flushes: 2,
            zeros: 10,
            hot: 40,
            requests: 600,
            ..Params::draw(self.seed)
        }
    }

    fn name(self) -> String {
        format!(
            "v{}-c{}-r{}",
            self.version,
            1 << self.cluster_bits,
            1 << self.refcount_order
        )
    }
}

const KINDS: [Kind; 8] = [
    Kind {
        seed: 1,
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        unit: 512,
    },
    Kind {
        seed: 2,
        version: 2,
        cluster_bits: 16,
        refcount_order: 4,
        unit: 16,
    },
    Kind {
        seed: 3,
        version: 3,
        cluster_bits: 9,
        refcount_order: 0,
        unit: 512,
    },
    Kind {
        seed: 4,
        version: 3,
        cluster_bits: 9,
        refcount_order: 6,
        unit: 16,
    },
    Kind {
        seed: 5,
        version: 3,
        cluster_bits: 12,
        refcount_order: 1,
        unit: 512,
    },
    Kind {
        seed: 6,
        version: 2,
        cluster_bits: 12,
        refcount_order: 4,
        unit: 512,
    },
    Kind {
        seed: 7,
        version: 3,
        cluster_bits: 21,
        refcount_order: 3,
        unit: 16,
    },
    Kind {
        seed: 8,
        version: 3,
        cluster_bits: 10,
        refcount_order: 5,
        unit: 512,
    },
];

/// Makes an empty image of `kind` with `qemu-img`, so that this promise is about writing, not about
/// creating.
fn create(folder: &Path, kind: Kind, backing: Option<&Path>) -> PathBuf {
    let path = folder.join(format!("{}.qcow2", kind.name()));
    let compat = if kind.version == 2 { "0.10" } else { "1.1" };
    let options = format!(
        "compat={compat},cluster_size={},refcount_bits={}",
        1u64 << kind.cluster_bits,
        1u64 << kind.refcount_order
    );
    let size = kind.params().size.to_string();
    let mut words = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some(backing) = backing {
        words.extend(["-F", "raw", "-b", backing.to_str().expect("text")]);
    }
    words.extend([path.to_str().expect("text"), &size]);
    peer::qemu_img(&words);
    path
}

/// Loads the image at `path` through us and lets the reference judge it.
fn load_and_judge(
    path: &Path,
    name: &str,
    params: &Params,
    history: History,
    engine: EngineKind,
    direct: bool,
) {
    let ours = files::load_and_judge(path, name, params, history, engine, direct);
    assert_eq!(
        peer::check(path),
        peer::Check::default(),
        "{name}: qemu-img check"
    );
    assert_same(
        &format!("{name}, through qemu-img"),
        &peer::content("qcow2", path),
        &ours,
    );
}

/// Every kind of image, with each engine, through the page cache and past it.
#[test]
fn loaded_images_are_sound() {
    if !peer::present("loaded_images_are_sound") {
        return;
    }
    let folder = session::folder();
    for kind in KINDS {
        for engine in session::engines() {
            for direct in [false, true] {
                let path = create(folder.path(), kind, None);
                let params = kind.params();
                let history = History::new(params.size, params.unit, params.seed);
                let name = format!("{} {engine:?} direct {direct}", kind.name());
                load_and_judge(&path, &name, &params, history, engine, direct);
            }
        }
    }
}

/// Copy on write from a backing file that is half as long: what is not written keeps its content,
/// the rest is zeros.
#[test]
fn loaded_overlays_keep_their_backing() {
    if !peer::present("loaded_overlays_keep_their_backing") {
        return;
    }
    let folder = session::folder();
    for kind in [KINDS[0], KINDS[3], KINDS[5]] {
        let params = kind.params();
        let len = params.size / 2;
        let mut bytes = vec![0; usize::try_from(len).expect("a small disk")];
        stamp(&mut bytes, 0, params.unit, params.seed, 0);
        let base = folder.path().join(format!("{}-base.raw", kind.name()));
        std::fs::write(&base, &bytes).expect("a file in our folder");
        for direct in [false, true] {
            let path = create(folder.path(), kind, Some(&base));
            let mut history = History::new(params.size, params.unit, params.seed);
            history.set_base(len);
            let name = format!("overlay {} direct {direct}", kind.name());
            load_and_judge(&path, &name, &params, history, session::engine(), direct);
            assert_same(
                "the backing file",
                &std::fs::read(&base).expect("it is ours"),
                &bytes,
            );
        }
    }
}

/// Clusters that a snapshot shares are copied, never written: the snapshot still reads as it did.
#[test]
fn loaded_images_keep_their_snapshots() {
    if !peer::present("loaded_images_keep_their_snapshots") {
        return;
    }
    let folder = session::folder();
    for kind in [KINDS[0], KINDS[4], KINDS[7]] {
        let path = create(folder.path(), kind, None);
        let text = path.to_str().expect("text");
        let params = kind.params();
        // The first load gives the snapshot something to keep; its stamps are foreign to the second
        // one's.
        let first = Params {
            seed: params.seed + 1000,
            ..params.clone()
        };
        let history = History::new(first.size, first.unit, first.seed);
        load_and_judge(&path, "before", &first, history, session::engine(), false);
        let before = peer::content("qcow2", &path);
        peer::qemu_img(&["snapshot", "-c", "kept", text]);

        let gate = LikeReference::new();
        let session = Session::new(session::engine());
        let disk = session
            .open(session::image("qcow2", &path, false), &gate)
            .expect("open");
        // Every block of the disk is written once, so that nothing of the first load may be left to
        // judge.
        let mut history = History::new(params.size, params.unit, params.seed);
        session.home.run(|co| {
            let mut buf = vec![0; 1 << 16];
            for offset in (0..params.size).step_by(1 << 16) {
                let id = history.begin_write(offset, &mut buf, 0);
                disk.pwrite(co, offset, &*buf, RequestFlags::empty())
                    .expect("write");
                history.end_write(id);
            }
        });
        session.close(disk);
        session.end();
        load_and_judge(&path, "after", &params, history, session::engine(), true);

        let kept = path.with_extension("kept");
        let kept_text = kept.to_str().expect("text");
        peer::qemu_img(&[
            "convert",
            "-l",
            "snapshot.name=kept",
            "-f",
            "qcow2",
            "-O",
            "raw",
            text,
            kept_text,
        ]);
        assert_same(
            "the snapshot",
            &std::fs::read(&kept).expect("written"),
            &before,
        );
    }
}
