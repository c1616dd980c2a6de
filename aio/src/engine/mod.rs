//! How requests reach the kernel: through a ring, or on threads.
//!
//! An engine belongs to a home; an open file to none. The functions of this module each make one
//! attempt, in whatever context the coroutine runs in now, and give what the system call gives: a
//! count or a negated errno. [`crate::co`] builds complete operations from them.
//!
//! ```text
//!   co::read  ->  engine::read  --+--> uring::read     push an entry, suspend   (one enter a pass)
//!                                 +--> on_pool         a closure on a thread, suspend
//!                                 +--> at_once         the call itself, where the file is memory
//!                                 +--> lane            one thread for the buffered writes of a file
//! ```

mod at_once;
mod lane;
mod threads;
#[allow(unsafe_code)] // The kernel is given addresses.
pub(crate) mod uring;

use crate::buf::{IoVec, IoVecMut};
use crate::context::{AioContext, ContextOptions, EngineKind};
use crate::current::with_core;
use crate::fd_handler::ReadyList;
use crate::medium::Medium;
use crate::monitor::Reported;
use crate::notifier::EventNotifier;
use crate::sys::event::Epoll;
use at_once::at_once;
use coblock_coroutine::Co;
pub(crate) use lane::Lanes;
use std::io;
use std::os::fd::BorrowedFd;
pub(crate) use threads::on_pool;
use uring::Uring;

/// What only the home touches.
pub(crate) enum Engine {
    Uring(Box<Uring>),
    Threads,
    None,
}

/// Takes reports of the context's descriptors into the list of ready ones, waiting up to
/// `timeout_ns` for one.
pub(crate) fn collect(
    context: &AioContext,
    ready: &ReadyList,
    timeout_ns: Option<u64>,
) -> io::Result<Reported> {
    let report = |token, events| ready.report(&context.handlers, token, events);
    context.monitor.wait(&context.notifier, timeout_ns, report)
}

/// A system call of the loop that ended early for a signal ended for nothing.
pub(crate) fn tolerate_signal<T>(result: io::Result<T>, nothing: T) -> T {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => nothing,
        other => other.expect("the wait of an event loop"),
    }
}

impl Engine {
    pub fn new(options: &ContextOptions) -> io::Result<Self> {
        let ring = || {
            let ring = Uring::new(options.ring_depth, options.ring_delivery)?;
            Ok(Engine::Uring(Box::new(ring)))
        };
        match options.engine {
            EngineKind::IoUring => ring(),
            EngineKind::Threads => Ok(Engine::Threads),
            EngineKind::None => Ok(Engine::None),
            EngineKind::Auto => Ok(ring().unwrap_or_else(|why: io::Error| {
                log::warn!(
                    "context '{}': threads instead of io_uring: {why}",
                    options.name
                );
                Engine::Threads
            })),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Engine::Uring(_) => "io_uring",
            Engine::Threads => "threads",
            Engine::None => "none",
        }
    }

    /// The ring watches the context's descriptors from now on.
    pub fn watch(&self, epoll: &Epoll) -> io::Result<()> {
        match self {
            Engine::Uring(ring) => ring.watch(epoll),
            Engine::Threads | Engine::None => Ok(()),
        }
    }

    /// Completions of the ring raise `event` from now on, for loops that wait elsewhere.
    pub fn raise(&self, event: &EventNotifier) -> io::Result<()> {
        match self {
            Engine::Uring(ring) => ring.raise(event),
            Engine::Threads | Engine::None => Ok(()),
        }
    }

    /// Requests of the ring, and its system calls.
    pub fn counts(&self) -> (u64, u64) {
        match self {
            Engine::Uring(ring) => ring.counts(),
            Engine::Threads | Engine::None => (0, 0),
        }
    }

    /// Hands queued requests to the kernel without waiting.
    pub fn submit(&self) {
        if let Engine::Uring(ring) = self {
            ring.submit();
        }
    }

    /// Is something to be completed without any wait?
    pub fn has_completions(&self) -> bool {
        match self {
            Engine::Uring(ring) => ring.has_completions(),
            Engine::Threads | Engine::None => false,
        }
    }

    /// Hands queued requests to the kernel and waits for anything.
    pub fn wait(&self, context: &AioContext, ready: &ReadyList, timeout_ns: Option<u64>) {
        match self {
            Engine::Uring(ring) => ring.wait(context, ready, timeout_ns),
            Engine::Threads | Engine::None => {
                let reported = collect(context, ready, timeout_ns);
                tolerate_signal(reported, Reported::NOTHING);
            }
        }
    }

    /// Resumes the coroutines whose requests are complete; tells whether there was one.
    pub fn complete(&self, context: &AioContext, ready: &ReadyList) -> bool {
        match self {
            Engine::Uring(ring) => ring.complete(context, ready),
            Engine::Threads | Engine::None => false,
        }
    }
}

/// A system call's result as the ring gives it.
pub(crate) fn raw(result: io::Result<usize>) -> i32 {
    match result {
        // The kernel transfers less than 2 GiB at once.
        Ok(count) => i32::try_from(count).expect("a transfer of less than 2 GiB"),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Runs a blocking call on the pool, unless this context was made to do no I/O.
#[inline(never)]
fn on_threads(co: &Co, call: impl FnOnce() -> io::Result<usize> + Send) -> i32 {
    let none = with_core(|core| {
        matches!(
            core.expect("I/O outside of every context").engine,
            Engine::None
        )
    });
    if none {
        -libc::EOPNOTSUPP
    } else {
        raw(on_pool(co, call))
    }
}

/// One attempt to read.
#[inline(always)]
pub(crate) fn read(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: &mut IoVecMut<'_>) -> i32 {
    match uring::read(co, fd, offset, buf) {
        Some(result) => result,
        None => read_on_threads(co, fd, offset, buf),
    }
}

/// One attempt to read, as is best for what lies there.
#[inline(always)]
pub(crate) fn read_from(
    co: &Co,
    fd: BorrowedFd<'_>,
    medium: Medium,
    offset: u64,
    buf: &mut IoVecMut<'_>,
) -> i32 {
    let done = match medium {
        Medium::Device => None,
        Medium::PageCache | Medium::PageCacheNowait => uring::read_cached(co, fd, offset, buf),
        Medium::Memory => read_memory(co, fd, offset, buf),
    };
    match done {
        Some(result) => result,
        None => read(co, fd, offset, buf),
    }
}

#[inline(never)]
fn read_memory(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: &mut IoVecMut<'_>) -> Option<i32> {
    at_once(co, buf.len(), || {
        crate::sys::file::read_at(fd, offset, buf.reborrow())
    })
}

/// One attempt to read, on the pool whatever the engine.
#[inline(never)]
pub(crate) fn read_on_threads(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: &mut IoVecMut<'_>,
) -> i32 {
    let buf = buf.reborrow();
    on_threads(co, move || crate::sys::file::read_at(fd, offset, buf))
}

/// One attempt to write.
#[inline(always)]
pub(crate) fn write(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> i32 {
    match uring::write(co, fd, offset, buf) {
        Some(result) => result,
        None => write_on_threads(co, fd, offset, buf),
    }
}

/// One attempt to write, as is best for what lies there.
#[inline(always)]
pub(crate) fn write_to(
    co: &Co,
    fd: BorrowedFd<'_>,
    medium: Medium,
    offset: u64,
    buf: IoVec<'_>,
) -> i32 {
    let done = match medium {
        Medium::Device | Medium::PageCacheNowait => None,
        Medium::PageCache => lane::write(co, fd, offset, buf),
        Medium::Memory => write_memory(co, fd, offset, buf),
    };
    match done {
        Some(result) => result,
        None => write(co, fd, offset, buf),
    }
}

#[inline(never)]
fn write_memory(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> Option<i32> {
    at_once(co, buf.len(), || {
        crate::sys::file::write_at(fd, offset, buf)
    })
}

/// One attempt to write, on the pool whatever the engine.
#[inline(never)]
pub(crate) fn write_on_threads(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> i32 {
    on_threads(co, move || crate::sys::file::write_at(fd, offset, buf))
}

/// One attempt to sync.
pub(crate) fn sync(co: &Co, fd: BorrowedFd<'_>, data_only: bool) -> i32 {
    match uring::sync(co, fd, data_only) {
        Some(result) => result,
        None => on_threads(co, move || {
            crate::sys::file::sync(fd, data_only).map(|()| 0)
        }),
    }
}

/// One attempt to fallocate; `mode` is one of [`crate::sys::file::allocate`].
pub(crate) fn fallocate(co: &Co, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> i32 {
    match uring::fallocate(co, fd, mode, offset, len) {
        Some(result) => result,
        None => on_threads(co, move || {
            crate::sys::file::fallocate(fd, mode, offset, len).map(|()| 0)
        }),
    }
}
