//! Building nodes from options, and the files that images name.
//!
//! A driver opens what the *options* name itself, one level inside the other: the caller wrote that
//! nesting. What an *image* names it only announces ([`Opening::dependent`]); [`open`] then asks
//! the gate and opens these one after the other in a loop, so no image decides how deep the stack
//! gets. Depth and loops are bounded there.

mod inherited;
mod opening;

pub(crate) use inherited::{Inherited, take_discard};
pub use opening::Opening;

use crate::child::Child;
use crate::driver::DriverRegistry;
use crate::error::{Error, ErrorKind, Result};
use crate::gate::{Dependent, OpenGate};
use crate::graph::Graph;
use crate::node::{Node, close_if_unused};
use crate::options::Options;
use crate::types::{ChildRole, FileId, Perm, Permissions};
use coblock_coroutine::{Co, Hold};
use std::collections::VecDeque;
use std::panic::Location;
use std::sync::Arc;

/// How deep options may nest children.
const MAX_NESTING: usize = 16;

/// Opens a node and everything below it.
///
/// Options that every node knows: `driver` (needed), `node-name`, `read-only`, `force-share`,
/// `discard` (`unmap` or `ignore`), `cache.direct`, `cache.no-flush`; the rest is the driver's,
/// children under their names (`file.filename`). Children inherit `read-only`, `force-share` and
/// `cache` unless they say otherwise. `share-rw=off` at the top keeps others from writing.
///
/// Suspends. The node has no user yet: give it to a [`BlockBackend`](crate::BlockBackend), or to
/// [`close_unused`](crate::close_unused).
///
/// # Errors
/// An option that is wrong, missing or known to nobody; what the host or a driver says; what the
/// gate refuses. Nothing stays open then.
///
/// # Panics
/// When the coroutine holds a graph guard; in an [`Action`](crate::Action) of the graph.
#[track_caller]
pub fn open(
    co: &Co,
    graph: &Arc<Graph>,
    registry: &DriverRegistry,
    gate: &dyn OpenGate,
    mut options: Options,
) -> Result<Arc<Node>> {
    let share_rw = options.take_bool("share-rw")?.unwrap_or(true);
    let read_only = options.get_bool("read-only")?.unwrap_or(false);
    let held = if read_only {
        Perm::CONSISTENT_READ
    } else {
        Perm::CONSISTENT_READ | Perm::WRITE
    };
    let shared = if share_rw {
        Perm::all()
    } else {
        Perm::all() - Perm::WRITE - Perm::RESIZE
    };
    let permissions = Permissions { held, shared };
    open_for(co, (graph, registry, gate), options, permissions)
}

/// The same for a node that a [`Transaction`](crate::Transaction) is to put into the graph: as long as
/// nobody uses it, a filter holds nothing of what it filters.
///
/// # Errors
/// As [`open`].
///
/// # Panics
/// As [`open`].
#[track_caller]
pub fn open_unused(
    co: &Co,
    graph: &Arc<Graph>,
    registry: &DriverRegistry,
    gate: &dyn OpenGate,
    options: Options,
) -> Result<Arc<Node>> {
    open_for(co, (graph, registry, gate), options, Permissions::NONE)
}

#[track_caller]
fn open_for(
    co: &Co,
    (graph, registry, gate): (&Arc<Graph>, &DriverRegistry, &dyn OpenGate),
    options: Options,
    permissions: Permissions,
) -> Result<Arc<Node>> {
    assert_eq!(
        co.holds(Hold::GraphRead),
        0,
        "open() is called with a graph guard held"
    );
    let at = Location::caller();
    graph.refuse_in_change(co, at);
    let env = Env {
        graph,
        registry,
        gate,
    };
    let place = Place {
        permissions,
        nesting: 0,
        depth: 0,
        ancestors: Vec::new(),
    };
    let mut built = Built::default();
    let result = env
        .open_node(co, options, None, place, &mut built)
        .and_then(|root| {
            env.open_dependents(co, &mut built)?;
            Ok(root)
        });
    // Children first were pushed first; with or without an error everything gets its edges, so that
    // it can be closed.
    let mut new = Vec::new();
    let guard = graph.read(co);
    for unfinished in built.nodes {
        unfinished.node.publish(&guard, unfinished.children);
        new.push(unfinished.node);
    }
    drop(guard);
    match result.and_then(|root| graph.settle(co, &new, at).map(|()| root)) {
        Ok(root) => Ok(root),
        Err(error) => {
            for node in built.abandoned {
                close_quietly(co, graph, node);
            }
            if let Some(root) = built.root {
                close_quietly(co, graph, root);
            }
            Err(error)
        }
    }
}

/// After an error that is already being told.
fn close_quietly(co: &Co, graph: &Arc<Graph>, node: Arc<Node>) {
    if let Err(error) = close_if_unused(co, graph, node) {
        log::warn!("closing what a failed open had opened: {error}");
    }
}

struct Env<'a> {
    graph: &'a Arc<Graph>,
    registry: &'a DriverRegistry,
    gate: &'a dyn OpenGate,
}

/// Where in the tree a node is opened.
#[derive(Clone)]
struct Place {
    permissions: Permissions,
    /// How many nodes above it in the options.
    nesting: usize,
    /// How many images above it in a chain.
    depth: usize,
    /// The files of those images.
    ancestors: Vec<FileId>,
}

/// A node whose edges are not complete.
struct Unfinished {
    node: Arc<Node>,
    children: Vec<Arc<Child>>,
}

/// A file that an image names, waiting for its turn.
struct Pending {
    /// Index in [`Built::nodes`].
    parent: usize,
    role: ChildRole,
    key: &'static str,
    name: String,
    format: Option<String>,
    /// The caller's options name a node instead.
    existing: Option<Arc<Node>>,
    /// What the caller's options say about it.
    given: Options,
    inherited: Inherited,
    place: Place,
}

#[derive(Default)]
struct Built {
    /// Made, children before parents.
    nodes: Vec<Unfinished>,
    pending: VecDeque<Pending>,
    /// The node at the top, once it is made.
    root: Option<Arc<Node>>,
    /// Children of a driver that failed to open.
    abandoned: Vec<Arc<Node>>,
}

impl Env<'_> {
    fn open_node(
        &self,
        co: &Co,
        mut options: Options,
        inherited: Option<Inherited>,
        place: Place,
        built: &mut Built,
    ) -> Result<Arc<Node>> {
        let given = options.clone();
        if let Some(inherited) = inherited {
            options.inherit(&inherited.options());
        }
        if place.nesting >= MAX_NESTING {
            return Err(Error::new(
                ErrorKind::Chain,
                format!("Options nest nodes more than {MAX_NESTING} deep"),
            ));
        }
        let Some(driver_name) = options.take_str("driver")? else {
            return Err(Error::new(
                ErrorKind::MissingOption,
                "Must specify either driver or file",
            ));
        };
        let driver = self.registry.find(&driver_name)?;
        let name = self.graph.reserve_name(options.take_str("node-name")?)?;
        let is_root = place.nesting == 0 && place.depth == 0;
        let made = Opening::new(self, given, options, place, built)
            .and_then(|opening| opening.make(co, driver, &driver_name, name.clone()));
        match made {
            Ok(node) => {
                if is_root {
                    built.root = Some(node.clone());
                }
                Ok(node)
            }
            Err(error) => {
                // A node that was made gives its name back itself.
                if self.graph.find_node(&name).is_none() {
                    self.graph.release_name(&name);
                }
                Err(error)
            }
        }
    }

    /// The loop over what images name.
    fn open_dependents(&self, co: &Co, built: &mut Built) -> Result<()> {
        while let Some(pending) = built.pending.pop_front() {
            let Pending {
                parent,
                role,
                key,
                name,
                format,
                existing,
                given,
                inherited,
                place,
            } = pending;
            let image = built.nodes[parent].node.clone();
            let wants = place.permissions;
            let located = |error: Error| match image.filename() {
                "" => error,
                file => error.at_file(file),
            };
            if place.depth > self.gate.max_depth() {
                return Err(located(Error::new(
                    ErrorKind::Chain,
                    format!(
                        "Could not open {role} file '{name}': the chain is more than {} images \
                         deep",
                        self.gate.max_depth()
                    ),
                )));
            }
            let exists = existing.is_some();
            let node = if let Some(node) = existing {
                if node
                    .file_id()
                    .is_some_and(|id| place.ancestors.contains(&id))
                {
                    let name = node.name();
                    let message = format!("Node '{name}' is already part of this chain of images");
                    return Err(located(Error::new(ErrorKind::Chain, message)));
                }
                node
            } else {
                let options = if given.has("file") || given.has("filename") || given.has("fd") {
                    given
                } else {
                    let mut options = self.gate.dependent(&Dependent {
                        role,
                        name: &name,
                        format: format.as_deref(),
                        image: image.filename(),
                        depth: place.depth,
                        read_only: inherited.read_only,
                    })?;
                    options.overlay(given);
                    options
                };
                self.open_node(co, options, Some(inherited), place, built)
                    .map_err(|error| error.context(format_args!("Could not open {role} file")))?
            };
            let child = Child::new(self.graph, key, role, node, wants, !exists)?;
            built.nodes[parent].children.push(child.clone());
            image.driver().attach(role, child).map_err(located)?;
        }
        Ok(())
    }
}
