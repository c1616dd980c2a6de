//! "Is there metadata at this host offset?", asked before every write.
//!
//! A damaged image can lead guest data over tables, and a bug of ours could hand out a table's
//! cluster. The answer costs one load for almost every write: a filter of hashed bits knows every
//! cluster that ever held a table. Only where its bits are set, the tables themselves are searched.
//! (Hazard O14; the reference searches them for every write.)

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use coblock_block::types::in_memory;

use crate::types::HostCluster;

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

    /// `cluster` holds a table from now on.
    pub fn insert(&self, cluster: HostCluster) {
        let (word, bits) = self.place(cluster);
        self.words[word].fetch_or(bits, Relaxed);
    }

    /// Might `cluster` hold a table?
    #[inline(always)]
    pub fn may_contain(&self, cluster: HostCluster) -> bool {
        let (word, bits) = self.place(cluster);
        self.words[word].load(Relaxed) & bits == bits
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
