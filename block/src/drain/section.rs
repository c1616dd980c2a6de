//! The lock of sections: who is quiesced changes only under it, and whoever is visited then is let
//! go after it.

use super::Parent;
use crate::graph::Graph;
use crate::node::Node;
use crate::request_table::Wake;
use coblock_coroutine::{ThreadGuard, WakeHandle};
use std::panic::Location;
use std::sync::Arc;
use std::thread::ThreadId;

/// How many nodes a section of all of them visits at a time; with a user each has some hundred
/// bytes that it looks at.
const GROUP: usize = 256;

/// The graph's lock of sections, held; and what is to be done when it is let go.
pub(crate) struct Section<'a> {
    /// How many sections of all nodes there are (rule 5.3).
    pub(super) all: ThreadGuard<'a, u32>,
    /// Rule 5.9: the section that begins stops threads of devices first, and holds nothing back that
    /// they may wait for.
    pub(crate) threads_run: bool,
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
            threads_run: false,
            woken: Vec::new(),
            parents: Vec::new(),
            nodes: Vec::new(),
        };
        let inside = Inside::enter(self);
        let result = f(&mut section);
        let kicked = inside.leave();
        let Section {
            all,
            woken,
            parents,
            nodes,
            ..
        } = section;
        drop(all);
        drop((parents, nodes));
        for handle in woken {
            handle.wake();
        }
        for wake in kicked {
            wake.wake();
        }
        result
    }
}

impl Graph {
    #[track_caller]
    fn refuse_callbacks(&self) {
        let inside = self.inside_section.lock();
        let Some(begun) = inside.as_ref().and_then(InSection::of_this_thread) else {
            return;
        };
        drop(inside);
        panic!(
            "the graph is called at {}, from a callback of the change of sections at {begun}: \
             devices and drivers are told under a lock of the graph, and do this later",
            Location::caller()
        );
    }

    /// Wakes who waits for what ended. From a callback that is told under the lock of sections only
    /// once that is let go: who goes on may take it.
    pub(crate) fn wake_outside(&self, wakes: Vec<Wake>) {
        if let Some(inside) = self.inside_section.lock().as_mut()
            && inside.of_this_thread().is_some()
        {
            inside.kicked.extend(wakes);
            return;
        }
        for wake in wakes {
            wake.wake();
        }
    }
}

/// Who is under the lock of sections.
pub(crate) struct InSection {
    thread: ThreadId,
    /// Where it took it.
    begun: &'static Location<'static>,
    /// To be woken when it is let go.
    kicked: Vec<Wake>,
}

impl InSection {
    /// Where this thread took it, if it did.
    fn of_this_thread(&self) -> Option<&'static Location<'static>> {
        (self.thread == std::thread::current().id()).then_some(self.begun)
    }
}

struct Inside<'a>(&'a Graph);

impl<'a> Inside<'a> {
    #[track_caller]
    fn enter(graph: &'a Graph) -> Self {
        *graph.inside_section.lock() = Some(InSection {
            thread: std::thread::current().id(),
            begun: Location::caller(),
            kicked: Vec::new(),
        });
        Inside(graph)
    }

    /// Who was kicked meanwhile.
    fn leave(self) -> Vec<Wake> {
        let inside = self.0.inside_section.lock().take();
        inside.map_or_else(Vec::new, |inside| inside.kicked)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let inside = self.0.inside_section.lock().take();
        drop(inside);
    }
}
