//! Which slice gives way when the cache is full.
//!
//! ```text
//!                hand
//!                 v
//!   .. n n u n n | u u . u u u . u u ..      n new, not looked at again    u used again    . not of late
//!      \_______/
//!       on trial: slots that the hand has passed
//! ```
//!
//! Second chance alone keeps the slices that came last. Where requests go round an image with more
//! mapping than the cache holds, those are the ones that will be needed last, and it never finds
//! one again. So a new slice is on trial: one behind the hand that nobody has looked at again gives
//! way first, and the rest of the cache stays as it is. The hand goes on when the slot whose turn
//! it is was looked at again, and now and then in any case, so that the cache follows the guest.

use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;

use coblock_coroutine::mutant;

use super::{SliceCache, SlotState, State};

/// This part of all slots is on trial.
const TRIAL_SHARE: usize = 16;
/// One slice in so many gets its place without one.
const UNTRIED: usize = 16;

/// Just read: the look-up that it was read for is still to come.
const NEW: u8 = 0;
/// Looked at once since it was read.
const TRIED: u8 = 1;
/// Looked at again.
const USED: u8 = 2;
/// Not looked at since the hand, or the cleaner, came by.
const UNUSED: u8 = 3;

/// Whether a slot's slice was looked at of late. Races between those who look lose no more than a
/// look.
pub(super) struct Recency(AtomicU8);

impl Recency {
    pub(super) const fn new() -> Recency {
        Recency(AtomicU8::new(NEW))
    }

    /// Its slice was read.
    pub(super) fn begin(&self) {
        self.0.store(NEW, Relaxed);
    }

    /// Its slice is looked at. Writes nothing if it was before.
    #[inline(always)]
    pub(super) fn look(&self) {
        let now = self.0.load(Relaxed);
        if now != USED {
            self.0.store(if now == NEW { TRIED } else { USED }, Relaxed);
        }
    }

    fn on_trial(&self) -> bool {
        self.0.load(Relaxed) < USED
    }

    /// Was it used since the hand was here? It counts as unused from now on.
    fn second_chance(&self) -> bool {
        self.0.swap(UNUSED, Relaxed) == USED
    }

    /// Was it read or used since the last call? It counts as unused from now on.
    pub(super) fn outlives_cleaning(&self) -> bool {
        self.0.swap(UNUSED, Relaxed) != UNUSED
    }
}

impl SliceCache {
    /// A slot that may be reused, out of the directory.
    pub(super) fn victim(&self, state: &mut State) -> Option<usize> {
        if let Some(slot) = state.free.pop() {
            state.slots[slot].free = false;
            return Some(slot);
        }
        if state.touched < self.slots.len() {
            let slot = state.touched;
            state.touched += 1;
            state.slots.push(SlotState::default());
            return Some(slot);
        }
        state.turn = state.turn.wrapping_add(1);
        let slot = match self.on_trial(state) {
            Some(slot) => slot,
            None => self.next_unused(state)?,
        };
        if let Some(slice) = state.slots[slot].slice {
            if !mutant!("an evicted slice stays in the directory") {
                self.forget(slice);
            }
            self.evictions.fetch_add(1, Relaxed);
        }
        Some(slot)
    }

    /// The slot behind the hand whose turn it is, if it failed its trial.
    fn on_trial(&self, state: &State) -> Option<usize> {
        if state.turn.is_multiple_of(UNTRIED) {
            return None;
        }
        let places = (state.touched / TRIAL_SHARE).max(1);
        let behind = 1 + state.turn % places;
        let slot = (state.hand + state.touched - behind) % state.touched;
        let gives_way = state.slots[slot].evictable() && self.slots[slot].used.on_trial();
        gives_way.then_some(slot)
    }

    /// The next slot before the hand that was not used since it came by last: in two rounds at most.
    fn next_unused(&self, state: &mut State) -> Option<usize> {
        for _ in 0..2 * state.touched {
            let slot = state.hand;
            state.hand = (state.hand + 1) % state.touched;
            if state.slots[slot].evictable() && !self.slots[slot].used.second_chance() {
                return Some(slot);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Reserved, SLICE_BYTES_MIN};
    use super::*;
    use crate::types::HostOffset;
    use coblock_aio::{ContextOptions, EngineKind, Home};
    use coblock_block::types::in_memory;

    const SLOTS: u64 = 256;

    /// Looks the slices up as requests do, in this order; how many of them were there.
    fn hits(cache: &SliceCache, slices: impl Iterator<Item = u64>) -> u64 {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::default()
        };
        let home = Home::new(options).unwrap();
        let bytes = vec![0; in_memory(SLICE_BYTES_MIN)];
        let there = |slice| cache.peek(slice, |words| words.get(0)).is_some();
        home.run(|co| {
            let mut hits = 0;
            for slice in slices {
                if there(slice) {
                    hits += 1;
                    continue;
                }
                let host = HostOffset(slice * SLICE_BYTES_MIN);
                let Reserved::Load(load) = cache.reserve(co, slice, host) else {
                    panic!("slice {slice} is to be read");
                };
                assert!(load.publish(&bytes, || true).is_some());
                assert!(there(slice));
            }
            hits
        })
    }

    fn cache() -> SliceCache {
        SliceCache::new(SLICE_BYTES_MIN, SLOTS * SLICE_BYTES_MIN, 0)
    }

    /// Who goes round twice as many slices as there are slots finds some of them again: keeping the
    /// last ones, none would be found ever.
    #[test]
    fn going_round_more_than_fits_finds_a_part_again() {
        let cache = cache();
        assert_eq!(hits(&cache, 0..2 * SLOTS), 0, "the first round");
        let found = hits(&cache, (2 * SLOTS..8 * SLOTS).map(|n| n % (2 * SLOTS)));
        assert!(found > 6 * SLOTS / 3, "{found} of {}", 6 * SLOTS);
    }

    /// Slices that are needed once do not drive out those that are needed again and again.
    #[test]
    fn what_is_used_again_outlives_what_is_needed_once() {
        let cache = cache();
        let often = |n: u64| n * 7 % (SLOTS / 2);
        hits(&cache, (0..SLOTS).map(often));
        let mixed = |n: u64| {
            if n.is_multiple_of(2) {
                often(n / 2)
            } else {
                1000 + n
            }
        };
        let found = hits(&cache, (0..8 * SLOTS).map(mixed));
        assert!(found > 4 * SLOTS * 9 / 10, "{found} of {}", 4 * SLOTS);
    }

    /// The guest turns to other slices, fewer than there are slots: soon all of them are there.
    #[test]
    fn the_cache_follows_the_guest() {
        let cache = cache();
        let mut state = 1u64;
        let mut anywhere = |from: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            from + (state >> 33) % (SLOTS * 3 / 4)
        };
        for from in [0, 10_000, 20_000] {
            let settling: Vec<u64> = (0..8 * SLOTS).map(|_| anywhere(from)).collect();
            hits(&cache, settling.into_iter());
            let settled: Vec<u64> = (0..SLOTS).map(|_| anywhere(from)).collect();
            let found = hits(&cache, settled.into_iter());
            assert!(found > SLOTS * 9 / 10, "{found} of {SLOTS} from {from} on");
        }
    }
}
