//! Refcount table and blocks, and every refcount against the references that were found.

use coblock_block::Result;

use super::{Broken, Finding, State};
use crate::header::Header;
use crate::spec;
use crate::types::{HostCluster, HostOffset};

impl State<'_> {
    /// Counts the references to refcount table and blocks, then compares.
    pub(super) fn compare(&mut self, header: &Header) -> Result<()> {
        let geometry = self.geometry;
        let table_len = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        self.refer(header.refcount_table_offset, table_len, 1)?;
        for slot in 0..self.disk.table().len() {
            self.refcount_block(slot)?;
        }
        self.refcounts();
        Ok(())
    }

    fn refcount_block(&mut self, slot: usize) -> Result<()> {
        let geometry = self.geometry;
        let entry = self.disk.table()[slot];
        let number = slot as u64;
        if entry & spec::REFCOUNT_TABLE_RESERVED != 0 {
            self.found(&Finding::RefcountTableReserved { index: number }, 1);
            return Ok(());
        }
        if !geometry.is_aligned(entry) {
            self.found(&Finding::RefcountBlockUnaligned { index: number }, 1);
            return Ok(());
        }
        if entry == 0 {
            return Ok(());
        }
        let cluster = geometry.host_cluster(HostOffset(entry));
        if cluster.get() >= self.file_clusters {
            self.found(&Finding::RefcountBlockPastEnd { index: number }, 1);
            return Ok(());
        }
        self.refer(HostOffset(entry), geometry.cluster_size(), 1)?;
        let references = self.counts.get(cluster);
        if references != 1 {
            self.found(
                &Finding::RefcountBlockShared {
                    index: number,
                    references,
                },
                1,
            );
        }
        Ok(())
    }

    /// Every cluster of the file: the refcount on disk against the references.
    fn refcounts(&mut self) {
        let mut highest = 0;
        let mut broken = Run::default();
        let step = self.disk.slice_entries();
        let mut from = 0;
        while from < self.file_clusters {
            let to = self.file_clusters.min(from + step);
            match self.disk.are_zero(HostCluster(from)) {
                // Where nothing is counted on disk, only clusters with references can be wrong.
                Ok(true) => {
                    for cluster in self.counts.referenced(from, to) {
                        highest = cluster.get();
                        self.compare_one(cluster, 0);
                    }
                }
                Ok(false) => {
                    for cluster in (from..to).map(HostCluster) {
                        match self.disk.get(cluster) {
                            Ok(refcount) if self.compare_one(cluster, refcount) => {
                                highest = cluster.get();
                            }
                            Ok(_) => {}
                            Err(Broken) => unreachable!("the slice is in memory"),
                        }
                    }
                }
                Err(Broken) => {
                    if let Some(run) = broken.push(from, to - from) {
                        self.unreadable(run);
                    }
                }
            }
            from = to;
        }
        if let Some(run) = broken.0 {
            self.unreadable(run);
        }
        self.report.image_end_offset = (highest + 1) * self.geometry.cluster_size();
    }

    /// Whether the cluster is in use.
    fn compare_one(&mut self, cluster: HostCluster, refcount: u64) -> bool {
        let references = self.counts.get(cluster);
        if refcount < references {
            self.found(
                &Finding::RefcountTooSmall {
                    cluster,
                    refcount,
                    references,
                },
                1,
            );
        } else if refcount > references {
            self.found(
                &Finding::Leaked {
                    cluster,
                    refcount,
                    references,
                },
                1,
            );
        }
        refcount > 0 || references > 0
    }

    fn unreadable(&mut self, (cluster, clusters): (u64, u64)) {
        let cluster = HostCluster(cluster);
        self.found(&Finding::RefcountUnreadable { cluster, clusters }, clusters);
    }
}

/// Clusters that follow each other: the first one and how many.
#[derive(Default)]
struct Run(Option<(u64, u64)>);

impl Run {
    /// Adds clusters; gives the run before them when they do not belong to that.
    fn push(&mut self, from: u64, more: u64) -> Option<(u64, u64)> {
        match &mut self.0 {
            Some((first, count)) if *first + *count == from => {
                *count += more;
                None
            }
            other => other.replace((from, more)),
        }
    }
}
