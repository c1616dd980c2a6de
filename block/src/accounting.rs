//! What a backend's requests did: how many, how much, how long, what failed. Always on.
//!
//! ```text
//!   Accounting
//!     rows[slot]      one per context, made at its first request; stored to by its home only
//!       kind          bytes, time, longest, failed, invalid
//!         buckets     how many took so long; their sum is the number of requests
//!       last_ns       when one ended last
//!     extra           what devices tell: merged, invalid         any thread, rare
//!     chosen          histograms with boundaries of the user's    under a lock, only while there are any
//! ```
//! A request is counted with plain loads and stores to its context's own row, and a reader sums all
//! rows; so a snapshot may lack what ends while it is taken, and never tears a number.
//!
//! **Time** is that of the loop's passes, which read the clock once each, for all requests that end
//! or begin in them. So a request takes from the pass in which its coroutine was entered before it
//! began to the one in which it was entered last, and one that never suspends takes none. What a
//! request waits for in queues and for limits is part of its time.

use crate::error::{Error, ErrorKind, Result};
use crate::graph_lock::{ContextSlot, MAX_CONTEXTS};
use crate::request_table::RequestKind;
use coblock_coroutine::{ThreadLock, mutant};
use std::array;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// What a request is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoKind {
    /// A read; of a copy, its source.
    Read = 0,
    /// A write; of a copy, its target.
    Write = 1,
    /// Zeroes.
    Zero = 2,
    /// A discard ("unmap").
    Discard = 3,
    /// A flush.
    Flush = 4,
}

const KINDS: usize = 5;

impl IoKind {
    /// All of them.
    pub const ALL: [IoKind; KINDS] = [
        IoKind::Read,
        IoKind::Write,
        IoKind::Zero,
        IoKind::Discard,
        IoKind::Flush,
    ];

    /// As the table of requests in flight knows it.
    pub(crate) const fn request(self) -> RequestKind {
        match self {
            IoKind::Read => RequestKind::Read,
            IoKind::Write | IoKind::Zero => RequestKind::Write,
            IoKind::Discard => RequestKind::Discard,
            IoKind::Flush => RequestKind::Other,
        }
    }

    /// The name in statistics and traces.
    pub const fn name(self) -> &'static str {
        match self {
            IoKind::Read => "read",
            IoKind::Write => "write",
            IoKind::Zero => "zero",
            IoKind::Discard => "discard",
            IoKind::Flush => "flush",
        }
    }
}

/// Shortest difference that buckets see, as a power of two: 128 ns.
const UNIT_BITS: u32 = 7;
/// Buckets for each doubling of the time, as a power of two: 4.
const STEP_BITS: u32 = 2;
/// The last one begins at about 15 minutes.
const BUCKETS: usize = 128;

/// The bucket of a time: linear up to 8 units, then 4 for each doubling.
#[inline(always)]
fn bucket(ns: u64) -> usize {
    let units = ns >> UNIT_BITS;
    let shift = (u64::BITS - 1 - (units | 1).leading_zeros()).saturating_sub(STEP_BITS);
    let index = (u64::from(shift) << STEP_BITS) + (units >> shift);
    usize::try_from(index).map_or(BUCKETS - 1, |index| index.min(BUCKETS - 1))
}

/// The shortest time of a bucket.
fn lowest(index: usize) -> u64 {
    let index = index as u64;
    let shift = (index >> STEP_BITS).saturating_sub(1);
    (index - (shift << STEP_BITS)) << shift << UNIT_BITS
}

/// Adds, where nobody else stores.
#[inline(always)]
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}

struct KindRow {
    bytes: AtomicU64,
    time_ns: AtomicU64,
    longest_ns: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

#[repr(align(128))]
struct Row {
    last_ns: AtomicU64,
    kinds: [KindRow; KINDS],
}

impl Row {
    #[cold]
    fn new() -> Box<Row> {
        let zero = || AtomicU64::new(0);
        Box::new(Row {
            last_ns: zero(),
            kinds: array::from_fn(|_| KindRow {
                bytes: zero(),
                time_ns: zero(),
                longest_ns: zero(),
                failed: zero(),
                invalid: zero(),
                buckets: array::from_fn(|_| zero()),
            }),
        })
    }
}

/// How many requests took how long, by boundaries that somebody chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    /// Nanoseconds, ascending.
    pub boundaries: Vec<u64>,
    /// One more than there are boundaries: `bins[i]` is of times from `boundaries[i - 1]` up to,
    /// and not with, `boundaries[i]`.
    pub bins: Vec<u64>,
}

impl LatencyHistogram {
    fn record(&mut self, ns: u64) {
        let bin = self.boundaries.partition_point(|&boundary| boundary <= ns);
        self.bins[bin] += 1;
    }
}

/// Requests of one kind, since the backend was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindStatistics {
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes that these were about.
    pub bytes: u64,
    /// Time of all that ended, in nanoseconds, failed ones too.
    pub time_ns: u64,
    /// The longest of them.
    pub longest_ns: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that were refused: past the end, or the backend is closed; and what a device told
    /// by [`account_invalid`](crate::BlockBackend::account_invalid). No other number has them.
    pub invalid: u64,
    /// Requests of the guest that a device sent as a part of others.
    pub merged: u64,
    /// Times, by log-linear buckets: the shortest time of each in nanoseconds, and how many
    /// requests it has; empty ones left out. A bucket is at most a quarter as wide as the times in
    /// it, or 128 ns.
    pub latencies: Vec<(u64, u64)>,
    /// The same by the boundaries of
    /// [`set_latency_histogram`](crate::BlockBackend::set_latency_histogram), since that was called.
    pub histogram: Option<LatencyHistogram>,
}

impl KindStatistics {
    /// The same in the form of [`LatencyHistogram`]: boundaries are those of buckets.
    pub fn latency_histogram(&self) -> LatencyHistogram {
        let (mut boundaries, mut bins) = (Vec::new(), vec![0]);
        for &(from, count) in &self.latencies {
            if from > 0 && boundaries.last() != Some(&from) {
                boundaries.push(from);
                bins.push(0);
            }
            if let Some(last) = bins.last_mut() {
                *last = count;
            }
            boundaries.push(lowest(bucket(from) + 1));
            bins.push(0);
        }
        LatencyHistogram { boundaries, bins }
    }

    /// What came since `before`, but the longest time, which stays what it is.
    fn since(&self, before: &KindStatistics) -> KindStatistics {
        let counted_before = |from: u64| {
            let its = before.latencies.binary_search_by_key(&from, |pair| pair.0);
            its.map_or(0, |index| before.latencies[index].1)
        };
        let latencies = self.latencies.iter();
        let latencies = latencies.map(|&(from, count)| (from, count - counted_before(from)));
        KindStatistics {
            operations: self.operations.saturating_sub(before.operations),
            bytes: self.bytes - before.bytes,
            time_ns: self.time_ns - before.time_ns,
            longest_ns: self.longest_ns,
            failed: self.failed - before.failed,
            invalid: self.invalid - before.invalid,
            merged: self.merged - before.merged,
            latencies: latencies.filter(|(_, count)| *count > 0).collect(),
            histogram: self.histogram.clone(),
        }
    }

    /// A time that `permille` of 1000 requests did not exceed, rounded up to the end of its bucket,
    /// but never above the longest; zero where there are none.
    pub fn percentile_ns(&self, permille: u64) -> u64 {
        let total: u64 = self.latencies.iter().map(|(_, count)| count).sum();
        let rank = (u128::from(total) * u128::from(permille))
            .div_ceil(1000)
            .max(1);
        let mut seen = 0;
        for &(from, count) in &self.latencies {
            seen += u128::from(count);
            if seen >= rank {
                let index = bucket(from);
                return (lowest(index + 1) - 1).min(self.longest_ns);
            }
        }
        self.longest_ns
    }
}

/// What the requests of a backend did since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    kinds: [KindStatistics; KINDS],
    /// When a request ended last, in nanoseconds of its context's clock.
    pub last_ns: Option<u64>,
}

impl Statistics {
    /// Those of one kind.
    pub fn of(&self, kind: IoKind) -> &KindStatistics {
        &self.kinds[kind as usize]
    }

    /// What came since `before`, an earlier snapshot of the same backend; the longest times and the
    /// histograms that somebody chose stay what they are.
    #[must_use]
    pub fn since(&self, before: &Statistics) -> Statistics {
        Statistics {
            kinds: array::from_fn(|kind| self.kinds[kind].since(&before.kinds[kind])),
            last_ns: self.last_ns,
        }
    }

    /// How long no request has ended, `now_ns` being the time by the same clock; `None`: none ever
    /// did.
    pub fn idle_ns(&self, now_ns: u64) -> Option<u64> {
        self.last_ns.map(|last| now_ns.saturating_sub(last))
    }
}

#[derive(Default)]
struct Extra {
    merged: AtomicU64,
    invalid: AtomicU64,
}

/// The counters of one backend.
pub(crate) struct Accounting {
    rows: [OnceLock<Box<Row>>; MAX_CONTEXTS],
    extra: [Extra; KINDS],
    /// Is there any in `chosen`?
    has_chosen: AtomicBool,
    chosen: ThreadLock<[Option<LatencyHistogram>; KINDS]>,
}

impl Accounting {
    pub(crate) fn new() -> Accounting {
        Accounting {
            rows: [const { OnceLock::new() }; MAX_CONTEXTS],
            extra: array::from_fn(|_| Extra::default()),
            has_chosen: AtomicBool::new(false),
            chosen: ThreadLock::new(Default::default()),
        }
    }

    #[inline(always)]
    fn row(&self, slot: ContextSlot) -> &Row {
        self.rows[slot.index()].get_or_init(Row::new)
    }

    /// A request on `len` bytes that took from `began_ns` to `now_ns`.
    #[inline(always)]
    pub(crate) fn ended(
        &self,
        slot: ContextSlot,
        (kind, len): (IoKind, u64),
        (began_ns, now_ns): (u64, u64),
        is_ok: bool,
    ) {
        if cfg!(feature = "unaccounted") {
            return;
        }
        let row = self.row(slot);
        let its = &row.kinds[kind as usize];
        let time_ns = now_ns.saturating_sub(began_ns);
        add(&its.buckets[bucket(time_ns)], 1);
        add(&its.time_ns, time_ns);
        row.last_ns.store(now_ns, Relaxed);
        if time_ns > its.longest_ns.load(Relaxed) {
            its.longest_ns.store(time_ns, Relaxed);
        }
        if is_ok || mutant!("a request that failed counts as done") {
            add(&its.bytes, len);
        } else {
            add(&its.failed, 1);
        }
        if self.has_chosen.load(Relaxed) {
            self.record_chosen(kind, time_ns);
        }
    }

    #[cold]
    fn record_chosen(&self, kind: IoKind, ns: u64) {
        if let Some(histogram) = &mut self.chosen.lock()[kind as usize] {
            histogram.record(ns);
        }
    }

    /// A request that was refused.
    #[cold]
    pub(crate) fn refused(&self, slot: ContextSlot, kind: IoKind) {
        add(&self.row(slot).kinds[kind as usize].invalid, 1);
    }

    /// A device refused one. Any thread.
    pub(crate) fn add_invalid(&self, kind: IoKind) {
        self.extra[kind as usize].invalid.fetch_add(1, Relaxed);
    }

    /// A device made one of several. Any thread.
    pub(crate) fn add_merged(&self, kind: IoKind, requests: u64) {
        self.extra[kind as usize]
            .merged
            .fetch_add(requests, Relaxed);
    }

    pub(crate) fn choose(&self, kind: IoKind, boundaries: Option<&[u64]>) -> Result<()> {
        let histogram = match boundaries {
            None => None,
            Some(boundaries) => {
                let ascends = boundaries.windows(2).all(|pair| pair[0] < pair[1]);
                if !ascends || boundaries.first().is_none_or(|&first| first == 0) {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        "Boundaries of a latency histogram are greater than zero and ascend",
                    ));
                }
                Some(LatencyHistogram {
                    boundaries: boundaries.to_vec(),
                    bins: vec![0; boundaries.len() + 1],
                })
            }
        };
        let mut chosen = self.chosen.lock();
        chosen[kind as usize] = histogram;
        let any = chosen.iter().any(Option::is_some);
        self.has_chosen.store(any, Relaxed);
        Ok(())
    }

    /// The sum of all rows. Any thread.
    pub(crate) fn sum(&self) -> Statistics {
        let mut all = Statistics::default();
        for (number, its) in all.kinds.iter_mut().enumerate() {
            let mut buckets = [0u64; BUCKETS];
            for row in self.rows.iter().filter_map(OnceLock::get) {
                let row = &row.kinds[number];
                its.bytes += row.bytes.load(Relaxed);
                its.time_ns += row.time_ns.load(Relaxed);
                its.longest_ns = its.longest_ns.max(row.longest_ns.load(Relaxed));
                its.failed += row.failed.load(Relaxed);
                its.invalid += row.invalid.load(Relaxed);
                for (sum, one) in buckets.iter_mut().zip(&row.buckets) {
                    *sum += one.load(Relaxed);
                }
            }
            let extra = &self.extra[number];
            its.invalid += extra.invalid.load(Relaxed);
            its.merged = extra.merged.load(Relaxed);
            let ended: u64 = buckets.iter().sum();
            its.operations = ended.saturating_sub(its.failed);
            its.latencies = (0..BUCKETS)
                .filter(|&index| buckets[index] > 0)
                .map(|index| (lowest(index), buckets[index]))
                .collect();
        }
        let rows = self.rows.iter().filter_map(OnceLock::get);
        let last = rows.map(|row| row.last_ns.load(Relaxed)).max();
        let any_ended = all.kinds.iter().any(|its| !its.latencies.is_empty());
        all.last_ns = last.filter(|_| any_ended);
        let chosen = self.chosen.lock();
        for (its, histogram) in all.kinds.iter_mut().zip(chosen.iter()) {
            its.histogram.clone_from(histogram);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap() {
        for index in 0..BUCKETS {
            assert_eq!(bucket(lowest(index)), index, "first of bucket {index}");
            assert_eq!(
                bucket(lowest(index + 1) - 1),
                index,
                "last of bucket {index}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_bucket_is_narrow() {
        for index in 0..BUCKETS {
            let (from, to) = (lowest(index), lowest(index + 1));
            assert!(
                to - from <= (from / 4).max(128),
                "bucket {index}: {from} to {to}"
            );
        }
    }
}
