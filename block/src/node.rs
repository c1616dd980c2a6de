//! A node: one driver, its place in the graph, and what all its requests share.
//!
//! ```text
//!   opening --publish--> open --last user goes--> closing --nothing in flight--> closed
//! ```
//! How requests go through a node is in `io/`. A node has *users*: edges from parents, and
//! backends. When the last one goes, [`close_unused`] closes it and then, one after the other and
//! without recursion, what only it used.

use crate::child::Child;
use crate::driver::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphCell, GraphRead};
use crate::request_table::RequestTable;
use crate::types::{ChildRole, FileId, Limits, MAX_LENGTH};
use coblock_coroutine::{Co, CoMutex};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// One node of the graph.
///
/// Its requests come through a [`Child`] or a [`BlockBackend`](crate::BlockBackend); a driver,
/// which has neither for its own node, cannot send any to it (rule 2.7):
/// ```compile_fail,E0624
/// # use {coblock_block::{GraphRead, Node}, coblock_coroutine::Co};
/// fn own(node: &Node, co: &Co, graph: &GraphRead<'_>) {
///     let _ = node.flush(co, graph);
/// }
/// ```
pub struct Node {
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) requests: RequestTable,
    pub(crate) limits: Limits,
    whole_limits: Limits,
    /// Length in bytes: the driver's, raised by writes past it.
    pub(crate) len: AtomicU64,
    pub(crate) read_only: bool,
    pub(crate) growable: bool,
    /// Discards and `MAY_UNMAP` reach the driver.
    pub(crate) discard: bool,
    /// Flushes of this node's own storage are skipped: its owner said that it may be lost.
    pub(crate) no_flush: bool,
    /// Something was written since the last flush began. Set after a write completed, cleared
    /// before a flush starts: so a write that completes during a flush is not taken for flushed.
    pub(crate) unflushed: AtomicBool,
    /// A flush of this node's own storage failed. Never cleared.
    pub(crate) poisoned: AtomicBool,
    /// One flush at a time; the next one then often finds nothing to do.
    pub(crate) flushing: CoMutex<()>,
    name: String,
    filename: String,
    graph: Weak<Graph>,
    children: GraphCell<Vec<Arc<Child>>>,
    users: AtomicUsize,
    file_id: Option<FileId>,
}

/// What `open` knows about a node that it makes.
pub(crate) struct NodeParts {
    pub(crate) name: String,
    pub(crate) filename: String,
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    pub(crate) no_flush: bool,
    pub(crate) driver: Box<dyn Driver>,
    /// Limits of what lies below, and its role.
    pub(crate) below: Vec<(Limits, ChildRole)>,
    pub(crate) file_id: Option<FileId>,
}

impl Node {
    /// Makes a node whose name is reserved. It is published by [`Node::publish`].
    pub(crate) fn new(graph: &Arc<Graph>, parts: NodeParts) -> Result<Arc<Node>> {
        let NodeParts {
            name,
            filename,
            read_only,
            discard,
            no_flush,
            driver,
            below,
            file_id,
        } = parts;
        let limits = driver.limits();
        limits.assert_sane(driver.format());
        let len = driver.len();
        if len > MAX_LENGTH {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("A length of {len} bytes is above the limit of {MAX_LENGTH}"),
            )
            .at_file(&filename));
        }
        graph.count_node();
        Ok(Arc::new(Node {
            requests: RequestTable::new(),
            limits,
            whole_limits: below
                .iter()
                .fold(limits, |all, (below, role)| all.through(below, *role)),
            len: AtomicU64::new(len),
            read_only,
            growable: driver.is_growable(),
            discard,
            no_flush,
            unflushed: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            flushing: CoMutex::new(()),
            name,
            filename,
            graph: Arc::downgrade(graph),
            children: GraphCell::empty(),
            users: AtomicUsize::new(0),
            file_id,
            driver,
        }))
    }

    /// Gives the node its edges and makes it findable.
    pub(crate) fn publish(self: &Arc<Node>, graph: &Arc<Graph>, children: Vec<Arc<Child>>) {
        for child in &children {
            child.set_parent(self);
        }
        self.children.set(children);
        graph.add_node(self);
    }

    pub(crate) fn add_user(&self) {
        self.users.fetch_add(1, Ordering::AcqRel);
    }

    /// `true` if that was the last one.
    pub(crate) fn remove_user(&self) -> bool {
        let before = self.users.fetch_sub(1, Ordering::AcqRel);
        assert!(
            before > 0,
            "node '{}' loses a user that it does not have",
            self.name
        );
        before == 1
    }

    /// How many edges and backends use the node.
    pub fn users(&self) -> usize {
        self.users.load(Ordering::Acquire)
    }

    /// Name in the graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the file below, for messages; empty where there is none.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// Name of the driver.
    pub fn format(&self) -> &'static str {
        self.driver.format()
    }

    /// The driver, for who knows its type ([`Driver::as_any`]).
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Are writes refused?
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Is it zero bytes long?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the driver does in one request.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What a request may be so that nobody below has to pad, copy or take it apart: the limits of
    /// all nodes down to where the data is. Anything else works too, at that price.
    pub fn whole_limits(&self) -> &Limits {
        &self.whole_limits
    }

    /// The edges to its children.
    pub fn children<'g>(&'g self, graph: &'g GraphRead<'_>) -> &'g [Arc<Child>] {
        self.children.try_get(graph).map_or(&[], Vec::as_slice)
    }

    /// File of the host on which the node stands, through its storage.
    pub fn file_id(&self) -> Option<FileId> {
        self.file_id
    }

    /// Requests in flight on this node.
    pub fn in_flight(&self) -> usize {
        self.requests.in_flight()
    }

    /// Requests in flight on this node, with what they do: for tests and people.
    pub fn requests(&self) -> &RequestTable {
        &self.requests
    }

    /// The error of a request to a node that is closed.
    #[cold]
    pub(crate) fn closed(&self) -> Error {
        self.locate(Error::new(ErrorKind::Closed, "The node is closed"))
    }

    /// Names node and file in an error that comes from here.
    #[cold]
    pub(crate) fn locate(&self, error: Error) -> Error {
        let error = error.at_node(&self.name);
        if self.filename.is_empty() {
            error
        } else {
            error.at_file(&self.filename)
        }
    }

    /// Waits for nothing in flight, flushes, closes the driver (rule 5.7). Later calls do nothing.
    fn close(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        if !self.requests.close() {
            return Ok(());
        }
        self.requests.wait_idle(co);
        // Both are done whatever happens; the first failure is told.
        let flushed = if self.read_only {
            Ok(())
        } else {
            self.flush_driver(co, graph)
        };
        let closed = self
            .driver
            .close(co, graph)
            .map_err(|error| self.locate(error));
        assert_eq!(
            self.requests.in_flight(),
            0,
            "node '{}' has requests after close",
            self.name
        );
        flushed.and(closed)
    }
}

/// Closes a node without users, then what only it used. Suspends; returns the first failure after
/// having closed all.
///
/// # Errors
/// `InUse` when somebody uses it, then nothing was done; else what flushing or a driver's close
/// returned.
pub fn close_unused(co: &Co, graph: &Arc<Graph>, node: Arc<Node>) -> Result<()> {
    if node.users() != 0 {
        return Err(node.locate(Error::new(ErrorKind::InUse, "The node is in use")));
    }
    let mut result = Ok(());
    let mut unused = vec![node];
    let guard = graph.read(co);
    let mut at = 0;
    // Top down, and all are kept until the end: a chain is taken apart without recursion.
    while let Some(node) = unused.get(at).cloned() {
        at += 1;
        result = result.and(node.close(co, &guard));
        for child in node.children(&guard) {
            if child.detach() {
                unused.push(child.below().clone());
            }
        }
    }
    drop(guard);
    for node in unused {
        drop(node);
    }
    result
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.upgrade() {
            graph.forget_node(&self.name);
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("format", &self.format())
            .field("filename", &self.filename)
            .field("len", &self.len())
            .field("read_only", &self.read_only)
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}

const _: () = {
    const fn send_sync<T: Send + Sync + ?Sized>() {}
    send_sync::<Node>();
    send_sync::<Child>();
    send_sync::<Graph>();
    send_sync::<RequestTable>();
    send_sync::<dyn Driver>();
};
