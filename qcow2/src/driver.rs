//! qcow2 as a driver of the block layer: read, write, zero, discard, flush, close.
//!
//! ```text
//!   pread   lookup: one cluster that is there (no lock)  -> child file
//!           anything else, extent by extent             -> child file | backing file | zeros
//!   pwrite  lookup: one cluster of our own              -> child file in place
//!           anything else, extent by extent             -> cow.rs, under the metadata mutex
//!   flush   writeback.rs
//! ```
//!
//! This is the only file with both plain offsets, as the block layer has them, and ours with their
//! types.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use coblock_aio::{AlignedBuf, IoVec, IoVecMut};
use coblock_block::types::in_memory;
use coblock_block::{
    Changes, Child, ChildRole, Copied, CopySource, CopyTarget, Driver, DriverStatus, GraphRead,
    Limits, Preallocation, Precision, RequestFlags, RequestKind, Result,
};
use coblock_coroutine::Co;

use crate::compress::inflate;
use crate::error::Error;
use crate::header_bits::Found;
use crate::image::{Qcow2, buffer};
use crate::mapping::{Extent, Mapped};
use crate::types::{GuestOffset, HostCluster, HostOffset};
use crate::writeback::Counts;
use crate::zero::Empty;

impl Qcow2 {
    /// Before guest data goes to `host` in place: refuses if a table is there. (Hazard O14.)
    #[inline]
    pub(crate) fn check_no_table(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        host: HostOffset,
        len: u64,
    ) -> Result<()> {
        let first = self.geometry.host_cluster(host).0;
        let last = self.geometry.host_cluster(HostOffset(host.0 + len - 1)).0;
        for cluster in first..=last {
            if let Some(table) = self.protected_at(HostCluster(cluster)) {
                let host = self.geometry.host_start(HostCluster(cluster));
                return Err(self.signal_corruption(co, graph, Error::DataInTable { table, host }));
            }
        }
        Ok(())
    }

    /// Is there a backing file?
    pub(crate) fn has_backing(&self) -> bool {
        self.backing.get().is_some()
    }

    /// Reads from the backing file; zeros where there is none, or past its end.
    pub(crate) fn read_backing(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        mut into: IoVecMut<'_>,
    ) -> Result<()> {
        match self.backing.get() {
            Some(backing) => {
                self.at(coblock_block::Event::ReadBackingAio);
                backing.pread(co, graph, at.0, into, RequestFlags::empty())
            }
            None => {
                let len = into.len();
                into.fill(0, len, 0);
                Ok(())
            }
        }
    }

    /// The usual read: of one cluster that is there, whose entry is cached. `None`: it is not, and
    /// nothing was done.
    ///
    /// Straight code without a loop: what lies on a coroutine's stack while it waits is fetched
    /// into the cache again afterwards.
    #[inline(always)]
    fn read_in_place(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        into: &mut IoVecMut<'_>,
    ) -> Option<Result<()>> {
        let slot = graph.slot();
        let in_flight = self.in_flight.begin_unknown(slot, RequestKind::Other);
        // Whoever frees a cluster sees us from here on, or we see it unmapped: `begin_unknown` ends
        // with the light fence that pairs with the heavy one of `lower_durable`.
        let (host, _) = self.lookup_data(at, into.len() as u64)?;
        in_flight.set_range(host.0, into.len() as u64);
        let none = RequestFlags::empty();
        Some(self.file.pread(co, graph, host.0, into.reborrow(), none))
    }

    /// The usual write: to one cluster that is there, whose entry is cached, and that nobody else
    /// refers to. `None`: it is not, and nothing was done.
    #[inline(always)]
    fn write_in_place(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        data: IoVec<'_>,
    ) -> Option<Result<()>> {
        let slot = graph.slot();
        let in_flight = self.in_flight.begin_unknown(slot, RequestKind::Other);
        let (host, true) = self.lookup_data(at, data.len() as u64)? else {
            return None;
        };
        in_flight.set_range(host.0, data.len() as u64);
        if self.tables.may_contain(self.geometry.host_cluster(host)) {
            return None;
        }
        let none = RequestFlags::empty();
        Some(self.file.pwrite(co, graph, host.0, data, none))
    }

    #[inline(never)]
    fn read_in_parts(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        mut at: GuestOffset,
        mut buf: IoVecMut<'_>,
    ) -> Result<()> {
        loop {
            let done = match self.read_extent(co, graph, at, buf.reborrow()) {
                Ok(done) => done,
                Err(error) => return Err(self.notice(co, graph, error, Found::ByRead)),
            };
            if done == buf.len() {
                return Ok(());
            }
            buf = buf.skip(done);
            at.0 += done as u64;
        }
    }

    #[inline(never)]
    fn write_in_parts(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        mut at: GuestOffset,
        mut data: IoVec<'_>,
    ) -> Result<()> {
        loop {
            let done = match self.write_extent(co, graph, at, data) {
                Ok(done) => done,
                Err(error) => return Err(self.notice(co, graph, error, Found::ByWrite)),
            };
            if done == data.len() {
                return Ok(());
            }
            data = data.slice(done, data.len() - done);
            at.0 += done as u64;
        }
    }

    /// Reads a first part of the range; returns how much.
    #[inline]
    fn read_extent(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        mut into: IoVecMut<'_>,
    ) -> Result<usize> {
        loop {
            let in_flight = self
                .in_flight
                .begin_unknown(graph.slot(), RequestKind::Other);
            // As in `read_in_place`.
            let Some(Extent { what, len }) = self.lookup(at, into.len() as u64)? else {
                drop(in_flight);
                self.load_l2(co, graph, at)?;
                continue;
            };
            let len = in_memory(len);
            match what {
                Mapped::Data { host, .. } => {
                    in_flight.set_range(host.0, len as u64);
                    self.at(coblock_block::Event::ReadAio);
                    let into = into.slice(0, len);
                    self.file
                        .pread(co, graph, host.0, into, RequestFlags::empty())?;
                }
                Mapped::Zero => into.fill(0, len, 0),
                Mapped::Unallocated => {
                    drop(in_flight);
                    self.read_backing(co, graph, at, into.slice(0, len))?;
                }
                Mapped::Compressed { host, len: packed } => {
                    in_flight.set_range(host.0, packed);
                    let cluster = self.read_compressed(co, graph, host, packed)?;
                    let from = in_memory(self.geometry.offset_in_cluster(at));
                    into.copy_from(0, &cluster[from..from + len]);
                }
            }
            return Ok(len);
        }
    }

    /// Reads the cluster that `len` bytes at `host` inflate to, on a thread of the pool.
    pub(crate) fn read_compressed(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        host: HostOffset,
        len: u64,
    ) -> Result<AlignedBuf> {
        // The descriptor counts sectors; the file may end in the last one.
        let len = len.min(self.file.len(graph).saturating_sub(host.0));
        self.at(coblock_block::Event::ReadCompressed);
        let mut packed = buffer(in_memory(len))?;
        let none = RequestFlags::empty();
        self.file
            .pread(co, graph, host.0, IoVecMut::from(&mut packed[..]), none)?;
        let mut cluster = buffer(self.geometry.cluster_len())?;
        let kind = self.header.compression;
        coblock_aio::co::on_pool(co, || inflate(kind, &packed, &mut cluster))
            .map_err(|why| Error::CompressedData { host, why })?;
        self.counters.clusters_inflated.fetch_add(1, Relaxed);
        Ok(cluster)
    }

    /// Writes a first part of the range; returns how much.
    #[inline]
    pub(crate) fn write_extent(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        data: IoVec<'_>,
    ) -> Result<usize> {
        loop {
            let in_flight = self
                .in_flight
                .begin_unknown(graph.slot(), RequestKind::Other);
            let Some(Extent { what, len }) = self.lookup(at, data.len() as u64)? else {
                drop(in_flight);
                self.load_l2(co, graph, at)?;
                continue;
            };
            if let Mapped::Data {
                host,
                in_place: true,
            } = what
            {
                in_flight.set_range(host.0, len);
                self.check_no_table(co, graph, host, len)?;
                self.at(coblock_block::Event::WriteAio);
                let data = data.slice(0, in_memory(len));
                self.file
                    .pwrite(co, graph, host.0, data, RequestFlags::empty())?;
                return Ok(in_memory(len));
            }
            drop(in_flight);
            match self.write_allocating(co, graph, at, data)? {
                0 => {}
                written => return Ok(in_memory(written)),
            }
        }
    }
}

impl Driver for Qcow2 {
    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn len(&self) -> u64 {
        self.size.load(Acquire)
    }

    fn limits(&self) -> Limits {
        let cluster = self.geometry.cluster_size();
        Limits {
            zero_alignment: cluster,
            discard_alignment: cluster,
            ..Limits::default()
        }
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let _turn = self.turn(co);
        self.check_readable()?;
        match self.read_in_place(co, graph, GuestOffset(offset), &mut buf) {
            Some(done) => done,
            None => self.read_in_parts(co, graph, GuestOffset(offset), buf),
        }
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let _turn = self.turn(co);
        self.check_intact()?;
        match self.write_in_place(co, graph, GuestOffset(offset), buf) {
            Some(done) => done,
            None => self.write_in_parts(co, graph, GuestOffset(offset), buf),
        }
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let _turn = self.turn(co);
        self.empty_clusters(co, graph, GuestOffset(offset), len, Empty::asked(flags))
            .map_err(|error| self.notice(co, graph, error, Found::Otherwise))
    }

    fn pwrite_zeroes_within_block(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let _turn = self.turn(co);
        self.empty_part(co, graph, GuestOffset(offset), len, Empty::asked(flags))
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        let _turn = self.turn(co);
        self.empty_clusters(co, graph, GuestOffset(offset), len, Empty::Discard)
            .map_err(|error| self.notice(co, graph, error, Found::Otherwise))
    }

    fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        let _turn = self.turn(co);
        self.check_readable()?;
        self.copy_extent_from(co, graph, GuestOffset(offset), len, to)
    }

    fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        // Waiting for a turn could be waiting for who waits for the source.
        let _turn = match self.try_turn(co) {
            Some(turn) => turn,
            None => return Ok(0),
        };
        self.check_intact()?;
        self.copy_extent_to(co, graph, GuestOffset(offset), source)
    }

    fn block_status<'g>(
        &'g self,
        co: &Co,
        graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        self.check_readable()?;
        self.status(co, graph, GuestOffset(offset), len, precision)
            .map_err(|error| self.notice(co, graph, error, Found::ByRead))
    }

    fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        self.file.allocated_bytes(co, graph)
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let _turn = self.turn(co);
        self.save(co, graph, Counts::MayLag)
            .map_err(|error| self.notice(co, graph, error, Found::Otherwise))
    }

    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, _exact: bool) -> Result<()> {
        let _turn = self.turn(co);
        self.resize(co, graph, len, Preallocation::Off)
    }

    fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let _turn = self.turn(co);
        self.resize(co, graph, len, preallocation)
    }

    fn attach(&self, role: ChildRole, child: Arc<Child>) -> Result<()> {
        assert_eq!(role, ChildRole::Backing, "no other file is asked for");
        assert!(
            self.backing.set(child).is_ok(),
            "a backing file is attached once"
        );
        Ok(())
    }

    fn is_format(&self) -> bool {
        true
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn close(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        if let Some(cleaner) = &self.cleaner {
            cleaner.stop();
        }
        self.write_out(co, graph)
    }

    fn reopen_prepare(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        to: &mut Changes<'_>,
    ) -> Result<Option<Box<dyn Driver>>> {
        Ok(Some(Box::new(self.successor(co, graph, to)?)))
    }

    fn reopen_abort(&self, co: &Co) {
        self.replaced(co);
    }

    /// What it has to write of its own, now that its file is writable.
    fn reopen_clean(&self, co: &Co, graph: &GraphRead<'_>) {
        if let Err(error) = self.clear_autoclear(co, graph) {
            self.take_no_more_changes(&format!("a header update failed: {error}"));
        }
    }

    fn replaced(&self, _co: &Co) {
        if let Some(cleaner) = &self.cleaner {
            cleaner.stop();
        }
    }

    fn supports_backing(&self) -> bool {
        true
    }
}

impl Qcow2 {
    /// Writes everything back durably, then lowers the counts of what that made free.
    pub(crate) fn save(&self, co: &Co, graph: &GraphRead<'_>, counts: Counts) -> Result<()> {
        self.write_back(co, graph, true, counts)?;
        if !self.frees.lock().durable.is_empty() {
            let mut meta = self.meta.lock(co);
            self.lower_durable(co, graph, &mut meta)?;
        }
        self.punch_holes(co, graph)
    }

    /// Brings the file to where an image that is closed has it.
    pub(crate) fn write_out(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        // Freed clusters lose their counts after the first pass, and the second one writes that.
        while self.has_freed() || self.is_dirty() {
            self.save(co, graph, Counts::Written)?;
        }
        if self.check_intact().is_ok() {
            self.mark_clean(co, graph)?;
        }
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        self.l1.has_dirty()
            || self.l2.has_dirty()
            || self.refcount_table.has_dirty()
            || self.refcounts.has_dirty()
    }
}
