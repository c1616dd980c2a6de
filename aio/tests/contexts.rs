//! Contexts and their homes: who may poll (rule 3.1), what may be left at the end (rule 3.3), what
//! is current (rule 3.9), coroutines that wake each other and work elsewhere (rule 3.10), I/O
//! threads.

mod support;

use coblock_aio::{ContextOptions, EventNotifier, FdHandler, Home, IoThread, co};
use coblock_coroutine::{CoMutex, Coroutine, WakeHandle};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Count, Log, each_drive, each_engine, options};

/// The message of the panic of `f`.
#[track_caller]
fn refusal<R>(f: impl FnOnce() -> R) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else {
        panic!("it was not refused")
    };
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| {
        (*panic
            .downcast_ref::<&str>()
            .expect("a panic with a message"))
        .to_owned()
    })
}

fn thread(name: &str) -> IoThread {
    IoThread::new(ContextOptions {
        name: name.to_owned(),
        ..options("auto")
    })
    .unwrap()
}

/// Rules 3.1, 4.4: no poll in a coroutine, nested or not; the message names the locks that it
/// holds.
#[test]
fn poll_in_a_coroutine_is_refused() {
    each_engine(|home, _| {
        let message = refusal(|| home.run(|_co| coblock_aio::poll(false)));
        assert!(message.contains("(rules 3.1, 4.4)"), "{message}");
        assert!(message.contains("holds 0 coroutine lock(s)"), "{message}");
        let mutex = CoMutex::new(());
        let message = refusal(|| {
            home.run(|c| {
                let _guard = mutex.lock(c);
                coblock_aio::poll(true)
            })
        });
        assert!(message.contains("holds 1 coroutine lock(s)"), "{message}");
        let outside = refusal(|| coblock_aio::poll(false));
        assert!(outside.contains("drives no context"), "{outside}");
    });
}

/// Rule 3.3: what is left when a context ends is refused, by name, each kind.
#[test]
fn leftovers_are_refused_by_name() {
    let closing = |leave: &dyn Fn(&Home) -> Box<dyn std::any::Any>| {
        let home = Home::new(options("threads")).unwrap();
        let kept = leave(&home);
        let message = refusal(AssertUnwindSafe(|| home.close()));
        assert!(
            message.starts_with("context 'test' closed with live "),
            "{message}"
        );
        // The thing goes away after its home has.
        drop(kept);
        message
    };
    let message = closing(&|home| Box::new(home.context().bottom_half("forgotten", || ())));
    assert!(message.contains("bottom half 'forgotten'"), "{message}");
    let message = closing(&|home| {
        let timer = home.context().timer("late", || ());
        timer.arm_in(Duration::from_secs(1000));
        Box::new(timer)
    });
    assert!(message.contains("timer 'late'"), "{message}");
    let message = closing(&|home| {
        let event = EventNotifier::new().unwrap();
        let handler = FdHandler::new().on_read(|| ());
        home.context()
            .set_fd_handler(event.as_fd().as_raw_fd(), handler)
            .unwrap();
        Box::new(event)
    });
    assert!(message.contains("handler of descriptor"), "{message}");
    let message = closing(&|home| {
        let handle: Rc<RefCell<Option<WakeHandle>>> = Rc::default();
        for _ in 0..2 {
            let keep = handle.clone();
            home.spawn("sleeper", move |c| {
                keep.replace(Some(c.wake_handle()));
                c.suspend();
            });
        }
        Box::new(handle)
    });
    assert!(message.contains("2 coroutine(s) 'sleeper'"), "{message}");
}

/// Rule 3.3: what was posted before the end still runs; afterwards posting is refused.
#[test]
fn one_shots_run_before_the_end() {
    let home = Home::new(options("threads")).unwrap();
    let (runs, context) = (Count::default(), home.context().clone());
    let (count, inner) = (runs.clone(), context.clone());
    context.oneshot(move || {
        count.add();
        inner.oneshot(move || {
            count.add();
        });
    });
    home.close();
    assert_eq!(runs.get(), 2);
    let message = refusal(|| context.oneshot(|| ()));
    assert_eq!(
        message,
        "one-shot posted to context 'test', which is closed"
    );
}

/// Rule 3.9: the current context is that of the innermost poll or `with`; threads have none.
#[test]
fn current_context() {
    let (a, b) = (
        Home::new(options("none")).unwrap(),
        Home::new(options("none")).unwrap(),
    );
    assert!(coblock_aio::current().is_none());
    assert_eq!(coblock_aio::current_id(), None);
    a.with(|| {
        assert!(a.context().is_current());
        b.with(|| {
            assert_eq!(coblock_aio::current_id(), Some(b.context().id()));
            assert!(!a.context().is_current());
        });
        assert!(Arc::ptr_eq(&coblock_aio::current().unwrap(), a.context()));
        std::thread::scope(|s| {
            s.spawn(|| assert!(coblock_aio::current().is_none()));
        });
    });
    refusal(|| a.with(|| panic!("the current context is given back by a panic")));
    assert!(coblock_aio::current().is_none());
    assert_ne!(a.context().id(), b.context().id());
    b.run(|_| assert!(b.context().is_current()));
    a.close();
    b.close();
}

/// A panic in a callback or coroutine comes out of the poll; what else was due runs in the next
/// one.
#[test]
fn a_panic_does_not_lose_the_rest_of_the_pass() {
    each_drive(|home, drive| {
        let log = Log::default();
        home.context().oneshot(|| panic!("first"));
        let say = log.clone();
        home.context().oneshot(move || say.say("second"));
        assert_eq!(refusal(|| drive.poll(true)), "first");
        assert!(drive.poll(true));
        assert_eq!(log.take(), ["second"]);
        home.spawn("panics later", |c| {
            co::reschedule(c);
            panic!("third");
        });
        assert_eq!(refusal(|| drive.poll(true)), "third");
        assert_eq!(home.context().live_coroutines(), 0);
    });
}

/// Two coroutines wake each other 25 000 times: chained, not nested.
/// (/aio/coroutine/queue-chaining)
#[test]
fn queue_chaining() {
    each_engine(|home, _| {
        const ROUNDS: u32 = 25_000;
        let handles: [Rc<RefCell<Option<WakeHandle>>>; 2] = Default::default();
        let (turns, ended) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        for me in 0..2u32 {
            let (handles, turns, ended) = (handles.clone(), turns.clone(), ended.clone());
            home.spawn("ping-pong", move |c| {
                handles[me as usize].replace(Some(c.wake_handle()));
                let other = &handles[1 - me as usize];
                while turns.get() < ROUNDS {
                    if turns.get() % 2 == me
                        && let Some(other) = other.borrow().as_ref()
                    {
                        turns.set(turns.get() + 1);
                        other.wake();
                    }
                    c.suspend();
                }
                ended.set(ended.get() + 1);
                if let Some(other) = other.borrow().as_ref() {
                    other.wake();
                }
            });
        }
        let first = handles[0].borrow().clone().unwrap();
        while ended.get() < 2 {
            home.with(|| first.wake());
            home.poll(false);
        }
        assert_eq!(turns.get(), ROUNDS);
    });
}

/// Rule 3.10: woken from a thread that does not drive its context, a coroutine does not run there;
/// it is scheduled and runs at its home's next poll. (/aio/coroutine/worker-thread-co-enter)
#[test]
fn woken_from_a_worker_thread() {
    each_engine(|home, _| {
        let home_thread = std::thread::current().id();
        let (handle, resumed) = (Rc::new(RefCell::new(None)), Count::default());
        let (keep, count) = (handle.clone(), resumed.clone());
        home.spawn("woken", move |c| {
            keep.replace(Some(c.wake_handle()));
            c.suspend();
            assert_eq!(std::thread::current().id(), home_thread);
            count.add();
        });
        let handle = handle.take().unwrap();
        std::thread::spawn(move || handle.wake()).join().unwrap();
        assert_eq!(resumed.get(), 0, "not there, and not before the poll");
        assert!(home.poll(true));
        assert_eq!(resumed.get(), 1);
    });
}

/// Rule 3.10: "same context, outside a coroutine: enter now".
#[test]
fn woken_at_home_runs_now() {
    each_engine(|home, _| {
        let handle = Rc::new(RefCell::new(None));
        let keep = handle.clone();
        home.spawn("woken", move |c| {
            keep.replace(Some(c.wake_handle()));
            c.suspend();
        });
        let handle = handle.take().unwrap();
        assert_eq!(home.context().live_coroutines(), 1);
        home.with(|| handle.wake());
        assert_eq!(
            home.context().live_coroutines(),
            0,
            "it has run, without a poll"
        );
        handle.wake();
        assert!(!home.poll(false), "stale: nothing");
    });
}

/// Spawned from another thread, a coroutine begins in its context; scheduled ones run in order.
#[test]
fn spawned_from_elsewhere() {
    each_drive(|home, drive| {
        let log = Log::default();
        let (context, say) = (home.context().clone(), log.clone());
        std::thread::spawn(move || {
            for name in ["a", "b", "c"] {
                let say = say.clone();
                context
                    .spawn(name, move |c| {
                        say.say(format!("{name} begins"));
                        co::reschedule(c);
                        say.say(format!("{name} ends"));
                    })
                    .unwrap();
            }
        })
        .join()
        .unwrap();
        assert_eq!(home.context().live_coroutines(), 3);
        assert!(drive.poll(true));
        assert!(drive.poll(true));
        assert_eq!(
            log.take(),
            [
                "a begins", "b begins", "c begins", "a ends", "b ends", "c ends"
            ]
        );
        assert_eq!(home.context().live_coroutines(), 0);
    });
}

/// A coroutine with I/O in flight may have been spawned in a coroutine; a hand-driven one may do
/// I/O too, resumed by its completion.
#[test]
fn io_in_nested_and_hand_driven_coroutines() {
    each_engine(|home, engine| {
        let file = Rc::new(tempfile::tempfile().unwrap());
        let done = Rc::new(Cell::new(0));
        home.run(|outer| {
            for n in 0..3u64 {
                let (file, done) = (file.clone(), done.clone());
                coblock_aio::spawn("nested", move |c| {
                    co::write(c, file.as_fd(), n, (&[7u8]).into()).unwrap();
                    done.set(done.get() + 1);
                })
                .unwrap();
            }
            while done.get() < 3 {
                co::reschedule(outer);
            }
        });
        let (by_hand, ended) = (file.clone(), done.clone());
        let coroutine = Coroutine::new(move |c| {
            let mut buf = [0; 8];
            assert_eq!(
                co::read(c, by_hand.as_fd(), 0, (&mut buf).into()).unwrap(),
                3
            );
            ended.set(100);
        })
        .unwrap();
        home.with(|| coroutine.enter());
        drop(coroutine);
        while done.get() < 100 {
            home.poll(true);
        }
        assert_eq!(
            done.get(),
            100,
            "{engine}: dropping the handle changed nothing"
        );
    });
}

/// `run_in`: work in another context, borrowing from the caller; errors and panics come back.
#[test]
fn run_in_another_context() {
    each_engine(|home, _| {
        let other = thread("other");
        let mut text = String::from("there");
        let result = home.run(|c| {
            let here = coblock_aio::current_id();
            let result = co::run_in(c, other.context(), "visitor", |c| {
                assert!(other.context().is_current());
                assert_ne!(coblock_aio::current_id(), here);
                assert_eq!(other.context().live_coroutines(), 1);
                co::sleep(c, Duration::from_millis(1));
                text.push_str(" and back");
                std::thread::current().name().unwrap().to_owned()
            });
            assert_eq!(coblock_aio::current_id(), here);
            result.unwrap()
        });
        assert_eq!(
            (result.as_str(), text.as_str()),
            ("other", "there and back")
        );
        let message = refusal(|| {
            home.run(|c| co::run_in(c, other.context(), "visitor", |_| panic!("over there")))
        });
        assert_eq!(message, "over there");
        assert_eq!(
            home.run(|c| co::run_in(c, home.context(), "stays", |_| 1))
                .unwrap(),
            1
        );
        other.stop();
    });
}

/// `fd_ready`: several coroutines wait for descriptors, each is resumed for its own.
#[test]
fn waiting_for_descriptors() {
    each_engine(|home, engine| {
        let events: Vec<_> = (0..3)
            .map(|_| Arc::new(EventNotifier::new().unwrap()))
            .collect();
        let log = Log::default();
        for (n, event) in events.iter().enumerate() {
            let (event, log) = (event.clone(), log.clone());
            home.spawn("waiter", move |c| {
                co::fd_ready(c, event.as_fd(), co::Interest::Read).unwrap();
                log.say(format!("{n}"));
                co::fd_ready(c, event.as_fd(), co::Interest::Write).unwrap();
            });
        }
        for n in [2, 0, 1] {
            for _ in 0..5 {
                home.poll(false);
            }
            assert!(log.take().is_empty(), "{engine}: not before its time");
            events[n].set();
            while log.take() != [format!("{n}")] {
                home.poll(true);
            }
        }
        while home.context().live_coroutines() > 0 {
            home.poll(true);
        }
    });
}

/// Five threads run a bottom half each and are joined; contexts outlive their threads.
/// (/aio/multi/lifecycle)
#[test]
fn five_threads() {
    let threads: Vec<_> = (0..5).map(|n| thread(&format!("multi-{n}"))).collect();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for io in &threads {
        let (seen, context) = (seen.clone(), io.context().clone());
        io.context().oneshot(move || {
            assert!(context.is_current());
            seen.lock()
                .unwrap()
                .push(std::thread::current().name().unwrap().to_owned());
        });
    }
    let contexts: Vec<_> = threads.iter().map(|io| io.context().clone()).collect();
    threads.into_iter().for_each(IoThread::stop);
    seen.lock().unwrap().sort();
    assert_eq!(
        *seen.lock().unwrap(),
        (0..5).map(|n| format!("multi-{n}")).collect::<Vec<_>>()
    );
    assert_eq!(contexts[4].name(), "multi-4");
    assert_eq!(contexts[4].live_coroutines(), 0);
}

/// A thread that stops waits for its coroutines; a panic in it comes out of `stop`.
#[test]
fn stopping_a_thread() {
    let io = thread("stops");
    let done = Arc::new(AtomicBool::new(false));
    let flag = done.clone();
    io.context()
        .spawn("slow", move |c| {
            co::sleep(c, Duration::from_millis(50));
            flag.store(true, Ordering::Release);
        })
        .unwrap();
    io.stop();
    assert!(done.load(Ordering::Acquire));

    let io = thread("fails");
    io.context().oneshot(|| panic!("in the thread"));
    while !io_ended(&io) {
        std::thread::yield_now();
    }
    assert_eq!(refusal(|| io.stop()), "in the thread");
}

fn io_ended(io: &IoThread) -> bool {
    format!("{:?}", io.context()).contains("closed: true")
}

/// Coroutines of five threads schedule each other at random for a second or more: no wake-up is
/// lost, none is entered twice, and all stop when told. (/aio/multi/schedule)
#[test]
fn multi_schedule() {
    const THREADS: usize = 5;
    let threads: Vec<_> = (0..THREADS)
        .map(|n| thread(&format!("schedule-{n}")))
        .collect();
    let sleeping: Arc<[Mutex<Option<WakeHandle>>; THREADS]> = Arc::default();
    let (stop, wakes) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU32::new(0)),
    );
    let inside: Arc<[AtomicBool; THREADS]> = Arc::default();
    for (me, io) in threads.iter().enumerate() {
        let (sleeping, stop, wakes) = (sleeping.clone(), stop.clone(), wakes.clone());
        let inside = inside.clone();
        io.context()
            .spawn("scheduler", move |c| {
                let mut random = me as u64 + 1;
                while !stop.load(Ordering::Relaxed) {
                    let twice = inside[me].swap(true, Ordering::Relaxed);
                    assert!(!twice, "entered twice");
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let other = usize::try_from(random >> 33).unwrap() % THREADS;
                    *sleeping[me].lock().unwrap() = Some(c.wake_handle());
                    let woken = sleeping[other].lock().unwrap().take();
                    inside[me].store(false, Ordering::Relaxed);
                    if let Some(woken) = woken {
                        wakes.fetch_add(1, Ordering::Relaxed);
                        woken.wake();
                    } else {
                        // Nobody there: do not sleep, or all five might.
                        sleeping[me].lock().unwrap().take();
                        co::reschedule(c);
                        continue;
                    }
                    while sleeping[me].lock().unwrap().is_some() && !stop.load(Ordering::Relaxed) {
                        c.suspend();
                    }
                }
            })
            .unwrap();
    }
    let began = Instant::now();
    let busy = |limit| began.elapsed() < Duration::from_secs(limit);
    while busy(1) || busy(120) && wakes.load(Ordering::Relaxed) <= 1000 {
        std::thread::sleep(Duration::from_millis(10));
        // The one that may have been woken last wakes nobody: keep the game going.
        for slot in sleeping.iter() {
            if let Some(handle) = slot.lock().unwrap().take() {
                handle.wake();
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    for slot in sleeping.iter() {
        if let Some(handle) = slot.lock().unwrap().take() {
            handle.wake();
        }
    }
    threads.into_iter().for_each(IoThread::stop);
    assert!(
        wakes.load(Ordering::Relaxed) > 1000,
        "{wakes:?} wake-ups in two minutes"
    );
}

/// Rule 3.10, "reschedule self": to another context and back, many times, with errors on the way;
/// in the same context nothing happens; the counts of live coroutines go with it.
#[test]
fn there_and_back_again() {
    let (a, b) = (thread("here"), thread("there"));
    let (here, there, done) = (a.context().clone(), b.context().clone(), Count::default());
    for _ in 0..4 {
        let (here, there, done) = (here.clone(), there.clone(), done.clone());
        let spawn_in = here.clone();
        let travel = move |c: &coblock_coroutine::Co| {
            let file = tempfile::tempfile().unwrap();
            let read_only = std::fs::File::open("/proc/self/exe").unwrap();
            for round in 0..200u64 {
                // SAFETY: everything on this stack is Send, nothing is bound to a thread, and no
                // wake handle is made.
                unsafe { coblock_aio::move_to(c, &here) };
                assert!(here.is_current());
                assert_eq!(std::thread::current().name(), Some("here"));
                co::write(c, file.as_fd(), round, (&[7]).into()).unwrap();
                let error = co::write(c, read_only.as_fd(), 0, (&[7]).into()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EBADF));
                // SAFETY: as above.
                unsafe { coblock_aio::move_to(c, &there) };
                assert_eq!(std::thread::current().name(), Some("there"));
                // SAFETY: as above; the same context: nothing happens.
                unsafe { coblock_aio::move_to(c, &there) };
                let mut byte = [0];
                let count = co::read(c, file.as_fd(), round, (&mut byte).into()).unwrap();
                assert_eq!((count, byte), (1, [7]));
                if round % 10 == 0 {
                    co::sleep(c, Duration::from_micros(10));
                }
            }
            done.add();
        };
        spawn_in.spawn("traveller", travel).unwrap();
    }
    while done.get() < 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    a.stop();
    assert_eq!((here.live_coroutines(), there.live_coroutines()), (0, 0));
    b.stop();
}

/// A panic after a move comes out where the coroutine is now.
#[test]
fn a_panic_after_a_move() {
    let (a, b) = (Home::new(options("threads")).unwrap(), thread("elsewhere"));
    let there = b.context().clone();
    a.context()
        .spawn("traveller", move |c| {
            // SAFETY: nothing on this stack is bound to a thread.
            unsafe { coblock_aio::move_to(c, &there) };
            panic!("far away");
        })
        .unwrap();
    while a.context().live_coroutines() > 0 {
        a.poll(true);
    }
    a.poll(false);
    a.close();
    assert_eq!(refusal(|| b.stop()), "far away");
}
