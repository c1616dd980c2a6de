//! Constants of the qcow2 specification, and the limits that we put on fields the specification
//! leaves open.
//!
//! Names follow the specification; every bound of the second half is a row of
//! `docs/qcow2-layout.md`. Nothing here computes anything.

/// `QFI\xfb`, the first four bytes of an image. qcow2 specification, "Header".
pub const MAGIC: u32 = 0x5146_49fb;

/// Bytes of the fixed part of a version 2 header; where its extensions begin.
pub const HEADER_LEN_V2: u32 = 72;
/// Bytes of a version 3 header without the compression type: the shortest `header_length`.
pub const HEADER_LEN_V3_MIN: u32 = 104;
/// Bytes of a version 3 header with the compression type and its padding: what we write.
pub const HEADER_LEN_V3: u32 = 112;

/// Byte offset of the virtual size.
pub const HEADER_AT_SIZE: u64 = 24;
/// Byte offset of `l1_size` in the header; `l1_table_offset` follows it, so both change in one
/// 12-byte write.
pub const HEADER_AT_L1_SIZE: u64 = 36;
/// Byte offset of `refcount_table_offset`; `refcount_table_clusters` follows it, so both change in
/// one 12-byte write.
pub const HEADER_AT_REFCOUNT_TABLE: u64 = 48;
/// Byte offset of `nb_snapshots`; `snapshots_offset` follows it, so both change in one 12-byte
/// write.
pub const HEADER_AT_SNAPSHOTS: u64 = 60;
/// Byte offset of the incompatible feature bits (version 3).
pub const HEADER_AT_INCOMPATIBLE: u64 = 72;
/// Byte offset of the autoclear feature bits (version 3).
pub const HEADER_AT_AUTOCLEAR: u64 = 88;

/// Header extension: end of the extension area.
pub const EXT_END: u32 = 0x0000_0000;
/// Header extension: backing file format name.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: feature name table.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: bitmaps.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Header extension: full disk encryption header pointer.
pub const EXT_CRYPTO_HEADER: u32 = 0x0537_be77;
/// Header extension: external data file name.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Bytes of one entry of the feature name table: type, bit number, name.
pub const FEATURE_NAME_LEN: usize = 48;
/// Bytes of the full disk encryption header pointer.
pub const CRYPTO_HEADER_EXT_LEN: usize = 16;
/// Bytes of the bitmaps extension.
pub const BITMAPS_EXT_LEN: usize = 24;

/// L1 and standard L2 entries: host offset, bits 9 to 55.
pub const ENTRY_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L1 and L2 entries: the refcount is exactly one, so the cluster may be written in place.
pub const ENTRY_COPIED: u64 = 1 << 63;
/// L2 entries: compressed cluster descriptor.
pub const L2_COMPRESSED: u64 = 1 << 62;
/// Standard L2 entries, version 3: the cluster reads as zeros.
pub const L2_ZERO: u64 = 1;
/// L1 entries: bits that must be zero.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Standard L2 entries: bits that must be zero (bit 0 is [`L2_ZERO`], reserved too in version 2).
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Refcount table entries: bits that must be zero.
pub const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;
/// First host offset that no L1 or L2 entry can hold.
pub const HOST_OFFSET_END: u64 = 1 << 56;

/// Bytes of an L1 entry, and of a refcount table entry.
pub const TABLE_ENTRY_LEN: u64 = 8;
/// Bytes of a sector, the unit of compressed lengths.
pub const SECTOR_LEN: u64 = 512;

/// Smallest accepted `cluster_bits`: 512 B.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Greatest accepted `cluster_bits`: 2 MiB.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Smallest `cluster_bits` with extended L2 entries: 32 subclusters of 512 B.
pub const CLUSTER_BITS_MIN_EXTENDED_L2: u32 = 14;
/// Greatest accepted `refcount_order`: 64-bit refcounts.
pub const REFCOUNT_ORDER_MAX: u32 = 6;
/// `refcount_order` of every version 2 image: 16-bit refcounts.
pub const REFCOUNT_ORDER_V2: u32 = 4;
/// Longest backing file name, in bytes.
pub const BACKING_NAME_LEN_MAX: u32 = 1023;
/// Longest backing format name, in bytes.
pub const BACKING_FORMAT_LEN_MAX: usize = 15;
/// Greatest L1 table, in bytes.
pub const L1_LEN_MAX: u64 = 32 << 20;
/// Most L1 entries that a size may ask for: the reference counts them in a C `int`.
pub const L1_ENTRIES_MAX: u64 = i32::MAX as u64;
/// Greatest refcount table, in bytes.
pub const REFCOUNT_TABLE_LEN_MAX: u64 = 8 << 20;
/// Most snapshots.
pub const SNAPSHOTS_MAX: u32 = 65_536;
/// Greatest snapshot table, in bytes.
pub const SNAPSHOT_TABLE_LEN_MAX: u64 = 64 << 20;
/// Most bytes of extra data that a snapshot may carry.
pub const SNAPSHOT_EXTRA_LEN_MAX: u32 = 1024;
/// Bytes of the fixed part of a snapshot table entry.
pub const SNAPSHOT_HEADER_LEN: usize = 40;
/// Most bitmaps.
pub const BITMAPS_MAX: u32 = 65_535;
/// Greatest bitmap directory, in bytes.
pub const BITMAP_DIRECTORY_LEN_MAX: u64 = 64 << 20;
/// Bytes of the fixed part of a bitmap directory entry.
pub const BITMAP_HEADER_LEN: usize = 24;
/// Most entries of a bitmap table.
pub const BITMAP_TABLE_ENTRIES_MAX: u32 = 0x0800_0000;
/// Most bytes of the tables of all bitmaps that are looked at: the bits of 2 TiB of bitmaps with
/// the usual clusters.
pub const BITMAP_TABLES_LEN_MAX: u64 = 256 << 20;
/// Most bytes that the bits of one bitmap may need in memory.
pub const BITMAP_MEMORY_MAX: u64 = 0x2000_0000;
/// Smallest granularity of a bitmap, as a power of two: 512 B.
pub const BITMAP_GRANULARITY_BITS_MIN: u8 = 9;
/// Greatest granularity of a bitmap, as a power of two: 2 GiB.
pub const BITMAP_GRANULARITY_BITS_MAX: u8 = 31;
/// Longest bitmap name, in bytes.
pub const BITMAP_NAME_LEN_MAX: u16 = 1023;
/// Greatest length or offset of anything: a signed 64-bit number must hold it.
pub const OFFSET_MAX: u64 = i64::MAX as u64;
/// Most clusters of a file that is checked: the reference counts them in a C `int`.
pub const CHECK_CLUSTERS_MAX: u64 = i32::MAX as u64;
