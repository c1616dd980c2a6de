//! Who may open an image at the same time: lock bytes in the file itself, as the reference has
//! them.
//!
//! ```text
//!   byte 100 + bit     read-locked by everybody who holds that permission
//!   byte 200 + bit     read-locked by everybody who does not share it
//! ```
//! Read locks never conflict: all are taken first, and then it is asked who else is there. We may
//! not hold what somebody does not share, and not refuse to share what somebody holds. The locks
//! belong to the open file description: they go with it, to whoever gets a duplicate, and end with
//! the last of these.
//!
//! The bytes need not exist; guest data in them is not concerned.

use crate::error::{Error, ErrorKind, Result};
use crate::types::{Perm, Permissions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::BorrowedFd;

const HELD_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
/// Bits of [`Perm`] that have lock bytes.
const BITS: u32 = 4;

fn lock_of(kind: i32, byte: i64) -> libc::flock {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the kernel's constants fit their field"
    )]
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn bits(perm: Perm) -> impl Iterator<Item = u32> {
    (0..BITS).filter(move |bit| perm.bits() & 1 << bit != 0)
}

fn set(fd: BorrowedFd<'_>, kind: i32, byte: i64) -> std::result::Result<(), Errno> {
    fcntl(fd, FcntlArg::F_OFD_SETLK(&lock_of(kind, byte))).map(drop)
}

/// Has anybody else a lock on `byte`?
fn is_locked(fd: BorrowedFd<'_>, byte: i64) -> std::result::Result<bool, Errno> {
    let mut probe = lock_of(libc::F_WRLCK, byte);
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut probe))?;
    Ok(i32::from(probe.l_type) != libc::F_UNLCK)
}

/// Takes the lock bytes of `wanted` and looks who else is there. Does not block.
///
/// # Errors
/// `Locked`, in the reference's words, when somebody excludes us, and what the kernel says when it
/// has no such locks for this file. No lock is left then.
pub(super) fn acquire(fd: BorrowedFd<'_>, wanted: Permissions, filename: &str) -> Result<()> {
    let result = take(fd, wanted).and_then(|()| conflicts(fd, wanted));
    result.map_err(|error| {
        release(fd);
        error
            .at_file(filename)
            .with_hint(format!("Is another process using the image [{filename}]?"))
    })
}

fn take(fd: BorrowedFd<'_>, wanted: Permissions) -> Result<()> {
    let held = bits(wanted.held).map(|bit| HELD_BASE + i64::from(bit));
    let unshared = bits(!wanted.shared).map(|bit| UNSHARED_BASE + i64::from(bit));
    for byte in held.chain(unshared) {
        set(fd, libc::F_RDLCK, byte).map_err(|errno| {
            let message = format!("Failed to lock byte {byte}");
            Error::from_io(message, errno.into())
        })?;
    }
    Ok(())
}

fn conflicts(fd: BorrowedFd<'_>, wanted: Permissions) -> Result<()> {
    let probe = |byte| {
        is_locked(fd, byte).map_err(|errno| {
            Error::from_io(format!("Failed to probe lock byte {byte}"), errno.into())
        })
    };
    for bit in bits(wanted.held) {
        if probe(UNSHARED_BASE + i64::from(bit))? {
            let name = Perm::bit_name(bit);
            return Err(Error::new(
                ErrorKind::Locked,
                format!("Failed to get \"{name}\" lock"),
            ));
        }
    }
    for bit in bits(!wanted.shared) {
        if probe(HELD_BASE + i64::from(bit))? {
            let name = Perm::bit_name(bit);
            let message = format!("Failed to get shared \"{name}\" lock");
            return Err(Error::new(ErrorKind::Locked, message));
        }
    }
    Ok(())
}

/// Gives all lock bytes back.
pub(super) fn release(fd: BorrowedFd<'_>) {
    for byte in (0..i64::from(BITS)).flat_map(|bit| [HELD_BASE + bit, UNSHARED_BASE + bit]) {
        if let Err(errno) = set(fd, libc::F_UNLCK, byte) {
            log::warn!("unlocking byte {byte}: {errno}");
        }
    }
}
