//! New refcounts for an image whose own are not to be trusted: what opening a dirty image for
//! writing does first.
//!
//! References are counted from the header down, as a check does, and written as a refcount table
//! with its blocks to clusters that nothing refers to; then one write of the header switches to
//! them. The old ones are never changed, so a power cut on the way leaves the image as it was, or
//! repaired:
//!
//! ```text
//!   | header | old table, blocks | L1, L2, data ...            | new blocks | new table |
//!        |         not counted any more: free                          ^
//!        +--------- 12 bytes, written and flushed last ----------------+
//! ```
//! Then copied flags that contradict the new counts are corrected, and the dirty bit goes last.

use coblock_block::Result;

use super::copied::correct_copied_flags;
use super::{Event, Finding, Severity, State, check};
use crate::error::Error;
use crate::header::{Header, Incompatible};
use crate::image_file::ImageFile;
use crate::snapshot::SnapshotTable;
use crate::spec;
use crate::types::{HostCluster, HostOffset, index};
use crate::width::RefcountWidth;

/// Clusters whose references are looked at together.
const STEP: u64 = 4096;

/// Rebuilds the refcounts of a dirty image, makes sure that the image is sound, and takes the dirty
/// bit away, in the file and in `header`. Suspends. Returns how many clusters are in use.
///
/// # Errors
/// I/O, the limits of [`check`], no room at the end of a device, or an image whose trouble is not
/// its refcounts. It is still dirty then.
pub fn rebuild_refcounts(file: &ImageFile<'_>, header: &mut Header) -> Result<u64> {
    let used = count_and_write(file, header)?;
    let mut worst = None;
    let mut flags = false;
    check(file, header, &mut |event| {
        if is_about_flags(&event) {
            flags = true;
        } else {
            remember(&mut worst, &event);
        }
    })?;
    if worst.is_none() && flags {
        let corrected = correct_copied_flags(file, header)?;
        log::warn!("{corrected} copied flags contradicted the new counts");
        check(file, header, &mut |event| remember(&mut worst, &event))?;
    }
    if worst.is_some() {
        return Err(damaged(worst));
    }
    header.incompatible.remove(Incompatible::DIRTY);
    let field = header.incompatible.bits().to_be_bytes();
    file.write(spec::HEADER_AT_INCOMPATIBLE, &field)?;
    file.flush()?;
    Ok(used)
}

fn count_and_write(file: &ImageFile<'_>, header: &mut Header) -> Result<u64> {
    let mut worst = None;
    let mut event = |event: Event<'_>| {
        // Flags were compared with the refcounts that are replaced.
        if !is_about_flags(&event) {
            remember(&mut worst, &event);
        }
    };
    let mut state = State::new(file, header, &mut event)?;
    let snapshots = SnapshotTable::read(file, header, &mut state.budget)?;
    state.references(header, &snapshots)?;
    let old_table = state.disk.table().to_vec();
    let (counts, file_clusters) = (state.counts, state.file_clusters);
    if worst.is_some() {
        return Err(damaged(worst));
    }

    // Behind everything that is in use, and behind the old tables: they stay as they are.
    let geometry = header.geometry;
    let mut first = 1;
    let mut blocks = Vec::new();
    let per_block = geometry.refcount_block_entries();
    let mut used = 0;
    for start in (0..file_clusters).step_by(index(STEP.min(per_block))) {
        let referenced = counts.referenced(start, file_clusters.min(start + STEP.min(per_block)));
        if let Some(last) = referenced.last() {
            first = last.get() + 1;
            blocks.push(start / per_block);
        }
        used += referenced.len() as u64;
    }
    blocks.dedup();
    let table_clusters = u64::from(header.refcount_table_clusters);
    first = first.max(geometry.host_cluster(header.refcount_table_offset).get() + table_clusters);
    for entry in old_table {
        let block = geometry.host_cluster(HostOffset(entry & !spec::REFCOUNT_TABLE_RESERVED));
        // An entry that leads out of the file leads nowhere.
        if block.get() < file_clusters {
            first = first.max(block.get() + 1);
        }
    }

    let plan = Plan::new(header, blocks, first)?;
    let width = RefcountWidth::new(geometry.refcount_order());
    let mut block = vec![0; geometry.cluster_len()];
    let mut table = vec![0; index(plan.table_clusters * geometry.cluster_size())];
    for (nth, &number) in (0..).zip(&plan.blocks) {
        block.fill(0);
        let range = number * per_block..(number + 1) * per_block;
        let mut set = |cluster: u64, count| {
            width.set(&mut block, index(cluster - range.start), count);
        };
        for start in range.clone().step_by(index(STEP)) {
            for cluster in counts.referenced(start, range.end.min(start + STEP)) {
                set(cluster.get(), counts.get(cluster));
            }
        }
        for cluster in range.start.max(first)..range.end.min(first + plan.clusters()) {
            set(cluster, 1);
        }
        let host = geometry.host_start(HostCluster(first + nth));
        file.write(host.get(), &block)?;
        let slot = index(number * spec::TABLE_ENTRY_LEN);
        table[slot..slot + 8].copy_from_slice(&host.get().to_be_bytes());
    }
    let table_at = geometry.host_start(HostCluster(first + plan.blocks.len() as u64));
    file.write(table_at.get(), &table)?;
    file.flush()?;

    let table_clusters = u32::try_from(plan.table_clusters).expect("8 MiB at most");
    let mut field = [0; 12];
    field[..8].copy_from_slice(&table_at.get().to_be_bytes());
    field[8..].copy_from_slice(&table_clusters.to_be_bytes());
    file.write(spec::HEADER_AT_REFCOUNT_TABLE, &field)?;
    file.flush()?;
    header.refcount_table_offset = table_at;
    header.refcount_table_clusters = table_clusters;
    Ok(used + plan.clusters())
}

/// Which blocks there will be, and how large the table.
struct Plan {
    /// Their slots in the table, in order.
    blocks: Vec<u64>,
    table_clusters: u64,
}

impl Plan {
    /// For `blocks` that count what is in use, with more that count the new clusters themselves,
    /// from `first` on.
    fn new(header: &Header, mut blocks: Vec<u64>, first: u64) -> Result<Self> {
        let geometry = header.geometry;
        let per_block = geometry.refcount_block_entries();
        let mut plan = Plan {
            blocks: Vec::new(),
            table_clusters: 0,
        };
        // Each round adds what the one before needs; a block counts far more clusters than it
        // takes.
        loop {
            let last = (first + plan.clusters()) / per_block;
            for slot in first / per_block..=last {
                if let Err(at) = blocks.binary_search(&slot) {
                    blocks.insert(at, slot);
                }
            }
            let slots = blocks.last().map_or(1, |last| last + 1);
            let table_clusters = geometry.clusters(slots * spec::TABLE_ENTRY_LEN).get();
            if (blocks.len(), table_clusters) == (plan.blocks.len(), plan.table_clusters) {
                return Ok(plan);
            }
            let bytes = table_clusters * geometry.cluster_size();
            if bytes > spec::REFCOUNT_TABLE_LEN_MAX {
                return Err(Error::RefcountTableFull { bytes }.into());
            }
            plan = Plan {
                blocks: blocks.clone(),
                table_clusters,
            };
        }
    }

    /// New clusters, all in one row.
    fn clusters(&self) -> u64 {
        self.blocks.len() as u64 + self.table_clusters
    }
}

/// Does it say that a copied flag contradicts a refcount?
fn is_about_flags(event: &Event<'_>) -> bool {
    let flags =
        |finding: &Finding| matches!(finding, Finding::L1Copied { .. } | Finding::L2Copied { .. });
    matches!(event, Event::Finding { finding, .. } if flags(finding))
}

/// Keeps the first finding that is more than a leak.
fn remember(worst: &mut Option<String>, event: &Event<'_>) {
    if let Event::Finding { finding, .. } = event
        && finding.severity() != Severity::Leak
        && worst.is_none()
    {
        *worst = Some(finding.to_string());
    }
}

fn damaged(worst: Option<String>) -> coblock_block::Error {
    let why = worst.unwrap_or_else(|| "the check failed".to_owned());
    Error::DirtyAndDamaged { why }.into()
}
