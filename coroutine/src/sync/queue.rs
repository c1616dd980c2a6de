//! A queue of coroutines that wait for something to change ([`CoQueue`], rule 4.2).
//!
//! Each waiter has a ticket; tickets grow towards the back, so the queue is sorted by them and a
//! waiter finds out quickly whether it was taken out (woken) or resumed for another reason (then it
//! goes on waiting).

use std::collections::VecDeque;
use std::fmt;
use std::ops::ControlFlow;
use std::panic::Location;

use super::{CoMutexGuard, ThreadGuard, ThreadLock};
use crate::co::Co;
use crate::schedule::WakeHandle;

/// A queue of coroutines that wait for something to change. For coroutines of any home and thread.
///
/// A waiter looks at its condition again when it comes back: somebody else may have been there in
/// between.
#[derive(Default)]
pub struct CoQueue {
    waiters: ThreadLock<Waiters>,
}

#[derive(Default)]
struct Waiters {
    queue: VecDeque<(i64, WakeHandle)>,
    /// Ticket of the next one at the back; those at the front count down from -1.
    back: i64,
    front: i64,
}

/// Which end of the queue.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Back,
    Front,
}

impl CoQueue {
    /// An empty queue.
    pub const fn new() -> CoQueue {
        CoQueue {
            waiters: ThreadLock::new(Waiters {
                queue: VecDeque::new(),
                back: 0,
                front: 0,
            }),
        }
    }

    /// Queues at the back, and suspends until woken.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn wait(&self, co: &Co) {
        self.enqueue(co, End::Back, Location::caller()).wait();
    }

    /// Queues at the front: for one that was woken and found that its condition still fails.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn wait_front(&self, co: &Co) {
        self.enqueue(co, End::Front, Location::caller()).wait();
    }

    /// Queues at the back, gives the mutex back during the wait, and holds it again after.
    ///
    /// Queueing comes first: whoever changes the condition under the mutex finds this one in the
    /// queue.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn wait_with<'a, T>(&self, co: &Co, guard: CoMutexGuard<'a, T>) -> CoMutexGuard<'a, T> {
        self.wait_with_at(co, guard, End::Back, Location::caller())
    }

    /// As [`wait_with`](CoQueue::wait_with), at the front.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn wait_front_with<'a, T>(
        &self,
        co: &Co,
        guard: CoMutexGuard<'a, T>,
    ) -> CoMutexGuard<'a, T> {
        self.wait_with_at(co, guard, End::Front, Location::caller())
    }

    #[track_caller]
    fn wait_with_at<'a, T>(
        &self,
        co: &Co,
        guard: CoMutexGuard<'a, T>,
        end: End,
        caller: &'static Location<'static>,
    ) -> CoMutexGuard<'a, T> {
        let mutex = guard.mutex();
        let ticket = self.enqueue(co, end, caller);
        drop(guard);
        ticket.wait();
        mutex.lock(co)
    }

    /// Queues at the back, then drops `guard` (a [`ThreadGuard`] mostly), then suspends until
    /// woken. Takes nothing back.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn wait_dropping<G>(&self, co: &Co, guard: G) {
        let ticket = self.enqueue(co, End::Back, Location::caller());
        drop(guard);
        ticket.wait();
    }

    /// As [`wait_dropping`](CoQueue::wait_dropping), at the front.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn wait_front_dropping<G>(&self, co: &Co, guard: G) {
        let ticket = self.enqueue(co, End::Front, Location::caller());
        drop(guard);
        ticket.wait();
    }

    fn enqueue<'a>(
        &'a self,
        co: &'a Co,
        end: End,
        caller: &'static Location<'static>,
    ) -> Ticket<'a> {
        co.refuse_unless_running("waiting in a CoQueue", caller);
        let mut waiters = self.waiters.lock();
        let number = match end {
            End::Back => {
                let number = waiters.back;
                waiters.back += 1;
                waiters.queue.push_back((number, co.wake_handle()));
                number
            }
            End::Front => {
                waiters.front -= 1;
                let number = waiters.front;
                waiters.queue.push_front((number, co.wake_handle()));
                number
            }
        };
        Ticket {
            queue: self,
            co,
            number,
        }
    }

    /// Wakes the first waiter, if there is one: in a coroutine, it runs after the current one
    /// suspends (rule 1.9); outside, it is entered at once. In another home it is scheduled there.
    #[track_caller]
    pub fn wake_next(&self) -> bool {
        // The lock ends with the statement: the waiter may use this queue again.
        let first = self.waiters.lock().queue.pop_front();
        match first {
            Some((_, waiter)) => {
                waiter.wake();
                true
            }
            None => false,
        }
    }

    /// Wakes all that wait now, in order; one that waits again meanwhile is not woken twice. How
    /// many they were.
    #[track_caller]
    pub fn wake_all(&self) -> usize {
        let all = std::mem::take(&mut self.waiters.lock().queue);
        let count = all.len();
        for (_, waiter) in all {
            waiter.wake();
            if crate::mutant!("a queue wakes only its first") {
                break;
            }
        }
        count
    }

    /// As [`wake_next`](CoQueue::wake_next), for one who holds the lock of the condition: it is
    /// released meanwhile, because outside a coroutine the waiter is entered at once.
    #[track_caller]
    pub fn wake_next_unlocked<'a, T>(
        &self,
        lock: &'a ThreadLock<T>,
        guard: ThreadGuard<'a, T>,
    ) -> (ThreadGuard<'a, T>, ControlFlow<()>) {
        drop(guard);
        let woke = self.wake_next();
        (
            lock.lock(),
            if woke {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            },
        )
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiters.lock().queue.is_empty()
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiters.lock().queue.len()
    }
}

/// A place in the queue.
struct Ticket<'a> {
    queue: &'a CoQueue,
    co: &'a Co,
    number: i64,
}

impl Ticket<'_> {
    #[track_caller]
    fn wait(self) {
        while self.is_queued() {
            self.co.suspend();
        }
    }

    fn is_queued(&self) -> bool {
        let waiters = self.queue.waiters.lock();
        waiters
            .queue
            .binary_search_by_key(&self.number, |(number, _)| *number)
            .is_ok()
    }
}

impl Drop for Ticket<'_> {
    /// Leaves the queue, if it is unwound there.
    fn drop(&mut self) {
        let mut waiters = self.queue.waiters.lock();
        if let Ok(at) = waiters
            .queue
            .binary_search_by_key(&self.number, |(number, _)| *number)
        {
            waiters.queue.remove(at);
        }
    }
}

impl fmt::Debug for CoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CoQueue({} waiting)", self.len())
    }
}
