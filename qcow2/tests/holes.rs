//! The space of freed clusters goes back to the file while others go on.

mod support;

use coblock_block::drivers::sim::{Match, Op, SimDisk};
use coblock_block::{BlockBackend, Options, RequestFlags, Result};
use coblock_coroutine::Co;
use coblock_qcow2::Qcow2;
use coblock_qcow2::check::check;
use coblock_qcow2::create::{CreateOptions, create};
use support::image::with_options;
use support::rig::*;

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
    let audit = || {
        let driver = disk.node().driver();
        let image = driver.as_any().unwrap().downcast_ref::<Qcow2>().unwrap();
        let peek = |at: u64, bytes: &mut [u8]| bytes.copy_from_slice(&f.disk.peek(at, bytes.len()));
        let audit = f.home.run(|co| image.audit(co, &peek));
        audit.expect("nobody changes metadata now").unwrap()
    };
    let during = audit();
    assert_eq!(during.leaked, 0);

    hold.release_all();
    drop(hold);
    f.wait(&flushing).unwrap();
    let after = audit();
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
        let sim = Options::new()
            .with("driver", "sim")
            .with_object("disk", f.disk.clone());
        with_options(sim, |file| create(file, &options)).unwrap();
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
        let sim = Options::new()
            .with("driver", "sim")
            .with_object("disk", f.disk.clone());
        let report = with_options(sim, |file| check(file, &file.read_header()?, &mut |_| {}));
        let report = report.unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
    }
}
