//! A filter that counts the sections that its node is in, and notes where it is called.

use coblock_aio::AioContext;
use coblock_block::{
    Child, ChildRole, Driver, Error, ErrorKind, Limits, OpenDriver, Opening, Permissions, Result,
};
use coblock_coroutine::{Co, ThreadLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// How often driver callbacks came.
#[derive(Default)]
pub struct Calls {
    begun: AtomicU32,
    ended: AtomicU32,
    /// Permissions that were prepared, and neither committed nor given up.
    prepared: AtomicU32,
    /// Moves are refused.
    pub stays: AtomicBool,
    /// What moves and sections called, in which home, and where.
    notes: ThreadLock<Vec<String>>,
    home: ThreadLock<String>,
}

impl Calls {
    /// Begins and ends of sections.
    pub fn get(&self) -> (u32, u32) {
        (
            self.begun.load(Ordering::Relaxed),
            self.ended.load(Ordering::Relaxed),
        )
    }

    /// How many permissions are prepared, and neither committed nor given up.
    pub fn prepared(&self) -> u32 {
        self.prepared.load(Ordering::Relaxed)
    }

    /// What was noted since the last look.
    pub fn notes(&self) -> String {
        std::mem::take(&mut *self.notes.lock()).join(", ")
    }

    fn note(&self, what: &str) {
        let home = self.home.lock().clone();
        self.notes.lock().push(format!("{what} {home}"));
    }
}

/// Registered as `counted`; every node of it has a child `file` and counts in its own place, under
/// the option `calls`.
pub struct OpenCounted;

struct Counted {
    file: Arc<Child>,
    /// A second child, if there is one.
    _beside: Option<Arc<Child>>,
    len: u64,
    calls: Arc<Calls>,
}

impl OpenDriver for OpenCounted {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let calls = opening.options().take_object::<Calls>("calls")?;
        let calls = calls.unwrap_or_default();
        *calls.home.lock() = opening.home_context().name().to_owned();
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        let beside = match opening.options().get("beside") {
            Some(_) => Some(opening.open_child(co, "beside", ChildRole::Backing)?),
            None => None,
        };
        let len = file.len(&opening.graph().read(co));
        Ok(Box::new(Counted {
            file,
            _beside: beside,
            len,
            calls,
        }))
    }
}

impl Driver for Counted {
    fn format(&self) -> &'static str {
        "counted"
    }

    super::requests::passes_requests_on!(file);

    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn drained_begin(&self) {
        self.calls.begun.fetch_add(1, Ordering::Relaxed);
        self.calls.note("begin");
    }

    fn drained_end(&self) {
        self.calls.ended.fetch_add(1, Ordering::Relaxed);
        self.calls.note("end");
    }

    fn permissions_prepare(&self, _all: Permissions) -> Result<()> {
        self.calls.prepared.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn permissions_commit(&self) {
        self.calls.prepared.fetch_sub(1, Ordering::Relaxed);
    }

    fn permissions_abort(&self) {
        self.calls.prepared.fetch_sub(1, Ordering::Relaxed);
    }

    fn may_move(&self, _to: &Arc<AioContext>) -> Result<()> {
        if self.calls.stays.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::NotSupported, "told to stay"));
        }
        Ok(())
    }

    fn detach_context(&self, from: &Arc<AioContext>) {
        assert!(from.is_current() && !coblock_coroutine::in_coroutine());
        assert_eq!(*self.calls.home.lock(), from.name());
        self.calls.note("detach");
        self.calls.home.lock().clear();
    }

    fn attach_context(&self, to: &Arc<AioContext>) {
        assert!(to.is_current() && !coblock_coroutine::in_coroutine());
        assert!(self.calls.home.lock().is_empty(), "attached twice");
        to.name().clone_into(&mut self.calls.home.lock());
        self.calls.note("attach");
    }
}
