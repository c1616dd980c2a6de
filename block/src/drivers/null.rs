//! `null-co`: takes everything and keeps nothing. For measuring what the layers above cost.
//!
//! Options: `size` in bytes (1 GiB), `latency-ns` of each request (0), `read-zeroes` (off: buffers
//! are left as they are).

use crate::driver::{Changes, Driver, DriverStatus, OpenDriver, Place, Precision};
use crate::error::Result;
use crate::graph::GraphRead;
use crate::open::Opening;
use crate::types::{Limits, RequestFlags};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;
use std::time::Duration;

/// Registered as `null-co`.
#[derive(Debug)]
pub struct OpenNull;

impl OpenDriver for OpenNull {
    fn open(&self, _co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let options = opening.options();
        let driver = Null {
            size: options.take_size("size")?.unwrap_or(1 << 30),
            latency: Duration::from_nanos(options.take_u64("latency-ns")?.unwrap_or(0)),
            read_zeroes: options.take_bool("read-zeroes")?.unwrap_or(false),
        };
        opening.set_filename("null-co://");
        Ok(Box::new(driver))
    }
}

struct Null {
    size: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl Null {
    #[inline]
    fn wait(&self, co: &Co) {
        if !self.latency.is_zero() {
            coblock_aio::co::sleep(co, self.latency);
        }
    }
}

impl Driver for Null {
    fn format(&self) -> &'static str {
        "null-co"
    }

    fn pread(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        _offset: u64,
        mut buf: IoVecMut<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.wait(co);
        if self.read_zeroes {
            let len = buf.len();
            buf.fill(0, len, 0);
        }
        Ok(())
    }

    fn pwrite(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        _offset: u64,
        _buf: IoVec<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.wait(co);
        Ok(())
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        _offset: u64,
        _len: u64,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.wait(co);
        Ok(())
    }

    fn flush(&self, co: &Co, _graph: &GraphRead<'_>) -> Result<()> {
        self.wait(co);
        Ok(())
    }

    /// Zeros where they are asked for, else nobody knows: like the reference, neither data nor
    /// zeros.
    fn block_status<'g>(
        &'g self,
        _co: &Co,
        _graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        Ok(if self.read_zeroes {
            DriverStatus::zero(len).placed(Place::Here(offset))
        } else {
            DriverStatus::unallocated(len)
        })
    }

    /// Nothing is kept.
    fn allocated_bytes(&self, _co: &Co, _graph: &GraphRead<'_>) -> Result<u64> {
        Ok(0)
    }

    fn len(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn native_fua(&self) -> bool {
        true
    }

    /// Nothing in it depends on it.
    fn reopen_prepare(
        &self,
        _co: &Co,
        _graph: &GraphRead<'_>,
        _to: &mut Changes<'_>,
    ) -> Result<Option<Box<dyn Driver>>> {
        Ok(None)
    }
}
