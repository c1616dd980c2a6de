//! A node: one driver, its place in the graph, and what all its requests share.
//!
//! ```text
//!   opening --publish--> open --last user goes--> closing --nothing in flight--> closed
//! ```
//! How requests go through a node is in `io/`. A node has *users*: edges from parents, and
//! backends. When the last one goes, [`close_unused`] closes it and then, one after the other and
//! without recursion, what only it used.

mod serving;

use crate::backend::Stopping;
use crate::child::Child;
use crate::drain::{Busy, Collected, Parent, Section};
use crate::driver::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphRead, Reopen, take_permissions};
use crate::options::Options;
use crate::request_table::RequestTable;
use crate::types::{ChildRole, FileId, Limits, MAX_LENGTH, Perm, Permissions};
use coblock_aio::{AioContext, Resident};
use coblock_coroutine::{Co, CoMutex, ThreadLock, mutant};
use serving::Served;
pub(crate) use serving::{Edges, Serving};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
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
// In this order: what sections and requests touch lies together, before the cold rest.
#[repr(C)]
pub struct Node {
    /// Drained sections that this node is in. Changed under the graph's lock of sections.
    sections: AtomicU32,
    /// Coroutines whose section of this node is about to begin (rule 5.1).
    beginning: AtomicU32,
    /// Edges and backends above.
    parents: ThreadLock<Vec<Weak<dyn Parent>>>,
    /// Length in bytes: the driver's, raised by writes past it.
    pub(crate) len: AtomicU64,
    read_only: AtomicBool,
    /// Something was written since the last flush began. Set after a write completed, cleared
    /// before a flush starts: so a write that completes during a flush is not taken for flushed.
    pub(crate) unflushed: AtomicBool,
    /// Discards and `MAY_UNMAP` reach the driver.
    discard: AtomicBool,
    /// Flushes of this node's own storage are skipped: its owner said that it may be lost.
    no_flush: AtomicBool,
    /// Around the host's page cache. For who reopens: the driver has its own.
    direct: AtomicBool,
    /// A flush of this node's own storage failed. Never cleared.
    pub(crate) poisoned: AtomicBool,
    pub(crate) force_share: bool,
    served: Served,
    pub(crate) requests: RequestTable,
    // Requests leave alone what follows.
    whole_limits: ThreadLock<Limits>,
    /// As they were given, without those of children.
    options: ThreadLock<Options>,
    /// One flush at a time; the next one then often finds nothing to do.
    pub(crate) flushing: CoMutex<()>,
    name: String,
    format: &'static str,
    filename: String,
    graph: Weak<Graph>,
    users: AtomicUsize,
    serial: u64,
    file_id: Option<FileId>,
    /// Under the lock of sections.
    permissions: ThreadLock<Permissions>,
    /// The home context, and its place there unless that is the main one. Changed under the lock of
    /// sections.
    home: ThreadLock<(Arc<AioContext>, Option<Resident>)>,
}

/// What `open` knows about a node that it makes.
pub(crate) struct NodeParts {
    pub(crate) name: String,
    pub(crate) filename: String,
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    pub(crate) no_flush: bool,
    pub(crate) direct: bool,
    pub(crate) options: Options,
    pub(crate) driver: Box<dyn Driver>,
    /// Limits of what lies below, and its role.
    pub(crate) below: Vec<(Limits, ChildRole)>,
    pub(crate) file_id: Option<FileId>,
    pub(crate) force_share: bool,
    pub(crate) permissions: Permissions,
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
            direct,
            options,
            driver,
            below,
            file_id,
            force_share,
            permissions,
        } = parts;
        let len = driver.len();
        if len > MAX_LENGTH {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("A length of {len} bytes is above the limit of {MAX_LENGTH}"),
            )
            .at_file(&filename));
        }
        let serial = graph.next_serial();
        let format = driver.format();
        let served = Served::new(graph, driver);
        let whole_limits = served.limits().through_all(&below);
        let node = Arc::new(Node {
            requests: RequestTable::new(),
            served,
            whole_limits: ThreadLock::new(whole_limits),
            len: AtomicU64::new(len),
            read_only: AtomicBool::new(read_only),
            discard: AtomicBool::new(discard),
            no_flush: AtomicBool::new(no_flush),
            direct: AtomicBool::new(direct),
            options: ThreadLock::new(options),
            unflushed: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            flushing: CoMutex::new(()),
            name,
            filename,
            graph: Arc::downgrade(graph),
            users: AtomicUsize::new(0),
            parents: ThreadLock::new(Vec::new()),
            sections: AtomicU32::new(0),
            beginning: AtomicU32::new(0),
            serial,
            file_id,
            force_share,
            permissions: ThreadLock::new(permissions),
            home: ThreadLock::new((graph.main_context().clone(), None)),
            format,
        });
        graph.count_node(serial, &node);
        Ok(node)
    }

    /// Gives the node its edges and makes it findable.
    pub(crate) fn publish(self: &Arc<Node>, graph: &GraphRead<'_>, children: Vec<Arc<Child>>) {
        for child in &children {
            child.set_parent(self);
        }
        self.set_edges(graph, children);
        graph.graph().add_node(self);
    }

    /// One more user, which is quiesced if the node is drained (rule 5.4).
    ///
    /// # Errors
    /// `Closed` for a node that is being closed, else when its permissions do not go together with
    /// those of others; it is no user then.
    #[track_caller]
    pub(crate) fn add_user(self: &Arc<Node>, parent: &Arc<dyn Parent>) -> Result<()> {
        self.in_section(|section| {
            if self.requests.is_closed() {
                return Err(self.closed());
            }
            self.enter(parent);
            let Some(section) = section else {
                return Ok(());
            };
            if let Err(error) = take_permissions(self, section) {
                self.leave(&**parent);
                return Err(error);
            }
            if self.is_drained() && !mutant!("who comes to a drained node is not held back") {
                parent.drained_begin(section);
            }
            Ok(())
        })
    }

    pub(crate) fn enter(&self, user: &Arc<dyn Parent>) {
        self.users.fetch_add(1, Ordering::AcqRel);
        self.parents.lock().push(Arc::downgrade(user));
    }

    /// `true`: that was the last one.
    pub(crate) fn leave(&self, user: &dyn Parent) -> bool {
        let address = std::ptr::from_ref(user).cast::<()>().addr();
        let is_other = |weak: &Weak<dyn Parent>| weak.as_ptr().cast::<()>().addr() != address;
        self.parents.lock().retain(is_other);
        let before = self.users.fetch_sub(1, Ordering::AcqRel);
        assert!(
            before > 0,
            "node '{}' loses a user that it does not have",
            self.name
        );
        before == 1
    }

    /// Its users now. Under the lock of sections.
    pub(crate) fn users_now(&self) -> Vec<Arc<dyn Parent>> {
        let parents = self.parents.lock();
        parents.iter().filter_map(Weak::upgrade).collect()
    }

    /// What all users together hold and share; of a node that never had one what it was opened for.
    pub fn permissions(&self) -> Permissions {
        *self.permissions.lock()
    }

    pub(crate) fn set_permissions(&self, permissions: Permissions) {
        *self.permissions.lock() = permissions;
    }

    /// What a user does who does not say.
    pub(crate) fn for_user(&self) -> Permissions {
        if self.users() == 0 && self.permissions() != Permissions::NONE {
            return self.permissions();
        }
        let writes = if self.is_read_only() {
            Perm::empty()
        } else {
            Perm::WRITE
        };
        Permissions {
            held: Perm::CONSISTENT_READ | writes,
            shared: Perm::all(),
        }
    }

    /// May users hold this, if the node is `read_only` then?
    ///
    /// # Errors
    /// `ReadOnly`, in the reference's words.
    pub(crate) fn refuse_writers(&self, read_only: bool, held: Perm) -> Result<()> {
        if !read_only || !held.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
            return Ok(());
        }
        if self.is_read_only() {
            return Err(self.locate(Error::new(ErrorKind::ReadOnly, "Block node is read-only")));
        }
        let name = &self.name;
        let message = format!("Read-only block node '{name}' cannot support read-write users");
        Err(Error::new(ErrorKind::ReadOnly, message))
    }

    /// Under the lock of sections; `None` after the graph has gone, when there are none.
    #[track_caller]
    pub(crate) fn in_section<R>(&self, f: impl FnOnce(Option<&mut Section<'_>>) -> R) -> R {
        match self.graph.upgrade() {
            Some(graph) => graph.section(|section| f(Some(section))),
            None => f(None),
        }
    }

    /// The context that serves what the driver does by itself: handlers, timers, sockets; the main
    /// one unless the node moved ([`Transaction::move_to`](crate::Transaction::move_to)). Requests
    /// come from any context. Any thread.
    pub fn home_context(&self) -> Arc<AioContext> {
        self.home.lock().0.clone()
    }

    pub(crate) fn set_home(&self, context: &Arc<AioContext>, resident: Option<Resident>) {
        let before = std::mem::replace(&mut *self.home.lock(), (context.clone(), resident));
        drop(before);
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
        self.format
    }

    /// Are writes refused?
    #[inline]
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Do discards reach the driver?
    pub fn passes_discards(&self) -> bool {
        self.discard.load(Ordering::Relaxed)
    }

    /// Are flushes of this node's own storage skipped?
    pub fn skips_flushes(&self) -> bool {
        self.no_flush.load(Ordering::Relaxed)
    }

    /// Does it go around the host's page cache?
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// The options that it was given, without those of its children.
    pub(crate) fn options(&self) -> Options {
        self.options.lock().clone()
    }

    /// Changes what `to` names; with the node drained.
    pub(crate) fn reopened(&self, to: &Reopen) {
        let switches = [
            (&self.read_only, to.read_only),
            (&self.discard, to.discard),
            (&self.direct, to.direct),
            (&self.no_flush, to.no_flush),
        ];
        for (switch, to) in switches {
            if let Some(to) = to {
                switch.store(to, Ordering::Relaxed);
            }
        }
        self.options.lock().overlay(to.options.clone());
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

    /// What a request may be so that nobody below has to pad, copy or take it apart: the limits of
    /// all nodes down to where the data is. Anything else works too, at that price.
    pub fn whole_limits(&self) -> Limits {
        *self.whole_limits.lock()
    }

    /// Computes [`Node::whole_limits`] anew; tells whether they changed.
    pub(crate) fn refresh_whole_limits(&self) -> bool {
        let edges = self.edges();
        let below: Vec<_> = edges
            .iter()
            .map(|edge| (edge.below().whole_limits(), edge.role()))
            .collect();
        let new = self.limits().through_all(&below);
        std::mem::replace(&mut *self.whole_limits.lock(), new) != new
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

    /// Lets nobody use it any more, if nobody does: one step, so that nobody comes in between. The
    /// caller closes it.
    fn begin_close(&self) -> Closing {
        self.in_section(|_| {
            if self.users() != 0 {
                Closing::InUse
            } else if self.requests.close() {
                Closing::Ours
            } else {
                Closing::Begun
            }
        })
    }

    /// Waits for nothing in flight, flushes, closes the driver (rule 5.7). Once, by who began it.
    fn close(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.requests.wait_idle(co);
        // Both are done whatever happens; the first failure is told.
        let flushed = if self.is_read_only() {
            Ok(())
        } else {
            self.flush_driver(co, graph)
        };
        let driver = &self.serving(graph).driver;
        let closed = driver.close(co, graph).map_err(|error| self.locate(error));
        assert_eq!(
            self.requests.in_flight(),
            0,
            "node '{}' has requests after close",
            self.name
        );
        // It lives nowhere any more: its context may end.
        if !mutant!("a closed node keeps its home") {
            self.set_home(graph.graph().main_context(), None);
        }
        flushed.and(closed)
    }
}

/// What became of the wish to close a node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// Somebody uses it.
    InUse,
    /// The caller closes it.
    Ours,
    /// Somebody closes it, or did.
    Begun,
}

/// Closes a node without users, then what only it used. Suspends; returns the first failure after
/// having closed all. Nobody can become a user of the node from the moment of this call on.
///
/// # Errors
/// `InUse` when somebody uses it, then nothing was done; else what flushing or a driver's close
/// returned.
pub fn close_unused(co: &Co, graph: &Arc<Graph>, node: Arc<Node>) -> Result<()> {
    match node.begin_close() {
        Closing::InUse => Err(node.locate(Error::new(ErrorKind::InUse, "The node is in use"))),
        Closing::Ours => close_begun(co, graph, node),
        Closing::Begun => Ok(()),
    }
}

/// The same for who has just lost the last user: nothing if another one came meanwhile, which will
/// close it.
pub(crate) fn close_if_unused(co: &Co, graph: &Arc<Graph>, node: Arc<Node>) -> Result<()> {
    match node.begin_close() {
        Closing::Ours => close_begun(co, graph, node),
        Closing::InUse | Closing::Begun => Ok(()),
    }
}

fn close_begun(co: &Co, graph: &Arc<Graph>, node: Arc<Node>) -> Result<()> {
    let mut result = Ok(());
    let mut unused = vec![node];
    let guard = graph.read(co);
    let mut at = 0;
    // Top down, and all are kept until the end: a chain is taken apart without recursion.
    while let Some(node) = unused.get(at).cloned() {
        at += 1;
        result = result.and(node.close(co, &guard));
        for child in node.children(&guard) {
            let below = child.detach();
            unused.extend(below.filter(|below| below.begin_close() == Closing::Ours));
        }
    }
    drop(guard);
    for node in unused {
        drop(node);
    }
    result
}

/// Drained sections, seen from the node.
impl Node {
    /// The graph that it is in.
    ///
    /// # Panics
    /// When the graph has gone.
    pub(crate) fn owner(&self) -> Arc<Graph> {
        let graph = self.graph.upgrade();
        graph.unwrap_or_else(|| panic!("node '{}' outlives its graph", self.name))
    }

    /// Is it in a drained section?
    pub fn is_drained(&self) -> bool {
        self.drained_sections() > 0
    }

    /// In how many drained sections it is, its own and those of children that reach up to it.
    pub fn drained_sections(&self) -> u32 {
        self.sections.load(Ordering::Relaxed)
    }

    /// Into a graph with that many sections of all nodes (rule 5.3).
    pub(crate) fn born(&self, sections: u32) {
        self.sections.store(sections, Ordering::Relaxed);
        if sections > 0 {
            self.tell_driver(|driver| driver.drained_begin());
        }
    }

    /// Returns how many there were. Only under the lock of sections, hence no read-modify-write.
    fn count_section(&self, change: i32) -> u32 {
        let before = self.sections.load(Ordering::Relaxed);
        let after = before.wrapping_add_signed(change);
        self.sections.store(after, Ordering::Relaxed);
        before
    }

    /// Rule 5.1: on the first level parents send nothing new, then the driver.
    pub(crate) fn quiesce(&self, section: &mut Section<'_>) {
        if self.count_section(1) == 0 {
            self.each_parent(section, |parent, section| parent.drained_begin(section));
            self.tell_driver(|driver| driver.drained_begin());
        }
    }

    /// The same; on any level `devices` gets those of its users.
    pub(crate) fn quiesce_with_devices(
        &self,
        section: &mut Section<'_>,
        devices: &mut Vec<Stopping>,
    ) {
        let is_first = self.count_section(1) == 0;
        self.each_parent(section, |parent, section| {
            if is_first {
                parent.drained_begin(section);
            }
            devices.extend(parent.clone().stops_threads());
        });
        if is_first {
            self.tell_driver(|driver| driver.drained_begin());
        }
    }

    /// Rule 5.2: on the last level the driver goes on, then parents.
    pub(crate) fn unquiesce(&self, section: &mut Section<'_>) {
        let before = self.count_section(-1);
        assert!(
            before > 0,
            "node '{}' leaves a section that it is not in",
            self.name
        );
        if before == 1 || mutant!("an inner section ends the outer one") {
            self.tell_driver(|driver| driver.drained_end());
            self.each_parent(section, |parent, section| parent.drained_end(section));
        }
    }

    /// Those that live; kept alive until the lock of sections is let go.
    pub(crate) fn parents(&self, section: &mut Section<'_>) -> Vec<Arc<dyn Parent>> {
        let parents: Vec<_> = self
            .parents
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        section.parents.extend(parents.iter().cloned());
        parents
    }

    /// Calls `f` with those that live, and keeps them alive until the lock of sections is let go.
    pub(crate) fn each_parent(
        &self,
        section: &mut Section<'_>,
        mut f: impl FnMut(&Arc<dyn Parent>, &mut Section<'_>),
    ) {
        // In the list itself: sections of many nodes would allocate for each.
        let mut seen = std::mem::take(&mut section.parents);
        let before = seen.len();
        seen.extend(self.parents.lock().iter().filter_map(Weak::upgrade));
        for parent in &seen[before..] {
            f(parent, section);
        }
        seen.append(&mut section.parents);
        section.parents = seen;
    }

    /// Adds this node and everything above it.
    pub(crate) fn collect_busy(self: &Arc<Node>, section: &mut Section<'_>, busy: &mut Collected) {
        if busy.add(self) {
            self.each_parent(section, |parent, section| {
                parent.clone().collect(section, busy)
            });
        }
    }

    pub(crate) fn section_begins(&self) {
        self.beginning.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn section_began(&self) {
        self.beginning.fetch_sub(1, Ordering::SeqCst);
        self.requests.kick();
    }
}

impl Busy for Node {
    fn table(&self) -> &RequestTable {
        &self.requests
    }

    fn is_busy_otherwise(&self) -> bool {
        self.beginning.load(Ordering::SeqCst) > 0
    }

    fn describe(&self) -> String {
        format!("node '{}'", self.name)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.upgrade() {
            graph.forget_node(self.serial, &self.name);
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
            .field("read_only", &self.is_read_only())
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
