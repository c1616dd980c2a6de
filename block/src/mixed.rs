//! The face for callers that may or may not be in a coroutine (rules 2.2, 2.3).
//!
//! ```text
//!   in a coroutine        the call suspends it
//!   on the leader         a coroutine is made, and the loop is polled until it returned
//! ```
//! Both go through the same [`BlockBackend`], so checks, limits, errors and skipped flushes are the
//! same. Code that always is in a coroutine, all of this crate and of the formats, calls the
//! backend or its child instead: these methods are disallowed there (`clippy.toml`).
//!
//! Polling runs other people's callbacks. So it is refused where the caller holds something that
//! these may wait for, and in a callback of the loop itself unless nesting is declared
//! ([`Mixed::nested`]).

use crate::backend::BlockBackend;
use crate::error::Result;
use crate::io::Status;
use crate::types::RequestFlags;
use coblock_aio::Home;
use coblock_coroutine::{Co, Hold, Schedule};
use std::panic::Location;
use std::sync::Arc;

/// A backend for code that does not know whether it is in a coroutine.
///
/// # Panics
/// Every call: in a coroutine that holds a graph guard or a coroutine lock; on the leader in a
/// callback of the context that it would wait for, without nesting declared (rule 2.3).
#[derive(Clone, Copy, Debug)]
pub struct Mixed<'a> {
    backend: &'a BlockBackend,
    /// `None`: the context in whose callback the call is.
    home: Option<&'a Home>,
}

impl<'a> Mixed<'a> {
    /// Waits by polling `home`, outside of its callbacks.
    pub fn new(backend: &'a BlockBackend, home: &'a Home) -> Mixed<'a> {
        Mixed {
            backend,
            home: Some(home),
        }
    }

    /// Declares nesting: waits by polling the current context from inside one of its callbacks.
    /// Whatever else is scheduled there runs meanwhile, before this callback returned.
    pub fn nested(backend: &'a BlockBackend) -> Mixed<'a> {
        Mixed {
            backend,
            home: None,
        }
    }

    /// See [`BlockBackend::pread`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn pread(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.run(|co| self.backend.pread(co, offset, buf))
    }

    /// See [`BlockBackend::pwrite`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn pwrite(&self, offset: u64, buf: &[u8], flags: RequestFlags) -> Result<()> {
        self.run(|co| self.backend.pwrite(co, offset, buf, flags))
    }

    /// See [`BlockBackend::pwrite_sync`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn pwrite_sync(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.run(|co| self.backend.pwrite_sync(co, offset, buf))
    }

    /// See [`BlockBackend::pwrite_zeroes`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn pwrite_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        self.run(|co| self.backend.pwrite_zeroes(co, offset, len, flags))
    }

    /// See [`BlockBackend::pdiscard`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.run(|co| self.backend.pdiscard(co, offset, len))
    }

    /// See [`BlockBackend::copy_range`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn copy_range(
        &self,
        offset: u64,
        to: &BlockBackend,
        to_offset: u64,
        len: u64,
    ) -> Result<()> {
        self.run(|co| self.backend.copy_range(co, offset, to, to_offset, len))
    }

    /// See [`BlockBackend::flush`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn flush(&self) -> Result<()> {
        self.run(|co| self.backend.flush(co))
    }

    /// See [`BlockBackend::truncate`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn truncate(&self, len: u64, exact: bool) -> Result<()> {
        self.run(|co| self.backend.truncate(co, len, exact))
    }

    /// See [`BlockBackend::block_status`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn block_status(&self, offset: u64, len: u64) -> Result<Status> {
        self.run(|co| self.backend.block_status(co, offset, len))
    }

    /// See [`BlockBackend::map`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn map(&self, offset: u64, len: u64) -> Result<Status> {
        self.run(|co| self.backend.map(co, offset, len))
    }

    /// See [`BlockBackend::is_allocated`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn is_allocated(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        self.run(|co| self.backend.is_allocated(co, offset, len))
    }

    /// See [`BlockBackend::close`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn close(&self) -> Result<()> {
        self.run(|co| self.backend.close(co))
    }

    #[track_caller]
    fn run<R>(&self, f: impl FnOnce(&Co) -> Result<R>) -> Result<R> {
        let caller = Location::caller();
        if coblock_coroutine::in_coroutine() {
            return coblock_coroutine::with_current(|co| {
                let co = co.expect("asked just above");
                refuse_holding(co, caller);
                f(co)
            });
        }
        let Some(home) = self.home else {
            return run_nested(f, caller);
        };
        assert!(
            !home.context().is_current(),
            "rule 2.3: a mixed call at {caller} in a callback of context '{}', which it would wait for; \
             declare it with Mixed::nested",
            home.context().name()
        );
        home.run(f)
    }
}

/// From inside a callback of the current context.
fn run_nested<R>(f: impl FnOnce(&Co) -> Result<R>, caller: &Location<'_>) -> Result<R> {
    let Some(context) = coblock_aio::current() else {
        panic!("a nested mixed call at {caller} outside of every context");
    };
    let home: Arc<dyn Schedule> = context;
    let turn = || {
        coblock_aio::poll(true);
    };
    coblock_coroutine::run_scoped(Some(&home), f, turn)
        .expect("memory for the stack of a coroutine")
}

/// Rule 2.3: what a coroutine-only place is recognised by.
fn refuse_holding(co: &Co, caller: &Location<'_>) {
    let (locks, guards) = (co.holds(Hold::Lock), co.holds(Hold::GraphRead));
    assert!(
        locks == 0 && guards == 0,
        "rule 2.3: a mixed call at {caller} in {co:?}, which holds {locks} coroutine lock(s) and {guards} graph \
         guard(s): call the backend with its `co`"
    );
}
