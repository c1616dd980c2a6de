//! One submitted operation, in the frame that waits for it ([`IoWait`], rule 2.1).
//!
//! ```text
//!    new ----> submitted ----> complete(r) ----> wait() -> r     completed before: no suspend
//!                  |
//!                  +---------> wait() ~~~~~ complete(r) ~~> r    usually: suspended in between
//! ```
//! The kernel may write into the frame's memory from `submitted` until `complete`; so a frame that
//! is unwound in between cannot go on, and the process aborts, naming the operation.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::panic::Location;

use crate::co::{self, Co};
use crate::stack::control::Control;

/// One submitted operation, in the frame that waits for it. All on the thread of its coroutine.
///
/// Whoever completes it (an engine) keeps its address between [`submitted`](IoWait::submitted) and
/// [`complete`](IoWait::complete): it must not be moved meanwhile.
pub struct IoWait {
    what: &'static str,
    progress: Cell<Progress>,
    result: Cell<i32>,
    waiter: Cell<Option<&'static Control>>,
    /// Bound to its thread.
    _bound: PhantomData<*mut ()>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Progress {
    New,
    Submitted,
    Complete,
}

impl IoWait {
    /// An operation that is not submitted yet; `what` is for messages.
    #[inline]
    pub fn new(what: &'static str) -> IoWait {
        IoWait {
            what,
            progress: Cell::new(Progress::New),
            result: Cell::new(0),
            waiter: Cell::new(None),
            _bound: PhantomData,
        }
    }

    /// The operation is on its way: from here until [`complete`](IoWait::complete) this must
    /// neither move nor be dropped.
    ///
    /// # Panics
    /// If it was submitted before.
    #[inline]
    #[track_caller]
    pub fn submitted(&self) {
        if self.progress.replace(Progress::Submitted) != Progress::New {
            self.refuse("submitted twice", Location::caller());
        }
    }

    /// Suspends until the operation is complete, and returns its result; at once if it is complete
    /// already.
    ///
    /// Only [`complete`](IoWait::complete) resumes the coroutine: neither a wake nor entering by
    /// hand does (rule 2.1).
    ///
    /// # Panics
    /// If nothing was submitted, if another coroutine waits for it, or for the reasons of
    /// [`Co::suspend`].
    #[inline(always)]
    #[track_caller]
    pub fn wait(&self, co: &Co) -> i32 {
        if self.progress.get() != Progress::Complete {
            if self.progress.get() != Progress::Submitted || self.waiter.get().is_some() {
                self.refuse(
                    "waited for, but not submitted or waited for already",
                    Location::caller(),
                );
            }
            let register = |waiter| self.waiter.set(Some(waiter));
            co.wait_for(self.what, Location::caller(), register);
            debug_assert_eq!(
                self.progress.get(),
                Progress::Complete,
                "only complete() resumes"
            );
        }
        self.result.get()
    }

    /// The operation is done: exactly once. Resumes the waiter now; in a coroutine, it is queued
    /// (rule 1.9).
    ///
    /// When this returns, the `IoWait` may be gone: do not touch it again.
    ///
    /// # Panics
    /// If it is complete already or was never submitted; and with the panic of the coroutine that
    /// it resumes.
    #[inline(always)]
    #[track_caller]
    pub fn complete(&self, result: i32) {
        if self.progress.get() != Progress::Submitted {
            self.refuse(
                "completed, but not submitted or completed already",
                Location::caller(),
            );
        }
        self.result.set(result);
        self.progress.set(Progress::Complete);
        if let Some(waiter) = self.waiter.get() {
            co::resume_waiter(waiter);
        }
    }

    /// Asks the processor for what [`complete`](IoWait::complete) is going to touch: the frames from
    /// this one up to the root of the waiter's stack, and its control block. Changes nothing.
    #[inline(always)]
    pub fn prefetch(&self) {
        if let Some(waiter) = self.waiter.get() {
            waiter.prefetch_stack(std::ptr::from_ref(self).cast());
        }
    }

    /// Whether the operation is complete.
    #[inline]
    pub fn is_complete(&self) -> bool {
        self.progress.get() == Progress::Complete
    }

    /// What it was called.
    pub fn what(&self) -> &'static str {
        self.what
    }

    #[cold]
    #[inline(never)]
    fn refuse(&self, why: &str, caller: &'static Location<'static>) -> ! {
        panic!("operation '{}' {why} at {caller}", self.what);
    }
}

impl Drop for IoWait {
    #[inline]
    fn drop(&mut self) {
        if self.progress.get() == Progress::Submitted {
            abort(self.what);
        }
    }
}

#[cold]
#[inline(never)]
fn abort(what: &str) -> ! {
    eprintln!(
        "the frame of operation '{what}' was unwound before the operation was complete: aborting"
    );
    std::process::abort();
}

impl fmt::Debug for IoWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoWait('{}', {:?})", self.what, self.progress.get())
    }
}
