//! How much memory an image may ask for.
//!
//! An image is somebody else's data: a few bytes of a header can ask for tables of 32 MiB, a few
//! kilobytes of a directory for as many names as fit. Whatever of it decides how much is allocated
//! while the image is opened, described or checked is taken out of one budget first, so that all of
//! it together stays below a limit that the caller knows, and that the caller may raise.
//!
//! Counted is what stays for as long as the operation or the open image does. Buffers of a size
//! that we chose are not: they are the same for every image.

use crate::error::{Error, Result};

/// Bytes that an image may ask for unless the caller says otherwise.
pub const MEMORY_LIMIT_DEFAULT: u64 = 64 << 20;

/// What the caller can do about an image that asks for more.
const RAISE: &str = "; the option memory-limit raises the limit, for an image that is trusted";

/// What is left for one image in one operation.
#[derive(Clone, Debug)]
pub struct Budget {
    limit: u64,
    used: u64,
}

impl Budget {
    /// A budget of `limit` bytes of memory.
    #[must_use]
    pub const fn new(limit: u64) -> Self {
        Self { limit, used: 0 }
    }

    /// Bytes that nobody has taken.
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    /// Takes `need` bytes for `what`: "the L1 table". Call it before they are allocated.
    ///
    /// # Errors
    /// `LimitExceeded`: less is left. Nothing is taken then.
    pub fn take(&mut self, what: &'static str, need: u64) -> Result<()> {
        let have = self.left();
        if need > have {
            return Err(Error::LimitExceeded {
                what,
                need,
                have,
                advice: RAISE,
            });
        }
        self.used = self.used.saturating_add(need);
        Ok(())
    }

    /// More may be taken: something that costs whoever made the image as much has been seen.
    pub(crate) const fn grow(&mut self, bytes: u64) {
        self.limit = self.limit.saturating_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything up to the last byte, and nothing more; a refusal takes nothing.
    #[test]
    fn gives_what_there_is() {
        let mut budget = Budget::new(100);
        budget.take("bytes of a table", 60).unwrap();
        let refused = budget.take("bytes of another table", 41).unwrap_err();
        let (what, need, have) = match &refused {
            Error::LimitExceeded {
                what, need, have, ..
            } => (*what, *need, *have),
            other => panic!("{other:?}"),
        };
        assert_eq!((what, need, have), ("bytes of another table", 41, 40));
        assert!(refused.to_string().contains("memory-limit"), "{refused}");
        budget.take("bytes of another table", 40).unwrap();
        assert_eq!(budget.left(), 0);
        assert!(budget.take("anything", u64::MAX).is_err());
        budget.grow(u64::MAX);
        budget.take("anything", 1 << 40).unwrap();
    }
}
