//! How a file of the host is opened, by name or as the caller has it open, and what that asks of
//! requests.

use super::probe::{self, Alignment, Found};
use crate::error::{Error, ErrorKind, Result};
use coblock_aio::Medium;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

pub(super) fn could_not_open(filename: &str, error: io::Error) -> Error {
    Error::from_io(format_args!("Could not open '{filename}'"), error)
}

/// How the file is to be open.
pub(super) struct Wanted {
    pub(super) read_only: bool,
    pub(super) direct: bool,
}

impl Wanted {
    pub(super) fn open(&self, filename: &str) -> Result<File> {
        #[expect(clippy::cast_possible_wrap, reason = "flags, not a number")]
        let direct = if self.direct {
            OFlags::DIRECT.bits() as i32
        } else {
            0
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            // A pipe that an image names would be waited for until somebody opens its other end.
            .custom_flags(direct | libc::O_NOCTTY | libc::O_NONBLOCK)
            .open(filename);
        let waiting = |file: File| {
            let flags = rustix::fs::fcntl_getfl(&file)?;
            rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
            Ok(file)
        };
        file.and_then(waiting).map_err(|error| {
            let refused = error.raw_os_error() == Some(libc::EINVAL) && self.direct;
            let error = could_not_open(filename, error);
            if refused {
                error.with_hint("The file system may not support O_DIRECT")
            } else {
                error
            }
        })
    }

    /// A file that the caller had opened: its access and its way past the cache must be what the
    /// options say.
    pub(super) fn adopt(&self, file: File, filename: &str) -> Result<File> {
        let errno = |errno: rustix::io::Errno| could_not_open(filename, errno.into());
        let flags = rustix::fs::fcntl_getfl(&file).map_err(errno)?;
        let access = flags & OFlags::RWMODE;
        let enough = if self.read_only {
            access != OFlags::WRONLY
        } else {
            access == OFlags::RDWR
        };
        if !enough {
            let message =
                format!("Could not open '{filename}': the file was opened with other access");
            return Err(Error::new(ErrorKind::PermissionDenied, message));
        }
        let mut wanted = flags - OFlags::NONBLOCK;
        wanted.set(OFlags::DIRECT, self.direct);
        if wanted != flags {
            let flags = wanted;
            rustix::fs::fcntl_setfl(&file, flags).map_err(errno)?;
        }
        Ok(file)
    }
}

/// An open file, and what that it is open so asks of requests.
pub(super) struct Opened {
    pub(super) file: Arc<File>,
    pub(super) alignment: Alignment,
    /// What requests reach.
    pub(super) medium: Medium,
}

impl Opened {
    pub(super) fn new(file: File, found: &Found, direct: bool, filename: &str) -> Result<Opened> {
        let alignment = if direct {
            probe::direct_alignment(&file, found.is_block_device)
                .map_err(|error| error.context(format_args!("Could not open '{filename}'")))?
        } else {
            Alignment {
                request: 1,
                memory: 1,
            }
        };
        let medium = Medium::of(file.as_fd(), direct)
            .map_err(|error| Error::from_io("fstatfs", error).at_file(filename))?;
        Ok(Opened {
            file: Arc::new(file),
            alignment,
            medium,
        })
    }
}
