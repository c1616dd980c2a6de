//! Who has the lock, how often, and who is next.
//!
//! ```text
//!   free --acquire--> owned, levels = n --last release, nobody waits--> free
//!                         |  ^
//!                         |  '-- handed to the first in line: never free while somebody waits
//!                         '----- last release, somebody waits
//! ```
//! `contended` is called without the mutex: when a thread begins to wait, and by a new owner behind
//! whom others wait. The second matters: what the first call did may have served an earlier owner.
//!
//! `super::sync` has the mutex of std, or of loom where this file is model-checked.

use super::sync::{Condvar, Mutex, ThreadId, current};
use std::collections::VecDeque;
use std::fmt;

struct Owner<P> {
    thread: ThreadId,
    levels: u32,
    place: P,
}

struct State<P> {
    owner: Option<Owner<P>>,
    queue: VecDeque<Owner<P>>,
}

/// A recursive lock, first come first served. `P` says where it was taken.
pub(crate) struct Turns<P> {
    state: Mutex<State<P>>,
    changed: Condvar,
}

impl<P: Copy> Turns<P> {
    pub(crate) fn new() -> Self {
        Turns {
            state: Mutex::new(State {
                owner: None,
                queue: VecDeque::new(),
            }),
            changed: Condvar::new(),
        }
    }

    /// Takes `levels` of the lock; blocks.
    pub(crate) fn acquire(&self, levels: u32, place: P, contended: impl Fn()) {
        let thread = current().id();
        let mut state = self.state.lock().expect("nothing panics under it");
        let me = Owner {
            thread,
            levels,
            place,
        };
        match &mut state.owner {
            None => {
                state.owner = Some(me);
                return;
            }
            Some(owner) if owner.thread == thread => {
                owner.levels += levels;
                return;
            }
            Some(_) => state.queue.push_back(me),
        }
        drop(state);
        contended();
        let mut state = self.state.lock().expect("nothing panics under it");
        while state
            .owner
            .as_ref()
            .is_none_or(|owner| owner.thread != thread)
        {
            state = self.changed.wait(state).expect("nothing panics under it");
        }
        let more = !state.queue.is_empty();
        drop(state);
        if more {
            contended();
        }
    }

    /// Gives one level back.
    ///
    /// # Errors
    /// The thread does not have the lock: where the owner took it, if there is one.
    pub(crate) fn release(&self) -> Result<(), Option<P>> {
        let mut state = self.state.lock().expect("nothing panics under it");
        let thread = current().id();
        match &mut state.owner {
            Some(owner) if owner.thread == thread && owner.levels > 1 => owner.levels -= 1,
            Some(owner) if owner.thread == thread => self.hand_over(&mut state),
            owner => return Err(owner.as_ref().map(|owner| owner.place)),
        }
        Ok(())
    }

    /// Gives everything back that this thread has; how much that was.
    pub(crate) fn release_all(&self) -> u32 {
        let mut state = self.state.lock().expect("nothing panics under it");
        let levels = levels_of(&state);
        if levels > 0 {
            self.hand_over(&mut state);
        }
        levels
    }

    pub(crate) fn levels(&self) -> u32 {
        levels_of(&self.state.lock().expect("nothing panics under it"))
    }

    fn hand_over(&self, state: &mut State<P>) {
        state.owner = state.queue.pop_front();
        if state.owner.is_some() {
            // Each waiter looks whether it is the one.
            self.changed.notify_all();
        }
    }
}

fn levels_of<P>(state: &State<P>) -> u32 {
    let mine = |owner: &&Owner<P>| owner.thread == current().id();
    let owner = state.owner.as_ref().filter(mine);
    owner.map_or(0, |owner| owner.levels)
}

impl<P: fmt::Display> fmt::Debug for Turns<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock().expect("nothing panics under it");
        match &state.owner {
            None => f.write_str("free"),
            Some(owner) => write!(
                f,
                "{} level(s) of {:?} since {}, {} wait",
                owner.levels,
                owner.thread,
                owner.place,
                state.queue.len()
            ),
        }
    }
}
