//! Requests of coroutines as entries of the ring: each queues one and waits for it.
//!
//! `None` from any of them means that the current context has no ring, and nothing was done.

use super::{Held, Uring};
use crate::buf::{IoVec, IoVecMut};
use crate::current::with_core;
use crate::engine::Engine;
use crate::sys::file::SegmentArray;
use crate::sys::pending::Pending;
use coblock_coroutine::{Co, IoWait};
use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of one request; longer ones are short transfers. A multiple of every alignment.
const MAX_TRANSFER: usize = 1 << 30;

/// Queues something in the ring of the current home, and waits for it. `None`: there is no ring.
///
/// # Safety
/// `queue` pushes a request whose user data is what it is given, and the memory that the request
/// names must stay valid until this returns.
#[inline(always)]
unsafe fn request(co: &Co, what: &'static str, queue: impl FnOnce(&Uring, u64)) -> Option<i32> {
    let wait = IoWait::new(what);
    let queued = with_core(|core| {
        let core = core.expect("I/O outside of every context: a coroutine of a home does I/O");
        let Engine::Uring(ring) = &core.engine else {
            return false;
        };
        queue(ring, Pending::new(&wait).into_user_data());
        true
    });
    queued.then(|| wait.wait(co))
}

/// The same for an entry without its user data.
///
/// # Safety
/// The memory that the entry names must stay valid until this returns.
#[inline(always)]
unsafe fn request_entry(co: &Co, what: &'static str, entry: Entry) -> Option<i32> {
    let queue = |ring: &Uring, data| {
        // SAFETY: the user data was just made from a Pending. The memory stays valid until the
        // completion: the caller's frame stands until it waited, or the process aborts.
        unsafe { ring.push(&entry.user_data(data)) };
    };
    // SAFETY: the caller's promise is the one that is asked for.
    unsafe { request(co, what, queue) }
}

/// The kernel takes offset -1 for "the current position", which we never mean.
const MAX_OFFSET: u64 = i64::MAX.cast_unsigned();

#[inline(always)]
fn transfer_len(len: usize) -> u32 {
    u32::try_from(len.min(MAX_TRANSFER)).expect("at most 1 GiB")
}

/// One attempt to read; `None`: the current context has no ring.
#[inline(always)]
pub(crate) fn read(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: &mut IoVecMut<'_>,
) -> Option<i32> {
    if offset > MAX_OFFSET {
        return Some(-libc::EINVAL);
    }
    let Some(segment) = buf.single() else {
        return read_vectored(co, fd, offset, buf);
    };
    let (fd, len) = (Fd(fd.as_raw_fd()), transfer_len(segment.len));
    let entry = opcode::Read::new(fd, segment.base, len)
        .offset(offset)
        .build();
    // SAFETY: `buf` is borrowed exclusively until this returns.
    unsafe { request_entry(co, "read", entry) }
}

/// One attempt to read what may lie in the page cache; `None`: the current context has no ring.
#[inline(always)]
pub(crate) fn read_cached(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: &mut IoVecMut<'_>,
) -> Option<i32> {
    if offset > MAX_OFFSET {
        return Some(-libc::EINVAL);
    }
    let Some(segment) = buf.single() else {
        return read_vectored(co, fd, offset, buf);
    };
    let (fd, len) = (fd.as_raw_fd(), transfer_len(segment.len));
    let queue = |ring: &Uring, data| {
        // SAFETY: the user data was just made from a Pending; the rest as in `request_entry`.
        unsafe {
            ring.hold(Held {
                fd,
                base: segment.base,
                len,
                offset,
                data,
            })
        };
    };
    // SAFETY: `buf` is borrowed exclusively until this returns.
    unsafe { request(co, "read", queue) }
}

#[inline(never)]
fn read_vectored(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: &mut IoVecMut<'_>) -> Option<i32> {
    let list = SegmentArray::collect(buf.segments());
    let fd = Fd(fd.as_raw_fd());
    let entry = opcode::Readv::new(fd, list.as_ptr(), list.count())
        .offset(offset)
        .build();
    // SAFETY: `buf` is borrowed exclusively, and `list` lives, until this returns.
    unsafe { request_entry(co, "read", entry) }
}

/// One attempt to write; `None`: the current context has no ring.
#[inline(always)]
pub(crate) fn write(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> Option<i32> {
    if offset > MAX_OFFSET {
        return Some(-libc::EINVAL);
    }
    let Some(segment) = buf.single() else {
        return write_vectored(co, fd, offset, buf);
    };
    let (fd, len) = (Fd(fd.as_raw_fd()), transfer_len(segment.len));
    let entry = opcode::Write::new(fd, segment.base, len)
        .offset(offset)
        .build();
    // SAFETY: `buf` is borrowed until this returns.
    unsafe { request_entry(co, "write", entry) }
}

#[inline(never)]
fn write_vectored(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> Option<i32> {
    let list = SegmentArray::collect(buf.segments());
    let fd = Fd(fd.as_raw_fd());
    let entry = opcode::Writev::new(fd, list.as_ptr(), list.count())
        .offset(offset)
        .build();
    // SAFETY: `buf` is borrowed, and `list` lives, until this returns.
    unsafe { request_entry(co, "write", entry) }
}

/// One attempt to sync; `None`: the current context has no ring.
pub(crate) fn sync(co: &Co, fd: BorrowedFd<'_>, data_only: bool) -> Option<i32> {
    let flags = if data_only {
        FsyncFlags::DATASYNC
    } else {
        FsyncFlags::empty()
    };
    let entry = opcode::Fsync::new(Fd(fd.as_raw_fd())).flags(flags).build();
    // SAFETY: no memory is named.
    unsafe { request_entry(co, "sync", entry) }
}

/// One attempt to fallocate; `None`: the current context has no ring.
pub(crate) fn fallocate(
    co: &Co,
    fd: BorrowedFd<'_>,
    mode: i32,
    offset: u64,
    len: u64,
) -> Option<i32> {
    let entry = opcode::Fallocate::new(Fd(fd.as_raw_fd()), len)
        .offset(offset)
        .mode(mode)
        .build();
    // SAFETY: no memory is named.
    unsafe { request_entry(co, "fallocate", entry) }
}

/// Waits until `fd` can be read or written; `None`: the current context has no ring.
pub(crate) fn poll(co: &Co, fd: BorrowedFd<'_>, write: bool) -> Option<i32> {
    let flag = if write { libc::POLLOUT } else { libc::POLLIN };
    let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), flag.cast_unsigned().into()).build();
    // SAFETY: no memory is named.
    unsafe { request_entry(co, "fd_ready", entry) }
}
