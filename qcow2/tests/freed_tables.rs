//! Rule 9.4, by every request that frees a table: nothing that is cached of it is written over the
//! next owner of its cluster, or shown as a part of it.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use std::rc::Rc;

use coblock_block::drivers::sim::{Fault, Match};
use coblock_block::{BlockBackend, ErrorKind, RequestFlags};
use coblock_qcow2::Qcow2;
use support::rig::*;

/// Counts agree with references, in memory and file together, and nothing is leaked.
fn audit(f: &Fixture, disk: &BlockBackend, story: &str) {
    let node = disk.node();
    let driver = node.driver();
    let image = driver.as_any().unwrap().downcast_ref::<Qcow2>().unwrap();
    let peek = |at: u64, bytes: &mut [u8]| bytes.copy_from_slice(&f.disk.peek(at, bytes.len()));
    let audit = f.home.run(|co| image.audit(co, &peek));
    let audit = audit.expect("nobody changes metadata now");
    let audit = audit.unwrap_or_else(|wrong| panic!("{story}: {wrong}"));
    assert_eq!(audit.leaked, 0, "{story}");
}

/// Writes guest clusters from `first` on, each with `byte`, until one of them lies at `host`.
fn write_until_at(f: &Fixture, disk: &Rc<BlockBackend>, first: u64, byte: u8, host: u64) -> u64 {
    for cluster in first..first + 64 {
        f.write(disk, cluster * CLUSTER, CLUSTER, byte);
        f.flush(disk);
        if f.host_of(cluster * CLUSTER) == host {
            return cluster;
        }
    }
    panic!("the cluster of the freed table is never handed out");
}

/// Rule 9.4: a discard, or zeroes, in an L2 table that may not be changed in place, as if a snapshot
/// had shared it once. The table is copied, the old one freed with its slices cached, and its
/// cluster holds the guest's data afterwards.
#[test]
fn rule_9_4_a_table_freed_by_discard_or_zeroes() {
    for discard in [true, false] {
        let story = if discard { "discard" } else { "zeroes" };
        let f = Fixture::new();
        let disk = f.open();
        f.write(&disk, 0, 4 * CLUSTER, 1);
        f.close(disk);
        let table = f.word(L1) & !COPIED;
        f.disk.poke(L1, &table.to_be_bytes());

        let disk = f.open();
        assert!(f.read(&disk, 0, 4 * CLUSTER).iter().all(|&b| b == 1));
        assert!(stats(&disk).l2_misses > 0, "the old table is cached");
        f.home
            .run(|co| {
                if discard {
                    disk.pdiscard(co, CLUSTER, CLUSTER)
                } else {
                    disk.pwrite_zeroes(co, CLUSTER, CLUSTER, RequestFlags::MAY_UNMAP)
                }
            })
            .unwrap();
        f.flush(&disk);
        assert_ne!(f.word(L1) & !COPIED, table, "{story}: the table was copied");
        let reused = write_until_at(&f, &disk, 8, 3, table);
        audit(&f, &disk, story);
        // The new table changes once more, with the old place in the guest's hands.
        f.write(&disk, 2 * CLUSTER, CLUSTER, 4);
        f.flush(&disk);
        audit(&f, &disk, story);
        let read = |disk: &BlockBackend, cluster: u64| f.read(disk, cluster * CLUSTER, CLUSTER);
        let expected = [(0, 1), (1, 0), (2, 4), (3, 1), (reused, 3)];
        for (cluster, byte) in expected {
            assert!(
                read(&disk, cluster).iter().all(|&b| b == byte),
                "{story}: {cluster}"
            );
        }
        f.close(disk);
        assert!(
            f.disk.peek(table, CLUSTER as usize).iter().all(|&b| b == 3),
            "{story}"
        );
        let disk = f.open();
        for (cluster, byte) in expected {
            assert!(
                read(&disk, cluster).iter().all(|&b| b == byte),
                "{story}: {cluster}"
            );
        }
        f.close(disk);
    }
}

/// Rule 9.4: the table is freed by a shorter disk while its slices hold changes that the file does
/// not have.
#[test]
fn rule_9_4_a_changed_table_freed_by_a_shorter_disk() {
    let f = Fixture::new();
    let second = 512 * CLUSTER;
    // Two tables, with the L1 table where it is.
    f.disk.poke(24, &(2 * second).to_be_bytes());
    f.disk.poke(36, &2u32.to_be_bytes());
    let disk = f.open();
    f.write(&disk, 0, CLUSTER, 1);
    f.write(&disk, second, CLUSTER, 2);
    f.flush(&disk);
    let table = f.word(L1 + 8) & !COPIED;
    assert_ne!(table, 0);
    f.write(&disk, second + 8 * CLUSTER, CLUSTER, 2);
    assert_eq!(f.word(table + 64), 0, "the entry is in the cache alone");
    f.home.run(|co| disk.truncate(co, second, true)).unwrap();
    assert_eq!(f.word(L1 + 8), 0);
    let reused = write_until_at(&f, &disk, 1, 3, table);
    audit(&f, &disk, "shorter");
    f.home
        .run(|co| disk.truncate(co, 2 * second, true))
        .unwrap();
    for at in [second, second + 8 * CLUSTER] {
        assert!(
            f.read(&disk, at, CLUSTER).iter().all(|&b| b == 0),
            "{at:#x}"
        );
    }
    f.write(&disk, second, CLUSTER, 5);
    f.flush(&disk);
    audit(&f, &disk, "longer again");
    f.close(disk);
    assert!(f.disk.peek(table, CLUSTER as usize).iter().all(|&b| b == 3));
    let disk = f.open();
    assert!(
        f.read(&disk, reused * CLUSTER, CLUSTER)
            .iter()
            .all(|&b| b == 3)
    );
    assert!(f.read(&disk, second, CLUSTER).iter().all(|&b| b == 5));
    f.close(disk);
}

/// Rule 9.4: the same of a refcount block, whose range is used anew afterwards.
#[test]
fn rule_9_4_a_refcount_block_freed_by_a_shorter_disk() {
    let f = Fixture::new();
    let len = 12 << 20;
    let disk = f.open();
    let entry = CLUSTER + 8;
    let fill = |byte: u8| {
        f.home.run(|co| disk.truncate(co, len, true)).unwrap();
        for at in (0..len).step_by(1 << 20) {
            f.write(&disk, at, 1 << 20, byte);
        }
    };
    fill(1);
    f.flush(&disk);
    let block = f.word(entry);
    assert_ne!(block, 0, "a second block counts the end of the file");
    // Counts of the block change in memory.
    f.home
        .run(|co| disk.pdiscard(co, 11 << 20, 1 << 20))
        .unwrap();
    f.home.run(|co| disk.truncate(co, 1 << 20, true)).unwrap();
    assert_eq!(f.word(entry), 0, "the block went");
    assert!(f.disk.len() <= block, "and its cluster");
    audit(&f, &disk, "shorter");
    fill(2);
    f.flush(&disk);
    assert_ne!(f.word(entry), 0);
    audit(&f, &disk, "longer again");
    assert!(f.read(&disk, 0, len).iter().all(|&b| b == 2));
    f.close(disk);
    let disk = f.open();
    assert!(f.read(&disk, 0, len).iter().all(|&b| b == 2));
    f.close(disk);
}

/// A new table that cannot be written, an L2 table while counts are lazy and a longer L1 table: the
/// clusters that it had are free again, and the error is the one of the write.
#[test]
fn a_new_table_that_fails_leaks_nothing() {
    // The new table is in the first free cluster; lazy counts come to the file before it.
    for (story, at) in [("L2 table", REFCOUNT_BLOCK), ("L1 table", FIRST_L2)] {
        let f = Fixture::new();
        let disk = f
            .open_with(f.options().with("lazy-refcounts", "on"))
            .unwrap();
        let change = || match story {
            "L2 table" => f.wait(&f.start_write(&disk, 0, CLUSTER, 1)),
            _ => f.home.run(|co| disk.truncate(co, 1 << 30, true)),
        };
        f.disk
            .fail(Fault::new(Match::writes().touching(at..at + CLUSTER), 5));
        let error = change().expect_err(story);
        assert_eq!(error.kind(), ErrorKind::Io, "{story}: {error}");
        audit(&f, &disk, story);
        change().expect(story);
        audit(&f, &disk, story);
        f.close(disk);
    }
}
