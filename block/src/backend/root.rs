//! A backend as its node sees it: what holds requests back in a drained section (rules 5.5, 5.6).
//!
//! ```text
//!   request: begin in the table (counted) -> section? no: go on
//!                                            yes: not counted any more, queue
//!   last end: count each in `resuming`, wake it; it begins in the table, then leaves `resuming`
//! ```
//! Whether there is a section is a bit in the request table, which every request looks at anyway.
//! That test is repeated under the queue's lock, in one step with enqueueing.

use crate::accounting::Accounting;
use crate::drain::{Busy, Collected, Parent, Section};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{End, Graph};
use crate::node::Node;
use crate::request_table::{RequestKind, RequestTable};
use crate::throttle::{Direction, Member, ThrottleGroup};
use crate::types::Permissions;
use coblock_aio::AioContext;
use coblock_coroutine::{Co, ThreadLock, WakeHandle, mutant};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// What a device, an export or another user of a backend does in drained sections (rules 5.1, 5.5,
/// 5.9).
///
/// `drained_begin`, `drained_end` and `drained_poll` are called under a lock of the graph: they
/// neither wait nor call anything of the graph or a backend but [`BlockBackend::kick`].
///
/// [`BlockBackend::kick`]: crate::BlockBackend::kick
pub trait Device: Send + Sync {
    /// A first section begins: send nothing new.
    fn drained_begin(&self) {}

    /// The last section ended.
    fn drained_end(&self) {}

    /// Is it still busy with something that is no request? Whoever changes that calls
    /// [`BlockBackend::kick`](crate::BlockBackend::kick).
    fn drained_poll(&self) -> bool {
        false
    }

    /// The backend is `len` bytes long now: the guest is to be told. Under a lock of the graph, as
    /// `drained_begin`.
    fn resized(&self, len: u64) {
        let _ = len;
    }

    /// All nodes are being drained: when this returns nothing is new or pending outside of the main
    /// context. It may stop a thread of the device and save where in its queues it is; the device
    /// goes on after the section, with the guest's next notification (rule 5.9). Called in the main
    /// context, without locks, after `drained_begin`.
    ///
    /// It may wait for a thread that waits for requests: this section holds them back only once all
    /// devices have returned. An earlier section that lasts still may hold them back: such a thread
    /// cannot be waited for ([`BlockBackend::queued`] tells), and does nothing until both have ended.
    /// The time that this takes counts in the section's limit, which does not interrupt it.
    ///
    /// [`BlockBackend::queued`]: crate::BlockBackend::queued
    fn drain_threads(&self) {}

    /// May the node of the backend get the home `to` (rule 8.3)? Under a lock of the graph, as
    /// `drained_begin`. [`BlockBackend::allow_moves`](crate::BlockBackend::allow_moves) is asked
    /// apart from that.
    fn may_move(&self, to: &Arc<AioContext>) -> bool {
        let _ = to;
        true
    }

    /// It lives in `to` now. Still drained, and under a lock of the graph.
    fn moved(&self, to: &Arc<AioContext>) {
        let _ = to;
    }
}

#[derive(Default)]
struct Gate {
    /// Rule 5.4: the node is drained, and told so through this edge.
    quiesced: bool,
    /// Rule 5.9: requests go on until threads of devices have stopped, which may wait for them.
    passing: bool,
    /// Rule 8.3: the node may move by the wish of others.
    moves: bool,
    /// Number of the context of which the device knows.
    home: u64,
    /// Rule 5.6: off for who would block its own pausing.
    no_queueing: bool,
    /// By ticket: first come, first served.
    queue: BTreeMap<u64, Queued>,
    next_ticket: u64,
    device: Option<Arc<dyn Device>>,
    throttle: Option<Arc<Member>>,
}

struct Queued {
    handle: WakeHandle,
    /// Does it go on as a request, counted, or only look again?
    counted: bool,
}

impl Gate {
    fn must_queue(&self) -> bool {
        self.quiesced && !self.no_queueing && !self.passing
    }

    /// Lets all go on that wait. Each is counted before it is woken.
    fn open(&mut self, resuming: &AtomicU32, woken: &mut Vec<WakeHandle>) {
        let reversed = mutant!("who was held back last goes on first");
        let next = |queue: &mut BTreeMap<u64, Queued>| match reversed {
            true => queue.pop_last(),
            false => queue.pop_first(),
        };
        while let Some((_, queued)) = next(&mut self.queue) {
            if queued.counted && !mutant!("a request that goes on is not counted") {
                resuming.fetch_add(1, Ordering::SeqCst);
            }
            woken.push(queued.handle);
        }
    }
}

/// What a backend and its node share.
// In this order: what sections and requests touch lies together.
#[repr(C)]
pub(crate) struct Root {
    pub(crate) end: End,
    /// Woken, and not in the table yet.
    resuming: AtomicU32,
    /// Operations made of several requests (rule 5.6).
    operations: AtomicU32,
    /// Is there a device? Sections of many nodes ask each time, most of them for nothing. Changed
    /// under `gate`.
    has_device: AtomicBool,
    gate: ThreadLock<Gate>,
    pub(crate) requests: RequestTable,
    pub(crate) accounting: Accounting,
    /// Requests that were traced.
    traced: AtomicU64,
}

impl Root {
    pub(crate) fn new(graph: &Graph, node: Arc<Node>, permissions: Permissions) -> Arc<Root> {
        let gate = Gate {
            home: node.home_context().id(),
            ..Gate::default()
        };
        Arc::new(Root {
            end: End::new(graph, node, permissions),
            requests: RequestTable::new(),
            accounting: Accounting::new(),
            traced: AtomicU64::new(0),
            gate: ThreadLock::new(gate),
            resuming: AtomicU32::new(0),
            operations: AtomicU32::new(0),
            has_device: AtomicBool::new(false),
        })
    }

    /// A number for a request that is traced, from 1 on.
    pub(crate) fn next_request(&self) -> u64 {
        self.traced.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn is_quiesced(&self) -> bool {
        self.requests.is_quiesced()
    }

    pub(crate) fn set_device(&self, device: Option<Arc<dyn Device>>) {
        let mut gate = self.gate.lock();
        self.has_device.store(device.is_some(), Ordering::Release);
        let before = std::mem::replace(&mut gate.device, device);
        drop(gate);
        drop(before);
    }

    pub(crate) fn allow_moves(&self, on: bool) {
        self.gate.lock().moves = on;
    }

    pub(crate) fn set_queueing(&self, on: bool) {
        self.gate.lock().no_queueing = !on;
        if !on {
            self.open();
        }
    }

    /// New requests keep to the limits of `group`, those that wait for old ones go on.
    pub(crate) fn set_throttle(&self, group: Option<&Arc<ThrottleGroup>>) {
        let mut gate = self.gate.lock();
        let member = group.map(ThrottleGroup::join);
        if gate.quiesced
            && let Some(member) = &member
        {
            member.lift(true);
        }
        self.requests.set_throttled(member.is_some());
        if let Some(before) = std::mem::replace(&mut gate.throttle, member) {
            before.lift(true);
        }
    }

    /// Suspends as long as the limits of this user say.
    pub(crate) fn throttle(&self, co: &Co, kind: RequestKind, len: u64) {
        let direction = match kind {
            RequestKind::Read => Direction::Read,
            RequestKind::Write | RequestKind::Discard => Direction::Write,
            RequestKind::Truncate | RequestKind::Other => return,
        };
        let member = self.gate.lock().throttle.clone();
        if let Some(member) = member {
            member.wait(co, direction, len);
        }
    }

    pub(crate) fn queued(&self) -> usize {
        self.gate.lock().queue.len()
    }

    /// Must a request that finds a section queue? Asked by one that is in the table.
    pub(crate) fn must_queue(&self) -> bool {
        self.is_quiesced()
            && !self.requests.is_closed()
            && self.gate.lock().must_queue()
            && !mutant!("a section holds no request back")
    }

    /// Suspends while a section holds requests back. The caller is counted in flight from the end
    /// of the section on, until the guard is dropped. `None`: there is none, look again.
    pub(crate) fn wait_as_request(&self, co: &Co) -> Option<Resuming<'_>> {
        // Made only then: dropping one counts down.
        self.wait(co, true).then(|| Resuming(self))
    }

    /// Suspends while a section holds requests back. There may be one again on return.
    pub(crate) fn wait_until_open(&self, co: &Co) {
        self.wait(co, false);
    }

    fn wait(&self, co: &Co, counted: bool) -> bool {
        let waiting = {
            let mut gate = self.gate.lock();
            if !gate.must_queue() || self.requests.is_closed() {
                return false;
            }
            let ticket = gate.next_ticket;
            gate.next_ticket += 1;
            let handle = co.wake_handle();
            gate.queue.insert(ticket, Queued { handle, counted });
            Waiting {
                root: self,
                ticket,
                counted,
                done: false,
            }
        };
        waiting.wait(co);
        true
    }

    /// All that wait go on: after the last section, or to find the backend closed.
    pub(crate) fn open(&self) {
        let mut woken = Vec::new();
        self.gate.lock().open(&self.resuming, &mut woken);
        for handle in woken {
            handle.wake();
        }
    }

    pub(crate) fn operation_begins(&self) {
        self.operations.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn operation_ends(&self) {
        self.operations.fetch_sub(1, Ordering::SeqCst);
        self.requests.kick();
    }

    pub(crate) fn operations(&self) -> u32 {
        self.operations.load(Ordering::SeqCst)
    }

    fn device(&self) -> Option<Arc<dyn Device>> {
        if !self.has_device.load(Ordering::Acquire) {
            return None;
        }
        self.gate.lock().device.clone()
    }

    /// The edge goes: what the node did through it is undone (rule 5.4).
    pub(crate) fn let_go(&self, section: &mut Section<'_>) {
        let quiesced = self.gate.lock().quiesced;
        if quiesced {
            self.drained_end(section);
        }
    }
}

/// A request that was held back and is not in the table yet.
pub(crate) struct Resuming<'a>(&'a Root);

impl Drop for Resuming<'_> {
    fn drop(&mut self) {
        if !mutant!("a request that goes on is not counted") {
            self.0.resuming.fetch_sub(1, Ordering::SeqCst);
        }
        self.0.requests.kick();
    }
}

/// A place in the queue; a coroutine that is unwound while it waits leaves it.
struct Waiting<'a> {
    root: &'a Root,
    ticket: u64,
    counted: bool,
    done: bool,
}

impl Waiting<'_> {
    fn wait(mut self, co: &Co) {
        while self.root.gate.lock().queue.contains_key(&self.ticket) {
            co.suspend();
        }
        self.done = true;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let left = self.root.gate.lock().queue.remove(&self.ticket);
        if left.is_none() && self.counted {
            drop(Resuming(self.root));
        }
    }
}

impl Parent for Root {
    fn drained_begin(&self, section: &mut Section<'_>) {
        let mut gate = self.gate.lock();
        assert!(
            !gate.quiesced,
            "{} is quiesced twice through one edge",
            self.describe()
        );
        gate.quiesced = true;
        gate.passing = section.threads_run && gate.device.is_some();
        self.requests.set_quiesced(true);
        if let Some(member) = &gate.throttle {
            member.lift(true);
        }
        if let Some(device) = &gate.device {
            device.drained_begin();
        }
    }

    fn drained_end(&self, section: &mut Section<'_>) {
        let mut gate = self.gate.lock();
        assert!(
            gate.quiesced,
            "{} is let go and was not quiesced",
            self.describe()
        );
        gate.quiesced = false;
        self.requests.set_quiesced(false);
        if let Some(member) = &gate.throttle {
            member.lift(false);
        }
        if let Some(device) = &gate.device {
            device.drained_end();
        }
        if !mutant!("the end of a section lets nobody go on") {
            gate.open(&self.resuming, &mut section.woken);
        }
    }

    fn end(&self) -> &End {
        &self.end
    }

    fn node_changed(&self, len_before: u64, len: u64, _section: &mut Section<'_>) {
        if len != len_before
            && let Some(device) = self.device()
        {
            device.resized(len);
        }
    }

    fn may_move(&self, node: &Node, to: &Arc<AioContext>, wants_it: bool) -> Result<()> {
        let (allowed, device) = {
            let gate = self.gate.lock();
            (wants_it || gate.moves, gate.device.clone())
        };
        let refuses = if !allowed {
            self.who()
        } else if device.is_some_and(|device| !device.may_move(to)) {
            format!("the device of {}", self.who())
        } else {
            return Ok(());
        };
        let (name, to) = (node.name(), to.name());
        let message =
            format!("Node '{name}' cannot move to context '{to}': {refuses} does not allow it");
        Err(Error::new(ErrorKind::Conflict, message))
    }

    fn moved(&self, to: &Arc<AioContext>) {
        let device = {
            let mut gate = self.gate.lock();
            let before = std::mem::replace(&mut gate.home, to.id());
            gate.device.clone().filter(|_| before != to.id())
        };
        if let Some(device) = device {
            device.moved(to);
        }
    }

    fn who(&self) -> String {
        "an unnamed block device".to_owned()
    }

    fn edge_name(&self) -> &str {
        "root"
    }

    fn is_quiesced(&self) -> bool {
        self.gate.lock().quiesced
    }

    fn collect(self: Arc<Self>, _section: &mut Section<'_>, busy: &mut Collected) {
        busy.add(&self);
    }

    fn as_user(&self) -> Option<&dyn Busy> {
        Some(self)
    }

    fn stops_threads(self: Arc<Self>) -> Option<Stopping> {
        let device = self.device()?;
        Some(Stopping { root: self, device })
    }
}

/// A device whose threads are to stop (rule 5.9). Once this is dropped its requests are held back.
pub(crate) struct Stopping {
    root: Arc<Root>,
    device: Arc<dyn Device>,
}

impl Stopping {
    pub(crate) fn stop_threads(&self) {
        if !mutant!("threads of devices go on in a section") {
            self.device.drain_threads();
        }
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        // Under the lock under which a request finds that it need not queue: one that did is in the
        // table, and waited for.
        self.root.gate.lock().passing = false;
    }
}

impl Busy for Root {
    fn table(&self) -> &RequestTable {
        &self.requests
    }

    fn is_busy_otherwise(&self) -> bool {
        self.resuming.load(Ordering::SeqCst) > 0
            || self.device().is_some_and(|device| device.drained_poll())
    }

    fn describe(&self) -> String {
        format!("a backend of node '{}'", self.end.now().name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coblock_aio::{ContextOptions, EngineKind, Home};

    /// The section may end before a request that saw it has queued. The count once went below zero
    /// then, and `rule_5_5_sections_against_queues_that_never_stop` waited for ever.
    #[test]
    fn who_need_not_queue_is_not_counted() {
        let home = Home::new(ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named("test")
        })
        .expect("a context");
        let graph = Graph::new(home.context());
        let registry = crate::DriverRegistry::with_builtin();
        let options = crate::Options::new().with("driver", "null-co");
        let opened = home.run(|co| crate::open(co, &graph, &registry, &crate::DenyAll, options));
        let node = opened.expect("a node");
        let root = Root::new(&graph, node.clone(), node.permissions());
        home.run(|co| assert!(root.wait_as_request(co).is_none()));
        assert!(!root.is_busy_otherwise());
        home.close();
    }
}
