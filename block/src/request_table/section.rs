//! What drained sections ask of a table: they look at many of them at once (rules 5.1 to 5.5).
//!
//! A section sets a bit that new requests see, announces itself in each table, pays one heavy fence
//! for all of them, and then looks: at what is in flight, and at what its owner counts otherwise.

use super::{RequestTable, Target, Wake};
use crate::sync::light_fence;
use coblock_coroutine::mutant;

impl RequestTable {
    /// New requests of this user find [`RequestTable::is_quiesced`] (rule 5.5). Those that did not
    /// are seen by who looks after a heavy fence.
    pub(crate) fn set_quiesced(&self, on: bool) {
        self.special.set_quiesced(on);
    }

    /// New requests of this user do not find [`RequestTable::is_plain`].
    pub(crate) fn set_throttled(&self, on: bool) {
        self.special.set_throttled(on);
    }

    #[inline]
    pub(crate) fn is_quiesced(&self) -> bool {
        self.special.is_quiesced()
    }

    /// From here on requests that end wake who is listed. The caller issues the heavy fence before
    /// it looks.
    pub(crate) fn watch(&self) {
        self.waiters.enter();
    }

    pub(crate) fn unwatch(&self) {
        self.waiters.leave();
    }

    /// Is nothing in flight? Asked after a heavy fence by who holds new requests back: then it stays
    /// so.
    pub(crate) fn is_idle(&self) -> bool {
        let others = mutant!("a section does not see the requests of other contexts");
        let mut live = self.live().map(|(key, ..)| key);
        !live.any(|key| key.row == 0 || !others)
    }

    /// Is anything busy otherwise, or in flight? Then `wake` is listed, to be called when something
    /// ends, and the ticket returned. Both are asked after being listed, so that no end is lost; and
    /// `otherwise` first: a request that was held back is counted there until it is in the table.
    pub(crate) fn list_if_busy(
        &self,
        wake: impl FnOnce() -> Wake,
        otherwise: impl FnOnce() -> bool,
    ) -> Option<u64> {
        let ticket = self.waits.lock().push(Target::Any, wake());
        if otherwise() || !self.is_idle() {
            return Some(ticket);
        }
        self.unlist(ticket);
        None
    }

    pub(crate) fn is_listed(&self, ticket: u64) -> bool {
        let waits = self.waits.lock();
        waits.list.iter().any(|wait| wait.ticket == ticket)
    }

    pub(crate) fn unlist(&self, ticket: u64) {
        let mut waits = self.waits.lock();
        waits.list.retain(|wait| wait.ticket != ticket);
    }

    /// Something else ended that sections may wait for.
    pub(crate) fn kick(&self) {
        for wake in self.take_kicked() {
            wake.wake();
        }
    }

    /// The same; whom the caller is to wake.
    pub(crate) fn take_kicked(&self) -> Vec<Wake> {
        light_fence();
        match self.waiters.any() {
            true => self.take_those(|wait| matches!(wait.target, Target::Any)),
            false => Vec::new(),
        }
    }
}
