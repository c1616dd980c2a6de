//! What a context calls when a descriptor is ready (rule 3.5).
//!
//! Each registration has a token that is never used again. The kernel reports tokens; the loop
//! turns them into entries of a list of ready descriptors, and keeps what was reported *in the
//! registration* until the callback for it is called. So a nested poll that reports the same event
//! again only marks what is marked already, takes the mark, calls; and the outer pass finds the
//! mark gone: one event is dispatched once.
//!
//! A registration that is replaced or removed is marked so, and not called any more, wherever it
//! may still stand in a list; it is freed when nobody refers to it.
//!
//! While external handlers are disabled (rule 3.6), theirs are not in the kernel's set, and what
//! was reported before is forgotten instead of called. A state that lasts is reported anew once
//! they are in the set again.

use crate::monitor::{Monitor, NOTIFIER_TOKEN};
use crate::sys::event::ready;
use coblock_coroutine::ThreadLock;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

type Callback = Arc<dyn Fn() + Send + Sync>;
type Poll = Arc<dyn Fn() -> bool + Send + Sync>;

/// Mark of a registration whose busy poll said "ready"; epoll never reports this bit.
const POLL_READY: u32 = 1 << 26;

/// The callbacks of one descriptor; without any, it stands for "no handler".
///
/// All run on the home, outside coroutines, and may poll.
#[derive(Clone, Default)]
pub struct FdHandler {
    read: Option<Callback>,
    write: Option<Callback>,
    busy_poll: Option<Poll>,
    poll_ready: Option<Callback>,
    external: bool,
}

impl FdHandler {
    /// No callbacks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Called when it can be read, and on errors and hang-ups. Before the write callback.
    #[must_use]
    pub fn on_read(mut self, call: impl Fn() + Send + Sync + 'static) -> Self {
        self.read = Some(Arc::new(call));
        self
    }

    /// Called when it can be written, and on errors and hang-ups.
    #[must_use]
    pub fn on_write(mut self, call: impl Fn() + Send + Sync + 'static) -> Self {
        self.write = Some(Arc::new(call));
        self
    }

    /// Lets a busy-polling loop ask instead of waiting: `ready` looks and tells, cheaply and
    /// without side effects; when it says yes, `call` is called. Not asked again while `call` runs,
    /// so `call` may poll.
    #[must_use]
    pub fn busy_poll(
        mut self,
        ready: impl Fn() -> bool + Send + Sync + 'static,
        call: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        self.busy_poll = Some(Arc::new(ready));
        self.poll_ready = Some(Arc::new(call));
        self
    }

    /// Marks it as external (rule 3.6): it brings work from outside, as a guest's doorbell or a
    /// client's socket does, and rests while
    /// [`disable_external`](crate::AioContext::disable_external) holds.
    #[must_use]
    pub fn external(mut self) -> Self {
        self.external = true;
        self
    }

    fn is_empty(&self) -> bool {
        self.read.is_none() && self.write.is_none() && self.busy_poll.is_none()
    }

    fn wanted(&self) -> u32 {
        let read = if self.read.is_some() { ready::READ } else { 0 };
        let write = if self.write.is_some() {
            ready::WRITE
        } else {
            0
        };
        read | write
    }

    /// One direction of it taken or given; for coroutines that wait for a descriptor.
    pub(crate) fn direction(&mut self, write: bool) -> &mut Option<Callback> {
        if write {
            &mut self.write
        } else {
            &mut self.read
        }
    }
}

impl fmt::Debug for FdHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = f.debug_set();
        for (name, there) in [
            ("read", self.read.is_some()),
            ("write", self.write.is_some()),
            ("busy poll", self.busy_poll.is_some()),
            ("external", self.external),
        ] {
            if there {
                parts.entry(&name);
            }
        }
        parts.finish()
    }
}

/// One registration.
pub(crate) struct Slot {
    fd: RawFd,
    token: u64,
    handler: FdHandler,
    /// Reported and not dispatched yet. Home only.
    marks: AtomicU32,
    /// Replaced or removed: never called again.
    removed: AtomicBool,
    /// Its poll-ready callback runs: not asked meanwhile. Home only.
    asked: AtomicBool,
}

impl Slot {
    /// Takes a mark; tells whether its callback is to be called. Asked before each call, since the
    /// one before may have removed the registration or disabled external ones.
    fn take(&self, bits: u32, external: &External) -> bool {
        let marks = self.marks.load(Ordering::Relaxed);
        self.marks.store(marks & !bits, Ordering::Relaxed);
        marks & bits != 0 && !self.removed.load(Ordering::Acquire) && !external.rests(&self.handler)
    }

    /// Calls what is marked; tells whether something was called.
    fn dispatch(&self, external: &External) -> bool {
        let mut called = false;
        if self.take(POLL_READY, external)
            && let Some(call) = &self.handler.poll_ready
        {
            called = true;
            self.asked.store(true, Ordering::Relaxed);
            let _asked = Reset(&self.asked);
            call();
        }
        // An error or hang-up is for both; each direction takes its own copy of the mark.
        if self.take(ready::READ, external)
            && let Some(call) = &self.handler.read
        {
            called = true;
            call();
        }
        if self.take(ready::WRITE, external)
            && let Some(call) = &self.handler.write
        {
            called = true;
            call();
        }
        called
    }

    fn mark(&self, events: u32) {
        let broken = if events & ready::BROKEN != 0 {
            self.handler.wanted()
        } else {
            0
        };
        let wanted = self.handler.wanted() | POLL_READY;
        self.marks.store(
            self.marks.load(Ordering::Relaxed) | (events & wanted) | broken,
            Ordering::Relaxed,
        );
    }
}

/// Clears the flag also when the callback panics.
struct Reset<'a>(&'a AtomicBool);

impl Drop for Reset<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// How often external handlers are disabled (rule 3.6). Written under the lock of the table, read
/// by whoever is about to call a handler.
struct External(AtomicU32);

impl External {
    /// Is `handler` not to be called now?
    fn rests(&self, handler: &FdHandler) -> bool {
        handler.external && self.0.load(Ordering::Acquire) > 0
    }
}

/// The registrations of a context. Any thread.
pub(crate) struct Handlers {
    table: ThreadLock<Table>,
    external: External,
    /// How many can be asked, how many cannot: busy polling is for loops where all can.
    askable: AtomicUsize,
    deaf: AtomicUsize,
}

struct Table {
    by_fd: BTreeMap<RawFd, Arc<Slot>>,
    by_token: BTreeMap<u64, Arc<Slot>>,
    next_token: u64,
    /// Where external handlers were enabled last, for a refusal.
    enabled_at: Option<&'static Location<'static>>,
}

impl Table {
    /// Counts those that can be asked and those that cannot, among the ones that do not rest.
    fn count_askable(&self, external: &External) -> (usize, usize) {
        let mut counts = (0, 0);
        for slot in self.by_fd.values() {
            match &slot.handler {
                resting if external.rests(resting) => {}
                handler if handler.busy_poll.is_some() => counts.0 += 1,
                _ => counts.1 += 1,
            }
        }
        counts
    }
}

impl Handlers {
    pub fn new() -> Self {
        let table = Table {
            by_fd: BTreeMap::new(),
            by_token: BTreeMap::new(),
            next_token: NOTIFIER_TOKEN + 1,
            enabled_at: None,
        };
        Handlers {
            table: ThreadLock::new(table),
            external: External(AtomicU32::new(0)),
            askable: AtomicUsize::new(0),
            deaf: AtomicUsize::new(0),
        }
    }

    /// Sets, replaces, or removes (an empty handler).
    pub fn set(&self, monitor: &Monitor, fd: RawFd, handler: FdHandler) -> io::Result<()> {
        self.update(monitor, fd, |old| {
            *old = handler;
            Ok(())
        })
    }

    /// Changes the handler of `fd` in one step.
    pub fn update(
        &self,
        monitor: &Monitor,
        fd: RawFd,
        change: impl FnOnce(&mut FdHandler) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut table = self.table.lock();
        let old = table.by_fd.get(&fd).cloned();
        let mut handler = old
            .as_ref()
            .map(|slot| slot.handler.clone())
            .unwrap_or_default();
        change(&mut handler)?;
        let token = table.next_token;
        let was_watched = old
            .as_ref()
            .is_some_and(|old| !self.external.rests(&old.handler));
        if handler.is_empty() {
            if was_watched {
                // A descriptor that was closed before it was removed is not watched any more.
                let _gone = monitor.remove(fd);
            }
        } else if was_watched {
            match monitor.modify(fd, handler.wanted(), token) {
                // Closed and made again under the same number: a new one for an epoll set.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    monitor.add(fd, handler.wanted(), token)?;
                }
                other => other?,
            }
        } else {
            monitor.add(fd, handler.wanted(), token)?;
        }
        if self.external.rests(&handler) && !handler.is_empty() {
            // It was added all the same, to learn whether the kernel takes it.
            monitor.remove(fd)?;
        }
        if let Some(old) = &old {
            old.removed.store(true, Ordering::Release);
            table.by_token.remove(&old.token);
            table.by_fd.remove(&fd);
        }
        if !handler.is_empty() {
            table.next_token += 1;
            let slot = Arc::new(Slot {
                fd,
                token,
                handler,
                marks: AtomicU32::new(0),
                removed: AtomicBool::new(false),
                asked: AtomicBool::new(false),
            });
            table.by_fd.insert(fd, slot.clone());
            table.by_token.insert(token, slot);
        }
        self.store_askable(&table);
        drop(table);
        // Dropped here, outside the lock: it may hold the last reference to a callback.
        drop(old);
        Ok(())
    }

    fn store_askable(&self, table: &Table) {
        let (askable, deaf) = table.count_askable(&self.external);
        self.askable.store(askable, Ordering::Relaxed);
        self.deaf.store(deaf, Ordering::Relaxed);
    }

    /// External handlers rest once more (rule 3.6): the first time takes them out of the set.
    pub fn disable_external(&self, monitor: &Monitor) {
        let table = self.table.lock();
        let before = self.external.0.load(Ordering::Relaxed);
        let now = before.checked_add(1).expect("fewer than 2^32 sections");
        self.external.0.store(now, Ordering::Release);
        if before == 0 {
            for slot in table.by_fd.values().filter(|slot| slot.handler.external) {
                // A descriptor that was closed before its handler was removed is gone already.
                let _gone = monitor.remove(slot.fd);
            }
            self.store_askable(&table);
        }
    }

    /// Undoes one [`disable_external`](Self::disable_external); tells whether it was the last.
    /// Refused if there is none: with the place where the last one was undone, if one ever was.
    pub fn enable_external(
        &self,
        monitor: &Monitor,
        place: &'static Location<'static>,
    ) -> Result<bool, Option<&'static Location<'static>>> {
        let mut table = self.table.lock();
        let before = self.external.0.load(Ordering::Relaxed);
        let Some(now) = before.checked_sub(1) else {
            return Err(table.enabled_at);
        };
        self.external.0.store(now, Ordering::Release);
        table.enabled_at = Some(place);
        if now == 0 {
            for slot in table.by_fd.values().filter(|slot| slot.handler.external) {
                if let Err(error) = monitor.add(slot.fd, slot.handler.wanted(), slot.token) {
                    log::error!("descriptor {} cannot be watched again: {error}", slot.fd);
                }
            }
            self.store_askable(&table);
        }
        Ok(now == 0)
    }

    /// How often external handlers are disabled now.
    pub fn external_disabled(&self) -> u32 {
        self.external.0.load(Ordering::Acquire)
    }

    /// Is there something to ask, and can everything be asked?
    pub fn can_busy_poll(&self) -> bool {
        self.askable.load(Ordering::Relaxed) > 0 && self.deaf.load(Ordering::Relaxed) == 0
    }

    /// Those that can be asked, in the order of their descriptors.
    pub fn askable(&self) -> Vec<Arc<Slot>> {
        let table = self.table.lock();
        let slots = table
            .by_fd
            .values()
            .filter(|slot| slot.handler.busy_poll.is_some());
        slots.cloned().collect()
    }

    /// The descriptors with a handler, for a refusal.
    pub fn describe(&self) -> Vec<String> {
        let table = self.table.lock();
        table
            .by_fd
            .values()
            .map(|slot| format!("handler of descriptor {}", slot.fd))
            .collect()
    }

    fn by_token(&self, token: u64) -> Option<Arc<Slot>> {
        self.table.lock().by_token.get(&token).cloned()
    }
}

/// The descriptors reported ready and not dispatched yet; home only.
#[derive(Default)]
pub(crate) struct ReadyList {
    entries: RefCell<VecDeque<Arc<Slot>>>,
    /// Number of the entry at the front, as in the list of bottom halves.
    front: Cell<u64>,
}

impl ReadyList {
    /// The kernel reported `events` for `token`.
    pub fn report(&self, handlers: &Handlers, token: u64, events: u32) {
        if token == NOTIFIER_TOKEN {
            return;
        }
        // A token without a slot was removed after the kernel had reported it.
        if let Some(slot) = handlers.by_token(token) {
            self.push(slot, events);
        }
    }

    fn push(&self, slot: Arc<Slot>, events: u32) {
        slot.mark(events);
        let mut entries = self.entries.borrow_mut();
        if !entries.iter().any(|known| Arc::ptr_eq(known, &slot)) {
            entries.push_back(slot);
        }
    }

    /// Asks each that can be asked; tells whether one said yes.
    pub fn ask(&self, handlers: &Handlers, slots: &[Arc<Slot>]) -> bool {
        let mut any = false;
        for slot in slots {
            let busy = slot.asked.load(Ordering::Relaxed)
                || slot.removed.load(Ordering::Acquire)
                || handlers.external.rests(&slot.handler);
            if !busy && slot.handler.busy_poll.as_ref().is_some_and(|ready| ready()) {
                self.push(slot.clone(), POLL_READY);
                any = true;
            }
        }
        any
    }

    /// Is something left, by an outer pass?
    pub fn is_empty(&self) -> bool {
        self.entries.borrow().is_empty()
    }

    /// Calls the handlers of what was reported before this call; tells whether one ran.
    pub fn dispatch(&self, handlers: &Handlers) -> bool {
        let waiting = self.entries.borrow().len() as u64;
        let limit = self.front.get() + waiting;
        let mut progress = false;
        while self.front.get() < limit {
            let Some(slot) = self.entries.borrow_mut().pop_front() else {
                break;
            };
            self.front.set(self.front.get() + 1);
            progress |= slot.dispatch(&handlers.external);
        }
        progress
    }
}
