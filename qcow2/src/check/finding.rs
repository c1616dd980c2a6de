//! What a check finds, in the words of `qemu-img check`.

use std::fmt;

use crate::error::Error;
use crate::types::{HostCluster, HostOffset};

/// How bad a finding is: which count of the report it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Guest data can be lost or changed.
    Corruption,
    /// Space is lost, nothing else.
    Leak,
    /// Something could not be checked.
    CheckError,
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A snapshot table entry without fields that version 3 demands.
    SnapshotIncomplete {
        /// Index in the table.
        index: u32,
    },
    /// The L1 table of a snapshot is too large or at an impossible place.
    SnapshotL1 {
        /// Id and name.
        snapshot: String,
        /// What is wrong.
        error: Error,
    },
    /// Something refers to a place behind the file.
    PastEnd {
        /// Where it begins.
        offset: HostOffset,
        /// Its bytes.
        len: u64,
    },
    /// A cluster has more references than its refcount can tell.
    Overflow {
        /// Where the cluster begins.
        offset: HostOffset,
    },
    /// An L1 entry with bits that must be zero.
    L1Reserved {
        /// The entry.
        entry: u64,
    },
    /// An L2 table that does not begin at a cluster.
    L2Unaligned {
        /// Where it begins.
        offset: HostOffset,
    },
    /// An L2 table that could not be read.
    L2Unreadable {
        /// Where it begins.
        offset: HostOffset,
        /// Why.
        error: String,
    },
    /// An L2 entry with bits that must be zero.
    L2Reserved {
        /// The entry.
        entry: u64,
    },
    /// A compressed cluster that claims it may be written in place.
    CompressedCopied {
        /// Where the compressed data begins.
        offset: HostOffset,
    },
    /// A data cluster that does not begin at a cluster.
    DataUnaligned {
        /// Where it begins.
        offset: HostOffset,
        /// It is kept for a cluster that reads as zeros.
        zero: bool,
    },
    /// An L1 entry whose copied flag contradicts the refcount of the L2 table.
    L1Copied {
        /// Slot in the table.
        index: u64,
        /// The entry.
        entry: u64,
        /// The refcount on disk.
        refcount: u64,
    },
    /// An L2 entry whose copied flag contradicts the refcount of the data cluster.
    L2Copied {
        /// The entry.
        entry: u64,
        /// The refcount on disk.
        refcount: u64,
    },
    /// A broken entry of a bitmap table.
    BitmapTableEntry {
        /// The entry.
        entry: u64,
    },
    /// A refcount table entry with bits that must be zero.
    RefcountTableReserved {
        /// Slot in the table.
        index: u64,
    },
    /// A refcount block that does not begin at a cluster.
    RefcountBlockUnaligned {
        /// Slot in the table.
        index: u64,
    },
    /// A refcount block behind the file.
    RefcountBlockPastEnd {
        /// Slot in the table.
        index: u64,
    },
    /// Something else refers to a refcount block too.
    RefcountBlockShared {
        /// Slot in the table.
        index: u64,
        /// References.
        references: u64,
    },
    /// Refcounts that could not be read.
    RefcountUnreadable {
        /// The first such cluster.
        cluster: HostCluster,
        /// How many there are from there on.
        clusters: u64,
    },
    /// A refcount below the number of references: the cluster may be given away while it is used.
    RefcountTooSmall {
        /// The cluster.
        cluster: HostCluster,
        /// The refcount on disk.
        refcount: u64,
        /// References that were found.
        references: u64,
    },
    /// A refcount above the number of references: the cluster is lost for use.
    Leaked {
        /// The cluster.
        cluster: HostCluster,
        /// The refcount on disk.
        refcount: u64,
        /// References that were found.
        references: u64,
    },
}

impl Finding {
    /// Which count of the report it goes to.
    #[must_use]
    pub const fn severity(&self) -> Severity {
        match self {
            Self::Leaked { .. } => Severity::Leak,
            Self::RefcountUnreadable { .. } | Self::L2Unreadable { .. } => Severity::CheckError,
            _ => Severity::Corruption,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SnapshotIncomplete { index } => {
                write!(f, "ERROR snapshot table entry {index} is incomplete")
            }
            Self::SnapshotL1 { snapshot, error } => {
                write!(f, "ERROR snapshot {snapshot} ")?;
                match error {
                    Error::TableTooLarge { entries, .. } => {
                        write!(f, "l1_size={entries:#x}: L1 table is too large")
                    }
                    Error::TableOffset { offset, .. } => {
                        write!(f, "l1_offset={offset}: L1 table is not cluster aligned")
                    }
                    error => write!(f, "{error}"),
                }?;
                f.write_str("; snapshot table entry corrupted")
            }
            Self::PastEnd { offset, len } => write!(
                f,
                "ERROR: counting reference for region exceeding the end of the file \
                 by one cluster or more: offset {offset} size {len:#x}"
            ),
            Self::Overflow { offset } => write!(
                f,
                "ERROR: overflow cluster offset={offset}\n\
                 Use qemu-img amend to increase the refcount entry width or qemu-img convert to create \
                 a clean copy if the image cannot be opened for writing"
            ),
            Self::L1Reserved { entry } => {
                write!(f, "ERROR found L1 entry with reserved bits set: {entry:x}")
            }
            Self::L2Unaligned { offset } => write!(
                f,
                "ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted",
                offset.get()
            ),
            Self::L2Unreadable { offset, error } => {
                write!(f, "ERROR: I/O error in L2 table at {offset}: {error}")
            }
            Self::L2Reserved { entry } => {
                write!(f, "ERROR found l2 entry with reserved bits set: {entry:x}")
            }
            Self::CompressedCopied { offset } => write!(
                f,
                "ERROR: coffset={offset}: copied flag must never be set for compressed clusters"
            ),
            Self::DataUnaligned { offset, zero: true } => write!(
                f,
                "ERROR offset={:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
                offset.get()
            ),
            Self::DataUnaligned {
                offset,
                zero: false,
            } => write!(
                f,
                "ERROR offset={:x}: Data cluster is not properly aligned; L2 entry corrupted.",
                offset.get()
            ),
            Self::L1Copied {
                index,
                entry,
                refcount,
            } => write!(
                f,
                "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} \
                 refcount={refcount}"
            ),
            Self::L2Copied { entry, refcount } => {
                write!(
                    f,
                    "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"
                )
            }
            Self::BitmapTableEntry { entry } => {
                write!(f, "ERROR bitmap table entry {entry:x} is invalid")
            }
            Self::RefcountTableReserved { index } => {
                write!(
                    f,
                    "ERROR refcount table entry {index} has reserved bits set"
                )
            }
            Self::RefcountBlockUnaligned { index } => write!(
                f,
                "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ),
            Self::RefcountBlockPastEnd { index } => {
                write!(f, "ERROR refcount block {index} is outside image")
            }
            Self::RefcountBlockShared { index, references } => {
                write!(f, "ERROR refcount block {index} refcount={references}")
            }
            Self::RefcountUnreadable {
                cluster,
                clusters: 1,
            } => {
                write!(
                    f,
                    "Can't get refcount for cluster {cluster}: Input/output error"
                )
            }
            Self::RefcountUnreadable { cluster, clusters } => write!(
                f,
                "Can't get refcount for {clusters} clusters from {cluster} on: Input/output error"
            ),
            Self::RefcountTooSmall {
                cluster,
                refcount,
                references,
            } => {
                write!(
                    f,
                    "ERROR cluster {cluster} refcount={refcount} reference={references}"
                )
            }
            Self::Leaked {
                cluster,
                refcount,
                references,
            } => {
                write!(
                    f,
                    "Leaked cluster {cluster} refcount={refcount} reference={references}"
                )
            }
        }
    }
}
