//! Wakes: queued on the running coroutine and run depth first (rule 1.9), scheduled into another
//! home (rule 3.10), remembered, stale.

mod support;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use coblock_coroutine::{
    Co, Coroutine, IoWait, State, WakeHandle, in_coroutine, start, start_remote, stats,
};
use support::{TestHome, refused};

type Log = Rc<RefCell<Vec<&'static str>>>;

/// A suspended coroutine that runs `then` when it is woken, and the handle that wakes it.
fn sleeper(then: impl FnOnce(&Co) + 'static) -> (Coroutine, WakeHandle) {
    let out: Rc<RefCell<Option<WakeHandle>>> = Rc::default();
    let inner = out.clone();
    let co = Coroutine::new(move |co| {
        *inner.borrow_mut() = Some(co.wake_handle());
        co.suspend();
        then(co);
    })
    .unwrap();
    co.enter();
    let waker = out.take().unwrap();
    (co, waker)
}

/// Rule 1.9: a wake by a running coroutine does not switch at once; it runs when that one suspends
/// or finishes, in order, from the frame that entered it: so before its entry call returns.
#[test]
fn wakes_wait_for_the_suspend() {
    let log: Log = Rc::default();
    let note = |what| {
        let log = log.clone();
        move |_: &Co| log.borrow_mut().push(what)
    };
    let (one, wake_one) = sleeper(note("one"));
    let (two, wake_two) = sleeper(note("two"));
    let (three, wake_three) = sleeper(note("three"));
    let inner = log.clone();
    let waker = Coroutine::new(move |co| {
        wake_one.wake();
        wake_two.wake();
        // Twice is once.
        wake_two.wake();
        inner.borrow_mut().push("still running");
        co.suspend();
        wake_three.wake();
        inner.borrow_mut().push("ending");
    })
    .unwrap();
    assert_eq!(waker.enter(), State::Suspended);
    assert_eq!(*log.borrow(), ["still running", "one", "two"]);
    assert!(one.finished() && two.finished() && !three.finished());
    assert_eq!(waker.enter(), State::Finished);
    assert_eq!(log.borrow()[3..], ["ending", "three"]);
}

/// Rule 1.9: depth first: what a woken coroutine wakes runs before those that were queued already.
#[test]
fn wakes_run_depth_first() {
    let log: Log = Rc::default();
    let (leaf_log, b_log, c_log) = (log.clone(), log.clone(), log.clone());
    let (_leaf, wake_leaf) = sleeper(move |_| leaf_log.borrow_mut().push("leaf of b"));
    let (_c, wake_c) = sleeper(move |_| c_log.borrow_mut().push("c"));
    let (_b, wake_b) = sleeper(move |_| {
        wake_leaf.wake();
        b_log.borrow_mut().push("b");
    });
    Coroutine::new(move |_| {
        wake_b.wake();
        wake_c.wake();
    })
    .unwrap()
    .enter();
    assert_eq!(*log.borrow(), ["b", "leaf of b", "c"]);
}

/// Rule 1.9: from the frame that entered: with A inside B's wakes, the woken ones run while A's
/// enterer waits, not on A's stack; a nested coroutine's wakes run before its enterer goes on.
#[test]
fn a_nested_ones_wakes_run_in_its_enterer() {
    let log: Log = Rc::default();
    let (woken_log, outer_log) = (log.clone(), log.clone());
    let (woken, wake) = sleeper(move |_| woken_log.borrow_mut().push("woken"));
    Coroutine::new(move |_| {
        let inner = Coroutine::new(move |co| {
            wake.wake();
            co.suspend();
        })
        .unwrap();
        assert_eq!(inner.enter(), State::Suspended);
        outer_log.borrow_mut().push("outer goes on");
        assert_eq!(inner.enter(), State::Finished);
    })
    .unwrap()
    .enter();
    assert_eq!(*log.borrow(), ["woken", "outer goes on"]);
    assert!(woken.finished());
}

/// /aio/coroutine/queue-chaining, rule 1.9: two coroutines wake each other 25 000 times, and the
/// stack does not grow: the wakes are chained, not nested.
#[test]
fn mutual_wakes_do_not_grow_the_stack() {
    const TIMES: u32 = 25_000;
    // On the smallest stack: nested wakes would overflow it after a few dozen; and the leader's
    // frame is measured.
    let wakers: Rc<RefCell<Vec<WakeHandle>>> = Rc::default();
    let (count, depth) = (
        Rc::new(Cell::new(0)),
        Rc::new(RefCell::new([usize::MAX, 0])),
    );
    let make = |me: usize| {
        let (wakers, count, depth) = (wakers.clone(), count.clone(), depth.clone());
        move |co: &Co| {
            while count.get() < 2 * TIMES {
                count.set(count.get() + 1);
                let here = std::ptr::from_ref(&co).addr();
                if me == 0 {
                    let [low, high] = *depth.borrow();
                    *depth.borrow_mut() = [low.min(here), high.max(here)];
                }
                let other = wakers.borrow()[1 - me].clone();
                other.wake();
                co.suspend();
            }
            let other = wakers.borrow()[1 - me].clone();
            other.wake();
        }
    };
    let (zero, wake_zero) = sleeper(make(0));
    let (one, wake_one) = sleeper(make(1));
    wakers.borrow_mut().extend([wake_zero.clone(), wake_one]);
    let switches = stats().switches;
    wake_zero.wake();
    assert!(zero.finished() && one.finished());
    assert_eq!(count.get(), 2 * TIMES);
    assert!(stats().switches - switches >= u64::from(2 * TIMES));
    let [low, high] = *depth.borrow();
    assert!(
        high - low < 256,
        "frames of one coroutine wandered over {} bytes",
        high - low
    );
}

/// A wake on the leader of a coroutine of this thread enters it now; its panic comes out of the
/// wake (rules 3.10, 1.10).
#[test]
fn a_wake_on_the_leader_enters_now() {
    let (co, wake) = sleeper(|_| panic!("woken up badly"));
    assert_eq!(refused(|| wake.wake()), "woken up badly");
    assert!(co.finished());
}

/// A wake of a coroutine that runs, or has entered another one, is remembered: its next suspend
/// returns at once. Once.
#[test]
fn a_wake_of_the_running_one_is_remembered() {
    let passed = Rc::new(Cell::new(0));
    let inner = passed.clone();
    let co = Coroutine::new(move |co| {
        let me = co.wake_handle();
        me.wake();
        me.wake();
        co.suspend();
        inner.set(1);
        co.suspend();
        inner.set(2);
        // Woken by one that it has entered.
        Coroutine::new(move |_| me.wake()).unwrap().enter();
        co.suspend();
        inner.set(3);
    })
    .unwrap();
    co.enter();
    assert_eq!(passed.get(), 1, "two wakes of a running coroutine are one");
    assert_eq!(co.enter(), State::Finished);
    assert_eq!(passed.get(), 3);
}

/// A stale handle does nothing but count, even when the slot lives again.
#[test]
fn a_stale_wake_only_counts() {
    let (co, wake) = sleeper(|_| {});
    wake.wake();
    assert!(co.finished());
    let (next, wake_next) = sleeper(|_| {});
    assert_ne!(wake.id(), wake_next.id());
    let before = stats().stale_wakes;
    wake.wake();
    assert!(
        !next.finished(),
        "the next life in the same slot is not woken by the last one's handle"
    );
    assert_eq!(stats().stale_wakes, before + 1);
    wake_next.wake();
    assert!(next.finished());
}

/// Rule 2.1: a wake does not end a wait for an operation; it is remembered for the next bare
/// suspend.
#[test]
fn a_wake_does_not_end_an_operation() {
    let (wait, steps) = (Rc::new(IoWait::new("read")), Rc::new(Cell::new(0)));
    let (inner, out) = (wait.clone(), steps.clone());
    let waker: Rc<RefCell<Option<WakeHandle>>> = Rc::default();
    let waker_out = waker.clone();
    let co = Coroutine::new(move |co| {
        *waker_out.borrow_mut() = Some(co.wake_handle());
        inner.submitted();
        assert_eq!(inner.wait(co), 3);
        out.set(1);
        co.suspend();
        out.set(2);
    })
    .unwrap();
    co.enter();
    waker.take().unwrap().wake();
    assert_eq!(steps.get(), 0);
    wait.complete(3);
    assert_eq!(steps.get(), 2);
    assert!(co.finished());
}

/// Rule 2.1: completion before the wait: no suspend. Completion by a running coroutine: the waiter
/// is queued (rule 1.9).
#[test]
fn completions_before_and_in_a_coroutine() {
    let co = Coroutine::new(|co| {
        let wait = IoWait::new("early");
        wait.submitted();
        wait.complete(9);
        assert!(wait.is_complete());
        assert_eq!(wait.wait(co), 9);
    })
    .unwrap();
    let switches = stats().switches;
    assert_eq!(co.enter(), State::Finished);
    assert_eq!(stats().switches, switches + 1);

    let (wait, done) = (Rc::new(IoWait::new("late")), Rc::new(Cell::new(false)));
    let (inner, out) = (wait.clone(), done.clone());
    let waiter = Coroutine::new(move |co| {
        inner.submitted();
        assert_eq!(inner.wait(co), 4);
        out.set(true);
    })
    .unwrap();
    waiter.enter();
    let seen = done.clone();
    Coroutine::new(move |_| {
        wait.complete(4);
        assert!(!seen.get(), "rule 1.9");
    })
    .unwrap()
    .enter();
    assert!(done.get() && waiter.finished());
}

/// Rules 1.9, 1.10: a panic of a woken coroutine comes out of the entry call that ran it, and those
/// behind it still run.
#[test]
fn a_panic_in_the_queue_loses_nobody() {
    let log: Log = Rc::default();
    let (last_log, first_log) = (log.clone(), log.clone());
    let (bad, wake_bad) = sleeper(|_| panic!("bad"));
    let (worse, wake_worse) = sleeper(|_| panic!("worse"));
    let (last, wake_last) = sleeper(move |_| last_log.borrow_mut().push("last"));
    let waker = Coroutine::new(move |_| {
        wake_bad.wake();
        wake_worse.wake();
        wake_last.wake();
        first_log.borrow_mut().push("waker ends");
    })
    .unwrap();
    assert_eq!(refused(|| waker.enter()), "bad", "the first one goes on");
    assert_eq!(*log.borrow(), ["waker ends", "last"]);
    assert!(waker.finished() && bad.finished() && worse.finished() && last.finished());
    assert!(!in_coroutine() && !std::thread::panicking());
}

/// The waker's own panic comes out after what it had woken has run.
#[test]
fn a_panicking_waker_has_woken() {
    let (woken, wake) = sleeper(|_| {});
    let waker = Coroutine::new(move |_| {
        wake.wake();
        panic!("after the wake");
    })
    .unwrap();
    assert_eq!(refused(|| waker.enter()), "after the wake");
    assert!(woken.finished());
}

/// Rule 3.10: from another thread a wake is posted to the home, first in, first out; many wakes of
/// one life are one hand-over.
#[test]
fn wakes_from_another_thread_are_posted() {
    let home = TestHome::new("posted");
    let order: Rc<RefCell<Vec<u32>>> = Rc::default();
    let wakers: Rc<RefCell<Vec<WakeHandle>>> = Rc::default();
    for i in 0..3 {
        let (order, wakers) = (order.clone(), wakers.clone());
        start(&home.schedule_of(), "posted", move |co| {
            wakers.borrow_mut().push(co.wake_handle());
            co.suspend();
            order.borrow_mut().push(i);
        })
        .unwrap();
    }
    let wakers = wakers.take();
    std::thread::spawn(move || {
        for i in [2, 0, 2, 1, 0, 2] {
            wakers[i].wake();
        }
    })
    .join()
    .unwrap();
    assert!(order.borrow().is_empty(), "not there, not then");
    assert_eq!(
        home.queued(),
        3,
        "the home has not entered yet: one hand-over a life"
    );
    home.run();
    assert_eq!(*order.borrow(), [2, 0, 1]);
}

/// Rule 3.10 "schedule": even on its own thread a coroutine can be posted instead of entered.
#[test]
fn schedule_posts_at_home_too() {
    let home = TestHome::new("patient");
    let (waker, done): (Rc<RefCell<Option<WakeHandle>>>, Rc<Cell<bool>>) = Default::default();
    let (inner, out) = (waker.clone(), done.clone());
    start(&home.schedule_of(), "patient", move |co| {
        *inner.borrow_mut() = Some(co.wake_handle());
        co.suspend();
        out.set(true);
    })
    .unwrap();
    waker.take().unwrap().schedule();
    assert!(!done.get());
    home.run();
    assert!(done.get());
}

/// /aio/coroutine/worker-thread-co-enter: a coroutine started from a thread that does not own the
/// home runs in the home's thread.
#[test]
fn start_remote_runs_at_home() {
    let home = TestHome::new("worker");
    let this = std::thread::current().id();
    let ran = Arc::new(AtomicU32::new(0));
    let (far, inner) = (home.schedule_of(), ran.clone());
    std::thread::spawn(move || {
        start_remote(&far, "sent", move |co| {
            assert_eq!(std::thread::current().id(), this);
            assert_eq!(co.name(), "sent");
            inner.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    assert_eq!(home.run(), 1);
    assert_eq!(ran.load(Ordering::SeqCst), 1);
}

/// A `Ready` entered inside a coroutine is queued like any wake (rule 1.9); a late one is stale.
#[test]
fn a_ready_in_a_coroutine_is_queued() {
    let home = TestHome::new("nested");
    let done = Arc::new(AtomicU32::new(0));
    let inner = done.clone();
    start_remote(&home.schedule_of(), "sent", move |_| {
        inner.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    let (ready, seen) = (home.pop().unwrap(), done.clone());
    Coroutine::new(move |_| {
        assert!(ready.enter());
        assert_eq!(seen.load(Ordering::SeqCst), 0);
    })
    .unwrap()
    .enter();
    assert_eq!(done.load(Ordering::SeqCst), 1);

    // A hand-over that comes after its life has ended.
    let waker: Rc<RefCell<Option<WakeHandle>>> = Rc::default();
    let out = waker.clone();
    start(&home.schedule_of(), "short", move |co| {
        *out.borrow_mut() = Some(co.wake_handle());
        co.suspend();
    })
    .unwrap();
    let waker = waker.take().unwrap();
    waker.schedule();
    waker.wake();
    let before = stats().stale_wakes;
    assert!(!home.pop().unwrap().enter());
    assert_eq!(stats().stale_wakes, before + 1);
}

/// Wakes from several threads at once, while the sleepers go back to sleep: none is lost. Each
/// waker waits until its sleeper has seen the wake before it sends the next one, so a single lost
/// wake hangs the test.
#[test]
fn no_wake_is_lost_between_threads() {
    const WAKERS: usize = 3;
    const ROUNDS: u64 = 2_000;
    let home = TestHome::new("busy");
    let wakers: Rc<RefCell<VecDeque<WakeHandle>>> = Rc::default();
    let asked: Vec<Arc<AtomicU64>> = (0..WAKERS).map(|_| Arc::default()).collect();
    let seen: Vec<Arc<AtomicU64>> = (0..WAKERS).map(|_| Arc::default()).collect();
    for (asked, seen) in asked.iter().zip(&seen) {
        let (wakers, asked, seen) = (wakers.clone(), asked.clone(), seen.clone());
        start(&home.schedule_of(), "sleeper", move |co| {
            wakers.borrow_mut().push_back(co.wake_handle());
            let mut last = 0;
            while last < ROUNDS {
                let now = asked.load(Ordering::SeqCst);
                if now == last {
                    co.suspend();
                } else {
                    last = now;
                    seen.store(last, Ordering::SeqCst);
                }
            }
        })
        .unwrap();
    }
    let threads: Vec<_> = asked
        .iter()
        .zip(&seen)
        .map(|(asked, seen)| {
            let waker = wakers.borrow_mut().pop_front().unwrap();
            let (asked, seen) = (asked.clone(), seen.clone());
            std::thread::spawn(move || {
                for round in 1..=ROUNDS {
                    asked.store(round, Ordering::SeqCst);
                    waker.wake();
                    while seen.load(Ordering::SeqCst) < round {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    home.drive_until(|| {
        seen.iter()
            .all(|seen| seen.load(Ordering::SeqCst) == ROUNDS)
    });
    for thread in threads {
        thread.join().unwrap();
    }
    home.run();
}
