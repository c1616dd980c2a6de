//! Which clusters do tables claim, and which do two of them?
//!
//! ```text
//!   claimed by                                written in place
//!   header, active L1 table, refcount table   yes
//!   L1 entry -> L2 table                      if it says *copied*; otherwise the table is copied first
//!   refcount table entry -> refcount block    yes
//!   tables of snapshots                       no
//! ```
//!
//! Two claims to one cluster, one of them written in place: a change through one would destroy what
//! the other says, and caches that know a table by its number would hold two contents of one place.
//! So nothing is changed there. That is damage which only an image brings along, since the allocator
//! hands out no cluster of a table: it is looked for once, when an image is opened for writing, and
//! later questions cost one look at an empty list. Claims are found by the filter of `overlap.rs`,
//! which is filled anyhow: only clusters that it has already are counted, in a second walk. Entries
//! that are damaged themselves claim nothing: whoever follows one gets an error. (Hazard O14; the
//! reference searches all tables at every write to one.)

use coblock_block::{GraphRead, Result};
use coblock_coroutine::Co;

use crate::entry::L1Entry;
use crate::error::Error;
use crate::header::Header;
use crate::image::Qcow2;
use crate::memtable::MemTable;
use crate::overlap::{ClusterFilter, SnapshotTables};
use crate::spec;
use crate::types::{Geometry, HostCluster, HostOffset};

/// Clusters that are remembered to be counted. The filter errs less often than that for the greatest
/// tables there are.
const SUSPECTS_MAX: usize = 1 << 20;

/// Clusters with two owners, one of which would be written in place.
#[derive(Default)]
pub(crate) struct Contested {
    /// Sorted.
    clusters: Vec<u64>,
    /// So many that they are not listed: any cluster may be one.
    any: bool,
}

impl Contested {
    /// The usual case.
    #[inline(always)]
    pub fn none(&self) -> bool {
        self.clusters.is_empty() && !self.any
    }

    fn contains(&self, cluster: HostCluster) -> bool {
        self.any || self.clusters.binary_search(&cluster.0).is_ok()
    }
}

/// What one claim means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// The table is changed where it is.
    InPlace,
    /// It is only read.
    Reads,
    /// Nothing: the entry is damaged.
    Damaged,
}

/// Everything that claims clusters for tables.
pub(crate) struct Claims<'a> {
    pub geometry: Geometry,
    pub header: &'a Header,
    pub l1: &'a MemTable,
    pub refcount_table: &'a MemTable,
    pub snapshots: &'a SnapshotTables,
}

impl Claims<'_> {
    /// A filter that knows every cluster with a table.
    pub fn filter(&self) -> ClusterFilter {
        let filter = self.empty_filter();
        self.each(|cluster, _| _ = filter.insert(HostCluster(cluster)));
        filter
    }

    /// The same, and the clusters with two owners.
    pub fn filter_and_contested(&self) -> (ClusterFilter, Contested) {
        let filter = self.empty_filter();
        let (mut suspects, mut too_many) = (Vec::new(), false);
        self.each(|cluster, _| {
            let known = filter.insert(HostCluster(cluster));
            if !known || too_many || suspects.last() == Some(&cluster) {
                return;
            }
            if suspects.len() == SUSPECTS_MAX {
                suspects.sort_unstable();
                suspects.dedup();
                too_many = suspects.len() > SUSPECTS_MAX / 2;
            }
            suspects.push(cluster);
        });
        if too_many {
            let any = true;
            return (
                filter,
                Contested {
                    any,
                    ..Contested::default()
                },
            );
        }
        suspects.sort_unstable();
        suspects.dedup();
        let clusters = self.contested_of(suspects);
        (
            filter,
            Contested {
                clusters,
                any: false,
            },
        )
    }

    /// Those of `suspects`, which are sorted, that really have two owners.
    fn contested_of(&self, suspects: Vec<u64>) -> Vec<u64> {
        if suspects.is_empty() {
            return suspects;
        }
        // How many claims, up to two, and if one of them is written in place.
        let mut found = vec![(0_u8, false); suspects.len()];
        self.each(|cluster, claim| {
            if claim == Claim::Damaged {
                return;
            }
            if let Ok(nth) = suspects.binary_search(&cluster) {
                let (count, in_place) = &mut found[nth];
                *count = 2.min(*count + 1);
                *in_place |= claim == Claim::InPlace;
            }
        });
        suspects
            .into_iter()
            .zip(found)
            .filter_map(|(cluster, found)| (found == (2, true)).then_some(cluster))
            .collect()
    }

    fn empty_filter(&self) -> ClusterFilter {
        ClusterFilter::new(self.l1.len() + self.refcount_table.len())
    }

    fn each(&self, mut f: impl FnMut(u64, Claim)) {
        let geometry = self.geometry;
        let clusters = |at: HostOffset, bytes: u64| {
            let first = geometry.host_cluster(at).0;
            first..first + geometry.clusters(bytes).0
        };
        f(0, Claim::InPlace);
        for (at, table) in [
            (self.header.l1_offset, self.l1),
            (self.header.refcount_table_offset, self.refcount_table),
        ] {
            clusters(at, table.bytes()).for_each(|cluster| f(cluster, Claim::InPlace));
        }
        for (index, entry) in self.l1.iter() {
            let host = entry & spec::ENTRY_OFFSET_MASK;
            if host == 0 {
                continue;
            }
            let claim = match L1Entry::decode(entry, index, geometry) {
                Ok(entry) if entry.copied => Claim::InPlace,
                Ok(_) => Claim::Reads,
                Err(_) => Claim::Damaged,
            };
            f(geometry.host_cluster(HostOffset(host)).0, claim);
        }
        for (_, entry) in self.refcount_table.iter() {
            let sound = entry & spec::REFCOUNT_TABLE_RESERVED == 0 && geometry.is_aligned(entry);
            let claim = if sound {
                Claim::InPlace
            } else {
                Claim::Damaged
            };
            let host = entry & !spec::REFCOUNT_TABLE_RESERVED;
            f(geometry.host_cluster(HostOffset(host)).0, claim);
        }
        self.snapshots
            .clusters()
            .for_each(|cluster| f(cluster, Claim::Reads));
    }
}

impl Qcow2 {
    /// Before a table in `cluster` is changed: refuses if another one is there as well.
    ///
    /// # Errors
    /// The image is corrupt, and marked so.
    #[inline]
    pub(crate) fn assert_alone(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        cluster: HostCluster,
    ) -> Result<()> {
        if self.contested.none() {
            return Ok(());
        }
        self.refuse_contested(co, graph, cluster)
    }

    #[cold]
    fn refuse_contested(&self, co: &Co, graph: &GraphRead<'_>, cluster: HostCluster) -> Result<()> {
        if !self.contested.contains(cluster) {
            return Ok(());
        }
        let table = self.table_at(cluster).unwrap_or("L2 table");
        let host = self.geometry.host_start(cluster);
        Err(self.signal_corruption(co, graph, Error::SharedTable { table, host }))
    }

    /// The same for entry `index` of a table in memory.
    pub(crate) fn assert_entry_alone(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        table: &MemTable,
        index: u64,
    ) -> Result<()> {
        if self.contested.none() {
            return Ok(());
        }
        let at = HostOffset(table.offset().0 + index * spec::TABLE_ENTRY_LEN);
        self.assert_alone(co, graph, self.geometry.host_cluster(at))
    }
}
