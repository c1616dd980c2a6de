//! One graph: its nodes, its lock, its main context. Two of them in a process do not know each
//! other.

mod cell;
mod changing;
mod dump;
mod end;
mod main;
mod permissions;
mod requests;
mod transaction;
mod write;

pub use cell::{GraphAccess, GraphCell};
use changing::Changing;
pub use dump::{GraphDump, NodeDump};
pub(crate) use end::End;
pub use main::GraphMain;
pub(crate) use permissions::take as take_permissions;
pub use requests::RequestsDump;
pub(crate) use transaction::in_home;
pub use transaction::{Action, Reopen, Transaction};
pub use write::GraphWrite;

use crate::backend::Root;
use crate::drain::InSection;
use crate::error::{Error, ErrorKind, Result};
use crate::graph_lock::{ContextSlot, GraphLock, MAX_CONTEXTS, ReadLocked, TooManyContexts};
use crate::node::Node;
use crate::throttle::ThrottleGroup;
use coblock_aio::{AioContext, AioWait};
use coblock_coroutine::{Co, Schedule, ThreadLock, WakeHandle, mutant};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

#[derive(Default)]
struct Nodes {
    by_name: BTreeMap<String, Weak<Node>>,
    next_automatic: u64,
    /// Every node from its making to its end, in the order in which they were made.
    all: BTreeMap<u64, Weak<Node>>,
    next_serial: u64,
}

/// The block graph that `open` builds in. Everything that is global in the reference is in here.
pub struct Graph {
    wait: Arc<AioWait>,
    lock: GraphLock,
    /// How many sections of all nodes there are. Whatever changes who is quiesced, and edges
    /// through which that spreads, is under this lock; see `drain.rs`.
    pub(crate) sections: ThreadLock<u32>,
    /// Who is under that lock, and who is to be woken afterwards.
    pub(crate) inside_section: ThreadLock<Option<InSection>>,
    changing: Changing,
    /// Coroutines that want to write and wait for readers to leave.
    writers: Arc<ThreadLock<Waiting>>,
    nodes: ThreadLock<Nodes>,
    /// Backends that gave up their node: requests that they refuse are in flight, too.
    without_node: ThreadLock<Vec<Weak<Root>>>,
    throttle_groups: ThreadLock<BTreeMap<String, Arc<ThrottleGroup>>>,
    live: AtomicUsize,
}

/// Coroutines that wait for readers to leave.
#[derive(Default)]
struct Waiting {
    /// How often one left. A wake may come while its coroutine waits for something else; this says
    /// that it came.
    left: u64,
    handles: Vec<WakeHandle>,
}

impl Graph {
    /// An empty graph. The "main thread" of the rules is the one that drives `main`.
    pub fn new(main: &Arc<AioContext>) -> Arc<Graph> {
        let kicked = Arc::downgrade(main);
        let writers: Arc<ThreadLock<Waiting>> = Arc::default();
        let kick = {
            let writers = writers.clone();
            move || {
                if let Some(main) = kicked.upgrade() {
                    main.notify();
                }
                let waiting = {
                    let mut waiting = writers.lock();
                    waiting.left = waiting.left.wrapping_add(1);
                    std::mem::take(&mut waiting.handles)
                };
                for writer in waiting {
                    writer.wake();
                }
            }
        };
        Arc::new(Graph {
            wait: Arc::new(AioWait::new(main)),
            lock: GraphLock::new(Box::new(kick)),
            sections: ThreadLock::new(0),
            inside_section: ThreadLock::new(None),
            changing: Changing::default(),
            writers,
            nodes: ThreadLock::new(Nodes::default()),
            without_node: ThreadLock::new(Vec::new()),
            throttle_groups: ThreadLock::new(BTreeMap::new()),
            live: AtomicUsize::new(0),
        })
    }

    /// The context whose home changes the graph.
    pub fn main_context(&self) -> &Arc<AioContext> {
        self.wait.main()
    }

    /// Where those meet who wait outside of coroutines and those who change something (rule 3.8):
    /// the home of the main context may wait for anything.
    pub fn wait(&self) -> &Arc<AioWait> {
        &self.wait
    }

    /// Takes the graph lock for reading (rule 7.2). Costs two plain stores; suspends only while a
    /// writer owns the graph.
    ///
    /// # Panics
    /// When this coroutine already holds a guard (rule 7.7), runs in no context, or more than
    /// [`MAX_CONTEXTS`] contexts use this graph; [`Graph::try_read`] returns the last as an error.
    #[inline]
    #[track_caller]
    pub fn read<'a>(self: &'a Arc<Graph>, co: &'a Co) -> GraphRead<'a> {
        match self.read_inner(co) {
            Ok(guard) => guard,
            Err(TooManyContexts) => too_many_contexts(),
        }
    }

    /// As [`Graph::read`], for programs that make contexts without a bound.
    ///
    /// # Errors
    /// `LimitExceeded` when more than [`MAX_CONTEXTS`] live contexts use this graph.
    ///
    /// # Panics
    /// As [`Graph::read`].
    #[inline]
    #[track_caller]
    pub fn try_read<'a>(self: &'a Arc<Graph>, co: &'a Co) -> Result<GraphRead<'a>> {
        self.read_inner(co).map_err(|TooManyContexts| {
            Error::new(
                ErrorKind::LimitExceeded,
                format!("more than {MAX_CONTEXTS} event loops send requests into one graph"),
            )
        })
    }

    #[inline(always)]
    #[track_caller]
    fn read_inner<'a>(
        self: &'a Arc<Graph>,
        co: &'a Co,
    ) -> std::result::Result<GraphRead<'a>, TooManyContexts> {
        let locked = match co.home() {
            Some(home) => self.lock.read(co, home)?,
            None => self.lock.read(co, &current_home(co))?,
        };
        Ok(GraphRead {
            locked,
            graph: self,
        })
    }

    /// How many nodes there are. Zero at the end of every program that closes what it opened.
    pub fn live_nodes(&self) -> usize {
        self.live.load(Ordering::Acquire)
    }

    /// How many readers the graph lock counts. A hint unless everybody stands still: contexts are
    /// looked at one after the other (rule 7.3).
    pub fn readers(&self) -> u32 {
        self.lock.sum()
    }

    /// Makes a group findable for `throttle` nodes.
    ///
    /// # Errors
    /// `InUse`: there is one of that name.
    pub fn add_throttle_group(&self, group: &Arc<ThrottleGroup>) -> Result<()> {
        let mut groups = self.throttle_groups.lock();
        if groups.contains_key(group.name()) {
            let message = format!("There is a throttle group '{}' already", group.name());
            return Err(Error::new(ErrorKind::InUse, message));
        }
        groups.insert(group.name().to_owned(), group.clone());
        Ok(())
    }

    /// Nodes that are opened from now on do not find it; those that use it keep it.
    pub fn remove_throttle_group(&self, name: &str) -> Option<Arc<ThrottleGroup>> {
        self.throttle_groups.lock().remove(name)
    }

    /// The group of that name.
    pub fn throttle_group(&self, name: &str) -> Option<Arc<ThrottleGroup>> {
        self.throttle_groups.lock().get(name).cloned()
    }

    /// The node of that name.
    pub fn find_node(&self, name: &str) -> Option<Arc<Node>> {
        self.nodes.lock().by_name.get(name)?.upgrade()
    }

    /// Names of all nodes, sorted.
    pub fn node_names(&self) -> Vec<String> {
        let nodes = self.nodes.lock();
        let alive = nodes
            .by_name
            .iter()
            .filter(|(_, node)| node.strong_count() > 0);
        alive.map(|(name, _)| name.clone()).collect()
    }

    /// A name for a node: the given one, checked, or `#block` and a number.
    pub(crate) fn reserve_name(&self, wanted: Option<String>) -> Result<String> {
        let mut nodes = self.nodes.lock();
        let name = match wanted {
            Some(name) => {
                if !is_well_formed(&name) {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("Invalid node-name: '{name}'"),
                    ));
                }
                name
            }
            None => {
                let number = nodes.next_automatic;
                nodes.next_automatic += 1;
                format!("#block{number:03}")
            }
        };
        if nodes.by_name.contains_key(&name) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("Duplicate nodes with node-name='{name}'"),
            ));
        }
        nodes.by_name.insert(name.clone(), Weak::new());
        Ok(name)
    }

    pub(crate) fn release_name(&self, name: &str) {
        self.nodes.lock().by_name.remove(name);
    }

    pub(crate) fn add_node(&self, node: &Arc<Node>) {
        self.nodes
            .lock()
            .by_name
            .insert(node.name().to_owned(), Arc::downgrade(node));
    }

    /// A number for a node that is being made.
    pub(crate) fn next_serial(&self) -> u64 {
        let mut nodes = self.nodes.lock();
        nodes.next_serial += 1;
        nodes.next_serial
    }

    /// Counts a new node. In sections of all nodes it is born drained (rule 5.3).
    pub(crate) fn count_node(&self, serial: u64, node: &Arc<Node>) {
        self.live.fetch_add(1, Ordering::AcqRel);
        self.section(|section| {
            if !mutant!("nodes are born outside of sections") {
                node.born(section.all());
            }
            self.nodes.lock().all.insert(serial, Arc::downgrade(node));
        });
    }

    pub(crate) fn forget_node(&self, serial: u64, name: &str) {
        {
            let mut nodes = self.nodes.lock();
            nodes.all.remove(&serial);
            nodes.by_name.remove(name);
        }
        self.live.fetch_sub(1, Ordering::AcqRel);
    }

    /// At most `count` nodes whose serials follow `after`, and the serial to go on after; some may
    /// have gone. `None`: there are no more.
    pub(crate) fn nodes_after(&self, after: u64, count: usize) -> Option<(u64, Vec<Arc<Node>>)> {
        let nodes = self.nodes.lock();
        let mut last = None;
        let next = nodes.all.range(after + 1..).take(count);
        let next = next.inspect(|(serial, _)| last = Some(**serial));
        let alive = next.filter_map(|(_, node)| node.upgrade()).collect();
        Some((last?, alive))
    }

    /// All that live, also those that are being opened.
    pub(crate) fn all_nodes(&self) -> Vec<Arc<Node>> {
        let nodes = self.nodes.lock();
        nodes.all.values().filter_map(Weak::upgrade).collect()
    }

    /// A backend has given up its node.
    pub(crate) fn add_without_node(&self, root: &Arc<Root>) {
        let mut all = self.without_node.lock();
        all.retain(|root| root.strong_count() > 0);
        all.push(Arc::downgrade(root));
    }

    pub(crate) fn all_without_node(&self) -> Vec<Arc<Root>> {
        let all = self.without_node.lock();
        all.iter().filter_map(Weak::upgrade).collect()
    }
}

/// The home of a coroutine that is driven by hand: the context that this thread drives.
#[cold]
#[track_caller]
fn current_home(co: &Co) -> Arc<dyn Schedule> {
    match coblock_aio::current() {
        Some(context) => context,
        None => panic!("{co:?} takes the graph lock outside of every context"),
    }
}

#[cold]
#[track_caller]
fn too_many_contexts() -> ! {
    panic!("more than {MAX_CONTEXTS} contexts send requests into one graph")
}

/// The reference's rule for names: a letter, then letters, digits, `-`, `.` and `_`; below 32
/// characters.
fn is_well_formed(name: &str) -> bool {
    name.len() < 32
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph")
            .field("nodes", &self.node_names())
            .field("readers", &self.readers())
            .finish_non_exhaustive()
    }
}

/// The graph lock, held for reading: the proof that edges stay, which every request carries.
///
/// Belongs to one coroutine, hence to one thread:
/// ```compile_fail,E0277
/// fn send<T: Send>() {}
/// send::<coblock_block::GraphRead<'static>>();
/// ```
pub struct GraphRead<'a> {
    locked: ReadLocked<'a>,
    graph: &'a Arc<Graph>,
}

impl<'a> GraphRead<'a> {
    /// The coroutine that holds it.
    #[inline]
    pub fn co(&self) -> &'a Co {
        self.locked.co()
    }

    /// The context in which the request runs: which row of a table is its own.
    #[inline]
    pub fn slot(&self) -> ContextSlot {
        self.locked.slot()
    }

    /// The graph that is locked.
    pub fn graph(&self) -> &'a Arc<Graph> {
        self.graph
    }
}

impl fmt::Debug for GraphRead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "GraphRead in {:?} by coroutine {}",
            self.slot(),
            self.co().id()
        )
    }
}
