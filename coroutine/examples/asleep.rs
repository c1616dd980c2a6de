//! A program to look at with a debugger: three coroutines stand in different places when it calls
//! `look_here`. `docs/coroutines.md` tells how.

use std::cell::Cell;
use std::hint::black_box;
use std::rc::Rc;

use coblock_coroutine::{Co, Coroutine, CoroutineOptions, Error, IoWait, State};

#[inline(never)]
fn waits_for_dinner(co: &Co, deeper: u32) {
    if deeper > 0 {
        waits_for_dinner(co, deeper - 1);
    } else {
        co.suspend();
    }
    black_box(deeper);
}

#[inline(never)]
fn reads_the_paper(co: &Co, paper: &Rc<Cell<*const IoWait>>) {
    let wait = IoWait::new("the morning paper");
    wait.submitted();
    paper.set(&wait);
    black_box(wait.wait(co));
}

/// Where to set a breakpoint.
#[inline(never)]
fn look_here() {
    black_box(());
}

fn named(name: &'static str, f: impl FnOnce(&Co) + 'static) -> Result<Coroutine, Error> {
    let options = CoroutineOptions {
        name,
        ..CoroutineOptions::default()
    };
    Coroutine::with_options(&options, f)
}

/// Lets them fall asleep, and wakes them up again.
pub fn main() -> Result<(), Error> {
    let paper = Rc::new(Cell::new(std::ptr::null()));
    let inside = paper.clone();
    let hungry = named("hungry", |co| waits_for_dinner(co, 2))?;
    let reader = named("reader", move |co| reads_the_paper(co, &inside))?;
    let unborn = named("unborn", |_| ())?;
    assert_eq!(hungry.enter(), State::Suspended);
    assert_eq!(reader.enter(), State::Suspended);
    look_here();
    // SAFETY: the coroutine waits in the frame of the operation.
    unsafe { &*paper.get() }.complete(1);
    assert!(reader.finished());
    assert_eq!(hungry.enter(), State::Finished);
    assert_eq!(unborn.enter(), State::Finished);
    println!("all have woken up");
    Ok(())
}
