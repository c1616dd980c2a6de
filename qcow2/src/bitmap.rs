//! The directory of persistent dirty bitmaps.
//!
//! ```text
//!    0 table offset    8 table entries    12 flags    16 type    17 granularity bits
//!   18 length of name 20 length of extra data         24 extra data, name, zeros up to a multiple of 8
//! ```
//!
//! Bitmaps are listed and counted, never loaded. qcow2 specification, "Bitmaps".

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::extension::BitmapsHeader;
use crate::fields::{be8, be16, be32, be64, bytes};
use crate::header::Header;
use crate::image_file::{ImageFile, Window};
use crate::spec;
use crate::types::{Geometry, HostOffset};

/// Most bytes of an entry that [`Bitmap::decode`] does not refuse, and more: fixed part, name,
/// padding.
const ENTRY_LEN_MAX: usize = spec::BITMAP_HEADER_LEN + 0xffff + 8;

/// Bytes of memory of one in a list with room for more, without its name.
const ENTRY_MEMORY: usize = 2 * size_of::<Bitmap>();

bitflags::bitflags! {
    /// Flags of a bitmap.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct BitmapFlags: u32 {
        /// Not saved after its last use: its bits cannot be trusted.
        const IN_USE = 1 << 0;
        /// It has to follow every write.
        const AUTO = 1 << 1;
        /// Extra data that is not known may be ignored.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where its table begins.
    pub table_offset: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// Its flags.
    pub flags: BitmapFlags,
    /// Logarithm of the bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Its name.
    pub name: Vec<u8>,
}

impl Bitmap {
    /// Reads the entry at the start of `data`; also its length with padding.
    ///
    /// # Errors
    /// A field outside its limits, or an entry that runs past the end of the directory.
    pub fn decode(data: &[u8], number: u32, geometry: Geometry) -> Result<(Self, usize)> {
        let wrong = |what| {
            Err(Error::Bitmap {
                index: number,
                what,
            })
        };
        if data.len() < spec::BITMAP_HEADER_LEN {
            return wrong("the directory ends inside its fields");
        }
        let extra_len = be32(data, 20);
        let name_len = usize::from(be16(data, 18));
        if extra_len != 0 {
            return wrong("extra data is not supported");
        }
        let name_at = spec::BITMAP_HEADER_LEN;
        let len = name_at.saturating_add(name_len).next_multiple_of(8);
        if len > data.len() {
            return wrong("it runs past the end of the directory");
        }
        let bitmap = Self {
            table_offset: HostOffset(be64(data, 0)),
            table_entries: be32(data, 8),
            flags: BitmapFlags::from_bits_retain(be32(data, 12)),
            granularity_bits: be8(data, 17),
            name: bytes(data, name_at, name_len),
        };
        if !(BitmapFlags::IN_USE | BitmapFlags::AUTO).contains(bitmap.flags) {
            return wrong("reserved flags are set");
        }
        if be8(data, 16) != 1 {
            return wrong("its type is not supported");
        }
        if name_len == 0 || name_len > usize::from(spec::BITMAP_NAME_LEN_MAX) {
            return wrong("its name has no bytes or more than 1023");
        }
        let granularity = spec::BITMAP_GRANULARITY_BITS_MIN..=spec::BITMAP_GRANULARITY_BITS_MAX;
        if !granularity.contains(&bitmap.granularity_bits) {
            return wrong("its granularity is not within 512 B and 2 GiB");
        }
        let offset = bitmap.table_offset.get();
        if offset == 0 || !geometry.is_aligned(offset) {
            return wrong("its table is not cluster-aligned");
        }
        if bitmap.table_entries == 0 || bitmap.table_entries > spec::BITMAP_TABLE_ENTRIES_MAX {
            return wrong("its table has no entries or more than 2^27");
        }
        let memory = u64::from(bitmap.table_entries).saturating_mul(geometry.cluster_size());
        if memory > spec::BITMAP_MEMORY_MAX {
            return wrong("its bits need more than 512 MiB");
        }
        let covers = memory.saturating_mul(8).saturating_mul(
            1_u64
                .checked_shl(bitmap.granularity_bits.into())
                .unwrap_or(u64::MAX),
        );
        if covers < geometry.virtual_size() {
            return wrong("its table does not cover the disk");
        }
        Ok((bitmap, len))
    }
}

impl Bitmap {
    /// Bytes of its table.
    #[must_use]
    pub const fn table_len(&self) -> u64 {
        (self.table_entries as u64).saturating_mul(spec::TABLE_ENTRY_LEN)
    }

    /// Entries of the table of a bitmap of this granularity.
    #[must_use]
    pub fn entries_needed(&self, geometry: Geometry) -> u64 {
        let granularity = 1_u64
            .checked_shl(self.granularity_bits.into())
            .unwrap_or(u64::MAX);
        geometry
            .clusters(geometry.virtual_size().div_ceil(granularity).div_ceil(8))
            .get()
    }

    /// Calls `f` with each entry of its table that is in the file; what is behind the end counts as
    /// zeros. May suspend.
    ///
    /// # Errors
    /// What reading or `f` returned.
    pub(crate) fn for_each_entry(
        &self,
        file: &ImageFile<'_>,
        mut f: impl FnMut(u64) -> coblock_block::Result<()>,
    ) -> coblock_block::Result<()> {
        let offset = self.table_offset.get();
        let len = self.table_len().min(file.len().saturating_sub(offset));
        let mut window = Window::new(*file, offset);
        let mut at = 0_u64;
        while at < len {
            let data = window.at(at, size_of::<u64>())?;
            let rest = usize::try_from(len.saturating_sub(at)).unwrap_or(usize::MAX);
            for entry in data.chunks_exact(8).take(rest.div_ceil(8)) {
                f(be64(entry, 0))?;
                at = at.saturating_add(spec::TABLE_ENTRY_LEN);
            }
        }
        Ok(())
    }
}

/// What an entry of a bitmap's table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All bits are clear.
    Zeros,
    /// All bits are set.
    Ones,
    /// The bits are in a cluster.
    Data(HostOffset),
}

impl BitmapTableEntry {
    /// Reads an entry; `None`: reserved bits, or a cluster that is not aligned.
    #[must_use]
    pub const fn decode(entry: u64, geometry: Geometry) -> Option<Self> {
        if entry & 0xff00_0000_0000_01fe != 0 {
            return None;
        }
        let offset = entry & spec::ENTRY_OFFSET_MASK;
        match (offset, entry & 1) {
            (0, 0) => Some(Self::Zeros),
            (0, _) => Some(Self::Ones),
            (offset, 0) if geometry.is_aligned(offset) => Some(Self::Data(HostOffset(offset))),
            _ => None,
        }
    }
}

/// Reads the bitmap directory, in memory out of `budget`, and looks at the tables of the bitmaps
/// that can be trusted. May suspend.
///
/// # Errors
/// An entry that [`Bitmap::decode`] refuses, entries that do not fill the directory, a table of
/// another size than the disk needs or with a broken entry, tables too large to look at, more
/// memory than is left, or what reading returned.
pub fn read(
    file: &ImageFile<'_>,
    header: &Header,
    extension: BitmapsHeader,
    budget: &mut Budget,
) -> coblock_block::Result<Vec<Bitmap>> {
    let bitmaps = read_directory(file, header, extension, budget)?;
    let bytes = bitmaps
        .iter()
        .map(Bitmap::table_len)
        .fold(0, u64::saturating_add);
    if bytes > spec::BITMAP_TABLES_LEN_MAX {
        return Err(Error::LimitExceeded {
            what: "bytes of all bitmap tables",
            need: bytes,
            have: spec::BITMAP_TABLES_LEN_MAX,
            advice: "",
        }
        .into());
    }
    for (number, bitmap) in (0_u32..).zip(&bitmaps) {
        if bitmap.flags.contains(BitmapFlags::IN_USE) {
            continue;
        }
        let wrong = |what| {
            Err(Error::Bitmap {
                index: number,
                what,
            }
            .into())
        };
        if u64::from(bitmap.table_entries) != bitmap.entries_needed(header.geometry) {
            return wrong("its table has another size than the disk needs");
        }
        let mut good = true;
        bitmap.for_each_entry(file, |entry| {
            good &= BitmapTableEntry::decode(entry, header.geometry).is_some();
            Ok(())
        })?;
        if !good {
            return wrong("its table has a broken entry");
        }
    }
    Ok(bitmaps)
}

/// Reads the bitmap directory, and nothing that it refers to.
fn read_directory(
    file: &ImageFile<'_>,
    header: &Header,
    extension: BitmapsHeader,
    budget: &mut Budget,
) -> coblock_block::Result<Vec<Bitmap>> {
    let wrong = |index, what| Err(Error::Bitmap { index, what }.into());
    // Checked with the header: at most 64 MiB; and never more than the file holds.
    let (offset, len) = (extension.directory_offset.get(), extension.directory_len);
    if offset.checked_add(len).is_none_or(|end| end > file.len()) {
        return wrong(0, "the directory is past the end of the file");
    }
    let mut window = Window::new(*file, offset);
    let mut out = Vec::new();
    let mut at = 0_u64;
    while at < len {
        let number = u32::try_from(out.len()).unwrap_or(u32::MAX);
        if number == extension.count {
            return wrong(number, "more than the header promises");
        }
        let need = len.saturating_sub(at).min(ENTRY_LEN_MAX as u64);
        let data = window.at(at, usize::try_from(need).unwrap_or(ENTRY_LEN_MAX))?;
        let data = data
            .get(..usize::try_from(need).unwrap_or(ENTRY_LEN_MAX))
            .unwrap_or(data);
        let (bitmap, entry_len) = Bitmap::decode(data, number, header.geometry)?;
        let need = ENTRY_MEMORY.saturating_add(bitmap.name.len());
        budget.take("bytes of memory for the bitmap directory", need as u64)?;
        out.push(bitmap);
        at = at.saturating_add(entry_len as u64);
    }
    if out.len() as u64 != u64::from(extension.count) {
        let number = u32::try_from(out.len()).unwrap_or(u32::MAX);
        return wrong(number, "less than the header promises");
    }
    Ok(out)
}
