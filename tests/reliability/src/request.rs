//! One request of a script: sent from here or from another context, and told to the history.

use std::cell::RefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coblock::aio::co::run_in;
use coblock::aio::{AioContext, AlignedBuf};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::throttle::{Limit, ThrottleConfig, ThrottleGroup};
use coblock::block::{self, BlockBackend, DenyAll, DriverRegistry, ErrorKind, Options};
use coblock::block::{Drain, Drained, Graph, RequestFlags};
use coblock::coroutine::Co;

use super::load::{Effect, Failed, Shared};
use super::model::{Puts, WriteId};
use super::script::Op;

/// Name of the group of limits that scripts set.
pub const LIMITS: &str = "script";

/// A buffer, sometimes aligned for direct I/O and sometimes just not, so that the bounce buffers
/// have work.
enum Buffer {
    Aligned(AlignedBuf),
    Ragged(Vec<u8>),
}

impl Buffer {
    fn new(len: usize, ragged: bool) -> Self {
        if ragged {
            Buffer::Ragged(vec![0xa5; len + 1])
        } else {
            Buffer::Aligned(AlignedBuf::try_new(len, 4096).expect("a small buffer"))
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Buffer::Aligned(buf) => buf,
            Buffer::Ragged(buf) => &mut buf[1..],
        }
    }
}

/// Who sends a request, and from where.
pub(crate) struct Sender<'a> {
    pub(crate) co: &'a Co,
    pub(crate) backend: &'a Arc<BlockBackend>,
    pub(crate) elsewhere: Option<&'a Arc<AioContext>>,
}

impl Sender<'_> {
    /// Does it send to another context than this one?
    pub(crate) fn is_elsewhere(&self) -> bool {
        let here = coblock::aio::current().expect("a request runs in a context");
        self.elsewhere
            .is_some_and(|there| !Arc::ptr_eq(there, &here))
    }

    /// Calls `f` here, or as a coroutine of the other context. (Rule 3.10.)
    pub(crate) fn send<R: Send>(&self, f: impl FnOnce(&Co, &Arc<BlockBackend>) -> R + Send) -> R {
        let backend = self.backend;
        match self.elsewhere {
            None => f(self.co, backend),
            Some(context) => run_in(self.co, context, "elsewhere", |co| f(co, backend))
                .expect("memory for a stack"),
        }
    }
}

impl Shared {
    /// Sends a request and tells the history. On a disk that is being made shorter one may be
    /// refused that would have fitted before.
    pub(crate) fn request(&self, sender: &Sender<'_>, op: Op) -> Result<(), Failed> {
        let len = sender.backend.len();
        let before = self.state.borrow().resizes;
        match self.send(sender, op) {
            Err(Failed::Error(error)) if error.kind() == ErrorKind::OutOfBounds => {
                let resized = !self.state.borrow().resizes.none_since(before);
                let fits = op.range().is_some_and(|(at, many)| at + many as u64 <= len);
                match fits && !resized {
                    true => Err(Failed::Error(error)),
                    false => Ok(()),
                }
            }
            // It asked not to be done in any other way.
            Err(Failed::Error(error)) if is_too_slow(op, &error) => Ok(()),
            result => result,
        }
    }

    fn send(&self, sender: &Sender<'_>, op: Op) -> Result<(), Failed> {
        let ragged = self.state.borrow_mut().rng.chance(25);
        let history = || RefMut::map(self.state.borrow_mut(), |s| &mut s.history);
        let none = RequestFlags::empty();
        match op {
            Op::Read { offset, len } => {
                let mut buf = Buffer::new(len, ragged);
                let token = history().begin_read();
                let bytes = buf.bytes();
                sender.send(|co, backend| backend.pread(co, offset, bytes))?;
                let judged = history().end_read(&token, offset, buf.bytes());
                judged.map_err(Failed::Wrong)
            }
            Op::Write { offset, len, flags } => {
                let mut buf = Buffer::new(len, ragged);
                let id = history().begin_write(offset, buf.bytes(), self.log());
                let bytes = &*buf.bytes();
                let result = sender.send(|co, backend| backend.pwrite(co, offset, bytes, flags));
                self.changed(id, op, flags, result)
            }
            Op::Zero { offset, len, flags } => {
                let id = history().begin_zeros(offset, len, self.log(), Puts::Zeros);
                let many = len as u64;
                let result =
                    sender.send(|co, backend| backend.pwrite_zeroes(co, offset, many, flags));
                self.changed(id, op, flags, result)
            }
            Op::Discard { offset, len } => {
                let id = history().begin_zeros(offset, len, self.log(), Puts::ZerosOrNothing);
                let many = len as u64;
                let result = sender.send(|co, backend| backend.pdiscard(co, offset, many));
                self.changed(id, op, none, result)
            }
            Op::Copy { offset, len } => {
                let mut buf = vec![0; len];
                let id = history().begin_write(offset, &mut buf, self.log());
                let result = sender.send(|co, backend| copy(co, backend, offset, &buf));
                self.changed(id, op, none, result)
            }
            // Where somebody else has made it longer, or shorter, it is to stay so.
            Op::Grow { len } if sender.backend.len() < len => {
                self.resize(sender, len, |co, backend| backend.truncate(co, len, true))
            }
            Op::Shrink { len } if sender.backend.len() > len => {
                self.resize(sender, len, |co, backend| backend.truncate(co, len, true))
            }
            Op::Grow { .. } | Op::Shrink { .. } | Op::Move { .. } => Ok(()),
            Op::Resize { len } => {
                // It asks the disk below in its own section, whoever else has one.
                self.state.borrow_mut().changes.begin();
                let resized = self.resize(sender, len, |co, backend| backend.resize(co, len));
                self.state.borrow_mut().changes.end();
                resized
            }
            Op::Change(change) => self.change(sender, change),
            Op::Drain => self.hold(sender, |co, backend| backend.node().drain(co)),
            Op::DrainAll => self.hold(sender, |co, backend| backend.graph().drain(co)),
            Op::Lock => {
                self.lock(sender.co, sender.backend.graph());
                Ok(())
            }
            Op::Throttle { iops, bps } => {
                self.limit(sender.backend, iops, bps);
                Ok(())
            }
            Op::Flush => {
                let began = history().begin_flush();
                sender.send(|co, backend| backend.flush(co))?;
                history().end_flush(began, self.log());
                Ok(())
            }
            Op::Wait | Op::Reopen | Op::Mark => unreachable!("steps are no requests"),
        }
    }

    /// A write has ended, or a resize.
    fn written(
        &self,
        id: WriteId,
        flags: RequestFlags,
        result: block::Result<()>,
    ) -> Result<(), Failed> {
        let history = &mut self.state.borrow_mut().history;
        match result {
            Ok(()) if flags.contains(RequestFlags::FUA) => {
                history.end_durable_write(id, self.log());
            }
            Ok(()) => history.end_write(id),
            Err(_) => history.fail_write(id),
        }
        Ok(result?)
    }

    /// A request has ended that changes the disk; if it was refused, it has not changed it.
    fn changed(
        &self,
        id: WriteId,
        op: Op,
        flags: RequestFlags,
        result: block::Result<()>,
    ) -> Result<(), Failed> {
        if let Err(error) = result {
            let (offset, len) = op.range().expect("it has one");
            if error.kind() == ErrorKind::OutOfBounds {
                self.state.borrow_mut().history.take_back(id, offset, len);
                return Err(Failed::Error(error));
            }
            return self.written(id, flags, Err(error));
        }
        self.written(id, flags, Ok(()))
    }

    fn resize(
        &self,
        sender: &Sender<'_>,
        len: u64,
        resize: impl FnOnce(&Co, &Arc<BlockBackend>) -> block::Result<()> + Send,
    ) -> Result<(), Failed> {
        let _layout = self.layout.read(sender.co);
        let id = {
            let mut s = self.state.borrow_mut();
            s.resizes.begin();
            s.history.begin_resize(len, self.log())
        };
        let result = sender.send(resize);
        self.state.borrow_mut().resizes.end();
        self.written(id, RequestFlags::empty(), result)
    }

    /// Rules 5.1, 5.4: in a section nothing is in flight, and the disk below hears nothing; unless the
    /// disk got another node meanwhile.
    fn hold(
        &self,
        sender: &Sender<'_>,
        drain: impl FnOnce(&Co, &Arc<BlockBackend>) -> Drained + Send,
    ) -> Result<(), Failed> {
        let before = self.state.borrow().changes;
        let drained = sender.send(drain);
        let asked = self.asked();
        let time = Duration::from_micros(self.setting.delay_us);
        sender.send(|co, _| coblock::aio::co::sleep(co, time));
        if self.state.borrow().changes.none_since(before) {
            let in_flight = sender.backend.in_flight();
            assert_eq!(in_flight, 0, "requests in flight in {drained:?}");
            assert_eq!(self.asked(), asked, "requests sent below in {drained:?}");
        }
        drop(drained);
        self.happened(Effect::Section);
        Ok(())
    }

    /// Rule 7.5: the main home, outside of coroutines.
    fn lock(&self, co: &Co, graph: &Arc<Graph>) {
        let _turn = self.writer.lock(co);
        let over = Arc::new(AtomicBool::new(false));
        let (told, its, handle) = (over.clone(), graph.clone(), co.wake_handle());
        graph.main_context().oneshot(move || {
            let write = its.write();
            assert_eq!(its.readers(), 0, "readers beside the writer");
            drop(write);
            told.store(true, Ordering::Release);
            handle.wake();
        });
        while !over.load(Ordering::Acquire) {
            co.suspend();
        }
    }

    /// Rule 8.1: new limits, for those that wait too.
    fn limit(&self, backend: &BlockBackend, iops: u64, bps: u64) {
        let config = ThrottleConfig {
            iops_total: Limit::average(iops),
            bps_total: Limit::average(bps),
            ..ThrottleConfig::default()
        };
        let group = self.group(backend.graph());
        group.set_config(config).expect("limits that make sense");
        if config.is_enabled() {
            self.happened(Effect::Limit);
        }
        if !self.setting.throttle_node {
            backend.set_throttle(config.is_enabled().then_some(&group));
        }
    }
}

impl Shared {
    /// The group of limits that scripts set.
    pub(crate) fn group(&self, graph: &Arc<Graph>) -> Arc<ThrottleGroup> {
        graph.throttle_group(LIMITS).unwrap_or_else(|| {
            let (clock, none) = (graph.main_context().clock(), ThrottleConfig::default());
            let group = ThrottleGroup::new(LIMITS, clock, none).expect("no limits");
            graph.add_throttle_group(&group).expect("there was none");
            group
        })
    }
}

/// Was it refused because it asked for the quick way only?
fn is_too_slow(op: Op, error: &block::Error) -> bool {
    let quick = matches!(op, Op::Zero { flags, .. } if flags.contains(RequestFlags::NO_FALLBACK));
    quick && error.kind() == ErrorKind::NotSupported
}

/// Copies `bytes` from a disk of their own.
fn copy(co: &Co, backend: &BlockBackend, offset: u64, bytes: &[u8]) -> block::Result<()> {
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", SimDisk::with_contents(bytes));
    let registry = DriverRegistry::with_builtin();
    let node = block::open(co, backend.graph(), &registry, &DenyAll, options);
    let source = BlockBackend::new(backend.graph(), node.expect("a disk in memory"));
    let copied = source.copy_range(co, 0, backend, offset, bytes.len() as u64);
    source.close(co).expect("nothing happens to the source");
    copied
}
