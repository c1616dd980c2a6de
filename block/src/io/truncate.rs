//! Changing the length of a node.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::node::Node;
use crate::request_table::RequestKind;
use crate::types::{MAX_LENGTH, RequestFlags};
use coblock_coroutine::Co;
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
        let resize = || self.truncate_inner(co, graph, len, exact);
        self.trace(co, "resize", (len, 0), resize)
    }

    fn truncate_inner(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
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
        if self.read_only {
            let error = Error::new(ErrorKind::ReadOnly, "Image is read-only");
            return Err(self.locate(error.errno_is(libc::EACCES)));
        }
        self.admit(co, &request, RequestFlags::SERIALISING, (0, u64::MAX))?;

        let result = self.driver.truncate(co, graph, len, exact);
        // After a failure as well: it may have happened in part.
        self.mark_unflushed();
        self.len.store(self.driver.len(), Ordering::Release);
        result.map_err(|error| self.locate(error))
    }
}
