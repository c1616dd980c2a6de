//! A backend in its graph: how it comes there, what it holds and shares, and a new length.

use super::BlockBackend;
use super::root::Root;
use crate::drain::{Drain, Parent};
use crate::error::Result;
use crate::graph::{Graph, take_permissions};
use crate::node::Node;
use crate::types::Permissions;
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

impl BlockBackend {
    /// A user of `node`, give it back by [`BlockBackend::close`]. The first one of a node does what the
    /// node was opened for; later ones read, write what is not read-only, and let others do anything.
    ///
    /// # Panics
    /// When another user of the node does not let it: see [`BlockBackend::with_permissions`].
    #[track_caller]
    pub fn new(graph: &Arc<Graph>, node: Arc<Node>) -> BlockBackend {
        let permissions = node.for_user();
        BlockBackend::with_permissions(graph, node, permissions)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// A user of `node` that does and shares what `permissions` say.
    ///
    /// # Errors
    /// `Conflict` when another user of the node, or of one below, does not let it; what a driver
    /// says, `Locked` for one. Nothing has changed then.
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

    /// Does and shares from now on what `permissions` say.
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

    /// Makes the node `len` bytes long while requests go on (rule 8.2): drained, so that none is under
    /// way; then devices of all its users are told, and what was held back goes on. From a coroutine
    /// of any context, which has no request of its own in flight. Suspends.
    ///
    /// # Errors
    /// As [`BlockBackend::truncate`]. Devices are told when the length is another one all the same.
    ///
    /// # Panics
    /// When the coroutine holds a graph guard.
    pub fn resize(&self, co: &Co, len: u64) -> Result<()> {
        let node = self.node();
        let _section = node.drain(co);
        let before = node.len();
        let result = {
            let graph = self.graph.try_read(co)?;
            node.truncate(co, &graph, len, true)
        };
        self.graph.section(|section| {
            for user in node.parents(section) {
                user.node_changed(before, node.len(), section);
            }
        });
        result
    }
}
