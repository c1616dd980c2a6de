//! What a coroutine waits for: I/O on files, descriptors, time, threads, other contexts.
//!
//! Every function here suspends, and works in whatever context the coroutine runs in now; outside
//! of every context it panics. `EINTR`, `EAGAIN`, short transfers and full queues do not come out.
//!
//! The first attempt of a read or write is inlined into the caller and is all there is in the usual
//! case; what a short or failed one needs is out of line.

use crate::buf::{IoVec, IoVecMut};
use crate::context::{AioContext, Arriving};
use crate::current::{Live, current, with_core};
use crate::engine;
use crate::fd_handler::FdHandler;
use crate::medium::Medium;
use crate::sys::file::{self, allocate as mode};
use crate::sys::pending::Pending;
use crate::transfer::{Next, finish_read, finish_write};
use coblock_coroutine::{Co, Error, IoWait, Schedule};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Reads into all of `buf` from `offset` (bytes); tells how many came, fewer only at the end of the
/// file. Suspends.
///
/// # Errors
/// What the system says; part of `buf` may then have been written. `Unsupported` in a context
/// without engine.
#[inline(always)]
pub fn read(co: &Co, fd: BorrowedFd<'_>, offset: u64, mut buf: IoVecMut<'_>) -> io::Result<usize> {
    let len = buf.len();
    if len == 0 {
        return Ok(0);
    }
    let result = engine::read(co, fd, offset, &mut buf);
    match usize::try_from(result) {
        Ok(count) if count == len => Ok(len),
        _ => read_rest(co, fd, offset, buf, result),
    }
}

/// The same as [`read`], in the way that is best for what the descriptor reaches. Suspends, unless
/// that is memory.
///
/// # Errors
/// As [`read`].
#[inline(always)]
pub fn read_from(
    co: &Co,
    fd: BorrowedFd<'_>,
    medium: Medium,
    offset: u64,
    mut buf: IoVecMut<'_>,
) -> io::Result<usize> {
    let len = buf.len();
    if len == 0 {
        return Ok(0);
    }
    let result = engine::read_from(co, fd, medium, offset, &mut buf);
    match usize::try_from(result) {
        Ok(count) if count == len => Ok(len),
        _ => read_rest(co, fd, offset, buf, result),
    }
}

/// Goes on after an attempt that gave `result`.
#[cold]
#[inline(never)]
fn read_rest(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    mut buf: IoVecMut<'_>,
    result: i32,
) -> io::Result<usize> {
    let len = buf.len();
    let attempt = |next: Next| {
        let (at, mut rest) = (
            offset + next.done as u64,
            buf.slice(next.done, len - next.done),
        );
        if next.on_thread {
            engine::read_on_threads(co, fd, at, &mut rest)
        } else {
            engine::read(co, fd, at, &mut rest)
        }
    };
    finish_read(offset, len, result, attempt, || file::len(fd))
}

/// Writes all of `buf` at `offset` (bytes); the file grows as needed. Suspends until the kernel has
/// taken it; [`sync`] makes it stable.
///
/// # Errors
/// What the system says; `ENOSPC` also when it takes nothing and says nothing. Any part of the
/// range may then hold old or new data.
#[inline(always)]
pub fn write(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> io::Result<()> {
    if buf.is_empty() {
        return Ok(());
    }
    let result = engine::write(co, fd, offset, buf);
    match usize::try_from(result) {
        Ok(count) if count == buf.len() => Ok(()),
        _ => write_rest(co, fd, offset, buf, result),
    }
}

/// The same as [`write`](fn@write), in the way that is best for what the descriptor reaches.
/// Suspends, unless that is memory.
///
/// # Errors
/// As [`write`](fn@write).
#[inline(always)]
pub fn write_to(
    co: &Co,
    fd: BorrowedFd<'_>,
    medium: Medium,
    offset: u64,
    buf: IoVec<'_>,
) -> io::Result<()> {
    if buf.is_empty() {
        return Ok(());
    }
    let result = engine::write_to(co, fd, medium, offset, buf);
    match usize::try_from(result) {
        Ok(count) if count == buf.len() => Ok(()),
        _ => write_rest(co, fd, offset, buf, result),
    }
}

/// Goes on after an attempt that gave `result`.
#[cold]
#[inline(never)]
fn write_rest(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: IoVec<'_>,
    result: i32,
) -> io::Result<()> {
    let len = buf.len();
    finish_write(len, result, |next| {
        let (at, rest) = (
            offset + next.done as u64,
            buf.slice(next.done, len - next.done),
        );
        if next.on_thread {
            engine::write_on_threads(co, fd, at, rest)
        } else {
            engine::write(co, fd, at, rest)
        }
    })
}

/// Repeats a call without data until it is neither interrupted nor put off.
fn until_done(mut attempt: impl FnMut() -> i32) -> io::Result<()> {
    loop {
        match -attempt() {
            libc::EINTR | libc::EAGAIN => {}
            errno if errno > 0 => return Err(io::Error::from_raw_os_error(errno)),
            _ => return Ok(()),
        }
    }
}

/// Brings everything that was written before to stable storage; with `data_only` without times and
/// the like. Suspends.
///
/// # Errors
/// What the system says. The kernel may then have dropped what it could not write: do not take a
/// later success for it.
pub fn sync(co: &Co, fd: BorrowedFd<'_>, data_only: bool) -> io::Result<()> {
    until_done(|| engine::sync(co, fd, data_only))
}

/// Makes `len` bytes at `offset` read as zeros without writing them; a file that ends inside the
/// range, or before, grows to its end. `may_unmap`: the space may be given back. Suspends.
///
/// # Errors
/// `Unsupported` (`EOPNOTSUPP`) where the file system cannot: the caller writes zeros.
pub fn zero(co: &Co, fd: BorrowedFd<'_>, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    // Punching does not grow a file, so only what lies inside may be punched.
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| file::len(fd).is_ok_and(|l| end <= l));
    if may_unmap && inside {
        match until_done(|| engine::fallocate(co, fd, mode::PUNCH_HOLE, offset, len)) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            other => return other,
        }
    }
    until_done(|| engine::fallocate(co, fd, mode::ZERO_RANGE, offset, len))
}

/// Gives the space of `len` bytes at `offset` back; they read as zeros; the length stays. Suspends.
///
/// # Errors
/// `Unsupported` (`EOPNOTSUPP`) where the file system cannot.
pub fn discard(co: &Co, fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    until_done(|| engine::fallocate(co, fd, mode::PUNCH_HOLE, offset, len))
}

/// Makes the file system set space aside for `len` bytes at `offset`; contents stay, and new bytes
/// read as zeros. The file grows, unless `keep_size`. Suspends.
///
/// # Errors
/// `Unsupported` (`EOPNOTSUPP`) where the file system cannot; `ENOSPC`.
pub fn allocate(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    len: u64,
    keep_size: bool,
) -> io::Result<()> {
    let mode = if keep_size {
        mode::KEEP_SIZE
    } else {
        mode::GROW
    };
    if len == 0 {
        return Ok(());
    }
    until_done(|| engine::fallocate(co, fd, mode, offset, len))
}

/// What a descriptor shall be ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Reading, or it is broken or hung up.
    Read,
    /// Writing, or it is broken or hung up.
    Write,
}

/// Suspends until `fd` is ready. It may be ready no more by the time of the call that follows.
///
/// # Errors
/// When the descriptor is of a kind that cannot be waited for. With the thread engine also `EBUSY`,
/// when it has a handler or another waiter for the same direction.
pub fn fd_ready(co: &Co, fd: BorrowedFd<'_>, interest: Interest) -> io::Result<()> {
    let write = interest == Interest::Write;
    loop {
        match engine::uring::poll(co, fd, write) {
            None => return fd_ready_by_handler(co, fd, write),
            Some(result) if result > 0 => return Ok(()),
            Some(result) if matches!(-result, 0 | libc::EINTR | libc::EAGAIN) => {}
            Some(result) => return Err(io::Error::from_raw_os_error(-result)),
        }
    }
}

fn fd_ready_by_handler(co: &Co, fd: BorrowedFd<'_>, write: bool) -> io::Result<()> {
    let context = current().expect("fd_ready outside of every context");
    let (fd, wake) = (fd.as_raw_fd(), co.wake_handle());
    let ready = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mark = ready.clone();
    let on_ready = move || {
        mark.store(true, std::sync::atomic::Ordering::Relaxed);
        wake.wake();
    };
    context
        .handlers
        .update(&context.monitor, fd, |handler: &mut FdHandler| {
            let place = handler.direction(write);
            if place.is_some() {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            *place = Some(Arc::new(on_ready));
            Ok(())
        })?;
    /// Takes the handler away also when the coroutine is unwound.
    struct Remove<'a>(&'a AioContext, i32, bool);
    impl Drop for Remove<'_> {
        fn drop(&mut self) {
            let removed = self.0.handlers.update(&self.0.monitor, self.1, |handler| {
                *handler.direction(self.2) = None;
                Ok(())
            });
            removed.expect("removing a handler does not fail");
        }
    }
    let _remove = Remove(&context, fd, write);
    while !ready.load(std::sync::atomic::Ordering::Relaxed) {
        co.suspend();
    }
    Ok(())
}

/// Suspends for `time` of the context's clock.
pub fn sleep(co: &Co, time: Duration) {
    let context = current().expect("sleep outside of every context");
    let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let wait = IoWait::new("sleep");
    context
        .timers
        .arm_wait(context.now_ns().saturating_add(time), Pending::new(&wait));
    wait.wait(co);
}

/// Suspends, and goes on in the next pass of the current context, after all that was scheduled
/// before.
pub fn reschedule(co: &Co) {
    let wait = IoWait::new("reschedule");
    with_core(|core| {
        let context = &core.expect("reschedule outside of every context").context;
        let pending = Pending::new(&wait);
        core.expect("seen above")
            .work
            .push(&context.remote, crate::bottom_half::Work::Done(pending, 0));
    });
    wait.wait(co);
}

/// Runs `f` on a thread of the current context's pool, for what has no call that suspends. `f` may
/// borrow: the caller waits. A panic in it comes out here.
pub fn on_pool<R: Send>(co: &Co, f: impl FnOnce() -> R + Send) -> R {
    engine::on_pool(co, f)
}

/// Runs `f` as a new coroutine in `context`, and suspends until it returned. `f` may borrow: the
/// caller waits. A panic in it comes out here.
///
/// # Errors
/// When there is no memory for its stack.
pub fn run_in<R: Send>(
    co: &Co,
    context: &Arc<AioContext>,
    name: &'static str,
    f: impl FnOnce(&Co) -> R + Send,
) -> Result<R, Error> {
    let home: Arc<dyn Schedule> = context.clone();
    let arriving = Arriving::new(context.clone());
    coblock_coroutine::run_in(co, &home, name, move |co| {
        let _live = Live::begin_here(name);
        drop(arriving);
        f(co)
    })
}
