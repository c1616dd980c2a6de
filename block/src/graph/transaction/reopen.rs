//! Other options for a node that stays open.

use super::Action;
use crate::error::Result;
use crate::graph::{Graph, GraphWrite};
use crate::node::Node;
use coblock_coroutine::Co;
use std::sync::Arc;

/// Options that a node may get while it is open; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reopen {
    /// Refuse writes. A driver that knows its own state only as it was opened does not support it.
    pub read_only: Option<bool>,
    /// Let discards reach the driver (`discard=unmap`).
    pub discard: Option<bool>,
    /// Skip flushes of the node's own storage (`cache.no-flush`).
    pub no_flush: Option<bool>,
}

/// The part of that which is the driver's.
pub(super) struct Reopening {
    graph: Arc<Graph>,
    node: Arc<Node>,
    to: Reopen,
}

impl Reopening {
    pub(super) fn new(graph: Arc<Graph>, node: Arc<Node>, to: Reopen) -> Self {
        Reopening { graph, node, to }
    }

    /// Does its access change, and to what?
    fn access(&self) -> Option<bool> {
        let to = self.to.read_only?;
        (to != self.node.is_read_only()).then_some(to)
    }
}

impl Action for Reopening {
    fn prepare(&mut self, co: &Co) -> Result<()> {
        let Some(read_only) = self.access() else {
            return Ok(());
        };
        let guard = self.graph.read(co);
        let ready = self.node.driver().reopen_prepare(co, &guard, read_only);
        ready.map_err(|error| self.node.locate(error))
    }

    fn commit(&mut self, graph: &mut GraphWrite<'_>) {
        if self.access().is_some() {
            self.node.driver().reopen_commit(graph);
        }
        self.node.set_switches(self.to);
    }

    fn abort(&mut self, co: &Co) {
        if self.access().is_some() {
            self.node.driver().reopen_abort(co);
        }
    }
}
