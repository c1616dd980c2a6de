//! The system calls that std and the io-uring crate do not wrap, as safe functions.
//!
//! Everything takes borrowed descriptors and buffers and returns `io::Result`, so that callers need
//! no `unsafe`. `EINTR` is not retried here: [`crate::co`] decides that for requests, and the loop
//! takes an interrupted wait as a spurious wake-up.
//!
//! * [`mod@event`]: eventfd, epoll, the monotonic clock
//! * [`mod@file`]: positional I/O, allocation, locks, what the kernel tells about a file
//! * [`mod@fence`]: fences that cost the rare side everything and the common side nothing
//! * `pending`: the address of a waiting operation, on its way through kernel or pool

pub mod event;
pub mod fence;
pub mod file;
pub(crate) mod pending;

use std::io;

/// Turns the result of a system call that returns -1 and sets `errno` into a `Result`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same for calls that return a count of bytes.
fn check_len(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
