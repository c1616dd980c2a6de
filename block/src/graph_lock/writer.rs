//! The writer's half: alone in the graph, for a few statements (rules 7.5 to 7.7).
//!
//! ```text
//!   announce     readers that leave kick from now on; new ones still come in
//!   wait         the main loop goes on, until a scan finds nobody
//!   own          flag, fence, exact scan; somebody came in between: back, wake who queued, wait again
//!   ...          new readers queue
//!   release      flag off under the mutex, wake the queue
//! ```
//! Readers are admitted while it waits: a callback that needs the lock would hang otherwise. So
//! that they do not arrive for ever, the caller quiesces all nodes first.

use super::GraphLock;
use super::protocol::writer;
use coblock_coroutine::mutant;
use std::marker::PhantomData;
use std::panic::Location;

impl GraphLock {
    /// Rule 7.5. `wait_while` polls the main context as long as the condition holds; what runs
    /// meanwhile may take the lock, for reading and for writing.
    ///
    /// # Panics
    /// Rule 7.7: in a coroutine; when a writer owns the graph.
    #[track_caller]
    pub(crate) fn write(&self, wait_while: impl Fn(&mut dyn FnMut() -> bool)) -> WriteLocked<'_> {
        let at = Location::caller();
        assert!(
            !coblock_coroutine::in_coroutine(),
            "rule 7.5: the graph is locked for writing at {at} in a coroutine"
        );
        self.refuse_second(at);
        let _waits = Waits::announce(self);
        loop {
            wait_while(&mut || !writer::looks_free(self.sum()));
            if self.try_own(at) {
                return WriteLocked {
                    lock: self,
                    on_its_thread: PhantomData,
                };
            }
            // They came in while the flag was set.
            self.wake_queue();
        }
    }

    /// One attempt, without waiting; `None`: there are readers.
    ///
    /// # Panics
    /// As [`GraphLock::write`].
    #[track_caller]
    pub(crate) fn try_write(&self) -> Option<WriteLocked<'_>> {
        let at = Location::caller();
        assert!(
            !coblock_coroutine::in_coroutine(),
            "rule 7.5: the graph is locked for writing at {at} in a coroutine"
        );
        if writer::looks_free(self.sum()) {
            if self.try_own(at) {
                return Some(WriteLocked {
                    lock: self,
                    on_its_thread: PhantomData,
                });
            }
            // They came in while the flag was set.
            self.wake_queue();
        }
        None
    }

    /// A writer waits: readers that leave kick, as long as the guard lives.
    pub(crate) fn announce(&self) -> Waits<'_> {
        Waits::announce(self)
    }

    pub(super) fn try_own(&self, at: &'static Location<'static>) -> bool {
        // A callback may have written, and be writing still, while this one waited.
        self.refuse_second(at);
        let mut slow = self.slow.lock();
        if let Some((_, reads)) = slow.in_main
            && !mutant!("a writer does not see who reads without counting")
        {
            drop(slow);
            panic!(
                "rule 7.8: the graph is locked for writing at {at} while it is read without counting \
                 at {reads}"
            );
        }
        let counts = self.slots.iter().map(|slot| &slot.count);
        let owned = writer::try_own(&self.flags, counts, slow.orphans);
        if owned {
            slow.owner = Some((std::thread::current().id(), at));
        }
        owned
    }

    fn refuse_second(&self, at: &Location<'_>) {
        let owner = self.slow.lock().owner;
        if let Some((_, first)) = owner {
            panic!("rule 7.7: the graph is locked for writing at {at}, and was at {first}");
        }
    }

    /// Rule 7.6: the flag goes under the mutex, then the queue is woken.
    pub(super) fn release(&self) {
        {
            let mut slow = self.slow.lock();
            slow.owner = None;
            writer::release(&self.flags);
        }
        if !mutant!("the end of a writer wakes no reader") {
            self.wake_queue();
        }
    }
}

/// One writer that waits; also when a callback panics meanwhile.
pub(crate) struct Waits<'a>(&'a GraphLock);

impl<'a> Waits<'a> {
    fn announce(lock: &'a GraphLock) -> Self {
        writer::announce(&lock.flags);
        Waits(lock)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        writer::retract(&self.0.flags);
    }
}

/// The lock, held for writing. Stays on its thread.
pub(crate) struct WriteLocked<'a> {
    lock: &'a GraphLock,
    on_its_thread: PhantomData<*const ()>,
}

impl Drop for WriteLocked<'_> {
    fn drop(&mut self) {
        self.lock.release();
    }
}
