//! What requests make of clusters: places that are kept, space that is given back, disks that grow,
//! limits.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use coblock_block::drivers::sim::{Fault, LogEntry, Match, SimDisk};
use coblock_block::{BlockBackend, Explicit, Limits, Options, RequestFlags, open};
use std::rc::Rc;
use support::rig::*;
use support::{image, qemu_img, qemu_io, said, text};

const NONE: RequestFlags = RequestFlags::empty();

fn zero(f: &Fixture, disk: &BlockBackend, at: u64, len: u64, flags: RequestFlags) {
    f.home
        .run(|co| disk.pwrite_zeroes(co, at, len, flags))
        .unwrap();
}

/// Where a guest cluster has its place, whether it reads as zeros or not.
fn place(f: &Fixture, guest: u64) -> u64 {
    f.host_of(guest) & !1
}

fn assert_clean(f: &Fixture) {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", f.disk.clone());
    let (report, found) = image::with_options(options, image::report).unwrap();
    assert!(report.is_clean(), "{report:?}: {found:?}");
}

/// Clusters that were made zeros and kept their place are written there again, whatever the place
/// holds, and alone or several at once.
#[test]
fn a_kept_place_is_used_again() {
    for mode in ["mutex", "serial"] {
        let f = Fixture::new();
        let disk = f.open_in(mode);
        f.write(&disk, 0, 8 * CLUSTER, 0xaa);
        zero(&f, &disk, CLUSTER, 6 * CLUSTER, NONE);
        f.flush(&disk);
        let places: Vec<u64> = (0..8).map(|n| place(&f, n * CLUSTER)).collect();
        let len = f.disk.len();
        assert_eq!(f.host_of(CLUSTER), places[1] | 1, "zero, with a place");

        f.write(&disk, CLUSTER + 512, 512, 7);
        f.write(&disk, 3 * CLUSTER - 100, CLUSTER + 200, 8);
        f.flush(&disk);
        let now: Vec<u64> = (0..8).map(|n| place(&f, n * CLUSTER)).collect();
        assert_eq!(now, places, "{mode}");
        assert_eq!(f.disk.len(), len, "nothing was allocated");
        let mut want = vec![0; 8 * CLUSTER as usize];
        want[..CLUSTER as usize].fill(0xaa);
        want[7 * CLUSTER as usize..].fill(0xaa);
        want[CLUSTER as usize + 512..CLUSTER as usize + 1024].fill(7);
        let at = 3 * CLUSTER as usize - 100;
        want[at..at + CLUSTER as usize + 200].fill(8);
        assert!(f.read(&disk, 0, 8 * CLUSTER) == want, "{mode}");
        f.close(disk);
        assert_clean(&f);
    }
}

/// A write to a kept place that fails leaves zeros; the place stays the cluster's, and is neither
/// leaked nor freed.
#[test]
fn a_failed_write_keeps_the_place() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, 2 * CLUSTER, 0xaa);
    zero(&f, &disk, 0, 2 * CLUSTER, NONE);
    f.flush(&disk);
    let before = place(&f, 0);
    f.disk
        .fail(Fault::new(Match::writes().touching(BEHIND_TABLES), 5));
    let failed = f.start_write(&disk, 100, 100, 1);
    f.wait(&failed).unwrap_err();
    f.disk.clear_faults();
    assert_eq!(f.read(&disk, 0, CLUSTER), vec![0; CLUSTER as usize]);
    f.write(&disk, 100, 100, 2);
    f.close(disk);
    assert_eq!(place(&f, 0), before);
    assert_clean(&f);
}

/// A cluster that is discarded gives its space back once that is durable, and only for the classes
/// that are passed on.
#[test]
fn space_goes_back_by_class() {
    for (name, options, request, other) in [
        ("as it comes", &[][..], true, false),
        (
            "no requests",
            &[("pass-discard-request", "off")],
            false,
            false,
        ),
        ("other too", &[("pass-discard-other", "on")], true, true),
    ] {
        let f = Fixture::new();
        let mut open = f.options();
        for (key, value) in options {
            open = open.with(key, *value);
        }
        let disk = f.open_with(open).unwrap();
        f.write(&disk, 0, 4 * CLUSTER, 1);
        f.flush(&disk);
        let places: Vec<u64> = (0..4).map(|n| place(&f, n * CLUSTER)).collect();
        f.disk.checkpoint();
        f.home.run(|co| disk.pdiscard(co, 0, CLUSTER)).unwrap();
        zero(&f, &disk, CLUSTER, CLUSTER, RequestFlags::MAY_UNMAP);
        f.flush(&disk);
        // The L1 table moves: 513 tables do not fit its cluster.
        let size = 513 * 512 * CLUSTER;
        f.home.run(|co| disk.truncate(co, size, true)).unwrap();
        f.flush(&disk);
        let given: Vec<u64> = (f.disk.log().iter())
            .filter_map(|entry| match entry {
                LogEntry::Zero { offset, len } => Some((*offset, *len)),
                _ => None,
            })
            .flat_map(|(offset, len)| (offset..offset + len).step_by(CLUSTER as usize))
            .collect();
        assert_eq!(given.contains(&places[0]), request, "{name}: {given:?}");
        assert_eq!(given.contains(&places[1]), request, "{name}: {given:?}");
        assert_eq!(given.contains(&L1), other, "{name}: {given:?}");
        assert!(!given.contains(&places[2]), "{name}: {given:?}");
        f.close(disk);
        assert_clean(&f);
    }
}

/// A disk that grows under a longer backing file has zeros there, as in the reference; version 2
/// cannot say so, and stays as it is.
#[test]
fn growing_does_not_show_the_backing_file() {
    let folder = tempfile::tempdir().unwrap();
    let [base, path] = ["base", "image"].map(|name| folder.path().join(name));
    std::fs::write(&base, vec![b'B'; 1 << 20]).unwrap();
    for (compat, old, new, fits) in [
        ("1.1", 300 << 10, 700 << 10, true),
        ("1.1", 300 << 10, 310 << 10, true),
        ("1.1", 320 << 10, 3 << 20, true),
        ("1.1", 700 << 10, 700 << 10, true),
        ("0.10", 300 << 10, 310 << 10, true),
        ("0.10", 300 << 10, 700 << 10, false),
    ] {
        let options = format!("compat={compat}");
        let size = old.to_string();
        let words = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            "-b",
            "base",
            "-F",
            "raw",
            text(&path),
            &size,
        ];
        let Some(created) = qemu_img(&words) else {
            return;
        };
        assert!(created.status.success(), "{}", said(&created));
        let mut f = Fixture::new();
        f.disk = SimDisk::with_contents(&std::fs::read(&path).unwrap());
        let backing = SimDisk::with_contents(&vec![b'B'; 1 << 20]);
        let gate = Explicit::new().allow(
            "base",
            Options::new()
                .with("driver", "sim")
                .with_object("disk", backing),
        );
        let opened = |co: &_| open(co, &f.graph, &f.registry, &gate, f.options());
        let node = f.home.run(opened).unwrap();
        let disk = Rc::new(BlockBackend::new(&f.graph, node));
        let grown = f.home.run(|co| disk.truncate(co, new, true));
        let story = format!("{compat}: {old} to {new}");
        assert_eq!(grown.is_ok(), fits, "{story}: {grown:?}");
        if let Err(error) = grown {
            assert_eq!(error.errno(), libc::ENOTSUP, "{error}");
            assert!(
                error.message().contains("Failed to zero out new clusters"),
                "{error}"
            );
        }
        let now = if fits { new } else { old };
        assert_eq!(disk.len(), now, "{story}");
        let mut want = vec![b'B'; old as usize];
        want.resize(now as usize, 0);
        assert!(f.read(&disk, 0, now) == want, "{story}");
        f.close(disk);
        std::fs::write(&path, f.disk.contents()).unwrap();
        let check = qemu_img(&["check", text(&path)]).unwrap();
        assert!(check.status.success(), "{story}: {}", said(&check));
        let mut reads = vec![format!("read -P 0x42 0 {old}")];
        if now > old {
            reads.push(format!("read -P 0 {old} {}", now - old));
        }
        for read in reads {
            let read = qemu_io(&["-c", &read, text(&path)]).unwrap();
            assert!(read.status.success(), "{story}: {}", said(&read));
        }
    }
}

/// What a request may be: clusters are the unit of zeroes and discards, data is as free as the file
/// below.
#[test]
fn limits_of_an_image() {
    let f = Fixture::new();
    let odd = f
        .options()
        .with("file.request-alignment", "512")
        .with("file.mem-alignment", "512")
        .with("file.max-transfer", "65536");
    let disk = f.open_with(odd).unwrap();
    let own = Limits {
        zero_alignment: CLUSTER,
        discard_alignment: CLUSTER,
        ..Limits::default()
    };
    assert_eq!(disk.node().limits(), own);
    let whole = Limits {
        request_alignment: 512,
        mem_alignment: 512,
        max_transfer: 65536,
        ..own
    };
    assert_eq!(disk.node().whole_limits(), whole);
    f.close(disk);
}

/// Rule 2.6: both request modes give identical images, whatever the requests.
#[test]
fn rule_2_6_both_modes_under_all_operations() {
    let image = |mode: &str, lazy: &str| {
        let f = Fixture::new();
        let disk: Rc<BlockBackend> = f
            .open_with(
                f.options()
                    .with("request-mode", mode)
                    .with("lazy-refcounts", lazy),
            )
            .unwrap();
        let size = 1 << 20;
        for n in 0..300u64 {
            let at = n * 7919 % 250 * 4608 % (size - 40_000) / 512 * 512;
            let len = 512 * (1 + n * 31 % 60);
            f.home
                .run(|co| match n % 9 {
                    0 => disk.pwrite_zeroes(co, at, len, NONE),
                    1 => disk.pwrite_zeroes(co, at, len, RequestFlags::MAY_UNMAP),
                    2 => disk.pdiscard(co, at, len),
                    3 => disk.copy_range(
                        co,
                        at,
                        &disk,
                        (at + size / 2) % (size - len),
                        len.min(4096),
                    ),
                    4 => disk.truncate(co, size + n * 65536, true),
                    5 => disk.flush(co),
                    6 => disk.pwrite(co, at, &[n as u8; 700][..], RequestFlags::FUA),
                    _ => disk.pwrite(co, at, &vec![n as u8; len as usize][..], NONE),
                })
                .unwrap_or_else(|error| panic!("{mode}, {n}: {error}"));
        }
        let bytes = f.read(&disk, 0, size);
        f.close(disk);
        assert_clean(&f);
        (f.disk.contents(), bytes)
    };
    let (mutex, bytes) = image("mutex", "off");
    let (serial, _) = image("serial", "off");
    assert!(mutex == serial);
    let (lazy, same) = image("mutex", "on");
    let (lazy_serial, _) = image("serial", "on");
    assert!(lazy == lazy_serial && bytes == same);
}
