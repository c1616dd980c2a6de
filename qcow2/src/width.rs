//! Refcounts of 1 to 64 bits: how a refcount block packs them.
//!
//! ```text
//!   64, 32, 16, 8 bits   big-endian numbers, one after the other
//!   4, 2, 1 bits         several in a byte, the first in the low bits:  byte 0 = | 1 0 | with 4 bits
//! ```
//!
//! Both views of a block are served: its bytes, and 64-bit words. A word is the number that its
//! eight bytes make read big-endian (`u64::from_be_bytes`), whatever machine we run on; a refcount
//! never straddles two words. qcow2 specification, "Refcount block entries".

/// Width of the refcounts of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// The width of `1 << order` bits.
    ///
    /// # Panics
    /// An order above 6; [`crate::types::Geometry`] has refused it.
    #[must_use]
    pub const fn new(order: u32) -> Self {
        assert!(
            order <= crate::spec::REFCOUNT_ORDER_MAX,
            "refcounts have at most 64 bits"
        );
        Self { order }
    }

    /// Bits of a refcount.
    #[inline]
    #[must_use]
    pub const fn bits(self) -> u32 {
        1 << self.order
    }

    /// The greatest refcount; a cluster that has it can get no further reference.
    #[inline]
    #[must_use]
    pub const fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Refcounts in a 64-bit word.
    #[inline]
    #[must_use]
    pub const fn per_word(self) -> usize {
        64 >> self.order
    }

    /// Which 64-bit word of a block holds refcount `index`.
    #[inline]
    #[must_use]
    pub const fn word_index(self, index: usize) -> usize {
        index >> (6 - self.order)
    }

    /// Refcount `index` (of the block) out of its word, the number that
    /// [`RefcountWidth::word_index`] names.
    #[inline]
    #[must_use]
    pub const fn get_in_word(self, word: u64, index: usize) -> u64 {
        (word >> self.shift(index)) & self.max()
    }

    /// The word with refcount `index` (of the block) replaced.
    ///
    /// # Panics
    /// A value above [`RefcountWidth::max`]: the caller checks for overflow before it counts.
    #[inline]
    #[must_use]
    pub const fn set_in_word(self, word: u64, index: usize, value: u64) -> u64 {
        assert!(value <= self.max(), "a refcount must fit its width");
        let shift = self.shift(index);
        (word & !(self.max() << shift)) | (value << shift)
    }

    /// Refcount `index` of a block.
    ///
    /// # Panics
    /// An index past the end of the block.
    #[inline]
    #[must_use]
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        if self.order >= 3 {
            let len = 1 << (self.order - 3);
            block[index * len..][..len]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        } else {
            let per_byte = 8 >> self.order;
            let shift = (index % per_byte) << self.order;
            u64::from(block[index / per_byte]) >> shift & self.max()
        }
    }

    /// Replaces refcount `index` of a block.
    ///
    /// # Panics
    /// An index past the end of the block, or a value above [`RefcountWidth::max`].
    #[inline]
    pub fn set(self, block: &mut [u8], index: usize, value: u64) {
        assert!(value <= self.max(), "a refcount must fit its width");
        let bytes = value.to_be_bytes();
        if self.order >= 3 {
            let len = 1 << (self.order - 3);
            block[index * len..][..len].copy_from_slice(&bytes[8 - len..]);
        } else {
            let per_byte = 8 >> self.order;
            let shift = (index % per_byte) << self.order;
            let mask = bytes_mask(self.max()) << shift;
            let byte = &mut block[index / per_byte];
            *byte = *byte & !mask | bytes[7] << shift;
        }
    }

    /// Distance of refcount `index` from the low end of its word.
    const fn shift(self, index: usize) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "below 64")]
        let slot = (index & (self.per_word() - 1)) as u32;
        if self.order >= 3 {
            64 - (slot + 1) * self.bits()
        } else {
            let per_byte = 8 >> self.order;
            56 - slot / per_byte * 8 + ((slot % per_byte) << self.order)
        }
    }
}

/// The low byte of a mask of at most four bits.
const fn bytes_mask(max: u64) -> u8 {
    max.to_be_bytes()[7]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_of_each_width() {
        let block = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 0xff];
        for (order, index, want) in [
            (0, 0, 0),
            (0, 1, 1),
            (0, 4, 1),
            (0, 10, 1),
            (1, 0, 2),
            (1, 1, 0),
            (1, 2, 1),
            (2, 0, 2),
            (2, 1, 1),
            (2, 2, 4),
            (3, 1, 0x34),
            (4, 1, 0x5678),
            (5, 1, 0x9abc_def0),
            (6, 0, 0x1234_5678_9abc_def0),
        ] {
            assert_eq!(
                RefcountWidth::new(order).get(&block, index),
                want,
                "order {order}, {index}"
            );
        }
    }

    #[test]
    fn maxima() {
        let all: Vec<u64> = (0..=6)
            .map(|order| RefcountWidth::new(order).max())
            .collect();
        assert_eq!(all, [1, 3, 15, 255, 65535, u64::from(u32::MAX), u64::MAX]);
    }

    #[test]
    #[should_panic(expected = "must fit its width")]
    fn a_value_too_great_is_our_error() {
        RefcountWidth::new(2).set(&mut [0; 8], 0, 16);
    }

    proptest! {
        /// Bytes and words are two views of one block, and a store touches its own refcount only.
        #[test]
        fn bytes_and_words_agree(
            order in 0_u32..=6, mut block in proptest::array::uniform32(any::<u8>()), at in any::<usize>(), value in any::<u64>(),
        ) {
            let width = RefcountWidth::new(order);
            let entries = 256 / width.bits() as usize;
            let (at, value) = (at % entries, value & width.max());
            let before: Vec<u64> = (0..entries).map(|index| width.get(&block, index)).collect();
            let word_of = |block: &[u8; 32]| {
                let from = width.word_index(at) * 8;
                u64::from_be_bytes(block[from..from + 8].try_into().unwrap())
            };
            for (index, want) in before.iter().enumerate() {
                let from = width.word_index(index) * 8;
                let word = u64::from_be_bytes(block[from..from + 8].try_into().unwrap());
                prop_assert_eq!(width.get_in_word(word, index), *want);
            }
            let word = width.set_in_word(word_of(&block), at, value);
            width.set(&mut block, at, value);
            prop_assert_eq!(word_of(&block), word);
            for (index, old) in before.iter().enumerate() {
                prop_assert_eq!(width.get(&block, index), if index == at { value } else { *old });
            }
        }
    }
}
