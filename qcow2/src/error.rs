//! What can be wrong with an image, by name and place.
//!
//! An image can make us return one of these and can never make us panic. Each message says what is
//! wrong, what the value was, and which limit it broke.

use std::fmt;

use crate::compress::InflateError;
use crate::entry::EntryError;
use crate::spec;
use crate::types::{HostCluster, HostOffset};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A table that a header field points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The L1 table of the disk as it is now.
    ActiveL1,
    /// The refcount table.
    Refcount,
    /// The table of internal snapshots.
    Snapshots,
    /// The L1 table that snapshot number so-and-so keeps.
    SnapshotL1(u32),
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ActiveL1 => f.write_str("active L1 table"),
            Self::Refcount => f.write_str("refcount table"),
            Self::Snapshots => f.write_str("snapshot table"),
            Self::SnapshotL1(index) => write!(f, "L1 table of snapshot {index}"),
        }
    }
}

/// An image that we cannot use, or not for what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file ends inside the fixed part of the header.
    #[error("file of {len} bytes is too short for a qcow2 header of {need}")]
    Truncated {
        /// Bytes that there are.
        len: u64,
        /// Bytes that the header needs.
        need: u64,
    },
    /// Not a qcow2 image.
    #[error(
        "not a qcow2 image: it begins with {found:#010x} instead of {:#010x}",
        spec::MAGIC
    )]
    BadMagic {
        /// The first four bytes.
        found: u32,
    },
    /// Neither version 2 nor 3.
    #[error("unsupported qcow2 version {found}")]
    BadVersion {
        /// The version field.
        found: u32,
    },
    /// Cluster size outside 512 B to 2 MiB.
    #[error("unsupported cluster size: 2^{found}")]
    ClusterBits {
        /// The `cluster_bits` field.
        found: u32,
    },
    /// Extended L2 entries with subclusters smaller than a sector.
    #[error("unsupported subcluster size: clusters of 2^{found} bytes have 32 subclusters")]
    ExtendedL2ClusterBits {
        /// The `cluster_bits` field.
        found: u32,
    },
    /// Refcounts wider than 64 bits.
    #[error("refcount order {found} is too large: refcounts have at most 64 bits (order 6)")]
    RefcountOrder {
        /// The `refcount_order` field.
        found: u32,
    },
    /// Version 2 with refcounts of another width than 16 bits.
    #[error("refcount order {found} in a version 2 image, whose refcounts have 16 bits (order 4)")]
    RefcountOrderV2 {
        /// The order asked for.
        found: u32,
    },
    /// A virtual size that a signed 64-bit number cannot hold.
    #[error("virtual size {found} is too large")]
    VirtualSize {
        /// The size in bytes.
        found: u64,
    },
    /// `header_length` outside its bounds.
    #[error("header length {found} is not within {min} and the cluster size {max}")]
    HeaderLength {
        /// The `header_length` field.
        found: u32,
        /// The shortest header.
        min: u32,
        /// The cluster size.
        max: u64,
    },
    /// The backing file name does not begin within the first cluster.
    #[error("backing file name at offset {found:#x} lies outside the first cluster")]
    BackingOffset {
        /// The `backing_file_offset` field.
        found: u64,
    },
    /// The backing file name is too long, or runs out of the first cluster.
    #[error("backing file name of {found} bytes is too long: at most {max} fit at its place")]
    BackingLength {
        /// The `backing_file_size` field.
        found: u32,
        /// Most bytes there.
        max: u64,
    },
    /// Feature bits that we must not ignore.
    #[error("unsupported qcow2 feature(s): {}", names.join(", "))]
    UnknownFeatures {
        /// The bits.
        bits: u64,
        /// The name of each bit from the image's feature name table, or its number.
        names: Vec<String>,
    },
    /// A feature that we know and cannot serve.
    #[error("{feature} are not supported")]
    Unsupported {
        /// The feature's name in the plural.
        feature: &'static str,
    },
    /// An unknown number for the encryption method.
    #[error("unsupported encryption method {found}")]
    CryptMethod {
        /// The `crypt_method` field.
        found: u32,
    },
    /// The bit for a raw external data file without an external data file.
    #[error("the autoclear bit for a raw external data file needs an external data file")]
    RawDataFileMissing,
    /// The data is encrypted.
    #[error("the image is encrypted ({method}); its data cannot be read or written")]
    Encrypted {
        /// `aes` or `luks`.
        method: &'static str,
    },
    /// LUKS without the extension that says where its header is.
    #[error("the image is encrypted with LUKS but has no encryption header extension")]
    MissingCryptoHeader,
    /// An encryption header extension in an image that is not encrypted with LUKS.
    #[error("encryption header extension in an image that is not encrypted with LUKS")]
    UnexpectedCryptoHeader,
    /// An unknown compression type.
    #[error("unknown compression type {found}")]
    CompressionType {
        /// The `compression_type` field.
        found: u8,
    },
    /// Compression type and its incompatible feature bit contradict each other.
    #[error(
        "compression type is {found}, but its incompatible feature bit is {}set",
        if *bit { "" } else { "not " }
    )]
    CompressionBit {
        /// The `compression_type` field.
        found: u8,
        /// Incompatible feature bit 3.
        bit: bool,
    },
    /// An extension runs out of the space for extensions.
    #[error(
        "header extension {kind:#010x} at offset {at:#x} has {len} bytes, \
         but the extension area ends at {end:#x}"
    )]
    ExtensionTooLong {
        /// The extension's type.
        kind: u32,
        /// Offset of its header.
        at: usize,
        /// Its length field.
        len: u32,
        /// End of the space for extensions.
        end: usize,
    },
    /// An extension whose length its type does not allow.
    #[error("header extension {kind:#010x} has {len} bytes: {expected}")]
    ExtensionLength {
        /// The extension's type.
        kind: u32,
        /// Its length field.
        len: u32,
        /// What is allowed.
        expected: &'static str,
    },
    /// A field of an extension with a value that is not allowed.
    #[error("{extension} extension: {field} is {value:#x}, {expected}")]
    ExtensionField {
        /// The extension's name.
        extension: &'static str,
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        expected: &'static str,
    },
    /// A table beyond its limit.
    #[error("{table} is too large: {entries} entries, at most {max}")]
    TableTooLarge {
        /// Which table.
        table: Table,
        /// Its entries.
        entries: u64,
        /// Most entries.
        max: u64,
    },
    /// A table at an impossible place.
    #[error("{table} offset {offset} is invalid: not cluster-aligned, or its end is past 2^63")]
    TableOffset {
        /// Which table.
        table: Table,
        /// Where it should begin.
        offset: HostOffset,
    },
    /// A table that the file does not hold.
    #[error(
        "{table} at {offset} with {len} bytes lies past the end of the file of {file_len} bytes"
    )]
    TablePastEnd {
        /// Which table.
        table: Table,
        /// Where it should begin.
        offset: HostOffset,
        /// Its length in bytes.
        len: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// An L1 table that does not cover the virtual size.
    #[error("L1 table is too small: {entries} entries, but the virtual size needs {need}")]
    L1TooSmall {
        /// Its entries.
        entries: u64,
        /// Entries that the virtual size needs.
        need: u64,
    },
    /// The virtual size needs more L1 entries than anybody can use.
    #[error("image is too big: virtual size {size} needs {need} L1 entries")]
    ImageTooBig {
        /// The virtual size.
        size: u64,
        /// Entries that it needs.
        need: u64,
    },
    /// No refcount table.
    #[error("image does not contain a refcount table")]
    NoRefcountTable,
    /// The header with its extensions and names does not fit the first cluster.
    #[error("header of {need} bytes does not fit the first cluster of {have} bytes")]
    HeaderTooLarge {
        /// Bytes needed.
        need: u64,
        /// The cluster size.
        have: u64,
    },
    /// The image is marked as corrupt.
    #[error("image is marked as corrupt; it cannot be opened for writing until it is repaired")]
    Corrupt,
    /// The refcounts may be stale, and new ones do not make the image sound.
    #[error(
        "could not repair dirty image: {why}; \
         repair it with qemu-img check -r all before it is opened for writing"
    )]
    DirtyAndDamaged {
        /// The first thing that is wrong.
        why: String,
    },
    /// Lazy refcounts in a version 2 image.
    #[error("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")]
    LazyNeedsVersion3,
    /// An image that is open for reading and was not closed by its last writer.
    #[error(
        "the image was not closed properly: it has to be opened anew for writing, which repairs it"
    )]
    NeedsRepair,
    /// A broken entry in a snapshot table.
    #[error("snapshot table entry {index}: {what} is {value}, {expected}")]
    Snapshot {
        /// Index in the table.
        index: u32,
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        expected: &'static str,
    },
    /// A snapshot table that is longer than we read.
    #[error(
        "snapshot table is too large: entry {index} ends {len} bytes behind its start, at most {max}"
    )]
    SnapshotTableTooLarge {
        /// The entry that crosses the limit.
        index: u32,
        /// Where the entry ends, counted from the start of the table.
        len: u64,
        /// Most bytes.
        max: u64,
    },
    /// A broken entry in the bitmap directory.
    #[error("bitmap directory entry {index}: {what}")]
    Bitmap {
        /// Index in the directory.
        index: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// An option for a new image that cannot be had.
    #[error("{why}")]
    CreateOption {
        /// The reference's words for it.
        why: &'static str,
    },
    /// More than we are ready to give.
    #[error("{what}: {need}, at most {have}{advice}")]
    LimitExceeded {
        /// What there would be too much of.
        what: &'static str,
        /// How much.
        need: u64,
        /// Most of it, or what is left of it.
        have: u64,
        /// How the message ends: what can be done about it, or nothing.
        advice: &'static str,
    },
    /// A request that no file can serve.
    #[error("{len} bytes at offset {offset:#x} are past the greatest length of a file")]
    OutOfRange {
        /// Where it begins.
        offset: u64,
        /// Its bytes.
        len: u64,
    },
    /// A refcount table entry that the specification does not allow, met while counting `cluster`.
    #[error(
        "refcount table entry {entry:#x} for host cluster {cluster}: not the start of a cluster"
    )]
    RefcountTableEntry {
        /// The entry as read.
        entry: u64,
        /// The cluster whose count was looked for.
        cluster: HostCluster,
    },
    /// A cluster loses a reference that was never counted: the image is damaged.
    #[error("refcount of host cluster {cluster} would fall below zero")]
    RefcountUnderflow {
        /// The cluster.
        cluster: HostCluster,
    },
    /// A cluster has as many references as its refcount can say.
    #[error("refcount of host cluster {cluster} would exceed {max}")]
    RefcountOverflow {
        /// The cluster.
        cluster: HostCluster,
        /// The greatest refcount of this image.
        max: u64,
    },
    /// The refcount table has reached its limit.
    #[error(
        "the refcount table would need {bytes} bytes, at most {}",
        spec::REFCOUNT_TABLE_LEN_MAX
    )]
    RefcountTableFull {
        /// Bytes that it would need.
        bytes: u64,
    },
    /// The L1 table has reached its limit.
    #[error("the L1 table would need {bytes} bytes, at most {}", spec::L1_LEN_MAX)]
    L1TooLarge {
        /// Bytes that it would need.
        bytes: u64,
    },
    /// No host offset below the limit of the format is free.
    #[error("the image file has reached the greatest offset of the format")]
    ImageFull,
    /// A table in a cluster that counts as free: writing there would destroy it.
    #[error("{table} at host offset {host} has a refcount of zero")]
    UncountedTable {
        /// What the cluster holds.
        table: &'static str,
        /// Where it is.
        host: HostOffset,
    },
    /// A table that is in use would lose its last reference.
    #[error("{table} at host offset {host} is in use, but its last reference is given up")]
    TableInUse {
        /// What the cluster holds.
        table: &'static str,
        /// Where it is.
        host: HostOffset,
    },
    /// Two tables claim one cluster: a change of one would destroy the other.
    #[error("{table} at host offset {host} is not the only table there")]
    SharedTable {
        /// What the cluster holds, or one of both.
        table: &'static str,
        /// Where it is.
        host: HostOffset,
    },
    /// An L2 entry leads guest data over a table.
    #[error("guest data would overwrite the {table} at host offset {host}")]
    DataInTable {
        /// What the cluster holds.
        table: &'static str,
        /// Where it is.
        host: HostOffset,
    },
    /// Compressed data that does not inflate to a cluster.
    #[error("compressed cluster at host offset {host}: {why}")]
    CompressedData {
        /// First byte of the data.
        host: HostOffset,
        /// What is wrong with it.
        why: InflateError,
    },
    /// Something failed earlier that leaves memory and file in doubt.
    #[error("the image takes no more changes until it is opened again: {why}")]
    Stopped {
        /// What happened.
        why: String,
    },
    /// A table entry that the specification does not allow.
    #[error(transparent)]
    Entry(#[from] EntryError),
}

impl Error {
    /// The errno that the reference gives to a guest or caller for this.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::BadVersion { .. }
            | Self::UnknownFeatures { .. }
            | Self::Unsupported { .. }
            | Self::Encrypted { .. } => libc_errno::ENOTSUP,
            Self::TableTooLarge { .. }
            | Self::ImageTooBig { .. }
            | Self::VirtualSize { .. }
            | Self::SnapshotTableTooLarge { .. }
            | Self::LimitExceeded { .. } => libc_errno::EFBIG,
            Self::RefcountTableFull { .. } | Self::L1TooLarge { .. } | Self::ImageFull => {
                libc_errno::EFBIG
            }
            Self::Stopped { .. } => libc_errno::ENOMEDIUM,
            Self::RefcountTableEntry { .. }
            | Self::RefcountUnderflow { .. }
            | Self::RefcountOverflow { .. }
            | Self::UncountedTable { .. }
            | Self::TableInUse { .. }
            | Self::SharedTable { .. }
            | Self::CompressedData { .. }
            | Self::DataInTable { .. } => libc_errno::EIO,
            Self::HeaderTooLarge { .. } => libc_errno::ENOSPC,
            Self::Corrupt => libc_errno::EACCES,
            Self::Entry(_) => libc_errno::EIO,
            _ => libc_errno::EINVAL,
        }
    }
}

impl From<Error> for coblock_block::Error {
    #[cold]
    fn from(error: Error) -> Self {
        use coblock_block::ErrorKind;
        let kind = match (&error, error.errno()) {
            (Error::Stopped { .. }, _) => ErrorKind::Poisoned,
            (Error::Corrupt, _) => ErrorKind::ReadOnly,
            (Error::LazyNeedsVersion3, _) => ErrorKind::Invalid,
            (Error::NeedsRepair, _) => ErrorKind::NotSupported,
            (Error::CreateOption { .. }, _) => ErrorKind::Invalid,
            (_, libc_errno::ENOTSUP) => ErrorKind::NotSupported,
            (_, libc_errno::EFBIG) => ErrorKind::LimitExceeded,
            (_, libc_errno::ENOSPC) => ErrorKind::NoSpace,
            _ => ErrorKind::Corrupt,
        };
        Self::new(kind, error.to_string())
            .errno_is(error.errno())
            .caused_by(error)
    }
}

impl From<EntryError> for coblock_block::Error {
    #[cold]
    fn from(error: EntryError) -> Self {
        Error::Entry(error).into()
    }
}

/// Linux numbers, which are what guests and callers see.
mod libc_errno {
    pub const EIO: i32 = 5;
    pub const EACCES: i32 = 13;
    pub const EINVAL: i32 = 22;
    pub const EFBIG: i32 = 27;
    pub const ENOMEDIUM: i32 = 123;
    pub const ENOSPC: i32 = 28;
    pub const ENOTSUP: i32 = 95;
}
