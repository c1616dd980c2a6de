//! What lies behind a file descriptor, as far as it decides how a request goes fastest.

use crate::sys::file;
use std::io;
use std::os::fd::BorrowedFd;

/// Magic number of tmpfs in linux/magic.h.
const TMPFS: u64 = 0x0102_1994;

/// What reads and writes of a descriptor reach. It changes their cost only, never their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A device, by `O_DIRECT`: every request goes to the engine.
    Device,
    /// The page cache: a read that is alone may be served by the loop itself, without waiting for a
    /// device (decision 19); writes are left to workers of the kernel, and their completions are
    /// taken several at a time.
    PageCache,
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
        if file::is_regular(fd)? && file::file_system_magic(fd)? == TMPFS {
            Ok(Medium::Memory)
        } else if direct {
            Ok(Medium::Device)
        } else {
            Ok(Medium::PageCache)
        }
    }
}
