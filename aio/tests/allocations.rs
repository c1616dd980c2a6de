//! A request through the ring allocates nothing, and all requests of a pass go in one system call.

mod support;

use coblock_aio::co;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting per thread.
struct Counting;

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are those that are asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

/// Coroutine and request: nothing is allocated once the queues and the pool of stacks are warm.
#[test]
fn no_allocation_per_request() {
    let Some(home) = support::ring(64) else {
        return;
    };
    let file = Rc::new(tempfile::tempfile().unwrap());
    file.set_len(1 << 20).unwrap();
    let done = Rc::new(Cell::new(0));
    let round = || {
        for n in 0..32u64 {
            let (file, done) = (file.clone(), done.clone());
            home.spawn("reader", move |c| {
                let mut buf = [0; 512];
                co::read(c, file.as_fd(), n * 512, (&mut buf).into()).unwrap();
                co::write(c, file.as_fd(), n * 512, (&buf).into()).unwrap();
                done.set(done.get() + 1);
            });
        }
        while done.get() < 32 {
            home.poll(true);
        }
        done.set(0);
    };
    (0..10).for_each(|_| round());
    let (before, stats) = (allocations(), home.stats());
    (0..100).for_each(|_| round());
    assert_eq!(allocations() - before, 0);
    let after = home.stats();
    assert_eq!(after.ring_requests - stats.ring_requests, 100 * 64);
    let enters = after.ring_enters - stats.ring_enters;
    let completions = 100 * 64;
    assert!(
        enters <= after.passes - stats.passes + completions,
        "{enters} enters: one a pass, and others only for completions that the kernel held back"
    );
    let counted = Box::new(allocations());
    assert!(allocations() > *counted, "the counter counts");
    home.close();
}

/// 32 requests of one pass are one system call, submitting and waiting.
#[test]
fn one_enter_a_pass() {
    let Some(home) = support::ring(64) else {
        return;
    };
    let file = Rc::new(tempfile::tempfile().unwrap());
    file.set_len(1 << 20).unwrap();
    home.poll(false);
    let before = home.stats();
    for n in 0..32u64 {
        let file = file.clone();
        home.spawn("reader", move |c| {
            co::read(c, file.as_fd(), n, (&mut [0; 1]).into()).unwrap();
        });
    }
    assert_eq!(
        home.stats().ring_enters,
        before.ring_enters,
        "nothing before the poll"
    );
    assert!(home.poll(true));
    let after = home.stats();
    assert_eq!(after.ring_enters - before.ring_enters, 1);
    assert_eq!(after.ring_requests - before.ring_requests, 32);
    while home.context().live_coroutines() > 0 {
        home.poll(true);
    }
    home.close();
}
