//! Coroutines that borrow from the frame that waits for them: [`run_scoped`] and [`run_in`].
//!
//! Both lend the caller's stack to a coroutine, and both make sure that the caller's frame does not
//! go away before the coroutine is done with it: `run_scoped` keeps turning the loop, `run_in`
//! keeps the calling coroutine suspended. Where that cannot be kept (the loop itself panics), the
//! process aborts and says which coroutine waited.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::{create, create_remote};
use crate::co::{self, Co, with_thread};
use crate::error::Error;
use crate::schedule::{Schedule, WakeHandle};
use crate::stack::DEFAULT_CLASS;
use crate::stack::control::Phase;

/// What the entry function came to: its result, or its panic.
type Outcome<R> = Result<R, Box<dyn Any + Send>>;

/// Runs `f`, which may borrow, as a coroutine that belongs to `home`, and calls `turn` until it has
/// finished.
///
/// `turn` is one pass of the event loop: it has to let the world go on, so that whatever `f` waits
/// for comes about.
///
/// # Errors
/// When there is no stack to be had; then `f` has not run.
///
/// # Panics
/// With the panic of `f`; or on a thread that does not drive `home`. If `turn` panics while `f`
/// waits, the process aborts: `f` may still use what it borrows.
#[track_caller]
pub fn run_scoped<R>(
    home: Option<&Arc<dyn Schedule>>,
    f: impl FnOnce(&Co) -> R,
    mut turn: impl FnMut(),
) -> Result<R, Error> {
    const NAME: &str = "scoped";
    let created = Location::caller();
    if let Some(home) = home
        && !home.is_home()
    {
        super::refuse_start(home, NAME, created);
    }
    let outcome: Cell<Option<Outcome<R>>> = Cell::new(None);
    let finished = Cell::new(false);
    let entry = |co: &Co| {
        outcome.set(Some(catch_unwind(AssertUnwindSafe(|| f(co)))));
        // The last use of anything borrowed.
        finished.set(true);
    };
    with_thread(|thread| {
        // SAFETY: the entry borrows `outcome`, `finished` and what `f` borrows; this frame outlives
        // it, because it is left only after `finished` (which the entry sets last), or never:
        // `AbortUnlessFinished`. It is entered on this thread alone.
        let (control, _) = unsafe { create(thread, DEFAULT_CLASS, NAME, home, created, entry) }?;
        co::bind_own(thread, control);
        control.detached.set(true);
        let guard = AbortUnlessFinished {
            finished: &finished,
            created,
        };
        co::resume(thread, control, Phase::Running);
        while !finished.get() {
            turn();
        }
        drop(guard);
        Ok(())
    })?;
    match outcome
        .into_inner()
        .expect("a finished entry leaves its outcome")
    {
        Ok(result) => Ok(result),
        Err(panic) => resume_unwind(panic),
    }
}

/// Keeps the frame that a coroutine borrows from.
struct AbortUnlessFinished<'a> {
    finished: &'a Cell<bool>,
    created: &'static Location<'static>,
}

impl Drop for AbortUnlessFinished<'_> {
    fn drop(&mut self) {
        if !self.finished.get() {
            eprintln!(
                "the loop panicked while the coroutine of run_scoped at {} was waiting, and used its \
                 caller's frame: aborting",
                self.created
            );
            std::process::abort();
        }
    }
}

/// Runs `f`, which may borrow, in another home, and suspends until it has finished there.
///
/// In the coroutine's own home `f` simply runs. Else a new coroutine named `name` is scheduled in
/// `home`; the caller's stack waits, and cannot be unwound meanwhile.
///
/// # Errors
/// When there is no stack to be had, or when `home` drops the work without running it; then `f` has
/// not run.
///
/// # Panics
/// With the panic of `f`.
#[track_caller]
pub fn run_in<R: Send>(
    co: &Co,
    home: &Arc<dyn Schedule>,
    name: &'static str,
    f: impl FnOnce(&Co) -> R + Send,
) -> Result<R, Error> {
    let created = Location::caller();
    co.refuse_unless_running("sent into another home", created);
    if co.home().is_some_and(|own| Arc::ptr_eq(own, home)) {
        return Ok(f(co));
    }
    let shared: Shared<R> = Shared {
        outcome: Mutex::new(None),
        done: AtomicBool::new(false),
    };
    let signal = Signal {
        shared: &shared,
        waker: Some(co.wake_handle()),
    };
    let entry = move |there: &Co| {
        // Moved in as a whole: if the entry is dropped without running, so is the signal, and the
        // caller wakes up.
        let signal = signal;
        let outcome = catch_unwind(AssertUnwindSafe(|| f(there)));
        *signal
            .shared
            .outcome
            .lock()
            .expect("nothing panics under this lock") = Some(outcome);
        drop(signal);
    };
    // SAFETY: the entry borrows `shared` and what `f` borrows. `signal` is dropped last of all,
    // after which nothing borrowed is used; this frame is left only after that (`done`), or not at
    // all (`Pin`).
    let ready = unsafe { create_remote(home, name, created, entry) }?;
    {
        let _pin = Pin::new(co, &shared.done, name);
        home.schedule(ready);
        while !shared.done.load(Ordering::Acquire) {
            co.suspend();
        }
    }
    match shared
        .outcome
        .into_inner()
        .expect("nothing panics under this lock")
    {
        Some(Ok(result)) => Ok(result),
        Some(Err(panic)) => resume_unwind(panic),
        None => Err(Error::HomeGone { name }),
    }
}

/// Lies in the waiting frame.
struct Shared<R> {
    outcome: Mutex<Option<Outcome<R>>>,
    done: AtomicBool,
}

/// Tells the waiting frame that nobody uses it any more.
struct Signal<'a, R> {
    shared: &'a Shared<R>,
    waker: Option<WakeHandle>,
}

impl<R> Drop for Signal<'_, R> {
    fn drop(&mut self) {
        let waker = self.waker.take().expect("a signal is given once");
        // The last use of the waiting frame: once it reads `true`, it may be gone.
        self.shared.done.store(true, Ordering::Release);
        waker.wake();
    }
}

/// While it lives, the frame it lies in is used by another thread: the coroutine cannot be unwound.
struct Pin<'a> {
    co: &'a Co,
    done: &'a AtomicBool,
    name: &'static str,
}

impl<'a> Pin<'a> {
    fn new(co: &'a Co, done: &'a AtomicBool, name: &'static str) -> Pin<'a> {
        let pinned = &co.control().pinned;
        pinned.set(pinned.get() + 1);
        Pin { co, done, name }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        if !self.done.load(Ordering::Acquire) {
            eprintln!(
                "{:?} was unwound while '{}' works on its frame in another home: aborting",
                self.co, self.name
            );
            std::process::abort();
        }
        let pinned = &self.co.control().pinned;
        pinned.set(pinned.get() - 1);
    }
}
