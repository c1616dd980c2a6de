//! Slots that hold many slices, each as runs (`runs.rs`), and who is in them.
//!
//! ```text
//!   slot of 4 KiB     one slice, word by word        or a page of 32 records, a slice in each
//! ```
//!
//! A slice that is read to be looked at, and that has few enough runs, becomes a record. Who wants
//! to change it gets it word by word, in a slot of its own (`unfold`). So a record is never dirty
//! and never pinned: it may go at any time. A page whose last record goes is a free slot again.
//!
//! A reader does as with any slot: directory, words, directory again. So a record is written only
//! when no word of the directory leads there, and under a new generation.

use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use super::runs::{RECORD_WORDS, Record, Words};
use super::{Place, SLOTS_MIN, SliceCache, State};

/// Most records of a page, however large a slot is.
pub(super) const RECORDS_MAX: usize = 32;

/// Which pages there are. Under the lock of the cache's state, as all of this.
#[derive(Default)]
pub(super) struct Pages {
    all: Vec<usize>,
    /// Those with a free record.
    with_room: Vec<usize>,
    /// Where the search for a page that gives way goes on, in `all`.
    hand: usize,
}

/// Who is in the records of one page.
#[derive(Default)]
pub(super) struct Page {
    records: [Option<Held>; RECORDS_MAX],
    held: usize,
}

#[derive(Clone, Copy)]
struct Held {
    slice: u64,
    /// Where the slice lies in the file.
    host: u64,
}

/// Which records of a page were looked at of late: a bit each.
pub(super) struct Looked(AtomicU32);

impl Looked {
    pub(super) const fn new() -> Looked {
        Looked(AtomicU32::new(0))
    }

    /// Writes nothing if it was looked at before.
    #[inline(always)]
    pub(super) fn look(&self, record: usize) {
        let bit = 1 << (record % RECORDS_MAX);
        if self.0.load(Relaxed) & bit == 0 {
            self.0.fetch_or(bit, Relaxed);
        }
    }

    /// Which were; all count as not looked at from now on.
    fn take(&self) -> u32 {
        self.0.swap(0, Relaxed)
    }
}

/// The words of one record.
#[inline(always)]
pub(super) fn record(words: &[AtomicU64], nth: usize) -> Option<&[AtomicU64; RECORD_WORDS]> {
    words.get(nth * RECORD_WORDS..)?.first_chunk()
}

impl SliceCache {
    /// Records of a page.
    fn records(&self) -> usize {
        (self.words() / RECORD_WORDS).min(RECORDS_MAX)
    }

    /// Keeps the slice that was loaded for `slot` as runs; `false` where no page has room. The slot
    /// is free afterwards, or a page.
    pub(super) fn keep_runs(&self, state: &mut State, slot: usize, runs: &Record) -> bool {
        let its = &state.slots[slot];
        let slice = its.slice.expect("a loading slot has a slice");
        let held = Held {
            slice,
            host: its.host,
        };
        let Some(page) = self.page_with_room(state, slot) else {
            return false;
        };
        if page != slot {
            state.free_slot(slot);
        }
        let its = &mut state.slots[page];
        its.generation = its.generation.wrapping_add(1);
        let generation = its.generation;
        let records = its.page.as_mut().expect("a page");
        let nth = records.records.iter().position(Option::is_none);
        let nth = nth.expect("a page with room");
        records.records[nth] = Some(held);
        records.held += 1;
        if records.held == self.records() {
            let left = state.pages.with_room.pop();
            assert_eq!(left, Some(page), "the last of them");
        }
        let words = self.slots[page].words.get().expect("a page has words");
        let words = record(words, nth).expect("a record of the page");
        // Who still reads what was here will see that the directory has changed.
        fence(Release);
        for (word, &value) in words.iter().zip(runs) {
            word.store(value, Relaxed);
        }
        let place = Place {
            slot: page,
            record: Some(nth),
        };
        let entry = place.encode(generation);
        self.directory.ensure(slice).store(entry, Release);
        true
    }

    /// A page with a free record; `slot` becomes one where there is none and there may be more.
    fn page_with_room(&self, state: &mut State, slot: usize) -> Option<usize> {
        if let Some(&page) = state.pages.with_room.last() {
            return Some(page);
        }
        // Slots for those who change words are left.
        if state.pages.all.len() < (self.slots.len() - SLOTS_MIN) / 2 {
            self.slots[slot]
                .words
                .get_or_init(|| self.take_words(&mut state.spare_words));
            self.slots[slot].looked.take();
            let its = &mut state.slots[slot];
            its.slice = None;
            its.loading = false;
            its.pins = 0;
            its.page = Some(Box::default());
            state.pages.all.push(slot);
            state.pages.with_room.push(slot);
            return Some(slot);
        }
        for _ in 0..2 * state.pages.all.len() {
            let page = state.pages.all[state.pages.hand % state.pages.all.len()];
            state.pages.hand = (state.pages.hand + 1) % state.pages.all.len();
            if self.slots[page].looked.take() == 0 {
                self.empty_page(state, page);
                return Some(page);
            }
        }
        None
    }

    /// Gives up all slices of a page that is full.
    fn empty_page(&self, state: &mut State, page: usize) {
        let records = state.slots[page].page.as_mut().expect("a page");
        for held in records.records.iter_mut().filter_map(Option::take) {
            self.forget(held.slice);
            self.evictions.fetch_add(1, Relaxed);
        }
        records.held = 0;
        state.pages.with_room.push(page);
    }

    /// Gives up the slice in one record.
    fn drop_record(&self, state: &mut State, page: usize, nth: usize) {
        let full = self.records();
        let records = state.slots[page].page.as_mut().expect("a page");
        let held = records.records[nth].take().expect("a record that is held");
        if records.held == full {
            state.pages.with_room.push(page);
        }
        records.held -= 1;
        self.forget(held.slice);
    }

    /// Gives up those slices that `goes` chooses, which may also note a new place in the file. It is
    /// told whether a slice was looked at since the last cleaning, if this is one. Pages that are
    /// empty then are free slots. Returns how many went.
    fn drop_records(
        &self,
        state: &mut State,
        cleaning: bool,
        mut goes: impl FnMut(&mut Held, bool) -> bool,
    ) -> u64 {
        let mut dropped = 0;
        // From the last on: a page that goes makes way for one that was seen already.
        for at in (0..state.pages.all.len()).rev() {
            let page = state.pages.all[at];
            let looked = if cleaning {
                self.slots[page].looked.take()
            } else {
                0
            };
            for nth in 0..self.records() {
                let records = state.slots[page].page.as_mut().expect("a page");
                let Some(held) = &mut records.records[nth] else {
                    continue;
                };
                if goes(held, looked >> nth & 1 != 0) {
                    self.drop_record(state, page, nth);
                    dropped += 1;
                }
            }
            if state.slots[page].page.as_ref().is_some_and(|p| p.held == 0) {
                state.pages.all.swap_remove(at);
                state.pages.with_room.retain(|&other| other != page);
                state.slots[page].page = None;
                state.free_slot(page);
                if let Some(words) = self.slots[page].words.get() {
                    words.give_back();
                }
            }
        }
        dropped
    }

    /// Gives up the slices that nobody looked at since the last call.
    pub(super) fn clean_records(&self, state: &mut State) {
        let cleaned = self.drop_records(state, true, |_, looked| !looked);
        self.cleaned.fetch_add(cleaned, Relaxed);
    }

    /// Gives up the slices that lie in this range of the file.
    pub(super) fn drop_records_in(&self, state: &mut State, range: &Range<u64>) {
        self.drop_records(state, false, |held, _| range.contains(&held.host));
    }

    /// Slices for which there is one now lie at the place that `moved` tells.
    pub(super) fn move_records(&self, state: &mut State, moved: impl Fn(u64) -> Option<u64>) {
        self.drop_records(state, false, |held, _| {
            if let Some(host) = moved(held.slice) {
                held.host = host;
            }
            false
        });
    }

    /// What a record says, word by word.
    pub(super) fn words_of_record(&self, place: Place) -> impl Iterator<Item = u64> {
        let words = self.slots[place.slot].words.get();
        let words = words.expect("a page has words");
        let nth = place.record.expect("a record");
        let record = record(words, nth).expect("a record of the page");
        let view = Words::runs(record, self.step, self.words());
        (0..view.len()).map(move |index| view.get(index))
    }

    /// Moves a slice from its record to the free `slot`, word by word.
    pub(super) fn unfold(&self, state: &mut State, place: Place, slot: usize) {
        let nth = place.record.expect("a record");
        let page = state.slots[place.slot].page.as_ref().expect("a page");
        let held = page.records[nth].expect("directory against state");
        let words = self.slots[slot]
            .words
            .get_or_init(|| self.take_words(&mut state.spare_words));
        for (word, value) in words.iter().zip(self.words_of_record(place)) {
            word.store(value.to_be(), Relaxed);
        }
        // Out of the directory for a moment: who comes now waits for our lock.
        self.drop_record(state, place.slot, nth);
        let its = &mut state.slots[slot];
        its.slice = Some(held.slice);
        its.host = held.host;
        its.generation = its.generation.wrapping_add(1);
        self.slots[slot].used.begin();
        let entry = Place { slot, record: None }.encode(its.generation);
        self.directory.ensure(held.slice).store(entry, Release);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use coblock_aio::{ContextOptions, EngineKind, Home};
    use coblock_block::types::in_memory;
    use coblock_coroutine::Co;
    use proptest::prelude::*;

    use super::super::{Pin, Reserved};
    use super::*;
    use crate::types::HostOffset;

    const SLICE: u64 = 512;
    const WORDS: u64 = SLICE / 8;
    const STEP: u64 = 1 << 16;

    fn with_co(run: impl FnOnce(&Co)) {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::default()
        };
        Home::new(options).unwrap().run(run);
    }

    /// Word `index` of a slice that was written in order.
    fn in_order(slice: u64, index: u64) -> u64 {
        (slice * WORDS + index + 1) * STEP
    }

    fn bytes(words: impl Iterator<Item = u64>) -> Vec<u8> {
        words.flat_map(u64::to_be_bytes).collect()
    }

    /// Loads `slice`, which lies at its number times its size, to be looked at.
    fn look(cache: &SliceCache, co: &Co, slice: u64) {
        let Reserved::Load(load) = cache.reserve(co, slice, HostOffset(slice * SLICE)) else {
            panic!("slice {slice} is to be read");
        };
        let words = bytes((0..WORDS).map(|index| in_order(slice, index)));
        load.publish_to_look(&words, || true);
    }

    fn pin<'c>(cache: &'c SliceCache, co: &Co, slice: u64) -> Pin<'c> {
        match cache.reserve(co, slice, HostOffset(slice * SLICE)) {
            Reserved::Ready(pin) => pin,
            _ => panic!("slice {slice} is here"),
        }
    }

    fn word(cache: &SliceCache, slice: u64, index: usize) -> Option<u64> {
        cache.peek(slice, |words| words.get(index))
    }

    /// Slices that are only looked at, and whose clusters lie in order, take four to a slot here;
    /// what is beyond the pages' part of the cache gives way, and slots are left to change some.
    #[test]
    fn many_slices_share_a_slot() {
        with_co(|co| {
            let cache = SliceCache::new(SLICE, 8 * SLICE, STEP);
            for slice in 0..12 {
                look(&cache, co, slice);
            }
            for slice in 0..12 {
                assert_eq!(word(&cache, slice, 5), Some(in_order(slice, 5)), "{slice}");
            }
            assert_eq!((cache.misses(), cache.evictions()), (12, 0));
            for slice in 12..1000 {
                look(&cache, co, slice);
                assert_eq!(
                    word(&cache, slice, 63),
                    Some(in_order(slice, 63)),
                    "{slice}"
                );
            }
            let held: Vec<u64> = (0..1000).filter(|&slice| cache.holds(slice)).collect();
            assert!((4..=12).contains(&held.len()), "{held:?}");
            let pins = [pin(&cache, co, held[0]), pin(&cache, co, held[1])];
            assert_eq!(pins[1].load(9), in_order(held[1], 9));
        });
    }

    /// Who changes a slice gets it word by word; what is written to the file is the whole of it.
    #[test]
    fn a_slice_that_is_changed_leaves_its_record() {
        with_co(|co| {
            let cache = SliceCache::new(SLICE, 8 * SLICE, STEP);
            look(&cache, co, 3);
            pin(&cache, co, 3).store(7, 4711);
            assert_eq!(word(&cache, 3, 7), Some(4711));
            assert_eq!(word(&cache, 3, 8), Some(in_order(3, 8)));
            assert_eq!(cache.misses(), 1);
            let staged = cache.stage_dirty();
            let changed = |index| if index == 7 { 4711 } else { in_order(3, index) };
            assert_eq!(staged[0].bytes, bytes((0..WORDS).map(changed)));
            assert_eq!(staged[0].host, HostOffset(3 * SLICE));
            cache.written(&staged, true);
        });
    }

    /// Rule 9.4: records of a freed table go, wherever it has moved meanwhile, and no others. What
    /// they said can be copied from them before.
    #[test]
    fn rule_9_4_records_of_a_freed_table_go() {
        with_co(|co| {
            let cache = SliceCache::new(SLICE, 8 * SLICE, STEP);
            for slice in 0..4 {
                look(&cache, co, slice);
            }
            let mut copy = vec![0xff; in_memory(SLICE)];
            cache.overlay(1, &mut copy);
            assert_eq!(copy, bytes((0..WORDS).map(|index| in_order(1, index))));
            cache.rehome(1, 2, HostOffset(100 * SLICE), || {});
            cache.drop_range(HostOffset(0), 4 * SLICE);
            let held = |slices: [bool; 4]| {
                for (slice, is) in (0..).zip(slices) {
                    assert_eq!(cache.holds(slice), is, "{slice}");
                }
            };
            held([false, true, true, false]);
            cache.drop_range(HostOffset(101 * SLICE), SLICE);
            held([false, true, false, false]);
        });
    }

    /// Records that nobody looked at since the last cleaning go; the others stay.
    #[test]
    fn unused_records_are_cleaned() {
        with_co(|co| {
            let cache = SliceCache::new(SLICE, 8 * SLICE, STEP);
            for slice in 0..6 {
                look(&cache, co, slice);
                word(&cache, slice, 0);
            }
            cache.clean_unused();
            assert_eq!(cache.cleaned(), 0, "all were looked at");
            word(&cache, 2, 0);
            cache.clean_unused();
            assert_eq!(cache.cleaned(), 5);
            assert_eq!(word(&cache, 2, 1), Some(in_order(2, 1)));
            for slice in [0, 1, 3, 4, 5] {
                assert_eq!(word(&cache, slice, 1), None);
                look(&cache, co, slice);
                assert_eq!(word(&cache, slice, 1), Some(in_order(slice, 1)));
            }
        });
    }

    #[derive(Clone, Debug)]
    enum Op {
        Look(u64),
        Change(u64, usize, u64),
        WriteBack,
        Clean,
        Drop(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let slice = 0u64..24;
        prop_oneof![
            8 => slice.clone().prop_map(Op::Look),
            4 => (slice.clone(), 0..in_memory(WORDS), 0u64..4)
                .prop_map(|(slice, index, value)| Op::Change(slice, index, value * STEP)),
            2 => Just(Op::WriteBack),
            1 => Just(Op::Clean),
            1 => slice.prop_map(Op::Drop),
        ]
    }

    /// What one slice is in the file at first: in order, with some clusters, or all over the place.
    fn at_first(slice: u64) -> Vec<u64> {
        let word = |index: u64| match slice % 3 {
            0 => in_order(slice, index),
            1 if index.is_multiple_of(8) => in_order(slice, 2 * index),
            1 => 0,
            _ => (index * 7919 + slice) * STEP,
        };
        (0..WORDS).map(word).collect()
    }

    proptest! {
        /// Looked at, changed, written, cleaned, dropped in any order, with hardly any room: the
        /// cache and the file together always say what was last stored.
        #[test]
        fn the_cache_says_what_was_stored(script in prop::collection::vec(op(), 1..120)) {
            with_co(|co| {
                let cache = SliceCache::new(SLICE, 7 * SLICE, STEP);
                let mut file: BTreeMap<u64, Vec<u64>> = (0..24).map(|n| (n, at_first(n))).collect();
                let mut truth = file.clone();
                let write_back = |file: &mut BTreeMap<u64, Vec<u64>>| {
                    let staged = cache.stage_dirty();
                    for s in &staged {
                        let words = s.bytes.chunks_exact(8);
                        let words = words.map(|raw| u64::from_be_bytes(raw.try_into().unwrap()));
                        file.insert(s.host.0 / SLICE, words.collect());
                    }
                    cache.written(&staged, true);
                };
                for op in script {
                    match op {
                        Op::Look(slice) | Op::Change(slice, ..) => {
                            let pin = loop {
                                if matches!(op, Op::Look(_)) && cache.holds(slice) {
                                    break None;
                                }
                                match cache.reserve(co, slice, HostOffset(slice * SLICE)) {
                                    Reserved::Ready(pin) => break Some(pin),
                                    Reserved::NeedsWriteBack => write_back(&mut file),
                                    Reserved::Again => panic!("nobody else is here"),
                                    Reserved::Load(load) => {
                                        let words = bytes(file[&slice].iter().copied());
                                        match op {
                                            Op::Look(_) => load.publish_to_look(&words, || true),
                                            _ => break load.publish(&words, || true),
                                        }
                                    }
                                }
                            };
                            if let (Op::Change(_, index, value), Some(pin)) = (&op, &pin) {
                                pin.store(*index, *value);
                                truth.get_mut(&slice).unwrap()[*index] = *value;
                            }
                        }
                        Op::WriteBack => write_back(&mut file),
                        Op::Clean => cache.clean_unused(),
                        Op::Drop(slice) => {
                            cache.drop_range(HostOffset(slice * SLICE), SLICE);
                            truth.insert(slice, file[&slice].clone());
                        }
                    }
                    for (&slice, words) in &truth {
                        for (index, &word) in words.iter().enumerate() {
                            let seen = cache.peek(slice, |words| words.get(index));
                            assert_eq!(seen.unwrap_or(file[&slice][index]), word, "{slice}: {index}");
                        }
                    }
                }
            });
        }
    }
}
