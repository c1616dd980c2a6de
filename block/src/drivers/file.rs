//! `file`: a regular file or a block device of the host.
//!
//! Options: `filename`, or `fd` (an open file that the caller passes in; `filename` is then only
//! its name in messages); `locking` (`on`, `off`, or `auto`, which is on). `cache.direct` goes
//! around the page cache.
//!
//! Requests run in whatever context the coroutine is in; the file itself belongs to none. The
//! driver has the file that `opened` made, grows it by `ahead`, has the lock bytes of `locks`, the
//! alignment that `probe` found, and knows holes by `extents`.

mod ahead;
mod extents;
mod locks;
mod opened;
mod probe;
mod queue;

use crate::driver::{
    Changes, Driver, DriverStatus, OpenDriver, Place, Precision, shrinks_preallocated,
    unsupported_preallocation,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{GraphAccess, GraphCell, GraphRead, GraphWrite};
use crate::io::{Copied, CopySource, CopyTarget};
use crate::open::Opening;
use crate::types::{
    FileId, Limits, MAX_ALIGNMENT, MAX_REQUEST, Permissions, Preallocation, RequestFlags,
    align_down, align_up, bytes, in_memory,
};
use ahead::Ahead;
use coblock_aio::{AlignedBuf, IoVec, IoVecMut};
use coblock_coroutine::{Co, ThreadLock};
use locks::Held;
use opened::{Opened, Wanted, could_not_open};
use probe::{Alignment, Found};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes that one call of the host copies: it holds a thread of the pool meanwhile.
const COPY_MAX: u64 = 16 << 20;

/// Bytes of zeros that are written at once to space that is to be taken.
const ZEROS_AT_ONCE: u64 = 1 << 20;

/// Registered as `file`.
#[derive(Debug)]
pub struct OpenFile;

impl OpenDriver for OpenFile {
    fn open(&self, _co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let filename = opening.options().take_str("filename")?;
        let fd = opening.options().take_fd("fd")?;
        let locking = match opening.options().take_str("locking")?.as_deref() {
            None | Some("auto" | "on") => true,
            Some("off") => false,
            Some(_) => {
                let message = "Parameter 'locking' expects 'on', 'off' or 'auto'";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        };
        let wanted = Wanted {
            read_only: opening.is_read_only(),
            direct: opening.is_direct(),
        };
        let adopted = fd.is_some();
        let (file, filename) = match (fd, filename) {
            (Some(fd), name) => {
                let name = name.unwrap_or_else(|| "(open file)".to_owned());
                let file = fd
                    .try_clone()
                    .map_err(|error| could_not_open(&name, error))?;
                (wanted.adopt(File::from(file), &name)?, name)
            }
            (None, Some(name)) => (wanted.open(&name)?, name),
            (None, None) => {
                let message = "The 'file' block driver requires a file name";
                return Err(Error::new(ErrorKind::MissingOption, message));
            }
        };
        opening.set_filename(&filename);
        let context = |error: Error| error.context(format_args!("Could not open '{filename}'"));
        let found = probe::look(&file).map_err(context)?.ok_or_else(|| {
            let message = format!("'file' driver requires '{filename}' to be a regular file");
            Error::new(ErrorKind::Invalid, message)
        })?;
        opening.check_file(found.id)?;
        if locking {
            locks::acquire(file.as_fd(), opening.permissions(), &filename)?;
        }
        let opened = Opened::new(file, &found, wanted.direct, &filename)?;
        let permissions = opening.permissions();
        Ok(Box::new(HostFile {
            ahead: if !wanted.read_only && found.grows(opened.medium) {
                Ahead::of_file(found.len)
            } else {
                Ahead::never()
            },
            len: AtomicU64::new(found.len),
            locks: locking.then(|| ThreadLock::new(Held::new(&opened.file, permissions))),
            copies: AtomicBool::new(true),
            filename,
            found,
            alignment: ThreadLock::new(opened.alignment),
            next: ThreadLock::new(None),
            adopted,
            opened: GraphCell::new(opening.graph(), opened),
        }))
    }
}

struct HostFile {
    opened: GraphCell<Opened>,
    /// Ready to take its place, while the node gets other options.
    next: ThreadLock<Option<Opened>>,
    /// The caller had opened it: there is no name to open it anew.
    adopted: bool,
    filename: String,
    found: Found,
    /// Of the file that is open: for [`Driver::limits`], which is asked at open and after a reopen.
    alignment: ThreadLock<Alignment>,
    /// The lock bytes that are held; none with `locking=off`.
    locks: Option<ThreadLock<Held>>,
    /// The host copies to this file, as far as is known.
    copies: AtomicBool,
    /// Space set aside past the end.
    ahead: Ahead,
    /// Length in bytes, raised by writes past it.
    len: AtomicU64,
}

impl HostFile {
    #[cold]
    fn failed(&self, what: &str, offset: u64, error: io::Error) -> Error {
        Error::from_io(what, error)
            .at_offset(offset)
            .at_file(&self.filename)
    }

    /// Writes zeros past the end, from `from` to `to`; whole blocks only, where requests must be
    /// aligned: of the blocks at both ends the file system sets the rest aside.
    fn write_zeros(&self, co: &Co, graph: &GraphRead<'_>, from: u64, to: u64) -> io::Result<()> {
        let Opened {
            alignment, medium, ..
        } = self.opened.get(graph);
        let Alignment { request, memory } = *alignment;
        let piece = ZEROS_AT_ONCE.max(request);
        let no_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
        let zeros = AlignedBuf::try_new(in_memory(piece), memory).map_err(|_| no_memory())?;
        let (mut at, end) = (
            align_up(from, request).unwrap_or(to),
            align_down(to, request),
        );
        while at < end {
            let part = (end - at).min(piece);
            let source = IoVec::from(&zeros[..in_memory(part)]);
            coblock_aio::co::write_to(co, self.fd(graph), *medium, at, source)?;
            at += part;
        }
        if request == 1 {
            return Ok(());
        }
        coblock_aio::co::allocate(co, self.fd(graph), from, to - from, false)
    }

    #[inline]
    fn fd<'g>(&'g self, graph: &'g impl GraphAccess) -> BorrowedFd<'g> {
        self.file(graph).as_fd()
    }

    #[inline]
    fn file<'g>(&'g self, graph: &'g impl GraphAccess) -> &'g Arc<File> {
        &self.opened.get(graph).file
    }

    #[inline]
    fn grew_to(&self, end: u64) {
        if end > self.len.load(Ordering::Relaxed) {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }
}

impl Driver for HostFile {
    fn format(&self) -> &'static str {
        "file"
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let len = buf.len();
        let Opened { file, medium, .. } = self.opened.get(graph);
        match coblock_aio::co::read_from(co, file.as_fd(), *medium, offset, buf.reborrow()) {
            Ok(read) => {
                if read < len {
                    // The end of the file: padding, or somebody cut it. The rest is zeros.
                    buf.fill(read, len - read, 0);
                }
                Ok(())
            }
            Err(error) => Err(self.failed("read", offset, error)),
        }
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let end = offset + bytes(buf.len());
        let Opened { file, medium, .. } = self.opened.get(graph);
        self.ahead.before_write(co, file, offset, end);
        match coblock_aio::co::write_to(co, file.as_fd(), *medium, offset, buf) {
            Ok(()) => {
                self.grew_to(end);
                Ok(())
            }
            Err(error) => Err(self.failed("write", offset, error)),
        }
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        if flags.contains(RequestFlags::NO_FALLBACK) && self.found.queue.max_zeroes == Some(0) {
            // The kernel would write them.
            return Err(self.not_supported("zeroes that the device makes"));
        }
        let unmap = flags.contains(RequestFlags::MAY_UNMAP);
        match coblock_aio::co::zero(co, self.fd(graph), offset, len, unmap) {
            Ok(()) => {
                self.grew_to(offset + len);
                Ok(())
            }
            Err(error) => Err(self.failed("write zeroes", offset, error)),
        }
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        coblock_aio::co::discard(co, self.fd(graph), offset, len)
            .map_err(|error| self.failed("discard", offset, error))
    }

    fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        if self.found.is_block_device {
            return Ok(Copied::No);
        }
        let file = self.fd(graph);
        to.take(co, graph, CopySource { file, offset, len })
    }

    fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        if self.found.is_block_device || !self.copies.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let len = in_memory(source.len.min(COPY_MAX));
        let (mut from, mut to) = (source.offset, offset);
        let file = self.file(graph);
        let copied = coblock_aio::co::on_pool(co, || {
            let (from, to) = (Some(&mut from), Some(&mut to));
            rustix::fs::copy_file_range(source.file, from, file, to, len)
        });
        match copied {
            Ok(copied) => {
                self.grew_to(offset + bytes(copied));
                Ok(bytes(copied))
            }
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP) => {
                self.copies.store(false, Ordering::Relaxed);
                Ok(0)
            }
            // This range or these two files, not any.
            Err(Errno::INVAL | Errno::BADF | Errno::TXTBSY | Errno::PERM) => Ok(0),
            Err(errno) => Err(self.failed("copy", offset, errno.into())),
        }
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        coblock_aio::co::sync(co, self.fd(graph), true)
            .map_err(|error| Error::from_io("flush", error).at_file(&self.filename))
    }

    /// As the file system has it, holes and all; asked on a thread of the pool.
    fn block_status<'g>(
        &'g self,
        co: &Co,
        graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        let (is_hole, len) = match precision {
            Precision::Allocation => (false, len),
            Precision::Zeroes => {
                let file = self.file(graph);
                coblock_aio::co::on_pool(co, || extents::look(file, offset, len))
            }
        };
        let status = if is_hole {
            DriverStatus::zero(len)
        } else {
            DriverStatus::data(len)
        };
        Ok(status.placed(Place::Here(offset)))
    }

    fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        let file = self.file(graph);
        coblock_aio::co::on_pool(co, || file.metadata())
            .map(|metadata| metadata.blocks() * 512)
            .map_err(|error| Error::from_io("stat", error).at_file(&self.filename))
    }

    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        let file = self.file(graph);
        let refuse = |message: &str| Err(Error::new(ErrorKind::NotSupported, message));
        if self.found.is_block_device {
            let now = probe::length(file, true)?;
            self.len.store(now, Ordering::Release);
            return match len {
                _ if len > now => refuse("Cannot grow device files"),
                _ if exact && len != now => refuse("Cannot resize device files"),
                _ => Ok(()),
            };
        }
        coblock_aio::co::on_pool(co, || file.set_len(len))
            .map_err(|error| self.failed("Could not resize file", len, error))?;
        self.ahead.was_resized(co, len);
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        if self.found.is_block_device {
            let mode = preallocation.name();
            let message =
                format!("Preallocation mode '{mode}' unsupported for this non-regular file");
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        let now = self.len();
        if len < now {
            return Err(shrinks_preallocated());
        }
        let taken = match preallocation {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata => return Err(unsupported_preallocation(preallocation)),
            Preallocation::Falloc => {
                coblock_aio::co::allocate(co, self.fd(graph), now, len - now, false)
            }
            Preallocation::Full => self.write_zeros(co, graph, now, len),
        };
        let file = self.file(graph);
        let resized = coblock_aio::co::on_pool(co, || {
            let end = if taken.is_ok() { len } else { now };
            file.set_len(end)
        });
        self.ahead
            .was_resized(co, if taken.is_ok() { len } else { now });
        taken.map_err(|error| {
            self.failed("Could not preallocate data for the new file", now, error)
        })?;
        resized.map_err(|error| self.failed("Could not resize file", len, error))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn limits(&self) -> Limits {
        let Alignment { request, memory } = *self.alignment.lock();
        let mut limits = Limits {
            request_alignment: request,
            mem_alignment: memory,
            zero_alignment: request.max(self.found.sector),
            ..Limits::default()
        };
        let queue = &self.found.queue;
        let granularity = queue.discard_granularity.unwrap_or(1).min(MAX_ALIGNMENT);
        limits.discard_alignment = limits.zero_alignment.max(granularity);
        // A device that has none of it says so when it is asked.
        let most = |max: Option<u64>, alignment: u64| match max {
            Some(max) if max >= alignment => align_down(max, alignment).min(MAX_REQUEST),
            _ => MAX_REQUEST,
        };
        limits.max_discard = most(queue.max_discard, limits.discard_alignment);
        limits.max_zeroes = most(queue.max_zeroes, limits.zero_alignment);
        limits.device_transfer = most(queue.max_transfer, 1);
        limits.device_segments = queue.max_segments.unwrap_or(usize::MAX);
        limits
    }

    fn is_growable(&self) -> bool {
        !self.found.is_block_device
    }

    fn file_id(&self) -> Option<FileId> {
        Some(self.found.id)
    }

    fn permissions_prepare(&self, all: Permissions) -> Result<()> {
        let Some(held) = &self.locks else {
            return Ok(());
        };
        held.lock().prepare(all, &self.filename)
    }

    fn permissions_commit(&self) {
        if let Some(held) = &self.locks {
            held.lock().commit();
        }
    }

    fn permissions_abort(&self) {
        if let Some(held) = &self.locks {
            held.lock().abort();
        }
    }

    /// A file that can be written stays open as it is when its node becomes read-only.
    fn reopen_prepare(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        to: &mut Changes<'_>,
    ) -> Result<Option<Box<dyn Driver>>> {
        let context = |error: Error| error.at_file(&self.filename);
        let now = self.file(graph);
        let flags = rustix::fs::fcntl_getfl(now)
            .map_err(|errno| context(Error::from_io("fcntl", errno.into())))?;
        let has_access = to.read_only || flags & OFlags::RWMODE == OFlags::RDWR;
        if has_access && to.direct == to.was_direct {
            return Ok(None);
        }
        if self.adopted {
            let message = if has_access {
                "A file that was passed in open keeps its way past the cache"
            } else {
                "A file that was passed in open for reading cannot become writable"
            };
            return Err(context(Error::new(ErrorKind::NotSupported, message)));
        }
        let wanted = Wanted {
            read_only: to.read_only,
            direct: to.direct,
        };
        let file = wanted.open(&self.filename)?;
        if probe::look(&file)?.is_none_or(|found| found.id != self.found.id) {
            let message = "Another file has this name now";
            return Err(context(Error::new(ErrorKind::NotFound, message)));
        }
        if self.locks.is_some() {
            locks::try_out(file.as_fd()).map_err(context)?;
        }
        // The new one counts anew what it sets aside.
        let len = self.len();
        self.ahead
            .cut(co, now, len)
            .map_err(|error| self.failed("resize", len, error))?;
        self.ahead.was_resized(co, len);
        let opened = Opened::new(file, &self.found, to.direct, &self.filename)?;
        *self.next.lock() = Some(opened);
        Ok(None)
    }

    fn reopen_commit(&self, graph: &mut GraphWrite<'_>) {
        let Some(opened) = self.next.lock().take() else {
            return;
        };
        if let Some(held) = &self.locks {
            held.lock().move_to(&opened.file);
        }
        *self.alignment.lock() = opened.alignment;
        drop(self.opened.replace(graph, opened));
    }

    fn reopen_abort(&self, _co: &Co) {
        drop(self.next.lock().take());
    }

    fn reopen_clean(&self, co: &Co, graph: &GraphRead<'_>) {
        let Opened { file, medium, .. } = self.opened.get(graph);
        let writable =
            rustix::fs::fcntl_getfl(file).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR);
        if writable && self.found.grows(*medium) {
            self.ahead.may_grow(co, self.len());
        }
    }

    /// Cuts off what was set aside, and gives the locks back now, not when the last duplicate of
    /// the descriptor goes.
    fn close(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let len = self.len();
        let cut = self.ahead.cut(co, self.file(graph), len);
        if self.locks.is_some() {
            locks::release(self.fd(graph));
        }
        cut.map_err(|error| self.failed("resize", len, error))
    }
}
