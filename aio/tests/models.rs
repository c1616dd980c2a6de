//! The protocols without locks, run through all interleavings by loom: the files themselves, with
//! loom's atomics in place of std's.

use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// What the files below find as `super::sync`.
mod sync {
    pub use loom::sync::{Condvar, Mutex};
    pub use loom::thread::{ThreadId, current};

    pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

    /// The kernel makes a light and a heavy fence together what two full ones are.
    pub fn light_fence() {
        fence(Ordering::SeqCst);
    }

    /// See [`light_fence`].
    pub fn heavy_fence() {
        fence(Ordering::SeqCst);
    }
}

#[path = "../src/bh_state.rs"]
#[allow(dead_code)] // A model uses a part.
mod bh_state;
#[path = "../src/notify.rs"]
#[allow(dead_code)] // A model uses a part.
mod notify;
#[path = "../src/context_lock/turns.rs"]
#[allow(dead_code)] // A model uses a part.
mod turns;
#[path = "../src/waiters.rs"]
mod waiters;

use bh_state::{BhState, Entry, Ticket};
use notify::Notify;
use sync::{AtomicBool, AtomicU64, Ordering, fence};
use turns::Turns;
use waiters::Waiters;

/// The eventfd: raised, waited for, and lowered by whoever waited.
#[derive(Default)]
struct Event {
    raised: Mutex<u32>,
    changed: Condvar,
}

impl Event {
    fn raise(&self) {
        *self.raised.lock().unwrap() += 1;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut raised = self.raised.lock().unwrap();
        while *raised == 0 {
            raised = self.changed.wait(raised).unwrap();
        }
        *raised = 0;
    }
}

/// Complete for up to three preemptions; more take hours where a loop may go round again.
fn bounded(f: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(f);
}

/// Rule 3.4: two threads publish work; the loop finds both, whatever happens when, and never sleeps
/// for ever (loom reports that as a deadlock).
#[test]
fn no_wakeup_is_lost() {
    bounded(|| {
        let state = Arc::new((Notify::new(), Event::default(), AtomicU64::new(0)));
        let notifiers: Vec<_> = (0..2)
            .map(|bit| {
                let state = state.clone();
                thread::spawn(move || {
                    let (notify, event, work) = &*state;
                    work.fetch_or(1 << bit, Ordering::Relaxed);
                    if notify.publish() {
                        event.raise();
                    }
                })
            })
            .collect();
        let (notify, event, work) = &*state;
        while work.load(Ordering::Relaxed) != 0b11 {
            if notify.announce() {
                event.wait();
            }
            notify.accept();
        }
        notifiers.into_iter().for_each(|n| n.join().unwrap());
    });
}

/// Rule 3.4: the same with one thread that publishes twice.
#[test]
fn no_wakeup_of_one_notifier_is_lost() {
    bounded(|| {
        let state = Arc::new((Notify::new(), Event::default(), AtomicU64::new(0)));
        let theirs = state.clone();
        let notifier = thread::spawn(move || {
            let (notify, event, work) = &*theirs;
            for n in 1..=2 {
                work.store(n, Ordering::Relaxed);
                if notify.publish() {
                    event.raise();
                }
            }
        });
        let (notify, event, work) = &*state;
        while work.load(Ordering::Relaxed) != 2 {
            if notify.announce() {
                event.wait();
            }
            notify.accept();
        }
        notifier.join().unwrap();
    });
}

/// Rule 3.4: a notification that comes while the loop does not block is still there for the next
/// blocking poll, and exactly one such poll consumes it.
#[test]
fn only_a_blocking_poll_consumes() {
    loom::model(|| {
        let notify = Notify::new();
        assert!(!notify.publish(), "nobody sleeps");
        assert!(!notify.announce(), "the next blocking poll does not sleep");
        assert!(notify.accept());
        assert!(notify.announce(), "and the one after that does");
        assert!(!notify.accept());
    });
}

/// Many notifiers during one sleep raise the event once.
#[test]
fn one_sleep_costs_one_event() {
    loom::model(|| {
        let notify = Arc::new(Notify::new());
        assert!(notify.announce());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let notify = notify.clone();
                thread::spawn(move || notify.publish())
            })
            .collect();
        let raised = threads.into_iter().map(|t| t.join().unwrap());
        assert_eq!(raised.filter(|raised| *raised).count(), 1);
    });
}

/// The canary: the same protocol without its fences loses wake-ups, and the model sees it.
#[test]
#[should_panic(expected = "both looked before the other published")]
fn canary_without_fences() {
    loom::model(|| {
        let flags = Arc::new((AtomicBool::new(false), AtomicBool::new(false)));
        let other = flags.clone();
        let notifier = thread::spawn(move || {
            other.0.store(true, Ordering::Release);
            other.1.load(Ordering::Acquire)
        });
        flags.1.store(true, Ordering::Release);
        let loop_sees = flags.0.load(Ordering::Acquire);
        let notifier_sees = notifier.join().unwrap();
        assert!(
            loop_sees || notifier_sees,
            "both looked before the other published"
        );
    });
}

/// And with them it does not: the core of the protocol alone.
#[test]
fn fences_are_enough() {
    loom::model(|| {
        let flags = Arc::new((AtomicBool::new(false), AtomicBool::new(false)));
        let other = flags.clone();
        let notifier = thread::spawn(move || {
            other.0.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            other.1.load(Ordering::Relaxed)
        });
        flags.1.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let loop_sees = flags.0.load(Ordering::Relaxed);
        assert!(loop_sees || notifier.join().unwrap());
    });
}

/// A waiter of rule 3.8 and its loop.
struct WaitPoint {
    waiters: Waiters,
    notify: Notify,
    event: Event,
    done: AtomicU64,
}

impl WaitPoint {
    fn new() -> Arc<Self> {
        Arc::new(WaitPoint {
            waiters: Waiters::new(),
            notify: Notify::new(),
            event: Event::default(),
            done: AtomicU64::new(0),
        })
    }

    fn wait_for(&self, all: u64) {
        while self.done.load(Ordering::Relaxed) != all {
            if self.notify.announce() {
                self.event.wait();
            }
            self.notify.accept();
        }
    }

    fn change(&self, bit: u64) {
        self.done.fetch_or(bit, Ordering::Relaxed);
        if self.waiters.must_wake() && self.notify.publish() {
            self.event.raise();
        }
    }
}

/// Rule 3.8: the waiter counts itself before testing, so it sees what two others change or is woken
/// for it, whatever happens when; loom reports one that sleeps for ever.
#[test]
fn no_change_is_slept_over() {
    bounded(|| {
        let point = WaitPoint::new();
        let changers: Vec<_> = [0b01, 0b10]
            .into_iter()
            .map(|bit| {
                let point = point.clone();
                thread::spawn(move || point.change(bit))
            })
            .collect();
        point.waiters.enter();
        point.wait_for(0b11);
        point.waiters.leave();
        changers.into_iter().for_each(|c| c.join().unwrap());
        assert!(!point.waiters.must_wake(), "nobody waits any more");
    });
}

/// The canary: who tests first and counts then is not woken for what it did not see.
#[test]
#[should_panic(expected = "a change was slept over")]
fn canary_test_before_count() {
    loom::model(|| {
        let point = WaitPoint::new();
        let other = point.clone();
        let changer = thread::spawn(move || {
            other.done.store(1, Ordering::Relaxed);
            other.waiters.must_wake()
        });
        let seen = point.done.load(Ordering::Relaxed) == 1;
        point.waiters.enter();
        let woken = changer.join().unwrap();
        drop(point);
        assert!(seen || woken, "a change was slept over");
    });
}

/// A bottom half, a list, and what its schedulers wrote.
struct World {
    state: BhState,
    list: Mutex<Vec<Ticket>>,
    written: [AtomicU64; 2],
    runs: AtomicU64,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(World {
            state: BhState::new(),
            list: Mutex::new(Vec::new()),
            written: [AtomicU64::new(0), AtomicU64::new(0)],
            runs: AtomicU64::new(0),
        })
    }

    fn schedule(&self) {
        if let Some(ticket) = self.state.schedule(false) {
            self.list.lock().unwrap().push(ticket);
        }
    }

    /// Runs what is in the list; gives what the last callback saw.
    fn run(&self) -> Option<[u64; 2]> {
        let mut saw = None;
        let entries = std::mem::take(&mut *self.list.lock().unwrap());
        for ticket in entries {
            if self.state.begin(ticket) == Entry::Regular {
                self.runs
                    .store(self.runs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                saw = Some(self.written.each_ref().map(|w| w.load(Ordering::Relaxed)));
            }
        }
        saw
    }
}

/// Rules 3.2, 3.3: two threads write and schedule while the loop runs. It runs once or twice, and
/// the last run sees what both wrote, also the one whose schedule found it scheduled already.
#[test]
fn every_scheduler_is_seen() {
    loom::model(|| {
        let world = World::new();
        let threads: Vec<_> = (0..2)
            .map(|n| {
                let world = world.clone();
                thread::spawn(move || {
                    world.written[n].store(1, Ordering::Relaxed);
                    world.schedule();
                })
            })
            .collect();
        let early = world.run();
        // What the threads wrote must reach the callback through the state alone; the joins come
        // after the run that counts, unless that run has to wait for the schedulers.
        let both = early == Some([1, 1]);
        threads.into_iter().for_each(|t| t.join().unwrap());
        let late = world.run();
        assert!(
            both || late == Some([1, 1]),
            "early {early:?}, late {late:?}"
        );
        assert!((1..=2).contains(&world.runs.load(Ordering::Relaxed)));
        assert_eq!(world.run(), None, "nothing is left");
    });
}

/// Rule 3.3 for the scheduler that finds it scheduled: what it wrote is seen by the run that its
/// schedule fell to, without any other synchronisation.
#[test]
fn a_redundant_schedule_publishes_too() {
    loom::model(|| {
        let world = World::new();
        world.schedule();
        let other = world.clone();
        let scheduler = thread::spawn(move || {
            other.written[1].store(1, Ordering::Relaxed);
            other.state.schedule(false)
        });
        let saw = world.run().expect("it was scheduled");
        let again = scheduler.join().unwrap();
        assert!(
            again.is_some() || saw[1] == 1,
            "scheduled in vain, and not seen"
        );
    });
}

/// Rule 3.2: cancel against the loop: either it says that it prevented the run, or the run
/// happened.
#[test]
fn cancelled_or_run_never_both() {
    loom::model(|| {
        let world = World::new();
        world.schedule();
        let other = world.clone();
        let canceller = thread::spawn(move || other.state.cancel());
        world.run();
        let cancelled = canceller.join().unwrap();
        assert_eq!(world.runs.load(Ordering::Relaxed), u64::from(!cancelled));
    });
}

/// Rule 3.2: scheduled again while an old entry of a cancelled schedule is still in the list: one
/// run.
#[test]
fn cancel_and_schedule_again_runs_once() {
    loom::model(|| {
        let world = World::new();
        world.schedule();
        let other = world.clone();
        let again = thread::spawn(move || {
            let prevented = other.state.cancel();
            other.schedule();
            prevented
        });
        world.run();
        let prevented = again.join().unwrap();
        world.run();
        assert_eq!(
            world.runs.load(Ordering::Relaxed),
            if prevented { 1 } else { 2 }
        );
    });
}

/// Rule 3.2: once delete has returned, no run begins.
#[test]
fn deleted_never_begins() {
    loom::model(|| {
        let world = World::new();
        world.schedule();
        let other = world.clone();
        let deleter = thread::spawn(move || {
            other.state.delete();
            other.runs.load(Ordering::Relaxed)
        });
        world.run();
        deleter.join().unwrap();
        let before = world.runs.load(Ordering::Relaxed);
        world.schedule();
        assert_eq!(world.run(), None);
        assert_eq!(world.runs.load(Ordering::Relaxed), before);
    });
}

/// Rule 3.11: a home that polls under the context lock, and a thread that needs the lock. Whatever
/// happens when, the poll ends and the thread gets its turn, with nobody else inside.
#[test]
fn a_waiter_makes_the_owner_leave_its_poll() {
    bounded(|| {
        let state = Arc::new((
            Turns::new(),
            Notify::new(),
            Event::default(),
            AtomicU64::new(0),
        ));
        let theirs = state.clone();
        let waiter = thread::spawn(move || {
            let (turns, notify, event, inside) = &*theirs;
            turns.acquire(1, (), || {
                if notify.publish() {
                    event.raise();
                }
            });
            turns.acquire(1, (), || unreachable!("it is ours"));
            inside.fetch_add(1, Ordering::Relaxed);
            turns.release().unwrap();
            turns.release().unwrap();
        });
        let (turns, notify, event, inside) = &*state;
        while inside.load(Ordering::Relaxed) == 0 {
            turns.acquire(1, (), || ());
            let before = inside.load(Ordering::Relaxed);
            if before == 0 && notify.announce() {
                event.wait();
            }
            notify.accept();
            assert_eq!(
                inside.load(Ordering::Relaxed),
                before,
                "nobody else is inside"
            );
            turns.release().unwrap();
            loom::thread::yield_now();
        }
        waiter.join().unwrap();
    });
}
