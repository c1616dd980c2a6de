//! L1 and L2 tables: what the disk and each snapshot refer to.

use std::ops::Range;

use coblock_block::Result;

use super::{Event, Finding, State};
use crate::entry;
use crate::error::Error;
use crate::fields::be64;
use crate::header::Header;
use crate::snapshot::SnapshotTable;
use crate::spec;
use crate::types::{HostOffset, index};

/// How much of L1 tables is read at once.
const L1_READ: u64 = 1 << 20;
/// How much of adjacent L2 tables is read at once; at least one.
const L2_READ: u64 = 1 << 20;
/// References to L2 tables that are collected before equal ones are merged.
const MERGE_AT: usize = 1 << 16;

/// Bytes that the budget grows by for each table entry that refers to something: it fills eight
/// bytes of the file, which no hole does, and may need as many for a count, or twice as many in the
/// list of L2 tables.
const ENTRY_ALLOWS: u64 = 16;

/// L1 entries that refer to an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct TableRef {
    offset: u64,
    /// Of the disk as it is now.
    active: u32,
    /// Of the disk and of all snapshots.
    total: u32,
}

/// Where an L1 table begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    at: u64,
    /// Change of the number of active L1 tables, and of all.
    active: i64,
    total: i64,
}

impl State<'_> {
    /// Counts what the L1 tables of the disk and of all snapshots refer to.
    pub(super) fn tables(&mut self, header: &Header, snapshots: &SnapshotTable) -> Result<()> {
        let geometry = self.geometry;
        let mut edges = Vec::new();
        let mut in_clusters = Vec::new();
        let mut add = |offset: HostOffset, entries: u32, active: i64| {
            let len = u64::from(entries) * spec::TABLE_ENTRY_LEN;
            // Checked by the header and by `check_l1`: the end is at most 2^63.
            if len > 0 {
                edges.push(Edge {
                    at: offset.get(),
                    active,
                    total: 1,
                });
                edges.push(Edge {
                    at: offset.get() + len,
                    active: -active,
                    total: -1,
                });
            }
            len
        };
        self.refer(HostOffset(0), geometry.cluster_size(), 1)?;
        let len = add(header.l1_offset, header.l1_entries, 1);
        self.file.check_range(header.l1_offset.get(), len)?;
        in_clusters.extend(self.clusters_in_file(header.l1_offset, len, 1));
        for (number, snapshot) in (0_u32..).zip(&snapshots.snapshots) {
            if !snapshot.is_complete(geometry.version()) {
                self.found(&Finding::SnapshotIncomplete { index: number }, 1);
            }
            if let Err(error) = snapshot.check_l1(number, geometry) {
                // A table at a place that no file has cannot be told from a broken disk.
                if geometry.is_aligned(snapshot.l1_offset.get())
                    && matches!(error, Error::TableOffset { .. })
                {
                    return Err(error.into());
                }
                let (id, name) = snapshot.id_and_name();
                let snapshot = format!("{id} ({name})");
                self.found(&Finding::SnapshotL1 { snapshot, error }, 1);
                continue;
            }
            let len = add(snapshot.l1_offset, snapshot.l1_entries, 0);
            self.file.check_range(snapshot.l1_offset.get(), len)?;
            in_clusters.extend(self.clusters_in_file(snapshot.l1_offset, len, 1));
        }
        self.refer_together(in_clusters)?;
        let tables = self.l1_tables(edges, header.l1_offset)?;
        self.l2_tables(&tables)
    }

    /// Counts a reference to each cluster of each range. Ranges that lie over each other, as an image
    /// with many snapshots can make them, take no longer than one.
    fn refer_together(&mut self, ranges: Vec<Range<u64>>) -> Result<()> {
        let ends = |range: Range<u64>| [(range.start, 1_i64), (range.end, -1)];
        let mut edges: Vec<(u64, i64)> = ranges.into_iter().flat_map(ends).collect();
        edges.sort_unstable();
        let (mut from, mut open) = (0, 0_i64);
        for (at, change) in edges {
            if at > from && open > 0 {
                self.refer_clusters(from..at, open.unsigned_abs())?;
            }
            from = at;
            open += change;
        }
        Ok(())
    }

    /// Reads each byte of L1 tables once (that of the disk begins at `disk`); gives the L2 tables
    /// in the order of the file.
    fn l1_tables(&mut self, mut edges: Vec<Edge>, disk: HostOffset) -> Result<Vec<TableRef>> {
        edges.sort_unstable();
        let mut tables = Vec::new();
        let mut merge_at = MERGE_AT;
        let (mut active, mut total) = (0_i64, 0_i64);
        let mut buf = Vec::new();
        for (place, edge) in edges.iter().enumerate() {
            active += edge.active;
            total += edge.total;
            let end = edges
                .get(place + 1)
                .map_or(edge.at, |next| next.at)
                .min(self.file_len);
            if total == 0 || end <= edge.at {
                continue;
            }
            let counted = |count: i64| u32::try_from(count).expect("at most 65537 L1 tables");
            let (active, total) = (counted(active), counted(total));
            let mut at = edge.at;
            while at < end {
                let len = L1_READ.min(end - at);
                // The last entry of a file cut short ends with zeros.
                buf.resize(index(len.next_multiple_of(8)), 0);
                self.file.read(at, &mut buf)?;
                for (place, entry) in (at..).step_by(8).zip(buf.chunks_exact(8)) {
                    let entry = be64(entry, 0);
                    if entry != 0 {
                        let slot = (active > 0).then(|| (place - disk.get()) / 8);
                        self.l1_entry(entry, slot, total, &mut tables)?;
                    }
                }
                if tables.len() > merge_at {
                    merge(&mut tables);
                    merge_at = MERGE_AT.max(tables.len() * 2);
                }
                at += len;
            }
        }
        merge(&mut tables);
        Ok(tables)
    }

    /// `slot`: where the entry is in the L1 table of the disk, if it is there too.
    fn l1_entry(
        &mut self,
        entry: u64,
        slot: Option<u64>,
        total: u32,
        tables: &mut Vec<TableRef>,
    ) -> Result<()> {
        let times = u64::from(total);
        if entry & spec::L1_RESERVED != 0 {
            self.found(&Finding::L1Reserved { entry }, times);
        }
        let offset = HostOffset(entry & spec::ENTRY_OFFSET_MASK);
        self.refer(offset, self.geometry.cluster_size(), times)?;
        if !self.geometry.is_aligned(offset.get()) {
            self.found(&Finding::L2Unaligned { offset }, times);
        }
        if let Some(index) = slot.filter(|_| offset.get() != 0) {
            let cluster = self.geometry.host_cluster(offset);
            if let Ok(refcount) = self.disk.get(cluster)
                && (refcount == 1) != (entry & spec::ENTRY_COPIED != 0)
            {
                self.found(
                    &Finding::L1Copied {
                        index,
                        entry,
                        refcount,
                    },
                    1,
                );
            }
        }
        self.budget.grow(ENTRY_ALLOWS);
        if offset.get() < self.file_len {
            if tables.len() == tables.capacity() {
                let more = tables.capacity().max(MERGE_AT);
                let bytes = more * size_of::<TableRef>();
                self.budget
                    .take("bytes of memory for the list of L2 tables", bytes as u64)?;
                tables.reserve_exact(more);
            }
            tables.push(TableRef {
                offset: offset.get(),
                active: slot.is_some().into(),
                total,
            });
        }
        Ok(())
    }

    /// Reads each L2 table once.
    fn l2_tables(&mut self, tables: &[TableRef]) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let (mut done, total) = (0, tables.len() as u64 * cluster_size);
        let mut buf = Vec::new();
        let mut rest = tables;
        while let Some(first) = rest.first() {
            let most = index((L2_READ / cluster_size).max(1));
            let adjacent = rest
                .iter()
                .zip(0_u64..)
                .take(most)
                .take_while(|(table, number)| table.offset == first.offset + number * cluster_size)
                .count();
            let (run, later) = rest.split_at(adjacent);
            buf.resize(adjacent * self.geometry.cluster_len(), 0);
            match self.file.read(first.offset, &mut buf) {
                Ok(()) => {
                    for (table, data) in run
                        .iter()
                        .zip(buf.chunks_exact(self.geometry.cluster_len()))
                    {
                        self.l2_table(*table, data)?;
                    }
                }
                Err(error) => {
                    let (offset, error) = (HostOffset(first.offset), error.to_string());
                    let times = run.iter().map(|table| u64::from(table.total)).sum();
                    self.found(&Finding::L2Unreadable { offset, error }, times);
                }
            }
            done += run.len() as u64 * cluster_size;
            (self.event)(Event::Progress { done, total });
            rest = later;
        }
        Ok(())
    }

    fn l2_table(&mut self, table: TableRef, data: &[u8]) -> Result<()> {
        // Flags are told of tables that have a refcount, which the header (an entry without offset
        // names it) has not.
        let cluster = self.geometry.host_cluster(HostOffset(table.offset));
        let flags = table.active > 0 && table.offset != 0 && self.disk.get(cluster).is_ok();
        let mut next = None;
        for entry in data.chunks_exact(8).map(|entry| be64(entry, 0)) {
            if entry == 0 {
                continue;
            }
            self.budget.grow(ENTRY_ALLOWS);
            if entry & spec::L2_COMPRESSED != 0 {
                self.compressed_entry(table, entry)?;
            } else {
                self.standard_entry(table, entry, flags, &mut next)?;
            }
        }
        Ok(())
    }

    fn compressed_entry(&mut self, table: TableRef, entry: u64) -> Result<()> {
        let times = u64::from(table.total);
        let (offset, len) = entry::split_compressed(entry, self.geometry);
        let offset = HostOffset(offset);
        if entry & spec::ENTRY_COPIED != 0 {
            self.found(&Finding::CompressedCopied { offset }, times);
        }
        self.refer(offset, len, times)?;
        let active = u64::from(table.active);
        self.report.allocated_clusters += active;
        self.report.compressed_clusters += active;
        // A compressed cluster is a fragment by its nature.
        self.report.fragmented_clusters += active;
        Ok(())
    }

    /// `flags`: its copied flag is to be checked; `next`: where the table's next data cluster would
    /// not count as a fragment.
    fn standard_entry(
        &mut self,
        table: TableRef,
        entry: u64,
        flags: bool,
        next: &mut Option<u64>,
    ) -> Result<()> {
        let times = u64::from(table.total);
        let active = u64::from(table.active);
        if entry & spec::L2_RESERVED != 0 {
            self.found(&Finding::L2Reserved { entry }, times);
        }
        let offset = HostOffset(entry & spec::ENTRY_OFFSET_MASK);
        if offset.get() == 0 {
            return Ok(());
        }
        if !self.geometry.is_aligned(offset.get()) {
            let zero = entry & spec::L2_ZERO != 0;
            self.found(&Finding::DataUnaligned { offset, zero }, times);
        }
        self.report.allocated_clusters += active;
        if next.is_some_and(|next| next != offset.get()) {
            self.report.fragmented_clusters += active;
        }
        *next = Some(offset.get() + self.geometry.cluster_size());
        self.refer(offset, self.geometry.cluster_size(), times)?;
        if flags
            && let Ok(refcount) = self.disk.get(self.geometry.host_cluster(offset))
            && (refcount == 1) != (entry & spec::ENTRY_COPIED != 0)
        {
            self.found(&Finding::L2Copied { entry, refcount }, active);
        }
        Ok(())
    }
}

/// Sorts, and adds up the references to each table.
fn merge(tables: &mut Vec<TableRef>) {
    tables.sort_unstable();
    tables.dedup_by(|later, kept| {
        let same = later.offset == kept.offset;
        if same {
            kept.active = kept.active.saturating_add(later.active);
            kept.total = kept.total.saturating_add(later.total);
        }
        same
    });
}
