//! A lock that is handed from owner to owner, in order (rule 4.1); without any waiting of its own.
//!
//! The value travels: it lies here while the lock is free or on its way to the next owner, and is
//! taken out by whoever owns the lock. `release` names the next owner *before* it returns, so the
//! lock is never free while somebody waits and no newcomer overtakes.

use super::sync::ThreadLock;
use std::collections::VecDeque;

/// The lock; `V` is what it protects, `W` tells how to wake a waiter, `N` is a note about an owner.
/// Owners are named by a number that is never 0.
pub(crate) struct Handoff<V, W, N>(ThreadLock<Inner<V, W, N>>);

struct Inner<V, W, N> {
    /// `None` while an owner has it.
    value: Option<V>,
    /// Who owns the lock; 0: nobody, and then nobody waits either.
    owner: u64,
    /// Of the owner, or of the last one.
    note: Option<N>,
    waiters: VecDeque<(u64, N, W)>,
    acquired: u64,
}

/// Answer to an attempt.
pub(crate) enum Attempt<V, N> {
    /// The caller owns the lock now.
    Acquired(V),
    /// Somebody else owns it.
    Busy,
    /// The caller owns it already, with this note.
    Recursive(Option<N>),
}

impl<V, W, N: Copy> Handoff<V, W, N> {
    pub(crate) fn new(value: V) -> Handoff<V, W, N> {
        Handoff(ThreadLock::new(Inner {
            value: Some(value),
            owner: 0,
            note: None,
            waiters: VecDeque::new(),
            acquired: 0,
        }))
    }

    /// Takes the lock for `me` if it is free; else, if `waiter` says so, queues.
    pub(crate) fn attempt(&self, me: u64, note: N, waiter: Option<W>) -> Attempt<V, N> {
        let mut inner = self.0.lock();
        if inner.owner == me {
            return Attempt::Recursive(inner.note);
        }
        if inner.owner == 0 {
            assert!(inner.waiters.is_empty(), "a free lock has waiters");
            inner.owner = me;
            inner.note = Some(note);
            inner.acquired += 1;
            return Attempt::Acquired(inner.value.take().expect("a free lock has its value"));
        }
        if let Some(waiter) = waiter {
            inner.waiters.push_back((me, note, waiter));
        }
        Attempt::Busy
    }

    /// Takes the value if the lock was handed to `me`.
    pub(crate) fn claim(&self, me: u64) -> Option<V> {
        let mut inner = self.0.lock();
        if inner.owner != me {
            return None;
        }
        Some(
            inner
                .value
                .take()
                .expect("a lock that was handed over comes with its value"),
        )
    }

    /// Gives the lock back; the waiter that owns it now must be woken by the caller.
    #[must_use]
    pub(crate) fn release(&self, me: u64, value: V) -> Option<W> {
        let mut inner = self.0.lock();
        assert_eq!(inner.owner, me, "a coroutine lock is released by its owner");
        inner.value = Some(value);
        inner.pass_on()
    }

    /// `me` does not want the lock any more: leaves the queue, or passes the lock on if it was
    /// handed over already.
    #[must_use]
    pub(crate) fn abandon(&self, me: u64) -> Option<W> {
        let mut inner = self.0.lock();
        if inner.owner == me {
            return inner.pass_on();
        }
        inner.waiters.retain(|(who, _, _)| *who != me);
        None
    }

    /// Who owns the lock now (0: nobody), and the note of the last owner.
    pub(crate) fn owner(&self) -> (u64, Option<N>) {
        let inner = self.0.lock();
        (inner.owner, inner.note)
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.0.lock().waiters.len()
    }

    /// How often the lock was taken or handed over.
    pub(crate) fn acquired(&self) -> u64 {
        self.0.lock().acquired
    }

    /// The value of a lock that nobody uses any more.
    pub(crate) fn into_value(self) -> Option<V> {
        self.0.into_inner().value
    }

    /// The value, through the only reference.
    pub(crate) fn value_mut(&mut self) -> Option<&mut V> {
        self.0.get_mut().value.as_mut()
    }
}

impl<V, W, N> Inner<V, W, N> {
    fn pass_on(&mut self) -> Option<W> {
        match self.waiters.pop_front() {
            Some((next, note, waiter)) => {
                self.owner = next;
                self.note = Some(note);
                self.acquired += 1;
                Some(waiter)
            }
            None => {
                self.owner = 0;
                None
            }
        }
    }
}
