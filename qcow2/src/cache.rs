//! The cache of metadata slices: lock-free to read, written back in order, bounded in bytes.
//!
//! L2 tables and refcount blocks are read and kept in *slices*, of at most 4 KiB unless told
//! otherwise, as raw big-endian words.
//!
//! ```text
//!   directory, a word per slice       slots, never unmapped
//!   [ generation << 32 | place ] -> [ 512 words ]         a reader: directory, word, directory again;
//!   [ 0: not cached            ]    [ 32 records ]         equal means that the word was valid
//! ```
//!
//! A lookup that hits takes no lock, holds nothing and writes nothing but one recency bit, only
//! where it is clear. Everything else happens under one short thread lock: who has which slot, who
//! loads, pins, what is dirty. A slice that is only looked at, and that is a few runs of clusters,
//! takes a record in a slot that it shares with others (`pages.rs`). `replace.rs` finds the victim; dirty, pinned, loading slots and slots
//! on their way to the disk are none, and who finds no victim waits. What to write when, and after
//! what, is the business of `writeback.rs`.

mod pages;
mod replace;
mod runs;

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};

use coblock_aio::{AlignedBuf, AtomicWords};
use coblock_block::Result;
use coblock_block::types::in_memory;
use coblock_coroutine::{Co, CoQueue, ThreadLock, mutant};

use crate::image::buffer;
use crate::lazy::LazyWords;
use crate::spec;
use crate::types::HostOffset;
use pages::{Looked, Page, Pages};
use replace::Recency;
pub(crate) use runs::Words;

/// Bytes in a slice unless told otherwise: what a device reads at the price of one sector.
pub(crate) const SLICE_BYTES_DEFAULT: u64 = 4096;
/// Fewest bytes in a slice.
pub(crate) const SLICE_BYTES_MIN: u64 = 512;
/// Most bytes in a slice: the greatest cluster.
const SLICE_BYTES_MAX: u64 = 1 << spec::CLUSTER_BITS_MAX;
/// A cache must be able to hold what one request pins at the same time.
pub(crate) const SLOTS_MIN: usize = 2;
/// Most bytes of buffers kept for the next reads.
const SPARE_BYTES_MAX: usize = 256 << 10;
/// Bytes for slices that are mapped together.
const AT_ONCE_BYTES: u64 = 64 << 10;
/// Queues for those who wait for a slice that somebody else reads; slots share them.
const LOAD_QUEUES: usize = 64;

/// A cache of slices of one kind (L2 or refcount).
pub(crate) struct SliceCache {
    /// Logarithm of the number of 64-bit words in a slice.
    words_bits: u32,
    /// How much more each word is than the one before where clusters lie one after another.
    step: u64,
    directory: LazyWords,
    slots: Box<[Slot]>,
    state: ThreadLock<State>,
    /// By slot: woken when it was loaded, or its load was given up. Many of them, because with
    /// thousands of requests in flight most wait here at first, and a load must not wake those of
    /// all others.
    loaded: [CoQueue; LOAD_QUEUES],
    /// Woken when a slot was unpinned or written back, or a load was given up: it may be a victim.
    room: CoQueue,
    misses: AtomicU64,
    evictions: AtomicU64,
    cleaned: AtomicU64,
}

struct Slot {
    /// Allocated at first use, so that a large limit costs nothing on a small image.
    words: OnceLock<AtomicWords>,
    /// What a hit leaves behind.
    used: Recency,
    /// The same for the records of a page.
    looked: Looked,
}

#[derive(Default)]
struct State {
    slots: Vec<SlotState>,
    /// Slots that were used at least once; the rest is free and has no state to look at.
    touched: usize,
    /// Where the search for a victim goes on.
    hand: usize,
    /// Victims that were looked for: whose turn it is among those on trial.
    turn: usize,
    /// Slots that are being read: few, so a search through them costs less than an index.
    loading: Vec<usize>,
    /// How many slots are dirty or on their way to the file.
    unsaved: usize,
    /// What slices were read into, for the next reads: on an image far larger than the cache every
    /// request needs one, and pages that come and go cost as much as the look-up.
    spare: Vec<AlignedBuf>,
    /// For slots that are used for the first time.
    spare_words: Vec<AtomicWords>,
    /// Slots that were used and are not now.
    free: Vec<usize>,
    pages: Pages,
}

impl State {
    /// Ends the use of `slot`, which is in no directory word.
    fn free_slot(&mut self, slot: usize) {
        let its = &mut self.slots[slot];
        its.slice = None;
        its.loading = false;
        its.pins = 0;
        its.free = true;
        self.free.push(slot);
    }
}

/// What a slot is doing. All under the lock of [`SliceCache::state`].
#[derive(Default)]
struct SlotState {
    slice: Option<u64>,
    /// Where the slice lies in the file.
    host: u64,
    /// Its words are being read; nobody sees them yet, and `pins` is one.
    loading: bool,
    /// The words are newer than the file.
    dirty: bool,
    /// A copy of the words is on its way to the file: reading the slice anew could see the old
    /// ones.
    writing: bool,
    pins: u32,
    generation: u32,
    /// It stands in [`State::free`].
    free: bool,
    /// It holds records of slices, instead of one slice.
    page: Option<Box<Page>>,
}

impl SlotState {
    fn evictable(&self) -> bool {
        let dirty = self.dirty && !mutant!("dirty slices are evicted");
        let pinned = self.pins > 0 && !mutant!("pinned slices are evicted");
        let used_else = self.free || self.page.is_some();
        !self.loading && !dirty && !self.writing && !pinned && !used_else
    }
}

/// What [`SliceCache::reserve`] found.
pub(crate) enum Reserved<'a> {
    /// The slice is here and stays while the pin lives.
    Ready(Pin<'a>),
    /// The caller reads it and calls [`Load::publish`].
    Load(Load<'a>),
    /// No slot is free before dirty ones are written back.
    NeedsWriteBack,
    /// Waited: somebody else was reading the slice, or all slots were pinned. Look again.
    Again,
}

/// Where a slice is: in a slot of its own, or in a record of one. What a word of the directory says
/// in its lower half: slot + 1, and from bit 25 on record and a mark, if it is one.
#[derive(Clone, Copy)]
struct Place {
    slot: usize,
    record: Option<usize>,
}

/// A word of the directory with this bit names a record.
const IN_RECORD: u64 = 1 << 31;
const RECORD_SHIFT: u32 = 25;

impl Place {
    fn encode(self, generation: u32) -> u64 {
        let record = self
            .record
            .map_or(0, |nth| IN_RECORD | (nth as u64) << RECORD_SHIFT);
        u64::from(generation) << 32 | record | (self.slot as u64 + 1)
    }

    #[inline(always)]
    fn decode(entry: u64) -> Option<Place> {
        let slot = in_memory(entry & ((1 << RECORD_SHIFT) - 1)).checked_sub(1)?;
        let nth = in_memory((entry & (IN_RECORD - 1)) >> RECORD_SHIFT);
        let record = (entry & IN_RECORD != 0).then_some(nth);
        Some(Place { slot, record })
    }
}

/// A dirty slice's content, copied at one instant, to be written at `host`.
pub(crate) struct Staged {
    pub host: HostOffset,
    slot: usize,
    pub bytes: Vec<u8>,
}

impl SliceCache {
    /// A cache for slices of `slice_bytes` that never takes more than `limit_bytes`. `step`: how much
    /// more each word is than the one before where clusters lie one after another; zero if they never
    /// do.
    pub fn new(slice_bytes: u64, limit_bytes: u64, step: u64) -> Self {
        assert!(
            slice_bytes.is_power_of_two()
                && (SLICE_BYTES_MIN..=SLICE_BYTES_MAX).contains(&slice_bytes)
        );
        // A directory entry has 25 bits for the slot.
        let slots = in_memory((limit_bytes / slice_bytes).clamp(SLOTS_MIN as u64, 1 << 24));
        SliceCache {
            words_bits: (slice_bytes / 8).ilog2(),
            step,
            directory: LazyWords::new(),
            slots: (0..slots)
                .map(|_| Slot {
                    words: OnceLock::new(),
                    used: Recency::new(),
                    looked: Looked::new(),
                })
                .collect(),
            state: ThreadLock::new(State::default()),
            loaded: [const { CoQueue::new() }; LOAD_QUEUES],
            room: CoQueue::new(),
            misses: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            cleaned: AtomicU64::new(0),
        }
    }

    /// Bytes of memory that the places of `words` words of L2 tables take in the directory, for
    /// clusters of this size.
    pub fn directory_memory(cluster_size: u64, words: u64) -> u64 {
        LazyWords::places(words * 8 / cluster_size.min(SLICE_BYTES_DEFAULT))
    }

    /// Bytes in a slice.
    pub fn slice_bytes(&self) -> u64 {
        8 << self.words_bits
    }

    /// The slice that word `nth` of all is in, and its place there.
    #[inline(always)]
    pub fn place(&self, nth: u64) -> (u64, usize) {
        let in_slice = nth & ((1 << self.words_bits) - 1);
        (nth >> self.words_bits, in_memory(in_slice))
    }

    /// Words in a slice.
    fn words(&self) -> usize {
        1 << self.words_bits
    }

    /// A buffer for one slice, with anything in it. [`SliceCache::give_buffer`] takes it back.
    ///
    /// # Errors
    /// No memory.
    pub fn take_buffer(&self) -> Result<AlignedBuf> {
        // The lock ends with the statement.
        let spare = self.state.lock().spare.pop();
        match spare {
            Some(buffer) => Ok(buffer),
            None => buffer(in_memory(self.slice_bytes())),
        }
    }

    /// Keeps a buffer of [`SliceCache::take_buffer`] for the next one.
    pub fn give_buffer(&self, buffer: AlignedBuf) {
        let mut state = self.state.lock();
        if state.spare.len() * buffer.len() < SPARE_BYTES_MAX {
            state.spare.push(buffer);
        }
    }

    /// Memory for a slot that is used for the first time.
    fn take_words(&self, spare: &mut Vec<AtomicWords>) -> AtomicWords {
        if spare.is_empty() {
            let count = in_memory(AT_ONCE_BYTES / self.slice_bytes()).clamp(1, self.slots.len());
            spare.extend(AtomicWords::several(count, self.words()));
        }
        spare.pop().expect("made just now")
    }

    /// Slices that had to be read so far.
    pub fn misses(&self) -> u64 {
        self.misses.load(Relaxed)
    }

    /// Slices that gave way to another so far.
    pub fn evictions(&self) -> u64 {
        self.evictions.load(Relaxed)
    }

    /// Slices that gave their memory back because nobody used them.
    pub fn cleaned(&self) -> u64 {
        self.cleaned.load(Relaxed)
    }

    /// Gives up every slice that could be evicted and was not used since the last call; the others
    /// count as unused from now on. Any thread.
    pub fn clean_unused(&self) {
        let mut state = self.state.lock();
        for slot in 0..state.touched {
            if !state.slots[slot].evictable() || self.slots[slot].used.outlives_cleaning() {
                continue;
            }
            let Some(slice) = state.slots[slot].slice.take() else {
                continue;
            };
            // Who looks at the words now will see that the slice is gone.
            self.forget(slice);
            if let Some(words) = self.slots[slot].words.get() {
                words.give_back();
            }
            self.cleaned.fetch_add(1, Relaxed);
        }
        self.clean_records(&mut state);
    }

    /// Calls `look` with the words of `slice` if it is cached, and returns its result if the slice
    /// was there all the time. `look` may see words of another slice; then its result is thrown
    /// away.
    #[inline(always)]
    pub fn peek<R>(&self, slice: u64, look: impl FnOnce(Words<'_>) -> R) -> Option<R> {
        let entry = self.directory.get(slice)?;
        let before = entry.load(Acquire);
        let place = Place::decode(before)?;
        let slot = &self.slots[place.slot];
        let words = slot.words.get()?;
        let result = look(match place.record {
            None => Words::whole(words),
            Some(nth) => Words::runs(pages::record(words, nth)?, self.step, self.words()),
        });
        // Orders the loads of `look` before the second look at the directory; pairs with `forget`.
        fence(Acquire);
        if entry.load(Relaxed) != before {
            return None;
        }
        match place.record {
            None => slot.used.look(),
            Some(nth) => slot.looked.look(nth),
        }
        Some(result)
    }

    /// Whether `slice` is cached.
    pub fn holds(&self, slice: u64) -> bool {
        self.find(slice).is_some()
    }

    /// Finds or makes room for `slice`, which lies at `host`. Suspends only to wait, and then says
    /// [`Reserved::Again`]: what the caller knew before is out of date.
    pub fn reserve(&self, co: &Co, slice: u64, host: HostOffset) -> Reserved<'_> {
        let mut state = self.state.lock();
        let found = self.find(slice);
        if let Some(Place { slot, record: None }) = found {
            let its = &mut state.slots[slot];
            assert_eq!(its.slice, Some(slice), "directory against state");
            its.pins += 1;
            self.slots[slot].used.look();
            return Reserved::Ready(Pin { cache: self, slot });
        }
        // A load in progress is not in the directory.
        let same = |slot: &&usize| state.slots[**slot].slice == Some(slice);
        if let Some(&slot) = state.loading.iter().find(same) {
            self.loaded(slot).wait_dropping(co, state);
            return Reserved::Again;
        }
        if let Some(slot) = self.victim(&mut state) {
            if let Some(place) = found {
                self.unfold(&mut state, place, slot);
                state.slots[slot].pins = 1;
                return Reserved::Ready(Pin { cache: self, slot });
            }
            state.loading.push(slot);
            let its = &mut state.slots[slot];
            its.slice = Some(slice);
            its.host = host.0;
            its.loading = true;
            its.pins = 1;
            its.generation = its.generation.wrapping_add(1);
            self.misses.fetch_add(1, Relaxed);
            return Reserved::Load(Load {
                cache: self,
                slot,
                done: false,
            });
        }
        // Also where a write-back is under way: asking for another one waits for it.
        if state.unsaved > 0 {
            return Reserved::NeedsWriteBack;
        }
        self.room.wait_dropping(co, state);
        Reserved::Again
    }

    /// Where to wait for the load of `slot`.
    fn loaded(&self, slot: usize) -> &CoQueue {
        &self.loaded[slot % LOAD_QUEUES]
    }

    /// Where `slice` is; it stays so under the lock.
    fn find(&self, slice: u64) -> Option<Place> {
        Place::decode(self.directory.get(slice)?.load(Relaxed))
    }

    /// Takes `slice` out of the directory. Words may be overwritten afterwards: whoever still reads
    /// them sees the directory change.
    fn forget(&self, slice: u64) {
        self.directory.ensure(slice).store(0, Relaxed);
        fence(Release);
    }

    /// Copies every dirty slice at this instant and marks it as on its way to the file. Each copy
    /// must come back through [`SliceCache::written`].
    pub fn stage_dirty(&self) -> Vec<Staged> {
        let mut state = self.state.lock();
        let mut staged = Vec::with_capacity(state.unsaved);
        for (slot, its) in state.slots.iter_mut().enumerate() {
            if !its.dirty {
                continue;
            }
            assert!(!its.writing, "one write-back at a time");
            its.dirty = false;
            its.writing = true;
            let words = self.slots[slot]
                .words
                .get()
                .expect("a dirty slice has words");
            let bytes = words
                .iter()
                .flat_map(|word| raw_bytes(word.load(Acquire)))
                .collect();
            staged.push(Staged {
                host: HostOffset(its.host),
                slot,
                bytes,
            });
        }
        staged.sort_by_key(|s| s.host);
        staged
    }

    /// Ends the write of `staged` slices. Those that did not reach the file are dirty again.
    pub fn written(&self, staged: &[Staged], ok: bool) {
        let mut state = self.state.lock();
        for s in staged {
            let its = &mut state.slots[s.slot];
            assert!(its.writing, "only what was staged is written");
            its.writing = false;
            its.dirty |= !ok && its.slice.is_some();
            let saved = !its.dirty;
            state.unsaved -= usize::from(saved);
        }
        drop(state);
        self.room.wake_all();
    }

    /// The table with these slices moved to `host`, where the file has the same words. `switch`
    /// publishes the move and runs under the lock.
    pub fn rehome(&self, first_slice: u64, slices: u64, host: HostOffset, switch: impl FnOnce()) {
        let mut state = self.state.lock();
        let moved = |slice: u64| {
            let nth = slice.checked_sub(first_slice)?;
            let moves = nth < slices && !mutant!("slices of a table that moved keep their place");
            moves.then(|| host.0 + nth * self.slice_bytes())
        };
        for its in &mut state.slots {
            if let Some(host) = its.slice.and_then(moved) {
                its.host = host;
            }
        }
        self.move_records(&mut state, moved);
        switch();
    }

    /// Drops every slice that lies in the freed range, unwritten (rule 9.4).
    pub fn drop_range(&self, start: HostOffset, len: u64) {
        let mut state = self.state.lock();
        for slot in 0..state.slots.len() {
            let its = &mut state.slots[slot];
            let Some(slice) = its.slice else { continue };
            if !(start.0..start.0 + len).contains(&its.host) {
                continue;
            }
            if its.loading {
                // No table points here any more, so its reader will find it out of place.
                continue;
            }
            // Somebody without the metadata mutex may be looking: the words stay while it does.
            its.slice = None;
            let was_dirty = std::mem::take(&mut its.dirty) && !its.writing;
            self.forget(slice);
            state.unsaved -= usize::from(was_dirty);
        }
        self.drop_records_in(&mut state, &(start.0..start.0 + len));
    }

    /// Copies the cached words of `slice` over `bytes` if it is cached, newer or not.
    pub fn overlay(&self, slice: u64, bytes: &mut [u8]) {
        let state = self.state.lock();
        let Some(place) = self.find(slice) else {
            return;
        };
        let Place { slot, record: None } = place else {
            for (word, raw) in self.words_of_record(place).zip(bytes.chunks_exact_mut(8)) {
                raw.copy_from_slice(&word.to_be_bytes());
            }
            return;
        };
        assert_eq!(state.slots[slot].slice, Some(slice));
        let words = self.slots[slot]
            .words
            .get()
            .expect("a cached slice has words");
        for (word, raw) in words.iter().zip(bytes.chunks_exact_mut(8)) {
            raw.copy_from_slice(&raw_bytes(word.load(Acquire)));
        }
    }

    /// Is there anything that the file does not have?
    pub fn has_dirty(&self) -> bool {
        self.state.lock().unsaved > 0
    }

    fn unpin(&self, slot: usize) {
        let mut state = self.state.lock();
        let its = &mut state.slots[slot];
        its.pins -= 1;
        let wake = its.pins == 0;
        drop(state);
        if wake {
            self.room.wake_all();
        }
    }
}

/// A raw word as it stands in the file. Words are kept as they were read, so this is no conversion
/// of byte order but of type.
#[expect(
    clippy::host_endian_bytes,
    reason = "the word was made by the counterpart of this"
)]
fn raw_bytes(word: u64) -> [u8; 8] {
    word.to_ne_bytes()
}

/// Counterpart of [`raw_bytes`].
#[expect(clippy::host_endian_bytes, reason = "undone by raw_bytes")]
fn raw_word(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().expect("chunks of eight"))
}

/// A slot whose slice the holder is reading from the file. Dropped without [`Load::publish`], the
/// slot is free again.
pub(crate) struct Load<'a> {
    cache: &'a SliceCache,
    slot: usize,
    done: bool,
}

impl<'a> Load<'a> {
    /// Shows what was read, if it is still `in_place`: tables move under the same lock. If not,
    /// nothing: look up the place again.
    pub fn publish(mut self, bytes: &[u8], in_place: impl FnOnce() -> bool) -> Option<Pin<'a>> {
        let cache = self.cache;
        assert_eq!(bytes.len(), cache.words() * 8);
        let mut guard = cache.state.lock();
        let state = &mut *guard;
        let its = &mut state.slots[self.slot];
        assert!(its.loading && its.pins == 1, "published once");
        if !in_place() {
            drop(guard);
            return None;
        }
        let words = cache.slots[self.slot]
            .words
            .get_or_init(|| cache.take_words(&mut state.spare_words));
        for (word, raw) in words.iter().zip(bytes.chunks_exact(8)) {
            word.store(raw_word(raw), Relaxed);
        }
        its.loading = false;
        let slice = its.slice.expect("a loading slot has a slice");
        let place = Place {
            slot: self.slot,
            record: None,
        };
        let entry = place.encode(its.generation);
        state.loading.retain(|&slot| slot != self.slot);
        cache.slots[self.slot].used.begin();
        cache.directory.ensure(slice).store(entry, Release);
        self.done = true;
        drop(guard);
        if !mutant!("a load wakes nobody") {
            cache.loaded(self.slot).wake_all();
        }
        Some(Pin {
            cache,
            slot: self.slot,
        })
    }
}

impl Load<'_> {
    /// As [`Load::publish`], for somebody who only looks at the slice: as runs if it is a few.
    pub fn publish_to_look(self, bytes: &[u8], in_place: impl Fn() -> bool) {
        let cache = self.cache;
        let words = bytes.chunks_exact(8).map(|raw| u64::from_be(raw_word(raw)));
        let left = match runs::encode(words, cache.step) {
            Some(runs) => self.publish_runs(&runs, &in_place),
            None => Some(self),
        };
        if let Some(load) = left {
            load.publish(bytes, in_place);
        }
    }

    /// Gives the load back where no page has room.
    fn publish_runs(mut self, runs: &runs::Record, in_place: impl Fn() -> bool) -> Option<Self> {
        let cache = self.cache;
        let mut state = cache.state.lock();
        let its = &state.slots[self.slot];
        assert!(its.loading && its.pins == 1, "published once");
        if !in_place() {
            // Looked up again by who asked; the slot goes when we do.
            drop(state);
            return None;
        }
        if !cache.keep_runs(&mut state, self.slot, runs) {
            drop(state);
            return Some(self);
        }
        state.loading.retain(|&slot| slot != self.slot);
        self.done = true;
        drop(state);
        cache.loaded(self.slot).wake_all();
        cache.room.wake_all();
        None
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut state = self.cache.state.lock();
        let its = &mut state.slots[self.slot];
        its.loading = false;
        its.slice = None;
        its.pins = 0;
        state.loading.retain(|&slot| slot != self.slot);
        drop(state);
        self.cache.loaded(self.slot).wake_all();
        self.cache.room.wake_all();
    }
}

/// A slice that cannot be evicted while this lives. Who changes words holds the metadata mutex.
pub(crate) struct Pin<'a> {
    cache: &'a SliceCache,
    slot: usize,
}

impl Pin<'_> {
    /// The raw words.
    pub fn words(&self) -> &[AtomicU64] {
        self.cache.slots[self.slot]
            .words
            .get()
            .expect("a pinned slice has words")
    }

    /// Word `index` in host byte order.
    pub fn load(&self, index: usize) -> u64 {
        u64::from_be(self.words()[index].load(Acquire))
    }

    /// Changes word `index`, given in host byte order. The slice is dirty afterwards.
    pub fn store(&self, index: usize, value: u64) {
        self.words()[index].store(value.to_be(), Release);
        let mut state = self.cache.state.lock();
        let its = &mut state.slots[self.slot];
        assert!(its.slice.is_some(), "a freed table is changed");
        let newly = !its.dirty && !its.writing;
        if mutant!("a change while a slice is written is forgotten") && its.writing {
            return;
        }
        its.dirty = true;
        state.unsaved += usize::from(newly);
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.cache.unpin(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coblock_aio::{ContextOptions, EngineKind, Home};
    use std::cell::Cell;
    use std::rc::Rc;

    /// A load wakes those who wait for its slice and no others. When it woke everybody, 10 000
    /// reads that came at once to a new image cost sixty times as much as the same reads 32 at a
    /// time.
    #[test]
    fn a_load_wakes_only_those_who_wait_for_it() {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::default()
        };
        let home = Home::new(options).unwrap();
        let cache = Rc::new(SliceCache::new(512, 8 * 512, 0));
        let gates: [Rc<CoQueue>; 2] = Default::default();
        for (slice, gate) in (0..).zip(gates.clone()) {
            let cache = cache.clone();
            home.spawn("load", move |co| {
                let Reserved::Load(load) = cache.reserve(co, slice, HostOffset(slice * 512)) else {
                    panic!("slice {slice} is new");
                };
                gate.wait(co);
                assert!(load.publish(&[0; 512], || true).is_some());
            });
        }
        let (woken, ready) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
        let (counted, told, its) = (woken.clone(), ready.clone(), cache.clone());
        home.spawn("wait for slice 1", move |co| {
            while let Reserved::Again = its.reserve(co, 1, HostOffset(512)) {
                counted.set(counted.get() + 1);
            }
            told.set(true);
        });
        let settle = |gate: &CoQueue| {
            home.run(|_| gate.wake_next());
            while home.poll(false) {}
        };
        settle(&gates[0]);
        assert_eq!((woken.get(), ready.get()), (0, false), "slice 0 is here");
        settle(&gates[1]);
        assert_eq!((woken.get(), ready.get()), (1, true), "slice 1 is here");
    }
}
