//! A backend in its graph: how it comes there, what it holds and shares, and a new length.

use super::BlockBackend;
use super::root::Root;
use crate::drain::{Drain, Parent, refuse_guard};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, Transaction, take_permissions};
use crate::node::Node;
use crate::request_table::RequestKind;
use crate::types::Permissions;
use coblock_aio::AioContext;
use coblock_coroutine::Co;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

impl BlockBackend {
    /// A user of `node`, give it back by [`BlockBackend::close`]. The first one of a node does what the
    /// node was opened for; later ones read, write what is not read-only, and let others do anything.
    ///
    /// # Panics
    /// When another user of the node does not let it, and when it is closed: see
    /// [`BlockBackend::with_permissions`].
    #[track_caller]
    pub fn new(graph: &Arc<Graph>, node: Arc<Node>) -> BlockBackend {
        let permissions = node.for_user();
        BlockBackend::with_permissions(graph, node, permissions)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// A user of `node` that does and shares what `permissions` say.
    ///
    /// # Errors
    /// `Conflict` when another user of the node, or of one below, does not let it; `Closed` for a node
    /// that is closed, or is being closed; what a driver says, `Locked` for one. Nothing has changed
    /// then.
    #[track_caller]
    pub fn with_permissions(
        graph: &Arc<Graph>,
        node: Arc<Node>,
        permissions: Permissions,
    ) -> Result<BlockBackend> {
        let root = Root::new(graph, node.clone(), permissions);
        let parent: Arc<dyn Parent> = root.clone();
        node.add_user(&parent)?;
        Ok(BlockBackend {
            graph: graph.clone(),
            root,
            detached: AtomicBool::new(false),
        })
    }

    /// Does and shares from now on what `permissions` say. A write that is in flight ends as it began:
    /// who gives up writing waits for his own first, or drains the node.
    /// [`Transaction::set_permissions`] does so, and goes together with a reopen of the node.
    ///
    /// # Errors
    /// As [`BlockBackend::with_permissions`]; nothing has changed then.
    #[track_caller]
    pub fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        self.graph.section(|section| {
            let end = &self.root.end;
            let before = end.permissions();
            end.set_permissions(permissions);
            let taken = take_permissions(&end.now(), section);
            if taken.is_err() {
                end.set_permissions(before);
            }
            taken
        })
    }

    /// Where the node lives: [`Node::home_context`].
    pub fn home_context(&self) -> Arc<AioContext> {
        self.node().home_context()
    }

    /// The node, and all that is connected with it, gets the home `context` (rule 8.3): all of it is
    /// drained, and what drivers do by themselves goes on there. Requests come from any context, as
    /// before. From a coroutine of any context, which has no request of its own in flight. Suspends.
    ///
    /// # Errors
    /// As [`Transaction::run`]; `Conflict` when another backend or a device does not allow it, `Closed`
    /// when a context has ended. Nothing has changed then.
    ///
    /// # Panics
    /// When the coroutine holds a graph guard.
    #[track_caller]
    pub fn move_to(&self, co: &Co, context: &Arc<AioContext>) -> Result<()> {
        let mut transaction = Transaction::new(&self.graph);
        transaction.moves(&self.node(), context, Some(self.as_parent()));
        transaction.run(co)
    }

    /// May the node move by the wish of others than this backend? Not unless it is told: then
    /// [`BlockBackend::move_to`] of another backend that is connected with it is refused.
    pub fn allow_moves(&self, on: bool) {
        self.root.allow_moves(on);
    }

    /// Makes the node `len` bytes long while requests go on (rule 8.2): drained, so that none is under
    /// way, in the home context of the node; there devices of all its users are told, and what was
    /// held back goes on. From a coroutine of any context, which has no request of its own in flight.
    /// Suspends.
    ///
    /// # Errors
    /// As [`BlockBackend::truncate`]. Devices are told when the length is another one all the same.
    /// `OutOfMemory` where there is none for a coroutine in the home context.
    ///
    /// # Panics
    /// When the coroutine holds a graph guard; in an [`Action`](crate::Action) of the graph.
    #[track_caller]
    pub fn resize(&self, co: &Co, len: u64) -> Result<()> {
        refuse_guard(co, "resizes");
        // So that the node does not move meanwhile.
        let _one_at_a_time = self.graph.change(co, Location::caller());
        let node = self.node();
        let _section = node.drain(co);
        in_home_of(co, &node, |co| {
            let before = node.len();
            let result = {
                let graph = self.graph.try_read(co)?;
                self.check_writes(&graph, RequestKind::Truncate)?;
                node.truncate(co, &graph, len, true)
            };
            self.graph.section(|section| {
                for user in node.parents(section) {
                    user.node_changed(before, node.len(), section);
                }
            });
            result
        })
    }
}

/// Runs `f` in the home context of `node`, or here where that has ended. Suspends.
fn in_home_of(co: &Co, node: &Node, f: impl FnOnce(&Co) -> Result<()> + Send) -> Result<()> {
    let home = node.home_context();
    if home.is_current() || home.has_ended() {
        return f(co);
    }
    let ran = coblock_aio::co::run_in(co, &home, "resize", f);
    ran.unwrap_or_else(|error| Err(Error::new(ErrorKind::OutOfMemory, error.to_string())))
}
