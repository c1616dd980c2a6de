//! Header extensions: optional data between the header's fixed part and the backing file name.
//!
//! ```text
//!   | type (4) | length (4) | data (length) | zeros up to a multiple of 8 |   ...   | 0 | 0 |
//! ```
//!
//! Those that we do not know are kept as they are and written back; so are the order and any
//! repetition. qcow2 specification, "Header extensions".

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

use crate::error::{Error, Result};
use crate::fields::{array, be32, be64, bytes};
use crate::spec;
use crate::types::{Geometry, HostOffset};

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Name of the backing file's format.
    BackingFormat(Vec<u8>),
    /// Names of feature bits, for messages.
    FeatureNames(Vec<FeatureName>),
    /// Where the LUKS header is.
    CryptoHeader(CryptoHeader),
    /// Where the directory of persistent dirty bitmaps is.
    Bitmaps(BitmapsHeader),
    /// Name of the external data file.
    DataFile(Vec<u8>),
    /// Something that we do not know.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its data, without padding.
        data: Vec<u8>,
    },
}

/// The group that a feature bit belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureKind(pub u8);

impl FeatureKind {
    /// Unknown bits forbid to open the image.
    pub const INCOMPATIBLE: Self = Self(0);
    /// Unknown bits can be ignored.
    pub const COMPATIBLE: Self = Self(1);
    /// Unknown bits are cleared when the image is opened for writing.
    pub const AUTOCLEAR: Self = Self(2);
}

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// Which group of bits.
    pub kind: FeatureKind,
    /// Which bit.
    pub bit: u8,
    /// Its name: up to 46 bytes, then zeros.
    pub name: [u8; 46],
}

impl FeatureName {
    /// An entry that we write.
    ///
    /// # Panics
    /// A name of more than 46 bytes.
    #[must_use]
    pub fn new(kind: FeatureKind, bit: u8, name: &str) -> Self {
        assert!(
            name.len() <= 46,
            "feature names have at most 46 bytes: {name}"
        );
        Self {
            kind,
            bit,
            name: array(name.as_bytes(), 0),
        }
    }

    /// The name up to its first zero.
    #[must_use]
    pub fn text(&self) -> String {
        let text = self
            .name
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }
}

/// Full disk encryption header pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Where the LUKS header begins; cluster-aligned.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub len: u64,
}

/// Bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsHeader {
    /// Number of bitmaps in the directory.
    pub count: u32,
    /// Must be zero; kept to be written back where the extension is not valid.
    pub reserved: u32,
    /// Length of the directory in bytes.
    pub directory_len: u64,
    /// Where the directory begins; cluster-aligned.
    pub directory_offset: HostOffset,
}

impl BitmapsHeader {
    /// Checks the fields; done only when the autoclear bit says that the extension is valid.
    ///
    /// # Errors
    /// Names the field that breaks its limit.
    pub fn validate(&self, geometry: Geometry) -> Result<()> {
        let wrong = |field, value, expected| {
            Err(Error::ExtensionField {
                extension: "bitmaps",
                field,
                value,
                expected,
            })
        };
        if self.reserved != 0 {
            return wrong("reserved field", self.reserved.into(), "must be zero");
        }
        if self.count > spec::BITMAPS_MAX {
            return wrong(
                "number of bitmaps",
                self.count.into(),
                "at most 65535 are allowed",
            );
        }
        if self.count == 0 {
            return wrong("number of bitmaps", 0, "at least one is needed");
        }
        let offset = self.directory_offset.get();
        if !geometry.is_aligned(offset) || offset == 0 {
            return wrong(
                "directory offset",
                offset,
                "must be a multiple of the cluster size",
            );
        }
        if self.directory_len > spec::BITMAP_DIRECTORY_LEN_MAX {
            return wrong(
                "directory size",
                self.directory_len,
                "at most 64 MiB are allowed",
            );
        }
        let least = u64::from(self.count).saturating_mul(spec::BITMAP_HEADER_LEN as u64);
        if self.directory_len < least {
            return wrong(
                "directory size",
                self.directory_len,
                "its entries need more",
            );
        }
        Ok(())
    }
}

/// Reads the extensions between `start` and `end` of the first cluster.
///
/// # Errors
/// An extension that runs past `end`, or whose length its type does not allow.
pub fn decode(cluster: &[u8], start: usize, end: usize) -> Result<Vec<Extension>> {
    let mut out = Vec::new();
    let mut at = start;
    while let Some(data_at) = at.checked_add(8).filter(|data_at| *data_at <= end) {
        let (kind, len) = (be32(cluster, at), be32(cluster, at.saturating_add(4)));
        if kind == spec::EXT_END {
            break;
        }
        let room = end.saturating_sub(data_at);
        let size = usize::try_from(len).ok().filter(|size| *size <= room);
        let Some(size) = size else {
            return Err(Error::ExtensionTooLong { kind, at, len, end });
        };
        out.push(decode_one(kind, bytes(cluster, data_at, size), len)?);
        // Below `end` but for the padding, and `end` is at most a cluster.
        at = data_at.saturating_add(size.next_multiple_of(8));
    }
    Ok(out)
}

fn decode_one(kind: u32, data: Vec<u8>, len: u32) -> Result<Extension> {
    let wrong = |expected| {
        Err(Error::ExtensionLength {
            kind,
            len,
            expected,
        })
    };
    Ok(match kind {
        spec::EXT_BACKING_FORMAT if data.len() > spec::BACKING_FORMAT_LEN_MAX => {
            return wrong("a backing format name has less than 16");
        }
        spec::EXT_BACKING_FORMAT => Extension::BackingFormat(data),
        // A table whose last entry is cut short has names too, but goes back as it came.
        spec::EXT_FEATURE_NAMES if !data.len().is_multiple_of(spec::FEATURE_NAME_LEN) => {
            Extension::Unknown { kind, data }
        }
        spec::EXT_FEATURE_NAMES => Extension::FeatureNames(decode_names(&data).collect()),
        spec::EXT_CRYPTO_HEADER if data.len() != spec::CRYPTO_HEADER_EXT_LEN => {
            return wrong("an encryption header pointer has exactly 16");
        }
        spec::EXT_CRYPTO_HEADER => Extension::CryptoHeader(CryptoHeader {
            offset: HostOffset(be64(&data, 0)),
            len: be64(&data, 8),
        }),
        spec::EXT_BITMAPS if data.len() != spec::BITMAPS_EXT_LEN => {
            return wrong("a bitmaps extension has exactly 24");
        }
        spec::EXT_BITMAPS => Extension::Bitmaps(BitmapsHeader {
            count: be32(&data, 0),
            reserved: be32(&data, 4),
            directory_len: be64(&data, 8),
            directory_offset: HostOffset(be64(&data, 16)),
        }),
        spec::EXT_DATA_FILE => Extension::DataFile(data),
        _ => Extension::Unknown { kind, data },
    })
}

/// The entries of a feature name table; zeros follow a last one that is cut short.
pub(crate) fn decode_names(data: &[u8]) -> impl Iterator<Item = FeatureName> {
    data.chunks(spec::FEATURE_NAME_LEN)
        .map(|entry| FeatureName {
            kind: FeatureKind(entry.first().copied().unwrap_or(u8::MAX)),
            bit: entry.get(1).copied().unwrap_or(u8::MAX),
            name: array(entry, 2),
        })
}

/// Appends the extensions; `out` ends at a multiple of 8 before and after. The end mark is the
/// caller's.
pub fn encode(extensions: &[Extension], out: &mut Vec<u8>) {
    for extension in extensions {
        let (kind, data) = encode_one(extension);
        out.extend_from_slice(&kind.to_be_bytes());
        // Read from, or checked against, a cluster of at most 2 MiB; a longer one fails in the
        // caller, which compares the whole header with the cluster size.
        out.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(&data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

fn encode_one(extension: &Extension) -> (u32, Vec<u8>) {
    match extension {
        Extension::BackingFormat(name) => (spec::EXT_BACKING_FORMAT, name.clone()),
        Extension::FeatureNames(names) => {
            let mut data = Vec::new();
            for name in names {
                data.extend_from_slice(&[name.kind.0, name.bit]);
                data.extend_from_slice(&name.name);
            }
            (spec::EXT_FEATURE_NAMES, data)
        }
        Extension::CryptoHeader(header) => {
            let mut data = header.offset.get().to_be_bytes().to_vec();
            data.extend_from_slice(&header.len.to_be_bytes());
            (spec::EXT_CRYPTO_HEADER, data)
        }
        Extension::Bitmaps(header) => {
            let mut data = header.count.to_be_bytes().to_vec();
            data.extend_from_slice(&header.reserved.to_be_bytes());
            data.extend_from_slice(&header.directory_len.to_be_bytes());
            data.extend_from_slice(&header.directory_offset.get().to_be_bytes());
            (spec::EXT_BITMAPS, data)
        }
        Extension::DataFile(name) => (spec::EXT_DATA_FILE, name.clone()),
        Extension::Unknown { kind, data } => (*kind, data.clone()),
    }
}

/// The feature name table that we write: every bit of the specification.
#[must_use]
pub fn feature_names() -> Vec<FeatureName> {
    use FeatureKind as Kind;
    [
        (Kind::INCOMPATIBLE, 0, "dirty bit"),
        (Kind::INCOMPATIBLE, 1, "corrupt bit"),
        (Kind::INCOMPATIBLE, 2, "external data file"),
        (Kind::INCOMPATIBLE, 3, "compression type"),
        (Kind::INCOMPATIBLE, 4, "extended L2 entries"),
        (Kind::COMPATIBLE, 0, "lazy refcounts"),
        (Kind::AUTOCLEAR, 0, "bitmaps"),
        (Kind::AUTOCLEAR, 1, "raw external data"),
    ]
    .into_iter()
    .map(|(kind, bit, name)| FeatureName::new(kind, bit, name))
    .collect()
}
