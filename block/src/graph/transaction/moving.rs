//! Nodes get another home context (rule 8.3).
//!
//! ```text
//!   find      the whole connected component; every driver and every user may refuse    nothing has changed
//!             (the transaction drains all of it)
//!   detach    in the old home: handlers, timers and sockets of drivers leave it
//!   commit    under the lock of sections: the home is the new one, users are told
//!   attach    in the new home: handlers, timers and sockets come there
//!             (the transaction ends its sections: drivers go on, in the new home)
//! ```
//! An abort attaches to the old home what was detached there, the last one first.
//!
//! Edges join nodes of one home only. `open` sees to that for new nodes ([`Graph::settle`]); a step of
//! a transaction that would join two homes is refused.

use super::in_home;
use crate::drain::{Drain, Parent, Section};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::node::Node;
use coblock_aio::{AioContext, Resident};
use coblock_coroutine::{Co, mutant};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::Location;
use std::sync::Arc;

/// One node on its way.
struct Going {
    node: Arc<Node>,
    from: Arc<AioContext>,
    /// Its place in the new home; none in the main one, which ends last anyway.
    resident: Option<Resident>,
}

/// A component on its way to another home.
pub(super) struct Moving {
    graph: Arc<Graph>,
    to: Arc<AioContext>,
    what: What,
    /// How they came there: for who ends that context with them in it.
    how: String,
    going: Vec<Going>,
}

/// What moves.
enum What {
    /// All that is connected with this node. The user that wants it is not asked.
    Component(Arc<Node>, Option<Arc<dyn Parent>>),
    /// These alone, which were just opened.
    New(Vec<Arc<Node>>),
}

impl Moving {
    pub(super) fn component(
        graph: &Arc<Graph>,
        node: &Arc<Node>,
        to: &Arc<AioContext>,
        mover: Option<Arc<dyn Parent>>,
        at: &'static Location<'static>,
    ) -> Moving {
        Moving {
            graph: graph.clone(),
            to: to.clone(),
            what: What::Component(node.clone(), mover),
            how: format!("moved at {at}"),
            going: Vec::new(),
        }
    }

    /// Finds who goes, and asks everybody.
    ///
    /// # Errors
    /// `Closed`: the node, or one of the contexts; `Conflict`: a user does not allow it; what a driver
    /// says. Nothing has changed then.
    pub(super) fn find(&mut self) -> Result<()> {
        let graph = self.graph.clone();
        self.going = graph.section(|section| {
            let nodes = match &self.what {
                What::Component(start, _) if start.requests().is_closed() => {
                    return Err(start.closed());
                }
                What::Component(start, _) => component(start, section),
                What::New(nodes) => nodes.clone(),
            };
            if !mutant!("nobody is asked before a move") {
                self.ask(&nodes, section)?;
            }
            let mut going = Vec::new();
            for node in nodes {
                let from = node.home_context();
                if Arc::ptr_eq(&from, &self.to) {
                    section.nodes.push(node);
                    continue;
                }
                if from.has_ended() {
                    return Err(ended(&node, &from));
                }
                going.push(Going {
                    node,
                    from,
                    resident: None,
                });
            }
            Ok(going)
        })?;
        Ok(())
    }

    /// Do all users and drivers of `nodes` allow it?
    fn ask(&self, nodes: &[Arc<Node>], section: &mut Section<'_>) -> Result<()> {
        let mover = match &self.what {
            What::Component(_, mover) => mover.as_ref(),
            What::New(_) => None,
        };
        for node in nodes {
            if Arc::ptr_eq(&node.home_context(), &self.to) {
                continue;
            }
            let allowed = node.driver().may_move(&self.to);
            allowed.map_err(|error| node.locate(error))?;
            for user in node.parents(section) {
                let wants_it = mover.is_some_and(|mover| Arc::ptr_eq(mover, &user));
                user.may_move(node, &self.to, wants_it)?;
            }
        }
        Ok(())
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.going.iter().map(|going| &going.node)
    }

    pub(super) fn to(&self) -> &Arc<AioContext> {
        &self.to
    }

    /// With the nodes drained: they leave their old home. Suspends.
    ///
    /// # Errors
    /// `Closed`: the new home has ended; they stay then.
    pub(super) fn detach(&mut self, co: &Co) -> Result<()> {
        if !Arc::ptr_eq(&self.to, self.graph.main_context()) {
            for going in &mut self.going {
                if mutant!("a home may end with nodes that moved there") {
                    continue;
                }
                let name = going.node.name();
                let place = self.to.reside(format!("node '{name}', {}", self.how));
                going.resident = Some(place.ok_or_else(|| ended(&going.node, &self.to))?);
            }
        }
        for (home, nodes) in self.by_old_home() {
            if mutant!("handlers stay in the old home") {
                continue;
            }
            in_home(co, &home.clone(), move || {
                for node in nodes {
                    node.driver().detach_context(&home);
                }
            });
        }
        Ok(())
    }

    /// The sections have been kept: asks again, since users come meanwhile.
    ///
    /// # Errors
    /// As [`Moving::find`].
    pub(super) fn ask_again(&self, section: &mut Section<'_>) -> Result<()> {
        let nodes: Vec<_> = self.nodes().cloned().collect();
        if mutant!("who comes while a move drains is not asked") {
            return Ok(());
        }
        self.ask(&nodes, section)
    }

    /// The home is the new one. Nothing fails.
    pub(super) fn commit(&mut self, section: &mut Section<'_>) {
        for going in &mut self.going {
            if going.node.requests().is_closed() {
                // Closed meanwhile: it lives nowhere.
                going.resident = None;
                continue;
            }
            going.node.set_home(&self.to, going.resident.take());
            for user in going.node.parents(section) {
                if !mutant!("a device is not told that its node moved") {
                    user.moved(&self.to);
                }
            }
        }
    }

    /// They come to the new home. Suspends.
    pub(super) fn attach(&mut self, co: &Co) {
        let to = self.to.clone();
        let nodes: Vec<_> = self.going.drain(..).rev().map(|going| going.node).collect();
        if !nodes.is_empty() {
            let there = match mutant!("handlers come to the new home from elsewhere") {
                true => self.graph.main_context().clone(),
                false => to.clone(),
            };
            in_home(co, &there, move || attach(&nodes, &to));
        }
    }

    /// They come back to the old one. Suspends.
    pub(super) fn abort(&mut self, co: &Co) {
        for (home, mut nodes) in self.by_old_home().into_iter().rev() {
            nodes.reverse();
            in_home(co, &home.clone(), move || attach(&nodes, &home));
        }
        self.going.clear();
    }

    /// One home, but for nodes that are just being opened above others.
    fn by_old_home(&self) -> Vec<(Arc<AioContext>, Vec<Arc<Node>>)> {
        let mut homes: BTreeMap<u64, (Arc<AioContext>, Vec<Arc<Node>>)> = BTreeMap::new();
        for Going { node, from, .. } in &self.going {
            let entry = homes.entry(from.id());
            let (_, nodes) = entry.or_insert_with(|| (from.clone(), Vec::new()));
            nodes.push(node.clone());
        }
        homes.into_values().collect()
    }
}

fn attach(nodes: &[Arc<Node>], to: &Arc<AioContext>) {
    for node in nodes {
        node.driver().attach_context(to);
    }
}

fn ended(node: &Node, context: &AioContext) -> Error {
    let message = format!("The event loop '{}' has ended", context.name());
    node.locate(Error::new(ErrorKind::Closed, message))
}

/// What is connected with `start` by edges, each once. Not what is being closed.
fn component(start: &Arc<Node>, section: &mut Section<'_>) -> Vec<Arc<Node>> {
    let mut seen = BTreeSet::from([Arc::as_ptr(start).addr()]);
    let mut nodes = vec![start.clone()];
    let mut at = 0;
    while let Some(node) = nodes.get(at).cloned() {
        at += 1;
        let above = node.parents(section);
        let alone = mutant!("those above a node that moves stay behind");
        let above = above.iter().filter(|_| !alone);
        let above = above.filter_map(|user| user.owner());
        let edges = node.edges();
        let below = edges.iter().map(|edge| edge.below());
        for next in above.chain(below) {
            section.nodes.push(next.clone());
            if !next.requests().is_closed() && seen.insert(Arc::as_ptr(&next).addr()) {
                nodes.push(next);
            }
        }
        section.nodes.push(node);
    }
    nodes
}

impl Graph {
    /// `new` were just opened, perhaps on nodes that live elsewhere: they go there. Suspends.
    ///
    /// # Errors
    /// `Conflict`: those live in different contexts; as [`Moving::find`].
    pub(crate) fn settle(
        self: &Arc<Graph>,
        co: &Co,
        new: &[Arc<Node>],
        at: &'static Location<'static>,
    ) -> Result<()> {
        if self.section(|section| foreign(new, section)).is_empty()
            || mutant!("a new node does not go where those below it live")
        {
            return Ok(());
        }
        // What moves now is there afterwards.
        let _one_at_a_time = self.change(co, at);
        let there = self.section(|section| foreign(new, section));
        let Some((node, to)) = there.first() else {
            return Ok(());
        };
        let beside = self.section(|section| beside(new, section));
        if let Some((other, elsewhere)) = beside.iter().find(|(_, home)| home.id() != to.id()) {
            return Err(apart(node, to, other, elsewhere));
        }
        let mut moving = Moving {
            graph: self.clone(),
            to: to.clone(),
            what: What::New(new.to_vec()),
            how: format!("opened on node '{}'", node.name()),
            going: Vec::new(),
        };
        moving.find()?;
        let sections: Vec<_> = moving.nodes().map(|node| node.drain(co)).collect();
        moving.detach(co)?;
        self.section(|section| moving.commit(section));
        moving.attach(co);
        drop(sections);
        Ok(())
    }
}

/// Nodes that `new` stand on and that were there before, with their homes.
fn beside(new: &[Arc<Node>], section: &mut Section<'_>) -> Vec<(Arc<Node>, Arc<AioContext>)> {
    let is_new = |node: &Arc<Node>| new.iter().any(|new| Arc::ptr_eq(new, node));
    let beside: Vec<_> = new
        .iter()
        .flat_map(|node| {
            node.edges()
                .iter()
                .map(|edge| edge.below())
                .collect::<Vec<_>>()
        })
        .filter(|node| !is_new(node))
        .map(|node| (node.clone(), node.home_context()))
        .collect();
    section
        .nodes
        .extend(beside.iter().map(|(node, _)| node.clone()));
    beside
}

/// The same, of those that live elsewhere than `new` do.
fn foreign(new: &[Arc<Node>], section: &mut Section<'_>) -> Vec<(Arc<Node>, Arc<AioContext>)> {
    let mut beside = beside(new, section);
    let Some(own) = new.first().map(|node| node.home_context()) else {
        return Vec::new();
    };
    beside.retain(|(_, home)| home.id() != own.id());
    beside
}

/// The error of an edge that would join two homes.
pub(super) fn apart(a: &Node, of_a: &AioContext, b: &Node, of_b: &AioContext) -> Error {
    let message = format!(
        "Node '{}' lives in context '{}' and node '{}' in '{}': one of them moves first",
        a.name(),
        of_a.name(),
        b.name(),
        of_b.name()
    );
    Error::new(ErrorKind::Conflict, message)
}
