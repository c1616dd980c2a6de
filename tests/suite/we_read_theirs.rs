//! Promise: images made by `qemu-img` read byte for byte as it reads them itself: every version,
//! cluster size and refcount width, backing chains, preallocated, with zero clusters, with internal
//! snapshots.

use std::path::{Path, PathBuf};

use coblock::block::LikeReference;

use crate::support::model::{assert_same, stamp};
use crate::support::rng::Rng;
use crate::support::session::{self, Session};
use crate::support::{load, peer};

/// Writes a raw file of `size` bytes with content and holes, by `seed`.
fn raw_file(path: &Path, size: u64, seed: u64) {
    let mut bytes = vec![0u8; usize::try_from(size).expect("a small disk")];
    let mut rng = Rng::new(seed);
    for _ in 0..24 {
        let len = rng.between(1, 96) * 512;
        let at = rng.below((size - len) / 512) * 512;
        let from = usize::try_from(at).expect("a small disk");
        let to = from + usize::try_from(len).expect("a short range");
        stamp(&mut bytes[from..to], at, 512, seed, seed + 1);
    }
    std::fs::write(path, bytes).expect("a file in our folder");
}

/// `qemu-img convert` of a raw file into a qcow2 image with `options`, then some writes, zeros and
/// discards on it.
fn image(folder: &Path, name: &str, options: &str, size: u64, seed: u64) -> PathBuf {
    let raw = folder.join(format!("{name}.raw"));
    let path = folder.join(format!("{name}.qcow2"));
    raw_file(&raw, size, seed);
    let (from, to) = (raw.to_str().expect("text"), path.to_str().expect("text"));
    peer::qemu_img(&[
        "convert", "-f", "raw", "-O", "qcow2", "-o", options, from, to,
    ]);
    scribble(&path, size, seed);
    path
}

/// Some writes, zeros and discards, through qemu-io.
fn scribble(path: &Path, size: u64, seed: u64) {
    let mut rng = Rng::new(seed ^ 0xabcd);
    let commands: Vec<String> = (0..12)
        .map(|_| {
            let len = rng.between(1, 200) * 512;
            let offset = rng.below((size - len) / 512) * 512;
            match rng.below(4) {
                0 => format!("write -z {offset} {len}"),
                1 => format!("discard {offset} {len}"),
                _ => format!("write -P {} {offset} {len}", rng.between(1, 255)),
            }
        })
        .collect();
    peer::qemu_io("qcow2", path, &commands);
}

/// Opens `path` with both kinds of caching and compares the whole disk, in steps that meet no
/// boundary of the format.
fn reads_identically(path: &Path, name: &str) {
    let expected = peer::content("qcow2", path);
    let gate = LikeReference::new();
    for engine in session::engines() {
        for (direct, step) in [(false, 77_777), (true, 1 << 20)] {
            let session = Session::new(engine);
            let options = session::image("qcow2", path, direct).with("read-only", "on");
            let disk = session
                .open(options, &gate)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let found = session.home.run(|co| load::read_all(co, &disk, step));
            assert_same(
                &format!("{name}, {engine:?}, direct {direct}"),
                &found,
                &expected,
            );
            session.close(disk);
            session.end();
        }
    }
}

/// Every cluster size in both versions.
#[test]
fn every_cluster_size_and_version() {
    if !peer::present("every_cluster_size_and_version") {
        return;
    }
    let folder = session::folder();
    for (compat, seed) in [("0.10", 1), ("1.1", 2)] {
        for bits in 9..=21u32 {
            let cluster = 1u64 << bits;
            let size = (3 * cluster + cluster / 2).clamp(1 << 20, 8 << 20);
            let name = format!("v{compat}-c{cluster}");
            let options = format!("compat={compat},cluster_size={cluster}");
            let path = image(folder.path(), &name, &options, size, seed + u64::from(bits));
            reads_identically(&path, &name);
        }
    }
}

/// Every refcount width, on small and on usual clusters.
#[test]
fn every_refcount_width() {
    if !peer::present("every_refcount_width") {
        return;
    }
    let folder = session::folder();
    for cluster in [512u64, 65536] {
        for bits in [1, 2, 4, 8, 16, 32, 64] {
            let name = format!("c{cluster}-r{bits}");
            let options = format!("cluster_size={cluster},refcount_bits={bits}");
            let path = image(folder.path(), &name, &options, 2 << 20, 100 + bits);
            reads_identically(&path, &name);
        }
    }
}

/// A length that is no multiple of a cluster, or of a sector's neighbours.
#[test]
fn odd_sizes() {
    if !peer::present("odd_sizes") {
        return;
    }
    let folder = session::folder();
    for size in [512u64, 65536 - 512, (1 << 20) + 512, (3 << 20) - 1024] {
        let path = folder.path().join(format!("odd{size}.qcow2"));
        peer::qemu_img(&[
            "create",
            "-f",
            "qcow2",
            path.to_str().expect("text"),
            &size.to_string(),
        ]);
        peer::qemu_io("qcow2", &path, &[format!("write -P 7 {} 512", size - 512)]);
        reads_identically(&path, &format!("{size} bytes"));
    }
}

/// Metadata or everything preallocated.
#[test]
fn preallocated() {
    if !peer::present("preallocated") {
        return;
    }
    let folder = session::folder();
    for mode in ["metadata", "falloc", "full"] {
        for cluster in [4096u64, 65536] {
            let path = folder.path().join(format!("{mode}{cluster}.qcow2"));
            let options = format!("preallocation={mode},cluster_size={cluster}");
            let words = [
                "create",
                "-f",
                "qcow2",
                "-o",
                &options,
                path.to_str().expect("text"),
                "4M",
            ];
            peer::qemu_img(&words);
            reads_identically(&path, &format!("fresh, preallocation {mode}"));
            scribble(&path, 4 << 20, cluster);
            reads_identically(&path, &format!("written, preallocation {mode}"));
        }
    }
}

/// Chains of qcow2 on qcow2 on raw, shorter and longer than what lies below, of different cluster
/// sizes.
#[test]
fn backing_chains() {
    if !peer::present("backing_chains") {
        return;
    }
    let folder = session::folder();
    for (number, sizes) in [[2u64, 2, 2], [1, 3, 2], [3, 1, 2], [2, 1, 4]]
        .into_iter()
        .enumerate()
    {
        for clusters in [[512u64, 65536], [65536, 4096]] {
            let at = |layer: &str| {
                folder
                    .path()
                    .join(format!("{layer}-{number}-{}", clusters[0]))
            };
            let (base, middle, top) = (at("base"), at("middle"), at("top"));
            raw_file(&base, sizes[0] << 20, 31);
            let mut below = (base, "raw");
            for (layer, path) in [&middle, &top].into_iter().enumerate() {
                let size = format!("{}M", sizes[layer + 1]);
                let options = format!("cluster_size={}", clusters[layer]);
                let name = below
                    .0
                    .file_name()
                    .expect("a file")
                    .to_str()
                    .expect("text")
                    .to_string();
                let path_text = path.to_str().expect("text");
                peer::qemu_img(&[
                    "create", "-q", "-f", "qcow2", "-b", &name, "-F", below.1, "-o", &options,
                    path_text, &size,
                ]);
                scribble(path, sizes[layer + 1] << 20, 40 + layer as u64);
                below = (path.clone(), "qcow2");
            }
            reads_identically(
                &top,
                &format!("chain of {sizes:?} MiB, clusters {clusters:?}"),
            );
        }
    }
}

/// An image with internal snapshots, whose clusters have counts above one.
#[test]
fn internal_snapshots() {
    if !peer::present("internal_snapshots") {
        return;
    }
    let folder = session::folder();
    for cluster in [512u64, 65536] {
        let name = format!("snap{cluster}");
        let path = image(
            folder.path(),
            &name,
            &format!("cluster_size={cluster}"),
            2 << 20,
            77,
        );
        let text = path.to_str().expect("text");
        peer::qemu_img(&["snapshot", "-c", "one", text]);
        scribble(&path, 2 << 20, 78);
        peer::qemu_img(&["snapshot", "-c", "two", text]);
        scribble(&path, 2 << 20, 79);
        reads_identically(&path, &name);
    }
}
