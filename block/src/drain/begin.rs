//! How a drained section begins, and how it waits (rules 5.1, 5.11).
//!
//! The waiting side ([`Watch`]) announces itself in each table that it looks at, pays one heavy fence
//! for all of them, and looks at everything anew whenever something ended: edges may have changed (rule
//! 5.11). Where nobody is busy to begin with it announces nothing: one fence and one look are all.

use super::{Busy, Collected, Drained, Quiesced, Scope, are_idle, busy_with};
use crate::backend::{BlockBackend, Root};
use crate::graph::{Graph, in_home};
use crate::node::Node;
use crate::request_table::{InFlight, Wake};
use crate::sync::heavy_fence;
use coblock_aio::{AioContext, Timer};
use coblock_coroutine::{Co, Hold, mutant};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

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
    graph: Arc<Graph>,
    wanted: Wanted,
    /// Rule 5.6: its operations of several requests are waited for.
    operations_of: Option<&'a BlockBackend>,
}

impl Target<'_> {
    /// Or has a transaction given the backend another node while the section waited?
    fn is_drained_by(&self, begun: &Begun<'_>) -> bool {
        match (&self.wanted, &begun.quiesced.0) {
            (Wanted::NodeOf(root), Scope::Node(node, _)) => Arc::ptr_eq(&root.end.now(), node),
            _ => true,
        }
    }
}

/// What is to be drained. Which node of a backend that is shows when the section begins: a
/// transaction may come before.
#[derive(Clone)]
enum Wanted {
    Node(Arc<Node>),
    NodeOf(Arc<Root>),
    All,
}

impl Wanted {
    /// As things stand now; in the main home they stay so until it polls.
    fn scope(&self, graph: &Arc<Graph>) -> Scope {
        match self {
            Wanted::Node(node) => Scope::Node(node.clone(), graph.clone()),
            Wanted::NodeOf(root) => Scope::Node(root.end.now(), graph.clone()),
            Wanted::All => Scope::All(graph.clone()),
        }
    }
}

impl Drain for Arc<Node> {
    fn target(&self) -> Target<'_> {
        Target {
            graph: self.owner(),
            wanted: Wanted::Node(self.clone()),
            operations_of: None,
        }
    }
}

impl Drain for Arc<Graph> {
    fn target(&self) -> Target<'_> {
        Target {
            graph: self.clone(),
            wanted: Wanted::All,
            operations_of: None,
        }
    }
}

impl Drain for BlockBackend {
    fn target(&self) -> Target<'_> {
        Target {
            graph: self.graph().clone(),
            wanted: Wanted::NodeOf(self.root().clone()),
            operations_of: Some(self),
        }
    }
}

/// Rule 5.11: who waits for readers to leave, or for sections, is none itself.
///
/// # Panics
/// When the coroutine holds a graph guard.
#[track_caller]
pub(crate) fn refuse_guard(co: &Co, does: &str) {
    assert_eq!(
        co.holds(Hold::GraphRead),
        0,
        "rule 5.11: {co:?} {does} with a graph guard held"
    );
}

fn in_coroutine(
    target: &Target<'_>,
    co: &Co,
    limit: Option<Duration>,
) -> Result<Drained, DrainTimeout> {
    refuse_guard(co, "drains");
    let deadline = Deadline::new(&target.graph, limit);
    let mut before = None;
    loop {
        let (quiesced, is_idle) = quiesce_in_main(target, co);
        let begun = Begun {
            quiesced,
            operations_of: target.operations_of,
        };
        drop(before);
        if !is_idle && !begun.is_idle() {
            let _alarm = deadline.alarm(|| Wake::Coroutine(co.wake_handle()));
            let mut watch = Watch::new(&begun);
            while watch.is_busy(|| Wake::Coroutine(co.wake_handle())) {
                if deadline.is_over() {
                    return Err(watch.timeout());
                }
                while watch.is_listed() && !deadline.is_over() {
                    co.suspend();
                }
            }
        }
        if target.is_drained_by(&begun) {
            return Ok(begun.into_section());
        }
        before = Some(begun);
    }
}

/// Rule 5.1: a bottom half of the main context begins. Until then the coroutine counts as in
/// flight on the node, so that no other section of it is complete before this one has begun.
fn quiesce_in_main(target: &Target<'_>, co: &Co) -> (Quiesced, bool) {
    let main = target.graph.main_context();
    if main.is_current() {
        return Quiesced::begin_and_look(target.wanted.scope(&target.graph));
    }
    let counted = match target.wanted.scope(&target.graph) {
        Scope::Node(node, _) if !mutant!("a section that is about to begin is not in flight") => {
            Some(node)
        }
        _ => None,
    };
    if let Some(node) = &counted {
        node.section_begins();
    }
    let (wanted, graph) = (target.wanted.clone(), target.graph.clone());
    in_home(co, main, move || {
        let begun = Quiesced::begin_and_look(wanted.scope(&graph));
        if let Some(node) = counted {
            node.section_began();
        }
        begun
    })
}

#[track_caller]
fn outside(target: &Target<'_>, limit: Option<Duration>) -> Result<Drained, DrainTimeout> {
    let (wait, main) = (target.graph.wait(), target.graph.main_context());
    assert!(
        main.is_current() && !coblock_coroutine::in_coroutine(),
        "rule 5.1: a section is begun outside of coroutines elsewhere than in the main context '{}'",
        main.name()
    );
    let deadline = Deadline::new(&target.graph, limit);
    let mut before = None;
    loop {
        let (quiesced, is_idle) = Quiesced::begin_and_look(target.wanted.scope(&target.graph));
        let begun = Begun {
            quiesced,
            operations_of: target.operations_of,
        };
        drop(before);
        if !is_idle && !begun.is_idle() {
            let _alarm = deadline.alarm(|| Wake::Outside(wait.clone()));
            let mut watch = Watch::new(&begun);
            let mut busy = false;
            wait.wait_while(main, || {
                busy = watch.is_busy(|| Wake::Outside(wait.clone()));
                busy && !deadline.is_over()
            });
            if busy {
                return Err(watch.timeout());
            }
        }
        if target.is_drained_by(&begun) {
            return Ok(begun.into_section());
        }
        before = Some(begun);
    }
}

/// When a section gives up. What devices need to stop their threads counts, too.
struct Deadline {
    main: Arc<AioContext>,
    at_ns: Option<u64>,
}

impl Deadline {
    fn new(graph: &Arc<Graph>, limit: Option<Duration>) -> Deadline {
        let main = graph.main_context().clone();
        let after = |limit: Duration| {
            let ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
            main.now_ns().saturating_add(ns)
        };
        Deadline {
            at_ns: limit.map(after),
            main,
        }
    }

    fn is_over(&self) -> bool {
        self.at_ns.is_some_and(|at| self.main.now_ns() >= at)
    }

    /// Wakes who waits then.
    fn alarm(&self, wake: impl FnOnce() -> Wake) -> Option<Timer> {
        let at_ns = self.at_ns?;
        let wake = wake();
        let timer = self.main.timer("drain limit", move || wake.wake());
        timer.arm_at(at_ns);
        Some(timer)
    }
}

/// A section that has begun, and waits.
struct Begun<'a> {
    quiesced: Quiesced,
    operations_of: Option<&'a BlockBackend>,
}

impl Begun<'_> {
    fn into_section(self) -> Drained {
        Drained {
            quiesced: self.quiesced,
        }
    }

    /// Is nobody busy? Asked once, with parents quiesced: from then on it stays so.
    fn is_idle(&self) -> bool {
        match &self.quiesced.0 {
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
        let mut collected = self.quiesced.0.collect();
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

/// Who waits until nobody is busy.
struct Watch<'a> {
    begun: &'a Begun<'a>,
    /// In whose tables it is announced, all that it ever looked at.
    announced: Collected,
    /// Where it is listed: who wakes it.
    listed: Option<(Arc<dyn Busy>, u64)>,
}

impl<'a> Watch<'a> {
    fn new(begun: &'a Begun<'a>) -> Self {
        Watch {
            begun,
            announced: Collected::default(),
            listed: None,
        }
    }

    /// Who is looked at now; all of them are announced.
    fn look(&mut self) -> Vec<Arc<dyn Busy>> {
        let mut now = self.begun.collect();
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
            let others = || self.begun.is_busy_otherwise(&*busy);
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
            .filter_map(|busy| busy_with(&*busy, self.begun.has_operations(&*busy)));
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
