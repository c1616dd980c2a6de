//! The file below an image, as operations on whole images read and write it.
//!
//! Such an operation gets one value instead of coroutine, graph and edge: an [`ImageFile`]. It is
//! made from the edge to the file, or from the handle of a program that has opened the file without
//! its format (to create an image, or to look at one that cannot be opened). A read past the end
//! gives zeros, as everywhere in a graph of nodes; an offset that no file can have is an error, so
//! that a table at such a place is not mistaken for an empty one.

use std::ops::Range;

use coblock_aio::{IoVec, IoVecMut};
use coblock_block::{BlockBackend, Child, GraphRead, MAX_LENGTH, RequestFlags, Result};
use coblock_coroutine::Co;

use crate::budget::{Budget, MEMORY_LIMIT_DEFAULT};
use crate::error::Error;
use crate::header::Header;
use crate::types::index;

/// Bytes of memory that a byte of the first cluster may become: an empty extension of 8 bytes is a
/// value of 40, and lists have room for more.
const HEADER_COST: u64 = 8;
const HEADER_MEMORY: &str = "bytes of memory for header and extensions";

/// How the file is reached.
#[derive(Clone, Copy)]
enum Reach<'a> {
    Child(&'a GraphRead<'a>, &'a Child),
    Backend(&'a BlockBackend),
}

/// The file of an image for the length of one operation, in one coroutine.
#[derive(Clone, Copy)]
pub struct ImageFile<'a> {
    co: &'a Co,
    reach: Reach<'a>,
    memory_limit: u64,
}

impl<'a> ImageFile<'a> {
    /// The file below a format's node.
    #[must_use]
    pub const fn new(co: &'a Co, graph: &'a GraphRead<'a>, file: &'a Child) -> Self {
        Self {
            co,
            reach: Reach::Child(graph, file),
            memory_limit: MEMORY_LIMIT_DEFAULT,
        }
    }

    /// A file that was opened for itself.
    #[must_use]
    pub const fn of_backend(co: &'a Co, file: &'a BlockBackend) -> Self {
        Self {
            co,
            reach: Reach::Backend(file),
            memory_limit: MEMORY_LIMIT_DEFAULT,
        }
    }

    /// The same file, whose image may ask an operation for `bytes` of memory instead of
    /// [`MEMORY_LIMIT_DEFAULT`].
    #[must_use]
    pub const fn with_memory_limit(self, bytes: u64) -> Self {
        Self {
            memory_limit: bytes,
            ..self
        }
    }

    const fn budget(&self) -> Budget {
        Budget::new(self.memory_limit)
    }

    /// What one operation may spend on this image, whose header it has in memory.
    ///
    /// # Errors
    /// `LimitExceeded`: the header is too much.
    pub fn budget_beside(&self, header: &Header) -> Result<Budget> {
        let mut budget = self.budget();
        budget.take(HEADER_MEMORY, HEADER_COST * header.geometry.cluster_size())?;
        Ok(budget)
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self.reach {
            Reach::Child(graph, file) => file.len(graph),
            Reach::Backend(file) => file.len(),
        }
    }

    /// Has the file no bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a file can have these bytes.
    ///
    /// # Errors
    /// `OutOfRange`, naming them.
    pub fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > MAX_LENGTH) {
            return Err(Error::OutOfRange { offset, len }.into());
        }
        Ok(())
    }

    /// Fills `buf` from `offset` on; past the end of the file with zeros. Suspends.
    ///
    /// # Errors
    /// `OutOfRange`, or what the file's driver returned.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let here = self.len().saturating_sub(offset).min(buf.len() as u64);
        let (here, past) = buf.split_at_mut(index(here));
        past.fill(0);
        if here.is_empty() {
            return Ok(());
        }
        let here = IoVecMut::from(here);
        match self.reach {
            Reach::Child(graph, file) => {
                file.pread(self.co, graph, offset, here, RequestFlags::empty())
            }
            Reach::Backend(file) => file.pread(self.co, offset, here),
        }
    }

    /// The length of the hole at `offset`: bytes that read as zeros because nobody wrote them. Zero
    /// where there is none, or where the driver does not tell. Suspends.
    fn hole_at(&self, offset: u64) -> u64 {
        let len = self.len().saturating_sub(offset);
        let status = match self.reach {
            Reach::Child(graph, file) => file.block_status(self.co, graph, offset, len),
            Reach::Backend(file) => file.block_status(self.co, offset, len),
        };
        status.map_or(0, |found| if found.zero { found.len } else { 0 })
    }

    /// Reads and decodes the header. Suspends.
    ///
    /// # Errors
    /// What [`Header::decode`] says of it, more memory than the limit, or what the file's driver
    /// returned.
    pub fn read_header(&self) -> Result<Header> {
        let len = self.len();
        let mut start = vec![0; index(len.min(512))];
        self.read(0, &mut start)?;
        let cluster_len = len.min(Header::len_to_read(&start)? as u64);
        self.budget()
            .take(HEADER_MEMORY, HEADER_COST * cluster_len)?;
        let mut cluster = vec![0; index(cluster_len)];
        self.read(0, &mut cluster)?;
        Ok(Header::decode(&cluster)?)
    }

    /// Writes `buf` at `offset`, which has to be inside the file. Suspends.
    ///
    /// # Errors
    /// What the file's driver returned; any part of the range may have changed then.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let buf = IoVec::from(buf);
        let none = RequestFlags::empty();
        match self.reach {
            Reach::Child(graph, file) => file.pwrite(self.co, graph, offset, buf, none),
            Reach::Backend(file) => file.pwrite(self.co, offset, buf, none),
        }
    }

    /// Makes a range inside the file read as zeros, and keeps or gets it storage. Suspends.
    ///
    /// # Errors
    /// As [`ImageFile::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let none = RequestFlags::empty();
        match self.reach {
            Reach::Child(graph, file) => file.pwrite_zeroes(self.co, graph, offset, len, none),
            Reach::Backend(file) => file.pwrite_zeroes(self.co, offset, len, none),
        }
    }

    /// Makes the file `len` bytes long. Suspends.
    ///
    /// # Errors
    /// What the file's driver returned; `NotSupported` for a device.
    pub fn truncate(&self, len: u64) -> Result<()> {
        match self.reach {
            Reach::Child(graph, file) => file.truncate(self.co, graph, len, true),
            Reach::Backend(file) => file.truncate(self.co, len, true),
        }
    }

    /// Everything written before is on stable storage when this returns. Suspends.
    ///
    /// # Errors
    /// What the file's driver returned.
    pub fn flush(&self) -> Result<()> {
        match self.reach {
            Reach::Child(graph, file) => file.flush(self.co, graph),
            Reach::Backend(file) => file.flush(self.co),
        }
    }
}

/// The last hole of the file in which something was looked for. A table can refer to a million
/// places in one hole: a single question tells that all of them are zeros.
#[derive(Default)]
pub(crate) struct Hole(Range<u64>);

impl Hole {
    /// Is it known that these bytes are zeros?
    pub(crate) fn covers(&self, offset: u64, len: u64) -> bool {
        self.0.start <= offset && offset.saturating_add(len) <= self.0.end
    }

    /// Zeros were read at `offset`: is that a hole, and how long? Suspends.
    pub(crate) fn zeros_at(&mut self, file: &ImageFile<'_>, offset: u64) {
        self.0 = offset..offset.saturating_add(file.hole_at(offset));
    }
}

/// A table that is read from its start, entry by entry, through a buffer of bounded size.
pub(crate) struct Window<'a> {
    file: ImageFile<'a>,
    /// Where the table begins in the file.
    table: u64,
    /// Where the buffer begins in the table.
    start: u64,
    buf: Vec<u8>,
}

impl<'a> Window<'a> {
    /// How much is read at once.
    pub(crate) const LEN: usize = 256 << 10;

    pub(crate) const fn new(file: ImageFile<'a>, table: u64) -> Self {
        Self {
            file,
            table,
            start: 0,
            buf: Vec::new(),
        }
    }

    /// The table from `at` on: at least `need` bytes, with zeros past the end of the file.
    /// Suspends.
    ///
    /// # Errors
    /// What reading returned.
    ///
    /// # Panics
    /// More than [`Window::LEN`] bytes asked for.
    pub(crate) fn at(&mut self, at: u64, need: usize) -> Result<&[u8]> {
        assert!(
            need <= Self::LEN,
            "a window of {} bytes has not {need}",
            Self::LEN
        );
        let inside = at
            .checked_sub(self.start)
            .filter(|skip| skip.saturating_add(need as u64) <= self.buf.len() as u64);
        let skip = match inside {
            Some(skip) => index(skip),
            None => {
                self.buf.resize(Self::LEN, 0);
                self.file
                    .read(self.table.saturating_add(at), &mut self.buf)?;
                self.start = at;
                0
            }
        };
        Ok(self.buf.get(skip..).unwrap_or_default())
    }
}
