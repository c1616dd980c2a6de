//! Writing zeroes and discarding: whole blocks to the driver, the odd ends as ordinary writes.

use super::MAX_BOUNCE;
use crate::error::{ErrorKind, Result};
use crate::graph::GraphRead;
use crate::node::{Node, Serving};
use crate::request_table::RequestKind;
use crate::types::{RequestFlags, align_down, align_up, bytes, in_memory};
use coblock_aio::IoVec;
use coblock_coroutine::Co;

impl Node {
    /// See [`Child::pwrite_zeroes`](crate::Child::pwrite_zeroes).
    pub(crate) fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let zero = || self.pwrite_zeroes_inner(co, graph, offset, len, flags);
        self.trace(co, "write zeroes", (offset, len), zero)
    }

    fn pwrite_zeroes_inner(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Write);
        let end = self.checked_end(offset, len)?;
        self.writable_end(graph, offset, end)?;
        self.admit_write(co, graph, &request, offset, end, flags)?;

        let Serving { driver, limits, .. } = self.serving(graph);
        let align = limits.zero_alignment.max(limits.request_alignment);
        // Neither overflows: both ends are below MAX_LENGTH. A node's last, odd block counts as
        // whole.
        let middle = align_up(offset, align).unwrap_or(end).min(end);
        let whole_end = if end == self.len() {
            end
        } else {
            align_down(end, align)
        };
        let middle_end = whole_end.max(middle);
        // The middle first: it may tell that there is no other way than to write it all.
        let driver_flags = if self.passes_discards() {
            flags
        } else {
            flags - RequestFlags::MAY_UNMAP
        };
        let mut at = middle;
        while at < middle_end {
            let part = (middle_end - at).min(align_down(limits.max_zeroes, align).max(align));
            let zeroed = driver.pwrite_zeroes(co, graph, at, part, driver_flags);
            self.mark_unflushed();
            match zeroed {
                Ok(()) => self.grow_to(graph, at + part),
                Err(error) if error.kind() == ErrorKind::NotSupported => {
                    if flags.contains(RequestFlags::NO_FALLBACK) {
                        return Err(self.failed(error, at));
                    }
                    break;
                }
                Err(error) => return Err(self.failed(error, at)),
            }
            at += part;
        }
        // What the driver did not take of the middle.
        self.write_zero_bytes(co, graph, at, middle_end, flags)?;
        self.zero_within_block(co, graph, offset, middle, flags, driver_flags)?;
        self.zero_within_block(co, graph, middle_end, end, flags, driver_flags)?;
        // The driver's zeroes are not covered by a native FUA of the writes around them.
        if flags.contains(RequestFlags::FUA) {
            self.flush_driver(co, graph)
        } else {
            Ok(())
        }
    }

    /// An odd end: the driver may know that the rest of the block reads as zeros too.
    fn zero_within_block(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        start: u64,
        end: u64,
        flags: RequestFlags,
        driver_flags: RequestFlags,
    ) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        let driver = &self.serving(graph).driver;
        let zeroed = driver.pwrite_zeroes_within_block(co, graph, start, end - start, driver_flags);
        self.mark_unflushed();
        match zeroed {
            Ok(()) => {
                self.grow_to(graph, end);
                Ok(())
            }
            Err(error)
                if error.kind() == ErrorKind::NotSupported
                    && !flags.contains(RequestFlags::NO_FALLBACK) =>
            {
                self.write_zero_bytes(co, graph, start, end, flags)
            }
            Err(error) => Err(self.failed(error, start)),
        }
    }

    /// Writes zeros from memory from `start` to `end`.
    fn write_zero_bytes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        start: u64,
        end: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        // Not less than a block: otherwise each part would read what it then replaces.
        let align = self.serving(graph).limits.request_alignment;
        let longest = MAX_BOUNCE.max(align);
        let zeros = self.bounce(graph, longest.min(end - start))?;
        let mut at = start;
        while at < end {
            // Up to a multiple of the alignment, so that only the ends are odd.
            let stop = align_down(at + longest, align).min(end);
            let part = (stop - at).min(bytes(zeros.len()));
            let source = IoVec::from(&zeros[..in_memory(part)]);
            self.write_pieces(co, graph, at, source, flags - RequestFlags::FUA)?;
            at += part;
        }
        Ok(())
    }

    /// See [`Child::pdiscard`](crate::Child::pdiscard).
    pub(crate) fn pdiscard(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let discard = || self.pdiscard_inner(co, graph, offset, len);
        self.trace(co, "discard", (offset, len), discard)
    }

    fn pdiscard_inner(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        let request = self
            .requests
            .begin(graph.slot(), offset, len, RequestKind::Discard);
        let end = self.checked_end(offset, len)?;
        self.writable_end(graph, offset, end)?;
        if end > self.len() {
            return Err(self.out_of_bounds(offset, len));
        }
        self.admit(co, &request, RequestFlags::empty(), (offset, len))?;
        if !self.passes_discards() {
            return Ok(());
        }
        let Serving { driver, limits, .. } = self.serving(graph);
        let align = limits.discard_alignment.max(limits.request_alignment);
        let whole_end = if end == self.len() {
            end
        } else {
            align_down(end, align)
        };
        let mut at = align_up(offset, align).unwrap_or(end);
        while at < whole_end {
            let part = (whole_end - at).min(align_down(limits.max_discard, align).max(align));
            let discarded = driver.pdiscard(co, graph, at, part);
            self.mark_unflushed();
            match discarded {
                Ok(()) => at += part,
                // A discard is advice.
                Err(error) if error.kind() == ErrorKind::NotSupported => return Ok(()),
                Err(error) => return Err(self.failed(error, at)),
            }
        }
        Ok(())
    }
}
