//! Bottom halves (rules 3.2, 3.3), driven by the loop's own poll and by a foreign loop, with each
//! engine.

mod support;

use coblock_aio::{BottomHalf, Home};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Count, Log, each_drive, quiet};

/// A bottom half that its own callback can reach.
type OwnHalf = Arc<Mutex<Option<BottomHalf>>>;

/// A bottom half that counts how often it has run.
fn counted(home: &Home) -> (Count, BottomHalf) {
    let runs = Count::default();
    let count = runs.clone();
    let half = home.context().bottom_half("half", move || {
        count.add();
    });
    (runs, half)
}

/// Rule 3.2: not before the poll, once, progress once. (/aio/bh/schedule)
#[test]
fn schedule() {
    each_drive(|home, drive| {
        let (runs, half) = counted(home);
        half.schedule();
        half.schedule();
        assert_eq!(runs.get(), 0);
        assert!(drive.poll(true));
        assert_eq!(runs.get(), 1, "scheduled twice before running runs once");
        quiet(drive);
    });
}

/// Rule 3.2: scheduled in its own callback, it runs in the next pass. (/aio/bh/schedule10)
#[test]
fn schedule_from_its_own_callback() {
    each_drive(|home, drive| {
        let (runs, own) = (Count::default(), OwnHalf::default());
        let (counts, again) = (runs.clone(), own.clone());
        let half = home.context().bottom_half("half", move || {
            if counts.add() < 10 {
                again.lock().unwrap().as_ref().unwrap().schedule();
            }
        });
        half.schedule();
        *own.lock().unwrap() = Some(half);
        for n in 1..=10 {
            assert!(drive.poll(n % 2 == 0));
            assert_eq!(runs.get(), n, "once a pass");
        }
        quiet(drive);
        assert_eq!(runs.get(), 10);
        *own.lock().unwrap() = None;
    });
}

/// Rule 3.2: cancelled, it does not run; that is no progress. (/aio/bh/cancel)
#[test]
fn cancel() {
    each_drive(|home, drive| {
        let (runs, half) = counted(home);
        half.schedule();
        assert!(half.cancel());
        assert!(!half.cancel(), "nothing left to cancel");
        quiet(drive);
        assert_eq!(runs.get(), 0);
        half.schedule();
        assert!(drive.poll(false), "it can be scheduled again");
        assert_eq!(runs.get(), 1);
    });
}

/// Rule 3.2: deleted while scheduled, it does not run. (/aio/bh/delete)
#[test]
fn delete() {
    each_drive(|home, drive| {
        let (runs, half) = counted(home);
        half.schedule();
        half.delete();
        quiet(drive);
        assert_eq!(runs.get(), 0);
    });
}

/// Rule 3.2: deleting from its own callback is legal, after 1, 3, 2 and 4 runs.
/// (/aio/bh/callback-delete/one and /many)
#[test]
fn delete_in_its_own_callback() {
    each_drive(|home, drive| {
        let cases = [1, 3, 2, 4];
        let counts: Vec<Count> = cases.iter().map(|_| Count::default()).collect();
        let halves: Vec<OwnHalf> = cases.iter().map(|_| OwnHalf::default()).collect();
        for ((max, count), own) in cases.iter().copied().zip(&counts).zip(&halves) {
            let (count, me) = (count.clone(), own.clone());
            let half = home.context().bottom_half("half", move || {
                if count.add() == max {
                    me.lock().unwrap().take().unwrap().delete();
                } else {
                    me.lock().unwrap().as_ref().unwrap().schedule();
                }
            });
            half.schedule();
            *own.lock().unwrap() = Some(half);
        }
        let now = || counts.iter().map(Count::get).collect::<Vec<_>>();
        assert!(drive.poll(false));
        assert_eq!(now(), [1, 1, 1, 1], "one pass runs each once");
        while drive.poll(false) {}
        assert_eq!(now(), cases);
        assert!(halves.iter().all(|half| half.lock().unwrap().is_none()));
    });
}

/// One blocking poll is enough for what is scheduled. (/aio/bh/flush)
#[test]
fn flush() {
    each_drive(|home, drive| {
        let (runs, half) = counted(home);
        half.schedule();
        assert!(drive.poll(true));
        assert_eq!(runs.get(), 1);
        quiet(drive);
    });
}

/// Rule 3.2: first scheduled, first run, bottom halves and one-shots alike, whoever scheduled,
/// and after a cancel the later schedule counts.
#[test]
fn first_scheduled_first_run() {
    each_drive(|home, drive| {
        let log = Log::default();
        let make = |name| {
            let log = log.clone();
            home.context().bottom_half(name, move || log.say(name))
        };
        let (a, b, c, d) = (make("a"), make("b"), make("c"), make("d"));
        home.with(|| a.schedule());
        std::thread::scope(|s| {
            s.spawn(|| b.schedule()).join().unwrap();
        });
        home.with(|| c.schedule());
        let (say, context) = (log.clone(), home.context().clone());
        let post = move || context.oneshot(move || say.say("one-shot"));
        std::thread::spawn(post).join().unwrap();
        home.with(|| d.schedule());
        assert!(drive.poll(false));
        assert_eq!(log.take(), ["a", "b", "c", "one-shot", "d"]);
        a.schedule();
        b.schedule();
        a.cancel();
        a.schedule();
        assert!(drive.poll(false));
        assert_eq!(log.take(), ["b", "a"]);
    });
}

/// Rule 3.2: a nested poll first finishes the outer pass, then runs what was scheduled since; the
/// outer pass then has nothing left.
#[test]
fn nested_poll_finishes_the_outer_pass() {
    each_drive(|home, drive| {
        let log = Log::default();
        let say = |word| {
            let log = log.clone();
            move || log.say(word)
        };
        let outer = log.clone();
        home.context().oneshot(move || {
            outer.say("nest");
            let inner = outer.clone();
            coblock_aio::current()
                .unwrap()
                .oneshot(move || inner.say("new"));
            assert!(coblock_aio::poll(false));
            outer.say("back");
        });
        home.context().oneshot(say("outer 2"));
        home.context().oneshot(say("outer 3"));
        assert!(drive.poll(false));
        assert_eq!(log.take(), ["nest", "outer 2", "outer 3", "new", "back"]);
        quiet(drive);
    });
}

/// Rule 3.2: a callback may call itself through a nested poll, since callbacks are `Fn`.
#[test]
fn nested_poll_may_call_the_same_half() {
    each_drive(|home, drive| {
        let (depth, own) = (Count::default(), OwnHalf::default());
        let (count, me) = (depth.clone(), own.clone());
        let half = home.context().bottom_half("half", move || {
            if count.add() < 5 {
                me.lock().unwrap().as_ref().unwrap().schedule();
                assert!(coblock_aio::poll(true));
            }
        });
        half.schedule();
        *own.lock().unwrap() = Some(half);
        assert!(drive.poll(true));
        assert_eq!(depth.get(), 5);
        quiet(drive);
        *own.lock().unwrap() = None;
    });
}

/// Rule 3.2: idle ones are polled at least every 10 ms, and are no progress; scheduling an idle
/// one as a regular one makes it regular.
#[test]
fn idle() {
    each_drive(|home, drive| {
        let (runs, half) = counted(home);
        half.schedule_idle();
        let began = Instant::now();
        assert!(!drive.poll(true), "an idle one is no progress");
        assert_eq!(runs.get(), 1);
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "the wait was bounded"
        );
        half.schedule_idle();
        half.schedule();
        assert!(drive.poll(true), "now it is a regular one");
        assert_eq!(runs.get(), 2, "and runs once");
        quiet(drive);
        half.schedule();
        half.schedule_idle();
        assert!(drive.poll(true), "and stays one");
        assert_eq!(runs.get(), 3);
    });
}

/// Rule 3.3: what was written before scheduling is visible, from any thread, a thousand times.
#[test]
fn scheduled_from_threads() {
    each_drive(|home, drive| {
        let sum = Arc::new(AtomicUsize::new(0));
        let word = Arc::new(AtomicUsize::new(0));
        let (add, see) = (sum.clone(), word.clone());
        let half = home.context().bottom_half("half", move || {
            add.store(see.load(Ordering::Relaxed), Ordering::Relaxed);
        });
        let half = Arc::new(half);
        std::thread::scope(|scope| {
            let from = half.clone();
            scope.spawn(move || {
                for n in 1..=1000 {
                    word.store(n, Ordering::Relaxed);
                    from.schedule();
                }
            });
            while sum.load(Ordering::Relaxed) < 1000 {
                drive.poll(true);
            }
        });
    });
}

/// Rule 3.2: a one-shot runs once, and what it owns is freed.
#[test]
fn one_shot() {
    each_drive(|home, drive| {
        let (runs, owned) = (Count::default(), Arc::new(()));
        let (count, own) = (runs.clone(), owned.clone());
        home.context().oneshot(move || {
            let _own = own;
            count.add();
        });
        assert!(drive.poll(true));
        quiet(drive);
        assert_eq!((runs.get(), Arc::strong_count(&owned)), (1, 1));
    });
}
