//! What the image must hold: one entry a block, shared by all queues while requests are in flight.
//!
//! A block is written by one request at a time, each with the next sequence number. Reads may go on
//! meanwhile; what they find must be of versions between the one that was complete when they began
//! and the newest that had begun when they ended, and of one version where that is only one. A
//! write that failed leaves its block in doubt: old or new.
//!
//! A discard may or may not turn its blocks into zeros, and may go on beside a write: from its
//! begin on zeros are right too, until a write begins with no discard in flight.
//!
//! ```text
//!  entry of a block   bit 31       write BEGUN, not acknowledged
//!                     bit 30       DISCARDING
//!                     bit 29       MAYBE_ZERO: a discard came after the last write began
//!                     bits 0..29   sequence of the last acknowledged write
//! ```
//! Pure, but for atomics: who claims an entry is decided by the entry itself.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::pattern::{self, Found, SECTOR, UNTOUCHED};

const BEGUN: u32 = 1 << 31;
const DISCARDING: u32 = 1 << 30;
const MAYBE_ZERO: u32 = 1 << 29;
const SEQUENCE: u32 = MAYBE_ZERO - 1;

/// The state of all blocks.
#[derive(Debug)]
pub struct Ledger {
    block_size: usize,
    seed: u64,
    entries: Vec<AtomicU32>,
    /// Fingerprints of what the blocks held before the run; `None` when all were zero.
    before: Option<Vec<u64>>,
    /// A discard has begun at some time.
    discards: AtomicBool,
}

/// What a read may find, taken when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    oldest: u32,
    zeros: bool,
}

/// A sector or block that holds something it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Byte of the image where the sector, or block if only its fingerprint is known, begins.
    pub offset: u64,
    /// What was there and what should have been, in words.
    pub what: String,
}

impl Ledger {
    /// A ledger of `blocks` blocks of `block_size` bytes, all zero so far.
    ///
    /// # Errors
    /// How many bytes of memory could not be had.
    pub fn new(blocks: usize, block_size: usize, seed: u64) -> Result<Self, usize> {
        assert!(
            block_size > 0 && block_size.is_multiple_of(SECTOR),
            "whole sectors a block"
        );
        let mut entries = Vec::new();
        entries
            .try_reserve_exact(blocks)
            .map_err(|_| blocks.saturating_mul(4))?;
        entries.resize_with(blocks, AtomicU32::default);
        Ok(Self {
            block_size,
            seed,
            entries,
            before: None,
            discards: AtomicBool::new(false),
        })
    }

    /// Prepares for blocks that are not zero: each gets its fingerprint by [`Ledger::remember`].
    ///
    /// # Errors
    /// How many bytes of memory could not be had.
    pub fn expect_content(&mut self) -> Result<(), usize> {
        let blocks = self.entries.len();
        let mut before = Vec::new();
        before
            .try_reserve_exact(blocks)
            .map_err(|_| blocks.saturating_mul(8))?;
        before.resize(blocks, 0);
        self.before = Some(before);
        Ok(())
    }

    /// Records what `block` holds before the run.
    pub fn remember(&mut self, block: usize, content: &[u8]) {
        assert_eq!(content.len(), self.block_size, "a whole block");
        match &mut self.before {
            Some(before) => before[block] = pattern::fingerprint(content),
            None => panic!("Ledger::remember without Ledger::expect_content"),
        }
    }

    /// How many blocks.
    pub fn blocks(&self) -> usize {
        self.entries.len()
    }

    /// Bytes a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Byte of the image where `block` begins.
    pub fn offset(&self, block: usize) -> u64 {
        block as u64 * self.block_size as u64
    }

    fn entry(&self, block: usize) -> u32 {
        self.entries[block].load(Ordering::SeqCst)
    }

    /// Changes an entry, unless `change` says no.
    fn update(&self, block: usize, change: impl FnMut(u32) -> Option<u32>) -> bool {
        let entry = &self.entries[block];
        entry
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, change)
            .is_ok()
    }

    /// Begins a write of `block`; false while another one is in flight, and after one failed.
    #[inline]
    pub fn begin_write(&self, block: usize) -> bool {
        self.update(block, |entry| {
            let zeros_stay = entry & DISCARDING != 0;
            let entry = if zeros_stay {
                entry
            } else {
                entry & !MAYBE_ZERO
            };
            (entry & BEGUN == 0).then_some(entry | BEGUN)
        })
    }

    /// Fills `buf` with what the write of `block` that was begun shall put there.
    #[inline]
    pub fn fill(&self, block: usize, buf: &mut [u8]) {
        let entry = self.entry(block);
        assert!(entry & BEGUN != 0, "block {block}: no write was begun");
        let sequence = (entry & SEQUENCE) + 1;
        assert!(
            sequence <= SEQUENCE,
            "block {block}: out of sequence numbers"
        );
        pattern::fill(buf, self.offset(block), u64::from(sequence), self.seed);
    }

    /// The write of `block` was acknowledged.
    #[inline]
    pub fn end_write(&self, block: usize) {
        let ended = self.update(block, |entry| {
            (entry & BEGUN != 0).then(|| (entry & !BEGUN) + 1)
        });
        assert!(ended, "block {block}: no write was begun");
    }

    /// Begins a discard of `block`; false while another one is in flight.
    pub fn begin_discard(&self, block: usize) -> bool {
        self.discards.store(true, Ordering::SeqCst);
        self.update(block, |entry| {
            (entry & DISCARDING == 0).then_some(entry | DISCARDING | MAYBE_ZERO)
        })
    }

    /// The discard of `block` has ended, well or not.
    pub fn end_discard(&self, block: usize) {
        let ended = self.update(block, |entry| {
            (entry & DISCARDING != 0).then_some(entry & !DISCARDING)
        });
        assert!(ended, "block {block}: no discard was begun");
    }

    /// What a read of `block` that begins now may find at the oldest.
    pub fn begin_read(&self, block: usize) -> Expected {
        let entry = self.entry(block);
        Expected {
            oldest: entry & SEQUENCE,
            zeros: entry & MAYBE_ZERO != 0,
        }
    }

    /// Checks what a read of `block` found.
    ///
    /// # Errors
    /// The first sector that is wrong.
    #[inline]
    pub fn check(&self, block: usize, expected: Expected, content: &[u8]) -> Result<(), Mismatch> {
        let entry = self.entry(block);
        let newest = (entry & SEQUENCE) + u32::from(entry & BEGUN != 0);
        let oldest = expected.oldest;
        // A write that took the bit away is newer than what the read may have found.
        let hidden = newest > oldest && self.discards.load(Ordering::SeqCst);
        let zeros = expected.zeros || entry & MAYBE_ZERO != 0 || hidden;
        match &self.before {
            Some(before) if oldest == 0 => {
                // A block that was written while it was first read cannot be judged by its
                // fingerprint; the pass over the whole image at the end will.
                let zeroed = zeros && content.iter().all(|&byte| byte == 0);
                if newest == 0 && !zeroed && pattern::fingerprint(content) != before[block] {
                    return Err(Mismatch {
                        offset: self.offset(block),
                        what: "never written, but differs from what it held before the run".into(),
                    });
                }
                Ok(())
            }
            _ => {
                let allowed = Allowed {
                    versions: u64::from(oldest)..=u64::from(newest),
                    zeros,
                };
                self.check_sectors(block, &allowed, content)
            }
        }
    }

    fn check_sectors(
        &self,
        block: usize,
        allowed: &Allowed,
        content: &[u8],
    ) -> Result<(), Mismatch> {
        let (sectors, rest) = content.as_chunks::<SECTOR>();
        assert!(
            rest.is_empty() && content.len() == self.block_size,
            "a whole block"
        );
        let mut at = self.offset(block);
        for sector in sectors {
            let found = pattern::recognise(sector, at, self.seed);
            let versions = &allowed.versions;
            let good = match found {
                Found::Written(sequence) => versions.contains(&sequence),
                Found::Zeros => allowed.zeros || versions.contains(&UNTOUCHED),
                // Only where a write may have been on its way: elsewhere there is one version.
                Found::Other if allowed.zeros || versions.start() < versions.end() => {
                    let zeros = allowed.zeros.then_some(UNTOUCHED);
                    let versions = versions.clone().chain(zeros);
                    pattern::is_mixture(sector, at, self.seed, versions)
                }
                Found::Other => false,
            };
            if !good {
                return Err(Mismatch {
                    offset: at,
                    what: describe(found, allowed),
                });
            }
            at += SECTOR as u64;
        }
        Ok(())
    }

    /// Checks a block after the run, read through a newly opened image.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn check_final(&self, block: usize, content: &[u8]) -> Result<(), Mismatch> {
        let entry = self.entry(block);
        if self.before.is_some() && entry & (BEGUN | SEQUENCE) == BEGUN {
            // The only write of a block with foreign content failed: sectors that are ours must be
            // from that write, the others cannot be told apart.
            return Ok(());
        }
        self.check(block, self.begin_read(block), content)
    }
}

/// What a sector may hold.
struct Allowed {
    versions: std::ops::RangeInclusive<u64>,
    /// A discard may have come.
    zeros: bool,
}

fn describe(found: Found, allowed: &Allowed) -> String {
    let found = match found {
        Found::Written(sequence) => format!("holds write {sequence}"),
        Found::Zeros => "holds zeros".into(),
        Found::Other => "holds something that was never written there".into(),
    };
    let version = |n: u64| match n {
        UNTOUCHED => "zeros".to_owned(),
        n => format!("write {n}"),
    };
    let or_zeros = if allowed.zeros { " or zeros" } else { "" };
    match (*allowed.versions.start(), *allowed.versions.end()) {
        (low, high) if low == high => {
            format!("{found}, should hold {}{or_zeros}", version(low))
        }
        (low, high) => format!(
            "{found}, should hold {} to {}{or_zeros}",
            version(low),
            version(high)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(4, 1024, 9).unwrap()
    }

    fn write(ledger: &Ledger, block: usize, buf: &mut [u8]) {
        assert!(ledger.begin_write(block));
        ledger.fill(block, buf);
    }

    #[test]
    fn a_block_holds_its_last_acknowledged_write() {
        let ledger = ledger();
        let mut first = vec![0; 1024];
        let mut second = vec![0; 1024];
        assert_eq!(ledger.check_final(2, &[0; 1024]), Ok(()));
        write(&ledger, 2, &mut first);
        ledger.end_write(2);
        assert_eq!(ledger.check_final(2, &first), Ok(()));
        write(&ledger, 2, &mut second);
        ledger.end_write(2);
        assert_eq!(ledger.check_final(2, &second), Ok(()));
        let stale = ledger.check_final(2, &first).unwrap_err();
        assert_eq!(
            (stale.offset, stale.what.as_str()),
            (2048, "holds write 1, should hold write 2")
        );
        let lost = ledger.check_final(2, &[0; 1024]).unwrap_err();
        assert_eq!(lost.what, "holds zeros, should hold write 2");
        let elsewhere = ledger.check_final(1, &second).unwrap_err();
        assert_eq!(elsewhere.offset, 1024);
    }

    #[test]
    fn a_read_may_see_either_side_of_a_write_that_overlaps_it() {
        let ledger = ledger();
        let (mut old, mut new) = (vec![0; 1024], vec![0; 1024]);
        write(&ledger, 0, &mut old);
        ledger.end_write(0);
        let expected = ledger.begin_read(0);
        write(&ledger, 0, &mut new);
        let mut half = new.clone();
        half[512..].copy_from_slice(&old[512..]);
        for (name, content) in [("old", &old), ("new", &new), ("half", &half)] {
            assert_eq!(ledger.check(0, expected, content), Ok(()), "{name}");
        }
        assert!(
            ledger.check(0, expected, &[0; 1024]).is_err(),
            "older than both"
        );
        ledger.end_write(0);
        let later = ledger.begin_read(0);
        assert!(
            ledger.check(0, later, &half).is_err(),
            "begun after the write had ended"
        );
    }

    #[test]
    fn a_failed_write_leaves_old_or_new() {
        let ledger = ledger();
        let mut new = vec![0; 1024];
        write(&ledger, 3, &mut new);
        assert!(!ledger.begin_write(3), "nobody else writes it");
        assert_eq!(ledger.check_final(3, &new), Ok(()));
        assert_eq!(ledger.check_final(3, &[0; 1024]), Ok(()));
        assert!(ledger.check_final(3, &[1; 1024]).is_err());
    }

    #[test]
    fn foreign_content_is_known_by_its_fingerprint() {
        let mut ledger = ledger();
        ledger.expect_content().unwrap();
        for block in 0..4 {
            ledger.remember(block, &[7; 1024]);
        }
        assert_eq!(ledger.check_final(1, &[7; 1024]), Ok(()));
        assert_eq!(ledger.check_final(1, &[8; 1024]).unwrap_err().offset, 1024);
        let mut new = vec![0; 1024];
        write(&ledger, 1, &mut new);
        ledger.end_write(1);
        assert_eq!(ledger.check_final(1, &new), Ok(()));
        assert!(ledger.check_final(1, &[7; 1024]).is_err());
    }

    /// Zeros are right from the begin of a discard until a write begins after its end.
    #[test]
    fn a_discard_leaves_what_was_there_or_zeros() {
        let ledger = ledger();
        let (mut old, mut new) = (vec![0; 1024], vec![0; 1024]);
        write(&ledger, 0, &mut old);
        ledger.end_write(0);
        assert!(ledger.check_final(0, &[0; 1024]).is_err(), "no discard yet");
        assert!(ledger.begin_discard(0) && !ledger.begin_discard(0));
        write(&ledger, 0, &mut new);
        ledger.end_write(0);
        ledger.end_discard(0);
        for (name, content) in [("the write won", &new), ("the discard won", &vec![0; 1024])] {
            assert_eq!(ledger.check_final(0, content), Ok(()), "{name}");
        }
        assert!(ledger.check_final(0, &old).is_err(), "older than both");
        let expected = ledger.begin_read(0);
        write(&ledger, 0, &mut old);
        assert_eq!(ledger.check(0, expected, &[0; 1024]), Ok(()), "not yet");
        ledger.end_write(0);
        assert_eq!(ledger.check_final(0, &old), Ok(()));
        assert!(ledger.check_final(0, &[0; 1024]).is_err(), "written since");
    }
}
