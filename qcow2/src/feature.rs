//! Words of the header: feature bits, encryption method, compression type. qcow2 specification,
//! "Header".

bitflags::bitflags! {
    /// Features that a program must know to open the image.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Incompatible: u64 {
        /// Refcounts may be stale; they have to be rebuilt before anything is written.
        const DIRTY = 1 << 0;
        /// Metadata is known to be broken; nothing may be written.
        const CORRUPT = 1 << 1;
        /// Guest data is in another file.
        const DATA_FILE = 1 << 2;
        /// The compression type is not zlib.
        const COMPRESSION = 1 << 3;
        /// L2 entries have 16 bytes.
        const EXTENDED_L2 = 1 << 4;
    }

    /// Features that a program may ignore.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Compatible: u64 {
        /// Refcount updates may be postponed; the dirty bit says when they were.
        const LAZY_REFCOUNTS = 1 << 0;
    }

    /// Features that a program which does not know them clears when it writes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension agrees with the data.
        const BITMAPS = 1 << 0;
        /// The external data file can be read as a raw image.
        const DATA_FILE_RAW = 1 << 1;
    }
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CryptMethod {
    /// It is not.
    #[default]
    None,
    /// The old method: AES-CBC with the passphrase as key.
    Aes,
    /// LUKS, its header in the image.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CompressionType {
    /// Deflate, without a zlib header.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// Its name in messages and options.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}
