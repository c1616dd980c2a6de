//! Who owns a coroutine, and what dropping a handle does (rule 1.10).

mod support;

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use coblock_coroutine::{
    Co, Coroutine, CoroutineOptions, IoWait, State, WakeHandle, run_in, run_scoped, start,
    start_remote, stats,
};
use support::{TestHome, refused};

/// Counts its drops.
#[derive(Clone, Default)]
struct Drops(Rc<Cell<u32>>);
struct Counted(Drops);
impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.set(self.0.0.get() + 1);
    }
}
impl Drops {
    fn counted(&self) -> Counted {
        Counted(self.clone())
    }
    fn count(&self) -> u32 {
        self.0.get()
    }
}

/// A coroutine that has never run drops its entry function, and nothing runs.
#[test]
fn dropping_a_new_one() {
    let (drops, live) = (Drops::default(), stats().live());
    let held = drops.counted();
    let co = Coroutine::new(move |_| {
        let _held = held;
        unreachable!("never entered");
    })
    .unwrap();
    assert_eq!((drops.count(), co.state()), (0, "not started"));
    drop(co);
    assert_eq!((drops.count(), stats().live()), (1, live));
}

/// A large entry function (captures of 10 000 bytes) is dropped and run as well.
#[test]
fn dropping_a_new_one_with_a_large_entry() {
    let drops = Drops::default();
    let (held, large) = (drops.counted(), [7_u8; 10_000]);
    let co = Coroutine::new(move |_| {
        let _held = held;
        assert!(large.iter().all(|b| *b == 7));
    })
    .unwrap();
    drop(co);
    assert_eq!(drops.count(), 1);
    let held = drops.counted();
    let co = Coroutine::new(move |co| {
        let _held = held;
        co.suspend();
        assert!(large.iter().all(|b| *b == 7));
    })
    .unwrap();
    co.enter();
    assert_eq!(co.enter(), State::Finished);
    assert_eq!(drops.count(), 2);
}

/// Rule 1.10: a suspended one that is driven by hand is unwound, here and now: every destructor
/// runs, innermost first.
#[test]
fn dropping_a_suspended_one() {
    let (drops, live) = (Drops::default(), stats().live());
    let (captured, in_frame) = (drops.counted(), drops.counted());
    let co = Coroutine::new(move |co| {
        let _captured = captured;
        let deep = move |co: &Co| {
            let _in_frame = in_frame;
            co.suspend();
            unreachable!("it was unwound");
        };
        deep(co);
    })
    .unwrap();
    co.enter();
    assert_eq!(drops.count(), 0);
    drop(co);
    assert_eq!((drops.count(), stats().live()), (2, live));
    assert!(!std::thread::panicking());
}

/// Rule 1.10: a body that swallows the unwinding is unwound again at its next suspend, and may as
/// well finish.
#[test]
fn a_body_that_swallows_the_unwinding() {
    let steps = Rc::new(Cell::new(0));
    let inner = steps.clone();
    let co = Coroutine::new(move |co| {
        for _ in 0..3 {
            let swallowed = catch_unwind(AssertUnwindSafe(|| co.suspend()));
            inner.set(inner.get() + 1);
            assert!(swallowed.is_err());
        }
    })
    .unwrap();
    co.enter();
    drop(co);
    assert_eq!(steps.get(), 3);
}

/// Rule 1.10: a panic inside comes out of the entry call, with its payload, and the coroutine is
/// over.
#[test]
fn a_panic_comes_out_of_enter() {
    let live = stats().live();
    let co = Coroutine::new(|co| {
        co.suspend();
        std::panic::panic_any(42_u32);
    })
    .unwrap();
    assert_eq!(co.enter(), State::Suspended);
    let payload = catch_unwind(AssertUnwindSafe(|| co.enter())).unwrap_err();
    assert_eq!(payload.downcast_ref::<u32>(), Some(&42));
    assert!(co.finished() && !std::thread::panicking());
    assert_eq!(stats().live(), live, "its slot went back to the pool");
}

/// Rule 1.10: one that waits for an operation cannot be dropped; dropping its handle leaves it to
/// whoever completes it.
#[test]
fn dropping_one_that_waits() {
    let (drops, wait) = (Drops::default(), Rc::new(IoWait::new("write")));
    let (held, inner) = (drops.counted(), wait.clone());
    let co = Coroutine::new(move |co| {
        let _held = held;
        inner.submitted();
        assert_eq!(inner.wait(co), -5);
    })
    .unwrap();
    co.enter();
    assert!(
        format!("{co:?}").contains("waiting for an operation: 'write'"),
        "{co:?}"
    );
    drop(co);
    assert_eq!(drops.count(), 0, "nobody may unwind it");
    wait.complete(-5);
    assert_eq!(drops.count(), 1, "it ran to its end");
}

/// A handle whose coroutine has been resumed by its home belongs to that: dropping the handle is
/// nothing.
#[test]
fn dropping_one_that_a_home_has_resumed() {
    let home = TestHome::new("owner");
    let drops = Drops::default();
    let (held, waker): (_, Rc<RefCell<Option<WakeHandle>>>) = (drops.counted(), Rc::default());
    let out = waker.clone();
    let options = CoroutineOptions {
        home: Some(home.schedule_of()),
        ..Default::default()
    };
    let co = Coroutine::with_options(&options, move |co| {
        let _held = held;
        *out.borrow_mut() = Some(co.wake_handle());
        co.suspend();
        co.suspend();
    })
    .unwrap();
    co.enter();
    let waker = waker.take().unwrap();
    waker.wake();
    drop(co);
    assert_eq!(drops.count(), 0);
    waker.wake();
    assert_eq!(drops.count(), 1);
}

/// A handle whose coroutine is on its way to its home, or queued, may be dropped: the coroutine
/// runs none the less.
#[test]
fn dropping_one_that_is_on_its_way() {
    let home = TestHome::new("goal");
    let drops = Drops::default();
    let make = |out: &Rc<RefCell<Option<WakeHandle>>>| {
        let (held, out) = (drops.counted(), out.clone());
        let options = CoroutineOptions {
            home: Some(home.schedule_of()),
            ..Default::default()
        };
        let co = Coroutine::with_options(&options, move |co| {
            let _held = held;
            *out.borrow_mut() = Some(co.wake_handle());
            co.suspend();
        })
        .unwrap();
        co.enter();
        co
    };
    let out = Rc::default();
    let scheduled = make(&out);
    let waker = out.take().unwrap();
    std::thread::spawn(move || waker.wake()).join().unwrap();
    drop(scheduled);
    assert_eq!(drops.count(), 0);
    home.run();
    assert_eq!(drops.count(), 1);

    let queued = make(&out);
    let waker = out.take().unwrap();
    Coroutine::new(move |_| {
        waker.wake();
        drop(queued);
    })
    .unwrap()
    .enter();
    assert_eq!(drops.count(), 2);
}

/// A running coroutine may drop its own handle, and runs to its end.
#[test]
fn dropping_the_running_one() {
    let me: Rc<RefCell<Option<Coroutine>>> = Rc::default();
    let (inner, done) = (me.clone(), Rc::new(Cell::new(false)));
    let out = done.clone();
    let co = Coroutine::new(move |_| {
        drop(inner.take());
        out.set(true);
    })
    .unwrap();
    let enter: *const Coroutine = {
        *me.borrow_mut() = Some(co);
        std::ptr::from_ref(me.borrow().as_ref().unwrap())
    };
    // SAFETY: the handle is alive when it is entered; `enter` reads it before the switch, and not
    // after.
    unsafe { &*enter }.enter();
    assert!(done.get());
}

/// A scheduler that drops a first `Ready` drops the coroutine with it: its entry function is
/// dropped, on any thread.
#[test]
fn dropping_a_ready_that_never_ran() {
    struct Flag(std::sync::Arc<std::sync::atomic::AtomicBool>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }
    let (home, dropped) = (TestHome::new("closed"), std::sync::Arc::default());
    let flag = Flag(std::sync::Arc::clone(&dropped));
    start_remote(&home.schedule_of(), "never", move |_| drop(flag)).unwrap();
    let ready = home.pop().unwrap();
    std::thread::spawn(move || drop(ready)).join().unwrap();
    assert!(dropped.load(std::sync::atomic::Ordering::SeqCst));
}

/// `start` enters now; the coroutine belongs to its home from the start.
#[test]
fn start_enters_now() {
    let home = TestHome::new("here");
    let (steps, waker): (Rc<Cell<u32>>, Rc<RefCell<Option<WakeHandle>>>) = Default::default();
    let (inner, out) = (steps.clone(), waker.clone());
    start(&home.schedule_of(), "started", move |co| {
        assert!(co.home().is_some_and(|home| home.name() == "here"));
        assert_eq!(co.name(), "started");
        inner.set(1);
        *out.borrow_mut() = Some(co.wake_handle());
        co.suspend();
        inner.set(2);
    })
    .unwrap();
    assert_eq!(steps.get(), 1);
    waker.take().unwrap().wake();
    assert_eq!(steps.get(), 2);
    let message = refused(|| start(&home.schedule_of(), "bang", |_| panic!("at once")));
    assert_eq!(message, "at once");
}

/// `run_scoped` lends the caller's frame, turns the loop until the function returns, and passes its
/// result and its panic on.
#[test]
fn run_scoped_borrows() {
    let home = TestHome::new("scoped");
    let (waker, mut turns) = (RefCell::new(None), 0);
    let mut text = String::from("a");
    let length = run_scoped(
        Some(&home.schedule_of()),
        |co| {
            text.push('b');
            *waker.borrow_mut() = Some(co.wake_handle());
            co.suspend();
            text.push('c');
            text.len()
        },
        || {
            turns += 1;
            if let Some(waker) = waker.take() {
                waker.wake();
            }
        },
    );
    assert_eq!((length, turns, text.as_str()), (Ok(3), 1, "abc"));
    let panic = refused(|| run_scoped(None, |_| panic!("scoped panic"), || unreachable!()));
    assert_eq!(panic, "scoped panic");
    // A panic of the turn, after the function has returned, is an ordinary one; before it, the
    // process aborts (see `children.rs`).
    assert_eq!(
        run_scoped(None, |_| 5, || unreachable!("it never waited")),
        Ok(5)
    );
}

/// `run_in` runs a function that borrows in another home, on another thread, and comes back with
/// its result or its panic.
#[test]
fn run_in_another_home() {
    let here = TestHome::new("here");
    let there = TestHome::new("there");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let driver = {
        let (there, stop) = (there.clone(), stop.clone());
        std::thread::spawn(move || {
            there.adopt();
            there.drive_until(|| stop.load(std::sync::atomic::Ordering::SeqCst));
        })
    };
    // Until the other thread has adopted it.
    while coblock_coroutine::Schedule::is_home(&*there) {
        std::thread::yield_now();
    }
    let far = there.schedule_of();
    let mut borrowed = vec![1, 2];
    let done = run_scoped(
        Some(&here.schedule_of()),
        |co| {
            let this = std::thread::current().id();
            let sum = run_in(co, &far, "adds", |co| {
                assert_ne!(std::thread::current().id(), this);
                assert_eq!((co.name(), co.home().unwrap().name()), ("adds", "there"));
                borrowed.push(3);
                borrowed.iter().sum::<i32>()
            });
            assert_eq!(std::thread::current().id(), this);
            assert_eq!(sum, Ok(6));
            let panic = refused(|| run_in(co, &far, "fails", |_| panic!("over there")));
            assert_eq!(panic, "over there");
            // In its own home it simply runs, in the same coroutine.
            let own = co.home().unwrap().clone();
            assert_eq!(
                run_in(co, &own, "same", coblock_coroutine::Co::id),
                Ok(co.id())
            );
        },
        || here.turn(),
    );
    assert_eq!((done, borrowed), (Ok(()), vec![1, 2, 3]));
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    driver.join().unwrap();
}

/// A home that drops the work instead of running it: the caller gets an error, not an endless wait.
#[test]
fn run_in_a_home_that_is_gone() {
    let here = TestHome::new("here");
    // Belongs to a thread that is over.
    let there = std::thread::spawn(|| TestHome::new("gone")).join().unwrap();
    let far = there.schedule_of();
    let result = run_scoped(
        Some(&here.schedule_of()),
        |co| {
            run_in(co, &far, "unheard", |_| {
                unreachable!("nobody drives that home")
            })
        },
        || drop(there.pop()),
    );
    assert_eq!(
        result,
        Ok(Err::<(), _>(coblock_coroutine::Error::HomeGone {
            name: "unheard"
        }))
    );
}

/// While another thread works on its frame, a coroutine cannot be unwound: dropping its handle
/// leaves it alone.
#[test]
fn dropping_one_that_has_lent_its_frame() {
    let home = TestHome::new("lender");
    let there = std::thread::spawn(|| TestHome::new("borrower"))
        .join()
        .unwrap();
    let far = there.schedule_of();
    let result = Rc::new(Cell::new(0));
    let out = result.clone();
    let options = CoroutineOptions {
        home: Some(home.schedule_of()),
        ..Default::default()
    };
    let co = Coroutine::with_options(&options, move |co| {
        let on_stack = 20;
        out.set(run_in(co, &far, "works", |_| on_stack + 1).unwrap());
    })
    .unwrap();
    co.enter();
    drop(co);
    std::thread::spawn(move || {
        there.adopt();
        there.run();
    })
    .join()
    .unwrap();
    home.run();
    assert_eq!(result.get(), 21);
}
