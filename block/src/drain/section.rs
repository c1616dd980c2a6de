//! The lock of sections: who is quiesced changes only under it, and whoever is visited then is let
//! go after it.

use super::Parent;
use crate::graph::Graph;
use crate::node::Node;
use coblock_coroutine::{ThreadGuard, WakeHandle};
use std::panic::Location;
use std::sync::Arc;

/// How many nodes a section of all of them visits at a time; with a user each has some hundred
/// bytes that it looks at.
const GROUP: usize = 256;

/// The graph's lock of sections, held; and what is to be done when it is let go.
pub(crate) struct Section<'a> {
    /// How many sections of all nodes there are (rule 5.3).
    pub(super) all: ThreadGuard<'a, u32>,
    /// Requests that were held back, in the order in which they came.
    pub(crate) woken: Vec<WakeHandle>,
    /// What was looked at: perhaps the last references, whose destructors take the lock.
    pub(crate) parents: Vec<Arc<dyn Parent>>,
    pub(crate) nodes: Vec<Arc<Node>>,
}

impl Section<'_> {
    /// What a new node counts.
    pub(crate) fn all(&self) -> u32 {
        *self.all
    }

    /// Calls `f` with all nodes, so many at a time that a second look at them finds their memory in
    /// the processor's caches.
    pub(super) fn each_group(&mut self, graph: &Graph, mut f: impl FnMut(&mut Self, &[Arc<Node>])) {
        let mut after = 0;
        while let Some((last, nodes)) = graph.nodes_after(after, GROUP) {
            after = last;
            f(self, &nodes);
            self.nodes.extend(nodes);
        }
    }

    /// Every node and every user; users that hold no node, too.
    pub(super) fn gather(&mut self, graph: &Graph) {
        self.each_group(graph, |section, nodes| {
            for node in nodes {
                node.each_parent(section, |_, _| ());
            }
        });
        self.gather_without_node(graph);
    }

    pub(super) fn gather_without_node(&mut self, graph: &Graph) {
        let users = graph.all_without_node().into_iter();
        self.parents
            .extend(users.map(|user| user as Arc<dyn Parent>));
    }
}

impl Graph {
    /// Runs `f` under the lock of sections, then wakes whom it let go on.
    ///
    /// # Panics
    /// When the calling thread is under it already: a device or a driver called the graph in one of
    /// its callbacks. Names both places.
    #[track_caller]
    pub(crate) fn section<R>(&self, f: impl FnOnce(&mut Section<'_>) -> R) -> R {
        self.refuse_callbacks();
        let mut section = Section {
            all: self.sections.lock(),
            woken: Vec::new(),
            parents: Vec::new(),
            nodes: Vec::new(),
        };
        let inside = Inside::enter(self);
        let result = f(&mut section);
        drop(inside);
        let Section {
            all,
            woken,
            parents,
            nodes,
        } = section;
        drop(all);
        drop((parents, nodes));
        for handle in woken {
            handle.wake();
        }
        result
    }
}

impl Graph {
    #[track_caller]
    fn refuse_callbacks(&self) {
        let inside = *self.inside_section.lock();
        if let Some((thread, begun)) = inside
            && thread == std::thread::current().id()
        {
            panic!(
                "the graph is called at {}, from a callback of the change of sections at {begun}: \
                 devices and drivers are told under a lock of the graph, and do this later",
                Location::caller()
            );
        }
    }
}

/// Which thread is under the lock of sections, and where it took it.
struct Inside<'a>(&'a Graph);

impl<'a> Inside<'a> {
    #[track_caller]
    fn enter(graph: &'a Graph) -> Self {
        let here = (std::thread::current().id(), Location::caller());
        *graph.inside_section.lock() = Some(here);
        Inside(graph)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        *self.0.inside_section.lock() = None;
    }
}
