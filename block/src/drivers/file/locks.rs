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
use coblock_aio::sys::file::{LockKind, lock_is_free, lock_range};
use coblock_coroutine::mutant;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

const HELD_BASE: u64 = 100;
const UNSHARED_BASE: u64 = 200;

fn bits(perm: Perm) -> impl Iterator<Item = u32> {
    (0..Perm::BITS).filter(move |bit| perm.bits() & 1 << bit != 0)
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

/// The lock bytes of one open file, while permissions change.
#[derive(Debug)]
pub(super) struct Held {
    file: Arc<File>,
    now: Permissions,
    /// Taken too, not yet for good.
    next: Option<Permissions>,
}

impl Held {
    pub(super) fn new(file: &Arc<File>, now: Permissions) -> Self {
        Held {
            file: file.clone(),
            now,
            next: None,
        }
    }

    /// `file`, which was tried out, has taken the place; the file before is still locked.
    pub(super) fn move_to(&mut self, file: &Arc<File>) {
        if let Err(error) = take(file.as_fd(), self.now) {
            log::warn!("a file that was opened anew is not locked: {error}");
        }
        self.file = file.clone();
        release_all_but(self.file.as_fd(), self.now);
    }

    /// Takes what `next` needs more, and looks who else is there.
    ///
    /// # Errors
    /// As [`acquire`]; the locks are as before.
    pub(super) fn prepare(&mut self, next: Permissions, filename: &str) -> Result<()> {
        let fd = self.file.as_fd();
        let more = Permissions {
            held: next.held - self.now.held,
            shared: next.shared | !self.now.shared,
        };
        let result = take(fd, more).and_then(|()| conflicts(fd, more));
        if let Err(error) = result {
            release_all_but(fd, self.now);
            let hint = format!("Is another process using the image [{filename}]?");
            return Err(error.at_file(filename).with_hint(hint));
        }
        self.next = Some(next);
        Ok(())
    }

    pub(super) fn commit(&mut self) {
        self.now = self.next.take().unwrap_or(self.now);
        release_all_but(self.file.as_fd(), self.now);
    }

    pub(super) fn abort(&mut self) {
        self.next = None;
        release_all_but(self.file.as_fd(), self.now);
    }
}

/// Has this open file such locks? Nothing is locked afterwards: who looks for others at the file that
/// it is to replace would find it.
///
/// # Errors
/// What the kernel says.
pub(super) fn try_out(fd: BorrowedFd<'_>) -> Result<()> {
    let tried = lock_range(fd, LockKind::Shared, HELD_BASE, 1);
    release(fd);
    tried.map_err(|error| Error::from_io(format!("Failed to lock byte {HELD_BASE}"), error))
}

fn take(fd: BorrowedFd<'_>, wanted: Permissions) -> Result<()> {
    let held = bits(wanted.held).map(|bit| HELD_BASE + u64::from(bit));
    let unshared = bits(!wanted.shared).map(|bit| UNSHARED_BASE + u64::from(bit));
    for byte in held.chain(unshared) {
        if mutant!("unshared bytes are not locked") && byte >= UNSHARED_BASE {
            continue;
        }
        lock_range(fd, LockKind::Shared, byte, 1)
            .map_err(|error| Error::from_io(format!("Failed to lock byte {byte}"), error))?;
    }
    Ok(())
}

fn conflicts(fd: BorrowedFd<'_>, wanted: Permissions) -> Result<()> {
    let probe = |byte| {
        lock_is_free(fd, LockKind::Exclusive, byte, 1)
            .map(|free| !free)
            .map_err(|error| Error::from_io(format!("Failed to probe lock byte {byte}"), error))
    };
    if mutant!("nobody looks who else has the file") {
        return Ok(());
    }
    for bit in bits(wanted.held) {
        if probe(UNSHARED_BASE + u64::from(bit))? {
            let name = Perm::bit_name(bit);
            return Err(Error::new(
                ErrorKind::Locked,
                format!("Failed to get \"{name}\" lock"),
            ));
        }
    }
    for bit in bits(!wanted.shared) {
        if probe(HELD_BASE + u64::from(bit))? {
            let name = Perm::bit_name(bit);
            let message = format!("Failed to get shared \"{name}\" lock");
            return Err(Error::new(ErrorKind::Locked, message));
        }
    }
    Ok(())
}

/// Gives all lock bytes back.
pub(super) fn release(fd: BorrowedFd<'_>) {
    release_all_but(fd, Permissions::NONE);
}

fn release_all_but(fd: BorrowedFd<'_>, keep: Permissions) {
    let held = bits(!keep.held).map(|bit| HELD_BASE + u64::from(bit));
    let unshared = bits(keep.shared).map(|bit| UNSHARED_BASE + u64::from(bit));
    for byte in held.chain(unshared) {
        if let Err(error) = lock_range(fd, LockKind::Unlock, byte, 1) {
            log::warn!("unlocking byte {byte}: {error}");
        }
    }
}
