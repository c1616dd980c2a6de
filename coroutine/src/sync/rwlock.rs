//! A lock for many readers or one writer, whose waiters suspend ([`CoRwLock`], rule 4.3).
//!
//! Tickets are served in order: a reader waits as soon as anybody queues, so writers do not starve.
//! The protocol is in `protocol::tickets`, where a model checks it; this file adds the waiting and
//! the refusals. Readers share the value through an `Arc`, which is a writer's alone.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::Location;
use std::sync::Arc;

use crate::co::{Co, Hold};
use crate::pool;
use crate::protocol::tickets::{Attempt, Tickets, Upgrade, Want};
use crate::schedule::WakeHandle;

/// A lock for many readers or one writer, whose waiters suspend. For coroutines of any home and
/// thread; each runs on in its own home.
///
/// Not recursive, not even for reading: with a writer in the queue, the second read would wait for
/// the first. Finishing with it held, and leaving it from another coroutine, are refused. A panic
/// under it does not poison it.
pub struct CoRwLock<T> {
    tickets: Tickets<Arc<T>, WakeHandle, Place>,
}

/// Where it was locked.
type Place = &'static Location<'static>;

/// While it lives, its [`CoRwLock`] is read by the coroutine that got it.
#[must_use = "dropped at once, it protects nothing"]
pub struct CoReadGuard<'a, T> {
    side: Side<'a, T>,
}

/// While it lives, its [`CoRwLock`] is written by the coroutine that got it.
#[must_use = "dropped at once, it protects nothing"]
pub struct CoWriteGuard<'a, T> {
    side: Side<'a, T>,
}

/// What an upgrade has to tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Upgraded {
    /// Nobody wrote between reading and writing.
    Undisturbed,
    /// Another writer may have: look at everything anew.
    OthersMayHaveWritten,
}

/// What both guards are made of.
struct Side<'a, T> {
    lock: &'a CoRwLock<T>,
    /// `None` only when it is given up.
    value: Option<Arc<T>>,
    owner: u64,
    want: Want,
    /// Bound to its coroutine.
    _bound: PhantomData<*mut ()>,
}

impl<T> CoRwLock<T> {
    /// A free lock around `value`.
    pub fn new(value: T) -> CoRwLock<T> {
        CoRwLock {
            tickets: Tickets::new(Arc::new(value)),
        }
    }

    /// Locks for reading; suspends while somebody writes or queues.
    ///
    /// # Panics
    /// If this coroutine has it already, naming both places; or for the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn read(&self, co: &Co) -> CoReadGuard<'_, T> {
        CoReadGuard {
            side: self.lock(co, Want::Read, Location::caller()),
        }
    }

    /// Locks for writing; suspends while somebody reads, writes or queues.
    ///
    /// # Panics
    /// As [`read`](CoRwLock::read).
    #[track_caller]
    pub fn write(&self, co: &Co) -> CoWriteGuard<'_, T> {
        CoWriteGuard {
            side: self.lock(co, Want::Write, Location::caller()),
        }
    }

    fn lock(&self, co: &Co, want: Want, caller: Place) -> Side<'_, T> {
        co.refuse_unless_running("locking a CoRwLock", caller);
        let me = co.id();
        match self.tickets.attempt(me, want, caller, None) {
            Attempt::Acquired(value) => return self.side(co, want, value),
            Attempt::Recursive(at) => refuse_recursion(co, at, caller),
            Attempt::Busy => {}
        }
        match self
            .tickets
            .attempt(me, want, caller, Some(co.wake_handle()))
        {
            // Freed in between.
            Attempt::Acquired(value) => self.side(co, want, value),
            Attempt::Recursive(at) => refuse_recursion(co, at, caller),
            Attempt::Busy => self.wait(co, want),
        }
    }

    /// Waits for its turn in the queue.
    #[cold]
    fn wait(&self, co: &Co, want: Want) -> Side<'_, T> {
        let queued = Queued {
            lock: self,
            me: co.id(),
        };
        loop {
            if let Some((value, next)) = self.tickets.claim(co.id()) {
                std::mem::forget(queued);
                let side = self.side(co, want, value);
                if let Some(next) = next {
                    next.wake();
                }
                return side;
            }
            co.suspend();
        }
    }

    fn side(&self, co: &Co, want: Want, value: Arc<T>) -> Side<'_, T> {
        let held = co.control().held(Hold::Lock as usize);
        held.set(held.get() + 1);
        Side {
            lock: self,
            value: Some(value),
            owner: co.id(),
            want,
            _bound: PhantomData,
        }
    }

    /// How many coroutines wait for it now.
    pub fn waiting(&self) -> usize {
        self.tickets.state().2
    }

    /// How many coroutines read it now.
    pub fn readers(&self) -> usize {
        self.tickets.state().0
    }

    /// The value, through the only reference: no lock needed.
    ///
    /// # Panics
    /// If a guard was forgotten.
    #[track_caller]
    pub fn get_mut(&mut self) -> &mut T {
        self.tickets
            .value_mut()
            .and_then(Arc::get_mut)
            .expect("a guard of this CoRwLock was forgotten")
    }

    /// The value.
    ///
    /// # Panics
    /// If a guard was forgotten.
    #[track_caller]
    pub fn into_inner(self) -> T {
        self.tickets
            .into_value()
            .and_then(Arc::into_inner)
            .expect("a guard of this CoRwLock was forgotten")
    }
}

#[cold]
#[inline(never)]
fn refuse_recursion(co: &Co, at: Place, caller: Place) -> ! {
    panic!("{co:?} locks a CoRwLock at {caller} that it has locked at {at} already");
}

/// A coroutine in the queue of a lock. Dropped only when it is unwound there.
struct Queued<'a, T> {
    lock: &'a CoRwLock<T>,
    me: u64,
}

impl<T> Drop for Queued<'_, T> {
    fn drop(&mut self) {
        if let Some(next) = self.lock.tickets.abandon(self.me) {
            next.wake();
        }
    }
}

impl<T> Side<'_, T> {
    /// Takes the value out, and this off the coroutine's count of locks.
    #[track_caller]
    fn give_up(&mut self) -> Arc<T> {
        let running = pool::current().map(Co::of);
        let Some(co) = running.filter(|co| co.id() == self.owner) else {
            self.refuse(running)
        };
        let held = co.control().held(Hold::Lock as usize);
        held.set(held.get() - 1);
        self.value
            .take()
            .expect("a guard has its value until it is given up")
    }

    #[cold]
    #[inline(never)]
    fn refuse(&self, running: Option<&Co>) -> ! {
        let owner = self.owner;
        let at = self
            .lock
            .tickets
            .note_of(owner)
            .expect("an owner has a place");
        match running {
            Some(co) => panic!("{co:?} unlocks a CoRwLock that life {owner} locked at {at}"),
            None => {
                panic!("a CoRwLock that life {owner} locked at {at} is unlocked outside coroutines")
            }
        }
    }

    fn value(&self) -> &T {
        self.value
            .as_ref()
            .expect("a guard has its value until it is given up")
    }
}

impl<T> Drop for Side<'_, T> {
    fn drop(&mut self) {
        if self.value.is_none() {
            return;
        }
        let value = self.give_up();
        let next = match self.want {
            Want::Read => {
                drop(value);
                self.lock.tickets.release_read(self.owner)
            }
            Want::Write => self.lock.tickets.release_write(self.owner, value),
        };
        if let Some(next) = next {
            next.wake();
        }
    }
}

impl<'a, T> CoReadGuard<'a, T> {
    /// Writes instead of reading. Alone, at once; else it gives up reading, queues behind all who
    /// wait, and tells that another writer may have run (rule 4.3).
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`]; or if `co` is not who reads.
    #[track_caller]
    pub fn upgrade(mut self, co: &Co) -> (CoWriteGuard<'a, T>, Upgraded) {
        let caller = Location::caller();
        co.refuse_unless_running("upgrading a CoRwLock", caller);
        let lock = self.side.lock;
        drop(self.side.give_up());
        let (side, told) = match lock.tickets.upgrade(co.id(), caller, co.wake_handle()) {
            Upgrade::Alone(value) => (lock.side(co, Want::Write, value), Upgraded::Undisturbed),
            Upgrade::Queued { others_first, wake } => {
                if let Some(next) = wake {
                    next.wake();
                }
                let told = if others_first {
                    Upgraded::OthersMayHaveWritten
                } else {
                    Upgraded::Undisturbed
                };
                (lock.wait(co, Want::Write), told)
            }
        };
        (CoWriteGuard { side }, told)
    }
}

impl<'a, T> CoWriteGuard<'a, T> {
    /// Reads on instead of writing; never waits (rule 4.3). Readers that are next may join.
    #[track_caller]
    pub fn downgrade(mut self) -> CoReadGuard<'a, T> {
        let (lock, owner) = (self.side.lock, self.side.owner);
        let value = self.side.give_up();
        let (value, next) = lock.tickets.downgrade(owner, value);
        let running = pool::current().map(Co::of).expect("checked by `give_up`");
        let side = lock.side(running, Want::Read, value);
        if let Some(next) = next {
            next.wake();
        }
        CoReadGuard { side }
    }
}

impl<T> Deref for CoReadGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        self.side.value()
    }
}

impl<T> Deref for CoWriteGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        self.side.value()
    }
}

impl<T> DerefMut for CoWriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.side
            .value
            .as_mut()
            .and_then(Arc::get_mut)
            .expect("a writer is alone with the value")
    }
}

impl<T> fmt::Debug for CoRwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (readers, writer, waiting) = self.tickets.state();
        match writer {
            0 => write!(f, "CoRwLock({readers} reading, {waiting} waiting)"),
            _ => write!(f, "CoRwLock(life {writer} writes, {waiting} waiting)"),
        }
    }
}
