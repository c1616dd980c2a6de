//! Flushes: when they reach the disk, what they cover, and what a failed one leaves (rule 2.2).

mod support;

use coblock_block::drivers::sim::{Fault, LogEntry, Match, SimDisk};
use coblock_block::{ErrorKind, Options, RequestFlags};
use support::{PLAIN, World, end, settle, sim, sim_world as world, start};

/// Rule 2.2: a flush reaches the disk when something was written since the last one, and not
/// otherwise.
#[test]
fn flushes_are_skipped_when_nothing_was_written() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[]);
    world.run(|co| {
        let flushes = || disk.counts().flushes;
        backend.flush(co).unwrap();
        assert_eq!(flushes(), 0, "nothing was ever written");
        backend.pwrite(co, 0, &[1; 512][..], PLAIN).unwrap();
        backend.flush(co).unwrap();
        backend.flush(co).unwrap();
        assert_eq!(flushes(), 1);
        backend.pread(co, 0, &mut [0; 512][..]).unwrap();
        backend.flush(co).unwrap();
        assert_eq!(flushes(), 1, "a read is no write");
        backend.pwrite_zeroes(co, 0, 512, PLAIN).unwrap();
        backend.flush(co).unwrap();
        assert_eq!(flushes(), 2);
        backend.truncate(co, 4096, true).unwrap();
        backend.flush(co).unwrap();
        assert_eq!(flushes(), 3);
        disk.fail(Fault::new(Match::writes(), libc::EIO));
        backend.pwrite(co, 0, &[1; 512][..], PLAIN).unwrap_err();
        backend.flush(co).unwrap();
        assert_eq!(
            flushes(),
            4,
            "a write that failed may have changed something"
        );
    });
    end(world, backend);
}

/// `cache.no-flush=on`: the owner says that the data may be lost; flushes are successes that do
/// nothing.
#[test]
fn no_flush_flushes_nothing() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[("cache.no-flush", "on")]);
    world.run(|co| {
        backend
            .pwrite(co, 0, &[1; 512][..], RequestFlags::FUA)
            .unwrap();
        backend.flush(co).unwrap();
    });
    end(world, backend);
    assert_eq!(disk.counts().flushes, 0);
}

/// A write that ends while a flush is under way is not covered by it: the next flush is not
/// skipped.
#[test]
fn a_write_during_a_flush_needs_the_next_one() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[]);
    world
        .run(|co| backend.pwrite(co, 0, &[1; 512][..], PLAIN))
        .unwrap();
    let hold = disk.hold(Match::flushes());
    let first = start(&world, &backend, |co, backend| backend.flush(co));
    let second = start(&world, &backend, |co, backend| backend.flush(co));
    settle(&world);
    assert_eq!(
        (hold.waiting(), disk.counts().flushes),
        (1, 1),
        "one flush at a time"
    );
    world
        .run(|co| backend.pwrite(co, 512, &[2; 512][..], PLAIN))
        .unwrap();
    assert!(hold.release(0));
    settle(&world);
    assert!(first.borrow().is_some() && second.borrow().is_none());
    assert_eq!(disk.counts().flushes, 2);
    hold.release_all();
    settle(&world);
    assert!(second.borrow().is_some());
    let third = start(&world, &backend, |co, backend| backend.flush(co));
    assert!(third.borrow().is_some(), "nothing was written since");
    assert_eq!(disk.counts().flushes, 2);
    let covered: Vec<_> = disk
        .log()
        .into_iter()
        .filter_map(|entry| match entry {
            LogEntry::Flush { covered } => Some(covered),
            _ => None,
        })
        .collect();
    assert_eq!(covered, [vec![0], vec![0, 1]]);
    drop(hold);
    end(world, backend);
}

/// Reliability: a flush that failed is never repeated as a success; only reopening helps.
#[test]
fn a_failed_flush_poisons() {
    let disk = SimDisk::new(8192);
    for top in ["sim", "raw"] {
        let world = World::simulated();
        let options = match top {
            "raw" => {
                let mut options = Options::new().with("driver", "raw");
                options.nest("file", sim(&disk));
                options
            }
            _ => sim(&disk),
        };
        let backend = world.open(options.clone()).unwrap();
        world.run(|co| {
            backend.pwrite(co, 0, &[1; 512][..], PLAIN).unwrap();
            disk.fail(Fault::new(Match::flushes(), libc::EIO));
            let first = backend.flush(co).unwrap_err();
            assert_eq!((first.kind(), first.errno()), (ErrorKind::Io, libc::EIO));
            let flushes = disk.counts().flushes;
            for _ in 0..2 {
                let later = backend.flush(co).unwrap_err();
                assert_eq!(
                    (later.kind(), later.errno()),
                    (ErrorKind::Poisoned, libc::EIO)
                );
            }
            let fua = backend
                .pwrite(co, 0, &[1; 512][..], RequestFlags::FUA)
                .unwrap_err();
            assert_eq!(fua.kind(), ErrorKind::Poisoned);
            assert_eq!(
                disk.counts().flushes,
                flushes,
                "the disk is not asked again"
            );
            backend.pread(co, 0, &mut [0; 512][..]).unwrap();
            assert_eq!(backend.close(co).unwrap_err().kind(), ErrorKind::Poisoned);
        });
        drop(backend);
        let backend = world.open(options).unwrap();
        world.run(|co| {
            backend.pwrite(co, 0, &[1; 512][..], PLAIN).unwrap();
            backend.flush(co).unwrap();
        });
        world.close(backend).unwrap();
        world.end();
    }
}

/// FUA is passed on where the driver has it, and else is a write and a flush.
#[test]
fn fua_is_native_or_a_flush() {
    for (native, flushes) in [("on", 0), ("off", 1)] {
        let disk = SimDisk::new(8192);
        let (world, backend) = world(&disk, &[("fua", native), ("request-alignment", "512")]);
        world.run(|co| {
            backend
                .pwrite(co, 10, &[1; 600][..], RequestFlags::FUA)
                .unwrap();
            assert_eq!(disk.counts().flushes, flushes, "native FUA {native}");
            assert_eq!(
                disk.pending_at(disk.log_len()),
                0,
                "on stable storage, native FUA {native}"
            );
            backend
                .pwrite_zeroes(co, 10, 600, RequestFlags::FUA)
                .unwrap();
            assert_eq!(disk.pending_at(disk.log_len()), 0, "zeroes as well");
        });
        end(world, backend);
    }
}

/// Rule 2.2: `pwrite_sync` is write, then flush.
#[test]
fn pwrite_sync_is_a_write_and_then_a_flush() {
    let disk = SimDisk::new(8192);
    let (world, backend) = world(&disk, &[]);
    world
        .run(|co| backend.pwrite_sync(co, 512, &[1; 512][..]))
        .unwrap();
    let log = disk.log();
    assert_eq!(
        log[0],
        LogEntry::Write {
            offset: 512,
            data: vec![1; 512]
        }
    );
    assert_eq!(log[1..], [LogEntry::Flush { covered: vec![0] }]);
    end(world, backend);
}
