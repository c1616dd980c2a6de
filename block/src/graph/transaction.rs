//! Changes of the graph while requests go through it: all or none (rule 8.2).
//!
//! ```text
//!   in a coroutine          drain every touched node; prepare the actions, one after the other
//!   in the main home,       where does each user lead to, is there a cycle, do permissions go together,
//!   outside of coroutines,  are drivers ready for them?   no: nothing has changed
//!   graph locked            edges move, permissions are taken, actions commit: nothing fails
//!   in the coroutine        or else abort the actions, the last one first; clean them always;
//!                           close what has no user any more; end the sections
//! ```
//! Edges move while both the node that they leave and the node that they come to are drained, so the
//! parent stays quiesced and no request of it is under way (rule 5.4). Permissions are computed on the
//! graph as it will be, so the order of steps inside a transaction does not matter.

mod commit;
mod moving;
mod reopen;
mod tree;

pub use reopen::Reopen;

use super::{Graph, GraphWrite};
use crate::backend::BlockBackend;
use crate::child::Child;
use crate::drain::{Drain, Drained, Parent, Quiesced, refuse_guard};
use crate::error::{Error, ErrorKind, Result};
use crate::node::{Node, close_if_unused};
use crate::types::{ChildRole, Permissions};
use coblock_aio::AioContext;
use coblock_coroutine::{Co, ThreadLock, mutant};
use commit::commit;
use moving::Moving;
use reopen::Reopening;
use std::collections::BTreeSet;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

/// A part of a transaction that is no edge: see [`Transaction::action`].
///
/// `prepare` does whatever can fail. All were prepared: all `commit`. One was not: those before it
/// `abort`, the last one first. `clean` comes for each that was prepared, at the end.
///
/// None of them opens a node in the same graph, changes a length by
/// [`BlockBackend::resize`], or runs another transaction: changes happen one after the other, and this
/// one is not over. In the coroutine of the transaction that is refused at once: it panics and names
/// both places. Nor does one wait for another coroutine that does so: nobody can see that, and both would
/// wait for ever.
pub trait Action: Send {
    /// Gets ready, with the nodes drained. Suspends.
    ///
    /// # Errors
    /// What keeps it from being ready; it has undone its part then, and neither `abort` nor `clean`
    /// follows.
    fn prepare(&mut self, co: &Co) -> Result<()>;

    /// It happens. Under the write lock: does not poll.
    fn commit(&mut self, graph: &mut GraphWrite<'_>);

    /// It does not happen: undoes what `prepare` did. Suspends.
    fn abort(&mut self, co: &Co) {
        let _ = co;
    }

    /// The last call, with the nodes still drained. Suspends.
    fn clean(&mut self, co: &Co) {
        let _ = co;
    }
}

/// One wish. What it means is found out when it happens: other transactions come before.
enum Step {
    /// All users of the one go to the other, but those that stand below it.
    Users { from: Arc<Node>, to: Arc<Node> },
    /// One comes above the node that it stands on.
    Above(Arc<Node>),
    /// A filter goes.
    Out(Arc<Node>),
    /// One user.
    User {
        user: Arc<dyn Parent>,
        to: Arc<Node>,
    },
    /// What a user holds and shares.
    Permissions {
        user: Arc<dyn Parent>,
        permissions: Permissions,
    },
    /// Other options.
    Reopen(Arc<Reopening>),
}

impl Step {
    /// Nodes that it is about, and of these the one whose users may change.
    fn nodes(&self) -> (Vec<Arc<Node>>, Arc<Node>) {
        let now = |edge: Option<Arc<Child>>| edge.expect("it was looked at before").below();
        match self {
            Step::Users { from, to } => (vec![from.clone(), to.clone()], from.clone()),
            Step::Above(node) => {
                let below = now(stands_on(node));
                (vec![below.clone(), node.clone()], below)
            }
            Step::Out(filter) => {
                let below = now(edge_of(filter, ChildRole::Filtered));
                (vec![filter.clone(), below], filter.clone())
            }
            Step::User { user, to } => {
                let from = user.end().now();
                (vec![from.clone(), to.clone()], from)
            }
            Step::Permissions { user, .. } => {
                let node = user.end().now();
                (vec![node.clone()], node)
            }
            Step::Reopen(reopening) => (reopening.nodes(), reopening.node.clone()),
        }
    }
}

/// What a transaction is made of; goes to the main home and back.
#[derive(Default)]
struct Parts {
    steps: Vec<Step>,
    moves: Vec<Moving>,
    actions: Vec<Box<dyn Action>>,
}

/// Changes of one graph that happen together or not at all (rule 8.2).
///
/// ```no_run
/// # use {coblock_block::{BlockBackend, Node, Transaction, Result}, coblock_coroutine::Co, std::sync::Arc};
/// # fn snapshot(co: &Co, disks: &[(BlockBackend, Arc<Node>)]) -> Result<()> {
/// // One overlay for each disk, opened with `backing=` the node that the disk has now.
/// let mut transaction = Transaction::new(disks[0].0.graph());
/// for (disk, overlay) in disks {
///     transaction.insert(overlay);
/// }
/// transaction.run(co)
/// # }
/// ```
#[must_use = "nothing happens before it is run"]
pub struct Transaction {
    graph: Arc<Graph>,
    parts: Parts,
    touched: Vec<Arc<Node>>,
    limit: Option<Duration>,
    /// What is left of the parts then is not what was asked for.
    has_run: bool,
    not_closed: Vec<Error>,
}

impl Transaction {
    /// Without any change yet.
    pub fn new(graph: &Arc<Graph>) -> Transaction {
        Transaction {
            graph: graph.clone(),
            parts: Parts::default(),
            touched: Vec::new(),
            limit: None,
            has_run: false,
            not_closed: Vec::new(),
        }
    }

    /// How long each of the nodes may take until it is drained, on the clock of the graph's main
    /// context; without it for ever.
    pub fn within(&mut self, limit: Duration) -> &mut Self {
        self.limit = Some(limit);
        self
    }

    /// All users of `from` get `to` instead; not those that are `to` itself or stand below it. If
    /// nobody uses `from` then, it is closed. Keep it with a [`BlockBackend`] that holds nothing.
    pub fn replace(&mut self, from: &Arc<Node>, to: &Arc<Node>) -> &mut Self {
        self.parts.steps.push(Step::Users {
            from: from.clone(),
            to: to.clone(),
        });
        self
    }

    /// Puts `above`, which was opened on an existing node, between that node and its other users: a
    /// filter, or an overlay for a snapshot.
    ///
    /// The existing node is the one that `above` filters, or else its backing file.
    ///
    /// # Panics
    /// When `above` has neither.
    #[track_caller]
    pub fn insert(&mut self, above: &Arc<Node>) -> &mut Self {
        assert!(
            stands_on(above).is_some(),
            "node '{}' neither filters another node nor has a backing file",
            above.name()
        );
        self.parts.steps.push(Step::Above(above.clone()));
        self
    }

    /// Takes a filter out: its users get the node that it filters, and it is closed.
    ///
    /// # Panics
    /// When `filter` is none.
    #[track_caller]
    pub fn remove(&mut self, filter: &Arc<Node>) -> &mut Self {
        assert!(
            edge_of(filter, ChildRole::Filtered).is_some(),
            "node '{}' is no filter",
            filter.name()
        );
        self.parts.steps.push(Step::Out(filter.clone()));
        self
    }

    /// One edge gets another node.
    pub fn set_child(&mut self, edge: &Arc<Child>, to: &Arc<Node>) -> &mut Self {
        self.user(edge.clone(), to)
    }

    /// One backend gets another node.
    pub fn set_node(&mut self, backend: &BlockBackend, to: &Arc<Node>) -> &mut Self {
        self.user(backend.as_parent(), to)
    }

    fn user(&mut self, user: Arc<dyn Parent>, to: &Arc<Node>) -> &mut Self {
        self.parts.steps.push(Step::User {
            user,
            to: to.clone(),
        });
        self
    }

    /// `backend` does and shares from then on what `permissions` say. Together with a
    /// [reopen](Transaction::reopen) of its node nobody comes in between: neither is the node writable
    /// without being locked for it, nor the lock given up for a reopen that fails.
    pub fn set_permissions(
        &mut self,
        backend: &BlockBackend,
        permissions: Permissions,
    ) -> &mut Self {
        self.parts.steps.push(Step::Permissions {
            user: backend.as_parent(),
            permissions,
        });
        self
    }

    /// `node` and all that is connected with it get the home `context` (rule 8.3): drivers' handlers,
    /// timers and sockets move there. Every driver and every backend must allow it
    /// ([`BlockBackend::allow_moves`]).
    #[track_caller]
    pub fn move_to(&mut self, node: &Arc<Node>, context: &Arc<AioContext>) -> &mut Self {
        self.moves(node, context, None)
    }

    /// The same as the wish of a backend, which is not asked then.
    #[track_caller]
    pub(crate) fn moves(
        &mut self,
        node: &Arc<Node>,
        context: &Arc<AioContext>,
        mover: Option<Arc<dyn Parent>>,
    ) -> &mut Self {
        let at = Location::caller();
        let moving = Moving::component(&self.graph, node, context, mover, at);
        self.parts.moves.push(moving);
        self
    }

    /// `node` gets other options while it stays open; see [`Transaction::reopen_options`] for those of
    /// its children too. List a parent before its children.
    pub fn reopen(&mut self, node: &Arc<Node>, to: Reopen) -> &mut Self {
        let reopening = Reopening::new(&self.graph, node, to);
        self.parts.steps.push(Step::Reopen(reopening.clone()));
        self.parts.actions.push(Box::new(reopening));
        self
    }

    /// Something else that happens with it, with `nodes` drained.
    pub fn action(&mut self, nodes: &[Arc<Node>], action: Box<dyn Action>) -> &mut Self {
        self.touched.extend(nodes.iter().cloned());
        self.parts.actions.push(action);
        self
    }

    /// Makes all the changes. From a coroutine of any context; suspends. Transactions of one graph
    /// happen one after the other.
    ///
    /// The coroutine must have no request of its own in flight: it would wait for itself. What failed is
    /// put together anew: a transaction is run once.
    ///
    /// # Errors
    /// `InUse` when a node stays busy longer than [`Transaction::within`] says; `Chain` for a cycle,
    /// `Conflict` where permissions do not go together, `ReadOnly`, `Closed`, `Invalid` where a filter
    /// would get a child of another length and when it was run before, else what an action or a driver
    /// said. The graph is as it was then. A node that was taken out and could not be closed properly is no
    /// error of the transaction, which has happened: [`Transaction::not_closed`].
    ///
    /// # Panics
    /// When the coroutine holds a graph guard; in an [`Action`] of another transaction of the graph.
    #[track_caller]
    pub fn run(&mut self, co: &Co) -> Result<()> {
        self.run_at(co, Location::caller())
    }

    fn run_at(&mut self, co: &Co, at: &'static Location<'static>) -> Result<()> {
        refuse_guard(co, "changes the graph");
        if std::mem::replace(&mut self.has_run, true) {
            let message = "A transaction that was run is run again";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let graph = self.graph.clone();
        let _one_at_a_time = graph.change(co, at);
        self.find_moves()?;
        if self.is_empty() {
            self.parts = Parts::default();
            return Ok(());
        }
        let sections = self.drain(co)?;
        let mut prepared = 0;
        let mut result = Ok(());
        for action in &mut self.parts.actions {
            result = action.prepare(co);
            if result.is_err() {
                break;
            }
            prepared += 1;
        }
        let mut detached = 0;
        for moving in &mut self.parts.moves {
            result = result.and_then(|()| moving.detach(co));
            if result.is_err() {
                break;
            }
            detached += 1;
        }
        let mut unused = Vec::new();
        if result.is_ok() {
            match self.commit_in_main(co) {
                Ok(nodes) => unused = nodes,
                Err(error) => result = Err(error),
            }
        }
        let Parts { moves, actions, .. } = &mut self.parts;
        if result.is_err() {
            for moving in moves[..detached].iter_mut().rev() {
                if !mutant!("a move that fails leaves handlers nowhere") {
                    moving.abort(co);
                }
            }
            if mutant!("an abort undoes the first step first") {
                actions[..prepared].reverse();
            }
            for action in actions[..prepared].iter_mut().rev() {
                if !mutant!("an abort leaves what was prepared") {
                    action.abort(co);
                }
            }
        } else {
            for moving in moves {
                moving.attach(co);
            }
        }
        for action in &mut actions[..prepared] {
            if !mutant!("a transaction leaves without cleaning") {
                action.clean(co);
            }
        }
        for node in unused {
            let name = node.name().to_owned();
            if let Err(error) = close_if_unused(co, &graph, node) {
                // It was flushed before, so nothing that was promised is lost.
                let error = error.context(format_args!("Could not close node '{name}'"));
                log::warn!("a node that was taken out of the graph: {error}");
                self.not_closed.push(error);
            }
        }
        drop(sections);
        self.parts = Parts::default();
        self.touched.clear();
        result
    }

    /// The same outside of coroutines, in the home of the graph's main context: polls it.
    ///
    /// # Errors
    /// As [`Transaction::run`].
    ///
    /// # Panics
    /// In a coroutine, and elsewhere than in the home of the main context.
    #[track_caller]
    pub fn run_blocking(&mut self) -> Result<()> {
        let graph = self.graph.clone();
        let (wait, main) = (graph.wait(), graph.main_context());
        assert!(
            main.is_current() && !coblock_coroutine::in_coroutine(),
            "rule 7.5: the graph is changed outside of coroutines elsewhere than in its main context \
             '{}'",
            main.name()
        );
        let ended = Arc::new(ThreadLock::new(None));
        let at = Location::caller();
        let mut running = std::mem::replace(self, Transaction::new(&graph));
        // Should it not come back.
        self.has_run = true;
        let started = coblock_aio::spawn("transaction", {
            let (ended, wait) = (ended.clone(), wait.clone());
            move |co| {
                let result = running.run_at(co, at);
                *ended.lock() = Some((result, running));
                wait.kick();
            }
        });
        started.map_err(|error| Error::new(ErrorKind::OutOfMemory, error.to_string()))?;
        wait.wait_while(main, || ended.lock().is_none());
        let (result, run) = ended.lock().take().expect("it has ended");
        *self = run;
        result
    }

    /// After [`Transaction::run`]: why nodes that it took out of the graph could not be closed properly.
    /// What was flushed is there; what a driver writes only when it is closed may not be: an image may
    /// be marked as in use still, or have leaked clusters.
    pub fn not_closed(&self) -> &[Error] {
        &self.not_closed
    }

    /// Nobody notices it: all that was to move is there already.
    fn is_empty(&self) -> bool {
        let Parts {
            steps,
            moves,
            actions,
        } = &self.parts;
        let nobody_moves = moves.iter().all(|moving| moving.nodes().next().is_none());
        steps.is_empty() && actions.is_empty() && nobody_moves
    }

    /// Who gets another home; nothing has happened yet if somebody refuses.
    fn find_moves(&mut self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for moving in &mut self.parts.moves {
            moving.find()?;
            for node in moving.nodes() {
                if !seen.insert(Arc::as_ptr(node).addr()) {
                    let message = "A transaction moves a node twice";
                    return Err(node.locate(Error::new(ErrorKind::Invalid, message)));
                }
            }
        }
        Ok(())
    }

    /// Every touched node, and what they write is on stable storage where a node may be closed.
    fn drain(&self, co: &Co) -> Result<Vec<Drained>> {
        let mut touched: Vec<Arc<Node>> = Vec::new();
        let mut left = Vec::new();
        for step in &self.parts.steps {
            let (nodes, from) = step.nodes();
            touched.extend(nodes);
            left.push(from);
        }
        touched.extend(self.touched.iter().cloned());
        for moving in &self.parts.moves {
            if !mutant!("nodes move without being drained") {
                touched.extend(moving.nodes().cloned());
            }
        }
        let mut seen = BTreeSet::new();
        touched.retain(|node| seen.insert(Arc::as_ptr(node).addr()));
        if let Some(closed) = touched.iter().find(|node| node.requests().is_closed()) {
            return Err(closed.closed());
        }
        // All are told before one is waited for: what is in flight on one may wait for what another
        // one of them does by itself, a connection, and that ends when it is told.
        let all = touched.clone();
        let one_by_one = mutant!("a section waits for one node before it tells the next");
        let _told = (all.len() > 1 && !one_by_one).then(|| {
            let graph = self.graph.clone();
            in_home(co, self.graph.main_context(), move || {
                Quiesced::each(&graph, &all)
            })
        });
        let mut sections = Vec::new();
        for node in &touched {
            sections.push(match self.limit {
                None => node.drain(co),
                Some(limit) => node.drain_within(co, limit).map_err(|busy| {
                    let message = format!("Node '{}' is busy: {busy}", node.name());
                    Error::new(ErrorKind::InUse, message)
                })?,
            });
        }
        for node in left {
            if !mutant!("what leaves the graph is not flushed") {
                node.flush(co, &self.graph.read(co))?;
            }
        }
        if mutant!("a transaction lets its nodes go too early") {
            sections.clear();
        }
        Ok(sections)
    }

    /// The second part. Tells which nodes have no user any more.
    fn commit_in_main(&mut self, co: &Co) -> Result<Vec<Arc<Node>>> {
        let main = self.graph.main_context().clone();
        // So that readers do not arrive for ever (rule 7.5).
        let _quiesced = in_home(co, &main, {
            let graph = self.graph.clone();
            move || Quiesced::all(&graph)
        });
        let parts = Arc::new(ThreadLock::new(std::mem::take(&mut self.parts)));
        let _waits = self.graph.lock.announce();
        let result = loop {
            // Listed before the attempt, with how many had left: who leaves after that is noticed,
            // also if it wakes while the attempt is still under way.
            let seen = {
                let mut waiting = self.graph.writers.lock();
                waiting.handles.push(co.wake_handle());
                waiting.left
            };
            let attempt = in_home(co, &main, {
                let (graph, parts) = (self.graph.clone(), parts.clone());
                move || {
                    let mut write = graph.try_write()?;
                    Some(commit(&mut write, &mut parts.lock()))
                }
            });
            match attempt {
                Some(result) => break result,
                None => {
                    while self.graph.writers.lock().left == seen
                        || mutant!("a reader that leaves wakes no transaction")
                    {
                        co.suspend();
                    }
                }
            }
        };
        self.graph.writers.lock().handles.clear();
        self.parts = std::mem::take(&mut *parts.lock());
        result
    }
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.parts.steps.iter().flat_map(|step| step.nodes().0);
        let names: Vec<_> = nodes.map(|node| node.name().to_owned()).collect();
        f.debug_struct("Transaction")
            .field("nodes", &names)
            .field("actions", &self.parts.actions.len())
            .finish_non_exhaustive()
    }
}

fn edge_of(node: &Arc<Node>, role: ChildRole) -> Option<Arc<Child>> {
    let edges = node.edges();
    edges.iter().find(|edge| edge.role() == role).cloned()
}

fn stands_on(node: &Arc<Node>) -> Option<Arc<Child>> {
    edge_of(node, ChildRole::Filtered).or_else(|| edge_of(node, ChildRole::Backing))
}

/// Calls `f` in the home of `context`, outside of coroutines. Suspends.
pub(crate) fn in_home<R: Send + 'static>(
    co: &Co,
    context: &Arc<AioContext>,
    f: impl FnOnce() -> R + Send + 'static,
) -> R {
    let done = Arc::new(ThreadLock::new(None));
    context.oneshot({
        let (done, handle) = (done.clone(), co.wake_handle());
        move || {
            let result = f();
            *done.lock() = Some(result);
            handle.wake();
        }
    });
    loop {
        let result = done.lock().take();
        match result {
            Some(result) => return result,
            None => co.suspend(),
        }
    }
}
