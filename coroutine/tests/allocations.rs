//! No heap allocation per life or switch, counted by a global allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use coblock_coroutine::{Co, CoMutex, Coroutine, IoWait, Ready, Schedule, State, start};

struct Counting;

thread_local!(static COUNT: Cell<u64> = const { Cell::new(0) });

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `f` runs, after it has run once to warm up.
fn allocations(mut f: impl FnMut()) -> u64 {
    f();
    let before = COUNT.get();
    for _ in 0..100 {
        f();
    }
    COUNT.get() - before
}

struct Here;

impl Schedule for Here {
    fn schedule(&self, _: Ready) {
        unreachable!("nothing is scheduled here")
    }
    fn is_home(&self) -> bool {
        true
    }
    fn name(&self) -> &str {
        "here"
    }
}

/// The counter counts.
#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 100);
}

/// A pooled create + run + finish allocates nothing, with captures up to 400 bytes.
#[test]
fn a_life_allocates_nothing() {
    let large = [1_u8; 400];
    assert_eq!(
        allocations(|| {
            let co = Coroutine::new(move |_| {
                std::hint::black_box(&large);
            });
            assert_eq!(co.unwrap().enter(), State::Finished);
        }),
        0
    );
}

/// A suspend and resume allocates nothing; neither does a wake, nor an uncontended lock of an
/// existing mutex.
#[test]
fn a_switch_allocates_nothing() {
    let mutex = Arc::new(CoMutex::new(0));
    let co = Coroutine::new(move |co: &Co| {
        loop {
            let me = co.wake_handle();
            me.wake();
            co.suspend();
            let mut guard = mutex.lock(co);
            *guard += 1;
            co.suspend();
            drop(guard);
            co.suspend();
        }
    })
    .unwrap();
    assert_eq!(
        allocations(|| {
            assert_eq!(co.enter(), State::Suspended);
        }),
        0
    );
}

/// A coroutine started in a home, with one wait for an operation, allocates nothing.
#[test]
fn a_request_allocates_nothing() {
    thread_local!(static WAIT: Cell<*const IoWait> = const { Cell::new(std::ptr::null()) });
    let home: Arc<dyn Schedule> = Arc::new(Here);
    assert_eq!(
        allocations(|| {
            start(&home, "request", |co| {
                let wait = IoWait::new("read");
                wait.submitted();
                WAIT.set(&wait);
                assert_eq!(wait.wait(co), 1);
            })
            .unwrap();
            // SAFETY: the coroutine waits in the frame of the operation.
            unsafe { &*WAIT.get() }.complete(1);
        }),
        0
    );
}
