//! Rules 7.1 to 7.4 and 7.7, with an abstract writer in place of the one that comes with graph
//! changes.

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
    fn try_own(&self) -> bool {
        let orphans = self.slow.lock().orphans;
        writer::try_own(
            &self.flags,
            self.slots.iter().map(|slot| &slot.count),
            orphans,
        )
    }

    fn queued(&self) -> usize {
        self.slow.lock().queue.len()
    }

    /// Rule 7.6: the flag goes under the mutex, then the queue is woken.
    fn release(&self) {
        {
            let _slow = self.slow.lock();
            writer::release(&self.flags);
        }
        self.wake_queue();
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
    assert!(lock.try_own(), "nobody reads");
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
    assert!(lock.try_own());
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
        assert!(!lock.try_own(), "somebody reads");
        assert_eq!(kicks.load(Ordering::Relaxed), 0);
        drop(guard);
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
        assert!(lock.try_own());
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
        assert!(!lock.try_own(), "the orphan still reads");
        let _ = protocol::leave(&lock.slots[0].count, &lock.flags);
        assert_eq!(
            lock.slots[0].count.get(),
            u32::MAX,
            "one count alone may be negative"
        );
        assert!(lock.try_own(), "the sum is exact");
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
    assert!(lock.try_own());
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
        if lock.try_own() {
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
