//! Postponed actions (rules 6.1 to 6.4).

mod support;

use coblock_aio::{AioContext, Home, Postponer};
use coblock_coroutine::ThreadLock;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use support::options;

/// What ran, in order.
type Ran = Arc<ThreadLock<Vec<u32>>>;

fn note(ran: &Ran, n: u32) -> impl FnOnce() + Send + 'static {
    let ran = ran.clone();
    move || ran.lock().push(n)
}

fn settle(home: &Home) {
    while home.poll(false) {}
}

/// Rules 6.1, 6.2: what was postponed runs when the last section has ended, in the order in which
/// it was postponed, whoever owns it.
#[test]
fn rule_6_2_in_the_order_postponed() {
    let home = Home::new(options("none")).unwrap();
    let context = home.context().clone();
    let (one, two) = (context.postponer("one"), context.postponer("two"));
    let ran = Ran::default();
    context.disable_external();
    context.disable_external();
    for n in 0..6 {
        let owner = if n % 2 == 0 { &one } else { &two };
        assert!(n < 2 || owner.must_postpone());
        owner.postpone(note(&ran, n));
    }
    context.enable_external();
    settle(&home);
    assert_eq!(
        (ran.lock().len(), one.waiting()),
        (0, 3),
        "one section is left"
    );
    context.enable_external();
    assert!(
        ran.lock().is_empty(),
        "not from the call that ends the section"
    );
    assert!(one.must_postpone(), "what comes now would overtake");
    settle(&home);
    assert_eq!(*ran.lock(), [0, 1, 2, 3, 4, 5]);
    assert!(!one.must_postpone() && !two.must_postpone());
    home.close();
}

/// Rule 6.1: without a section it runs in the next pass, and not in the call.
#[test]
fn rule_6_1_without_a_section() {
    let home = Home::new(options("none")).unwrap();
    let owner = home.context().postponer("device");
    let ran = Ran::default();
    owner.postpone(note(&ran, 1));
    assert!(ran.lock().is_empty());
    settle(&home);
    assert_eq!(*ran.lock(), [1]);
    home.close();
}

/// Rule 6.3: an action that begins a section keeps the rest, in order.
#[test]
fn rule_6_3_a_new_section_keeps_the_rest() {
    let home = Home::new(options("none")).unwrap();
    let context = home.context().clone();
    let owner = context.postponer("device");
    let ran = Ran::default();
    context.disable_external();
    owner.postpone(note(&ran, 1));
    owner.postpone({
        let (context, ran) = (Arc::downgrade(&context), ran.clone());
        move || {
            ran.lock().push(2);
            context.upgrade().unwrap().disable_external();
        }
    });
    owner.postpone(note(&ran, 3));
    owner.postpone(note(&ran, 4));
    context.enable_external();
    settle(&home);
    assert_eq!((&*ran.lock(), owner.waiting()), (&vec![1, 2], 2));
    owner.postpone(note(&ran, 5));
    context.enable_external();
    settle(&home);
    assert_eq!(*ran.lock(), [1, 2, 3, 4, 5]);
    home.close();
}

/// Rule 6.3: no lock is held: an action postpones, resets and polls.
#[test]
fn rule_6_3_an_action_may_do_anything() {
    let home = Home::new(options("none")).unwrap();
    let context = home.context().clone();
    let owner = Arc::new(context.postponer("device"));
    let ran = Ran::default();
    context.disable_external();
    owner.postpone({
        let (owner, ran) = (Arc::downgrade(&owner), ran.clone());
        move || {
            let owner = owner.upgrade().unwrap();
            owner.postpone(note(&ran, 2));
            while coblock_aio::poll(false) {}
            assert!(ran.lock().is_empty(), "the next one waits for this one");
            ran.lock().push(1);
        }
    });
    context.enable_external();
    settle(&home);
    assert_eq!(*ran.lock(), [1, 2]);
    home.close();
}

/// Rule 6.4: order holds across owners too. When a section has ended and what one device postponed waits
/// for its bottom half, another device that comes first does not overtake it.
#[test]
fn rule_6_4_nobody_overtakes_another_owner() {
    let home = Home::new(options("none")).unwrap();
    let context = home.context().clone();
    let devices = ["one", "two"].map(|name| Arc::new(context.postponer(name)));
    let ran = Ran::default();
    /// What a device does with a request: at once if it may.
    fn submit(device: &Arc<Postponer>, ran: &Ran, n: u32) {
        if device.must_postpone() {
            // It asks again when it runs.
            let (owner, ran) = (Arc::downgrade(device), ran.clone());
            device.postpone(move || submit(&owner.upgrade().unwrap(), &ran, n));
        } else {
            ran.lock().push(n);
        }
    }
    context.disable_external();
    // Before the bottom half of the section's end: they run in this order.
    for n in 2..4 {
        let (device, ran) = (devices[1].clone(), ran.clone());
        context.oneshot(move || submit(&device, &ran, n));
    }
    for n in 0..2 {
        submit(&devices[0], &ran, n);
    }
    context.enable_external();
    assert!(devices[1].must_postpone() && devices[1].waiting() == 0);
    settle(&home);
    assert_eq!(*ran.lock(), [0, 1, 2, 3]);
    // In a poll of an action that runs still.
    context.disable_external();
    devices[0].postpone({
        let (device, ran) = (Arc::downgrade(&devices[1]), ran.clone());
        move || {
            let nested = ran.clone();
            coblock_aio::current().unwrap().oneshot(move || {
                submit(&device.upgrade().unwrap(), &nested, 5);
            });
            while coblock_aio::poll(false) {}
            ran.lock().push(4);
        }
    });
    context.enable_external();
    settle(&home);
    assert_eq!(*ran.lock(), [0, 1, 2, 3, 4, 5]);
    assert!(devices.iter().all(|device| !device.must_postpone()));
    drop(devices);
    home.close();
}

/// Rule 6.4: the handle cancels one action, a reset or the end of the owner all of its own.
#[test]
fn rule_6_4_cancelled_never_runs() {
    let home = Home::new(options("none")).unwrap();
    let context = home.context().clone();
    let (one, two) = (context.postponer("one"), context.postponer("two"));
    let ran = Ran::default();
    context.disable_external();
    let handles: Vec<_> = (0..4)
        .map(|n| (if n < 3 { &one } else { &two }).postpone(note(&ran, n)))
        .collect();
    assert!(handles[1].cancel() && !handles[1].cancel());
    context.enable_external();
    settle(&home);
    assert_eq!(*ran.lock(), [0, 2, 3]);
    assert!(!handles[0].cancel(), "it ran");

    let keep = Arc::new(());
    context.disable_external();
    for owner in [&one, &two] {
        let keep = keep.clone();
        owner.postpone(move || panic!("cancelled {keep:?}"));
    }
    one.reset();
    assert_eq!((one.waiting(), two.waiting()), (0, 1));
    drop(two);
    assert_eq!(Arc::strong_count(&keep), 1, "what they held is gone");
    one.postpone(note(&ran, 9));
    context.enable_external();
    settle(&home);
    assert_eq!(ran.lock().last(), Some(&9));
    home.close();
}

/// Rule 6.4: from other threads, against the end of sections: each action runs once or was
/// cancelled, never both, and those of one thread run in its order.
#[test]
fn rule_6_4_cancel_races_with_the_end_of_sections() {
    const EACH: u32 = 300;
    let home = Home::new(options("none")).unwrap();
    let context: &Arc<AioContext> = home.context();
    let ran = Ran::default();
    let threads: Vec<_> = (0..3)
        .map(|thread| {
            let (context, ran) = (context.clone(), ran.clone());
            std::thread::spawn(move || {
                let owner = context.postponer("thread");
                let mut cancelled = Vec::new();
                for n in 0..EACH {
                    let n = thread * EACH + n;
                    context.disable_external();
                    let handle = owner.postpone(note(&ran, n));
                    context.enable_external();
                    if n.is_multiple_of(3) && handle.cancel() {
                        cancelled.push(n);
                    }
                }
                (owner, cancelled)
            })
        })
        .collect();
    while threads.iter().any(|thread| !thread.is_finished()) {
        home.poll(false);
    }
    let ended: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    settle(&home);
    let ran = ran.lock();
    for (thread, (owner, cancelled)) in (0..).zip(&ended) {
        assert_eq!(owner.waiting(), 0);
        let ours = thread * EACH..(thread + 1) * EACH;
        let expected: Vec<u32> = ours.clone().filter(|n| !cancelled.contains(n)).collect();
        let seen: Vec<u32> = ran.iter().copied().filter(|n| ours.contains(n)).collect();
        assert_eq!(seen, expected);
    }
    drop(ran);
    drop(ended);
    home.close();
}

/// Rule 6.1: a context does not end with an action that waits.
#[test]
fn rule_6_1_a_context_is_not_closed_with_actions_left() {
    let home = Home::new(options("none")).unwrap();
    let context = home.context().clone();
    let owner = context.postponer("ide0");
    context.disable_external();
    owner.postpone(|| panic!("nobody runs it"));
    let closed = catch_unwind(AssertUnwindSafe(|| home.close()));
    let told = *closed.unwrap_err().downcast::<String>().unwrap();
    assert!(
        told.contains("1 postponed action(s), the first of 'ide0'"),
        "{told}"
    );
}
