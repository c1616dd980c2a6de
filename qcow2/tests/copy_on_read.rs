//! Copy on read: what a read finds in the backing file is written to the image.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use std::rc::Rc;
use std::sync::Arc;

use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{BlockBackend, ErrorKind, Explicit, Options, RequestFlags, open};
use support::rig::*;
use support::{image, put64};

/// Bytes of the backing file; the disk has a MiB.
const BASE: u64 = 600 << 10;

/// An image whose header names a backing file.
fn overlay() -> Fixture {
    let mut image = fresh_image();
    put64(&mut image, 8, 200);
    support::put32(&mut image, 16, 4);
    image[200..204].copy_from_slice(b"base");
    let mut f = Fixture::new();
    f.disk = SimDisk::with_contents(&image);
    f
}

fn base() -> Arc<SimDisk> {
    let mut bytes: Vec<u8> = (0..BASE).map(|at| (at / CLUSTER) as u8 | 1).collect();
    // Zeros are made, not written.
    bytes[64 << 10..128 << 10].fill(0);
    SimDisk::with_contents(&bytes)
}

fn gate(base: &Arc<SimDisk>) -> Explicit {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", base.clone());
    Explicit::new().allow("base", options)
}

fn open_filter(
    f: &Fixture,
    base: &Arc<SimDisk>,
    read_only: &str,
) -> coblock_block::Result<Rc<BlockBackend>> {
    let mut options = Options::new()
        .with("driver", "copy-on-read")
        .with("discard", "unmap")
        .with("read-only", read_only);
    options.nest("file", f.options());
    let opened = |co: &_| open(co, &f.graph, &f.registry, &gate(base), options);
    let node = f.home.run(opened)?;
    Ok(Rc::new(BlockBackend::new(&f.graph, node)))
}

fn expected(base: &SimDisk) -> Vec<u8> {
    let mut bytes = base.contents();
    bytes.resize(1 << 20, 0);
    bytes
}

fn is_allocated(f: &Fixture, disk: &BlockBackend, at: u64) -> bool {
    f.home.run(|co| disk.is_allocated(co, at, 512)).unwrap().0
}

/// A read copies the whole clusters that it touches and no others, once; what is allocated is only
/// read. Afterwards the backing file is not needed for them.
#[test]
fn reads_copy_what_was_not_allocated() {
    let (f, base) = (overlay(), base());
    let want = expected(&base);
    let disk = open_filter(&f, &base, "off").unwrap();
    f.write(&disk, 8 * CLUSTER, CLUSTER, 99);
    let mut want = want;
    want[8 * CLUSTER as usize..9 * CLUSTER as usize].fill(99);
    for (at, len) in [
        (100, 10),
        (3 * CLUSTER + 7, 2 * CLUSTER),
        (7 * CLUSTER, 3 * CLUSTER),
        (60 << 10, 80 << 10),
        (BASE - 100, 8192),
        ((1 << 20) - 5, 5),
    ] {
        let seen = f.read(&disk, at, len);
        assert!(
            seen == want[at as usize..(at + len) as usize],
            "{len} at {at}"
        );
        for cluster in at / CLUSTER..=(at + len - 1) / CLUSTER {
            assert!(
                is_allocated(&f, &disk, cluster * CLUSTER),
                "cluster {cluster}"
            );
        }
    }
    for cluster in [1, 2, 6, 10, 40, 200] {
        assert!(
            !is_allocated(&f, &disk, cluster * CLUSTER),
            "cluster {cluster}"
        );
    }
    f.flush(&disk);
    let writes = f.disk.counts().writes;
    assert!(f.read(&disk, 0, 10) == want[..10]);
    assert_eq!(f.disk.counts().writes, writes, "the second read only reads");
    base.fail(Fault::new(Match::reads(), libc::EIO).from_then_on());
    assert!(
        f.read(&disk, 7 * CLUSTER, 3 * CLUSTER)
            == want[7 * CLUSTER as usize..10 * CLUSTER as usize]
    );
    f.close(disk);
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", f.disk.clone());
    let report = image::with_options(options, image::report).unwrap().0;
    assert!(report.is_clean(), "{report:?}");
}

/// A write to a cluster that is being copied waits for the copy, and is not undone by it; a write
/// that came before is seen by the copy.
#[test]
fn writes_wait_for_copies() {
    for write_at in [0, CLUSTER / 2, CLUSTER - 512, 3 * CLUSTER] {
        let (f, base) = (overlay(), base());
        let disk = open_filter(&f, &base, "off").unwrap();
        let hold = base.hold(Match::reads());
        let (reader, read) = (disk.clone(), Outcome::default());
        let done = read.clone();
        f.home.spawn("read", move |co| {
            let mut data = vec![0; CLUSTER as usize];
            done.set(reader.pread(co, 0, &mut data[..]));
            assert!(
                data.iter().all(|&b| b == 1),
                "as it was when the read began"
            );
        });
        f.settle();
        assert_eq!(hold.waiting(), 1);
        let write = f.start_write(&disk, write_at, 512, 77);
        f.settle();
        assert!(!read.is_done());
        assert!(
            !write.is_done(),
            "it waits for the copy or for the backing file"
        );
        hold.release_all();
        f.wait(&read).unwrap();
        f.wait(&write).unwrap();
        assert_eq!(f.read(&disk, write_at, 512), [77; 512], "{write_at}");
        f.close(disk);
    }
}

/// What is refused, and what fails.
#[test]
fn errors_of_copies() {
    let (f, base) = (overlay(), base());
    let error = open_filter(&f, &base, "on").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert_eq!(
        error.message(),
        "Can't use copy-on-read on read-only device"
    );

    let disk = open_filter(&f, &base, "off").unwrap();
    let read = |at| {
        let mut data = [0; 512];
        f.home.run(|co| disk.pread(co, at, &mut data[..]))
    };
    base.fail(Fault::new(Match::reads(), libc::EIO));
    assert_eq!(read(0).unwrap_err().errno(), libc::EIO, "nothing was read");
    f.disk.fail(Fault::new(Match::writes(), libc::ENOSPC));
    assert_eq!(
        read(0).unwrap_err().errno(),
        libc::ENOSPC,
        "nothing was copied"
    );
    read(0).unwrap();
    f.home
        .run(|co| disk.pwrite(co, 4096, &[5; 4096][..], RequestFlags::FUA))
        .unwrap();
    f.home.run(|co| disk.truncate(co, 2 << 20, true)).unwrap();
    assert_eq!(disk.len(), 2 << 20);
    assert_eq!(f.read(&disk, (2 << 20) - 512, 512), [0; 512]);
    f.close(disk);
}
