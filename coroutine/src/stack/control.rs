//! The control block at the top of each stack, and the switches to and from it.
//!
//! A *slot* is a stack with its control block; it has one life after the other. Each begins with
//! its entry closure written to the top of the stack below the control block, and ends with the
//! stack empty.
//!
//! ```text
//!            create              enter                 enters another
//!    Free -----------> New ---------------> Running -------------------> Entered
//!     ^                 |                   ^  | |  <------------------
//!     |<----------------+ dropped unstarted |  | |     that comes back
//!     |                                     |  | |
//!     |     release, in the resumer         |  | | entry returned or panicked
//!     +---- Finished <----------------------|--|-+
//!                                           |  |
//!                        resumed by hand,   |  | suspend, or wait for an operation
//!                  by a wake, or completed  |  v
//!                            +------------- Suspended / Waiting
//!                            |                 |
//!                         Queued <-------------+ woken or completed by a running coroutine (1.9)
//! ```
//!
//! A hook's veto (rule 1.6) puts `Kept` between Finished and Free: until the handle is dropped.
//!
//! Who may touch what: `life`, `thread` and `mark` are atomics, any thread may read them at any
//! time. All else belongs to the thread on which this life runs (before its first entry: to whoever
//! holds it; between two lives: to the pool that holds the slot). `life` matches and `thread` is
//! mine: then all of it is mine.

use std::any::Any;
use std::backtrace::Backtrace;
use std::cell::{Cell, UnsafeCell};
use std::mem::{MaybeUninit, offset_of};
use std::panic::Location;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use corosensei::Yielder;
use corosensei::stack::valgrind::ValgrindStackRegistration;
use corosensei::stack::{Stack, StackPointer};

use super::fibre::Fibre;
use super::marks;
use crate::protocol::mark::WakeMark;
use crate::release::Hook;
use crate::schedule::Schedule;

/// In `Control::life`: over, and kept for the handle of this life.
pub(crate) const KEPT: u64 = 1 << 63;

/// Where a coroutine stands in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Created, never entered.
    New,
    /// Suspended by `Co::suspend`: entering by hand or a wake resumes it.
    Suspended,
    /// Waits for an operation: only its completion resumes it (rule 2.1).
    Waiting,
    /// Woken by a running coroutine, and in its queue (rule 1.9).
    Queued,
    /// The current coroutine of its thread, and not woken meanwhile.
    Running,
    /// The current coroutine of its thread, and woken meanwhile (`pending`): its next bare suspend
    /// returns at once.
    Roused,
    /// Has entered another one and waits for it to come back.
    Entered,
    /// The entry has returned; the resumer is about to release the slot.
    Finished,
    /// Over, and its release hook has vetoed: the slot belongs to the handle until that is dropped.
    Kept,
    /// Idle: the slot is in a pool.
    Free,
}

/// The switch; made anew for each life, which costs a few stores.
type Raw = corosensei::Coroutine<(), (), (), SlotStack>;

/// What is known about a coroutine, at the top of its stack. See the head of this file for who may
/// touch what.
#[repr(C, align(64))]
pub(crate) struct Control {
    // ---- the one line that a switch touches
    pub(crate) phase: Cell<Phase>,
    /// Has suspended in this life. Beside the phase: a suspend sets both with one store.
    pub(crate) suspended: Cell<bool>,
    /// A wake came while this coroutine could not be resumed: its next bare suspend returns at
    /// once.
    pub(crate) pending: Cell<bool>,
    /// Belongs to a home or to nobody: dropping the handle does nothing.
    pub(crate) detached: Cell<bool>,
    /// What an end must look at, see [`Control::woke`] and below; one comparison sees that there is
    /// nothing.
    odd: Cell<[bool; 4]>,
    raw: UnsafeCell<MaybeUninit<Raw>>,
    /// Process-unique number of this life; 0 while the slot is free.
    pub(crate) life: AtomicU64,
    /// Where it suspended last.
    pub(crate) suspended_at: Cell<&'static Location<'static>>,
    /// What time it was when it was entered last, see [`note_time`](crate::note_time).
    pub(crate) entered_at: Cell<u64>,

    // ---- one line that a wake, a creation or an end touches
    /// Number of the thread on which this life runs; 0 before its first entry.
    pub(crate) thread: AtomicU64,
    /// Next in the list that this one is in: a wake queue, or a pool.
    pub(crate) next: Cell<Option<&'static Control>>,
    /// Locks held: `[Hold::Lock, Hold::GraphRead]`.
    pub(crate) holds: Cell<[u32; 2]>,
    pub(crate) name: Cell<&'static str>,
    pub(crate) created: Cell<&'static Location<'static>>,
    class: u8,
    /// The thread was panicking already when this coroutine was last entered.
    pub(crate) entered_panicking: Cell<bool>,
    /// Has moved to another home in this life.
    pub(crate) moved: Cell<bool>,

    pub(crate) mark: WakeMark,
    /// First and last of the coroutines that this one has woken while it ran (rule 1.9).
    wakes_head: Cell<Option<&'static Control>>,
    wakes_tail: Cell<Option<&'static Control>>,
    /// Frames that must not be unwound, because somebody else works on memory of this stack.
    pub(crate) pinned: Cell<u32>,

    // ---- the rest
    home: UnsafeCell<Option<Arc<dyn Schedule>>>,
    pub(crate) panic: Cell<Option<Box<dyn Any + Send>>>,
    /// Somebody wants to know where this coroutine stands: it captures a backtrace when it is
    /// resumed, and suspends again.
    pub(crate) telling: Cell<bool>,
    /// What it told.
    pub(crate) told: Cell<Option<Box<Backtrace>>>,
    /// Decides about the stack at the end of this life, while `hooked`.
    pub(crate) release_hook: Cell<Option<Hook>>,
    /// What it waits for, while `Waiting`.
    pub(crate) waits_for: Cell<&'static str>,
    marked_by: AtomicPtr<Location<'static>>,
    low: *mut u8,
    /// The home that a life of this number has moved to. Any thread.
    pub(crate) forward: Mutex<Option<(u64, Arc<dyn Schedule>)>>,
    /// What ThreadSanitizer is told; in other builds it has no size.
    fibre: Fibre,
}

// SAFETY: the cells are touched only by the thread that owns this life (see the head of this file),
// and ownership moves between threads only through a lock or through a `Ready`, which its scheduler
// passes on with synchronisation of its own.
unsafe impl Sync for Control {}

/// Tells valgrind that this is a stack, so that it follows our switches; a few instructions that do
/// nothing where there is no valgrind. For ever, like the arena.
fn register_with_valgrind(control: &'static Control) {
    let bytes = ptr::from_ref(control).addr() - control.low.addr();
    std::mem::forget(ValgrindStackRegistration::new(control.low, bytes));
}

/// How far below the base of a stack corosensei keeps the parent link. Not in its interface, so it
/// is checked on each stack before its first life ([`Control::place`]).
const PARENT_LINK: usize = if cfg!(target_arch = "powerpc64") {
    32
} else {
    16
};

/// The same from a control block, where the stack begins; the sanitizer's words lie between.
const BASE_TO_PARENT_LINK: usize = PARENT_LINK + if cfg!(feature = "sanitizer") { 16 } else { 0 };

#[cold]
#[inline(never)]
fn wrong_parent_link() -> ! {
    eprintln!("this version of corosensei keeps the parent link elsewhere: aborting");
    std::process::abort();
}

/// The stack below a control block, for corosensei.
struct SlotStack(&'static Control);

// SAFETY: the stack reaches from the guard page that `Quarry::carve` set up to the control block,
// which is aligned to 64; the smallest class leaves far more than `MIN_STACK_SIZE` between them,
// and arenas are never unmapped.
unsafe impl Stack for SlotStack {
    #[inline(always)]
    fn base(&self) -> StackPointer {
        NonNull::from(self.0).addr()
    }
    fn limit(&self) -> StackPointer {
        NonNull::new(self.0.low)
            .expect("a mapped stack is not the null page")
            .addr()
    }
}

impl Control {
    /// Where in a control block the switch keeps its own words, and how many bytes they are: for
    /// debuggers.
    pub(super) const SWITCH: (usize, usize) = (offset_of!(Control, raw), size_of::<Raw>());

    /// Places a control block at the top of the first slot of `fresh` and prepares its stack.
    pub(crate) fn place(fresh: super::Fresh, class: usize) -> &'static Control {
        assert!(fresh.count >= 1, "no slot to place a control block in");
        let at: *mut Control = fresh.control_address(class).cast();
        assert!(
            at.is_aligned(),
            "colours and classes keep control blocks aligned"
        );
        let new = Control {
            phase: Cell::new(Phase::Free),
            suspended: Cell::new(false),
            pending: Cell::new(false),
            detached: Cell::new(false),
            odd: Cell::new([false; 4]),
            raw: UnsafeCell::new(MaybeUninit::uninit()),
            life: AtomicU64::new(0),
            suspended_at: Cell::new(Location::caller()),
            entered_at: Cell::new(0),
            thread: AtomicU64::new(0),
            next: Cell::new(None),
            holds: Cell::new([0; 2]),
            name: Cell::new(""),
            created: Cell::new(Location::caller()),
            class: u8::try_from(class).expect("few classes"),
            entered_panicking: Cell::new(false),
            moved: Cell::new(false),
            mark: WakeMark::new(),
            wakes_head: Cell::new(None),
            wakes_tail: Cell::new(None),
            pinned: Cell::new(0),
            home: UnsafeCell::new(None),
            panic: Cell::new(None),
            telling: Cell::new(false),
            told: Cell::new(None),
            release_hook: Cell::new(None),
            waits_for: Cell::new(""),
            marked_by: AtomicPtr::new(ptr::null_mut()),
            low: fresh.low,
            forward: Mutex::new(None),
            fibre: Fibre::new(),
        };
        // SAFETY: `at` lies inside a slot that belongs to the caller alone, with room for a
        // `Control` up to the slot's end (`control_address`), aligned (asserted), and mapped
        // read-write (only the first page is a guard).
        unsafe { at.write(new) };
        // SAFETY: just written; the arena is never unmapped and nobody ever writes a second
        // `Control` there, so the reference stays good for the rest of the process.
        let control: &'static Control = unsafe { &*at };
        super::note_placed(control);
        register_with_valgrind(control);
        control.check_parent_link();
        control
    }

    /// Switches to this stack and back, and looks where the parent link is.
    fn check_parent_link(&'static self) {
        let here = self.parent_link();
        // SAFETY: the stack is idle and lives for ever; the entry borrows nothing.
        let mut raw = unsafe {
            Raw::with_stack_unchecked(SlotStack(self), move |yielder, ()| {
                if ptr::from_ref(yielder).addr() != here {
                    wrong_parent_link();
                }
            })
        };
        raw.resume(());
    }

    /// Puts `entry` on the stack, ready for the first [`Control::switch_in`].
    ///
    /// # Safety
    /// The slot is the caller's alone and no life is on its stack. What `entry` borrows outlives
    /// the life. `entry` does not unwind.
    #[inline(always)]
    pub(crate) unsafe fn prepare<F>(&'static self, entry: F)
    where
        F: FnOnce(&'static Control),
    {
        // SAFETY: the stack is idle, as the caller promises.
        unsafe { marks::usable(self.low, ptr::from_ref(self).cast()) };
        let body = move |yielder: &Yielder<(), ()>, ()| {
            // Found by the place of the parent link, and not carried along: what is copied at each
            // beginning is the entry alone, and the frames are that much nearer.
            let at = ptr::from_ref(yielder).addr() + BASE_TO_PARENT_LINK;
            // SAFETY: the parent link of this stack lies there (checked by `place`), so this is the
            // address of `self`: a control block in mapped memory, exposed by `map_arena`.
            let control = unsafe { &*ptr::with_exposed_provenance::<Control>(at) };
            entry(control);
            control.phase.set(Phase::Finished);
            if control.suspended.get() || Fibre::TOLD {
                // The last switch of this life. It leaves the stack as it is, and nobody comes
                // back: after a suspend, each return through the frames below is mispredicted;
                // without one, they are predicted, and this switch were not.
                control.fibre.leave();
                yielder.suspend(());
            }
        };
        // SAFETY: the stack is idle and lives for ever; the caller answers for what `entry`
        // borrows.
        let raw = unsafe { Raw::with_stack_unchecked(SlotStack(self), body) };
        let room = self.raw.get().cast::<Raw>();
        // SAFETY: nobody uses the one of the last life any more. It needs no drop: its entry is
        // gone, run or dropped, and it owns nothing else.
        unsafe { room.write(raw) };
    }

    /// Drops the entry of a life that has never run.
    ///
    /// # Safety
    /// [`Control::prepare`] put one there, and it was not switched to since.
    pub(crate) unsafe fn drop_entry(&self) {
        // SAFETY: initialised by `prepare`, and nobody else uses a slot that does not run.
        let raw = unsafe { &mut *self.raw.get().cast::<Raw>() };
        raw.force_unwind();
    }

    /// Where corosensei keeps the link to whoever resumed this stack: the address of its
    /// `Yielder`. Kept nowhere, since the line of a control block that each switch touches is full.
    #[inline(always)]
    fn parent_link(&self) -> usize {
        ptr::from_ref(self).addr() - BASE_TO_PARENT_LINK
    }

    /// Asks the processor for the place where a coroutine with few frames has left its registers:
    /// now, and not when the control block has told where they are. Going round thousands of
    /// coroutines, that is one miss instead of two, one after the other.
    #[inline(always)]
    pub(crate) fn prefetch_frames(&self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // Below the line of the parent link; its neighbour comes with it.
            let at = ptr::from_ref(self).cast::<i8>().wrapping_sub(128);
            // SAFETY: a prefetch reads nothing, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
        }
    }

    /// The same for all frames from `low`, which lies in the last one, up to here, and for the
    /// control block. Of a deep stack the part around the last frames.
    #[inline(always)]
    pub(crate) fn prefetch_stack(&self, low: *const i8) {
        /// What the usual request has on its stack.
        const MOST: usize = 24 * LINE;
        /// Bytes of a cache line.
        const LINE: usize = 64;
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let control = ptr::from_ref(self).cast::<i8>();
            // SAFETY: a prefetch reads nothing, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(control) };
            let lines = control.addr().saturating_sub(low.addr()).min(MOST) / LINE + 3;
            // The frames of the switch itself lie below `low`.
            let mut line = low.wrapping_sub(2 * LINE);
            for _ in 0..lines {
                // SAFETY: as above.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
                line = line.wrapping_add(LINE);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = low;
    }

    /// Begins a life: phase `New`, and nothing has happened in it. Neighbours, so that it is one
    /// store.
    #[inline(always)]
    pub(crate) fn begin(&self) {
        self.phase.set(Phase::New);
        self.suspended.set(false);
        self.pending.set(false);
        self.detached.set(false);
        self.odd.set([false; 4]);
    }

    /// Has woken others while it ran: `wakes_head` is not empty.
    #[inline(always)]
    pub(crate) fn woke(&self) -> &Cell<bool> {
        &self.odd.as_array_of_cells()[0]
    }

    /// Has a home.
    #[inline(always)]
    pub(crate) fn homed(&self) -> &Cell<bool> {
        &self.odd.as_array_of_cells()[1]
    }

    /// Its end is no plain one: it has a release hook (never together with a home), or it has
    /// panicked.
    #[inline(always)]
    pub(crate) fn odd_end(&self) -> &Cell<bool> {
        &self.odd.as_array_of_cells()[2]
    }

    /// A resume is no plain resume: it unwinds, because the handle was dropped; or, while
    /// `telling`, only tells where this coroutine stands.
    #[inline(always)]
    pub(crate) fn unwinding(&self) -> &Cell<bool> {
        &self.odd.as_array_of_cells()[3]
    }

    /// How much of one kind is held, see `holds`.
    #[inline(always)]
    pub(crate) fn held(&self, what: usize) -> &Cell<u32> {
        &self.holds.as_array_of_cells()[what]
    }

    /// Whether none of the above is so, and nothing is held.
    #[inline(always)]
    pub(crate) fn ends_plainly(&self) -> bool {
        self.odd.get() == [false; 4] && self.holds.get() == [0; 2]
    }

    /// The phase of this coroutine when it runs on.
    #[inline(always)]
    pub(crate) fn running(&self) -> Phase {
        if self.pending.get() {
            Phase::Roused
        } else {
            Phase::Running
        }
    }

    /// Size class of the stack.
    pub(crate) fn class(&self) -> usize {
        usize::from(self.class)
    }

    /// Low end of the stack: its guard page.
    pub(crate) fn low(&self) -> *mut u8 {
        self.low
    }

    /// Switches to this stack; returns when it suspends or finishes.
    ///
    /// # Safety
    /// The calling thread owns this life, and its code is not on the stack anywhere below (phase
    /// `New`, `Suspended`, `Waiting` or `Queued`), with an entry in place if it has not started.
    #[inline(always)]
    pub(crate) unsafe fn switch_in(&'static self) {
        let raw = self.raw.get();
        // SAFETY: `prepare` initialised it, and only `switch_in` ever makes a reference to it; the
        // caller promises that no other `switch_in` of this slot is under way, so this one is the
        // only one.
        let raw = unsafe { &mut *raw.cast::<Raw>() };
        // SAFETY: it is done only after its life: each one begins with a new `Raw` (`prepare`).
        unsafe { std::hint::assert_unchecked(!raw.done()) };
        self.fibre.enter();
        raw.resume(());
        let over = self.phase.get() == Phase::Finished;
        self.fibre.left(over);
        if over {
            // SAFETY: this life has made its last switch, to us.
            unsafe { marks::over(self.low, ptr::from_ref(self).cast()) };
        }
    }

    /// Switches from this stack to whoever switched to it last.
    ///
    /// # Safety
    /// Runs on the stack of this slot.
    #[inline(always)]
    pub(crate) unsafe fn switch_out(&self) {
        // SAFETY: the parent link of a stack with a life is a `Yielder` at this place: checked
        // before its first life (`place`). Its address is that of mapped memory, exposed by
        // `map_arena`.
        let yielder =
            unsafe { &*ptr::with_exposed_provenance::<Yielder<(), ()>>(self.parent_link()) };
        self.fibre.leave();
        yielder.suspend(());
    }

    /// Remembers who marked this coroutine as scheduled.
    pub(crate) fn set_marked_by(&self, by: &'static Location<'static>) {
        self.marked_by
            .store(ptr::from_ref(by).cast_mut(), Ordering::Release);
    }

    /// Who marked this coroutine as scheduled last.
    pub(crate) fn marked_by(&self) -> Option<&'static Location<'static>> {
        // SAFETY: null, or made from a `&'static` by `set_marked_by`.
        unsafe { self.marked_by.load(Ordering::Acquire).as_ref() }
    }

    /// Its home, if it has one.
    ///
    /// # Safety
    /// The calling thread owns this life, and does not hold the answer beyond it.
    pub(crate) unsafe fn home(&self) -> Option<&Arc<dyn Schedule>> {
        // SAFETY: written by `set_home` only, at creation and at the end, when nobody holds such a
        // reference.
        unsafe { (*self.home.get()).as_ref() }
    }

    /// Gives a new life its home; cloned into its place, since a copy on the way would cost a
    /// stall.
    ///
    /// # Safety
    /// The calling thread owns this slot, which has no home.
    #[inline(always)]
    pub(crate) unsafe fn set_home(&self, home: &Arc<dyn Schedule>) {
        self.homed().set(true);
        // SAFETY: the caller owns the cell. What is overwritten is `None`, which needs no drop.
        unsafe { self.home.get().write(Some(home.clone())) };
    }

    /// Takes the home away from a life that is over, or moves; `between` runs before the reference
    /// is dropped, which may be the end of the home.
    ///
    /// # Safety
    /// The calling thread owns this slot, and nobody holds a reference that [`Control::home`] gave.
    #[inline(always)]
    pub(crate) unsafe fn drop_home(&self, between: impl FnOnce()) {
        self.homed().set(false);
        // SAFETY: the caller owns the cell and no reference into it is alive.
        let home = unsafe { self.home.get().replace(None) };
        between();
        drop(home);
    }

    /// Appends `other` to the coroutines that this one has woken (rule 1.9).
    pub(crate) fn push_wake(&self, other: &'static Control) {
        other.next.set(None);
        match self.wakes_tail.replace(Some(other)) {
            Some(tail) if self.woke().get() => tail.next.set(Some(other)),
            _ => self.wakes_head.set(Some(other)),
        }
        self.woke().set(true);
    }

    /// Takes the queue of the coroutines that this one has woken: its first and last.
    pub(crate) fn take_wakes(&self) -> Option<(&'static Control, &'static Control)> {
        if !self.woke().replace(false) {
            return None;
        }
        let first = self.wakes_head.take().expect("it woke somebody");
        Some((first, self.wakes_tail.take().expect("a queue has an end")))
    }
}
