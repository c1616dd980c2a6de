//! Actions that wait for external requests to be enabled again (rules 6.1 to 6.4).
//!
//! For devices that submit outside of descriptor handlers, which
//! [`AioContext::disable_external`] cannot hold back: they postpone what would start a request.
//!
//! ```text
//!   postpone ----> one list per context, in order ----> bottom half, once the last section ended
//!                     |                                    before each action: a new section? stay
//!                     +-- owner reset or dropped, handle cancelled: taken out
//! ```
//! Nothing here is in flight: an action that waits has not begun.

use crate::context::AioContext;
use coblock_coroutine::{ThreadLock, mutant};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

struct Action {
    owner: u64,
    owner_name: &'static str,
    run: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct List {
    /// By number: first postponed, first run.
    actions: BTreeMap<u64, Action>,
    next: u64,
    next_owner: u64,
    /// A bottom half is on its way, or runs them now.
    running: bool,
    /// Whose action runs now.
    runs: Option<u64>,
}

/// The actions that wait in one context.
#[derive(Default)]
pub(crate) struct Postponed(ThreadLock<List>);

impl Postponed {
    /// For who may not end before them.
    pub fn describe(&self) -> Option<String> {
        let list = self.0.lock();
        let (_, first) = list.actions.first_key_value()?;
        let (count, owner) = (list.actions.len(), first.owner_name);
        Some(format!(
            "{count} postponed action(s), the first of '{owner}'"
        ))
    }

    fn remove(&self, number: u64) -> bool {
        let action = self.0.lock().actions.remove(&number);
        action.is_some()
    }
}

impl AioContext {
    /// Somebody who postpones actions here: one device.
    pub fn postponer(self: &Arc<Self>, name: &'static str) -> Postponer {
        let mut list = self.postponed.0.lock();
        list.next_owner += 1;
        Postponer {
            context: self.clone(),
            name,
            id: list.next_owner,
        }
    }

    /// External requests are enabled, or something was postponed while they are: a bottom half runs
    /// what waits.
    pub(crate) fn run_postponed(&self) {
        let begins = {
            let mut list = self.postponed.0.lock();
            let waits = !list.running && !list.actions.is_empty();
            list.running |= waits;
            waits
        };
        if begins {
            self.oneshot(run_in_order);
        }
    }
}

/// The bottom half: outside of all sections and locks (rule 6.3).
fn run_in_order() {
    let context = crate::current::current().expect("a bottom half runs in its context");
    let running = Running(&context);
    loop {
        let next = {
            let mut list = context.postponed.0.lock();
            // A section may have begun since, also by the action that just ran.
            list.runs = None;
            let disabled = context.external_disabled() > 0;
            if disabled && !mutant!("a new section keeps no postponed action") {
                break;
            }
            let next = match mutant!("what was postponed last runs first") {
                true => list.actions.pop_last(),
                false => list.actions.pop_first(),
            };
            list.runs = next.as_ref().map(|(_, action)| action.owner);
            next
        };
        match next {
            Some((_, action)) => (action.run)(),
            None => break,
        }
    }
    drop(running);
}

/// One bottom half at a time; also when an action panics, the others run later.
struct Running<'a>(&'a Arc<AioContext>);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        {
            let mut list = self.0.postponed.0.lock();
            (list.running, list.runs) = (false, None);
        }
        if self.0.external_disabled() == 0 {
            self.0.run_postponed();
        }
    }
}

/// The owner of postponed actions: a device. Dropping it cancels them. Any thread.
pub struct Postponer {
    context: Arc<AioContext>,
    name: &'static str,
    id: u64,
}

impl Postponer {
    /// Must a request wait: are external requests disabled, or does an earlier action wait still, or
    /// run, of whichever owner (rule 6.4)? Asked by a device in the home of the context, where the answer
    /// stays true until it returns. In its own action only the first counts: what waits comes later.
    pub fn must_postpone(&self) -> bool {
        if self.context.external_disabled() > 0 {
            return true;
        }
        let list = self.context.postponed.0.lock();
        match list.runs {
            Some(owner) => owner != self.id,
            None => !list.actions.is_empty() && !mutant!("a request overtakes postponed ones"),
        }
    }

    /// Runs `action` from a bottom half of the context, after all that were postponed there before,
    /// once external requests are enabled (rules 6.2, 6.3).
    pub fn postpone(&self, action: impl FnOnce() + Send + 'static) -> PostponedAction {
        let number = {
            let mut list = self.context.postponed.0.lock();
            let number = list.next;
            list.next += 1;
            let action = Action {
                owner: self.id,
                owner_name: self.name,
                run: Box::new(action),
            };
            list.actions.insert(number, action);
            number
        };
        // After it is in the list: either this or who enables them sees both.
        if self.context.external_disabled() == 0 {
            self.context.run_postponed();
        }
        PostponedAction {
            context: self.context.clone(),
            number,
        }
    }

    /// Cancels all that wait: the device is reset (rule 6.4). One that has begun goes on.
    pub fn reset(&self) {
        let cancelled: Vec<_> = {
            let mut list = self.context.postponed.0.lock();
            let ours = |_: &u64, action: &mut Action| action.owner == self.id;
            list.actions.extract_if(.., ours).collect()
        };
        // What they captured is dropped outside of the lock.
        drop(cancelled);
    }

    /// How many of this owner wait.
    pub fn waiting(&self) -> usize {
        let list = self.context.postponed.0.lock();
        let ours = list.actions.values();
        ours.filter(|action| action.owner == self.id).count()
    }
}

impl Drop for Postponer {
    fn drop(&mut self) {
        if !mutant!("postponed actions outlive their owner") {
            self.reset();
        }
    }
}

impl fmt::Debug for Postponer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, waiting) = (self.name, self.waiting());
        write!(f, "Postponer('{name}', {waiting} waiting)")
    }
}

/// One action that was postponed. Dropping this changes nothing.
pub struct PostponedAction {
    context: Arc<AioContext>,
    number: u64,
}

impl PostponedAction {
    /// It will not run, unless it already began or was cancelled; tells whether this was what kept
    /// it. Any thread.
    pub fn cancel(&self) -> bool {
        self.context.postponed.remove(self.number)
    }
}

impl fmt::Debug for PostponedAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostponedAction({})", self.number)
    }
}
