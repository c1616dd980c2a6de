//! "Is there metadata at this host offset?", asked before guest data is written in place and before a
//! cluster is handed out. Whether a table may be written where it lies is asked when its image is
//! opened, in `claims.rs`.
//!
//! A damaged image can lead guest data over tables, and a bug of ours could hand out a table's
//! cluster. The answer costs one load for almost every write: a filter of hashed bits knows every
//! cluster that ever held a table. Only where its bits are set, the tables themselves are searched.
//! (Hazard O14; the reference searches them for every write.) Which structures are looked after is
//! the reference's option `overlap-check`. The allocator never hands out a cluster that holds a
//! table, whatever that says.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use coblock_block::ErrorKind;
use coblock_block::types::in_memory;

use crate::fields::be64;
use crate::header::Header;
use crate::image_file::ImageFile;
use crate::snapshot::SnapshotTable;
use crate::spec;
use crate::tuning::OverlapCheck;
use crate::types::{HostCluster, HostOffset};

/// Bits per table at the time the image is opened. With three of one word for each table, a
/// hundredth of the lookups of a full filter go on to the search; the search takes the longer the
/// larger the image is.
const BITS_PER_TABLE: u64 = 16;
const BITS_MIN: u64 = 1 << 16;
const BITS_MAX: u64 = 1 << 25;

/// Hashed set of clusters: no false "no".
pub(crate) struct ClusterFilter {
    words: Box<[AtomicU64]>,
    /// Logarithm of how many.
    words_bits: u32,
}

impl ClusterFilter {
    /// A filter for about `tables` clusters.
    pub fn new(tables: u64) -> Self {
        ClusterFilter {
            words_bits: Self::words(tables).ilog2(),
            words: (0..Self::words(tables))
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }

    fn words(tables: u64) -> u64 {
        let bits = (tables.saturating_mul(BITS_PER_TABLE)).clamp(BITS_MIN, BITS_MAX);
        bits.next_power_of_two() / 64
    }

    /// Bytes of memory for about `tables` clusters.
    pub fn memory(tables: u64) -> u64 {
        Self::words(tables) * 8
    }

    /// The word of a cluster, and its three bits there.
    #[inline(always)]
    fn place(&self, cluster: HostCluster) -> (usize, u64) {
        // Fibonacci hashing: the high bits of the product are well mixed.
        let hash = cluster.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let word = hash >> (64 - self.words_bits);
        let bits = hash >> (64 - self.words_bits - 18);
        let bit = |nth: u32| 1 << (bits >> (6 * nth) & 63);
        (in_memory(word), bit(0) | bit(1) | bit(2))
    }

    /// `cluster` holds a table from now on. Might it have held one before?
    pub fn insert(&self, cluster: HostCluster) -> bool {
        let (word, bits) = self.place(cluster);
        self.words[word].fetch_or(bits, Relaxed) & bits == bits
    }

    /// Might `cluster` hold a table?
    #[inline(always)]
    pub fn may_contain(&self, cluster: HostCluster) -> bool {
        let (word, bits) = self.place(cluster);
        self.words[word].load(Relaxed) & bits == bits
    }
}

/// Where the tables of snapshots lie. No operation here changes them.
#[derive(Default)]
pub(crate) struct SnapshotTables {
    /// First cluster, clusters, and what they hold; sorted.
    ranges: Vec<(u64, u64, &'static str)>,
    /// The longest of them, in clusters.
    longest: u64,
}

impl SnapshotTables {
    /// Finds them; their L2 tables only if `wanted` names these. Suspends.
    ///
    /// # Errors
    /// I/O; L1 tables that are too much for the budget, if their L2 tables are wanted. A snapshot
    /// table or a snapshot that is damaged or too large is left out: it is an error of who uses it.
    pub fn read(
        file: &ImageFile<'_>,
        header: &Header,
        wanted: OverlapCheck,
    ) -> coblock_block::Result<Self> {
        let mut found = SnapshotTables::default();
        if header.snapshots == 0 {
            return Ok(found);
        }
        let geometry = header.geometry;
        let mut add = |at: HostOffset, len: u64, what| {
            let clusters = geometry.clusters(len).get();
            found
                .ranges
                .push((geometry.host_cluster(at).get(), clusters, what));
            found.longest = found.longest.max(clusters);
        };
        let mut budget = file.budget_beside(header)?;
        let table = match SnapshotTable::read(file, header, &mut budget) {
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::LimitExceeded) => {
                log::warn!("tables of snapshots are not protected from writes: {error}");
                return Ok(found);
            }
            table => table?,
        };
        add(header.snapshots_offset, table.len, "snapshot table");
        for (index, snapshot) in (0..).zip(&table.snapshots) {
            let Ok(()) = snapshot.check_l1(index, geometry) else {
                continue;
            };
            let len = u64::from(snapshot.l1_entries) * spec::TABLE_ENTRY_LEN;
            add(snapshot.l1_offset, len, "L1 table of a snapshot");
            if wanted.contains(OverlapCheck::INACTIVE_L2) {
                // Its bytes, and a range of ours for each entry.
                let need = len.saturating_mul(5);
                budget.take("bytes of memory for the snapshot table", need)?;
                let mut l1 = vec![0; in_memory(len)];
                file.read(snapshot.l1_offset.get(), &mut l1)?;
                for raw in l1.chunks_exact(8) {
                    let host = be64(raw, 0) & spec::ENTRY_OFFSET_MASK;
                    if host != 0 {
                        add(
                            HostOffset(host),
                            geometry.cluster_size(),
                            "L2 table of a snapshot",
                        );
                    }
                }
            }
        }
        found.ranges.sort_unstable();
        found.ranges.dedup();
        Ok(found)
    }

    /// Every cluster of each.
    pub fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        let ranges = self.ranges.iter();
        ranges.flat_map(|&(first, clusters, _)| first..first + clusters)
    }

    /// What `cluster` holds a part of.
    pub fn at(&self, cluster: HostCluster) -> Option<&'static str> {
        let from = cluster.0.saturating_sub(self.longest);
        let start = self.ranges.partition_point(|(first, ..)| *first < from);
        self.ranges[start..]
            .iter()
            .take_while(|(first, ..)| *first <= cluster.0)
            .find(|(first, clusters, _)| cluster.0 - first < *clusters)
            .map(|(.., what)| *what)
    }
}

impl OverlapCheck {
    /// The structure that a table of this name belongs to.
    pub(crate) fn of(table: &str) -> Self {
        match table {
            "image header" => Self::MAIN_HEADER,
            "active L1 table" => Self::ACTIVE_L1,
            "refcount table" => Self::REFCOUNT_TABLE,
            "L2 table" => Self::ACTIVE_L2,
            "refcount block" => Self::REFCOUNT_BLOCK,
            "snapshot table" => Self::SNAPSHOT_TABLE,
            "L1 table of a snapshot" => Self::INACTIVE_L1,
            "L2 table of a snapshot" => Self::INACTIVE_L2,
            other => unreachable!("a table called {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never "no" for a member, rarely "perhaps" for another.
    #[test]
    fn filter_has_no_false_no() {
        let filter = ClusterFilter::new(4096);
        for n in 0..4096 {
            filter.insert(HostCluster(n * 8193));
        }
        assert!((0..4096).all(|n| filter.may_contain(HostCluster(n * 8193))));
        let wrong = (0..100_000)
            .filter(|n| filter.may_contain(HostCluster(n * 7 + 3)))
            .count();
        assert!(wrong < 2_000, "{wrong} of 100000");
    }
}
