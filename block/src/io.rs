//! How requests go through a node.
//!
//! ```text
//!   begin in the request table -> open? conflicts? range? -> aligned, one piece, plain memory?
//!        yes: the driver, at once                         (inlined: no frame of our own)
//!        no:  io/read.rs, io/write.rs, io/zero_discard.rs, io/copy_range.rs
//! ```
//! The first step is shared by all, so the two faces of a backend (rule 2.2) meet the same checks,
//! limits and errors here.

mod copy_range;
mod flush;
mod read;
mod status;
mod truncate;
mod write;
mod zero_discard;

pub use copy_range::{Copied, CopySource, CopyTarget};
pub use status::Status;

use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::node::Node;
use crate::request_table::Tracked;
use crate::types::{Limits, MAX_LENGTH, MAX_REQUEST, RequestFlags, in_memory};
use coblock_aio::AlignedBuf;
use coblock_coroutine::Co;
use std::sync::atomic::Ordering;

/// Is somebody watching requests? One load; then they take the slow path, which tells of them.
#[inline]
fn traced() -> bool {
    log::max_level() == log::LevelFilter::Trace
}

/// Longest bounce buffer in bytes, unless one aligned block is longer.
const MAX_BOUNCE: u64 = 1 << 20;

/// Up to here one padded request through a bounce buffer is better than a head, a middle and a
/// tail.
const SMALL_BOUNCE: u64 = 64 << 10;

impl Node {
    /// Is `len` at `offset` something that the driver takes as it is, memory aside?
    #[inline]
    fn takes_range(limits: &Limits, offset: u64, len: u64) -> bool {
        // Zero is no request, and wraps to far above any limit.
        (offset | len) & (limits.request_alignment - 1) == 0
            && len.wrapping_sub(1) < limits.max_transfer
    }

    /// Is `len` at `offset` inside the node?
    #[inline]
    fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// What every request asks first on the slow path: is the node open, and does anybody stand in
    /// the way?
    fn admit(
        &self,
        co: &Co,
        request: &Tracked<'_>,
        flags: RequestFlags,
        range: (u64, u64),
    ) -> Result<()> {
        if self.requests.is_closed() {
            return Err(self.closed());
        }
        if flags.contains(RequestFlags::SERIALISING) {
            request.serialise(co, range.0, range.1);
        } else if !self.requests.is_plain() {
            request.wait_for_conflicts(co);
        }
        Ok(())
    }

    /// End of a range that a node could have.
    fn checked_end(&self, offset: u64, len: u64) -> Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= MAX_LENGTH => Ok(end),
            _ => Err(self.out_of_bounds(offset, len)),
        }
    }

    /// The same for a request with a buffer, which has a limit of its own.
    fn checked_transfer(&self, offset: u64, len: u64) -> Result<u64> {
        if len > MAX_REQUEST {
            return Err(self.out_of_bounds(offset, len));
        }
        self.checked_end(offset, len)
    }

    /// Where a write of `len` at `offset` ends, if this node may be written there.
    fn writable_end(&self, graph: &GraphRead<'_>, offset: u64, end: u64) -> Result<()> {
        if self.is_read_only() {
            return Err(self.locate(Error::new(ErrorKind::ReadOnly, "The node is read-only")));
        }
        if end > self.len() && !self.serving(graph).growable {
            return Err(self.out_of_bounds(offset, end - offset));
        }
        Ok(())
    }

    #[cold]
    fn out_of_bounds(&self, offset: u64, len: u64) -> Error {
        let message = format!("{len} bytes do not fit a node of {} bytes", self.len());
        self.locate(Error::new(ErrorKind::OutOfBounds, message).at_offset(offset))
    }

    /// Tells when a request begins and how it ends; `len` is 0 where a request has none.
    fn trace(
        &self,
        co: &Co,
        what: &str,
        (offset, len): (u64, u64),
        request: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (req, node) = (co.id(), self.name());
        log::trace!("{what} begin req={req} node={node} offset={offset} len={len}");
        let result = request();
        let ret = result.as_ref().map_or_else(|error| -error.errno(), |()| 0);
        log::trace!("{what} end req={req} node={node} offset={offset} len={len} ret={ret}");
        result
    }

    /// A driver's error, with node and offset if it did not name them.
    #[cold]
    fn failed(&self, error: Error, offset: u64) -> Error {
        self.locate(error.at_offset(offset))
    }

    /// Memory that the driver takes, zeroed.
    fn bounce(&self, graph: &GraphRead<'_>, len: u64) -> Result<AlignedBuf> {
        AlignedBuf::try_new(in_memory(len), self.serving(graph).limits.mem_alignment)
            .map_err(|error| self.locate(Error::from_io("bounce buffer", error)))
    }

    /// After a write completed, well or not: what is below is newer than the last flush.
    #[inline]
    fn mark_unflushed(&self) {
        // Nearly always set already: then no shared line is written.
        if !self.unflushed.load(Ordering::Acquire) {
            self.unflushed.store(true, Ordering::Release);
        }
    }

    /// After a write that ended at `end`; only padding ends past a node that cannot grow.
    #[inline]
    fn grow_to(&self, graph: &GraphRead<'_>, end: u64) {
        if end > self.len.load(Ordering::Relaxed) && self.serving(graph).growable {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }
}
