//! Rules 7.1 to 7.7.

use super::protocol::writer;
use super::*;
use coblock_aio::{ContextOptions, EngineKind, Home};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::AtomicUsize;

fn home(name: &str) -> Home {
    Home::new(ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named(name)
    })
    .unwrap()
}

/// A lock, and how often the writer was kicked.
fn lock() -> (Arc<GraphLock>, Arc<AtomicUsize>) {
    let kicks = Arc::new(AtomicUsize::new(0));
    let counted = kicks.clone();
    let kick = move || {
        counted.fetch_add(1, Ordering::Relaxed);
    };
    (Arc::new(GraphLock::new(Box::new(kick))), kicks)
}

impl GraphLock {
    /// Owns if nobody reads, as on another thread: readers of this one queue.
    fn own(&self) -> bool {
        let owned = self.try_own(Location::caller());
        self.slow.lock().owner = None;
        owned
    }

    fn queued(&self) -> usize {
        self.slow.lock().queue.len()
    }
}

/// Rules 7.1, 7.2: a new context counts zero; a reader counts one in its own context and none
/// afterwards.
#[test]
fn a_reader_counts_in_its_own_context() {
    let (lock, kicks) = lock();
    let (one, two) = (home("one"), home("two"));
    one.run(|co| {
        let first = lock.read(co, co.home().unwrap()).unwrap();
        assert_eq!((first.slot().index(), lock.sum()), (0, 1));
        two.spawn("second", {
            let lock = lock.clone();
            move |co| {
                let second = lock.read(co, co.home().unwrap()).unwrap();
                assert_eq!((second.slot().index(), lock.sum()), (1, 2));
            }
        });
        assert_eq!(lock.sum(), 1);
    });
    assert_eq!(lock.sum(), 0);
    assert_eq!(
        kicks.load(Ordering::Relaxed),
        0,
        "nobody is kicked when no writer waits"
    );
}

/// Rule 7.2: while a writer owns, readers wait in order, uncounted, and come in when it is gone.
#[test]
fn readers_wait_for_a_writer_and_come_in_order() {
    let (lock, _) = lock();
    let home = home("readers");
    assert!(lock.own(), "nobody reads");
    let order = Rc::new(RefCell::new(Vec::new()));
    for n in 0..5 {
        let (lock, order) = (lock.clone(), order.clone());
        home.spawn("reader", move |co| {
            let guard = lock.read(co, co.home().unwrap()).unwrap();
            assert_eq!(co.holds(Hold::GraphRead), 1);
            order.borrow_mut().push(n);
            drop(guard);
        });
    }
    assert_eq!(
        (lock.queued(), lock.sum()),
        (5, 0),
        "queued readers are not counted"
    );
    assert!(order.borrow().is_empty());
    lock.release();
    while home.poll(false) {}
    assert_eq!(*order.borrow(), [0, 1, 2, 3, 4]);
    assert_eq!((lock.queued(), lock.sum()), (0, 0));
    home.close();
}

/// Rule 7.2: a wake that is not ours does not let a reader past the writer.
#[test]
fn a_stray_wake_does_not_let_a_reader_in() {
    let (lock, _) = lock();
    let home = home("stray");
    assert!(lock.own());
    let (handle, inside) = (Rc::new(RefCell::new(None)), Rc::new(Cell::new(false)));
    home.spawn("reader", {
        let (lock, handle, inside) = (lock.clone(), handle.clone(), inside.clone());
        move |co| {
            *handle.borrow_mut() = Some(co.wake_handle());
            let _guard = lock.read(co, co.home().unwrap()).unwrap();
            inside.set(true);
        }
    });
    let stray = handle.borrow_mut().take().unwrap();
    stray.wake();
    while home.poll(false) {}
    assert!(!inside.get() && lock.queued() == 1);
    lock.release();
    while home.poll(false) {}
    assert!(inside.get());
    home.close();
}

/// Rules 7.3, 7.5: a writer that meets readers does not own; each reader that leaves kicks it.
#[test]
fn leaving_readers_kick_a_waiting_writer() {
    let (lock, kicks) = lock();
    let home = home("kick");
    home.run(|co| {
        let guard = lock.read(co, co.home().unwrap()).unwrap();
        writer::announce(&lock.flags);
        assert!(!lock.own(), "somebody reads");
        assert_eq!(kicks.load(Ordering::Relaxed), 0);
        drop(guard);
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
        assert!(lock.own());
    });
    lock.release();
    home.close();
}

/// Rule 7.4: what a dead context had counted goes to the orphans, and its slot to the next one.
#[test]
fn a_dead_context_leaves_its_count_to_the_orphans() {
    let (lock, _) = lock();
    {
        let dying = home("dying");
        dying.run(|co| drop(lock.read(co, co.home().unwrap()).unwrap()));
        // As if a reader had come in here and left elsewhere (rule 7.3).
        assert!(protocol::enter(&lock.slots[0].count, &lock.flags));
    }
    assert_eq!(lock.sum(), 1, "the count outlives its context");
    let next = home("next");
    next.run(|co| {
        let guard = lock.read(co, co.home().unwrap()).unwrap();
        assert_eq!(guard.slot().index(), 0, "the slot of the dead one");
        let orphans = lock.slow.lock().orphans;
        assert_eq!((orphans, lock.sum()), (1, 2));
        drop(guard);
        assert!(!lock.own(), "the orphan still reads");
        let _ = protocol::leave(&lock.slots[0].count, &lock.flags);
        assert_eq!(
            lock.slots[0].count.get(),
            u32::MAX,
            "one count alone may be negative"
        );
        assert!(lock.own(), "the sum is exact");
    });
    lock.release();
    next.close();
}

/// More contexts than slots are an error, and a slot is free again when its context is gone.
#[test]
fn too_many_contexts_are_an_error() {
    let (lock, _) = lock();
    let mut homes: Vec<Home> = (0..MAX_CONTEXTS).map(|_| home("many")).collect();
    for home in &homes {
        home.run(|co| drop(lock.read(co, co.home().unwrap()).unwrap()));
    }
    let late = home("late");
    assert!(late.run(|co| lock.read(co, co.home().unwrap()).is_err()));
    assert_eq!(late.run(|co| co.holds(Hold::GraphRead)), 0);
    homes.swap_remove(7).close();
    assert_eq!(
        late.run(|co| lock.read(co, co.home().unwrap()).unwrap().slot().index()),
        7
    );
}

/// Rule 7.7: a second read lock of one coroutine is refused in every build.
#[test]
#[should_panic(expected = "rule 7.7")]
fn a_second_read_lock_is_refused() {
    let (lock, _) = lock();
    let home = home("twice");
    home.run(|co| {
        let _first = lock.read(co, co.home().unwrap()).unwrap();
        let _second = lock.read(co, co.home().unwrap());
    });
}

/// A coroutine that is dropped while it waits for a writer leaves the queue.
#[test]
fn an_unwound_reader_leaves_the_queue() {
    let (lock, _) = lock();
    let home = home("by hand");
    assert!(lock.own());
    let schedule: Arc<dyn Schedule> = home.context().clone();
    let inner = lock.clone();
    let reader = coblock_coroutine::Coroutine::new(move |co| {
        drop(inner.read(co, &schedule));
    })
    .unwrap();
    home.with(|| reader.enter());
    assert_eq!(lock.queued(), 1);
    drop(reader);
    assert_eq!((lock.queued(), lock.sum()), (0, 0));
    lock.release();
    home.close();
}

/// Rule 7.2 on two threads: a writer that owns is alone, however readers come and go.
#[test]
fn a_writer_that_owns_is_alone() {
    let (lock, _) = lock();
    let inside = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reader = {
        let (lock, inside, stop) = (lock.clone(), inside.clone(), stop.clone());
        std::thread::spawn(move || {
            let home = home("reader");
            let mut reads = 0u64;
            home.run(|co| {
                while !stop.load(Ordering::Relaxed) {
                    let guard = lock.read(co, co.home().unwrap()).unwrap();
                    inside.fetch_add(1, Ordering::SeqCst);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                    reads += 1;
                }
            });
            home.close();
            reads
        })
    };
    let mut owned = 0;
    let end = std::time::Instant::now() + std::time::Duration::from_millis(300);
    while std::time::Instant::now() < end || owned == 0 {
        if lock.own() {
            for _ in 0..100 {
                assert_eq!(
                    inside.load(Ordering::SeqCst),
                    0,
                    "a reader beside the writer"
                );
            }
            owned += 1;
            lock.release();
        } else {
            // Rule 7.5: the flag was taken back; who queued meanwhile must not wait for ever.
            lock.wake_queue();
        }
        std::thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
    assert_eq!(lock.sum(), 0);
}

/// Polls `home` as the graph does.
fn polling(home: &Home) -> impl Fn(&mut dyn FnMut() -> bool) + '_ {
    move |condition| {
        home.with(|| {
            while condition() {
                coblock_aio::poll(true);
            }
        });
    }
}

/// Kicks `home`, as the graph does.
fn lock_of(home: &Home) -> Arc<GraphLock> {
    let context = home.context().clone();
    Arc::new(GraphLock::new(Box::new(move || context.notify())))
}

/// Rule 7.5: while a writer waits, the loop goes on and readers come in; it owns when all have
/// left.
#[test]
fn rule_7_5_a_writer_waits_with_readers_admitted() {
    let home = home("writer");
    let lock = lock_of(&home);
    let steps = Rc::new(RefCell::new(Vec::new()));
    home.spawn("reader", {
        let (lock, steps) = (lock.clone(), steps.clone());
        move |co| {
            let first = lock.read(co, co.home().unwrap()).unwrap();
            coblock_aio::co::reschedule(co);
            assert!(lock.flags.waited(), "the writer waits by now");
            // What needs the lock while a writer waits does not hang.
            coblock_aio::spawn("another", {
                let (lock, steps) = (lock.clone(), steps.clone());
                move |co| {
                    let _second = lock.read(co, co.home().unwrap()).unwrap();
                    steps.borrow_mut().push("another reads");
                    coblock_aio::co::reschedule(co);
                    steps.borrow_mut().push("another ends");
                }
            })
            .unwrap();
            drop(first);
            steps.borrow_mut().push("the first ends");
        }
    });
    let written = lock.write(polling(&home));
    assert_eq!(
        *steps.borrow(),
        ["another reads", "the first ends", "another ends"]
    );
    assert!(lock.flags.owned() && !lock.flags.waited());
    drop(written);
    assert!(!lock.flags.owned());
    home.close();
}

/// Rule 7.5: a callback that runs while one writer waits may write itself.
#[test]
fn rule_7_5_a_callback_writes_while_a_writer_waits() {
    let home = home("writers");
    let lock = lock_of(&home);
    let inner = Arc::new(AtomicUsize::new(0));
    home.spawn("reader", {
        let lock = lock.clone();
        move |co| {
            let _guard = lock.read(co, co.home().unwrap()).unwrap();
            coblock_aio::co::reschedule(co);
            coblock_aio::co::reschedule(co);
        }
    });
    home.context().oneshot({
        let (lock, inner) = (lock.clone(), inner.clone());
        move || {
            let written = lock.write(|condition| {
                while condition() {
                    coblock_aio::poll(true);
                }
            });
            inner.fetch_add(1, Ordering::Relaxed);
            drop(written);
            assert!(lock.flags.waited(), "the outer one still waits");
        }
    });
    let written = lock.write(polling(&home));
    assert_eq!(inner.load(Ordering::Relaxed), 1);
    drop(written);
    home.close();
}

/// Rule 7.7: a writer under a writer is refused, with both places named.
#[test]
fn rule_7_7_a_second_writer_is_refused() {
    let home = home("twice");
    let lock = lock_of(&home);
    let _first = lock.write(polling(&home));
    let second = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        drop(lock.write(polling(&home)));
    }));
    let told = *second.unwrap_err().downcast::<String>().unwrap();
    assert!(
        told.contains("rule 7.7") && told.matches("tests.rs").count() == 2,
        "{told}"
    );
}

/// Rule 7.7: a reader under the writer of its thread would wait for ever, and is refused.
#[test]
fn rule_7_7_read_under_write_is_refused() {
    let home = home("under");
    let lock = lock_of(&home);
    let written = lock.write(polling(&home));
    let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        home.run(|co| drop(lock.read(co, co.home().unwrap())));
    }));
    let told = *read.unwrap_err().downcast::<String>().unwrap();
    assert!(
        told.contains("rule 7.7") && told.matches("tests.rs").count() == 2,
        "{told}"
    );
    assert_eq!((lock.queued(), lock.sum()), (0, 0), "it left nothing");
    drop(written);
    home.run(|co| drop(lock.read(co, co.home().unwrap()).unwrap()));
    home.close();
}

/// Rules 7.5, 7.7: write under read: a coroutine does not write.
#[test]
#[should_panic(expected = "rule 7.5")]
fn rule_7_5_a_coroutine_does_not_write() {
    let home = home("coroutine");
    let lock = lock_of(&home);
    home.run(|_co| drop(lock.write(|_| ())));
}
