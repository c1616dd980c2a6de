//! Drained sections: nothing new comes, and what was under way has ended (rules 5.1 to 5.11).
//!
//! ```text
//!   begin   quiesce   a count per node; the first one also quiesces each parent, upward, and the
//!                     driver. A user holds new requests back. Nothing is waited for.
//!           wait      once, until neither the nodes nor their users have anything in flight
//!   end     the last one lets driver and parents go on. Never waits.
//! ```
//! What changes counts ([`Quiesced`]) is under one lock per graph, so that edges may come and go
//! from any context meanwhile. The waiting side ([`Watch`]) announces itself in each table that it
//! looks at, pays one heavy fence for all of them, and looks at everything anew whenever something
//! ended: edges may have changed (rule 5.11). Where nobody is busy to begin with it announces nothing:
//! one fence and one look are all.
//!
//! A section is no lock (rule 5.3): its owner sends requests through nodes, or through a user that
//! does not queue; others open their own sections.

mod section;

pub(crate) use section::Section;

use crate::backend::{BlockBackend, Device};
use crate::graph::{End, Graph, in_home};
use crate::node::Node;
use crate::request_table::{InFlight, RequestTable, Wake};
use crate::sync::heavy_fence;
use crate::types::{ChildRole, Permissions};
use coblock_aio::{AioContext, Timer};
use coblock_coroutine::{Co, Hold, mutant};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A user of a node, as the node sees it: an edge to a node above, or a backend (rule 5.1).
///
/// All calls come under the graph's lock of sections. None polls, changes the graph or waits.
pub(crate) trait Parent: Send + Sync {
    /// Sends nothing new to the node from now on. Once, until the end.
    fn drained_begin(&self, section: &mut Section<'_>);
    /// May send again.
    fn drained_end(&self, section: &mut Section<'_>);
    /// Adds who must become idle above this edge.
    fn collect(self: Arc<Self>, section: &mut Section<'_>, busy: &mut Collected);
    /// What a section of all nodes looks at besides the nodes: this, if it is a user.
    fn as_user(&self) -> Option<&dyn Busy> {
        None
    }
    /// Where it leads to.
    fn end(&self) -> &End;
    /// The node above, if this is an edge that has one.
    fn owner(&self) -> Option<Arc<Node>> {
        None
    }
    /// What an edge from `owner`, which holds and shares `own` and is read-only or not, does with
    /// the node below.
    fn needs(&self, owner: &Node, own: Permissions, read_only: bool) -> Permissions {
        let _ = (owner, own, read_only);
        self.end().permissions()
    }
    /// What an edge is to its parent.
    fn role(&self) -> Option<ChildRole> {
        None
    }
    /// It leads to another node now.
    fn node_changed(&self, len_before: u64, len: u64, section: &mut Section<'_>) {
        let _ = (len_before, len, section);
    }
    /// May `node`, which it uses, get the home `to`? `wants_it`: this very user asks for it.
    ///
    /// # Errors
    /// Who does not allow it.
    fn may_move(&self, node: &Node, to: &Arc<AioContext>, wants_it: bool) -> crate::Result<()> {
        let _ = (node, to, wants_it);
        Ok(())
    }
    /// The node that it uses lives in `to` now.
    fn moved(&self, to: &Arc<AioContext>) {
        let _ = to;
    }
    /// In the words of the reference's messages.
    fn who(&self) -> String;
    /// The same: what it calls the node.
    fn edge_name(&self) -> &str;
    /// Did the node quiesce it? (Rule 5.4.)
    fn is_quiesced(&self) -> bool;
    /// Adds the device that sends the requests, if this is a user and has one.
    fn device(&self) -> Option<Arc<dyn Device>> {
        None
    }
}

/// Is nobody busy of `nodes`, and of the users among `parents`? An edge's node above is a node,
/// too. All of them send nothing new.
fn are_idle(nodes: &[Arc<Node>], parents: &[Arc<dyn Parent>]) -> bool {
    heavy_fence();
    let idle = |busy: &dyn Busy| !busy.is_busy_otherwise() && busy.table().is_idle();
    let mut users = parents.iter().filter_map(|parent| parent.as_user());
    users.all(idle) && nodes.iter().all(|node| idle(&**node))
}

/// Something that a section waits for.
pub(crate) trait Busy: Send + Sync {
    fn table(&self) -> &RequestTable;
    /// Busy with what is in no table. Changes are told by [`RequestTable::kick`].
    fn is_busy_otherwise(&self) -> bool;
    /// For people: which node or parent.
    fn describe(&self) -> String;
}

/// A set of those, in the order in which they were found.
#[derive(Default)]
pub(crate) struct Collected {
    seen: BTreeSet<usize>,
    pub(crate) list: Vec<Arc<dyn Busy>>,
}

impl Collected {
    /// `false`: it was there already.
    pub(crate) fn add<T: Busy + 'static>(&mut self, busy: &Arc<T>) -> bool {
        let is_new = self.seen.insert(Arc::as_ptr(busy).addr());
        if is_new {
            self.list.push(busy.clone());
        }
        is_new
    }
}

/// What is drained.
#[derive(Clone)]
enum Scope {
    Node(Arc<Node>, Arc<Graph>),
    All(Arc<Graph>),
}

impl Scope {
    fn graph(&self) -> &Arc<Graph> {
        match self {
            Scope::Node(_, graph) | Scope::All(graph) => graph,
        }
    }

    fn collect(&self) -> Collected {
        let mut collected = Collected::default();
        self.graph().section(|section| match self {
            Scope::Node(node, _) => node.collect_busy(section, &mut collected),
            Scope::All(graph) => {
                for node in graph.all_nodes() {
                    node.collect_busy(section, &mut collected);
                    section.nodes.push(node);
                }
                for root in graph.all_without_node() {
                    collected.add(&root);
                    section.parents.push(root);
                }
            }
        });
        collected
    }
}

/// The first half of a section: parents send nothing new. Waits for nothing.
pub(crate) struct Quiesced(Scope);

impl Quiesced {
    /// Every node, and those that are made while it lives: so that readers do not arrive for ever
    /// (rule 7.5). No section: nothing is waited for, and threads of devices are left alone.
    #[track_caller]
    pub(crate) fn all(graph: &Arc<Graph>) -> Quiesced {
        Quiesced::quiesce(Scope::All(graph.clone()), false).0
    }

    /// Each of `nodes`.
    #[track_caller]
    pub(crate) fn each(graph: &Arc<Graph>, nodes: &[Arc<Node>]) -> Vec<Quiesced> {
        let begin = |node: &Arc<Node>| Quiesced::begin(Scope::Node(node.clone(), graph.clone()));
        nodes.iter().map(begin).collect()
    }

    #[track_caller]
    fn begin(scope: Scope) -> Quiesced {
        Quiesced::begin_and_look(scope).0
    }

    /// `true`: nobody was busy, with parents quiesced. `false`: that was not looked at, or somebody
    /// is.
    #[track_caller]
    fn begin_and_look(scope: Scope) -> (Quiesced, bool) {
        let (quiesced, devices, is_idle) = Quiesced::quiesce(scope, true);
        // Rule 5.9: they may wait for threads of their own, hence without the lock.
        for device in devices {
            if !mutant!("threads of devices go on in a section") {
                device.drain_threads();
            }
        }
        (quiesced, is_idle)
    }

    /// Rule 5.3: of all nodes with the devices that are to stop their threads. With `look` each group
    /// of nodes is looked at, too, while it is at hand. It counts only where there is no device:
    /// until their threads have stopped they may begin something.
    #[track_caller]
    fn quiesce(scope: Scope, look: bool) -> (Quiesced, Vec<Arc<dyn Device>>, bool) {
        let (devices, is_idle) = scope.graph().section(|section| match &scope {
            Scope::Node(node, _) => {
                node.quiesce(section);
                (Vec::new(), false)
            }
            Scope::All(graph) => {
                *section.all += 1;
                let mut devices = Vec::new();
                let mut is_idle = look;
                section.each_group(graph, |section, nodes| {
                    let before = section.parents.len();
                    for node in nodes {
                        node.quiesce_with_devices(section, &mut devices);
                    }
                    is_idle = is_idle && are_idle(nodes, &section.parents[before..]);
                });
                let without_node = section.parents.len();
                section.gather_without_node(graph);
                is_idle = is_idle
                    && devices.is_empty()
                    && are_idle(&[], &section.parents[without_node..]);
                (devices, is_idle)
            }
        });
        (Quiesced(scope), devices, is_idle)
    }
}

impl Drop for Quiesced {
    /// Rule 5.2: never polls, and wakes what was held back.
    fn drop(&mut self) {
        let scope = &self.0;
        scope.graph().section(|section| match scope {
            Scope::Node(node, _) => node.unquiesce(section),
            Scope::All(graph) => {
                *section.all -= 1;
                section.each_group(graph, |section, nodes| {
                    for node in nodes {
                        node.unquiesce(section);
                    }
                });
            }
        });
    }
}

/// A drained section. It ends when this is dropped, on any thread.
#[must_use = "the section ends when this is dropped"]
pub struct Drained {
    quiesced: Quiesced,
}

impl fmt::Debug for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.quiesced.0 {
            Scope::Node(node, _) => write!(f, "Drained node '{}'", node.name()),
            Scope::All(_) => f.write_str("Drained all nodes"),
        }
    }
}

/// What `busy` is at, if it is.
fn busy_with(busy: &dyn Busy, has_operations: bool) -> Option<BusyWith> {
    let requests = busy.table().snapshot();
    let otherwise = busy.is_busy_otherwise() || has_operations;
    (otherwise || !requests.is_empty()).then(|| BusyWith {
        who: busy.describe(),
        requests,
        otherwise,
    })
}

/// Everybody in `graph` who has anything in flight. Any thread.
pub(crate) fn all_busy(graph: &Arc<Graph>) -> Vec<BusyWith> {
    let all = Scope::All(graph.clone()).collect().list;
    all.iter()
        .filter_map(|busy| busy_with(&**busy, false))
        .collect()
}

/// One that a section that ran out of time still waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusyWith {
    /// Node or parent.
    pub who: String,
    /// Its requests in flight.
    pub requests: Vec<InFlight>,
    /// Busy with something that is no request: a device, an operation of several requests, a
    /// request that is about to go on.
    pub otherwise: bool,
}

/// A section did not begin in time, and nothing is drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainTimeout {
    /// Whom it waited for.
    pub busy: Vec<BusyWith>,
}

impl fmt::Display for DrainTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Draining took too long; busy:")?;
        for busy in &self.busy {
            write!(f, " {}", busy.who)?;
            for request in &busy.requests {
                match request.range {
                    Some((offset, len)) => {
                        write!(f, " ({:?} of {len} bytes at {offset})", request.kind)?;
                    }
                    None => write!(f, " ({:?})", request.kind)?,
                }
            }
            if busy.otherwise {
                f.write_str(" (other work)")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for DrainTimeout {}

/// What can be drained: a node with its parents upward, a backend with its node, or all nodes of a
/// graph. Children are not drained (rule 5.1).
///
/// # Panics
/// All calls: when the coroutine holds a graph guard (rule 5.11). The blocking ones: in a
/// coroutine, and elsewhere than in the home of the graph's main context.
pub trait Drain {
    #[doc(hidden)]
    fn target(&self) -> Target<'_>;

    /// Begins a section: nothing is in flight when it returns, and nothing new comes while the
    /// guard lives. Suspends; from a coroutine of any context.
    ///
    /// The coroutine must have no request of its own in flight: it would wait for itself.
    fn drain(&self, co: &Co) -> Drained {
        let section = in_coroutine(&self.target(), co, None);
        section.expect("without a limit there is no timeout")
    }

    /// The same with a limit of time, on the clock of the graph's main context.
    ///
    /// # Errors
    /// Who was busy; nothing is drained then.
    fn drain_within(&self, co: &Co, limit: Duration) -> Result<Drained, DrainTimeout> {
        in_coroutine(&self.target(), co, Some(limit))
    }

    /// The same outside of coroutines, in the home of the graph's main context: polls it.
    #[track_caller]
    fn drain_blocking(&self) -> Drained {
        let section = outside(&self.target(), None);
        section.expect("without a limit there is no timeout")
    }

    /// The same with a limit of time.
    ///
    /// # Errors
    /// Who was busy; nothing is drained then.
    #[track_caller]
    fn drain_blocking_within(&self, limit: Duration) -> Result<Drained, DrainTimeout> {
        outside(&self.target(), Some(limit))
    }
}

/// What a [`Drain`] stands for.
#[doc(hidden)]
pub struct Target<'a> {
    scope: Scope,
    /// Rule 5.6: its operations of several requests are waited for.
    operations_of: Option<&'a BlockBackend>,
}

impl Target<'_> {
    /// Is nobody busy? Asked once, with parents quiesced: from then on it stays so.
    fn is_idle(&self) -> bool {
        match &self.scope {
            Scope::Node(..) => {
                heavy_fence();
                let idle = |busy: &Arc<dyn Busy>| {
                    !self.is_busy_otherwise(&**busy) && busy.table().is_idle()
                };
                self.collect().list.iter().all(idle)
            }
            // No list of them without doubles.
            Scope::All(graph) => graph.section(|section| {
                section.gather(graph);
                are_idle(&section.nodes, &section.parents)
            }),
        }
    }

    fn collect(&self) -> Collected {
        let mut collected = self.scope.collect();
        // Perhaps it has no node any more.
        if let Some(backend) = self.operations_of {
            collected.add(backend.root());
        }
        collected
    }

    /// Busy with what is in no table.
    fn is_busy_otherwise(&self, busy: &dyn Busy) -> bool {
        busy.is_busy_otherwise() || self.has_operations(busy)
    }

    /// Rule 5.6: only the user's own section waits for them.
    fn has_operations(&self, busy: &dyn Busy) -> bool {
        let Some(backend) = self.operations_of else {
            return false;
        };
        std::ptr::eq(busy.table(), backend.requests())
            && backend.operations() > 0
            && !mutant!("a section does not wait for operations of several requests")
    }
}

impl Drain for Arc<Node> {
    fn target(&self) -> Target<'_> {
        Target {
            scope: Scope::Node(self.clone(), self.owner()),
            operations_of: None,
        }
    }
}

impl Drain for Arc<Graph> {
    fn target(&self) -> Target<'_> {
        Target {
            scope: Scope::All(self.clone()),
            operations_of: None,
        }
    }
}

impl Drain for BlockBackend {
    fn target(&self) -> Target<'_> {
        Target {
            scope: Scope::Node(self.node().clone(), self.graph().clone()),
            operations_of: Some(self),
        }
    }
}

fn in_coroutine(
    target: &Target<'_>,
    co: &Co,
    limit: Option<Duration>,
) -> Result<Drained, DrainTimeout> {
    assert_eq!(
        co.holds(Hold::GraphRead),
        0,
        "rule 5.11: {co:?} drains with a graph guard held"
    );
    let (quiesced, is_idle) = quiesce_in_main(&target.scope, co);
    if is_idle || target.is_idle() {
        return Ok(Drained { quiesced });
    }
    let limit = Limit::new(
        target.scope.graph(),
        limit,
        Wake::Coroutine(co.wake_handle()),
    );
    let mut watch = Watch::new(target);
    while watch.is_busy(|| Wake::Coroutine(co.wake_handle())) {
        if limit.is_over() {
            return Err(watch.timeout());
        }
        while watch.is_listed() && !limit.is_over() {
            co.suspend();
        }
    }
    Ok(Drained { quiesced })
}

/// Rule 5.1: a bottom half of the main context begins. Until then the coroutine counts as in
/// flight on the node, so that no other section of it is complete before this one has begun.
fn quiesce_in_main(scope: &Scope, co: &Co) -> (Quiesced, bool) {
    let main = scope.graph().main_context();
    if main.is_current() {
        return Quiesced::begin_and_look(scope.clone());
    }
    if let Scope::Node(node, _) = scope
        && !mutant!("a section that is about to begin is not in flight")
    {
        node.section_begins();
    }
    let scope = scope.clone();
    in_home(co, main, move || {
        let begun = Quiesced::begin_and_look(scope.clone());
        if let Scope::Node(node, _) = &scope {
            node.section_began();
        }
        begun
    })
}

#[track_caller]
fn outside(target: &Target<'_>, limit: Option<Duration>) -> Result<Drained, DrainTimeout> {
    let graph = target.scope.graph();
    let (wait, main) = (graph.wait(), graph.main_context());
    assert!(
        main.is_current() && !coblock_coroutine::in_coroutine(),
        "rule 5.1: a section is begun outside of coroutines elsewhere than in the main context '{}'",
        main.name()
    );
    let (quiesced, is_idle) = Quiesced::begin_and_look(target.scope.clone());
    if is_idle || target.is_idle() {
        return Ok(Drained { quiesced });
    }
    let limit = Limit::new(graph, limit, Wake::Outside(wait.clone()));
    let mut watch = Watch::new(target);
    let mut busy = false;
    wait.wait_while(main, || {
        busy = watch.is_busy(|| Wake::Outside(wait.clone()));
        busy && !limit.is_over()
    });
    if busy {
        return Err(watch.timeout());
    }
    Ok(Drained { quiesced })
}

/// When a section gives up.
struct Limit {
    over: Arc<AtomicBool>,
    _timer: Option<Timer>,
}

impl Limit {
    fn new(graph: &Arc<Graph>, limit: Option<Duration>, wake: Wake) -> Limit {
        let over = Arc::new(AtomicBool::new(false));
        let timer = limit.map(|limit| {
            let told = over.clone();
            let timer = graph.main_context().timer("drain limit", move || {
                told.store(true, Ordering::Release);
                wake.wake();
            });
            timer.arm_in(limit);
            timer
        });
        Limit {
            over,
            _timer: timer,
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// Who waits until nobody is busy.
struct Watch<'a> {
    target: &'a Target<'a>,
    /// In whose tables it is announced, all that it ever looked at.
    announced: Collected,
    /// Where it is listed: who wakes it.
    listed: Option<(Arc<dyn Busy>, u64)>,
}

impl<'a> Watch<'a> {
    fn new(target: &'a Target<'a>) -> Self {
        Watch {
            target,
            announced: Collected::default(),
            listed: None,
        }
    }

    /// Who is looked at now; all of them are announced.
    fn look(&mut self) -> Vec<Arc<dyn Busy>> {
        let mut now = self.target.collect();
        if self.announced.list.is_empty() {
            // The first look: all are new.
            for busy in &now.list {
                busy.table().watch();
            }
            self.announced.list.clone_from(&now.list);
            self.announced.seen = std::mem::take(&mut now.seen);
            heavy_fence();
            return now.list;
        }
        let now = match mutant!("a section looks only at whom it found at first") {
            true => self.announced.list.clone(),
            false => now.list,
        };
        let before = self.announced.list.len();
        for busy in &now {
            if self.announced.seen.insert(Arc::as_ptr(busy).addr()) {
                busy.table().watch();
                self.announced.list.push(busy.clone());
            }
        }
        if self.announced.list.len() > before {
            heavy_fence();
        }
        now
    }

    /// Is anybody busy? Then that one wakes.
    fn is_busy(&mut self, wake: impl Fn() -> Wake) -> bool {
        self.unlist();
        for busy in self.look() {
            let table = busy.table();
            let others = || self.target.is_busy_otherwise(&*busy);
            // In this order: who was held back goes from the one to the other.
            if !others() && table.is_idle() {
                continue;
            }
            if let Some(ticket) = table.list_if_busy(&wake, others) {
                self.listed = Some((busy, ticket));
                return true;
            }
        }
        false
    }

    fn is_listed(&self) -> bool {
        let listed = self.listed.as_ref();
        listed.is_some_and(|(busy, ticket)| busy.table().is_listed(*ticket))
    }

    fn unlist(&mut self) {
        if let Some((busy, ticket)) = self.listed.take() {
            busy.table().unlist(ticket);
        }
    }

    fn timeout(&mut self) -> DrainTimeout {
        let busy = self
            .look()
            .into_iter()
            .filter_map(|busy| busy_with(&*busy, self.target.has_operations(&*busy)));
        DrainTimeout {
            busy: busy.collect(),
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.unlist();
        for busy in &self.announced.list {
            busy.table().unwatch();
        }
    }
}
