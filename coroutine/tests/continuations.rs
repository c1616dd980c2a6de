//! The operations of gtk-vnc: values both ways (rule 1.2), who runs (rule 1.1), what a release hook
//! decides (rule 1.6).

mod support;

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use coblock_coroutine::continuation::{
    Continuation, Ended, Itself, Options, Passed, Release, is_leader, itself,
};
use coblock_coroutine::{
    Coroutine, DEFAULT_STACK_SIZE, Error, State, WakeHandle, stats, with_current,
};
use support::{in_own_process, refused};

fn hooked(name: &'static str, hook: impl FnOnce(Ended) -> Release + 'static) -> Options {
    Options {
        name,
        release: Some(Box::new(hook)),
        ..Options::default()
    }
}

/// Rule 1.2: the first value is the entry's argument, later ones are what the pending yield
/// returns; what is yielded is what the entry call returns, and the result comes with the last one.
/// The types of the three may differ.
#[test]
fn one_value_each_way() {
    let seen: Rc<RefCell<Vec<u32>>> = Rc::default();
    let inner = seen.clone();
    let it = Continuation::init(Options::default(), move |own, first: u32| {
        inner.borrow_mut().push(first);
        for letter in ['a', 'b'] {
            let next = own.yield_with(letter);
            inner.borrow_mut().push(next);
        }
        "over".to_string()
    })
    .unwrap();
    assert!(seen.borrow().is_empty(), "init runs nothing");
    assert_eq!(it.yield_to(1), Passed::Yielded('a'));
    assert_eq!(it.yield_to(2), Passed::Yielded('b'));
    assert!(!it.exited());
    assert_eq!(it.yield_to(3), Passed::Returned("over".to_string()));
    assert_eq!(*seen.borrow(), [1, 2, 3]);
    assert!(it.exited());
}

/// Rule 1.2: each value is dropped exactly once, whether it arrives, is returned, or is on its way
/// when the continuation is dropped.
#[test]
fn no_value_is_lost_or_dropped_twice() {
    let token = Rc::new(());
    {
        let it = Continuation::init(Options::default(), |own, first: Rc<()>| {
            let mut last = first;
            loop {
                last = own.yield_with(last);
            }
            #[allow(unreachable_code)]
            last
        })
        .unwrap();
        for _ in 0..3 {
            let Passed::Yielded(back) = it.yield_to(token.clone()) else {
                panic!("it never returns")
            };
            assert!(Rc::ptr_eq(&back, &token));
        }
        let unused: Continuation<Rc<()>, ()> =
            Continuation::init(Options::default(), |_, _| ()).unwrap();
        drop(unused);
    }
    assert_eq!(Rc::strong_count(&token), 1);
}

/// Rules 1.2, 1.5: yield-to nests; each yield goes to whoever entered last, with its value.
#[test]
fn yield_to_nests() {
    let inner = Rc::new(
        Continuation::init(Options::default(), |own, n: u32| {
            let mut n = n;
            loop {
                n = own.yield_with(n * 10);
                if n == 0 {
                    return 0;
                }
            }
        })
        .unwrap(),
    );
    let shared = inner.clone();
    let outer = Continuation::init(Options::default(), move |own, n: u32| {
        let Passed::Yielded(tens) = shared.yield_to(n) else {
            panic!("inner goes on")
        };
        own.yield_with(tens + 1);
        tens
    })
    .unwrap();
    assert_eq!(outer.yield_to(4), Passed::Yielded(41));
    // Entered from here now: its yield comes here.
    assert_eq!(inner.yield_to(5), Passed::Yielded(50));
    assert_eq!(outer.yield_to(0), Passed::Returned(40));
    assert_eq!(inner.yield_to(0), Passed::Returned(0));
}

/// Rule 1.1: "self" and "is leader", inside, nested, outside, and in a plain coroutine.
#[test]
fn itself_and_leader() {
    assert_eq!((itself(), is_leader()), (Itself::Leader, true));
    let it = Continuation::init(Options::default(), |own, ()| {
        assert!(!is_leader());
        own.yield_with(itself());
        let nested: Continuation<(), Itself> =
            Continuation::init(Options::default(), |_, ()| itself()).unwrap();
        let Passed::Returned(seen) = nested.yield_to(()) else {
            panic!("it returns")
        };
        assert_eq!(seen, Itself::Created(nested.id()));
        itself()
    })
    .unwrap();
    let id = Itself::Created(it.id());
    assert_eq!(it.yield_to(()), Passed::Yielded(id));
    assert_eq!(itself(), Itself::Leader);
    assert_eq!(it.yield_to(()), Passed::Returned(id));
    Coroutine::new(|co| assert_eq!(itself(), Itself::Created(co.id())))
        .unwrap()
        .enter();
}

/// Rule 1.6: the hook runs in the resumer, once, after the entry function has returned and before
/// the entry call comes back; it is told who has ended; the handle outlives it.
#[test]
fn hook_runs_once_in_the_resumer() {
    let log: Rc<RefCell<Vec<String>>> = Rc::default();
    let (in_body, in_hook) = (log.clone(), log.clone());
    let it = Continuation::init(
        hooked("told", move |ended| {
            assert!(is_leader(), "control is in the resumer");
            in_hook.borrow_mut().push(format!("hook {}", ended.name));
            Release::Keep
        }),
        move |own, ()| {
            own.yield_with(());
            in_body.borrow_mut().push("body".into());
        },
    )
    .unwrap();
    it.yield_to(());
    assert!(log.borrow().is_empty(), "a yield is no end");
    assert_eq!(it.yield_to(()), Passed::Returned(()));
    log.borrow_mut().push("back".into());
    assert_eq!(*log.borrow(), ["body", "hook told", "back"]);
    assert_eq!((it.name(), it.exited(), it.vetoed()), ("told", true, false));
    drop(it);
    assert_eq!(log.borrow().len(), 3, "once");
}

/// Rule 1.6: the hook runs in the resumer also when that is a coroutine, and may use coroutines.
#[test]
fn hook_in_a_coroutine() {
    let seen = Rc::new(Cell::new((Itself::Leader, 0)));
    let inside = seen.clone();
    let resumer = Coroutine::new(move |_| {
        let it: Continuation<(), ()> = Continuation::init(
            hooked("inner", move |ended| {
                Coroutine::new(|_| ()).unwrap().enter();
                inside.set((itself(), ended.id));
                Release::Keep
            }),
            |_, ()| (),
        )
        .unwrap();
        it.yield_to(());
    })
    .unwrap();
    let id = resumer.id();
    resumer.enter();
    let (who, ended) = seen.get();
    assert_eq!(who, Itself::Created(id));
    assert!(ended > id);
}

/// Rule 1.6: "keep" leaves the stack to the next coroutine, "free" gives its memory back, "veto"
/// keeps it for the handle; in the end nothing is leaked.
#[test]
fn three_results() {
    in_own_process("three_results", || {
        let end = |answer: Release| {
            let it: Continuation<(), ()> =
                Continuation::init(hooked("ends", move |_| answer), |_, ()| ()).unwrap();
            it.yield_to(());
            it
        };
        drop(end(Release::Keep));
        let before = stats();
        let kept = end(Release::Keep);
        let after = stats();
        assert_eq!(
            (after.stacks_free, after.live()),
            (before.stacks_free, before.live()),
            "it went back to the pool"
        );
        drop(kept);

        let freed = end(Release::Free);
        let after = stats();
        assert!(freed.exited() && !freed.vetoed());
        assert_eq!(after.stacks_trimmed, before.stacks_trimmed + 1);
        assert_eq!(after.stacks_free + 1, before.stacks_free);
        assert_eq!(after.live(), before.live());

        let before = stats();
        let vetoed = end(Release::Veto);
        let after = stats();
        assert!(vetoed.exited() && vetoed.vetoed());
        assert_eq!(after.live(), before.live() + 1, "its slot is in no pool");
        let why = refused(|| vetoed.yield_to(()));
        assert!(
            why.contains("'ends'") && why.contains("has finished"),
            "{why}"
        );
        drop(vetoed);
        let after = stats();
        assert_eq!(after.live(), before.live());
        assert_eq!(after.stacks_free, before.stacks_free.max(1));
    });
}

/// Rule 1.6: the hook runs for every end: never entered, unwound by dropping the handle, a panic.
/// A veto then keeps nothing, because the handle is gone.
#[test]
fn hook_runs_for_every_end() {
    let runs = Rc::new(Cell::new(0));
    let counting = |answer: Release| {
        let runs = runs.clone();
        hooked("ends somehow", move |_| {
            runs.set(runs.get() + 1);
            answer
        })
    };
    let live = stats().live();
    for answer in [Release::Free, Release::Keep, Release::Veto] {
        let never: Continuation<(), ()> = Continuation::init(counting(answer), |_, ()| ()).unwrap();
        drop(never);
        let unwound = Continuation::init(counting(answer), |own, ()| own.yield_with(())).unwrap();
        unwound.yield_to(());
        drop(unwound);
        let panics: Continuation<(), ()> =
            Continuation::init(counting(answer), |_, ()| panic!("inside")).unwrap();
        let panic = catch_unwind(AssertUnwindSafe(|| panics.yield_to(()))).unwrap_err();
        assert_eq!(support::message(&*panic), "inside");
        drop(panics);
        // The handle goes while it runs.
        let slot: Rc<RefCell<Option<Continuation<(), ()>>>> = Rc::default();
        let own_handle = slot.clone();
        *slot.borrow_mut() = Some(
            Continuation::init(counting(answer), move |own, ()| {
                own.yield_with(());
                drop(own_handle.borrow_mut().take());
            })
            .unwrap(),
        );
        let handle = slot.borrow_mut().take().unwrap();
        handle.yield_to(());
        drop(handle);
        assert_eq!(stats().live(), live, "{answer:?}");
    }
    assert_eq!(runs.get(), 12);
}

/// Rule 1.6: a panic of the hook comes out of the entry call, and the stack is not lost.
#[test]
fn hook_panics() {
    let live = stats().live();
    let it: Continuation<(), ()> =
        Continuation::init(hooked("bad hook", |_| panic!("in the hook")), |_, ()| ()).unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| it.yield_to(()))).unwrap_err();
    assert_eq!(support::message(&*panic), "in the hook");
    assert!(it.exited());
    drop(it);
    assert_eq!(stats().live(), live);
}

type Shared = Rc<Continuation<u32, u32>>;

/// Rule 1.4: entering one that runs, has entered another, or has finished is refused with both
/// places, and the value that was to go in is not taken.
#[test]
fn refusals() {
    let slot: Rc<RefCell<Option<Shared>>> = Rc::default();
    let inside = slot.clone();
    let it = Rc::new(
        Continuation::init(
            Options {
                name: "selfish",
                ..Options::default()
            },
            move |own, _| {
                let me = inside.borrow().clone().unwrap();
                let why = refused(|| me.yield_to(7));
                assert!(
                    why.contains("'selfish'") && why.contains("but it is running"),
                    "{why}"
                );
                assert_eq!(why.matches("continuations.rs").count(), 2, "{why}");
                let nested = Coroutine::new(move |_| {
                    let why = refused(|| me.yield_to(7));
                    assert!(
                        why.contains("another coroutine that it has entered"),
                        "{why}"
                    );
                })
                .unwrap();
                nested.enter();
                own.yield_with(1)
            },
        )
        .unwrap(),
    );
    *slot.borrow_mut() = Some(it.clone());
    assert_eq!(it.yield_to(0), Passed::Yielded(1));
    assert_eq!(it.yield_to(9), Passed::Returned(9), "9, not the refused 7");
    let why = refused(|| it.yield_to(0));
    assert!(why.contains("has finished"), "{why}");
    slot.borrow_mut().take();
}

/// Rule 1.2: a wake brings no value, so it ends no yield; suspending without a value is refused in
/// the resumer.
#[test]
fn only_values_end_a_yield() {
    let waker: Rc<RefCell<Option<WakeHandle>>> = Rc::default();
    let inside = waker.clone();
    let it = Continuation::init(Options::default(), move |own, ()| {
        *inside.borrow_mut() = Some(own.co().wake_handle());
        own.yield_with(1);
        with_current(|co| co.unwrap().suspend());
        2
    })
    .unwrap();
    assert_eq!(it.yield_to(()), Passed::Yielded(1));
    waker.borrow().as_ref().unwrap().wake();
    assert!(!it.exited(), "still in its yield");
    let why = refused(|| it.yield_to(()));
    assert!(why.contains("suspended without a value"), "{why}");
}

/// Stack sizes: rounded up to a power of two, told, and refused as a value where absurd.
#[test]
fn stack_sizes() {
    let sized = |stack_size: usize| -> Result<Continuation<(), usize>, Error> {
        Continuation::init(
            Options {
                stack_size,
                ..Options::default()
            },
            |_, ()| 0,
        )
    };
    assert_eq!(
        Continuation::<(), usize>::init(Options::default(), |_, ()| 0)
            .unwrap()
            .stack_size(),
        DEFAULT_STACK_SIZE
    );
    for (name, asked, got) in [
        ("zero is the smallest", 0, 16 << 10),
        ("one byte", 1, 16 << 10),
        ("not page-aligned", 100_001, 128 << 10),
        ("large", 1 << 20, 1 << 20),
    ] {
        let it = sized(asked).unwrap();
        assert_eq!(it.stack_size(), got, "{name}");
        assert_eq!(it.yield_to(()), Passed::Returned(0));
    }
    for absurd in [usize::MAX, (256 << 20) + 1] {
        let why = sized(absurd).unwrap_err();
        assert!(matches!(why, Error::BadStackSize { asked, .. } if asked == absurd));
    }
}

/// A veto keeps nothing for a handle that is gone. Found by the random model: dropped while it was
/// woken and queued, a continuation is unwound when its turn comes, and then its stack was kept for
/// ever.
#[test]
fn a_veto_for_a_handle_that_is_gone() {
    let live = stats().live();
    let waker = Rc::new(RefCell::new(None));
    let kept = waker.clone();
    let options = Options {
        release: Some(Box::new(|_| Release::Veto)),
        ..Options::default()
    };
    let it: Continuation<(), ()> = Continuation::init(options, move |own, ()| {
        *kept.borrow_mut() = Some(own.co().wake_handle());
        own.yield_with(());
    })
    .unwrap();
    assert_eq!(it.yield_to(()), Passed::Yielded(()));
    let other = Coroutine::new(move |_| {
        waker.take().expect("it ran").wake();
        drop(it);
    });
    assert_eq!(other.unwrap().enter(), State::Finished);
    assert_eq!(stats().live(), live);
}
