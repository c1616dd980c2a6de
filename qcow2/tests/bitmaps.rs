//! The directory of dirty bitmaps: a good one is listed and counted, and one that breaks a rule is
//! refused in words that say which rule, as the reference refuses it.

mod support;

use coblock_block::drivers::sim::SimDisk;
use coblock_block::{Options, Result};
use coblock_qcow2::bitmap::BitmapFlags;
use coblock_qcow2::info::Info;
use support::corpus::add_extension;
use support::image::{report, with_options};
use support::{add_cluster, empty_image, put32, put64, qemu_img, text};

/// What breaks one rule, by the words that say which.
type Broken = (&'static str, fn(&mut Vec<u8>));

/// Clusters of the image below.
const DIRECTORY: usize = 0x4_0000;
const TABLE: usize = 0x5_0000;
const EXTENSION: usize = 120;

/// A disk of 1 MiB with one bitmap, `name`, of 64 KiB granularity; `change` is made to the bytes.
fn image(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = empty_image(16);
    assert_eq!(add_cluster(&mut image), DIRECTORY as u64);
    assert_eq!(add_cluster(&mut image), TABLE as u64);
    let mut extension = [0; 24];
    put32(&mut extension, 0, 1);
    put64(&mut extension, 8, 32);
    put64(&mut extension, 16, DIRECTORY as u64);
    add_extension(&mut image, 0x2385_2875, &extension);
    put64(&mut image, 88, 1);
    put64(&mut image, DIRECTORY, TABLE as u64);
    put32(&mut image, DIRECTORY + 8, 1);
    image[DIRECTORY + 16] = 1;
    image[DIRECTORY + 17] = 16;
    image[DIRECTORY + 19] = 4;
    image[DIRECTORY + 24..DIRECTORY + 28].copy_from_slice(b"name");
    change(&mut image);
    image
}

/// Calls `f` with what lies in memory.
fn with<R>(
    image: &[u8],
    f: impl FnOnce(&coblock_qcow2::image_file::ImageFile<'_>) -> Result<R>,
) -> Result<R> {
    let disk = Options::new()
        .with("driver", "sim")
        .with_object("disk", SimDisk::with_contents(image));
    with_options(disk, f)
}

/// What the directory says is what was put there; its cluster and its table's are counted.
#[test]
fn a_good_directory_is_listed() {
    for (what, entry) in [("zeros", 0), ("ones", 1), ("data", 0x4_0000)] {
        let image = image(|image| {
            put64(image, TABLE, entry);
            // A second reference to the directory's cluster, where the table has one.
            image[0x2_0000 + 2 * 4 + 1] += u8::from(entry > 1);
        });
        let info = with(&image, Info::read).unwrap();
        let [bitmap] = &info.bitmaps[..] else {
            panic!("{what}: {:?}", info.bitmaps);
        };
        assert_eq!(bitmap.name, b"name");
        assert_eq!(bitmap.granularity_bits, 16);
        assert_eq!(bitmap.flags, BitmapFlags::empty());
        let (report, found) = with(&image, report).unwrap();
        assert!(report.is_clean(), "{what}: {found:?}");
    }
}

/// Each rule of an entry and of the directory, broken alone.
#[test]
fn a_directory_that_breaks_a_rule_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bitmaps.qcow2");
    let cases: &[Broken] = &[
        ("the directory ends inside its fields", |i| {
            put32(i, EXTENSION, 2);
            put64(i, EXTENSION + 8, 56);
            i[DIRECTORY + 19] = 12;
        }),
        ("extra data is not supported", |i| {
            put32(i, DIRECTORY + 20, 8);
        }),
        ("it runs past the end of the directory", |i| {
            i[DIRECTORY + 19] = 9;
        }),
        ("reserved flags are set", |i| put32(i, DIRECTORY + 12, 4)),
        ("its type is not supported", |i| i[DIRECTORY + 16] = 2),
        ("its name has no bytes or more than 1023", |i| {
            i[DIRECTORY + 19] = 0;
            put64(i, EXTENSION + 8, 24);
        }),
        ("its name has no bytes or more than 1023", |i| {
            i[DIRECTORY + 18] = 4;
            i[DIRECTORY + 19] = 0;
            i[DIRECTORY + 24..DIRECTORY + 24 + 1024].fill(b'n');
            put64(i, EXTENSION + 8, 24 + 1024);
        }),
        ("its granularity is not within 512 B and 2 GiB", |i| {
            i[DIRECTORY + 17] = 8;
        }),
        ("its granularity is not within 512 B and 2 GiB", |i| {
            i[DIRECTORY + 17] = 32;
        }),
        ("its table is not cluster-aligned", |i| {
            put64(i, DIRECTORY, 0);
        }),
        ("its table is not cluster-aligned", |i| {
            put64(i, DIRECTORY, TABLE as u64 + 512);
        }),
        ("its table has no entries or more than 2^27", |i| {
            put32(i, DIRECTORY + 8, 0);
        }),
        ("its table has no entries or more than 2^27", |i| {
            put32(i, DIRECTORY + 8, (1 << 27) + 1);
        }),
        ("its bits need more than 512 MiB", |i| {
            put32(i, DIRECTORY + 8, 8193);
        }),
        ("its table does not cover the disk", |i| {
            put64(i, 24, 512 << 20);
            i[DIRECTORY + 17] = 9;
        }),
        ("its table has another size than the disk needs", |i| {
            put32(i, DIRECTORY + 8, 2);
        }),
        ("its table has a broken entry", |i| put64(i, TABLE, 2)),
        ("its table has a broken entry", |i| {
            put64(i, TABLE, 0x4_0200);
        }),
        ("its table has a broken entry", |i| {
            put64(i, TABLE, 0x4_0001);
        }),
        ("the directory is past the end of the file", |i| {
            put64(i, EXTENSION + 16, 1 << 40);
        }),
        ("more than the header promises", |i| {
            i.copy_within(DIRECTORY..DIRECTORY + 32, DIRECTORY + 32);
            put64(i, EXTENSION + 8, 64);
        }),
        ("less than the header promises", |i| {
            put32(i, EXTENSION, 2);
            put64(i, EXTENSION + 8, 48);
            i[DIRECTORY + 19] = 24;
        }),
    ];
    for (want, change) in cases {
        let image = image(change);
        for (how, got) in [
            ("info", with(&image, Info::read).map(drop)),
            ("check", with(&image, report).map(drop)),
        ] {
            let error = got.expect_err(want).to_string();
            // These are rules of the directory, and met behind its first entry.
            let index =
                usize::from(want.starts_with("the directory ends") || want.contains("header"));
            let whole = format!("bitmap directory entry {index}: {want}");
            assert!(error.contains(&whole), "{how}: {error}, not {whole}");
        }
        std::fs::write(&path, &image).unwrap();
        // The specification asks for a name; the reference takes a bitmap without one.
        let nameless = image[DIRECTORY + 18..DIRECTORY + 20] == [0, 0];
        if nameless {
            continue;
        }
        if let Some(theirs) = qemu_img(&["check", "-f", "qcow2", text(&path)]) {
            assert!(!theirs.status.success(), "{want}: {theirs:?}");
        }
    }
}

/// A bitmap that was in use when its program ended is listed, whatever its table says; nobody reads
/// that.
#[test]
fn a_bitmap_in_use_is_not_looked_into() {
    let image = image(|image| {
        put32(image, DIRECTORY + 12, 1);
        put64(image, TABLE, 2);
    });
    let info = with(&image, Info::read).unwrap();
    assert_eq!(info.bitmaps[0].flags, BitmapFlags::IN_USE);
}

/// Tables that are each within their limit and together above 256 MiB are refused before they are
/// read.
#[test]
fn tables_are_limited_together() {
    let mut image = empty_image(9);
    let directory = image.len();
    let count = 33_usize;
    image.resize(directory + (32 * count).next_multiple_of(512), 0);
    for entry in 0..count {
        let at = directory + 32 * entry;
        put64(&mut image, at, 0x1000);
        put32(&mut image, at + 8, 1 << 20);
        image[at + 16] = 1;
        image[at + 17] = 16;
        image[at + 19] = 2;
        image[at + 24..at + 26].copy_from_slice(format!("{entry:02}").as_bytes());
    }
    let mut extension = [0; 24];
    put32(&mut extension, 0, u32::try_from(count).unwrap());
    put64(&mut extension, 8, 32 * count as u64);
    put64(&mut extension, 16, directory as u64);
    add_extension(&mut image, 0x2385_2875, &extension);
    put64(&mut image, 88, 1);
    let error = with(&image, Info::read).unwrap_err().to_string();
    assert!(error.contains("bytes of all bitmap tables"), "{error}");
}
