//! Proof that we are in a coroutine ([`Co`]), and the switches: suspend here, resume and finish in
//! `resume`.
//!
//! `suspend` touches no thread-local. `resume` looks its thread up once and keeps the address over
//! the switch: it comes back on the same thread. Everything in both is inlined into its caller: each
//! real frame between the root of a coroutine and its suspend costs a mispredicted return after the
//! resume.

mod moving;
mod resume;

use std::backtrace::Backtrace;
use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{self, Location};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use moving::Departure;
pub(crate) use moving::forwarded;
pub use resume::State;
pub(crate) use resume::{drop_unstarted, release_kept, resume, resume_or_queue, resume_waiter};

use crate::pool::{self, Thread};
use crate::schedule::{Schedule, WakeHandle};
use crate::stack::control::{Control, Phase};

/// Proof that the code that holds a reference to it runs in a coroutine: `co: &Co` in a signature
/// means "may suspend".
///
/// There is one per coroutine, it lives on the coroutine's stack, and the entry function gets a
/// reference that it can neither keep nor send away. These do not compile:
///
/// ```compile_fail,E0521
/// // 1. Left behind in a thread-local.
/// use std::cell::Cell;
/// use coblock_coroutine::Co;
/// thread_local!(static LEAK: Cell<Option<&'static Co>> = const { Cell::new(None) });
/// coblock_coroutine::Coroutine::new(|co| LEAK.set(Some(co))).unwrap();
/// ```
/// ```compile_fail,E0521
/// // 2. Left behind in a captured variable.
/// let leak = std::rc::Rc::new(std::cell::Cell::new(None));
/// let inner = leak.clone();
/// coblock_coroutine::Coroutine::new(move |co| inner.set(Some(co))).unwrap();
/// ```
/// ```compile_fail,E0521
/// // 3. Put into an Rc that somebody else has, too.
/// use std::{cell::RefCell, rc::Rc};
/// let shared: Rc<RefCell<Vec<Rc<&'static coblock_coroutine::Co>>>> = Rc::default();
/// let inner = shared.clone();
/// coblock_coroutine::Coroutine::new(move |co| inner.borrow_mut().push(Rc::new(co))).unwrap();
/// ```
/// ```compile_fail,E0521
/// // 4. Captured by the entry of a nested coroutine.
/// use coblock_coroutine::Coroutine;
/// Coroutine::new(|outer| {
///     Coroutine::new(move |_inner| outer.suspend()).unwrap().enter();
/// }).unwrap();
/// ```
/// ```compile_fail,E0277
/// // 5. Lent to a scoped thread.
/// coblock_coroutine::Coroutine::new(|co| {
///     std::thread::scope(|s| { s.spawn(|| co.suspend()); });
/// }).unwrap();
/// ```
///
/// A sixth way compiles (a crate for scoped thread-locals lends a `&Co` to an inner coroutine); so
/// each operation that switches also checks, in every build, that its coroutine is the running one,
/// and refuses otherwise.
#[repr(transparent)]
pub struct Co {
    control: Control,
    /// Neither Send nor Sync: it speaks of a stack that is bound to its thread.
    _bound: PhantomData<*mut ()>,
}

/// What a coroutine may hold that it must not finish with, and what others must know about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Hold {
    /// A lock that suspends (rules 1.10, 4.4).
    Lock = 0,
    /// The graph lock, for reading (rule 7.7).
    GraphRead = 1,
}

/// While it lives, its coroutine holds something; see [`Co::hold`].
#[must_use = "dropped at once, it counts nothing"]
pub struct Held<'a> {
    count: &'a Cell<u32>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
    }
}

impl Co {
    /// The token of a control block.
    ///
    /// Handing it to code that does not run on this coroutine's stack is caught at its first
    /// suspend.
    #[inline(always)]
    pub(crate) fn of(control: &Control) -> &Co {
        // SAFETY: `Co` is a transparent wrapper around `Control`, and the lifetime stays the same.
        unsafe { &*std::ptr::from_ref(control).cast::<Co>() }
    }

    #[inline(always)]
    pub(crate) fn control(&self) -> &'static Control {
        // SAFETY: control blocks lie in arenas that are never unmapped, and are never overwritten
        // as a whole (`Control::place`); every `Co` is one (`Co::of`).
        unsafe { &*std::ptr::from_ref(&self.control) }
    }

    /// What time it was when it was entered last: what [`note_time`](crate::note_time) told the
    /// thread before that, in nanoseconds; 0 where nobody did. A plain load.
    #[inline(always)]
    pub fn entered_ns(&self) -> u64 {
        self.control.entered_at.get()
    }

    /// Suspends: control goes to whoever entered this coroutine last (rule 1.3).
    ///
    /// Ends when the coroutine is entered by hand or woken, for whatever reason, and at once if it
    /// was woken while it ran; so wait in a loop: `while !condition { co.suspend() }`.
    ///
    /// # Panics
    /// If this is not the running coroutine (a smuggled token), if it is unwinding, or if the
    /// thread holds a [`ThreadLock`](crate::sync::ThreadLock) (builds with debug assertions).
    #[inline(always)]
    #[track_caller]
    pub fn suspend(&self) {
        let control = &self.control;
        if control.phase.get() != Phase::Running {
            return self.suspend_otherwise(Location::caller());
        }
        self.refuse_where_none_may(Location::caller());
        control.suspended_at.set(Location::caller());
        self.switch_out(Phase::Suspended);
    }

    /// Refuses a suspend in a place where none may be: a destructor that runs because of a panic,
    /// and, in builds with debug assertions, under a thread lock.
    #[inline(always)]
    fn refuse_where_none_may(&self, caller: &'static Location<'static>) {
        // One load of a global; only while some thread panics does it look at this one.
        if std::thread::panicking() {
            refuse_if_unwinding(&self.control, caller);
        }
        if cfg!(debug_assertions) {
            refuse_if_locked(&self.control, caller);
        }
    }

    /// Leaves the stack with `phase`; comes back when it is resumed. The coroutine is running, as
    /// the caller has checked.
    #[inline(always)]
    fn switch_out(&self, phase: Phase) {
        let control = &self.control;
        control.phase.set(phase);
        control.suspended.set(true);
        // SAFETY: this coroutine is the running one (phase `Running`, which `resume` gives to the
        // current coroutine of a thread alone), and its token does not leave its thread: so this
        // code runs on its stack.
        unsafe { control.switch_out() };
        if control.unwinding().get() {
            resumed_oddly(control);
        }
    }

    #[cold]
    #[inline(never)]
    fn suspend_otherwise(&self, caller: &'static Location<'static>) {
        self.refuse_unless_running("suspended", caller);
        self.control.pending.set(false);
        self.control.phase.set(Phase::Running);
    }

    /// Waits for an operation: resumed only by [`resume_waiter`], never by a wake or by hand.
    ///
    /// `register` tells whoever completes it about the waiter; called when nothing is refused any
    /// more.
    #[inline(always)]
    pub(crate) fn wait_for(
        &self,
        what: &'static str,
        caller: &'static Location<'static>,
        register: impl FnOnce(&'static Control),
    ) {
        if self.control.phase.get() != Phase::Running {
            self.refuse_unless_running(what, caller);
        }
        self.refuse_where_none_may(caller);
        register(self.control());
        self.control.waits_for.set(what);
        self.control.suspended_at.set(caller);
        self.switch_out(Phase::Waiting);
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn refuse_unless_running(&self, what: &str, caller: &'static Location<'static>) {
        let control = &self.control;
        match control.phase.get() {
            Phase::Running | Phase::Roused => {}
            phase => panic!(
                "{} {what} at {caller}, but it is not the running coroutine (it is {})",
                Described(control),
                describe(phase),
            ),
        }
    }

    /// A handle that wakes this coroutine from any thread, for as long as it lives.
    pub fn wake_handle(&self) -> WakeHandle {
        WakeHandle::new(self.control(), self.id(), self.home().cloned())
    }

    /// Number of this life, unique in this process, never 0.
    #[inline]
    pub fn id(&self) -> u64 {
        self.control.life.load(Ordering::Relaxed)
    }

    /// The name that the coroutine was created with.
    pub fn name(&self) -> &'static str {
        self.control.name.get()
    }

    /// Where the coroutine was created.
    pub fn created_at(&self) -> &'static Location<'static> {
        self.control.created.get()
    }

    /// Counts `what` as held by this coroutine while the answer lives. Finishing meanwhile is
    /// refused (rule 1.10).
    #[inline]
    pub fn hold(&self, what: Hold) -> Held<'_> {
        let count = self.control.held(what as usize);
        count.set(count.get() + 1);
        Held { count }
    }

    /// How often this coroutine holds `what` now.
    #[inline]
    pub fn holds(&self, what: Hold) -> u32 {
        self.control.holds.get()[what as usize]
    }

    /// The home that runs this coroutine; `None`: it is driven by hand.
    #[inline]
    pub fn home(&self) -> Option<&Arc<dyn Schedule>> {
        // SAFETY: a token is only in the hands of the thread that runs this life, and does not
        // outlive it.
        unsafe { self.control.home() }
    }
}

impl fmt::Debug for Co {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Co({}, life {})", Described(&self.control), self.id())
    }
}

/// A coroutine in a message: its name and where it was created.
pub(crate) struct Described<'a>(pub(crate) &'a Control);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "coroutine '{}' (created at {})",
            self.0.name.get(),
            self.0.created.get()
        )
    }
}

/// A phase in a message.
pub(crate) fn describe(phase: Phase) -> &'static str {
    match phase {
        Phase::Free => "over",
        Phase::New => "not started",
        Phase::Suspended => "suspended",
        Phase::Waiting => "waiting for an operation",
        Phase::Queued => "woken and queued",
        Phase::Running | Phase::Roused => "running",
        Phase::Entered => "waiting for another coroutine that it has entered",
        Phase::Finished | Phase::Kept => "finished",
    }
}

/// The payload of the panic that unwinds a coroutine whose handle was dropped.
pub(crate) struct ForcedUnwind;

/// The way out of a suspend that was ended by somebody who wants to know where this coroutine
/// stands, or who has dropped its handle.
#[cold]
#[inline(never)]
fn resumed_oddly(control: &Control) {
    while control.telling.get() {
        let told = Box::new(Backtrace::force_capture());
        control.told.set(Some(told));
        // SAFETY: runs on this coroutine's stack, called from its suspend.
        unsafe { control.switch_out() };
    }
    if control.unwinding().get() {
        panic::resume_unwind(Box::new(ForcedUnwind));
    }
}

/// The backtrace of a coroutine of this thread that has suspended: it is resumed for just that, on
/// its own stack, and suspends again. Nothing else of it changes.
pub(crate) fn backtrace_of(thread: &Thread, control: &'static Control) -> Option<Backtrace> {
    if !matches!(
        control.phase.get(),
        Phase::Suspended | Phase::Waiting | Phase::Queued
    ) || !control.suspended.get()
    {
        return None;
    }
    let unwinding = control.unwinding().replace(true);
    let current = thread.current.replace(Some(control));
    control.telling.set(true);
    // SAFETY: this thread owns the life (the caller has checked), and the phase says that its code
    // rests on its own stack, in a suspend.
    unsafe { control.switch_in() };
    control.telling.set(false);
    thread.current.set(current);
    control.unwinding().set(unwinding);
    control.told.take().map(|told| *told)
}

/// Suspending in a destructor while unwinding would leave the thread "panicking" for everyone else.
#[cold]
#[inline(never)]
fn refuse_if_unwinding(control: &Control, caller: &'static Location<'static>) {
    if std::thread::panicking() && !control.entered_panicking.get() {
        panic!(
            "{} suspended at {caller} while it unwinds: a destructor must not suspend",
            Described(control)
        );
    }
}

#[inline(never)]
fn refuse_if_locked(control: &Control, caller: &'static Location<'static>) {
    let locks = pool::count_thread_locks(0);
    assert!(
        locks == 0,
        "{} suspended at {caller} while its thread holds {locks} thread lock(s)",
        Described(control)
    );
}

/// Calls `f` with the record of the calling thread. `f` may enter coroutines (it comes back on the
/// same thread), but must not suspend its own.
#[inline(always)]
pub(crate) fn with_thread<R>(f: impl FnOnce(&Thread) -> R) -> R {
    // SAFETY: the record is a thread-local without a destructor, which lies at its address as long
    // as its thread lives; `f` runs on that thread, and cannot take the reference away.
    f(unsafe { &*pool::address() })
}

/// Binds a coroutine that has never run to the calling thread (rule 1.8).
#[inline(always)]
pub(crate) fn bind(thread: &Thread, control: &Control) {
    control.thread.store(thread.number(), Ordering::Relaxed);
}

/// The same, by the thread that has made it.
#[inline(always)]
pub(crate) fn bind_own(thread: &Thread, control: &Control) {
    let number = thread.number_after_a_life();
    control.thread.store(number, Ordering::Relaxed);
}

/// Whether the calling code runs in a coroutine (rule 1.1).
pub fn in_coroutine() -> bool {
    pool::current().is_some()
}

/// Calls `f` with the running coroutine's token; `None` on the thread's own stack, the leader (rule
/// 1.1).
pub fn with_current<R>(f: impl FnOnce(Option<&Co>) -> R) -> R {
    f(pool::current().map(Co::of))
}

/// How often the running coroutine holds `what`; 0 for the leader. A nested event loop is refused
/// while it is not 0 (rule 4.4).
pub fn current_holds(what: Hold) -> u32 {
    pool::current().map_or(0, |control| control.holds.get()[what as usize])
}
