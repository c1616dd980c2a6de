//! What a disk was sent, entry by entry, and what of an entry a power cut leaves.

use super::pages::Pages;

/// What a disk writes in one piece, in bytes.
pub const SECTOR: u64 = 512;

/// What a disk was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// These bytes.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Zeros without bytes; also a discard.
    Zero {
        /// Where, in bytes.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The length became this.
    Resize {
        /// In bytes.
        len: u64,
    },
    /// The entries with these places in the log are on stable storage.
    Flush {
        /// In ascending order.
        covered: Vec<usize>,
    },
}

/// Which pending sectors survive a power cut.
#[derive(Clone, Debug)]
pub enum Keep {
    /// None.
    Nothing,
    /// All.
    Everything,
    /// All but the pending entry of that number.
    AllBut(usize),
    /// Everything but of the last write all after that many sectors.
    Torn(u64),
    /// Each sector for itself, by a seed.
    Seed(u64),
}

/// Numbers that depend on a seed and on nothing else.
#[derive(Clone, Debug)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    /// The next of a SplitMix64 sequence.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

pub(super) enum Sectors {
    All,
    First(u64),
    Seed(Rng),
}

impl Sectors {
    /// Each sector of entry `index` for itself.
    pub(super) fn by_seed(seed: u64, index: usize) -> Sectors {
        Sectors::Seed(Rng(
            seed ^ (index as u64).wrapping_mul(0x2545_f491_4f6c_dd1d)
        ))
    }

    fn keeps(&mut self, number: u64) -> bool {
        match self {
            Sectors::All => true,
            Sectors::First(count) => number < *count,
            Sectors::Seed(rng) => rng.next() & 1 == 0,
        }
    }
}

pub(super) fn apply(entry: &LogEntry, mut sectors: Sectors, pages: &mut Pages, len: &mut u64) {
    let (offset, count) = match entry {
        LogEntry::Write { offset, data } => (*offset, data.len() as u64),
        LogEntry::Zero { offset, len } => (*offset, *len),
        LogEntry::Resize { len: new } => {
            if sectors.keeps(0) {
                pages.zero(*new, u64::MAX);
                *len = *new;
            }
            return;
        }
        LogEntry::Flush { .. } => return,
    };
    if matches!(sectors, Sectors::All) {
        match entry {
            LogEntry::Write { data, .. } => pages.write(offset, data),
            _ => pages.zero(offset, offset + count),
        }
        *len = (*len).max(offset + count);
        return;
    }
    let mut at = 0;
    let mut number = 0;
    while at < count {
        // Sectors of the disk, not of the request.
        let next = ((offset + at) / SECTOR + 1) * SECTOR - offset;
        let end = next.min(count);
        if sectors.keeps(number) {
            match entry {
                LogEntry::Write { data, .. } => {
                    let part = usize::try_from(at).expect("in memory")
                        ..usize::try_from(end).expect("in memory");
                    pages.write(offset + at, &data[part]);
                }
                _ => pages.zero(offset + at, offset + end),
            }
            *len = (*len).max(offset + end);
        }
        at = end;
        number += 1;
    }
}
