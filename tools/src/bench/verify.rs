//! Reading all of an image, many pieces at once.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::AlignedBuf;
use coblock::block::BlockBackend;
use coblock::coroutine::Co;

use super::ledger::Ledger;
use super::load::Outcome;
use super::pattern::fingerprint;
use crate::open::Session;

/// Pieces in flight.
const PIECES: usize = 16;
/// Bytes of a piece, about.
const PIECE: usize = 1 << 20;

/// What the readers share.
struct Readers<V> {
    backend: Arc<BlockBackend>,
    len: u64,
    next: Cell<u64>,
    visit: RefCell<V>,
    failure: RefCell<Option<String>>,
}

impl<V: FnMut(u64, &[u8])> Readers<V> {
    /// Takes piece after piece until there is none.
    fn read(&self, co: &Co, buffer: &mut [u8]) {
        while self.next.get() < self.len {
            let at = self.next.get();
            let here = usize::try_from(self.len - at).map_or(buffer.len(), |n| n.min(buffer.len()));
            let piece = &mut buffer[..here];
            self.next.set(at + here as u64);
            match self.backend.pread(co, at, &mut *piece) {
                Ok(()) => (self.visit.borrow_mut())(at, piece),
                Err(error) => {
                    self.next.set(self.len);
                    let message = format!("read of {here} bytes at offset {at}: {error}");
                    self.failure.borrow_mut().get_or_insert(message);
                }
            }
        }
    }
}

/// Reads all of the image in pieces that are whole blocks, but for the last, and gives them to
/// `visit` in any order.
///
/// # Errors
/// The first that reading returned, or no memory.
fn read_all<V: FnMut(u64, &[u8]) + 'static>(
    session: &Session,
    backend: &Arc<BlockBackend>,
    block_size: usize,
    visit: V,
) -> Result<V, String> {
    let piece = (PIECE / block_size).max(1) * block_size;
    let alignment = backend.node().limits().mem_alignment.max(4096);
    let readers = Rc::new(Readers {
        len: backend.len(),
        backend: backend.clone(),
        next: Cell::new(0),
        visit: RefCell::new(visit),
        failure: RefCell::new(None),
    });
    let no_memory = || format!("no memory for {PIECES} buffers of {piece} bytes");
    for _ in 0..PIECES {
        let mut buffer = AlignedBuf::try_new(piece, alignment).map_err(|_| no_memory())?;
        let here = readers.clone();
        let spawned = session
            .home
            .try_spawn("read all", move |co| here.read(co, &mut buffer));
        if let Err(error) = spawned {
            readers.next.set(readers.len);
            let message = format!("reading could not be started: {error}");
            readers.failure.borrow_mut().get_or_insert(message);
        }
    }
    while session.home.context().live_coroutines() > 0 {
        session.home.poll(true);
    }
    let Ok(readers) = Rc::try_unwrap(readers) else {
        panic!("a reader outlives the reading");
    };
    match readers.failure.into_inner() {
        None => Ok(readers.visit.into_inner()),
        Some(message) => Err(message),
    }
}

/// The end of an image that is not a whole block: nobody writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail(Option<u64>);

/// Records what an image holds before the run.
///
/// # Errors
/// What reading returned, or no memory.
pub fn remember(
    session: &Session,
    backend: &Arc<BlockBackend>,
    ledger: Ledger,
) -> Result<(Ledger, Tail), String> {
    let block_size = ledger.block_size();
    let state = Rc::new(RefCell::new((ledger, Tail::default())));
    let here = state.clone();
    let visit = move |at: u64, piece: &[u8]| {
        let mut state = here.borrow_mut();
        let (blocks, tail) = piece.split_at(piece.len() / block_size * block_size);
        let first = usize::try_from(at / block_size as u64).unwrap_or(usize::MAX);
        for (index, block) in blocks.chunks_exact(block_size).enumerate() {
            state.0.remember(first + index, block);
        }
        if !tail.is_empty() {
            state.1 = Tail(Some(fingerprint(tail)));
        }
    };
    drop(read_all(session, backend, block_size, visit)?);
    match Rc::try_unwrap(state) {
        Ok(state) => Ok(state.into_inner()),
        Err(_) => panic!("reading an image has ended"),
    }
}

/// Checks all of an image against the ledger; what is wrong goes into `outcome`.
///
/// # Errors
/// What reading returned, or no memory.
pub fn verify(
    session: &Session,
    backend: &Arc<BlockBackend>,
    path: &str,
    ledger: Arc<Ledger>,
    tail_before: Tail,
    outcome: Outcome,
) -> Result<Outcome, String> {
    let block_size = ledger.block_size();
    let outcome = Rc::new(RefCell::new(outcome));
    let (here, path) = (outcome.clone(), path.to_owned());
    let visit = move |at: u64, piece: &[u8]| {
        let (blocks, tail) = piece.split_at(piece.len() / block_size * block_size);
        let first = usize::try_from(at / block_size as u64).unwrap_or(usize::MAX);
        for (index, block) in blocks.chunks_exact(block_size).enumerate() {
            if let Err(mismatch) = ledger.check_final(first + index, block) {
                here.borrow_mut().mismatched(&path, &mismatch);
            }
        }
        if !tail.is_empty() && tail_before != Tail(Some(fingerprint(tail))) {
            let offset = at + blocks.len() as u64;
            let what = "the end of the image has changed".to_owned();
            here.borrow_mut()
                .mismatched(&path, &super::ledger::Mismatch { offset, what });
        }
    };
    drop(read_all(session, backend, block_size, visit)?);
    match Rc::try_unwrap(outcome) {
        Ok(outcome) => Ok(outcome.into_inner()),
        Err(_) => panic!("reading an image has ended"),
    }
}
