//! The table of internal snapshots.
//!
//! ```text
//!    0 L1 offset        8 L1 entries     12 length of id    14 length of name
//!   16 seconds         20 nanoseconds    24 guest clock     32 size of the VM state
//!   36 length of extra data
//!   40 extra data: 64-bit size of the VM state, virtual size, instruction count, unknown
//!   .. id, name, zeros up to a multiple of 8
//! ```
//!
//! Entries have different lengths and the header knows only how many there are, so a table can only
//! be read from its start. An L1 table that a snapshot keeps is checked when it is used, not here:
//! listing an image must not depend on it. qcow2 specification, "Snapshots".

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

use crate::budget::Budget;
use crate::error::{Error, Result, Table};
use crate::fields::{be16, be32, be64, bytes};
use crate::header::Header;
use crate::image_file::{ImageFile, Window};
use crate::spec;
use crate::types::{Geometry, HostOffset, Version};

/// Bytes of extra data that hold fields which a version 3 image must have.
const EXTRA_V3: usize = 16;
/// Most bytes of one entry: fixed part, extra data, id, name, padding.
const ENTRY_LEN_MAX: usize =
    spec::SNAPSHOT_HEADER_LEN + spec::SNAPSHOT_EXTRA_LEN_MAX as usize + 2 * 0xffff + 8;

const _: () = assert!(ENTRY_LEN_MAX <= Window::LEN, "a window holds any entry");

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table begins, as the table says; see [`Snapshot::check_l1`].
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its id, unique in the image.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub date_seconds: u32,
    /// When it was taken: nanoseconds of the second.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of VM state that it keeps behind the end of the disk; 0: the disk only.
    pub vm_state_size: u64,
    /// Virtual size of the disk then; `None` in an entry that does not tell, where it is the
    /// image's size.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, where they were counted.
    pub icount: Option<u64>,
    /// Extra data behind these, kept as it is.
    pub unknown_extra: Vec<u8>,
    /// Length of all extra data in the table.
    pub extra_len: u32,
}

impl Snapshot {
    /// Reads the entry at the start of `data`; also its length without padding.
    ///
    /// What is missing at the end of `data` counts as zeros, as behind the end of a file.
    ///
    /// # Errors
    /// More extra data than we keep.
    pub fn decode(data: &[u8], index: u32) -> Result<(Self, usize)> {
        let extra_len = be32(data, 36);
        if extra_len > spec::SNAPSHOT_EXTRA_LEN_MAX {
            return Err(Error::Snapshot {
                index,
                what: "length of extra data",
                value: extra_len.into(),
                expected: "at most 1024 are supported",
            });
        }
        let extra = bytes(data, spec::SNAPSHOT_HEADER_LEN, extra_len as usize);
        let (id_len, name_len) = (usize::from(be16(data, 12)), usize::from(be16(data, 14)));
        // Each is bounded by its width, and `extra_len` above.
        let id_at = spec::SNAPSHOT_HEADER_LEN.saturating_add(extra.len());
        let name_at = id_at.saturating_add(id_len);
        let end = name_at.saturating_add(name_len);
        let extra_field =
            |at: usize| (extra.len() >= at.saturating_add(8)).then(|| be64(&extra, at));
        let icount = extra_field(16).filter(|count| *count != u64::MAX);
        let snapshot = Self {
            l1_offset: HostOffset(be64(data, 0)),
            l1_entries: be32(data, 8),
            id: bytes(data, id_at, id_len),
            name: bytes(data, name_at, name_len),
            date_seconds: be32(data, 16),
            date_nanoseconds: be32(data, 20),
            vm_clock_nanoseconds: be64(data, 24),
            vm_state_size: extra_field(0).unwrap_or_else(|| be32(data, 32).into()),
            disk_size: extra_field(8),
            icount,
            unknown_extra: extra.get(24..).unwrap_or_default().to_vec(),
            extra_len,
        };
        Ok((snapshot, end))
    }

    /// Its id and name as text, up to a zero byte, as the reference tells them.
    #[must_use]
    pub fn id_and_name(&self) -> (String, String) {
        let text = |bytes: &[u8]| {
            let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        (text(&self.id), text(&self.name))
    }

    /// Bytes of memory that it takes in a list with room for more.
    const fn memory(&self) -> u64 {
        let texts = self.id.len().saturating_add(self.name.len());
        let more = texts.saturating_add(self.unknown_extra.len());
        size_of::<Self>().saturating_mul(2).saturating_add(more) as u64
    }

    /// Whether the entry has the fields that an image of this version must give.
    #[must_use]
    pub const fn is_complete(&self, version: Version) -> bool {
        matches!(version, Version::V2) || self.extra_len as usize >= EXTRA_V3
    }

    /// Checks the place and size of the snapshot's L1 table; needed before anything uses it.
    ///
    /// # Errors
    /// More than 32 MiB, not cluster-aligned, or an end past 2^63.
    pub fn check_l1(&self, index: u32, geometry: Geometry) -> Result<()> {
        let table = Table::SnapshotL1(index);
        let (entries, offset) = (u64::from(self.l1_entries), self.l1_offset);
        let max = spec::L1_LEN_MAX / spec::TABLE_ENTRY_LEN;
        if !geometry.is_aligned(offset.get()) {
            return Err(Error::TableOffset { table, offset });
        }
        if entries > max {
            return Err(Error::TableTooLarge {
                table,
                entries,
                max,
            });
        }
        let len = entries.saturating_mul(spec::TABLE_ENTRY_LEN);
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end.get() > spec::OFFSET_MAX) {
            return Err(Error::TableOffset { table, offset });
        }
        Ok(())
    }
}

/// All snapshots of an image.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// Bytes that the table fills, with the padding between entries but not behind the last.
    pub len: u64,
}

impl SnapshotTable {
    /// Reads the table that `header` points to, in memory out of `budget`. May suspend.
    ///
    /// # Errors
    /// A table of more than 64 MiB, an entry that [`Snapshot::decode`] refuses, more memory than is
    /// left, or what reading returned.
    pub fn read(
        file: &ImageFile<'_>,
        header: &Header,
        budget: &mut Budget,
    ) -> coblock_block::Result<Self> {
        let mut table = Self::default();
        let mut window = Window::new(*file, header.snapshots_offset.get());
        for index in 0..header.snapshots {
            let at = table.len.next_multiple_of(8);
            let (snapshot, len) = Snapshot::decode(window.at(at, ENTRY_LEN_MAX)?, index)?;
            table.len = at.saturating_add(len as u64);
            if table.len > spec::SNAPSHOT_TABLE_LEN_MAX {
                let (len, max) = (table.len, spec::SNAPSHOT_TABLE_LEN_MAX);
                return Err(Error::SnapshotTableTooLarge { index, len, max }.into());
            }
            let need = snapshot.memory();
            budget.take("bytes of memory for the snapshot table", need)?;
            table.snapshots.push(snapshot);
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry as the reference writes it.
    fn entry(extra: &[u8], id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&0x9_0000_u64.to_be_bytes());
        out.extend_from_slice(&2_u32.to_be_bytes());
        out.extend_from_slice(&u16::try_from(id.len()).unwrap().to_be_bytes());
        out.extend_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        out.extend_from_slice(&1_700_000_000_u32.to_be_bytes());
        out.extend_from_slice(&500_u32.to_be_bytes());
        out.extend_from_slice(&77_u64.to_be_bytes());
        out.extend_from_slice(&12_u32.to_be_bytes());
        out.extend_from_slice(&u32::try_from(extra.len()).unwrap().to_be_bytes());
        out.extend_from_slice(extra);
        out.extend_from_slice(id);
        out.extend_from_slice(name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    #[test]
    fn fields() {
        let mut extra = Vec::new();
        for value in [1_u64 << 40, 1 << 30, u64::MAX] {
            extra.extend_from_slice(&value.to_be_bytes());
        }
        extra.extend_from_slice(b"later");
        let data = entry(&extra, b"17", b"before update");
        let (snapshot, len) = Snapshot::decode(&data, 0).unwrap();
        assert_eq!(len.next_multiple_of(8), data.len());
        assert_eq!(
            (snapshot.l1_offset, snapshot.l1_entries),
            (HostOffset(0x9_0000), 2)
        );
        assert_eq!(
            (&*snapshot.id, &*snapshot.name),
            (&b"17"[..], &b"before update"[..])
        );
        assert_eq!(
            (snapshot.date_seconds, snapshot.date_nanoseconds),
            (1_700_000_000, 500)
        );
        assert_eq!(
            (snapshot.vm_clock_nanoseconds, snapshot.vm_state_size),
            (77, 1 << 40)
        );
        assert_eq!((snapshot.disk_size, snapshot.icount), (Some(1 << 30), None));
        assert_eq!(snapshot.unknown_extra, b"later");
        assert!(snapshot.is_complete(Version::V3));
    }

    #[test]
    fn extra_data() {
        for (name, len, vm_state_size, disk_size, complete) in [
            ("none", 0, 12, None, false),
            ("a part of a field", 7, 12, None, false),
            ("VM state only", 8, 0, None, false),
            ("both", 16, 0, Some(0), true),
            ("most", 1024, 0, Some(0), true),
        ] {
            let data = entry(&vec![0; len], b"1", b"");
            let (snapshot, _) = Snapshot::decode(&data, 0).unwrap();
            assert_eq!(snapshot.vm_state_size, vm_state_size, "{name}");
            assert_eq!(snapshot.disk_size, disk_size, "{name}");
            assert_eq!(snapshot.is_complete(Version::V3), complete, "{name}");
            assert!(snapshot.is_complete(Version::V2), "{name}");
        }
        let too_much = Snapshot::decode(&entry(&[0; 1025], b"1", b""), 4).unwrap_err();
        assert!(matches!(
            too_much,
            Error::Snapshot {
                index: 4,
                value: 1025,
                ..
            }
        ));
    }

    /// CVE-2014-0143 and -0145: the L1 table of a snapshot at the limits.
    #[test]
    fn l1_limits() {
        let g = Geometry::new(Version::V3, 16, 4, 1 << 30).unwrap();
        let mut snapshot = Snapshot::decode(&entry(&[0; 16], b"1", b""), 0).unwrap().0;
        for (name, entries, offset, good) in [
            ("as it is", 2, 0x9_0000, true),
            ("greatest", 4 << 20, 0x9_0000, true),
            ("one more", (4 << 20) + 1, 0x9_0000, false),
            ("all ones", u32::MAX, 0x9_0000, false),
            ("not aligned", 2, 0x9_0200, false),
            ("ends at 2^63", 2, (1 << 63) - 0x1_0000, true),
            ("ends past 2^63", 0x4000, (1 << 63) - 0x1_0000, false),
            ("negative", 0, 1 << 63, false),
        ] {
            (snapshot.l1_entries, snapshot.l1_offset) = (entries, HostOffset(offset));
            assert_eq!(snapshot.check_l1(0, g).is_ok(), good, "{name}");
        }
    }

    /// A table of entries cut anywhere decodes without reading past its end.
    #[test]
    fn cut_short() {
        let data = entry(&[1; 24], b"id", b"name");
        for len in 0..data.len() {
            let _ = Snapshot::decode(&data[..len], 0).unwrap();
        }
    }
}
