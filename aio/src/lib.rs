//! `AioContext`: an event loop of bottom halves, descriptors and timers, and I/O that suspends.
//!
//! A context is driven by its [`Home`]. Coroutines that run in it do I/O with the functions of
//! [`co`], which suspend; the loop resumes them when the kernel is done.
//!
//! ```
//! use coblock_aio::{ContextOptions, Home, co};
//! use std::os::fd::AsFd;
//!
//! let home = Home::new(ContextOptions::named("example"))?;
//! let file = std::fs::File::open("/etc/hostname").or_else(|_| std::fs::File::open("/proc/version"))?;
//! let mut bytes = [0; 8];
//! let count = home.run(|co| co::read(co, file.as_fd(), 0, (&mut bytes).into()))?;
//! assert!(count > 0);
//! home.close();
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Modules from top to bottom; each uses only those below it, but for `context` and `home`, which
//! know what they are made of:
//!
//! * [`sim`]: several contexts in one thread, on a virtual clock
//! * `iothread`: a thread that drives a context
//! * `move`: taking a coroutine to another thread, unsafe, for tests
//! * `context_lock`: the lock that contexts once had, for programs that were written around it
//! * [`co`]: what a coroutine waits for
//! * `transfer`: what follows a short or interrupted transfer
//! * `wait_while`: waiting for a condition from outside of coroutines
//! * `postpone`: actions that wait until external requests are enabled again
//! * `resident`: what lives in a context without being work of it
//! * `home`: the right to drive a context; one pass of the loop
//! * `engine`: io_uring, or threads
//! * `current`: which context a thread drives
//! * `context`: what any thread may use
//! * `thread_pool`, `busy_poll`, `trimmer`, `bottom_half`, `fd_handler`, `timer`: the parts of a
//!   loop
//! * `medium`: what lies behind a descriptor, as far as it decides how a request goes
//! * `monitor`: watching descriptors, with epoll or poll(2)
//! * `clock`, `notifier`: time, real or virtual; an event
//! * `notify`, `bh_state`, `waiters`: the protocols without locks, model-checked in
//!   `tests/models.rs`
//! * [`buf`]: memory of requests
//! * [`sys`]: system calls

#![deny(unsafe_code)]

#[allow(unsafe_code)] // Raw segments of guest memory.
pub mod buf;
pub mod co;
pub mod sim;
#[allow(unsafe_code)] // System calls.
pub mod sys;

mod bh_state;
mod bottom_half;
mod busy_poll;
mod clock;
mod context;
mod context_lock;
mod current;
mod engine;
mod fd_handler;
mod home;
mod iothread;
mod medium;
mod monitor;
#[allow(unsafe_code)] // An unsafe operation, apart from all others.
mod r#move;
mod notifier;
mod notify;
mod postpone;
mod resident;
mod thread_pool;
mod timer;
pub mod transfer;
mod trimmer;
mod wait_while;
mod waiters;

/// The atomics of the model-checked files, which find loom's under the same path in their test.
mod sync {
    pub(crate) use crate::sys::fence::{heavy_fence, light_fence};
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
}

pub use bottom_half::BottomHalf;
pub use buf::{AlignedBuf, AtomicWords, Gather, IoVec, IoVecMut, RawSegment, Scatter, Segments};
pub use clock::{Clock, VirtualClock};
pub use context::{AioContext, ContextOptions, EngineKind, Park, RingDelivery};
pub use context_lock::ContextLock;
pub use current::{RefusePolls, current, current_id, refuse_polls};
pub use fd_handler::FdHandler;
pub use home::{Home, LoopStats, poll, spawn};
pub use iothread::IoThread;
pub use medium::Medium;
pub use monitor::MonitorKind;
pub use r#move::move_to;
pub use notifier::EventNotifier;
pub use postpone::{PostponedAction, Postponer};
pub use resident::Resident;
pub use sys::fence::{heavy_fence, light_fence, use_full_fences};
pub use thread_pool::{Job, ThreadPool, WorkHandle, WorkPool};
pub use timer::Timer;
pub use wait_while::AioWait;
