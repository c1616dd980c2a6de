//! Requests in flight: how many, where, and who waits for whom (rule 5.7, hazard Q21).
//!
//! ```text
//!   RequestTable
//!     special      serialising requests + THROTTLED + QUIESCED + CLOSED: zero on the fast path
//!     waiters      who looks for something to end: zero on the fast path
//!     rows[slot]   one per context, made at its first request
//!        free      a chunk with a free place                for the context's home
//!        chunk[n]  64 places; more of them are made when all are full
//!          live      bit i: place i is in use               stored to by the context's home only,
//!          place[i]  offset, length, kind                   read by everybody
//! ```
//! Beginning and ending a request are plain loads and stores to the context's own row. Whoever must
//! know about all requests is rare and pays for both: it announces itself in `special` or
//! `waiters`, issues the heavy fence, and then reads. A request publishes itself, passes the light
//! fence, and then looks at `special`; it leaves, passes the light fence, and then looks at
//! `waiters`. So either side sees the other.
//!
//! Who conflicts with others (one of them serialises, and the ranges overlap) takes a *turn*, under
//! one thread lock. It waits for requests that run and for those with an earlier turn, never for
//! one with a later turn, which will find it. So there is no cycle, they go on in the order in
//! which they came, and nobody starves. Who was taken for running and then takes a turn wakes those
//! that waited for it. Whoever goes on looks at everything anew.
//!
//! A request may be begun before its range is known: it overlaps everything until
//! [`Tracked::set_range`]. That is what a lookup needs whose result must stay in use (rule 9.2).

mod protocol;
mod section;

mod sync {
    pub(crate) use crate::sync::*;
}

use crate::graph_lock::{ContextSlot, MAX_CONTEXTS};
use crate::sync::heavy_fence;
use coblock_aio::{AioContext, AioWait};
use coblock_coroutine::{Co, ThreadLock, WakeHandle, mutant};
use protocol::{Live, Special, Waiters};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// What a tracked request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RequestKind {
    /// Reads the range.
    Read = 0,
    /// Writes it, also with zeroes.
    Write = 1,
    /// Gives it back.
    Discard = 2,
    /// Makes the node longer or shorter by this range.
    Truncate = 3,
    /// Has no range: a flush, another operation.
    Other = 4,
}

impl RequestKind {
    /// Does it change what a node holds?
    pub const fn changes(self) -> bool {
        matches!(
            self,
            RequestKind::Write | RequestKind::Discard | RequestKind::Truncate
        )
    }
}

const LEN_BITS: u32 = 56;
const LEN_MASK: u64 = (1 << LEN_BITS) - 1;
/// The whole node: what is not known yet, and what is longer than a length can say.
const UNKNOWN: u64 = LEN_MASK;
const SERIALISING: u64 = 1 << 63;
const KIND_SHIFT: u32 = LEN_BITS;

const PLACES: usize = 64;

#[derive(Default)]
struct Place {
    offset: AtomicU64,
    /// Bits 0..56 length, 56..59 kind, 63 serialising.
    len_kind: AtomicU64,
}

#[repr(align(128))]
struct Chunk {
    places: [Place; PLACES],
    live: Live,
    /// Number of the next chunk in the row's list, if this one is in it.
    next_free: AtomicU32,
    number: u32,
    row: u8,
}

impl Chunk {
    fn new(row: u8, number: u32, next_free: u32) -> Chunk {
        Chunk {
            places: std::array::from_fn(|_| Place::default()),
            live: Live::new(),
            next_free: AtomicU32::new(next_free),
            number,
            row,
        }
    }

    #[inline(always)]
    fn place(&self, index: u8) -> &Place {
        &self.places[usize::from(index) & (PLACES - 1)]
    }
}

/// How often the chunks of a row may double: far beyond the coroutines that a process can have.
const BUCKETS: usize = 24;
/// The end of the list of chunks with room.
const NO_CHUNK: u32 = u32::MAX;

/// The requests of one context. Chunk 0 is there from the start, chunks 2^k to 2^(k+1) - 1 are made
/// together.
struct Row {
    /// Number of a chunk with a free place, first of a list of all that have one; or [`NO_CHUNK`].
    /// For the home: a request finds its place in a time that does not depend on how many are in
    /// flight.
    free: AtomicU32,
    first: Chunk,
    more: [OnceLock<Box<[Chunk]>>; BUCKETS],
}

impl Row {
    #[cold]
    fn new(row: u8) -> Box<Row> {
        Box::new(Row {
            free: AtomicU32::new(0),
            first: Chunk::new(row, 0, NO_CHUNK),
            more: [const { OnceLock::new() }; BUCKETS],
        })
    }

    /// A chunk with a free place. For the home.
    #[inline(always)]
    fn with_room(&self) -> &Chunk {
        match self.free.load(Ordering::Relaxed) {
            0 => &self.first,
            number => self.later_with_room(number),
        }
    }

    #[inline(never)]
    fn later_with_room(&self, mut number: u32) -> &Chunk {
        if number == NO_CHUNK {
            number = self.grow();
            self.free.store(number, Ordering::Relaxed);
        }
        let bucket = number.ilog2();
        let chunks = self.more[bucket as usize].get().expect("a listed chunk");
        &chunks[(number - (1 << bucket)) as usize]
    }

    /// Makes as many chunks as there are, in a list, and gives the first one's number.
    #[cold]
    fn grow(&self) -> u32 {
        let bucket = self.more.iter().position(|chunks| chunks.get().is_none());
        let bucket = bucket.expect("fewer requests in flight than a process has coroutines");
        let numbers = 1u32 << bucket..2 << bucket;
        let last = numbers.end - 1;
        let next = |number| if number == last { NO_CHUNK } else { number + 1 };
        self.more[bucket].get_or_init(|| {
            let new = |number| Chunk::new(self.first.row, number, next(number));
            numbers.clone().map(new).collect()
        });
        numbers.start
    }

    /// The first chunk of the list is full now: the next one comes first. For the home.
    #[cold]
    fn take_out(&self, full: &Chunk) {
        debug_assert_eq!(self.free.load(Ordering::Relaxed), full.number);
        let next = full.next_free.load(Ordering::Relaxed);
        self.free.store(next, Ordering::Relaxed);
    }

    /// A chunk that was full has room again. For the home.
    #[cold]
    fn put_in(&self, chunk: &Chunk) {
        let next = self.free.load(Ordering::Relaxed);
        chunk.next_free.store(next, Ordering::Relaxed);
        self.free.store(chunk.number, Ordering::Relaxed);
    }

    /// All of them, from any thread.
    fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        let more = self.more.iter().map_while(OnceLock::get);
        std::iter::once(&self.first).chain(more.flat_map(|chunks| chunks.iter()))
    }
}

/// Names a place; while its request lives, it names the request.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    row: u8,
    chunk: u32,
    place: u8,
}

impl Key {
    fn of(chunk: &Chunk, place: u8) -> Key {
        Key {
            row: chunk.row,
            chunk: chunk.number,
            place,
        }
    }
}

/// What a waiter waits for.
enum Target {
    /// This request ends.
    Request(Key),
    /// Any request ends: the waiter will look again.
    Any,
}

struct Wait {
    ticket: u64,
    target: Target,
    wake: Wake,
}

/// Who waits.
pub(crate) enum Wake {
    Coroutine(WakeHandle),
    /// Somebody outside of coroutines (rule 3.8).
    Outside(Arc<AioWait>),
}

impl Wake {
    pub(crate) fn wake(&self) {
        match self {
            Wake::Coroutine(handle) => handle.wake(),
            Wake::Outside(wait) => wait.kick(),
        }
    }
}

#[derive(Default)]
struct Waits {
    list: Vec<Wait>,
    /// Requests that look for conflicts, in the order in which they came: turn, and who.
    pending: Vec<(u64, Key)>,
    next_ticket: u64,
}

impl Waits {
    fn push(&mut self, target: Target, wake: Wake) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.list.push(Wait {
            ticket,
            target,
            wake,
        });
        ticket
    }

    /// The turn of a request that is not admitted yet.
    fn turn_of(&self, key: Key) -> Option<u64> {
        self.pending
            .iter()
            .find(|(_, pending)| *pending == key)
            .map(|(turn, _)| *turn)
    }
}

/// A request in flight as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// What it does.
    pub kind: RequestKind,
    /// First byte and length; `None` is anywhere.
    pub range: Option<(u64, u64)>,
    /// Others that overlap it wait for it.
    pub serialising: bool,
}

/// The requests in flight on one node, or of one user.
// In this order: what every request looks at comes first, and close to the first rows.
#[repr(C)]
pub struct RequestTable {
    special: Special,
    waiters: Waiters,
    /// Bit i: `rows[i]` is there, or about to be. Sections look at many tables, most of them with
    /// few rows.
    used: AtomicU64,
    waits: ThreadLock<Waits>,
    rows: [OnceLock<Box<Row>>; MAX_CONTEXTS],
}

const _: () = assert!(MAX_CONTEXTS <= u64::BITS as usize, "a bit for each row");

impl Default for RequestTable {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RequestTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.snapshot()).finish()
    }
}

impl RequestTable {
    /// With nothing in flight.
    pub fn new() -> Self {
        RequestTable {
            special: Special::new(),
            waiters: Waiters::new(),
            used: AtomicU64::new(0),
            waits: ThreadLock::new(Waits::default()),
            rows: [const { OnceLock::new() }; MAX_CONTEXTS],
        }
    }

    /// Begins a request on `len` bytes at `offset`. It ends when the guard is dropped.
    ///
    /// Wait-free; allocates only when a context's places are all in use for the first time.
    #[inline]
    pub fn begin(
        &self,
        slot: ContextSlot,
        offset: u64,
        len: u64,
        kind: RequestKind,
    ) -> Tracked<'_> {
        self.publish(slot, offset, len.min(UNKNOWN) | (kind as u64) << KIND_SHIFT)
    }

    /// Begins a request whose range is not known: until [`Tracked::set_range`] it overlaps
    /// everything.
    #[inline]
    pub fn begin_unknown(&self, slot: ContextSlot, kind: RequestKind) -> Tracked<'_> {
        self.publish(slot, 0, UNKNOWN | (kind as u64) << KIND_SHIFT)
    }

    #[inline]
    fn publish(&self, slot: ContextSlot, offset: u64, len_kind: u64) -> Tracked<'_> {
        let index = slot.index();
        let row = self.rows[index].get_or_init(|| self.new_row(index));
        let chunk = row.with_room();
        let index = chunk.live.free();
        let place = chunk.place(index);
        place.offset.store(offset, Ordering::Relaxed);
        place.len_kind.store(len_kind, Ordering::Relaxed);
        if chunk.live.publish(index) {
            row.take_out(chunk);
        }
        Tracked {
            table: self,
            chunk,
            index,
            on_its_thread: PhantomData,
        }
    }

    /// Is nothing special going on: nobody serialises, no section, and the table is open? Asked after
    /// [`RequestTable::begin`].
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.special.is_plain()
    }

    /// Are new requests refused?
    pub fn is_closed(&self) -> bool {
        self.special.is_closed()
    }

    /// From here on new requests find [`RequestTable::is_closed`]; those that did not will be seen
    /// by [`RequestTable::wait_idle`]. `false` if it was closed before.
    pub fn close(&self) -> bool {
        self.special.close()
    }

    /// The bit comes before the row's first request: who does not see it, after a heavy fence, is
    /// seen by that request.
    #[cold]
    fn new_row(&self, index: usize) -> Box<Row> {
        self.used.fetch_or(1 << index, Ordering::SeqCst);
        #[expect(clippy::cast_possible_truncation, reason = "below MAX_CONTEXTS")]
        Row::new(index as u8)
    }

    fn rows(&self) -> impl Iterator<Item = &Row> {
        let mut used = self.used.load(Ordering::Acquire);
        let numbers = std::iter::from_fn(move || {
            let number = used.trailing_zeros() as usize;
            used &= used.wrapping_sub(1);
            (number < MAX_CONTEXTS).then_some(number)
        });
        numbers.filter_map(|number| self.rows[number].get().map(|row| &**row))
    }

    fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.rows().flat_map(Row::chunks)
    }

    /// All that are live, as seen after a heavy fence by the caller.
    fn live(&self) -> impl Iterator<Item = (Key, u64, u64)> {
        self.chunks().flat_map(|chunk| {
            let mut live = chunk.live.get();
            std::iter::from_fn(move || {
                #[expect(clippy::cast_possible_truncation, reason = "at most 64")]
                let index = live.trailing_zeros() as u8;
                if u32::from(index) == u64::BITS {
                    return None;
                }
                live &= live - 1;
                let place = chunk.place(index);
                // The length first: once it is known, so is the offset.
                let len_kind = place.len_kind.load(Ordering::Acquire);
                let offset = place.offset.load(Ordering::Relaxed);
                Some((Key::of(chunk, index), offset, len_kind))
            })
        })
    }

    /// How many requests are in flight (rule 5.7). Exact if none begins or ends meanwhile; from any
    /// thread.
    pub fn in_flight(&self) -> usize {
        heavy_fence();
        self.chunks()
            .map(|chunk| chunk.live.get().count_ones() as usize)
            .sum()
    }

    /// Everything in flight, for people and for tests; from any thread.
    pub fn snapshot(&self) -> Vec<InFlight> {
        heavy_fence();
        let _still = self.waits.lock();
        self.live()
            .map(|(_, offset, len_kind)| describe(offset, len_kind))
            .collect()
    }

    /// Is any request in flight on `range`, or on a range that is not known yet? From any thread.
    ///
    /// What began before this call is seen. What begins later must find by itself what the caller
    /// changed before.
    pub fn overlapping(&self, range: Range<u64>) -> bool {
        heavy_fence();
        let _still = self.waits.lock();
        self.live()
            .any(|(_, offset, len_kind)| overlaps(&range, offset, len_kind))
    }

    /// Calls `f` with each range in flight; `None` is anywhere. As [`RequestTable::overlapping`],
    /// with one fence for many questions.
    pub fn for_each(&self, mut f: impl FnMut(Option<Range<u64>>)) {
        heavy_fence();
        let _still = self.waits.lock();
        for (_, offset, len_kind) in self.live() {
            f(describe(offset, len_kind)
                .range
                .map(|(offset, len)| offset..offset.saturating_add(len)));
        }
    }

    /// Suspends until nothing is in flight. Requests that begin meanwhile are waited for as well:
    /// close first.
    ///
    /// # Panics
    /// Nothing detects that the caller itself has a request in flight here: it would wait for
    /// itself.
    pub fn wait_idle(&self, co: &Co) {
        self.wait_until(co, || self.live().next().is_none());
    }

    /// Suspends until nothing is in flight on `range`, nor on a range that is not known.
    pub fn wait_for_overlapping(&self, co: &Co, range: Range<u64>) {
        self.wait_until(co, || {
            !self
                .live()
                .any(|(_, offset, len_kind)| overlaps(&range, offset, len_kind))
        });
    }

    /// The same outside of coroutines: polls by `wait` (rule 3.8). Requests run in `context`, or in
    /// any one if the caller drives the main context. While nobody waits this costs a request
    /// nothing.
    ///
    /// # Panics
    /// As [`AioWait::wait_while`].
    #[track_caller]
    pub fn wait_idle_outside(&self, wait: &Arc<AioWait>, context: &Arc<AioContext>) {
        let _counted = Counted::new(self);
        let mut waiting = None;
        wait.wait_while(context, || {
            let last = waiting.take();
            // Its destructor takes the lock.
            drop(last);
            let mut waits = self.waits.lock();
            let busy = self.live().next().is_some();
            if busy {
                let wake = Wake::Outside(wait.clone());
                waiting = Some(self.enqueue(&mut waits, Target::Any, wake));
            }
            busy
        });
    }

    fn wait_until(&self, co: &Co, done: impl Fn() -> bool) {
        let _counted = Counted::new(self);
        loop {
            let waiting = {
                let mut waits = self.waits.lock();
                if done() {
                    return;
                }
                self.enqueue(&mut waits, Target::Any, Wake::Coroutine(co.wake_handle()))
            };
            waiting.wait(co);
        }
    }

    fn enqueue<'a>(&'a self, waits: &mut Waits, target: Target, wake: Wake) -> Waiting<'a> {
        Waiting {
            table: self,
            ticket: waits.push(target, wake),
        }
    }

    /// A request of this chunk, which was full, ends. For the home.
    #[cold]
    fn has_room(&self, chunk: &Chunk) {
        let row = self.rows[usize::from(chunk.row)].get();
        row.expect("the row of a chunk").put_in(chunk);
    }

    /// A request ended and somebody waits: wakes whoever waits for it.
    #[cold]
    fn wake_waiters(&self, ended: Key) {
        self.wake_those(|wait| match wait.target {
            Target::Request(key) => key == ended,
            Target::Any => true,
        });
    }

    fn wake_those(&self, ours: impl FnMut(&Wait) -> bool) {
        for wake in self.take_those(ours) {
            wake.wake();
        }
    }

    fn take_those(&self, mut ours: impl FnMut(&Wait) -> bool) -> Vec<Wake> {
        if mutant!("a request that ends wakes nobody") {
            return Vec::new();
        }
        let mut waits = self.waits.lock();
        let woken = waits.list.extract_if(.., |wait| ours(wait));
        woken.map(|wait| wait.wake).collect()
    }
}

fn overlaps(range: &Range<u64>, offset: u64, len_kind: u64) -> bool {
    let len = len_kind & LEN_MASK;
    len == UNKNOWN || (offset < range.end && range.start < offset.saturating_add(len))
}

fn describe(offset: u64, len_kind: u64) -> InFlight {
    let len = len_kind & LEN_MASK;
    InFlight {
        kind: match (len_kind & !SERIALISING) >> KIND_SHIFT {
            0 => RequestKind::Read,
            1 => RequestKind::Write,
            2 => RequestKind::Discard,
            3 => RequestKind::Truncate,
            _ => RequestKind::Other,
        },
        range: (len != UNKNOWN).then_some((offset, len)),
        serialising: len_kind & SERIALISING != 0,
    }
}

/// Counts its owner among those that look for something to end.
struct Counted<'a>(&'a RequestTable);

impl<'a> Counted<'a> {
    fn new(table: &'a RequestTable) -> Self {
        table.waiters.announce();
        Counted(table)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.waiters.leave();
    }
}

/// An entry of the list of waits; a coroutine that is unwound while it waits takes it away.
struct Waiting<'a> {
    table: &'a RequestTable,
    ticket: u64,
}

impl Waiting<'_> {
    fn wait(self, co: &Co) {
        while self.table.is_listed(self.ticket) {
            co.suspend();
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.table.unlist(self.ticket);
    }
}

/// A request in flight. Ends when dropped, on the thread where it began.
///
/// ```compile_fail,E0277
/// fn send<T: Send>() {}
/// send::<coblock_block::Tracked<'static>>();
/// ```
pub struct Tracked<'a> {
    table: &'a RequestTable,
    chunk: &'a Chunk,
    index: u8,
    on_its_thread: PhantomData<*const ()>,
}

impl Tracked<'_> {
    #[inline(always)]
    fn place(&self) -> &Place {
        self.chunk.place(self.index)
    }

    fn key(&self) -> Key {
        Key::of(self.chunk, self.index)
    }

    /// Tells the range of a request that was begun without one.
    ///
    /// # Panics
    /// For a request that has a range already: others may have relied on it.
    #[inline]
    pub fn set_range(&self, offset: u64, len: u64) {
        let len_kind = self.place().len_kind.load(Ordering::Relaxed);
        assert!(
            len_kind & LEN_MASK == UNKNOWN,
            "the range of a tracked request is set twice"
        );
        // A reader that sees the length sees the offset: it loads them in the other order.
        self.place().offset.store(offset, Ordering::Relaxed);
        let kind = len_kind & !LEN_MASK;
        self.place()
            .len_kind
            .store(kind | len.min(UNKNOWN), Ordering::Release);
        if self.table.waiters.any() {
            self.table.wake_waiters(self.key());
        }
    }

    /// Makes this request wait for all that overlap `offset`, `len`, and them for it (hazard Q21).
    /// The range takes in the one that it had. Suspends until it may go on.
    pub fn serialise(&self, co: &Co, offset: u64, len: u64) {
        {
            // Under the lock, so that no scan sees half of it.
            let _still = self.table.waits.lock();
            let len_kind = self.place().len_kind.load(Ordering::Relaxed);
            let own = self.place().offset.load(Ordering::Relaxed);
            let own_len = len_kind & LEN_MASK;
            let (start, new_len) = if own_len == UNKNOWN {
                (own, UNKNOWN)
            } else {
                let start = own.min(offset);
                let end = own.saturating_add(own_len).max(offset.saturating_add(len));
                (start, (end - start).min(UNKNOWN))
            };
            self.place().offset.store(start, Ordering::Relaxed);
            let kind = len_kind & !LEN_MASK;
            self.place()
                .len_kind
                .store(kind | SERIALISING | new_len, Ordering::Release);
            if len_kind & SERIALISING == 0 {
                self.table.special.raise();
            }
        }
        self.wait_for_conflicts(co);
    }

    #[cold]
    fn end_serialising(&self) {
        if self.place().len_kind.load(Ordering::Relaxed) & SERIALISING != 0 {
            self.table.special.lower();
        }
    }

    /// Waits for overlapping requests where either side serialises. A request that does not
    /// serialise calls it when the table is not plain, before it does anything else.
    #[cold]
    pub(crate) fn wait_for_conflicts(&self, co: &Co) {
        let _counted = Counted::new(self.table);
        let turn = Turn::take(self);
        loop {
            let waiting = {
                let mut waits = self.table.waits.lock();
                let Some(target) = self.conflict(&waits, turn.number) else {
                    return;
                };
                let wake = Wake::Coroutine(co.wake_handle());
                self.table
                    .enqueue(&mut waits, Target::Request(target), wake)
            };
            waiting.wait(co);
        }
    }

    fn conflict(&self, waits: &Waits, turn: u64) -> Option<Key> {
        let len_kind = self.place().len_kind.load(Ordering::Relaxed);
        let start = self.place().offset.load(Ordering::Relaxed);
        let len = len_kind & LEN_MASK;
        let range = if len == UNKNOWN {
            0..u64::MAX
        } else {
            start..start.saturating_add(len)
        };
        let conflicts = |&(key, offset, other): &(Key, u64, u64)| {
            !mutant!("serialising requests do not exclude each other")
                && key != self.key()
                && (len_kind | other) & SERIALISING != 0
                && overlaps(&range, offset, other)
                && waits.turn_of(key).is_none_or(|theirs| theirs < turn)
        };
        self.table.live().find(conflicts).map(|(key, _, _)| key)
    }
}

/// A request's place among those that look for conflicts; until it is admitted, or unwound.
struct Turn<'a> {
    table: &'a RequestTable,
    number: u64,
}

impl<'a> Turn<'a> {
    fn take(request: &Tracked<'a>) -> Self {
        let table = request.table;
        let number = {
            let mut waits = table.waits.lock();
            let number = waits.next_ticket;
            waits.next_ticket += 1;
            waits.pending.push((number, request.key()));
            number
        };
        // Who took it for running: its turn comes later than theirs.
        table.wake_waiters(request.key());
        Turn { table, number }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut waits = self.table.waits.lock();
        waits.pending.retain(|(number, _)| *number != self.number);
    }
}

impl Drop for Tracked<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // While it serialises, the table is not plain.
        if !self.table.is_plain() {
            self.end_serialising();
        }
        if self.chunk.live.is_full() {
            self.table.has_room(self.chunk);
        }
        if self.chunk.live.retire(self.index, &self.table.waiters) {
            self.table.wake_waiters(self.key());
        }
    }
}

#[cfg(test)]
mod tests;
