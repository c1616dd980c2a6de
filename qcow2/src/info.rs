//! What `info` tells about an image, without opening anything else.
//!
//! Only the image's own file is read: header, snapshot table, bitmap directory. Names of other
//! files are given as the image spells them, and nobody follows them here (CVE-2024-4467).

use coblock_block::Result;

use crate::bitmap::{self, Bitmap};
use crate::error::Error;
use crate::header::{Autoclear, Compatible, CompressionType, Header, Incompatible};
use crate::image_file::ImageFile;
use crate::snapshot::{Snapshot, SnapshotTable};
use crate::types::Version;

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes of the virtual disk, in whole sectors as the reference counts them.
    pub virtual_size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Version of the format; its `compat` name is in [`Version::compat`].
    pub version: Version,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// Refcount updates may be postponed. Version 3 only.
    pub lazy_refcounts: bool,
    /// Bits of a refcount. The reference tells it for version 3 only.
    pub refcount_bits: u32,
    /// Marked as corrupt. Version 3 only.
    pub corrupt: bool,
    /// Not closed properly. Version 3 only.
    pub dirty: bool,
    /// L2 entries have 16 bytes. Version 3 only.
    pub extended_l2: bool,
    /// `aes` or `luks`, when the data is encrypted.
    pub encryption: Option<&'static str>,
    /// Name of the backing file.
    pub backing_file: Option<Vec<u8>>,
    /// Its format.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file, when the image has one.
    pub data_file: Option<Vec<u8>>,
    /// The external data file can be read as a raw image.
    pub data_file_raw: bool,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Persistent dirty bitmaps.
    pub bitmaps: Vec<Bitmap>,
}

impl Info {
    /// Reads what there is to tell. Suspends.
    ///
    /// # Errors
    /// An image that the reference's `info` refuses too: a header, snapshot table or bitmap
    /// directory outside its limits, no refcount table; more memory than the file's limit; or what
    /// reading returned.
    pub fn read(file: &ImageFile<'_>) -> Result<Self> {
        let header = file.read_header()?;
        Self::of(file, &header)
    }

    /// The same for a header that was read already. Suspends.
    ///
    /// # Errors
    /// As [`Info::read`].
    pub fn of(file: &ImageFile<'_>, header: &Header) -> Result<Self> {
        if header.refcount_table_clusters == 0 {
            return Err(Error::NoRefcountTable.into());
        }
        let mut budget = file.budget_beside(header)?;
        let bitmaps = match header.bitmaps() {
            Some(extension) => bitmap::read(file, header, extension, &mut budget)?,
            None => Vec::new(),
        };
        let data_file = header.incompatible.contains(Incompatible::DATA_FILE);
        Ok(Self {
            virtual_size: header.whole_sectors(),
            cluster_size: header.geometry.cluster_size(),
            version: header.geometry.version(),
            compression: header.compression,
            lazy_refcounts: header.compatible.contains(Compatible::LAZY_REFCOUNTS),
            refcount_bits: header.geometry.refcount_bits(),
            corrupt: header.incompatible.contains(Incompatible::CORRUPT),
            dirty: header.incompatible.contains(Incompatible::DIRTY),
            extended_l2: header.incompatible.contains(Incompatible::EXTENDED_L2),
            encryption: header.encryption(),
            backing_file: header.backing_file.clone(),
            backing_format: header.backing_format().map(<[u8]>::to_vec),
            data_file: header.data_file().filter(|_| data_file).map(<[u8]>::to_vec),
            data_file_raw: data_file && header.autoclear.contains(Autoclear::DATA_FILE_RAW),
            snapshots: SnapshotTable::read(file, header, &mut budget)?.snapshots,
            bitmaps,
        })
    }
}
