//! Lazy refcounts: the life of the dirty bit, and what opening a dirty image does. (Hazard O11.)

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use std::rc::Rc;

use coblock_block::drivers::sim::{Fault, Keep, LogEntry, Match, SimDisk};
use coblock_block::{BlockBackend, ErrorKind, Options, Result};
use coblock_qcow2::check::CheckReport;
use support::rig::*;
use support::{image, put64, qemu_img, qemu_io, said, text};

/// Byte of the header with the dirty bit, and byte with the bit that asks for lazy refcounts.
const DIRTY_AT: u64 = 79;
const LAZY_AT: u64 = 87;

/// A fixture whose image asks for lazy refcounts.
fn lazy() -> Fixture {
    let f = Fixture::new();
    f.disk.poke(LAZY_AT, &[1]);
    f
}

/// The same disk, as a power cut leaves it when everything sent has arrived.
fn cut(f: &Fixture) -> Fixture {
    let mut after = Fixture::new();
    after.disk = SimDisk::with_contents(&f.disk.contents());
    after
}

fn is_dirty(f: &Fixture) -> bool {
    f.disk.peek(DIRTY_AT, 1) == [1]
}

fn check(f: &Fixture) -> CheckReport {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", f.disk.clone());
    image::with_options(options, image::report).unwrap().0
}

/// What the disk was sent, in words.
fn steps(f: &Fixture) -> Vec<&'static str> {
    let mut steps: Vec<&str> = Vec::new();
    for entry in f.disk.log() {
        let step = match &entry {
            LogEntry::Write { offset: 72, data } if data[7] == 1 => "dirty",
            LogEntry::Write { offset: 72, .. } => "clean",
            LogEntry::Write { offset, .. } if (REFCOUNT_BLOCK..L1).contains(offset) => "counts",
            LogEntry::Write { offset, .. } if (L1..FIRST_L2).contains(offset) => "L1",
            LogEntry::Write { offset, .. } if (FIRST_L2..FIRST_L2 + CLUSTER).contains(offset) => {
                "L2"
            }
            LogEntry::Write { .. } => "data",
            LogEntry::Flush { .. } => "flush",
            other => panic!("{other:?}"),
        };
        if steps.last() != Some(&step) {
            steps.push(step);
        }
    }
    steps
}

fn open_dirty(f: &Fixture) -> Result<Rc<BlockBackend>> {
    f.open_with(f.options())
}

/// The bit is durable before the first mapping whose count stays in memory, is not written again,
/// and goes last; a flush writes no counts. Only those of tables are not left behind.
#[test]
fn the_dirty_bit_comes_first_and_goes_last() {
    let f = lazy();
    let disk = f.open();
    f.disk.checkpoint();
    f.write(&disk, 0, CLUSTER, 1);
    assert!(!is_dirty(&f), "nothing in the file is behind yet");
    f.flush(&disk);
    assert!(is_dirty(&f));
    assert_eq!(
        steps(&f),
        [
            "counts", "L2", "data", "dirty", "flush", "L2", "L1", "flush"
        ],
        "a new table with its count, the data, then the bit before the mapping"
    );
    f.disk.checkpoint();
    f.write(&disk, CLUSTER, CLUSTER, 2);
    f.flush(&disk);
    assert_eq!(steps(&f), ["data", "flush", "L2", "flush"]);
    assert_eq!(f.refcount(FIRST_L2), 1);
    assert_eq!(f.refcount(5 * CLUSTER), 0, "the count is in memory");

    f.disk.checkpoint();
    f.close(disk);
    assert_eq!(steps(&f), ["counts", "flush", "clean", "flush"]);
    assert!(!is_dirty(&f));
    assert_eq!(f.refcount(5 * CLUSTER), 1);
    assert!(check(&f).is_clean());
}

/// Without a change of counts the image never becomes dirty; without lazy refcounts neither.
#[test]
fn who_becomes_dirty() {
    for (name, header, option, want) in [
        ("the image asks for it", 1, None, true),
        ("the option asks for it", 0, Some("on"), true),
        ("the option says no", 1, Some("off"), false),
        ("nobody asks for it", 0, None, false),
    ] {
        let f = Fixture::new();
        f.disk.poke(LAZY_AT, &[header]);
        let options = match option {
            None => f.options(),
            Some(value) => f.options().with("lazy-refcounts", value),
        };
        let disk = f.open_with(options.clone()).unwrap();
        f.flush(&disk);
        assert!(!is_dirty(&f), "{name}: nothing has changed");
        f.write(&disk, 0, CLUSTER, 1);
        f.flush(&disk);
        assert_eq!(is_dirty(&f), want, "{name}");
        f.close(disk);
        assert!(!is_dirty(&f), "{name}: closed");
        f.disk.checkpoint();
        let disk = f.open_with(options).unwrap();
        f.write(&disk, 0, CLUSTER, 2);
        f.close(disk);
        assert_eq!(steps(&f), ["data", "flush"], "{name}: an overwrite");
    }
}

/// Version 2 has no dirty bit.
#[test]
fn not_in_version_2() {
    let f = Fixture::new();
    f.disk.poke(4, &2u32.to_be_bytes());
    let error = f
        .open_with(f.options().with("lazy-refcounts", "on"))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let want = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
    assert!(error.to_string().contains(want), "{error}");
    let off = f.options().with("lazy-refcounts", "off");
    f.close(f.open_with(off).unwrap());
}

/// After a power cut the data that was flushed is there; reading leaves the image as it is, and
/// opening it for writing counts everything anew.
#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let before = lazy();
    let disk = before.open();
    before.write(&disk, 0, 20 * CLUSTER, 1);
    before.write(&disk, 100 * CLUSTER, CLUSTER, 2);
    before.flush(&disk);
    let f = cut(&before);
    before.close(disk);
    assert!(check(&f).corruptions > 0, "counts are behind");

    let contents = f.disk.contents();
    let disk = f.open_with(f.options().with("read-only", "on")).unwrap();
    assert_eq!(f.read(&disk, 100 * CLUSTER, CLUSTER), [2; CLUSTER as usize]);
    f.close(disk);
    assert_eq!(f.disk.contents(), contents, "only read");

    let disk = open_dirty(&f).unwrap();
    assert!(!is_dirty(&f), "repaired");
    assert!(check(&f).is_clean(), "{:?}", check(&f));
    assert_eq!(f.read(&disk, 0, CLUSTER), [1; CLUSTER as usize]);
    f.write(&disk, 200 * CLUSTER, 10 * CLUSTER, 3);
    assert_eq!(f.read(&disk, 19 * CLUSTER, CLUSTER), [1; CLUSTER as usize]);
    f.close(disk);
    assert!(check(&f).is_clean(), "{:?}", check(&f));
}

/// Whatever write or flush of the repair fails or is the last before a power cut, the image is
/// dirty or repaired, and opening it again repairs it.
#[test]
fn a_repair_may_be_cut_off() {
    let before = lazy();
    let disk = before.open();
    before.write(&disk, 0, 20 * CLUSTER, 1);
    before.flush(&disk);
    let dirty = cut(&before);
    before.close(disk);

    let open_and_leave = |f: &Fixture| open_dirty(f).map(|disk| f.close(disk));
    let whole = cut(&dirty);
    open_and_leave(&whole).unwrap();
    let entries = whole.disk.log_len();
    assert!(entries >= 6, "{:?}", whole.disk.log());
    for at in 0..=entries {
        for keep in [
            coblock_block::drivers::sim::Keep::Nothing,
            coblock_block::drivers::sim::Keep::Everything,
        ] {
            let mut f = cut(&dirty);
            f.disk = whole.disk.after_power_cut(at, &keep);
            assert!(is_dirty(&f) || check(&f).is_clean(), "{at} {keep:?}");
            open_and_leave(&f).unwrap();
            assert!(check(&f).is_clean(), "{at} {keep:?}");
        }
    }
    for what in [Match::writes(), Match::flushes()] {
        for n in 0..3 {
            let f = cut(&dirty);
            f.disk.fail(Fault::new(what.clone(), 5).after(n));
            assert_eq!(open_and_leave(&f).unwrap_err().kind(), ErrorKind::Io, "{n}");
            f.disk.clear_faults();
            open_and_leave(&f).unwrap();
            assert!(check(&f).is_clean(), "{what:?} {n}");
        }
    }
}

/// New refcounts do not help an image whose tables are wrong: it is not opened for writing and
/// nothing is changed.
#[test]
fn other_damage_is_not_repaired() {
    for (name, at, entry) in [
        ("a table outside of the file", L1, COPIED | 1 << 40),
        ("data outside of the file", FIRST_L2, COPIED | 1 << 40),
    ] {
        let before = lazy();
        let disk = before.open();
        before.write(&disk, 0, 2 * CLUSTER, 1);
        before.flush(&disk);
        let f = cut(&before);
        before.close(disk);
        f.disk.poke(at, &entry.to_be_bytes());
        let error = open_dirty(&f).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
        assert!(error.to_string().contains("dirty image"), "{name}: {error}");
        assert!(is_dirty(&f), "{name}");
    }
}

/// Copied flags that the new counts contradict are corrected, either way, as the reference does it;
/// a power cut on the way leaves the image dirty, and what a guest reads stays the same.
#[test]
fn copied_flags_that_contradict_the_counts_are_corrected() {
    let data = 5 * CLUSTER;
    for (name, patches) in [
        (
            "shared data is marked as ours",
            &[(FIRST_L2 + 8, COPIED | data)][..],
        ),
        ("our own data is not marked", &[(FIRST_L2, data)]),
        ("our own table is not marked", &[(L1, FIRST_L2)]),
        (
            "all at once",
            &[
                (FIRST_L2 + 8, COPIED | data),
                (L1, FIRST_L2),
                (FIRST_L2 + 16, 7 * CLUSTER),
            ],
        ),
        (
            "zeroes with a cluster",
            &[(FIRST_L2 + 8, COPIED | data | 1)],
        ),
    ] {
        let before = lazy();
        let disk = before.open();
        before.write(&disk, 0, 3 * CLUSTER, 1);
        before.flush(&disk);
        let f = cut(&before);
        before.close(disk);
        for (at, entry) in patches {
            f.disk.poke(*at, &entry.to_be_bytes());
        }
        assert!(check(&f).corruptions > 0, "{name}");
        f.disk.checkpoint();
        let disk = open_dirty(&f).unwrap_or_else(|e| panic!("{name}: {e}"));
        f.close(disk);
        let log = f.disk.log();
        assert!(check(&f).is_clean(), "{name}: {:?}", check(&f));
        // Whoever shares data gets a place of its own with its next write.
        let disk = f.open();
        f.write(&disk, 0, CLUSTER, 2);
        let rest = f.read(&disk, CLUSTER, CLUSTER);
        let zeroed = name.starts_with("zeroes");
        assert!(rest.iter().all(|&b| b == u8::from(!zeroed)), "{name}");
        f.close(disk);
        for at in 0..=log.len() {
            for keep in [Keep::Nothing, Keep::Everything, Keep::Seed(at as u64)] {
                let mut left = Fixture::new();
                left.disk = f.disk.after_power_cut(at, &keep);
                let story = format!("{name}: cut after {at}, {keep:?}");
                if !is_dirty(&left) {
                    let report = check(&left);
                    assert_eq!(report.corruptions, 0, "{story}: {report:?}");
                }
                let disk = open_dirty(&left).unwrap_or_else(|e| panic!("{story}: {e}"));
                let rest = left.read(&disk, CLUSTER, CLUSTER);
                assert!(rest.iter().all(|&b| b == u8::from(!zeroed)), "{story}");
                left.close(disk);
                assert!(check(&left).is_clean(), "{story}: {:?}", check(&left));
            }
        }
    }
}

/// The reference repairs what we leave, and we what it leaves.
#[test]
fn the_reference_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dirty.qcow2");
    let before = lazy();
    let disk = before.open();
    before.write(&disk, 0, 20 * CLUSTER, 1);
    before.flush(&disk);
    std::fs::write(&path, before.disk.contents()).unwrap();
    before.close(disk);
    let Some(dirty) = qemu_img(&["check", text(&path)]) else {
        return;
    };
    assert_eq!(dirty.status.code(), Some(2), "{}", said(&dirty));
    let repaired = qemu_img(&["check", "-q", "-r", "all", text(&path)]).unwrap();
    assert!(repaired.status.success(), "{}", said(&repaired));
    let read = format!("read -P 1 0 {}", 20 * CLUSTER);
    let read = qemu_io(&["-c", &read, text(&path)]).unwrap();
    assert!(read.status.success(), "{}", said(&read));

    for options in ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=4k"] {
        let created = qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            text(&path),
            "64M",
        ]);
        assert!(created.unwrap().status.success());
        // It aborts, so its status tells nothing.
        qemu_io(&[
            "-c",
            "write -P 7 1M 9M",
            "-c",
            "flush",
            "-c",
            "abort",
            text(&path),
        ])
        .unwrap();
        let mut f = Fixture::new();
        f.disk = SimDisk::with_contents(&std::fs::read(&path).unwrap());
        assert!(is_dirty(&f), "{options}");
        let disk = open_dirty(&f).unwrap();
        assert_eq!(f.read(&disk, 9 << 20, 1 << 20), vec![7; 1 << 20]);
        f.write(&disk, 20 << 20, 1 << 20, 8);
        f.close(disk);
        std::fs::write(&path, f.disk.contents()).unwrap();
        let check = qemu_img(&["check", text(&path)]).unwrap();
        assert!(check.status.success(), "{options}: {}", said(&check));
    }
}

/// A dirty image with the widest and the narrowest counts, clusters far apart, and more blocks than
/// one table cluster can name.
#[test]
fn every_shape_of_refcounts_is_rebuilt() {
    for order in 0..=6u32 {
        let mut image = support::empty_image(9);
        // An image of 1 MiB: header, table, block, L1 table of 32 entries in one cluster.
        support::put32(&mut image, 96, order);
        image[2 * 512..3 * 512].fill(0);
        put64(&mut image, 72, 1);
        let mut f = Fixture::new();
        f.disk = SimDisk::with_contents(&image);
        // Guest cluster 0 far up in the file: its L2 table at 3 MiB, the data behind it.
        f.disk.poke(3 * 512, &(COPIED | 3 << 20).to_be_bytes());
        f.disk
            .poke(3 << 20, &(COPIED | ((3 << 20) + 512)).to_be_bytes());
        f.disk.poke((3 << 20) + 512, &[9; 512]);
        let disk = open_dirty(&f).unwrap_or_else(|e| panic!("{order}: {e}"));
        assert_eq!(f.read(&disk, 0, 512), [9; 512]);
        f.write(&disk, 1 << 16, 1 << 16, 3);
        f.close(disk);
        assert!(check(&f).is_clean(), "{order}: {:?}", check(&f));
    }
}
