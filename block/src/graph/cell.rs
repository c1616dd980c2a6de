//! What only a writer of the graph changes and only who reads the graph sees: the node below an
//! edge. The one place of `unsafe` in this crate.
//!
//! ```text
//!   GraphRead    many, in every context        get: &T as long as the guard is borrowed
//!   GraphMain    the main home, uncounted      get
//!   GraphWrite   one, and none of the others   get; replace, by `&mut`
//! ```
//! Why that is sound: a `&T` from [`GraphCell::get`] lives no longer than the borrow of the proof that
//! was shown. [`GraphCell::replace`] needs a [`GraphWrite`] of the same graph, by an exclusive borrow.
//! While that one lives there is
//!
//! 1. no `GraphRead` of this graph: the lock gives the one out only while nobody has the other
//!    (rules 7.2, 7.5; its order is model-checked in `tests/loom_graph_lock.rs`). A guard that is
//!    forgotten is counted for ever, so that no writer comes any more;
//! 2. no `GraphMain` of it: `GraphLock` keeps both under one mutex, and panics (`graph/main.rs`);
//! 3. no second `GraphWrite`: the lock panics (rule 7.7);
//! 4. no `&T` from this `GraphWrite` itself: the exclusive borrow.
//!
//! What the writer stored is seen by readers that come after it, and what readers did with the old
//! value came before: entering and owning the lock are ordered by its fences.
//!
//! "Of the same graph" is checked at every access, in release too. The address of the lock stands for
//! the graph: proofs keep their graph alive, so those that live at one time and show one address are of
//! one graph.

#![expect(unsafe_code, reason = "the proof stands above")]

use super::{Graph, GraphMain, GraphRead, GraphWrite};
use crate::graph_lock::GraphLock;
use std::cell::UnsafeCell;
use std::fmt;

/// A proof that edges stay: [`GraphRead`], [`GraphWrite`] or [`GraphMain`].
pub trait GraphAccess: sealed::Lock {}

impl<T: sealed::Lock> GraphAccess for T {}

mod sealed {
    /// # Safety
    /// While a value of the type is borrowed nobody has an exclusive borrow of a
    /// [`GraphWrite`](super::GraphWrite) of the graph whose lock this is.
    pub unsafe trait Lock {
        /// Address of that lock.
        fn lock(&self) -> usize;
    }
}

// SAFETY: it is counted until it is dropped, and the lock has no writer meanwhile.
unsafe impl sealed::Lock for GraphRead<'_> {
    #[inline(always)]
    fn lock(&self) -> usize {
        address(self.locked.lock())
    }
}

// SAFETY: there is one writer at most, so an exclusive borrow would be one of this very value.
unsafe impl sealed::Lock for GraphWrite<'_> {
    fn lock(&self) -> usize {
        address(&self.graph().lock)
    }
}

// SAFETY: the lock refuses a writer while it is entered, and to enter it while there is a writer.
unsafe impl sealed::Lock for GraphMain<'_> {
    fn lock(&self) -> usize {
        address(&self.graph().lock)
    }
}

/// Something that only a writer of the graph changes and only who reads it sees; belongs to one
/// graph.
pub struct GraphCell<T> {
    /// Address of the lock of its graph.
    lock: usize,
    value: UnsafeCell<T>,
}

// SAFETY: readers of many contexts get `&T`, hence `T: Sync`; the writer takes values out that others
// made, hence `T: Send`. That nobody reads while the writer writes is shown above.
unsafe impl<T: Send + Sync> Sync for GraphCell<T> {}

impl<T> GraphCell<T> {
    /// In `graph`, holding `value`.
    pub fn new(graph: &Graph, value: T) -> Self {
        GraphCell {
            lock: address(&graph.lock),
            value: UnsafeCell::new(value),
        }
    }

    /// What it holds.
    ///
    /// # Panics
    /// When `graph` is a proof about another graph.
    #[inline(always)]
    pub fn get<'g>(&'g self, graph: &'g impl GraphAccess) -> &'g T {
        self.check(graph);
        // SAFETY: the pointer comes from a cell that lives for `'g`. A write to it needs an exclusive
        // borrow of a `GraphWrite` of this graph, which does not overlap with the borrow of `graph`,
        // see `sealed::Lock`; and `graph` is about this graph, as was just checked.
        unsafe { &*self.value.get() }
    }

    /// Puts `value` in its place, and gives back what was there.
    ///
    /// # Panics
    /// When `graph` is another graph.
    pub fn replace(&self, graph: &mut GraphWrite<'_>, value: T) -> T {
        self.check(graph);
        // SAFETY: the pointer comes from a cell that lives. No reference into it does: each is bound to
        // the borrow of a proof about this graph, and none of these is borrowed while the writer of
        // this graph is borrowed exclusively, which was just checked to be its writer. Nothing of `T`
        // runs meanwhile.
        unsafe { self.value.get().replace(value) }
    }

    #[inline(always)]
    fn check(&self, graph: &impl GraphAccess) {
        if graph.lock() != self.lock {
            another_graph();
        }
    }
}

#[inline(always)]
fn address(lock: &GraphLock) -> usize {
    std::ptr::from_ref(lock).addr()
}

#[cold]
#[track_caller]
fn another_graph() -> ! {
    panic!("rule 7.9: a guard of one graph is shown for an edge of another")
}

impl<T> fmt::Debug for GraphCell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GraphCell")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coblock_aio::{ContextOptions, EngineKind, Home};

    fn world() -> (Home, std::sync::Arc<Graph>) {
        let home = Home::new(ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named("main")
        })
        .expect("a context");
        let graph = Graph::new(home.context());
        (home, graph)
    }

    /// Rule 7.9: readers see what the last writer put there; values are dropped once each.
    #[test]
    fn rule_7_9_a_cell_gives_what_the_last_writer_put_there() {
        let (home, graph) = world();
        let value = std::sync::Arc::new(1);
        let cell = GraphCell::new(&graph, value.clone());
        home.run(|co| assert_eq!(**cell.get(&graph.read(co)), 1));
        let before = home.with(|| {
            let mut write = graph.write();
            assert_eq!(**cell.get(&write), 1);
            let before = cell.replace(&mut write, std::sync::Arc::new(2));
            assert_eq!(**cell.get(&write), 2);
            before
        });
        home.run(|co| assert_eq!(**cell.get(&graph.read(co)), 2));
        home.with(|| assert_eq!(graph.read_in_main(|main| **cell.get(main)), 2));
        drop(before);
        assert_eq!(std::sync::Arc::strong_count(&value), 1);
        drop(cell);
        drop(graph);
        home.close();
    }

    /// Rule 7.9: a guard proves something about its own graph only.
    #[test]
    #[should_panic(expected = "a guard of one graph is shown for an edge of another")]
    fn rule_7_9_a_guard_of_another_graph_proves_nothing() {
        let (home, graph) = world();
        let other = Graph::new(home.context());
        let cell = GraphCell::new(&other, 1);
        home.with(|| graph.read_in_main(|main| *cell.get(main)));
    }

    /// The same for the writer.
    #[test]
    #[should_panic(expected = "a guard of one graph is shown for an edge of another")]
    fn rule_7_9_a_writer_of_another_graph_changes_nothing() {
        let (home, graph) = world();
        let other = Graph::new(home.context());
        let cell = GraphCell::new(&other, 1);
        home.with(|| {
            let mut write = graph.write();
            cell.replace(&mut write, 2)
        });
    }
}
