//! A disk that becomes shorter, or longer with its space taken at once.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use std::rc::Rc;

use coblock_block::drivers::sim::{Fault, Keep, Match, SimDisk};
use coblock_block::{BlockBackend, ErrorKind, Options, Preallocation};
use coblock_qcow2::check::CheckReport;
use support::rig::*;
use support::{image, qemu_img, said, text};

fn check(disk: &std::sync::Arc<SimDisk>) -> CheckReport {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone());
    image::with_options(options, image::report).unwrap().0
}

fn resize(f: &Fixture, disk: &BlockBackend, len: u64) {
    f.home.run(|co| disk.truncate(co, len, true)).unwrap();
}

/// A disk of 4 MiB, two L2 tables, all of it written with its cluster's number.
fn full_disk(f: &Fixture) -> Rc<BlockBackend> {
    let disk = f.open();
    resize(f, &disk, 4 << 20);
    for cluster in 0..(4 << 20) / CLUSTER {
        f.write(&disk, cluster * CLUSTER, CLUSTER, cluster as u8 | 1);
    }
    f.flush(&disk);
    disk
}

/// What is past the new end is free, the file is as short as its last cluster lets it be, what is
/// before the end is as it was, and a disk that grows again has zeros there, also behind an end
/// inside a cluster.
#[test]
fn a_shorter_disk_frees_what_is_past_its_end() {
    for (new, clusters) in [
        (4 << 20, 1024),
        (3 << 20, 768),
        ((2 << 20) + 512, 513),
        (2 << 20, 512),
        ((1 << 20) - 512, 256),
        (512, 1),
        (0, 0),
    ] {
        let f = Fixture::new();
        let disk = full_disk(&f);
        let before = f.disk.len();
        resize(&f, &disk, new);
        assert_eq!(disk.len(), new);
        let gone = 1024 - clusters;
        assert!(
            f.disk.len() <= before - gone * CLUSTER,
            "{new}: {} of {before} bytes are left",
            f.disk.len()
        );
        for (len, more) in [(new, 0), (new, 1 << 20)] {
            resize(&f, &disk, len + more);
            for at in (0..len + more).step_by(512) {
                let want = if at < new {
                    (at / CLUSTER) as u8 | 1
                } else {
                    0
                };
                assert!(
                    f.read(&disk, at, 512) == [want; 512],
                    "{new}, then {more} more, at {at}"
                );
            }
        }
        f.close(disk);
        let report = check(&f.disk);
        assert!(report.is_clean(), "{new}: {report:?}");
    }
}

/// The power may go at any write of it: nothing is referred to that is not counted, and what lies
/// before the new end reads as it did. (Rule 9.3, hazard O19.)
#[test]
fn rule_9_3_power_cuts_while_a_disk_becomes_shorter() {
    for new in [(2 << 20) + 512, 600 << 10, 0] {
        let f = Fixture::new();
        let disk = full_disk(&f);
        f.disk.checkpoint();
        resize(&f, &disk, new);
        f.close(disk);
        let log = f.disk.log().len();
        assert!(log > 6, "{log} entries");
        let mut sizes = std::collections::BTreeSet::new();
        for at in 0..=log {
            let pending = f.disk.pending_at(at);
            let choices = [Keep::Nothing, Keep::Everything]
                .into_iter()
                .chain((0..pending).map(Keep::AllBut))
                .chain((0..4).map(Keep::Seed));
            for keep in choices {
                let story = format!("{new}: cut after {at} of {log}, kept {keep:?}");
                let mut left = Fixture::new();
                left.disk = f.disk.after_power_cut(at, &keep);
                let report = check(&left.disk);
                assert_eq!(
                    report.corruptions + report.check_errors,
                    0,
                    "{story}: {report:?}"
                );
                let disk = left.open();
                sizes.insert(disk.len());
                assert!(
                    [4 << 20, new].contains(&disk.len()),
                    "{story}: {}",
                    disk.len()
                );
                for cluster in 0..new.div_ceil(CLUSTER) {
                    let len = CLUSTER.min(new - cluster * CLUSTER);
                    let seen = left.read(&disk, cluster * CLUSTER, len);
                    assert!(seen.iter().all(|&b| b == cluster as u8 | 1), "{story}");
                }
                left.close(disk);
            }
        }
        assert_eq!(sizes.len(), 2, "{new}: both lengths were seen: {sizes:?}");
    }
}

/// A write that fails on the way leaves the old length, a sound image, and a disk that can be made
/// shorter again.
#[test]
fn errors_while_a_disk_becomes_shorter() {
    for fails in 0..40 {
        let f = Fixture::new();
        let disk = full_disk(&f);
        f.disk
            .fail(Fault::new(Match::writes(), libc::EIO).after(fails));
        let result = f.home.run(|co| disk.truncate(co, 1 << 20, true));
        f.disk.clear_faults();
        if result.is_ok() {
            assert!(fails > 2, "only {fails} writes");
            f.close(disk);
            return;
        }
        assert_eq!(disk.len(), 4 << 20, "write {fails}");
        // An image whose header is in doubt takes no more changes: it is opened anew.
        let _ = f.home.run(|co| disk.close(co));
        drop(disk);
        let report = check(&f.disk);
        assert_eq!(
            report.corruptions + report.check_errors,
            0,
            "{fails}: {report:?}"
        );
        let disk = f.open();
        resize(&f, &disk, 1 << 20);
        for cluster in 0..256 {
            let seen = f.read(&disk, cluster * CLUSTER, CLUSTER);
            assert!(
                seen.iter().all(|&b| b == cluster as u8 | 1),
                "write {fails}"
            );
        }
        f.close(disk);
        assert_eq!(check(&f.disk).corruptions, 0);
    }
    panic!("more than 40 writes");
}

/// Snapshots keep what they have; a version 2 image that has one keeps its length, as in the
/// reference.
#[test]
fn snapshots_and_shorter_disks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (compat, allowed) in [("1.1", true), ("0.10", false)] {
        let options = format!("compat={compat},cluster_size=4096");
        let words = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            text(&path),
            "4M",
        ];
        if qemu_img(&words).is_none() {
            return;
        }
        let mut f = Fixture::new();
        let load = |f: &mut Fixture| {
            f.disk = SimDisk::with_contents(&std::fs::read(&path).unwrap());
        };
        let store = |f: &Fixture| std::fs::write(&path, f.disk.contents()).unwrap();
        load(&mut f);
        let disk = f.open();
        f.write(&disk, 0, 4 << 20, 7);
        f.close(disk);
        store(&f);
        qemu_img(&["snapshot", "-c", "kept", text(&path)]).unwrap();
        load(&mut f);
        let disk = f.open();
        f.write(&disk, 1 << 20, 1 << 20, 8);
        let result = f.home.run(|co| disk.truncate(co, 1 << 20, true));
        if allowed {
            result.unwrap();
        } else {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported);
            assert_eq!(
                error.message(),
                "Can't resize a v2 image which has snapshots"
            );
        }
        f.close(disk);
        store(&f);
        let checked = qemu_img(&["check", text(&path)]).unwrap();
        assert!(checked.status.success(), "{compat}: {checked:?}");
        let raw = folder.path().join("kept");
        qemu_img(&["snapshot", "-a", "kept", text(&path)]).unwrap();
        let words = ["convert", "-O", "raw", text(&path), text(&raw)];
        let converted = qemu_img(&words).unwrap();
        assert!(converted.status.success(), "{}", said(&converted));
        assert!(std::fs::read(&raw).unwrap() == vec![7; 4 << 20], "{compat}");
    }
}

/// Space that is taken while a disk grows: every cluster has a place and reads as zeros, also where
/// the allocator found clusters that had held something else.
#[test]
fn a_longer_disk_takes_its_space_at_once() {
    for mode in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        let f = Fixture::new();
        let disk = f.open();
        f.write(&disk, 0, 1 << 20, 9);
        f.home.run(|co| disk.pdiscard(co, 0, 512 << 10)).unwrap();
        f.flush(&disk);
        let new = (2 << 20) + 512;
        f.home
            .run(|co| disk.grow_preallocated(co, new, mode))
            .unwrap();
        let mut at = 1 << 20;
        while at < new {
            let (allocated, len) = f
                .home
                .run(|co| disk.is_allocated(co, at, new - at))
                .unwrap();
            assert!(allocated, "{mode:?}: {at}");
            at += len;
        }
        let seen = f.read(&disk, 1 << 20, new - (1 << 20));
        assert!(seen.iter().all(|&b| b == 0), "{mode:?}");
        let shorter = f
            .home
            .run(|co| disk.grow_preallocated(co, 512, mode))
            .unwrap_err();
        assert_eq!(
            shorter.message(),
            "Preallocation can't be used for shrinking an image"
        );
        f.close(disk);
        let report = check(&f.disk);
        assert!(report.is_clean(), "{mode:?}: {report:?}");
        assert!(f.disk.len() >= 384 * CLUSTER, "{mode:?}: {}", f.disk.len());
    }
}

/// No space for all of it: the disk is as long as before, and nothing is lost or leaked.
#[test]
fn no_space_for_a_longer_disk() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, 1 << 20, 9);
    f.flush(&disk);
    f.disk
        .fail(Fault::new(Match::writes(), libc::ENOSPC).after(3));
    let grown = f
        .home
        .run(|co| disk.grow_preallocated(co, 8 << 20, Preallocation::Full));
    f.disk.clear_faults();
    assert_eq!(grown.unwrap_err().errno(), libc::ENOSPC);
    assert_eq!(disk.len(), 1 << 20);
    assert!(f.read(&disk, 0, 1 << 20).iter().all(|&b| b == 9));
    f.close(disk);
    let report = check(&f.disk);
    assert!(report.is_clean(), "{report:?}");
}
