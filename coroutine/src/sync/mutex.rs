//! A mutex whose waiters suspend ([`CoMutex`], rule 4.1).
//!
//! First in, first out, by direct hand-off: `unlock` makes the first waiter the owner before it
//! returns, so the lock is never free while somebody waits, and no newcomer overtakes. The protocol
//! is in `protocol::handoff`, where a model checks it; this file adds the waiting and the refusals.
//! The value itself travels with the ownership, as a `Box`.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use crate::co::{Co, Hold};
use crate::pool;
use crate::protocol::handoff::{Attempt, Handoff};
use crate::schedule::WakeHandle;

/// A mutex whose waiters suspend. For coroutines of any home and thread; the one that gets it runs
/// on in its own home.
///
/// Not recursive. Finishing with it held, suspending for it while one holds it, and unlocking it
/// from another coroutine are refused. A panic under it unlocks it and does not poison it.
pub struct CoMutex<T> {
    handoff: Handoff<Box<T>, WakeHandle, Place>,
}

/// Where it was locked.
type Place = &'static Location<'static>;

/// While it lives, its [`CoMutex`] is locked by the coroutine that got it.
#[must_use = "dropped at once, it protects nothing"]
pub struct CoMutexGuard<'a, T> {
    mutex: &'a CoMutex<T>,
    /// `None` only while it is dropped.
    value: Option<Box<T>>,
    owner: u64,
    /// Bound to its coroutine.
    _bound: PhantomData<*mut ()>,
}

impl<T> CoMutex<T> {
    /// A free mutex around `value`.
    pub fn new(value: T) -> CoMutex<T> {
        CoMutex {
            handoff: Handoff::new(Box::new(value)),
        }
    }

    /// Locks; suspends while another coroutine has it, or is to have it before this one.
    ///
    /// # Panics
    /// If this coroutine has it already, naming both places; or for the reasons of [`Co::suspend`].
    #[track_caller]
    pub fn lock(&self, co: &Co) -> CoMutexGuard<'_, T> {
        let caller = Location::caller();
        co.refuse_unless_running("locking a CoMutex", caller);
        match self.handoff.attempt(co.id(), caller, None) {
            Attempt::Acquired(value) => self.guard(co, value),
            Attempt::Busy => self.wait(co, caller),
            Attempt::Recursive(at) => refuse_recursion(co, at, caller),
        }
    }

    /// Locks if that needs no waiting.
    #[track_caller]
    pub fn try_lock(&self, co: &Co) -> Option<CoMutexGuard<'_, T>> {
        let caller = Location::caller();
        co.refuse_unless_running("locking a CoMutex", caller);
        match self.handoff.attempt(co.id(), caller, None) {
            Attempt::Acquired(value) => Some(self.guard(co, value)),
            Attempt::Busy | Attempt::Recursive(_) => None,
        }
    }

    fn guard(&self, co: &Co, value: Box<T>) -> CoMutexGuard<'_, T> {
        let held = co.control().held(Hold::Lock as usize);
        held.set(held.get() + 1);
        CoMutexGuard {
            mutex: self,
            value: Some(value),
            owner: co.id(),
            _bound: PhantomData,
        }
    }

    #[cold]
    #[track_caller]
    fn wait(&self, co: &Co, caller: Place) -> CoMutexGuard<'_, T> {
        let me = co.id();
        match self.handoff.attempt(me, caller, Some(co.wake_handle())) {
            // Freed in between.
            Attempt::Acquired(value) => return self.guard(co, value),
            Attempt::Busy => {}
            Attempt::Recursive(at) => refuse_recursion(co, at, caller),
        }
        let queued = Queued { mutex: self, me };
        loop {
            if let Some(value) = self.handoff.claim(me) {
                std::mem::forget(queued);
                return self.guard(co, value);
            }
            co.suspend();
        }
    }

    /// How often it was locked so far: for tests that show that a path does not lock.
    pub fn lock_count(&self) -> u64 {
        self.handoff.acquired()
    }

    /// How many coroutines wait for it now.
    pub fn waiting(&self) -> usize {
        self.handoff.waiting()
    }

    /// The value, through the only reference: no lock needed.
    ///
    /// # Panics
    /// If a guard was forgotten.
    #[track_caller]
    pub fn get_mut(&mut self) -> &mut T {
        self.handoff
            .value_mut()
            .expect("a guard of this CoMutex was forgotten")
    }

    /// The value.
    ///
    /// # Panics
    /// If a guard was forgotten.
    #[track_caller]
    pub fn into_inner(self) -> T {
        *self
            .handoff
            .into_value()
            .expect("a guard of this CoMutex was forgotten")
    }
}

#[cold]
#[inline(never)]
fn refuse_recursion(co: &Co, at: Option<Place>, caller: Place) -> ! {
    let at = at.expect("an owner has a place");
    panic!("{co:?} locks a CoMutex at {caller} that it has locked at {at} already");
}

/// A coroutine in the queue of a mutex. Dropped only when it is unwound there.
struct Queued<'a, T> {
    mutex: &'a CoMutex<T>,
    me: u64,
}

impl<T> Drop for Queued<'_, T> {
    fn drop(&mut self) {
        if let Some(next) = self.mutex.handoff.abandon(self.me) {
            next.wake();
        }
    }
}

impl<'a, T> CoMutexGuard<'a, T> {
    /// The mutex that it belongs to.
    pub fn mutex(&self) -> &'a CoMutex<T> {
        self.mutex
    }
}

impl<T> Drop for CoMutexGuard<'_, T> {
    fn drop(&mut self) {
        let running = pool::current().map(Co::of);
        match running.filter(|co| co.id() == self.owner) {
            Some(co) => {
                let held = co.control().held(Hold::Lock as usize);
                held.set(held.get() - 1);
                let value = self
                    .value
                    .take()
                    .expect("a guard has its value until it is dropped");
                if let Some(next) = self.mutex.handoff.release(self.owner, value)
                    && !crate::mutant!("a mutex wakes nobody")
                {
                    next.wake();
                }
            }
            None => self.refuse(running),
        }
    }
}

impl<T> CoMutexGuard<'_, T> {
    #[cold]
    #[inline(never)]
    fn refuse(&self, running: Option<&Co>) -> ! {
        let (owner, at) = self.mutex.handoff.owner();
        let at = at.expect("an owner has a place");
        match running {
            Some(co) => panic!("{co:?} unlocks a CoMutex that life {owner} locked at {at}"),
            None => {
                panic!("a CoMutex that life {owner} locked at {at} is unlocked outside coroutines")
            }
        }
    }
}

impl<T> Deref for CoMutexGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        self.value
            .as_ref()
            .expect("a guard has its value until it is dropped")
    }
}

impl<T> DerefMut for CoMutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.value
            .as_mut()
            .expect("a guard has its value until it is dropped")
    }
}

impl<T> fmt::Debug for CoMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.handoff.owner() {
            (0, _) => write!(f, "CoMutex(free)"),
            (owner, Some(at)) => {
                write!(
                    f,
                    "CoMutex(life {owner}, locked at {at}, {} waiting)",
                    self.waiting()
                )
            }
            (owner, None) => write!(f, "CoMutex(life {owner})"),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for CoMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}
