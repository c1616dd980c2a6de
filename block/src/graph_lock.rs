//! The graph lock: what lets a request walk the edges, and one home change them (rules 7.1 to
//! 7.8).
//!
//! Each event loop ("context") that sends requests into a graph has a *slot*: an index below
//! [`MAX_CONTEXTS`] and, on a cache line of its own, a count of readers. Taking and releasing the
//! lock are plain stores to that line, and loads of lines that requests never write; see `graph_lock/protocol.rs` for the order. What is rare is
//! under one thread lock: which context has which slot, the counts that dead contexts left behind,
//! the readers that wait for a writer, and who that is. The writer is in `graph_lock/writer.rs`.

pub(crate) mod protocol;
mod writer;

pub(crate) use writer::WriteLocked;

mod sync {
    pub(crate) use crate::sync::*;
}

use coblock_coroutine::{Co, Held, Hold, Schedule, ThreadLock, WakeHandle, mutant};
use protocol::{ReaderCount, WriterFlags};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::panic::Location;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Weak};
use std::thread::ThreadId;

/// How many live contexts may send requests into one graph.
pub const MAX_CONTEXTS: usize = 64;

/// Index of the context in which a request runs, below [`MAX_CONTEXTS`].
///
/// Holding one proves that the caller runs on that context's home, which is what allows plain
/// stores to the context's own words: so it stays on its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextSlot {
    index: u8,
    on_its_thread: PhantomData<*const ()>,
}

impl ContextSlot {
    #[inline]
    fn new(index: usize) -> Self {
        debug_assert!(index < MAX_CONTEXTS);
        #[expect(clippy::cast_possible_truncation, reason = "below MAX_CONTEXTS")]
        ContextSlot {
            index: index as u8,
            on_its_thread: PhantomData,
        }
    }

    /// For tables with a row per context.
    #[inline]
    pub fn index(self) -> usize {
        usize::from(self.index) & (MAX_CONTEXTS - 1)
    }
}

#[repr(align(128))]
struct Slot {
    count: ReaderCount,
}

/// Which context has which slot. Apart from the counts: every reader of every context looks through
/// it, so it must not share a line with what readers write.
#[repr(align(128))]
struct Homes {
    /// Slots from here on were never used.
    used: AtomicUsize,
    /// Addresses, kept from reuse by the `Weak` in [`Slow::homes`]; 0 is free.
    addresses: [AtomicUsize; MAX_CONTEXTS],
}

#[derive(Default)]
struct Slow {
    homes: Vec<Option<Weak<dyn Schedule>>>,
    /// Sum of the counts of dead contexts (rule 7.4).
    orphans: u32,
    /// Readers that wait for a writer, by ticket: first come, first woken.
    queue: BTreeMap<u64, WakeHandle>,
    next_ticket: u64,
    /// Who reads in the main home without counting: how many, and the first of them (rule 7.8).
    in_main: Option<(u32, &'static Location<'static>)>,
    /// Who owns the graph for writing, and where it was locked.
    owner: Option<(ThreadId, &'static Location<'static>)>,
}

/// The lock of one graph.
pub(crate) struct GraphLock {
    flags: WriterFlags,
    homes: Box<Homes>,
    slots: Box<[Slot; MAX_CONTEXTS]>,
    slow: ThreadLock<Slow>,
    /// Makes the writer look again. From any thread.
    kick: Box<dyn Fn() + Send + Sync>,
}

/// More contexts at once than a graph has slots.
#[derive(Debug)]
pub struct TooManyContexts;

fn address(home: &Arc<dyn Schedule>) -> usize {
    Arc::as_ptr(home).cast::<()>().addr()
}

impl GraphLock {
    pub(crate) fn new(kick: Box<dyn Fn() + Send + Sync>) -> Self {
        let slot = |_| Slot {
            count: ReaderCount::new(),
        };
        let homes = Homes {
            used: AtomicUsize::new(0),
            addresses: [const { AtomicUsize::new(0) }; MAX_CONTEXTS],
        };
        GraphLock {
            flags: WriterFlags::new(),
            homes: Box::new(homes),
            slots: Box::new(std::array::from_fn(slot)),
            slow: ThreadLock::new(Slow::default()),
            kick,
        }
    }

    /// The slot of `home`, if it has one.
    #[inline(always)]
    fn find(&self, home: &Arc<dyn Schedule>) -> Option<usize> {
        let address = address(home);
        let is_ours = |home: &AtomicUsize| home.load(Ordering::Relaxed) == address;
        let homes = &*self.homes;
        // The main context is the first in most programs.
        if is_ours(&homes.addresses[0]) {
            return Some(0);
        }
        let used = homes.used.load(Ordering::Acquire);
        homes.addresses[..used].iter().position(is_ours)
    }

    /// Gives `home` a slot: a new one, or that of a context that died (rule 7.4).
    #[cold]
    fn register(&self, home: &Arc<dyn Schedule>) -> Result<usize, TooManyContexts> {
        let mut slow = self.slow.lock();
        if let Some(index) = self.find(home) {
            return Ok(index);
        }
        let used = slow.homes.len();
        let dead = |home: &Option<Weak<dyn Schedule>>| {
            home.as_ref().is_none_or(|home| home.strong_count() == 0)
        };
        let index = match slow.homes.iter().position(dead) {
            Some(index) => index,
            None if used < MAX_CONTEXTS => {
                slow.homes.push(None);
                used
            }
            None => return Err(TooManyContexts),
        };
        // Pairs with the release of the last strong count: the dead home's plain stores, here and
        // in every table with a row per context, come before ours.
        fence(Ordering::Acquire);
        let left = self.slots[index].count.retire();
        if !mutant!("a dead context takes its readers along") {
            slow.orphans = slow.orphans.wrapping_add(left);
        }
        slow.homes[index] = Some(Arc::downgrade(home));
        self.homes.addresses[index].store(address(home), Ordering::Relaxed);
        self.homes.used.fetch_max(index + 1, Ordering::Release);
        Ok(index)
    }

    /// Rule 7.2. Suspends while a writer owns the graph.
    ///
    /// # Panics
    /// Rule 7.7: when this coroutine holds a read guard already.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn read<'a>(
        &'a self,
        co: &'a Co,
        home: &Arc<dyn Schedule>,
    ) -> Result<ReadLocked<'a>, TooManyContexts> {
        if co.holds(Hold::GraphRead) != 0 {
            refuse_second(co, Location::caller());
        }
        let index = match self.find(home) {
            Some(index) => index,
            None => self.register(home)?,
        };
        let slot = &self.slots[index];
        if !protocol::enter(&slot.count, &self.flags) {
            self.enter_slow(co, slot, Location::caller());
        }
        Ok(ReadLocked {
            lock: self,
            co,
            slot: ContextSlot::new(index),
            home: address(home),
            _held: co.hold(Hold::GraphRead),
        })
    }

    /// Counted, and a writer was seen. Returns counted, with no writer.
    #[cold]
    fn enter_slow(&self, co: &Co, slot: &Slot, at: &Location<'_>) {
        loop {
            let ticket = {
                let mut slow = self.slow.lock();
                if !self.flags.owned() {
                    return;
                }
                let owner = slow.owner;
                let kick = protocol::leave(&slot.count, &self.flags);
                let ticket = slow.next_ticket;
                slow.next_ticket += 1;
                slow.queue.insert(ticket, co.wake_handle());
                drop(slow);
                if kick {
                    (self.kick)();
                }
                let queued = Queued { lock: self, ticket };
                refuse_under_write(co, owner, at);
                queued
            };
            while self.slow.lock().queue.contains_key(&ticket.ticket) {
                co.suspend();
            }
            drop(ticket);
            if protocol::enter(&slot.count, &self.flags) {
                return;
            }
        }
    }

    /// Readers of all contexts and those that dead contexts left behind (rules 7.3, 7.4). Under the
    /// mutex, so that no count is on its way from the one to the other.
    pub(crate) fn sum(&self) -> u32 {
        let slow = self.slow.lock();
        protocol::sum(self.slots.iter().map(|slot| &slot.count), slow.orphans)
    }

    /// Rule 7.8: somebody reads in the main home, uncounted, until the guard is dropped. No writer
    /// owns the graph meanwhile.
    pub(crate) fn read_in_main(&self, at: &'static Location<'static>) -> ReadInMain<'_> {
        let mut slow = self.slow.lock();
        if let Some((_, locked)) = slow.owner {
            drop(slow);
            panic!(
                "rule 7.7: the graph is read without counting at {at} under the write lock taken at \
                 {locked}"
            );
        }
        slow.in_main = match slow.in_main {
            None => Some((1, at)),
            Some((count, first)) => Some((count + 1, first)),
        };
        ReadInMain(self)
    }

    /// Wakes all that wait, in the order in which they came.
    fn wake_queue(&self) {
        let queue = std::mem::take(&mut self.slow.lock().queue);
        for handle in queue.into_values() {
            handle.wake();
        }
    }
}

/// A place in the queue; a coroutine that is unwound while it waits leaves it.
struct Queued<'a> {
    lock: &'a GraphLock,
    ticket: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.lock.slow.lock().queue.remove(&self.ticket);
    }
}

/// The lock, held for reading. Stays on its thread.
pub(crate) struct ReadLocked<'a> {
    lock: &'a GraphLock,
    co: &'a Co,
    slot: ContextSlot,
    home: usize,
    _held: Held<'a>,
}

impl<'a> ReadLocked<'a> {
    #[inline(always)]
    pub(crate) fn lock(&self) -> &'a GraphLock {
        self.lock
    }

    #[inline]
    pub(crate) fn co(&self) -> &'a Co {
        self.co
    }

    #[inline]
    pub(crate) fn slot(&self) -> ContextSlot {
        self.slot
    }
}

impl Drop for ReadLocked<'_> {
    /// Rule 7.3: in the context where the coroutine runs now, which a move may have changed.
    #[inline(always)]
    fn drop(&mut self) {
        let index = match self.co.home() {
            Some(home)
                if address(home) != self.home && !mutant!("a reader leaves where it came in") =>
            {
                self.lock.moved_to(home)
            }
            _ => self.slot.index(),
        };
        let kick = protocol::leave(&self.lock.slots[index].count, &self.lock.flags);
        if kick && !mutant!("a reader that leaves kicks no writer") {
            (self.lock.kick)();
        }
    }
}

impl GraphLock {
    #[cold]
    fn moved_to(&self, home: &Arc<dyn Schedule>) -> usize {
        self.find(home).or_else(|| self.register(home).ok()).unwrap_or_else(|| {
            panic!(
                "a graph guard ends in context '{}', for which there is no slot: {MAX_CONTEXTS} contexts use the graph",
                home.name()
            )
        })
    }
}

/// Somebody reads in the main home, uncounted.
pub(crate) struct ReadInMain<'a>(&'a GraphLock);

impl Drop for ReadInMain<'_> {
    fn drop(&mut self) {
        let mut slow = self.0.slow.lock();
        slow.in_main = match slow.in_main {
            Some((count, first)) if count > 1 => Some((count - 1, first)),
            _ => None,
        };
    }
}

#[cold]
fn refuse_second(co: &Co, at: &Location<'_>) -> ! {
    panic!(
        "rule 7.7: coroutine {} takes the graph lock at {at} while it holds a read guard of it: \
         pass that guard instead",
        co.id()
    )
}

/// Rule 7.7. A writer does not poll, so whoever reads on its thread does it from inside the
/// section.
fn refuse_under_write(
    co: &Co,
    owner: Option<(ThreadId, &'static Location<'static>)>,
    at: &Location<'_>,
) {
    if let Some((thread, locked)) = owner
        && thread == std::thread::current().id()
    {
        panic!(
            "rule 7.7: coroutine {} takes the graph lock at {at} under the write lock taken at \
             {locked}, which only ends after it",
            co.id()
        );
    }
}

#[cfg(test)]
mod tests;
