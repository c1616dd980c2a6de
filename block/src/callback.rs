//! The face with callbacks (rule 2.4), for devices and programs that are no coroutines.
//!
//! ```text
//!   aio_pread --- starts a coroutine --> request --> bottom half: done(result, buffer) --> ends
//!      |                                                                                    |
//!      +-- returns                in flight, for close and everybody (rule 5.7) ------------+
//! ```
//! The submitting call returns before the callback runs, even when the request was over at once,
//! and the callback runs on the loop's own stack, in the context that submitted. Requests are the
//! same as those of [`BlockBackend::pread`] and its like: same checks, limits and errors.
//!
//! The buffer belongs to the request until the callback gets it back, so nothing can free it or
//! look into it meanwhile: a vector, an aligned buffer, or a guard of memory that lives elsewhere.
//!
//! A callback may submit, make synchronous requests ([`Mixed::nested`](crate::Mixed::nested)) and
//! drop anything; it holds no lock of ours.

use crate::accounting::IoKind;
use crate::backend::BlockBackend;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphRead;
use crate::request_table::Tracked;
use crate::types::{RequestFlags, bytes};
use coblock_aio::{AioContext, IoVec, IoVecMut};
use coblock_coroutine::{Co, ThreadLock, WakeHandle, mutant};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Not over, or its callback waits for its turn.
    Running,
    /// The callback runs now.
    CallingBack,
    /// The callback returned.
    Over,
}

/// What a request is: its kind, its range, and for copies where to.
type Submitted = (IoKind, (u64, u64), Option<(Arc<BlockBackend>, u64)>);

struct State {
    stage: Stage,
    waiters: Vec<WakeHandle>,
}

/// What the request, its callback and its handle share.
struct Shared(ThreadLock<State>);

impl Shared {
    fn stage(&self) -> Stage {
        self.0.lock().stage
    }

    /// Suspends until the callback returned.
    fn wait(&self, co: &Co) {
        loop {
            {
                let mut state = self.0.lock();
                if state.stage == Stage::Over {
                    return;
                }
                state.waiters.push(co.wake_handle());
            }
            co.suspend();
        }
    }

    fn call(&self, callback: impl FnOnce()) {
        self.0.lock().stage = Stage::CallingBack;
        // Over also when it panics: nobody waits for ever then.
        let _over = Over(self);
        callback();
    }
}

struct Over<'a>(&'a Shared);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.0.0.lock();
            state.stage = Stage::Over;
            std::mem::take(&mut state.waiters)
        };
        waiters.iter().for_each(WakeHandle::wake);
    }
}

/// A request whose callback has been or will be called. Dropping the handle changes nothing.
#[derive(Clone)]
pub struct AioRequest {
    shared: Arc<Shared>,
    context: Arc<AioContext>,
}

impl AioRequest {
    /// Has the callback returned?
    pub fn is_over(&self) -> bool {
        self.shared.stage() == Stage::Over
    }

    /// Gives the request up: suspends until its callback returned, which tells how it ended. It
    /// runs to its end; what was sent to a device is not called back. From a coroutine of any
    /// context.
    ///
    /// # Panics
    /// Nothing detects a coroutine that its own callback waits for: both would wait for ever.
    pub fn cancel(&self, co: &Co) {
        self.shared.wait(co);
    }

    /// The same in a callback of the context that submitted: polls it from inside. Whatever else is
    /// scheduled there runs meanwhile.
    ///
    /// # Panics
    /// In a coroutine, in another context, and in the request's own callback.
    #[track_caller]
    pub fn cancel_nested(&self) {
        assert!(
            !coblock_coroutine::in_coroutine() && self.context.is_current(),
            "a request submitted in context '{}' is cancelled outside of its callbacks",
            self.context.name()
        );
        assert!(
            self.shared.stage() != Stage::CallingBack,
            "a request is cancelled in its own callback, in context '{}'",
            self.context.name()
        );
        while !self.is_over() {
            coblock_aio::poll(true);
        }
    }
}

impl fmt::Debug for AioRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "AioRequest in '{}', {:?}",
            self.context.name(),
            self.shared.stage()
        )
    }
}

/// Requests with callbacks. Each takes what the call of the same name without `aio_` takes, returns
/// at once, and calls `done` from a bottom half of the current context, with what that call
/// returns.
///
/// # Errors
/// `OutOfMemory`: nothing was submitted, `done` is not called and the buffer is gone. Every other
/// failure comes to `done`.
///
/// # Panics
/// All of them: outside of every context, because there is nowhere to call back.
impl BlockBackend {
    /// Reads into all of `buf` from `offset`; see [`BlockBackend::pread`]. A buffer that is only
    /// borrowed is refused:
    /// ```compile_fail,E0597
    /// # use {coblock_block::BlockBackend, std::sync::Arc};
    /// fn borrowed(backend: &Arc<BlockBackend>) {
    ///     let mut buf = [0; 512];
    ///     let _ = backend.aio_pread(0, &mut buf[..], |_, _| ());
    /// }
    /// ```
    #[track_caller]
    pub fn aio_pread<B>(
        self: &Arc<Self>,
        offset: u64,
        buf: B,
        done: impl FnOnce(Result<()>, B) + Send + 'static,
    ) -> Result<AioRequest>
    where
        B: DerefMut<Target = [u8]> + Send + 'static,
    {
        let range = (offset, bytes(buf.len()));
        let read = move |backend: &BlockBackend, co: &Co, graph: &GraphRead<'_>, buf: &mut B| {
            let buf = IoVecMut::from(&mut buf[..]);
            let none = RequestFlags::empty();
            backend.node_in(graph).pread(co, graph, offset, buf, none)
        };
        self.submit((IoKind::Read, range, None), buf, read, done)
    }

    /// Writes all of `buf` at `offset`; see [`BlockBackend::pwrite`].
    #[track_caller]
    pub fn aio_pwrite<B>(
        self: &Arc<Self>,
        offset: u64,
        buf: B,
        flags: RequestFlags,
        done: impl FnOnce(Result<()>, B) + Send + 'static,
    ) -> Result<AioRequest>
    where
        B: Deref<Target = [u8]> + Send + 'static,
    {
        let range = (offset, bytes(buf.len()));
        let write = move |backend: &BlockBackend, co: &Co, graph: &GraphRead<'_>, buf: &mut B| {
            let buf = IoVec::from(&buf[..]);
            backend.node_in(graph).pwrite(co, graph, offset, buf, flags)
        };
        self.submit((IoKind::Write, range, None), buf, write, done)
    }

    /// Makes the range read as zeros; see [`BlockBackend::pwrite_zeroes`].
    #[track_caller]
    pub fn aio_pwrite_zeroes(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        flags: RequestFlags,
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<AioRequest> {
        let zero = move |backend: &BlockBackend, co: &Co, graph: &GraphRead<'_>, _: &mut ()| {
            backend
                .node_in(graph)
                .pwrite_zeroes(co, graph, offset, len, flags)
        };
        let done = move |result, ()| done(result);
        let request = (IoKind::Zero, (offset, len), None);
        self.submit(request, (), zero, done)
    }

    /// Gives the storage of the range back; see [`BlockBackend::pdiscard`].
    #[track_caller]
    pub fn aio_pdiscard(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<AioRequest> {
        let discard = move |backend: &BlockBackend, co: &Co, graph: &GraphRead<'_>, _: &mut ()| {
            backend.node_in(graph).pdiscard(co, graph, offset, len)
        };
        let done = move |result, ()| done(result);
        let request = (IoKind::Discard, (offset, len), None);
        self.submit(request, (), discard, done)
    }

    /// Copies to another backend; see [`BlockBackend::copy_range`].
    #[track_caller]
    pub fn aio_copy_range(
        self: &Arc<Self>,
        offset: u64,
        to: &Arc<BlockBackend>,
        to_offset: u64,
        len: u64,
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<AioRequest> {
        let target = Some((to.clone(), to_offset));
        let to = to.clone();
        let copy = move |backend: &BlockBackend, co: &Co, graph: &GraphRead<'_>, _: &mut ()| {
            backend.copy_range_admitted(co, graph, offset, (&to, to_offset), len)
        };
        let done = move |result, ()| done(result);
        let request = (IoKind::Read, (offset, len), target);
        self.submit(request, (), copy, done)
    }

    /// Everything whose callback was called before is on stable storage when `done` is; see
    /// [`BlockBackend::flush`].
    #[track_caller]
    pub fn aio_flush(
        self: &Arc<Self>,
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<AioRequest> {
        let flush = |backend: &BlockBackend, co: &Co, graph: &GraphRead<'_>, _: &mut ()| {
            backend.node_in(graph).flush(co, graph)
        };
        let done = move |result, ()| done(result);
        self.submit((IoKind::Flush, (0, 0), None), (), flush, done)
    }

    /// Serves a request and counts it; its places in the tables of requests in flight, which end
    /// after its callback.
    fn serve<'a>(
        &'a self,
        co: &'a Co,
        kind: IoKind,
        range: (u64, u64),
        target: &'a Option<(Arc<BlockBackend>, u64)>,
        request: impl FnOnce(&GraphRead<'_>) -> Result<()>,
    ) -> (Result<()>, [Option<Tracked<'a>>; 2]) {
        let began_ns = co.entered_ns();
        let traced = self.trace_if_wanted(co, kind, range);
        let admitted = match target {
            None => self.admit(co, range, kind.request()).map(|one| (one, None)),
            Some((to, at)) => self
                .admit_both(co, range, (to, *at))
                .map(|both| (both.source, Some(both.target))),
        };
        let (result, places) = match admitted {
            Err(error) => (Err(error), [None, None]),
            Ok((admitted, at_target)) => {
                let result = match target {
                    None => self.count(co, kind, range, began_ns, &admitted, request),
                    Some((to, _)) => self.count_copy(co, range, began_ns, (&admitted, to), request),
                };
                (result, [Some(admitted.into_request()), at_target])
            }
        };
        if let Some(req) = traced {
            self.trace_end(req, kind, range, &result);
        }
        (result, places)
    }

    #[track_caller]
    fn submit<B: Send + 'static>(
        self: &Arc<Self>,
        (kind, (offset, len), target): Submitted,
        mut buf: B,
        request: impl FnOnce(&BlockBackend, &Co, &GraphRead<'_>, &mut B) -> Result<()> + 'static,
        done: impl FnOnce(Result<()>, B) + Send + 'static,
    ) -> Result<AioRequest> {
        let Some(context) = coblock_aio::current() else {
            panic!("rule 2.4: a request with a callback is submitted outside of every context");
        };
        let shared = Arc::new(Shared(ThreadLock::new(State {
            stage: Stage::Running,
            waiters: Vec::new(),
        })));
        let handle = AioRequest {
            shared: shared.clone(),
            context: context.clone(),
        };
        let backend = self.clone();
        coblock_aio::spawn("aio request", move |co| {
            // Counted until the callback returned (rule 5.7); the graph is let go before, so that
            // the callback may do anything.
            let (result, counted) = backend.serve(co, kind, (offset, len), &target, |graph| {
                request(&backend, co, graph, &mut buf)
            });
            let _counted = (!mutant!("a request is over before its callback")).then_some(counted);
            let caller = shared.clone();
            let context = match mutant!("callbacks come in the main context") {
                true => backend.graph().main_context().clone(),
                false => context,
            };
            context.oneshot(move || caller.call(move || done(result, buf)));
            shared.wait(co);
        })
        .map_err(|error| Error::new(ErrorKind::OutOfMemory, error.to_string()))?;
        Ok(handle)
    }
}

const _: () = {
    const fn send_sync<T: Send + Sync>() {}
    send_sync::<AioRequest>();
};
