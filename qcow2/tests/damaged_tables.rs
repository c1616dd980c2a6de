//! Hazards O14, Q15: an image whose tables lie where others are, or where nothing counts them. Who
//! would write over a table gets an error and the image is marked as corrupt; not a byte of its
//! tables has changed then.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use coblock_block::drivers::sim::SimDisk;
use coblock_block::{ErrorKind, Result};
use support::rig::*;
use support::{put32, put64};

/// The first cluster that the second entry of the refcount table counts.
const SECOND_RANGE: u64 = CLUSTER * CLUSTER / 2;

/// The bytes that say where tables are and what features the image has, in the header.
const FEATURES: usize = 79;
const CORRUPT: u8 = 2;

impl Fixture {
    /// A fixture whose disk is `image`.
    fn of(image: &[u8]) -> Fixture {
        let disk = SimDisk::with_contents(image);
        Fixture {
            disk,
            ..Fixture::new()
        }
    }

    /// Writes a cluster at `at`, flushes and closes.
    fn try_to_write(&self, at: u64) -> Result<()> {
        let disk = self.open();
        let write = self.start_write(&disk, at, CLUSTER, 9);
        let written = self.wait(&write);
        let flushed = self.home.run(|co| disk.flush(co));
        let closed = self.home.run(|co| disk.close(co));
        written.and(flushed).and(closed)
    }

    /// A write at `at` is refused, the image marked as corrupt, and nothing else in it changes.
    fn refuses(&self, at: u64, story: &str, why: &str) {
        let mut before = self.disk.contents();
        let error = self.try_to_write(at).expect_err(story);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{story}: {error}");
        assert!(error.to_string().contains(why), "{story}: {error}");
        before[FEATURES] |= CORRUPT;
        let after = self.disk.contents();
        let changed = before.iter().zip(&after).position(|(a, b)| a != b);
        assert_eq!(changed, None, "{story}: byte {changed:x?} has changed");
    }
}

/// The fresh image with a cluster of data, as bytes.
fn image_with_data() -> Vec<u8> {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, CLUSTER, 1);
    f.close(disk);
    f.disk.contents()
}

/// Moves the cluster at `from` to the start of the second range, which no block counts.
fn move_to_second_range(image: &mut Vec<u8>, from: u64) {
    image.resize((SECOND_RANGE + CLUSTER) as usize, 0);
    let from = from as usize;
    image.copy_within(from..from + CLUSTER as usize, SECOND_RANGE as usize);
}

/// An entry of the refcount table was lost. The new block for its range went to the first cluster
/// there, whatever that held: with entry 0, over the header.
#[test]
fn no_refcount_block_over_a_table_that_nothing_counts() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage); 6] = [
        ("image header", |image| {
            put64(image, CLUSTER as usize, 0);
        }),
        ("L2 table", |image| {
            move_to_second_range(image, FIRST_L2);
            put64(image, L1 as usize, SECOND_RANGE | COPIED);
        }),
        ("active L1 table", |image| {
            move_to_second_range(image, L1);
            put64(image, 40, SECOND_RANGE);
        }),
        ("refcount table", |image| {
            move_to_second_range(image, CLUSTER);
            put64(image, 48, SECOND_RANGE);
        }),
        ("refcount block", |image| {
            move_to_second_range(image, REFCOUNT_BLOCK);
            put64(image, (CLUSTER + 8 * 5) as usize, SECOND_RANGE);
        }),
        ("snapshot table", |image| {
            move_to_second_range(image, L1);
            let entry = support::snapshot(L1, 0, b"1");
            let at = SECOND_RANGE as usize;
            image[at..at + entry.len()].copy_from_slice(&entry);
            put32(image, 60, 1);
            put64(image, 64, SECOND_RANGE);
        }),
    ];
    for (table, damage) in cases {
        let mut image = image_with_data();
        if table != "image header" {
            // All of the first range is in use, so the next cluster comes from the second.
            let block = REFCOUNT_BLOCK as usize;
            for count in image[block..block + CLUSTER as usize].chunks_exact_mut(2) {
                count.copy_from_slice(&1u16.to_be_bytes());
            }
        }
        damage(&mut image);
        let f = Fixture::of(&image);
        f.refuses(8 * CLUSTER, table, &format!("{table} at host offset"));
    }
}

/// Clusters of 512 bytes, counts of 64 bits, every cluster that the refcount table can cover in use,
/// and behind them the only L2 table and its data.
fn full_refcount_table() -> Vec<u8> {
    const BLOCKS: usize = 64;
    let covered = BLOCKS * 64 * 512;
    let l1 = 512 * (2 + BLOCKS);
    let mut image = fresh_image()[..512].to_vec();
    image.resize(covered + 1024, 0);
    put32(&mut image, 20, 9);
    put64(&mut image, 24, 64 * 512);
    put64(&mut image, 40, l1 as u64);
    put64(&mut image, 48, 512);
    put32(&mut image, 96, 6);
    for block in 0..BLOCKS {
        put64(&mut image, 512 + 8 * block, (1024 + 512 * block) as u64);
    }
    for count in image[1024..l1].chunks_exact_mut(8) {
        count.copy_from_slice(&1u64.to_be_bytes());
    }
    put64(&mut image, l1, covered as u64 | COPIED);
    put64(&mut image, covered, (covered as u64 - 512) | COPIED);
    image[covered - 512..covered].fill(1);
    image
}

/// A refcount table that grows lies behind all that the old one covers. An L2 table was there, and
/// every write through it said that it had succeeded.
#[test]
fn no_refcount_table_grows_over_a_table_that_nothing_counts() {
    let f = Fixture::of(&full_refcount_table());
    let disk = f.open();
    assert_eq!(f.read(&disk, 0, 512), [1; 512]);
    f.close(disk);
    f.refuses(16 * 512, "grow", "L2 table at host offset");
}

/// The image with data, on a disk of two L2 tables; the second one is not there yet.
fn image_of_two_tables() -> Vec<u8> {
    let mut image = image_with_data();
    put64(&mut image, 24, 2 * SECOND_TABLE);
    put32(&mut image, 36, 2);
    image
}

/// The first byte of the disk that the second L2 table maps.
const SECOND_TABLE: u64 = CLUSTER / 8 * CLUSTER;

/// A cluster that it maps, and whose entry is zero whatever else that table is.
const THERE: u64 = SECOND_TABLE + 8 * CLUSTER;

/// An L2 table or a refcount block in a cluster where another table is. Changes of it were written
/// over the other one; and two entries with one table had two contents of it in memory, of which
/// the file got one: what was written and flushed through the other was gone.
#[test]
fn no_change_of_a_cluster_that_two_tables_claim() {
    type Damage = fn(&mut Vec<u8>);
    // Where a write has to go to change that cluster.
    let cases: [(&str, Damage, &[u64]); 9] = [
        (
            "the second L2 table is the first",
            |image| put64(image, L1 as usize + 8, FIRST_L2 | COPIED),
            &[8 * CLUSTER, THERE],
        ),
        (
            "the second L2 table is the first, which is shared",
            |image| {
                put64(image, L1 as usize, FIRST_L2);
                put64(image, L1 as usize + 8, FIRST_L2 | COPIED);
            },
            &[8 * CLUSTER, THERE],
        ),
        (
            "an L2 table is the refcount block",
            |image| put64(image, L1 as usize + 8, REFCOUNT_BLOCK | COPIED),
            &[8 * CLUSTER, THERE],
        ),
        (
            "a shared L2 table is the refcount block",
            |image| put64(image, L1 as usize + 8, REFCOUNT_BLOCK),
            &[8 * CLUSTER, THERE],
        ),
        (
            "an L2 table is the refcount table",
            |image| put64(image, L1 as usize + 8, CLUSTER | COPIED),
            &[THERE],
        ),
        (
            "an L2 table is the L1 table",
            |image| put64(image, L1 as usize + 8, L1 | COPIED),
            &[THERE],
        ),
        (
            "an L2 table is the snapshot table",
            |image| {
                let at = image.len();
                image.resize(at + CLUSTER as usize, 0);
                let entry = support::snapshot(L1, 0, b"1");
                image[at..at + entry.len()].copy_from_slice(&entry);
                put32(image, 60, 1);
                put64(image, 64, at as u64);
                put64(image, L1 as usize + 8, at as u64 | COPIED);
                image[REFCOUNT_BLOCK as usize + 2 * (at / CLUSTER as usize) + 1] = 1;
            },
            &[THERE],
        ),
        (
            "two ranges have one refcount block",
            |image| put64(image, CLUSTER as usize + 8, REFCOUNT_BLOCK),
            &[8 * CLUSTER],
        ),
        (
            "the L1 table is the refcount table",
            |image| put64(image, 48, L1),
            &[THERE],
        ),
    ];
    for (story, damage, places) in cases {
        let mut image = image_of_two_tables();
        damage(&mut image);
        for &at in places {
            let f = Fixture::of(&image);
            f.refuses(at, story, "is not the only table there");
        }
        // What changes no table goes on.
        let f = Fixture::of(&image);
        let disk = f.open();
        assert_eq!(f.read(&disk, 0, CLUSTER), [1; CLUSTER as usize], "{story}");
        f.write(&disk, 0, CLUSTER, 2);
        f.flush(&disk);
        assert_eq!(f.read(&disk, 0, CLUSTER), [2; CLUSTER as usize], "{story}");
        f.close(disk);
    }
}

/// Two L1 entries with one L2 table that neither may change in place: each gets a copy of its own.
#[test]
fn a_table_that_two_entries_share_is_copied() {
    let mut image = image_of_two_tables();
    put64(&mut image, L1 as usize, FIRST_L2);
    put64(&mut image, L1 as usize + 8, FIRST_L2);
    image[(REFCOUNT_BLOCK + 2 * FIRST_L2 / CLUSTER) as usize + 1] = 2;
    let f = Fixture::of(&image);
    let disk = f.open();
    f.write(&disk, 8 * CLUSTER, CLUSTER, 2);
    f.write(&disk, SECOND_TABLE + 16 * CLUSTER, CLUSTER, 3);
    f.close(disk);
    let disk = f.open();
    for (at, byte) in [
        (0, 1),
        (8 * CLUSTER, 2),
        (16 * CLUSTER, 0),
        (SECOND_TABLE, 1),
        (SECOND_TABLE + 8 * CLUSTER, 0),
        (SECOND_TABLE + 16 * CLUSTER, 3),
    ] {
        assert_eq!(f.read(&disk, at, 512), [byte; 512], "{at:#x}");
    }
    f.close(disk);
}
