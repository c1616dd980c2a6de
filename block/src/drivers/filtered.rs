//! What the filters of this crate share: the node that they pass requests on to.

use crate::child::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The child of a filter, and how the filter lies on it. Calls that a filter does not have itself go
/// to that child: see [`Driver::filtered`](crate::Driver::filtered).
#[derive(Debug)]
pub struct Filtered {
    file: Arc<Child>,
    /// Where in the child the filter begins, in bytes.
    offset: u64,
    /// The filter has a length of its own.
    fixed: bool,
    growable: bool,
    len: AtomicU64,
}

impl Filtered {
    /// On all of `file`.
    pub fn new(file: Arc<Child>, graph: &GraphRead<'_>) -> Filtered {
        Filtered {
            offset: 0,
            fixed: false,
            growable: file.is_growable(graph),
            len: AtomicU64::new(file.len(graph)),
            file,
        }
    }

    /// On the part of `file` from `offset` on: `len` bytes, or to the end. The caller checked that the
    /// part is inside.
    pub(super) fn part(
        file: Arc<Child>,
        graph: &GraphRead<'_>,
        offset: u64,
        len: Option<u64>,
    ) -> Filtered {
        let rest = file.len(graph).saturating_sub(offset);
        Filtered {
            offset,
            fixed: len.is_some(),
            growable: len.is_none() && file.is_growable(graph),
            len: AtomicU64::new(len.unwrap_or(rest)),
            file,
        }
    }

    /// The edge to the child.
    #[inline]
    pub fn file(&self) -> &Child {
        &self.file
    }

    /// Where `offset` lies in the child. No overflow: what is inside a part is inside the child, and
    /// what grows has no part; the child checks the rest.
    #[inline]
    pub fn below(&self, offset: u64) -> u64 {
        self.offset.saturating_add(offset)
    }

    /// Length of the filter in bytes.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Is it zero bytes long?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Do writes past the end make it longer?
    pub fn is_growable(&self) -> bool {
        self.growable
    }

    /// Lets `change` make the child as long as a filter of `len` bytes needs it.
    pub(crate) fn resize(
        &self,
        graph: &GraphRead<'_>,
        len: u64,
        change: impl FnOnce(&Child, u64) -> Result<()>,
    ) -> Result<()> {
        if self.fixed {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "Cannot resize fixed-size raw disks",
            ));
        }
        let Some(below) = self.offset.checked_add(len) else {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                "Disk size too large for the chosen offset",
            ));
        };
        let result = change(&self.file, below);
        self.follow(self.file.len(graph));
        result
    }

    /// The child is `len` bytes long now.
    pub(crate) fn follow(&self, len: u64) {
        if !self.fixed {
            let rest = len.saturating_sub(self.offset);
            self.len.store(rest, Ordering::Release);
        }
    }
}
