//! The second door: what a driver does for its node.
//!
//! A driver gets requests that were checked, tracked, aligned and split for it, and sends its own
//! to its children. It never sees its own node, so it cannot send a request to it (rule 2.7).
//! `registry` has how drivers are found, `status` what they say of a range.

mod registry;
mod status;

pub use registry::{DriverRegistry, OpenDriver};
pub use status::{DriverStatus, Place, Precision};

use crate::child::Child;
use crate::drivers::filtered::Filtered;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::graph::{GraphRead, GraphWrite};
use crate::io::{Copied, CopySource, CopyTarget};
use crate::options::Options;
use crate::types::{ChildRole, FileId, Limits, Permissions, Preallocation, RequestFlags};
use coblock_aio::{AioContext, IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::sync::Arc;

/// What a driver does for its node. All calls come in the context in which the request runs, many
/// at a time.
///
/// Reads and writes that arrive are multiples of [`Limits::request_alignment`], at most
/// [`Limits::max_transfer`] long, and in memory aligned to [`Limits::mem_alignment`]. Reads end at
/// most at the node's length rounded up to the alignment; what lies past the driver's own end reads
/// as zeros.
#[expect(
    clippy::len_without_is_empty,
    reason = "a node of no bytes is asked for its length like any other"
)]
pub trait Driver: Send + Sync + 'static {
    /// The name under which the driver is registered.
    fn format(&self) -> &'static str;

    /// Fills `buf` from `offset`. Suspends.
    ///
    /// # Errors
    /// Anything may be in `buf` then.
    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()>;

    /// Writes `buf` at `offset`. Suspends. [`RequestFlags::FUA`] comes only to drivers with
    /// [`Driver::native_fua`].
    ///
    /// # Errors
    /// After one any part of the range may hold old or new data; nothing outside it has changed.
    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()>;

    /// The driver above comes to a named point of its work on this node. For tests; must neither
    /// suspend nor send a request.
    fn event(&self, _event: Event) {}

    /// Puts everything that completed before the call on stable storage. Suspends. One at a time
    /// per node.
    ///
    /// # Errors
    /// Nothing is known about what is stable then.
    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        match self.filtered() {
            Some(below) => below.file().flush(co, graph),
            None => Err(self.not_supported("flush")),
        }
    }

    /// Length in bytes now. Asked at open and after a truncation; writes past it are added by the
    /// node.
    fn len(&self) -> u64;

    /// What one request may be. Asked once, at open.
    ///
    /// A filter usually takes everything: the node below takes longer and unaligned requests apart.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Makes reads of the range return zeros. Suspends. Aligned to [`Limits::zero_alignment`],
    /// except that it may end at the end of the node.
    ///
    /// # Errors
    /// `NotSupported` makes the node write zeros instead.
    fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        match self.filtered() {
            Some(below) => {
                let offset = below.below(offset);
                below.file().pwrite_zeroes(co, graph, offset, len, flags)
            }
            None => Err(self.not_supported("writing zeroes")),
        }
    }

    /// The same for a part of one block of [`Limits::zero_alignment`]. A driver can do that without
    /// writing where all of the block reads as zeros then. Suspends.
    ///
    /// # Errors
    /// `NotSupported` makes the node write zeros instead.
    fn pwrite_zeroes_within_block(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let _ = (co, graph, offset, len, flags);
        Err(self.not_supported("writing zeroes to a part of a block"))
    }

    /// Gives the storage of the range back; what is read there afterwards is the driver's choice.
    /// Suspends. Aligned to [`Limits::discard_alignment`], except that it may end at the end of the
    /// node.
    ///
    /// # Errors
    /// `NotSupported` is no failure: a discard is advice.
    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        match self.filtered() {
            Some(below) => below.file().pdiscard(co, graph, below.below(offset), len),
            None => Err(self.not_supported("discard")),
        }
    }

    /// Offers a first part of the range to `to` without reading it: hands it on to a child, or to
    /// `to` where the bytes are in a file of the host. Suspends. The range is not empty and inside
    /// the node, and not aligned to anything.
    ///
    /// # Errors
    /// Those of who was asked. What cannot be copied without reading it is [`Copied::No`].
    fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        match self.filtered() {
            Some(below) => {
                let offset = below.below(offset);
                below.file().copy_range_from(co, graph, offset, len, to)
            }
            None => Ok(Copied::No),
        }
    }

    /// Copies a first part of `source` to `offset` without reading it, and tells how many bytes
    /// that were. Suspends, but never for another request that may be waiting for one of `source`:
    /// then, as where it cannot be done, it copies nothing. `offset` and length are multiples of
    /// [`Limits::request_alignment`].
    ///
    /// # Errors
    /// As [`Driver::pwrite`].
    fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        match self.filtered() {
            Some(below) => {
                let offset = below.below(offset);
                below.file().copy_range_to(co, graph, offset, source)
            }
            None => Ok(0),
        }
    }

    /// Tells what the first bytes of the range are, without reading them. Suspends. The range is
    /// not empty and inside the node, and not aligned to anything.
    ///
    /// The work is bounded: the answer may be about fewer bytes than asked, at least one. It was
    /// true at some time during the call. A driver that looks into a child to answer makes sure
    /// that what it looks at stays what it was meanwhile (rule 9.2).
    ///
    /// # Errors
    /// What kept it from looking.
    fn block_status<'g>(
        &'g self,
        co: &Co,
        graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        let _ = (co, graph, precision);
        Ok(match self.filtered() {
            Some(below) => DriverStatus::through(below.file(), below.below(offset), len),
            None => DriverStatus::data(len),
        })
    }

    /// How many bytes of storage the node takes up, holes left out. Suspends.
    ///
    /// # Errors
    /// `NotSupported` where nobody knows.
    fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        match self.filtered() {
            Some(below) => below.file().allocated_bytes(co, graph),
            None => Err(self.not_supported("telling its allocated size")),
        }
    }

    /// Makes the node `len` bytes long; what is added reads as zeros. With `exact` unset it may end
    /// up longer. Suspends; no request is in flight on the part that comes or goes.
    ///
    /// # Errors
    /// `NotSupported` where the length is fixed.
    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        match self.filtered() {
            Some(below) => {
                below.resize(graph, len, |file, len| file.truncate(co, graph, len, exact))
            }
            None => Err(Error::new(
                ErrorKind::NotSupported,
                "Image format driver does not support resize",
            )),
        }
    }

    /// A first drained section of the node begins: start nothing by yourself (rule 5.1). Under
    /// locks of the graph and the node: neither waits nor calls anything of them.
    fn drained_begin(&self) {}

    /// The last drained section of the node ended.
    fn drained_end(&self) {}

    /// May the node get the home `to` (rule 8.3)? Asked before anything has happened, and again before
    /// it happens. Under a lock of the graph, as [`Driver::drained_begin`].
    ///
    /// # Errors
    /// Why that context cannot be the home of the node.
    fn may_move(&self, to: &Arc<AioContext>) -> Result<()> {
        let _ = to;
        Ok(())
    }

    /// The node leaves its home `from`, drained: handlers, timers and sockets that the driver has
    /// there go. Called there, outside of coroutines; neither waits nor fails. A driver that is
    /// closed does nothing.
    ///
    /// [`Driver::attach_context`] follows, in the new home, or in the old one if the node stays.
    fn detach_context(&self, from: &Arc<AioContext>) {
        let _ = from;
    }

    /// The node has the home `to`, and is still drained: they come there. Called there, outside of
    /// coroutines; neither waits nor fails: what cannot be had is as a connection that broke.
    ///
    /// The first home is [`Opening::home_context`](crate::Opening::home_context), where `open`
    /// itself puts them.
    fn attach_context(&self, to: &Arc<AioContext>) {
        let _ = to;
    }

    /// What all users of the node together do, and let others do, is about to become this: get
    /// ready, so that nothing can go wrong any more. Either [`Driver::permissions_commit`] follows
    /// or [`Driver::permissions_abort`]. All three under a lock of the graph: they neither wait nor
    /// call anything of it.
    ///
    /// # Errors
    /// What keeps it from doing so; neither of the two follows then.
    fn permissions_prepare(&self, all: Permissions) -> Result<()> {
        let _ = all;
        Ok(())
    }

    /// It became so.
    fn permissions_commit(&self) {}

    /// It did not.
    fn permissions_abort(&self) {}

    /// The node is about to get other options: gets ready, with the node drained and flushed, so
    /// that nothing can go wrong any more; takes from [`Changes::options`] what it can change.
    /// Suspends. A driver whose state depends on them makes its successor, which has them: that one
    /// gets the calls that follow, either [`Driver::reopen_commit`] and [`Driver::reopen_clean`], or
    /// [`Driver::reopen_abort`].
    ///
    /// Its children may get other options in the same step, and have not yet: one that becomes
    /// writable cannot be written before `reopen_clean`.
    ///
    /// # Errors
    /// `NotSupported` of a driver that has only what it was opened with; what keeps it from
    /// changing. Nothing has changed then, and none of the calls follows.
    fn reopen_prepare(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        to: &mut Changes<'_>,
    ) -> Result<Option<Box<dyn Driver>>> {
        let _ = (co, graph);
        if self.filtered().is_none() && to.read_only != to.was_read_only {
            return Err(self.not_supported("changing the option 'read-only' of an open node"));
        }
        Ok(None)
    }

    /// It got them. Under the write lock.
    fn reopen_commit(&self, graph: &mut GraphWrite<'_>) {
        let _ = graph;
    }

    /// It did not. Suspends.
    fn reopen_abort(&self, co: &Co) {
        let _ = co;
    }

    /// After the commit, with the node still drained: does what needed the children's new options.
    /// Suspends. Nothing can be refused any more.
    fn reopen_clean(&self, co: &Co, graph: &GraphRead<'_>) {
        let _ = (co, graph);
    }

    /// Its successor has taken over, and nothing comes any more: gives back what it has of its own.
    /// Suspends.
    fn replaced(&self, co: &Co) {
        let _ = co;
    }

    /// Can the node get another backing file, or none?
    fn supports_backing(&self) -> bool {
        false
    }

    /// Makes the node `len` bytes long like [`Driver::truncate`], and takes the space for what is
    /// added at once, as `preallocation` says. Suspends.
    ///
    /// # Errors
    /// `NotSupported` for a way that the driver does not have; `Invalid` where the node would
    /// become shorter; no space. The length is as before then.
    fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        match self.filtered() {
            Some(below) => below.resize(graph, len, |file, len| {
                file.grow_preallocated(co, graph, len, preallocation)
            }),
            None => Err(unsupported_preallocation(preallocation)),
        }
    }

    /// The last call: nothing is in flight. Writes out what the driver holds. Suspends.
    ///
    /// # Errors
    /// The driver is closed all the same.
    fn close(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let _ = (co, graph);
        Ok(())
    }

    /// Takes a file that the image names, opened through the gate. Called between
    /// [`OpenDriver::open`] and the first request, for each name that was given to
    /// [`Opening::dependent`](crate::Opening::dependent).
    ///
    /// # Errors
    /// What makes the image unusable with it.
    fn attach(&self, role: ChildRole, child: Arc<Child>) -> Result<()> {
        panic!(
            "driver {} asked for a {role} file '{}' and does not take it",
            self.format(),
            child.name()
        )
    }

    /// Does the driver interpret an image format?
    fn is_format(&self) -> bool {
        false
    }

    /// Do writes past the end make the node longer? Else they are `OutOfBounds`.
    fn is_growable(&self) -> bool {
        self.filtered().is_some_and(Filtered::is_growable)
    }

    /// Is [`RequestFlags::FUA`] obeyed? Else the node flushes after such writes.
    ///
    /// A filter obeys it by passing it on: the node below flushes where its driver cannot.
    fn native_fua(&self) -> bool {
        self.filtered().is_some()
    }

    /// Which file of the host this driver itself has open.
    fn file_id(&self) -> Option<FileId> {
        None
    }

    /// The child of a filter: calls that the driver does not have itself go there. What a filter must
    /// see or keep away, it has to have: reads around it by [`Driver::copy_range_from`] too.
    fn filtered(&self) -> Option<&Filtered> {
        None
    }

    /// This driver as a value of its own type, for who made it.
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }

    /// The error of an operation that this driver does not have.
    #[doc(hidden)]
    fn not_supported(&self, what: &str) -> Error {
        Error::new(
            ErrorKind::NotSupported,
            format!("Driver '{}' does not support {what}", self.format()),
        )
    }
}

/// The error for a way to preallocate that a driver does not have.
pub(crate) fn unsupported_preallocation(preallocation: Preallocation) -> Error {
    let mode = preallocation.name();
    Error::new(
        ErrorKind::NotSupported,
        format!("Unsupported preallocation mode: {mode}"),
    )
}

/// The error of a file that would become shorter.
pub(crate) fn shrinks_preallocated() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "Cannot use preallocation for shrinking files",
    )
}

/// What becomes of an open node: see [`Driver::reopen_prepare`].
#[derive(Debug)]
pub struct Changes<'a> {
    /// Are writes refused until then?
    pub was_read_only: bool,
    /// Will they be?
    pub read_only: bool,
    /// Does it go around the host's page cache until then?
    pub was_direct: bool,
    /// Will it?
    pub direct: bool,
    /// All options of the driver, as they will be.
    pub options: Options,
    /// All edges to its children, as they will be; of those that come nothing may be asked yet.
    pub edges: &'a [Arc<Child>],
}

impl Changes<'_> {
    /// The child in that role.
    pub fn child(&self, role: ChildRole) -> Option<&Arc<Child>> {
        self.edges.iter().find(|edge| edge.role() == role)
    }
}
