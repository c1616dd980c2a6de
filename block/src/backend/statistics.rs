//! A backend's requests are counted, and told to who traces them.

use super::{Admitted, BlockBackend};
use crate::accounting::{IoKind, Statistics};
use crate::error::Result;
use crate::graph::GraphRead;
use coblock_coroutine::Co;
use log::{Level, log_enabled, trace};

/// The target of records about requests, at level `trace`: one when a request begins and one when
/// it ends, with the same number.
pub const REQUESTS: &str = "coblock::request";

impl BlockBackend {
    /// One request, from its begin to its end: admitted, checked, counted and traced.
    #[inline(always)]
    #[track_caller]
    pub(super) fn request(
        &self,
        co: &Co,
        kind: IoKind,
        range: (u64, u64),
        f: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> Result<()> {
        if log_enabled!(target: REQUESTS, Level::Trace) {
            return self.traced(co, kind, range, || self.counted(co, kind, range, f));
        }
        self.counted(co, kind, range, f)
    }

    #[inline(always)]
    #[track_caller]
    fn counted(
        &self,
        co: &Co,
        kind: IoKind,
        range: (u64, u64),
        f: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> Result<()> {
        let began_ns = co.entered_ns();
        let admitted = self.admit(co, range, kind.request())?;
        self.count(co, kind, range, began_ns, &admitted, f)
    }

    /// The same for a request that was admitted; `began_ns` is from before that.
    #[inline(always)]
    pub(crate) fn count(
        &self,
        co: &Co,
        kind: IoKind,
        (offset, len): (u64, u64),
        began_ns: u64,
        admitted: &Admitted<'_>,
        f: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> Result<()> {
        let checked = self.check(admitted, offset, len);
        let checked = checked.and_then(|()| self.check_writes(&admitted.graph, kind.request()));
        if let Err(error) = checked {
            self.root.accounting.refused(admitted.graph.slot(), kind);
            return Err(error);
        }
        let result = f(&admitted.graph);
        let times = (began_ns, co.entered_ns());
        let slot = admitted.graph.slot();
        self.root
            .accounting
            .ended(slot, (kind, len), times, result.is_ok());
        result
    }

    /// The same for a copy to `to`: a read here, a write there.
    pub(crate) fn count_copy(
        &self,
        co: &Co,
        range: (u64, u64),
        began_ns: u64,
        (source, to): (&Admitted<'_>, &BlockBackend),
        f: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> Result<()> {
        self.count(co, IoKind::Read, range, began_ns, source, |graph| {
            let result = f(graph);
            let (len, times) = (range.1, (began_ns, co.entered_ns()));
            let target = &to.root.accounting;
            target.ended(graph.slot(), (IoKind::Write, len), times, result.is_ok());
            result
        })
    }

    /// Tells when a request begins and ends.
    #[cold]
    #[inline(never)]
    fn traced(
        &self,
        co: &Co,
        kind: IoKind,
        range: (u64, u64),
        f: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let req = self.trace_begin(co, kind, range);
        let result = f();
        self.trace_end(req, kind, range, &result);
        result
    }

    /// Tells that a request begins, if anybody wants to know; its number.
    #[inline]
    pub(crate) fn trace_if_wanted(&self, co: &Co, kind: IoKind, range: (u64, u64)) -> Option<u64> {
        log_enabled!(target: REQUESTS, Level::Trace).then(|| self.trace_begin(co, kind, range))
    }

    #[cold]
    fn trace_begin(&self, co: &Co, kind: IoKind, (offset, len): (u64, u64)) -> u64 {
        let req = self.root.next_request();
        let (what, node, coroutine) = (kind.name(), self.node(), co.id());
        let node = node.name();
        trace!(
            target: REQUESTS,
            "{what} begins req={req} node={node} offset={offset} len={len} coroutine={coroutine}"
        );
        req
    }

    #[cold]
    pub(crate) fn trace_end(
        &self,
        req: u64,
        kind: IoKind,
        (offset, len): (u64, u64),
        result: &Result<()>,
    ) {
        let ret = result.as_ref().map_or_else(|error| -error.errno(), |()| 0);
        let (what, node) = (kind.name(), self.node());
        let node = node.name();
        trace!(
            target: REQUESTS,
            "{what} ends req={req} node={node} offset={offset} len={len} ret={ret}"
        );
    }
}

/// Statistics.
impl BlockBackend {
    /// What the requests of this backend did so far. From any thread; those that end meanwhile may
    /// be missing. Times are to the accuracy of one pass of a loop: what never waits takes none.
    pub fn statistics(&self) -> Statistics {
        self.root.accounting.sum()
    }

    /// From now on the times of requests of this kind are counted by `boundaries`, too: nanoseconds,
    /// greater than zero, ascending. `None`: no more. While there are any, each end of a request
    /// takes a thread lock.
    ///
    /// # Errors
    /// `Invalid`: they do not ascend; nothing has changed.
    pub fn set_latency_histogram(&self, kind: IoKind, boundaries: Option<&[u64]>) -> Result<()> {
        self.root.accounting.choose(kind, boundaries)
    }

    /// A device refused a request of the guest, which never came here. Any thread.
    pub fn account_invalid(&self, kind: IoKind) {
        self.root.accounting.add_invalid(kind);
    }

    /// A device made `requests` requests of the guest a part of another one that it sends. Any thread.
    pub fn account_merged(&self, kind: IoKind, requests: u64) {
        self.root.accounting.add_merged(kind, requests);
    }
}
