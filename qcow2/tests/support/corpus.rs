//! The corpus of hostile images: one generator for each public weakness of this format's programs,
//! by its name.

use std::sync::Arc;

use coblock_block::drivers::sim::SimDisk;

use super::{add_cluster, add_l2, add_snapshots, empty_image, get64, put32, put64, snapshot};

pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;

/// What an operation is to say.
#[derive(Clone, Copy, Debug)]
pub enum Want {
    /// It works.
    Good,
    /// It fails, and the message has this in it.
    Bad(&'static str),
}
use Want::{Bad, Good};

pub struct Case {
    pub name: &'static str,
    pub disk: fn() -> Arc<SimDisk>,
    pub info: Want,
    /// `Good`: a report, whatever it counts.
    pub check: Want,
    pub read: Want,
    pub write: Want,
}

/// The empty image of 1 MiB with 64 KiB clusters, and `change` made to its bytes.
pub fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Arc<SimDisk> {
    let mut image = empty_image(16);
    change(&mut image);
    SimDisk::with_contents(&image)
}

/// A header extension in front of the end mark.
pub fn add_extension(image: &mut [u8], kind: u32, data: &[u8]) {
    put32(image, 112, kind);
    put32(image, 116, u32::try_from(data.len()).unwrap());
    image[120..120 + data.len()].copy_from_slice(data);
}

/// The header of version 1: a disk of `size` bytes, 4 KiB clusters, L2 tables of `2^l2_bits` entries.
fn version_1(size: u64, l2_bits: u8) -> Arc<SimDisk> {
    let mut image = vec![0; 0x3000];
    put32(&mut image, 0, 0x5146_49fb);
    put32(&mut image, 4, 1);
    put64(&mut image, 24, size);
    image[32] = 12;
    image[33] = l2_bits;
    put64(&mut image, 40, 0x1000);
    put64(&mut image, 0x1000, 0x2000);
    SimDisk::with_contents(&image)
}

/// A sparse file of 512-byte clusters and 512 GiB, its tables full of offsets far apart.
fn far_apart() -> Arc<SimDisk> {
    let mut image = empty_image(9);
    let l1 = usize::try_from(get64(&image, 40)).unwrap();
    for slot in 0..64 {
        let at = image.len();
        image.resize(at + 512, 0);
        put64(&mut image, l1 + 8 * slot, at as u64 | COPIED);
        for entry in 0..64 {
            let number = (slot * 64 + entry) as u64;
            // 4096 clusters, each in a part of the file of its own.
            put64(&mut image, at + 8 * entry, ((number + 1) << 27) | COPIED);
        }
    }
    let disk = SimDisk::with_contents(&image);
    disk.poke((1 << 39) - 512, &[0; 512]);
    disk
}

/// Refcount table of 8 MiB, every entry a block in a hole of a sparse file.
fn scattered_refcount_blocks() -> Arc<SimDisk> {
    let mut image = empty_image(9);
    put32(&mut image, 56, (8 << 20) / 512);
    let table = 1 << 20;
    put64(&mut image, 48, table);
    let disk = SimDisk::with_contents(&image);
    let entries: Vec<u8> = (0_u64..1 << 20)
        .flat_map(|slot| ((slot + 1) << 19).to_be_bytes())
        .collect();
    disk.poke(table, &entries);
    disk.poke((1 << 39) - 512, &[0; 512]);
    disk
}

/// An L1 table of 32 MiB, each entry the same L2 table, each entry of that the same cluster.
fn everything_is_one_cluster() -> Arc<SimDisk> {
    let mut image = empty_image(16);
    let data = add_cluster(&mut image);
    let table = add_l2(&mut image, &[data | COPIED; 8192]);
    let l1 = image.len() as u64;
    put64(&mut image, 40, l1);
    put32(&mut image, 36, 4 << 20);
    let disk = SimDisk::with_contents(&image);
    let entries: Vec<u8> = (0..4 << 20)
        .flat_map(|_| (table | COPIED).to_be_bytes())
        .collect();
    disk.poke(l1, &entries);
    disk
}

/// 65536 snapshots, each with an L1 table of 32 MiB, all of them over the same bytes.
fn snapshots_over_one_table() -> Arc<SimDisk> {
    let mut image = empty_image(16);
    let l1 = 16 << 20;
    let table: Vec<u8> = (0..65536_u64)
        .flat_map(|number| snapshot(l1 + (number % 64) * 0x1_0000, 4 << 20, b"1"))
        .collect();
    put32(&mut image, 60, 65536);
    put64(&mut image, 64, 8 << 20);
    let disk = SimDisk::with_contents(&image);
    disk.poke(8 << 20, &table);
    // A tenth of the entries point somewhere, most of them to nowhere.
    let entries: Vec<u8> = (0..4_u64 << 20)
        .flat_map(|slot| {
            if slot % 10 == 0 {
                (slot << 16).to_be_bytes()
            } else {
                [0; 8]
            }
        })
        .collect();
    disk.poke(l1, &entries);
    disk
}

/// A table of 65536 snapshots with ids and names as long as they get, until 64 MiB are full.
fn long_snapshot_table() -> Arc<SimDisk> {
    let mut image = empty_image(16);
    put32(&mut image, 60, 65536);
    put64(&mut image, 64, 1 << 20);
    let disk = SimDisk::with_contents(&image);
    let mut entry = vec![0; 56];
    put32(&mut entry, 12, 0xffff_ffff);
    put32(&mut entry, 36, 16);
    let len = (56 + 2 * 0xffff_u64).next_multiple_of(8);
    for number in 0..600 {
        disk.poke((1 << 20) + number * len, &entry);
    }
    disk
}

/// The bitmap directory is a hole of 64 MiB.
fn bitmaps_in_a_hole() -> Arc<SimDisk> {
    let disk = changed(|image| {
        let mut data = vec![0; 24];
        put32(&mut data, 0, 65535);
        put64(&mut data, 8, 64 << 20);
        put64(&mut data, 16, 1 << 20);
        add_extension(image, 0x2385_2875, &data);
        put64(image, 88, 1);
    });
    disk.poke((65 << 20) - 1, &[0]);
    disk
}

pub fn cases() -> Vec<Case> {
    let case = |name, disk, info, check, read, write| Case {
        name,
        disk,
        info,
        check,
        read,
        write,
    };
    let all = |name, disk, want| Case {
        name,
        disk,
        info: want,
        check: want,
        read: want,
        write: want,
    };
    vec![
        all("an honest image", || changed(|_| ()), Good),
        // CVE-2014-0143: integer overflows.
        case(
            "CVE-2014-0143: refcount index of a cluster at 2^56",
            || changed(|image| _ = add_l2(image, &[0x00ff_ffff_ffff_0000 | COPIED])),
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "CVE-2014-0143: compressed data at 2^56",
            || changed(|image| _ = add_l2(image, &[COMPRESSED | 0x3f_ffff_ffff_ffff])),
            Good,
            Good,
            Bad("compressed cluster"),
            Good,
        ),
        all(
            "CVE-2014-0143: L1 entries 2^32 - 1",
            || changed(|i| put32(i, 36, u32::MAX)),
            Bad("active L1 table is too large"),
        ),
        all(
            "CVE-2014-0143: L1 entries that wrap in bytes",
            || changed(|i| put32(i, 36, 0x2000_0001)),
            Bad("active L1 table is too large"),
        ),
        all(
            "CVE-2014-0143: virtual size 2^63 - 1",
            || changed(|i| put64(i, 24, (1 << 63) - 1)),
            Bad("too big"),
        ),
        all(
            "CVE-2014-0143: virtual size 2^64 - 1",
            || changed(|i| put64(i, 24, u64::MAX)),
            Bad("too large"),
        ),
        case(
            "CVE-2014-0143: snapshot L1 entries 2^32 - 1",
            || changed(|image| add_snapshots(image, &snapshot(0x1_0000, u32::MAX, b"1"), 1)),
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "CVE-2014-0143: snapshot L1 table at 2^64 - 64 KiB",
            || changed(|image| add_snapshots(image, &snapshot(!0xffff, 1, b"1"), 1)),
            Good,
            Bad("L1 table of snapshot 0 offset"),
            Good,
            Good,
        ),
        // CVE-2014-0144: missing bounds.
        all(
            "CVE-2014-0144: header length",
            || changed(|i| put32(i, 100, u32::MAX)),
            Bad("header length"),
        ),
        all(
            "CVE-2014-0144: backing name offset",
            || changed(|i| put64(i, 8, 1 << 63)),
            Bad("outside the first cluster"),
        ),
        all(
            "CVE-2014-0144: backing name length",
            || {
                changed(|i| {
                    put64(i, 8, 512);
                    put32(i, 16, u32::MAX);
                })
            },
            Bad("too long"),
        ),
        all(
            "CVE-2014-0144: extension length",
            || changed(|i| put64(i, 112, 0x1234_5678_ffff_ffff)),
            Bad("has 4294967295 bytes"),
        ),
        all(
            "CVE-2014-0144: refcount table clusters",
            || changed(|i| put32(i, 56, u32::MAX)),
            Bad("refcount table is too large"),
        ),
        all(
            "CVE-2014-0144: refcount table offset",
            || changed(|i| put64(i, 48, 1 << 63)),
            Bad("refcount table offset"),
        ),
        case(
            "CVE-2014-0144: refcount table past the end",
            || changed(|i| put64(i, 48, 1 << 40)),
            Good,
            Good,
            Bad("past the end of the file"),
            Bad("past the end of the file"),
        ),
        case(
            "CVE-2014-0144: L1 table past the end",
            || changed(|i| put64(i, 40, 1 << 40)),
            Good,
            Good,
            Bad("past the end of the file"),
            Bad("past the end of the file"),
        ),
        all(
            "CVE-2014-0144: snapshots 2^32 - 1",
            || changed(|i| put32(i, 60, u32::MAX)),
            Bad("snapshot table is too large"),
        ),
        case(
            "CVE-2014-0144: snapshot extra data 2^32 - 1",
            || {
                changed(|image| {
                    let mut entry = snapshot(0x3_0000, 1, b"1");
                    put32(&mut entry, 36, u32::MAX);
                    add_snapshots(image, &entry, 1);
                })
            },
            Bad("length of extra data"),
            Bad("length of extra data"),
            Good,
            Good,
        ),
        case(
            "CVE-2014-0144: snapshot table of more than 64 MiB",
            long_snapshot_table,
            Bad("bytes of memory for the snapshot table"),
            Bad("bytes of memory for the snapshot table"),
            Good,
            Good,
        ),
        // CVE-2014-0145: snapshot L1 tables of another size than the active one.
        case(
            "CVE-2014-0145: snapshot L1 table greater than the active one",
            || {
                changed(|image| {
                    let l1 = add_cluster(image);
                    add_snapshots(image, &snapshot(l1, 8192, b"1"), 1);
                })
            },
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "CVE-2014-0145: snapshot L1 table smaller than the active one",
            || changed(|image| add_snapshots(image, &snapshot(0x3_0000, 0, b"1"), 1)),
            Good,
            Good,
            Good,
            Good,
        ),
        // CVE-2014-0147: refcount blocks for clusters far behind the end.
        case(
            "CVE-2014-0147: shared data far past the end, in disk and snapshot",
            || {
                changed(|image| {
                    let l1 = add_cluster(image);
                    let far = 1 << 50;
                    let table = add_l2(image, &[far]);
                    put64(image, usize::try_from(l1).unwrap(), table);
                    put64(image, 0x3_0000, table);
                    image[0x2_0000 + usize::try_from(table >> 16).unwrap() * 2 + 1] = 2;
                    add_snapshots(image, &snapshot(l1, 1, b"1"), 1);
                })
            },
            Good,
            Good,
            Good,
            Good,
        ),
        // CVE-2014-0222, CVE-2014-0223: the same in version 1, which nobody reads here.
        all(
            "CVE-2014-0222: version 1, L2 tables of 2^63 entries",
            || version_1(1 << 20, 63),
            Bad("unsupported qcow2 version 1"),
        ),
        all(
            "CVE-2014-0222: version 1, L2 tables of one entry",
            || version_1(1 << 20, 0),
            Bad("unsupported qcow2 version 1"),
        ),
        all(
            "CVE-2014-0223: version 1, virtual size 2^64 - 1",
            || version_1(u64::MAX, 9),
            Bad("unsupported qcow2 version 1"),
        ),
        // CVE-2024-4467, CVE-2024-32498, CVE-2015-5163: names of host files.
        case(
            "CVE-2024-4467: external data file named in JSON",
            || {
                changed(|image| {
                    put64(image, 72, 4);
                    add_extension(
                        image,
                        0x4441_5441,
                        br#"json:{"driver":"file","filename":"/etc/passwd"}"#,
                    );
                })
            },
            Good,
            Bad("external data file"),
            Bad("external data file"),
            Bad("external data file"),
        ),
        case(
            "CVE-2024-32498: external data file",
            || {
                changed(|image| {
                    put64(image, 72, 4);
                    add_extension(image, 0x4441_5441, b"/etc/passwd");
                })
            },
            Good,
            Bad("external data file"),
            Bad("external data file"),
            Bad("external data file"),
        ),
        case(
            "CVE-2015-5163: backing file of the host",
            || {
                changed(|image| {
                    put64(image, 8, 0x200);
                    put32(image, 16, 11);
                    image[0x200..0x20b].copy_from_slice(b"/etc/passwd");
                    add_extension(image, 0xe279_2aca, b"raw");
                })
            },
            Good,
            Good,
            Bad("/etc/passwd"),
            Bad("/etc/passwd"),
        ),
        // Exhaustion.
        case(
            "no CVE: references far apart in a sparse file",
            far_apart,
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "no CVE: refcount blocks far apart in a sparse file",
            scattered_refcount_blocks,
            Good,
            Good,
            Good,
            Bad("refcount of zero"),
        ),
        case(
            "CVE-2015-5162: 2^35 references to one cluster",
            everything_is_one_cluster,
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "CVE-2015-5162: 65536 snapshots over one L1 table",
            snapshots_over_one_table,
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "no CVE: a bitmap directory in a hole",
            bitmaps_in_a_hole,
            Bad("bitmap directory entry 0"),
            Bad("bitmap directory entry 0"),
            Good,
            Good,
        ),
        case(
            "no CVE: a check of 2^40 clusters",
            || {
                let disk = SimDisk::with_contents(&empty_image(9));
                disk.poke((1 << 49) - 512, &[0; 512]);
                disk
            },
            Good,
            Bad("clusters of the file"),
            Good,
            Good,
        ),
        // Tables that are what they should not be.
        case(
            "no CVE: the L1 table is its own L2 table",
            || changed(|i| put64(i, 0x3_0000, 0x3_0000 | COPIED)),
            Good,
            Good,
            Good,
            Bad("would overwrite the active L1 table"),
        ),
        case(
            "no CVE: the header is an L2 table",
            || changed(|i| put64(i, 0x3_0000, COPIED)),
            Good,
            Good,
            Good,
            Good,
        ),
        case(
            "no CVE: the refcount block is an L2 table",
            || changed(|i| put64(i, 0x3_0000, 0x2_0000 | COPIED)),
            Good,
            Good,
            Good,
            Bad("is not the only table there"),
        ),
        case(
            "no CVE: the refcount table is an L2 table",
            || changed(|i| put64(i, 0x3_0000, 0x1_0000 | COPIED)),
            Good,
            Good,
            Good,
            Bad("is not the only table there"),
        ),
        case(
            "no CVE: two L1 entries share an L2 table",
            || {
                changed(|image| {
                    let table = add_l2(image, &[]);
                    put64(image, 24, 1 << 30);
                    put32(image, 36, 2);
                    put64(image, 0x3_0008, table | COPIED);
                })
            },
            Good,
            Good,
            Good,
            Bad("is not the only table there"),
        ),
        case(
            "no CVE: two ranges share a refcount block",
            || changed(|i| put64(i, 0x1_0008, 0x2_0000)),
            Good,
            Good,
            Good,
            Bad("is not the only table there"),
        ),
        case(
            "no CVE: data over the refcount table",
            || changed(|image| _ = add_l2(image, &[0x1_0000 | COPIED])),
            Good,
            Good,
            Good,
            Bad("would overwrite the refcount table"),
        ),
        case(
            "no CVE: data over the header",
            || changed(|image| _ = add_l2(image, &[COPIED | 1, 0x200])),
            Good,
            Good,
            Bad("not cluster-aligned"),
            Bad("not cluster-aligned"),
        ),
        case(
            "no CVE: the refcount table is a refcount block",
            || changed(|i| put64(i, 0x1_0000, 0x1_0000)),
            Good,
            Good,
            Good,
            Bad("refcount of zero"),
        ),
        case(
            "no CVE: no refcount block for the header",
            || changed(|i| put64(i, 0x1_0000, 0)),
            Good,
            Good,
            Good,
            Bad("image header at host offset 0x0 has a refcount of zero"),
        ),
        case(
            "no CVE: every refcount is zero",
            || changed(|i| i[0x2_0000..0x3_0000].fill(0)),
            Good,
            Good,
            Good,
            Bad("refcount of zero"),
        ),
        case(
            "no CVE: L2 table not aligned",
            || changed(|i| put64(i, 0x3_0000, 0x2_0200 | COPIED)),
            Good,
            Good,
            Bad("not cluster-aligned"),
            Bad("not cluster-aligned"),
        ),
        case(
            "no CVE: refcount block not aligned",
            || changed(|i| put64(i, 0x1_0000, 0x2_0200)),
            Good,
            Good,
            Good,
            Bad("not the start of a cluster"),
        ),
        case(
            "no CVE: data not aligned",
            || changed(|image| _ = add_l2(image, &[0x4_0200 | COPIED])),
            Good,
            Good,
            Bad("not cluster-aligned"),
            Bad("not cluster-aligned"),
        ),
        case(
            "no CVE: reserved bits everywhere",
            || changed(|image| _ = add_l2(image, &[!COMPRESSED])),
            Good,
            Good,
            Bad("reserved bits"),
            Bad("reserved bits"),
        ),
        case(
            "no CVE: compressed cluster of noise",
            || changed(|image| _ = add_l2(image, &[COMPRESSED | 0x2_0000])),
            Good,
            Good,
            Bad("compressed cluster"),
            Bad("last reference is given up"),
        ),
    ]
}
