//! Blocking work on threads: submitted with a callback, by a coroutine, many at once, cancelled.

mod support;

use coblock_aio::{ContextOptions, Home, Job, ThreadPool, WorkPool, co};
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use support::{Count, each_engine};

/// Keeps work from ending until it is opened.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

/// Work without anybody who waits for it runs. (/thread-pool/submit-no-complete)
#[test]
fn submit_and_forget() {
    let pool = ThreadPool::new("forget", 2);
    let (gate, runs) = (Arc::new(Gate::default()), Count::default());
    let (open, count) = (gate.clone(), runs.clone());
    pool.submit(Job::new(move || {
        count.add();
        open.open();
    }));
    gate.pass();
    drop(pool);
    assert_eq!(runs.get(), 1);
}

/// The callback runs once, in the submitter's context, from a poll and not before, with the result.
/// (/thread-pool/submit-aio)
#[test]
fn submit_with_callback() {
    each_engine(|home, _| {
        let got = Arc::new(Mutex::new(Vec::new()));
        let (results, context) = (got.clone(), home.context().clone());
        let home_thread = std::thread::current().id();
        let handle = home.context().submit_work(
            move || {
                assert_ne!(std::thread::current().id(), home_thread);
                assert!(
                    coblock_aio::current().is_none(),
                    "rule 3.9: workers have no context"
                );
                42
            },
            move |result| {
                assert!(context.is_current());
                assert!(!coblock_coroutine::in_coroutine());
                results.lock().unwrap().push(result);
            },
        );
        std::thread::sleep(Duration::from_millis(20));
        assert!(got.lock().unwrap().is_empty(), "not before the poll");
        while !handle.is_done() {
            home.poll(true);
        }
        assert_eq!(*got.lock().unwrap(), [42]);
        assert!(!handle.cancel(), "too late");
        assert!(!home.poll(false));
    });
}

/// A coroutine that submits work is suspended, and goes on in its context. The work may borrow from
/// its stack. A panic of the work comes out of it. (/thread-pool/submit-co)
#[test]
fn submit_from_a_coroutine() {
    each_engine(|home, _| {
        let home_thread = std::thread::current().id();
        let mut text = String::from("borrowed");
        let other = home.run(|c| {
            let other = co::on_pool(c, || {
                text.push_str(", changed");
                std::thread::current().id()
            });
            assert_eq!(std::thread::current().id(), home_thread);
            other
        });
        assert_ne!(other, home_thread);
        assert_eq!(text, "borrowed, changed");
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            home.run(|c| co::on_pool(c, || panic!("the work")));
        }));
        assert_eq!(*panic.unwrap_err().downcast::<&str>().unwrap(), "the work");
        assert_eq!(
            home.run(|c| co::on_pool(c, || 5)),
            5,
            "and the pool goes on"
        );
    });
}

/// A hundred items, more than there are threads: each runs once and completes.
/// (/thread-pool/submit-many)
#[test]
fn submit_many() {
    let pool = Arc::new(ThreadPool::new("few", 4));
    let options = ContextOptions {
        pool: Some(pool.clone()),
        ..support::options("threads")
    };
    let home = Home::new(options).unwrap();
    let (done, seen) = (Count::default(), Arc::new(Mutex::new(BTreeSet::new())));
    for n in 0..100 {
        let (done, seen) = (done.clone(), seen.clone());
        home.context().submit_work(
            move || {
                let name = std::thread::current().name().unwrap().to_owned();
                assert!(name.starts_with("few-pool-"), "{name}");
                assert!(seen.lock().unwrap().insert(n), "{n} ran twice");
                n
            },
            move |result| {
                assert_eq!(result, n);
                done.add();
            },
        );
        assert!(pool.threads() <= 4, "bounded");
    }
    while done.get() < 100 {
        home.poll(true);
    }
    assert_eq!(seen.lock().unwrap().len(), 100);
    home.close();
}

/// Of a hundred long items, those that have not started are cancelled and complete with ECANCELED,
/// in a later pass; those that run cannot be, and complete with their result; some of each.
/// (/thread-pool/cancel and /cancel-async)
#[test]
fn cancel() {
    for wait_for_each in [false, true] {
        let pool = Arc::new(ThreadPool::new("cancel", 8));
        let options = ContextOptions {
            pool: Some(pool),
            ..support::options("threads")
        };
        let home = Home::new(options).unwrap();
        let (gate, started) = (Arc::new(Gate::default()), Count::default());
        let results = Arc::new(Mutex::new([None; 100]));
        let handles: Vec<_> = (0..100)
            .map(|n| {
                let (gate, started, results) = (gate.clone(), started.clone(), results.clone());
                home.context().submit_work(
                    move || {
                        started.add();
                        gate.pass();
                        0
                    },
                    move |result| {
                        let before = results.lock().unwrap()[n].replace(result);
                        assert_eq!(before, None, "completed twice");
                    },
                )
            })
            .collect();
        while started.get() < 8 {
            std::thread::yield_now();
        }
        let mut cancelled = 0;
        for (n, handle) in handles.iter().enumerate() {
            if handle.cancel() {
                cancelled += 1;
                assert_eq!(
                    results.lock().unwrap()[n],
                    None,
                    "never from inside the call"
                );
                if wait_for_each {
                    while !handle.is_done() {
                        home.poll(true);
                    }
                    assert_eq!(results.lock().unwrap()[n], Some(-libc::ECANCELED));
                }
            }
        }
        assert_eq!(cancelled, 92, "all but those that run");
        gate.open();
        while handles.iter().any(|handle| !handle.is_done()) {
            home.poll(true);
        }
        let results = results.lock().unwrap();
        assert_eq!(
            results
                .iter()
                .filter(|r| **r == Some(-libc::ECANCELED))
                .count(),
            92
        );
        assert_eq!(results.iter().filter(|r| **r == Some(0)).count(), 8);
        assert_eq!(started.get(), 8, "the cancelled ones never ran");
        home.close();
    }
}

/// Work that panics is EIO for its callback, and the pool lives.
#[test]
fn panicking_work() {
    each_engine(|home, _| {
        let got = Arc::new(Mutex::new(None));
        let result = got.clone();
        let handle = home.context().submit_work(
            || panic!("on purpose"),
            move |r| *result.lock().unwrap() = Some(r),
        );
        while !handle.is_done() {
            home.poll(true);
        }
        assert_eq!(*got.lock().unwrap(), Some(-libc::EIO));
    });
}

/// A pool may be replaced; one that drops a job is noticed by whoever waits for it.
#[test]
fn a_pool_that_drops_work_is_noticed() {
    struct Dropping;
    impl WorkPool for Dropping {
        fn submit(&self, work: Job) {
            std::thread::spawn(move || drop(work));
        }
    }
    let options = ContextOptions {
        pool: Some(Arc::new(Dropping)),
        ..support::options("threads")
    };
    let home = Home::new(options).unwrap();
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        home.run(|c| co::on_pool(c, || ()));
    }));
    let message = panic.unwrap_err();
    assert!(
        message
            .downcast_ref::<&str>()
            .unwrap()
            .contains("the pool dropped a job")
    );
    home.close();
}
