//! A lock for many readers or one writer, handed over in order (rule 4.3); without any waiting of
//! its own.
//!
//! ```text
//!   queue:   R1  W2  R3  R4  W5            the front is next
//!   a reader comes:    joins the readers if nobody queues, else queues
//!   a writer comes:    owns if nobody does and nobody queues, else queues
//!   last one leaves:   the front is granted the lock *before* that returns
//!   R3 takes it up:    grants R4; R4 finds a writer next, and the chain ends
//! ```
//! At most one grant is on its way at any time: to the front of the queue, woken by whoever made
//! it.

use super::sync::ThreadLock;
use std::collections::VecDeque;

/// What somebody wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// To read, with others.
    Read,
    /// To write, alone.
    Write,
}

/// The lock; `V` is what it protects (each reader gets a clone, a writer the original), `W` tells
/// how to wake a waiter, `N` is a note about an owner. Owners are named by a number that is never
/// 0.
pub(crate) struct Tickets<V, W, N>(ThreadLock<Inner<V, W, N>>);

struct Inner<V, W, N> {
    /// `None` while a writer has it.
    value: Option<V>,
    /// Who reads.
    readers: Vec<(u64, N)>,
    /// Who writes.
    writer: Option<(u64, N)>,
    /// Of those, who has been granted the lock and has not taken it up yet; 0: nobody.
    granted: u64,
    queue: VecDeque<Waiter<W, N>>,
}

struct Waiter<W, N> {
    who: u64,
    want: Want,
    note: N,
    wake: W,
}

/// Answer to an attempt.
pub(crate) enum Attempt<V, N> {
    /// The caller has the lock now.
    Acquired(V),
    /// It has to wait; queued, if it said how to wake it.
    Busy,
    /// The caller has the lock already, with this note.
    Recursive(N),
}

/// Answer to an upgrade.
pub(crate) enum Upgrade<V, W> {
    /// The caller writes now; nobody wrote in between.
    Alone(V),
    /// The caller does not read any more, and waits as a writer. `others_first`: writers may come
    /// before it. Who is to be woken.
    Queued { others_first: bool, wake: Option<W> },
}

impl<V: Clone, W, N: Copy> Tickets<V, W, N> {
    pub(crate) fn new(value: V) -> Tickets<V, W, N> {
        Tickets(ThreadLock::new(Inner {
            value: Some(value),
            readers: Vec::new(),
            writer: None,
            granted: 0,
            queue: VecDeque::new(),
        }))
    }

    /// Takes the lock for `me` if that needs no waiting; else, if `wake` says how, queues.
    pub(crate) fn attempt(&self, me: u64, want: Want, note: N, wake: Option<W>) -> Attempt<V, N> {
        let mut inner = self.0.lock();
        if let Some(note) = inner.note_of(me) {
            return Attempt::Recursive(note);
        }
        if inner.queue.is_empty() && inner.has_room_for(want) {
            return Attempt::Acquired(inner.enter(me, want, note));
        }
        if let Some(wake) = wake {
            inner.queue.push_back(Waiter {
                who: me,
                want,
                note,
                wake,
            });
        }
        Attempt::Busy
    }

    /// Takes the lock up if it was granted to `me`; and then, for a reader, who reads next and is
    /// to be woken.
    pub(crate) fn claim(&self, me: u64) -> Option<(V, Option<W>)> {
        let mut inner = self.0.lock();
        if inner.granted != me {
            return None;
        }
        inner.granted = 0;
        let value = if inner.writer.is_some() {
            inner.value.take()
        } else {
            inner.value.clone()
        };
        let value = value.expect("a lock that was granted comes with its value");
        Some((value, inner.grant()))
    }

    /// A reader leaves; its clone of the value is gone. Who is to be woken.
    #[must_use]
    pub(crate) fn release_read(&self, me: u64) -> Option<W> {
        let mut inner = self.0.lock();
        inner.remove_reader(me);
        inner.grant()
    }

    /// The writer leaves. Who is to be woken.
    #[must_use]
    pub(crate) fn release_write(&self, me: u64, value: V) -> Option<W> {
        let mut inner = self.0.lock();
        inner.remove_writer(me, value);
        inner.grant()
    }

    /// The writer reads on, without any wait; readers at the front of the queue may join. Its clone
    /// of the value, and who is to be woken.
    pub(crate) fn downgrade(&self, me: u64, value: V) -> (V, Option<W>) {
        let mut inner = self.0.lock();
        let note = inner.remove_writer(me, value);
        let value = inner.enter(me, Want::Read, note);
        (value, inner.grant())
    }

    /// A reader wants to write; its clone of the value is gone. Alone it writes at once; else it
    /// gives up its side, and queues at the back.
    pub(crate) fn upgrade(&self, me: u64, note: N, wake: W) -> Upgrade<V, W> {
        let mut inner = self.0.lock();
        inner.remove_reader(me);
        if inner.queue.is_empty() && inner.has_room_for(Want::Write) {
            return Upgrade::Alone(inner.enter(me, Want::Write, note));
        }
        let others_first = !inner.queue.is_empty();
        inner.queue.push_back(Waiter {
            who: me,
            want: Want::Write,
            note,
            wake,
        });
        Upgrade::Queued {
            others_first,
            wake: inner.grant(),
        }
    }

    /// `me` does not want the lock any more: leaves the queue, or gives up what it was granted. Who
    /// is to be woken.
    #[must_use]
    pub(crate) fn abandon(&self, me: u64) -> Option<W> {
        let mut inner = self.0.lock();
        if inner.granted == me {
            inner.granted = 0;
            match inner.writer {
                Some(_) => inner.writer = None,
                None => {
                    inner.remove_reader(me);
                }
            }
        } else {
            inner.queue.retain(|waiter| waiter.who != me);
        }
        inner.grant()
    }

    /// Who reads, who writes (0: nobody), how many wait.
    pub(crate) fn state(&self) -> (usize, u64, usize) {
        let inner = self.0.lock();
        let writer = inner.writer.as_ref().map_or(0, |(who, _)| *who);
        (inner.readers.len(), writer, inner.queue.len())
    }

    /// Where `who` got the lock that it has.
    pub(crate) fn note_of(&self, who: u64) -> Option<N> {
        self.0.lock().note_of(who)
    }

    /// The value, through the only reference.
    pub(crate) fn value_mut(&mut self) -> Option<&mut V> {
        self.0.get_mut().value.as_mut()
    }

    /// The value of a lock that nobody uses any more.
    pub(crate) fn into_value(self) -> Option<V> {
        self.0.into_inner().value
    }
}

impl<V: Clone, W, N: Copy> Inner<V, W, N> {
    fn note_of(&self, who: u64) -> Option<N> {
        let mut owners = self.readers.iter().chain(self.writer.as_ref());
        owners
            .find(|(owner, _)| *owner == who)
            .map(|(_, note)| *note)
    }

    fn has_room_for(&self, want: Want) -> bool {
        self.writer.is_none() && (want == Want::Read || self.readers.is_empty())
    }

    fn enter(&mut self, me: u64, want: Want, note: N) -> V {
        assert!(
            self.has_room_for(want),
            "nobody enters a lock that is taken"
        );
        match want {
            Want::Read => {
                self.readers.push((me, note));
                self.value.clone()
            }
            Want::Write => {
                self.writer = Some((me, note));
                self.value.take()
            }
        }
        .expect("a lock without a writer has its value")
    }

    fn remove_reader(&mut self, me: u64) -> N {
        let at = self.readers.iter().position(|(who, _)| *who == me);
        self.readers
            .swap_remove(at.expect("a reader of the lock leaves it"))
            .1
    }

    fn remove_writer(&mut self, me: u64, value: V) -> N {
        let (who, note) = self
            .writer
            .take()
            .expect("the writer of the lock leaves it");
        assert_eq!(who, me, "a coroutine lock is released by its owner");
        self.value = Some(value);
        note
    }

    /// Grants the lock to the front of the queue, if that may have it now.
    fn grant(&mut self) -> Option<W> {
        if self.granted != 0 || !self.has_room_for(self.queue.front()?.want) {
            return None;
        }
        let next = self.queue.pop_front()?;
        self.granted = next.who;
        match next.want {
            Want::Read => self.readers.push((next.who, next.note)),
            Want::Write => self.writer = Some((next.who, next.note)),
        }
        Some(next.wake)
    }
}
