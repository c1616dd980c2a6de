//! `raw`: the bytes of its child as they are, perhaps a part of them.
//!
//! Options: `offset` and `size` in bytes, multiples of 512, name the part; without `size` it goes
//! to the end, and grows with the file.

use super::filtered::Filtered;
use crate::driver::{Driver, OpenDriver};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::open::Opening;
use crate::types::{ChildRole, RequestFlags};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;

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
        Ok(Box::new(Raw(Filtered::part(file, &guard, offset, size))))
    }
}

struct Raw(Filtered);

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
        let at = self.0.below(offset);
        self.0.file().pread(co, graph, at, buf, flags)
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let at = self.0.below(offset);
        self.0.file().pwrite(co, graph, at, buf, flags)
    }

    fn len(&self) -> u64 {
        self.0.len()
    }

    fn filtered(&self) -> Option<&Filtered> {
        Some(&self.0)
    }
}
