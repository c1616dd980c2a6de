//! What the crate promises under `panic = "abort"`, as a program that can be built so: `cargo run
//! --profile abort -p coblock-coroutine --example without_unwinding`. It runs as well with
//! unwinding.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use coblock_coroutine::{CoMutex, Coroutine, IoWait, State, WakeHandle, run_scoped, stats};

fn main() {
    life_and_switch();
    wakes_and_locks();
    operations();
    dropping();
    println!("no normal path needs unwinding ({:?})", stats());
}

fn life_and_switch() {
    for n in 0..1000 {
        let co = Coroutine::new(move |co| (0..n % 5).for_each(|_| co.suspend())).unwrap();
        for _ in 0..n % 5 {
            assert_eq!(co.enter(), State::Suspended);
        }
        assert_eq!(co.enter(), State::Finished);
    }
    assert_eq!(run_scoped(None, |_| 5, || ()), Ok(5));
}

fn wakes_and_locks() {
    let (mutex, waker) = (
        Rc::new(CoMutex::new(0)),
        Rc::new(RefCell::new(None::<WakeHandle>)),
    );
    let all: Vec<Coroutine> = (0..4)
        .map(|_| {
            let (mutex, waker) = (mutex.clone(), waker.clone());
            Coroutine::new(move |co| {
                let mut guard = mutex.lock(co);
                *waker.borrow_mut() = Some(co.wake_handle());
                co.suspend();
                *guard += 1;
            })
            .unwrap()
        })
        .collect();
    for co in &all {
        co.enter();
    }
    for _ in 0..4 {
        let first = waker.take().unwrap();
        first.wake();
    }
    assert!(all.iter().all(Coroutine::finished));
    assert_eq!(mutex.lock_count(), 4);
}

fn operations() {
    let (wait, got) = (Rc::new(IoWait::new("read")), Rc::new(Cell::new(0)));
    let (inner, out) = (wait.clone(), got.clone());
    let co = Coroutine::new(move |co| {
        inner.submitted();
        out.set(inner.wait(co));
    })
    .unwrap();
    co.enter();
    drop(co);
    wait.complete(7);
    assert_eq!(got.get(), 7);
}

/// Dropping a suspended coroutine that is driven by hand: unwound, or leaked and counted.
fn dropping() {
    let kept = Rc::new(());
    let inner = kept.clone();
    let co = Coroutine::new(move |co| {
        co.suspend();
        drop(inner);
    })
    .unwrap();
    co.enter();
    drop(co);
    let leaks = cfg!(panic = "abort");
    assert_eq!(Rc::strong_count(&kept), 1 + usize::from(leaks));
    assert_eq!(
        (stats().leaked, stats().live()),
        (u64::from(leaks), i64::from(leaks))
    );
}
