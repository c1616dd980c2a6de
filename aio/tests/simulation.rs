//! Several contexts stepped in one thread: a seed replays, time jumps, a deadlock is named.

mod support;

use coblock_aio::sim::World;
use coblock_aio::{Home, co};
use coblock_coroutine::CoMutex;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use support::{Count, Log};

fn end(world: World, homes: Vec<Rc<Home>>) {
    drop(world);
    for home in homes {
        Rc::into_inner(home).expect("the world is gone").close();
    }
}

/// Three contexts whose coroutines visit each other, lock and sleep.
fn story(seed: u64) -> Vec<String> {
    let (world, log) = (World::new(seed), Log::default());
    let homes: Vec<_> = (0..3)
        .map(|n| world.add(&format!("home-{n}")).unwrap())
        .collect();
    let (mutex, ended) = (Arc::new(CoMutex::new(0u64)), Count::default());
    for (n, home) in homes.iter().enumerate() {
        let next = homes[(n + 1) % 3].context().clone();
        let (log, mutex, ended) = (log.clone(), mutex.clone(), ended.clone());
        home.spawn("traveller", move |c| {
            for turn in 0..5u64 {
                co::sleep(c, Duration::from_millis(turn));
                co::run_in(c, &next, "visitor", |c| {
                    let mut count = mutex.lock(c);
                    co::reschedule(c);
                    *count += 1;
                    log.say(format!("{n} is {} at {}", *count, next.now_ns()));
                })
                .unwrap();
            }
            ended.add();
        });
    }
    world.run_until(|| ended.get() == 3);
    assert_eq!(world.clock().now_ns(), 10_000_000, "1 + 2 + 3 + 4 ms");
    end(world, homes);
    log.take()
}

/// The same seed is the same story; among twenty seeds there are different ones.
#[test]
fn a_seed_replays() {
    let first = story(1);
    assert_eq!(first.len(), 15);
    assert_eq!(first, story(1));
    assert!(
        (2..20).any(|seed| story(seed) != first),
        "the seed decides something"
    );
}

/// Real files through a simulated context: work of the pool takes virtual time.
#[test]
fn virtual_pool() {
    let world = World::new(7);
    let home = world.add("home").unwrap();
    let (done, file) = (Count::default(), tempfile::tempfile().unwrap());
    let count = done.clone();
    home.spawn("writer", move |c| {
        co::write(c, file.as_fd(), 0, (b"simulated").into()).unwrap();
        let mut back = [0; 9];
        co::read(c, file.as_fd(), 0, (&mut back).into()).unwrap();
        assert_eq!(&back, b"simulated");
        count.add();
    });
    world.settle();
    assert_eq!(done.get(), 0, "time stands");
    world.run_until(|| done.get() == 1);
    assert_eq!(world.clock().now_ns(), 2_000, "two operations of 1 us");
    end(world, vec![home]);
}

/// A blocking poll in a handler lets the others run.
#[test]
fn a_nested_blocking_poll_steps_the_others() {
    let world = World::new(3);
    let (a, b) = (world.add("a").unwrap(), world.add("b").unwrap());
    let (asked, answered, done) = (Count::default(), Count::default(), Count::default());
    let (ask, answer, end_of) = (asked.clone(), answered.clone(), done.clone());
    let (context_a, context_b) = (a.context().clone(), b.context().clone());
    a.context().oneshot(move || {
        let (answer, context_a) = (answer.clone(), context_a.clone());
        let seen = answer.clone();
        context_b.oneshot(move || {
            ask.add();
            context_a.oneshot(move || {
                answer.add();
            });
        });
        while seen.get() == 0 {
            coblock_aio::poll(true);
        }
        end_of.add();
    });
    world.run_until(|| done.get() == 1);
    assert_eq!((asked.get(), answered.get()), (1, 1));
    end(world, vec![a, b]);
}

/// When nothing can ever happen again, the world says so and names who waits for what.
#[test]
fn a_deadlock_is_named() {
    let world = World::new(5);
    let home = world.add("stuck").unwrap();
    home.spawn("waits for ever", |c| c.suspend());
    let panic = catch_unwind(AssertUnwindSafe(|| world.run_until(|| false))).unwrap_err();
    let message = panic.downcast::<String>().unwrap();
    assert!(
        message.starts_with("nothing can ever happen again"),
        "{message}"
    );
    assert!(message.contains("(\"waits for ever\", 1)"), "{message}");
    // The coroutine that waits for ever is left behind on purpose, and so is its home.
    std::mem::forget((world, home));
}
