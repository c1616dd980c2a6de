//! From guest offset to host offset: lookups, and the L2 tables that they go through.
//!
//! ```text
//!   guest offset -> L1 entry, in memory -> slice of an L2 table, cached -> L2 entry -> host offset
//! ```
//!
//! A lookup that hits the cache takes no lock at all. What it returns is true only until the next
//! suspend: between the lookup and the I/O that uses it nothing suspends, and the request stands in
//! the table of requests in flight all the time (rule 9.2).

use coblock_aio::{IoVec, IoVecMut};
use coblock_block::types::in_memory;
use coblock_block::{GraphRead, RequestFlags, Result};
use coblock_coroutine::{Co, mutant};

use crate::alloc::Run;
use crate::cache::{Pin, Reserved, SliceCache, Words};
use crate::entry::{L1Entry, L2Entry};
use crate::image::{Meta, Qcow2, buffer};
use crate::types::{GuestOffset, HostOffset};
use crate::writeback::Counts;

/// What a range of the guest's disk is, up to the first change of kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub what: Mapped,
    /// Bytes, from the offset that was looked up.
    pub len: u64,
}

/// Where the bytes of an [`Extent`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// In the image, from this byte on. `in_place`: nobody else refers to these clusters, so they
    /// may be overwritten.
    Data { host: HostOffset, in_place: bool },
    /// Nowhere: they read as zeros.
    Zero,
    /// In the backing file, if there is one.
    Unallocated,
    /// In a compressed cluster: these bytes of the file, at most, inflate to it.
    Compressed { host: HostOffset, len: u64 },
}

/// What a slice is brought into the cache for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Look,
    Change,
}

impl Qcow2 {
    /// The slice of an L2 table that maps `at`, and the index of its entry there.
    #[inline(always)]
    pub(crate) fn l2_place(&self, at: GuestOffset) -> (u64, usize) {
        self.l2.place(self.geometry.guest_cluster(at).0)
    }

    /// Slices of one L2 table.
    fn slices_per_table(&self) -> u64 {
        self.geometry.cluster_size() / self.l2.slice_bytes()
    }

    /// The usual case of [`Qcow2::lookup`]: all of the range is data, in one cluster, and its entry
    /// is cached. Where it begins, and whether it may be overwritten there.
    #[inline(always)]
    pub(crate) fn lookup_data(&self, at: GuestOffset, len: u64) -> Option<(HostOffset, bool)> {
        let in_cluster = self.geometry.offset_in_cluster(at);
        if len > self.geometry.cluster_size() - in_cluster {
            return None;
        }
        let (slice, index) = self.l2_place(at);
        let entry = self.l2.peek(slice, |words| words.get(index))?;
        match L2Entry::decode(entry, at, self.geometry) {
            Ok(L2Entry::Data { host, copied }) => Some((HostOffset(host.0 + in_cluster), copied)),
            _ => None,
        }
    }

    /// Looks up to `len` bytes from `at` up without suspending. Nothing where the entry is not in
    /// the cache.
    ///
    /// # Errors
    /// A damaged entry.
    pub(crate) fn lookup(&self, at: GuestOffset, len: u64) -> Result<Option<Extent>> {
        let (slice, index) = self.l2_place(at);
        if let Some(extent) = self
            .l2
            .peek(slice, |words| self.extent(words, index, at, len))
        {
            return extent.map(Some);
        }
        let index = self.geometry.l1_index(at) as u64;
        if L1Entry::decode(self.l1.get(index), index, self.geometry)?
            .host
            .is_none()
        {
            let coverage = self.geometry.l1_entry_coverage();
            let len = len.min(coverage - at.0 % coverage);
            return Ok(Some(Extent {
                what: Mapped::Unallocated,
                len,
            }));
        }
        Ok(None)
    }

    /// The extent from `at` on, as far as these entries tell.
    #[inline]
    fn extent(&self, words: Words<'_>, index: usize, at: GuestOffset, len: u64) -> Result<Extent> {
        let entry = |nth: usize| words.get(index + nth);
        let size = self.geometry.cluster_size();
        let in_cluster = self.geometry.offset_in_cluster(at);
        let first = self.mapped(entry(0), at)?;
        let mut known = size - in_cluster;
        let mut nth = 1;
        while known < len && index + nth < words.len() {
            let next_at = GuestOffset(at.0 + known);
            // An error in a later entry is an error of the request that reaches it.
            let Ok(next) = self.mapped(entry(nth), next_at) else {
                break;
            };
            let continues = match (first, next) {
                (
                    Mapped::Data { host, in_place },
                    Mapped::Data {
                        host: next_host,
                        in_place: next_in_place,
                    },
                ) => in_place == next_in_place && next_host.0 == host.0 + known,
                // Equal ones are of the same kind and in no place; each compressed cluster is on
                // its own.
                (Mapped::Compressed { .. }, _) => false,
                (first, next) => first == next,
            };
            if !continues {
                break;
            }
            known += size;
            nth += 1;
        }
        Ok(Extent {
            what: first,
            len: known.min(len),
        })
    }

    /// What one L2 entry says about the byte at `at`.
    #[inline]
    fn mapped(&self, entry: u64, at: GuestOffset) -> Result<Mapped> {
        Ok(match L2Entry::decode(entry, at, self.geometry)? {
            L2Entry::Unallocated => Mapped::Unallocated,
            L2Entry::Zero { .. } => Mapped::Zero,
            L2Entry::Data { host, copied } => {
                let host = HostOffset(host.0 + self.geometry.offset_in_cluster(at));
                Mapped::Data {
                    host,
                    in_place: copied || mutant!("shared clusters are written in place"),
                }
            }
            L2Entry::Compressed { host, len } => Mapped::Compressed { host, len },
        })
    }

    /// Where slice `slice` of the L2 tables lies in the file; nothing where no table is.
    fn l2_slice_host(&self, slice: u64) -> Result<Option<HostOffset>> {
        let index = slice / self.slices_per_table();
        let entry = L1Entry::decode(self.l1.get(index), index, self.geometry)?;
        let in_table = slice % self.slices_per_table() * self.l2.slice_bytes();
        Ok(entry.host.map(|table| HostOffset(table.0 + in_table)))
    }

    /// Brings the slice that maps `at` into the cache. Nothing where no L2 table is.
    ///
    /// # Errors
    /// I/O or a damaged L1 entry.
    pub(crate) fn pin_l2(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
    ) -> Result<Option<Pin<'_>>> {
        let (slice, _) = self.l2_place(at);
        self.pin_slice(co, graph, &self.l2, slice, || self.l2_slice_host(slice))
    }

    /// Brings the L2 entry of `at` into the cache, if there is one, to be looked at. Call it with
    /// nothing in flight: it suspends, and another look-up must follow.
    ///
    /// # Errors
    /// As [`Qcow2::pin_l2`].
    #[cold]
    pub(crate) fn load_l2(&self, co: &Co, graph: &GraphRead<'_>, at: GuestOffset) -> Result<()> {
        let (slice, _) = self.l2_place(at);
        let place = || self.l2_slice_host(slice);
        self.bring_slice(co, graph, &self.l2, slice, Use::Look, place)
            .map(drop)
    }

    /// Brings `slice` into `cache`; `place` tells where it is, and is asked anew after every wait.
    pub(crate) fn pin_slice<'c>(
        &'c self,
        co: &Co,
        graph: &GraphRead<'_>,
        cache: &'c SliceCache,
        slice: u64,
        place: impl Fn() -> Result<Option<HostOffset>>,
    ) -> Result<Option<Pin<'c>>> {
        self.bring_slice(co, graph, cache, slice, Use::Change, place)
    }

    /// The same; who only looks gets no pin.
    fn bring_slice<'c>(
        &'c self,
        co: &Co,
        graph: &GraphRead<'_>,
        cache: &'c SliceCache,
        slice: u64,
        what_for: Use,
        place: impl Fn() -> Result<Option<HostOffset>>,
    ) -> Result<Option<Pin<'c>>> {
        loop {
            if what_for == Use::Look && cache.holds(slice) {
                return Ok(None);
            }
            let Some(host) = place()? else {
                return Ok(None);
            };
            match cache.reserve(co, slice, host) {
                Reserved::Ready(pin) => return Ok(Some(pin)),
                Reserved::Again => {}
                Reserved::NeedsWriteBack => {
                    // The cache that is full must get room.
                    let counts = if std::ptr::eq(cache, &raw const *self.refcounts) {
                        Counts::Written
                    } else {
                        Counts::MayLag
                    };
                    self.write_back(co, graph, false, counts)?;
                }
                Reserved::Load(load) => {
                    let mut words = cache.take_buffer()?;
                    self.at(if std::ptr::eq(cache, &raw const *self.refcounts) {
                        coblock_block::Event::RefblockLoad
                    } else {
                        coblock_block::Event::L2Load
                    });
                    let into = IoVecMut::from(&mut words[..]);
                    self.file
                        .pread(co, graph, host.0, into, RequestFlags::empty())?;
                    let in_place = || place().is_ok_and(|now| now == Some(host));
                    let published = match what_for {
                        Use::Change => load.publish(&words, in_place),
                        Use::Look => {
                            load.publish_to_look(&words, in_place);
                            None
                        }
                    };
                    cache.give_buffer(words);
                    if let Some(pin) = published {
                        return Ok(Some(pin));
                    }
                }
            }
        }
    }

    /// The L2 table that maps `at`.
    ///
    /// # Errors
    /// A damaged L1 entry.
    pub(crate) fn l2_table_of(&self, at: GuestOffset) -> Result<Option<HostOffset>> {
        let index = self.geometry.l1_index(at) as u64;
        Ok(L1Entry::decode(self.l1.get(index), index, self.geometry)?.host)
    }

    /// Makes sure that there is an L2 table for `at` which belongs to the active mapping alone.
    ///
    /// # Errors
    /// I/O or a damaged image. The mapping is as before.
    pub(crate) fn own_l2_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        meta: &mut Meta,
        at: GuestOffset,
    ) -> Result<()> {
        let index = self.geometry.l1_index(at) as u64;
        let entry = L1Entry::decode(self.l1.get(index), index, self.geometry)?;
        let old = entry.host;
        if let Some(table) = old {
            self.assert_alone(co, graph, self.geometry.host_cluster(table))?;
            if entry.copied {
                return Ok(());
            }
        }
        self.assert_entry_alone(co, graph, &self.l1, index)?;
        let run = self.allocate(co, graph, meta, 1, true)?;
        if let Err(error) = self.fill_l2_table(co, graph, index, old, run) {
            self.give_up(co, graph, meta, run);
            return Err(error);
        }
        let new = L1Entry {
            host: Some(run.start),
            copied: true,
        }
        .encode();
        self.tables.insert(self.geometry.host_cluster(run.start));
        let slices = self.slices_per_table();
        self.l2.rehome(index * slices, slices, run.start, || {
            self.l1.set(index, new)
        });
        if let Some(old) = old {
            self.unmapped(self.geometry.host_cluster(old));
        }
        Ok(())
    }

    /// Completes a new table, empty or a copy of `old`, in the file, before an entry can lead there.
    /// (Hazard O5.)
    fn fill_l2_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        index: u64,
        old: Option<HostOffset>,
        run: Run,
    ) -> Result<()> {
        if self.lazy_refcounts {
            // Only counts of data stay behind, as in the reference: whoever looks at a dirty image
            // finds its tables counted.
            self.write_back(co, graph, false, Counts::Written)?;
        }
        match old {
            None if mutant!("a new table is published before it is written") => Ok(()),
            None => self.write_zero_cluster(co, graph, run),
            Some(old) => self.copy_l2_table(co, graph, index, old, run.start),
        }
    }

    /// Writes zeros over a cluster that becomes a table.
    fn write_zero_cluster(&self, co: &Co, graph: &GraphRead<'_>, run: Run) -> Result<()> {
        let size = self.geometry.cluster_size();
        // Past the old end of the file everything reads as zeros; a last piece makes the file reach
        // so far.
        let len = if run.fresh { size.min(4096) } else { size };
        let zeros = buffer(in_memory(len))?;
        self.at(coblock_block::Event::L2AllocWrite);
        let at = run.start.0 + size - len;
        self.file.pwrite(
            co,
            graph,
            at,
            IoVec::from(&zeros[..]),
            RequestFlags::empty(),
        )
    }

    /// Copies the table at `old`, which somebody else refers to as well, to `new`.
    fn copy_l2_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        index: u64,
        old: HostOffset,
        new: HostOffset,
    ) -> Result<()> {
        let mut table = buffer(self.geometry.cluster_len())?;
        let none = RequestFlags::empty();
        self.at(coblock_block::Event::L2AllocCowRead);
        self.file
            .pread(co, graph, old.0, IoVecMut::from(&mut table[..]), none)?;
        let slices = self.slices_per_table();
        for (nth, bytes) in table
            .chunks_exact_mut(in_memory(self.l2.slice_bytes()))
            .enumerate()
        {
            self.l2.overlay(index * slices + nth as u64, bytes);
        }
        self.at(coblock_block::Event::L2AllocWrite);
        self.file
            .pwrite(co, graph, new.0, IoVec::from(&table[..]), none)
    }
}
