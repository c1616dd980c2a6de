//! The request path on a simulated disk: alignment, serialising, splitting, limits, ends.
#![expect(
    clippy::cast_possible_truncation,
    reason = "small numbers that the test chose"
)]

mod support;

use coblock_block::drivers::sim::{Fault, LogEntry, Match, SimDisk};
use coblock_block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock_block::{BlockBackend, ErrorKind, Limits, Options, RequestFlags};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use support::{PLAIN, World, end, pattern, settle, sim_world as world, start};

/// Alignment of disk and memory cost padding and copies, never a wrong byte: odd ranges at odd
/// addresses.
#[test]
fn odd_requests_are_padded() {
    for (request, memory, longest) in [
        (1, 1, 1 << 20),
        (512, 1, 4096),
        (512, 512, 1 << 20),
        (4096, 4096, 8192),
        (64, 64, 1000),
    ] {
        let disk = SimDisk::with_contents(&pattern(1, 40_000));
        let (request, memory, longest) =
            (request.to_string(), memory.to_string(), longest.to_string());
        let (world, backend) = world(
            &disk,
            &[
                ("request-alignment", &request),
                ("mem-alignment", &memory),
                ("max-transfer", &longest),
            ],
        );
        let mut model = pattern(1, 40_000);
        world.run(|co| {
            for (n, (offset, len)) in [
                (0, 1),
                (511, 2),
                (512, 512),
                (4095, 4098),
                (100, 20_000),
                (39_999, 1),
                (0, 40_000),
                (5000, 0),
            ]
            .into_iter()
            .enumerate()
            {
                let memory = pattern(n as u64 + 2, len + 1);
                // An odd address: the buffer of the pattern begins at an even one.
                let data = &memory[1..];
                backend.pwrite(co, offset as u64, data, PLAIN).unwrap();
                model[offset..offset + len].copy_from_slice(data);
                let mut seen = vec![0xee; len + 3];
                backend
                    .pread(co, offset as u64, &mut seen[1..=len])
                    .unwrap();
                assert!(seen[1..=len] == *data, "{len} at {offset}");
                assert_eq!(
                    (seen[0], seen[len + 1]),
                    (0xee, 0xee),
                    "only the buffer is written"
                );
            }
        });
        assert!(
            disk.peek(0, 40_000) == model,
            "alignment {request}, memory {memory}"
        );
        end(world, backend);
    }
}

/// A write of a part of a block reads the block, keeps the rest of it, and writes it as one.
#[test]
fn a_partial_block_is_read_changed_and_written() {
    let disk = SimDisk::with_contents(&pattern(1, 8192));
    let (world, backend) = world(&disk, &[("request-alignment", "512")]);
    world
        .run(|co| backend.pwrite(co, 700, &[7; 10][..], PLAIN))
        .unwrap();
    let mut block = pattern(1, 8192)[512..1024].to_vec();
    block[188..198].fill(7);
    assert_eq!(
        disk.log(),
        [LogEntry::Write {
            offset: 512,
            data: block
        }]
    );
    assert_eq!(
        disk.counts().reads,
        1,
        "one block, padded on both sides, is read once"
    );
    end(world, backend);
}

/// Hazard Q21: while a block is read and changed for one write, another write into it waits, and so
/// does a read.
#[test]
fn padding_serialises_the_block() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[("request-alignment", "512")]);
    let reads = disk.hold(Match::reads());
    let one = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[1; 100][..], PLAIN)
    });
    let two = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 100, &[2; 100][..], PLAIN)
    });
    let three = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[3; 512][..], PLAIN)
    });
    let apart = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 512, &[4; 512][..], PLAIN)
    });
    settle(&world);
    assert_eq!(
        (reads.waiting(), disk.counts().writes),
        (1, 1),
        "one reads, only the other block is written"
    );
    assert!(apart.borrow().is_some() && one.borrow().is_none());
    assert_eq!(backend.in_flight(), 3);
    drop(reads);
    settle(&world);
    for result in [one, two, three, apart] {
        assert!(result.borrow_mut().take().unwrap().is_ok());
    }
    let mut want = vec![3; 512];
    want.extend([4; 512]);
    assert!(
        disk.peek(0, 1024) == want,
        "in the order in which they came"
    );
    end(world, backend);
}

/// Hazard Q21: a request can ask for it; a read that overlaps waits until the serialising write is
/// done.
#[test]
fn a_serialising_write_keeps_reads_away() {
    let disk = SimDisk::with_contents(&[1; 4096]);
    let (world, backend) = world(&disk, &[]);
    let writes = disk.hold(Match::writes());
    let write = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[2; 512][..], RequestFlags::SERIALISING)
    });
    let seen = Rc::new(Cell::new(0));
    let noted = seen.clone();
    let read = start(&world, &backend, move |co, backend| {
        let mut buf = [0; 1];
        backend.pread(co, 511, &mut buf[..])?;
        noted.set(buf[0]);
        Ok(())
    });
    settle(&world);
    assert!(read.borrow().is_none() && disk.counts().reads == 0);
    assert!(writes.release(0));
    settle(&world);
    assert!(write.borrow().is_some() && read.borrow().is_some());
    assert_eq!(seen.get(), 2);
    drop(writes);
    end(world, backend);
}

/// Requests longer than the driver takes go down in pieces; each obeys its limits, which the
/// simulated disk asserts.
#[test]
fn long_requests_are_split() {
    let disk = SimDisk::new(1 << 20);
    let (world, backend) = world(
        &disk,
        &[("max-transfer", "5000"), ("request-alignment", "512")],
    );
    let data = pattern(3, 65536);
    world.run(|co| {
        backend.pwrite(co, 4096, &data[..], PLAIN).unwrap();
        assert_eq!(disk.counts().writes, 65536_u64.div_ceil(4608));
        let mut seen = vec![0; 65536];
        backend.pread(co, 4096, &mut seen[..]).unwrap();
        assert!(seen == data);
        assert_eq!(disk.counts().reads, 65536_u64.div_ceil(4608));
    });
    end(world, backend);
}

/// Requests tell when they begin and end, with the same words.
#[test]
fn requests_are_traced() {
    static LINES: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());
    struct Keep;
    impl log::Log for Keep {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            LINES.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }
    log::set_logger(&Keep).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[("node-name", "traced")]);
    let id = world.run(|co| {
        backend.pwrite(co, 512, &[1; 512][..], PLAIN).unwrap();
        disk.fail(Fault::new(Match::reads(), libc::EIO));
        backend.pread(co, 512, &mut [0; 512][..]).unwrap_err();
        co.id()
    });
    end(world, backend);
    log::set_max_level(log::LevelFilter::Off);
    let lines = LINES.lock().unwrap();
    let ours: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains(&format!("req={id} node=traced ")))
        .collect();
    let want =
        |what: &str, ret: &str| format!("{what} req={id} node=traced offset=512 len=512{ret}");
    assert_eq!(
        ours,
        [
            &want("write begin", ""),
            &want("write end", " ret=0"),
            &want("read begin", ""),
            &want("read end", &format!(" ret=-{}", libc::EIO)),
        ]
    );
}

/// Writing zeroes: whole blocks by the driver, odd ends by writing; all by writing where the driver
/// cannot.
#[test]
fn zeroes_by_the_driver_or_by_writing() {
    for zeroes in ["on", "off"] {
        let disk = SimDisk::with_contents(&pattern(1, 16384));
        let (world, backend) = world(&disk, &[("request-alignment", "512"), ("zeroes", zeroes)]);
        let mut model = pattern(1, 16384);
        world.run(|co| {
            for (offset, len) in [(100, 50), (1000, 3000), (4096, 4096), (16_000, 384), (0, 0)] {
                backend.pwrite_zeroes(co, offset, len, PLAIN).unwrap();
                let (from, to) = (offset as usize, (offset + len) as usize);
                model[from..to].fill(0);
                assert!(
                    disk.peek(0, 16384) == model,
                    "{len} at {offset}, driver {zeroes}"
                );
            }
            let odd = backend
                .pwrite_zeroes(co, 1, 4096, RequestFlags::NO_FALLBACK)
                .unwrap_err();
            assert_eq!(
                (odd.kind(), odd.errno()),
                (ErrorKind::NotSupported, libc::ENOTSUP)
            );
            let whole = backend.pwrite_zeroes(co, 8192, 4096, RequestFlags::NO_FALLBACK);
            assert_eq!(whole.is_ok(), zeroes == "on");
        });
        assert_eq!(disk.counts().zeroes > 0, zeroes == "on");
        end(world, backend);
    }
}

/// A discard is advice: odd ends are left, `discard=ignore` does nothing; both are successes.
#[test]
fn discards_are_advice() {
    let disk = SimDisk::with_contents(&pattern(1, 8192));
    for (discard, seen) in [("ignore", 0), ("unmap", 1)] {
        let (world, backend) = world(&disk, &[("request-alignment", "512"), ("discard", discard)]);
        world.run(|co| {
            backend.pdiscard(co, 100, 5000).unwrap();
            assert_eq!(disk.counts().discards, seen);
            let past = backend.pdiscard(co, 8000, 1000).unwrap_err();
            assert_eq!(past.errno(), libc::EIO);
        });
        end(world, backend);
    }
    assert_eq!(
        disk.log()[0],
        LogEntry::Zero {
            offset: 512,
            len: 4096
        }
    );
}

/// What a disk checks, in the errors of the reference: test-block-iothread's /sync-op/pread,
/// pwrite, pwrite_zeroes, pdiscard, truncate and flush.
#[test]
fn ranges_that_no_disk_has_are_eio() {
    let disk = SimDisk::new(65536);
    let (world, backend) = world(&disk, &[]);
    let minus_two = -2_i64 as u64;
    world.run(|co| {
        let mut buf = [0; 512];
        backend.pread(co, 0, &mut buf[..]).unwrap();
        backend.pwrite(co, 0, &buf[..], PLAIN).unwrap();
        for offset in [minus_two, u64::MAX, 65536 - 511, 65537, 1 << 62] {
            for result in [
                backend.pread(co, offset, &mut buf[..]),
                backend.pwrite(co, offset, &buf[..], PLAIN),
                backend.pwrite_zeroes(co, offset, 512, PLAIN),
                backend.pdiscard(co, offset, 512),
            ] {
                assert_eq!(result.unwrap_err().errno(), libc::EIO, "{offset}");
            }
        }
        for len in [u64::MAX, minus_two, 1 << 63] {
            assert_eq!(
                backend
                    .pwrite_zeroes(co, 512, len, PLAIN)
                    .unwrap_err()
                    .errno(),
                libc::EIO
            );
            assert_eq!(
                backend.truncate(co, len, true).unwrap_err().errno(),
                libc::EINVAL
            );
        }
        let long = backend.truncate(co, (1 << 63) - 1, true).unwrap_err();
        assert_eq!(
            (long.kind(), long.errno()),
            (ErrorKind::LimitExceeded, libc::EFBIG)
        );
        backend.truncate(co, 65536, false).unwrap();
        backend.flush(co).unwrap();
        backend.pread(co, 65536, &mut [0; 0][..]).unwrap();
    });
    end(world, backend);
}

/// A read-only node: writes are EPERM, resizing is EACCES, a flush is a success that does nothing.
#[test]
fn a_read_only_node_refuses_changes() {
    let disk = SimDisk::new(4096);
    let (world, backend) = world(&disk, &[("read-only", "on")]);
    world.run(|co| {
        for result in [
            backend.pwrite(co, 0, &[1][..], PLAIN),
            backend.pwrite(co, 0, &[0; 0][..], PLAIN),
            backend.pwrite_zeroes(co, 0, 512, PLAIN),
            backend.pdiscard(co, 0, 512),
        ] {
            let error = result.unwrap_err();
            assert_eq!(
                (error.kind(), error.errno()),
                (ErrorKind::ReadOnly, libc::EPERM)
            );
        }
        assert_eq!(
            backend.truncate(co, 0, true).unwrap_err().errno(),
            libc::EACCES
        );
        backend.flush(co).unwrap();
    });
    assert_eq!(disk.log(), []);
    end(world, backend);
}

/// A resize waits for what is in flight, keeps new requests away, and what it adds reads as zeros.
#[test]
fn a_resize_is_alone() {
    let disk = SimDisk::with_contents(&[9; 8192]);
    let (world, backend) = world(&disk, &[]);
    let hold = disk.hold(Match::writes());
    let write = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 4096, &[1; 512][..], PLAIN)
    });
    let shrink = start(&world, &backend, |co, backend| {
        backend.truncate(co, 2048, true)
    });
    let read = start(&world, &backend, |co, backend| {
        backend.pread(co, 4096, &mut [0; 512][..])
    });
    settle(&world);
    assert!(shrink.borrow().is_none() && read.borrow().is_none());
    drop(hold);
    settle(&world);
    assert!(write.borrow().as_ref().unwrap().is_ok());
    assert!(shrink.borrow().as_ref().unwrap().is_ok());
    assert!(
        read.borrow().as_ref().unwrap().is_ok(),
        "it was inside when it came"
    );
    assert_eq!((backend.len(), disk.len()), (2048, 2048));
    world.run(|co| {
        backend.truncate(co, 6000, true).unwrap();
        let mut seen = [1; 6000];
        backend.pread(co, 0, &mut seen[..]).unwrap();
        assert!(seen[..2048].iter().all(|byte| *byte == 9));
        assert!(
            seen[2048..].iter().all(|byte| *byte == 0),
            "old bytes do not come back"
        );
    });
    end(world, backend);
}

/// Rule 2.5: the length is looked at again after a wait: a write that no longer fits is refused,
/// not misplaced.
#[test]
fn a_write_that_waited_is_checked_again() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[("growable", "off")]);
    let hold = disk.hold(Match::writes());
    let _first = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[1; 512][..], PLAIN)
    });
    let _shrink = start(&world, &backend, |co, backend| {
        backend.truncate(co, 4096, true)
    });
    let late = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 6000, &[1; 512][..], PLAIN)
    });
    settle(&world);
    drop(hold);
    settle(&world);
    let error = late.borrow_mut().take().unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.errno()),
        (ErrorKind::OutOfBounds, libc::EIO)
    );
    assert_eq!(disk.len(), 4096);
    end(world, backend);
}

/// Rule 5.7: close refuses what comes, waits for what is there, flushes, and leaves nothing behind.
#[test]
fn close_waits_for_requests_in_flight() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[]);
    let hold = disk.hold(Match::writes());
    let write = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[1; 512][..], PLAIN)
    });
    let close = start(&world, &backend, |co, backend| backend.close(co));
    settle(&world);
    assert!(write.borrow().is_none() && close.borrow().is_none());
    assert_eq!(backend.in_flight(), 1);
    let refused = world
        .run(|co| backend.pread(co, 0, &mut [0; 512][..]))
        .unwrap_err();
    assert_eq!(
        (refused.kind(), refused.errno()),
        (ErrorKind::Closed, libc::ENOMEDIUM)
    );
    hold.release_all();
    settle(&world);
    assert!(write.borrow().as_ref().unwrap().is_ok() && close.borrow().as_ref().unwrap().is_ok());
    assert_eq!(disk.pending_at(disk.log_len()), 0, "close flushes");
    assert_eq!(backend.in_flight(), 0);
    drop(hold);
    // A second close does nothing.
    end(world, backend);
}

/// Rule 5.7: one user's close waits for its own requests; the node stays open for the other.
#[test]
fn a_node_closes_with_its_last_user() {
    let disk = SimDisk::new(8192);
    let (world, one) = world(&disk, &[]);
    let two = Arc::new(BlockBackend::new(&world.graph, one.node().clone()));
    let hold = disk.hold(Match::reads());
    let busy = start(&world, &two, |co, two| two.pread(co, 0, &mut [0; 512][..]));
    world.run(|co| one.close(co)).unwrap();
    assert!(world.run(|co| one.flush(co)).is_err());
    drop(hold);
    settle(&world);
    assert!(busy.borrow().as_ref().unwrap().is_ok());
    world
        .run(|co| two.pwrite(co, 0, &[1; 512][..], PLAIN))
        .unwrap();
    drop(one);
    assert_eq!(world.graph.live_nodes(), 1);
    end(world, two);
}

/// An error names the node's file and the offset, and carries the disk's errno; only its own
/// request fails.
#[test]
fn an_error_tells_where() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[("node-name", "disk0")]);
    disk.fail(
        Fault::new(Match::writes().touching(4096..8192), libc::ENOSPC)
            .after(1)
            .torn(100),
    );
    world.run(|co| {
        backend.pwrite(co, 4096, &[1; 512][..], PLAIN).unwrap();
        backend.pwrite(co, 0, &[1; 512][..], PLAIN).unwrap();
        let error = backend.pwrite(co, 5000, &[2; 512][..], PLAIN).unwrap_err();
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::NoSpace, libc::ENOSPC)
        );
        assert_eq!(
            (error.node(), error.file(), error.offset()),
            (Some("disk0"), Some("sim"), Some(5000))
        );
        assert_eq!(
            error.to_string(),
            "write: No space left on device (file 'sim', offset 5000)"
        );
        backend.pwrite(co, 5000, &[3; 50][..], PLAIN).unwrap();
    });
    assert_eq!(
        disk.peek(5050, 50),
        [2; 50],
        "what had arrived of the torn write"
    );
    assert_eq!(disk.peek(5100, 412), [0; 412]);
    end(world, backend);
}

/// Limits of every driver, and of everything below it: a user sees what nobody will pad, copy or
/// take apart.
#[test]
fn limits_are_merged_upward() {
    let plain = Limits::default();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, [0; 4096]).unwrap();
    let path = path.to_str().unwrap();
    let odd = |prefix: &str| {
        let key = |name: &str| format!("{prefix}{name}");
        Options::new()
            .with(&key("driver"), "sim")
            .with_object(&key("disk"), SimDisk::new(1 << 20))
            .with(&key("request-alignment"), "512")
            .with(&key("mem-alignment"), "256")
            .with(&key("max-transfer"), "8192")
    };
    let odd_limits = Limits {
        request_alignment: 512,
        mem_alignment: 256,
        max_transfer: 8192,
        ..plain
    };
    let world = World::simulated();
    let clock = world.home.context().clock();
    let group = ThrottleGroup::new("group", clock, ThrottleConfig::default()).unwrap();
    world.graph.add_throttle_group(&group).unwrap();
    for (name, options, own, whole) in [
        (
            "null",
            Options::new().with("driver", "null-co"),
            plain,
            plain,
        ),
        ("file", Options::file(path), plain, plain),
        (
            "raw on file",
            Options::format_on_file("raw", path),
            plain,
            plain,
        ),
        ("sim", odd(""), odd_limits, odd_limits),
        (
            "raw on sim",
            odd("file.").with("driver", "raw"),
            plain,
            odd_limits,
        ),
        (
            "throttle on sim",
            odd("file.")
                .with("driver", "throttle")
                .with("throttle-group", "group"),
            plain,
            odd_limits,
        ),
        (
            "copy-on-read on sim",
            odd("file.").with("driver", "copy-on-read"),
            plain,
            odd_limits,
        ),
    ] {
        let backend = world.open(options).unwrap();
        assert_eq!(backend.node().limits(), own, "{name}");
        assert_eq!(backend.node().whole_limits(), whole, "{name}");
        world.close(backend).unwrap();
    }
    world.end();
}
