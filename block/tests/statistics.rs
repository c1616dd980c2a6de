//! What a backend counts of its requests, on a virtual clock; and what is told of them.

mod support;

use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::throttle::{Limit, ThrottleConfig, ThrottleGroup};
use coblock_block::{ErrorKind, IoKind, RequestFlags};
use support::{PLAIN, end, settle, sim_world, start};

const US: u64 = 1000;

/// Each kind has its own counters; what fails and what is refused are two other ones, and no bytes.
#[test]
fn each_kind_counts_its_operations_and_bytes() {
    let disk = SimDisk::new(1 << 20);
    let (world, backend) = sim_world(&disk, &[("discard", "unmap")]);
    assert_eq!(backend.statistics(), coblock_block::Statistics::default());
    world.home.run(|co| {
        backend.pread(co, 0, &mut [0; 4096][..]).unwrap();
        backend.pread(co, 4096, &mut [0; 512][..]).unwrap();
        backend.pwrite(co, 0, &[1; 1024][..], PLAIN).unwrap();
        backend.pwrite_sync(co, 0, &[1; 512][..]).unwrap();
        backend.pwrite_zeroes(co, 0, 65536, PLAIN).unwrap();
        backend.pdiscard(co, 0, 8192).unwrap();
        backend.flush(co).unwrap();
        // Questions and the length are in no statistics.
        backend.block_status(co, 0, 512).unwrap();
        backend.truncate(co, 1 << 20, true).unwrap();
        // Refused: a disk has no such bytes.
        let past = backend.pread(co, 1 << 20, &mut [0; 512][..]);
        assert_eq!(past.unwrap_err().kind(), ErrorKind::OutOfBounds);
    });
    disk.fail(Fault::new(Match::writes(), 5));
    let failed = |co: &_| backend.pwrite(co, 0, &[1; 2048][..], RequestFlags::empty());
    assert!(world.home.run(failed).is_err());
    backend.account_merged(IoKind::Write, 3);
    backend.account_invalid(IoKind::Flush);

    let all = backend.statistics();
    for (kind, operations, bytes, failed, invalid, merged) in [
        (IoKind::Read, 2, 4608, 0, 1, 0),
        (IoKind::Write, 2, 1536, 1, 0, 3),
        (IoKind::Zero, 1, 65536, 0, 0, 0),
        (IoKind::Discard, 1, 8192, 0, 0, 0),
        (IoKind::Flush, 1, 0, 0, 1, 0),
    ] {
        let its = all.of(kind);
        let found = (
            its.operations,
            its.bytes,
            its.failed,
            its.invalid,
            its.merged,
        );
        let want = (operations, bytes, failed, invalid, merged);
        assert_eq!(found, want, "{kind:?}");
        let ended: u64 = its.latencies.iter().map(|(_, count)| count).sum();
        assert_eq!(
            ended,
            operations + failed,
            "{kind:?}: each that ended has its time"
        );
    }
    end(world, backend);
}

/// A request's time is that between the passes of the loop, what it waits for limits with it; and
/// the idle time begins when the last one ends.
#[test]
fn times_are_those_of_the_clock() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let clock = world.clock.clone().unwrap();
    clock.advance(7 * US);
    world.home.poll(false);
    let config = ThrottleConfig {
        iops_total: Limit::average(10),
        ..ThrottleConfig::default()
    };
    let group = ThrottleGroup::new("group", world.home.context().clock(), config).unwrap();
    backend.set_throttle(Some(&group));
    let boundaries = [1, 150_000 * US, 200_000 * US];
    backend
        .set_latency_histogram(IoKind::Read, Some(&boundaries))
        .unwrap();
    // Two at once, then one each 100 ms.
    for _ in 0..5 {
        start(&world, &backend, |co, backend| {
            backend.pread(co, 0, &mut [0; 512][..])
        });
    }
    while backend.in_flight() > 0 {
        world.home.poll(true);
    }
    let all = backend.statistics();
    let reads = all.of(IoKind::Read);
    assert_eq!(reads.operations, 5);
    assert_eq!(reads.time_ns, 600_000 * US);
    assert_eq!(reads.longest_ns, 300_000 * US);
    assert_eq!(reads.percentile_ns(1000), 300_000 * US);
    assert_eq!(reads.percentile_ns(400), 127, "the first bucket");
    let histogram = reads.histogram.as_ref().unwrap();
    assert_eq!(histogram.boundaries, boundaries);
    assert_eq!(
        histogram.bins,
        [2, 1, 0, 2],
        "a boundary belongs to the bin above it"
    );
    let own = reads.latency_histogram();
    assert_eq!(own.bins.len(), own.boundaries.len() + 1);
    assert!(own.boundaries.is_sorted_by(|a, b| a < b), "{own:?}");
    assert_eq!((own.bins[0], own.bins.iter().sum::<u64>()), (2, 5));
    assert_eq!(all.since(&all).of(IoKind::Read).latencies, []);
    clock.advance(40 * US);
    assert_eq!(all.idle_ns(clock.now_ns()), Some(40 * US));
    end(world, backend);
}

/// Boundaries that make no sense change nothing, and `None` takes a histogram away.
#[test]
fn boundaries_are_checked() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let read = IoKind::Read;
    backend
        .set_latency_histogram(read, Some(&[10, 50, 100]))
        .unwrap();
    for wrong in [&[][..], &[0, 1], &[10, 10], &[10, 5]] {
        let error = backend
            .set_latency_histogram(read, Some(wrong))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{wrong:?}");
    }
    let its =
        |backend: &coblock_block::BlockBackend| backend.statistics().of(read).histogram.clone();
    assert_eq!(its(&backend).unwrap().boundaries, [10, 50, 100]);
    backend.set_latency_histogram(read, None).unwrap();
    assert_eq!(its(&backend), None);
    end(world, backend);
}

/// Requests with callbacks and copies are counted like all others.
#[test]
fn callbacks_and_copies_are_counted() {
    let disk = SimDisk::new(1 << 20);
    let (world, backend) = sim_world(&disk, &[]);
    world.home.with(|| {
        backend
            .aio_pread(0, vec![0; 512], |result, _| result.unwrap())
            .unwrap();
        backend
            .aio_pwrite(0, vec![1; 1024], PLAIN, |result, _| result.unwrap())
            .unwrap();
        backend
            .aio_pwrite_zeroes(0, 4096, PLAIN, Result::unwrap)
            .unwrap();
        backend.aio_flush(Result::unwrap).unwrap();
        backend
            .aio_pread(1 << 20, vec![0; 1], |result, _| assert!(result.is_err()))
            .unwrap();
        backend
            .aio_copy_range(0, &backend, 8192, 2048, Result::unwrap)
            .unwrap();
    });
    settle(&world);
    world
        .home
        .run(|co| backend.copy_range(co, 0, &backend, 16384, 512))
        .unwrap();
    let all = backend.statistics();
    let found = IoKind::ALL.map(|kind| (all.of(kind).operations, all.of(kind).bytes));
    let want = [
        (3, 512 + 2048 + 512),
        (3, 1024 + 2048 + 512),
        (1, 4096),
        (0, 0),
        (1, 0),
    ];
    assert_eq!(found, want);
    assert_eq!(all.of(IoKind::Read).invalid, 1);
    end(world, backend);
}
