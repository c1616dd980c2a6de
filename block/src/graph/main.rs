//! Reading the graph in the main home without counting (rule 7.8).
//!
//! Only the main home writes, so code there that neither polls nor suspends needs no count. What it
//! gets is a closure: while that runs, polls of the thread are refused, and so is a writer.

use super::Graph;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;

impl Graph {
    /// Calls `f` with a proof that edges stay, which costs no count (rule 7.8).
    ///
    /// Only in the home of the main context, outside of coroutines. Inside, the thread does not poll
    /// and nobody locks the graph for writing: both panic.
    ///
    /// # Panics
    /// Elsewhere, and under the write lock (rule 7.7).
    #[track_caller]
    pub fn read_in_main<R>(self: &Arc<Graph>, f: impl FnOnce(&GraphMain<'_>) -> R) -> R {
        let at = Location::caller();
        let main = self.main_context();
        assert!(
            main.is_current() && !coblock_coroutine::in_coroutine(),
            "rule 7.8: the graph is read without counting at {at}, which is in a coroutine or outside \
             of its main context '{}'",
            main.name()
        );
        let _reading = self.lock.read_in_main(at);
        let _still = coblock_aio::refuse_polls("rule 7.8: the graph is read without counting");
        f(&GraphMain { graph: self })
    }
}

/// The proof that edges stay, in the main home, without counting: see [`Graph::read_in_main`].
///
/// Nothing that it shows comes out of the closure:
/// ```compile_fail
/// # use {coblock_block::{Graph, Node}, std::sync::Arc};
/// fn keep(graph: &Arc<Graph>, node: &Node) {
///     let children = graph.read_in_main(|main| node.children(main));
/// }
/// ```
pub struct GraphMain<'a> {
    graph: &'a Arc<Graph>,
}

impl<'a> GraphMain<'a> {
    /// The graph that is read.
    pub fn graph(&self) -> &'a Arc<Graph> {
        self.graph
    }
}

impl fmt::Debug for GraphMain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GraphMain of {:?}", self.graph)
    }
}
