//! Arrays of atomic words that grow without moving and cost memory only where they are touched.
//!
//! The hot path reads tables (L1, the cache's directory) without any lock while a resize or a miss
//! may be adding to them, so an element must never move. Words live in chunks of 512, chunks hang
//! in buckets that double in size:
//!
//! ```text
//!   bucket 0: chunk 0          bucket 1: chunks 1 2       bucket 2: chunks 3 4 5 6      ...
//! ```
//!
//! A chunk is allocated, zeroed, when it is first written.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use coblock_block::types::in_memory;

/// Words in one chunk: 4 KiB.
const CHUNK: u64 = 512;
/// Buckets double, so this is enough for 2^31 chunks, 2^40 words: far more than any table may have.
const BUCKETS: usize = 31;

type Chunk = OnceLock<Box<[AtomicU64]>>;

/// A sparse array of 64-bit words, zero where never written.
pub(crate) struct LazyWords {
    buckets: [OnceLock<Box<[Chunk]>>; BUCKETS],
}

/// Where word `index` lives: bucket, chunk in the bucket, word in the chunk.
#[inline]
fn locate(index: u64) -> (usize, usize, usize) {
    let chunk = index / CHUNK + 1;
    let bucket = chunk.ilog2();
    let in_bucket = chunk - (1 << bucket);
    (
        bucket as usize,
        in_memory(in_bucket),
        in_memory(index % CHUNK),
    )
}

impl LazyWords {
    pub fn new() -> Self {
        LazyWords {
            buckets: [const { OnceLock::new() }; BUCKETS],
        }
    }

    /// Bytes of memory for `words` words, each of them written.
    pub const fn memory(words: u64) -> u64 {
        words * 8 + Self::places(words)
    }

    /// Bytes of memory for the places of chunks when any of `words` words is written: buckets of
    /// all sizes up to the last one's.
    pub const fn places(words: u64) -> u64 {
        2 * words.div_ceil(CHUNK).next_power_of_two() * size_of::<Chunk>() as u64
    }

    /// Word `index`, or nothing where the chunk was never written (it would read as zero).
    #[inline]
    pub fn get(&self, index: u64) -> Option<&AtomicU64> {
        let (bucket, chunk, word) = locate(index);
        self.buckets.get(bucket)?.get()?[chunk]
            .get()
            .map(|words| &words[word])
    }

    /// Word `index`, allocating its chunk when it is the first of it.
    ///
    /// # Panics
    /// Above 2^40 words: no table of the format comes near.
    pub fn ensure(&self, index: u64) -> &AtomicU64 {
        let (bucket, chunk, word) = locate(index);
        let chunks = self.buckets[bucket]
            .get_or_init(|| (0..1usize << bucket).map(|_| OnceLock::new()).collect());
        let words = chunks[chunk].get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        &words[word]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    /// Every index has a place of its own, and the places of neighbours are neighbours.
    #[test]
    fn places_are_distinct_and_stable() {
        let words = LazyWords::new();
        let indices = [
            0,
            1,
            511,
            512,
            1023,
            1024,
            1535,
            1536,
            3583,
            3584,
            1 << 20,
            (1 << 33) + 7,
        ];
        for (n, &index) in indices.iter().enumerate() {
            assert!(
                words.get(index).is_none_or(|w| w.load(Relaxed) == 0),
                "{index}"
            );
            words.ensure(index).store(n as u64 + 1, Relaxed);
        }
        for (n, &index) in indices.iter().enumerate() {
            assert_eq!(
                words.get(index).unwrap().load(Relaxed),
                n as u64 + 1,
                "{index}"
            );
        }
        assert!(words.get(1 << 30).is_none());
    }
}
