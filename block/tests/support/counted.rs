//! A filter that counts the sections that its node is in.

use coblock_aio::{IoVec, IoVecMut};
use coblock_block::{
    Child, ChildRole, Driver, GraphRead, Limits, OpenDriver, Opening, RequestFlags, Result,
};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often driver callbacks came.
#[derive(Default)]
pub struct Calls {
    begun: AtomicU32,
    ended: AtomicU32,
}

impl Calls {
    /// Begins and ends of sections.
    pub fn get(&self) -> (u32, u32) {
        (
            self.begun.load(Ordering::Relaxed),
            self.ended.load(Ordering::Relaxed),
        )
    }
}

/// Registered as `counted`; every node of it has a child `file` and counts in its own place, under
/// the option `calls`.
pub struct OpenCounted;

struct Counted {
    file: Arc<Child>,
    len: u64,
    calls: Arc<Calls>,
}

impl OpenDriver for OpenCounted {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let calls = opening.options().take_object::<Calls>("calls")?;
        let file = opening.open_child(co, "file", ChildRole::Filtered)?;
        let len = file.len(&opening.graph().read(co));
        Ok(Box::new(Counted {
            file,
            len,
            calls: calls.unwrap_or_default(),
        }))
    }
}

impl Driver for Counted {
    fn format(&self) -> &'static str {
        "counted"
    }

    fn pread(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVecMut<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file.pread(co, graph, offset, buf, flags)
    }

    fn pwrite(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        offset: u64,
        buf: IoVec<'_>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.file.pwrite(co, graph, offset, buf, flags)
    }

    fn flush(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        self.file.flush(co, graph)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn drained_begin(&self) {
        self.calls.begun.fetch_add(1, Ordering::Relaxed);
    }

    fn drained_end(&self) {
        self.calls.ended.fetch_add(1, Ordering::Relaxed);
    }
}
