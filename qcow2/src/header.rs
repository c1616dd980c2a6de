//! The header: the first cluster of an image.
//!
//! ```text
//!     0 magic "QFI\xfb"                 4 version, 2 or 3
//!     8 backing file name: offset      16 its length           20 cluster_bits
//!    24 virtual size                   32 encryption           36 L1 entries     40 L1 offset
//!    48 refcount table offset          56 its clusters         60 snapshots      64 snapshot table offset
//!    72 incompatible features          80 compatible           88 autoclear      96 refcount_order   100 header_length
//!   104 compression type              105 fields that we do not know, up to header_length
//!   ... header extensions, backing file name
//! ```
//!
//! Decoding checks all that the header alone can tell; [`Header::validate`] adds what needs the
//! length of the file, and [`Header::ensure_readable`] and [`Header::ensure_writable`] what forbids
//! a use. Encoding gives the first cluster again, with unknown fields and extensions as they were.
//! qcow2 specification, "Header".

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

use crate::error::{Error, Result, Table};
use crate::extension::{self, BitmapsHeader, CryptoHeader, Extension, FeatureKind, FeatureName};
use crate::fields::{be8, be32, be64, bytes};
use crate::spec;
use crate::types::{Geometry, HostOffset, Version};

pub use crate::feature::{Autoclear, Compatible, CompressionType, CryptMethod, Incompatible};

/// The header and its extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sizes, version and virtual size.
    pub geometry: Geometry,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table begins.
    pub l1_offset: HostOffset,
    /// Where the refcount table begins.
    pub refcount_table_offset: HostOffset,
    /// Its clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table begins.
    pub snapshots_offset: HostOffset,
    /// Features that a program must know; always empty in version 2.
    pub incompatible: Incompatible,
    /// Features that a program may ignore; always empty in version 2.
    pub compatible: Compatible,
    /// Features that a program may have to clear; always empty in version 2.
    pub autoclear: Autoclear,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// `header_length`: 72 in version 2, at least 104 in version 3.
    pub header_len: u32,
    /// Bytes 105 to `header_len`: padding, and fields of a later specification. Kept as they are.
    pub unknown_fields: Vec<u8>,
    /// Header extensions in their order.
    pub extensions: Vec<Extension>,
    /// Name of the backing file, as the image spells it.
    pub backing_file: Option<Vec<u8>>,
}

impl Header {
    /// How many bytes from the start of the file [`Header::decode`] wants: one cluster.
    ///
    /// `start` are the first bytes of the file, at least 24.
    ///
    /// # Errors
    /// Not a qcow2 image, or a cluster size outside its limits.
    pub fn len_to_read(start: &[u8]) -> Result<usize> {
        Self::magic_and_version(start)?;
        let cluster_bits = be32(start, 20);
        if !(spec::CLUSTER_BITS_MIN..=spec::CLUSTER_BITS_MAX).contains(&cluster_bits) {
            return Err(Error::ClusterBits {
                found: cluster_bits,
            });
        }
        Ok(1 << cluster_bits)
    }

    fn magic_and_version(start: &[u8]) -> Result<Version> {
        let need = u64::from(spec::HEADER_LEN_V2);
        let len = start.len() as u64;
        if len < 8 {
            return Err(Error::Truncated { len, need });
        }
        let found = be32(start, 0);
        if found != spec::MAGIC {
            return Err(Error::BadMagic { found });
        }
        match be32(start, 4) {
            2 => Ok(Version::V2),
            3 => Ok(Version::V3),
            found => Err(Error::BadVersion { found }),
        }
    }

    /// Reads a header from the first cluster of an image.
    ///
    /// When the file is shorter, what is missing behind the fixed part counts as zeros.
    ///
    /// # Errors
    /// Any field outside the limits of `docs/qcow2-layout.md`, and incompatible features that we do
    /// not know, by the names that the image gives them. A feature that we know but cannot serve is
    /// left to [`Header::ensure_readable`], a missing refcount table to [`Header::validate`].
    pub fn decode(cluster: &[u8]) -> Result<Self> {
        let version = Self::magic_and_version(cluster)?;
        let (need, refcount_order) = match version {
            Version::V2 => (spec::HEADER_LEN_V2, spec::REFCOUNT_ORDER_V2),
            Version::V3 => (spec::HEADER_LEN_V3_MIN, be32(cluster, 96)),
        };
        let len = cluster.len() as u64;
        if len < need.into() {
            return Err(Error::Truncated {
                len,
                need: need.into(),
            });
        }
        let cluster_len = Self::len_to_read(cluster)?;
        let cluster = cluster.get(..cluster_len).unwrap_or(cluster);

        let (features, header_len) = match version {
            Version::V2 => ([0; 3], spec::HEADER_LEN_V2),
            Version::V3 => (
                [be64(cluster, 72), be64(cluster, 80), be64(cluster, 88)],
                be32(cluster, 100),
            ),
        };
        if header_len < need || header_len as usize > cluster_len {
            let (min, max) = (need, cluster_len as u64);
            return Err(Error::HeaderLength {
                found: header_len,
                min,
                max,
            });
        }
        let (backing, extensions_end) = Self::backing_place(cluster, cluster_len)?;
        let extensions = |start: u32| extension::decode(cluster, start as usize, extensions_end);

        let incompatible = Incompatible::from_bits(features[0]).ok_or_else(|| {
            let bits = features[0] & !Incompatible::all().bits();
            // Extensions that cannot be read give no names; the bits are the error to report.
            Error::UnknownFeatures {
                bits,
                names: feature_bit_names(bits, &extensions(header_len).unwrap_or_default()),
            }
        })?;
        let mut geometry = Geometry::new(
            version,
            be32(cluster, 20),
            refcount_order,
            be64(cluster, 24),
        )?;
        if incompatible.contains(Incompatible::EXTENDED_L2) {
            geometry = geometry.with_extended_l2()?;
        }
        let crypt_method = match be32(cluster, 32) {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            found => return Err(Error::CryptMethod { found }),
        };
        // Offset 104 belongs to the extensions where the header is shorter.
        let compression = if header_len > spec::HEADER_LEN_V3_MIN {
            be8(cluster, 104)
        } else {
            0
        };
        let bit = incompatible.contains(Incompatible::COMPRESSION);
        let compression = match compression {
            found if (found != 0) != bit => return Err(Error::CompressionBit { found, bit }),
            0 => CompressionType::Zlib,
            1 => CompressionType::Zstd,
            found => return Err(Error::CompressionType { found }),
        };
        let unknown_at = spec::HEADER_LEN_V3_MIN.saturating_add(1);
        let unknown_len = header_len.saturating_sub(unknown_at) as usize;

        let header = Self {
            geometry,
            crypt_method,
            l1_entries: be32(cluster, 36),
            l1_offset: HostOffset(be64(cluster, 40)),
            refcount_table_offset: HostOffset(be64(cluster, 48)),
            refcount_table_clusters: be32(cluster, 56),
            snapshots: be32(cluster, 60),
            snapshots_offset: HostOffset(be64(cluster, 64)),
            incompatible,
            compatible: Compatible::from_bits_retain(features[1]),
            autoclear: Autoclear::from_bits_retain(features[2]),
            compression,
            header_len,
            unknown_fields: bytes(cluster, unknown_at as usize, unknown_len),
            extensions: extensions(header_len)?,
            backing_file: backing,
        };
        header.check_tables()?;
        header.check_extensions()?;
        Ok(header)
    }

    /// The backing file name, and where the space for extensions ends.
    fn backing_place(cluster: &[u8], cluster_len: usize) -> Result<(Option<Vec<u8>>, usize)> {
        let (offset, len) = (be64(cluster, 8), be32(cluster, 16));
        if offset == 0 {
            return Ok((None, cluster_len));
        }
        let at = usize::try_from(offset).ok().filter(|at| *at <= cluster_len);
        let Some(at) = at else {
            return Err(Error::BackingOffset { found: offset });
        };
        let max = cluster_len
            .saturating_sub(at)
            .min(spec::BACKING_NAME_LEN_MAX as usize);
        if len as usize > max {
            return Err(Error::BackingLength {
                found: len,
                max: max as u64,
            });
        }
        Ok(((len > 0).then(|| bytes(cluster, at, len as usize)), at))
    }

    /// Limits of the tables that fields point to.
    fn check_tables(&self) -> Result<()> {
        let geometry = self.geometry;
        let clusters = u64::from(self.refcount_table_clusters);
        self.check_table(
            Table::Refcount,
            self.refcount_table_offset,
            clusters.saturating_mul(geometry.cluster_size() / spec::TABLE_ENTRY_LEN),
            spec::TABLE_ENTRY_LEN,
            spec::REFCOUNT_TABLE_LEN_MAX / spec::TABLE_ENTRY_LEN,
        )?;
        self.check_table(
            Table::Snapshots,
            self.snapshots_offset,
            self.snapshots.into(),
            spec::SNAPSHOT_HEADER_LEN as u64,
            spec::SNAPSHOTS_MAX.into(),
        )?;
        let entries = u64::from(self.l1_entries);
        self.check_table(
            Table::ActiveL1,
            self.l1_offset,
            entries,
            spec::TABLE_ENTRY_LEN,
            spec::L1_LEN_MAX / spec::TABLE_ENTRY_LEN,
        )?;
        let need = geometry.l1_entries();
        if need > spec::L1_ENTRIES_MAX {
            return Err(Error::ImageTooBig {
                size: geometry.virtual_size(),
                need,
            });
        }
        if entries < need {
            return Err(Error::L1TooSmall { entries, need });
        }
        Ok(())
    }

    fn check_table(
        &self,
        table: Table,
        offset: HostOffset,
        entries: u64,
        entry_len: u64,
        max: u64,
    ) -> Result<()> {
        if entries > max {
            return Err(Error::TableTooLarge {
                table,
                entries,
                max,
            });
        }
        // At most 32 MiB.
        let len = entries.saturating_mul(entry_len);
        let ends = offset
            .checked_add(len)
            .is_some_and(|end| end.get() <= spec::OFFSET_MAX);
        if !ends || !self.geometry.is_aligned(offset.get()) {
            return Err(Error::TableOffset { table, offset });
        }
        Ok(())
    }

    /// Limits of what extensions say, where the header says that they count.
    fn check_extensions(&self) -> Result<()> {
        if let Some(crypto) = self.crypto_header() {
            if self.crypt_method != CryptMethod::Luks {
                return Err(Error::UnexpectedCryptoHeader);
            }
            if !self.geometry.is_aligned(crypto.offset.get()) {
                return Err(Error::ExtensionField {
                    extension: "encryption header",
                    field: "offset",
                    value: crypto.offset.get(),
                    expected: "must be a multiple of the cluster size",
                });
            }
        } else if self.crypt_method == CryptMethod::Luks {
            return Err(Error::MissingCryptoHeader);
        }
        match self.bitmaps() {
            Some(bitmaps) => bitmaps.validate(self.geometry),
            None => Ok(()),
        }
    }

    /// Checks what needs the length of the file: that the tables without which nothing can be read
    /// are there.
    ///
    /// Guest data past the end of the file is legal (it reads as zeros), a table there is a file
    /// cut short.
    ///
    /// # Errors
    /// No refcount table, or an L1 or refcount table past the end of the file.
    pub fn validate(&self, file_len: u64) -> Result<()> {
        if self.refcount_table_clusters == 0 {
            return Err(Error::NoRefcountTable);
        }
        let l1_len = u64::from(self.l1_entries).saturating_mul(spec::TABLE_ENTRY_LEN);
        // The table may end with zeros that nobody wrote: its first entry has to be there.
        for (table, offset, len, least) in [
            (Table::ActiveL1, self.l1_offset, l1_len, l1_len),
            (
                Table::Refcount,
                self.refcount_table_offset,
                u64::from(self.refcount_table_clusters)
                    .saturating_mul(self.geometry.cluster_size()),
                spec::TABLE_ENTRY_LEN,
            ),
        ] {
            if least > 0 && offset.get().saturating_add(least) > file_len {
                return Err(Error::TablePastEnd {
                    table,
                    offset,
                    len,
                    file_len,
                });
            }
        }
        Ok(())
    }

    /// Whether guest data can be read.
    ///
    /// # Errors
    /// The image is encrypted, keeps its data elsewhere, or has extended L2 entries.
    pub fn ensure_readable(&self) -> Result<()> {
        if let Some(method) = self.encryption() {
            return Err(Error::Encrypted { method });
        }
        self.ensure_standard_metadata()?;
        if self.incompatible.contains(Incompatible::DATA_FILE) {
            return Err(Error::Unsupported {
                feature: "images with an external data file",
            });
        }
        Ok(())
    }

    /// Whether guest data and metadata can be written.
    ///
    /// # Errors
    /// As [`Header::ensure_readable`], and for an image that is marked as corrupt. A dirty one gets
    /// new refcounts first.
    pub fn ensure_writable(&self) -> Result<()> {
        self.ensure_readable()?;
        if self.incompatible.contains(Incompatible::CORRUPT) {
            return Err(Error::Corrupt);
        }
        Ok(())
    }

    /// Whether mapping tables have the entries that [`crate::entry`] reads.
    ///
    /// # Errors
    /// The image has extended L2 entries.
    pub fn ensure_standard_metadata(&self) -> Result<()> {
        if self.incompatible.contains(Incompatible::EXTENDED_L2) {
            return Err(Error::Unsupported {
                feature: "extended L2 entries",
            });
        }
        Ok(())
    }

    /// Whether guest data is in the image itself.
    ///
    /// # Errors
    /// The image has an external data file, or calls one raw that it has not.
    pub fn ensure_data_in_file(&self) -> Result<()> {
        if self.incompatible.contains(Incompatible::DATA_FILE) {
            return Err(Error::Unsupported {
                feature: "images with an external data file",
            });
        }
        if self.autoclear.contains(Autoclear::DATA_FILE_RAW) {
            return Err(Error::RawDataFileMissing);
        }
        Ok(())
    }

    /// Bytes of the virtual disk in whole sectors: what the reference works with.
    #[must_use]
    pub const fn whole_sectors(&self) -> u64 {
        self.geometry.virtual_size() & !(spec::SECTOR_LEN - 1)
    }

    /// Name of the encryption method, if there is one.
    #[must_use]
    pub const fn encryption(&self) -> Option<&'static str> {
        match self.crypt_method {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        }
    }

    /// Name of the backing file's format, if the image gives one.
    #[must_use]
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions
            .iter()
            .rev()
            .find_map(|extension| match extension {
                Extension::BackingFormat(name) => Some(name.as_slice()),
                _ => None,
            })
    }

    /// Name of the external data file, if the image gives one.
    #[must_use]
    pub fn data_file(&self) -> Option<&[u8]> {
        self.extensions
            .iter()
            .rev()
            .find_map(|extension| match extension {
                Extension::DataFile(name) => Some(name.as_slice()),
                _ => None,
            })
    }

    /// Where the LUKS header is.
    #[must_use]
    pub fn crypto_header(&self) -> Option<CryptoHeader> {
        self.extensions
            .iter()
            .rev()
            .find_map(|extension| match extension {
                Extension::CryptoHeader(header) => Some(*header),
                _ => None,
            })
    }

    /// The bitmaps extension, when the autoclear bit says that it is valid.
    #[must_use]
    pub fn bitmaps(&self) -> Option<BitmapsHeader> {
        let valid = self.autoclear.contains(Autoclear::BITMAPS);
        self.extensions
            .iter()
            .rev()
            .filter(|_| valid)
            .find_map(|extension| match extension {
                Extension::Bitmaps(header) => Some(*header),
                _ => None,
            })
    }

    /// The header's fixed part, extensions and backing file name.
    ///
    /// The name goes right behind the extensions, wherever it was; the rest of the cluster is
    /// zeros.
    ///
    /// # Errors
    /// `HeaderTooLarge` when they do not fit one cluster, `BackingLength` for a name that is too
    /// long.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let geometry = self.geometry;
        let cluster_size = geometry.cluster_size();
        let v3 = geometry.version() == Version::V3;
        let mut tail = Vec::new();
        extension::encode(&self.extensions, &mut tail);
        let name = self.backing_file.as_deref().unwrap_or_default();
        let end_of = |tail: &[u8]| (self.header_len as usize).saturating_add(tail.len());
        // The end mark; extensions and a name that fill the cluster to its end need none.
        if end_of(&tail).saturating_add(name.len()).saturating_add(8) as u64 <= cluster_size {
            tail.extend_from_slice(&[0; 8]);
        }
        let name_at = end_of(&tail);
        let need = name_at.saturating_add(name.len()) as u64;
        if need > cluster_size {
            return Err(Error::HeaderTooLarge {
                need,
                have: cluster_size,
            });
        }
        let name_len = u32::try_from(name.len()).unwrap_or(u32::MAX);
        if name_len > spec::BACKING_NAME_LEN_MAX {
            let max = spec::BACKING_NAME_LEN_MAX.into();
            return Err(Error::BackingLength {
                found: name_len,
                max,
            });
        }
        let backing_offset = if name.is_empty() { 0 } else { name_at as u64 };

        let mut out = Vec::with_capacity(geometry.cluster_len());
        put32(&mut out, spec::MAGIC);
        put32(&mut out, geometry.version().number());
        put64(&mut out, backing_offset);
        put32(&mut out, name_len);
        put32(&mut out, geometry.cluster_bits());
        put64(&mut out, geometry.virtual_size());
        put32(&mut out, self.crypt_method as u32);
        put32(&mut out, self.l1_entries);
        put64(&mut out, self.l1_offset.get());
        put64(&mut out, self.refcount_table_offset.get());
        put32(&mut out, self.refcount_table_clusters);
        put32(&mut out, self.snapshots);
        put64(&mut out, self.snapshots_offset.get());
        if v3 {
            put64(&mut out, self.incompatible.bits());
            put64(&mut out, self.compatible.bits());
            put64(&mut out, self.autoclear.bits());
            put32(&mut out, geometry.refcount_order());
            put32(&mut out, self.header_len);
            if self.header_len > spec::HEADER_LEN_V3_MIN {
                out.push(self.compression as u8);
                out.extend_from_slice(&self.unknown_fields);
            }
        }
        assert_eq!(
            out.len(),
            self.header_len as usize,
            "header_len tells another length"
        );
        out.extend_from_slice(&tail);
        out.extend_from_slice(name);
        out.resize(geometry.cluster_len(), 0);
        Ok(out)
    }
}

/// The name of each bit, from the image's own table where it has one.
fn feature_bit_names(bits: u64, extensions: &[Extension]) -> Vec<String> {
    let names: Vec<FeatureName> = extensions
        .iter()
        .flat_map(|extension| match extension {
            Extension::FeatureNames(names) => names.clone(),
            // The reference reads names from a table whose last entry is cut short, too.
            Extension::Unknown {
                kind: spec::EXT_FEATURE_NAMES,
                data,
            } => extension::decode_names(data).collect(),
            _ => Vec::new(),
        })
        .collect();
    (0..64_u8)
        .filter(|bit| bits & 1_u64.wrapping_shl((*bit).into()) != 0)
        .map(|bit| {
            names
                .iter()
                .find(|name| name.kind == FeatureKind::INCOMPATIBLE && name.bit == bit)
                .map_or_else(
                    || format!("incompatible feature bit {bit}"),
                    |name| name.text(),
                )
        })
        .collect()
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}
