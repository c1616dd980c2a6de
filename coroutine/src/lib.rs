//! Stackful coroutines in the style of gtk-vnc and QEMU, and the locks that suspend.
//!
//! A request is a plain function call that goes down through all layers; at the bottom it
//! *suspends* its coroutine, and the event loop *resumes* it when the kernel is done. `co: &Co` in
//! a signature means "may suspend".
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
//! ```text
//!   sync        CoMutex, CoQueue, CoRwLock: locks that suspend (rules 4.1 to 4.3);
//!               ThreadLock: one that must not be held over a suspend
//!   io_wait     IoWait: one submitted operation, in the frame that waits for it (rule 2.1)
//!   continuation: values both ways, a release hook: the operations of gtk-vnc (rules 1.2, 1.6)
//!   dump        every coroutine of a thread: who waits, where, with its backtrace
//!   coroutine   Coroutine, start, start_remote, run_scoped, run_in: making and driving
//!               (rules 1.4, 1.8, 1.10)
//!   schedule    Schedule, Ready, WakeHandle: who runs it again (rule 3.10)
//!   co          Co: the token, suspend (rules 1.1, 1.3); resume, finish, the wake queue (1.5, 1.6, 1.9)
//!   pool        slots kept for reuse, per thread and between threads (rule 1.7)
//!   stack       arenas, guards, colours; the control block on each stack, and the switch itself
//!   release     what a release hook decides
//!   protocol    what several threads touch at once, small enough to be modelled
//!   error       why a coroutine could not be made
//! ```
//!
//! A module uses only modules below it. `unsafe` lives in `coroutine`, `co` and `stack` (with their
//! submodules).
//!
//! Coroutines stay on the thread where they were first entered (rule 1.8): waking from any thread
//! posts to their home, and work that must run elsewhere goes there as a new coroutine
//! ([`run_in`]). Control blocks lie in memory that is never unmapped, so a stale handle finds
//! another life there, never another kind of thing.

#![deny(unsafe_code)]

#[cfg(not(all(unix, target_pointer_width = "64")))]
compile_error!("stack arenas need a 64-bit Unix");

pub mod continuation;
pub mod sync;

#[allow(unsafe_code)]
mod co;
#[allow(unsafe_code)]
mod coroutine;
mod dump;
mod error;
mod io_wait;
mod mutant;
mod pool;
mod protocol;
mod release;
mod schedule;
#[allow(unsafe_code)]
mod stack;

pub use co::{Co, Departure, Held, Hold, State, current_holds, in_coroutine, with_current};
pub use coroutine::{Coroutine, CoroutineOptions, run_in, run_scoped, start, start_remote};
pub use dump::{Dump, Standing, dump};
pub use error::Error;
pub use io_wait::IoWait;
#[cfg(feature = "mutants")]
#[doc(hidden)]
pub use mutant::mutants;
pub use pool::{Stats, idle_stacks, note_time, stats, trim_idle};
pub use schedule::{Ready, Schedule, WakeHandle};
pub use stack::overflow::install_overflow_handler;
pub use stack::{DEFAULT_STACK_SIZE, force_mprotect_guards, guard_kind, set_stack_limit};
pub use sync::{
    CoMutex, CoMutexGuard, CoQueue, CoReadGuard, CoRwLock, CoWriteGuard, ThreadGuard, ThreadLock,
    Upgraded,
};
