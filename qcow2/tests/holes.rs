//! The space of freed clusters goes back to the file while others go on.

mod support;

use std::collections::BTreeSet;

use coblock_block::drivers::sim::{Fault, Match, Op, SimDisk};
use coblock_block::{BlockBackend, Options, RequestFlags, Result};
use coblock_coroutine::Co;
use coblock_qcow2::Qcow2;
use coblock_qcow2::audit::Audit;
use coblock_qcow2::check::check;
use coblock_qcow2::create::{CreateOptions, create};
use support::image::with_options;
use support::rig::*;

/// Counts compared with references, in memory and file together.
fn audit(f: &Fixture, disk: &BlockBackend) -> Audit {
    let driver = disk.node().driver();
    let image = driver.as_any().unwrap().downcast_ref::<Qcow2>().unwrap();
    let peek = |at: u64, bytes: &mut [u8]| bytes.copy_from_slice(&f.disk.peek(at, bytes.len()));
    let audit = f.home.run(|co| image.audit(co, &peek));
    audit.expect("nobody changes metadata now").unwrap()
}

/// The disk of `f` as the file of an image.
fn file_of(f: &Fixture) -> Options {
    Options::new()
        .with("driver", "sim")
        .with_object("disk", f.disk.clone())
}

/// The check finds nothing wrong.
fn assert_clean(f: &Fixture, story: &str) {
    let report = with_options(file_of(f), |file| {
        check(file, &file.read_header()?, &mut |_| {})
    });
    let report = report.unwrap();
    assert!(report.is_clean(), "{story}: {report:?}");
}

/// Q13 and rule 9.2: while a hole is punched, writes allocate, and none of them gets the cluster; its
/// count goes down afterwards, and then it serves again.
#[test]
fn rule_9_2_holes_are_punched_beside_other_metadata() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, 2 * CLUSTER, 0x11);
    f.flush(&disk);
    let freed = BEHIND_TABLES.start;
    assert_eq!(f.disk.peek(freed, 2), [0x11; 2], "the first data cluster");

    f.home.run(|co| disk.pdiscard(co, 0, CLUSTER)).unwrap();
    let hold = f.disk.hold(Match::ops(&[Op::Discard]));
    let flushing = {
        let (disk, outcome) = (disk.clone(), Outcome::default());
        let result = outcome.clone();
        f.home.spawn("flush", move |co| result.set(disk.flush(co)));
        outcome
    };
    while hold.waiting() == 0 {
        f.home.poll(true);
    }
    // The metadata mutex is free: this one allocates, and ends.
    f.write(&disk, 16 * CLUSTER, CLUSTER, 0x22);
    assert!(!flushing.is_done());
    assert_ne!(
        f.disk.peek(freed, 1),
        [0x22],
        "not the cluster that is being punched"
    );
    let during = audit(&f, &disk);
    assert_eq!(during.leaked, 0);

    hold.release_all();
    drop(hold);
    f.wait(&flushing).unwrap();
    let after = audit(&f, &disk);
    assert_eq!((after.leaked, after.counted), (0, during.counted - 1));
    f.write(&disk, 17 * CLUSTER, CLUSTER, 0x33);
    assert_eq!(f.disk.peek(freed, 1), [0x33], "it serves again");
    assert_eq!(f.read(&disk, 0, 1), [0]);
    assert_eq!(f.read(&disk, CLUSTER, 1), [0x11]);
    assert_eq!(f.read(&disk, 16 * CLUSTER, 1), [0x22]);
    f.home.run(|co| disk.close(co)).unwrap();
}

/// Q13 and rule 9.2: a table that has moved gives its space back in the same way, whichever it is. While
/// that hole is punched, others allocate, and none of them gets its cluster before the end.
#[test]
fn rule_9_2_old_tables_are_punched_beside_other_metadata() {
    // The first refcount table counts 2 MiB, the first L1 table maps 64 KiB.
    let small = CreateOptions {
        cluster_size: 512,
        refcount_bits: 64,
        ..CreateOptions::new(64 << 10)
    };
    type Grow = fn(&Co, &BlockBackend) -> Result<()>;
    let tables: [(&str, u64, Grow); 2] = [
        ("L1", 40, |co, disk| {
            disk.truncate(co, 16 << 20, true)?;
            disk.flush(co)
        }),
        ("refcount", 48, |co, disk| {
            disk.pwrite(co, 0, &vec![0x44; 3 << 20][..], RequestFlags::empty())?;
            disk.flush(co)
        }),
    ];
    for (name, pointer, grow) in tables {
        let mut f = Fixture::new();
        f.disk = SimDisk::with_contents(&[]);
        let options = CreateOptions {
            virtual_size: if name == "L1" { 64 << 10 } else { 4 << 20 },
            ..small.clone()
        };
        with_options(file_of(&f), |file| create(file, &options)).unwrap();
        let disk = f
            .open_with(f.options().with("pass-discard-other", "on"))
            .unwrap();
        f.write(&disk, 0, 512, 0x11);
        f.flush(&disk);
        let table = f.word(pointer);
        let hold = f
            .disk
            .hold(Match::ops(&[Op::Discard]).touching(table..table + 512));
        let growing = {
            let (disk, outcome) = (disk.clone(), Outcome::default());
            let result = outcome.clone();
            f.home.spawn("grow", move |co| result.set(grow(co, &disk)));
            outcome
        };
        while hold.waiting() == 0 {
            assert!(!growing.is_done(), "{name}: the hole was punched");
            f.home.poll(true);
        }
        assert_ne!(f.word(pointer), table, "{name}: the table has moved");
        // The metadata mutex is free: this one allocates, and ends.
        let before = f.disk.peek(table, 512);
        f.write(&disk, options.virtual_size - 512, 512, 0x22);
        assert!(!growing.is_done(), "{name}");
        assert_eq!(f.disk.peek(table, 512), before, "{name}: nobody got it");
        hold.release_all();
        drop(hold);
        f.wait(&growing).unwrap();
        // Punched; the next one has got the other.
        assert_ne!(f.disk.peek(table, 512), before, "{name}");
        f.close(disk);
        assert_clean(&f, name);
    }
}

/// Rule 9.3, "errors of each step are returned", to whom they belong: a write whose own work is done
/// finds that the counts of freed clusters cannot be lowered. It has succeeded; the clusters stay on
/// the list, the next flush fails as long as the file does, and the one after that lowers them.
#[test]
fn a_write_that_cannot_lower_counts_leaves_it_to_the_next_flush() {
    const FREED: u64 = 8;
    const STEP: u64 = 48 << 10;
    let mut f = Fixture::new();
    f.disk = SimDisk::with_contents(&[]);
    // A refcount block, which is one slice, counts 64 clusters.
    let small = CreateOptions {
        cluster_size: 512,
        refcount_bits: 64,
        ..CreateOptions::new(512 << 10)
    };
    with_options(file_of(&f), |file| create(file, &small)).unwrap();
    // Fewer slices than there are blocks with freed clusters.
    let options = || f.options().with("refcount-cache-size", "2048");
    let disk = f.open_with(options()).unwrap();
    f.write(&disk, 0, FREED * STEP, 0x11);
    f.flush(&disk);
    let host_of = |guest: u64| {
        let table = f.word(f.word(40) + guest / (32 << 10) * 8) & !COPIED;
        f.word(table + guest / 512 % 64 * 8) & !COPIED
    };
    let block_of = |host: u64| f.word(f.word(48) + host / 512 / 64 * 8);
    let count_of = |host: u64| f.word(block_of(host) + host / 512 % 64 * 8);
    let freed: Vec<u64> = (0..FREED).map(|nth| host_of(nth * STEP)).collect();
    let blocks: BTreeSet<u64> = freed.iter().map(|host| block_of(*host)).collect();
    assert_eq!(blocks.len() as u64, FREED);

    // Each is being read while it is discarded, so that the flush leaves it alone.
    let holds: Vec<_> = freed
        .iter()
        .map(|host| f.disk.hold(Match::reads().touching(*host..host + 512)))
        .collect();
    let reads: Vec<_> = (0..FREED)
        .map(|nth| {
            let (disk, outcome) = (disk.clone(), Outcome::default());
            let result = outcome.clone();
            f.home.spawn("read", move |co| {
                let mut data = [0; 512];
                result.set(disk.pread(co, nth * STEP, &mut data[..]));
                assert_eq!(data, [0x11; 512]);
            });
            outcome
        })
        .collect();
    f.settle();
    assert!(holds.iter().all(|hold| hold.waiting() == 1));
    for nth in 0..FREED {
        f.home.run(|co| disk.pdiscard(co, nth * STEP, 512)).unwrap();
    }
    f.flush(&disk);
    drop(holds);
    for read in &reads {
        f.wait(read).unwrap();
    }
    assert!(freed.iter().all(|host| count_of(*host) == 1));

    // The next write finds them unused, and punches the holes when its own work is done; then no
    // refcount block can be read any more.
    let hold = f.disk.hold(Match::ops(&[Op::Discard]));
    let new = FREED * STEP;
    let write = f.start_write(&disk, new, 1024, 0x22);
    while hold.waiting() == 0 {
        f.home.poll(true);
    }
    assert!(!write.is_done());
    for block in &blocks {
        let broken = Match::reads().touching(*block..block + 512);
        f.disk.fail(Fault::new(broken, libc::EIO).from_then_on());
    }
    drop(hold);
    f.wait(&write).unwrap();
    assert_eq!(
        f.disk.take_hits().len(),
        1,
        "the first count that is not in memory"
    );
    assert_eq!(f.read(&disk, new, 1024), [0x22; 1024]);

    f.home.run(|co| disk.flush(co)).unwrap_err();
    f.disk.clear_faults();
    f.flush(&disk);
    assert_eq!(audit(&f, &disk).leaked, 0);
    f.close(disk);

    assert!(freed.iter().all(|host| count_of(*host) == 0));
    assert_clean(&f, "closed");
    let disk = f.open_with(options()).unwrap();
    f.write(&disk, new + 1024, 512, 0x33);
    for nth in 0..FREED {
        assert_eq!(f.read(&disk, nth * STEP, 512), [0; 512]);
        let rest = f.read(&disk, nth * STEP + 512, STEP - 512);
        assert!(rest.iter().all(|&byte| byte == 0x11), "{nth}");
    }
    assert_eq!(f.read(&disk, new, 1024), [0x22; 1024]);
    assert_eq!(f.read(&disk, new + 1024, 512), [0x33; 512]);
    f.close(disk);
}
