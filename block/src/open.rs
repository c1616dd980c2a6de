//! Building nodes from options, and the files that images name.
//!
//! A driver opens what the *options* name itself, one level inside the other: the caller wrote that
//! nesting. What an *image* names it only announces ([`Opening::dependent`]); [`open`] then asks
//! the gate and opens these one after the other in a loop, so no image decides how deep the stack
//! gets. Depth and loops are bounded there.

use crate::child::Child;
use crate::driver::{Driver, DriverRegistry};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::{Dependent, OpenGate};
use crate::graph::Graph;
use crate::node::{Node, NodeParts, close_unused};
use crate::options::Options;
use crate::types::{ChildRole, FileId, Perm, Permissions};
use coblock_aio::AioContext;
use coblock_coroutine::{Co, Hold};
use std::collections::VecDeque;
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
/// [`close_unused`].
///
/// # Errors
/// An option that is wrong, missing or known to nobody; what the host or a driver says; what the
/// gate refuses. Nothing stays open then.
///
/// # Panics
/// When the coroutine holds a graph guard.
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
pub fn open_unused(
    co: &Co,
    graph: &Arc<Graph>,
    registry: &DriverRegistry,
    gate: &dyn OpenGate,
    options: Options,
) -> Result<Arc<Node>> {
    open_for(co, (graph, registry, gate), options, Permissions::NONE)
}

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
    match result.and_then(|root| graph.settle(co, &new).map(|()| root)) {
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
    if node.users() == 0
        && let Err(error) = close_unused(co, graph, node)
    {
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

/// Options that a child has unless it says otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Inherited {
    pub(crate) read_only: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    pub(crate) force_share: bool,
    pub(crate) discard: bool,
}

impl Inherited {
    /// What a node with these gives to a child.
    pub(crate) fn through(self, role: ChildRole) -> Inherited {
        let backing = role == ChildRole::Backing;
        Inherited {
            read_only: self.read_only || backing,
            // What this node lets through is decided here, once.
            discard: !backing,
            ..self
        }
    }

    pub(crate) fn options(self) -> Options {
        let word = |on: bool| if on { "on" } else { "off" };
        Options::new()
            .with("read-only", word(self.read_only))
            .with("force-share", word(self.force_share))
            .with("cache.direct", word(self.direct))
            .with("cache.no-flush", word(self.no_flush))
            .with("discard", if self.discard { "unmap" } else { "ignore" })
    }
}

/// Takes the option `discard`.
///
/// # Errors
/// `Invalid` for a word that is none of its values.
pub(crate) fn take_discard(options: &mut Options) -> Result<Option<bool>> {
    match options.take_str("discard")?.as_deref() {
        None => Ok(None),
        Some("ignore" | "off") => Ok(Some(false)),
        Some("unmap" | "on") => Ok(Some(true)),
        Some(_) => Err(Error::new(ErrorKind::Invalid, "Invalid discard option")),
    }
}

/// What a driver sees of the node that it is opened for.
pub struct Opening<'a> {
    env: &'a Env<'a>,
    /// As the caller or the gate said, nothing inherited.
    given: Options,
    options: Options,
    place: Place,
    built: &'a mut Built,
    filename: String,
    read_only: bool,
    direct: bool,
    no_flush: bool,
    force_share: bool,
    discard: bool,
    children: Vec<Arc<Child>>,
    pending: Vec<Pending>,
}

impl<'a> Opening<'a> {
    fn new(
        env: &'a Env<'a>,
        given: Options,
        mut options: Options,
        place: Place,
        built: &'a mut Built,
    ) -> Result<Self> {
        let read_only = options.take_bool("read-only")?.unwrap_or(false);
        let force_share = options.take_bool("force-share")?.unwrap_or(false);
        if force_share && !read_only {
            return Err(Error::new(
                ErrorKind::Invalid,
                "force-share=on can only be used with read-only images",
            ));
        }
        let discard = take_discard(&mut options)?.unwrap_or(false);
        Ok(Opening {
            env,
            place,
            built,
            filename: String::new(),
            read_only,
            direct: options.take_bool("cache.direct")?.unwrap_or(false),
            no_flush: options.take_bool("cache.no-flush")?.unwrap_or(false),
            force_share,
            discard,
            children: Vec::new(),
            pending: Vec::new(),
            given,
            options,
        })
    }

    /// The graph in which the node will be: for guards to read from children while opening.
    pub fn graph(&self) -> &'a Arc<Graph> {
        self.env.graph
    }

    /// Where the driver has its handlers, timers and sockets; another context later, if the node
    /// moves ([`Driver::detach_context`]).
    pub fn home_context(&self) -> &'a Arc<AioContext> {
        self.env.graph.main_context()
    }

    /// What is left of the node's options. The driver takes what it knows.
    pub fn options(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Will writes be refused?
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Does the caller want to go around the host's page cache?
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Is the image opened whatever others do with it?
    pub fn is_force_share(&self) -> bool {
        self.force_share
    }

    /// Will discards reach the driver?
    pub fn is_discard(&self) -> bool {
        self.discard
    }

    /// What users of this node do with it, and let others do.
    pub fn permissions(&self) -> Permissions {
        self.place.permissions
    }

    /// Is that file not one of the images above in this chain? Asked before it is locked.
    ///
    /// # Errors
    /// `Chain` when it is: the chain comes back to itself.
    pub fn check_file(&self, id: FileId) -> Result<()> {
        if self.place.ancestors.contains(&id) {
            let message = format!(
                "'{}' is already part of this chain of images",
                self.filename
            );
            return Err(Error::new(ErrorKind::Chain, message));
        }
        Ok(())
    }

    /// The name for messages. Without one it is that of the first child.
    pub fn set_filename(&mut self, filename: impl Into<String>) {
        self.filename = filename.into();
    }

    /// Options that a child has unless it says otherwise.
    fn inherited(&self, role: ChildRole) -> Inherited {
        let own = Inherited {
            read_only: self.read_only,
            direct: self.direct,
            no_flush: self.no_flush,
            force_share: self.force_share,
            discard: self.discard,
        };
        own.through(role)
    }

    fn place_of(&self, role: ChildRole, read_only: bool) -> Place {
        let mut place = self.place.clone();
        place.permissions = role.permissions(place.permissions, read_only, self.force_share);
        place
    }

    /// Opens the child that the options call `key`: either a set of options under `key.`, or the
    /// name of a node that exists.
    ///
    /// # Errors
    /// `MissingOption` when the options do not say it, else what opening says.
    pub fn open_child(
        &mut self,
        co: &Co,
        key: &'static str,
        role: ChildRole,
    ) -> Result<Arc<Child>> {
        let mut own = false;
        self.given.split(key);
        let node = if let Some(name) = self.options.take_str(key)? {
            self.find_node(&name)?
        } else {
            let options = self.options.split(key);
            if options.is_empty() {
                return Err(Error::new(
                    ErrorKind::MissingOption,
                    format!("A block device must be specified for \"{key}\""),
                ));
            }
            let mut place = self.place_of(role, self.read_only);
            place.nesting += 1;
            let inherited = Some(self.inherited(role));
            own = true;
            self.env
                .open_node(co, options, inherited, place, self.built)?
        };
        if self.filename.is_empty() {
            self.filename = node.filename().to_owned();
        }
        let wants = self.place_of(role, self.read_only).permissions;
        let child = Child::new(self.env.graph, key, role, node, wants, own)?;
        self.children.push(child.clone());
        Ok(child)
    }

    fn find_node(&self, name: &str) -> Result<Arc<Node>> {
        self.env.graph.find_node(name).ok_or_else(|| {
            let message = format!("Cannot find node-name='{name}'");
            Error::new(ErrorKind::NotFound, message)
        })
    }

    /// Tells that the image names a file, in the format that it says or in none. After the driver
    /// is made it is opened as the gate says and given to [`Driver::attach`]. Options under `key`
    /// go before what the image says; `key` itself names a node that exists and is used instead; an
    /// empty `key` keeps the file out, and so does [`Opening::without_dependents`].
    ///
    /// # Errors
    /// For options of the wrong kind; `NotFound` for the name of a node.
    pub fn dependent(
        &mut self,
        key: &'static str,
        role: ChildRole,
        name: &str,
        format: Option<&str>,
    ) -> Result<()> {
        let given = self.options.split(key);
        self.given.split(key);
        let mut existing = None;
        match self.options.take_str(key)?.as_deref() {
            None => {}
            Some("") => return Ok(()),
            Some(_) if !given.is_empty() => {
                let message = format!("'{key}' names a node, and there are options under '{key}.'");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            Some(node) => existing = Some(self.find_node(node)?),
        }
        let inherited = self.inherited(role);
        let mut place = self.place_of(role, inherited.read_only);
        place.nesting = 0;
        place.depth += 1;
        self.pending.push(Pending {
            parent: usize::MAX,
            role,
            key,
            name: name.to_owned(),
            format: format.map(str::to_owned),
            existing,
            given,
            inherited,
            place,
        });
        Ok(())
    }

    /// Forgets what [`Opening::dependent`] announced: for callers that look at an image alone.
    pub fn without_dependents(&mut self) {
        self.pending.clear();
    }

    fn make(
        mut self,
        co: &Co,
        opener: &dyn crate::driver::OpenDriver,
        driver_name: &str,
        name: String,
    ) -> Result<Arc<Node>> {
        let opened = opener
            .open(co, &mut self)
            .and_then(|driver| self.check(driver, driver_name));
        let driver = match opened {
            Ok(driver) => driver,
            Err(error) => {
                self.abandon();
                return Err(error);
            }
        };
        let storage = |role| matches!(role, ChildRole::Storage | ChildRole::Filtered);
        let file_id = driver.file_id().or_else(|| {
            let child = self.children.iter().find(|child| storage(child.role()))?;
            child.below().file_id()
        });
        let parts = NodeParts {
            name,
            filename: std::mem::take(&mut self.filename),
            read_only: self.read_only,
            discard: self.discard,
            no_flush: self.no_flush,
            direct: self.direct,
            options: std::mem::take(&mut self.given).only_text(),
            driver,
            below: self
                .children
                .iter()
                .map(|child| (child.below().whole_limits(), child.role()))
                .collect(),
            file_id,
            force_share: self.force_share,
            permissions: self.place.permissions,
        };
        let node = match Node::new(self.env.graph, parts) {
            Ok(node) => node,
            Err(error) => {
                self.abandon();
                return Err(error);
            }
        };
        let parent = self.built.nodes.len();
        for mut pending in self.pending {
            pending.parent = parent;
            pending.place.ancestors.extend(file_id);
            self.built.pending.push_back(pending);
        }
        self.built.nodes.push(Unfinished {
            node: node.clone(),
            children: self.children,
        });
        Ok(node)
    }

    /// Options that nobody took, and files that come back.
    fn check(&mut self, driver: Box<dyn Driver>, driver_name: &str) -> Result<Box<dyn Driver>> {
        if let Some(key) = self.options.keys().next() {
            // What stands on another node is a format to a reader of the message, `raw` too.
            let message = if driver.is_format() || !self.children.is_empty() {
                format!("Block format '{driver_name}' does not support the option '{key}'")
            } else {
                format!("Block protocol '{driver_name}' doesn't support the option '{key}'")
            };
            return Err(Error::new(ErrorKind::UnknownOption, message));
        }
        driver.file_id().map_or(Ok(()), |id| self.check_file(id))?;
        Ok(driver)
    }

    /// The driver failed: its children have no parent that would close them.
    fn abandon(&mut self) {
        for child in self.children.drain(..) {
            self.built.abandoned.extend(child.detach());
        }
    }
}
