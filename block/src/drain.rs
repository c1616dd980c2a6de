//! Drained sections: nothing new comes, and what was under way has ended (rules 5.1 to 5.11).
//!
//! ```text
//!   begin   quiesce   a count per node; the first one also quiesces each parent, upward, and the
//!                     driver. A user holds new requests back. Nothing is waited for.
//!           wait      once, until neither the nodes nor their users have anything in flight
//!   end     the last one lets driver and parents go on. Never waits.
//! ```
//! What changes counts ([`Quiesced`]) is under one lock per graph, so that edges may come and go
//! from any context meanwhile. The waiting side is in `drain/begin.rs`.
//!
//! A section is no lock (rule 5.3): its owner sends requests through nodes, or through a user that
//! does not queue; others open their own sections.

mod begin;
mod section;

pub(crate) use begin::refuse_guard;
pub use begin::{BusyWith, Drain, DrainTimeout};
pub(crate) use section::{InSection, Section};

use crate::backend::Stopping;
use crate::graph::{End, Graph};
use crate::node::Node;
use crate::request_table::RequestTable;
use crate::sync::heavy_fence;
use crate::types::{ChildRole, Permissions};
use coblock_aio::AioContext;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

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
    /// Rule 5.9: the device that sends the requests, if this is a user and has one, with its threads
    /// running still.
    fn stops_threads(self: Arc<Self>) -> Option<Stopping> {
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
        // Rule 5.9: they may wait for threads of their own, and those for requests: hence without
        // the lock, and with requests let through until all of them have stopped.
        for device in &devices {
            device.stop_threads();
        }
        drop(devices);
        (quiesced, is_idle)
    }

    /// Rule 5.3: of all nodes with the devices that are to stop their threads. With `look` each group
    /// of nodes is looked at, too, while it is at hand. It counts only where there is no device:
    /// until their threads have stopped they may begin something.
    #[track_caller]
    fn quiesce(scope: Scope, begins: bool) -> (Quiesced, Vec<Stopping>, bool) {
        let (devices, is_idle) = scope.graph().section(|section| match &scope {
            Scope::Node(node, _) => {
                node.quiesce(section);
                (Vec::new(), false)
            }
            Scope::All(graph) => {
                *section.all += 1;
                section.threads_run = begins;
                let mut devices = Vec::new();
                let mut is_idle = begins;
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
