//! Images on real files, through the ring and through threads, judged by the reference's tools.
//!
//! Says aloud when `qemu-img` is missing.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::process::Command;
use std::rc::Rc;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::{BlockBackend, Graph, LikeReference, Options, RequestFlags, open};
use coblock_qcow2::{Qcow2, Qcow2Stats};
use support::rng::Rng;
use support::world::registry;

/// Runs `qemu-img`; `None`, said aloud, when it is not there.
fn qemu_img(args: &[&str]) -> Option<String> {
    match Command::new("qemu-img").args(args).output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let errors = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(
                out.status.success(),
                "qemu-img {args:?}: {}\n{text}{errors}",
                out.status
            );
            Some(text)
        }
        Err(error) => {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI needs qemu-img: {error}"
            );
            writeln!(std::io::stderr(), "SKIPPED: qemu-img is missing ({error})")
                .expect("standard error");
            None
        }
    }
}

/// What the reference reads from an image, in which its check finds nothing.
fn read_by_the_reference(image: &str) -> Option<Vec<u8>> {
    qemu_img(&["check", "-f", "qcow2", image])?;
    let raw = format!("{image}.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, &raw])?;
    Some(std::fs::read(raw).unwrap())
}

/// One random write at a time per coroutine, `depth` coroutines; no two of them overlap while in
/// flight.
fn write_randomly(
    home: &Home,
    disk: &Rc<BlockBackend>,
    model: &Rc<RefCell<Vec<u8>>>,
    depth: usize,
    writes: usize,
    seed: u64,
) {
    let left = Rc::new(Cell::new(writes));
    let running = Rc::new(Cell::new(depth));
    let busy: Rc<RefCell<Vec<(u64, u64)>>> = Rc::default();
    let rng = Rc::new(RefCell::new(Rng(seed)));
    for _ in 0..depth {
        let (left, running, busy) = (left.clone(), running.clone(), busy.clone());
        let (rng, disk, model) = (rng.clone(), disk.clone(), model.clone());
        home.spawn("writer", move |co| {
            let size = disk.len();
            while left.get() > 0 {
                left.set(left.get() - 1);
                let (at, len, byte, flush) = loop {
                    let mut rng = rng.borrow_mut();
                    let most = if rng.next() & 7 == 0 { 300 } else { 16 };
                    let len = 512 * (1 + rng.below(most));
                    let at = rng.below((size - len) / 512) * 512;
                    let clash = busy
                        .borrow()
                        .iter()
                        .any(|&(b, l)| b < at + len && at < b + l);
                    if !clash {
                        break (at, len, rng.next() as u8, rng.below(40) == 0);
                    }
                };
                busy.borrow_mut().push((at, len));
                let data = vec![byte; len as usize];
                disk.pwrite(co, at, &data[..], RequestFlags::empty())
                    .unwrap();
                model.borrow_mut()[at as usize..(at + len) as usize].fill(byte);
                busy.borrow_mut().retain(|&range| range != (at, len));
                if flush {
                    disk.flush(co).unwrap();
                }
            }
            running.set(running.get() - 1);
        });
    }
    while running.get() > 0 {
        home.poll(true);
    }
}

fn run(
    engine: EngineKind,
    direct: bool,
    create: &[&str],
    size: u64,
    seed: u64,
) -> Option<Qcow2Stats> {
    // Under the build folder, which is on a real file system: not every temporary folder knows
    // O_DIRECT.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image.qcow2");
    let image = image.to_str().unwrap();
    let size_text = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(create);
    args.extend([image, &size_text]);
    qemu_img(&args)?;

    let home = Home::new(ContextOptions {
        engine,
        ..ContextOptions::default()
    })
    .unwrap();
    let graph = Graph::new(home.context());
    let registry = registry();
    let options = || {
        Options::format_on_file("qcow2", image)
            .with("file.cache.direct", if direct { "on" } else { "off" })
            .with("l2-cache-size", "16k")
            .with("refcount-cache-size", "16k")
    };
    let gate = LikeReference::default();
    let node = home
        .run(|co| open(co, &graph, &registry, &gate, options()))
        .unwrap();
    let disk = Rc::new(BlockBackend::new(&graph, node));
    let model = Rc::new(RefCell::new(vec![0; size as usize]));
    write_randomly(&home, &disk, &model, 64, 3000, seed);
    let stats = stats(&disk);
    home.run(|co| {
        let mut all = vec![1; size as usize];
        disk.pread(co, 0, &mut all[..]).unwrap();
        assert!(all == *model.borrow(), "read back through the same handle");
        disk.close(co).unwrap();
    });
    drop(disk);
    assert_eq!(graph.live_nodes(), 0);
    assert!(read_by_the_reference(image)? == *model.borrow());
    assert_eq!(home.context().live_coroutines(), 0);
    Some(stats)
}

fn stats(disk: &BlockBackend) -> Qcow2Stats {
    let node = disk.node();
    let driver = node.driver();
    let driver = driver.as_any().unwrap();
    driver.downcast_ref::<Qcow2>().unwrap().stats()
}

/// 64 writers on one image, caches at a few slices: the reference finds no error and no leak, and
/// reads what we wrote.
#[test]
fn the_reference_reads_what_64_writers_wrote() {
    for (engine, direct) in [
        (EngineKind::IoUring, false),
        (EngineKind::IoUring, true),
        (EngineKind::Threads, false),
        (EngineKind::Threads, true),
    ] {
        for (seed, create) in [
            (1, &["-o", "cluster_size=512,refcount_bits=64"][..]),
            (2, &["-o", "cluster_size=4k,refcount_bits=1"]),
            (3, &["-o", "cluster_size=64k"]),
            (4, &["-o", "compat=0.10"]),
            (5, &["-o", "cluster_size=2M"]),
        ] {
            let size = 24 << 20;
            let Some(stats) = run(engine, direct, create, size, seed) else {
                return;
            };
            println!("{engine:?} direct={direct} {create:?}: {stats:?}");
            // Writes of whole sectors never share a cluster of 512 B.
            assert!(seed == 1 || stats.dependency_waits > 0);
        }
    }
}

/// A disk that grows from 64 KiB to 256 MiB in clusters of 512 B: the L1 table moves to 128
/// neighbouring clusters, and the refcount table moves too. Nothing leaks, and the reference reads
/// every byte.
#[test]
fn tables_grow_with_the_disk() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image.qcow2");
    let image = image.to_str().unwrap();
    let options = "cluster_size=512,refcount_bits=64";
    if qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, image, "64k"]).is_none() {
        return;
    }
    let home = Home::new(ContextOptions::default()).unwrap();
    let graph = Graph::new(home.context());
    let registry = registry();
    let gate = LikeReference::default();
    let options = || Options::format_on_file("qcow2", image);
    let size: u64 = 1 << 28;
    home.run(|co| {
        let node = open(co, &graph, &registry, &gate, options()).unwrap();
        let disk = BlockBackend::new(&graph, node);
        disk.pwrite(co, 512, &[1; 1024][..], RequestFlags::empty())
            .unwrap();
        disk.truncate(co, size, true).unwrap();
        assert_eq!(disk.len(), size);
        // More than the first refcount table can count.
        disk.pwrite(co, 1 << 20, &vec![1; 3 << 20][..], RequestFlags::empty())
            .unwrap();
        for n in 0..64 {
            let at = n * (size / 64) + 512;
            disk.pwrite(co, at, &[n as u8 + 2; 3000][..], RequestFlags::empty())
                .unwrap();
        }
        assert!(stats(&disk).tables_grown >= 2, "{:?}", stats(&disk));
        disk.close(co).unwrap();
    });
    assert_eq!(graph.live_nodes(), 0);
    let raw = read_by_the_reference(image).unwrap();
    assert_eq!(raw.len() as u64, size);
    for n in 0..64 {
        let at = (n * (size / 64)) as usize + 512;
        assert!(raw[at..at + 3000].iter().all(|&b| b == n as u8 + 2), "{at}");
        assert_eq!((raw[at - 1], raw[at + 3000]), (0, 0), "{at}");
    }
}

/// What `qemu-img convert -c` wrote reads identically, in both compression types; overwritten in
/// part it is copied, the reference finds no leak, and reads what we wrote.
#[test]
fn compressed_images_are_read_and_overwritten() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let size = 6 << 20;
    // Runs of different lengths: some clusters compress well, some hardly.
    let mut rng = Rng(7);
    let mut model = Vec::with_capacity(size);
    while model.len() < size {
        let most = if rng.next() & 63 == 0 { 200_000 } else { 40 };
        let run = 1 + rng.below(most) as usize;
        model.resize((model.len() + run).min(size), rng.next() as u8);
    }
    std::fs::write(path("raw"), &model).unwrap();
    for options in [
        "cluster_size=64k,compression_type=zlib",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=4k,compression_type=zlib",
        "cluster_size=2M,compression_type=zstd,refcount_bits=64",
        "compat=0.10",
    ] {
        let (raw, image) = (path("raw"), path("image"));
        let pack = [
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &image,
        ];
        if qemu_img(&pack).is_none() {
            return;
        }
        let home = Home::new(ContextOptions::default()).unwrap();
        let graph = Graph::new(home.context());
        let registry = registry();
        let gate = LikeReference::default();
        let mut model = model.clone();
        home.run(|co| {
            let node = open(
                co,
                &graph,
                &registry,
                &gate,
                Options::format_on_file("qcow2", &*image),
            );
            let disk = BlockBackend::new(&graph, node.unwrap());
            let mut all = vec![0; size];
            disk.pread(co, 0, &mut all[..]).unwrap();
            assert!(all == model, "{options}: read");
            for _ in 0..200 {
                let len = 512 * (1 + rng.below(20) as usize);
                let at = 512 * rng.below(((size - len) / 512) as u64) as usize;
                let byte = rng.next() as u8;
                disk.pwrite(co, at as u64, &vec![byte; len][..], RequestFlags::empty())
                    .unwrap();
                model[at..at + len].fill(byte);
            }
            disk.pread(co, 0, &mut all[..]).unwrap();
            assert!(all == model, "{options}: overwritten");
            disk.close(co).unwrap();
        });
        assert_eq!(graph.live_nodes(), 0);
        assert!(
            read_by_the_reference(&image).unwrap() == model,
            "{options}: read by the reference"
        );
    }
}

/// Random writes, zeroes and discards, 32 at a time, over every kind of image: what is read obeys
/// the model, and the reference agrees and finds no leak.
#[test]
fn zeroes_and_discards_obey_the_model() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let size: u64 = 8 << 20;
    let size_text = size.to_string();
    std::fs::write(path("base"), vec![0xb5; size as usize]).unwrap();
    for (seed, options, overlay) in [
        (1, "cluster_size=64k", false),
        (2, "cluster_size=4k", false),
        (3, "cluster_size=512,refcount_bits=2", false),
        (4, "cluster_size=4k", true),
        (5, "compat=0.10", false),
        (6, "compat=0.10,cluster_size=4k", true),
    ] {
        let (image, base) = (path("image"), path("base"));
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if overlay {
            create.extend(["-b", &base, "-F", "raw"]);
        }
        create.extend([&*image, &*size_text]);
        if qemu_img(&create).is_none() {
            return;
        }
        let home = Home::new(ContextOptions::default()).unwrap();
        let graph = Graph::new(home.context());
        let registry = registry();
        let gate = LikeReference::default();
        let open_options = Options::format_on_file("qcow2", &*image).with("discard", "unmap");
        let node = home
            .run(|co| open(co, &graph, &registry, &gate, open_options))
            .unwrap();
        let disk = Rc::new(BlockBackend::new(&graph, node));
        let first = if overlay { 0xb5 } else { 0 };
        let model = Rc::new(RefCell::new(vec![first; size as usize]));
        let cluster = match options {
            o if o.contains("=512") => 512,
            o if o.contains("=4k") => 4096,
            _ => 65536,
        };
        // Over a backing file version 2 cannot say "zero", so a discard does nothing.
        let discards = !(overlay && options.contains("compat=0.10"));
        mix_randomly(&home, &disk, &model, seed, cluster, discards);
        home.run(|co| {
            let mut all = vec![1; size as usize];
            disk.pread(co, 0, &mut all[..]).unwrap();
            assert!(all == *model.borrow(), "{options}: read back");
            disk.close(co).unwrap();
        });
        drop(disk);
        assert_eq!(graph.live_nodes(), 0);
        assert!(
            read_by_the_reference(&image).unwrap() == *model.borrow(),
            "{options}: the reference"
        );
        std::fs::remove_file(image).unwrap();
    }
}

/// Writes, zeroes of both kinds, discards and flushes; no two of them overlap while in flight.
fn mix_randomly(
    home: &Home,
    disk: &Rc<BlockBackend>,
    model: &Rc<RefCell<Vec<u8>>>,
    seed: u64,
    cluster: u64,
    discards: bool,
) {
    let left = Rc::new(Cell::new(2500));
    let running = Rc::new(Cell::new(32));
    let busy: Rc<RefCell<Vec<(u64, u64)>>> = Rc::default();
    let rng = Rc::new(RefCell::new(Rng(seed)));
    for _ in 0..32 {
        let (left, running, busy) = (left.clone(), running.clone(), busy.clone());
        let (rng, disk, model) = (rng.clone(), disk.clone(), model.clone());
        home.spawn("mix", move |co| {
            while left.get() > 0 {
                left.set(left.get() - 1);
                let (at, len, what) = loop {
                    let mut rng = rng.borrow_mut();
                    let len = 512 * (1 + rng.below(300));
                    let at = rng.below((disk.len() - len) / 512) * 512;
                    let clash = busy
                        .borrow()
                        .iter()
                        .any(|&(b, l)| b < at + len && at < b + l);
                    if !clash {
                        break (at, len, rng.below(6));
                    }
                };
                busy.borrow_mut().push((at, len));
                let (start, end) = (at as usize, (at + len) as usize);
                match what {
                    0 => {
                        disk.pwrite_zeroes(co, at, len, RequestFlags::empty())
                            .unwrap();
                        model.borrow_mut()[start..end].fill(0);
                    }
                    1 => {
                        disk.pwrite_zeroes(co, at, len, RequestFlags::MAY_UNMAP)
                            .unwrap();
                        model.borrow_mut()[start..end].fill(0);
                    }
                    2 => {
                        disk.pdiscard(co, at, len).unwrap();
                        // Whole clusters only; the disk ends with one.
                        let start = at.next_multiple_of(cluster) as usize;
                        let end = ((at + len) / cluster * cluster) as usize;
                        if discards && start < end {
                            model.borrow_mut()[start..end].fill(0);
                        }
                    }
                    3 if len < 8192 => disk.flush(co).unwrap(),
                    _ => {
                        let byte = len as u8 | 1;
                        let data = vec![byte; len as usize];
                        disk.pwrite(co, at, &data[..], RequestFlags::empty())
                            .unwrap();
                        model.borrow_mut()[start..end].fill(byte);
                    }
                }
                busy.borrow_mut().retain(|&range| range != (at, len));
            }
            running.set(running.get() - 1);
        });
    }
    while running.get() > 0 {
        home.poll(true);
    }
}
