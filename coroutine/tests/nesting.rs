//! Rule 1.5: coroutines nest. A enters B, B suspends to A, A may then finish, suspend, or enter B
//! again; after B finishes inside A, current is A.

mod support;

use std::cell::RefCell;
use std::rc::Rc;

use coblock_coroutine::{Coroutine, State, with_current};
use support::refused;

fn current() -> u64 {
    with_current(|current| current.map_or(0, coblock_coroutine::Co::id))
}

/// B, which suspends `times` and then finishes.
fn suspends(times: u32) -> Rc<Coroutine> {
    Rc::new(
        Coroutine::new(move |co| {
            for _ in 0..times {
                assert_eq!(current(), co.id());
                co.suspend();
            }
        })
        .unwrap(),
    )
}

/// Rule 1.5: A finishes while B is suspended; B goes on under somebody else.
#[test]
fn outer_finishes_first() {
    let b = suspends(2);
    let inner = b.clone();
    let a = Coroutine::new(move |co| {
        assert_eq!(inner.enter(), State::Suspended);
        assert_eq!(current(), co.id());
    })
    .unwrap();
    assert_eq!(a.enter(), State::Finished);
    assert_eq!(current(), 0);
    assert_eq!(b.enter(), State::Suspended);
    assert_eq!(b.enter(), State::Finished);
}

/// Rule 1.5: A suspends while B is suspended; both go on, in either order.
#[test]
fn outer_suspends() {
    for b_first in [false, true] {
        let b = suspends(2);
        let inner = b.clone();
        let a = Coroutine::new(move |co| {
            assert_eq!(inner.enter(), State::Suspended);
            co.suspend();
            assert_eq!(current(), co.id());
        })
        .unwrap();
        assert_eq!(a.enter(), State::Suspended);
        if b_first {
            assert_eq!(b.enter(), State::Suspended);
            assert_eq!(b.enter(), State::Finished);
            assert_eq!(a.enter(), State::Finished);
        } else {
            assert_eq!(a.enter(), State::Finished);
            assert_eq!(b.enter(), State::Suspended);
            assert_eq!(b.enter(), State::Finished);
        }
    }
}

/// Rule 1.5: A enters B again and again; after B finishes inside A, current is A, and A's suspend
/// goes to its own enterer.
#[test]
fn outer_enters_again() {
    let b = suspends(3);
    let a = Coroutine::new(move |co| {
        while b.enter() == State::Suspended {
            assert_eq!(current(), co.id());
            co.suspend();
        }
        assert_eq!(
            current(),
            co.id(),
            "after B finished inside A, current is A"
        );
        co.suspend();
    })
    .unwrap();
    for _ in 0..4 {
        assert_eq!(a.enter(), State::Suspended);
        assert_eq!(current(), 0);
    }
    assert_eq!(a.enter(), State::Finished);
}

/// Rule 1.3: suspending returns to whoever entered last, not to whoever entered first.
#[test]
fn suspends_to_the_last_enterer() {
    let log: Rc<RefCell<Vec<&str>>> = Rc::default();
    let b = suspends(2);
    for name in ["first", "second", "third"] {
        let (log, inner) = (log.clone(), b.clone());
        let enterer = Coroutine::new(move |co| {
            inner.enter();
            assert_eq!(current(), co.id());
            log.borrow_mut().push(name);
        })
        .unwrap();
        assert_eq!(enterer.enter(), State::Finished);
    }
    assert_eq!(*log.borrow(), ["first", "second", "third"]);
    assert!(b.finished());
}

/// Rules 1.5, 1.10: a panic in B comes out where A entered it; A goes on as the current one.
#[test]
fn inner_panics() {
    let a = Coroutine::new(|co| {
        let b = Coroutine::new(|co| {
            co.suspend();
            panic!("inside b");
        })
        .unwrap();
        assert_eq!(b.enter(), State::Suspended);
        assert_eq!(refused(|| b.enter()), "inside b");
        assert!(b.finished() && !std::thread::panicking());
        assert_eq!(current(), co.id());
        co.suspend();
    })
    .unwrap();
    assert_eq!(a.enter(), State::Suspended);
    assert_eq!(a.enter(), State::Finished);
}

/// Rule 1.5: a deep chain, each level suspending all the way, and coming back.
#[test]
fn a_chain_suspends_level_by_level() {
    fn level(left: u32) -> Coroutine {
        Coroutine::new(move |co| {
            if left > 0 {
                let next = level(left - 1);
                while next.enter() == State::Suspended {
                    co.suspend();
                }
            } else {
                co.suspend();
                co.suspend();
            }
        })
        .unwrap()
    }
    let top = level(64);
    assert_eq!(top.enter(), State::Suspended);
    assert_eq!(top.enter(), State::Suspended);
    assert_eq!(top.enter(), State::Finished);
}
