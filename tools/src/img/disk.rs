//! An image as these commands see it: whole sectors, bytes past the end of the last one are zeros.

use coblock::block::{self, BlockBackend, Status};
use coblock::coroutine::Co;

use crate::explain::explain;
use crate::open::Session;
use crate::spec::{Access, ImageSpec};

/// Disks are so many of these.
pub(super) const SECTOR: usize = 512;

/// An open image.
pub(super) struct Disk {
    backend: BlockBackend,
    /// What the user called it.
    pub(super) shown: String,
    /// Bytes, in whole sectors.
    pub(super) len: u64,
}

impl Disk {
    /// Opens the image that `spec` names.
    ///
    /// # Errors
    /// "Could not open ...".
    pub(super) fn open(
        co: &Co,
        session: &Session,
        spec: &ImageSpec,
        access: Access,
    ) -> Result<Self, String> {
        let backend = session
            .open(co, spec, access)
            .map_err(|error| spec.could_not_open(&error))?;
        Ok(Self {
            len: whole_sectors(backend.len(), spec.driver()),
            backend,
            shown: spec.shown.clone(),
        })
    }

    /// Closes it.
    ///
    /// # Errors
    /// Which image could not be closed, and why.
    pub(super) fn close(&self, co: &Co) -> Result<(), String> {
        let closed = self.backend.close(co);
        closed.map_err(|error| format!("Failed to close '{}': {}", self.shown, explain(&error)))
    }

    /// Memory for requests lies at multiples of this.
    pub(super) fn mem_alignment(&self) -> usize {
        self.backend.node().limits().mem_alignment
    }

    /// The layer that decides what the first bytes of the range are, and what it says. The range is
    /// inside the disk and not empty; the answer is about one byte at least.
    ///
    /// # Errors
    /// What the library says.
    pub(super) fn map(&self, co: &Co, offset: u64, len: u64) -> block::Result<Status> {
        self.ask(offset, len, |offset, len| self.backend.map(co, offset, len))
    }

    /// The first layer that holds the first bytes of the range, and what it says.
    ///
    /// # Errors
    /// As [`Disk::map`].
    pub(super) fn status(&self, co: &Co, offset: u64, len: u64) -> block::Result<Status> {
        self.ask(offset, len, |offset, len| {
            self.backend.block_status_above(co, None, offset, len)
        })
    }

    fn ask(
        &self,
        offset: u64,
        len: u64,
        question: impl Fn(u64, u64) -> block::Result<Status>,
    ) -> block::Result<Status> {
        let end = self.backend.len();
        let mut status = if offset < end {
            let mut status = question(offset, len.min(end - offset))?;
            if offset + status.len == end {
                status.len = len.min(status.len + rest_of_block(&status));
            }
            status
        } else {
            // The rest of the last sector goes on where the last byte is.
            let mut last = question(end - 1, 1)?;
            let past = offset - end;
            let is_data = past < rest_of_block(&last);
            last.place = last.place.map(|(node, at)| (node, at + 1 + past));
            Status {
                len,
                data: is_data,
                zero: !is_data,
                allocated: true,
                ..last
            }
        };
        status.eof = offset + status.len >= self.len;
        Ok(status)
    }

    /// Reads a range of the disk.
    ///
    /// # Errors
    /// What the library says.
    pub(super) fn read(&self, co: &Co, offset: u64, buf: &mut [u8]) -> block::Result<()> {
        let there = self.backend.len().saturating_sub(offset);
        let there = usize::try_from(there).map_or(buf.len(), |there| there.min(buf.len()));
        let (inside, past_end) = buf.split_at_mut(there);
        past_end.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        self.backend.pread(co, offset, inside)
    }
}

/// Bytes behind the last one of a file that are data as it is: where whole blocks are read, a block
/// that is data in its first part is data.
fn rest_of_block(last: &Status) -> u64 {
    match &last.place {
        Some((node, at)) if last.data => {
            let end = at + last.len;
            end.next_multiple_of(node.limits().request_alignment) - end
        }
        _ => 0,
    }
}

/// A length as disks have it: a file is padded to whole sectors, an image's own size is cut.
pub(super) fn whole_sectors(len: u64, driver: &str) -> u64 {
    const SECTOR_LEN: u64 = SECTOR as u64;
    match driver {
        "qcow2" => len - len % SECTOR_LEN,
        _ => len.checked_next_multiple_of(SECTOR_LEN).unwrap_or(len),
    }
}
