//! Entries of the three kinds of tables: L1, L2 and refcount table.
//!
//! ```text
//!              63     62         61..56     55 .. 9            8 .. 1     0
//!   L1         copied | reserved           | L2 table offset  | reserved        |
//!   L2         copied | 0       | reserved | data offset      | reserved | zero |
//!   L2         0      | 1       | sectors - 1  | offset in bytes                |   split at 62 - (cluster_bits - 8)
//!   refcounts  | refcount block offset                        | reserved        |
//! ```
//!
//! Decoding refuses what the specification reserves: a bit that we do not know may change what the
//! others mean. The consistency check looks at raw entries instead, because it has to count what a
//! broken entry refers to. qcow2 specification, "Cluster mapping".

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

use crate::spec;
use crate::types::{Geometry, GuestOffset, HostOffset, Version};

/// An entry that the specification does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Bits 0 to 8 or 56 to 62 of an L1 entry are not zero.
    #[error("L1 entry {index} is {entry:#018x}: reserved bits are set")]
    L1Reserved {
        /// Slot in the L1 table.
        index: u64,
        /// The entry as read.
        entry: u64,
    },
    /// An L2 table that does not begin at a cluster.
    #[error("L1 entry {index} is {entry:#018x}: the L2 table is not cluster-aligned")]
    L1Unaligned {
        /// Slot in the L1 table.
        index: u64,
        /// The entry as read.
        entry: u64,
    },
    /// Reserved bits of a standard L2 entry are not zero.
    #[error("L2 entry {entry:#018x} for guest offset {guest}: reserved bits are set")]
    L2Reserved {
        /// First guest byte of the cluster.
        guest: GuestOffset,
        /// The entry as read.
        entry: u64,
    },
    /// A data cluster that does not begin at a cluster.
    #[error("L2 entry {entry:#018x} for guest offset {guest}: host offset is not cluster-aligned")]
    UnalignedData {
        /// First guest byte of the cluster.
        guest: GuestOffset,
        /// The entry as read.
        entry: u64,
    },
    /// The preallocated cluster of a zero cluster does not begin at a cluster.
    #[error(
        "L2 entry {entry:#018x} for guest offset {guest}: \
         host offset of a zero cluster is not cluster-aligned"
    )]
    UnalignedZero {
        /// First guest byte of the cluster.
        guest: GuestOffset,
        /// The entry as read.
        entry: u64,
    },
    /// The zero flag in a version 2 image.
    #[error("L2 entry {entry:#018x} for guest offset {guest}: a zero cluster in a version 2 image")]
    ZeroInV2 {
        /// First guest byte of the cluster.
        guest: GuestOffset,
        /// The entry as read.
        entry: u64,
    },
    /// Compressed data at 2^56 or above; possible in images with small clusters.
    #[error("L2 entry {entry:#018x} for guest offset {guest}: compressed data past 2^56")]
    CompressedOffset {
        /// First guest byte of the cluster.
        guest: GuestOffset,
        /// The entry as read.
        entry: u64,
    },
    /// Bits 0 to 8 of a refcount table entry are not zero.
    #[error("refcount table entry {index} is {entry:#018x}: reserved bits are set")]
    RefcountTableReserved {
        /// Slot in the refcount table.
        index: u64,
        /// The entry as read.
        entry: u64,
    },
    /// A refcount block that does not begin at a cluster.
    #[error("refcount table entry {index} is {entry:#018x}: the block is not cluster-aligned")]
    RefcountTableUnaligned {
        /// Slot in the refcount table.
        index: u64,
        /// The entry as read.
        entry: u64,
    },
}

/// Where an L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct L1Entry {
    /// Start of the L2 table; `None`: no cluster of its range is allocated.
    pub host: Option<HostOffset>,
    /// The refcount of the L2 table is exactly one.
    pub copied: bool,
}

impl L1Entry {
    /// Reads entry `index` of an L1 table.
    ///
    /// # Errors
    /// Reserved bits, or a table that is not cluster-aligned.
    #[inline]
    pub const fn decode(entry: u64, index: u64, geometry: Geometry) -> Result<Self, EntryError> {
        if entry & spec::L1_RESERVED != 0 {
            return Err(EntryError::L1Reserved { index, entry });
        }
        let offset = entry & spec::ENTRY_OFFSET_MASK;
        if !geometry.is_aligned(offset) {
            return Err(EntryError::L1Unaligned { index, entry });
        }
        Ok(Self {
            host: non_zero(offset),
            copied: entry & spec::ENTRY_COPIED != 0,
        })
    }

    /// The entry as a number.
    ///
    /// # Panics
    /// A host offset that no entry can hold: the allocator stays below 2^56.
    #[inline]
    #[must_use]
    pub const fn encode(self) -> u64 {
        offset_bits(self.host) | copied_bit(self.copied)
    }
}

/// What one L2 entry says about a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Never written: reads as the backing file, or as zeros without one.
    Unallocated,
    /// Reads as zeros, whatever a backing file holds.
    Zero {
        /// A cluster that is kept for later writes; its content means nothing.
        host: Option<HostOffset>,
        /// The refcount of `host` is exactly one.
        copied: bool,
    },
    /// Its bytes are in the host cluster at `host`.
    Data {
        /// Start of the host cluster.
        host: HostOffset,
        /// The refcount of the host cluster is exactly one: it may be written in place.
        copied: bool,
    },
    /// Its bytes are compressed; never written in place.
    Compressed {
        /// First byte of the compressed data, at any alignment.
        host: HostOffset,
        /// Bytes from `host` to the end of the last sector that holds compressed data: an upper
        /// bound of its length.
        len: u64,
    },
}

impl L2Entry {
    /// Reads a standard (8-byte) entry; `at` is the start of its guest cluster, for messages.
    ///
    /// # Errors
    /// Reserved bits, a host offset that is not cluster-aligned, a zero cluster in a version 2
    /// image.
    #[inline]
    pub const fn decode(
        entry: u64,
        at: GuestOffset,
        geometry: Geometry,
    ) -> Result<Self, EntryError> {
        if entry & spec::L2_COMPRESSED != 0 {
            let (host, len) = split_compressed(entry, geometry);
            if host >= spec::HOST_OFFSET_END {
                return Err(EntryError::CompressedOffset { guest: at, entry });
            }
            return Ok(Self::Compressed {
                host: HostOffset(host),
                len,
            });
        }
        if entry & spec::L2_RESERVED != 0 {
            return Err(EntryError::L2Reserved { guest: at, entry });
        }
        let offset = entry & spec::ENTRY_OFFSET_MASK;
        let copied = entry & spec::ENTRY_COPIED != 0;
        if entry & spec::L2_ZERO != 0 {
            if matches!(geometry.version(), Version::V2) {
                return Err(EntryError::ZeroInV2 { guest: at, entry });
            }
            if !geometry.is_aligned(offset) {
                return Err(EntryError::UnalignedZero { guest: at, entry });
            }
            return Ok(Self::Zero {
                host: non_zero(offset),
                copied,
            });
        }
        if offset == 0 {
            return Ok(Self::Unallocated);
        }
        if !geometry.is_aligned(offset) {
            return Err(EntryError::UnalignedData { guest: at, entry });
        }
        Ok(Self::Data {
            host: HostOffset(offset),
            copied,
        })
    }

    /// The entry as a number.
    ///
    /// # Panics
    /// A host offset, or compressed data, that no entry can hold: the allocator stays below
    /// [`compressed_end`].
    #[must_use]
    pub const fn encode(self, geometry: Geometry) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero { host, copied } => offset_bits(host) | copied_bit(copied) | spec::L2_ZERO,
            Self::Data { host, copied } => offset_bits(Some(host)) | copied_bit(copied),
            Self::Compressed { host, len } => join_compressed(host, len, geometry),
        }
    }

    /// The host range that the entry refers to, if any: a whole cluster, or the sectors of
    /// compressed data.
    #[must_use]
    pub const fn host_range(self, geometry: Geometry) -> Option<(HostOffset, u64)> {
        match self {
            Self::Unallocated | Self::Zero { host: None, .. } => None,
            Self::Zero {
                host: Some(host), ..
            }
            | Self::Data { host, .. } => Some((host, geometry.cluster_size())),
            Self::Compressed { host, len } => Some((host, len)),
        }
    }
}

/// First host offset that compressed data may not reach.
///
/// The descriptor gives the offset `62 - (cluster_bits - 8)` bits, and never more than 56.
#[must_use]
pub const fn compressed_end(geometry: Geometry) -> HostOffset {
    let by_field = 1_u64 << compressed_offset_bits(geometry);
    HostOffset(if by_field < spec::HOST_OFFSET_END {
        by_field
    } else {
        spec::HOST_OFFSET_END
    })
}

/// Offset and length that a compressed cluster descriptor holds, whatever they are.
///
/// The length reaches from the offset to the end of the last sector.
#[must_use]
pub const fn split_compressed(entry: u64, geometry: Geometry) -> (u64, u64) {
    let offset_bits = compressed_offset_bits(geometry);
    let offset = entry & mask(offset_bits);
    let sectors = ((entry & mask(62)) >> offset_bits).saturating_add(1);
    // At most 2^13 sectors; an offset in a sector is below 512.
    let len = sectors
        .saturating_mul(spec::SECTOR_LEN)
        .saturating_sub(offset % spec::SECTOR_LEN);
    (offset, len)
}

const fn join_compressed(host: HostOffset, len: u64, geometry: Geometry) -> u64 {
    let offset_bits = compressed_offset_bits(geometry);
    let offset = host.get();
    assert!(
        len > 0 && len / 2 <= geometry.cluster_size(),
        "compressed data of a strange length"
    );
    assert!(
        offset.saturating_add(len) <= compressed_end(geometry).get(),
        "compressed data past the end of its descriptor"
    );
    let last = offset.saturating_add(len.saturating_sub(1)) / spec::SECTOR_LEN;
    let sectors = last.saturating_sub(offset / spec::SECTOR_LEN);
    assert!(
        sectors < 1 << 62_u32.saturating_sub(offset_bits),
        "too many sectors for a descriptor"
    );
    spec::L2_COMPRESSED | sectors << offset_bits | offset
}

/// Reads entry `index` of the refcount table: the start of a refcount block, if there is one.
///
/// # Errors
/// Reserved bits, or a block that is not cluster-aligned.
pub const fn decode_refcount_table(
    entry: u64,
    index: u64,
    geometry: Geometry,
) -> Result<Option<HostOffset>, EntryError> {
    if entry & spec::REFCOUNT_TABLE_RESERVED != 0 {
        return Err(EntryError::RefcountTableReserved { index, entry });
    }
    if !geometry.is_aligned(entry) {
        return Err(EntryError::RefcountTableUnaligned { index, entry });
    }
    Ok(non_zero(entry))
}

/// Bits of the offset field of a compressed cluster descriptor: 49 to 61.
const fn compressed_offset_bits(geometry: Geometry) -> u32 {
    70_u32.saturating_sub(geometry.cluster_bits())
}

const fn mask(bits: u32) -> u64 {
    u64::MAX >> 64_u32.saturating_sub(bits)
}

const fn non_zero(offset: u64) -> Option<HostOffset> {
    if offset == 0 {
        None
    } else {
        Some(HostOffset(offset))
    }
}

const fn copied_bit(copied: bool) -> u64 {
    if copied { spec::ENTRY_COPIED } else { 0 }
}

const fn offset_bits(host: Option<HostOffset>) -> u64 {
    match host {
        None => 0,
        Some(HostOffset(offset)) => {
            assert!(offset != 0, "host offset 0 is the header");
            assert!(
                offset & !spec::ENTRY_OFFSET_MASK == 0,
                "no entry can hold this host offset"
            );
            offset
        }
    }
}

#[cfg(test)]
mod tests {
    use super::EntryError::*;
    use super::L2Entry::*;
    use super::*;
    use proptest::prelude::*;

    const COPIED: u64 = spec::ENTRY_COPIED;
    const AT: GuestOffset = GuestOffset(0x123_0000);

    fn clusters(bits: u32, version: Version) -> Geometry {
        Geometry::new(version, bits, 4, 1 << 30).unwrap()
    }

    #[test]
    fn l2_entries() {
        let g = clusters(16, Version::V3);
        let compressed_1 = COPIED >> 1 | 0x5_0123;
        for (name, entry, want) in [
            ("never written", 0, Ok(Unallocated)),
            ("never written, copied flag", COPIED, Ok(Unallocated)),
            (
                "zero, no cluster",
                1,
                Ok(Zero {
                    host: None,
                    copied: false,
                }),
            ),
            (
                "zero, a cluster kept",
                COPIED | 0x5_0001,
                Ok(Zero {
                    host: Some(HostOffset(0x5_0000)),
                    copied: true,
                }),
            ),
            (
                "data, refcount one",
                COPIED | 0x5_0000,
                Ok(Data {
                    host: HostOffset(0x5_0000),
                    copied: true,
                }),
            ),
            (
                "data, shared",
                0x5_0000,
                Ok(Data {
                    host: HostOffset(0x5_0000),
                    copied: false,
                }),
            ),
            (
                "greatest offset",
                0x00ff_ffff_ffff_0000,
                Ok(Data {
                    host: HostOffset(0x00ff_ffff_ffff_0000),
                    copied: false,
                }),
            ),
            (
                "host not aligned",
                COPIED | 0x5_0200,
                Err(UnalignedData {
                    guest: AT,
                    entry: COPIED | 0x5_0200,
                }),
            ),
            (
                "zero, host not aligned",
                0x5_0201,
                Err(UnalignedZero {
                    guest: AT,
                    entry: 0x5_0201,
                }),
            ),
            (
                "reserved bit 1",
                0x5_0002,
                Err(L2Reserved {
                    guest: AT,
                    entry: 0x5_0002,
                }),
            ),
            (
                "reserved bit 8",
                0x100,
                Err(L2Reserved {
                    guest: AT,
                    entry: 0x100,
                }),
            ),
            (
                "reserved bit 56",
                1 << 56,
                Err(L2Reserved {
                    guest: AT,
                    entry: 1 << 56,
                }),
            ),
            (
                "reserved bit 61",
                1 << 61,
                Err(L2Reserved {
                    guest: AT,
                    entry: 1 << 61,
                }),
            ),
            (
                "compressed, one sector",
                compressed_1,
                Ok(Compressed {
                    host: HostOffset(0x5_0123),
                    len: 512 - 0x123,
                }),
            ),
            (
                "compressed, four sectors",
                compressed_1 | 3 << 54,
                Ok(Compressed {
                    host: HostOffset(0x5_0123),
                    len: 2048 - 0x123,
                }),
            ),
        ] {
            assert_eq!(L2Entry::decode(entry, AT, g), want, "{name}: {entry:#x}");
        }
    }

    #[test]
    fn version_2_has_no_zero_clusters() {
        let g = clusters(16, Version::V2);
        assert_eq!(
            L2Entry::decode(1, AT, g),
            Err(ZeroInV2 {
                guest: AT,
                entry: 1
            })
        );
    }

    #[test]
    fn compressed_offsets_end_at_2_56() {
        let g = clusters(9, Version::V3);
        let at = |offset: u64| L2Entry::decode(spec::L2_COMPRESSED | offset, AT, g);
        assert!(at((1 << 56) - 1).is_ok());
        assert!(matches!(at(1 << 56), Err(CompressedOffset { .. })));
        assert_eq!(compressed_end(g), HostOffset(1 << 56));
        assert_eq!(
            compressed_end(clusters(21, Version::V3)),
            HostOffset(1 << 49)
        );
    }

    #[test]
    fn l1_entries() {
        let g = clusters(16, Version::V3);
        let ok = |offset, copied| {
            Ok(L1Entry {
                host: (offset != 0).then_some(HostOffset(offset)),
                copied,
            })
        };
        for (name, entry, want) in [
            ("none", 0, ok(0, false)),
            ("a table", COPIED | 0x3_0000, ok(0x3_0000, true)),
            ("a shared table", 0x3_0000, ok(0x3_0000, false)),
            (
                "reserved bit 0",
                0x3_0001,
                Err(L1Reserved {
                    index: 7,
                    entry: 0x3_0001,
                }),
            ),
            (
                "reserved bit 62",
                1 << 62,
                Err(L1Reserved {
                    index: 7,
                    entry: 1 << 62,
                }),
            ),
            (
                "not aligned",
                0x3_0200,
                Err(L1Unaligned {
                    index: 7,
                    entry: 0x3_0200,
                }),
            ),
        ] {
            assert_eq!(L1Entry::decode(entry, 7, g), want, "{name}: {entry:#x}");
        }
    }

    #[test]
    fn refcount_table_entries() {
        let g = clusters(16, Version::V3);
        for (name, entry, want) in [
            ("none", 0, Ok(None)),
            ("a block", 0x2_0000, Ok(Some(HostOffset(0x2_0000)))),
            ("above 2^56", 1 << 60, Ok(Some(HostOffset(1 << 60)))),
            (
                "reserved",
                0x2_0001,
                Err(RefcountTableReserved {
                    index: 3,
                    entry: 0x2_0001,
                }),
            ),
            (
                "not aligned",
                0x2_0200,
                Err(RefcountTableUnaligned {
                    index: 3,
                    entry: 0x2_0200,
                }),
            ),
        ] {
            assert_eq!(
                decode_refcount_table(entry, 3, g),
                want,
                "{name}: {entry:#x}"
            );
        }
    }

    #[test]
    fn an_error_names_entry_and_place() {
        let text = UnalignedData {
            guest: AT,
            entry: 0x5_0200,
        }
        .to_string();
        assert!(
            text.contains("0x1230000") && text.contains("0x0000000000050200"),
            "{text}"
        );
    }

    #[test]
    #[should_panic(expected = "no entry can hold this host offset")]
    fn an_offset_that_does_not_fit_is_our_error() {
        let _ = L1Entry {
            host: Some(HostOffset(1 << 56)),
            copied: false,
        }
        .encode();
    }

    proptest! {
        /// Every entry that decodes encodes to itself, but for an unallocated one with the copied
        /// flag.
        #[test]
        fn l2_round_trip(entry in any::<u64>(), keep in any::<u64>(), bits in 9_u32..=21) {
            let g = clusters(bits, Version::V3);
            for entry in [entry, entry & keep, entry & !(g.cluster_size() - 1) & !spec::L2_RESERVED] {
                if let Ok(decoded) = L2Entry::decode(entry, AT, g) {
                    let again = decoded.encode(g);
                    match decoded {
                        Unallocated => prop_assert_eq!(again, 0),
                        // The copied flag means nothing there.
                        Compressed { host, len } => {
                            prop_assert!(len <= 2 * g.cluster_size());
                            prop_assert!(host < HostOffset(spec::HOST_OFFSET_END));
                            if host.get() + len <= compressed_end(g).get() {
                                prop_assert_eq!(decoded.encode(g), entry & !COPIED);
                            }
                        }
                        _ => prop_assert_eq!(again, entry),
                    }
                }
            }
        }

        #[test]
        fn l1_round_trip(entry in any::<u64>(), bits in 9_u32..=21) {
            let g = clusters(bits, Version::V3);
            let entry = entry & !spec::L1_RESERVED & !(g.cluster_size() - 1);
            prop_assert_eq!(L1Entry::decode(entry, 0, g).unwrap().encode(), entry);
        }
    }
}
