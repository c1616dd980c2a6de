//! Changing the size of the guest's disk; how it becomes shorter is in `shrink.rs`.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use coblock_aio::IoVec;
use coblock_block::types::in_memory;
use coblock_block::{
    Error as BlockError, ErrorKind, GraphRead, Preallocation, RequestFlags, Result,
};
use coblock_coroutine::{Co, mutant};

use crate::alloc::Run;
use crate::cow::{Plan, Wait};
use crate::error::Error;
use crate::image::{Meta, Qcow2, buffer, header_field};
use crate::mapping::{Extent, Mapped};
use crate::spec;
use crate::types::{GuestOffset, HostCluster, Version};
use crate::writeback::Counts;
use crate::zero::Empty;

/// Bytes of zeros that are written at once.
const ZEROS_AT_ONCE: u64 = 1 << 20;

impl Qcow2 {
    /// Makes the disk `len` bytes long; what is added reads as zeros. It is allocated where
    /// something else would show, and everywhere with a preallocation.
    ///
    /// # Errors
    /// A length that is not whole sectors, the limits of the format, a version 2 image with
    /// snapshots, or I/O; the size is as before then. Of a disk that was to become shorter, what
    /// lies past the new end may be lost all the same.
    pub(crate) fn resize(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        self.check_intact()?;
        if !len.is_multiple_of(512) {
            let why = "The new size must be a multiple of 512";
            return Err(BlockError::new(ErrorKind::Invalid, why));
        }
        if self.geometry.version() == Version::V2 && self.header.snapshots > 0 {
            // Their entries do not say how long the disk was.
            let why = "Can't resize a v2 image which has snapshots";
            return Err(BlockError::new(ErrorKind::NotSupported, why));
        }
        let geometry = self.geometry.with_virtual_size(len)?;
        let old = self.size.load(Acquire);
        if len < old {
            if preallocation != Preallocation::Off {
                let why = "Preallocation can't be used for shrinking an image";
                return Err(BlockError::new(ErrorKind::Invalid, why));
            }
            self.shrink(co, graph, len)?;
        } else {
            if geometry.l1_entries() > self.l1.len() {
                let mut meta = self.meta.lock(co);
                self.grow_l1(co, graph, &mut meta, geometry.l1_entries())?;
            }
            let mut hidden = true;
            if preallocation == Preallocation::Off {
                hidden = self.hide_what_was(co, graph, old, len)?;
            } else if let Err(error) = self.preallocate(co, graph, (old, len), preallocation) {
                // What was mapped is past the end of the disk.
                if let Err(also) = self.shrink(co, graph, old) {
                    log::warn!("clusters past the end of the disk stay: {also}");
                }
                return Err(error.context("Could not allocate clusters"));
            }
            if hidden && !mutant!("a longer disk comes before what hides its backing file") {
                // The new length must not come first: a power cut would show what is hidden.
                self.save(co, graph, Counts::MayLag)?;
            }
        }
        self.switch_header(co, graph, spec::HEADER_AT_SIZE, &len.to_be_bytes())?;
        self.size.store(len, Release);
        Ok(())
    }

    /// Makes sure that the disk has zeros from `old` to `new`, whatever a backing file or the rest
    /// of its last cluster holds there; tells if anything had to be done. Nobody else writes
    /// meanwhile: a resize is alone.
    fn hide_what_was(&self, co: &Co, graph: &GraphRead<'_>, old: u64, new: u64) -> Result<bool> {
        let size = self.geometry.cluster_size();
        let whole = old.next_multiple_of(size);
        let behind = self.backing.get().map_or(0, |backing| backing.len(graph));
        let rest = old < whole.min(new) && self.shows(co, graph, GuestOffset(old), behind)?;
        if rest {
            self.write_zero_bytes(co, graph, old, whole.min(new))?;
        }
        let end = new.min(behind);
        if whole < end {
            let len = (end - whole).next_multiple_of(size);
            self.empty_clusters(co, graph, GuestOffset(whole), len, Empty::Zero)
                .map_err(|error| error.context("Failed to zero out new clusters"))?;
        }
        Ok(rest || whole < end)
    }

    /// Might anything but zeros be read at `at`, over a backing file of `behind` bytes?
    fn shows(&self, co: &Co, graph: &GraphRead<'_>, at: GuestOffset, behind: u64) -> Result<bool> {
        loop {
            if let Some(Extent { what, .. }) = self.lookup(at, 1)? {
                return Ok(match what {
                    Mapped::Data { .. } | Mapped::Compressed { .. } => true,
                    Mapped::Zero => false,
                    Mapped::Unallocated => behind > at.0,
                });
            }
            self.load_l2(co, graph, at)?;
        }
    }

    /// Writes zeros to a part of one cluster.
    fn write_zero_bytes(&self, co: &Co, graph: &GraphRead<'_>, from: u64, to: u64) -> Result<()> {
        let zeros = buffer(in_memory(to - from))?;
        let mut at = from;
        while at < to {
            let rest = IoVec::from(&zeros[in_memory(at - from)..]);
            at += self.write_extent(co, graph, GuestOffset(at), rest)? as u64;
        }
        Ok(())
    }

    /// Gives every cluster from `old` to `new` a place that reads as zeros.
    fn preallocate(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        (old, new): (u64, u64),
        how: Preallocation,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let whole = old.next_multiple_of(size);
        if old < whole.min(new) {
            self.write_zero_bytes(co, graph, old, whole.min(new))?;
        }
        let end = new.next_multiple_of(size);
        let mut at = whole;
        let mut file_end = 0;
        while at < end {
            let plan = self.plan(co, graph, GuestOffset(at), end - at, Wait::Allowed)?;
            let Plan::Allocate(pending, run, cow) = plan else {
                // Somebody left a cluster past the end of the disk: what it holds must not show.
                self.empty_clusters(co, graph, GuestOffset(at), size, Empty::ZeroAndUnmap)?;
                continue;
            };
            let zeroed = self.zero_run(co, graph, run, how);
            self.settle(co, graph, &pending, run, zeroed.map(|()| true))?;
            at += cow.len;
            file_end = file_end.max(run.start.0 + run.clusters * size);
        }
        if self.file.len(graph) < file_end {
            self.file.truncate(co, graph, file_end, false)?;
        }
        Ok(())
    }

    /// Makes new clusters read as zeros, with the storage that `how` wants.
    fn zero_run(&self, co: &Co, graph: &GraphRead<'_>, run: Run, how: Preallocation) -> Result<()> {
        let (start, len) = (run.start.0, run.clusters * self.geometry.cluster_size());
        let none = RequestFlags::empty();
        match how {
            Preallocation::Off | Preallocation::Metadata if run.fresh => Ok(()),
            Preallocation::Off | Preallocation::Metadata => {
                let unmap = RequestFlags::MAY_UNMAP;
                self.file.pwrite_zeroes(co, graph, start, len, unmap)
            }
            Preallocation::Falloc => self.file.pwrite_zeroes(co, graph, start, len, none),
            Preallocation::Full => {
                let zeros = buffer(in_memory(len.min(ZEROS_AT_ONCE)))?;
                let mut at = 0;
                while at < len {
                    let part = in_memory((len - at).min(ZEROS_AT_ONCE));
                    let source = IoVec::from(&zeros[..part]);
                    self.file.pwrite(co, graph, start + at, source, none)?;
                    at += part as u64;
                }
                Ok(())
            }
        }
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
        if let Err(error) = self.write_longer_l1(co, graph, run, entries) {
            self.give_up(co, graph, meta, run);
            return Err(error);
        }
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
        self.free_old_table(old, old_clusters);
        Ok(())
    }

    /// Writes a copy of the L1 table with `entries` to `run`, durably.
    fn write_longer_l1(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        run: Run,
        entries: u64,
    ) -> Result<()> {
        // Every table that the copy will name is complete in the file, and the counts of the new
        // place are durable.
        self.write_back(co, graph, true, Counts::Written)?;
        let table = self.l1.to_bytes(entries);
        self.at(coblock_block::Event::L1GrowWriteTable);
        let none = RequestFlags::empty();
        self.file
            .pwrite(co, graph, run.start.0, IoVec::from(&table[..]), none)?;
        self.file.flush(co, graph)
    }
}
