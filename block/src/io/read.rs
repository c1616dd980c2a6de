//! Reads: straight to the driver, or in pieces through a bounce buffer.

use super::{MAX_BOUNCE, SMALL_BOUNCE, traced};
use crate::error::Result;
use crate::graph::GraphRead;
use crate::node::{Node, Serving};
use crate::request_table::{RequestKind, Tracked};
use crate::types::{RequestFlags, align_down, bytes, in_memory};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;

impl Node {
    /// See [`Child::pread`](crate::Child::pread).
    ///
    /// Inlined into whoever calls: each real frame on a coroutine's stack costs a mispredicted
    /// return.
    #[inline(always)]
    pub(crate) fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let len = bytes(buf.len());
        let request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Read);
        let Serving { driver, limits, .. } = self.serving(graph);
        if self.requests.is_plain()
            && Node::takes_range(limits, offset, len)
            && self.contains(offset, len)
            && (limits.mem_alignment == 1 || buf.is_aligned(limits.mem_alignment))
            && flags.is_empty()
            && !traced()
        {
            match driver.pread(co, graph, offset, buf, flags) {
                Ok(()) => Ok(()),
                Err(error) => Err(self.failed(error, offset)),
            }
        } else {
            self.pread_traced(co, graph, offset, buf, flags, &request)
        }
    }

    #[cold]
    #[inline(never)]
    fn pread_traced(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVecMut<'_>,
        flags: RequestFlags,
        request: &Tracked<'_>,
    ) -> Result<()> {
        self.trace(co, "read", (offset, bytes(buf.len())), || {
            self.pread_slow(co, graph, offset, buf, flags, request)
        })
    }

    fn pread_slow(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        flags: RequestFlags,
        request: &Tracked<'_>,
    ) -> Result<()> {
        let len = bytes(buf.len());
        self.checked_transfer(offset, len)?;
        self.admit(co, request, flags, (offset, len))?;
        // After the wait: the length may have changed meanwhile (rule 2.5).
        let inside = self.len().saturating_sub(offset).min(len);
        buf.fill(in_memory(inside), in_memory(len - inside), 0);

        let mut at = 0;
        while at < inside {
            let start = offset + at;
            let piece = self.read_piece(
                co,
                graph,
                start,
                buf.slice(in_memory(at), in_memory(inside - at)),
            );
            at += piece.map_err(|error| self.failed(error, start))?;
        }
        Ok(())
    }

    /// Reads the first part of `buf`, as much as one request to the driver gives. Returns how much
    /// that was.
    fn read_piece(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        start: u64,
        mut buf: IoVecMut<'_>,
    ) -> Result<u64> {
        let piece = self.piece(graph, start, buf.as_source());
        let mut part = buf.slice(0, in_memory(piece.len));
        if !piece.bounced {
            let driver = &self.serving(graph).driver;
            driver.pread(co, graph, start, part, RequestFlags::empty())?;
        } else {
            let mut bounce = self.bounce(graph, piece.padded_len)?;
            self.serving(graph).driver.pread(
                co,
                graph,
                piece.padded_start,
                IoVecMut::from(&mut bounce[..]),
                RequestFlags::empty(),
            )?;
            let from = in_memory(start - piece.padded_start);
            part.copy_from(0, &bounce[from..from + in_memory(piece.len)]);
        }
        Ok(piece.len)
    }
}

/// What one request to the driver covers.
pub(super) struct Piece {
    /// Bytes of the caller's buffer.
    pub(super) len: u64,
    /// Through a bounce buffer, for its alignment on disk or in memory?
    pub(super) bounced: bool,
    /// Where the driver's request starts: at or before the caller's.
    pub(super) padded_start: u64,
    /// How long the driver's request is.
    pub(super) padded_len: u64,
}

impl Node {
    /// Cuts the first request to the driver off a request for all of `buf` at `start`.
    pub(super) fn piece(&self, graph: &GraphRead<'_>, start: u64, buf: IoVec<'_>) -> Piece {
        let limits = &self.serving(graph).limits;
        let len = bytes(buf.len());
        let align = limits.request_alignment;
        let longest = align_down(limits.max_transfer, align);
        let head = start & (align - 1);
        let whole = align_down(len, align).min(longest);
        let padded = align_down(head + len + align - 1, align);
        let plain = || {
            buf.slice(0, in_memory(whole))
                .is_aligned(limits.mem_alignment)
        };
        if head == 0
            && whole > 0
            && (whole == len || padded > SMALL_BOUNCE || padded > longest)
            && plain()
        {
            return Piece {
                len: whole,
                bounced: false,
                padded_start: start,
                padded_len: whole,
            };
        }
        // A long request with an odd start: only its first block is copied, the next piece may be
        // plain again.
        let most = if head != 0 && padded > SMALL_BOUNCE {
            align
        } else {
            longest.min(align_down(MAX_BOUNCE, align).max(align))
        };
        let padded_len = padded.min(most);
        Piece {
            len: len.min(padded_len - head),
            bounced: true,
            padded_start: start - head,
            padded_len,
        }
    }
}
