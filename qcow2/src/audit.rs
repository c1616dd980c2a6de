//! For tests: does every count equal what refers to the cluster, at this moment, in memory?
//!
//! ```text
//!   count = header, tables, blocks   each once
//!         + mappings of L2 entries
//!         + pending allocations      written, not mapped yet
//!         + freed clusters           unmapped, count not lowered yet
//! ```
//! So the sets are disjoint: whatever is in two of them is counted once and referred to twice. This is
//! what `check` asks of a closed image, asked while requests are in flight.

use coblock_block::types::in_memory;
use coblock_coroutine::Co;

use crate::entry::L2Entry;
use crate::image::Qcow2;
use crate::spec;
use crate::types::{GuestOffset, HostCluster, HostOffset};

/// What an audit counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Clusters with a count.
    pub counted: u64,
    /// Clusters whose count is higher than what refers to them.
    pub leaked: u64,
}

impl Qcow2 {
    /// Compares counts with references. Does no I/O and never suspends: `peek` reads the file past
    /// everybody, as it is now.
    ///
    /// Nothing where metadata is being changed at this moment, or where snapshots share clusters.
    ///
    /// # Errors
    /// What is wrong: a cluster that more refers to than its count says, one in use that is free, or
    /// an entry that contradicts the specification.
    pub fn audit(&self, co: &Co, peek: &dyn Fn(u64, &mut [u8])) -> Option<Result<Audit, String>> {
        let meta = self.meta.try_lock(co)?;
        // A pass has taken the list of freed clusters with it.
        let _no_pass = self.writing_back.try_lock(co)?;
        if self.header.snapshots > 0 || self.check_intact().is_err() {
            return None;
        }
        let counts = self.all_counts(peek);
        let mut references = References {
            of: vec![0; counts.len()],
            wrong: None,
        };
        self.refer_to_tables(&mut references);
        self.refer_to_data(&mut references, &counts, peek);
        for pending in &meta.pending {
            if let Some((start, clusters)) = pending.new_clusters() {
                references.add_run(self.geometry.host_cluster(start), clusters, "pending");
            }
        }
        {
            let frees = self.frees.lock();
            for cluster in frees.counted() {
                references.add_run(cluster, 1, "freed");
            }
        }
        Some(self.compare(references, &counts))
    }

    fn compare(&self, references: References, counts: &[u64]) -> Result<Audit, String> {
        if let Some(wrong) = references.wrong {
            return Err(wrong);
        }
        let mut audit = Audit {
            counted: 0,
            leaked: 0,
        };
        for (cluster, (&count, &refers)) in counts.iter().zip(&references.of).enumerate() {
            if refers > count {
                return Err(format!(
                    "cluster {cluster} is counted {count} times and used {refers} times"
                ));
            }
            audit.counted += u64::from(count > 0);
            audit.leaked += u64::from(count > refers);
        }
        let mut free = None;
        self.in_flight.for_each(|range| {
            let Some(range) = range.filter(|range| range.start < range.end) else {
                return;
            };
            let first = self.geometry.host_cluster(HostOffset(range.start)).0;
            let last = self.geometry.host_cluster(HostOffset(range.end - 1)).0;
            let is_free = |c: &u64| counts.get(in_memory(*c)).is_none_or(|count| *count == 0);
            free = free.or((first..=last).find(is_free));
        });
        match free {
            Some(cluster) => Err(format!(
                "cluster {cluster} is free with a request in flight"
            )),
            None => Ok(audit),
        }
    }

    /// The count of every cluster that a block covers.
    fn all_counts(&self, peek: &dyn Fn(u64, &mut [u8])) -> Vec<u64> {
        let per_block = in_memory(self.geometry.refcount_block_entries());
        let slice = in_memory(self.refcounts.slice_bytes());
        let slices = (self.geometry.cluster_len() / slice) as u64;
        let width = self.refcount_width();
        let mut block = vec![0; self.geometry.cluster_len()];
        let mut counts = Vec::new();
        for (index, entry) in self.refcount_table.iter() {
            peek(entry & !spec::REFCOUNT_TABLE_RESERVED, &mut block);
            for (nth, bytes) in (0..).zip(block.chunks_exact_mut(slice)) {
                self.refcounts.overlay(index * slices + nth, bytes);
            }
            counts.resize(in_memory(index) * per_block, 0);
            counts.extend((0..per_block).map(|nth| width.get(&block, nth)));
        }
        counts
    }

    fn refer_to_tables(&self, references: &mut References) {
        let geometry = self.geometry;
        references.add_run(HostCluster(0), 1, "header");
        for (what, table) in [
            ("L1 table", &self.l1),
            ("refcount table", &self.refcount_table),
        ] {
            let clusters = geometry.clusters(table.bytes()).0;
            references.add_run(geometry.host_cluster(table.offset()), clusters, what);
        }
        for (_, entry) in self.refcount_table.iter() {
            let at = HostOffset(entry & !spec::REFCOUNT_TABLE_RESERVED);
            references.add_run(geometry.host_cluster(at), 1, "refcount block");
        }
    }

    fn refer_to_data(
        &self,
        references: &mut References,
        counts: &[u64],
        peek: &dyn Fn(u64, &mut [u8]),
    ) {
        let geometry = self.geometry;
        let slice = in_memory(self.l2.slice_bytes());
        let slices = (geometry.cluster_len() / slice) as u64;
        let mut table = vec![0; geometry.cluster_len()];
        for (index, entry) in self.l1.iter() {
            let at = HostOffset(entry & spec::ENTRY_OFFSET_MASK);
            references.add_run(geometry.host_cluster(at), 1, "L2 table");
            peek(at.0, &mut table);
            for (nth, bytes) in (0..).zip(table.chunks_exact_mut(slice)) {
                self.l2.overlay(index * slices + nth, bytes);
            }
            let first = index * geometry.l2_entries() as u64;
            for (nth, raw) in (0..).zip(table.chunks_exact(8)) {
                let entry = u64::from_be_bytes(raw.try_into().expect("chunks of eight"));
                if entry == 0 {
                    continue;
                }
                let guest = GuestOffset((first + nth) * geometry.cluster_size());
                match L2Entry::decode(entry, guest, geometry) {
                    Ok(entry) => self.refer_to_entry(references, counts, guest, entry),
                    Err(error) => references.wrong(error.to_string()),
                }
            }
        }
    }

    fn refer_to_entry(
        &self,
        references: &mut References,
        counts: &[u64],
        guest: GuestOffset,
        entry: L2Entry,
    ) {
        let Some((host, len)) = entry.host_range(self.geometry) else {
            return;
        };
        let first = self.geometry.host_cluster(host);
        let last = self.geometry.host_cluster(HostOffset(host.0 + len - 1));
        references.add_run(first, last.0 - first.0 + 1, "data");
        let copied = matches!(
            entry,
            L2Entry::Data { copied: true, .. } | L2Entry::Zero { copied: true, .. }
        );
        let count = counts.get(in_memory(first.0)).copied().unwrap_or(0);
        if copied && count != 1 {
            references.wrong(format!(
                "the entry for guest offset {guest} says that its cluster is counted once, not {count} times"
            ));
        }
    }
}

/// How much refers to each cluster.
struct References {
    of: Vec<u64>,
    /// The first thing that is wrong.
    wrong: Option<String>,
}

impl References {
    fn add_run(&mut self, first: HostCluster, clusters: u64, what: &str) {
        for cluster in first.0..first.0 + clusters {
            match self.of.get_mut(in_memory(cluster)) {
                Some(count) => *count += 1,
                None => self.wrong(format!("{what}: cluster {cluster} is not counted")),
            }
        }
    }

    fn wrong(&mut self, why: String) {
        self.wrong.get_or_insert(why);
    }
}
