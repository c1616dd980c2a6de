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

use crate::entry::EntryError;
use crate::error::Error;
use crate::header::Incompatible;
use crate::image::Qcow2;
use crate::spec;
use crate::types::{GuestOffset, HostOffset, Version};

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
    /// the file too, and returns the error for the request that found it. If it was open for
    /// writing, every later request fails with `ENOMEDIUM`, as in the reference. (Hazard O13.)
    pub(crate) fn signal_corruption(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        what: Error,
    ) -> coblock_block::Error {
        self.mark_corrupt(co, graph, &what, Found::ByWrite);
        what.into()
    }

    /// Marks the image as corrupt if `error`, with which a request failed, says so.
    #[cold]
    pub(crate) fn notice(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        error: coblock_block::Error,
        found: Found,
    ) -> coblock_block::Error {
        let what = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<Error>());
        if let Some(what) = what
            && self.event_words(what, found).is_some()
        {
            self.mark_corrupt(co, graph, what, found);
        }
        error
    }

    /// What was found is told once, under the target [`EVENTS`], in the reference's words.
    fn mark_corrupt(&self, co: &Co, graph: &GraphRead<'_>, what: &Error, found: Found) {
        if !self.read_only {
            self.stop_because_corrupt(what);
        }
        if !self.corrupt.swap(true, Relaxed) {
            let words = self
                .event_words(what, found)
                .unwrap_or_else(|| what.to_string());
            if self.read_only {
                log::error!(
                    target: EVENTS,
                    "Image is corrupt: {words}; further non-fatal corruption events will be \
                     suppressed"
                );
            } else {
                log::error!(
                    target: EVENTS,
                    "Marking image as corrupt: {words}; further corruption events will be \
                     suppressed"
                );
            }
            if !self.read_only && self.geometry.version() == Version::V3 {
                let mut header = self.header_bits.lock(co);
                header.bits.insert(Incompatible::CORRUPT);
                if let Err(error) = self.write_bits(co, graph, header.bits) {
                    log::error!("the image could not be marked as corrupt: {error}");
                }
            }
        }
    }

    /// The reference's words for what is wrong; nothing for what it does not take for corruption.
    fn event_words(&self, what: &Error, found: Found) -> Option<String> {
        let at = |guest: GuestOffset| {
            let table = self.l2_table_of(guest).ok().flatten();
            let table = table.map_or(0, HostOffset::get);
            (table, self.geometry.l2_index(guest) as u64)
        };
        let data = |kind: &str, entry: u64, guest: GuestOffset| {
            let host = hex(entry & spec::ENTRY_OFFSET_MASK);
            match found {
                Found::ByRead => {
                    let (table, index) = at(guest);
                    let (table, index) = (hex(table), hex(index));
                    Some(format!(
                        "Cluster allocation offset {host} unaligned (L2 offset: {table}, L2 \
                         index: {index})"
                    ))
                }
                Found::ByWrite => {
                    let guest = hex(guest.get());
                    Some(format!(
                        "{kind} offset {host} unaligned (guest offset: {guest})"
                    ))
                }
                Found::Otherwise => None,
            }
        };
        match what {
            Error::Entry(EntryError::L1Unaligned { index, entry }) => {
                let (host, index) = (hex(entry & spec::ENTRY_OFFSET_MASK), hex(*index));
                Some(format!(
                    "L2 table offset {host} unaligned (L1 index: {index})"
                ))
            }
            Error::Entry(EntryError::UnalignedData { guest, entry }) => {
                data("Data cluster", *entry, *guest)
            }
            Error::Entry(EntryError::UnalignedZero { guest, entry }) => {
                data("Preallocated zero cluster", *entry, *guest)
            }
            Error::RefcountTableEntry { entry, cluster } => {
                let host = entry & !spec::REFCOUNT_TABLE_RESERVED;
                let index = hex(self.geometry.refcount_table_index(*cluster));
                (!self.geometry.is_aligned(host)).then(|| {
                    let host = hex(host);
                    format!("Refblock offset {host} unaligned (reftable index: {index})")
                })
            }
            Error::DataInTable { table, .. }
            | Error::UncountedTable { table, .. }
            | Error::SharedTable { table, .. }
            | Error::TableInUse { table, .. } => {
                let table = match *table {
                    "image header" => "qcow2_header",
                    "L2 table" => "active L2 table",
                    "L1 table of a snapshot" => "inactive L1 table",
                    "L2 table of a snapshot" => "inactive L2 table",
                    other => other,
                };
                Some(format!(
                    "Preventing invalid write on metadata (overlaps with {table})"
                ))
            }
            _ => None,
        }
    }
}

/// The target of records about corruption that was found: for programs that show them to people.
pub const EVENTS: &str = "qcow2";

/// What a request was at when it found damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    ByRead,
    ByWrite,
    /// By a discard or zeroes, which need not follow the entry.
    Otherwise,
}

/// As C prints a number with `%#x`.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        other => format!("{other:#x}"),
    }
}
