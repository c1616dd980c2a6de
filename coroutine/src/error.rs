//! Why a coroutine could not be made.
//!
//! Everything here comes from outside (the kernel, the caller's configuration) and is an error
//! value. Breaking a rule of the coroutines themselves is a panic that names both places, never one
//! of these.

use std::fmt;

/// Why a coroutine could not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The kernel has no memory or no address space for another arena of stacks.
    OutOfMemory {
        /// Bytes of the smallest arena that was tried.
        need: usize,
    },
    /// The process has as many mappings as the kernel allows (`vm.max_map_count`), so that no guard
    /// page could be set.
    OutOfMappings {
        /// Mappings that the guard page would have needed.
        need: usize,
    },
    /// As many stacks exist as [`set_stack_limit`](crate::set_stack_limit) allows, and all are in
    /// use.
    TooManyStacks {
        /// The limit.
        limit: u64,
    },
    /// The stack size that was asked for is outside the range that the pool serves.
    BadStackSize {
        /// Bytes that were asked for.
        asked: usize,
        /// Largest stack that can be had, in bytes.
        max: usize,
    },
    /// The home dropped the work before it ran: it was closed, or it refused the work.
    HomeGone {
        /// Name of the coroutine that never ran.
        name: &'static str,
    },
    /// The kernel refused a mapping or a guard page for another reason.
    Kernel {
        /// What was attempted.
        what: &'static str,
        /// The `errno`.
        errno: i32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::OutOfMemory { need } => {
                write!(
                    f,
                    "no memory for coroutine stacks: {need} bytes of address space were refused"
                )
            }
            Error::OutOfMappings { need } => {
                write!(
                    f,
                    "no mapping left for a guard page ({need} more needed, see vm.max_map_count)"
                )
            }
            Error::TooManyStacks { limit } => {
                write!(
                    f,
                    "all {limit} coroutine stacks that are allowed are in use"
                )
            }
            Error::BadStackSize { asked, max } => {
                write!(
                    f,
                    "coroutine stack of {asked} bytes is larger than {max} bytes"
                )
            }
            Error::HomeGone { name } => {
                write!(f, "coroutine '{name}' never ran: its home dropped it")
            }
            Error::Kernel { what, errno } => {
                write!(f, "{what}: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match error {
            Error::OutOfMemory { .. }
            | Error::OutOfMappings { .. }
            | Error::TooManyStacks { .. } => std::io::ErrorKind::OutOfMemory,
            Error::BadStackSize { .. } => std::io::ErrorKind::InvalidInput,
            Error::HomeGone { .. } => std::io::ErrorKind::NotConnected,
            Error::Kernel { errno, .. } => return std::io::Error::from_raw_os_error(errno),
        };
        std::io::Error::new(kind, error)
    }
}
