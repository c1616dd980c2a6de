//! `CoRwLock` (rule 4.3): alone, between threads, unwound, and under random load.

mod support;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use coblock_coroutine::{Co, CoRwLock, Coroutine, Hold, Schedule, State, Upgraded, start_remote};
use proptest::collection::vec;
use proptest::prelude::*;
use support::{TestHome, refused};

type Log = Rc<RefCell<Vec<&'static str>>>;
type Lock = Rc<CoRwLock<u32>>;

/// A coroutine that runs `body`, entered until it first suspends.
fn begin(body: impl for<'a> FnOnce(&'a Co) + 'static) -> Coroutine {
    let co = Coroutine::new(body).unwrap();
    co.enter();
    co
}

/// One that reads, holds it over one suspend, and tells both ends.
fn reader(lock: &Lock, log: &Log, begins: &'static str, ends: &'static str) -> Coroutine {
    let (lock, log) = (lock.clone(), log.clone());
    begin(move |co| {
        let guard = lock.read(co);
        log.borrow_mut().push(begins);
        co.suspend();
        log.borrow_mut().push(ends);
        drop(guard);
    })
}

/// The same, writing.
fn writer(lock: &Lock, log: &Log, begins: &'static str, ends: &'static str) -> Coroutine {
    let (lock, log) = (lock.clone(), log.clone());
    begin(move |co| {
        let mut guard = lock.write(co);
        *guard += 1;
        log.borrow_mut().push(begins);
        co.suspend();
        log.borrow_mut().push(ends);
        drop(guard);
    })
}

fn fresh() -> (Lock, Log) {
    (Rc::new(CoRwLock::new(0)), Log::default())
}

/// Rule 4.3: readers share, a writer is alone; and everybody else waits for it.
#[test]
fn readers_share_and_a_writer_is_alone() {
    let (lock, log) = fresh();
    let r1 = reader(&lock, &log, "+r1", "-r1");
    let r2 = reader(&lock, &log, "+r2", "-r2");
    assert_eq!((lock.readers(), lock.waiting()), (2, 0));
    let w = writer(&lock, &log, "+w", "-w");
    r1.enter();
    assert_eq!(lock.waiting(), 1, "one reader is left");
    r2.enter();
    assert_eq!(lock.waiting(), 0);
    let r3 = reader(&lock, &log, "+r3", "-r3");
    w.enter();
    r3.enter();
    assert_eq!(
        *log.borrow(),
        ["+r1", "+r2", "-r1", "-r2", "+w", "-w", "+r3", "-r3"]
    );
    drop((r1, r2, r3, w));
    assert_eq!(Rc::into_inner(lock).unwrap().into_inner(), 1);
}

/// Rule 4.3: tickets are served in order, and a reader waits if anyone queues, even while others
/// read.
#[test]
fn a_reader_waits_if_anyone_queues() {
    let (lock, log) = fresh();
    let r1 = reader(&lock, &log, "+r1", "-r1");
    let w2 = writer(&lock, &log, "+w2", "-w2");
    let r3 = reader(&lock, &log, "+r3", "-r3");
    let w4 = writer(&lock, &log, "+w4", "-w4");
    let r5 = reader(&lock, &log, "+r5", "-r5");
    assert_eq!((lock.readers(), lock.waiting()), (1, 4));
    for co in [&r1, &w2, &r3, &w4, &r5] {
        co.enter();
    }
    assert_eq!(
        *log.borrow(),
        [
            "+r1", "-r1", "+w2", "-w2", "+r3", "-r3", "+w4", "-w4", "+r5", "-r5"
        ]
    );
}

/// Rule 4.3: a woken reader wakes the next reader, up to the next writer.
#[test]
fn a_woken_reader_wakes_the_next_reader() {
    let (lock, log) = fresh();
    let w = writer(&lock, &log, "+w", "-w");
    let r1 = reader(&lock, &log, "+r1", "-r1");
    let r2 = reader(&lock, &log, "+r2", "-r2");
    let w3 = writer(&lock, &log, "+w3", "-w3");
    let r4 = reader(&lock, &log, "+r4", "-r4");
    w.enter();
    assert_eq!(*log.borrow(), ["+w", "-w", "+r1", "+r2"]);
    assert_eq!((lock.readers(), lock.waiting()), (2, 2));
    for co in [&r2, &r1, &w3, &r4] {
        co.enter();
    }
    assert_eq!(
        log.borrow()[4..],
        ["-r2", "-r1", "+w3", "-w3", "+r4", "-r4"]
    );
}

/// /locking/co-rwlock/upgrade: a sole reader that asks for an upgrade queues behind a writer that
/// waits: the writer runs first, the upgrade after it, and is told so; both end.
#[test]
fn upgrade() {
    let (lock, log) = fresh();
    let (lock2, log2) = (lock.clone(), log.clone());
    let upgrader = begin(move |co| {
        let guard = lock2.read(co);
        co.suspend();
        let (mut guard, told) = guard.upgrade(co);
        assert_eq!(told, Upgraded::OthersMayHaveWritten);
        assert_eq!(*guard, 1, "the writer has run");
        *guard += 10;
        log2.borrow_mut().push("upgraded");
    });
    let w = writer(&lock, &log, "+w", "-w");
    assert_eq!(
        upgrader.enter(),
        State::Suspended,
        "it gave up its side and queues"
    );
    assert_eq!(w.enter(), State::Finished);
    assert!(upgrader.finished());
    assert_eq!(*log.borrow(), ["+w", "-w", "upgraded"]);
}

/// Rule 4.3: alone, an upgrade is at once and undisturbed; with other readers it waits for them,
/// and of two the second is told that the first may have written.
#[test]
fn upgrade_alone_and_twice() {
    let (lock, _) = fresh();
    let (alone, first, second) = (lock.clone(), lock.clone(), lock.clone());
    let co = begin(move |co| {
        let (mut guard, told) = alone.read(co).upgrade(co);
        assert_eq!(told, Upgraded::Undisturbed);
        *guard = 5;
    });
    assert!(co.finished());
    let a = begin(move |co| {
        let guard = first.read(co);
        co.suspend();
        let (mut guard, told) = guard.upgrade(co);
        assert_eq!((told, *guard), (Upgraded::Undisturbed, 5));
        *guard = 6;
    });
    let b = begin(move |co| {
        let guard = second.read(co);
        co.suspend();
        let (guard, told) = guard.upgrade(co);
        assert_eq!((told, *guard), (Upgraded::OthersMayHaveWritten, 6));
    });
    assert_eq!(
        a.enter(),
        State::Suspended,
        "the other reader is still there"
    );
    // Its leaving lets the first one in, whose end lets it in: all from the frame that entered it.
    b.enter();
    assert!(b.finished());
    assert!(a.finished());
}

/// /locking/co-rwlock/downgrade: W1, R and W2 wait behind a reader. When that unlocks, W1 gets the
/// lock and downgrades, without waiting; R then gets in, W2 last; nobody hangs.
#[test]
fn downgrade() {
    let (lock, log) = fresh();
    let r0 = reader(&lock, &log, "+r0", "-r0");
    let (lock1, log1) = (lock.clone(), log.clone());
    let w1 = begin(move |co| {
        let mut guard = lock1.write(co);
        *guard = 7;
        log1.borrow_mut().push("+w1");
        let guard = guard.downgrade();
        log1.borrow_mut().push("w1 reads");
        assert_eq!(*guard, 7);
        co.suspend();
        log1.borrow_mut().push("-w1");
    });
    let r = reader(&lock, &log, "+r", "-r");
    let w2 = writer(&lock, &log, "+w2", "-w2");
    r0.enter();
    assert_eq!(*log.borrow(), ["+r0", "-r0", "+w1", "w1 reads", "+r"]);
    assert_eq!((lock.readers(), lock.waiting()), (2, 1));
    for co in [&w1, &r, &w2] {
        co.enter();
    }
    assert_eq!(log.borrow()[5..], ["-w1", "-r", "+w2", "-w2"]);
    assert!([&r0, &w1, &r, &w2].iter().all(|co| co.finished()));
}

/// Rule 4.3: a wake that is no grant lets nobody pass.
#[test]
fn spurious_wakes_do_not_pass() {
    let (lock, log) = fresh();
    let w = writer(&lock, &log, "+w", "-w");
    let r = reader(&lock, &log, "+r", "-r");
    assert_eq!(
        r.enter(),
        State::Suspended,
        "entered by hand, without a grant"
    );
    assert_eq!(*log.borrow(), ["+w"]);
    w.enter();
    assert_eq!(*log.borrow(), ["+w", "-w", "+r"]);
    r.enter();
}

/// Rule 1.10, 4.3: one that is unwound while it waits leaves the queue, and those behind it go on:
/// a writer that kept readers waiting, a reader in a chain, a holder.
#[test]
fn unwound_ones_leave() {
    let (lock, log) = fresh();
    let r1 = reader(&lock, &log, "+r1", "-r1");
    let w2 = writer(&lock, &log, "+w2", "-w2");
    let r3 = reader(&lock, &log, "+r3", "-r3");
    drop(w2);
    assert_eq!(
        *log.borrow(),
        ["+r1", "+r3"],
        "no writer is in front of it any more"
    );
    let w4 = writer(&lock, &log, "+w4", "-w4");
    drop(r1);
    drop(r3);
    assert_eq!(
        *log.borrow(),
        ["+r1", "+r3", "+w4"],
        "unwound holders unlock"
    );
    drop(w4);
    assert_eq!((lock.readers(), lock.waiting()), (0, 0));
}

/// Rules 1.10, 4.3: locking twice, in any combination, is refused and names both places; leaving it
/// from elsewhere and finishing with it are refused, too.
#[test]
fn refusals() {
    let (lock, _) = fresh();
    let all = begin(move |co| {
        for (name, write_first, write_then) in [
            ("read, read", false, false),
            ("read, write", false, true),
            ("write, read", true, false),
            ("write, write", true, true),
        ] {
            let (mut r, mut w) = (None, None);
            if write_first {
                w = Some(lock.write(co));
            } else {
                r = Some(lock.read(co));
            }
            assert_eq!(co.holds(Hold::Lock), 1);
            let why = refused(|| {
                if write_then {
                    drop(lock.write(co));
                } else {
                    drop(lock.read(co));
                }
            });
            assert!(why.contains("locked at"), "{name}: {why}");
            assert_eq!(why.matches("rwlock.rs").count(), 3, "{name}: {why}");
            drop((r, w));
            assert_eq!(co.holds(Hold::Lock), 0);
        }
    });
    assert!(all.finished());
    let lock: &'static CoRwLock<u32> = Box::leak(Box::new(CoRwLock::new(0)));
    let forgets = Coroutine::new(|co| std::mem::forget(lock.read(co))).unwrap();
    let why = refused(|| forgets.enter());
    assert!(why.contains("finished while it holds 1 lock"), "{why}");

    // A guard that another coroutine drops.
    let lock: &'static CoRwLock<u32> = Box::leak(Box::new(CoRwLock::new(0)));
    let slot = Rc::new(RefCell::new(None));
    let inner = slot.clone();
    let owner = begin(move |co| {
        *inner.borrow_mut() = Some(lock.write(co));
        co.suspend();
    });
    let guard = slot.borrow_mut().take().unwrap();
    let guard = RefCell::new(Some(std::mem::ManuallyDrop::new(guard)));
    let why = refused(|| drop(std::mem::ManuallyDrop::into_inner(guard.take().unwrap())));
    assert!(why.contains("unlocked outside coroutines"), "{why}");
    std::mem::forget(owner);
}

/// Rule 4.3 over two homes: readers never see a half-made change, no writer loses one, and the
/// woken one runs on its own thread.
#[test]
fn contention_over_two_homes() {
    let lock = Arc::new(CoRwLock::new((0u32, 0u32)));
    let (here, there) = (TestHome::new("here"), TestHome::new("there"));
    let done = Arc::new(AtomicU32::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    for home in [&here, &there] {
        let schedule: Arc<dyn Schedule> = home.clone();
        for i in 0..8 {
            let (lock, done, home) = (lock.clone(), done.clone(), home.clone());
            start_remote(&schedule, "contender", move |co| {
                for n in 0..200 {
                    if (n + i) % 4 == 0 {
                        let mut guard = lock.write(co);
                        guard.0 += 1;
                        // Gives others the chance to see it half done.
                        co.wake_handle().schedule();
                        co.suspend();
                        guard.1 += 1;
                        if n % 8 == 0 {
                            let guard = guard.downgrade();
                            assert_eq!(guard.0, guard.1);
                        }
                    } else {
                        let guard = lock.read(co);
                        assert_eq!(guard.0, guard.1);
                        if n % 5 == 0 {
                            let (guard, _) = guard.upgrade(co);
                            assert_eq!(guard.0, guard.1);
                        }
                    }
                    assert!(home.is_home(), "on its own thread");
                }
                done.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
        }
    }
    let other = {
        let (there, stop) = (there.clone(), stop.clone());
        std::thread::spawn(move || {
            there.adopt();
            there.drive_until(|| stop.load(Ordering::SeqCst));
        })
    };
    here.drive_until(|| done.load(Ordering::SeqCst) == 16);
    stop.store(true, Ordering::SeqCst);
    other.join().unwrap();
    let lock = Arc::into_inner(lock).unwrap().into_inner();
    assert_eq!(lock, (800, 800));
}

/// What a coroutine does next, and what the lock looks like then.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Read,
    Write,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Rule 4.3 against a model: a list of tickets, admitted from its front. Who holds the lock
    /// after each step is who the model says.
    #[test]
    fn admits_as_the_model(script in vec((any::<bool>(), 0usize..6), 1..60)) {
        let lock: Rc<CoRwLock<()>> = Rc::new(CoRwLock::new(()));
        let holding: Rc<RefCell<Vec<usize>>> = Rc::default();
        // The model: tickets in order, the first `admitted` of them hold the lock.
        let mut tickets: Vec<(usize, Kind)> = Vec::new();
        let mut admitted = 0;
        let mut live: Vec<(usize, Coroutine)> = Vec::new();
        for (n, (write, which)) in script.into_iter().enumerate() {
            if which < 3 || live.is_empty() {
                let kind = if write { Kind::Write } else { Kind::Read };
                let (lock, holding) = (lock.clone(), holding.clone());
                live.push((n, begin(move |co| {
                    let (r, w) = match kind {
                        Kind::Read => (Some(lock.read(co)), None),
                        Kind::Write => (None, Some(lock.write(co))),
                    };
                    holding.borrow_mut().push(n);
                    co.suspend();
                    holding.borrow_mut().retain(|who| *who != n);
                    drop((r, w));
                })));
                tickets.push((n, kind));
            } else {
                // Some holder ends, or (every second time) any one is dropped where it stands.
                let at = which % live.len();
                let (who, co) = live.swap_remove(at);
                let position = tickets.iter().position(|(t, _)| *t == who).unwrap();
                if position < admitted {
                    admitted -= 1;
                    co.enter();
                } else {
                    drop(co);
                }
                tickets.remove(position);
            }
            while let Some((_, kind)) = tickets.get(admitted) {
                let room = match kind {
                    Kind::Write => admitted == 0,
                    Kind::Read => tickets[..admitted].iter().all(|(_, k)| *k == Kind::Read),
                };
                if !room { break }
                admitted += 1;
            }
            let mut want: Vec<usize> = tickets[..admitted].iter().map(|(t, _)| *t).collect();
            let mut have = holding.borrow().clone();
            want.sort_unstable();
            have.sort_unstable();
            prop_assert_eq!(have, want);
            prop_assert_eq!(lock.waiting(), tickets.len() - admitted);
        }
    }
}
