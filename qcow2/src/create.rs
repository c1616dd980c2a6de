//! Makes a new image.
//!
//! Tables first, header last: a file that was cut off before is not mistaken for an image. The
//! bytes are those that the reference writes for the same options, see [`crate::layout`].

use coblock_block::{ErrorKind, Result};

use crate::error::Error;
use crate::extension::{Extension, feature_names};
use crate::header::{Autoclear, Compatible, CompressionType, CryptMethod, Header, Incompatible};
use crate::image_file::ImageFile;
use crate::layout::{Layout, PIECE};
use crate::spec;
use crate::types::{Geometry, HostOffset, Version, index};

pub use coblock_block::Preallocation;

/// What a new image is to be like; [`CreateOptions::new`] has the reference's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the virtual disk; rounded up to whole sectors.
    pub virtual_size: u64,
    /// Version of the format.
    pub version: Version,
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a refcount: a power of two, 1 to 64; 16 in version 2.
    pub refcount_bits: u64,
    /// How clusters are to be compressed; zlib in version 2.
    pub compression: CompressionType,
    /// Refcount updates may be postponed; not in version 2.
    pub lazy_refcounts: bool,
    /// Name of the backing file, written as it is.
    pub backing_file: Option<Vec<u8>>,
    /// Its format.
    pub backing_format: Option<Vec<u8>>,
    /// Which clusters it has from the start.
    pub preallocation: Preallocation,
}

/// Options of the reference's `create -o` that we refuse, with the words of the refusal.
const REFUSED: [(&str, &str); 5] = [
    ("encryption", "encrypted images"),
    ("encrypt", "encrypted images"),
    ("extended_l2", "extended L2 entries"),
    ("data_file", "images with an external data file"),
    ("data_file_raw", "images with an external data file"),
];

impl CreateOptions {
    /// An image of that size with the reference's defaults: version 3, 64 KiB, 16 bits, nothing
    /// preallocated.
    #[must_use]
    pub const fn new(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            version: Version::V3,
            cluster_size: 65536,
            refcount_bits: 16,
            compression: CompressionType::Zlib,
            lazy_refcounts: false,
            backing_file: None,
            backing_format: None,
            preallocation: Preallocation::Off,
        }
    }

    /// Why an option of the reference's `create -o` that has no field here cannot be had; `None`
    /// for others.
    ///
    /// The caller asks only when the option is given, and on.
    #[must_use]
    pub fn refusal(option: &str) -> Option<Error> {
        let group = option.split('.').next().unwrap_or(option);
        let (_, feature) = REFUSED.iter().find(|(name, _)| *name == group)?;
        Some(Error::Unsupported { feature })
    }

    /// Checks the options against each other.
    ///
    /// # Errors
    /// Names the option, in the reference's words.
    pub fn geometry(&self) -> std::result::Result<Geometry, Error> {
        let wrong = |why: &'static str| Err(Error::CreateOption { why });
        let cluster_bits = self.cluster_size.trailing_zeros();
        let cluster_bits_good =
            (spec::CLUSTER_BITS_MIN..=spec::CLUSTER_BITS_MAX).contains(&cluster_bits);
        if !self.cluster_size.is_power_of_two() || !cluster_bits_good {
            return wrong("Cluster size must be a power of two between 512 and 2048k");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return wrong("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.version == Version::V2 {
            if self.refcount_bits != 16 {
                return wrong(
                    "Different refcount widths than 16 bits require compatibility level 1.1 or \
                     above (use version=v3 or greater)",
                );
            }
            if self.lazy_refcounts {
                return wrong(
                    "Lazy refcounts only supported with compatibility level 1.1 and above \
                     (use version=v3 or greater)",
                );
            }
            if self.compression != CompressionType::Zlib {
                return wrong(
                    "Non-zlib compression type is only supported with compatibility level 1.1 and \
                     above (use version=v3 or greater)",
                );
            }
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return wrong("Backing format cannot be used without backing file");
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off {
            return wrong("Backing file and preallocation cannot be used at the same time");
        }
        if let Some(format) = &self.backing_format
            && format.len() > spec::BACKING_FORMAT_LEN_MAX
        {
            return wrong("Backing format has more than 15 bytes");
        }
        let size = self.virtual_size.checked_next_multiple_of(spec::SECTOR_LEN);
        let Some(size) = size else {
            return Err(Error::VirtualSize {
                found: self.virtual_size,
            });
        };
        Geometry::new(
            self.version,
            cluster_bits,
            self.refcount_bits.trailing_zeros(),
            size,
        )
    }

    fn header(&self, geometry: Geometry, layout: Layout) -> Header {
        let v3 = self.version == Version::V3;
        let mut incompatible = Incompatible::empty();
        incompatible.set(
            Incompatible::COMPRESSION,
            self.compression != CompressionType::Zlib,
        );
        let mut compatible = Compatible::empty();
        compatible.set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        let format = self
            .backing_format
            .iter()
            .map(|name| Extension::BackingFormat(name.clone()));
        // As in the reference, a small first cluster is kept for names and extensions that somebody
        // needs.
        let names =
            (v3 && self.cluster_size > 4096).then(|| Extension::FeatureNames(feature_names()));
        Header {
            geometry,
            crypt_method: CryptMethod::None,
            l1_entries: layout.l1_entries(),
            // A disk of no size has no table.
            l1_offset: if layout.l1_entries() == 0 {
                HostOffset(0)
            } else {
                layout.l1_offset()
            },
            refcount_table_offset: layout.refcount_table_offset(),
            refcount_table_clusters: layout.refcount_table_clusters(),
            snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible,
            compatible,
            autoclear: Autoclear::empty(),
            compression: self.compression,
            header_len: if v3 {
                spec::HEADER_LEN_V3
            } else {
                spec::HEADER_LEN_V2
            },
            unknown_fields: if v3 { vec![0; 7] } else { Vec::new() },
            extensions: format.chain(names).collect(),
            backing_file: self.backing_file.clone(),
        }
    }
}

/// Makes an image in `file`, whatever was there. Suspends; everything is on stable storage when it
/// returns.
///
/// # Errors
/// An option that is wrong or too large, a device that is too short, or what writing returned. What
/// is left then has no header, so it is no image.
pub fn create(file: &ImageFile<'_>, options: &CreateOptions) -> Result<()> {
    let geometry = options.geometry()?;
    let layout = Layout::plan(geometry, options.preallocation != Preallocation::Off)?;
    let header = options.header(geometry, layout).encode()?;

    // The reference's file ends with the last table, even inside a cluster.
    let l1_len = u64::from(layout.l1_entries()) * spec::TABLE_ENTRY_LEN;
    let end_of_l1 = layout.l1_offset().get() + l1_len;
    let more = layout.l2_tables() > 0 || layout.refcount_blocks() > 1;
    let len = if more {
        layout.clusters() * geometry.cluster_size()
    } else {
        end_of_l1
    };
    resize(file, len)?;

    let mut out = Pieces {
        file,
        at: layout.l1_offset().get(),
        pending: Vec::new(),
    };
    out.put(layout.l1_offset(), &layout.l1_table())?;
    for table in 0..layout.l2_tables() {
        out.put(layout.l2_offset(table), &layout.l2_table(table))?;
    }
    for block in 0..layout.refcount_blocks() {
        out.put(
            layout.refcount_block_offset(block),
            &layout.refcount_block(block),
        )?;
    }
    out.put(layout.refcount_table_offset(), &layout.refcount_table())?;
    out.write()?;
    let (data, data_len) = layout.data();
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc if data_len > 0 => file.write_zeroes(data.get(), data_len)?,
        Preallocation::Full | Preallocation::Falloc => {
            let zeros = vec![0; index(PIECE)];
            let mut at = 0;
            while at < data_len {
                let piece = PIECE.min(data_len - at);
                file.write(data.get() + at, &zeros[..index(piece)])?;
                at += piece;
            }
        }
    }
    file.flush()?;
    file.write(0, &header)?;
    file.flush()
}

/// Empties the file and makes it `len` bytes long; a device has to be long enough.
fn resize(file: &ImageFile<'_>, len: u64) -> Result<()> {
    match file.truncate(0).and_then(|()| file.truncate(len)) {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            let have = file.len();
            if have < len {
                return Err(Error::LimitExceeded {
                    what: "bytes of the device",
                    need: len,
                    have,
                    advice: "",
                }
                .into());
            }
            // No header of an older image while the new one is not ready.
            file.write(0, &[0; 512])?;
            file.flush()
        }
        result => result,
    }
}

/// Tables that follow each other in the file, written together.
struct Pieces<'a> {
    file: &'a ImageFile<'a>,
    /// Where `pending` belongs.
    at: u64,
    pending: Vec<u8>,
}

impl Pieces<'_> {
    fn put(&mut self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        let next = self.at + self.pending.len() as u64;
        if offset.get() != next || self.pending.len() as u64 >= PIECE {
            self.write()?;
            self.at = offset.get();
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        for piece in self.pending.chunks(index(PIECE)) {
            self.file.write(self.at, piece)?;
            self.at += piece.len() as u64;
        }
        self.pending.clear();
        Ok(())
    }
}
