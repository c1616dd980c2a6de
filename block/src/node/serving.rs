//! What a node's requests meet: its driver and what that takes, and the edges to its children.
//!
//! All of it stays while requests look, and a transaction changes it as a whole: a node that is
//! reopened gets another driver, which may stand on other edges.

use super::Node;
use crate::child::Child;
use crate::drain::Section;
use crate::driver::Driver;
use crate::graph::{Graph, GraphAccess, GraphCell, GraphRead, GraphWrite};
use crate::types::Limits;
use coblock_coroutine::ThreadLock;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

/// Edges from a node to its children.
pub(crate) type Edges = Arc<[Arc<Child>]>;

/// Who does the requests of a node, and how they must be.
pub(crate) struct Serving {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) limits: Limits,
    pub(crate) growable: bool,
    /// Set when the node is published.
    edges: OnceLock<Edges>,
}

impl Serving {
    fn new(driver: Arc<dyn Driver>, edges: Option<Edges>) -> Serving {
        let limits = driver.limits();
        limits.assert_sane(driver.format());
        Serving {
            limits,
            growable: driver.is_growable(),
            driver,
            edges: edges.map_or_else(OnceLock::new, OnceLock::from),
        }
    }
}

/// The same for who holds no guard: it may be another one right after the look.
struct Known {
    driver: Arc<dyn Driver>,
    limits: Limits,
    edges: Edges,
}

/// The one and the other.
pub(super) struct Served {
    seen: GraphCell<Serving>,
    known: ThreadLock<Known>,
}

impl Served {
    pub(super) fn new(graph: &Graph, driver: Box<dyn Driver>) -> Served {
        let driver: Arc<dyn Driver> = driver.into();
        let serving = Serving::new(driver.clone(), None);
        Served {
            known: ThreadLock::new(Known {
                driver,
                limits: serving.limits,
                edges: Arc::default(),
            }),
            seen: GraphCell::new(graph, serving),
        }
    }
}

impl Served {
    pub(super) fn limits(&self) -> Limits {
        self.known.lock().limits
    }
}

impl Node {
    /// Driver and limits, as long as the guard is borrowed.
    #[inline(always)]
    pub(crate) fn serving<'g>(&'g self, graph: &'g GraphRead<'_>) -> &'g Serving {
        self.served.seen.get(graph)
    }

    /// Gives a new node its edges.
    pub(super) fn set_edges(&self, graph: &GraphRead<'_>, edges: Vec<Arc<Child>>) {
        let edges = Edges::from(edges);
        self.served.known.lock().edges = edges.clone();
        let set = self.serving(graph).edges.set(edges);
        assert!(set.is_ok(), "node '{}' is published twice", self.name());
    }

    /// A driver, perhaps the one that there is, and perhaps other edges; with the node drained. It is
    /// asked anew what it takes. The driver before comes back: it may be the last one to hold what
    /// cannot be let go here.
    pub(crate) fn serve(
        &self,
        graph: &mut GraphWrite<'_>,
        _section: &mut Section<'_>,
        driver: Arc<dyn Driver>,
        edges: Option<Edges>,
    ) -> Arc<dyn Driver> {
        let edges = edges.unwrap_or_else(|| self.edges());
        self.len.store(driver.len(), Ordering::Release);
        let serving = Serving::new(driver.clone(), Some(edges.clone()));
        let known = Known {
            driver,
            limits: serving.limits,
            edges,
        };
        drop(std::mem::replace(&mut *self.served.known.lock(), known));
        self.served.seen.replace(graph, serving).driver
    }

    /// The driver, for who knows its type ([`Driver::as_any`]). The node may have another one right
    /// after, when it is reopened.
    pub fn driver(&self) -> Arc<dyn Driver> {
        self.served.known.lock().driver.clone()
    }

    /// Tells it about a section, in place: sections of many nodes would count each driver.
    pub(super) fn tell_driver(&self, tell: impl FnOnce(&dyn Driver)) {
        tell(&*self.served.known.lock().driver);
    }

    /// The edges to its children, for who holds no guard; none until it is published.
    pub(crate) fn edges(&self) -> Edges {
        self.served.known.lock().edges.clone()
    }

    /// The edges to its children.
    pub fn children<'g>(&'g self, graph: &'g impl GraphAccess) -> &'g [Arc<Child>] {
        self.served
            .seen
            .get(graph)
            .edges
            .get()
            .map_or(&[], |edges| &edges[..])
    }

    /// What the driver does in one request.
    pub fn limits(&self) -> Limits {
        self.served.known.lock().limits
    }
}
