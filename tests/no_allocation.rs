//! Promise: a cached read of a qcow2 image, and an overwrite, allocate nothing on the heap. A
//! program of its own, since it counts every allocation of its thread.

use coblock_reliability as support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::rc::Rc;

use coblock::aio::{AlignedBuf, EngineKind};
use coblock::block::{LikeReference, RequestFlags};

use support::image;
use support::session::{self, Session};
use support::swarm::Params;

thread_local! {
    /// Allocations of this thread; constant and without a destructor, so that reading it allocates
    /// nothing.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counted.
struct Counting;

// SAFETY: every method hands its arguments unchanged to the system's allocator and returns what
// that returned, so the promises of that allocator are those of this one. Counting touches no
// memory of the heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: our caller promised what `alloc` asks for: a layout that is not empty.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: our caller promised that the block came from `alloc` of this allocator, which is
        // the system's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZE: u64 = 16 << 20;
const REQUEST: usize = 4096;
const DEPTH: usize = 32;

/// The usual image: version 3, clusters of 64 KiB, counts of 16 bits.
fn params() -> Params {
    Params {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        size: SIZE,
        ..Params::draw(0)
    }
}

/// `rounds` times 32 requests at once, each in a coroutine of its own, as a device model would send
/// them.
fn rounds(session: &Session, state: &Rc<State>, rounds: u64, write: bool) {
    for round in 0..rounds {
        for slot in 0..DEPTH {
            let state = state.clone();
            session.home.spawn("request", move |co| {
                let offset = ((round * 7919 + slot as u64 * 104_729) * REQUEST as u64) % SIZE;
                let mut buf = state.buffers[slot]
                    .take()
                    .expect("one request for each buffer");
                if write {
                    state
                        .disk
                        .pwrite(co, offset, &buf[..], RequestFlags::empty())
                        .expect("write");
                } else {
                    state.disk.pread(co, offset, &mut buf[..]).expect("read");
                }
                state.buffers[slot].set(Some(buf));
                state.done.set(state.done.get() + 1);
            });
        }
        while state.done.get() < DEPTH {
            session.home.poll(true);
        }
        state.done.set(0);
    }
}

struct State {
    disk: std::sync::Arc<coblock::block::BlockBackend>,
    buffers: Vec<Cell<Option<AlignedBuf>>>,
    done: Cell<usize>,
}

/// Warm caches and pools first; then 10 000 requests each way must not allocate once.
#[test]
fn cached_requests_allocate_nothing() {
    if !session::engines().contains(&EngineKind::IoUring) {
        support::peer::skipped(
            "cached_requests_allocate_nothing: the thread pool allocates a job for each request",
        );
        return;
    }
    let folder = session::folder();
    for direct in [false, true] {
        let path = folder.path().join("disk.qcow2");
        let session = Session::new(EngineKind::IoUring);
        std::fs::write(&path, image::empty(&params().setting(), None))
            .expect("a file in our folder");
        let disk = session
            .open(
                session::image("qcow2", &path, direct),
                &LikeReference::new(),
            )
            .expect("open");
        session.home.run(|co| {
            let zeros = vec![0x5a; 1 << 20];
            for offset in (0..SIZE).step_by(zeros.len()) {
                disk.pwrite(co, offset, &zeros[..], RequestFlags::empty())
                    .expect("fill");
            }
            disk.flush(co).expect("flush");
        });
        let buffers = (0..DEPTH)
            .map(|_| Cell::new(Some(AlignedBuf::try_new(REQUEST, 4096).expect("small"))))
            .collect();
        let state = Rc::new(State {
            disk,
            buffers,
            done: Cell::new(0),
        });
        for write in [false, true] {
            rounds(&session, &state, 200, write);
            let before = COUNT.get();
            rounds(&session, &state, 320, write);
            let allocated = COUNT.get() - before;
            // Buffered writes go to a thread of the pool (decision 35); starting one allocates, and
            // it may come to that two or three times, when one is asked for before the last rests.
            let allowed = if write && !direct { 40 } else { 0 };
            assert!(
                allocated <= allowed,
                "{allocated} allocations in 10240 cached requests, write {write}, direct {direct}"
            );
        }
        let state = Rc::into_inner(state).expect("every request has ended");
        session.close(state.disk);
        session.end();
        std::fs::remove_file(&path).expect("it is ours");
    }
}
