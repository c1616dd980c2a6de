//! Changing the graph: the main home, alone (rules 7.5 to 7.7).

use super::Graph;
use crate::drain::Quiesced;
use crate::graph_lock::WriteLocked;
use coblock_aio::RefusePolls;
use coblock_coroutine::mutant;
use std::fmt;
use std::sync::Arc;

impl Graph {
    /// Takes the graph lock for writing (rule 7.5). Keeps new requests away, then polls the main
    /// context until no coroutine reads the graph; what runs meanwhile may read it and even change
    /// it.
    ///
    /// Only the home of the main context may, outside of coroutines. While the guard lives that
    /// home does not poll, and readers wait.
    ///
    /// # Panics
    /// Rules 7.5, 7.7: in a coroutine; elsewhere than in the home of the main context
    /// ([`coblock_aio::Home::with`] outside of callbacks); when the graph is locked for writing
    /// already. With a panic of what runs meanwhile.
    #[track_caller]
    pub fn write(self: &Arc<Graph>) -> GraphWrite<'_> {
        let main = self.main_context();
        assert!(
            main.is_current(),
            "rule 7.5: the graph is locked for writing outside of its main context '{}'",
            main.name()
        );
        let still = || coblock_aio::refuse_polls("rule 7.5: the graph is locked for writing");
        // Without waiting: only so that readers do not arrive for ever.
        let quiesced = match mutant!("requests come while a writer waits") {
            true => None,
            false => Some(Quiesced::all(self)),
        };
        let locked = self.lock.write(|condition| {
            self.wait.wait_while(main, condition);
        });
        GraphWrite {
            held: Some((still(), locked, quiesced)),
            graph: self,
        }
    }
}

impl Graph {
    /// The same, once and without waiting; in the main home, outside of coroutines. `None`: there
    /// are readers. The caller has announced a writer and quiesced the nodes.
    pub(super) fn try_write(self: &Arc<Graph>) -> Option<GraphWrite<'_>> {
        let locked = self.lock.try_write()?;
        let still = coblock_aio::refuse_polls("rule 7.5: the graph is locked for writing");
        Some(GraphWrite {
            held: Some((still, locked, None)),
            graph: self,
        })
    }
}

/// The graph lock, held for writing: the proof that nobody else looks at an edge.
///
/// Belongs to the home of the main context:
/// ```compile_fail,E0277
/// fn send<T: Send>() {}
/// send::<coblock_block::GraphWrite<'static>>();
/// ```
pub struct GraphWrite<'a> {
    /// Until it is dropped; in the order in which it ends.
    held: Option<(RefusePolls, WriteLocked<'a>, Option<Quiesced>)>,
    graph: &'a Arc<Graph>,
}

impl<'a> GraphWrite<'a> {
    /// The graph that is locked.
    pub fn graph(&self) -> &'a Arc<Graph> {
        self.graph
    }
}

impl Drop for GraphWrite<'_> {
    /// Rule 7.6: readers that waited are woken, and what was put off until the end of the section
    /// is done on return.
    fn drop(&mut self) {
        drop(self.held.take());
        if !std::thread::panicking() {
            coblock_aio::poll(false);
        }
    }
}

impl fmt::Debug for GraphWrite<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GraphWrite of {:?}", self.graph)
    }
}
