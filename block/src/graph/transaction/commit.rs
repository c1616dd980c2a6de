//! The part of a transaction that happens with the graph locked: everything, or nothing.

use super::moving::{Moving, apart};
use super::{Parts, Step, edge_of, stands_on};
use crate::drain::{Parent, Section};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphWrite;
use crate::graph::permissions::Future;
use crate::node::Node;
use crate::types::ChildRole;
use coblock_coroutine::mutant;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Tells which nodes have no user any more.
pub(super) fn commit(write: &mut GraphWrite<'_>, parts: &mut Parts) -> Result<Vec<Arc<Node>>> {
    let Parts {
        steps,
        moves,
        actions,
    } = parts;
    let graph = write.graph().clone();
    let unused = graph.section(|section| {
        let mut future = Future::default();
        for step in &*steps {
            match step {
                Step::Users { from, to } => lead_users(&mut future, from, to, section),
                Step::Above(node) => {
                    let edge = stands_on(node).expect("it was looked at before");
                    let below = future.below(&edge);
                    lead_users(&mut future, &below, node, section);
                    section.nodes.push(below);
                }
                Step::Out(filter) => {
                    let edge = edge_of(filter, ChildRole::Filtered);
                    let below = future.below(&edge.expect("it was looked at before"));
                    lead_users(&mut future, filter, &below, section);
                    section.nodes.push(below);
                }
                Step::User { user, to } => future.lead(user.clone(), to.clone()),
                Step::Permissions { user, permissions } => future.permit(user, *permissions),
                Step::Reopen(reopening) => {
                    let node = &reopening.node;
                    if let Some(read_only) = reopening.to.read_only {
                        future.reopen(node, read_only);
                    }
                    if let Some(edges) = reopening.edges() {
                        future.give_edges(node, edges);
                    }
                }
            }
        }
        for moving in &*moves {
            for node in moving.nodes() {
                future.rehome(node, moving.to());
            }
        }
        future.settle();
        let asked = moves
            .iter()
            .try_for_each(|moving| moving.ask_again(section));
        let result = asked.and_then(|()| move_all(write, &future, moves, section));
        future.keep(section);
        result
    })?;
    for action in actions {
        action.commit(write);
    }
    Ok(unused)
}

/// All users of `from` go to `to`, but those that stand below it.
fn lead_users(future: &mut Future, from: &Arc<Node>, to: &Arc<Node>, section: &mut Section<'_>) {
    for user in future.users(from) {
        if !stands_at_or_below(future, &*user, to, section) {
            future.lead(user, to.clone());
        }
    }
}

fn move_all(
    write: &mut GraphWrite<'_>,
    future: &Future,
    rehomed: &mut [Moving],
    section: &mut Section<'_>,
) -> Result<Vec<Arc<Node>>> {
    for (user, to) in future.moves() {
        follow_children(to, section);
        refuse_unfit(user, to, section)?;
        refuse_two_homes(user, to, future, section)?;
    }
    for edge in future.edges_that_come() {
        let user: Arc<dyn Parent> = edge.clone();
        let below = edge.below();
        if below.requests().is_closed() {
            return Err(below.closed());
        }
        section.nodes.push(below);
        refuse_two_homes(&user, &edge.below(), future, section)?;
    }
    let permissions = future.prepare()?;
    // From here on nothing fails.
    permissions.commit();
    for moving in rehomed {
        moving.commit(section);
    }
    for edge in future.edges_that_go() {
        edge.leave(section);
    }
    for edge in future.edges_that_come() {
        edge.enter(section);
    }
    for (user, to) in future.moves() {
        let from = move_user(write, section, user, to);
        section.nodes.push(from);
    }
    for (user, _) in future.moves() {
        if let Some(owner) = user.owner()
            && !mutant!("limits stay those of a child that has gone")
        {
            refresh_limits(owner, section);
        }
    }
    Ok(future.removed())
}

/// The node was opened a while ago: if it is a filter, its child may have got another length since.
fn follow_children(node: &Arc<Node>, section: &mut Section<'_>) {
    let mut chain = vec![node.clone()];
    while let Some(edge) = edge_of(&chain[chain.len() - 1], ChildRole::Filtered) {
        let below = edge.below();
        chain.push(below);
    }
    for node in chain.iter().rev() {
        node.follow_child();
    }
    section.nodes.append(&mut chain);
}

/// Rule 5.4: the user stays quiesced while it moves; at an undrained node it is let go afterwards.
fn move_user(
    write: &mut GraphWrite<'_>,
    section: &mut Section<'_>,
    user: &Arc<dyn Parent>,
    to: &Arc<Node>,
) -> Arc<Node> {
    assert!(
        user.is_quiesced(),
        "rule 5.4: {} gets node '{}' as '{}' and is not quiesced",
        user.who(),
        to.name(),
        user.edge_name()
    );
    let from = match mutant!("a user stays with the node that it leaves") {
        true => user.end().now(),
        false => user.end().replace(write, to.clone()),
    };
    from.leave(&**user);
    to.enter(user);
    if !to.is_drained() {
        user.drained_end(section);
    }
    user.node_changed(from.len(), to.len(), section);
    user.moved(&to.home_context());
    from
}

/// Does the user belong to `top`, or to a node that `top` stands on?
fn stands_at_or_below(
    future: &Future,
    user: &dyn Parent,
    top: &Arc<Node>,
    section: &mut Section<'_>,
) -> bool {
    let Some(owner) = user.owner() else {
        return false;
    };
    section.nodes.push(owner.clone());
    let mut seen = BTreeSet::new();
    let mut look = vec![top.clone()];
    while let Some(node) = look.pop() {
        section.nodes.push(node.clone());
        if Arc::ptr_eq(&node, &owner) {
            return true;
        }
        if seen.insert(Arc::as_ptr(&node).addr()) {
            look.extend(future.children(&node));
        }
    }
    false
}

fn refuse_unfit(user: &Arc<dyn Parent>, to: &Arc<Node>, section: &mut Section<'_>) -> Result<()> {
    let from = user.end().now();
    // Closed since the transaction was made.
    let users = from.parents(section);
    if !users.iter().any(|other| Arc::ptr_eq(other, user)) {
        return Err(from.closed());
    }
    if to.requests().is_closed() {
        return Err(to.closed());
    }
    let (now, then) = (from.len(), to.len());
    if user.role() == Some(ChildRole::Filtered) && now != then {
        let message = format!(
            "{} filters {now} bytes and cannot get node '{}' of {then} bytes",
            user.who(),
            to.name()
        );
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(())
}

/// Edges join nodes of one home (rule 8.3). A backend lives where its node does, if it may.
fn refuse_two_homes(
    user: &Arc<dyn Parent>,
    to: &Arc<Node>,
    future: &Future,
    section: &mut Section<'_>,
) -> Result<()> {
    let home = future.home(to);
    if let Some(owner) = user.owner() {
        let above = future.home(&owner);
        let apart = (above.id() != home.id()).then(|| apart(&owner, &above, to, &home));
        section.nodes.push(owner);
        return apart.map_or(Ok(()), Err);
    }
    let from = user.end().now();
    let moves = future.home(&from).id() != home.id();
    section.nodes.push(from);
    if moves {
        user.may_move(to, &home, false)?;
    }
    Ok(())
}

/// What requests of `node` may be so that nobody takes them apart, and of all nodes above.
pub(super) fn refresh_limits(node: Arc<Node>, section: &mut Section<'_>) {
    let mut look = vec![node];
    while let Some(node) = look.pop() {
        if node.refresh_whole_limits() {
            for user in node.parents(section) {
                look.extend(user.owner());
            }
        }
        section.nodes.push(node);
    }
}
