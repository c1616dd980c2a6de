//! `sim`: a disk in memory, for tests. It holds requests back, delays and reorders them, fails
//! them, and loses power.
//!
//! Options: `disk` (a [`SimDisk`], needed); `request-alignment`, `mem-alignment`, `max-transfer` in
//! bytes; `growable` (on), `fua` (off), `zeroes` (on). The disk outlives the node, so a test can
//! open it again.
//!
//! Delays are on the clock of the context in which a request runs; with a virtual one a run depends
//! on its seeds and on nothing else.

mod cut;
mod disk;
mod fault;
mod log;
mod pages;

pub use cut::PowerCuts;
pub use disk::{Counts, SimDisk};
pub use fault::{Fault, Hold, Match, Op};
pub use log::{Keep, LogEntry, SECTOR};

use crate::driver::{
    Changes, Driver, DriverStatus, OpenDriver, Place, Precision, shrinks_preallocated,
    unsupported_preallocation,
};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::graph::GraphRead;
use crate::open::Opening;
use crate::types::{Limits, MAX_REQUEST, Preallocation, RequestFlags, bytes};
use coblock_aio::transfer::{Next, finish_read, finish_write};
use coblock_aio::{IoVec, IoVecMut};
use coblock_coroutine::Co;
use disk::Action;
use std::io;
use std::sync::Arc;

/// Registered as `sim`.
#[derive(Debug)]
pub struct OpenSim;

impl OpenDriver for OpenSim {
    fn open(&self, _co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let options = opening.options();
        let Some(disk) = options.take_object::<SimDisk>("disk")? else {
            return Err(Error::new(
                ErrorKind::MissingOption,
                "Parameter 'disk' is missing",
            ));
        };
        let request_alignment = options.take_u64("request-alignment")?.unwrap_or(1);
        let mem_alignment = options.take_u64("mem-alignment")?.unwrap_or(1);
        let max_transfer = options.take_size("max-transfer")?.unwrap_or(MAX_REQUEST);
        let sane = |value: u64| value.is_power_of_two() && value <= 1 << 20;
        if !sane(request_alignment)
            || !sane(mem_alignment)
            || mem_alignment > request_alignment
            || max_transfer < request_alignment
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                "The limits of the simulated disk make no sense",
            ));
        }
        let limits = Limits {
            request_alignment,
            mem_alignment: usize::try_from(mem_alignment).expect("at most a megabyte"),
            max_transfer,
            ..Limits::default()
        };
        let driver = Sim {
            limits,
            growable: options.take_bool("growable")?.unwrap_or(true),
            fua: options.take_bool("fua")?.unwrap_or(false),
            zeroes: options.take_bool("zeroes")?.unwrap_or(true),
            disk,
        };
        opening.set_filename("sim");
        Ok(Box::new(driver))
    }
}

struct Sim {
    disk: Arc<SimDisk>,
    limits: Limits,
    growable: bool,
    fua: bool,
    zeroes: bool,
}

impl Sim {
    fn perform(&self, co: &Co, what: &str, offset: u64, action: Action<'_>) -> Result<()> {
        let result = self.disk.perform(co, offset, action, true);
        result.map(drop).map_err(|errno| {
            let error = io::Error::from_raw_os_error(errno);
            failed(what, offset, error)
        })
    }

    /// One attempt, with the result that a system call would give.
    fn attempt(&self, co: &Co, offset: u64, action: Action<'_>, patient: bool) -> i32 {
        match self.disk.perform(co, offset, action, patient) {
            Ok(count) => i32::try_from(count).expect("a transfer of less than 2 GiB"),
            Err(errno) => -errno,
        }
    }

    /// What a driver is promised about requests.
    fn assert_obeys(&self, offset: u64, len: u64, aligned_memory: bool) {
        let Limits {
            request_alignment,
            max_transfer,
            ..
        } = self.limits;
        assert!(
            (offset | len).is_multiple_of(request_alignment)
                && (1..=max_transfer).contains(&len)
                && aligned_memory,
            "a request of {len} bytes at {offset} does not obey {:?}",
            self.limits
        );
    }
}

fn failed(what: &str, offset: u64, error: io::Error) -> Error {
    Error::from_io(what, error).at_offset(offset).at_file("sim")
}

impl Driver for Sim {
    fn format(&self) -> &'static str {
        "sim"
    }

    fn pread(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        mut buf: IoVecMut<'_>,
        _flags: RequestFlags,
    ) -> Result<()> {
        let aligned = buf.is_aligned(self.limits.mem_alignment);
        self.assert_obeys(offset, bytes(buf.len()), aligned);
        let mut data = vec![0; buf.len()];
        let len = data.len();
        let mut attempt = |next: Next| {
            let rest = Action::Read(&mut data[next.done..]);
            self.attempt(co, offset + next.done as u64, rest, next.on_thread)
        };
        let first = attempt(Next::default());
        let file_len = || Ok(self.disk.len());
        finish_read(offset, len, first, attempt, file_len)
            .map_err(|e| failed("read", offset, e))?;
        buf.copy_from(0, &data);
        Ok(())
    }

    fn pwrite(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        let aligned = buf.is_aligned(self.limits.mem_alignment);
        self.assert_obeys(offset, bytes(buf.len()), aligned);
        let fua = flags.contains(RequestFlags::FUA);
        assert!(
            self.fua || !fua,
            "FUA reached a driver that does not have it"
        );
        let all = buf.to_vec();
        let attempt = |next: Next| {
            let data = all[next.done..].to_vec();
            let rest = Action::Write { data, fua };
            self.attempt(co, offset + next.done as u64, rest, next.on_thread)
        };
        let first = attempt(Next::default());
        finish_write(all.len(), first, attempt).map_err(|e| failed("write", offset, e))
    }

    fn pwrite_zeroes(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        offset: u64,
        len: u64,
        _flags: RequestFlags,
    ) -> Result<()> {
        if !self.zeroes {
            return Err(self.not_supported("writing zeroes"));
        }
        self.perform(co, "write zeroes", offset, Action::Zero { len })
    }

    fn pdiscard(&self, co: &Co, _graph: &GraphRead<'_>, offset: u64, len: u64) -> Result<()> {
        self.perform(co, "discard", offset, Action::Discard { len })
    }

    /// Data where something was written, in pages of 4 KiB.
    fn block_status<'g>(
        &'g self,
        co: &Co,
        _graph: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        let mut answer = (true, len);
        let action = Action::Status {
            len,
            answer: &mut answer,
        };
        self.perform(co, "block status", offset, action)?;
        let status = match answer {
            (true, len) => DriverStatus::data(len),
            (false, len) => DriverStatus::zero(len),
        };
        Ok(status.placed(Place::Here(offset)))
    }

    fn event(&self, event: Event) {
        self.disk.event(event);
    }

    fn flush(&self, co: &Co, _graph: &GraphRead<'_>) -> Result<()> {
        self.perform(co, "flush", 0, Action::Flush)
    }

    fn truncate(&self, co: &Co, _graph: &GraphRead<'_>, len: u64, _exact: bool) -> Result<()> {
        self.perform(co, "resize", len, Action::Resize)
    }

    /// Memory has no space to set aside: all ways but that of formats are the same.
    fn grow_preallocated(
        &self,
        co: &Co,
        _graph: &GraphRead<'_>,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        if preallocation == Preallocation::Metadata {
            return Err(unsupported_preallocation(preallocation));
        }
        if len < self.disk.len() {
            return Err(shrinks_preallocated());
        }
        self.perform(co, "resize", len, Action::Resize)
    }

    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn is_growable(&self) -> bool {
        self.growable
    }

    fn native_fua(&self) -> bool {
        self.fua
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
