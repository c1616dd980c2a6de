//! Locks that suspend: `CoMutex` (rule 4.1) and `CoQueue` (rule 4.2), alone, between threads, and
//! under random load.

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use coblock_coroutine::{
    Co, CoMutex, CoQueue, Coroutine, Hold, Schedule, State, ThreadLock, WakeHandle, start_remote,
    stats,
};
use support::TestHome;

type Log = Rc<RefCell<Vec<u32>>>;

/// Rule 4.1: waiters are served in order; the lock is never free while somebody waits, so a
/// newcomer does not overtake, not even one that comes between the unlock and the resume of the
/// next owner.
#[test]
fn direct_hand_off_in_order() {
    let mutex = Rc::new(CoMutex::new(()));
    let log: Log = Rc::default();
    let locker = |i: u32| {
        let (mutex, log) = (mutex.clone(), log.clone());
        Coroutine::new(move |co| {
            let guard = mutex.lock(co);
            log.borrow_mut().push(i);
            co.suspend();
            drop(guard);
            // Comes back at once, and must queue behind all others.
            let _again = mutex.lock(co);
            log.borrow_mut().push(10 + i);
        })
        .unwrap()
    };
    let all: Vec<Coroutine> = (0..4).map(locker).collect();
    for co in &all {
        co.enter();
    }
    assert_eq!((log.borrow().len(), mutex.waiting()), (1, 3));
    for co in &all {
        // The owner suspends with the lock, then gives it to the next one and queues again.
        co.enter();
    }
    assert_eq!(*log.borrow(), [0, 1, 2, 3, 10, 11, 12, 13]);
    assert!(all.iter().all(Coroutine::finished));
    assert_eq!(mutex.lock_count(), 8);
}

/// Rule 4.1: between the unlock and the moment at which the next owner runs, the lock is the next
/// owner's: nobody can take it.
#[test]
fn never_free_in_between() {
    let mutex = Rc::new(CoMutex::new(()));
    let got = Rc::new(Cell::new(false));
    let holder = {
        let mutex = mutex.clone();
        Coroutine::new(move |co| {
            let guard = mutex.lock(co);
            co.suspend();
            drop(guard);
            // Woken, but not run yet (rule 1.9).
            assert!(mutex.try_lock(co).is_none());
        })
        .unwrap()
    };
    let waiter = {
        let (mutex, got) = (mutex.clone(), got.clone());
        Coroutine::new(move |co| {
            let _guard = mutex.lock(co);
            got.set(true);
        })
        .unwrap()
    };
    holder.enter();
    waiter.enter();
    assert!(!got.get());
    holder.enter();
    assert!(got.get() && waiter.finished());
}

/// A wake that is not the hand-off does not let a waiter through.
#[test]
fn spurious_wakes_do_not_pass() {
    let mutex = Rc::new(CoMutex::new(0));
    let (waker, got): (Rc<RefCell<Option<WakeHandle>>>, Rc<Cell<bool>>) = Default::default();
    let holder = {
        let mutex = mutex.clone();
        Coroutine::new(move |co| {
            let _guard = mutex.lock(co);
            co.suspend();
        })
        .unwrap()
    };
    holder.enter();
    let waiter = {
        let (mutex, waker, got) = (mutex.clone(), waker.clone(), got.clone());
        Coroutine::new(move |co| {
            *waker.borrow_mut() = Some(co.wake_handle());
            let _guard = mutex.lock(co);
            got.set(true);
        })
        .unwrap()
    };
    waiter.enter();
    let waker = waker.take().unwrap();
    for _ in 0..3 {
        waker.wake();
        assert_eq!(waiter.enter(), State::Suspended);
    }
    assert!(!got.get());
    holder.enter();
    assert!(got.get() && waiter.finished());
}

/// A waiter that is unwound leaves the queue; one that had the lock handed over already passes it
/// on.
#[test]
fn unwound_waiters_leave() {
    let mutex = Rc::new(CoMutex::new(0));
    let got = Rc::new(Cell::new(0));
    let locker = |add: u32| {
        let (mutex, got) = (mutex.clone(), got.clone());
        Coroutine::new(move |co| {
            let _guard = mutex.lock(co);
            got.set(got.get() + add);
            co.suspend();
        })
        .unwrap()
    };
    let (first, second, third) = (locker(1), locker(10), locker(100));
    first.enter();
    second.enter();
    third.enter();
    drop(second);
    assert_eq!(mutex.waiting(), 1);
    // Unwinding the owner unlocks: the next one gets the lock.
    drop(first);
    assert_eq!(got.get(), 101);
    drop(third);
    assert_eq!((mutex.waiting(), stats().live()), (0, 0));
    let mut mutex = Rc::into_inner(mutex).unwrap();
    assert_eq!(*mutex.get_mut(), 0);
    assert_eq!(mutex.into_inner(), 0);
}

/// A panic under the lock unlocks it, and does not poison it.
#[test]
fn a_panic_unlocks() {
    let mutex = Rc::new(CoMutex::new(1));
    let inner = mutex.clone();
    let co = Coroutine::new(move |co| {
        *inner.lock(co) += 1;
        let _guard = inner.lock(co);
        panic!("under the lock");
    })
    .unwrap();
    assert_eq!(support::refused(|| co.enter()), "under the lock");
    let inner = mutex.clone();
    let co = Coroutine::new(move |co| assert_eq!(*inner.lock(co), 2)).unwrap();
    assert_eq!(co.enter(), State::Finished);
}

/// A home of its own thread, driven until the flag is set.
fn driven(name: &str, stop: &Arc<AtomicBool>) -> (Arc<TestHome>, std::thread::JoinHandle<()>) {
    let home = TestHome::new(name);
    let (inner, stop) = (home.clone(), stop.clone());
    let thread = std::thread::spawn(move || {
        inner.adopt();
        inner.drive_until(|| stop.load(Ordering::SeqCst));
    });
    while home.is_home() {
        std::thread::yield_now();
    }
    (home, thread)
}

/// Rule 4.1, across homes: coroutines of two threads contend for one mutex; never two owners,
/// nobody is lost, and each one runs on in its own home.
#[test]
fn contention_over_two_homes() {
    const EACH: u32 = 8;
    const ROUNDS: u32 = 200;
    struct Protected {
        owners: u32,
        total: u64,
    }
    let stop = Arc::new(AtomicBool::new(false));
    let homes = [driven("one", &stop), driven("two", &stop)];
    let mutex = Arc::new(CoMutex::new(Protected {
        owners: 0,
        total: 0,
    }));
    let done = Arc::new(AtomicU32::new(0));
    for (home, thread) in &homes {
        let id = thread.thread().id();
        for _ in 0..EACH {
            let (mutex, done) = (mutex.clone(), done.clone());
            start_remote(&home.schedule_of(), "contender", move |co| {
                for round in 0..ROUNDS {
                    let mut guard = mutex.lock(co);
                    assert_eq!(
                        std::thread::current().id(),
                        id,
                        "each runs on in its own home"
                    );
                    assert_eq!(guard.owners, 0, "one owner at a time");
                    guard.owners = 1;
                    if round % 3 == 0 {
                        // Give the others a chance to queue up while the lock is held over a
                        // suspend.
                        co.wake_handle().schedule();
                        co.suspend();
                    }
                    guard.owners = 0;
                    guard.total += 1;
                }
                done.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
        }
    }
    for _ in 0..2000 {
        if done.load(Ordering::SeqCst) == 2 * EACH {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    stop.store(true, Ordering::SeqCst);
    for (_, thread) in homes {
        thread.join().unwrap();
    }
    assert_eq!(done.load(Ordering::SeqCst), 2 * EACH, "all came through");
    let mutex = Arc::into_inner(mutex).expect("no coroutine is left");
    assert_eq!(mutex.lock_count(), u64::from(2 * EACH * ROUNDS));
    assert_eq!(mutex.into_inner().total, u64::from(2 * EACH * ROUNDS));
}

/// A coroutine that waits in `queue` and then notes its number.
fn waits_in(queue: &Rc<CoQueue>, log: &Log, number: u32) -> Coroutine {
    let (queue, log) = (queue.clone(), log.clone());
    let co = Coroutine::new(move |co| {
        queue.wait(co);
        log.borrow_mut().push(number);
    })
    .unwrap();
    assert_eq!(co.enter(), State::Suspended);
    co
}

/// Rule 4.2: wait appends; outside a coroutine, waking enters at once, first in, first out.
#[test]
fn queue_is_first_in_first_out() {
    let (queue, log): (Rc<CoQueue>, Log) = Default::default();
    let all: Vec<Coroutine> = (0..4).map(|i| waits_in(&queue, &log, i)).collect();
    assert_eq!((queue.len(), queue.is_empty()), (4, false));
    assert!(queue.wake_next());
    assert_eq!(*log.borrow(), [0], "entered at once");
    assert_eq!(queue.wake_all(), 3);
    assert_eq!(*log.borrow(), [0, 1, 2, 3]);
    assert!(!queue.wake_next() && queue.is_empty());
    assert!(all.iter().all(Coroutine::finished));
}

/// Rule 4.2: in a coroutine, the woken ones run after the current one suspends.
#[test]
fn queue_in_a_coroutine() {
    let (queue, log): (Rc<CoQueue>, Log) = Default::default();
    let _all: Vec<Coroutine> = (0..3).map(|i| waits_in(&queue, &log, i)).collect();
    let (inner, seen) = (queue.clone(), log.clone());
    let waker = Coroutine::new(move |co| {
        assert!(inner.wake_next());
        assert!(seen.borrow().is_empty());
        co.suspend();
        assert_eq!(*seen.borrow(), [0]);
        assert_eq!(inner.wake_all(), 2);
        assert_eq!(*seen.borrow(), [0]);
    })
    .unwrap();
    waker.enter();
    waker.enter();
    assert_eq!(*log.borrow(), [0, 1, 2]);
}

/// Rule 4.2: one that was woken and finds its condition still failing goes back to the front. It is
/// not woken by the same `wake_all` again.
#[test]
fn queue_front() {
    let (queue, log): (Rc<CoQueue>, Log) = Default::default();
    let ready = Rc::new(Cell::new(false));
    let (inner, flag, out) = (queue.clone(), ready.clone(), log.clone());
    let stubborn = Coroutine::new(move |co| {
        queue_wait_until(&inner, co, &flag);
        out.borrow_mut().push(0);
    })
    .unwrap();
    stubborn.enter();
    let _others: Vec<Coroutine> = (1..3).map(|i| waits_in(&queue, &log, i)).collect();
    assert!(queue.wake_next());
    assert_eq!((log.borrow().len(), queue.len()), (0, 3));
    ready.set(true);
    assert!(queue.wake_next());
    assert_eq!(*log.borrow(), [0], "it was at the front");
    ready.set(false);
    assert_eq!(queue.wake_all(), 2);
    assert_eq!(*log.borrow(), [0, 1, 2]);
}

fn queue_wait_until(queue: &CoQueue, co: &Co, flag: &Cell<bool>) {
    queue.wait(co);
    while !flag.get() {
        queue.wait_front(co);
    }
}

/// Rule 4.2: the lock is released during the wait and held again after; and queueing comes before
/// the release.
#[test]
fn queue_with_a_mutex() {
    struct Shared {
        queue: CoQueue,
        items: CoMutex<Vec<u32>>,
    }
    let shared = Rc::new(Shared {
        queue: CoQueue::new(),
        items: CoMutex::new(Vec::new()),
    });
    let log: Log = Rc::default();
    let consumer = |count: u32| {
        let (shared, log) = (shared.clone(), log.clone());
        Coroutine::new(move |co| {
            for _ in 0..count {
                let mut items = shared.items.lock(co);
                while items.is_empty() {
                    assert_eq!(co.holds(Hold::Lock), 1);
                    items = shared.queue.wait_with(co, items);
                }
                let item = items.remove(0);
                log.borrow_mut().push(item);
                drop(items);
                assert_eq!(co.holds(Hold::Lock), 0);
            }
        })
        .unwrap()
    };
    let (one, two) = (consumer(2), consumer(2));
    one.enter();
    two.enter();
    assert_eq!(shared.queue.len(), 2);
    let inner = shared.clone();
    let producer = Coroutine::new(move |co| {
        for item in 0..4 {
            let mut items = inner.items.lock(co);
            items.push(item);
            inner.queue.wake_next();
            // Woken while we hold the lock: they wait for it.
            co.suspend();
            drop(items);
        }
    })
    .unwrap();
    while producer.enter() == State::Suspended {}
    assert_eq!(*log.borrow(), [0, 1, 2, 3]);
    assert!(one.finished() && two.finished());
}

/// Rule 4.2, outside a coroutine, with a thread lock: released while the waiter is entered, held
/// again after. And waiting with a thread guard gives it back before the suspend.
#[test]
fn queue_with_a_thread_lock() {
    struct Shared {
        queue: CoQueue,
        value: ThreadLock<u32>,
    }
    let shared = Rc::new(Shared {
        queue: CoQueue::new(),
        value: ThreadLock::new(0),
    });
    let inner = shared.clone();
    let waiter = Coroutine::new(move |co| {
        let mut value = inner.value.lock();
        while *value == 0 {
            inner.queue.wait_dropping(co, value);
            value = inner.value.lock();
        }
        *value += 100;
        drop(value);
        let value = inner.value.lock();
        inner.queue.wait_front_dropping(co, value);
    })
    .unwrap();
    waiter.enter();
    let mut value = shared.value.lock();
    *value = 1;
    let (value, woke) = shared.queue.wake_next_unlocked(&shared.value, value);
    assert_eq!((*value, woke.is_continue()), (101, true));
    drop(value);
    assert_eq!(shared.queue.wake_all(), 1);
    assert!(waiter.finished());
    let (_value, woke) = shared
        .queue
        .wake_next_unlocked(&shared.value, shared.value.lock());
    assert!(woke.is_break());
}

/// A waiter that is unwound leaves the queue; a spurious wake does not let it out.
#[test]
fn queue_unwound_and_spurious() {
    let (queue, log): (Rc<CoQueue>, Log) = Default::default();
    let (one, two) = (waits_in(&queue, &log, 1), waits_in(&queue, &log, 2));
    assert_eq!(one.enter(), State::Suspended);
    assert_eq!(two.enter(), State::Suspended);
    drop(one);
    assert_eq!(queue.len(), 1);
    queue.wake_next();
    assert_eq!(*log.borrow(), [2]);
}

/// Waiters of two homes in one queue; each is woken into its own home, none is lost.
#[test]
fn queue_over_two_homes() {
    const EACH: u64 = 50;
    let stop = Arc::new(AtomicBool::new(false));
    let homes = [driven("left", &stop), driven("right", &stop)];
    let (queue, woken) = (Arc::new(CoQueue::new()), Arc::new(AtomicU64::new(0)));
    for (home, thread) in &homes {
        let id = thread.thread().id();
        for _ in 0..EACH {
            let (queue, woken) = (queue.clone(), woken.clone());
            start_remote(&home.schedule_of(), "waiter", move |co| {
                queue.wait(co);
                assert_eq!(std::thread::current().id(), id);
                woken.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
        }
    }
    let mut sent = 0;
    for _ in 0..20_000 {
        if woken.load(Ordering::SeqCst) == 2 * EACH {
            break;
        }
        sent += u64::from(queue.wake_next());
        std::thread::yield_now();
    }
    // All have been woken once each; the last ones may still be on their way.
    for _ in 0..2000 {
        if woken.load(Ordering::SeqCst) == 2 * EACH {
            break;
        }
        sent += u64::from(queue.wake_next());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    stop.store(true, Ordering::SeqCst);
    for (_, thread) in homes {
        thread.join().unwrap();
    }
    assert_eq!((woken.load(Ordering::SeqCst), sent), (2 * EACH, 2 * EACH));
}
