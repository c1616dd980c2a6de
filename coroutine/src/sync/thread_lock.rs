//! A lock between threads that knows that it must not be held over a suspend.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard};

use crate::pool;

/// A lock between threads, for a few statements. Never held over a suspend: builds with debug
/// assertions count the guards of each thread, and [`Co::suspend`](crate::Co::suspend) refuses
/// while there are any.
///
/// A panic under the lock poisons it, and whoever locks it next panics too: what it protects may be
/// half changed.
#[derive(Default)]
pub struct ThreadLock<T>(Mutex<T>);

/// While it lives, its [`ThreadLock`] is held.
#[must_use = "dropped at once, it protects nothing"]
pub struct ThreadGuard<'a, T> {
    guard: MutexGuard<'a, T>,
    _counted: Counted,
}

/// One in the count of the thread's locks.
struct Counted(PhantomData<*mut ()>);

impl Counted {
    fn new() -> Counted {
        if cfg!(debug_assertions) {
            pool::count_thread_locks(1);
        }
        Counted(PhantomData)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            pool::count_thread_locks(-1);
        }
    }
}

impl<T> ThreadLock<T> {
    /// A free lock around `value`.
    pub const fn new(value: T) -> ThreadLock<T> {
        ThreadLock(Mutex::new(value))
    }

    /// Takes the lock; blocks the thread while another one has it.
    ///
    /// # Panics
    /// If somebody panicked under it.
    #[track_caller]
    #[inline]
    pub fn lock(&self) -> ThreadGuard<'_, T> {
        let guard = self
            .0
            .lock()
            .expect("somebody panicked under this thread lock");
        ThreadGuard {
            guard,
            _counted: Counted::new(),
        }
    }

    /// The value, through the only reference: no lock needed.
    ///
    /// # Panics
    /// If somebody panicked under the lock.
    #[track_caller]
    pub fn get_mut(&mut self) -> &mut T {
        self.0
            .get_mut()
            .expect("somebody panicked under this thread lock")
    }

    /// The value.
    ///
    /// # Panics
    /// If somebody panicked under the lock.
    #[track_caller]
    pub fn into_inner(self) -> T {
        self.0
            .into_inner()
            .expect("somebody panicked under this thread lock")
    }
}

impl<T> Deref for ThreadGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for ThreadGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T: fmt::Debug> fmt::Debug for ThreadLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
