//! The user's handle: what a device, an export or a tool sends its requests to.
//!
//! Each call takes the graph lock itself, checks bounds as a disk does, and is counted until it
//! returns (rule 5.7).

mod place;
mod root;
mod statistics;

pub use root::Device;
pub use statistics::REQUESTS;

use crate::accounting::IoKind;
use crate::drain::{Busy, Parent};
use crate::driver::Precision;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphAccess, GraphRead};
use crate::io::Status;
use crate::node::{Node, close_if_unused};
use crate::request_table::{RequestKind, RequestTable, Tracked};
use crate::throttle::ThrottleGroup;
use crate::types::{Preallocation, RequestFlags, bytes};
use coblock_aio::{AioContext, IoVec, IoVecMut};
use coblock_coroutine::{Co, mutant};
use root::Resuming;
pub(crate) use root::{Root, Stopping};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A user of a node. Requests may come from any context, any number at a time.
///
/// All calls suspend, and take the graph lock: a coroutine that holds a guard of its own must not
/// call them (rule 7.7).
pub struct BlockBackend {
    graph: Arc<Graph>,
    root: Arc<Root>,
    /// Set when the handle has given up its node.
    detached: AtomicBool,
}

impl BlockBackend {
    /// The node that is used now; a change of the graph may put another one there.
    pub fn node(&self) -> Arc<Node> {
        self.root.end.now()
    }

    /// The node that a request goes to.
    #[inline(always)]
    pub(crate) fn node_in<'g>(&'g self, graph: &'g impl GraphAccess) -> &'g Arc<Node> {
        self.root.end.get(graph)
    }

    /// The graph that the node is in.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    pub(crate) fn as_parent(&self) -> Arc<dyn Parent> {
        self.root.clone()
    }

    pub(crate) fn root(&self) -> &Arc<Root> {
        &self.root
    }

    pub(crate) fn requests(&self) -> &RequestTable {
        &self.root.requests
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.node().len()
    }

    /// Is it zero bytes long?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Are writes refused?
    pub fn is_read_only(&self) -> bool {
        self.node().is_read_only()
    }

    /// How many requests of this user are in flight (rule 5.7).
    pub fn in_flight(&self) -> usize {
        self.root.requests.in_flight()
    }

    /// Outside of coroutines: polls until no request of this user is in flight, callbacks included
    /// (rules 3.8, 5.7). Its requests run in `context`, or anywhere if the caller drives the main
    /// context.
    ///
    /// # Panics
    /// In a coroutine; when the caller drives neither of the two contexts.
    #[track_caller]
    pub fn wait_idle(&self, context: &Arc<AioContext>) {
        self.root
            .requests
            .wait_idle_outside(self.graph.wait(), context);
    }

    /// Reads into `buf` from `offset`.
    ///
    /// # Errors
    /// `OutOfBounds` (errno `EIO`) past the end, `Closed`, else what the driver returned. Anything
    /// may be in `buf` then.
    #[inline]
    pub fn pread<'b>(&self, co: &Co, offset: u64, buf: impl Into<IoVecMut<'b>>) -> Result<()> {
        let buf = buf.into();
        let len = bytes(buf.len());
        self.request(co, IoKind::Read, (offset, len), |graph| {
            self.node_in(graph)
                .pread(co, graph, offset, buf, RequestFlags::empty())
        })
    }

    /// Writes `buf` at `offset`; with [`RequestFlags::FUA`] the data is on stable storage
    /// afterwards.
    ///
    /// # Errors
    /// `OutOfBounds` (errno `EIO`) past the end, `ReadOnly` (errno `EPERM`) also where the backend does
    /// not hold [`Perm::WRITE`](crate::Perm::WRITE), `Closed`, else what the driver returned. After an
    /// error any part of the range may hold old or new data; nothing outside it has changed.
    #[inline]
    pub fn pwrite<'b>(
        &self,
        co: &Co,
        offset: u64,
        buf: impl Into<IoVec<'b>>,
        flags: RequestFlags,
    ) -> Result<()> {
        let buf = buf.into();
        let len = bytes(buf.len());
        self.request(co, IoKind::Write, (offset, len), |graph| {
            self.node_in(graph).pwrite(co, graph, offset, buf, flags)
        })
    }

    /// Write, then flush (rule 2.2): one operation, in that order. It orders nothing that came
    /// before, unless that was flushed already.
    ///
    /// # Errors
    /// As [`BlockBackend::pwrite`] and [`BlockBackend::flush`].
    pub fn pwrite_sync<'b>(&self, co: &Co, offset: u64, buf: impl Into<IoVec<'b>>) -> Result<()> {
        let buf = buf.into();
        let len = bytes(buf.len());
        self.request(co, IoKind::Write, (offset, len), |graph| {
            let node = self.node_in(graph);
            node.pwrite(co, graph, offset, buf, RequestFlags::empty())?;
            node.flush(co, graph)
        })
    }

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// As [`BlockBackend::pwrite`]; `NotSupported` with [`RequestFlags::NO_FALLBACK`].
    pub fn pwrite_zeroes(&self, co: &Co, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        self.request(co, IoKind::Zero, (offset, len), |graph| {
            self.node_in(graph)
                .pwrite_zeroes(co, graph, offset, len, flags)
        })
    }

    /// Gives the storage of the range back; does nothing unless the node was opened with
    /// `discard=unmap`.
    ///
    /// # Errors
    /// As [`BlockBackend::pwrite`].
    pub fn pdiscard(&self, co: &Co, offset: u64, len: u64) -> Result<()> {
        self.request(co, IoKind::Discard, (offset, len), |graph| {
            self.node_in(graph).pdiscard(co, graph, offset, len)
        })
    }

    /// Copies `len` bytes from `offset` to `to_offset` of `to`. Where both stand on different files
    /// of the host, it copies or shares them itself; zeros stay zeros and need no storage; all else
    /// is read and written.
    ///
    /// # Errors
    /// `OutOfBounds` (errno `EIO`) past either end, `Invalid` where ranges of one node overlap or
    /// the two are in different graphs, else as [`BlockBackend::pread`] and
    /// [`BlockBackend::pwrite`]. After an error any part of the target may hold old or new data.
    pub fn copy_range(
        &self,
        co: &Co,
        offset: u64,
        to: &BlockBackend,
        to_offset: u64,
        len: u64,
    ) -> Result<()> {
        let began_ns = co.entered_ns();
        let both = self.admit_both(co, (offset, len), (to, to_offset))?;
        self.count_copy(co, (offset, len), began_ns, (&both.source, to), |graph| {
            self.copy_range_admitted(co, graph, offset, (to, to_offset), len)
        })
    }

    /// The same for a request that was admitted, and its own range checked.
    pub(crate) fn copy_range_admitted(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        (to, to_offset): (&BlockBackend, u64),
        len: u64,
    ) -> Result<()> {
        to.check_range(graph, to.root.requests.is_closed(), to_offset, len)?;
        to.check_writes(graph, RequestKind::Write)?;
        self.node_in(graph)
            .copy_range(co, graph, offset, (to.node_in(graph), to_offset), len)
    }

    /// Everything that completed before is on stable storage when this returns. Nothing to do on a
    /// read-only node.
    ///
    /// # Errors
    /// What the driver returned; `Poisoned` from then on; `Closed`.
    pub fn flush(&self, co: &Co) -> Result<()> {
        self.request(co, IoKind::Flush, (0, 0), |graph| {
            self.node_in(graph).flush(co, graph)
        })
    }

    /// Makes the node `len` bytes long; what is added reads as zeros. With `exact` unset it may end
    /// up longer.
    ///
    /// # Errors
    /// `Invalid` for 2^63 and more, `ReadOnly` (errno `EACCES`), `NotSupported`, `Closed`, else
    /// what the driver returned.
    pub fn truncate(&self, co: &Co, len: u64, exact: bool) -> Result<()> {
        self.other(co, RequestKind::Truncate, |graph| {
            self.node_in(graph).truncate(co, graph, len, exact)
        })
    }

    /// Makes the node `len` bytes long and takes the space for what is added at once, as
    /// `preallocation` says; [`Preallocation::Off`] is a truncation to exactly this length.
    ///
    /// # Errors
    /// As [`BlockBackend::truncate`]; `Invalid` where the node would become shorter, `NotSupported`
    /// for a way that the driver does not have.
    pub fn grow_preallocated(&self, co: &Co, len: u64, preallocation: Preallocation) -> Result<()> {
        self.other(co, RequestKind::Truncate, |graph| {
            self.node_in(graph)
                .grow_preallocated(co, graph, len, preallocation)
        })
    }

    /// What the first bytes of the range are, as the backend's own layer holds them; filters pass
    /// the question on. Neither data nor zeros: the backing file decides.
    ///
    /// The answer is about at least one byte, or it is about none: the range is empty or past the
    /// end. It was true at some time during the call, so look again before acting on it, or keep
    /// writers away.
    ///
    /// # Errors
    /// `Closed`, else what a driver returned.
    pub fn block_status(&self, co: &Co, offset: u64, len: u64) -> Result<Status> {
        self.question(co, |graph| {
            self.node_in(graph).block_status(co, graph, (offset, len))
        })
    }

    /// The same of the layer that decides what is read, with how deep in the chain it is. Where no
    /// layer holds the range it is the first one that knows that it reads as zeros, and not
    /// allocated.
    ///
    /// # Errors
    /// As [`BlockBackend::block_status`].
    pub fn map(&self, co: &Co, offset: u64, len: u64) -> Result<Status> {
        self.question(co, |graph| {
            self.node_in(graph).map(co, graph, (offset, len))
        })
    }

    /// The status of the first bytes of the range in the first layer that holds them, from this one
    /// down to `base`, which is not asked; without a base down the whole chain. Not allocated: no
    /// layer above `base` holds them. A layer that ends inside the range holds zeros past its end.
    ///
    /// # Errors
    /// As [`BlockBackend::block_status`].
    pub fn block_status_above(
        &self,
        co: &Co,
        base: Option<&Arc<Node>>,
        offset: u64,
        len: u64,
    ) -> Result<Status> {
        self.above(co, base, (offset, len), Precision::Zeroes)
    }

    /// Does the backend's own layer hold the first bytes of the range, and of how many is that
    /// true? Not of any for an empty range and past the end. Cheaper than the status: nobody looks
    /// for zeros.
    ///
    /// # Errors
    /// As [`BlockBackend::block_status`].
    pub fn is_allocated(&self, co: &Co, offset: u64, len: u64) -> Result<(bool, u64)> {
        let status = self.question(co, |graph| {
            self.node_in(graph).is_allocated(co, graph, (offset, len))
        })?;
        Ok((status.allocated, status.len))
    }

    /// Does any layer above `base` hold the first bytes of the range, and of how many is that true?
    ///
    /// # Errors
    /// As [`BlockBackend::block_status`].
    pub fn is_allocated_above(
        &self,
        co: &Co,
        base: Option<&Arc<Node>>,
        offset: u64,
        len: u64,
    ) -> Result<(bool, u64)> {
        let status = self.above(co, base, (offset, len), Precision::Allocation)?;
        Ok((status.allocated, status.len))
    }

    fn above(
        &self,
        co: &Co,
        base: Option<&Arc<Node>>,
        range: (u64, u64),
        precision: Precision,
    ) -> Result<Status> {
        self.question(co, |graph| {
            self.node_in(graph)
                .block_status_above(co, graph, base, range, precision)
        })
    }

    /// How many bytes of storage the node takes up, holes left out.
    ///
    /// # Errors
    /// `NotSupported` where nobody knows.
    pub fn allocated_bytes(&self, co: &Co) -> Result<u64> {
        self.question(co, |graph| self.node_in(graph).allocated_bytes(co, graph))
    }

    /// What is about no bytes, so that there is nothing to check.
    fn question<R>(&self, co: &Co, f: impl FnOnce(&GraphRead<'_>) -> Result<R>) -> Result<R> {
        let admitted = self.admit(co, (0, 0), RequestKind::Other)?;
        if admitted.closed {
            return Err(self.refused(&admitted.graph, true, 0, 0));
        }
        f(&admitted.graph)
    }

    /// What is in no statistics.
    fn other(
        &self,
        co: &Co,
        kind: RequestKind,
        f: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> Result<()> {
        let admitted = self.admit(co, (0, 0), kind)?;
        self.check(&admitted, 0, 0)?;
        self.check_writes(&admitted.graph, kind)?;
        f(&admitted.graph)
    }

    /// Takes the graph lock and counts a request in flight; where a drained section holds requests
    /// back, after that (rule 5.5).
    #[inline(always)]
    #[track_caller]
    pub(crate) fn admit<'a>(
        &'a self,
        co: &'a Co,
        range: (u64, u64),
        kind: RequestKind,
    ) -> Result<Admitted<'a>> {
        self.admit_with(co, range, kind, true)
    }

    /// The same; a request that has waited for the limits of this user before does not wait again.
    #[inline(always)]
    #[track_caller]
    fn admit_with<'a>(
        &'a self,
        co: &'a Co,
        range: (u64, u64),
        kind: RequestKind,
        keeps_to_limits: bool,
    ) -> Result<Admitted<'a>> {
        let graph = self.graph.try_read(co)?;
        let requests = &self.root.requests;
        let request = requests.begin(graph.slot(), range.0, range.1, kind);
        if requests.is_plain() {
            return Ok(Admitted {
                request,
                graph,
                closed: false,
            });
        }
        drop(request);
        drop(graph);
        self.admit_slow(co, range, kind, keeps_to_limits)
    }

    #[cold]
    #[inline(never)]
    #[track_caller]
    fn admit_slow<'a>(
        &'a self,
        co: &'a Co,
        (offset, len): (u64, u64),
        kind: RequestKind,
        keeps_to_limits: bool,
    ) -> Result<Admitted<'a>> {
        let requests = &self.root.requests;
        let mut resuming: Option<Resuming<'_>> = None;
        let (request, graph) = loop {
            let graph = self.graph.try_read(co)?;
            let request = requests.begin(graph.slot(), offset, len, kind);
            // Who was held back goes on, counted, even if the next section has begun by now.
            if resuming.is_some() || !self.root.must_queue() {
                break (request, graph);
            }
            // No more in flight, and no reader: the section may change the graph.
            let _kept = mutant!("a request that is held back is in flight").then_some(request);
            drop(graph);
            resuming = self.root.wait_as_request(co);
        };
        drop(resuming);
        let fits = self.check_range(&graph, requests.is_closed(), offset, len);
        if keeps_to_limits && fits.is_ok() {
            self.root.throttle(co, kind, len);
        }
        Ok(Admitted {
            request,
            graph,
            closed: requests.is_closed(),
        })
    }

    /// Admits a request here and one on `to`, both or none. While it is held back at either end it
    /// is not in flight at the other: sections of the two may wait for each other's ends otherwise. For
    /// the same reason it waits for the limits of `to` before it is in flight anywhere; a section of this
    /// backend lifts only its own. It waits for limits once, however often it is held back.
    ///
    /// # Errors
    /// `Invalid` where the two are in different graphs: a guard of the one proves nothing of the other.
    #[track_caller]
    pub(crate) fn admit_both<'a>(
        &'a self,
        co: &'a Co,
        range: (u64, u64),
        (to, to_offset): (&'a BlockBackend, u64),
    ) -> Result<AdmittedBoth<'a>> {
        if !Arc::ptr_eq(&self.graph, &to.graph) {
            let message = "The two ends of a copy are in different graphs";
            return Err(self.node().locate(Error::new(ErrorKind::Invalid, message)));
        }
        let mut has_waited = false;
        loop {
            to.root.wait_until_open(co);
            if !has_waited {
                to.wait_for_limits(co, (to_offset, range.1))?;
            }
            let source = self.admit_with(co, range, RequestKind::Read, !has_waited)?;
            has_waited = true;
            let slot = source.graph.slot();
            let target = to
                .requests()
                .begin(slot, to_offset, range.1, RequestKind::Write);
            if to.requests().is_plain() || !to.root.must_queue() {
                return Ok(AdmittedBoth { target, source });
            }
        }
    }

    /// A write that is in flight nowhere waits as long as the limits say.
    #[track_caller]
    fn wait_for_limits(&self, co: &Co, (offset, len): (u64, u64)) -> Result<()> {
        if self.requests().is_plain() {
            return Ok(());
        }
        let graph = self.graph.try_read(co)?;
        let fits = self.check_range(&graph, self.requests().is_closed(), offset, len);
        drop(graph);
        if fits.is_ok() {
            self.root.throttle(co, RequestKind::Write, len);
        }
        Ok(())
    }

    /// What a disk checks: is it there, and does it have these bytes?
    #[inline]
    pub(crate) fn check(&self, admitted: &Admitted<'_>, offset: u64, len: u64) -> Result<()> {
        self.check_range(&admitted.graph, admitted.closed, offset, len)
    }

    #[inline]
    fn check_range(
        &self,
        graph: &GraphRead<'_>,
        closed: bool,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let size = self.node_in(graph).len();
        if !closed && offset <= size && len <= size - offset {
            return Ok(());
        }
        Err(self.refused(graph, closed, offset, len))
    }

    /// Who does not hold the permission to write has no lock for it either: a request that changes
    /// something is refused.
    #[inline(always)]
    pub(crate) fn check_writes(&self, graph: &GraphRead<'_>, kind: RequestKind) -> Result<()> {
        if !kind.changes() || self.root.end.writes() {
            return Ok(());
        }
        self.refuse_write(graph)
    }

    #[cold]
    fn refuse_write(&self, graph: &GraphRead<'_>) -> Result<()> {
        let node = self.node_in(graph);
        if node.is_read_only() {
            // In its own words.
            return Ok(());
        }
        let message = "The block backend does not hold the permission 'write'";
        Err(node.locate(Error::new(ErrorKind::ReadOnly, message)))
    }

    #[cold]
    fn refused(&self, graph: &GraphRead<'_>, closed: bool, offset: u64, len: u64) -> Error {
        let node = self.node_in(graph);
        if closed {
            return node.locate(Error::new(ErrorKind::Closed, "The block backend is closed"));
        }
        let message = format!(
            "{len} bytes are not inside a device of {} bytes",
            node.len()
        );
        node.locate(Error::new(ErrorKind::OutOfBounds, message).at_offset(offset))
    }

    /// Refuses new requests, waits until none is in flight, and gives up the node; its last user
    /// closes it: flush, then the driver, then what only it used (rule 5.7).
    ///
    /// # Errors
    /// The first failure to write something out; everything is closed all the same. A second close
    /// does nothing.
    pub fn close(&self, co: &Co) -> Result<()> {
        self.root.requests.close();
        // Who is held back finds it closed, and nobody waits for limits any more.
        self.root.open();
        self.root.set_throttle(None);
        self.root.requests.wait_idle(co);
        match self.detach() {
            Some(node) => close_if_unused(co, &self.graph, node),
            None => Ok(()),
        }
    }

    /// The node, if it has no user any more.
    fn detach(&self) -> Option<Arc<Node>> {
        if self.detached.swap(true, Ordering::AcqRel) {
            return None;
        }
        let root = &*self.root;
        self.graph.add_without_node(&self.root);
        root.end.leave(root, |section| root.let_go(section))
    }
}

/// Drained sections, seen from the user.
impl BlockBackend {
    /// What is told of drained sections; replaces what was set before.
    pub fn set_device(&self, device: Option<Arc<dyn Device>>) {
        self.root.set_device(device);
    }

    /// Are requests held back in drained sections, as they are unless told otherwise? Off for a user
    /// that would block its own pausing: it sends nothing in a section by itself (rule 5.6). Turning
    /// it off lets those go on that wait.
    pub fn set_request_queueing(&self, on: bool) {
        self.root.set_queueing(on);
    }

    /// Reads, writes, zeroes and discards keep to the limits of `group` from now on, or to none. Those
    /// that wait for limits that were set before go on. In drained sections there are none.
    pub fn set_throttle(&self, group: Option<&Arc<ThrottleGroup>>) {
        self.root.set_throttle(group);
    }

    /// How many requests wait for a drained section to end.
    pub fn queued(&self) -> usize {
        self.root.queued()
    }

    /// Does a drained section hold requests back?
    pub fn is_quiesced(&self) -> bool {
        self.root.is_quiesced()
    }

    /// Begins an operation made of several requests. A section of this backend waits until it has
    /// ended; one of its node does not, and holds its next request back (rule 5.6).
    #[must_use = "it ends when this is dropped"]
    pub fn operation(&self) -> Operation<'_> {
        self.root.operation_begins();
        Operation(&self.root)
    }

    pub(crate) fn operations(&self) -> u32 {
        self.root.operations()
    }

    /// The device is not busy any more ([`Device::drained_poll`]): sections look again. Any thread,
    /// also in callbacks of the device.
    pub fn kick(&self) {
        self.graph.wake_outside(self.root.requests.take_kicked());
    }
}

/// An operation made of several requests, until it is dropped.
pub struct Operation<'a>(&'a Root);

impl fmt::Debug for Operation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Operation of {}", self.0.describe())
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.0.operation_ends();
    }
}

/// A request that may go on: counted in flight, and with the edges kept.
pub(crate) struct Admitted<'a> {
    /// Ends first.
    request: Tracked<'a>,
    pub(crate) graph: GraphRead<'a>,
    /// The backend is closed: fails.
    closed: bool,
}

impl<'a> Admitted<'a> {
    /// Lets the edges go; the request stays in flight.
    pub(crate) fn into_request(self) -> Tracked<'a> {
        self.request
    }
}

/// The same of a request between two backends.
pub(crate) struct AdmittedBoth<'a> {
    pub(crate) target: Tracked<'a>,
    pub(crate) source: Admitted<'a>,
}

impl Drop for BlockBackend {
    /// Without [`BlockBackend::close`] nothing is written out: a destructor does no I/O.
    fn drop(&mut self) {
        if let Some(node) = self.detach()
            && !node.is_read_only()
        {
            log::warn!("{node:?} was dropped without close: what it held back is lost");
        }
    }
}

impl fmt::Debug for BlockBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockBackend")
            .field("node", &self.node())
            .field("requests", &self.root.requests)
            .finish_non_exhaustive()
    }
}

const _: () = {
    const fn send_sync<T: Send + Sync>() {}
    send_sync::<BlockBackend>();
};
