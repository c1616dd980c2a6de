//! The context lock of old (rule 3.11): a compatibility primitive for programs that were written
//! around one. Nothing in the block layer uses it.
//!
//! ```text
//!   home:    loop { lock.acquire(); home.poll(true); lock.release(); }
//!   others:  lock.acquire(); .. what the home must not do meanwhile ..; lock.release();
//! ```
//! Recursive, first come first served. Who has to wait makes the context leave its poll, so a home
//! that polls under the lock gives it back soon. A wait by [`ContextLock::wait_while`] gives back
//! *all* levels and takes them back: the original gave back one, and a thread that had the lock
//! twice waited for ever for somebody who needed it.
//!
//! What remains of ten years of deadlocks is up to its users: two threads that take two such locks
//! in different orders wait for each other.

mod turns;

mod sync {
    pub(super) use std::sync::{Condvar, Mutex};
    pub(super) use std::thread::{ThreadId, current};
}

use crate::context::AioContext;
use crate::wait_while::AioWait;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use turns::Turns;

/// A lock that a thread may take several times. Any thread outside of coroutines.
pub struct ContextLock {
    context: Arc<AioContext>,
    turns: Turns<&'static Location<'static>>,
}

impl ContextLock {
    /// A free lock, whose waiters make `context` leave its poll.
    pub fn new(context: &Arc<AioContext>) -> ContextLock {
        ContextLock {
            context: context.clone(),
            turns: Turns::new(),
        }
    }

    /// Takes the lock, once more if this thread has it. Blocks the thread until all that came
    /// before have had it.
    ///
    /// # Panics
    /// In a coroutine, which would block its whole loop.
    #[track_caller]
    pub fn acquire(&self) {
        self.acquire_levels(1, Location::caller());
    }

    /// Gives one level back; with the last, the next in line has the lock.
    ///
    /// # Panics
    /// When this thread does not have it; names who does.
    #[track_caller]
    pub fn release(&self) {
        if let Err(owner) = self.turns.release() {
            let owner = owner.map_or_else(
                || "nobody has it".to_owned(),
                |place| format!("it was taken at {place} by another thread"),
            );
            panic!(
                "the lock of context '{}' is released by a thread that does not have it: {owner} \
                 (rule 3.11)",
                self.context.name()
            );
        }
    }

    /// How often this thread has the lock.
    pub fn levels(&self) -> u32 {
        self.turns.levels()
    }

    /// As [`AioWait::wait_while`]: each poll is without the lock, each test of `condition` with all
    /// the levels that the caller had. It need not have any.
    ///
    /// # Panics
    /// As [`AioWait::wait_while`]; the lock is held as before then too.
    #[track_caller]
    pub fn wait_while(
        &self,
        wait: &AioWait,
        context: &Arc<AioContext>,
        condition: impl FnMut() -> bool,
    ) -> bool {
        let at = Location::caller();
        wait.wait_while_around(context, condition, |poll| {
            let _back = self.give_back(at);
            poll();
        })
    }

    /// Gives back all levels until the guard is dropped.
    fn give_back(&self, at: &'static Location<'static>) -> TakeBack<'_> {
        TakeBack {
            lock: self,
            levels: match coblock_coroutine::mutant!("a wait gives one level of the lock back") {
                true => u32::from(self.turns.release().is_ok()),
                false => self.turns.release_all(),
            },
            at,
        }
    }

    #[track_caller]
    fn acquire_levels(&self, levels: u32, at: &'static Location<'static>) {
        coblock_coroutine::with_current(|co| {
            if let Some(co) = co {
                panic!(
                    "the lock of context '{}' in {co:?} (rule 3.11)",
                    self.context.name()
                );
            }
        });
        self.turns.acquire(levels, at, || self.context.notify());
    }
}

impl fmt::Debug for ContextLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextLock")
            .field("context", &self.context.name())
            .field("turns", &self.turns)
            .finish()
    }
}

/// Levels that are given back, until this is dropped.
struct TakeBack<'a> {
    lock: &'a ContextLock,
    levels: u32,
    at: &'static Location<'static>,
}

impl Drop for TakeBack<'_> {
    fn drop(&mut self) {
        if self.levels > 0 {
            self.lock.acquire_levels(self.levels, self.at);
        }
    }
}
