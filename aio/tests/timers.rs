//! Timers (rule 3.7) and the order of one pass (rule 3.1), with real and virtual clocks.

mod support;

use coblock_aio::{Clock, ContextOptions, EventNotifier, FdHandler, Home, Timer, VirtualClock, co};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Count, Log, each_drive, each_engine, quiet};

const SHORT: Duration = Duration::from_millis(150);

/// A timer that its own callback can reach.
type OwnTimer = Arc<Mutex<Option<Timer>>>;

/// A home on a virtual clock, with each engine.
fn each_virtual(test: impl Fn(&Home, &VirtualClock)) {
    for engine in ["threads", "io_uring"] {
        let clock = VirtualClock::new();
        let options = ContextOptions {
            clock: Clock::Virtual(clock.clone()),
            ..support::options(engine)
        };
        match Home::new(options) {
            Ok(home) => {
                test(&home, &clock);
                home.close();
            }
            Err(why) => println!("skipped: {engine}: {why}"),
        }
    }
}

/// Rule 3.7: not early, nor while the thread merely sleeps; once; armed again from its callback it
/// fires a second time, not before its time. (/aio/timer/schedule)
#[test]
fn schedule() {
    each_drive(|home, drive| {
        let (fired, own) = (Count::default(), OwnTimer::default());
        let (count, me) = (fired.clone(), own.clone());
        let timer = home.context().timer("timer", move || {
            if count.add() == 1 {
                me.lock().unwrap().as_ref().unwrap().arm_in(SHORT);
            }
        });
        let began = Instant::now();
        timer.arm_in(SHORT);
        *own.lock().unwrap() = Some(timer);
        quiet(drive);
        assert_eq!(fired.get(), 0, "not early");
        std::thread::sleep(SHORT);
        assert_eq!(fired.get(), 0, "not by itself");
        assert!(drive.poll(false));
        assert_eq!(fired.get(), 1);
        while fired.get() < 2 {
            drive.poll(true);
        }
        assert!(began.elapsed() >= 2 * SHORT, "the second not early either");
        quiet(drive);
        assert_eq!(fired.get(), 2);
        *own.lock().unwrap() = None;
    });
}

/// Rule 3.7: by time; equal times first in first out; an arming replaces the one before.
#[test]
fn sorted_and_first_in_first_out() {
    each_virtual(|home, clock| {
        let log = Log::default();
        let make = |name: &'static str| {
            let log = log.clone();
            home.context().timer(name, move || log.say(name))
        };
        let (a, b, c, d) = (make("a"), make("b"), make("c"), make("d"));
        a.arm_at(30);
        b.arm_at(10);
        c.arm_at(30);
        d.arm_at(10);
        a.arm_at(30);
        clock.advance(9);
        assert!(!home.poll(false));
        clock.advance(21);
        assert!(home.poll(false));
        assert_eq!(
            log.take(),
            ["b", "d", "c", "a"],
            "a was armed again, after c"
        );
        assert!(!home.poll(false), "each fires once");
        a.arm_at(40);
        assert_eq!((a.deadline_ns(), b.deadline_ns()), (Some(40), None));
        assert!(a.disarm());
        assert!(!a.disarm());
        clock.advance(100);
        assert!(!home.poll(false), "disarmed");
        a.arm_at(0);
        assert!(home.poll(true), "a time that has passed is the next pass");
        assert_eq!(log.take(), ["a"]);
    });
}

/// Rule 3.7: removed before the callback, so arming inside is legal; it runs in a later pass even
/// when its time has come. A callback that disarms another one that is due prevents it.
#[test]
fn armed_again_inside() {
    each_virtual(|home, clock| {
        let (fired, own) = (Count::default(), OwnTimer::default());
        let (count, me) = (fired.clone(), own.clone());
        let timer = home.context().timer("again", move || {
            let timer = me.lock().unwrap();
            let timer = timer.as_ref().unwrap();
            assert_eq!(timer.deadline_ns(), None, "removed before the callback");
            if count.add() < 5 {
                timer.arm_at(0);
            }
        });
        timer.arm_at(1);
        *own.lock().unwrap() = Some(timer);
        clock.advance(1);
        for n in 1..=5 {
            assert!(home.poll(true));
            assert_eq!(fired.get(), n, "one a pass");
        }
        assert!(!home.poll(false));
        *own.lock().unwrap() = None;

        let victim = Arc::new(home.context().timer("victim", || panic!("it was disarmed")));
        let other = victim.clone();
        let killer = home
            .context()
            .timer("killer", move || assert!(other.disarm()));
        killer.arm_at(5);
        victim.arm_at(5);
        clock.advance(10);
        assert!(home.poll(false));
        assert!(!home.poll(false));
    });
}

/// Rule 3.7: a nested poll in a callback is a later pass: it fires what was armed meanwhile, and
/// what the outer pass still had is fired once.
#[test]
fn nested_poll_in_a_timer() {
    each_virtual(|home, clock| {
        let (log, own) = (Log::default(), OwnTimer::default());
        let say = log.clone();
        *own.lock().unwrap() = Some(home.context().timer("inner", move || say.say("inner")));
        let (say, inner) = (log.clone(), own.clone());
        let outer = home.context().timer("outer", move || {
            inner.lock().unwrap().as_ref().unwrap().arm_at(1);
            say.say("outer");
            assert!(coblock_aio::poll(false));
            say.say("back");
        });
        let say = log.clone();
        let second = home.context().timer("second", move || say.say("second"));
        outer.arm_at(1);
        second.arm_at(1);
        clock.advance(1);
        assert!(home.poll(false));
        assert_eq!(log.take(), ["outer", "second", "inner", "back"]);
        assert!(!home.poll(false));
        *own.lock().unwrap() = None;
    });
}

/// Rule 3.7: armed from another thread as the earliest, it wakes the sleeping loop.
#[test]
fn armed_from_another_thread() {
    each_drive(|home, drive| {
        let fired = Count::default();
        let make = |name: &'static str| {
            let fired = fired.clone();
            home.context().timer(name, move || {
                fired.add();
            })
        };
        let (late, early) = (make("late"), make("early"));
        late.arm_in(Duration::from_secs(3600));
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                early.arm_in(Duration::from_millis(20));
            });
            while fired.get() == 0 {
                drive.poll(true);
            }
        });
        assert!(began.elapsed() < Duration::from_secs(60));
        assert!(late.disarm());
    });
}

/// Rule 3.7, per clock: one context may have timers of several clocks; moving a virtual one wakes a
/// loop that waits on real time.
#[test]
fn several_clocks_in_one_context() {
    each_engine(|home, _| {
        let (log, clock) = (Log::default(), VirtualClock::new());
        let (first, second) = (log.clone(), log.clone());
        let virtual_one =
            home.context()
                .timer_on(&Clock::Virtual(clock.clone()), "virtual", move || {
                    first.say("virtual")
                });
        let real_one = home.context().timer("real", move || second.say("real"));
        virtual_one.arm_at(1_000_000_000_000);
        real_one.arm_in(Duration::from_millis(5));
        while log.take() != ["real"] {
            home.poll(true);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                clock.advance_to(1_000_000_000_000);
            });
            while log.take() != ["virtual"] {
                home.poll(true);
            }
        });
        clock.advance_to(5);
        assert_eq!(clock.now_ns(), 1_000_000_000_000, "no clock goes back");
    });
}

/// The dump of a loop's thread says since when each coroutine waits: since the pass of the loop in
/// which it was entered last.
#[test]
fn the_dump_tells_since_when() {
    each_virtual(|home, clock| {
        clock.advance_to(1_000_000_000);
        home.poll(false);
        home.spawn("sleeps", |co| {
            co::sleep(co, Duration::from_secs(10));
        });
        clock.advance_to(4_500_000_000);
        home.poll(false);
        let told = coblock_coroutine::dump(false);
        let one = told.standing.iter().find(|one| one.name == "sleeps");
        let one = one.expect("it waits");
        assert_eq!(one.entered_ago, Some(3_500_000_000), "{one}");
        clock.advance_to(11_000_000_000);
        home.poll(true);
    });
}

/// A sleeping coroutine goes on at its time, in the order of the times.
#[test]
fn sleeping_coroutines() {
    each_virtual(|home, clock| {
        let log = Log::default();
        for (name, ms) in [("c", 30), ("a", 10), ("b", 20)] {
            let log = log.clone();
            home.spawn(name, move |c| {
                co::sleep(c, Duration::from_millis(ms));
                log.say(name);
            });
        }
        for want in ["a", "b", "c"] {
            assert!(!home.poll(false));
            clock.advance(10_000_000);
            assert!(home.poll(true));
            assert_eq!(log.take(), [want]);
        }
    });
    each_engine(|home, _| {
        let began = Instant::now();
        home.run(|c| co::sleep(c, Duration::from_millis(30)));
        assert!(began.elapsed() >= Duration::from_millis(30));
    });
}

/// Rule 3.1: bottom halves, then descriptors, then timers, each counted as progress; a notification
/// alone wakes a blocking poll and is none.
#[test]
fn order_and_progress_of_a_pass() {
    each_drive(|home, drive| {
        let log = Log::default();
        let (timer_log, fd_log, half_log) = (log.clone(), log.clone(), log.clone());
        let timer = home
            .context()
            .timer("timer", move || timer_log.say("timer"));
        let event = Arc::new(EventNotifier::new().unwrap());
        let mine = event.clone();
        let handler = FdHandler::new().on_read(move || {
            mine.test_and_clear();
            fd_log.say("descriptor");
        });
        home.context()
            .set_fd_handler(event.as_fd().as_raw_fd(), handler)
            .unwrap();
        let half = home
            .context()
            .bottom_half("half", move || half_log.say("bottom half"));
        timer.arm_at(1);
        event.set();
        half.schedule();
        assert!(drive.poll(true));
        assert_eq!(log.take(), ["bottom half", "descriptor", "timer"]);
        quiet(drive);
        home.context().remove_fd_handler(event.as_fd().as_raw_fd());

        let context = home.context().clone();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                context.notify();
            });
            assert!(!drive.poll(true), "a notification alone is no progress");
        });
        quiet(drive);
    });
}

/// Rule 3.4: only a blocking poll consumes a notification: a poll that does not block leaves it,
/// and the next blocking one returns at once. (/aio-gsource/flush)
#[test]
fn notifications_are_consumed_by_blocking_polls() {
    each_engine(|home, _| {
        home.context().notify();
        assert!(!home.poll(false));
        assert!(
            !home.poll(true),
            "it would hang if the first poll had consumed it"
        );
        // And now there is none: only the timer ends the wait.
        let fired = Count::default();
        let count = fired.clone();
        let timer = home.context().timer("end", move || {
            count.add();
        });
        timer.arm_in(Duration::from_millis(20));
        while !home.poll(true) {}
        assert_eq!(fired.get(), 1);
    });
}
