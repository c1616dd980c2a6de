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

use super::filtered::Filtered;
use crate::driver::{Driver, OpenDriver};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::io::{Copied, CopySource, CopyTarget};
use crate::open::Opening;
use crate::request_table::{RequestKind, RequestTable, Tracked};
use crate::types::{ChildRole, RequestFlags, align_down, align_up, bytes, in_memory};
use coblock_aio::{AlignedBuf, IoVec, IoVecMut};
use coblock_coroutine::Co;

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
            changes: RequestTable::new(),
            below: Filtered::new(file.clone(), &guard),
        }))
    }
}

struct CopyOnRead {
    /// What the child allocates at once, in bytes.
    block: u64,
    /// Requests that change the child, copies among them.
    changes: RequestTable,
    below: Filtered,
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
        let file = self.below.file();
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
        let file = self.below.file();
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
        self.below.file().pwrite(co, graph, offset, buf, flags)
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
        self.below
            .file()
            .pwrite_zeroes(co, graph, offset, len, flags)
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        let _change = self.change(co, graph, (offset, len), RequestKind::Discard);
        self.below.file().pdiscard(co, graph, offset, len)
    }

    /// Copies read: what they find in the backing file is kept too.
    fn copy_range_from(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        _offset: u64,
        _len: u64,
        _to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        Ok(Copied::No)
    }

    /// Would have to wait for copies on read.
    fn copy_range_to(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        _offset: u64,
        _source: CopySource<'_>,
    ) -> Result<u64> {
        Ok(0)
    }

    fn len(&self) -> u64 {
        self.below.len()
    }

    fn filtered(&self) -> Option<&Filtered> {
        Some(&self.below)
    }
}
