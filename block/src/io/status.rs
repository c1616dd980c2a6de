//! Block status: what the bytes of a range are, and in which layer of a chain.
//!
//! ```text
//!   block_status         one layer: what the node itself holds; filters pass the question on
//!   map                  down the backing chain to the layer that decides what is read
//!   block_status_above   down the backing chain to the layer that holds the range, not past `base`
//! ```
//! A chain is walked in a loop, so no image decides how deep the stack gets. Each call does bounded
//! work and may tell of a first part of the range only.
//!
//! **An answer is old when it arrives** (rule 2.5): whoever acts on it keeps writers away, or looks
//! again. What a driver has to hold still while it looks into a child is its own business.

use crate::child::Child;
use crate::driver::{DriverStatus, Place, Precision};
use crate::error::Result;
use crate::graph::GraphRead;
use crate::node::Node;
use crate::request_table::RequestKind;
use crate::types::{ChildRole, align_down, align_up};
use coblock_coroutine::Co;
use std::sync::Arc;

/// What the first [`Status::len`] bytes of a range are.
#[derive(Clone, Debug)]
pub struct Status {
    /// How many bytes this is true of; zero only where nothing was asked, or past the end.
    pub len: u64,
    /// They are stored; reading them costs I/O.
    pub data: bool,
    /// They read as zeros. Unset tells nothing.
    pub zero: bool,
    /// The layer that was asked decides what they are; else its backing file does.
    pub allocated: bool,
    /// They are stored compressed.
    pub compressed: bool,
    /// The range ends where the node ends.
    pub eof: bool,
    /// Where they are: byte for byte at this offset of that node.
    pub place: Option<(Arc<Node>, u64)>,
    /// How many backing files down from the node that was asked.
    pub depth: usize,
}

impl Status {
    fn nothing(eof: bool) -> Status {
        Status {
            len: 0,
            data: false,
            zero: false,
            allocated: false,
            compressed: false,
            eof,
            place: None,
            depth: 0,
        }
    }

    /// The same for fewer bytes.
    fn cut(&mut self, len: u64) {
        if len < self.len {
            self.len = len;
            self.eof = false;
        }
    }
}

/// What one layer says, and where the layer below it goes on.
struct Layer<'g> {
    status: Status,
    /// Below all filters, and where the range starts there.
    node: &'g Node,
    offset: u64,
    /// The walk came to the node that it must not ask.
    at_base: bool,
}

impl<'g> Layer<'g> {
    fn backing(&self, graph: &'g GraphRead<'_>) -> Option<&'g Arc<Node>> {
        backing(self.node, graph).map(|child| child.node(graph))
    }
}

fn backing<'g>(node: &'g Node, graph: &'g GraphRead<'_>) -> Option<&'g Arc<Child>> {
    let mut children = node.children(graph).iter();
    children.find(|child| child.role() == ChildRole::Backing)
}

/// `base` is compared, never asked.
fn is(node: &Arc<Node>, base: Option<&Arc<Node>>) -> bool {
    base.is_some_and(|base| Arc::ptr_eq(node, base))
}

impl Node {
    /// See [`BlockBackend::block_status`](crate::BlockBackend::block_status).
    pub(crate) fn block_status(
        self: &Arc<Node>,
        co: &Co,
        graph: &GraphRead<'_>,
        range: (u64, u64),
    ) -> Result<Status> {
        let layer = self.layer(co, graph, range, Precision::Zeroes, None)?;
        Ok(layer.status)
    }

    /// See [`BlockBackend::is_allocated`](crate::BlockBackend::is_allocated).
    pub(crate) fn is_allocated(
        self: &Arc<Node>,
        co: &Co,
        graph: &GraphRead<'_>,
        range: (u64, u64),
    ) -> Result<Status> {
        let layer = self.layer(co, graph, range, Precision::Allocation, None)?;
        Ok(layer.status)
    }

    /// See [`BlockBackend::map`](crate::BlockBackend::map).
    pub(crate) fn map(
        self: &Arc<Node>,
        co: &Co,
        graph: &GraphRead<'_>,
        range: (u64, u64),
    ) -> Result<Status> {
        let mut layer = self.layer(co, graph, range, Precision::Zeroes, None)?;
        let mut depth = 0;
        while !layer.status.data && !layer.status.zero && layer.status.len > 0 {
            let Some(below) = layer.backing(graph) else {
                break;
            };
            depth += 1;
            let len = layer.status.len;
            let next = below.layer(co, graph, (layer.offset, len), Precision::Zeroes, None)?;
            if next.status.len == 0 {
                // It was made shorter just now; what is past its end reads as zeros.
                layer.status.zero = true;
                depth -= 1;
                break;
            }
            layer = next;
        }
        let mut status = layer.status;
        status.depth = depth;
        status.eof = range.0.saturating_add(status.len) >= self.len();
        Ok(status)
    }

    /// See [`BlockBackend::block_status_above`](crate::BlockBackend::block_status_above).
    pub(crate) fn block_status_above(
        self: &Arc<Node>,
        co: &Co,
        graph: &GraphRead<'_>,
        base: Option<&Arc<Node>>,
        range: (u64, u64),
        precision: Precision,
    ) -> Result<Status> {
        let mut layer = self.layer(co, graph, range, precision, base)?;
        let mut depth = 0;
        let mut len = layer.status.len;
        while !layer.status.allocated && !layer.at_base && len > 0 {
            let Some(below) = layer.backing(graph) else {
                break;
            };
            if is(below, base) {
                break;
            }
            depth += 1;
            let next = below.layer(co, graph, (layer.offset, len), precision, base)?;
            if next.status.len == 0 {
                // A layer that is shorter than the one above behaves as if it held zeros there.
                layer.status = Status {
                    len,
                    zero: true,
                    allocated: true,
                    ..Status::nothing(false)
                };
                break;
            }
            layer = next;
            len = layer.status.len;
        }
        let mut status = layer.status;
        status.depth = depth;
        status.eof = range.0.saturating_add(status.len) >= self.len();
        Ok(status)
    }

    /// See [`Child::allocated_bytes`].
    pub(crate) fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        let _request = self.requests.begin(graph.slot(), 0, 0, RequestKind::Other);
        if self.requests.is_closed() {
            return Err(self.closed());
        }
        let driver = &self.serving(graph).driver;
        driver
            .allocated_bytes(co, graph)
            .map_err(|error| self.failed(error, 0))
    }

    /// Asks this node, through filters down to the first one that answers for itself.
    fn layer<'g>(
        self: &'g Arc<Node>,
        co: &Co,
        graph: &'g GraphRead<'_>,
        (offset, len): (u64, u64),
        precision: Precision,
        base: Option<&Arc<Node>>,
    ) -> Result<Layer<'g>> {
        let mut node = self;
        let mut at = offset;
        let mut rest = len.min(self.len().saturating_sub(offset));
        loop {
            // Counted while it is asked (rule 5.7); its range is nobody's business.
            let _request = node.requests.begin(graph.slot(), 0, 0, RequestKind::Other);
            if node.requests.is_closed() {
                return Err(node.closed());
            }
            let answer = |status, at_base| Layer {
                status,
                node,
                offset: at,
                at_base,
            };
            if rest == 0 {
                return Ok(answer(Status::nothing(offset >= self.len()), false));
            }
            if is(node, base) {
                let mut status = Status::nothing(false);
                status.len = rest;
                return Ok(answer(status, true));
            }
            let inside = node.len().saturating_sub(at).min(rest);
            if inside == 0 {
                // A filter over a child that became shorter: zeros, as a read gives.
                let status = Status {
                    len: rest,
                    zero: true,
                    allocated: true,
                    ..Status::nothing(false)
                };
                return Ok(answer(status, false));
            }
            let driver = &node.serving(graph).driver;
            let found = driver
                .block_status(co, graph, at, inside, precision)
                .map_err(|error| node.failed(error, at))?;
            assert!(
                found.len > 0 && found.len <= inside,
                "driver {} told the status of {} bytes of {inside}",
                node.format(),
                found.len
            );
            if let Place::Through { child, offset } = found.place {
                (node, at, rest) = (child.node(graph), offset, found.len);
                continue;
            }
            let mut status = node.complete(graph, at, inside, &found, precision);
            status.eof = offset.saturating_add(status.len) >= self.len();
            return Ok(answer(status, false));
        }
    }

    /// A driver's answer with what the node adds to it.
    fn complete(
        self: &Arc<Node>,
        graph: &GraphRead<'_>,
        at: u64,
        asked: u64,
        found: &DriverStatus<'_>,
        precision: Precision,
    ) -> Status {
        let mut status = Status {
            len: found.len,
            data: found.data,
            zero: found.zero,
            allocated: found.data || found.zero,
            compressed: found.compressed,
            place: match found.place {
                Place::Nowhere | Place::Through { .. } => None,
                Place::Here(offset) => Some((self.clone(), offset)),
                Place::In { child, offset } => Some((child.node(graph).clone(), offset)),
            },
            ..Status::nothing(false)
        };
        self.whole_blocks(graph, at, asked, &mut status);
        if !status.allocated && self.serving(graph).driver.is_format() {
            let past_backing =
                |child: &Arc<Child>| precision == Precision::Zeroes && at >= child.len(graph);
            status.zero = backing(self, graph).is_none_or(past_backing);
        }
        status
    }

    /// Answers end at whole blocks: a block that is one thing in its first part and another in the
    /// rest counts as data.
    fn whole_blocks(&self, graph: &GraphRead<'_>, at: u64, asked: u64, status: &mut Status) {
        let align = self.serving(graph).limits.request_alignment;
        let end = at + status.len;
        if status.len == asked || end.is_multiple_of(align) {
            return;
        }
        let down = align_down(end, align);
        if down > at {
            status.cut(down - at);
        } else {
            let up = align_up(end, align).map_or(asked, |up| up - at);
            status.len = up.min(asked);
            status.data = true;
            status.zero = false;
            status.allocated = true;
        }
    }
}
