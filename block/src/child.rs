//! An edge of the graph: how a parent reaches its child, and only with a graph guard.

use crate::drain::{Collected, Parent, Section};
use crate::error::Result;
use crate::event::Event;
use crate::graph::{End, Graph, GraphAccess, GraphRead};
use crate::io::{Copied, CopySource, CopyTarget, Status};
use crate::node::Node;
use crate::types::{ChildRole, FileId, Limits, Permissions, Preallocation, RequestFlags};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::{Co, mutant};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// An edge. It owns the node below; the node above is known weakly.
pub struct Child {
    name: String,
    role: ChildRole,
    end: End,
    parent: OnceLock<Weak<Node>>,
    detached: AtomicBool,
    /// The node below is drained, and this edge quiesced the parent, or will once it has one (rule
    /// 5.4). Under the graph's lock of sections.
    quiesced: AtomicBool,
    /// The node below was opened together with the parent, and has its options where it was not told
    /// otherwise.
    own: bool,
}

impl Child {
    pub(crate) fn new(
        graph: &Graph,
        name: &str,
        role: ChildRole,
        node: Arc<Node>,
        permissions: Permissions,
        own: bool,
    ) -> Result<Arc<Child>> {
        let child = Arc::new(Child {
            name: name.to_owned(),
            role,
            end: End::new(graph, node.clone(), permissions),
            parent: OnceLock::new(),
            detached: AtomicBool::new(false),
            quiesced: AtomicBool::new(false),
            own,
        });
        let parent: Arc<dyn Parent> = child.clone();
        if let Err(error) = node.add_user(&parent) {
            // It never was a user: dropping it counts nobody down.
            child.detached.store(true, Ordering::Release);
            return Err(error);
        }
        Ok(child)
    }

    /// An edge that a transaction may give to `parent`; it is no user of `node` before
    /// [`Child::enter`].
    pub(crate) fn unentered(
        graph: &Graph,
        name: &str,
        role: ChildRole,
        parent: &Arc<Node>,
        node: Arc<Node>,
    ) -> Arc<Child> {
        Arc::new(Child {
            name: name.to_owned(),
            role,
            end: End::new(graph, node, Permissions::NONE),
            parent: OnceLock::from(Arc::downgrade(parent)),
            detached: AtomicBool::new(true),
            quiesced: AtomicBool::new(false),
            own: false,
        })
    }

    /// It is a user of the node below now, which quiesces the parent if it is drained (rule 5.4).
    pub(crate) fn enter(self: &Arc<Child>, section: &mut Section<'_>) {
        let was = self.detached.swap(false, Ordering::AcqRel);
        assert!(was, "edge '{}' is entered twice", self.name);
        let (below, user): (_, Arc<dyn Parent>) = (self.end.now(), self.clone());
        below.enter(&user);
        if below.is_drained() {
            self.drained_begin(section);
        }
        section.nodes.push(below);
    }

    /// It is no user any more; the node below lets the parent go on.
    pub(crate) fn leave(&self, section: &mut Section<'_>) {
        let was = self.detached.swap(true, Ordering::AcqRel);
        assert!(!was, "edge '{}' leaves twice", self.name);
        let below = self.end.now();
        below.leave(self);
        if self.is_quiesced() {
            self.drained_end(section);
        }
        section.nodes.push(below);
    }

    /// Was the node below opened together with the parent?
    pub(crate) fn is_own(&self) -> bool {
        self.own
    }

    pub(crate) fn set_parent(&self, parent: &Arc<Node>) {
        self.end.now().in_section(|section| {
            let set = self.parent.set(Arc::downgrade(parent));
            assert!(
                set.is_ok(),
                "edge '{}' gets a second parent, {}",
                self.name,
                parent.name()
            );
            if let Some(section) = section
                && self.quiesced.load(Ordering::Relaxed)
            {
                parent.quiesce(section);
            }
        });
    }

    /// Gives up the node below; the node, if that was its last user: the caller closes it.
    pub(crate) fn detach(&self) -> Option<Arc<Node>> {
        if self.detached.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.end.leave(self, |section| {
            if self.quiesced.load(Ordering::Relaxed) {
                self.drained_end(section);
            }
        })
    }

    /// The parent, while it lives; kept until the lock of sections is let go.
    fn parent_in(&self, section: &mut Section<'_>) -> Option<Arc<Node>> {
        let parent = self.parent.get()?.upgrade()?;
        section.nodes.push(parent.clone());
        Some(parent)
    }

    /// The node below, for who holds no guard: the edge may lead elsewhere right after.
    pub(crate) fn below(&self) -> Arc<Node> {
        self.end.now()
    }

    /// What the parent calls it: `file`, `backing`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is to the parent.
    pub fn role(&self) -> ChildRole {
        self.role
    }

    /// The node above; `None` while it is being opened, and after it has gone.
    pub fn parent(&self, _graph: &impl GraphAccess) -> Option<Arc<Node>> {
        self.parent.get()?.upgrade()
    }

    /// The node below.
    #[inline(always)]
    pub fn node<'g>(&'g self, graph: &'g impl GraphAccess) -> &'g Arc<Node> {
        self.end.get(graph)
    }

    /// Length of the node below in bytes. It grows when writes go past it.
    #[inline]
    pub fn len(&self, graph: &GraphRead<'_>) -> u64 {
        self.node(graph).len()
    }

    /// Is the node below zero bytes long?
    pub fn is_empty(&self, graph: &GraphRead<'_>) -> bool {
        self.len(graph) == 0
    }

    /// What the node below does in one request; larger and unaligned ones are taken apart on the
    /// way.
    pub fn limits<'g>(&'g self, graph: &'g GraphRead<'_>) -> &'g Limits {
        &self.node(graph).serving(graph).limits
    }

    /// Is the node below read-only?
    pub fn is_read_only(&self, graph: &GraphRead<'_>) -> bool {
        self.node(graph).is_read_only()
    }

    /// Do writes past the end make the node below longer?
    pub fn is_growable(&self, graph: &GraphRead<'_>) -> bool {
        self.node(graph).serving(graph).growable
    }

    /// File of the host below this edge, through filters and formats.
    pub fn file_id(&self, graph: &GraphRead<'_>) -> Option<FileId> {
        self.node(graph).file_id()
    }

    /// Name of the file below, for messages.
    pub fn filename<'g>(&'g self, graph: &'g GraphRead<'_>) -> &'g str {
        self.node(graph).filename()
    }

    /// Reads into `buf` from `offset`; past the end of the node are zeros. Suspends.
    ///
    /// # Errors
    /// `OutOfBounds` where no node can reach, else what the driver returned. Anything may be in
    /// `buf` then.
    #[inline(always)]
    pub fn pread<'b>(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: impl Into<IoVecMut<'b>>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.node(graph).pread(co, graph, offset, buf.into(), flags)
    }

    /// Tells the driver below that its parent comes to `event`. Nothing without the feature `events`.
    #[inline]
    pub fn event(&self, event: Event) {
        if cfg!(feature = "events") {
            self.end.now().driver().event(event);
        }
    }

    /// Writes `buf` at `offset`. Suspends until the driver has taken the data; with
    /// [`RequestFlags::FUA`], until it is on stable storage.
    ///
    /// # Errors
    /// `OutOfBounds` past the end of a node that cannot grow, `ReadOnly`, else what the driver
    /// returned. After an error any part of the range may hold old or new data; nothing outside it
    /// has changed.
    #[inline(always)]
    pub fn pwrite<'b>(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: impl Into<IoVec<'b>>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.node(graph)
            .pwrite(co, graph, offset, buf.into(), flags)
    }

    /// Write, then flush (rule 2.2). It orders nothing that came before unless that was flushed
    /// already. Suspends.
    ///
    /// # Errors
    /// As [`Child::pwrite`] and [`Child::flush`].
    pub fn pwrite_sync<'b>(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: impl Into<IoVec<'b>>,
    ) -> Result<()> {
        self.pwrite(co, graph, offset, buf, RequestFlags::empty())?;
        self.flush(co, graph)
    }

    /// Makes the range read as zeros. Suspends.
    ///
    /// # Errors
    /// As [`Child::pwrite`]; `NotSupported` with [`RequestFlags::NO_FALLBACK`].
    pub fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.node(graph)
            .pwrite_zeroes(co, graph, offset, len, flags)
    }

    /// Gives the storage of the range back, where the driver can. Suspends.
    ///
    /// # Errors
    /// As [`Child::pwrite`].
    pub fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        self.node(graph).pdiscard(co, graph, offset, len)
    }

    /// Offers a first part of the range to `to`, without reading it where that is possible.
    /// Suspends. For drivers; users have
    /// [`BlockBackend::copy_range`](crate::BlockBackend::copy_range).
    ///
    /// # Errors
    /// `Closed`, else what a driver returned.
    pub fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        self.node(graph).copy_range_from(co, graph, offset, len, to)
    }

    /// Copies a first part of `source` to `offset` without reading it; tells how many bytes that
    /// were, none where it cannot be done without waiting. Suspends.
    ///
    /// # Errors
    /// As [`Child::pwrite`].
    pub fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        self.node(graph).copy_range_to(co, graph, offset, source)
    }

    /// What the first bytes of the range are, as the node below holds them: one layer, through its
    /// filters. Suspends.
    ///
    /// The answer was true at some time during the call. Its length is zero only for an empty range
    /// and past the end.
    ///
    /// # Errors
    /// `Closed`, else what the driver returned.
    pub fn block_status(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
    ) -> Result<Status> {
        self.node(graph).block_status(co, graph, (offset, len))
    }

    /// Does the node below hold the first bytes of the range in its own layer, and of how many is
    /// that true? Not of any past the end. Suspends.
    ///
    /// # Errors
    /// What a driver returned.
    pub fn is_allocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
    ) -> Result<(bool, u64)> {
        let status = self.node(graph).is_allocated(co, graph, (offset, len))?;
        Ok((status.allocated, status.len))
    }

    /// Is it known, without reading, that all of the range reads as zeros? Past the end it does.
    /// True at some time during the call.
    ///
    /// # Errors
    /// What a driver returned.
    pub fn reads_as_zeros(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
    ) -> Result<bool> {
        let node = self.node(graph);
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end.min(node.len()) {
            let status = node.map(co, graph, (at, end - at))?;
            if status.len > 0 && !status.zero {
                return Ok(false);
            }
            // It was made shorter just now: the rest is past its end.
            at += if status.len > 0 { status.len } else { end - at };
        }
        Ok(true)
    }

    /// How many bytes of storage the node below takes up, holes left out. Suspends.
    ///
    /// # Errors
    /// `NotSupported` where nobody knows.
    pub fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        self.node(graph).allocated_bytes(co, graph)
    }

    /// Everything that completed before is on stable storage when this returns. Suspends; returns
    /// at once when nothing was written since the last one.
    ///
    /// # Errors
    /// What the driver returned; `Poisoned` from then on.
    pub fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.node(graph).flush(co, graph)
    }

    /// Makes the node `len` bytes long; what is added reads as zeros. Suspends.
    ///
    /// # Errors
    /// `Invalid`, `ReadOnly` (errno `EACCES`), `NotSupported`, else what the driver returned.
    pub fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        self.node(graph).truncate(co, graph, len, exact)
    }

    /// Makes the node `len` bytes long and takes the space for what is added at once. Suspends.
    ///
    /// # Errors
    /// As [`Child::truncate`]; `Invalid` where the node would become shorter.
    pub fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        self.node(graph)
            .grow_preallocated(co, graph, len, preallocation)
    }
}

/// Rule 5.1: what a node below asks for, the parent passes on upward.
impl Parent for Child {
    fn drained_begin(&self, section: &mut Section<'_>) {
        let was = self.quiesced.swap(true, Ordering::Relaxed);
        assert!(!was, "edge '{}' quiesces its parent twice", self.name);
        if let Some(parent) = self.parent_in(section)
            && !mutant!("sections do not reach upward")
        {
            parent.quiesce(section);
        }
    }

    fn drained_end(&self, section: &mut Section<'_>) {
        let was = self.quiesced.swap(false, Ordering::Relaxed);
        assert!(was, "edge '{}' lets its parent go twice", self.name);
        if let Some(parent) = self.parent_in(section)
            && !mutant!("sections do not reach upward")
        {
            parent.unquiesce(section);
        }
    }

    fn end(&self) -> &End {
        &self.end
    }

    fn owner(&self) -> Option<Arc<Node>> {
        self.parent.get()?.upgrade()
    }

    fn needs(&self, owner: &Node, own: Permissions, read_only: bool) -> Permissions {
        self.role.permissions(own, read_only, owner.force_share)
    }

    fn role(&self) -> Option<ChildRole> {
        Some(self.role)
    }

    fn who(&self) -> String {
        match self.owner() {
            Some(owner) => format!("node '{}'", owner.name()),
            None => "a node that is being opened".to_owned(),
        }
    }

    fn edge_name(&self) -> &str {
        &self.name
    }

    fn is_quiesced(&self) -> bool {
        self.quiesced.load(Ordering::Relaxed)
    }

    fn collect(self: Arc<Self>, section: &mut Section<'_>, busy: &mut Collected) {
        if let Some(parent) = self.parent_in(section)
            && !mutant!("a section does not wait for those above")
        {
            parent.collect_busy(section, busy);
        }
    }
}

impl Drop for Child {
    /// Of a graph that was not closed: the count stays right, nothing is written out.
    fn drop(&mut self) {
        self.detach();
    }
}

impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) -> {:?}", self.name, self.role, self.below())
    }
}
