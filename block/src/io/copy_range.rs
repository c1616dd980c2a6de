//! Copying from node to node: by the host where it can, else by reading and writing.
//!
//! ```text
//!   source   node -> driver -> child .. -> file: bytes of a file of the host     (CopySource)
//!                                            |
//!   target   node -> driver -> child .. -> file: copy_file_range
//! ```
//! Down the source first, then down the target; the requests of both are in flight until the host
//! has copied. So going down the target must not wait for other requests: one of them might wait
//! for the source's. Whatever would have to wait, to be padded or to be copied on write there is
//! not copied by the host, and neither is anything between nodes that stand on the same file.
//!
//! What the host does not copy is read and then written from the top, with nothing of the source
//! held while the target is written.

use super::MAX_BOUNCE;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::node::{Node, Serving};
use crate::request_table::RequestKind;
use crate::types::{RequestFlags, align_down, in_memory};
use coblock_aio::{AlignedBuf, IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::os::fd::BorrowedFd;

/// Bytes in a file of the host.
#[derive(Clone, Copy, Debug)]
pub struct CopySource<'a> {
    /// The file, open for reading.
    pub file: BorrowedFd<'a>,
    /// Where they begin.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
}

impl CopySource<'_> {
    /// `len` of the bytes, from `skip` on.
    ///
    /// # Panics
    /// There are not so many.
    #[must_use]
    pub fn part(self, skip: u64, len: u64) -> Self {
        assert!(
            skip <= self.len && len <= self.len - skip,
            "{len} from {skip} of {self:?}"
        );
        CopySource {
            offset: self.offset + skip,
            len,
            ..self
        }
    }
}

/// Where a copy goes.
#[derive(Clone, Copy, Debug)]
pub struct CopyTarget<'a> {
    node: &'a Node,
    offset: u64,
}

impl CopyTarget<'_> {
    /// Hands bytes of the host to the target, at most as many as there are from the start of the
    /// request. Suspends.
    ///
    /// # Errors
    /// What a driver of the target returned.
    pub fn take(&self, co: &Co, graph: &GraphRead<'_>, source: CopySource<'_>) -> Result<Copied> {
        Ok(
            match self.node.copy_range_to(co, graph, self.offset, source)? {
                0 => Copied::No,
                len => Copied::Bytes(len),
            },
        )
    }
}

/// What became of the first bytes of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// So many were copied.
    Bytes(u64),
    /// So many read as zeros, and the target was not touched.
    Zeros(u64),
    /// They cannot be copied this way.
    No,
}

impl Node {
    /// See [`BlockBackend::copy_range`](crate::BlockBackend::copy_range).
    pub(crate) fn copy_range(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        to: (&Node, u64),
        len: u64,
    ) -> Result<()> {
        let copy = || self.copy_range_inner(co, graph, offset, to, len);
        self.trace(co, "copy range", (offset, len), copy)
    }

    fn copy_range_inner(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        (to, to_offset): (&Node, u64),
        len: u64,
    ) -> Result<()> {
        self.checked_end(offset, len)?;
        let to_end = to.checked_end(to_offset, len)?;
        to.writable_end(graph, to_offset, to_end)?;
        if std::ptr::eq(self, to) && offset.abs_diff(to_offset) < len {
            let message = format!("{len} bytes are copied over themselves");
            return Err(self.locate(Error::new(ErrorKind::Invalid, message).at_offset(to_offset)));
        }
        let by_host = !share_storage(self, to, graph);
        let mut at = 0;
        while at < len {
            let rest = len - at;
            let (from_at, to_at) = (offset + at, to_offset + at);
            let target = CopyTarget {
                node: to,
                offset: to_at,
            };
            let copied = if by_host {
                self.copy_range_from(co, graph, from_at, rest, &target)?
            } else {
                Copied::No
            };
            at += match copied {
                Copied::Bytes(part) => part,
                Copied::Zeros(part) => {
                    to.pwrite_zeroes(co, graph, to_at, part, RequestFlags::empty())?;
                    part
                }
                Copied::No => {
                    // Up to where the next piece is a whole one of the target again.
                    let part = rest.min(MAX_BOUNCE - to_at % MAX_BOUNCE);
                    self.read_and_write(co, graph, from_at, (to, to_at), part)?;
                    part
                }
            };
        }
        Ok(())
    }

    fn read_and_write(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        (to, to_offset): (&Node, u64),
        len: u64,
    ) -> Result<()> {
        let alignment = self.whole_limits().mem_alignment;
        let alignment = alignment.max(to.whole_limits().mem_alignment);
        let mut buf = AlignedBuf::try_new(in_memory(len), alignment)
            .map_err(|error| self.locate(Error::from_io("copy buffer", error)))?;
        let none = RequestFlags::empty();
        self.pread(co, graph, offset, IoVecMut::from(&mut buf[..]), none)?;
        to.pwrite(co, graph, to_offset, IoVec::from(&buf[..]), none)
    }

    /// See [`Child::copy_range_from`](crate::Child::copy_range_from).
    pub(crate) fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        let request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Read);
        self.checked_end(offset, len)?;
        self.admit(co, &request, RequestFlags::empty(), (offset, len))?;
        // After the wait: the length may have changed meanwhile (rule 2.5).
        let inside = self.len().saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(Copied::Zeros(len));
        }
        let driver = &self.serving(graph).driver;
        let copied = driver.copy_range_from(co, graph, offset, inside, to);
        let copied = copied.map_err(|error| self.failed(error, offset))?;
        if let Copied::Bytes(part) | Copied::Zeros(part) = copied {
            assert!(
                (1..=inside).contains(&part),
                "driver {} copied {part} of {inside} bytes",
                self.format()
            );
        }
        Ok(copied)
    }

    /// See [`Child::copy_range_to`](crate::Child::copy_range_to).
    pub(crate) fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        let Serving { driver, limits, .. } = self.serving(graph);
        let align = limits.request_alignment;
        let _request = self
            .requests
            .begin(graph.slot(), offset, source.len, RequestKind::Write);
        let end = self.checked_end(offset, source.len)?;
        self.writable_end(graph, offset, end)?;
        if self.requests.is_closed() {
            return Err(self.closed());
        }
        let len = align_down(source.len, align);
        if !self.requests.is_plain() || offset & (align - 1) != 0 || len == 0 {
            return Ok(0);
        }
        let copied = driver.copy_range_to(co, graph, offset, source.part(0, len));
        self.mark_unflushed();
        let copied = copied.map_err(|error| self.failed(error, offset))?;
        assert!(
            copied <= len,
            "driver {} took {copied} of {len} bytes",
            self.format()
        );
        self.grow_to(graph, offset + copied);
        Ok(copied)
    }
}

/// Do the two stand on a common node, or on the same file of the host?
fn share_storage(a: &Node, b: &Node, graph: &GraphRead<'_>) -> bool {
    let below_b = with_all_below(b, graph);
    with_all_below(a, graph).iter().any(|a| {
        below_b.iter().any(|b| {
            let same_file = a.file_id().is_some() && a.file_id() == b.file_id();
            std::ptr::eq(*a, *b) || same_file
        })
    })
}

/// The node and whatever it stands on, each once.
fn with_all_below<'g>(node: &'g Node, graph: &'g GraphRead<'_>) -> Vec<&'g Node> {
    let mut found = vec![node];
    let mut at = 0;
    while let Some(node) = found.get(at).copied() {
        at += 1;
        for child in node.children(graph) {
            let below: &Node = child.node(graph);
            if !found.iter().any(|seen| std::ptr::eq(*seen, below)) {
                found.push(below);
            }
        }
    }
    found
}
