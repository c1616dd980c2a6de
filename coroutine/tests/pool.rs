//! Stacks: pooled per thread, shared between threads, of several sizes (rule 1.7).

mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use coblock_coroutine::{
    Coroutine, CoroutineOptions, Error, Schedule, State, guard_kind, start_remote, stats,
};
use support::{TestHome, in_own_process};

fn sized(stack_size: usize, f: impl FnOnce(&coblock_coroutine::Co) + 'static) -> Coroutine {
    Coroutine::with_options(
        &CoroutineOptions {
            stack_size,
            ..Default::default()
        },
        f,
    )
    .unwrap()
}

/// Rule 1.7: last in, first out: the next coroutine gets the stack that was left last, and none is
/// made.
#[test]
fn a_stack_is_reused_at_once() {
    let place = Rc::new(Cell::new(0));
    let make = || {
        let place = place.clone();
        Coroutine::new(move |_| place.set(std::ptr::from_ref(&place).addr())).unwrap()
    };
    make().enter();
    let (first, before) = (place.get(), stats());
    for _ in 0..1000 {
        make().enter();
        assert_eq!(place.get(), first);
    }
    let after = stats();
    assert_eq!(after.created - before.created, 1000);
    assert_eq!(after.reused - before.reused, 1000);
    assert_eq!(after.finished - before.finished, 1000);
    assert_eq!(after.live(), before.live());
}

/// Stack tops are coloured: the hot ends of many stacks do not all fall into the same cache sets.
#[test]
fn tops_are_coloured() {
    let tops: Rc<RefCell<BTreeSet<usize>>> = Rc::default();
    let all: Vec<Coroutine> = (0..64)
        .map(|_| {
            let tops = tops.clone();
            // A size that no other test uses: these stacks are new, and lie side by side.
            let co = sized(32 << 10, move |co| {
                tops.borrow_mut()
                    .insert(std::ptr::from_ref(co).addr() % 4096);
                co.suspend();
            });
            co.enter();
            co
        })
        .collect();
    assert_eq!(
        tops.borrow().len(),
        15,
        "fifteen places in the page: {:x?}",
        tops.borrow()
    );
    drop(all);
}

/// Each size class has stacks of at least that size, and the extremes are typed errors or are
/// rounded up.
#[test]
fn sizes() {
    for size in [0, 1, 16 << 10, 64 << 10, (64 << 10) + 1, 1 << 20, 8 << 20] {
        // The guard, the colour and the control block take up to 8.5 KiB together.
        let used = size.max(16 << 10) * 3 / 8;
        let co = sized(size, move |co| {
            let deepest = eat(used);
            assert!(std::ptr::from_ref(co).addr() - deepest >= used - 2048);
            co.suspend();
        });
        assert_eq!(co.enter(), State::Suspended, "{size}");
        assert_eq!(co.enter(), State::Finished);
    }
    let too_large = CoroutineOptions {
        stack_size: (256 << 20) + 1,
        ..Default::default()
    };
    let error = Coroutine::with_options(&too_large, |_| {}).unwrap_err();
    assert_eq!(
        error,
        Error::BadStackSize {
            asked: (256 << 20) + 1,
            max: 256 << 20
        }
    );
    assert!(error.to_string().contains("268435457 bytes"));
}

/// Uses about `bytes` of stack; the lowest address that it has touched.
fn eat(bytes: usize) -> usize {
    let frame = std::hint::black_box([0_u8; 512]);
    let here = frame.as_ptr().addr();
    // The frame and its overhead.
    if bytes < 1024 {
        here
    } else {
        here.min(eat(bytes - 512))
    }
}

/// More stacks than one arena holds; all keep their contents, all are reused afterwards.
#[test]
fn many_at_once() {
    in_own_process("many_at_once", || {
        const MANY: u64 = 2000;
        let sum = Rc::new(Cell::new(0));
        let all: Vec<Coroutine> = (0..MANY)
            .map(|i| {
                let sum = sum.clone();
                let co = Coroutine::new(move |co| {
                    let on_stack = std::hint::black_box([i; 8]);
                    co.suspend();
                    sum.set(sum.get() + on_stack.iter().sum::<u64>() / 8);
                })
                .unwrap();
                co.enter();
                co
            })
            .collect();
        for co in &all {
            assert_eq!(co.enter(), State::Finished);
        }
        assert_eq!(sum.get(), MANY * (MANY - 1) / 2);
        assert_ne!(guard_kind(), "unknown");
        let free = stats().stacks_free + stats().stacks_shared;
        assert!(free >= MANY, "{free} idle stacks");
        assert!(
            stats().stacks_free <= 128,
            "the thread's own list is bounded"
        );
    });
}

/// Rule 1.7: coroutines that one thread creates and another one finishes do not defeat the pool:
/// their stacks travel back in batches, and the number of stacks stays small.
#[test]
fn create_here_finish_there() {
    in_own_process("create_here_finish_there", || {
        const TOTAL: u64 = 20_000;
        const AHEAD: u64 = 64;
        let stop = Arc::new(AtomicBool::new(false));
        let home = TestHome::new("finisher");
        let driver = {
            let (home, stop) = (home.clone(), stop.clone());
            std::thread::spawn(move || {
                home.adopt();
                home.drive_until(|| stop.load(Ordering::SeqCst));
            })
        };
        while home.is_home() {
            std::thread::yield_now();
        }
        let finished = Arc::new(AtomicU64::new(0));
        let before = stats();
        for i in 0..TOTAL {
            while i - finished.load(Ordering::SeqCst) > AHEAD {
                std::thread::yield_now();
            }
            let finished = finished.clone();
            start_remote(&home.schedule_of(), "sent", move |_| {
                finished.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
        }
        while finished.load(Ordering::SeqCst) < TOTAL {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::SeqCst);
        driver.join().unwrap();
        let after = stats();
        assert_eq!(after.created - before.created, TOTAL);
        assert_eq!(
            after.finished - before.finished,
            0,
            "all finished on the other thread"
        );
        let fresh = TOTAL - (after.reused - before.reused);
        // Those ahead, a full list over there, and the batches in between.
        assert!(
            fresh <= 512,
            "{fresh} stacks were made for {TOTAL} coroutines"
        );
    });
}

/// Many threads create, switch and finish at once; when they end, their stacks serve the others.
#[test]
fn several_threads() {
    in_own_process("several_threads", || {
        let before = stats().stacks_mapped;
        for _ in 0..4 {
            let threads: Vec<_> = (0..4)
                .map(|seed| {
                    std::thread::spawn(move || {
                        let mut alive: Vec<Coroutine> = Vec::new();
                        let mut random: u64 = seed * 7919 + 1;
                        for _ in 0..3000 {
                            random = random * 1_103_515_245 % 2_147_483_647 + 1;
                            if random.is_multiple_of(3) && !alive.is_empty() {
                                let at = usize::try_from(random).unwrap() % alive.len();
                                let co = alive.swap_remove(at);
                                if random.is_multiple_of(2) {
                                    assert_eq!(co.enter(), State::Finished);
                                }
                            } else if alive.len() < 100 {
                                let co = Coroutine::new(move |co| {
                                    let mine = std::hint::black_box([random; 4]);
                                    co.suspend();
                                    assert_eq!(std::hint::black_box(mine), [random; 4]);
                                })
                                .unwrap();
                                co.enter();
                                alive.push(co);
                            }
                        }
                        drop(alive);
                        assert_eq!(stats().live(), 0);
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
        }
        let made = stats().stacks_mapped - before;
        // Four rounds of four threads with up to a hundred each; the later rounds find those of the
        // earlier ones.
        assert!(made < 800, "{made} stacks");
        assert!(
            stats().stacks_shared > 0,
            "ended threads have given their stacks up"
        );
    });
}
