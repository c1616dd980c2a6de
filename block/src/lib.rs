//! The block graph: nodes, the edges between them, and the requests that go through.
//!
//! ```text
//!   users       mixed           for callers that may or may not be in a coroutine (rules 2.2, 2.3)
//!               callback        for callers with callbacks (rule 2.4)
//!               backend         BlockBackend: the user's handle
//!   nodes       open, gate      from options to nodes; files that an image names
//!               drivers/        file, raw, null-co, sim, and the filters throttle and copy-on-read
//!               io/             a request's way through a node: align, serialise, split, bounce, copy, flush, status
//!               node, child, driver     these three know each other
//!               drain           drained sections: nothing new comes, nothing is in flight (5.1 to 5.11)
//!               graph           all nodes, GraphRead, GraphWrite
//!   below       accounting      what a backend's requests did: counts, times, histograms
//!               throttle        limits shared by groups: buckets, turns (8.1)
//!               request_table   requests in flight, who waits for whom
//!               graph_lock      readers in every context, one writer in the main one (7.1 to 7.8)
//!               options, error, types, sync
//! ```
//! ```
//! use coblock_aio::{ContextOptions, Home};
//! use coblock_block::{BlockBackend, DenyAll, DriverRegistry, Graph, Options, RequestFlags, open};
//!
//! let home = Home::new(ContextOptions::named("main"))?;
//! let graph = Graph::new(home.context());
//! let drivers = DriverRegistry::with_builtin();
//! let options = Options::new().with("driver", "null-co").with("size", "1M");
//! home.run(|co| {
//!     let disk = BlockBackend::new(&graph, open(co, &graph, &drivers, &DenyAll, options)?);
//!     disk.pwrite(co, 4096, &[1; 512][..], RequestFlags::empty())?;
//!     disk.flush(co)?;
//!     disk.close(co)
//! })?;
//! home.close();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A request is a function call down and a return up; `co: &Co` in a signature means that it may
//! suspend. Each carries a `&GraphRead`, the proof that edges stay. An edge owns downward,
//! everything upward is weak.
//!
//! `unsafe` is in one place, `graph/cell.rs`: what a writer of the graph changes under the lock that
//! readers hold. There is no process-wide state: what is global in the reference is in a [`Graph`].

#![deny(unsafe_code)]
#![deny(clippy::disallowed_methods)]

pub mod drivers;
pub mod gate;
pub mod mixed;
pub mod options;
pub mod request_table;
pub mod throttle;
pub mod types;

mod accounting;
mod backend;
mod callback;
mod child;
mod drain;
mod driver;
mod error;
mod event;
mod graph;
mod graph_lock;
mod io;
mod node;
mod open;
mod sync;

pub use accounting::{IoKind, KindStatistics, LatencyHistogram, Statistics};
pub use backend::{BlockBackend, Device, Operation, REQUESTS};
pub use callback::AioRequest;
pub use child::Child;
pub use drain::{BusyWith, Drain, DrainTimeout, Drained};
pub use driver::{Changes, Driver, DriverRegistry, DriverStatus, OpenDriver, Place, Precision};
pub use error::{Error, ErrorKind, Result, errno_text};
pub use event::Event;
pub use gate::{Beneath, DenyAll, Dependent, Explicit, LikeReference, OpenGate};
pub use graph::{
    Action, Graph, GraphAccess, GraphCell, GraphDump, GraphMain, GraphRead, GraphWrite, NodeDump,
    Reopen, RequestsDump, Transaction,
};
pub use graph_lock::{ContextSlot, MAX_CONTEXTS};
pub use io::{Copied, CopySource, CopyTarget, Status};
pub use mixed::Mixed;
pub use node::{Node, close_unused};
pub use open::{Opening, open, open_unused};
pub use options::{Options, Value};
pub use request_table::{InFlight, RequestKind, RequestTable, Tracked};
pub use types::{
    ChildRole, FileId, Limits, MAX_ALIGNMENT, MAX_LENGTH, MAX_REQUEST, Perm, Permissions,
    Preallocation, RequestFlags,
};
