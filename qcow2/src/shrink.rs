//! Making the guest's disk shorter.
//!
//! ```text
//!   unmap every cluster past the new end     L2 entries of the last table; L1 entries of the others
//!   write back, flush; lower their counts    rule 9.3: a power cut leaks them at worst
//!   drop refcount blocks that count nothing
//!   cut the file behind its last cluster
//!   the new size in the header               by the caller
//! ```
//! So the size changes last (hazard O19): after a power cut in between, the disk has its old length,
//! and past what was to be its end it reads as if it had never been written. The L1 table stays as
//! long as it is; its entries past the end are zero. The caller is alone on the node, but a flush
//! may go on beside it: what must be seen together by a write-back is changed without a suspend.

use coblock_block::types::in_memory;
use coblock_block::{GraphRead, Result};
use coblock_coroutine::Co;

use crate::alloc::{Discards, UNMAPPED_MAX};
use crate::entry::{L1Entry, L2Entry};
use crate::image::{Meta, Qcow2};
use crate::types::{GuestCluster, GuestOffset, HostCluster, HostOffset};
use crate::writeback::Counts;

impl Qcow2 {
    /// Frees everything from byte `len` of the disk up, whole clusters only.
    ///
    /// # Errors
    /// I/O or a damaged table; some of it is freed then.
    pub(crate) fn shrink(&self, co: &Co, graph: &GraphRead<'_>, len: u64) -> Result<()> {
        let first = GuestCluster(self.geometry.clusters(len).0);
        let per_table = self.geometry.l2_entries() as u64;
        let tables = first.0.div_ceil(per_table);
        if !first.0.is_multiple_of(per_table) {
            self.unmap_rest_of_table(co, graph, first)
                .map_err(|error| error.context("Failed to discard cropped clusters"))?;
        }
        for index in tables..self.l1.len() {
            if self.l1.get(index) != 0 {
                self.unmap_table(co, graph, index)
                    .map_err(|error| error.context("Failed to reduce the number of L2 tables"))?;
            }
        }
        // Twice: what a request was reading at the first time waits for the second.
        self.save(co, graph, Counts::Written)?;
        if self.has_freed() {
            self.save(co, graph, Counts::Written)?;
        }
        self.drop_unused_blocks(co, graph)
            .map_err(|error| error.context("Failed to discard unused refblocks"))?;
        self.punch_holes(co, graph)?;
        self.cut_file(co, graph)
    }

    /// Unmaps the clusters from `first` to the end of its L2 table.
    fn unmap_rest_of_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        first: GuestCluster,
    ) -> Result<()> {
        let per_table = self.geometry.l2_entries() as u64;
        let end = first.0.next_multiple_of(per_table);
        let mut next = first.0;
        let mut meta = self.meta.lock(co);
        if self
            .l2_table_of(self.geometry.guest_start(first))?
            .is_none()
        {
            return Ok(());
        }
        while next < end {
            let at = self.geometry.guest_start(GuestCluster(next));
            self.own_l2_table(co, graph, &mut meta, at)?;
            let Some(pin) = self.pin_l2(co, graph, at)? else {
                unreachable!("there is a table, and the metadata mutex is held");
            };
            let (_, index) = self.l2_place(at);
            for slot in index..pin.words().len() {
                let guest = self.geometry.guest_start(GuestCluster(next));
                let old = L2Entry::decode(pin.load(slot), guest, self.geometry)?;
                if old != L2Entry::Unallocated {
                    pin.store(slot, L2Entry::Unallocated.encode(self.geometry));
                    self.unmapped_range(old, Discards::Always);
                }
                next += 1;
            }
            drop(pin);
            self.free_some(co, graph, &mut meta)?;
        }
        Ok(())
    }

    /// Unmaps a whole L2 table with all that it maps.
    fn unmap_table(&self, co: &Co, graph: &GraphRead<'_>, index: u64) -> Result<()> {
        let mut meta = self.meta.lock(co);
        let Some(table) = L1Entry::decode(self.l1.get(index), index, self.geometry)?.host else {
            return Ok(());
        };
        self.assert_alone(co, graph, self.geometry.host_cluster(table))?;
        self.assert_entry_alone(co, graph, &self.l1, index)?;
        let per_table = self.geometry.l2_entries() as u64;
        let mut mapped = Vec::new();
        let mut next = index * per_table;
        while next < (index + 1) * per_table {
            let at = self.geometry.guest_start(GuestCluster(next));
            let Some(pin) = self.pin_l2(co, graph, at)? else {
                unreachable!("there is a table, and the metadata mutex is held");
            };
            for slot in 0..pin.words().len() {
                let guest = GuestOffset(at.0 + slot as u64 * self.geometry.cluster_size());
                match L2Entry::decode(pin.load(slot), guest, self.geometry)? {
                    L2Entry::Unallocated => {}
                    old => mapped.push(old),
                }
            }
            next += pin.words().len() as u64;
        }
        // No pass has copies of slices that go now, and from here to the end nothing suspends.
        let no_pass = self.writing_back.lock(co);
        self.l1.set(index, 0);
        self.l2.drop_range(table, self.geometry.cluster_size());
        for old in mapped {
            self.unmapped_range(old, Discards::Always);
        }
        self.unmapped(self.geometry.host_cluster(table));
        drop(no_pass);
        self.free_some(co, graph, &mut meta)
    }

    /// Keeps the list of what waits for a flush short.
    fn free_some(&self, co: &Co, graph: &GraphRead<'_>, meta: &mut Meta) -> Result<()> {
        if self.frees.lock().unmapped.len() >= UNMAPPED_MAX {
            self.write_back(co, graph, true, Counts::MayLag)?;
            self.lower_durable(co, graph, meta)?;
        }
        Ok(())
    }

    /// Takes refcount blocks that count no cluster, but perhaps their own, out of the table.
    fn drop_unused_blocks(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        let mut meta = self.meta.lock(co);
        let mut dropped = false;
        for index in (0..self.refcount_table.len()).rev() {
            let entry = self.refcount_table.get(index);
            if entry == 0 {
                continue;
            }
            let own = self.geometry.host_cluster(HostOffset(entry));
            let range = index * per_block..(index + 1) * per_block;
            let counts_itself = range.contains(&own.0);
            let used = |cluster: u64, count: u64| count > u64::from(cluster == own.0);
            if self.last_counted(co, graph, range, used)?.is_some() {
                continue;
            }
            self.assert_alone(co, graph, own)?;
            self.assert_entry_alone(co, graph, &self.refcount_table, index)?;
            let no_pass = self.writing_back.lock(co);
            self.refcount_table.set(index, 0);
            self.refcounts
                .drop_range(HostOffset(entry), self.geometry.cluster_size());
            if !counts_itself {
                self.unmapped(own);
            }
            drop(no_pass);
            dropped = true;
        }
        if dropped {
            self.write_back(co, graph, true, Counts::Written)?;
            self.lower_durable(co, graph, &mut meta)?;
        }
        Ok(())
    }

    /// Cuts off what lies behind the last cluster that is counted. What cannot be cut stays.
    fn cut_file(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        let _meta = self.meta.lock(co);
        for index in (0..self.refcount_table.len()).rev() {
            if self.refcount_table.get(index) == 0 {
                continue;
            }
            let range = index * per_block..(index + 1) * per_block;
            let Some(last) = self.last_counted(co, graph, range, |_, count| count > 0)? else {
                continue;
            };
            let end = self.geometry.host_start(HostCluster(last + 1)).0;
            if end < self.file.len(graph)
                && let Err(error) = self.file.truncate(co, graph, end, false)
            {
                log::warn!("Failed to truncate the tail of the image: {error}");
            }
            break;
        }
        Ok(())
    }

    /// The last cluster of `range`, which one block counts, whose count is `used`.
    fn last_counted(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        range: std::ops::Range<u64>,
        used: impl Fn(u64, u64) -> bool,
    ) -> Result<Option<u64>> {
        let per_slice = self.counts_per_slice() as u64;
        let mut end = range.end;
        while end > range.start {
            let start = end - per_slice;
            let Some((pin, 0)) = self.pin_refcounts(co, graph, HostCluster(start))? else {
                unreachable!("the table names a block, and slices begin at their first count");
            };
            let found = (start..end)
                .rev()
                .find(|&cluster| used(cluster, self.count_at(&pin, in_memory(cluster - start))));
            if found.is_some() {
                return Ok(found);
            }
            end = start;
        }
        Ok(None)
    }
}
