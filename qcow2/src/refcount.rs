//! Refcounts of host clusters: read, changed by one, and the blocks and the table that hold them.
//!
//! ```text
//!   refcount table, in memory          refcount blocks, in slices
//!   [ block 0 | block 1 | ... ]   ->   [ count | count | ... ]
//! ```
//!
//! Everything here runs under the metadata mutex (`meta: &mut Meta` is its proof). Counts change in
//! memory; the order in which they reach the file is that of `writeback.rs`. Nothing here calls
//! itself: a new block describes itself, and a new table lies with its blocks in an area that
//! describes itself, so an image cannot make the allocator recurse.

use std::sync::atomic::Ordering::Relaxed;

use coblock_aio::IoVec;
use coblock_block::types::in_memory;
use coblock_block::{GraphRead, RequestFlags, Result};
use coblock_coroutine::{Co, mutant};

use crate::cache::Pin;
use crate::error::Error;
use crate::image::{Meta, Qcow2, buffer, header_field};
use crate::spec;
use crate::types::{HostCluster, HostOffset};
use crate::width::RefcountWidth;
use crate::writeback::Counts;

impl Qcow2 {
    /// Where the slice with the count of `cluster` is: number of the slice, index of the count in
    /// it.
    fn refcount_place(&self, cluster: HostCluster) -> (u64, usize) {
        let counts = self.refcounts.slice_bytes() * 8 / u64::from(self.geometry.refcount_bits());
        (cluster.0 / counts, in_memory(cluster.0 % counts))
    }

    /// Counts in a slice of a refcount block.
    pub(crate) fn counts_per_slice(&self) -> usize {
        in_memory(self.refcounts.slice_bytes() * 8) / self.geometry.refcount_bits() as usize
    }

    /// The slice with the count of `cluster`, and the index of the count in it. Nothing where no
    /// block covers `cluster`.
    pub(crate) fn pin_refcounts(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        cluster: HostCluster,
    ) -> Result<Option<(Pin<'_>, usize)>> {
        let (slice, index) = self.refcount_place(cluster);
        let in_block = slice % (self.geometry.cluster_size() / self.refcounts.slice_bytes());
        let place = || {
            let entry = self
                .refcount_table
                .get(self.geometry.refcount_table_index(cluster));
            if entry == 0 {
                return Ok(None);
            }
            if entry & spec::REFCOUNT_TABLE_RESERVED != 0 || !self.geometry.is_aligned(entry) {
                return Err(Error::RefcountTableEntry { entry, cluster }.into());
            }
            Ok(Some(HostOffset(
                entry + in_block * self.refcounts.slice_bytes(),
            )))
        };
        let pin = self.pin_slice(co, graph, &self.refcounts, slice, place)?;
        Ok(pin.map(|pin| (pin, index)))
    }

    /// Count `index` of a pinned slice.
    pub(crate) fn count_at(&self, pin: &Pin<'_>, index: usize) -> u64 {
        let width = self.refcount_width();
        width.get_in_word(pin.load(width.word_index(index)), index)
    }

    pub(crate) fn refcount_width(&self) -> RefcountWidth {
        RefcountWidth::new(self.geometry.refcount_order())
    }

    /// Raises or lowers the count of `cluster` by one and returns the new count.
    ///
    /// At zero the cluster may be handed out again at once: whoever lowers a count makes sure that
    /// nothing in the file leads there.
    ///
    /// # Errors
    /// I/O, or a damaged image: no block covers the cluster, the count is zero already or at its
    /// maximum. Nothing has changed.
    pub(crate) fn change_refcount(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        cluster: HostCluster,
        up: bool,
    ) -> Result<u64> {
        let Some((pin, index)) = self.pin_refcounts(co, graph, cluster)? else {
            return Err(Error::RefcountUnderflow { cluster }.into());
        };
        if !self.contested.none() {
            let index = self.geometry.refcount_table_index(cluster);
            let block = HostOffset(self.refcount_table.get(index));
            self.assert_alone(co, graph, self.geometry.host_cluster(block))?;
        }
        let width = self.refcount_width();
        let word = width.word_index(index);
        let value = pin.load(word);
        let old = width.get_in_word(value, index);
        let new = match (up, old) {
            (true, old) if old < width.max() => old + 1,
            (true, _) => {
                return Err(Error::RefcountOverflow {
                    cluster,
                    max: width.max(),
                }
                .into());
            }
            (false, 0) => return Err(Error::RefcountUnderflow { cluster }.into()),
            (false, 1) if let Some(table) = self.table_at(cluster) => {
                // Something else led to the table as well, and was taken for its last reference.
                drop(pin);
                let host = self.geometry.host_start(cluster);
                return Err(self.signal_corruption(co, graph, Error::TableInUse { table, host }));
            }
            (false, _) if mutant!("a count above one goes to zero") => 0,
            (false, old) => old - 1,
        };
        if mutant!("a count is written without its neighbours") {
            pin.store(word, width.set_in_word(0, index, new));
        } else {
            pin.store(word, width.set_in_word(value, index, new));
        }
        drop(pin);
        if new == 0 {
            meta.cursor = meta.cursor.min(cluster.0);
            if self.tables.may_contain(cluster) {
                // Rule 9.4: nothing of a freed table may be written over the next owner.
                let (start, len) = (
                    self.geometry.host_start(cluster),
                    self.geometry.cluster_size(),
                );
                self.l2.drop_range(start, len);
                self.refcounts.drop_range(start, len);
            }
        }
        Ok(new)
    }

    /// Makes `count` refcount blocks for the ranges from that of `at` on, in the clusters from `at`
    /// on. None of these ranges has a block, and no table that we know of lies in these clusters.
    ///
    /// # Errors
    /// I/O, or the table would grow past its limit. Nothing has changed but perhaps unused clusters
    /// of the file.
    pub(crate) fn add_refcount_blocks(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        at: HostCluster,
        count: u64,
    ) -> Result<()> {
        let first = self.geometry.refcount_table_index(at);
        assert!((first..first + count).all(|block| self.refcount_table.get(block) == 0));
        assert!(
            first + count <= self.refcount_table.len(),
            "the table was grown before"
        );
        for index in [first, first + count - 1] {
            self.assert_entry_alone(co, graph, &self.refcount_table, index)?;
        }
        self.at(coblock_block::Event::RefblockAlloc);
        // Whether or not the write succeeds, something may be in these clusters afterwards.
        meta.clusters_written(self.geometry.host_start(HostCluster(at.0 + count)));
        let used = if mutant!("a new refcount block does not count itself") {
            0
        } else {
            count
        };
        self.at(coblock_block::Event::RefblockAllocWrite);
        self.write_self_describing_blocks(co, graph, at, count, used)?;
        // The blocks are complete in the file before anything points to them: from here on nothing
        // can fail.
        for nth in 0..count {
            let block = HostCluster(at.0 + nth);
            self.refcount_table
                .set(first + nth, self.geometry.host_start(block).0);
            self.tables.insert(block);
        }
        self.counters
            .refcount_blocks_added
            .fetch_add(count, Relaxed);
        Ok(())
    }

    /// Writes `blocks` new blocks at `at` that count `used` clusters from `at` on as used once.
    fn write_self_describing_blocks(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: HostCluster,
        blocks: u64,
        used: u64,
    ) -> Result<()> {
        assert!(at.0 > 0, "cluster 0 is the header's");
        let width = self.refcount_width();
        let per_block = self.geometry.refcount_block_entries();
        let first = self.geometry.refcount_table_index(at);
        let mut block = buffer(self.geometry.cluster_len())?;
        for nth in 0..blocks {
            block.fill(0);
            let range = (first + nth) * per_block..(first + nth + 1) * per_block;
            for cluster in range.start.max(at.0)..range.end.min(at.0 + used) {
                width.set(&mut block, in_memory(cluster - range.start), 1);
            }
            let host = self.geometry.host_start(HostCluster(at.0 + nth));
            self.file.pwrite(
                co,
                graph,
                host.0,
                IoVec::from(&block[..]),
                RequestFlags::empty(),
            )?;
        }
        Ok(())
    }

    /// Moves the refcount table to a greater one that has at least `entries`.
    ///
    /// The new table, and the blocks that count it, lie in an area past everything that the old
    /// table covers: no count of the old table changes before the header points to the new one.
    /// (Hazard O7.)
    ///
    /// # Errors
    /// I/O, or the limit of the format. Before the header is written, nothing has changed; when its
    /// write fails, nobody can know which table the file has, and the image takes no more changes.
    pub(crate) fn grow_refcount_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        entries: u64,
    ) -> Result<()> {
        let geometry = &self.geometry;
        let per_block = geometry.refcount_block_entries();
        let old_len = self.refcount_table.len();
        let start = HostCluster(old_len * per_block);
        // A greater table may need one more block, and one more block a greater table.
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let needed = entries.max(old_len + old_len / 2).max(old_len + blocks);
            let clusters = geometry.clusters(needed * spec::TABLE_ENTRY_LEN).0;
            let covering = (clusters + blocks).div_ceil(per_block);
            if (clusters, covering) == (table_clusters, blocks) {
                break;
            }
            (table_clusters, blocks) = (clusters, covering);
        }
        let table_bytes = table_clusters * geometry.cluster_size();
        if table_bytes > spec::REFCOUNT_TABLE_LEN_MAX {
            return Err(Error::RefcountTableFull { bytes: table_bytes }.into());
        }
        let used = blocks + table_clusters;
        let table_at = geometry.host_start(HostCluster(start.0 + blocks));
        let new_len = table_bytes / spec::TABLE_ENTRY_LEN;

        // Nothing counts this area: in a damaged image tables may lie there all the same.
        self.assert_no_tables(co, graph, start, used)?;
        self.at(coblock_block::Event::ReftableGrow);
        // Every block that the copy will name is complete in the file.
        self.write_back(co, graph, true, Counts::Written)?;
        meta.clusters_written(geometry.host_start(HostCluster(start.0 + used)));
        self.at(coblock_block::Event::RefblockAllocWriteBlocks);
        self.write_self_describing_blocks(co, graph, start, blocks, used)?;
        let added: Vec<(u64, u64)> = (0..blocks)
            .map(|nth| {
                (
                    old_len + nth,
                    geometry.host_start(HostCluster(start.0 + nth)).0,
                )
            })
            .collect();
        let mut bytes = self.refcount_table.to_bytes(new_len);
        for &(index, entry) in &added {
            let at = in_memory(index * spec::TABLE_ENTRY_LEN);
            bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        }
        self.at(coblock_block::Event::RefblockAllocWriteTable);
        self.file.pwrite(
            co,
            graph,
            table_at.0,
            IoVec::from(&bytes[..]),
            RequestFlags::empty(),
        )?;
        if !mutant!("the header switches to a table that is not flushed") {
            self.file.flush(co, graph)?;
        }

        let mut field = [0; 12];
        field[..8].copy_from_slice(&table_at.0.to_be_bytes());
        field[8..].copy_from_slice(&header_field(table_clusters).to_be_bytes());
        self.at(coblock_block::Event::RefblockAllocSwitchTable);
        self.switch_header(co, graph, spec::HEADER_AT_REFCOUNT_TABLE, &field)?;

        let old_at = self.refcount_table.offset();
        let old_clusters = geometry.clusters(old_len * spec::TABLE_ENTRY_LEN).0;
        self.refcount_table.moved(table_at, new_len, &added);
        for nth in 0..used {
            self.tables.insert(HostCluster(start.0 + nth));
        }
        self.counters
            .refcount_blocks_added
            .fetch_add(blocks, Relaxed);
        self.counters.tables_grown.fetch_add(1, Relaxed);
        self.free_old_table(old_at, old_clusters);
        Ok(())
    }
}
