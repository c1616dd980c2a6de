//! The behaviours of the reference's own unit test of coroutines, one test each, named as there.

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use coblock_coroutine::{CoMutex, Coroutine, State, in_coroutine, with_current};

/// /basic/no-dangling-access: after c1 has entered c2, c2 has suspended and c1 has ended (and its
/// slot lives again as something else), entering c2 touches nothing of c1.
#[test]
fn no_dangling_access() {
    let c2 = Rc::new(Coroutine::new(|co| co.suspend()).unwrap());
    let inner = c2.clone();
    let c1 = Coroutine::new(move |_| assert_eq!(inner.enter(), State::Suspended)).unwrap();
    assert_eq!(c1.enter(), State::Finished);
    // Takes c1's slot out of the pool and runs in it, over and over.
    for _ in 0..10 {
        let junk = Coroutine::new(|co| {
            let junk = std::hint::black_box([0xa5_u8; 2048]);
            co.suspend();
            std::hint::black_box(&junk);
        })
        .unwrap();
        junk.enter();
        junk.enter();
    }
    assert_eq!(c2.enter(), State::Finished);
}

/// /basic/lifecycle: create, enter and return runs the body exactly once, twice over.
#[test]
fn lifecycle() {
    for _ in 0..2 {
        let runs = Rc::new(Cell::new(0));
        let inner = runs.clone();
        let co = Coroutine::new(move |_| inner.set(inner.get() + 1)).unwrap();
        assert_eq!(runs.get(), 0);
        assert_eq!(co.enter(), State::Finished);
        assert_eq!(runs.get(), 1);
        assert!(co.finished());
    }
}

/// /basic/yield: a body that suspends five times needs six entries; each resumes just after the
/// last suspend.
#[test]
fn suspends_and_resumes() {
    let step = Rc::new(Cell::new(0));
    let inner = step.clone();
    let co = Coroutine::new(move |co| {
        for i in 1..=5 {
            inner.set(i);
            co.suspend();
        }
    })
    .unwrap();
    for i in 1..=5 {
        assert_eq!(co.enter(), State::Suspended);
        assert_eq!(step.get(), i);
    }
    assert_eq!(co.enter(), State::Finished);
}

/// /basic/nesting: coroutines enter new coroutines 128 levels deep; all are entered and all return.
#[test]
fn nests_128_levels() {
    fn level(entered: Rc<Cell<u32>>, returned: Rc<Cell<u32>>, left: u32) -> Coroutine {
        Coroutine::new(move |_| {
            entered.set(entered.get() + 1);
            if left > 1 {
                let next = level(entered.clone(), returned.clone(), left - 1);
                assert_eq!(next.enter(), State::Finished);
            }
            returned.set(returned.get() + 1);
        })
        .unwrap()
    }
    let (entered, returned) = (Rc::default(), Rc::default());
    let outermost: Coroutine = level(Rc::clone(&entered), Rc::clone(&returned), 128);
    assert_eq!(outermost.enter(), State::Finished);
    assert_eq!((entered.get(), returned.get()), (128, 128));
}

/// /basic/self: inside, "self" is the object that create returned.
#[test]
fn current_is_self() {
    let seen = Rc::new(Cell::new(0));
    let inner = seen.clone();
    let co = Coroutine::new(move |co| {
        assert_eq!(
            with_current(|current| current.map(coblock_coroutine::Co::id)),
            Some(co.id())
        );
        inner.set(co.id());
    })
    .unwrap();
    let id = co.id();
    co.enter();
    assert_eq!(seen.get(), id);
    assert!(
        with_current(|current| current.is_none()),
        "rule 1.1: outside, current is the leader"
    );
}

/// /basic/entered: true for the running one and its chain of callers; false for a new or suspended
/// one; right after a re-entry too.
#[test]
fn entered() {
    let outer: Rc<RefCell<Option<Coroutine>>> = Rc::default();
    let inner = Rc::new(RefCell::new(None));
    let (outer2, inner2, inner3) = (outer.clone(), inner.clone(), inner.clone());
    let is_entered = |co: &Rc<RefCell<Option<Coroutine>>>| co.borrow().as_ref().unwrap().entered();
    *inner.borrow_mut() = Some(
        Coroutine::new(move |co| {
            for _ in 0..2 {
                assert!(is_entered(&inner3), "the running one");
                assert!(is_entered(&outer2), "its caller");
                co.suspend();
            }
        })
        .unwrap(),
    );
    let (outer3, inner4) = (outer.clone(), inner2.clone());
    *outer.borrow_mut() = Some(
        Coroutine::new(move |_| {
            assert!(!is_entered(&inner4), "new");
            for want in [State::Suspended, State::Suspended, State::Finished] {
                assert_eq!(inner4.borrow().as_ref().unwrap().enter(), want);
                assert!(!is_entered(&inner4), "suspended or finished");
                assert!(is_entered(&outer3));
            }
        })
        .unwrap(),
    );
    assert!(!is_entered(&outer));
    assert_eq!(outer.borrow().as_ref().unwrap().enter(), State::Finished);
    assert!(!is_entered(&outer) && !is_entered(&inner2));
    // The coroutine's captures held the cells that hold the coroutines; both have finished, so the
    // circle is open.
    assert_eq!(
        (Rc::strong_count(&outer), Rc::strong_count(&inner2)),
        (1, 2)
    );
    drop(inner);
}

/// /basic/in_coroutine: false on the plain stack, true inside.
#[test]
fn in_coroutine_tells() {
    assert!(!in_coroutine());
    let co = Coroutine::new(|_| assert!(in_coroutine())).unwrap();
    co.enter();
    assert!(!in_coroutine());
}

/// /basic/order: control goes strictly caller, coroutine, caller, coroutine, caller.
#[test]
fn order() {
    let steps: Rc<RefCell<Vec<(u32, bool)>>> = Rc::default();
    let inner = steps.clone();
    let co = Coroutine::new(move |co| {
        inner.borrow_mut().push((2, in_coroutine()));
        co.suspend();
        inner.borrow_mut().push((4, in_coroutine()));
    })
    .unwrap();
    steps.borrow_mut().push((1, in_coroutine()));
    co.enter();
    steps.borrow_mut().push((3, in_coroutine()));
    co.enter();
    steps.borrow_mut().push((5, in_coroutine()));
    assert_eq!(
        *steps.borrow(),
        [(1, false), (2, true), (3, false), (4, true), (5, false)]
    );
}

/// /locking/co-mutex: held across a suspend, a second locker is queued; when the first unlocks and
/// ends, the second owns the lock without being entered by hand; never two owners.
#[test]
fn co_mutex() {
    let mutex = Rc::new(CoMutex::new(0_u32));
    let done = Rc::new(Cell::new(0));
    let body = || {
        let (mutex, done) = (mutex.clone(), done.clone());
        Coroutine::new(move |co| {
            let mut owners = mutex.lock(co);
            assert_eq!(*owners, 0, "one owner at a time");
            *owners += 1;
            co.suspend();
            *owners -= 1;
            drop(owners);
            done.set(done.get() + 1);
        })
        .unwrap()
    };
    let (first, second) = (body(), body());
    first.enter();
    second.enter();
    assert_eq!(mutex.waiting(), 1);
    assert_eq!(first.enter(), State::Finished);
    // The second was woken by the unlock and stands at its own suspend now, as the owner.
    assert_eq!((done.get(), mutex.waiting()), (1, 0));
    assert_eq!(second.enter(), State::Finished);
    assert_eq!(done.get(), 2);
}
