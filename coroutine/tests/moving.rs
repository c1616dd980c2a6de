//! Rule 3.10, "reschedule self": a coroutine really moves to another home, and back again. Unsafe,
//! and used by nothing else.

mod support;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use coblock_coroutine::{
    Coroutine, CoroutineOptions, Departure, Hold, WakeHandle, start, start_remote,
};
use support::{Driven, TestHome, refused, until};

#[inline(never)]
fn this_thread() -> std::thread::ThreadId {
    std::thread::current().id()
}

/// Rule 3.10: there and back again, a hundred times, with what it holds; it finishes on the other
/// thread, and its slot serves that one.
#[test]
fn there_and_back_again() {
    let (one, two) = (Driven::new("one"), Driven::new("two"));
    let homes = [one.home.schedule_of(), two.home.schedule_of()];
    let posts = [one.departures.clone(), two.departures.clone()];
    let ids = [one.id(), two.id()];
    let done = Arc::new(AtomicU32::new(0));
    for _ in 0..4 {
        let (homes, posts, done) = (homes.clone(), posts.clone(), done.clone());
        start_remote(&one.home.schedule_of(), "traveller", move |co| {
            let held = co.hold(Hold::GraphRead);
            let mut sum = 0_u64;
            for i in 0..101_u64 {
                let from = usize::try_from(i % 2).unwrap();
                assert_eq!(this_thread(), ids[from]);
                // In its own home it is nothing.
                // SAFETY: what lies on this stack is `Send`; `this_thread` is not inlined.
                unsafe { co.move_to(&homes[from], |_| unreachable!("already there")) };
                // SAFETY: as above.
                unsafe {
                    co.move_to(&homes[1 - from], |departure| {
                        posts[from].lock().unwrap().push(departure);
                    });
                }
                assert_eq!(this_thread(), ids[1 - from]);
                assert_eq!(co.home().unwrap().name(), ["one", "two"][1 - from]);
                sum += i;
            }
            assert_eq!((sum, co.holds(Hold::GraphRead)), (5050, 1));
            drop(held);
            done.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
    }
    until(|| done.load(Ordering::SeqCst) == 4);
}

/// A wake by a handle from before the move finds the coroutine in its new home; one that comes
/// while it moves is remembered.
#[test]
fn wakes_follow() {
    let (one, two) = (Driven::new("one"), Driven::new("two"));
    let (far, post) = (two.home.schedule_of(), one.departures.clone());
    let handle: Arc<Mutex<Option<WakeHandle>>> = Arc::default();
    let (out, steps) = (handle.clone(), Arc::new(AtomicU32::new(0)));
    let (inner, there) = (steps.clone(), two.id());
    start_remote(&one.home.schedule_of(), "traveller", move |co| {
        let mine = co.wake_handle();
        // SAFETY: what lies on this stack is `Send`; `this_thread` is not inlined.
        unsafe {
            co.move_to(&far, |departure| {
                // On its way: remembered.
                mine.wake();
                post.lock().unwrap().push(departure);
            });
        }
        co.suspend();
        inner.store(1, Ordering::SeqCst);
        *out.lock().unwrap() = Some(mine);
        co.suspend();
        assert_eq!(this_thread(), there);
        inner.store(2, Ordering::SeqCst);
    })
    .unwrap();
    until(|| handle.lock().unwrap().is_some());
    assert_eq!(steps.load(Ordering::SeqCst), 1);
    let old = handle.lock().unwrap().take().unwrap();
    old.wake();
    until(|| steps.load(Ordering::SeqCst) == 2);
}

/// Departing before the coroutine has suspended is refused: the new home could enter it while it
/// runs.
#[test]
fn departing_too_early() {
    let home = TestHome::new("here");
    let far = TestHome::new("there").schedule_of();
    let kept = std::rc::Rc::new(std::cell::Cell::new(false));
    let seen = kept.clone();
    start(&home.schedule_of(), "hasty", move |co| {
        let message = refused(|| {
            // SAFETY: it does not move.
            unsafe { co.move_to(&far, Departure::depart) }
        });
        assert!(message.contains("'hasty'") && message.contains("before it has suspended"));
        seen.set(true);
    })
    .unwrap();
    assert!(kept.get());
}

/// A coroutine without a home gets one by moving, and its handle is nothing from then on.
#[test]
fn a_homeless_one_moves_in() {
    let home = TestHome::new("shelter");
    let departure = std::rc::Rc::new(std::cell::Cell::new(None));
    let (out, to) = (departure.clone(), home.schedule_of());
    let co = Coroutine::with_options(&CoroutineOptions::default(), move |co| {
        // SAFETY: it moves to a home of the same thread.
        unsafe { co.move_to(&to, |departure| out.set(Some(departure))) };
        assert_eq!(co.home().unwrap().name(), "shelter");
    })
    .unwrap();
    co.enter();
    assert!(refused(|| co.enter()).contains("the move to another home"));
    departure.take().unwrap().depart();
    let id = co.id();
    drop(co);
    assert!(id > 0);
    assert_eq!(home.run(), 1);
    assert_eq!(coblock_coroutine::stats().live(), 0);
}
