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
