//! What went wrong, where, and which errno a guest gets for it.
//!
//! An [`Error`] is one pointer wide, so that results of the request path stay in registers; it is
//! made on paths that are slow anyway. Code matches on [`ErrorKind`], people read the message.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What code may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host failed a read, write or another call; `errno` says how.
    Io,
    /// No space is left below.
    NoSpace,
    /// Past the end of a node that cannot grow, or offset and length that no node can have.
    OutOfBounds,
    /// An argument or the value of an option makes no sense.
    Invalid,
    /// The driver cannot do that.
    NotSupported,
    /// A write or resize of what was opened read-only.
    ReadOnly,
    /// Somebody else uses the image in a way that excludes us.
    Locked,
    /// No such file or node.
    NotFound,
    /// The host refused access.
    PermissionDenied,
    /// The gate does not let an image name that file.
    Denied,
    /// A chain of images is too deep, or comes back to one of its own.
    Chain,
    /// No driver of that name is registered.
    UnknownDriver,
    /// An option that nobody took.
    UnknownOption,
    /// An option that is needed is missing.
    MissingOption,
    /// Another user of the node does not go together with this one.
    Conflict,
    /// The name is taken, or the node has users.
    InUse,
    /// The node or the user's handle was closed.
    Closed,
    /// A flush failed earlier, so nobody knows what is stable; reopen.
    Poisoned,
    /// An image contradicts its format.
    Corrupt,
    /// An image or a request wants more than we are ready to give.
    LimitExceeded,
    /// No memory.
    OutOfMemory,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    errno: i32,
    message: String,
    hint: Option<String>,
    node: Option<String>,
    file: Option<String>,
    offset: Option<u64>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// One failure: kind, errno, message, and as far as known node, file and offset.
pub struct Error(Box<Inner>);

impl Error {
    /// A failure of `kind` with the errno that goes with it.
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        let errno = match kind {
            ErrorKind::Io | ErrorKind::OutOfBounds | ErrorKind::Corrupt | ErrorKind::Poisoned => {
                libc::EIO
            }
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::Invalid | ErrorKind::UnknownOption | ErrorKind::MissingOption => {
                libc::EINVAL
            }
            ErrorKind::UnknownDriver => libc::EINVAL,
            ErrorKind::NotSupported => libc::ENOTSUP,
            ErrorKind::ReadOnly | ErrorKind::Conflict => libc::EPERM,
            ErrorKind::Locked => libc::EAGAIN,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::PermissionDenied | ErrorKind::Denied => libc::EACCES,
            ErrorKind::Chain => libc::ELOOP,
            ErrorKind::InUse => libc::EBUSY,
            ErrorKind::Closed => libc::ENOMEDIUM,
            ErrorKind::LimitExceeded => libc::EFBIG,
            ErrorKind::OutOfMemory => libc::ENOMEM,
        };
        Error(Box::new(Inner {
            kind,
            errno,
            message: message.into(),
            hint: None,
            node: None,
            file: None,
            offset: None,
            source: None,
        }))
    }

    /// A failure of the host while doing `what` ("read", "Could not open 'x'").
    #[cold]
    pub fn from_io(what: impl fmt::Display, error: io::Error) -> Error {
        let errno = error.raw_os_error().unwrap_or(match error.kind() {
            io::ErrorKind::OutOfMemory => libc::ENOMEM,
            io::ErrorKind::InvalidInput => libc::EINVAL,
            io::ErrorKind::Unsupported => libc::ENOTSUP,
            _ => libc::EIO,
        });
        let kind = match errno {
            libc::ENOSPC | libc::EDQUOT => ErrorKind::NoSpace,
            libc::ENOENT => ErrorKind::NotFound,
            libc::EACCES | libc::EPERM => ErrorKind::PermissionDenied,
            libc::ENOTSUP | libc::ENOSYS => ErrorKind::NotSupported,
            libc::EINVAL => ErrorKind::Invalid,
            libc::ENOMEM => ErrorKind::OutOfMemory,
            libc::EROFS => ErrorKind::ReadOnly,
            libc::EFBIG => ErrorKind::LimitExceeded,
            _ => ErrorKind::Io,
        };
        let mut result = Error::new(kind, format!("{what}: {}", errno_text(errno)));
        result.0.errno = errno;
        result.0.source = Some(Box::new(error));
        result
    }

    /// The same with another errno.
    #[must_use]
    pub fn errno_is(mut self, errno: i32) -> Error {
        self.0.errno = errno;
        self
    }

    /// The same, with the node that failed unless one further down is already named.
    #[must_use]
    pub fn at_node(mut self, node: &str) -> Error {
        self.0.node.get_or_insert_with(|| node.to_owned());
        self
    }

    /// The same, with the file that failed unless one further down is already named.
    #[must_use]
    pub fn at_file(mut self, file: &str) -> Error {
        self.0.file.get_or_insert_with(|| file.to_owned());
        self
    }

    /// The same, with the offset in bytes that failed, unless one further down is already named.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Error {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// The same, with advice for a person, printed on a line of its own.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint = Some(hint.into());
        self
    }

    /// The same, caused by `source`.
    #[must_use]
    pub fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> Error {
        self.0.source = Some(Box::new(source));
        self
    }

    /// The same with `what: ` before the message.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Error {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// What code matches on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The positive errno for guests and tools.
    pub fn errno(&self) -> i32 {
        self.0.errno
    }

    /// The message without node, file and offset.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Advice for a person.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Name of the node that failed.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// Name of the file that failed.
    pub fn file(&self) -> Option<&str> {
        self.0.file.as_deref()
    }

    /// Where in that file or node it failed, in bytes.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }
}

/// The host's words for an errno, without the number.
pub fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.write_str(&inner.message)?;
        let mut parts = Vec::new();
        if let Some(file) = &inner.file
            && !inner.message.contains(file.as_str())
        {
            parts.push(format!("file '{file}'"));
        } else if let (None, Some(node)) = (&inner.file, &inner.node) {
            parts.push(format!("node '{node}'"));
        }
        if let Some(offset) = inner.offset {
            parts.push(format!("offset {offset}"));
        }
        if !parts.is_empty() {
            write!(f, " ({})", parts.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self} [errno {}]", self.0.kind, self.0.errno)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

const _: () = {
    const fn send_sync<T: Send + Sync>() {}
    send_sync::<Error>();
    assert!(size_of::<Result<()>>() == size_of::<usize>());
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Bad input: a message names file and offset, and the guest's errno is the host's.
    #[test]
    fn a_message_names_file_and_offset() {
        let error = Error::from_io("read", io::Error::from_raw_os_error(libc::ENOSPC))
            .at_offset(4096)
            .at_file("disk.img")
            .at_node("node0")
            .at_offset(7);
        assert_eq!(
            error.to_string(),
            "read: No space left on device (file 'disk.img', offset 4096)"
        );
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::NoSpace, libc::ENOSPC)
        );
        assert_eq!(error.node(), Some("node0"));
    }

    #[test]
    fn a_file_named_in_the_message_is_not_named_twice() {
        let error = Error::new(ErrorKind::NotFound, "Could not open 'a'").at_file("a");
        assert_eq!(error.to_string(), "Could not open 'a'");
    }
}
