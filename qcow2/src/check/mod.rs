//! The check of an image's metadata, with the verdict and the counts of `qemu-img check`; and new
//! refcounts from the same walk, in `rebuild.rs`.
//!
//! Every table is read once, in the order of the file, however many snapshots share it:
//!
//! ```text
//!   L1 tables of disk and snapshots      as one sorted list of ranges, each with how many tables lie over it
//!        v  tables.rs
//!   L2 tables                            as one sorted list, each with how many L1 entries refer to it
//!        v  tables.rs
//!   references of every host cluster     counts.rs
//!        v  compare.rs
//!   refcounts on disk                    disk_refcounts.rs    (or new ones: rebuild.rs)
//! ```
//!
//! What a table refers to counts once for each path from the header to it, which is what a refcount
//! has to say. Work is bounded by the length of the file. Memory comes out of the image's budget,
//! which grows with each table entry that is really there: a large disk may be checked, a small file
//! cannot ask for much. Nothing recurses.

mod bitmaps;
mod compare;
mod copied;
mod counts;
mod disk_refcounts;
mod finding;
mod rebuild;
mod tables;

pub use finding::{Finding, Severity};
pub use rebuild::rebuild_refcounts;

use std::ops::Range;

use coblock_block::Result;

use crate::budget::Budget;
use crate::error::Error;
use crate::header::Header;
use crate::image_file::ImageFile;
use crate::snapshot::SnapshotTable;
use crate::spec;
use crate::types::{Geometry, HostCluster, HostOffset};
use crate::width::RefcountWidth;
use counts::Counts;
use disk_refcounts::DiskRefcounts;

/// A refcount on disk is not known: its block is not cluster-aligned, or could not be read.
#[derive(Debug)]
struct Broken;

/// The counts of a check. Fields are named as in `qemu-img check --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Things that can lose or change guest data.
    pub corruptions: u64,
    /// Clusters that are lost for use.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a place in the file.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow the one before in the file; and the compressed ones.
    pub fragmented_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
}

impl CheckReport {
    /// Neither corruptions nor leaks nor unchecked parts.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

/// What a check tells while it runs.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Something is wrong, `times` times over: once for each path that leads there.
    Finding {
        /// What.
        finding: &'a Finding,
        /// How often it counts.
        times: u64,
    },
    /// How far it is.
    Progress {
        /// Bytes of tables that were read.
        done: u64,
        /// Bytes of tables that are to be read, as far as is known.
        total: u64,
    },
}

/// Checks all metadata of the image in `file`. May suspend.
///
/// Nothing is written. `event` is called for each finding and now and then for progress, and may
/// keep them or not.
///
/// # Errors
/// An image that cannot be checked at all: extended L2 entries, an external data file, a snapshot
/// table or bitmap directory that cannot be read, more clusters than the reference can count.
/// Damage is not an error, it is counted.
pub fn check(
    file: &ImageFile<'_>,
    header: &Header,
    event: &mut dyn FnMut(Event<'_>),
) -> Result<CheckReport> {
    let mut state = State::new(file, header, event)?;
    let snapshots = SnapshotTable::read(file, header, &mut state.budget)?;
    state.references(header, &snapshots)?;
    state.compare(header)?;
    Ok(state.report)
}

/// A check while it runs.
struct State<'a> {
    file: &'a ImageFile<'a>,
    /// Bytes of the file, in whole sectors.
    file_len: u64,
    geometry: Geometry,
    disk: DiskRefcounts<'a>,
    counts: Counts,
    budget: Budget,
    /// Clusters of the file, and one more when something semi-allocated refers to it.
    file_clusters: u64,
    report: CheckReport,
    event: &'a mut dyn FnMut(Event<'_>),
}

impl<'a> State<'a> {
    fn new(
        file: &'a ImageFile<'a>,
        header: &Header,
        event: &'a mut dyn FnMut(Event<'_>),
    ) -> Result<Self> {
        header.ensure_standard_metadata()?;
        header.ensure_data_in_file()?;
        let geometry = header.geometry;
        // The reference counts files in sectors.
        let file_len = file.len().next_multiple_of(spec::SECTOR_LEN);
        let file_clusters = geometry.clusters(file_len).get();
        if file_clusters > spec::CHECK_CLUSTERS_MAX {
            return Err(Error::LimitExceeded {
                what: "clusters of the file",
                need: file_clusters,
                have: spec::CHECK_CLUSTERS_MAX,
                advice: "",
            }
            .into());
        }
        let mut budget = file.budget_beside(header)?;
        Ok(State {
            file,
            file_len,
            geometry,
            disk: DiskRefcounts::read(file, header, &mut budget)?,
            counts: Counts::new(RefcountWidth::new(geometry.refcount_order())),
            budget,
            file_clusters,
            report: CheckReport {
                total_clusters: geometry.clusters(header.whole_sectors()).get(),
                ..CheckReport::default()
            },
            event,
        })
    }

    /// Counts every reference but those of the refcounts to themselves.
    fn references(&mut self, header: &Header, snapshots: &SnapshotTable) -> Result<()> {
        self.tables(header, snapshots)?;
        if header.snapshots > 0 {
            self.refer(header.snapshots_offset, snapshots.len, 1)?;
        }
        if let Some(crypto) = header.crypto_header() {
            self.refer(crypto.offset, crypto.len, 1)?;
        }
        self.bitmaps(header)
    }

    /// Counts and tells a finding.
    fn found(&mut self, finding: &Finding, times: u64) {
        let count = match finding.severity() {
            Severity::Corruption => &mut self.report.corruptions,
            Severity::Leak => &mut self.report.leaks,
            Severity::CheckError => &mut self.report.check_errors,
        };
        *count = count.saturating_add(times);
        (self.event)(Event::Finding { finding, times });
    }

    /// Counts `times` references to each cluster that the range touches.
    ///
    /// The file's last cluster may end early, so a range may reach into it, but not a whole cluster
    /// behind the end.
    fn refer(&mut self, offset: HostOffset, len: u64, times: u64) -> Result<()> {
        match self.clusters_in_file(offset, len, times) {
            Some(clusters) => self.refer_clusters(clusters, times),
            None => Ok(()),
        }
    }

    /// The clusters that a range touches; nothing where there are none, or where they are behind the
    /// end, which is told.
    fn clusters_in_file(&mut self, at: HostOffset, len: u64, times: u64) -> Option<Range<u64>> {
        if len == 0 || times == 0 {
            return None;
        }
        let cluster_size = self.geometry.cluster_size();
        let end = at.get().checked_add(len);
        let Some(end) = end.filter(|end| *end < self.file_len.saturating_add(cluster_size)) else {
            self.found(&Finding::PastEnd { offset: at, len }, times);
            return None;
        };
        Some(self.geometry.host_cluster(at).get()..end.div_ceil(cluster_size))
    }

    fn refer_clusters(&mut self, clusters: Range<u64>, times: u64) -> Result<()> {
        self.file_clusters = self.file_clusters.max(clusters.end);
        for cluster in clusters.map(HostCluster) {
            let lost = self.counts.add(cluster, times, &mut self.budget)?;
            if lost > 0 {
                let offset = self.geometry.host_start(cluster);
                self.found(&Finding::Overflow { offset }, lost);
            }
        }
        Ok(())
    }
}
