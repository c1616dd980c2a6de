//! Which host clusters are free: allocation, and the way of a freed cluster back to its next owner.
//!
//! ```text
//!   mapped --unmapped in memory--> Frees::unmapped --write-back, flush--> Frees::durable
//!                                                                            |
//!   handed out <-- count lowered to zero <--------- nobody reads or writes it any more
//!                        ^                                                   |
//!                        +---- hole punched, counted meanwhile <-- space goes back: Frees::holes
//! ```
//!
//! A cluster that lost its last mapping keeps its count until the file says so durably (otherwise a
//! crash would bring back a mapping to somebody else's data), and until every request that looked
//! it up is done (rule 9.2). Whatever happens in between, a crash leaks it at worst.

use std::collections::BTreeSet;
use std::ops::Range;

use coblock_block::{ErrorKind, GraphRead, Result};
use coblock_coroutine::{Co, mutant};

use crate::entry::L2Entry;
use crate::error::Error;
use crate::image::{Meta, Qcow2};
use crate::spec;
use crate::types::{HostCluster, HostOffset};
use crate::writeback::Counts;

/// Neighbouring host clusters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub start: HostOffset,
    pub clusters: u64,
    /// The file has never held anything here: it lay past the end, and reads as zeros.
    pub fresh: bool,
    /// They are not new: zero clusters that kept their place.
    pub kept: bool,
}

/// Unmapped clusters that may wait for a flush of the user's; with more, the allocator flushes.
pub(crate) const UNMAPPED_MAX: usize = 1 << 14;

/// Clusters that were unmapped and are not free yet.
#[derive(Default)]
pub(crate) struct Frees {
    /// The unmapping is in memory only, or not flushed.
    pub unmapped: Vec<Freed>,
    /// The unmapping is on stable storage.
    pub durable: Vec<Freed>,
    /// So it is, nobody uses them, and their count is the last one: their space goes back before it
    /// is lowered. Until then nobody gets them.
    holes: Vec<HostCluster>,
    /// Of these, those whose space is on its way.
    punching: BTreeSet<HostCluster>,
}

impl Frees {
    /// Are there any?
    pub fn is_empty(&self) -> bool {
        self.unmapped.is_empty() && self.durable.is_empty() && !self.has_holes()
    }

    fn has_holes(&self) -> bool {
        !self.holes.is_empty() || !self.punching.is_empty()
    }

    /// All whose count was not lowered yet.
    pub fn counted(&self) -> impl Iterator<Item = HostCluster> {
        let listed = self.unmapped.iter().chain(&self.durable);
        let holes = self.holes.iter().chain(&self.punching).copied();
        listed.map(|freed| freed.cluster).chain(holes)
    }
}

/// Why a cluster is freed, which decides whether its space goes back to the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Discards {
    /// The disk is shorter now, and the file will be.
    Always,
    /// The guest said that it does not need it.
    Request,
    /// A table has moved.
    Other,
    /// It will soon be used again.
    Never,
}

/// One count that some cluster will lose.
#[derive(Clone, Copy)]
pub(crate) struct Freed {
    pub cluster: HostCluster,
    /// Its space goes back to the file system.
    pub give_back: bool,
}

impl Qcow2 {
    /// Takes up to `want` neighbouring free clusters, each with a count of one afterwards; exactly
    /// `want` if `exact`.
    ///
    /// # Errors
    /// I/O, or the limits of the format; nothing is allocated then.
    pub(crate) fn allocate(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        want: u64,
        exact: bool,
    ) -> Result<Run> {
        assert!(want > 0);
        if self.frees.lock().unmapped.len() >= UNMAPPED_MAX {
            self.write_back(co, graph, true, Counts::MayLag)?;
        }
        self.lower_durable(co, graph, meta)?;
        self.at(coblock_block::Event::ClusterAlloc);
        let (first, clusters) = self.find_free(co, graph, meta, want, exact)?;
        assert!(first.0 > 0, "cluster 0 is the header's");
        for nth in 0..clusters {
            let raised = self.change_refcount(co, graph, meta, HostCluster(first.0 + nth), true);
            if let Err(error) = raised {
                for undo in 0..nth {
                    // Best effort: what stays counted is a leak. (Hazard O17.)
                    if let Err(e) =
                        self.change_refcount(co, graph, meta, HostCluster(first.0 + undo), false)
                    {
                        log::warn!("leaked a cluster while undoing an allocation: {e}");
                    }
                }
                return Err(error);
            }
        }
        if meta.cursor == first.0 {
            meta.cursor = first.0 + clusters;
        }
        let start = self.geometry.host_start(first);
        let fresh = start.0 >= meta.fresh_from;
        meta.clusters_written(self.geometry.host_start(HostCluster(first.0 + clusters)));
        Ok(Run {
            start,
            clusters,
            fresh,
            kept: false,
        })
    }

    /// Finds clusters with a count of zero; makes refcount blocks where the search leaves what they
    /// cover.
    fn find_free(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        want: u64,
        exact: bool,
    ) -> Result<(HostCluster, u64)> {
        let geometry = &self.geometry;
        let per_block = geometry.refcount_block_entries();
        let mut at = HostCluster(meta.cursor);
        // Free neighbours that end just before `at`.
        let mut run = 0;
        let mut skipped_free = false;
        loop {
            if at.0 >= (spec::HOST_OFFSET_END >> geometry.cluster_bits()) - want {
                return Err(Error::ImageFull.into());
            }
            let block = geometry.refcount_table_index(at);
            if self.refcount_table.get(block) == 0 {
                if run > 0 && !exact {
                    break;
                }
                // No cluster of this range is counted, and none that follows up to the next block.
                let blocks = blocks_for(at.0 % per_block, if exact { want } else { 1 }, per_block);
                if (block..block + blocks).any(|b| self.refcount_table.get(b) != 0) {
                    // A later block is in the way of a run of this length.
                    (at, run, skipped_free) = (HostCluster((block + 1) * per_block), 0, true);
                    continue;
                }
                if block + blocks > self.refcount_table.len() {
                    self.grow_refcount_table(co, graph, meta, block + blocks)?;
                    (at, run) = (HostCluster(meta.cursor.max(at.0)), 0);
                    continue;
                }
                // In a damaged image there may be tables all the same.
                self.assert_no_tables(co, graph, at, blocks)?;
                self.add_refcount_blocks(co, graph, meta, at, blocks)?;
                (at, run) = (HostCluster(at.0 + blocks), 0);
                continue;
            }
            let Some((pin, index)) = self.pin_refcounts(co, graph, at)? else {
                unreachable!("the table names a block");
            };
            let mut found = false;
            for index in index..self.counts_per_slice() {
                if self.count_at(&pin, index) == 0 {
                    self.assert_no_table(co, graph, at)?;
                    run += 1;
                    at.0 += 1;
                    found = run == want;
                } else if run > 0 && !exact {
                    found = true;
                } else {
                    skipped_free |= run > 0;
                    run = 0;
                    at.0 += 1;
                }
                if found {
                    break;
                }
            }
            if found {
                break;
            }
        }
        let first = HostCluster(at.0 - run);
        if !skipped_free {
            meta.cursor = first.0;
        }
        Ok((first, run))
    }

    /// A cluster with a count of zero that holds a table means that the image is damaged: writing
    /// there would destroy it. (Hazards O14, Q15.)
    fn assert_no_table(&self, co: &Co, graph: &GraphRead<'_>, cluster: HostCluster) -> Result<()> {
        match self.table_at(cluster) {
            None => Ok(()),
            Some(table) => {
                let host = self.geometry.host_start(cluster);
                Err(self.signal_corruption(co, graph, Error::UncountedTable { table, host }))
            }
        }
    }

    /// The same for `count` clusters from `first` on that no block counts.
    pub(crate) fn assert_no_tables(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        first: HostCluster,
        count: u64,
    ) -> Result<()> {
        (first.0..first.0 + count)
            .try_for_each(|cluster| self.assert_no_table(co, graph, HostCluster(cluster)))
    }

    /// Gives back clusters that were allocated and never mapped.
    ///
    /// # Errors
    /// I/O; the rest is leaked then.
    pub(crate) fn release(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        run: Run,
    ) -> Result<()> {
        let first = self.geometry.host_cluster(run.start);
        for nth in 0..run.clusters {
            self.change_refcount(co, graph, meta, HostCluster(first.0 + nth), false)?;
        }
        Ok(())
    }

    /// `cluster` lost one mapping in memory; its count follows when that is durable. Call it after
    /// the change of the L2 or L1 entry, in the same step.
    pub(crate) fn unmapped(&self, cluster: HostCluster) {
        self.frees.lock().unmapped.push(Freed {
            cluster,
            give_back: self.passes(Discards::Other),
        });
    }

    /// The same for every cluster that an L2 entry referred to.
    pub(crate) fn unmapped_range(&self, old: L2Entry, why: Discards) {
        let give_back = self.passes(why);
        let Some((host, len)) = old.host_range(self.geometry) else {
            return;
        };
        let first = self.geometry.host_cluster(host).0;
        let last = self.geometry.host_cluster(HostOffset(host.0 + len - 1)).0;
        let mut frees = self.frees.lock();
        for cluster in (first..=last).map(HostCluster) {
            let freed = Freed { cluster, give_back };
            if mutant!("freed clusters do not wait for a flush") {
                frees.durable.push(freed);
            } else {
                frees.unmapped.push(freed);
            }
        }
    }

    /// Does the space of clusters that are freed so go back?
    fn passes(&self, why: Discards) -> bool {
        match why {
            Discards::Always => true,
            Discards::Request => self.pass_discard.request,
            Discards::Other => self.pass_discard.other,
            Discards::Never => false,
        }
    }

    /// The clusters of a table are free: the header that named it is gone for good. Their counts are
    /// lowered as those of all others are.
    pub(crate) fn free_old_table(&self, at: HostOffset, clusters: u64) {
        let first = self.geometry.host_cluster(at).0;
        let give_back = self.passes(Discards::Other);
        let freed = (first..first + clusters).map(HostCluster);
        let freed = freed.map(|cluster| Freed { cluster, give_back });
        self.frees.lock().durable.extend(freed);
    }

    /// Lowers the counts of clusters whose unmapping is durable and which no request uses any more.
    /// Where the space goes back too, [`Qcow2::punch_holes`] has to follow.
    ///
    /// # Errors
    /// I/O or a damaged image; what was not lowered stays on the list.
    pub(crate) fn lower_durable(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
    ) -> Result<()> {
        let mut durable = std::mem::take(&mut self.frees.lock().durable);
        if mutant!("freed clusters are forgotten") {
            return Ok(());
        }
        if durable.is_empty() {
            return Ok(());
        }
        // A request enters itself before its lookup, so either it is among these or it saw the
        // cluster unmapped.
        let mut in_use = Vec::new();
        self.in_flight.for_each(|range| in_use.push(range));
        let mut busy = Vec::new();
        let mut holes = Vec::new();
        let mut result = Ok(());
        while let Some(freed) = durable.pop() {
            let start = self.geometry.host_start(freed.cluster).0;
            let end = start + self.geometry.cluster_size();
            let overlaps = |range: &Option<Range<u64>>| {
                range
                    .as_ref()
                    .is_none_or(|used| used.start < end && start < used.end)
            };
            if in_use.iter().any(overlaps) && !mutant!("clusters are freed under their readers") {
                busy.push(freed);
                continue;
            }
            let lowered = match self.is_last_count(co, graph, freed) {
                Ok(true) => {
                    holes.push(freed.cluster);
                    Ok(())
                }
                Ok(false) => self.lower(co, graph, meta, freed.cluster),
                Err(error) => Err(error),
            };
            if lowered.is_err() {
                busy.push(freed);
                result = lowered;
                break;
            }
        }
        let mut frees = self.frees.lock();
        frees.durable.append(&mut busy);
        frees.durable.append(&mut durable);
        frees.holes.append(&mut holes);
        result
    }

    /// Will this one be free, and its space go back? Not where a table is, which is not to be freed.
    fn is_last_count(&self, co: &Co, graph: &GraphRead<'_>, freed: Freed) -> Result<bool> {
        if !freed.give_back || self.table_at(freed.cluster).is_some() {
            return Ok(false);
        }
        let Some((pin, index)) = self.pin_refcounts(co, graph, freed.cluster)? else {
            return Ok(false);
        };
        Ok(self.count_at(&pin, index) == 1)
    }

    /// Lowers the count of a cluster whose unmapping is durable.
    fn lower(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        cluster: HostCluster,
    ) -> Result<()> {
        self.at(coblock_block::Event::ClusterFree);
        match self.change_refcount(co, graph, meta, cluster, false) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::Corrupt && self.check_intact().is_ok() => {
                // The count was zero already: the image was damaged before we unmapped the
                // cluster.
                log::error!("an unmapped cluster was not counted: {error}");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Punches the holes that [`Qcow2::lower_durable`] left, with the metadata mutex free, and lowers
    /// the counts of their clusters then: until that nobody gets one of them.
    ///
    /// # Errors
    /// I/O or a damaged image; what was not lowered stays on the list.
    pub(crate) fn punch_holes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let mut batch = {
            let mut frees = self.frees.lock();
            let batch = std::mem::take(&mut frees.holes);
            frees.punching.extend(&batch);
            batch
        };
        if batch.is_empty() {
            return Ok(());
        }
        let start = |cluster: &HostCluster| self.geometry.host_start(*cluster).0;
        let mut starts: Vec<_> = batch.iter().map(start).collect();
        starts.sort_unstable();
        let late = mutant!("clusters are free before their holes are punched");
        if !late {
            self.give_back(co, graph, &starts);
        }
        let mut meta = self.meta.lock(co);
        let mut result = Ok(());
        while let Some(cluster) = batch.pop() {
            result = self.lower(co, graph, &mut meta, cluster);
            let mut frees = self.frees.lock();
            frees.punching.remove(&cluster);
            if result.is_err() {
                for cluster in batch.drain(..).chain([cluster]) {
                    frees.punching.remove(&cluster);
                    let give_back = false;
                    frees.durable.push(Freed { cluster, give_back });
                }
            }
        }
        drop(meta);
        if late {
            self.give_back(co, graph, &starts);
        }
        result
    }

    /// Returns the space of clusters, in the order of the file, that nobody gets meanwhile to the
    /// file system.
    fn give_back(&self, co: &Co, graph: &GraphRead<'_>, clusters: &[u64]) {
        let size = self.geometry.cluster_size();
        let mut rest = clusters;
        while let Some(&start) = rest.first() {
            let in_row = (0u64..)
                .zip(rest)
                .take_while(|&(nth, &at)| at == start + nth * size)
                .count();
            let len = in_row as u64 * size;
            // Advice: the clusters become free whether or not the space is given back.
            if let Err(error) = self.file.pdiscard(
                co,
                graph,
                start,
                len.min(self.file.len(graph).saturating_sub(start)),
            ) {
                log::debug!("space was not given back: {error}");
            }
            rest = &rest[in_row..];
        }
    }
}

/// How many new blocks, laid from `index` of their first range on and followed by `want` clusters,
/// cover both.
fn blocks_for(index: u64, want: u64, per_block: u64) -> u64 {
    let mut blocks = 1;
    while index + blocks + want > blocks * per_block {
        blocks += 1;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// New blocks cover themselves and what is asked for.
    #[test]
    fn blocks_cover_themselves() {
        for (name, index, want, per_block, blocks) in [
            ("one cluster", 0, 1, 64, 1),
            ("fills the range", 0, 63, 64, 1),
            ("one more", 0, 64, 64, 2),
            ("starts late", 63, 1, 64, 2),
            ("many", 0, 1000, 64, 16),
        ] {
            assert_eq!(blocks_for(index, want, per_block), blocks, "{name}");
        }
    }
}
