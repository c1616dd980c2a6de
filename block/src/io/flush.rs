//! Flushes: skipped when nothing was written, one at a time, and never trusted again after a
//! failure.
//!
//! ```text
//!   write:   data done ... unflushed = true
//!   flush:   lock, unflushed = false, driver.flush       a write that completes now sets it again
//!                  was false: only the children
//!                  failed: unflushed = true; a node without children is poisoned
//! ```
//! The host forgets which pages it could not write once it has told somebody, so repeating a failed
//! flush would report success for lost data. Hence the poison, which only reopening takes away.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::node::Node;
use crate::request_table::RequestKind;
use crate::types::RequestFlags;
use coblock_coroutine::Co;
use std::sync::atomic::Ordering;

impl Node {
    /// See [`Child::flush`](crate::Child::flush).
    pub(crate) fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.trace(co, "flush", (0, 0), || self.flush_inner(co, graph))
    }

    fn flush_inner(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let request = self.requests.begin(graph.slot(), 0, 0, RequestKind::Other);
        self.admit(co, &request, RequestFlags::empty(), (0, 0))?;
        if self.is_read_only() {
            return Ok(());
        }
        self.flush_driver(co, graph)
    }

    /// The flush itself, for who is tracked already or has closed the node.
    pub(crate) fn flush_driver(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        let _one_at_a_time = self.flushing.lock(co);
        if self.poisoned.load(Ordering::Acquire) {
            return Err(self.locate(Error::new(
                ErrorKind::Poisoned,
                "An earlier flush failed: what is on stable storage is unknown until the file is reopened",
            )));
        }
        let children = self.children(graph);
        if !self.unflushed.swap(false, Ordering::AcqRel) {
            // Nothing came through this node, but its driver may have written metadata on its own
            // account.
            return children.iter().try_for_each(|child| child.flush(co, graph));
        }
        if self.skips_flushes() && children.is_empty() {
            return Ok(());
        }
        self.serving(graph)
            .driver
            .flush(co, graph)
            .map_err(|error| {
                self.unflushed.store(true, Ordering::Release);
                if children.is_empty() {
                    self.poisoned.store(true, Ordering::Release);
                }
                self.locate(error)
            })
    }
}
