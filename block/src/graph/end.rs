//! The lower end of an edge: which node it leads to.

use super::permissions;
use super::{Graph, GraphAccess, GraphCell, GraphWrite};
use crate::drain::{Parent, Section};
use crate::node::Node;
use crate::types::{Perm, Permissions};
use coblock_coroutine::ThreadLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The node that an edge or a backend leads to. Owns it.
pub(crate) struct End {
    /// For requests, and for all who hold a guard.
    seen: GraphCell<Arc<Node>>,
    /// The same for who holds none: it may lead elsewhere right after the look.
    known: ThreadLock<Arc<Node>>,
    /// What this user does with the node and lets others do. Changed under the lock of sections.
    permissions: ThreadLock<Permissions>,
    /// Is writing among them? For requests.
    writes: AtomicBool,
}

impl End {
    pub(crate) fn new(graph: &Graph, node: Arc<Node>, permissions: Permissions) -> Self {
        End {
            seen: GraphCell::new(graph, node.clone()),
            known: ThreadLock::new(node),
            permissions: ThreadLock::new(permissions),
            writes: AtomicBool::new(permissions.held.contains(Perm::WRITE)),
        }
    }

    #[inline(always)]
    pub(crate) fn get<'g>(&'g self, graph: &'g impl GraphAccess) -> &'g Arc<Node> {
        self.seen.get(graph)
    }

    pub(crate) fn permissions(&self) -> Permissions {
        *self.permissions.lock()
    }

    pub(crate) fn set_permissions(&self, permissions: Permissions) {
        *self.permissions.lock() = permissions;
        let writes = permissions.held.contains(Perm::WRITE);
        self.writes.store(writes, Ordering::Relaxed);
    }

    /// Does this user hold the permission to write?
    #[inline(always)]
    pub(crate) fn writes(&self) -> bool {
        self.writes.load(Ordering::Relaxed)
    }

    pub(crate) fn now(&self) -> Arc<Node> {
        self.known.lock().clone()
    }

    /// `user`, whose end this is, gives the node up; the node, if that was its last user. `let_go`
    /// undoes what the node did to it in drained sections.
    pub(crate) fn leave<P: Parent>(
        &self,
        user: &P,
        let_go: impl FnOnce(&mut Section<'_>),
    ) -> Option<Arc<Node>> {
        self.now().in_section(|section| {
            // Looked at again: under the lock it does not lead elsewhere.
            let node = self.now();
            let last = node.leave(user);
            if let Some(section) = section {
                let_go(section);
                if !last {
                    permissions::relax(&node, section);
                }
            }
            last.then_some(node)
        })
    }

    /// Leads to `node` from now on; gives back where it led to.
    pub(crate) fn replace(&self, graph: &mut GraphWrite<'_>, node: Arc<Node>) -> Arc<Node> {
        let known = std::mem::replace(&mut *self.known.lock(), node.clone());
        drop(known);
        self.seen.replace(graph, node)
    }
}
