//! Files: positional I/O, allocation, locks, and what the kernel tells about a file.
//!
//! These calls block. Requests go through [`crate::co`]; the rest is for opening and closing, or
//! belongs on a pool thread.

use super::{check, check_len};
use crate::buf::{IoVec, IoVecMut, RawSegment, Segments};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Segments handed to the kernel in one call; a longer list is a short transfer.
pub(crate) const MAX_SEGMENTS: usize = 64;

/// The first segments of a list, side by side as the kernel wants them.
#[derive(Debug)]
pub(crate) struct SegmentArray {
    array: [RawSegment; MAX_SEGMENTS],
    count: usize,
}

impl SegmentArray {
    /// The first [`MAX_SEGMENTS`] of `segments`.
    pub fn collect(segments: Segments<'_>) -> Self {
        let empty = RawSegment {
            base: std::ptr::null_mut(),
            len: 0,
        };
        let mut list = SegmentArray {
            array: [empty; MAX_SEGMENTS],
            count: 0,
        };
        for (slot, segment) in list.array.iter_mut().zip(segments) {
            *slot = segment;
            list.count += 1;
        }
        list
    }

    /// For the kernel; [`RawSegment`] has the layout of `iovec`.
    pub fn as_ptr(&self) -> *const libc::iovec {
        self.array.as_ptr().cast()
    }

    /// How many.
    pub fn count(&self) -> u32 {
        u32::try_from(self.count).expect("64 at most")
    }
}

fn offset_arg(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn read_with_flags(
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: &mut IoVecMut<'_>,
    flags: libc::c_int,
) -> io::Result<usize> {
    let list = SegmentArray::collect(buf.segments());
    let (offset, count) = (offset_arg(offset)?, list.count().cast_signed());
    // SAFETY: the segments are writable and borrowed exclusively through the call, which is what an
    // `IoVecMut` promises; the array lives through the call.
    check_len(unsafe { libc::preadv2(fd.as_raw_fd(), list.as_ptr(), count, offset, flags) })
}

/// Reads once; may be short for any reason, 0 at the end of the file.
pub fn read_at(fd: BorrowedFd<'_>, offset: u64, mut buf: IoVecMut<'_>) -> io::Result<usize> {
    read_with_flags(fd, offset, &mut buf, 0)
}

/// Reads once what is at hand without waiting for a device; `WouldBlock` when nothing is.
pub fn read_at_nowait(
    fd: BorrowedFd<'_>,
    offset: u64,
    buf: &mut IoVecMut<'_>,
) -> io::Result<usize> {
    read_with_flags(fd, offset, buf, libc::RWF_NOWAIT)
}

/// Writes once; may be short for any reason.
pub fn write_at(fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> io::Result<usize> {
    let list = SegmentArray::collect(buf.segments());
    let (offset, count) = (offset_arg(offset)?, list.count().cast_signed());
    // SAFETY: the segments are readable through the call, which is what an `IoVec` promises; the
    // array lives through the call.
    check_len(unsafe { libc::pwritev(fd.as_raw_fd(), list.as_ptr(), count, offset) })
}

/// Brings what was written to stable storage; with `data_only`, without times and the like.
pub fn sync(fd: BorrowedFd<'_>, data_only: bool) -> io::Result<()> {
    let fd = fd.as_raw_fd();
    let result = if data_only {
        // SAFETY: takes an integer and touches no memory of ours.
        unsafe { libc::fdatasync(fd) }
    } else {
        // SAFETY: takes an integer and touches no memory of ours.
        unsafe { libc::fsync(fd) }
    };
    check(result).map(|_| ())
}

/// Modes of [`fallocate`].
pub mod allocate {
    /// Allocates, and lets the file grow.
    pub const GROW: i32 = 0;
    /// Allocates, the length stays.
    pub const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
    /// Gives the space back; reads as zeros; the length stays.
    pub const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    /// Reads as zeros, the space stays allocated; grows the file.
    pub const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;
}

/// fallocate(2) with a mode of [`allocate`].
pub fn fallocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (offset_arg(offset)?, offset_arg(len)?);
    // SAFETY: takes integers and touches no memory of ours.
    check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) }).map(|_| ())
}

/// Kind of a lock on a byte range of an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Several may hold it.
    Shared,
    /// One alone may hold it.
    Exclusive,
    /// Gives back what is held.
    Unlock,
}

fn flock_arg(kind: LockKind, start: u64, len: u64) -> io::Result<libc::flock> {
    let code = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    let narrow = |value: libc::c_int| libc::c_short::try_from(value).expect("a small constant");
    Ok(libc::flock {
        l_type: narrow(code),
        l_whence: narrow(libc::SEEK_SET),
        l_start: offset_arg(start)?,
        l_len: offset_arg(len)?,
        l_pid: 0,
    })
}

/// Takes or gives back an OFD lock on bytes, without waiting.
///
/// # Errors
/// `WouldBlock` when somebody else holds it.
pub fn lock_range(fd: BorrowedFd<'_>, kind: LockKind, start: u64, len: u64) -> io::Result<()> {
    let lock = flock_arg(kind, start, len)?;
    // SAFETY: `lock` lives through the call, which only reads it.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(|_| ())
}

/// Could this lock be taken now? Takes nothing.
pub fn lock_is_free(fd: BorrowedFd<'_>, kind: LockKind, start: u64, len: u64) -> io::Result<bool> {
    let mut lock = flock_arg(kind, start, len)?;
    // SAFETY: `lock` lives through the call, which writes at most into it.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

/// What direct I/O on a file needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectLimits {
    /// Alignment of memory.
    pub memory: u32,
    /// Alignment of offset and length.
    pub offset: u32,
}

/// What direct I/O on this file needs, as the kernel says since Linux 6.1.
///
/// `None`: it does not say (older kernel or a file system that does not know), or the file takes no
/// direct I/O at all.
pub fn direct_limits(fd: BorrowedFd<'_>) -> io::Result<Option<DirectLimits>> {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string, which AT_EMPTY_PATH allows, and the kernel writes one
    // `statx` into `answer`.
    check(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    })?;
    // SAFETY: it was zeroed, which is a valid `statx`, and filled by the kernel.
    let answer = unsafe { answer.assume_init() };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 || answer.stx_dio_mem_align == 0 {
        return Ok(None);
    }
    Ok(Some(DirectLimits {
        memory: answer.stx_dio_mem_align,
        offset: answer.stx_dio_offset_align,
    }))
}

/// `_IOR(0x12, 114, size_t)` of linux/fs.h.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 127)` of linux/fs.h.
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// Size of a block device in bytes.
pub fn device_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, into `size`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Logical block size of a block device in bytes.
pub fn device_block_size(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, into `size`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::BLKSSZGET, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Discards bytes of a block device.
pub fn device_discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from `range`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) }).map(|_| ())
}

/// Makes bytes of a block device read as zeros.
pub fn device_zero(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKZEROOUT reads two u64 from `range`, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKZEROOUT, range.as_ptr()) }).map(|_| ())
}

/// Where data or a hole begins at or after `offset`; `None` past the last one.
pub fn seek_data_or_hole(fd: BorrowedFd<'_>, offset: u64, data: bool) -> io::Result<Option<u64>> {
    let whence = if data {
        libc::SEEK_DATA
    } else {
        libc::SEEK_HOLE
    };
    let offset = offset_arg(offset)?;
    // SAFETY: takes integers and touches no memory of ours.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    let mut answer = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel writes one `stat` into `answer`.
    check(unsafe { libc::fstat(fd.as_raw_fd(), answer.as_mut_ptr()) })?;
    // SAFETY: it was zeroed, which is a valid `stat`, and filled by the kernel.
    Ok(unsafe { answer.assume_init() })
}

/// Bytes in a regular file, or of a block device.
pub fn len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = stat(fd)?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFBLK {
        return device_size(fd);
    }
    Ok(stat.st_size.cast_unsigned())
}

/// Is it a block device?
pub fn is_device(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(stat(fd)?.st_mode & libc::S_IFMT == libc::S_IFBLK)
}

/// Is it a regular file?
pub fn is_regular(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(stat(fd)?.st_mode & libc::S_IFMT == libc::S_IFREG)
}

/// Kind of the file system that a file lies on (`f_type` of statfs(2)).
pub fn file_system_magic(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut answer = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel writes one `statfs` into `answer`.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), answer.as_mut_ptr()) })?;
    // SAFETY: it was zeroed, which is a valid `statfs`, and filled by the kernel.
    let answer = unsafe { answer.assume_init() };
    Ok(answer.f_type.cast_unsigned())
}

/// `f_type` of tmpfs.
pub const TMPFS_MAGIC: u64 = 0x0102_1994;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn file() -> std::fs::File {
        tempfile::tempfile().unwrap()
    }

    #[test]
    fn scatter_lists_longer_than_one_call_are_short_transfers() {
        let file = file();
        let bytes: Vec<u8> = (0..200).collect();
        let parts: Vec<io::IoSlice> = bytes.chunks(2).map(io::IoSlice::new).collect();
        let whole = IoVec::from(&parts[..]);
        assert_eq!(
            write_at(file.as_fd(), 3, whole).unwrap(),
            128,
            "64 segments of 2 bytes"
        );
        let mut back = [0u8; 200];
        assert_eq!(read_at(file.as_fd(), 0, (&mut back).into()).unwrap(), 131);
        assert_eq!(back[3..131], bytes[..128]);
    }

    #[test]
    fn locks_belong_to_the_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locked");
        let first = std::fs::File::create(&path).unwrap();
        let second = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        lock_range(first.as_fd(), LockKind::Exclusive, 100, 1).unwrap();
        assert!(!lock_is_free(second.as_fd(), LockKind::Shared, 100, 1).unwrap());
        assert!(lock_is_free(second.as_fd(), LockKind::Shared, 101, 1).unwrap());
        let refused = lock_range(second.as_fd(), LockKind::Exclusive, 100, 1).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        lock_range(first.as_fd(), LockKind::Unlock, 100, 1).unwrap();
        lock_range(second.as_fd(), LockKind::Exclusive, 100, 1).unwrap();
    }

    #[test]
    fn holes_are_found() {
        let file = file();
        file.set_len(1 << 20).unwrap();
        write_at(file.as_fd(), 512 << 10, IoVec::from(&[1u8; 4096])).unwrap();
        assert_eq!(
            seek_data_or_hole(file.as_fd(), 0, true).unwrap(),
            Some(512 << 10)
        );
        assert_eq!(seek_data_or_hole(file.as_fd(), 0, false).unwrap(), Some(0));
        assert_eq!(
            seek_data_or_hole(file.as_fd(), 1 << 20, true).unwrap(),
            None
        );
    }

    #[test]
    fn offsets_past_the_largest_file_are_errors() {
        let file = file();
        let error = write_at(file.as_fd(), u64::MAX, IoVec::from(b"x")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert!(
            device_size(file.as_fd()).is_err(),
            "a file is no block device"
        );
    }
}
