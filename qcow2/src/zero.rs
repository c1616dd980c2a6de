//! Requests that change the mapping without data: write zeroes and discard.
//!
//! | old entry | zeroes, keep the space | zeroes, may unmap; discard |
//! |---|---|---|
//! | data, only ours | zero, cluster kept | zero, cluster freed |
//! | data, shared; compressed | zero, one reference given up | the same |
//! | zero with a cluster | as it is | zero, cluster freed |
//! | unallocated | zero | zeroes: zero; discard: zero over a backing file, else as it is |
//!
//! Version 2 has no zero flag: without a backing file "unallocated" says the same, with one nothing
//! does, and the block layer writes zeros. Whole clusters only; the last one may be cut off by the
//! end of the disk, and a part of one is as good as all of it where the rest reads as zeros without
//! data. A range with a pending allocation is waited for (rule 9.1); freed clusters go the way of
//! all others (rule 9.2), and those of a discard are given back to the file system on it.

use std::sync::atomic::Ordering::Relaxed;

use coblock_block::types::in_memory;
use coblock_block::{Error as BlockError, ErrorKind, GraphRead, RequestFlags, Result};
use coblock_coroutine::Co;

use crate::alloc::Discards;
use crate::cache::Pin;
use crate::entry::L2Entry;
use crate::image::Qcow2;
use crate::types::{GuestOffset, HostOffset, Version};

/// What is to become of the clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Empty {
    /// They read as zeros and keep their space.
    Zero,
    /// They read as zeros, and their space is given back.
    ZeroAndUnmap,
    /// Their space is given back; they read as zeros where the format can say so.
    Discard,
}

impl Empty {
    /// What a request to write zeroes asks for.
    pub(crate) fn asked(flags: RequestFlags) -> Self {
        if flags.contains(RequestFlags::MAY_UNMAP) {
            Self::ZeroAndUnmap
        } else {
            Self::Zero
        }
    }
}

impl Qcow2 {
    /// Empties the clusters of `len` bytes at `at`, which is the start of one.
    ///
    /// # Errors
    /// `NotSupported` in version 2 over a backing file; I/O or a damaged image: some of the
    /// clusters may be empty then.
    pub(crate) fn empty_clusters(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        len: u64,
        how: Empty,
    ) -> Result<()> {
        assert_eq!(
            self.geometry.offset_in_cluster(at),
            0,
            "whole clusters only"
        );
        self.check_intact()?;
        if self.geometry.version() == Version::V2 && self.has_backing() {
            return Err(BlockError::new(
                ErrorKind::NotSupported,
                "a version 2 image cannot hide its backing file",
            ));
        }
        let mut clusters = self.geometry.clusters(len).0;
        let mut at = at;
        while clusters > 0 {
            let done = self.empty_slice(co, graph, at, clusters, how)?;
            at = GuestOffset(at.0 + done * self.geometry.cluster_size());
            clusters -= done;
        }
        self.punch_holes(co, graph)
    }

    /// The same for as many of `clusters` as the slice of `at` maps. Returns how many that are.
    fn empty_slice(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        clusters: u64,
        how: Empty,
    ) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let (_, index) = self.l2_place(at);
        let clusters = clusters.min(self.l2.slice_bytes() / 8 - index as u64);
        let first = self.geometry.guest_cluster(at);
        loop {
            let mut meta = self.meta.lock(co);
            self.check_intact()?;
            if let Some(other) = meta.pending_in(first, clusters) {
                self.counters.dependency_waits.fetch_add(1, Relaxed);
                other.wait(co, meta);
                continue;
            }
            let stays = how == Empty::Discard && !self.has_backing();
            if stays && self.l2_table_of(at)?.is_none() {
                return Ok(clusters);
            }
            self.own_l2_table(co, graph, &mut meta, at)?;
            let Some(pin) = self.pin_l2(co, graph, at)? else {
                unreachable!("the table was made, and the metadata mutex is held");
            };
            for nth in 0..clusters {
                let slot = index + in_memory(nth);
                let guest = GuestOffset(at.0 + nth * size);
                let old = L2Entry::decode(pin.load(slot), guest, self.geometry)?;
                self.empty_entry(&pin, slot, old, how);
            }
            return Ok(clusters);
        }
    }

    /// Empties the cluster that a part of `len` bytes at `at` lies in, where all of it reads as
    /// zeros then.
    ///
    /// # Errors
    /// `NotSupported` where the rest is data, or nobody knows what it is; as
    /// [`Qcow2::empty_clusters`].
    pub(crate) fn empty_part(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        len: u64,
        how: Empty,
    ) -> Result<()> {
        let not_supported = |why| Err(BlockError::new(ErrorKind::NotSupported, why));
        if self.geometry.version() == Version::V2 && self.has_backing() {
            return not_supported("a version 2 image cannot hide its backing file");
        }
        let cluster = self.geometry.guest_cluster(at);
        let start = self.geometry.guest_start(cluster);
        let end = at.0 + len;
        let cluster_end = start.0 + self.geometry.cluster_size();
        assert!(end <= cluster_end, "a part of one cluster");
        let (_, slot) = self.l2_place(at);
        // Nobody writes to a backing file below an image that is open.
        let mut zeros_below = !self.has_backing();
        loop {
            let mut meta = self.meta.lock(co);
            self.check_intact()?;
            if let Some(other) = meta.pending_in(cluster, 1) {
                self.counters.dependency_waits.fetch_add(1, Relaxed);
                other.wait(co, meta);
                continue;
            }
            if self.l2_table_of(at)?.is_some() || zeros_below {
                self.own_l2_table(co, graph, &mut meta, at)?;
                let Some(pin) = self.pin_l2(co, graph, at)? else {
                    unreachable!("the table was made, and the metadata mutex is held");
                };
                match L2Entry::decode(pin.load(slot), start, self.geometry)? {
                    old @ L2Entry::Zero { .. } => {
                        self.empty_entry(&pin, slot, old, how);
                        return Ok(());
                    }
                    L2Entry::Unallocated if zeros_below => {
                        self.empty_entry(&pin, slot, L2Entry::Unallocated, how);
                        return Ok(());
                    }
                    L2Entry::Unallocated => {}
                    _ => return not_supported("the rest of the cluster is data"),
                }
            }
            drop(meta);
            for (from, to) in [(start.0, at.0), (end, cluster_end)] {
                let Some(backing) = self.backing.get() else {
                    unreachable!("without one there are zeros below");
                };
                if !backing.reads_as_zeros(co, graph, from, to - from)? {
                    return not_supported("the rest of the cluster is in the backing file");
                }
            }
            zeros_below = true;
        }
    }

    /// Turns the entry in `slot`, which is `old`, into what it becomes.
    fn empty_entry(&self, pin: &Pin<'_>, slot: usize, old: L2Entry, how: Empty) {
        let new = self.emptied(old, how);
        if new == old {
            return;
        }
        pin.store(slot, new.encode(self.geometry));
        if new.host_range(self.geometry) != old.host_range(self.geometry) {
            let why = if how == Empty::Zero {
                Discards::Never
            } else {
                Discards::Request
            };
            self.unmapped_range(old, why);
        }
    }

    /// The entry that `old` becomes; the table at the head of this file.
    fn emptied(&self, old: L2Entry, how: Empty) -> L2Entry {
        let zero = |host: Option<HostOffset>| match self.geometry.version() {
            Version::V3 => L2Entry::Zero {
                host,
                copied: host.is_some(),
            },
            Version::V2 => L2Entry::Unallocated,
        };
        let keeps = how == Empty::Zero && self.geometry.version() == Version::V3;
        match old {
            L2Entry::Data { host, copied: true }
            | L2Entry::Zero {
                host: Some(host),
                copied: true,
            } if keeps => zero(Some(host)),
            L2Entry::Unallocated if how == Empty::Discard && !self.has_backing() => old,
            _ => zero(None),
        }
    }
}
