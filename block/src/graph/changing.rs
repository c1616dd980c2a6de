//! Changes of one graph happen one after the other: transactions, and changes of length.
//!
//! A change calls what others have made, drivers and actions, in its own coroutine. What of that comes
//! back to change the same graph would wait for itself; it is refused, with both places named.

use super::Graph;
use coblock_coroutine::{Co, CoMutex, CoMutexGuard, ThreadLock};
use std::panic::Location;

/// Whose turn it is.
pub(super) struct Changing {
    turn: CoMutex<()>,
    /// By which coroutine, and from where.
    by: ThreadLock<Option<(u64, &'static Location<'static>)>>,
}

impl Default for Changing {
    fn default() -> Self {
        Changing {
            turn: CoMutex::new(()),
            by: ThreadLock::default(),
        }
    }
}

/// The turn of one change; it ends with this.
#[must_use = "dropped at once, it keeps no other change off"]
pub(crate) struct Turn<'a> {
    by: &'a ThreadLock<Option<(u64, &'static Location<'static>)>>,
    _turn: CoMutexGuard<'a, ()>,
}

impl Graph {
    /// The caller at `at` is the only one to change the graph from now on. Suspends while others do.
    ///
    /// # Panics
    /// As [`Graph::refuse_in_change`].
    pub(crate) fn change(&self, co: &Co, at: &'static Location<'static>) -> Turn<'_> {
        self.refuse_in_change(co, at);
        let turn = self.changing.turn.lock(co);
        *self.changing.by.lock() = Some((co.id(), at));
        Turn {
            by: &self.changing.by,
            _turn: turn,
        }
    }

    /// # Panics
    /// When this coroutine is in the middle of a change: `at` is in an action of a transaction, or in a
    /// driver that gets ready for one.
    pub(crate) fn refuse_in_change(&self, co: &Co, at: &'static Location<'static>) {
        let by = *self.changing.by.lock();
        if let Some((coroutine, begun)) = by
            && coroutine == co.id()
        {
            panic!(
                "rule 8.2: the graph is changed at {at}, in the middle of its change at {begun}: open \
                 nodes before a transaction, and make all changes steps of one"
            );
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.by.lock() = None;
    }
}
