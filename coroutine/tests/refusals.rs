//! What is refused, and that each refusal is raised where the mistake is made and names both places
//! (rules 1.3, 1.4, 1.10, 2.1, 4.1).

mod support;

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use coblock_coroutine::{
    Co, CoMutex, Coroutine, CoroutineOptions, Hold, IoWait, Schedule, State, ThreadLock,
    current_holds, in_coroutine, start, start_remote, with_current,
};
use support::{TestHome, refused};

scoped_tls::scoped_thread_local!(static SMUGGLED: Co);

fn named(name: &'static str, f: impl FnOnce(&Co) + 'static) -> Coroutine {
    Coroutine::with_options(
        &CoroutineOptions {
            name,
            ..Default::default()
        },
        f,
    )
    .unwrap()
}

/// Both places: the coroutine by name and creation, and the caller, all of this file.
#[track_caller]
fn names_both(message: &str, coroutine: &str, why: &str) {
    assert!(
        message.contains(coroutine),
        "{message:?} does not name {coroutine:?}"
    );
    assert!(message.contains(why), "{message:?} does not say {why:?}");
    let places = message.matches("tests/refusals.rs:").count();
    assert!(places >= 2, "{message:?} names {places} place(s), not both");
}

/// Rule 1.4: a running coroutine cannot be entered.
#[test]
fn entering_the_running_one() {
    let me: Rc<RefCell<Option<Coroutine>>> = Rc::default();
    let inner = me.clone();
    let co = named("narcissus", move |_| {
        let message = refused(|| inner.borrow().as_ref().unwrap().enter());
        names_both(&message, "narcissus", "is running");
    });
    *me.borrow_mut() = Some(co);
    assert_eq!(me.borrow().as_ref().unwrap().enter(), State::Finished);
}

/// Rule 1.4: one that has entered another and waits for it cannot be entered.
#[test]
fn entering_one_that_has_entered_another() {
    let outer: Rc<RefCell<Option<Coroutine>>> = Rc::default();
    let from_inner = outer.clone();
    let co = named("outer", move |_| {
        let inner = named("inner", move |_| {
            let message = refused(|| from_inner.borrow().as_ref().unwrap().enter());
            names_both(&message, "outer", "another coroutine that it has entered");
        });
        assert_eq!(inner.enter(), State::Finished);
    });
    *outer.borrow_mut() = Some(co);
    assert_eq!(outer.borrow().as_ref().unwrap().enter(), State::Finished);
}

/// Rule 1.4: a finished one cannot be entered, even when its slot lives again.
#[test]
fn entering_a_finished_one() {
    let co = named("over", |_| {});
    co.enter();
    names_both(&refused(|| co.enter()), "over", "has finished");
    let next = named("next life", |co| co.suspend());
    next.enter();
    names_both(&refused(|| co.enter()), "over", "has finished");
    assert_eq!(next.enter(), State::Finished);
}

/// Rule 1.4: one that is scheduled elsewhere cannot be entered by hand; the refusal names who
/// scheduled it.
#[test]
fn entering_one_that_is_scheduled_elsewhere() {
    let home = TestHome::new("elsewhere");
    let waker = Rc::new(RefCell::new(None));
    let inner = waker.clone();
    let options = CoroutineOptions {
        name: "posted",
        home: Some(home.schedule_of()),
        ..Default::default()
    };
    let co = Coroutine::with_options(&options, move |co| {
        *inner.borrow_mut() = Some(co.wake_handle());
        co.suspend();
    })
    .unwrap();
    co.enter();
    let waker = waker.take().unwrap();
    let line = line!() + 1;
    std::thread::spawn(move || waker.wake()).join().unwrap();
    let message = refused(|| co.enter());
    names_both(&message, "posted", "scheduled already");
    assert!(
        message.contains(&format!("tests/refusals.rs:{line}:")),
        "who woke it? {message:?}"
    );
    assert_eq!(home.run(), 1);
    assert!(co.finished());
}

/// Rule 1.4, 1.9: one that the running coroutine has woken is scheduled: it cannot be entered by
/// hand before it ran.
#[test]
fn entering_one_that_is_queued() {
    let waker = Rc::new(RefCell::new(None));
    let inner = waker.clone();
    let sleeper = Rc::new(named("sleeper", move |co| {
        *inner.borrow_mut() = Some(co.wake_handle());
        co.suspend();
    }));
    sleeper.enter();
    let target = sleeper.clone();
    let co = named("waker", move |_| {
        waker.borrow().as_ref().unwrap().wake();
        assert!(!target.finished(), "rule 1.9: not at once");
        names_both(&refused(|| target.enter()), "sleeper", "scheduled already");
    });
    co.enter();
    assert!(sleeper.finished());
}

/// Rule 2.1: a resume that is not the completion is refused, in the resumer, before the switch.
#[test]
fn entering_one_that_waits_for_an_operation() {
    let wait = Rc::new(IoWait::new("read of 4096 bytes"));
    let inner = wait.clone();
    let ran_on = Rc::new(Cell::new(false));
    let ran = ran_on.clone();
    let co = named("reader", move |co| {
        inner.submitted();
        assert_eq!(inner.wait(co), 7);
        ran.set(true);
    });
    co.enter();
    let message = refused(|| co.enter());
    names_both(&message, "reader", "read of 4096 bytes");
    assert!(!ran_on.get(), "refused before the switch");
    wait.complete(7);
    assert!(ran_on.get() && co.finished());
}

/// Rule 2.1: an operation is submitted once and completes exactly once.
#[test]
fn an_operation_completes_once() {
    let wait = IoWait::new("once");
    assert!(refused(|| wait.complete(0)).contains("'once' completed, but not submitted"));
    wait.submitted();
    assert!(refused(|| wait.submitted()).contains("'once' submitted twice"));
    // Refusing it has not made it less submitted; and then it is complete.
    let again = IoWait::new("twice");
    again.submitted();
    again.complete(1);
    assert!(refused(|| again.complete(2)).contains("completed already"));
    wait.complete(0);
}

/// Rule 1.3: the leader cannot suspend. It has no token; one that was smuggled out is refused.
#[test]
fn the_leader_suspending() {
    assert!(!in_coroutine());
    with_current(|current| assert!(current.is_none()));
    // A leader's turn inside the scope of a coroutine's token: run_scoped's turn, called while its
    // coroutine is suspended, cannot see it; so the token goes through a raw pointer, as unsafe
    // code might do by mistake.
    let token: Rc<Cell<*const Co>> = Rc::new(Cell::new(std::ptr::null()));
    let inner = token.clone();
    let co = named("absent", move |co| {
        inner.set(co);
        co.suspend();
    });
    co.enter();
    // SAFETY: the coroutine is suspended, its token still lies on its stack.
    let smuggled = unsafe { &*token.get() };
    names_both(
        &refused(|| smuggled.suspend()),
        "absent",
        "is not the running coroutine",
    );
    assert_eq!(co.enter(), State::Finished);
}

/// The sixth way to leak a token compiles: a scoped thread-local lends a coroutine's `&Co` to
/// another one. Suspending by it is refused in every build, since that coroutine is not the running
/// one but waits for the one it has entered.
#[test]
fn a_smuggled_token_is_refused() {
    let outer = named("outer", |co| {
        let inner = named("inner", |own| {
            SMUGGLED.with(|smuggled| {
                names_both(
                    &refused(|| smuggled.suspend()),
                    "outer",
                    "not the running coroutine",
                );
                let mutex = CoMutex::new(());
                names_both(
                    &refused(|| drop(mutex.lock(smuggled))),
                    "outer",
                    "not the running",
                );
                let wait = IoWait::new("smuggled");
                wait.submitted();
                names_both(&refused(|| wait.wait(smuggled)), "outer", "not the running");
                wait.complete(0);
            });
            own.suspend();
        });
        SMUGGLED.set(co, || assert_eq!(inner.enter(), State::Suspended));
        assert_eq!(inner.enter(), State::Finished);
        co.suspend();
    });
    assert_eq!(outer.enter(), State::Suspended);
    assert_eq!(outer.enter(), State::Finished);
}

/// Rule 1.10: finishing while holding a coroutine lock is refused; the panic comes out of the entry
/// call.
#[test]
fn finishing_with_a_lock() {
    let mutex = Rc::new(CoMutex::new(5));
    let inner = mutex.clone();
    let co = named("keeper", move |co| std::mem::forget(inner.lock(co)));
    let message = refused(|| co.enter());
    assert!(
        message.contains("'keeper'") && message.contains("1 lock(s)"),
        "{message:?}"
    );
    assert!(co.finished());
    // The same for what others count as held.
    let co = named("reader", |co| std::mem::forget(co.hold(Hold::GraphRead)));
    let message = refused(|| co.enter());
    assert!(
        message.contains("'reader'") && message.contains("1 graph lock(s)"),
        "{message:?}"
    );
    // And for a woken one, whose entry call is somebody else's.
    let waker = Rc::new(RefCell::new(None));
    let (out, mutex) = (waker.clone(), Rc::new(CoMutex::new(())));
    let late = named("late keeper", move |co| {
        *out.borrow_mut() = Some(co.wake_handle());
        co.suspend();
        std::mem::forget(mutex.lock(co));
    });
    late.enter();
    let co = named("innocent", move |_| waker.borrow().as_ref().unwrap().wake());
    assert!(refused(|| co.enter()).contains("'late keeper'"));
    assert!(co.finished() && late.finished());
}

/// Rule 4.4: what a coroutine holds can be asked, so that a nested event loop is refused meanwhile.
#[test]
fn holding_is_counted() {
    assert_eq!(current_holds(Hold::Lock), 0, "the leader holds nothing");
    let co = named("holder", |co| {
        let mutex = CoMutex::new(0);
        assert_eq!((current_holds(Hold::Lock), co.holds(Hold::Lock)), (0, 0));
        let guard = mutex.lock(co);
        let read = co.hold(Hold::GraphRead);
        co.suspend();
        assert_eq!(
            (current_holds(Hold::Lock), current_holds(Hold::GraphRead)),
            (1, 1)
        );
        drop(guard);
        drop(read);
        assert_eq!(
            (current_holds(Hold::Lock), current_holds(Hold::GraphRead)),
            (0, 0)
        );
    });
    co.enter();
    assert_eq!(
        current_holds(Hold::Lock),
        0,
        "the holder is suspended; the leader holds nothing"
    );
    co.enter();
}

/// Rule 4.1: not recursive; both places of locking are named.
#[test]
fn locking_twice() {
    let co = named("greedy", |co| {
        let mutex = CoMutex::new(());
        let first = line!() + 1;
        let _guard = mutex.lock(co);
        let message = refused(|| drop(mutex.lock(co)));
        names_both(&message, "greedy", &format!("tests/refusals.rs:{first}:"));
        assert!(mutex.try_lock(co).is_none());
    });
    assert_eq!(co.enter(), State::Finished);
}

/// Rule 4.1: unlocking by another coroutine, or outside coroutines, is refused, naming the place of
/// locking.
#[test]
fn unlocking_by_another() {
    // Leaked, so that a guard can leave its coroutine.
    let mutex: &'static CoMutex<()> = Box::leak(Box::new(CoMutex::new(())));
    let guard = Rc::new(RefCell::new(None));
    let inner = guard.clone();
    let owner = named("owner", move |co| {
        *inner.borrow_mut() = Some(mutex.lock(co));
        co.suspend();
    });
    owner.enter();
    let taken = guard.clone();
    let thief = named("thief", move |_| {
        let stolen = taken.take();
        names_both(&refused(|| drop(stolen)), "thief", "unlocks a CoMutex");
    });
    thief.enter();
    // The owner still counts as one that holds it.
    assert!(refused(|| owner.enter()).contains("'owner'"));

    let mutex: &'static CoMutex<()> = Box::leak(Box::new(CoMutex::new(())));
    let inner = guard.clone();
    let owner = named("owner", move |co| {
        *inner.borrow_mut() = Some(mutex.lock(co));
        co.suspend();
    });
    owner.enter();
    let stolen = guard.take();
    assert!(refused(|| drop(stolen)).contains("unlocked outside coroutines"));
    assert!(refused(|| owner.enter()).contains("'owner'"));
}

/// A thread lock must not be held over a suspend: other coroutines of the thread would wait for
/// ever.
#[test]
#[cfg(debug_assertions)]
fn suspending_with_a_thread_lock() {
    let co = named("locker", |co| {
        let lock = ThreadLock::new(1);
        let guard = lock.lock();
        let message = refused(|| co.suspend());
        names_both(&message, "locker", "holds 1 thread lock");
        drop(guard);
        co.suspend();
    });
    assert_eq!(co.enter(), State::Suspended);
    assert_eq!(co.enter(), State::Finished);
}

/// Suspending in a destructor while its coroutine unwinds is refused: the thread would stay
/// "panicking" for everyone else. The refusal comes before the switch.
#[test]
fn suspending_while_unwinding() {
    struct Suspends<'a>(&'a Co, Rc<RefCell<String>>);
    impl Drop for Suspends<'_> {
        fn drop(&mut self) {
            *self.1.borrow_mut() = refused(|| self.0.suspend());
        }
    }
    let said = Rc::new(RefCell::new(String::new()));
    let inner = said.clone();
    let co = named("unwinding", move |co| {
        let _suspends = Suspends(co, inner);
        panic!("first");
    });
    assert_eq!(refused(|| co.enter()), "first");
    names_both(&said.borrow(), "unwinding", "while it unwinds");
    assert!(!std::thread::panicking());
    // The same when it is unwound because its handle was dropped.
    let inner = said.clone();
    let co = named("dropped", move |co| {
        let _suspends = Suspends(co, inner);
        co.suspend();
    });
    co.enter();
    drop(co);
    names_both(&said.borrow(), "dropped", "while it unwinds");
}

/// A destructor that runs because its thread unwinds may enter a coroutine, and that one may
/// suspend: it is not the one that unwinds.
#[test]
fn suspending_while_the_leader_unwinds() {
    struct Enters(Coroutine, Rc<Cell<u32>>);
    impl Drop for Enters {
        fn drop(&mut self) {
            assert!(std::thread::panicking());
            while self.0.enter() == State::Suspended {
                self.1.set(self.1.get() + 1);
            }
        }
    }
    let suspended = Rc::new(Cell::new(0));
    let co = named("bystander", |co| {
        co.suspend();
        co.suspend();
    });
    let enters = Enters(co, suspended.clone());
    let panic = catch_unwind(AssertUnwindSafe(move || {
        let _enters = enters;
        panic!("the leader's own");
    }));
    assert!(panic.is_err());
    assert_eq!(suspended.get(), 2);
}

/// Rule 1.8: a coroutine starts on the thread that drives its home, nowhere else.
#[test]
fn starting_on_a_foreign_thread() {
    let home = TestHome::new("far");
    let far = home.schedule_of();
    std::thread::spawn(move || {
        let message = refused(|| start(&far, "lost", |_| {}));
        assert!(
            message.contains("'lost'") && message.contains("'far'"),
            "{message:?}"
        );
    })
    .join()
    .unwrap();
}

/// Rule 1.8: a home that lets the wrong thread enter a coroutine is refused, first entry or later.
#[test]
fn entering_on_a_foreign_thread() {
    let home = TestHome::new("right");
    start_remote(&home.schedule_of(), "wanderer", |_| {
        unreachable!("dropped unstarted")
    })
    .unwrap();
    let ready = home.pop().unwrap();
    std::thread::spawn(move || {
        let message = refused(|| ready.enter());
        assert!(
            message.contains("'wanderer'") && message.contains("'right'"),
            "{message:?}"
        );
    })
    .join()
    .unwrap();

    let waker = Rc::new(RefCell::new(None));
    let inner = waker.clone();
    start(&home.schedule_of(), "resident", move |co| {
        *inner.borrow_mut() = Some(co.wake_handle());
        co.suspend();
    })
    .unwrap();
    let waker = waker.take().unwrap();
    let thief = home.clone();
    std::thread::spawn(move || {
        waker.wake();
        let ready = thief.pop().unwrap();
        assert!(refused(|| ready.enter()).contains("does not drive its home"));
        waker.wake();
    })
    .join()
    .unwrap();
    assert_eq!(home.run(), 1, "the second wake is not lost with the first");
}

/// A coroutine without a home can only be woken on its own thread.
#[test]
fn waking_a_homeless_one_from_afar() {
    let waker = Rc::new(RefCell::new(None));
    let inner = waker.clone();
    let co = named("homeless", move |co| {
        *inner.borrow_mut() = Some(co.wake_handle());
        co.suspend();
    });
    co.enter();
    let waker = waker.take().unwrap();
    let far = waker.clone();
    std::thread::spawn(move || {
        assert!(refused(|| far.wake()).contains("tests/refusals.rs:"));
    })
    .join()
    .unwrap();
    assert!(refused(|| waker.schedule()).contains("without a home"));
    waker.wake();
    assert!(co.finished());
}

/// The types keep tokens, handles and guards on their thread, and let wakes and locks travel.
#[test]
fn what_may_travel() {
    fn travels<T: Send + Sync>() {}
    travels::<coblock_coroutine::WakeHandle>();
    travels::<CoMutex<Vec<u8>>>();
    travels::<coblock_coroutine::CoQueue>();
    travels::<ThreadLock<Vec<u8>>>();
    travels::<coblock_coroutine::Error>();
    fn moves<T: Send>() {}
    moves::<coblock_coroutine::Ready>();
    let _: fn() -> Arc<dyn Schedule> = || TestHome::new("any").schedule_of();
}
