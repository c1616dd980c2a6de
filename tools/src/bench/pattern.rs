//! What the main job writes, and how it recognises it again.
//!
//! Each sector of 512 bytes tells where it belongs, which write of its block it is from, and which
//! run made it; the rest follows from these three, so a sector that was swapped, torn inside, stale
//! or from another run is always seen.
//!
//! ```text
//!  byte 0         8          16         24                                  512
//!  | magic       | offset    | sequence | seed | word 4 | word 5 | ...      |
//!                                              word i = mix(offset, sequence, seed) + i * STEP
//! ```
//! All words are 64 bits, little-endian. Pure.

/// Bytes that carry one mark.
pub const SECTOR: usize = 512;

const MAGIC: u64 = 0x636f_626c_6f63_6b31;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const WORD: usize = 8;
const FIRST_FILLER: usize = 4;

/// The sequence number of a sector that was not written in this run.
pub const UNTOUCHED: u64 = 0;

/// One step of SplitMix64: a well mixed function of its argument.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn filler(offset: u64, sequence: u64, seed: u64) -> u64 {
    mix(offset ^ mix(sequence ^ mix(seed)))
}

fn word(sector: &[u8; SECTOR], index: usize) -> u64 {
    let mut bytes = [0; WORD];
    bytes.copy_from_slice(&sector[index * WORD..(index + 1) * WORD]);
    u64::from_le_bytes(bytes)
}

/// Fills `buf`, which begins at byte `offset` of the image, as write number `sequence` of a run
/// with this seed.
///
/// `offset` and the length are multiples of [`SECTOR`]; `sequence` is not [`UNTOUCHED`].
pub fn fill(buf: &mut [u8], offset: u64, sequence: u64, seed: u64) {
    assert!(
        sequence != UNTOUCHED,
        "sequence {UNTOUCHED} means that nothing was written"
    );
    let (sectors, rest) = buf.as_chunks_mut::<SECTOR>();
    assert!(
        rest.is_empty() && offset.is_multiple_of(SECTOR as u64),
        "whole sectors only"
    );
    let mut at = offset;
    for sector in sectors {
        let base = filler(at, sequence, seed);
        let (words, _) = sector.as_chunks_mut::<WORD>();
        let mut value = base;
        for word in &mut *words {
            *word = value.to_le_bytes();
            value = value.wrapping_add(STEP);
        }
        for (word, mark) in words.iter_mut().zip([MAGIC, at, sequence, seed]) {
            *word = mark.to_le_bytes();
        }
        at += SECTOR as u64;
    }
}

/// What a sector turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Exactly what [`fill`] makes for this place and seed with this sequence number.
    Written(u64),
    /// Zeros only.
    Zeros,
    /// Something else.
    Other,
}

/// Recognises the sector at byte `offset` of the image.
#[inline]
pub fn recognise(sector: &[u8; SECTOR], offset: u64, seed: u64) -> Found {
    if word(sector, 0) == 0 {
        let (words, _) = sector.as_chunks::<WORD>();
        let any = words.iter().fold(0, |any, w| any | u64::from_le_bytes(*w));
        return if any == 0 { Found::Zeros } else { Found::Other };
    }
    let sequence = word(sector, 2);
    let head = [word(sector, 0), word(sector, 1), word(sector, 3)] == [MAGIC, offset, seed];
    if !head || sequence == UNTOUCHED {
        return Found::Other;
    }
    let base = filler(offset, sequence, seed);
    let mut difference = 0;
    let mut value = base.wrapping_add(STEP.wrapping_mul(FIRST_FILLER as u64));
    let (words, _) = sector.as_chunks::<WORD>();
    for word in &words[FIRST_FILLER..] {
        difference |= u64::from_le_bytes(*word) ^ value;
        value = value.wrapping_add(STEP);
    }
    if difference == 0 {
        Found::Written(sequence)
    } else {
        Found::Other
    }
}

/// True when each byte of the sector is that of one of these versions ([`UNTOUCHED`]: zero).
///
/// What a read finds while a write is on its way: nobody promises that a page of the host's cache
/// changes in steps of sectors, or of words.
#[cold]
pub fn is_mixture(
    sector: &[u8; SECTOR],
    offset: u64,
    seed: u64,
    versions: impl Iterator<Item = u64>,
) -> bool {
    let mut possible = [false; SECTOR];
    let mut version = [0; SECTOR];
    for sequence in versions {
        match sequence {
            UNTOUCHED => version.fill(0),
            sequence => fill(&mut version, offset, sequence, seed),
        }
        for ((possible, found), would) in possible.iter_mut().zip(sector).zip(&version) {
            *possible |= found == would;
        }
    }
    possible.iter().all(|&possible| possible)
}

/// A fingerprint of a block whose content is not ours: equal content has equal fingerprints, on
/// every machine.
pub fn fingerprint(block: &[u8]) -> u64 {
    let (words, rest) = block.as_chunks::<WORD>();
    // Four independent chains, since one would wait for each multiplication.
    let mut lanes = [1_u64, 2, 3, 4];
    for (index, word) in words.iter().enumerate() {
        let lane = &mut lanes[index % 4];
        *lane = (*lane ^ u64::from_le_bytes(*word))
            .wrapping_mul(STEP)
            .rotate_left(29);
    }
    let tail = rest
        .iter()
        .fold(block.len() as u64, |hash, &b| mix(hash ^ u64::from(b)));
    lanes.iter().fold(tail, |hash, &lane| mix(hash ^ lane))
}

/// A stream of numbers that depends on its seed only.
#[derive(Clone, Debug)]
pub struct Numbers {
    state: u64,
}

impl Numbers {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    /// The next number.
    #[inline]
    pub fn next_number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// The next number below `bound`, which is not zero, as good as evenly spread.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below zero");
        let wide = u128::from(self.next_number()) * u128::from(bound);
        u64::try_from(wide >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(buf: &[u8], index: usize) -> [u8; SECTOR] {
        buf[index * SECTOR..(index + 1) * SECTOR]
            .try_into()
            .unwrap()
    }

    #[test]
    fn what_was_written_is_recognised() {
        let mut buf = vec![0xaa; 4096];
        fill(&mut buf, 8192, 7, 42);
        for index in 0..8 {
            let at = 8192 + (index * SECTOR) as u64;
            assert_eq!(
                recognise(&sector(&buf, index), at, 42),
                Found::Written(7),
                "sector {index}"
            );
        }
        assert_eq!(recognise(&[0; SECTOR], 0, 42), Found::Zeros);
    }

    #[test]
    fn any_changed_byte_is_seen() {
        let mut buf = vec![0; SECTOR];
        fill(&mut buf, 0, 1, 42);
        for at in 0..SECTOR {
            let mut torn = sector(&buf, 0);
            torn[at] ^= 0x10;
            assert_ne!(recognise(&torn, 0, 42), Found::Written(1), "byte {at}");
            let mut nearly_zero = [0; SECTOR];
            nearly_zero[at] = 1;
            assert_eq!(
                recognise(&nearly_zero, 0, 42),
                Found::Other,
                "zero but byte {at}"
            );
        }
    }

    #[test]
    fn wrong_place_other_run_and_mixed_halves_are_seen() {
        let mut buf = vec![0; 1024];
        fill(&mut buf, 0, 1, 42);
        assert_eq!(
            recognise(&sector(&buf, 0), 512, 42),
            Found::Other,
            "misplaced"
        );
        assert_eq!(
            recognise(&sector(&buf, 0), 0, 43),
            Found::Other,
            "another run"
        );
        let mut newer = vec![0; 1024];
        fill(&mut newer, 0, 2, 42);
        let mut torn = sector(&buf, 0);
        torn[256..].copy_from_slice(&newer[256..512]);
        assert_eq!(
            recognise(&torn, 0, 42),
            Found::Other,
            "torn inside a sector"
        );
    }

    #[test]
    fn a_mixture_has_bytes_of_its_versions_only() {
        let version = |sequence| {
            let mut sector = [0; SECTOR];
            fill(&mut sector, 512, sequence, 42);
            sector
        };
        let (old, new) = (version(3), version(4));
        let mut torn = old;
        torn[100..333].copy_from_slice(&new[100..333]);
        assert!(is_mixture(&torn, 512, 42, 3..=4));
        assert!(
            !is_mixture(&torn, 512, 42, 4..=5),
            "bytes of a version that was over"
        );
        assert!(!is_mixture(&torn, 1024, 42, 3..=4), "of another place");
        torn[400] ^= 1;
        assert!(!is_mixture(&torn, 512, 42, 3..=4), "a byte of neither");
        let mut first = version(1);
        first[256..].fill(0);
        assert!(is_mixture(&first, 512, 42, UNTOUCHED..=1));
    }

    #[test]
    fn fingerprints_tell_blocks_apart() {
        let zeros = vec![0; 4096];
        let mut one = zeros.clone();
        one[4095] = 1;
        let mut swapped = zeros.clone();
        swapped[0] = 1;
        assert_ne!(fingerprint(&zeros), fingerprint(&one));
        assert_ne!(fingerprint(&one), fingerprint(&swapped));
        assert_eq!(fingerprint(&one), fingerprint(&one.clone()));
        assert_ne!(fingerprint(&zeros[..4095]), fingerprint(&zeros));
    }

    #[test]
    fn numbers_stay_below_and_repeat() {
        let (mut a, mut b) = (Numbers::new(5), Numbers::new(5));
        let mut seen = [false; 10];
        for _ in 0..1000 {
            let n = a.below(10);
            assert_eq!(n, b.below(10));
            seen[usize::try_from(n).unwrap()] = true;
        }
        assert_eq!(seen, [true; 10]);
    }
}
