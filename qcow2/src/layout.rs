//! Where a new image has its tables.
//!
//! ```text
//!   | header | refcount table | refcount block 0 | L1 table | L2 tables, data | refcount blocks 1 .. |
//!                                                            preallocated       only of large images
//! ```
//!
//! The order is the reference's, so a new image of the usual sizes has the same bytes. Everything
//! here is arithmetic: [`crate::create`] writes what a [`Layout`] says.

use crate::entry::{L1Entry, L2Entry};
use crate::error::{Error, Result};
use crate::spec;
use crate::types::{Geometry, HostCluster, HostOffset, index};
use crate::width::RefcountWidth;

/// Bytes that one refcount block, or the L1 table, is written in at most.
pub const PIECE: u64 = 1 << 20;

/// A new image, in clusters of the host file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    geometry: Geometry,
    /// Clusters of the refcount table, which begins at cluster 1.
    refcount_table_clusters: u64,
    l1_start: u64,
    l1_clusters: u64,
    /// L2 tables behind the L1 table; 0 without preallocation.
    l2_tables: u64,
    /// Data clusters behind the L2 tables; 0 without preallocation.
    data_clusters: u64,
    refcount_blocks: u64,
}

impl Layout {
    /// Plans an image; with `preallocate` every guest cluster has its place.
    ///
    /// # Errors
    /// A size whose L1 or refcount table would be too large.
    pub fn plan(geometry: Geometry, preallocate: bool) -> Result<Self> {
        let cluster_size = geometry.cluster_size();
        let entries = geometry.l1_entries();
        let max = spec::L1_LEN_MAX / spec::TABLE_ENTRY_LEN;
        if entries > max {
            return Err(Error::ImageTooBig {
                size: geometry.virtual_size(),
                need: entries,
            });
        }
        let l1_clusters = geometry.clusters(entries * spec::TABLE_ENTRY_LEN).get();
        let (l2_tables, data_clusters) = if preallocate {
            (entries, geometry.clusters(geometry.virtual_size()).get())
        } else {
            (0, 0)
        };
        let block_entries = geometry.refcount_block_entries();
        let table_entries = cluster_size / spec::TABLE_ENTRY_LEN;
        // Refcount structures count themselves: grow both until they are enough. Each round adds
        // less than the last one by the number of refcounts in a block, which is at least 64.
        let (mut table, mut blocks) = (1, 1);
        loop {
            let total = 1 + table + blocks + l1_clusters + l2_tables + data_clusters;
            let (need_blocks, need_table) = (
                total.div_ceil(block_entries),
                blocks.div_ceil(table_entries),
            );
            if need_blocks <= blocks && need_table <= table {
                break;
            }
            (blocks, table) = (blocks.max(need_blocks), table.max(need_table));
        }
        let max = spec::REFCOUNT_TABLE_LEN_MAX / cluster_size;
        if table > max {
            return Err(Error::LimitExceeded {
                what: "clusters of the refcount table",
                need: table,
                have: max,
                advice: "",
            });
        }
        Ok(Self {
            geometry,
            refcount_table_clusters: table,
            l1_start: 1 + table + 1,
            l1_clusters,
            l2_tables,
            data_clusters,
            refcount_blocks: blocks,
        })
    }

    fn start(self, cluster: u64) -> HostOffset {
        self.geometry.host_start(HostCluster(cluster))
    }

    /// Where the refcount table begins.
    #[must_use]
    pub fn refcount_table_offset(self) -> HostOffset {
        self.start(1)
    }

    /// Clusters of the refcount table.
    #[must_use]
    pub fn refcount_table_clusters(self) -> u32 {
        u32::try_from(self.refcount_table_clusters).expect("at most 8 MiB, checked by `plan`")
    }

    /// Where the L1 table begins.
    #[must_use]
    pub fn l1_offset(self) -> HostOffset {
        self.start(self.l1_start)
    }

    /// Entries of the L1 table.
    #[must_use]
    pub fn l1_entries(self) -> u32 {
        u32::try_from(self.geometry.l1_entries()).expect("at most 32 MiB, checked by `plan`")
    }

    /// Number of L2 tables.
    #[must_use]
    pub fn l2_tables(self) -> u64 {
        self.l2_tables
    }

    fn l2_start(self) -> u64 {
        self.l1_start + self.l1_clusters
    }

    /// Where an L2 table begins.
    #[must_use]
    pub fn l2_offset(self, table: u64) -> HostOffset {
        assert!(
            table < self.l2_tables,
            "L2 table {table} of {}",
            self.l2_tables
        );
        self.start(self.l2_start() + table)
    }

    /// Where preallocated data begins, and its bytes.
    #[must_use]
    pub fn data(self) -> (HostOffset, u64) {
        let start = self.start(self.l2_start() + self.l2_tables);
        (start, self.data_clusters * self.geometry.cluster_size())
    }

    /// Number of refcount blocks.
    #[must_use]
    pub fn refcount_blocks(self) -> u64 {
        self.refcount_blocks
    }

    /// Where a refcount block begins.
    #[must_use]
    pub fn refcount_block_offset(self, block: u64) -> HostOffset {
        assert!(
            block < self.refcount_blocks,
            "refcount block {block} of {}",
            self.refcount_blocks
        );
        if block == 0 {
            return self.start(1 + self.refcount_table_clusters);
        }
        self.start(self.l2_start() + self.l2_tables + self.data_clusters + block - 1)
    }

    /// Clusters of the whole image; each has one reference.
    #[must_use]
    pub fn clusters(self) -> u64 {
        self.l2_start() + self.l2_tables + self.data_clusters + self.refcount_blocks - 1
    }

    /// The refcount table.
    #[must_use]
    pub fn refcount_table(self) -> Vec<u8> {
        let mut out: Vec<u8> = (0..self.refcount_blocks)
            .flat_map(|block| self.refcount_block_offset(block).get().to_be_bytes())
            .collect();
        out.resize(
            index(self.refcount_table_clusters * self.geometry.cluster_size()),
            0,
        );
        out
    }

    /// A refcount block: one for each cluster of the image.
    #[must_use]
    pub fn refcount_block(self, block: u64) -> Vec<u8> {
        let width = RefcountWidth::new(self.geometry.refcount_order());
        let entries = self.geometry.refcount_block_entries();
        let used = self.clusters().saturating_sub(block * entries).min(entries);
        let mut out = vec![0; self.geometry.cluster_len()];
        for slot in 0..index(used) {
            width.set(&mut out, slot, 1);
        }
        out
    }

    /// The L1 table.
    #[must_use]
    pub fn l1_table(self) -> Vec<u8> {
        let mut out: Vec<u8> = (0..self.l2_tables)
            .flat_map(|table| {
                let entry = L1Entry {
                    host: Some(self.l2_offset(table)),
                    copied: true,
                };
                entry.encode().to_be_bytes()
            })
            .collect();
        out.resize(index(self.geometry.l1_entries() * spec::TABLE_ENTRY_LEN), 0);
        out
    }

    /// An L2 table: each guest cluster has the next data cluster.
    #[must_use]
    pub fn l2_table(self, table: u64) -> Vec<u8> {
        let entries = self.geometry.l2_entries() as u64;
        let first = table * entries;
        let used = self.data_clusters.saturating_sub(first).min(entries);
        let data = self.l2_start() + self.l2_tables;
        let mut out: Vec<u8> = (first..first + used)
            .flat_map(|cluster| {
                let entry = L2Entry::Data {
                    host: self.start(data + cluster),
                    copied: true,
                };
                entry.encode(self.geometry).to_be_bytes()
            })
            .collect();
        out.resize(self.geometry.cluster_len(), 0);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Version;

    fn plan(cluster_bits: u32, order: u32, size: u64, preallocate: bool) -> Layout {
        let geometry = Geometry::new(Version::V3, cluster_bits, order, size).unwrap();
        Layout::plan(geometry, preallocate).unwrap()
    }

    #[test]
    fn usual_image() {
        let layout = plan(16, 4, 1 << 30, false);
        assert_eq!(layout.refcount_table_offset(), HostOffset(0x1_0000));
        assert_eq!(layout.refcount_block_offset(0), HostOffset(0x2_0000));
        assert_eq!(
            (layout.l1_offset(), layout.l1_entries()),
            (HostOffset(0x3_0000), 2)
        );
        assert_eq!((layout.refcount_blocks(), layout.clusters()), (1, 4));
    }

    /// Every cluster has one place and one refcount, in every geometry.
    #[test]
    fn places_do_not_overlap() {
        for (bits, order, size) in [
            (9, 4, 1 << 20),
            (9, 4, 1 << 30),
            (9, 6, 1 << 30),
            (9, 0, 1 << 27),
            (9, 4, 128 << 30),
            (12, 3, 1 << 33),
            (16, 4, 1 << 44),
            (21, 6, 1 << 50),
            (16, 4, 0),
        ] {
            for preallocate in [false, true] {
                if preallocate && size > 1 << 30 {
                    continue;
                }
                let layout = plan(bits, order, size, preallocate);
                let cluster = |offset: HostOffset| offset.get() >> bits;
                let mut ranges = vec![
                    (0, 1),
                    (1, u64::from(layout.refcount_table_clusters())),
                    (cluster(layout.l1_offset()), layout.l1_clusters),
                    (cluster(layout.data().0), layout.data().1 >> bits),
                ];
                ranges.extend((0..layout.l2_tables()).map(|n| (cluster(layout.l2_offset(n)), 1)));
                ranges.extend(
                    (0..layout.refcount_blocks())
                        .map(|n| (cluster(layout.refcount_block_offset(n)), 1)),
                );
                ranges.retain(|(_, len)| *len > 0);
                ranges.sort_unstable();
                let mut next = 0;
                for (start, len) in ranges {
                    assert_eq!(start, next, "{bits} {order} {size} {preallocate}");
                    next = start + len;
                }
                assert_eq!(next, layout.clusters());
                let covered = layout.refcount_blocks() * layout.geometry.refcount_block_entries();
                assert!(covered >= layout.clusters());
                let table = layout.refcount_table();
                assert!(table.len() as u64 >= layout.refcount_blocks() * 8);
            }
        }
    }

    #[test]
    fn too_large() {
        let geometry = Geometry::new(Version::V3, 9, 4, (128 << 30) + 1).unwrap();
        assert!(matches!(
            Layout::plan(geometry, false),
            Err(Error::ImageTooBig { .. })
        ));
        // The table of 64-bit refcounts of all that data.
        let geometry = Geometry::new(Version::V3, 9, 6, 128 << 30).unwrap();
        assert!(matches!(
            Layout::plan(geometry, true),
            Err(Error::LimitExceeded { .. })
        ));
    }
}
