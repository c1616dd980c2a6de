//! What a driver sees while its node is opened: options, children, files that the image names.

use super::{Built, Env, Inherited, Pending, Place, Unfinished, take_discard};
use crate::child::Child;
use crate::driver::{Driver, OpenDriver};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::node::{Node, NodeParts};
use crate::options::Options;
use crate::types::{ChildRole, FileId, Permissions};
use coblock_aio::AioContext;
use coblock_coroutine::Co;
use std::sync::Arc;

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
    pub(super) fn new(
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

    pub(super) fn make(
        mut self,
        co: &Co,
        opener: &dyn OpenDriver,
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
