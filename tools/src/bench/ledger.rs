//! What the image must hold: one entry a block, kept by the main job while requests are in flight.
//!
//! A block is written by one request at a time, each with the next sequence number. Reads may go on
//! meanwhile; what they find must be of versions between the one that was complete when they began
//! and the newest that had begun when they ended, and of one version where that is only one. A
//! write that failed leaves its block in doubt: old or new.
//!
//! ```text
//!  entry of a block   | bit 31: write BEGUN, not acknowledged | bits 0..31: sequence of the last acknowledged write |
//! ```
//! Pure.

use super::pattern::{self, Found, SECTOR, UNTOUCHED};

const BEGUN: u32 = 1 << 31;

/// The state of all blocks.
#[derive(Debug)]
pub struct Ledger {
    block_size: usize,
    seed: u64,
    entries: Vec<u32>,
    /// Fingerprints of what the blocks held before the run; `None` when all were zero.
    before: Option<Vec<u64>>,
}

/// What a read may find, taken when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    oldest: u32,
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
        entries.resize(blocks, 0);
        Ok(Self {
            block_size,
            seed,
            entries,
            before: None,
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

    /// True while a write of this block is in flight, or after one failed.
    #[inline]
    pub fn is_begun(&self, block: usize) -> bool {
        self.entries[block] & BEGUN != 0
    }

    /// Begins a write of `block` and fills `buf` with what it shall hold.
    #[inline]
    pub fn begin_write(&mut self, block: usize, buf: &mut [u8]) {
        let entry = &mut self.entries[block];
        assert!(*entry & BEGUN == 0, "two writes of block {block} at once");
        let sequence = u64::from(*entry) + 1;
        assert!(
            sequence < u64::from(BEGUN),
            "block {block}: out of sequence numbers"
        );
        *entry |= BEGUN;
        pattern::fill(buf, self.offset(block), sequence, self.seed);
    }

    /// The write of `block` was acknowledged.
    #[inline]
    pub fn end_write(&mut self, block: usize) {
        let entry = &mut self.entries[block];
        assert!(*entry & BEGUN != 0, "block {block}: no write was begun");
        *entry = (*entry & !BEGUN) + 1;
    }

    /// What a read of `block` that begins now may find at the oldest.
    pub fn begin_read(&self, block: usize) -> Expected {
        Expected {
            oldest: self.entries[block] & !BEGUN,
        }
    }

    /// Checks what a read of `block` found.
    ///
    /// # Errors
    /// The first sector that is wrong.
    #[inline]
    pub fn check(&self, block: usize, expected: Expected, content: &[u8]) -> Result<(), Mismatch> {
        let entry = self.entries[block];
        let newest = (entry & !BEGUN) + u32::from(entry & BEGUN != 0);
        let oldest = expected.oldest;
        match &self.before {
            Some(before) if oldest == 0 => {
                // A block that was written while it was first read cannot be judged by its
                // fingerprint; the pass over the whole image at the end will.
                if newest == 0 && pattern::fingerprint(content) != before[block] {
                    return Err(Mismatch {
                        offset: self.offset(block),
                        what: "never written, but differs from what it held before the run".into(),
                    });
                }
                Ok(())
            }
            _ => self.check_sectors(block, u64::from(oldest)..=u64::from(newest), content),
        }
    }

    fn check_sectors(
        &self,
        block: usize,
        allowed: std::ops::RangeInclusive<u64>,
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
            let good = match found {
                Found::Written(sequence) => allowed.contains(&sequence),
                Found::Zeros => allowed.contains(&UNTOUCHED),
                // Only where a write may have been on its way: elsewhere there is one version.
                Found::Other if allowed.start() < allowed.end() => {
                    pattern::is_mixture(sector, at, self.seed, allowed.clone())
                }
                Found::Other => false,
            };
            if !good {
                return Err(Mismatch {
                    offset: at,
                    what: describe(found, &allowed),
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
        let entry = self.entries[block];
        if self.before.is_some() && entry == BEGUN {
            // The only write of a block with foreign content failed: sectors that are ours must be
            // from that write, the others cannot be told apart.
            return Ok(());
        }
        self.check(block, self.begin_read(block), content)
    }
}

fn describe(found: Found, allowed: &std::ops::RangeInclusive<u64>) -> String {
    let found = match found {
        Found::Written(sequence) => format!("holds write {sequence}"),
        Found::Zeros => "holds zeros".into(),
        Found::Other => "holds something that was never written there".into(),
    };
    let version = |n: u64| match n {
        UNTOUCHED => "zeros".to_owned(),
        n => format!("write {n}"),
    };
    match (*allowed.start(), *allowed.end()) {
        (low, high) if low == high => format!("{found}, should hold {}", version(low)),
        (low, high) => format!("{found}, should hold {} to {}", version(low), version(high)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(4, 1024, 9).unwrap()
    }

    #[test]
    fn a_block_holds_its_last_acknowledged_write() {
        let mut ledger = ledger();
        let mut first = vec![0; 1024];
        let mut second = vec![0; 1024];
        assert_eq!(ledger.check_final(2, &[0; 1024]), Ok(()));
        ledger.begin_write(2, &mut first);
        ledger.end_write(2);
        assert_eq!(ledger.check_final(2, &first), Ok(()));
        ledger.begin_write(2, &mut second);
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
        let mut ledger = ledger();
        let (mut old, mut new) = (vec![0; 1024], vec![0; 1024]);
        ledger.begin_write(0, &mut old);
        ledger.end_write(0);
        let expected = ledger.begin_read(0);
        ledger.begin_write(0, &mut new);
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
        let mut ledger = ledger();
        let mut new = vec![0; 1024];
        ledger.begin_write(3, &mut new);
        assert!(ledger.is_begun(3));
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
        ledger.begin_write(1, &mut new);
        ledger.end_write(1);
        assert_eq!(ledger.check_final(1, &new), Ok(()));
        assert!(ledger.check_final(1, &[7; 1024]).is_err());
    }

    #[test]
    #[should_panic(expected = "two writes of block 0 at once")]
    fn two_writes_of_a_block_are_refused() {
        let mut ledger = ledger();
        ledger.begin_write(0, &mut [0; 1024]);
        ledger.begin_write(0, &mut [0; 1024]);
    }
}
