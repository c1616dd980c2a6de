//! The `file` and `raw` drivers on real files: both engines, buffered and O_DIRECT.

mod support;

use coblock_aio::AlignedBuf;
use coblock_block::types::in_memory;
use coblock_block::{ErrorKind, Limits, MAX_REQUEST, Options, RequestFlags};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use support::{World, engines, pattern};

/// A buffered read that is alone is served from the page cache by the loop, without the ring; a
/// direct one never is.
#[test]
fn lonely_buffered_reads_do_not_enter_the_ring() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, pattern(2, 8192)).unwrap();
    let uring = coblock_aio::EngineKind::IoUring;
    if !engines().contains(&uring) {
        println!("skipped: no io_uring");
        return;
    }
    for (direct, most, least) in [("off", 5, 0), ("on", u64::MAX, 50)] {
        let world = World::with_engine(uring);
        let options =
            Options::format_on_file("raw", path.to_str().unwrap()).with("cache.direct", direct);
        let Ok(backend) = world.open(options) else {
            assert_eq!(direct, "on", "only direct I/O may be missing");
            println!("skipped: no direct I/O in {}", path.display());
            world.end();
            continue;
        };
        world.run(|co| {
            let mut seen = vec![0; 4096];
            backend.pread(co, 4096, &mut seen[..]).unwrap();
            let before = world.home.stats().ring_enters;
            for _ in 0..50 {
                seen.fill(0);
                backend.pread(co, 4096, &mut seen[..]).unwrap();
                assert!(seen == pattern(2, 8192)[4096..], "direct {direct}");
            }
            let enters = world.home.stats().ring_enters - before;
            assert!(
                (least..=most).contains(&enters),
                "direct {direct}: {enters} enters for 50 reads"
            );
        });
        world.close(backend).unwrap();
        world.end();
    }
}

/// Rule 2.1: what was written is read, through the page cache and around it, on both engines.
#[test]
fn reads_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    for engine in engines() {
        for direct in ["off", "on"] {
            std::fs::write(&path, pattern(1, 100_000)).unwrap();
            let world = World::with_engine(engine);
            let options =
                Options::format_on_file("raw", path.to_str().unwrap()).with("cache.direct", direct);
            let backend = world.open(options).unwrap();
            assert_eq!(backend.len(), 100_000);
            let mut model = pattern(1, 100_000);
            world.run(|co| {
                for (n, (offset, len)) in [
                    (0, 512),
                    (4096, 8192),
                    (1, 3),
                    (511, 2),
                    (99_000, 1000),
                    (12_345, 70_000),
                ]
                .into_iter()
                .enumerate()
                {
                    let data = pattern(100 + n as u64, len);
                    backend
                        .pwrite(co, offset as u64, &data[..], RequestFlags::empty())
                        .unwrap();
                    model[offset..offset + len].copy_from_slice(&data);
                    let mut seen = vec![0; 100_000];
                    backend.pread(co, 0, &mut seen[..]).unwrap();
                    assert!(
                        seen == model,
                        "after write {n}, direct {direct}, {engine:?}"
                    );
                }
                backend.flush(co).unwrap();
                let past = backend.pread(co, 99_999, &mut [0; 2][..]).unwrap_err();
                assert_eq!(
                    (past.kind(), past.errno()),
                    (ErrorKind::OutOfBounds, libc::EIO)
                );
            });
            world.close(backend).unwrap();
            let on_disk = std::fs::read(&path).unwrap();
            assert!(
                on_disk[..100_000] == model[..],
                "direct {direct}, {engine:?}"
            );
            world.end();
        }
    }
}

fn options(path: &std::path::Path) -> Options {
    Options::format_on_file("raw", path.to_str().unwrap())
}

/// Resizing, zeroes and discards of a real file, on both engines.
#[test]
fn length_and_holes_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    for engine in engines() {
        std::fs::write(&path, pattern(1, 65536)).unwrap();
        let world = World::with_engine(engine);
        let backend = world.open(options(&path).with("discard", "unmap")).unwrap();
        let mut model = pattern(1, 65536);
        world.run(|co| {
            backend
                .pwrite_zeroes(co, 100, 9000, RequestFlags::empty())
                .unwrap();
            model[100..9100].fill(0);
            backend
                .pwrite_zeroes(co, 16384, 8192, RequestFlags::MAY_UNMAP)
                .unwrap();
            model[16384..24576].fill(0);
            backend.pdiscard(co, 32768, 4096).unwrap();
            let mut seen = vec![0; 65536];
            backend.pread(co, 0, &mut seen[..]).unwrap();
            // A discard of a file makes a hole where the file system has holes.
            assert!(seen[32768..36864] == [0; 4096] || seen[32768..36864] == model[32768..36864]);
            model[32768..36864].copy_from_slice(&seen[32768..36864]);
            assert!(seen == model);

            backend.truncate(co, 100_000, true).unwrap();
            model.resize(100_000, 0);
            assert_eq!(backend.len(), 100_000);
            backend
                .pwrite(co, 99_000, &[5; 1000][..], RequestFlags::FUA)
                .unwrap();
            model[99_000..].fill(5);
            backend.truncate(co, 50_000, true).unwrap();
            backend.truncate(co, 100_000, true).unwrap();
            model[50_000..].fill(0);
        });
        world.close(backend).unwrap();
        assert!(std::fs::read(&path).unwrap() == model, "{engine:?}");
        world.end();
    }
}

/// Bad input: what the kernel refuses is told with file and offset, and what was there still is.
#[test]
fn an_error_of_the_kernel_names_the_file() {
    let world = World::with_engine(coblock_aio::EngineKind::Auto);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [1; 4096]).unwrap();
    let backend = world.open(options(&path)).unwrap();
    world.run(|co| {
        // More than any file system has.
        let error = backend.truncate(co, 1 << 62, true).unwrap_err();
        assert!(
            [libc::EFBIG, libc::EINVAL, libc::ENOSPC].contains(&error.errno()),
            "{error:?}"
        );
        assert_eq!(
            (error.file(), error.offset()),
            (path.to_str(), Some(1 << 62))
        );
        let mut seen = [0; 4096];
        backend.pread(co, 0, &mut seen[..]).unwrap();
        assert_eq!((seen, backend.len()), ([1; 4096], 4096));
    });
    world.close(backend).unwrap();
    world.end();
}

/// A file that is cut while it is open reads as zeros past its new end, as the reference does;
/// never as an error or as old data.
#[test]
fn a_file_that_was_cut_reads_as_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    for engine in engines() {
        std::fs::write(&path, [1; 8192]).unwrap();
        let world = World::with_engine(engine);
        let backend = world.open(options(&path)).unwrap();
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(1000)
            .unwrap();
        let mut seen = [9; 8192];
        world.run(|co| backend.pread(co, 0, &mut seen[..])).unwrap();
        assert_eq!((seen[999], seen[1000], seen[8191]), (1, 0, 0), "{engine:?}");
        world.close(backend).unwrap();
        world.end();
    }
}

/// What the limits of a file say is enough for the kernel, with direct I/O and without.
#[test]
fn limits_of_a_file_are_enough() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, pattern(2, 1 << 16)).unwrap();
    let world = World::simulated();
    for (direct, flags) in [("off", 0), ("on", libc::O_DIRECT)] {
        let options = Options::file(path.to_str().unwrap()).with("cache.direct", direct);
        let Ok(backend) = world.open(options) else {
            assert_eq!(direct, "on", "only direct I/O may be missing");
            writeln!(
                std::io::stderr(),
                "SKIPPED: no direct I/O in {}",
                path.display()
            )
            .expect("standard error");
            continue;
        };
        let limits = backend.node().limits();
        if direct == "off" {
            assert_eq!((limits.request_alignment, limits.mem_alignment), (1, 1));
        }
        assert_eq!(backend.node().whole_limits(), limits);
        let (request, memory) = (in_memory(limits.request_alignment), limits.mem_alignment);
        let file = std::fs::File::options()
            .read(true)
            .custom_flags(flags)
            .open(&path)
            .unwrap();
        // Aligned to that and no more.
        let mut buf = AlignedBuf::try_new(1 << 14, 1 << 13).unwrap();
        let part = &mut buf[memory..memory + request];
        file.read_exact_at(part, limits.request_alignment).unwrap();
        assert!(
            *part == pattern(2, 1 << 16)[request..2 * request],
            "direct {direct}"
        );
        world.close(backend).unwrap();
    }
    world.end();
}

/// The limits are those of the device's queue, through `raw`.
fn assert_queue_limits(limits: &Limits, device: &str) {
    let value = |name: &str| -> u64 {
        let path = format!("/sys/block/{device}/queue/{name}");
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    assert_eq!(
        limits.device_transfer,
        (value("max_hw_sectors_kb") * 1024).min(MAX_REQUEST)
    );
    assert_eq!(limits.device_segments as u64, value("max_segments"));
    let granularity = value("discard_granularity").max(1);
    assert!(
        limits.discard_alignment >= granularity
            && limits.discard_alignment <= granularity.max(4096)
    );
    for (most, name) in [
        (limits.max_discard, "discard_max_bytes"),
        (limits.max_zeroes, "write_zeroes_max_bytes"),
    ] {
        match value(name) {
            0 => assert_eq!(most, MAX_REQUEST, "{name}: not known"),
            max => assert!(most <= max && most > 0, "{name}"),
        }
    }
}

/// Block devices: length and sector size from the kernel, O_DIRECT, no growth.
#[test]
fn a_block_device_has_a_fixed_length() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backing");
    std::fs::write(&file, pattern(1, 1 << 20)).unwrap();
    let attached = std::process::Command::new("losetup")
        .args(["--show", "-f"])
        .arg(&file)
        .output()
        .ok()
        .filter(|output| output.status.success());
    let Some(attached) = attached else {
        writeln!(
            std::io::stderr(),
            "SKIPPED: no loop device is to be had here"
        )
        .expect("standard error");
        return;
    };
    let device = String::from_utf8(attached.stdout)
        .unwrap()
        .trim()
        .to_owned();
    struct Detach(String);
    impl Drop for Detach {
        fn drop(&mut self) {
            let _ = std::process::Command::new("losetup")
                .args(["-d", &self.0])
                .status();
        }
    }
    let _detach = Detach(device.clone());
    for engine in engines() {
        for direct in ["on", "off"] {
            let world = World::with_engine(engine);
            let options = Options::format_on_file("raw", &device).with("cache.direct", direct);
            let backend = world.open(options.with("discard", "unmap")).unwrap();
            assert_eq!(backend.len(), 1 << 20);
            let id = backend.node().file_id().unwrap();
            assert_eq!(id.inode, 0, "a device is known by its number");
            let name = device.rsplit('/').next().unwrap();
            assert_queue_limits(&backend.node().whole_limits(), name);
            world.run(|co| {
                let data = pattern(2, 1000);
                backend
                    .pwrite(co, 77, &data[..], RequestFlags::empty())
                    .unwrap();
                let mut seen = vec![0; 1000];
                backend.pread(co, 77, &mut seen[..]).unwrap();
                assert!(seen == data);
                backend
                    .pwrite_zeroes(co, 100, 5000, RequestFlags::MAY_UNMAP)
                    .unwrap();
                backend.pdiscard(co, 10_000, 5000).unwrap();
                backend.pread(co, 77, &mut seen[..]).unwrap();
                assert!(seen[..23] == data[..23] && seen[23..] == [0; 977]);
                backend.flush(co).unwrap();
                let past = backend.pwrite(co, (1 << 20) - 1, &[1; 2][..], RequestFlags::empty());
                assert_eq!(past.unwrap_err().kind(), ErrorKind::OutOfBounds);
                let grow = backend.truncate(co, 2 << 20, true).unwrap_err();
                assert_eq!(grow.kind(), ErrorKind::NotSupported);
                assert!(
                    grow.message().contains("Cannot grow device files"),
                    "{grow}"
                );
                let shrink = backend.truncate(co, 1 << 19, true).unwrap_err();
                assert!(
                    shrink.message().contains("Cannot resize device files"),
                    "{shrink}"
                );
                backend.truncate(co, 1 << 19, false).unwrap();
                assert_eq!(backend.len(), 1 << 20);
            });
            world.close(backend).unwrap();
            world.end();
        }
    }
}

/// `raw` with a part: it begins and ends where the options say, and does not grow.
#[test]
fn a_part_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, pattern(1, 8192)).unwrap();
    let world = World::with_engine(coblock_aio::EngineKind::Auto);
    let part = options(&path).with("offset", "1k").with("size", "2k");
    let backend = world.open(part).unwrap();
    assert_eq!(backend.len(), 2048);
    world.run(|co| {
        backend
            .pwrite(co, 0, &[1; 2048][..], RequestFlags::empty())
            .unwrap();
        assert!(
            backend
                .pwrite(co, 2047, &[1; 2][..], RequestFlags::empty())
                .is_err()
        );
        let error = backend.truncate(co, 4096, true).unwrap_err();
        assert_eq!(error.message(), "Cannot resize fixed-size raw disks");
    });
    world.close(backend).unwrap();
    let mut want = pattern(1, 8192);
    want[1024..3072].fill(1);
    assert!(std::fs::read(&path).unwrap() == want);
    world.end();
}

/// `null-co`: takes everything, keeps nothing; its latency is on the context's clock.
#[test]
fn null_takes_everything() {
    let world = World::simulated();
    let null = |zeroes: &str| {
        let options = Options::new().with("driver", "null-co").with("size", "1M");
        options
            .with("latency-ns", "1000000")
            .with("read-zeroes", zeroes)
    };
    for (zeroes, want) in [("off", 7), ("on", 0)] {
        let before = world.clock.as_ref().unwrap().now_ns();
        let backend = world.open(null(zeroes)).unwrap();
        assert_eq!(backend.len(), 1 << 20);
        world.run(|co| {
            backend
                .pwrite(co, 0, &[1; 512][..], RequestFlags::FUA)
                .unwrap();
            let mut seen = [7; 512];
            backend.pread(co, 0, &mut seen[..]).unwrap();
            assert_eq!(seen, [want; 512], "read-zeroes={zeroes}");
            backend
                .pwrite_zeroes(co, 0, 1 << 20, RequestFlags::empty())
                .unwrap();
            assert!(backend.truncate(co, 0, true).is_err());
        });
        let took = world.clock.as_ref().unwrap().now_ns() - before;
        assert!(
            took >= 3_000_000,
            "three requests of a millisecond took {took} ns"
        );
        world.close(backend).unwrap();
    }
    world.end();
}

/// Hazard Q21 across threads: parts of the same blocks are written from three loops at once, around
/// the page cache; no write loses what its neighbour wrote.
#[test]
fn padding_serialises_across_contexts() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    const QUEUES: usize = 3;
    const PARTS: usize = 4;
    const BLOCKS: usize = 16;
    const PART: usize = 512 / (QUEUES * PARTS);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    for engine in engines() {
        std::fs::write(&path, [0; BLOCKS * 512]).unwrap();
        let world = World::with_engine(engine);
        let direct = options(&path).with("cache.direct", "on");
        let backend = Arc::new(world.open(direct).unwrap());
        let threads: Vec<_> = (0..QUEUES)
            .map(|n| {
                let name = format!("queue {n}");
                let options = coblock_aio::ContextOptions {
                    engine,
                    ..coblock_aio::ContextOptions::named(name)
                };
                coblock_aio::IoThread::new(options).unwrap()
            })
            .collect();
        let left = Arc::new(AtomicUsize::new(QUEUES * PARTS));
        for part in 0..QUEUES * PARTS {
            let (backend, left) = (backend.clone(), left.clone());
            let main = world.home.context().clone();
            let write_all = move |co: &coblock_coroutine::Co| {
                for block in 0..BLOCKS {
                    let offset = (block * 512 + part * PART) as u64;
                    let data = [u8::try_from(part + 1).unwrap(); PART];
                    backend
                        .pwrite(co, offset, &data[..], RequestFlags::empty())
                        .unwrap();
                }
                drop(backend);
                left.fetch_sub(1, Ordering::Release);
                main.notify();
            };
            threads[part % QUEUES]
                .context()
                .spawn("write", write_all)
                .unwrap();
        }
        while left.load(Ordering::Acquire) > 0 {
            world.home.poll(true);
        }
        world.run(|co| backend.close(co)).unwrap();
        for thread in threads {
            thread.stop();
        }
        drop(backend);
        let seen = std::fs::read(&path).unwrap();
        for (at, byte) in seen.iter().enumerate() {
            let part = at % 512 / PART;
            let want = if part < QUEUES * PARTS { part + 1 } else { 0 };
            assert_eq!(usize::from(*byte), want, "byte {at}, {engine:?}");
        }
        world.end();
    }
}
