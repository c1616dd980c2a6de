//! Slots kept for reuse: a list per thread and size, and a shared one between the threads.
//!
//! ```text
//!            thread A                     shared, under a lock             thread B
//!   take <-- local list (LIFO) <--batch-- warm list (bounded) <--batch---- local list <-- put
//!                    ^                        |
//!                    |                        v  above the bound: pages back to the kernel
//!                    |                    cold list
//!                    +-- fresh slots <--- quarry: arenas
//! ```
//! A local list that has grown too long gives half of itself to the shared one; an empty one takes
//! a batch from there. So when one thread creates and another finishes (rule 1.7), slots travel in
//! batches and none is made anew. Only the resident memory is bounded: slots are never unmapped
//! (see `stack`).

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::stack::control::{Control, Phase};
use crate::stack::{self, CLASSES, Fresh, Quarry, size_of_class};

/// Bytes of idle stacks that one thread keeps per size class, as if they were resident as a whole.
const LOCAL_BYTES: usize = 32 << 20;
/// The same for the shared list; above it, stacks give their pages back.
const SHARED_BYTES: usize = 256 << 20;
/// Life numbers that a thread takes at once.
const LIVES: u64 = 1 << 20;

/// Most idle slots of `class` in a thread's own list.
const fn local_max(class: usize) -> usize {
    let n = LOCAL_BYTES / size_of_class(class);
    if n < 2 { 2 } else { n }
}

/// Most idle slots of `class` in the shared list that keep their pages.
const fn shared_max(class: usize) -> usize {
    let n = SHARED_BYTES / size_of_class(class);
    if n < 4 { 4 } else { n }
}

/// Idle slots of one size, last in, first out, linked through their `next`.
struct List {
    head: Cell<Option<&'static Control>>,
    /// Slots above `most`, so negative while there is room: a push then sees by the sign alone
    /// that it was one too many.
    excess: Cell<isize>,
    /// Above this number, slots are one too many.
    most: Cell<isize>,
}

impl List {
    const fn new(most: usize) -> List {
        List {
            head: Cell::new(None),
            excess: Cell::new(-1 - most.cast_signed()),
            most: Cell::new(most.cast_signed()),
        }
    }

    fn count(&self) -> usize {
        let count = self.excess.get() + self.most.get() + 1;
        count.cast_unsigned()
    }

    /// Sets how many are not too many.
    fn set_most(&self, most: usize) {
        let count = self.count();
        self.most.set(most.cast_signed());
        self.excess
            .set(count.cast_signed() - most.cast_signed() - 1);
    }

    #[inline]
    fn pop(&self) -> Option<&'static Control> {
        let first = self.head.get()?;
        self.head.set(first.next.get());
        self.excess.set(self.excess.get() - 1);
        Some(first)
    }

    /// True: there are more than `most` now.
    #[inline]
    fn push(&self, slot: &'static Control) -> bool {
        slot.next.set(self.head.get());
        self.head.set(Some(slot));
        self.excess.set(self.excess.get() + 1);
        self.excess.get() >= 0
    }
}

/// The pool of one thread for one size. Aligned, so that finding the one of a class is a shift.
#[repr(align(64))]
struct Local {
    idle: List,
    fresh: Cell<Fresh>,
}

/// Classes, rounded up to a power of two: a masked index is never out of bounds.
const LOCALS: usize = CLASSES.next_power_of_two();

const fn locals() -> [Local; LOCALS] {
    let mut all = [const {
        Local {
            idle: List::new(0),
            fresh: Cell::new(Fresh::EMPTY),
        }
    }; LOCALS];
    let mut class = 0;
    while class < CLASSES {
        all[class].idle = List::new(local_max(class));
        class += 1;
    }
    all
}

/// What each thread knows: its current coroutine, its number, its idle slots, its counters.
pub(crate) struct Thread {
    /// The running coroutine; `None` is the leader (rule 1.1).
    pub(crate) current: Cell<Option<&'static Control>>,
    /// Number of this thread, never given to another one; 0 until the first use.
    number: Cell<u64>,
    next_life: Cell<u64>,
    last_life: Cell<u64>,
    /// What to add to `next_life` in order to know how many lives have begun here.
    begun: Cell<u64>,
    /// What time it is, see [`note_time`].
    pub(crate) now: Cell<u64>,
    /// Thread locks held now (`sync::ThreadLock`, builds with debug assertions only).
    pub(crate) locks: Cell<u32>,
    /// The thread is ending: idle slots go straight to the shared list.
    ending: Cell<bool>,
    pub(crate) switches: Cell<u64>,
    pub(crate) stale_wakes: Cell<u64>,
    pub(crate) leaked: Cell<u64>,
    /// Lives that began here on a stack that nobody had used.
    fresh: Cell<u64>,
    finished: Cell<u64>,
    local: [Local; LOCALS],
}

thread_local! {
    static THREAD: Thread = const {
        Thread {
            current: Cell::new(None),
            number: Cell::new(0),
            next_life: Cell::new(1),
            last_life: Cell::new(0),
            begun: Cell::new(u64::MAX),
            now: Cell::new(0),
            locks: Cell::new(0),
            ending: Cell::new(false),
            switches: Cell::new(0),
            stale_wakes: Cell::new(0),
            leaked: Cell::new(0),
            fresh: Cell::new(0),
            finished: Cell::new(0),
            local: locals(),
        }
    };

    /// Gives the idle slots of this thread to the others when it ends.
    static AT_EXIT: AtExit = const { AtExit };
}

struct AtExit;

impl Drop for AtExit {
    fn drop(&mut self) {
        THREAD.with(Thread::give_up);
    }
}

/// Where the record of the calling thread lies, for as long as the thread lives: it has no
/// destructor.
#[inline]
pub(crate) fn address() -> *const Thread {
    THREAD.with(std::ptr::from_ref)
}

/// The running coroutine of this thread, or `None` on its own stack.
///
/// Never inlined, so that no caller keeps the address of a thread-local over a suspend.
#[inline(never)]
pub(crate) fn current() -> Option<&'static Control> {
    THREAD.with(|thread| thread.current.get())
}

/// Takes back one from the count of thread locks, or adds one.
#[inline(never)]
pub(crate) fn count_thread_locks(change: i32) -> u32 {
    THREAD.with(|thread| {
        let now = thread
            .locks
            .get()
            .checked_add_signed(change)
            .expect("thread locks are paired");
        thread.locks.set(now);
        now
    })
}

/// A counter that only this thread changes.
#[inline(always)]
pub(crate) fn bump(counter: &Cell<u64>) {
    counter.set(counter.get().wrapping_add(1));
}

impl Thread {
    /// Number of this thread, on which a life has begun already.
    #[inline]
    pub(crate) fn number_after_a_life(&self) -> u64 {
        debug_assert!(self.number.get() != 0, "the first life has taken a number");
        self.number.get()
    }

    /// Number of this thread, never 0.
    #[inline]
    pub(crate) fn number(&self) -> u64 {
        match self.number.get() {
            0 => self.take_number(),
            n => n,
        }
    }

    #[cold]
    fn take_number(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        self.number.get()
    }

    /// A number for a new life, unique in this process, never 0.
    #[inline]
    pub(crate) fn new_life(&self) -> u64 {
        let life = self.next_life.get();
        if life > self.last_life.get() {
            return self.more_lives();
        }
        self.next_life.set(life + 1);
        life
    }

    #[cold]
    fn more_lives(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.number();
        let first = NEXT.fetch_add(LIVES, Ordering::Relaxed);
        self.begun.set(self.created().wrapping_sub(first));
        self.next_life.set(first + 1);
        self.last_life.set(first + LIVES - 1);
        first
    }

    /// Lives that have begun here.
    fn created(&self) -> u64 {
        self.next_life.get().wrapping_add(self.begun.get())
    }

    fn local(&self, class: usize) -> &Local {
        &self.local[class % LOCALS]
    }

    /// An idle slot of `class`, phase `Free`; a new life is to begin on it.
    ///
    /// # Errors
    /// What [`Quarry::carve`] says, when no idle slot is left anywhere.
    #[inline]
    pub(crate) fn take(&self, class: usize) -> Result<&'static Control, Error> {
        let slot = match self.local(class).idle.pop() {
            Some(slot) => slot,
            None => self.take_slow(class)?,
        };
        debug_assert_eq!(slot.phase.get(), Phase::Free, "a pooled slot is free");
        Ok(slot)
    }

    #[cold]
    #[inline(never)]
    fn take_slow(&self, class: usize) -> Result<&'static Control, Error> {
        let local = self.local(class);
        let mut fresh = local.fresh.get();
        if fresh.count == 0 {
            if !self.ending.get() {
                // The first slow path registers the destructor; when it cannot be, the thread is
                // ending.
                let _ = AT_EXIT.try_with(|_| ());
            }
            stack::overflow::prepare_thread();
            let mut shared = lock(class);
            if shared.give(&local.idle, local_max(class).div_ceil(2)) {
                drop(shared);
                return Ok(local.idle.pop().expect("the shared list gave at least one"));
            }
            fresh = shared.fresh(class)?;
        }
        let first = fresh.split(1, class);
        local.fresh.set(fresh);
        bump(&self.fresh);
        Ok(Control::place(first, class))
    }

    /// Takes back a slot whose life is over. Its phase must be `Free`.
    #[inline]
    pub(crate) fn put(&self, slot: &'static Control) {
        debug_assert_eq!(slot.phase.get(), Phase::Free, "only a free slot is pooled");
        bump(&self.finished);
        let class = slot.class();
        let local = self.local(class);
        if local.idle.push(slot) {
            self.spill(class);
        }
    }

    /// Takes back a slot whose life is over, and gives its memory to the kernel.
    #[cold]
    pub(crate) fn put_cold(&self, slot: &'static Control) {
        debug_assert_eq!(slot.phase.get(), Phase::Free, "only a free slot is pooled");
        bump(&self.finished);
        unbind(slot);
        stack::trim(slot);
        lock(slot.class()).cold.push(slot);
    }

    #[cold]
    #[inline(never)]
    fn spill(&self, class: usize) {
        let idle = &self.local(class).idle;
        let keep = if self.ending.get() {
            0
        } else {
            local_max(class) / 2
        };
        let mut shared = lock(class);
        while idle.count() > keep {
            let slot = idle.pop().expect("the count is right");
            unbind(slot);
            shared.take_in(slot, class);
        }
    }

    /// Gives all idle slots to the other threads, now and from now on.
    fn give_up(&self) {
        self.ending.set(true);
        for class in 0..CLASSES {
            let local = self.local(class);
            local.idle.set_most(0);
            let fresh = local.fresh.replace(Fresh::EMPTY);
            if fresh.count > 0 {
                lock(class).leftovers.push(fresh);
            }
            if local.idle.count() > 0 {
                self.spill(class);
            }
        }
    }

    /// Moves idle slots from below the `keep` warmest ones to the cold list, up to `most` of them.
    fn cool(&self, class: usize, keep: usize, most: usize) -> usize {
        let idle = &self.local(class).idle;
        let warm = List::new(keep);
        while warm.count() < keep
            && let Some(slot) = idle.pop()
        {
            warm.push(slot);
        }
        let mut cooled = 0;
        while cooled < most
            && let Some(slot) = idle.pop()
        {
            unbind(slot);
            stack::trim(slot);
            lock(class).cold.push(slot);
            cooled += 1;
        }
        while let Some(slot) = warm.pop() {
            idle.push(slot);
        }
        cooled
    }

    fn idle_slots(&self) -> usize {
        self.local.iter().map(|local| local.idle.count()).sum()
    }
}

/// A slot that leaves its thread forgets it, so that this thread never takes the slot's next life
/// for its own.
fn unbind(slot: &'static Control) {
    slot.thread.store(0, Ordering::Relaxed);
}

/// The slots of one size that no thread has to itself.
struct Shared {
    warm: List,
    cold: List,
    /// Rows of slots that a thread had carved and not used when it ended.
    leftovers: Vec<Fresh>,
    quarry: Quarry,
}

static SHARED: [Mutex<Shared>; CLASSES] = [const {
    Mutex::new(Shared {
        warm: List::new(0),
        cold: List::new(0),
        leftovers: Vec::new(),
        quarry: Quarry::new(),
    })
}; CLASSES];

fn lock(class: usize) -> std::sync::MutexGuard<'static, Shared> {
    SHARED[class]
        .lock()
        .expect("nothing panics while it holds the shared pool")
}

impl Shared {
    /// Moves up to `most` slots into `to`, warm ones first. False: there are none.
    fn give(&mut self, to: &List, most: usize) -> bool {
        for _ in 0..most {
            let Some(slot) = self.warm.pop() else { break };
            to.push(slot);
        }
        if to.count() == 0
            && let Some(slot) = self.cold.pop()
        {
            to.push(slot);
        }
        to.count() > 0
    }

    /// Takes in an idle slot; one too many gives its pages back to the kernel.
    fn take_in(&mut self, slot: &'static Control, class: usize) {
        if self.warm.count() < shared_max(class) {
            self.warm.push(slot);
        } else {
            stack::trim(slot);
            self.cold.push(slot);
        }
    }

    fn fresh(&mut self, class: usize) -> Result<Fresh, Error> {
        if let Some(row) = self.leftovers.pop() {
            return Ok(row);
        }
        self.quarry.carve(class, stack::BATCH.min(local_max(class)))
    }
}

/// Idle stacks of each size that a thread keeps warm when it trims.
const WARM: usize = 16;

/// Gives the memory of up to `most` idle stacks back to the kernel: of this thread (all but the
/// last few used), then of those between the threads. How many there were; fewer than `most`:
/// nothing is left to trim.
///
/// For an event loop that has nothing to do (that of `coblock-aio` does it), in batches: one stack
/// costs about a microsecond here, and one or two page faults when it is used again.
pub fn trim_idle(most: usize) -> usize {
    let mut trimmed = 0;
    for class in 0..CLASSES {
        trimmed += THREAD.with(|thread| thread.cool(class, WARM, most - trimmed));
        let shared = lock(class);
        while trimmed < most
            && let Some(slot) = shared.warm.pop()
        {
            stack::trim(slot);
            shared.cold.push(slot);
            trimmed += 1;
        }
    }
    trimmed
}

/// Idle stacks of the calling thread that [`trim_idle`] would trim; those between the threads are
/// not counted. A few loads, no lock.
pub fn idle_stacks() -> usize {
    THREAD.with(|thread| {
        let idle = thread.local.iter().map(|local| local.idle.count());
        idle.map(|count| count.saturating_sub(WARM)).sum()
    })
}

/// Tells the coroutines of the calling thread what time it is, in nanoseconds of whatever clock: one
/// that is entered is stamped with the last time that was noted, and [`dump`](crate::dump())
/// compares the two; [`Co::entered_ns`](crate::Co::entered_ns) tells it. For an event loop, once a pass
/// (that of `coblock-aio` does it).
pub fn note_time(now_ns: u64) {
    THREAD.with(|thread| thread.now.set(now_ns));
}

/// What the coroutines of the calling thread have done so far, and what the process holds for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Coroutines created by this thread.
    pub created: u64,
    /// Of those, how many got a pooled stack.
    pub reused: u64,
    /// Coroutines whose end this thread saw (finished, or dropped before they started).
    pub finished: u64,
    /// Switches into a coroutine made by this thread.
    pub switches: u64,
    /// Wakes that came too late: their life was over.
    pub stale_wakes: u64,
    /// Suspended coroutines that could not be unwound when they were dropped (`panic = "abort"`):
    /// stacks lost.
    pub leaked: u64,
    /// Idle stacks in this thread's own lists.
    pub stacks_free: u64,
    /// Idle stacks between the threads, all sizes, whole process.
    pub stacks_shared: u64,
    /// Of those, stacks whose memory was given back to the kernel.
    pub stacks_trimmed: u64,
    /// Stacks made so far, whole process: live ones, idle ones, and those carved but never used.
    pub stacks_mapped: u64,
    /// Arenas mapped so far, whole process.
    pub arenas_mapped: u64,
}

impl Stats {
    /// Coroutines that this thread has created and not seen the end of. Negative where others
    /// create for it.
    pub fn live(&self) -> i64 {
        self.created.wrapping_sub(self.finished).cast_signed()
    }
}

/// Counters of the calling thread's coroutines.
#[inline(never)]
pub fn stats() -> Stats {
    let (mut warm, mut cold) = (0, 0);
    for class in 0..CLASSES {
        let shared = lock(class);
        warm += shared.warm.count();
        cold += shared.cold.count();
    }
    THREAD.with(|thread| Stats {
        created: thread.created(),
        reused: thread.created() - thread.fresh.get(),
        finished: thread.finished.get(),
        switches: thread.switches.get(),
        stale_wakes: thread.stale_wakes.get(),
        leaked: thread.leaked.get(),
        stacks_free: thread.idle_slots() as u64,
        stacks_shared: (warm + cold) as u64,
        stacks_trimmed: cold as u64,
        stacks_mapped: stack::stacks_carved(),
        arenas_mapped: stack::arenas_mapped(),
    })
}
