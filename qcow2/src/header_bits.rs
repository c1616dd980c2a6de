//! Feature bits of the header that change while an image is open: *dirty* and *corrupt*.
//!
//! The life of the dirty bit, with lazy refcounts:
//!
//! ```text
//!   clean --first mappings whose counts stay in memory--> dirty --close, everything written--> clean
//!                                                           |
//!                     power cut; opened for writing: refcounts rebuilt (check/rebuild.rs) --> clean
//! ```
//!
//! The bit is on stable storage before the first such mapping is written, and taken away only after
//! everything else is. (Hazards O11, O13, Q19. qcow2 specification, "incompatible_features", "Lazy
//! refcounts".)

use std::sync::atomic::Ordering::Relaxed;

use coblock_block::{GraphRead, Result};
use coblock_coroutine::Co;

use crate::error::Error;
use crate::header::Incompatible;
use crate::image::Qcow2;
use crate::spec;
use crate::types::Version;

/// The bits, as far as we know them. Its coroutine mutex is the innermost one.
pub(crate) struct HeaderBits {
    /// What the file may have: a bit is here before its write begins, and until a write without it
    /// was flushed.
    bits: Incompatible,
    /// The dirty bit is on stable storage.
    dirty: bool,
}

impl HeaderBits {
    pub const fn new(bits: Incompatible) -> Self {
        HeaderBits { bits, dirty: false }
    }
}

impl Qcow2 {
    /// Says in the file, durably, that refcounts may be behind. Costs I/O only once between opening
    /// and closing.
    ///
    /// # Errors
    /// I/O; nothing whose count is behind may be written then.
    pub(crate) fn mark_dirty(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let mut header = self.header_bits.lock(co);
        if header.dirty {
            return Ok(());
        }
        header.bits.insert(Incompatible::DIRTY);
        self.write_bits(co, graph, header.bits)?;
        header.dirty = true;
        Ok(())
    }

    /// Takes the dirty bit away, if it may be there. Everything else is on stable storage.
    ///
    /// # Errors
    /// I/O; the image may still be marked.
    pub(crate) fn mark_clean(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let mut header = self.header_bits.lock(co);
        if header.bits.contains(Incompatible::DIRTY) {
            header.dirty = false;
            self.write_bits(co, graph, header.bits - Incompatible::DIRTY)?;
            header.bits.remove(Incompatible::DIRTY);
        }
        Ok(())
    }

    fn write_bits(&self, co: &Co, graph: &GraphRead<'_>, bits: Incompatible) -> Result<()> {
        let field = bits.bits().to_be_bytes();
        self.write_table(co, graph, spec::HEADER_AT_INCOMPATIBLE, &field)?;
        self.file.flush(co, graph)
    }

    /// The image contradicts itself in a way that a write would make worse: marks it as corrupt, in
    /// the file too, and returns the error for the request that found it. (Hazard O13.)
    pub(crate) fn signal_corruption(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        what: Error,
    ) -> coblock_block::Error {
        if !self.corrupt.swap(true, Relaxed) {
            log::error!("the image is corrupt: {what}");
            if !self.read_only && self.geometry.version() == Version::V3 {
                let mut header = self.header_bits.lock(co);
                header.bits.insert(Incompatible::CORRUPT);
                if let Err(error) = self.write_bits(co, graph, header.bits) {
                    log::error!("the image could not be marked as corrupt: {error}");
                }
            }
        }
        if !self.read_only {
            self.take_no_more_changes(&format!("the image is corrupt: {what}"));
        }
        what.into()
    }
}
