//! What lies behind a file descriptor, as far as it decides how a request goes fastest.

use crate::sys::file;
use std::io;
use std::os::fd::BorrowedFd;

/// Magic numbers of linux/magic.h.
const TMPFS: u64 = 0x0102_1994;
const XFS: u64 = 0x5846_5342;
const BTRFS: u64 = 0x9123_683e;

/// What reads and writes of a descriptor reach. It changes their cost only, never their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A device, by `O_DIRECT`: every request goes to the engine.
    Device,
    /// The page cache: a read that is alone may be served by the loop itself, without waiting for a
    /// device (decision 19); the writes of a file are done one after another by a thread of the
    /// pool, because the file system takes none that must not wait (decision 35).
    PageCache,
    /// The page cache of a file system that takes writes that must not wait: reads as before,
    /// writes through the ring, which then does them when they are submitted.
    PageCacheNowait,
    /// Memory and nothing else (tmpfs): short requests are system calls of the loop itself, which
    /// wait for nothing but, when the machine swaps, memory. Through the ring a worker of the
    /// kernel would do each.
    Memory,
}

impl Medium {
    /// What the descriptor reaches; `direct`: it was opened with `O_DIRECT`.
    ///
    /// # Errors
    /// What fstat(2) and fstatfs(2) say.
    pub fn of(fd: BorrowedFd<'_>, direct: bool) -> io::Result<Medium> {
        // The node of a device may lie on a tmpfs; what it reaches does not.
        let magic = file::is_regular(fd)?
            .then(|| file::file_system_magic(fd))
            .transpose()?;
        Ok(match magic {
            Some(TMPFS) => Medium::Memory,
            _ if direct => Medium::Device,
            Some(XFS | BTRFS) => Medium::PageCacheNowait,
            _ => Medium::PageCache,
        })
    }
}
