//! What the host says about an open file: which one it is, how long, and what alignment it wants.

use super::queue::Queue;
use crate::error::{Error, ErrorKind, Result};
use crate::types::FileId;
use coblock_aio::{AlignedBuf, Medium};
use rustix::fs::{AtFlags, FileType, StatxFlags};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// What was found out about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) id: FileId,
    pub(super) len: u64,
    pub(super) is_block_device: bool,
    /// What zero requests and discards are multiples of, in bytes: sectors of a device, 1 in a
    /// file.
    pub(super) sector: u64,
    /// Of a device.
    pub(super) queue: Queue,
}

impl Found {
    /// Do writes past the end gain by space that was set aside?
    pub(super) fn grows(&self, medium: Medium) -> bool {
        !self.is_block_device && medium != Medium::Memory
    }
}

/// Alignment of offsets and lengths, and of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) request: u64,
    pub(super) memory: usize,
}

/// Looks at a file that was just opened.
///
/// # Errors
/// What the host says. `None`: neither a regular file nor a block device.
pub(super) fn look(file: &File) -> Result<Option<Found>> {
    let stat = rustix::fs::fstat(file).map_err(|errno| Error::from_io("fstat", errno.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some(Found {
            id: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            len: length(file, false)?,
            is_block_device: false,
            sector: 1,
            queue: Queue::default(),
        })),
        FileType::BlockDevice => Ok(Some(Found {
            id: FileId {
                device: stat.st_rdev,
                inode: 0,
            },
            len: length(file, true)?,
            is_block_device: true,
            sector: sector(file),
            queue: Queue::of_device(stat.st_rdev),
        })),
        _ => Ok(None),
    }
}

/// Logical sectors of a block device, in bytes.
fn sector(file: &File) -> u64 {
    let sector = rustix::fs::ioctl_blksszget(file).unwrap_or(0);
    // A device that does not say takes what all of today's take.
    if sector.is_power_of_two() {
        u64::from(sector)
    } else {
        4096
    }
}

/// Its length now.
///
/// # Errors
/// What the host says.
pub(super) fn length(mut file: &File, is_block_device: bool) -> Result<u64> {
    let length = if is_block_device {
        // The end of a device is its size; nobody uses the position of this description.
        file.seek(SeekFrom::End(0))
    } else {
        file.metadata().map(|metadata| metadata.len())
    };
    length.map_err(|error| Error::from_io("length", error))
}

/// What O_DIRECT wants: what the kernel says, else the sectors of a device, else what works.
///
/// # Errors
/// `NotSupported` when no alignment works.
pub(super) fn direct_alignment(file: &File, is_block_device: bool) -> Result<Alignment> {
    if let Ok(stat) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN)
        && stat.stx_dio_offset_align != 0
        && let Some(alignment) = sane(stat.stx_dio_offset_align, stat.stx_dio_mem_align)
    {
        return Ok(alignment);
    }
    if is_block_device
        && let Ok(sector) = rustix::fs::ioctl_blksszget(file)
        && let Some(alignment) = sane(sector, sector)
    {
        return Ok(alignment);
    }
    by_trying(file)
}

fn sane(request: u32, memory: u32) -> Option<Alignment> {
    (request.is_power_of_two() && memory.is_power_of_two()).then(|| Alignment {
        request: u64::from(request),
        memory: memory as usize,
    })
}

/// The smallest aligned read that the file takes; reading past the end is a read as well.
fn by_trying(file: &File) -> Result<Alignment> {
    const LARGEST: usize = 4096;
    let mut memory = AlignedBuf::try_new(2 * LARGEST, LARGEST)
        .map_err(|error| Error::from_io("alignment probe", error))?;
    for align in [512, 1024, 2048, LARGEST] {
        if file
            .read_at(&mut memory[align..2 * align], align as u64)
            .is_ok()
        {
            // Memory as strict as the offset: it costs a copy where that is too much, and never an
            // error.
            return Ok(Alignment {
                request: align as u64,
                memory: align,
            });
        }
    }
    Err(Error::new(
        ErrorKind::NotSupported,
        "Could not find working O_DIRECT alignment",
    )
    .with_hint("Try cache.direct=off"))
}
