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

use coblock_coroutine::IoWait;
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

/// A job that any thread may run.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Hands a job that borrows to `submit`, as one that may live for ever, and then calls `wait`.
///
/// `wait` must return only when the job has run to its end or was dropped: it waits in an
/// [`IoWait`] that the job completes last of all. When anything panics in between, that `IoWait` is
/// dropped while submitted, which aborts the process.
pub(crate) fn lend<'a>(
    job: Box<dyn FnOnce() + Send + 'a>,
    submit: impl FnOnce(Job),
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
