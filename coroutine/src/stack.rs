//! Memory of the stacks: arenas of many stacks, their guard pages, and where a control block lies
//! in its stack.
//!
//! One arena is one raw mapping that holds many stacks of one size. Nobody ever makes a reference
//! to it as a whole; it is never unmapped, so a control block, once placed, stays a control block
//! until the process ends (*type-stable* memory: a stale handle may look at it and only finds that
//! the life number is another one).
//!
//! ```text
//!   one arena            one slot of SIZE bytes (a power of two, and a page)
//!   +--------+           +-------+--------------------------+---------------+--------+
//!   | slot 0 |           | guard |  <---- stack grows down  | control block | colour |
//!   | slot 1 | --------> +-------+--------------------------+---------------+--------+
//!   | ...    |           low     low + GUARD             control          top   low + SIZE
//!   +--------+
//!                        colour = (index % 15) * 256 bytes: so that the hot ends of many
//!                        stacks do not all fall into the same sets of the processor's caches
//! ```
//!
//! The guard page is set with `MADV_GUARD_INSTALL` (Linux 6.13: costs no mapping; several with one
//! call since 6.14) or, where the kernel does not know it, with `mprotect` (two mappings a stack).
//! Which one is found out once, by trying.

pub(crate) mod control;
mod debugger;
mod fibre;
mod marks;
mod newest;
pub(crate) mod overflow;

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use crate::error::Error;
use crate::protocol::limit::Limit;
use crate::protocol::placed::Placed;
use newest::Newest;

/// Bytes of the guard at the low end of each stack.
pub(crate) const GUARD: usize = 4096;
/// Bytes between two neighbouring colours.
const COLOUR_STEP: usize = 256;
/// Number of colours. One less than a page has room for: in the lowest place, control block and
/// first frames would lie in two pages, and cost a sixteenth more memory on average.
const COLOURS: usize = 15;
/// Size of the first arena of a class; each one after it is [`ARENA_GROWTH`] times as large as the
/// one before. So a million stacks of 256 KiB fit into nine.
const FIRST_ARENA: usize = 4 << 20;
/// How much larger each arena is than the one before.
const ARENA_GROWTH: usize = 4;
/// Largest arena that is asked for.
const LARGEST_ARENA: usize = 256 << 30;

/// Smallest stack, guard and control block included: 16 KiB.
pub(crate) const SMALLEST_STACK: usize = 16 << 10;
/// Number of size classes; class `n` has stacks of `SMALLEST_STACK << n` bytes.
pub(crate) const CLASSES: usize = 15;
/// Largest stack: 256 MiB.
pub(crate) const LARGEST_STACK: usize = SMALLEST_STACK << (CLASSES - 1);
/// Default stack, guard and control block included: 256 KiB.
pub const DEFAULT_STACK_SIZE: usize = 256 << 10;
/// Class of [`DEFAULT_STACK_SIZE`].
pub(crate) const DEFAULT_CLASS: usize = 4;
const _: () = assert!(SMALLEST_STACK << DEFAULT_CLASS == DEFAULT_STACK_SIZE);

/// The class whose stacks hold at least `bytes`, guard and control block included.
pub(crate) fn class_of(bytes: usize) -> Result<usize, Error> {
    if bytes > LARGEST_STACK {
        return Err(Error::BadStackSize {
            asked: bytes,
            max: LARGEST_STACK,
        });
    }
    let size = bytes.next_power_of_two().max(SMALLEST_STACK);
    Ok((size / SMALLEST_STACK).trailing_zeros() as usize)
}

/// Bytes of one slot of `class`: what was asked for, and a page.
///
/// The page makes the distance of two neighbours odd, in pages. Were it a power of two, the tops of
/// all stacks would share a few sets of the TLB and of the second-level cache: going round a
/// thousand coroutines then took more than twice as long.
pub(crate) const fn size_of_class(class: usize) -> usize {
    (SMALLEST_STACK << class) + GUARD
}

/// `MADV_GUARD_INSTALL`, Linux 6.13; not in the libc crate.
const MADV_GUARD_INSTALL: libc::c_int = 102;

/// Most guards that are set with one call, so most slots that are carved at once.
pub(crate) const BATCH: usize = 16;
/// The kernel has refused to set several guards with one call.
static NO_BATCHES: AtomicBool = AtomicBool::new(false);

/// How guard pages are set; found out by the first attempt.
static GUARD_KIND: AtomicU8 = AtomicU8::new(GUARD_UNKNOWN);
const GUARD_UNKNOWN: u8 = 0;
const GUARD_MADVISE: u8 = 1;
const GUARD_MPROTECT: u8 = 2;

/// Makes every guard page from now on by `mprotect`, as on a kernel without `MADV_GUARD_INSTALL`.
///
/// For tests of the fallback only.
#[doc(hidden)]
pub fn force_mprotect_guards() {
    GUARD_KIND.store(GUARD_MPROTECT, Ordering::Relaxed);
}

/// Which call sets the guard pages: `"MADV_GUARD_INSTALL"`, `"mprotect"`, or `"unknown"` before the
/// first stack.
pub fn guard_kind() -> &'static str {
    match GUARD_KIND.load(Ordering::Relaxed) {
        GUARD_MADVISE => "MADV_GUARD_INSTALL",
        GUARD_MPROTECT => "mprotect",
        _ => "unknown",
    }
}

/// A row of neighbouring slots in one arena, with guards set, whose control blocks are not placed
/// yet.
#[derive(Clone, Copy)]
pub(crate) struct Fresh {
    /// Low end of the next slot.
    pub(crate) low: *mut u8,
    /// Number of the next slot, for its colour.
    pub(crate) index: usize,
    /// Slots left.
    pub(crate) count: usize,
}

// SAFETY: a `Fresh` is the exclusive right to memory that no thread has used yet; nothing in it
// belongs to a thread.
unsafe impl Send for Fresh {}

impl Fresh {
    pub(crate) const EMPTY: Fresh = Fresh {
        low: ptr::null_mut(),
        index: 0,
        count: 0,
    };

    /// Splits off the first `count` slots; `class` says how large one is.
    pub(crate) fn split(&mut self, count: usize, class: usize) -> Fresh {
        assert!(
            count <= self.count,
            "a row of {} slots has no {count}",
            self.count
        );
        let first = Fresh {
            low: self.low,
            index: self.index,
            count,
        };
        self.low = self.low.wrapping_add(count * size_of_class(class));
        self.index += count;
        self.count -= count;
        first
    }

    /// The address where the control block of the first slot goes.
    pub(crate) fn control_address(&self, class: usize) -> *mut u8 {
        let colour = (self.index % COLOURS) * COLOUR_STEP;
        self.low
            .wrapping_add(size_of_class(class) - colour - size_of::<control::Control>())
    }
}

/// The primitives of `newest`, so that a test can include that file with loom's.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicPtr, Ordering};
}

/// What the overflow handler needs to know of an arena. Made once per arena, never freed.
pub(crate) struct Arena {
    low: usize,
    bytes: usize,
    class: usize,
    /// Slots handed out so far, counted from the low end: only these may hold a control block.
    carved: AtomicUsize,
    /// Whose control blocks are in place.
    placed: Placed,
    next: Option<&'static Arena>,
}

/// Enters the control block into its arena's list of those that are in place.
fn note_placed(control: &'static control::Control) {
    let at = control.low().addr();
    let mut next = ARENAS.get();
    while let Some(arena) = next {
        next = arena.next;
        if let Some(offset) = at.checked_sub(arena.low).filter(|o| *o < arena.bytes) {
            return arena.placed.set(offset / size_of_class(arena.class));
        }
    }
}

/// Calls `f` with every control block of the process, live or idle, of any thread.
pub(crate) fn for_each_control(mut f: impl FnMut(&'static control::Control)) {
    let mut next = ARENAS.get();
    while let Some(arena) = next {
        next = arena.next;
        let size = size_of_class(arena.class);
        let carved = arena.carved.load(Ordering::Acquire);
        arena.placed.for_each(carved, |index| {
            let slot = Fresh {
                low: ptr::with_exposed_provenance_mut(arena.low + index * size),
                index,
                count: 1,
            };
            let at: *const control::Control = slot.control_address(arena.class).cast();
            // SAFETY: its bit says that it was written before (`Placed`), and it stays for the rest
            // of the process.
            f(unsafe { &*at });
        });
    }
}

/// Bytes at the top of a stack that its lives have used since its memory was last given back: its
/// high-water mark, in whole pages. Counts what is resident now, so swapped-out pages at the low
/// end are missed.
pub(crate) fn high_water(control: &'static control::Control) -> usize {
    let low = control.low().wrapping_add(GUARD);
    let top = control.low().wrapping_add(size_of_class(control.class()));
    let mut at = low;
    while at.addr() < top.addr() {
        let mut resident = [0u8; 64];
        let bytes = (top.addr() - at.addr()).min(resident.len() * GUARD);
        // SAFETY: the range lies in the arena, which is mapped; the answer has a byte for each page
        // of it.
        let refused = unsafe { libc::mincore(at.cast(), bytes, resident.as_mut_ptr().cast()) };
        if refused != 0 {
            return 0;
        }
        if let Some(page) = resident.iter().position(|byte| byte & 1 != 0) {
            return top.addr() - (at.addr() + page * GUARD);
        }
        at = at.wrapping_add(bytes);
    }
    0
}

/// All arenas, newest first.
static ARENAS: Newest<Arena> = Newest(AtomicPtr::new(ptr::null_mut()));
/// Stacks that have been carved out of all arenas, and how many may ever be.
static STACKS: Limit = Limit {
    taken: AtomicU64::new(0),
    most: AtomicU64::new(u64::MAX),
};
/// Arenas that have been mapped.
static ARENA_COUNT: AtomicU64 = AtomicU64::new(0);

/// Stacks carved so far in this process, of all sizes.
pub(crate) fn stacks_carved() -> u64 {
    STACKS.taken.load(Ordering::Relaxed)
}

/// Arenas mapped so far in this process.
pub(crate) fn arenas_mapped() -> u64 {
    ARENA_COUNT.load(Ordering::Relaxed)
}

/// Sets how many stacks, of all sizes, this process may ever have; creating one more coroutine than
/// that is [`Error::TooManyStacks`]. Stacks that exist already stay, and are used again.
///
/// Without a limit, memory is the limit, and the kernel may kill the process when it is gone.
pub fn set_stack_limit(most: u64) {
    STACKS.most.store(most, Ordering::Relaxed);
}

/// Takes up to `want` out of what the limit leaves.
fn reserve_stacks(want: usize) -> Result<usize, Error> {
    match STACKS.take(want as u64) {
        0 => Err(Error::TooManyStacks {
            limit: STACKS.most(),
        }),
        // Not more than `want`.
        got => Ok(usize::try_from(got).expect("64-bit")),
    }
}

/// The part of an arena that is not carved yet, and how large the next arena shall be. One per
/// class, under the lock of the shared pool.
pub(crate) struct Quarry {
    rest: Fresh,
    arena: Option<&'static Arena>,
    next_bytes: usize,
}

impl Quarry {
    pub(crate) const fn new() -> Quarry {
        Quarry {
            rest: Fresh::EMPTY,
            arena: None,
            next_bytes: FIRST_ARENA,
        }
    }

    /// Carves up to `want` neighbouring slots of `class` with their guards set, at least one.
    ///
    /// # Errors
    /// `OutOfMemory`, `OutOfMappings` or `Kernel`, when not even one could be had.
    pub(crate) fn carve(&mut self, class: usize, want: usize) -> Result<Fresh, Error> {
        if self.rest.count == 0 {
            self.map(class)?;
        }
        let size = size_of_class(class);
        let want = reserve_stacks(want.min(self.rest.count).max(1))?;
        let guarded = match install_guards(self.rest.low, size, want) {
            Ok(guarded) => guarded,
            Err(error) => {
                STACKS.give_back(want as u64);
                return Err(error);
            }
        };
        let fresh = self.rest.split(guarded, class);
        let arena = self.arena.expect("a quarry with slots has an arena");
        arena.carved.fetch_add(guarded, Ordering::Release);
        STACKS.give_back((want - guarded) as u64);
        Ok(fresh)
    }

    fn map(&mut self, class: usize) -> Result<(), Error> {
        let size = size_of_class(class);
        // Where guards cost mappings, those end long before address space does; and where the
        // reason is locked memory (`mlockall`), an arena is resident as a whole at once.
        let small = GUARD_KIND.load(Ordering::Relaxed) == GUARD_MPROTECT;
        let next = if small { FIRST_ARENA } else { self.next_bytes };
        let mut bytes = next.max(size);
        loop {
            match map_arena(bytes, class) {
                Ok((low, arena)) => {
                    self.rest = Fresh {
                        low: low.as_ptr(),
                        index: 0,
                        count: bytes / size,
                    };
                    self.arena = Some(arena);
                    self.next_bytes = (bytes * ARENA_GROWTH).min(LARGEST_ARENA);
                    return Ok(());
                }
                Err(libc::ENOMEM) if bytes > size => bytes = (bytes / 2).max(size),
                Err(libc::ENOMEM) => return Err(Error::OutOfMemory { need: size }),
                Err(errno) => {
                    return Err(Error::Kernel {
                        what: "mmap of coroutine stacks",
                        errno,
                    });
                }
            }
        }
    }
}

/// Maps an arena of `bytes`, and enters it into the list of arenas.
fn map_arena(bytes: usize, class: usize) -> Result<(NonNull<u8>, &'static Arena), i32> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice overlaps nothing.
    let low = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if low == libc::MAP_FAILED {
        return Err(errno());
    }
    // A huge page would make 2 MiB resident for the first byte of a stack. A kernel without huge
    // pages answers EINVAL, and nothing is lost then. SAFETY: the range is exactly the mapping made
    // above, which nobody else has seen.
    unsafe { libc::madvise(low, bytes, libc::MADV_NOHUGEPAGE) };
    let low = NonNull::new(low.cast::<u8>()).expect("mmap gave the null page");
    // Linked into the program, since something refers to it.
    std::hint::black_box(&debugger::LAYOUT);
    static PUBLISH: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = PUBLISH.lock().expect("nothing panics under this lock");
    let arena = ARENAS.add(|next| Arena {
        low: low.as_ptr().expose_provenance(),
        bytes,
        class,
        carved: AtomicUsize::new(0),
        placed: Placed::new(bytes / size_of_class(class)),
        next,
    });
    ARENA_COUNT.fetch_add(1, Ordering::Relaxed);
    Ok((low, arena))
}

/// Makes the first page of each of `count` neighbouring slots one that kills whoever touches it.
/// How many were done, at least one.
///
/// # Errors
/// When not even the first could be; a failure after that is not reported.
fn install_guards(low: *mut u8, size: usize, count: usize) -> Result<usize, Error> {
    let mut done = install_guards_at_once(low, size, count.min(BATCH));
    while done < count {
        match install_guard(low.wrapping_add(done * size)) {
            Ok(()) => done += 1,
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// As [`install_guards`], with one call. How many were done; none where the kernel cannot: it knows
/// this form of the call for one's own memory since Linux 6.14.
fn install_guards_at_once(low: *mut u8, size: usize, count: usize) -> usize {
    /// `PIDFD_SELF`, Linux 6.14; not in the libc crate.
    const MYSELF: libc::c_int = -10_000;
    let single = GUARD_KIND.load(Ordering::Relaxed) == GUARD_MPROTECT;
    if count < 2 || single || NO_BATCHES.load(Ordering::Relaxed) {
        return 0;
    }
    let guards: [libc::iovec; BATCH] = std::array::from_fn(|n| libc::iovec {
        iov_base: low.wrapping_add(n * size).cast(),
        iov_len: GUARD,
    });
    let (call, nothing) = (libc::SYS_process_madvise, 0_usize);
    // SAFETY: the first `count` ranges are the first pages of slots that have just been carved out
    // of their arena and that nobody has seen, so no reference points into them.
    let bytes = unsafe {
        libc::syscall(
            call,
            MYSELF,
            guards.as_ptr(),
            count,
            MADV_GUARD_INSTALL,
            nothing,
        )
    };
    let Ok(bytes) = usize::try_from(bytes) else {
        NO_BATCHES.store(true, Ordering::Relaxed);
        return 0;
    };
    GUARD_KIND.store(GUARD_MADVISE, Ordering::Relaxed);
    bytes / GUARD
}

/// Makes the page at `low` one that kills whoever touches it.
fn install_guard(low: *mut u8) -> Result<(), Error> {
    if GUARD_KIND.load(Ordering::Relaxed) != GUARD_MPROTECT {
        // SAFETY: `low` begins a slot that has just been carved out of its arena and that nobody
        // has seen, so no reference points into its first page.
        if unsafe { libc::madvise(low.cast(), GUARD, MADV_GUARD_INSTALL) } == 0 {
            GUARD_KIND.store(GUARD_MADVISE, Ordering::Relaxed);
            return Ok(());
        }
        match errno() {
            // Older than Linux 6.13, or memory locked by mlockall.
            libc::EINVAL => GUARD_KIND.store(GUARD_MPROTECT, Ordering::Relaxed),
            libc::ENOMEM => return Err(Error::OutOfMemory { need: GUARD }),
            errno => {
                return Err(Error::Kernel {
                    what: "madvise of a stack's guard page",
                    errno,
                });
            }
        }
    }
    // SAFETY: as above: the first page of a slot that nobody has seen.
    if unsafe { libc::mprotect(low.cast(), GUARD, libc::PROT_NONE) } == 0 {
        return Ok(());
    }
    match errno() {
        // The page splits its mapping: the stack below, the guard, the stack above.
        libc::ENOMEM => Err(Error::OutOfMappings { need: 2 }),
        errno => Err(Error::Kernel {
            what: "mprotect of a stack's guard page",
            errno,
        }),
    }
}

/// Gives back to the kernel the pages of an idle stack, up to the one with its control block.
pub(crate) fn trim(control: &'static control::Control) {
    let page = ptr::from_ref(control).addr() & !(GUARD - 1);
    let from = control.low().wrapping_add(GUARD);
    let bytes = page - from.addr();
    // SAFETY: between two lives nothing on a stack is live, and the next life writes before it
    // reads; the control block lies above the range, the guard below.
    let refused = unsafe { libc::madvise(from.cast(), bytes, libc::MADV_DONTNEED) } != 0;
    debug_assert!(
        !refused,
        "madvise(MADV_DONTNEED): {}",
        std::io::Error::last_os_error()
    );
}

fn errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .expect("an OS error has a number")
}
