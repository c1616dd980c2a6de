//! `throttle`: a filter that makes requests keep to the limits of a group (rule 8.1).
//!
//! Options: `file`, and `throttle-group`, the name of a group of the graph
//! ([`Graph::add_throttle_group`](crate::Graph::add_throttle_group)).

use crate::child::Child;
use crate::driver::{Driver, DriverStatus, OpenDriver, Precision};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{GraphCell, GraphRead};
use crate::io::{Copied, CopySource, CopyTarget};
use crate::open::Opening;
use crate::throttle::{Direction, Member};
use crate::types::{ChildRole, Limits, Preallocation, RequestFlags, bytes};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) struct OpenThrottle;

impl OpenDriver for OpenThrottle {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let Some(name) = opening.options().take_str("throttle-group")? else {
            return Err(Error::new(
                ErrorKind::MissingOption,
                "Parameter 'throttle-group' is missing",
            ));
        };
        let Some(group) = opening.graph().throttle_group(&name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Throttle group '{name}' does not exist"),
            ));
        };
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        let graph = opening.graph().read(co);
        Ok(Box::new(Throttle {
            len: AtomicU64::new(file.len(&graph)),
            growable: file.is_growable(&graph),
            file: GraphCell::new(file),
            member: group.join(),
        }))
    }
}

struct Throttle {
    len: AtomicU64,
    growable: bool,
    file: GraphCell<Arc<Child>>,
    member: Arc<Member>,
}

impl Throttle {
    fn reads(&self, co: &Co, len: u64) {
        self.member.wait(co, Direction::Read, len);
    }

    fn writes(&self, co: &Co, len: u64) {
        self.member.wait(co, Direction::Write, len);
    }
}

impl Driver for Throttle {
    fn format(&self) -> &'static str {
        "throttle"
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.reads(co, bytes(buf.len()));
        self.file.get(graph).pread(co, graph, offset, buf, flags)
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.writes(co, bytes(buf.len()));
        self.file.get(graph).pwrite(co, graph, offset, buf, flags)
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.writes(co, len);
        let file = self.file.get(graph);
        file.pwrite_zeroes(co, graph, offset, len, flags)
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        self.writes(co, len);
        self.file.get(graph).pdiscard(co, graph, offset, len)
    }

    fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        let file = self.file.get(graph);
        let copied = file.copy_range_from(co, graph, offset, len, to)?;
        // What is not copied here is read, and paid for then.
        if let Copied::Bytes(len) = copied {
            self.reads(co, len);
        }
        Ok(copied)
    }

    fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        let copied = self
            .file
            .get(graph)
            .copy_range_to(co, graph, offset, source)?;
        if copied > 0 {
            self.writes(co, copied);
        }
        Ok(copied)
    }

    fn block_status<'g>(
        &'g self,
        _co: &Co,
        graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        Ok(DriverStatus::through(self.file.get(graph), offset, len))
    }

    fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        self.file.get(graph).allocated_bytes(co, graph)
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.file.get(graph).flush(co, graph)
    }

    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        let file = self.file.get(graph);
        let result = file.truncate(co, graph, len, exact);
        self.len.store(file.len(graph), Ordering::Release);
        result
    }

    fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let file = self.file.get(graph);
        let result = file.grow_preallocated(co, graph, len, preallocation);
        self.len.store(file.len(graph), Ordering::Release);
        result
    }

    fn drained_begin(&self) {
        self.member.lift(true);
    }

    fn drained_end(&self) {
        self.member.lift(false);
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Longer and unaligned requests go on as they are: the node below takes them apart.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_growable(&self) -> bool {
        self.growable
    }

    /// The node below flushes where its driver cannot.
    fn native_fua(&self) -> bool {
        true
    }
}
