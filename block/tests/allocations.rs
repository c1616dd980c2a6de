//! No heap allocation per request on the path from the user's handle to the ring.

mod support;

use coblock_aio::EngineKind;
use coblock_block::{Options, RequestFlags};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write as _;
use std::sync::Arc;
use support::World;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // While the thread ends its counter may be gone; nothing is measured then.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: all calls go to the system's allocator as they are; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.get()
}

/// How many allocations `requests` reads or overwrites make, one coroutine each, `depth` at a time,
/// after a warm-up.
fn measure(engine: EngineKind, write: bool) -> u64 {
    const REQUESTS: u64 = 2000;
    const DEPTH: usize = 32;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let world = World::with_engine(engine);
    let backend = Arc::new(
        world
            .open(Options::format_on_file("raw", path.to_str().unwrap()))
            .unwrap(),
    );
    let live = || world.home.context().live_coroutines();
    let round = |requests: u64| {
        for n in 0..requests {
            let backend = backend.clone();
            world.home.spawn("request", move |co| {
                let mut buf = [0; 4096];
                let offset = n * 7919 % 255 * 4096;
                if write {
                    backend
                        .pwrite(co, offset, &buf[..], RequestFlags::empty())
                        .unwrap();
                } else {
                    backend.pread(co, offset, &mut buf[..]).unwrap();
                    assert_eq!(buf[4095], 1);
                }
            });
            while live() >= DEPTH {
                world.home.poll(true);
            }
        }
        while live() > 0 {
            world.home.poll(true);
        }
    };
    round(500);
    let before = allocations();
    round(REQUESTS);
    let made = allocations() - before;
    world.run(|co| backend.close(co)).unwrap();
    drop(backend);
    world.end();
    made
}

/// Budget: no allocation for a request, reads and overwrites, through `raw` and `file` to the
/// ring.
#[test]
fn a_request_allocates_nothing() {
    if !support::engines().contains(&EngineKind::IoUring) {
        writeln!(std::io::stderr(), "SKIPPED: io_uring is not to be had here")
            .expect("standard error");
        return;
    }
    assert_eq!(measure(EngineKind::IoUring, false), 0, "reads");
    // Buffered writes go to a thread of the pool (decision 35): once and again a list of it grows,
    // or another thread has to be started.
    let made = measure(EngineKind::IoUring, true);
    assert!(made <= 40, "{made} allocations in 2000 overwrites");
    // The counter counts.
    let before = allocations();
    drop(std::hint::black_box(Box::new(5)));
    assert_eq!(allocations() - before, 1);
}
