//! The address of a waiting operation, on its way through the kernel or a pool of threads.
//!
//! ```text
//!   frame of the request        kernel, pool            home
//!   IoWait on the stack  --Pending-->   ...  --Pending--> complete(result)
//! ```
//!
//! An [`IoWait`] lies in the frame that waits. From [`Pending::new`] on, that frame cannot go
//! away before [`Pending::complete`]: dropping a submitted `IoWait` aborts the process, and a
//! coroutine that waits in one is resumed by its completion only.

use crate::buf::IoVec;
use crate::sys::file;
use coblock_coroutine::{Co, IoWait};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;

/// One submitted operation; completed exactly once, since completing consumes it.
#[derive(Debug)]
pub(crate) struct Pending(NonNull<IoWait>);

// SAFETY: the address is only carried by other threads; `complete`, the one use of it, is called on
// the home alone (its contract).
unsafe impl Send for Pending {}

impl Pending {
    /// Marks `wait` submitted. The caller's frame then waits in [`IoWait::wait`].
    #[inline]
    pub fn new(wait: &IoWait) -> Self {
        wait.submitted();
        Pending(NonNull::from(wait))
    }

    /// Resumes the waiter with `result`. Only on the home that the waiter runs in.
    #[inline]
    pub fn complete(self, result: i32) {
        // SAFETY: `new` marked it submitted, and it is not completed yet, because that consumes the
        // only `Pending`. So its frame still stands: its drop would have aborted the process. The
        // home thread is the one that may use it, and the waiter does not run now.
        let wait = unsafe { self.0.as_ref() };
        wait.complete(result);
    }

    /// Asks the processor for the line in which the `IoWait` of this user data lies. Reads nothing,
    /// so any number will do.
    #[inline(always)]
    pub fn prefetch(data: u64) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = std::ptr::without_provenance(usize::try_from(data).unwrap_or(0));
            // SAFETY: a prefetch reads nothing, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = data;
    }

    /// Asks the processor for what resuming the waiter will touch.
    ///
    /// # Safety
    /// As for [`from_user_data`](Self::from_user_data), and the operation is not completed.
    #[inline(always)]
    pub unsafe fn prefetch_waiter(data: u64) {
        // SAFETY: the caller's promise. It is not completed by this.
        let pending = unsafe { Self::from_user_data(data) };
        // SAFETY: as in `complete`: its frame stands.
        unsafe { pending.0.as_ref() }.prefetch();
    }

    /// As the user data of a ring entry.
    #[inline]
    pub fn into_user_data(self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }

    /// Back from the user data.
    ///
    /// # Safety
    /// `data` came from [`into_user_data`](Self::into_user_data) and was not turned back before.
    #[inline]
    pub unsafe fn from_user_data(data: u64) -> Self {
        let address = std::ptr::with_exposed_provenance_mut::<IoWait>(
            usize::try_from(data).expect("user data that was an address"),
        );
        // SAFETY: the caller says that it was the address of an IoWait, which is not null.
        Pending(unsafe { NonNull::new_unchecked(address) })
    }
}

/// Work that any thread may do.
type Work = Box<dyn FnOnce() + Send>;

/// Hands a job that borrows to `submit`, as one that may live for ever, and then calls `wait`.
///
/// `wait` must return only when the job has run to its end or was dropped: it waits in an
/// [`IoWait`] that the job completes last of all. When anything panics in between, that `IoWait` is
/// dropped while submitted, which aborts the process.
pub(crate) fn lend<'a>(
    job: Box<dyn FnOnce() + Send + 'a>,
    submit: impl FnOnce(Work),
    wait: impl FnOnce(),
) {
    let raw: *mut (dyn FnOnce() + Send + 'a) = Box::into_raw(job);
    // SAFETY: only the lifetime changes, which pointers to trait objects carry in their type alone.
    let raw = unsafe {
        std::mem::transmute::<*mut (dyn FnOnce() + Send + 'a), *mut (dyn FnOnce() + Send)>(raw)
    };
    // SAFETY: it came out of `Box::into_raw` just now. What the job borrows outlives it, because
    // the frame that lends stands until `wait` returned, and aborts the process rather than unwind.
    submit(unsafe { Box::from_raw(raw) });
    wait();
}

/// A write that another thread does while the frame that asked for it waits.
#[derive(Debug)]
pub(crate) struct LentWrite {
    fd: RawFd,
    offset: u64,
    /// Borrowed from the frame, whatever the type says.
    buf: IoVec<'static>,
    pending: Pending,
}

impl LentWrite {
    /// Writes once; gives the operation, to be completed on its home, with a count or a negated
    /// errno. Any thread.
    pub fn run(self) -> (Pending, i32) {
        // SAFETY: the frame that lends it holds the descriptor borrowed until the completion.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let result = file::write_at(fd, self.offset, self.buf);
        (self.pending, crate::engine::raw(result))
    }

    /// Not done: gives the operation, to be completed on its home.
    pub fn refuse(self) -> (Pending, i32) {
        (self.pending, -libc::ECANCELED)
    }
}

/// Hands a write to `submit` as one that may live for ever, and waits for its completion.
///
/// If `submit` panics, the operation is dropped while submitted, which aborts the process; so the
/// buffer and the descriptor outlive the write.
pub(crate) fn lend_write(
    co: &Co,
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: IoVec<'_>,
    submit: impl FnOnce(LentWrite),
) -> i32 {
    let wait = IoWait::new("write");
    // SAFETY: only the lifetime changes. The frame, and with it what `buf` borrows, stands until
    // `wait` below returned, which is after the completion that consumes the `Pending`.
    let buf = unsafe { std::mem::transmute::<IoVec<'_>, IoVec<'static>>(buf) };
    submit(LentWrite {
        fd: fd.as_raw_fd(),
        offset,
        buf,
        pending: Pending::new(&wait),
    });
    wait.wait(co)
}
