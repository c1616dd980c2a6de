//! What reaches the file in which order, so that a power cut at any moment leaks clusters and does
//! nothing worse.
//!
//! Metadata changes in memory and is written back in passes, by a flush or because a cache is full
//! of changes:
//!
//! ```text
//!   copies of everything dirty, at one instant
//!   1  refcount blocks
//!      flush             counts, new blocks, guest data, copied data, contents of new tables are durable
//!   2  refcount table    only if it changed
//!      flush
//!   3  L2 slices, L1 entries
//!      flush             only if the caller needs it; then freed clusters may lose their counts
//! ```
//!
//! So a count is durable before a mapping (O1), data before its mapping (O4), a block and a table
//! before the pointer to it (O5, O6), and since counts are lowered only after step 3 was flushed,
//! an unmapping is durable before its count goes down (O2). There are no dependencies between cache
//! entries, so there can be no cycle of them (O3).
//!
//! With lazy refcounts a pass may leave out step 1, and the counts stay in memory. Before the first
//! mapping is written whose count does so, the header says durably that the image is dirty (O11,
//! `header_bits.rs`); all else keeps its order.
//!
//! Passes run one at a time. They work on copies and hold neither the metadata mutex nor a pin: a
//! request that holds the mutex may run a pass, and others go on allocating.

use coblock_aio::IoVec;
use coblock_block::{GraphRead, RequestFlags, Result};
use coblock_coroutine::{Co, mutant};

use crate::cache::Staged;
use crate::image::Qcow2;
use crate::memtable::StagedEntries;
use crate::types::HostCluster;

/// Bytes that one write of neighbouring slices may have.
const WRITE_BYTES_MAX: usize = 1 << 20;

/// What a pass does about refcounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counts {
    /// They may stay in memory, if refcounts are lazy.
    MayLag,
    /// They reach the file before the mappings.
    Written,
}

/// Copies of everything that the file does not have.
struct Pass {
    refcounts: Vec<Staged>,
    refcount_table: Vec<StagedEntries>,
    l2: Vec<Staged>,
    l1: Vec<StagedEntries>,
    /// Some of the mappings have counts that stay in memory.
    lags: bool,
}

impl Qcow2 {
    /// Writes everything back that is dirty now, in order; `durable`: and makes it so.
    ///
    /// # Errors
    /// I/O. What did not reach the file is dirty again, and nothing in the file points to something
    /// unwritten.
    pub(crate) fn write_back(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        durable: bool,
        counts: Counts,
    ) -> Result<()> {
        let _one_at_a_time = (!mutant!("two passes at a time")).then(|| self.writing_back.lock(co));
        self.check_intact()?;
        // The order of these copies matters when other threads go on: a mapping that is copied here
        // has its count, which was raised earlier, copied below; a freed cluster taken here has its
        // unmapping copied below.
        let freed = std::mem::take(&mut self.frees.lock().unmapped);
        let l2 = self.l2.stage_dirty();
        let l1 = self.l1.stage_dirty();
        let refcount_table = self.refcount_table.stage_dirty();
        let lazy = self.lazy_refcounts && counts == Counts::MayLag;
        let refcounts = if lazy {
            Vec::new()
        } else {
            self.refcounts.stage_dirty()
        };
        let pass = Pass {
            lags: lazy && self.refcounts.has_dirty(),
            refcounts,
            refcount_table,
            l2,
            l1,
        };

        let result = self.write_pass(co, graph, &pass, durable);

        self.refcounts.written(&pass.refcounts, result.is_ok());
        self.l2.written(&pass.l2, result.is_ok());
        if result.is_err() {
            self.refcount_table.unstage(&pass.refcount_table);
            self.l1.unstage(&pass.l1);
        }
        let mut frees = self.frees.lock();
        if durable && result.is_ok() {
            frees.durable.extend(freed);
        } else {
            frees.unmapped.extend(freed);
        }
        result
    }

    fn write_pass(&self, co: &Co, graph: &GraphRead<'_>, pass: &Pass, durable: bool) -> Result<()> {
        if mutant!("mappings before counts") {
            self.write_slices(co, graph, &pass.l2)?;
            self.write_entries(co, graph, &pass.l1)?;
        }
        self.at(coblock_block::Event::FlushToOs);
        if !pass.refcounts.is_empty() {
            self.at(coblock_block::Event::RefblockUpdatePart);
        }
        self.write_slices(co, graph, &pass.refcounts)?;
        let points = !pass.refcount_table.is_empty() || !pass.l2.is_empty() || !pass.l1.is_empty();
        if points {
            if pass.lags && !mutant!("a lazy image is not marked dirty") {
                self.mark_dirty(co, graph)?;
            }
            if !mutant!("no flush between counts and mappings") {
                self.file.flush(co, graph)?;
            }
        }
        if !pass.refcount_table.is_empty() {
            self.at(coblock_block::Event::ReftableUpdate);
            self.write_entries(co, graph, &pass.refcount_table)?;
            if !mutant!("no flush after the refcount table") {
                self.file.flush(co, graph)?;
            }
        }
        if !pass.l2.is_empty() {
            self.at(coblock_block::Event::L2Update);
        }
        self.write_slices(co, graph, &pass.l2)?;
        if !pass.l1.is_empty() {
            self.at(coblock_block::Event::L1Update);
        }
        self.write_entries(co, graph, &pass.l1)?;
        if durable && !mutant!("no flush at the end of a flush") {
            self.at(coblock_block::Event::FlushToDisk);
            self.file.flush(co, graph)
        } else {
            Ok(())
        }
    }

    /// Writes slices, neighbours in the file in one write. They are sorted by place.
    fn write_slices(&self, co: &Co, graph: &GraphRead<'_>, staged: &[Staged]) -> Result<()> {
        let mut rest = staged;
        while let Some(first) = rest.first() {
            let mut bytes = Vec::new();
            let neighbours = rest
                .iter()
                .take_while(|s| {
                    let next = s.host.0 == first.host.0 + bytes.len() as u64
                        || mutant!("slices are written side by side that are not");
                    let fits = bytes.len() + s.bytes.len() <= WRITE_BYTES_MAX;
                    if next && fits {
                        bytes.extend_from_slice(&s.bytes);
                    }
                    next && fits
                })
                .count();
            self.write_table(co, graph, first.host.0, &bytes)?;
            rest = &rest[neighbours..];
        }
        Ok(())
    }

    fn write_entries(&self, co: &Co, graph: &GraphRead<'_>, runs: &[StagedEntries]) -> Result<()> {
        runs.iter()
            .try_for_each(|run| self.write_table(co, graph, run.host.0, &run.bytes))
    }

    pub(crate) fn write_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: u64,
        bytes: &[u8],
    ) -> Result<()> {
        self.file
            .pwrite(co, graph, at, IoVec::from(bytes), RequestFlags::empty())
    }

    /// Changes neighbouring header fields that switch from an old table to a new one, in one write,
    /// durably.
    ///
    /// # Errors
    /// I/O. Nobody can know then which of the two the file has: the image takes no more changes. Or
    /// something else lies over the header.
    pub(crate) fn switch_header(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: u64,
        field: &[u8],
    ) -> Result<()> {
        self.assert_alone(co, graph, HostCluster(0))?;
        let switched = self
            .write_table(co, graph, at, field)
            .and_then(|()| self.file.flush(co, graph));
        if let Err(error) = &switched {
            self.take_no_more_changes(&format!("a header update failed: {error}"));
        }
        switched
    }
}
