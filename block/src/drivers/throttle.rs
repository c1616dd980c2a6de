//! `throttle`: a filter that makes requests keep to the limits of a group (rule 8.1).
//!
//! Options: `file`, and `throttle-group`, the name of a group of the graph
//! ([`Graph::add_throttle_group`](crate::Graph::add_throttle_group)).

use super::filtered::Filtered;
use crate::driver::{Driver, OpenDriver};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::io::{Copied, CopySource, CopyTarget};
use crate::open::Opening;
use crate::throttle::{Direction, Member};
use crate::types::{ChildRole, RequestFlags, bytes};
use coblock_aio::{AioContext, IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::sync::Arc;

/// Opens `throttle` nodes.
#[derive(Debug)]
pub struct OpenThrottle;

impl OpenDriver for OpenThrottle {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let Some(name) = opening.options().take_str("throttle-group")? else {
            return Err(Error::new(
                ErrorKind::MissingOption,
                "Please specify a throttle group",
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
            below: Filtered::new(file, &graph),
            member: group.join(),
        }))
    }
}

struct Throttle {
    below: Filtered,
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
        self.below.file().pread(co, graph, offset, buf, flags)
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
        self.below.file().pwrite(co, graph, offset, buf, flags)
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
        let file = self.below.file();
        file.pwrite_zeroes(co, graph, offset, len, flags)
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        self.writes(co, len);
        self.below.file().pdiscard(co, graph, offset, len)
    }

    fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        let file = self.below.file();
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
        let copied = self.below.file().copy_range_to(co, graph, offset, source)?;
        if copied > 0 {
            self.writes(co, copied);
        }
        Ok(copied)
    }

    fn drained_begin(&self) {
        self.member.lift(true);
    }

    fn drained_end(&self) {
        self.member.lift(false);
    }

    fn may_move(&self, to: &Arc<AioContext>) -> Result<()> {
        self.member.group().check_clock(to)
    }

    fn len(&self) -> u64 {
        self.below.len()
    }

    fn filtered(&self) -> Option<&Filtered> {
        Some(&self.below)
    }
}
