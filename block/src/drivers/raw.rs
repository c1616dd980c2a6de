//! `raw`: the bytes of its child as they are, perhaps a part of them.
//!
//! Options: `offset` and `size` in bytes, multiples of 512, name the part; without `size` it goes
//! to the end, and grows with the file.

use crate::child::Child;
use crate::driver::{Driver, DriverStatus, OpenDriver, Precision};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{GraphCell, GraphRead};
use crate::io::{Copied, CopySource, CopyTarget};
use crate::open::Opening;
use crate::types::{ChildRole, Limits, Preallocation, RequestFlags};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Registered as `raw`.
#[derive(Debug)]
pub struct OpenRaw;

impl OpenDriver for OpenRaw {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let offset = opening.options().take_size("offset")?.unwrap_or(0);
        let size = opening.options().take_size("size")?;
        for (what, value) in [("offset", offset), ("size", size.unwrap_or(0))] {
            if value % 512 != 0 {
                let message = format!("Specified {what} is not multiple of 512");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        let guard = opening.graph().read(co);
        let below = file.len(&guard);
        let Some(rest) = below.checked_sub(offset) else {
            let message = format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({below})"
            );
            return Err(Error::new(ErrorKind::Invalid, message).at_file(file.filename(&guard)));
        };
        if let Some(size) = size
            && size > rest
        {
            let message = format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the \
                 actual size of the containing file ({below})"
            );
            return Err(Error::new(ErrorKind::Invalid, message).at_file(file.filename(&guard)));
        }
        Ok(Box::new(Raw {
            offset,
            fixed: size.is_some(),
            growable: size.is_none() && file.is_growable(&guard),
            len: AtomicU64::new(size.unwrap_or(rest)),
            file: GraphCell::new(file.clone()),
        }))
    }
}

struct Raw {
    offset: u64,
    /// The options say the length.
    fixed: bool,
    growable: bool,
    len: AtomicU64,
    file: GraphCell<Arc<Child>>,
}

impl Raw {
    /// Where `offset` lies in the child. No overflow: what is inside a part is inside the child,
    /// and what grows has no part; the child checks the rest.
    #[inline]
    fn below(&self, offset: u64) -> u64 {
        self.offset.saturating_add(offset)
    }

    /// Lets `change` make the child as long as this node of `len` bytes needs it.
    fn resize(
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
        let file = self.file.get(graph);
        let Some(below) = self.offset.checked_add(len) else {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                "Disk size too large for the chosen offset",
            ));
        };
        let result = change(file, below);
        self.len.store(
            file.len(graph).saturating_sub(self.offset),
            Ordering::Release,
        );
        result
    }
}

impl Driver for Raw {
    fn format(&self) -> &'static str {
        "raw"
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file
            .get(graph)
            .pread(co, graph, self.below(offset), buf, flags)
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file
            .get(graph)
            .pwrite(co, graph, self.below(offset), buf, flags)
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file
            .get(graph)
            .pwrite_zeroes(co, graph, self.below(offset), len, flags)
    }

    fn pdiscard(&self, co: &Co, graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        self.file
            .get(graph)
            .pdiscard(co, graph, self.below(offset), len)
    }

    fn copy_range_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        self.file
            .get(graph)
            .copy_range_from(co, graph, self.below(offset), len, to)
    }

    fn copy_range_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        source: CopySource<'_>,
    ) -> Result<u64> {
        self.file
            .get(graph)
            .copy_range_to(co, graph, self.below(offset), source)
    }

    fn block_status<'g>(
        &'g self,
        _co: &Co,
        graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        let file = self.file.get(graph);
        Ok(DriverStatus::through(file, self.below(offset), len))
    }

    fn allocated_bytes(&self, co: &Co, graph: &GraphRead<'_>) -> Result<u64> {
        self.file.get(graph).allocated_bytes(co, graph)
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.file.get(graph).flush(co, graph)
    }

    fn truncate(&self, co: &Co, graph: &GraphRead<'_>, len: u64, exact: bool) -> Result<()> {
        self.resize(graph, len, |file, below| {
            file.truncate(co, graph, below, exact)
        })
    }

    fn grow_preallocated(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        self.resize(graph, len, |file, below| {
            file.grow_preallocated(co, graph, below, preallocation)
        })
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Longer and unaligned requests go on as they are: the node below takes them apart.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_growable(&self) -> bool {
        self.growable
    }

    /// The node below flushes where its driver cannot.
    fn native_fua(&self) -> bool {
        true
    }
}
