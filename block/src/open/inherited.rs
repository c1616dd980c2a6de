//! What a child has of its parent's options.

use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;
use crate::types::ChildRole;

/// Options that a child has unless it says otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Inherited {
    pub(crate) read_only: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    pub(crate) force_share: bool,
    pub(crate) discard: bool,
}

impl Inherited {
    /// What a node with these gives to a child.
    pub(crate) fn through(self, role: ChildRole) -> Inherited {
        let backing = role == ChildRole::Backing;
        Inherited {
            read_only: self.read_only || backing,
            // What this node lets through is decided here, once.
            discard: !backing,
            ..self
        }
    }

    pub(crate) fn options(self) -> Options {
        let word = |on: bool| if on { "on" } else { "off" };
        Options::new()
            .with("read-only", word(self.read_only))
            .with("force-share", word(self.force_share))
            .with("cache.direct", word(self.direct))
            .with("cache.no-flush", word(self.no_flush))
            .with("discard", if self.discard { "unmap" } else { "ignore" })
    }
}

/// Takes the option `discard`.
///
/// # Errors
/// `Invalid` for a word that is none of its values.
pub(crate) fn take_discard(options: &mut Options) -> Result<Option<bool>> {
    match options.take_str("discard")?.as_deref() {
        None => Ok(None),
        Some("ignore" | "off") => Ok(Some(false)),
        Some("unmap" | "on") => Ok(Some(true)),
        Some(_) => Err(Error::new(ErrorKind::Invalid, "Invalid discard option")),
    }
}
