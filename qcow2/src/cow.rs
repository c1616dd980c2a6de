//! Writes that change the mapping: dependencies, allocation, copy-on-write, the new L2 entries.
//!
//! ```text
//!   metadata mutex held                       released                          held again
//!   +-------------------------------------+   +------------------------------+  +------------------------+
//!   | overlaps a pending one? shorten, or |   | read what surrounds the data |  | enter the new clusters |
//!   |   wait and look everything up anew  |-->| write it with the data       |->| in L2, take the pending|
//!   | allocate; publish PendingAllocation |   |                              |  | one off, wake waiters  |
//!   +-------------------------------------+   +------------------------------+  +------------------------+
//! ```
//!
//! (Rules 2.6 and 9.1, hazards Q1 to Q4.) Nothing learned before a wait is used after it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use coblock_aio::{Gather, IoVec, IoVecMut};
use coblock_block::types::in_memory;
use coblock_block::{ErrorKind, GraphRead, RequestFlags, Result};
use coblock_coroutine::{Co, CoMutexGuard, CoQueue, mutant};

use crate::alloc::{Discards, Run};
use crate::cache::Pin;
use crate::entry::L2Entry;
use crate::image::{Meta, Qcow2, buffer};
use crate::types::{GuestCluster, GuestOffset, HostOffset};
use crate::writeback::Counts;

/// Clusters that a write has allocated and not yet entered in their L2 table.
///
/// Published under the metadata mutex before it is released, and taken off under it, on success and
/// on every error.
pub(crate) struct PendingAllocation {
    first: GuestCluster,
    clusters: u64,
    /// Where they are.
    run: Run,
    /// Writes that wait until this one is off the list; woken in order.
    waiters: CoQueue,
}

impl PendingAllocation {
    /// Does it overlap `clusters` from `first` on?
    fn overlaps(&self, first: GuestCluster, clusters: u64) -> bool {
        self.first.0 < first.0 + clusters && first.0 < self.first.0 + self.clusters
    }

    /// The host clusters that nothing else refers to yet, and how many.
    pub(crate) fn new_clusters(&self) -> Option<(HostOffset, u64)> {
        (!self.run.kept).then_some((self.run.start, self.run.clusters))
    }

    /// Gives the metadata mutex back and suspends until this allocation is off the list.
    pub(crate) fn wait(&self, co: &Co, meta: CoMutexGuard<'_, Meta>) {
        self.waiters.wait_dropping(co, meta);
    }
}

impl Meta {
    /// A pending allocation in these clusters.
    pub(crate) fn pending_in(
        &self,
        first: GuestCluster,
        clusters: u64,
    ) -> Option<Arc<PendingAllocation>> {
        self.pending
            .iter()
            .find(|other| other.overlaps(first, clusters))
            .cloned()
    }
}

/// Where the bytes around the data of an allocating write come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Zeros,
    Host(HostOffset),
    /// From `skip` on of the cluster that `len` bytes at `host` inflate to.
    Compressed {
        host: HostOffset,
        len: u64,
        skip: u64,
    },
    Backing(GuestOffset),
}

/// A part of a new cluster that the guest did not write.
pub(crate) struct Edge {
    source: Source,
    len: u64,
}

/// May a write wait for another one's allocation?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// As long as it takes.
    Allowed,
    /// It holds something for which the other one may wait.
    Never,
}

/// How a write goes on after its first look.
pub(crate) enum Plan {
    /// Nothing to allocate here any more: look the mapping up again.
    Overwrite,
    /// Another write is about to map the first cluster.
    Busy,
    Allocate(Arc<PendingAllocation>, Run, Cow),
}

/// What clusters need before they can be written.
#[derive(Clone, Copy)]
enum Need {
    /// The first one is ours already.
    Nothing,
    /// So many have no place of their own.
    New(u64),
    /// They read as zeros, and a place is kept for them. What it holds means nothing.
    Kept(Run),
}

/// What to write: the part of the request, and what comes before and after it in its clusters.
pub(crate) struct Cow {
    pub(crate) len: u64,
    head: Edge,
    tail: Edge,
}

impl Qcow2 {
    /// Writes a first part of `data` at `at`, where the mapping must change. Returns how many bytes
    /// were written; zero when the mapping has changed meanwhile and the caller should look again.
    ///
    /// # Errors
    /// I/O or a damaged image. The range then holds old or new data, nothing outside it has
    /// changed.
    pub(crate) fn write_allocating(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        data: IoVec<'_>,
    ) -> Result<u64> {
        let plan = self.plan(co, graph, at, data.len() as u64, Wait::Allowed)?;
        let (pending, run, cow) = match plan {
            Plan::Overwrite | Plan::Busy => return Ok(0),
            Plan::Allocate(pending, run, cow) => (pending, run, cow),
        };
        let written =
            self.write_clusters(co, graph, run, at, data.slice(0, in_memory(cow.len)), &cow);

        match self.settle(co, graph, &pending, run, written.map(|()| true)) {
            Err(error) if error.kind() == ErrorKind::NoSpace && self.has_freed() => {
                // Freed clusters may serve, once their unmapping is durable. (Hazard Q13.)
                self.write_back(co, graph, true, Counts::MayLag)?;
                let mut meta = self.meta.lock(co);
                self.lower_durable(co, graph, &mut meta)?;
                drop(meta);
                self.punch_holes(co, graph)?;
                let meta = self.meta.lock(co);
                if meta.cursor < self.geometry.host_cluster(run.start).0 {
                    Ok(0)
                } else {
                    Err(error)
                }
            }
            result => {
                // What the allocation above found to be free is not on its list for long.
                if let Err(error) = self.punch_holes(co, graph) {
                    // Not this write's error, which has succeeded or has its own. They are on the
                    // list of `lower_durable` again: the next flush does it, or fails.
                    log::warn!("freed clusters keep their counts until the next flush: {error}");
                }
                result.map(|_| cow.len)
            }
        }
    }

    /// Third step: maps the clusters that were `written`, gives them back where they were not, and
    /// takes the pending allocation off. Tells whether they are mapped.
    pub(crate) fn settle(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        pending: &Arc<PendingAllocation>,
        run: Run,
        written: Result<bool>,
    ) -> Result<bool> {
        let mut meta = self.meta.lock(co);
        let result = match written {
            Ok(true) => self
                .enter_clusters(co, graph, &mut meta, pending, run)
                .map(|()| true),
            other => other,
        };
        if !matches!(result, Ok(true)) {
            self.give_up(co, graph, &mut meta, run);
        }
        meta.pending.retain(|other| !Arc::ptr_eq(other, pending));
        drop(meta);
        if !mutant!("an allocation forgets who waits for it") {
            pending.waiters.wake_all();
        }
        result
    }

    /// Frees clusters that were allocated for something that failed, whose error is the one to tell.
    /// What cannot be given back is a leak.
    pub(crate) fn give_up(&self, co: &Co, graph: &GraphRead<'_>, meta: &mut Meta, run: Run) {
        // Kept ones belong to the entries that they had before.
        if !run.kept
            && let Err(error) = self.release(co, graph, meta, run)
        {
            log::warn!("leaked clusters of a change that failed: {error}");
        }
    }

    /// First step: dependencies, allocation, publication.
    pub(crate) fn plan(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        len: u64,
        wait: Wait,
    ) -> Result<Plan> {
        loop {
            let mut meta = self.meta.lock(co);
            self.check_intact()?;
            let first = self.geometry.guest_cluster(at);
            let mut last = self.geometry.guest_cluster(GuestOffset(at.0 + len - 1));
            let mut blocker = None;
            for other in &meta.pending {
                if other.first.0 > last.0 || first.0 >= other.first.0 + other.clusters {
                    continue;
                }
                if other.first <= first {
                    blocker = Some(other.clone());
                    break;
                }
                last = GuestCluster(other.first.0 - 1);
            }
            if let Some(other) = blocker.filter(|_| !mutant!("no wait for a pending allocation")) {
                if wait == Wait::Never {
                    return Ok(Plan::Busy);
                }
                self.counters.dependency_waits.fetch_add(1, Relaxed);
                other.wait(co, meta);
                continue;
            }
            self.own_l2_table(co, graph, &mut meta, at)?;
            let Some(pin) = self.pin_l2(co, graph, at)? else {
                unreachable!("the table was made, and the metadata mutex is held");
            };
            let (_, index) = self.l2_place(at);
            let run = match self.need(&pin, index, first, last)? {
                Need::Nothing => return Ok(Plan::Overwrite),
                Need::New(clusters) => self.allocate(co, graph, &mut meta, clusters, false)?,
                Need::Kept(run) => {
                    let len = run.clusters * self.geometry.cluster_size();
                    self.check_no_table(co, graph, run.start, len)?;
                    run
                }
            };
            let cow = self.surroundings(&pin, index, at, len, run.clusters);
            drop(pin);
            let cow = match cow {
                Ok(cow) => cow,
                Err(error) => {
                    self.give_up(co, graph, &mut meta, run);
                    return Err(error);
                }
            };
            let pending = PendingAllocation {
                first,
                clusters: run.clusters,
                run,
                waiters: CoQueue::new(),
            };
            let pending = Arc::new(pending);
            meta.pending.push(pending.clone());
            return Ok(Plan::Allocate(pending, run, cow));
        }
    }

    /// Where clusters from `first` to `last` may be written, as far as one answer goes, in this
    /// slice.
    fn need(
        &self,
        pin: &Pin<'_>,
        index: usize,
        first: GuestCluster,
        last: GuestCluster,
    ) -> Result<Need> {
        let in_slice = (pin.words().len() - index) as u64;
        let most = in_slice.min(last.0 - first.0 + 1);
        let mut need = Need::Nothing;
        for nth in 0..most {
            let at = self.geometry.guest_start(GuestCluster(first.0 + nth));
            let entry = match L2Entry::decode(pin.load(index + in_memory(nth)), at, self.geometry) {
                Ok(entry) => entry,
                Err(error) if nth == 0 => return Err(error.into()),
                // An error of the request that reaches it.
                Err(_) => break,
            };
            let kept = match entry {
                L2Entry::Data { copied: true, .. } => break,
                L2Entry::Zero {
                    host: Some(host),
                    copied: true,
                } => Some(host),
                _ => None,
            };
            need = match (need, kept) {
                (Need::Nothing, Some(start)) => Need::Kept(Run {
                    start,
                    clusters: 1,
                    fresh: false,
                    kept: true,
                }),
                (Need::Kept(run), Some(host))
                    if host.0 == run.start.0 + nth * self.geometry.cluster_size() =>
                {
                    Need::Kept(Run {
                        clusters: nth + 1,
                        ..run
                    })
                }
                (Need::Nothing | Need::New(_), None) => Need::New(nth + 1),
                _ => break,
            };
        }
        Ok(need)
    }

    /// What surrounds the part of the request that fits in `clusters`.
    fn surroundings(
        &self,
        pin: &Pin<'_>,
        index: usize,
        at: GuestOffset,
        len: u64,
        clusters: u64,
    ) -> Result<Cow> {
        let size = self.geometry.cluster_size();
        let head_len = self.geometry.offset_in_cluster(at);
        let start = at.0 - head_len;
        let end = start + clusters * size;
        let len = len.min(end - at.0);
        let tail_at = at.0 + len;
        let tail_cluster = (tail_at - 1 - start) / size;
        let tail_start = start + tail_cluster * size;
        let head = self.source(pin.load(index), GuestOffset(start), 0)?;
        let last = pin.load(index + in_memory(tail_cluster));
        let tail = self.source(last, GuestOffset(tail_start), tail_at - tail_start)?;
        Ok(Cow {
            len,
            head: Edge {
                source: head,
                len: head_len,
            },
            tail: Edge {
                source: tail,
                len: end - tail_at,
            },
        })
    }

    /// Where the bytes from `skip` on of the cluster at `cluster` come from.
    fn source(&self, entry: u64, cluster: GuestOffset, skip: u64) -> Result<Source> {
        Ok(match L2Entry::decode(entry, cluster, self.geometry)? {
            L2Entry::Data { host, .. } => Source::Host(HostOffset(host.0 + skip)),
            L2Entry::Zero { .. } => Source::Zeros,
            L2Entry::Compressed { host, len } => Source::Compressed { host, len, skip },
            L2Entry::Unallocated if self.has_backing() => {
                Source::Backing(GuestOffset(cluster.0 + skip))
            }
            L2Entry::Unallocated => Source::Zeros,
        })
    }

    /// Second step, without the mutex: the data and what surrounds it.
    fn write_clusters(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        run: Run,
        at: GuestOffset,
        data: IoVec<'_>,
        cow: &Cow,
    ) -> Result<()> {
        let none = RequestFlags::empty();
        let in_run = self.geometry.offset_in_cluster(at);
        // Where the file has never held anything, zeros need not be written.
        let needless = |edge: &Edge| edge.len == 0 || (run.fresh && edge.source == Source::Zeros);
        let head = if needless(&cow.head) || mutant!("what is in front of the data is not copied") {
            0
        } else {
            cow.head.len
        };
        let tail = if needless(&cow.tail) || mutant!("what is behind the data is not copied") {
            0
        } else {
            cow.tail.len
        };
        if head == 0 && tail == 0 {
            self.at(coblock_block::Event::WriteAio);
            return self
                .file
                .pwrite(co, graph, run.start.0 + in_run, data, none);
        }
        let mut before = buffer(in_memory(head))?;
        let mut after = buffer(in_memory(tail))?;
        self.read_edge(co, graph, cow.head.source, &mut before)?;
        self.read_edge(co, graph, cow.tail.source, &mut after)?;
        self.at(coblock_block::Event::CowWrite);
        let mut all = Gather::new();
        all.push(&before[..]);
        all.push(data);
        all.push(&after[..]);
        self.file
            .pwrite(co, graph, run.start.0 + in_run - head, all.as_iovec(), none)
    }

    fn read_edge(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        source: Source,
        into: &mut [u8],
    ) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        let none = RequestFlags::empty();
        match source {
            // The buffer was made of zeros.
            Source::Zeros => Ok(()),
            Source::Host(at) => {
                self.at(coblock_block::Event::CowRead);
                self.file.pread(co, graph, at.0, IoVecMut::from(into), none)
            }
            Source::Compressed { host, len, skip } => {
                let cluster = self.read_compressed(co, graph, host, len)?;
                let skip = in_memory(skip);
                into.copy_from_slice(&cluster[skip..skip + into.len()]);
                Ok(())
            }
            Source::Backing(at) => self.read_backing(co, graph, at, IoVecMut::from(into)),
        }
    }

    /// The L2 entries of the new clusters.
    fn enter_clusters(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        _meta: &mut Meta,
        pending: &PendingAllocation,
        run: Run,
    ) -> Result<()> {
        let at = self.geometry.guest_start(pending.first);
        let Some(pin) = self.pin_l2(co, graph, at)? else {
            unreachable!("tables are never taken away");
        };
        // From here on nothing fails or suspends.
        let (_, index) = self.l2_place(at);
        let size = self.geometry.cluster_size();
        for nth in 0..run.clusters {
            let slot = index + in_memory(nth);
            let cluster = GuestOffset(at.0 + nth * size);
            let old = L2Entry::decode(pin.load(slot), cluster, self.geometry);
            if mutant!("the last cluster of a run is not mapped")
                && nth > 0
                && nth + 1 == run.clusters
            {
                break;
            }
            let host = HostOffset(run.start.0 + nth * size);
            pin.store(
                slot,
                L2Entry::Data { host, copied: true }.encode(self.geometry),
            );
            if let Ok(old) = old
                && !run.kept
            {
                self.unmapped_range(old, Discards::Never);
            }
        }
        Ok(())
    }
}
