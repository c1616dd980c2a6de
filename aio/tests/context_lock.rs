//! The context lock (rule 3.11): a compatibility primitive, which nothing in the block layer uses.

mod support;

use coblock_aio::{AioWait, ContextLock, Home};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use support::{each_engine, options};

fn refusal<R>(f: impl FnOnce() -> R) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else {
        panic!("it was not refused")
    };
    *panic.downcast::<String>().expect("a message")
}

/// Waits until so many threads wait for the lock.
fn until_queued(lock: &ContextLock, count: u32) {
    let queued = format!("{count} wait");
    while !format!("{lock:?}").contains(&queued) {
        std::thread::yield_now();
    }
}

/// Rule 3.11: the same thread may take it again, and gives it back as often.
#[test]
fn rule_3_11_recursive() {
    let home = Home::new(options("none")).unwrap();
    let lock = ContextLock::new(home.context());
    for level in 1..=3 {
        lock.acquire();
        assert_eq!(lock.levels(), level);
    }
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            assert_eq!(lock.levels(), 0, "another thread does not have it");
            lock.acquire();
            lock.release();
        });
        until_queued(&lock, 1);
        lock.release();
        lock.release();
        assert!(!other.is_finished() && lock.levels() == 1);
        lock.release();
    });
    assert_eq!(lock.levels(), 0);
    assert!(format!("{lock:?}").contains("free"));
    home.close();
}

/// Rule 3.11: first come, first served; nobody overtakes, not even who gives it back and wants it
/// again.
#[test]
fn rule_3_11_first_come_first_served() {
    let home = Home::new(options("none")).unwrap();
    let lock = ContextLock::new(home.context());
    let order = Mutex::new(Vec::new());
    let (lock, order) = (&lock, &order);
    std::thread::scope(|scope| {
        lock.acquire();
        for n in 0..4 {
            scope.spawn(move || {
                lock.acquire();
                order.lock().unwrap().push(n);
                lock.release();
            });
            until_queued(lock, n + 1);
        }
        lock.release();
        lock.acquire();
        order.lock().unwrap().push(99);
        lock.release();
    });
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 99]);
    home.close();
}

/// Rule 3.11: a home that polls under the lock, with nothing to do, leaves its poll for each
/// waiter.
#[test]
fn rule_3_11_a_waiter_ends_the_owners_poll() {
    each_engine(|home, engine| {
        let lock = ContextLock::new(home.context());
        let done = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        lock.acquire();
                        lock.acquire();
                        done.fetch_add(1, Ordering::Relaxed);
                        lock.release();
                        lock.release();
                    }
                });
            }
            while done.load(Ordering::Relaxed) < 300 {
                lock.acquire();
                let before = done.load(Ordering::Relaxed);
                if before < 300 {
                    home.poll(true);
                }
                let after = done.load(Ordering::Relaxed);
                assert_eq!(after, before, "{engine}: nobody else is inside");
                lock.release();
            }
        });
    });
}

/// Rule 3.11: a wait gives back all levels, so that who needs the lock to make the condition true
/// gets it (the original gave back one and hung), and each test has all of them again.
#[test]
fn rule_3_11_a_wait_gives_back_all_levels() {
    each_engine(|home, engine| {
        let lock = ContextLock::new(home.context());
        let wait = Arc::new(AioWait::new(home.context()));
        let changed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            lock.acquire();
            lock.acquire();
            scope.spawn(|| {
                lock.acquire();
                changed.store(true, Ordering::Release);
                lock.release();
                wait.kick();
            });
            let waited = home.with(|| {
                lock.wait_while(&wait, home.context(), || {
                    assert_eq!(lock.levels(), 2, "{engine}");
                    !changed.load(Ordering::Acquire)
                })
            });
            assert!(waited, "{engine}");
            assert_eq!(lock.levels(), 2, "{engine}");
            lock.release();
            lock.release();
        });
        // Without the lock it is a plain wait.
        assert!(!home.with(|| lock.wait_while(&wait, home.context(), || false)));
    });
}

/// Rule 3.11: misuse is refused, with both places named.
#[test]
fn rule_3_11_refusals() {
    let home = Home::new(options("none")).unwrap();
    let lock = ContextLock::new(home.context());
    let message = refusal(|| lock.release());
    assert!(message.contains("nobody has it"), "{message}");
    std::thread::scope(|scope| {
        let (told, hear) = mpsc::channel::<()>();
        let (taken, has_it) = mpsc::channel();
        let lock = &lock;
        scope.spawn(move || {
            lock.acquire();
            taken.send(()).unwrap();
            let _ = hear.recv();
            lock.release();
        });
        has_it.recv().unwrap();
        let message = refusal(|| lock.release());
        assert!(message.contains("context_lock.rs:"), "{message}");
        drop(told);
    });
    let message = refusal(|| home.run(|_co| lock.acquire()));
    assert!(message.contains("rule 3.11"), "{message}");
    assert_eq!(lock.levels(), 0);
    home.close();
}
