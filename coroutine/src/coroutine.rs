//! Coroutines: making one, and driving it by hand ([`Coroutine`]) or by its home ([`start`],
//! [`start_remote`]).
//!
//! ```
//! use coblock_coroutine::{Coroutine, State};
//!
//! let count = Coroutine::new(|co| {
//!     for _ in 0..2 {
//!         co.suspend();
//!     }
//! })?;
//! assert_eq!(count.enter(), State::Suspended);
//! assert_eq!(count.enter(), State::Suspended);
//! assert_eq!(count.enter(), State::Finished);
//! # Ok::<(), coblock_coroutine::Error>(())
//! ```
//!
//! # Who owns a coroutine
//!
//! | it is | dropping the handle |
//! |---|---|
//! | not started | drops the entry function |
//! | suspended by [`Co::suspend`], only ever entered by hand | unwinds it, here and now |
//! | waiting for an operation, or with its frame lent out | nothing: who completes that resumes it |
//! | woken by a running coroutine and queued, without a home | unwinds it when its turn comes |
//! | on its way to its home, queued, or resumed by its home once | nothing: it is its home's |
//! | running, or has entered another one | nothing: it runs to its end |
//!
//! Unwinding needs `panic = "unwind"`. Built with `panic = "abort"`, dropping a suspended coroutine
//! leaks it: its stack is never used again, nothing on it is dropped, and
//! [`Stats::leaked`](crate::Stats) counts it. Nothing else depends on unwinding.

mod scoped;

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use scoped::{run_in, run_scoped};

use crate::co::{self, Co, ForcedUnwind, State, describe, with_thread};
use crate::error::Error;
use crate::pool::{Thread, bump};
use crate::release::Hook;
use crate::schedule::{Ready, Schedule};
use crate::stack::control::{Control, KEPT, Phase};
use crate::stack::{self, DEFAULT_CLASS};

/// How to make a coroutine.
#[derive(Clone)]
pub struct CoroutineOptions {
    /// For messages.
    pub name: &'static str,
    /// Bytes of stack, its guard page included; rounded up to a power of two of at least 16 KiB.
    pub stack_size: usize,
    /// Who resumes it after a wake; `None`: only the thread that made it, by hand or by a wake of
    /// its own.
    pub home: Option<Arc<dyn Schedule>>,
}

impl Default for CoroutineOptions {
    fn default() -> Self {
        CoroutineOptions {
            name: "unnamed",
            stack_size: stack::DEFAULT_STACK_SIZE,
            home: None,
        }
    }
}

/// A coroutine that its program drives by hand; see the table at the head of this file for what
/// dropping it does.
#[must_use = "dropped at once, it never runs"]
pub struct Coroutine {
    control: &'static Control,
    life: u64,
    /// Record of the thread that it is bound to: the handle's own.
    thread: *const Thread,
    name: &'static str,
    created: &'static Location<'static>,
}

impl Coroutine {
    /// A coroutine that will run `f`, with a default stack, without a home. It does not run before
    /// it is entered.
    ///
    /// # Errors
    /// When there is no stack to be had.
    #[track_caller]
    #[inline]
    pub fn new<F>(f: F) -> Result<Coroutine, Error>
    where
        F: for<'a> FnOnce(&'a Co) + 'static,
    {
        let created = Location::caller();
        with_thread(|thread| {
            // SAFETY: `f` borrows nothing.
            let born = unsafe { create(thread, DEFAULT_CLASS, "unnamed", None, created, f) }?;
            Ok(Coroutine::by_hand(thread, born, "unnamed", created))
        })
    }

    /// A coroutine that will run `f`, made as `options` say. It does not run before it is entered.
    ///
    /// # Errors
    /// When there is no stack to be had, or none of that size.
    #[track_caller]
    pub fn with_options<F>(options: &CoroutineOptions, f: F) -> Result<Coroutine, Error>
    where
        F: for<'a> FnOnce(&'a Co) + 'static,
    {
        let created = Location::caller();
        let class = stack::class_of(options.stack_size)?;
        with_thread(|thread| {
            let (name, home) = (options.name, options.home.as_ref());
            // SAFETY: `f` borrows nothing.
            let born = unsafe { create(thread, class, name, home, created, f) }?;
            Ok(Coroutine::by_hand(thread, born, name, created))
        })
    }

    /// `name` and `created` are those of the life, which is not over as long as the caller owns it;
    /// the handle outlives it.
    #[inline]
    fn by_hand(
        thread: &Thread,
        (control, life): (&'static Control, u64),
        name: &'static str,
        created: &'static Location<'static>,
    ) -> Coroutine {
        co::bind_own(thread, control);
        Coroutine {
            control,
            life,
            thread: std::ptr::from_ref(thread),
            name,
            created,
        }
    }

    /// Runs the coroutine until it suspends or finishes.
    ///
    /// # Panics
    /// With the panic of the coroutine (rule 1.10). And, before any switch, naming the coroutine
    /// and the caller, if it runs, has entered another one, waits for an operation, is on its way
    /// to its home, or has finished (rules 1.4, 2.1).
    #[inline(always)]
    #[track_caller]
    pub fn enter(&self) -> State {
        let control = self.control;
        control.prefetch_frames();
        if control.life.load(Ordering::Relaxed) != self.life
            || !matches!(control.phase.get(), Phase::New | Phase::Suspended)
            || control.homed().get() && control.mark.is_set(self.life)
        {
            self.refuse(Location::caller());
        }
        debug_assert!(!control.pending.get(), "a wake of it has resumed it");
        co::resume(self.thread(), control, Phase::Running)
    }

    #[inline(always)]
    fn thread(&self) -> &Thread {
        // SAFETY: the record of the thread that made the handle, which lies at its address as long
        // as that thread lives; and the handle stays on it.
        unsafe { &*self.thread }
    }

    #[cold]
    #[inline(never)]
    fn refuse(&self, caller: &'static Location<'static>) -> ! {
        let (control, name, created) = (self.control, self.name, self.created);
        let who = format!("coroutine '{name}' (created at {created}) entered at {caller}");
        if !self.is_live() {
            panic!("{who}, but it has finished");
        }
        match control.phase.get() {
            Phase::Waiting => {
                panic!(
                    "{who}, but it waits for '{}', which alone resumes it",
                    control.waits_for.get()
                )
            }
            Phase::New | Phase::Suspended | Phase::Queued => {
                let by = control
                    .marked_by()
                    .map_or("nobody".to_string(), ToString::to_string);
                panic!("{who}, but it is scheduled already, by {by}")
            }
            phase => panic!("{who}, but it is {}", describe(phase)),
        }
    }

    /// Refuses as [`enter`](Coroutine::enter) does, without entering.
    pub(crate) fn refuse_unless_enterable(&self, caller: &'static Location<'static>) {
        let control = self.control;
        if !self.is_live()
            || !matches!(control.phase.get(), Phase::New | Phase::Suspended)
            || control.mark.is_set(self.life)
        {
            self.refuse(caller);
        }
    }

    /// Who decides what becomes of the stack when this life ends (rule 1.6). Before the first
    /// entry.
    pub(crate) fn set_release_hook(&self, hook: Hook) {
        let control = self.control;
        assert!(
            self.is_live() && control.phase.get() == Phase::New && !control.homed().get(),
            "a release hook is set before the first entry, on one that is driven by hand"
        );
        control.release_hook.set(Some(hook));
        control.odd_end().set(true);
    }

    /// Bytes of its stack, guard page and control block included.
    pub(crate) fn stack_size(&self) -> usize {
        stack::SMALLEST_STACK << self.control.class()
    }

    /// What a veto of its release hook leaves behind; to be dropped after the handle.
    pub(crate) fn kept_slot(&self) -> KeptSlot {
        KeptSlot {
            control: self.control,
            life: self.life,
            _bound: PhantomData,
        }
    }

    fn is_live(&self) -> bool {
        self.control.life.load(Ordering::Relaxed) == self.life
    }

    /// Number of this coroutine's life, unique in this process; equal to [`Co::id`] inside.
    pub fn id(&self) -> u64 {
        self.life
    }

    /// The name that it was made with.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether it runs, or has entered another one and waits for that to come back.
    pub fn entered(&self) -> bool {
        let phase = self.control.phase.get();
        self.is_live() && matches!(phase, Phase::Running | Phase::Roused | Phase::Entered)
    }

    /// Whether it has finished.
    pub fn finished(&self) -> bool {
        !self.is_live()
    }

    /// Where it stands, in words.
    pub fn state(&self) -> &'static str {
        if self.is_live() {
            describe(self.control.phase.get())
        } else {
            "finished"
        }
    }
}

impl Drop for Coroutine {
    #[inline]
    fn drop(&mut self) {
        if self.is_live() {
            self.drop_live();
        }
    }
}

impl Coroutine {
    #[cold]
    #[inline(never)]
    fn drop_live(&self) {
        let control = self.control;
        match control.phase.get() {
            Phase::New => with_thread(|thread| co::drop_unstarted(thread, control)),
            Phase::Suspended
                if !control.detached.get()
                    && control.pinned.get() == 0
                    && !control.mark.is_set(self.life) =>
            {
                if cfg!(panic = "abort") {
                    control.detached.set(true);
                    return with_thread(|thread| bump(&thread.leaked));
                }
                control.unwinding().set(true);
                // A `catch_unwind` in the body may stop the unwinding; it starts again at the next
                // suspend.
                while self.is_live() && control.phase.get() == Phase::Suspended {
                    co::resume(self.thread(), control, control.running());
                }
            }
            // Nobody but us would ever resume it again: it is unwound when its turn in the queue
            // comes.
            Phase::Queued
                if !control.homed().get()
                    && !control.detached.get()
                    && control.pinned.get() == 0
                    && cfg!(panic = "unwind") =>
            {
                control.unwinding().set(true);
                // Its release hook cannot keep the stack for a handle that is gone.
                control.detached.set(true);
            }
            _ => control.detached.set(true),
        }
    }
}

/// The slot of a life whose release hook has vetoed; gives it to the pool when dropped. Of any
/// other life it is nothing.
pub(crate) struct KeptSlot {
    control: &'static Control,
    life: u64,
    /// Bound to its thread.
    _bound: PhantomData<*mut ()>,
}

impl KeptSlot {
    /// Whether the hook has vetoed.
    pub(crate) fn is_kept(&self) -> bool {
        self.control.life.load(Ordering::Relaxed) == self.life | KEPT
    }
}

impl Drop for KeptSlot {
    fn drop(&mut self) {
        if self.is_kept() {
            with_thread(|thread| co::release_kept(thread, self.control));
        }
    }
}

impl fmt::Debug for Coroutine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Coroutine('{}', {}", self.name, self.state())?;
        if self.is_live() && self.control.phase.get() == Phase::Waiting {
            write!(f, ": '{}'", self.control.waits_for.get())?;
        }
        write!(f, ", created at {})", self.created)
    }
}

/// Creates a coroutine that belongs to `home`, and runs it until it first suspends.
///
/// On the thread that drives `home`. In a coroutine the new one is entered from there, and comes
/// back there.
///
/// # Errors
/// When there is no stack to be had.
///
/// # Panics
/// With the panic of the coroutine, if it comes before the first suspend; or on a thread that does
/// not drive `home`.
#[track_caller]
#[inline]
pub fn start<F>(home: &Arc<dyn Schedule>, name: &'static str, f: F) -> Result<(), Error>
where
    F: for<'a> FnOnce(&'a Co) + 'static,
{
    let created = Location::caller();
    if !home.is_home() {
        refuse_start(home, name, created);
    }
    with_thread(|thread| {
        // SAFETY: `f` borrows nothing.
        let (control, _) = unsafe { create(thread, DEFAULT_CLASS, name, Some(home), created, f) }?;
        co::bind_own(thread, control);
        control.detached.set(true);
        co::resume(thread, control, Phase::Running);
        Ok(())
    })
}

#[cold]
#[inline(never)]
fn refuse_start(home: &Arc<dyn Schedule>, name: &str, at: &'static Location<'static>) -> ! {
    panic!(
        "coroutine '{name}' started at {at}, but this thread does not drive its home '{}'",
        home.name()
    );
}

/// Creates a coroutine that belongs to `home`, and schedules it there. From any thread.
///
/// # Errors
/// When there is no stack to be had.
#[track_caller]
pub fn start_remote<F>(home: &Arc<dyn Schedule>, name: &'static str, f: F) -> Result<(), Error>
where
    F: for<'a> FnOnce(&'a Co) + Send + 'static,
{
    // SAFETY: `f` borrows nothing.
    let ready = unsafe { create_remote(home, name, Location::caller(), f) }?;
    home.schedule(ready);
    Ok(())
}

/// # Safety
/// What `f` borrows outlives the coroutine: until it has finished, or until the `Ready` or the
/// coroutine is dropped.
unsafe fn create_remote<F>(
    home: &Arc<dyn Schedule>,
    name: &'static str,
    created: &'static Location<'static>,
    f: F,
) -> Result<Ready, Error>
where
    F: for<'a> FnOnce(&'a Co) + Send,
{
    with_thread(|thread| {
        // SAFETY: the caller's promise.
        let born = unsafe { create(thread, DEFAULT_CLASS, name, Some(home), created, f) }?;
        let (control, life) = born;
        control.thread.store(0, Ordering::Relaxed);
        control.detached.set(true);
        Ok(Ready::first(control, life, home, created))
    })
}

/// Bytes of an entry function that is written to the stack; a larger one is boxed.
const LARGEST_ENTRY: usize = 512;

/// A new life, phase `New`, not bound to a thread yet; and its number.
///
/// # Safety
/// What `f` borrows outlives the coroutine. A coroutine with an `f` that is not `Send` is only ever
/// entered on this thread.
#[inline(always)]
unsafe fn create<F>(
    thread: &Thread,
    class: usize,
    name: &'static str,
    home: Option<&Arc<dyn Schedule>>,
    created: &'static Location<'static>,
    f: F,
) -> Result<(&'static Control, u64), Error>
where
    F: for<'a> FnOnce(&'a Co),
{
    let control = thread.take(class)?;
    // A slot comes back from its last life with these as they are here: nothing waits, nothing is
    // held.
    debug_assert!(!control.woke().get() && !control.odd_end().get() && !control.homed().get());
    debug_assert_eq!(control.holds.get(), [0; 2]);
    // Nobody sees it before it has a life.
    control.begin();
    control.name.set(name);
    control.created.set(created);
    if let Some(home) = home {
        // SAFETY: the slot came from the pool: it is this thread's alone, and without a home.
        unsafe { control.set_home(home) };
    }
    if const { size_of::<F>() <= LARGEST_ENTRY } {
        // SAFETY: the slot is fresh from the pool, so its stack is idle. The caller answers for
        // what `f` borrows; `run` catches its panic.
        unsafe { control.prepare(move |control| run(control, f)) };
    } else {
        let f = Box::new(f);
        // SAFETY: as above.
        unsafe { control.prepare(move |control| run(control, |co| f(co))) };
    }
    let life = thread.new_life();
    control.life.store(life, Ordering::Release);
    Ok((control, life))
}

/// Runs an entry on its coroutine's stack and keeps its panic for the resumer.
#[inline(always)]
fn run<F>(control: &'static Control, f: F)
where
    F: for<'a> FnOnce(&'a Co),
{
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(Co::of(control)))) {
        keep_panic(control, panic);
    }
}

#[cold]
#[inline(never)]
fn keep_panic(control: &'static Control, panic: Box<dyn Any + Send>) {
    if !panic.is::<ForcedUnwind>() {
        control.panic.set(Some(panic));
        control.odd_end().set(true);
    }
}
