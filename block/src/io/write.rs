//! Writes: straight to the driver, or in pieces, padded by reading what is there.

use super::traced;
use crate::error::Result;
use crate::graph::GraphRead;
use crate::node::{Node, Serving};
use crate::request_table::{RequestKind, Tracked};
use crate::types::{RequestFlags, align_down, bytes, in_memory};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;

impl Node {
    /// See [`Child::pwrite`](crate::Child::pwrite); inlined as [`Node::pread`] is.
    #[inline(always)]
    pub(crate) fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let len = bytes(buf.len());
        let request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Write);
        let Serving { driver, limits, .. } = self.serving(graph);
        if self.requests.is_plain()
            && Node::takes_range(limits, offset, len)
            && self.contains(offset, len)
            && (limits.mem_alignment == 1 || buf.is_aligned(limits.mem_alignment))
            && flags.is_empty()
            && !traced()
            && !self.is_read_only()
        {
            let result = driver.pwrite(co, graph, offset, buf, flags);
            self.mark_unflushed();
            match result {
                Ok(()) => Ok(()),
                Err(error) => Err(self.failed(error, offset)),
            }
        } else {
            self.pwrite_traced(co, graph, offset, buf, flags, &request)
        }
    }

    #[cold]
    #[inline(never)]
    fn pwrite_traced(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
        request: &Tracked<'_>,
    ) -> Result<()> {
        self.trace(co, "write", (offset, bytes(buf.len())), || {
            self.pwrite_slow(co, graph, offset, buf, flags, request)
        })
    }

    fn pwrite_slow(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
        request: &Tracked<'_>,
    ) -> Result<()> {
        let len = bytes(buf.len());
        let end = self.checked_transfer(offset, len)?;
        self.writable_end(graph, offset, end)?;
        if len == 0 {
            self.admit(co, request, RequestFlags::empty(), (offset, len))?;
            return self.flush_for(co, graph, flags);
        }
        self.admit_write(co, graph, request, offset, end, flags)?;
        self.write_pieces(co, graph, offset, buf, flags)?;
        self.flush_for(co, graph, flags)
    }

    /// Waits for its turn; for a range that must be padded, alone on the padded range (hazard Q21).
    pub(super) fn admit_write(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        request: &Tracked<'_>,
        offset: u64,
        end: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let align = self.serving(graph).limits.request_alignment;
        let unaligned = (offset | end) & (align - 1) != 0;
        let start = align_down(offset, align);
        // Below MAX_LENGTH, so padding does not overflow.
        let padded = (start, align_down(end + align - 1, align) - start);
        let flags = if unaligned {
            flags | RequestFlags::SERIALISING
        } else {
            flags
        };
        self.admit(co, request, flags, padded)?;
        // After the wait: the length may have changed meanwhile (rule 2.5).
        self.writable_end(graph, offset, end)
    }

    /// Writes all of `buf`, one request to the driver after the other.
    pub(super) fn write_pieces(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let fua = if self.serving(graph).driver.native_fua() {
            flags & RequestFlags::FUA
        } else {
            RequestFlags::empty()
        };
        let mut at = 0;
        while at < buf.len() {
            let start = offset + bytes(at);
            let written = self.write_piece(co, graph, start, buf.slice(at, buf.len() - at), fua);
            self.mark_unflushed();
            at += written.map_err(|error| self.failed(error, start))?;
        }
        Ok(())
    }

    /// Writes the first part of `buf`, as much as one request to the driver takes. Returns how much
    /// that was.
    fn write_piece(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        start: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<usize> {
        let piece = self.piece(graph, start, buf);
        let len = in_memory(piece.len);
        let part = buf.slice(0, len);
        if !piece.bounced {
            let driver = &self.serving(graph).driver;
            driver.pwrite(co, graph, start, part, flags)?;
        } else {
            let mut bounce = self.bounce(graph, piece.padded_len)?;
            let align = self.serving(graph).limits.request_alignment;
            let head = start - piece.padded_start;
            let tail = piece.padded_len - head - piece.len;
            let last_block = piece.padded_len - align;
            if head != 0 {
                self.read_block(
                    co,
                    graph,
                    piece.padded_start,
                    &mut bounce[..in_memory(align)],
                )?;
            }
            // One block that is padded on both sides is read once.
            if tail != 0 && (head == 0 || last_block != 0) {
                let block = &mut bounce[in_memory(last_block)..];
                self.read_block(co, graph, piece.padded_start + last_block, block)?;
            }
            let from = in_memory(head);
            part.copy_to(0, &mut bounce[from..from + len]);
            self.serving(graph).driver.pwrite(
                co,
                graph,
                piece.padded_start,
                IoVec::from(&bounce[..]),
                flags,
            )?;
        }
        self.grow_to(graph, piece.padded_start + piece.padded_len);
        Ok(len)
    }

    /// One block around the edge of a write; past the end of the node it stays zero.
    fn read_block(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        block: &mut [u8],
    ) -> Result<()> {
        if offset >= self.len() {
            return Ok(());
        }
        self.serving(graph).driver.pread(
            co,
            graph,
            offset,
            IoVecMut::from(block),
            RequestFlags::empty(),
        )
    }

    /// What [`RequestFlags::FUA`] still needs after the write.
    pub(super) fn flush_for(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        if flags.contains(RequestFlags::FUA) && !self.serving(graph).driver.native_fua() {
            self.flush_driver(co, graph)?;
        }
        Ok(())
    }
}
