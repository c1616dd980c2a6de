//! The words of a request table that its fast path touches, and in which order.
//!
//! Compiled twice, as `graph_lock/protocol.rs` is: over the real atomics, and in
//! `tests/loom_request_table.rs` over loom's. The includer provides `super::sync`.
//!
//! ```text
//!   request (plain stores, own row)            who must know all requests (rare)
//!   live |= bit                                special += 1, or CLOSED        waiters += 1
//!   light_fence                                heavy_fence                    heavy_fence
//!   special == 0?  no: look further            look at live                   look at live, then sleep
//!   ...
//!   live &= !bit
//!   light_fence
//!   waiters == 0?  no: wake them
//! ```

use super::sync::{AtomicU32, AtomicU64, Ordering, heavy_fence, light_fence};

/// In [`Special`]: new requests are refused.
const CLOSED: u32 = 1 << 31;
/// In [`Special`]: a drained section holds new requests back.
const QUIESCED: u32 = 1 << 30;
/// In [`Special`]: new requests have limits to keep to.
const THROTTLED: u32 = 1 << 29;

/// Which of 64 places are in use. Stored to by the home of its context only.
pub(crate) struct Live(AtomicU64);

impl Live {
    pub(crate) fn new() -> Self {
        Live(AtomicU64::new(0))
    }

    /// Are all places in use? For the home.
    #[inline(always)]
    pub(crate) fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed) == u64::MAX
    }

    /// A place that is not in use; not all are. For the home.
    #[inline(always)]
    pub(crate) fn free(&self) -> u8 {
        let live = self.0.load(Ordering::Relaxed);
        debug_assert!(live != u64::MAX, "a place is looked for where none is");
        #[expect(clippy::cast_possible_truncation, reason = "below 64")]
        let place = live.trailing_ones() as u8;
        place
    }

    /// Takes a place that is free, whose contents are written. For the home. `true`: it was the
    /// last one.
    #[inline(always)]
    pub(crate) fn publish(&self, place: u8) -> bool {
        let live = self.0.load(Ordering::Relaxed) | 1 << place;
        self.0.store(live, Ordering::Release);
        light_fence();
        live == u64::MAX
    }

    /// Gives a place back. For the home. `true`: somebody waits and must be woken.
    #[inline]
    #[must_use]
    pub(crate) fn retire(&self, place: u8, waiters: &Waiters) -> bool {
        let live = self.0.load(Ordering::Relaxed);
        debug_assert!(live & 1 << place != 0, "a tracked request ends twice");
        self.0.store(live & !(1 << place), Ordering::Release);
        light_fence();
        waiters.any()
    }

    /// All places in use. Everything that was published before the caller's heavy fence is in it.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// Why a request must look further: serialising requests are there, or the table is closed.
pub(crate) struct Special(AtomicU32);

impl Special {
    pub(crate) fn new() -> Self {
        Special(AtomicU32::new(0))
    }

    /// Nothing of the kind. Asked after [`Live::publish`].
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    /// `false` if it was closed before. A look at [`Live`] comes after [`Waiters::announce`].
    pub(crate) fn close(&self) -> bool {
        self.0.fetch_or(CLOSED, Ordering::SeqCst) & CLOSED == 0
    }

    /// A look at [`Live`] comes after a heavy fence.
    pub(crate) fn set_quiesced(&self, on: bool) {
        self.set(QUIESCED, on);
    }

    pub(crate) fn set_throttled(&self, on: bool) {
        self.set(THROTTLED, on);
    }

    fn set(&self, bit: u32, on: bool) {
        if on {
            self.0.fetch_or(bit, Ordering::SeqCst);
        } else {
            self.0.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    #[inline]
    pub(crate) fn is_quiesced(&self) -> bool {
        self.0.load(Ordering::Acquire) & QUIESCED != 0
    }

    /// One more serialising request. A look at [`Live`] comes after [`Waiters::announce`].
    pub(crate) fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// One less.
    pub(crate) fn lower(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How many look for requests to end.
pub(crate) struct Waiters(AtomicU32);

impl Waiters {
    pub(crate) fn new() -> Self {
        Waiters(AtomicU32::new(0))
    }

    #[inline]
    pub(crate) fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// From here on each request that ends wakes. Then look at [`Live`], and only then sleep.
    pub(crate) fn announce(&self) {
        self.enter();
        heavy_fence();
    }

    /// The same for who looks at many tables and issues one heavy fence for all of them.
    pub(crate) fn enter(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn leave(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
