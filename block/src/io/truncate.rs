//! Changing the length of a node.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::node::Node;
use crate::request_table::RequestKind;
use crate::types::{MAX_LENGTH, Preallocation, RequestFlags};
use coblock_coroutine::{Co, mutant};
use std::sync::atomic::Ordering;

impl Node {
    /// See [`Child::truncate`](crate::Child::truncate).
    pub(crate) fn truncate(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        exact: bool,
    ) -> Result<()> {
        self.resize(co, graph, len, || {
            let driver = &self.serving(graph).driver;
            driver.truncate(co, graph, len, exact)
        })
    }

    /// See [`Child::grow_preallocated`](crate::Child::grow_preallocated).
    pub(crate) fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        if preallocation == Preallocation::Off {
            return self.truncate(co, graph, len, true);
        }
        self.resize(co, graph, len, || {
            let driver = &self.serving(graph).driver;
            driver.grow_preallocated(co, graph, len, preallocation)
        })
    }

    /// Checks, waits for all requests, and lets the driver change the length.
    fn resize(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let resize = || self.resize_inner(co, graph, len, change);
        self.trace(co, "resize", (len, 0), resize)
    }

    fn resize_inner(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        // A range without end: it meets whatever is on the part that comes or goes.
        let request = self
            .requests
            .begin(graph.slot(), 0, u64::MAX, RequestKind::Truncate);
        if len > i64::MAX.cast_unsigned() {
            return Err(self.locate(Error::new(
                ErrorKind::Invalid,
                format!("{len} is no length: it is 2^63 or more"),
            )));
        }
        if len > MAX_LENGTH {
            return Err(self.locate(Error::new(
                ErrorKind::LimitExceeded,
                format!("A length of {len} bytes is above the limit of {MAX_LENGTH}"),
            )));
        }
        if self.is_read_only() {
            let error = Error::new(ErrorKind::ReadOnly, "Image is read-only");
            return Err(self.locate(error.errno_is(libc::EACCES)));
        }
        self.admit(co, &request, RequestFlags::SERIALISING, (0, u64::MAX))?;

        let result = change();
        // After a failure as well: it may have happened in part.
        self.mark_unflushed();
        let len = self.serving(graph).driver.len();
        self.len.store(len, Ordering::Release);
        self.tell_filters();
        result.map_err(|error| self.locate(error))
    }

    /// Filters above are as long as their child, also those that the change did not come through.
    fn tell_filters(&self) {
        self.owner().section(|section| {
            let mut users = self.parents(section);
            while let Some(user) = users.pop() {
                let Some(filter) = user.owner() else { continue };
                if filter.follow_child() {
                    users.extend(filter.parents(section));
                }
                section.nodes.push(filter);
            }
        });
    }

    /// A filter takes the length of its child; true if that was another one. Other nodes keep theirs.
    pub(crate) fn follow_child(&self) -> bool {
        let driver = self.driver();
        let Some(filtered) = driver.filtered() else {
            return false;
        };
        if mutant!("a filter keeps its length") {
            return false;
        }
        filtered.follow(filtered.file().below().len());
        let now = driver.len();
        self.len.swap(now, Ordering::AcqRel) != now
    }
}
