//! Small values that every part of the crate speaks: flags, limits, permissions, roles.
//!
//! All offsets and lengths are bytes. Nothing here does I/O or suspends.

use bitflags::bitflags;
use std::fmt;

/// Longest request in bytes: what fits a signed 32-bit length, in whole sectors.
pub const MAX_REQUEST: u64 = i32::MAX as u64 & !511;

/// Longest node in bytes: below 2^63, in whole GiB, so that padding a request never overflows.
pub const MAX_LENGTH: u64 = i64::MAX as u64 & !(MAX_ALIGNMENT - 1);

/// Largest request alignment in bytes that a driver may ask for.
pub const MAX_ALIGNMENT: u64 = 1 << 30;

bitflags! {
    /// What a request asks for beyond its bytes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RequestFlags: u32 {
        /// The data of this write is on stable storage when the call returns.
        const FUA = 1 << 0;
        /// Writing zeroes may free the storage instead.
        const MAY_UNMAP = 1 << 1;
        /// Writing zeroes fails with `NotSupported` where it would have to write a buffer of zeros.
        const NO_FALLBACK = 1 << 2;
        /// The request waits for all that overlap it, and they for it.
        const SERIALISING = 1 << 3;
    }
}

/// What becomes of the space that a node gets when it is made longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// It is taken when something is written there.
    #[default]
    Off,
    /// A format has its tables ready for it; the file has holes there.
    Metadata,
    /// It is set aside by the file system.
    Falloc,
    /// Zeros are written to it.
    Full,
}

impl Preallocation {
    /// All of them, by the reference's words.
    pub const NAMES: [(&str, Self); 4] = [
        ("off", Self::Off),
        ("metadata", Self::Metadata),
        ("falloc", Self::Falloc),
        ("full", Self::Full),
    ];

    /// The reference's word.
    pub fn name(self) -> &'static str {
        let named = Self::NAMES.iter().find(|(_, mode)| *mode == self);
        named.map_or("?", |(name, _)| name)
    }
}

bitflags! {
    /// What a user of a node does, or lets others do. Bit numbers are those of the lock bytes of
    /// image files.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Perm: u8 {
        /// Reads that must see a consistent picture.
        const CONSISTENT_READ = 1 << 0;
        /// Writes that change what is read.
        const WRITE = 1 << 1;
        /// Writes that do not change what is read.
        const WRITE_UNCHANGED = 1 << 2;
        /// Changing the length.
        const RESIZE = 1 << 3;
    }
}

impl Perm {
    /// How many there are.
    pub const BITS: u32 = 4;

    /// The one permission with bit number `bit`, in the words of the reference's messages.
    pub fn bit_name(bit: u32) -> &'static str {
        match bit {
            0 => "consistent read",
            1 => "write",
            2 => "write unchanged",
            3 => "resize",
            _ => "unknown",
        }
    }
}

/// What a user does with a node, and what it lets others do meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Held by this user.
    pub held: Perm,
    /// Granted to all other users.
    pub shared: Perm,
}

impl Permissions {
    /// Of who does nothing and lets others do anything.
    pub const NONE: Permissions = Permissions {
        held: Perm::empty(),
        shared: Perm::all(),
    };
}

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildRole {
    /// The parent passes requests through, perhaps shifted: `raw` to its file.
    Filtered,
    /// Metadata of a format, and its data unless there is a [`ChildRole::Data`].
    Storage,
    /// Guest data of a format that keeps its metadata elsewhere.
    Data,
    /// What reads see where the parent holds nothing.
    Backing,
}

impl ChildRole {
    /// What a parent with `own` permissions needs of a child in this role.
    ///
    /// Seen from outside these are the reference's: a format never shares writing and resizing of
    /// its storage, a backing file is only read and everything is shared, a filter passes on what
    /// its own users need.
    pub fn permissions(self, own: Permissions, read_only: bool, force_share: bool) -> Permissions {
        let shared_with_all = Perm::all();
        match self {
            ChildRole::Filtered => own,
            ChildRole::Backing => Permissions {
                held: Perm::CONSISTENT_READ,
                shared: shared_with_all,
            },
            ChildRole::Storage | ChildRole::Data => Permissions {
                held: if read_only {
                    Perm::CONSISTENT_READ
                } else {
                    Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE
                },
                shared: if force_share {
                    shared_with_all
                } else {
                    Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED
                },
            },
        }
    }
}

impl fmt::Display for ChildRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChildRole::Filtered => "filtered",
            ChildRole::Storage => "storage",
            ChildRole::Data => "data",
            ChildRole::Backing => "backing",
        })
    }
}

/// What a driver can do in one request. Set once, when the node is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of reads and writes are multiples of this; a power of two, at least 1.
    pub request_alignment: u64,
    /// Memory of requests lies at multiples of this; a power of two, at least 1.
    pub mem_alignment: usize,
    /// Longest read or write; at least `request_alignment`.
    pub max_transfer: u64,
    /// Offsets and lengths of zero requests that reach the driver are multiples of this; a power of
    /// two.
    pub zero_alignment: u64,
    /// Longest zero request; at least `zero_alignment`.
    pub max_zeroes: u64,
    /// Offsets and lengths of discards that reach the driver are multiples of this; a power of two.
    pub discard_alignment: u64,
    /// Longest discard; at least `discard_alignment`.
    pub max_discard: u64,
    /// Longest transfer that a device below takes as one. Longer ones are taken apart by the
    /// kernel, side by side, so no node does it; for who tells a guest what is good.
    pub device_transfer: u64,
    /// Most pieces of memory in such a transfer, likewise.
    pub device_segments: usize,
}

impl Default for Limits {
    /// Any byte of any memory, as much as a request can have.
    fn default() -> Self {
        Limits {
            request_alignment: 1,
            mem_alignment: 1,
            max_transfer: MAX_REQUEST,
            zero_alignment: 1,
            max_zeroes: MAX_REQUEST,
            discard_alignment: 1,
            max_discard: MAX_REQUEST,
            device_transfer: MAX_REQUEST,
            device_segments: usize::MAX,
        }
    }
}

impl Limits {
    /// These, for requests that nobody on the way to `below`, which keeps the data in that role,
    /// has to pad, copy or take apart. Zeroes and discards of a format are its own: they change its
    /// tables.
    pub(crate) fn through(self, below: &Limits, role: ChildRole) -> Limits {
        let data = Limits {
            request_alignment: self.request_alignment.max(below.request_alignment),
            mem_alignment: self.mem_alignment.max(below.mem_alignment),
            max_transfer: self.max_transfer.min(below.max_transfer),
            device_transfer: self.device_transfer.min(below.device_transfer),
            device_segments: self.device_segments.min(below.device_segments),
            ..self
        };
        match role {
            ChildRole::Backing => self,
            ChildRole::Storage | ChildRole::Data => data,
            ChildRole::Filtered => Limits {
                zero_alignment: self.zero_alignment.max(below.zero_alignment),
                max_zeroes: self.max_zeroes.min(below.max_zeroes),
                discard_alignment: self.discard_alignment.max(below.discard_alignment),
                max_discard: self.max_discard.min(below.max_discard),
                ..data
            },
        }
    }

    /// These, through all that lie below.
    pub(crate) fn through_all(self, below: &[(Limits, ChildRole)]) -> Limits {
        let through = |all: Limits, (below, role): &(Limits, ChildRole)| all.through(below, *role);
        below.iter().fold(self, through)
    }

    /// Panics with what is wrong; a driver computes these, an image never does.
    pub(crate) fn assert_sane(&self, format: &str) {
        for (what, value) in [
            ("request alignment", self.request_alignment),
            ("zero alignment", self.zero_alignment),
            ("discard alignment", self.discard_alignment),
            ("memory alignment", self.mem_alignment as u64),
        ] {
            assert!(
                value.is_power_of_two() && value <= MAX_ALIGNMENT,
                "driver {format}: {what} {value}"
            );
        }
        assert!(
            self.max_transfer >= self.request_alignment
                && self.max_zeroes >= self.zero_alignment
                && self.max_discard >= self.discard_alignment,
            "driver {format}: a limit is below its alignment: {self:?}"
        );
    }
}

/// Which file of the host a node stands on: device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev`, or `st_rdev` of a device.
    pub device: u64,
    /// `st_ino`, or 0 of a device.
    pub inode: u64,
}

/// `value` down to a multiple of `alignment`, a power of two.
#[inline]
pub fn align_down(value: u64, alignment: u64) -> u64 {
    value & !(alignment - 1)
}

/// `value` up to a multiple of `alignment`, a power of two; `None` past 2^64.
#[inline]
pub fn align_up(value: u64, alignment: u64) -> Option<u64> {
    Some(align_down(value.checked_add(alignment - 1)?, alignment))
}

/// A length in memory as a length on disk.
#[inline]
pub fn bytes(len: usize) -> u64 {
    len as u64
}

/// A length on disk that is known to fit memory: it came from a buffer, or was bounded by
/// [`MAX_REQUEST`].
///
/// # Panics
/// When it does not fit: our own mistake.
#[inline]
pub fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("a length that was bounded by a buffer")
}
