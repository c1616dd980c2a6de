//! Waiting for a condition from outside of coroutines (rule 3.8).

mod support;

use coblock_aio::sim::World;
use coblock_aio::{AioContext, AioWait, ContextOptions, Home, IoThread, co};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use support::{Count, each_engine, options};

fn thread(name: &str) -> IoThread {
    IoThread::new(ContextOptions {
        name: name.to_owned(),
        ..options("auto")
    })
    .unwrap()
}

/// Runs `f` in a handler of `context`, and gives what it returned.
fn inside<R: Send + 'static>(
    context: &Arc<AioContext>,
    f: impl FnOnce() -> R + Send + 'static,
) -> R {
    let (tell, hear) = mpsc::channel();
    context.oneshot(move || tell.send(f()).unwrap());
    hear.recv().unwrap()
}

fn refusal<R>(f: impl FnOnce() -> R) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else {
        panic!("it was not refused")
    };
    *panic.downcast::<String>().expect("a message")
}

/// Rule 3.8: the home of a context waits for it; handlers run meanwhile.
#[test]
fn a_home_waits_for_its_own_context() {
    each_engine(|home, engine| {
        let wait = AioWait::new(home.context());
        let count = Count::default();
        let fires = count.clone();
        let timer = home.context().timer("a change", move || {
            fires.add();
        });
        timer.arm_in(Duration::from_millis(5));
        let waited = home.with(|| wait.wait_while(home.context(), || count.get() == 0));
        assert!(waited, "{engine}");
        let before = home.stats().passes;
        let waited = home.with(|| wait.wait_while(home.context(), || count.get() == 0));
        assert!(!waited, "{engine}: it was so already");
        assert_eq!(
            home.stats().passes,
            before,
            "{engine}: and nothing was polled"
        );
    });
}

/// Rule 3.8: the home of the main context waits for anything; a completion elsewhere kicks.
#[test]
fn the_main_home_waits_for_another_thread() {
    each_engine(|home, engine| {
        let wait = Arc::new(AioWait::new(home.context()));
        let worker = thread("worker");
        let busy = Arc::new(AtomicU32::new(0));
        home.with(|| {
            for round in 0..500 {
                busy.store(1 + round % 3, Ordering::Relaxed);
                for n in 0..=round % 3 {
                    let (busy, wait) = (busy.clone(), wait.clone());
                    let spawned = worker.context().spawn("request", move |co| {
                        if n == 1 {
                            co::reschedule(co);
                        }
                        busy.fetch_sub(1, Ordering::Release);
                        wait.kick();
                    });
                    spawned.unwrap();
                }
                wait.wait_while(worker.context(), || busy.load(Ordering::Acquire) > 0);
            }
        });
        worker.stop();
        assert_eq!(busy.load(Ordering::Relaxed), 0, "{engine}");
        assert!(format!("{wait:?}").contains("waiting_in: []"), "{wait:?}");
    });
}

/// Rule 3.8: another thread may wait for its own context; it is woken also by a change that was
/// made on a thread without a context.
#[test]
fn a_thread_waits_for_its_own_context() {
    let home = Home::new(options("none")).unwrap();
    let wait = Arc::new(AioWait::new(home.context()));
    let worker = thread("worker");
    let busy = Arc::new(AtomicBool::new(true));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Not before it waits.
            while !format!("{wait:?}").contains("worker") {
                std::thread::yield_now();
            }
            busy.store(false, Ordering::Release);
            wait.kick();
        });
        let (context, theirs, busy) = (worker.context().clone(), wait.clone(), busy.clone());
        let waited = inside(worker.context(), move || {
            theirs.wait_while(&context, || busy.load(Ordering::Acquire))
        });
        assert!(waited);
    });
    worker.stop();
}

/// Rule 3.8: never between two other threads, nor on one without a context; both are named.
#[test]
fn refused_between_two_other_threads() {
    let home = Home::new(ContextOptions::named("main")).unwrap();
    let wait = Arc::new(AioWait::new(home.context()));
    let (a, b) = (thread("a"), thread("b"));
    let (theirs, other) = (wait.clone(), b.context().clone());
    let message = inside(a.context(), move || {
        refusal(|| theirs.wait_while(&other, || panic!("tested though refused")))
    });
    assert!(
        message.contains("waiting for context 'b' in context 'a'"),
        "{message}"
    );
    assert!(
        message.contains("main context 'main' (rule 3.8)"),
        "{message}"
    );
    let (theirs, main) = (wait.clone(), home.context().clone());
    let message = inside(a.context(), move || {
        refusal(|| theirs.wait_while(&main, || false))
    });
    assert!(
        message.contains("waiting for context 'main' in context 'a'"),
        "{message}"
    );
    let message = refusal(|| wait.wait_while(home.context(), || false));
    assert!(message.contains("drives no context"), "{message}");
    a.stop();
    b.stop();
}

/// Rule 3.8 with 3.1: a coroutine suspends; it is refused even if there is nothing to wait for.
#[test]
fn refused_in_a_coroutine() {
    each_engine(|home, _| {
        let wait = AioWait::new(home.context());
        let message = refusal(|| home.run(|_co| wait.wait_while(home.context(), || false)));
        assert!(message.contains("(rules 3.1, 4.4)"), "{message}");
    });
}

/// A wait inside the handler of a wait: both end, each with its own condition.
#[test]
fn nested() {
    each_engine(|home, engine| {
        let wait = Arc::new(AioWait::new(home.context()));
        let (outer, inner) = (Count::default(), Count::default());
        let (done, count) = (outer.clone(), inner.clone());
        let (mine, context) = (wait.clone(), home.context().clone());
        home.context().oneshot(move || {
            let add = count.clone();
            context.oneshot(move || {
                add.add();
            });
            mine.wait_while(&context, || count.get() == 0);
            assert!(
                format!("{mine:?}").contains("\"test\""),
                "the outer one waits"
            );
            done.add();
        });
        home.with(|| wait.wait_while(home.context(), || outer.get() == 0));
        assert_eq!(inner.get(), 1, "{engine}");
        assert!(format!("{wait:?}").contains("waiting_in: []"), "{wait:?}");
    });
}

/// A panic of the condition comes out, and nobody is counted any more: a kick notifies no loop.
#[test]
fn a_panic_ends_the_wait() {
    each_engine(|home, engine| {
        let wait = AioWait::new(home.context());
        let message = home.with(|| {
            refusal(|| wait.wait_while(home.context(), || panic!("{}", "no more".to_owned())))
        });
        assert_eq!(message, "no more");
        assert!(format!("{wait:?}").contains("waiting_in: []"), "{wait:?}");
        wait.kick();
        let timer = home.context().timer("wakes", || ());
        // On the home, so that arming notifies nobody.
        home.with(|| timer.arm_in(Duration::from_millis(5)));
        assert!(home.poll(true), "{engine}: the wait was not cut short");
    });
}

/// Rule 3.8 in a simulated world: the main context waits for what another one does at a later time.
#[test]
fn in_a_simulated_world() {
    for seed in 0..20 {
        let world = World::new(seed);
        let (main, other) = (world.add("main").unwrap(), world.add("other").unwrap());
        let wait = Arc::new(AioWait::new(main.context()));
        let done = Count::default();
        let (count, kicks) = (done.clone(), wait.clone());
        other.spawn("sleeper", move |co| {
            co::sleep(co, Duration::from_secs(3));
            count.add();
            kicks.kick();
        });
        let (seen, count) = (Count::default(), done.clone());
        let (saw, context) = (seen.clone(), other.context().clone());
        main.context().oneshot(move || {
            wait.wait_while(&context, || count.get() == 0);
            saw.add();
        });
        world.run_until(|| seen.get() == 1);
        assert_eq!(done.get(), 1, "seed {seed}");
    }
}
