//! Who does what with a node, and lets others do it.
//!
//! ```text
//!   user (edge, backend)   holds, shares
//!   node                   holds what any user holds, shares what all users share     "cumulated"
//!   edge below a node      follows from its role and from what the node holds and shares
//! ```
//! So a change at one user goes down, parents before children: permissions are taken on the graph as it
//! will be, and those of what is being removed do not count. All or none: drivers prepare theirs (lock
//! bytes of a file) first. Everything here is under the graph's lock of sections, under which edges
//! stay.

use crate::child::Child;
use crate::drain::{Parent, Section};
use crate::error::{Error, ErrorKind, Result};
use crate::node::{Edges, Node};
use crate::types::{Perm, Permissions};
use coblock_aio::AioContext;
use coblock_coroutine::mutant;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

fn key<T: ?Sized>(of: &Arc<T>) -> usize {
    Arc::as_ptr(of).cast::<()>().addr()
}

/// The graph as it will be: users that lead elsewhere.
#[derive(Default)]
pub(crate) struct Future {
    /// By user: where it leads to.
    moves: BTreeMap<usize, (Arc<dyn Parent>, Arc<Node>)>,
    /// By node: who comes to it.
    coming: BTreeMap<usize, Vec<Arc<dyn Parent>>>,
    /// By node whose edges come and go: those that it will have.
    edges: BTreeMap<usize, (Arc<Node>, Edges)>,
    /// Edges that come.
    new: Vec<Arc<Child>>,
    /// Edges that go.
    going: BTreeMap<usize, Arc<Child>>,
    /// By user that will hold and share something else.
    permits: BTreeMap<usize, (Arc<dyn Parent>, Permissions)>,
    /// By node that becomes read-only, or writable.
    read_only: BTreeMap<usize, (Arc<Node>, bool)>,
    /// By node that moves: its home.
    homes: BTreeMap<usize, Arc<AioContext>>,
    /// Nodes that lose their last user.
    removed: BTreeSet<usize>,
    /// Where users came from.
    left: Vec<Arc<Node>>,
    /// What was looked at: perhaps the last references, whose destructors take the lock of sections.
    users_seen: RefCell<Vec<Arc<dyn Parent>>>,
    nodes_seen: RefCell<Vec<Arc<Node>>>,
}

impl Future {
    /// With `user` at `node`. The last word counts.
    pub(crate) fn lead(&mut self, user: Arc<dyn Parent>, node: Arc<Node>) {
        let user_key = key(&user);
        if let Some((_, before)) = self.moves.get(&user_key)
            && let Some(coming) = self.coming.get_mut(&key(before))
        {
            coming.retain(|other| key(other) != user_key);
        } else {
            self.left.push(user.end().now());
        }
        self.coming
            .entry(key(&node))
            .or_default()
            .push(user.clone());
        self.moves.insert(user_key, (user, node));
    }

    /// With other edges below `node`: those of `edges` that it has not are new.
    pub(crate) fn give_edges(&mut self, node: &Arc<Node>, edges: Edges) {
        let before = self.edges(node);
        for edge in before.iter() {
            if !edges.iter().any(|other| Arc::ptr_eq(other, edge)) {
                self.going.insert(key(edge), edge.clone());
                self.left.push(edge.below());
            }
        }
        for edge in edges.iter() {
            if !before.iter().any(|other| Arc::ptr_eq(other, edge)) {
                let coming = self.coming.entry(key(&edge.below())).or_default();
                coming.push(edge.clone());
                self.new.push(edge.clone());
            }
        }
        self.edges.insert(key(node), (node.clone(), edges));
    }

    /// The edges of `node`.
    fn edges(&self, node: &Arc<Node>) -> Edges {
        let changed = self.edges.get(&key(node));
        changed.map_or_else(|| node.edges(), |(_, edges)| edges.clone())
    }

    pub(crate) fn edges_that_go(&self) -> impl Iterator<Item = &Arc<Child>> {
        self.going.values()
    }

    pub(crate) fn edges_that_come(&self) -> impl Iterator<Item = &Arc<Child>> {
        self.new.iter()
    }

    /// Where the edges of `node` lead to.
    pub(crate) fn children(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let edges = self.edges(node);
        edges.iter().map(|edge| self.below(edge)).collect()
    }

    /// With `node` read-only or not.
    pub(crate) fn reopen(&mut self, node: &Arc<Node>, read_only: bool) {
        self.read_only.insert(key(node), (node.clone(), read_only));
    }

    /// With `user` holding and sharing that.
    pub(crate) fn permit(&mut self, user: &Arc<dyn Parent>, permissions: Permissions) {
        self.permits.insert(key(user), (user.clone(), permissions));
    }

    /// What `user` says itself that it will hold and share.
    fn own_permissions(&self, user: &Arc<dyn Parent>) -> Permissions {
        let changed = self.permits.get(&key(user));
        changed.map_or_else(|| user.end().permissions(), |(_, permissions)| *permissions)
    }

    /// With `node` at home in `context`.
    pub(crate) fn rehome(&mut self, node: &Arc<Node>, context: &Arc<AioContext>) {
        self.homes.insert(key(node), context.clone());
    }

    /// The home of `node`.
    pub(crate) fn home(&self, node: &Arc<Node>) -> Arc<AioContext> {
        let moved = self.homes.get(&key(node));
        moved.map_or_else(|| node.home_context(), Arc::clone)
    }

    fn is_read_only(&self, node: &Arc<Node>) -> bool {
        let changed = self.read_only.get(&key(node));
        changed.map_or_else(|| node.is_read_only(), |(_, read_only)| *read_only)
    }

    pub(crate) fn moves(&self) -> impl Iterator<Item = &(Arc<dyn Parent>, Arc<Node>)> {
        self.moves.values()
    }

    /// Where `edge` leads to.
    pub(crate) fn below(&self, edge: &Arc<Child>) -> Arc<Node> {
        let moved = self.moves.get(&key(edge));
        moved.map_or_else(|| edge.below(), |(_, node)| node.clone())
    }

    /// Users of `node`, the newest first.
    pub(crate) fn users(&self, node: &Arc<Node>) -> Vec<Arc<dyn Parent>> {
        let now = node.users_now();
        self.users_seen.borrow_mut().extend(now.iter().cloned());
        let coming = self.coming.get(&key(node)).into_iter().flatten();
        let staying = now.iter().rev().filter(|user| {
            !self.moves.contains_key(&key(user)) && !self.going.contains_key(&key(user))
        });
        let owner_stays = |user: &&Arc<dyn Parent>| {
            let owner = self.owner(user);
            owner.is_none_or(|owner| !self.removed.contains(&key(&owner)))
        };
        coming.chain(staying).filter(owner_stays).cloned().collect()
    }

    fn owner(&self, user: &Arc<dyn Parent>) -> Option<Arc<Node>> {
        let owner = user.owner()?;
        self.nodes_seen.borrow_mut().push(owner.clone());
        Some(owner)
    }

    /// Nothing that was looked at goes before the lock of sections does.
    pub(crate) fn keep(self, section: &mut Section<'_>) {
        section.parents.extend(self.users_seen.into_inner());
        section
            .parents
            .extend(self.moves.values().map(|(user, _)| user.clone()));
        section.nodes.extend(self.nodes_seen.into_inner());
        section.nodes.extend(self.left);
    }

    /// Finds out who loses the last user.
    pub(crate) fn settle(&mut self) {
        let mut look = self.left.clone();
        while let Some(node) = look.pop() {
            if !self.removed.contains(&key(&node)) && self.users(&node).is_empty() {
                self.removed.insert(key(&node));
                look.extend(self.children(&node));
            }
        }
    }

    /// Those that lose the last user and were led to before.
    pub(crate) fn removed(&self) -> Vec<Arc<Node>> {
        let mut seen = BTreeSet::new();
        let is_removed = |node: &&Arc<Node>| self.removed.contains(&key(node));
        let removed = self.left.iter().filter(is_removed);
        removed
            .filter(|node| seen.insert(key(node)))
            .cloned()
            .collect()
    }

    /// Nodes whose permissions may change, parents before children.
    ///
    /// # Errors
    /// `Chain`: an edge that leads elsewhere would lead to a node above it.
    fn order(&self, starts: Vec<Arc<Node>>) -> Result<Vec<Arc<Node>>> {
        let (mut entered, mut left) = (BTreeSet::new(), BTreeSet::new());
        let mut children_first = Vec::new();
        for start in starts {
            if self.removed.contains(&key(&start)) || !entered.insert(key(&start)) {
                continue;
            }
            let edges = self.edges(&start);
            let mut path = vec![(start, edges, 0)];
            while let Some((node, edges, next)) = path.last_mut() {
                let Some(edge) = edges.get(*next) else {
                    left.insert(key(node));
                    children_first.push(node.clone());
                    path.pop();
                    continue;
                };
                *next += 1;
                let below = self.below(edge);
                self.nodes_seen.borrow_mut().push(below.clone());
                if entered.insert(key(&below)) {
                    let edges = self.edges(&below);
                    path.push((below, edges, 0));
                } else if !left.contains(&key(&below)) {
                    let (child, parent) = (below.name(), node.name());
                    let name = edge.name();
                    let message = format!(
                        "Making '{child}' a {name} child of '{parent}' would create a cycle"
                    );
                    return Err(Error::new(ErrorKind::Chain, message));
                }
            }
        }
        children_first.reverse();
        Ok(children_first)
    }

    /// Takes what the users will hold, and lets drivers prepare it.
    ///
    /// # Errors
    /// `Chain` for a cycle, `Conflict` when two users do not go together, `ReadOnly`, else what a
    /// driver said. Everything is as before then.
    pub(crate) fn prepare(&self) -> Result<Prepared> {
        let mut starts: Vec<_> = self.moves().map(|(_, node)| node.clone()).collect();
        starts.extend(self.left.iter().cloned());
        starts.extend(self.read_only.values().map(|(node, _)| node.clone()));
        starts.extend(self.edges.values().map(|(node, _)| node.clone()));
        starts.extend(self.permits.values().map(|(user, _)| user.end().now()));
        // What hangs below the removed ones is used by fewer.
        let mut at = 0;
        while let Some(node) = starts.get(at).cloned() {
            at += 1;
            if self.removed.contains(&key(&node)) {
                starts.extend(self.children(&node));
            }
        }
        let mut prepared = Prepared::default();
        let mut cumulated: BTreeMap<usize, Permissions> = BTreeMap::new();
        for node in self.order(starts)? {
            let users: Vec<_> = self
                .users(&node)
                .into_iter()
                .map(|user| {
                    let above = self
                        .owner(&user)
                        .and_then(|owner| cumulated.get(&key(&owner)).map(|own| (owner, *own)));
                    let wants = match above {
                        Some((owner, own)) => user.needs(&owner, own, self.is_read_only(&owner)),
                        None => self.own_permissions(&user),
                    };
                    (user, wants)
                })
                .collect();
            refuse_conflicts(&node, &users)?;
            let all = if users.is_empty() {
                node.permissions()
            } else {
                users
                    .iter()
                    .fold(Permissions::NONE, |all, (_, one)| Permissions {
                        held: all.held | one.held,
                        shared: all.shared & one.shared,
                    })
            };
            if !mutant!("a read-only node gets writers") {
                node.refuse_writers(self.is_read_only(&node), all.held)?;
            }
            cumulated.insert(key(&node), all);
            prepared.users.extend(users);
            if all != node.permissions() {
                let told = node.driver().permissions_prepare(all);
                told.map_err(|error| node.locate(error))?;
                prepared.nodes.push((node, all));
            }
        }
        Ok(prepared)
    }
}

/// In the reference's words.
fn refuse_conflicts(node: &Node, users: &[(Arc<dyn Parent>, Permissions)]) -> Result<()> {
    for (unshares, has) in users {
        for (requires, wants) in users {
            let conflict = wants.held - has.shared;
            if Arc::ptr_eq(unshares, requires)
                || conflict.is_empty()
                || mutant!("permissions are taken that others do not share")
            {
                continue;
            }
            let names: Vec<_> = (0..Perm::BITS)
                .filter(|bit| conflict.bits() & 1 << bit != 0)
                .map(Perm::bit_name)
                .collect();
            let name = node.name();
            let uses = |user: &Arc<dyn Parent>| {
                format!(
                    "{} (uses node '{name}' as '{}' child)",
                    user.who(),
                    user.edge_name()
                )
            };
            return Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "Permission conflict on node '{name}': permissions '{}' are both required by {} \
                     and unshared by {}.",
                    names.join(", "),
                    uses(requires),
                    uses(unshares)
                ),
            ));
        }
    }
    Ok(())
}

/// Permissions that all agree with, and drivers are ready for. Dropped, nothing has changed.
#[derive(Default)]
pub(crate) struct Prepared {
    users: Vec<(Arc<dyn Parent>, Permissions)>,
    nodes: Vec<(Arc<Node>, Permissions)>,
}

impl Prepared {
    pub(crate) fn commit(mut self) {
        for (user, permissions) in self.users.drain(..) {
            user.end().set_permissions(permissions);
        }
        for (node, permissions) in self.nodes.drain(..) {
            node.set_permissions(permissions);
            node.driver().permissions_commit();
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        for (node, _) in self.nodes.drain(..).rev() {
            if !mutant!("a driver keeps permissions that somebody refused") {
                node.driver().permissions_abort();
            }
        }
    }
}

/// A user came to `node`, with what its end says: takes it.
///
/// # Errors
/// As [`Future::prepare`].
pub(crate) fn take(node: &Arc<Node>, section: &mut Section<'_>) -> Result<()> {
    let future = Future {
        left: vec![node.clone()],
        ..Future::default()
    };
    let taken = future.prepare().map(Prepared::commit);
    future.keep(section);
    taken
}

/// A user has left `node`, or holds less: the rest holds less.
pub(crate) fn relax(node: &Arc<Node>, section: &mut Section<'_>) {
    if let Err(error) = take(node, section) {
        log::warn!(
            "node '{}' keeps permissions that nobody needs: {error}",
            node.name()
        );
    }
}
