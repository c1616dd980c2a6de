//! Bottom halves: "call this soon, from the loop" (rules 3.2, 3.3).
//!
//! A context keeps two lists. The home appends to a plain one; other threads push to a lock-free
//! one and notify. Whenever the home touches its list, it first takes over what others pushed, so
//! the plain list alone decides the order, and what happened before is in it before.
//!
//! ```text
//!   other threads -> remote (SegQueue) --+
//!                                        +--> local (VecDeque, home only) --> run
//!   home ------------------------------- +
//! ```
//!
//! Entries carry a running number. A pass runs those below the number that the next entry would
//! have had when the pass began: what is scheduled meanwhile runs in the next pass, and a nested
//! poll, whose limit is higher, first finishes what the outer pass has left.

use crate::bh_state::{BhState, Entry, Ticket};
use crate::context::AioContext;
use crate::sys::pending::Pending;
use coblock_coroutine::Ready;
use crossbeam_queue::SegQueue;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

/// Something that a loop does once, in the order posted.
pub(crate) enum Work {
    /// A bottom half, if the ticket is still good.
    Half(Arc<Half>, Ticket),
    /// A one-shot.
    Once(Box<dyn FnOnce() + Send>),
    /// A coroutine that is to go on.
    Enter(Ready),
    /// An operation that ended with a result.
    Done(Pending, i32),
}

impl Work {
    /// Dead entries do not count; `Idle` only for idle bottom halves.
    fn look(&self) -> Entry {
        match self {
            Work::Half(half, ticket) => half.state.look(*ticket),
            _ => Entry::Regular,
        }
    }

    /// Does it; tells whether it was progress.
    fn run(self) -> bool {
        match self {
            Work::Half(half, ticket) => {
                let entry = half.state.begin(ticket);
                if entry != Entry::Dead {
                    (half.callback)();
                }
                entry == Entry::Regular
            }
            Work::Once(call) => {
                call();
                true
            }
            Work::Enter(ready) => {
                ready.enter();
                true
            }
            Work::Done(pending, result) => {
                pending.complete(result);
                true
            }
        }
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Half(half, _) => write!(f, "bottom half '{}'", half.name),
            Work::Once(_) => f.write_str("one-shot"),
            Work::Enter(_) => f.write_str("coroutine to be resumed"),
            Work::Done(..) => f.write_str("completion"),
        }
    }
}

/// The plain list; home only.
#[derive(Default)]
pub(crate) struct WorkList {
    entries: RefCell<VecDeque<Work>>,
    /// Number of the entry at the front.
    front: Cell<u64>,
}

impl WorkList {
    /// Appends, after everything that others pushed before.
    pub fn push(&self, remote: &SegQueue<Work>, work: Work) {
        let mut entries = self.entries.borrow_mut();
        while let Some(earlier) = remote.pop() {
            entries.push_back(earlier);
        }
        entries.push_back(work);
    }

    /// Takes over what others pushed until now.
    fn take_over(&self, remote: &SegQueue<Work>) {
        if !remote.is_empty() {
            let mut entries = self.entries.borrow_mut();
            while let Some(work) = remote.pop() {
                entries.push_back(work);
            }
        }
    }

    /// What a blocking poll finds: `Regular`: do not wait; `Idle`: not long; `Dead`: nothing here.
    pub fn look(&self) -> Entry {
        let mut found = Entry::Dead;
        for work in self.entries.borrow().iter() {
            match work.look() {
                Entry::Regular => return Entry::Regular,
                Entry::Idle => found = Entry::Idle,
                Entry::Dead => {}
            }
        }
        found
    }

    /// Runs what was scheduled before this call; tells whether something was progress.
    pub fn run(&self, remote: &SegQueue<Work>) -> bool {
        self.take_over(remote);
        let waiting = self.entries.borrow().len() as u64;
        let limit = self.front.get() + waiting;
        let mut progress = false;
        while self.front.get() < limit {
            let Some(work) = self.entries.borrow_mut().pop_front() else {
                break;
            };
            self.front.set(self.front.get() + 1);
            progress |= work.run();
        }
        progress
    }

    /// What is left, for a refusal.
    pub fn describe(&self) -> Vec<String> {
        let entries = self.entries.borrow();
        let live = entries.iter().filter(|work| work.look() != Entry::Dead);
        live.map(|work| format!("{work:?}")).collect()
    }
}

/// What list entries share with the handle.
pub(crate) struct Half {
    name: &'static str,
    state: BhState,
    callback: Box<dyn Fn() + Send + Sync>,
}

/// A callback of a context that can be scheduled again and again (rule 3.2).
///
/// All methods from any thread. Whatever was written before [`schedule`](Self::schedule) is visible
/// in the callback (rule 3.3), also when it was scheduled already. Dropping the handle deletes it.
pub struct BottomHalf {
    half: Arc<Half>,
    context: Arc<AioContext>,
    /// Its entry in the context's register of live ones.
    key: u64,
}

impl BottomHalf {
    pub(crate) fn new(
        context: &Arc<AioContext>,
        name: &'static str,
        callback: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let half = Arc::new(Half {
            name,
            state: BhState::new(),
            callback,
        });
        let key = context.halves.insert(name);
        BottomHalf {
            half,
            context: context.clone(),
            key,
        }
    }

    /// Calls back once, in the next pass of the context. Scheduled before, it still runs only once.
    pub fn schedule(&self) {
        self.schedule_as(false);
    }

    /// Calls back once, within 10 ms, and without counting as progress of the loop: for polling.
    pub fn schedule_idle(&self) {
        self.schedule_as(true);
    }

    fn schedule_as(&self, idle: bool) {
        if let Some(ticket) = self.half.state.schedule(idle) {
            self.context.post(Work::Half(self.half.clone(), ticket));
        }
    }

    /// Does not run what was scheduled, unless it already started. Tells whether something was.
    pub fn cancel(&self) -> bool {
        self.half.state.cancel()
    }

    /// Never runs again, unless it already started; legal in its own callback. The same as a drop.
    pub fn delete(self) {
        drop(self);
    }

    /// The name that it was made with.
    pub fn name(&self) -> &'static str {
        self.half.name
    }
}

impl Drop for BottomHalf {
    fn drop(&mut self) {
        self.half.state.delete();
        self.context.halves.remove(self.key);
    }
}

impl fmt::Debug for BottomHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "BottomHalf('{}' in '{}')",
            self.half.name,
            self.context.name()
        )
    }
}
