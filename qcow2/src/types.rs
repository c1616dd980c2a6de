//! Offsets, clusters and the one conversion table between them.
//!
//! A qcow2 image has two address spaces. The *guest* sees a disk; the *host* file holds tables and
//! data. Each has offsets in bytes and clusters; mixing them up is the classic error, so each has
//! its own type. [`Geometry`] was checked once, when the header was read, and does all conversions:
//! none of its methods can fail or overflow.
//!
//! ```text
//!   guest offset   | l1_index              | l2_index       | offset_in_cluster |
//!                  63                      .                .  cluster_bits     0
//!
//!   host cluster   | refcount_table_index         | refcount_block_index |
//!                  63                             .                      0
//! ```

use std::fmt;

use crate::error::{Error, Result};
use crate::spec;

const _: () = assert!(
    usize::BITS >= 64,
    "table indices of a qcow2 image need 64-bit indices"
);

/// A number of table entries or clusters as an index: the assertion above makes it lossless.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits, asserted above"
)]
pub(crate) const fn index(number: u64) -> usize {
    number as usize
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The plain number.
            #[inline]
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + more`, or `None` where a `u64` ends.
            #[inline]
            #[must_use]
            pub const fn checked_add(self, more: u64) -> Option<Self> {
                match self.0.checked_add(more) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// `self - less`, or `None` below zero.
            #[inline]
            #[must_use]
            pub const fn checked_sub(self, less: u64) -> Option<Self> {
                match self.0.checked_sub(less) {
                    Some(rest) => Some(Self(rest)),
                    None => None,
                }
            }

            /// How far `self` lies behind `start`, or `None` when it lies before it.
            #[inline]
            #[must_use]
            pub const fn distance_from(self, start: Self) -> Option<u64> {
                self.0.checked_sub(start.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $format, ")"), self.0)
            }
        }
    };
}

number! {
    /// A byte of the disk that the guest sees.
    GuestOffset, "{:#x}"
}
number! {
    /// A byte of the image file.
    HostOffset, "{:#x}"
}
number! {
    /// Index of a cluster of the disk that the guest sees.
    GuestCluster, "{}"
}
number! {
    /// Index of a cluster of the image file.
    HostCluster, "{}"
}
number! {
    /// How many clusters.
    ClusterCount, "{}"
}

/// Version of the format: of the header, and of what L2 entries may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// "compat: 0.10".
    V2,
    /// "compat: 1.1": feature bits, refcounts of other widths, clusters that read as zeros.
    V3,
}

impl Version {
    /// The number in the header.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// The version by the name that `qemu-img` gives it: `0.10` or `1.1`.
    #[must_use]
    pub const fn compat(self) -> &'static str {
        match self {
            Self::V2 => "0.10",
            Self::V3 => "1.1",
        }
    }
}

/// Sizes of an image's units, checked once; does all conversions between offsets, clusters and
/// table indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    virtual_size: u64,
    version: Version,
    cluster_bits: u8,
    l2_bits: u8,
    refcount_order: u8,
}

impl Geometry {
    /// Checks the fields of a header against each other's limits.
    ///
    /// # Errors
    /// Cluster size outside 512 B to 2 MiB, refcounts wider than 64 bits (or not 16 bits in version
    /// 2), or a virtual size of 2^63 bytes and more.
    pub fn new(
        version: Version,
        cluster_bits: u32,
        refcount_order: u32,
        virtual_size: u64,
    ) -> Result<Self> {
        if !(spec::CLUSTER_BITS_MIN..=spec::CLUSTER_BITS_MAX).contains(&cluster_bits) {
            return Err(Error::ClusterBits {
                found: cluster_bits,
            });
        }
        if refcount_order > spec::REFCOUNT_ORDER_MAX {
            return Err(Error::RefcountOrder {
                found: refcount_order,
            });
        }
        if version == Version::V2 && refcount_order != spec::REFCOUNT_ORDER_V2 {
            return Err(Error::RefcountOrderV2 {
                found: refcount_order,
            });
        }
        if virtual_size > spec::OFFSET_MAX {
            return Err(Error::VirtualSize {
                found: virtual_size,
            });
        }
        // Both were bounded above.
        let (Ok(cluster_bits), Ok(refcount_order)) =
            (u8::try_from(cluster_bits), u8::try_from(refcount_order))
        else {
            unreachable!(
                "cluster_bits {cluster_bits} and refcount_order {refcount_order} are small"
            )
        };
        Ok(Self {
            virtual_size,
            version,
            cluster_bits,
            l2_bits: cluster_bits - 3,
            refcount_order,
        })
    }

    /// The same geometry with 16-byte L2 entries.
    ///
    /// # Errors
    /// Clusters below 16 KiB, whose 32 subclusters would be smaller than a sector.
    pub fn with_extended_l2(mut self) -> Result<Self> {
        if u32::from(self.cluster_bits) < spec::CLUSTER_BITS_MIN_EXTENDED_L2 {
            return Err(Error::ExtendedL2ClusterBits {
                found: self.cluster_bits.into(),
            });
        }
        self.l2_bits = self.cluster_bits - 4;
        Ok(self)
    }

    /// The same geometry of a disk of another size; used by resize.
    ///
    /// # Errors
    /// A size of 2^63 bytes and more.
    pub fn with_virtual_size(self, virtual_size: u64) -> Result<Self> {
        if virtual_size > spec::OFFSET_MAX {
            return Err(Error::VirtualSize {
                found: virtual_size,
            });
        }
        Ok(Self {
            virtual_size,
            ..self
        })
    }

    /// Version of the format.
    #[inline]
    #[must_use]
    pub const fn version(self) -> Version {
        self.version
    }

    /// Bytes of the disk that the guest sees.
    #[inline]
    #[must_use]
    pub const fn virtual_size(self) -> u64 {
        self.virtual_size
    }

    /// Logarithm of [`Geometry::cluster_size`].
    #[inline]
    #[must_use]
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits as u32
    }

    /// Bytes of a cluster: 512 to 2 MiB.
    #[inline]
    #[must_use]
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a cluster, for slices.
    #[inline]
    #[must_use]
    pub const fn cluster_len(self) -> usize {
        1 << self.cluster_bits
    }

    /// Bytes of one L2 entry: 8, or 16 with extended L2 entries.
    #[inline]
    #[must_use]
    pub const fn l2_entry_len(self) -> u64 {
        1 << (self.cluster_bits - self.l2_bits)
    }

    /// Entries of an L2 table, which fills one cluster.
    #[inline]
    #[must_use]
    pub const fn l2_entries(self) -> usize {
        1 << self.l2_bits
    }

    /// Guest bytes that one L1 entry, so one L2 table, covers.
    #[inline]
    #[must_use]
    pub const fn l1_entry_coverage(self) -> u64 {
        1 << (self.l2_bits + self.cluster_bits)
    }

    /// Slot of `at` in the L1 table.
    #[inline]
    #[must_use]
    pub const fn l1_index(self, at: GuestOffset) -> usize {
        index(at.0 >> (self.l2_bits + self.cluster_bits))
    }

    /// Slot of `at` in its L2 table; below [`Geometry::l2_entries`].
    #[inline]
    #[must_use]
    pub const fn l2_index(self, at: GuestOffset) -> usize {
        index(at.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// First guest byte that slot `l2_index` of the table behind `l1_index` covers, or `None` past
    /// the end of `u64`.
    #[must_use]
    pub fn guest_offset(self, l1_index: u64, l2_index: u64) -> Option<GuestOffset> {
        let start = l1_index.checked_mul(self.l1_entry_coverage())?;
        start
            .checked_add(l2_index.checked_mul(self.cluster_size())?)
            .map(GuestOffset)
    }

    /// L1 entries that a disk of [`Geometry::virtual_size`] needs.
    #[must_use]
    pub const fn l1_entries(self) -> u64 {
        self.virtual_size.div_ceil(self.l1_entry_coverage())
    }

    /// Bytes between the start of its cluster and `at`.
    #[inline]
    #[must_use]
    pub const fn offset_in_cluster(self, at: GuestOffset) -> u64 {
        at.0 & (self.cluster_size() - 1)
    }

    /// Bytes between the start of its host cluster and `at`.
    #[inline]
    #[must_use]
    pub const fn host_offset_in_cluster(self, at: HostOffset) -> u64 {
        at.0 & (self.cluster_size() - 1)
    }

    /// Whether a raw host offset is the start of a cluster.
    #[inline]
    #[must_use]
    pub const fn is_aligned(self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }

    /// The guest cluster that holds `at`.
    #[inline]
    #[must_use]
    pub const fn guest_cluster(self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.cluster_bits)
    }

    /// First byte of a guest cluster.
    ///
    /// # Panics
    /// A cluster that ends past 2^64: no offset can have led to it.
    #[inline]
    #[must_use]
    pub const fn guest_start(self, cluster: GuestCluster) -> GuestOffset {
        assert!(
            cluster.0 <= u64::MAX >> self.cluster_bits,
            "guest cluster past 2^64 bytes"
        );
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The host cluster that holds `at`.
    #[inline]
    #[must_use]
    pub const fn host_cluster(self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.cluster_bits)
    }

    /// First byte of a host cluster.
    ///
    /// # Panics
    /// A cluster that ends past 2^64: no offset can have led to it.
    #[inline]
    #[must_use]
    pub const fn host_start(self, cluster: HostCluster) -> HostOffset {
        assert!(
            cluster.0 <= u64::MAX >> self.cluster_bits,
            "host cluster past 2^64 bytes"
        );
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Clusters that `bytes` fill, the last one perhaps in part.
    #[inline]
    #[must_use]
    pub const fn clusters(self, bytes: u64) -> ClusterCount {
        ClusterCount(bytes.div_ceil(self.cluster_size()))
    }

    /// `bytes` rounded up to whole clusters, or `None` past 2^64.
    #[inline]
    #[must_use]
    pub fn round_up(self, bytes: u64) -> Option<u64> {
        bytes.checked_next_multiple_of(self.cluster_size())
    }

    /// Logarithm of [`Geometry::refcount_bits`].
    #[inline]
    #[must_use]
    pub const fn refcount_order(self) -> u32 {
        self.refcount_order as u32
    }

    /// Bits of a refcount: 1, 2, 4, 8, 16, 32 or 64.
    #[inline]
    #[must_use]
    pub const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts in a refcount block, which fills one cluster; the host clusters that it covers.
    #[inline]
    #[must_use]
    pub const fn refcount_block_entries(self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Slot of a host cluster's refcount block in the refcount table.
    #[inline]
    #[must_use]
    pub const fn refcount_table_index(self, cluster: HostCluster) -> u64 {
        cluster.0 >> self.refcount_block_bits()
    }

    /// Slot of a host cluster in its refcount block; below [`Geometry::refcount_block_entries`].
    #[inline]
    #[must_use]
    pub const fn refcount_block_index(self, cluster: HostCluster) -> usize {
        index(cluster.0) & ((1 << self.refcount_block_bits()) - 1)
    }

    const fn refcount_block_bits(self) -> u32 {
        // 8 bits a byte; at least 9 + 3 - 6.
        self.cluster_bits as u32 + 3 - self.refcount_order as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, refcount_order: u32, size: u64) -> Geometry {
        Geometry::new(Version::V3, cluster_bits, refcount_order, size).unwrap()
    }

    #[test]
    fn default_image() {
        let g = geometry(16, 4, 1 << 30);
        assert_eq!(
            (g.cluster_size(), g.l2_entries(), g.l2_entry_len()),
            (65536, 8192, 8)
        );
        assert_eq!((g.l1_entries(), g.l1_entry_coverage()), (2, 512 << 20));
        assert_eq!((g.refcount_bits(), g.refcount_block_entries()), (16, 32768));
        let at = GuestOffset((512 << 20) + 3 * 65536 + 17);
        assert_eq!(
            (g.l1_index(at), g.l2_index(at), g.offset_in_cluster(at)),
            (1, 3, 17)
        );
        assert_eq!(
            g.guest_offset(1, 3),
            Some(GuestOffset((512 << 20) + 3 * 65536))
        );
        assert_eq!(g.guest_start(g.guest_cluster(at)), GuestOffset(at.0 - 17));
        let cluster = g.host_cluster(HostOffset(65536 * 32769 + 5));
        assert_eq!(
            (
                g.refcount_table_index(cluster),
                g.refcount_block_index(cluster)
            ),
            (1, 1)
        );
        assert_eq!(g.host_start(cluster), HostOffset(65536 * 32769));
        assert_eq!(g.clusters(65537), ClusterCount(2));
    }

    #[test]
    fn limits() {
        for (name, version, cluster_bits, order, size, good) in [
            ("smallest cluster", Version::V3, 9, 4, 0, true),
            ("cluster too small", Version::V3, 8, 4, 0, false),
            ("greatest cluster", Version::V3, 21, 4, 0, true),
            ("cluster too great", Version::V3, 22, 4, 0, false),
            (
                "cluster bits that wrap a u8",
                Version::V3,
                256 + 16,
                4,
                0,
                false,
            ),
            ("widest refcount", Version::V3, 16, 6, 0, true),
            ("refcount too wide", Version::V3, 16, 7, 0, false),
            ("version 2 with its width", Version::V2, 16, 4, 0, true),
            ("version 2 with another width", Version::V2, 16, 3, 0, false),
            ("greatest size", Version::V3, 16, 4, (1 << 63) - 1, true),
            ("size too great", Version::V3, 16, 4, 1 << 63, false),
        ] {
            assert_eq!(
                Geometry::new(version, cluster_bits, order, size).is_ok(),
                good,
                "{name}"
            );
        }
        assert!(geometry(14, 4, 0).with_extended_l2().is_ok());
        assert!(geometry(13, 4, 0).with_extended_l2().is_err());
        assert!(geometry(16, 4, 0).with_virtual_size(1 << 63).is_err());
    }

    /// Every index stays inside its table, for every cluster size and the greatest offset.
    #[test]
    fn indices_are_in_range() {
        for cluster_bits in 9..=21 {
            for order in 0..=6 {
                let g = geometry(cluster_bits, order, u64::MAX >> 1);
                for raw in [0, 1, g.cluster_size() - 1, g.cluster_size(), u64::MAX] {
                    assert!(g.l2_index(GuestOffset(raw)) < g.l2_entries());
                    let cluster = g.host_cluster(HostOffset(raw));
                    let slot = g.refcount_block_index(cluster) as u64;
                    assert!(slot < g.refcount_block_entries());
                    let joined =
                        g.refcount_table_index(cluster) * g.refcount_block_entries() + slot;
                    assert_eq!(joined, cluster.get());
                    assert_eq!(
                        g.host_start(cluster).get() + g.host_offset_in_cluster(HostOffset(raw)),
                        raw
                    );
                }
                assert!(g.round_up(u64::MAX).is_none());
            }
        }
    }

    #[test]
    fn arithmetic_ends_at_the_ends() {
        assert_eq!(HostOffset(u64::MAX).checked_add(1), None);
        assert_eq!(HostOffset(1).checked_sub(2), None);
        assert_eq!(HostOffset(7).distance_from(HostOffset(4)), Some(3));
        assert_eq!(HostOffset(4).distance_from(HostOffset(7)), None);
        assert_eq!(
            format!("{} {:?}", HostOffset(512), HostCluster(3)),
            "0x200 HostCluster(3)"
        );
        assert_eq!(geometry(16, 4, 0).guest_offset(u64::MAX, 0), None);
    }
}
