//! The user's handle: what a device, an export or a tool sends its requests to.
//!
//! Each call takes the graph lock itself, checks bounds as a disk does, and is counted until it
//! returns (rule 5.7).

use crate::driver::Precision;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphRead};
use crate::io::Status;
use crate::node::{Node, close_unused};
use crate::request_table::{RequestKind, RequestTable};
use crate::types::{RequestFlags, bytes};
use coblock_aio::{AioContext, IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A user of a node. Requests may come from any context, any number at a time.
///
/// All calls suspend, and take the graph lock: a coroutine that holds a guard of its own must not
/// call them (rule 7.7).
pub struct BlockBackend {
    graph: Arc<Graph>,
    node: Arc<Node>,
    requests: RequestTable,
    /// Set when the handle has given up its node.
    detached: AtomicBool,
}

impl BlockBackend {
    /// A user of `node`. Give it back by [`BlockBackend::close`].
    pub fn new(graph: &Arc<Graph>, node: Arc<Node>) -> BlockBackend {
        node.add_user();
        BlockBackend {
            graph: graph.clone(),
            node,
            requests: RequestTable::new(),
            detached: AtomicBool::new(false),
        }
    }

    /// The node that is used.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The graph that the node is in.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    pub(crate) fn requests(&self) -> &RequestTable {
        &self.requests
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.node.len()
    }

    /// Is it zero bytes long?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Are writes refused?
    pub fn is_read_only(&self) -> bool {
        self.node.is_read_only()
    }

    /// How many requests of this user are in flight (rule 5.7).
    pub fn in_flight(&self) -> usize {
        self.requests.in_flight()
    }

    /// Outside of coroutines: polls until no request of this user is in flight, callbacks included
    /// (rules 3.8, 5.7). Its requests run in `context`, or anywhere if the caller drives the main
    /// context.
    ///
    /// # Panics
    /// In a coroutine; when the caller drives neither of the two contexts.
    #[track_caller]
    pub fn wait_idle(&self, context: &Arc<AioContext>) {
        self.requests.wait_idle_outside(self.graph.wait(), context);
    }

    /// Reads into `buf` from `offset`.
    ///
    /// # Errors
    /// `OutOfBounds` (errno `EIO`) past the end, `Closed`, else what the driver returned. Anything
    /// may be in `buf` then.
    #[inline]
    pub fn pread<'b>(&self, co: &Co, offset: u64, buf: impl Into<IoVecMut<'b>>) -> Result<()> {
        let buf = buf.into();
        let graph = self.graph.try_read(co)?;
        let len = bytes(buf.len());
        let _request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Read);
        self.check(offset, len)?;
        self.node
            .pread(co, &graph, offset, buf, RequestFlags::empty())
    }

    /// Writes `buf` at `offset`; with [`RequestFlags::FUA`] the data is on stable storage
    /// afterwards.
    ///
    /// # Errors
    /// `OutOfBounds` (errno `EIO`) past the end, `ReadOnly` (errno `EPERM`), `Closed`, else what
    /// the driver returned. After an error any part of the range may hold old or new data; nothing
    /// outside it has changed.
    #[inline]
    pub fn pwrite<'b>(
        &self,
        co: &Co,
        offset: u64,
        buf: impl Into<IoVec<'b>>,
        flags: RequestFlags,
    ) -> Result<()> {
        let buf = buf.into();
        let graph = self.graph.try_read(co)?;
        let len = bytes(buf.len());
        let _request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Write);
        self.check(offset, len)?;
        self.node.pwrite(co, &graph, offset, buf, flags)
    }

    /// Write, then flush (rule 2.2): one operation, in that order. It orders nothing that came
    /// before, unless that was flushed already.
    ///
    /// # Errors
    /// As [`BlockBackend::pwrite`] and [`BlockBackend::flush`].
    pub fn pwrite_sync<'b>(&self, co: &Co, offset: u64, buf: impl Into<IoVec<'b>>) -> Result<()> {
        let buf = buf.into();
        let len = bytes(buf.len());
        self.other(co, RequestKind::Write, (offset, len), |graph| {
            self.node
                .pwrite(co, graph, offset, buf, RequestFlags::empty())?;
            self.node.flush(co, graph)
        })
    }

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// As [`BlockBackend::pwrite`]; `NotSupported` with [`RequestFlags::NO_FALLBACK`].
    pub fn pwrite_zeroes(&self, co: &Co, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        self.other(co, RequestKind::Write, (offset, len), |graph| {
            self.node.pwrite_zeroes(co, graph, offset, len, flags)
        })
    }

    /// Gives the storage of the range back; does nothing unless the node was opened with
    /// `discard=unmap`.
    ///
    /// # Errors
    /// As [`BlockBackend::pwrite`].
    pub fn pdiscard(&self, co: &Co, offset: u64, len: u64) -> Result<()> {
        self.other(co, RequestKind::Discard, (offset, len), |graph| {
            self.node.pdiscard(co, graph, offset, len)
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
        self.other(co, RequestKind::Read, (offset, len), |graph| {
            self.copy_range_counted(co, graph, offset, (to, to_offset), len)
        })
    }

    /// The same for a request that is counted here already.
    pub(crate) fn copy_range_counted(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        (to, to_offset): (&BlockBackend, u64),
        len: u64,
    ) -> Result<()> {
        if !Arc::ptr_eq(&self.graph, &to.graph) {
            let message = "The two ends of a copy are in different graphs";
            return Err(self.node.locate(Error::new(ErrorKind::Invalid, message)));
        }
        let _request = to
            .requests
            .begin(graph.slot(), to_offset, len, RequestKind::Write);
        to.check(to_offset, len)?;
        self.node
            .copy_range(co, graph, offset, (&to.node, to_offset), len)
    }

    /// Everything that completed before is on stable storage when this returns. Nothing to do on a
    /// read-only node.
    ///
    /// # Errors
    /// What the driver returned; `Poisoned` from then on; `Closed`.
    pub fn flush(&self, co: &Co) -> Result<()> {
        self.other(co, RequestKind::Other, (0, 0), |graph| {
            self.node.flush(co, graph)
        })
    }

    /// Makes the node `len` bytes long; what is added reads as zeros. With `exact` unset it may end
    /// up longer.
    ///
    /// # Errors
    /// `Invalid` for 2^63 and more, `ReadOnly` (errno `EACCES`), `NotSupported`, `Closed`, else
    /// what the driver returned.
    pub fn truncate(&self, co: &Co, len: u64, exact: bool) -> Result<()> {
        self.other(co, RequestKind::Truncate, (0, 0), |graph| {
            self.node.truncate(co, graph, len, exact)
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
        self.question(co, |graph| self.node.block_status(co, graph, (offset, len)))
    }

    /// The same of the layer that decides what is read, with how deep in the chain it is. Where no
    /// layer holds the range it is the first one that knows that it reads as zeros, and not
    /// allocated.
    ///
    /// # Errors
    /// As [`BlockBackend::block_status`].
    pub fn map(&self, co: &Co, offset: u64, len: u64) -> Result<Status> {
        self.question(co, |graph| self.node.map(co, graph, (offset, len)))
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
        let status = self.question(co, |graph| self.node.is_allocated(co, graph, (offset, len)))?;
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
            self.node
                .block_status_above(co, graph, base, range, precision)
        })
    }

    /// How many bytes of storage the node takes up, holes left out.
    ///
    /// # Errors
    /// `NotSupported` where nobody knows.
    pub fn allocated_bytes(&self, co: &Co) -> Result<u64> {
        self.question(co, |graph| self.node.allocated_bytes(co, graph))
    }

    /// What is about no bytes, so that there is nothing to check.
    fn question<R>(&self, co: &Co, f: impl FnOnce(&GraphRead<'_>) -> Result<R>) -> Result<R> {
        let graph = self.graph.try_read(co)?;
        let _request = self.requests.begin(graph.slot(), 0, 0, RequestKind::Other);
        if self.requests.is_closed() {
            return Err(self.refused(0, 0));
        }
        f(&graph)
    }

    fn other(
        &self,
        co: &Co,
        kind: RequestKind,
        (offset, len): (u64, u64),
        f: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> Result<()> {
        let graph = self.graph.try_read(co)?;
        let _request = self.requests.begin(graph.slot(), offset, len, kind);
        self.check(offset, len)?;
        f(&graph)
    }

    /// What a disk checks: is it there, and does it have these bytes?
    #[inline]
    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.node.len();
        if self.requests.is_plain() && offset <= size && len <= size - offset {
            return Ok(());
        }
        Err(self.refused(offset, len))
    }

    #[cold]
    fn refused(&self, offset: u64, len: u64) -> Error {
        if self.requests.is_closed() {
            return self
                .node
                .locate(Error::new(ErrorKind::Closed, "The block backend is closed"));
        }
        let message = format!(
            "{len} bytes are not inside a device of {} bytes",
            self.len()
        );
        self.node
            .locate(Error::new(ErrorKind::OutOfBounds, message).at_offset(offset))
    }

    /// Refuses new requests, waits until none is in flight, and gives up the node; its last user
    /// closes it: flush, then the driver, then what only it used (rule 5.7).
    ///
    /// # Errors
    /// The first failure to write something out; everything is closed all the same. A second close
    /// does nothing.
    pub fn close(&self, co: &Co) -> Result<()> {
        self.requests.close();
        self.requests.wait_idle(co);
        if self.detach() {
            close_unused(co, &self.graph, self.node.clone())
        } else {
            Ok(())
        }
    }

    /// `true` if the node has no user any more.
    fn detach(&self) -> bool {
        !self.detached.swap(true, Ordering::AcqRel) && self.node.remove_user()
    }
}

impl Drop for BlockBackend {
    /// Without [`BlockBackend::close`] nothing is written out: a destructor does no I/O.
    fn drop(&mut self) {
        if self.detach() && !self.node.is_read_only() {
            log::warn!(
                "{:?} was dropped without close: what it held back is lost",
                self.node
            );
        }
    }
}

impl fmt::Debug for BlockBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockBackend")
            .field("node", &self.node)
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}

const _: () = {
    const fn send_sync<T: Send + Sync>() {}
    send_sync::<BlockBackend>();
};
