//! A script, sent to an open disk by many coroutines at once, and judged by the history as it goes.
//!
//! Each of the workers takes the next request of the script, so that as many are in flight as there
//! are workers, and a slow one holds up nobody. All of them run at one home; the model lies between
//! them and needs no lock.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::{AlignedBuf, Home};
use coblock::block::drivers::sim::SimDisk;
use coblock::block::{self, BlockBackend, DenyAll, DriverRegistry, Options, RequestFlags};
use coblock::coroutine::Co;

use super::model::{History, Puts, Violation};
use super::rng::Rng;
use super::script::{Op, Params};

/// What the workers share.
struct Shared {
    history: History,
    script: Vec<Op>,
    next: usize,
    in_flight: usize,
    /// Most requests that were in flight at once.
    peak: usize,
    workers: usize,
    errors: usize,
    rng: Rng,
}

/// Why a request did not do what it should.
enum Failed {
    /// It said so.
    Error(coblock::block::Error),
    /// It returned what it must not.
    Wrong(Violation),
}

impl From<coblock::block::Error> for Failed {
    fn from(error: coblock::block::Error) -> Self {
        Failed::Error(error)
    }
}

/// What a load does about a request that fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Ends the test.
    Panic,
    /// Counts it. A write that failed may be there in part, a flush that failed has made nothing
    /// durable.
    Count,
}

/// What came of a load.
pub struct Loaded {
    /// Requests that failed.
    pub errors: usize,
    /// What the disk may hold now.
    pub history: History,
    /// Most requests that were in flight at once.
    pub peak: usize,
}

/// Sends the whole script of `params` to `backend` and returns when every request is done. `log`
/// tells how many entries the file below was sent so far, for a power cut; a constant will do where
/// there is none.
///
/// Panics when a request fails or a read returns what it must not.
pub fn run(
    home: &Home,
    backend: &Arc<BlockBackend>,
    params: &Params,
    history: History,
    log: impl Fn() -> usize + 'static,
) -> Loaded {
    run_with(home, backend, params, history, log, OnError::Panic)
}

/// The same, with a choice of what to do about errors.
pub fn run_with(
    home: &Home,
    backend: &Arc<BlockBackend>,
    params: &Params,
    history: History,
    log: impl Fn() -> usize + 'static,
    on_error: OnError,
) -> Loaded {
    let shared = Rc::new(RefCell::new(Shared {
        history,
        script: params.script(),
        next: 0,
        in_flight: 0,
        peak: 0,
        workers: params.in_flight,
        errors: 0,
        rng: Rng::new(!params.seed),
    }));
    let log = Rc::new(log);
    for _ in 0..params.in_flight {
        let (shared, backend, log) = (shared.clone(), backend.clone(), log.clone());
        let seed = params.seed;
        home.spawn("worker", move |co| {
            while let Some(op) = take(&shared) {
                let result = request(co, &backend, &shared, op, &*log);
                let mut shared = shared.borrow_mut();
                shared.in_flight -= 1;
                match result {
                    Ok(()) => {}
                    Err(Failed::Wrong(violation)) => panic!("seed {seed}: {op:?}: {violation}"),
                    Err(Failed::Error(_)) if on_error == OnError::Count => shared.errors += 1,
                    Err(Failed::Error(error)) => panic!("seed {seed}: {op:?}: {error}"),
                }
            }
            shared.borrow_mut().workers -= 1;
        });
    }
    while shared.borrow().workers > 0 {
        home.poll(true);
    }
    let shared = Rc::into_inner(shared)
        .expect("every worker has ended")
        .into_inner();
    Loaded {
        errors: shared.errors,
        history: shared.history,
        peak: shared.peak,
    }
}

fn take(shared: &RefCell<Shared>) -> Option<Op> {
    let mut s = shared.borrow_mut();
    let op = s.script.get(s.next).copied()?;
    s.next += 1;
    s.in_flight += 1;
    s.peak = s.peak.max(s.in_flight);
    Some(op)
}

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

fn request(
    co: &Co,
    backend: &BlockBackend,
    shared: &RefCell<Shared>,
    op: Op,
    log: &dyn Fn() -> usize,
) -> Result<(), Failed> {
    let ragged = shared.borrow_mut().rng.chance(25);
    match op {
        Op::Read { offset, len } => {
            let mut buf = Buffer::new(len, ragged);
            let token = shared.borrow_mut().history.begin_read();
            backend.pread(co, offset, buf.bytes())?;
            let judged = shared
                .borrow_mut()
                .history
                .end_read(&token, offset, buf.bytes());
            judged.map_err(Failed::Wrong)
        }
        Op::Write { offset, len } => {
            let mut buf = Buffer::new(len, ragged);
            let id = shared
                .borrow_mut()
                .history
                .begin_write(offset, buf.bytes(), log());
            backend.pwrite(co, offset, &*buf.bytes(), RequestFlags::empty())?;
            shared.borrow_mut().history.end_write(id);
            Ok(())
        }
        Op::Zero { offset, len, unmap } => {
            let id = shared
                .borrow_mut()
                .history
                .begin_zeros(offset, len, log(), Puts::Zeros);
            let flags = if unmap {
                RequestFlags::MAY_UNMAP
            } else {
                RequestFlags::empty()
            };
            backend.pwrite_zeroes(co, offset, len as u64, flags)?;
            shared.borrow_mut().history.end_write(id);
            Ok(())
        }
        Op::Discard { offset, len } => {
            let id =
                shared
                    .borrow_mut()
                    .history
                    .begin_zeros(offset, len, log(), Puts::ZerosOrNothing);
            backend.pdiscard(co, offset, len as u64)?;
            shared.borrow_mut().history.end_write(id);
            Ok(())
        }
        Op::Copy { offset, len } => {
            let mut buf = vec![0; len];
            let id = shared
                .borrow_mut()
                .history
                .begin_write(offset, &mut buf, log());
            let options = Options::new()
                .with("driver", "sim")
                .with_object("disk", SimDisk::with_contents(&buf));
            let registry = DriverRegistry::with_builtin();
            let node = block::open(co, backend.graph(), &registry, &DenyAll, options)?;
            let source = BlockBackend::new(backend.graph(), node);
            let copied = source.copy_range(co, 0, backend, offset, len as u64);
            source.close(co)?;
            copied?;
            shared.borrow_mut().history.end_write(id);
            Ok(())
        }
        Op::Grow { len } => {
            match backend.truncate(co, len, true) {
                // Somebody else has made it longer.
                Err(_) if backend.len() > len => Ok(()),
                grown => Ok(grown?),
            }
        }
        Op::Flush => {
            let began = shared.borrow_mut().history.begin_flush();
            backend.flush(co)?;
            shared.borrow_mut().history.end_flush(began, log());
            Ok(())
        }
    }
}

/// Reads the first `size` bytes of the disk like [`read_all`]; a disk that has grown has zeros
/// behind.
pub fn read_size(co: &Co, backend: &BlockBackend, step: usize, size: u64) -> Vec<u8> {
    let mut bytes = read_all(co, backend, step);
    let behind = bytes.split_off(usize::try_from(size).expect("a small disk"));
    assert!(
        behind.iter().all(|b| *b == 0),
        "what was added is not zeros"
    );
    bytes
}

/// Reads the whole disk in pieces of `step` bytes, one after the other.
pub fn read_all(co: &Co, backend: &BlockBackend, step: usize) -> Vec<u8> {
    let size = usize::try_from(backend.len()).expect("a small disk");
    let mut bytes = vec![0xa5; size];
    for (index, piece) in bytes.chunks_mut(step).enumerate() {
        let offset = (index * step) as u64;
        backend
            .pread(co, offset, &mut *piece)
            .unwrap_or_else(|e| panic!("reading {} bytes at {offset:#x}: {e}", step));
    }
    bytes
}
