//! `copy-on-read`: a filter that writes what a read found in a backing file to the image itself.
//!
//! ```text
//!   read -> is it allocated in the child's own layer?
//!             yes: read it
//!             no:  alone on these blocks: look again, read, write what was read
//! ```
//! What is written is what was there, so readers may go on meanwhile; writers of the same blocks may
//! not: a write between the read and its copy would be undone. All requests that change something
//! stand in the filter's own table for that, and a copy is serialising there (hazard Q21). Whole
//! blocks of the child's allocation unit are copied, so the child has nothing to copy itself. Zeros
//! are not written but made.

use crate::child::Child;
use crate::driver::{Driver, DriverStatus, OpenDriver, Precision};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{GraphCell, GraphRead};
use crate::open::Opening;
use crate::request_table::{RequestKind, RequestTable, Tracked};
use crate::types::{
    ChildRole, Limits, Preallocation, RequestFlags, align_down, align_up, bytes, in_memory,
};
use coblock_aio::{AlignedBuf, IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes that are copied at once, unless one block is longer.
const COPY_MAX: u64 = 1 << 20;

/// Memory of copies is aligned for every driver below.
const ALIGNMENT: usize = 4096;

/// Registered as `copy-on-read`. Options: `file`, the node that is read and written.
#[derive(Debug)]
pub struct OpenCopyOnRead;

impl OpenDriver for OpenCopyOnRead {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        if opening.is_read_only() {
            let why = "Can't use copy-on-read on read-only device";
            return Err(Error::new(ErrorKind::ReadOnly, why));
        }
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        let guard = opening.graph().read(co);
        let limits = file.limits(&guard);
        Ok(Box::new(CopyOnRead {
            block: limits.zero_alignment.max(limits.request_alignment),
            growable: file.is_growable(&guard),
            len: AtomicU64::new(file.len(&guard)),
            changes: RequestTable::new(),
            file: GraphCell::new(file.clone()),
        }))
    }
}

struct CopyOnRead {
    /// What the child allocates at once, in bytes.
    block: u64,
    growable: bool,
    len: AtomicU64,
    /// Requests that change the child, copies among them.
    changes: RequestTable,
    file: GraphCell<Arc<Child>>,
}

impl CopyOnRead {
    /// Enters a request that changes the range, after copies that are under way there.
    fn change(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        (offset, len): (u64, u64),
        kind: RequestKind,
    ) -> Tracked<'_> {
        let request = self.changes.begin(graph.slot(), offset, len, kind);
        if !self.changes.is_plain() {
            request.wait_for_conflicts(co);
        }
        request
    }

    /// Reads a first part of `buf` from `at`, where the child holds nothing for `len` bytes, and
    /// copies the blocks that it lies in. Returns how much.
    fn read_and_copy(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: u64,
        len: u64,
        buf: &mut IoVecMut<'_>,
    ) -> Result<u64> {
        let file = self.file.get(graph);
        let start = align_down(at, self.block);
        let longest = align_down(COPY_MAX, self.block).max(self.block);
        let end = align_up(at + len, self.block).unwrap_or(u64::MAX);
        let end = end.min(start + longest).min(file.len(graph));
        let copy = self
            .changes
            .begin(graph.slot(), start, end - start, RequestKind::Write);
        copy.serialise(co, start, end - start);

        let none = RequestFlags::empty();
        let mut copied = AlignedBuf::try_new(in_memory(end - start), ALIGNMENT)
            .map_err(|error| Error::from_io("buffer to copy on read", error))?;
        file.pread(co, graph, start, IoVecMut::from(&mut copied[..]), none)?;
        // Somebody may have written some of it while this request waited for its turn.
        let mut done = start;
        while done < end {
            let (allocated, part) = file.is_allocated(co, graph, done, end - done)?;
            if part == 0 {
                break;
            }
            if !allocated {
                let from = in_memory(done - start);
                let source = IoVec::from(&copied[from..from + in_memory(part)]);
                if source.is_zero() {
                    file.pwrite_zeroes(co, graph, done, part, none)?;
                } else {
                    file.pwrite(co, graph, done, source, none)?;
                }
            }
            done += part;
        }
        let from = in_memory(at - start);
        let len = len.min(end - at);
        buf.slice(0, in_memory(len))
            .copy_from(0, &copied[from..from + in_memory(len)]);
        Ok(len)
    }
}

impl Driver for CopyOnRead {
    fn format(&self) -> &'static str {
        "copy-on-read"
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let file = self.file.get(graph);
        let len = bytes(buf.len());
        let mut done = 0;
        while done < len {
            let (at, rest) = (offset + done, len - done);
            let mut part = buf.slice(in_memory(done), in_memory(rest));
            done += match file.is_allocated(co, graph, at, rest)? {
                (false, len) if len > 0 => self.read_and_copy(co, graph, at, len, &mut part)?,
                // Past the end are zeros, which the child gives too.
                (_, len) => {
                    let len = if len == 0 { rest } else { len };
                    file.pread(co, graph, at, part.slice(0, in_memory(len)), flags)?;
                    len
                }
            };
        }
        Ok(())
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let range = (offset, bytes(buf.len()));
        let _change = self.change(co, graph, range, RequestKind::Write);
        self.file.get(graph).pwrite(co, graph, offset, buf, flags)
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let _change = self.change(co, graph, (offset, len), RequestKind::Write);
        self.file
            .get(graph)
            .pwrite_zeroes(co, graph, offset, len, flags)
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        let _change = self.change(co, graph, (offset, len), RequestKind::Discard);
        self.file.get(graph).pdiscard(co, graph, offset, len)
    }

    fn block_status<'g>(
        &'g self,
        _co: &Co,
        graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        Ok(DriverStatus::through(self.file.get(graph), offset, len))
    }

    fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        self.file.get(graph).allocated_bytes(co, graph)
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.file.get(graph).flush(co, graph)
    }

    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        let file = self.file.get(graph);
        let result = file.truncate(co, graph, len, exact);
        self.len.store(file.len(graph), Ordering::Release);
        result
    }

    fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let file = self.file.get(graph);
        let result = file.grow_preallocated(co, graph, len, preallocation);
        self.len.store(file.len(graph), Ordering::Release);
        result
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Longer and unaligned requests go on as they are: the node below takes them apart.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_growable(&self) -> bool {
        self.growable
    }

    /// The node below flushes where its driver cannot.
    fn native_fua(&self) -> bool {
        true
    }
}
