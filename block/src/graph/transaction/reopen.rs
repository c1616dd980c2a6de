//! Other options for a node that stays open.
//!
//! ```text
//!   prepare   the driver gets ready, or makes its successor; edges that come are made
//!   commit    permissions follow (`commit.rs`); the driver or its successor takes over
//!   clean     it writes what it can only write now; the one before lets go of what it has
//! ```

use super::Action;
use super::commit::refresh_limits;
use crate::child::Child;
use crate::driver::{Changes, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphWrite};
use crate::node::{Edges, Node};
use crate::options::Options;
use crate::types::ChildRole;
use coblock_coroutine::{Co, ThreadLock};
use std::sync::Arc;

/// Options that a node gets while it is open; what is not set stays as it is.
#[derive(Clone, Debug, Default)]
pub struct Reopen {
    /// Refuse writes.
    pub read_only: Option<bool>,
    /// Go around the host's page cache (`cache.direct`).
    pub direct: Option<bool>,
    /// Let discards reach the driver (`discard=unmap`).
    pub discard: Option<bool>,
    /// Skip flushes of the node's own storage (`cache.no-flush`).
    pub no_flush: Option<bool>,
    /// The driver's own, in place of those that it was opened with.
    pub options: Options,
    /// The backing file: `Some(None)` takes it away.
    pub backing: Option<Option<Arc<Node>>>,
}

impl Reopen {
    /// Does it change nothing of `node`?
    pub(super) fn is_empty(&self) -> bool {
        let switches = [self.read_only, self.direct, self.discard, self.no_flush];
        switches == [None; 4] && self.options.is_empty() && self.backing.is_none()
    }

    /// Must the driver know?
    fn concerns_driver(&self, node: &Node) -> bool {
        self.read_only.is_some_and(|to| to != node.is_read_only())
            || self.direct.is_some_and(|to| to != node.is_direct())
            || !self.options.is_empty()
            || self.backing.is_some()
    }
}

/// A node, what it is to become, and how far that is.
pub(super) struct Reopening {
    graph: Arc<Graph>,
    pub(super) node: Arc<Node>,
    pub(super) to: Reopen,
    state: ThreadLock<State>,
}

#[derive(Default)]
struct State {
    /// Who takes over at the commit, or has: the driver that there is, or its successor.
    driver: Option<Arc<dyn Driver>>,
    /// Edges that the node will have.
    edges: Option<Edges>,
    /// It happened; this was the driver before.
    before: Option<Arc<dyn Driver>>,
}

impl Reopening {
    pub(super) fn new(graph: &Arc<Graph>, node: &Arc<Node>, to: Reopen) -> Arc<Self> {
        Arc::new(Reopening {
            graph: graph.clone(),
            node: node.clone(),
            to,
            state: ThreadLock::default(),
        })
    }

    /// Nodes that it is about.
    pub(super) fn nodes(&self) -> Vec<Arc<Node>> {
        let mut nodes = vec![self.node.clone()];
        if let Some(backing) = &self.to.backing {
            let edges = self.node.edges();
            let now = edges
                .iter()
                .filter(|edge| edge.role() == ChildRole::Backing);
            nodes.extend(now.map(|edge| edge.below()));
            nodes.extend(backing.clone());
        }
        nodes
    }

    /// The edges that were made for it, once it is prepared.
    pub(super) fn edges(&self) -> Option<Edges> {
        self.state.lock().edges.clone()
    }

    fn future_edges(&self) -> Option<Edges> {
        let backing = self.to.backing.as_ref()?;
        let before = self.node.edges();
        let others = before
            .iter()
            .filter(|edge| edge.role() != ChildRole::Backing);
        let mut edges: Vec<_> = others.cloned().collect();
        if let Some(below) = backing {
            let (node, below) = (&self.node, below.clone());
            edges.push(Child::unentered(
                &self.graph,
                "backing",
                ChildRole::Backing,
                node,
                below,
            ));
        }
        Some(edges.into())
    }

    fn prepare_inner(&self, co: &Co) -> Result<()> {
        let node = &self.node;
        let driver = node.driver();
        if self.to.backing.is_some() && !driver.supports_backing() {
            let (format, name) = (node.format(), node.name());
            let message =
                format!("Driver '{format}' of node '{name}' does not support backing files");
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        let edges = self.future_edges();
        let mut options = node.options();
        options.overlay(self.to.options.clone());
        let now = node.edges();
        let guard = self.graph.read(co);
        let mut changes = Changes {
            was_read_only: node.is_read_only(),
            read_only: self.to.read_only.unwrap_or_else(|| node.is_read_only()),
            was_direct: node.is_direct(),
            direct: self.to.direct.unwrap_or_else(|| node.is_direct()),
            options,
            edges: edges.as_deref().unwrap_or(&now),
        };
        let successor = driver.reopen_prepare(co, &guard, &mut changes)?;
        let ready: Arc<dyn Driver> = successor.map_or(driver, Arc::from);
        let options = changes.options;
        if let Some(key) = self.to.options.keys().find(|key| options.has(key)) {
            ready.reopen_abort(co);
            let message = format!("Cannot change the option '{key}'");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let mut state = self.state.lock();
        state.driver = Some(ready);
        state.edges = edges;
        Ok(())
    }
}

impl Action for Arc<Reopening> {
    fn prepare(&mut self, co: &Co) -> Result<()> {
        if !self.to.concerns_driver(&self.node) {
            return Ok(());
        }
        self.prepare_inner(co)
            .map_err(|error| self.node.locate(error))
    }

    fn commit(&mut self, graph: &mut GraphWrite<'_>) {
        let (driver, edges) = {
            let state = self.state.lock();
            (state.driver.clone(), state.edges.clone())
        };
        if let Some(driver) = driver {
            driver.reopen_commit(graph);
            let before = self.graph.section(|section| {
                let before = self.node.serve(graph, section, driver, edges);
                refresh_limits(self.node.clone(), section);
                before
            });
            self.state.lock().before = Some(before);
        }
        self.node.reopened(&self.to);
    }

    fn abort(&mut self, co: &Co) {
        let driver = self.state.lock().driver.clone();
        if let Some(driver) = driver {
            driver.reopen_abort(co);
        }
    }

    fn clean(&mut self, co: &Co) {
        let state = std::mem::take(&mut *self.state.lock());
        let (Some(driver), Some(before)) = (state.driver, state.before) else {
            return;
        };
        let guard = self.graph.read(co);
        if !Arc::ptr_eq(&driver, &before) {
            before.replaced(co);
        }
        driver.reopen_clean(co, &guard);
    }
}
