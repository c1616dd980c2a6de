//! Changing the size of the guest's disk.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use coblock_aio::IoVec;
use coblock_block::types::in_memory;
use coblock_block::{Error as BlockError, ErrorKind, GraphRead, RequestFlags, Result};
use coblock_coroutine::Co;

use crate::error::Error;
use crate::image::{Meta, Qcow2, buffer, header_field};
use crate::spec;
use crate::types::{GuestOffset, HostCluster};
use crate::writeback::Counts;
use crate::zero::Empty;

impl Qcow2 {
    /// Makes the disk `len` bytes long; what is added reads as zeros, and is allocated only where a
    /// backing file would show.
    ///
    /// # Errors
    /// A shorter disk, one that is not whole sectors, the limits of the format, or I/O; the size is
    /// as before then.
    pub(crate) fn resize(&self, co: &Co, graph: &GraphRead<'_>, len: u64) -> Result<()> {
        self.check_intact()?;
        if !len.is_multiple_of(512) {
            let why = "The new size must be a multiple of 512";
            return Err(BlockError::new(ErrorKind::Invalid, why));
        }
        let geometry = self.geometry.with_virtual_size(len)?;
        let old = self.size.load(Acquire);
        if len < old {
            return Err(Error::Unsupported {
                feature: "shrinking images",
            }
            .into());
        }
        if geometry.l1_entries() > self.l1.len() {
            let mut meta = self.meta.lock(co);
            self.grow_l1(co, graph, &mut meta, geometry.l1_entries())?;
        }
        self.hide_backing(co, graph, old, len)?;
        self.switch_header(co, graph, spec::HEADER_AT_SIZE, &len.to_be_bytes())?;
        self.size.store(len, Release);
        Ok(())
    }

    /// Where the backing file is longer than the disk was, the disk has zeros from `old` to `new`.
    /// Nobody else writes meanwhile: a resize is alone.
    fn hide_backing(&self, co: &Co, graph: &GraphRead<'_>, old: u64, new: u64) -> Result<()> {
        let behind = self.backing.get().map_or(0, |backing| backing.len(graph));
        let end = new.min(behind);
        if end <= old {
            return Ok(());
        }
        let size = self.geometry.cluster_size();
        let whole = old.next_multiple_of(size);
        if whole < end {
            let len = (end - whole).next_multiple_of(size);
            self.empty_clusters(co, graph, GuestOffset(whole), len, Empty::Zero)
                .map_err(|error| error.context("Failed to zero out new clusters"))?;
        }
        let end = whole.min(end);
        if old == end {
            return Ok(());
        }
        let mut at = old;
        let zeros = buffer(in_memory(end - old))?;
        while at < end {
            let rest = IoVec::from(&zeros[in_memory(at - old)..]);
            at += self.write_extent(co, graph, GuestOffset(at), rest)? as u64;
        }
        Ok(())
    }

    /// Moves the L1 table to a greater one with at least `entries`. (Hazard O8.)
    fn grow_l1(&self, co: &Co, graph: &GraphRead<'_>, meta: &mut Meta, entries: u64) -> Result<()> {
        let geometry = self.geometry;
        let old_len = self.l1.len();
        let entries = entries.max(old_len + old_len / 2);
        let bytes = entries * spec::TABLE_ENTRY_LEN;
        if bytes > spec::L1_LEN_MAX {
            return Err(Error::L1TooLarge { bytes }.into());
        }
        self.at(coblock_block::Event::L1GrowAllocTable);
        let run = self.allocate(co, graph, meta, geometry.clusters(bytes).0, true)?;
        // Every table that the copy will name is complete in the file, and the counts of the new
        // place are durable.
        self.write_back(co, graph, true, Counts::Written)?;
        let table = self.l1.to_bytes(entries);
        self.at(coblock_block::Event::L1GrowWriteTable);
        let none = RequestFlags::empty();
        self.file
            .pwrite(co, graph, run.start.0, IoVec::from(&table[..]), none)?;
        self.file.flush(co, graph)?;
        let mut field = [0; 12];
        field[..4].copy_from_slice(&header_field(entries).to_be_bytes());
        field[4..].copy_from_slice(&run.start.0.to_be_bytes());
        self.at(coblock_block::Event::L1GrowActivateTable);
        self.switch_header(co, graph, spec::HEADER_AT_L1_SIZE, &field)?;
        let old = self.l1.offset();
        self.l1.moved(run.start, entries, &[]);
        let first = geometry.host_cluster(run.start).0;
        for nth in 0..run.clusters {
            self.tables.insert(HostCluster(first + nth));
        }
        self.counters.tables_grown.fetch_add(1, Relaxed);
        let old_clusters = geometry.clusters(old_len * spec::TABLE_ENTRY_LEN).0;
        self.free_old_table(co, graph, meta, old, old_clusters)
    }
}
