//! Exhaustive models of what several threads touch at once: the very files of the crate, with
//! loom's primitives.
//!
//! `mark`: no wake is lost, whoever comes first (rule 3.10). `handoff`: never two owners, never
//! free while somebody waits, nobody forgotten (rule 4.1). `placed`, `newest`, `limit`: the arenas
//! (rule 1.7). Loom tries every order of the threads'
//! steps that the memory model allows.

// Which functions a model uses is its own affair.
#![allow(dead_code, missing_docs, reason = "the files are those of the crate")]

/// What the included files import from `super::sync`.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

    /// As the crate's, on loom's mutex.
    pub(crate) struct ThreadLock<T>(loom::sync::Mutex<T>);

    impl<T> ThreadLock<T> {
        pub(crate) fn new(value: T) -> ThreadLock<T> {
            ThreadLock(loom::sync::Mutex::new(value))
        }
        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
        pub(crate) fn into_inner(self) -> T {
            self.0.into_inner().unwrap()
        }
        pub(crate) fn get_mut(&mut self) -> &mut T {
            unreachable!("loom's mutex has no get_mut, and no model needs it")
        }
    }
}

#[path = "../src/protocol/handoff.rs"]
mod handoff;
#[path = "../src/protocol/limit.rs"]
mod limit;
#[path = "../src/protocol/mark.rs"]
mod mark;
#[path = "../src/stack/newest.rs"]
mod newest;
#[path = "../src/protocol/placed.rs"]
mod placed;
#[path = "../src/protocol/tickets.rs"]
mod tickets;

use std::collections::VecDeque;

use handoff::{Attempt, Handoff};
use limit::Limit;
use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex, Notify};
use mark::WakeMark;
use newest::Newest;

/// Whoever sees the bit of a control block sees what was written there before; two that are placed
/// at once, in one word, are both seen in the end.
#[test]
fn a_placed_control_block_is_whole() {
    use loom::cell::UnsafeCell;
    loom::model(|| {
        let placed = Arc::new(placed::Placed::new(64));
        let blocks = Arc::new([UnsafeCell::new(0_u64), UnsafeCell::new(0)]);
        let look = |placed: &placed::Placed, blocks: &[UnsafeCell<u64>; 2]| {
            let mut seen = 0;
            placed.for_each(64, |index| {
                // SAFETY: written before its bit was set, and never again; loom checks that.
                assert_eq!(blocks[index].with(|at| unsafe { *at }), 7 + index as u64);
                seen += 1;
            });
            seen
        };
        let placers: Vec<_> = (0..2)
            .map(|index| {
                let (placed, blocks) = (placed.clone(), blocks.clone());
                loom::thread::spawn(move || {
                    // SAFETY: only this thread writes it, once, before anybody looks.
                    blocks[index].with_mut(|at| unsafe { *at = 7 + index as u64 });
                    placed.set(index);
                })
            })
            .collect();
        look(&placed, &blocks);
        placers
            .into_iter()
            .for_each(|placer| placer.join().unwrap());
        assert_eq!(look(&placed, &blocks), 2);
    });
}

/// Never more stacks are taken than the limit leaves, whatever the order of taking and giving back;
/// what was given back can be had again.
#[test]
fn a_limit_is_never_passed() {
    loom::model(|| {
        let limit = Arc::new(Limit {
            taken: AtomicU64::new(0),
            most: AtomicU64::new(3),
        });
        let takers: Vec<_> = (0..2)
            .map(|_| {
                let limit = limit.clone();
                loom::thread::spawn(move || {
                    let got = limit.take(2);
                    assert!(
                        (1..=2).contains(&got),
                        "three are never gone after one taker"
                    );
                    assert!(limit.taken.load(Ordering::Relaxed) <= 3);
                    // As where the kernel refuses the second guard page.
                    limit.give_back(got - 1);
                })
            })
            .collect();
        takers.into_iter().for_each(|taker| taker.join().unwrap());
        assert_eq!(limit.taken.load(Ordering::Relaxed), 2, "one each");
        assert_eq!((limit.take(5), limit.take(1)), (1, 0));
    });
}

/// An arena in small: whoever walks the list meets only whole arenas and whole control blocks, while
/// others map arenas, carve slots and place control blocks.
#[test]
fn a_walk_meets_only_what_is_whole() {
    use loom::cell::UnsafeCell;

    struct Arena {
        low: UnsafeCell<u64>,
        carved: AtomicUsize,
        placed: placed::Placed,
        blocks: [UnsafeCell<u64>; 2],
        next: Option<&'static Arena>,
    }
    // SAFETY: loom watches each access of the cells.
    unsafe impl Sync for Arena {}

    struct World {
        newest: Newest<Arena>,
        /// The lock of the quarry: the arena that is carved, and the next slot.
        quarry: Mutex<Option<(&'static Arena, usize)>>,
    }
    // SAFETY: an arena may be used by any thread.
    unsafe impl Send for World {}
    // SAFETY: as above.
    unsafe impl Sync for World {}

    impl World {
        /// Carves a slot, of a new arena where there is none, and places its control block.
        fn carve_and_place(&self) {
            let mut quarry = self.quarry.lock().unwrap();
            let (arena, index) = quarry.unwrap_or_else(|| {
                let make = |next| Arena {
                    low: UnsafeCell::new(7),
                    carved: AtomicUsize::new(0),
                    placed: placed::Placed::new(2),
                    blocks: [UnsafeCell::new(0), UnsafeCell::new(0)],
                    next,
                };
                (self.newest.add(make), 0)
            });
            arena.carved.fetch_add(1, Ordering::Release);
            *quarry = Some((arena, index + 1));
            drop(quarry);
            // SAFETY: the slot is this thread's alone; nobody looks before its bit is set.
            arena.blocks[index].with_mut(|at| unsafe { *at = 7 + index as u64 });
            arena.placed.set(index);
        }

        fn walk(&self) -> usize {
            let (mut next, mut seen) = (self.newest.get(), 0);
            while let Some(arena) = next {
                next = arena.next;
                // SAFETY: written before the arena was added, and never again.
                assert_eq!(arena.low.with(|at| unsafe { *at }), 7);
                let carved = arena.carved.load(Ordering::Acquire);
                arena.placed.for_each(carved, |index| {
                    // SAFETY: written before its bit was set, and never again.
                    let block = arena.blocks[index].with(|at| unsafe { *at });
                    assert_eq!(block, 7 + index as u64);
                    seen += 1;
                });
            }
            seen
        }
    }

    loom::model(|| {
        let world = Arc::new(World {
            newest: Newest(AtomicPtr::new(std::ptr::null_mut())),
            quarry: Mutex::new(None),
        });
        let makers: Vec<_> = (0..2)
            .map(|_| {
                let world = world.clone();
                loom::thread::spawn(move || world.carve_and_place())
            })
            .collect();
        assert!(world.walk() <= 2);
        makers.into_iter().for_each(|maker| maker.join().unwrap());
        assert_eq!(world.walk(), 2);
    });
}

const LIFE: u64 = 7;

/// A home's queue, a coroutine that counts what it has seen, and its mark.
struct Home {
    mark: WakeMark,
    queue: Mutex<VecDeque<u64>>,
    conditions: [AtomicBool; 2],
}

impl Home {
    fn new() -> Home {
        Home {
            mark: WakeMark::new(),
            queue: Mutex::new(VecDeque::new()),
            conditions: [AtomicBool::new(false), AtomicBool::new(false)],
        }
    }

    /// A waker: makes its condition true, marks, and hands over if it was the first.
    fn wake(&self, condition: usize) {
        self.conditions[condition].store(true, Ordering::Relaxed);
        if self.mark.set(LIFE) {
            self.queue.lock().unwrap().push_back(LIFE);
        }
    }

    /// The home: takes one hand-over, if there is one, clears the mark, and lets the coroutine
    /// look. What it sees.
    fn turn(&self) -> Option<[bool; 2]> {
        let life = self.queue.lock().unwrap().pop_front()?;
        self.mark.clear(life);
        Some([0, 1].map(|i| self.conditions[i].load(Ordering::Relaxed)))
    }
}

/// Two wakers and a home that may run at any time in between: in the end, the last look at the
/// conditions saw both; and the two wakes were one or two hand-overs.
#[test]
fn no_wake_is_lost() {
    loom::model(|| {
        let home = Arc::new(Home::new());
        let wakers: Vec<_> = (0..2)
            .map(|i| {
                let home = home.clone();
                loom::thread::spawn(move || home.wake(i))
            })
            .collect();
        let mut seen = [false; 2];
        let mut turns = 0;
        // A turn at some time while they wake.
        if let Some(now) = home.turn() {
            (seen, turns) = (now, turns + 1);
        }
        for waker in wakers {
            waker.join().unwrap();
        }
        while let Some(now) = home.turn() {
            (seen, turns) = (now, turns + 1);
        }
        assert_eq!(seen, [true, true], "a wake was lost");
        assert!((1..=2).contains(&turns), "{turns} hand-overs for two wakes");
    });
}

/// A late waker of the last life comes by while the next one is woken: the next one's wake is not
/// lost.
#[test]
fn a_late_wake_of_another_life_hides_nothing() {
    loom::model(|| {
        let home = Arc::new(Home::new());
        let late = {
            let home = home.clone();
            loom::thread::spawn(move || {
                // Its hand-over is stale, and its home drops it.
                let _ = home.mark.set(LIFE - 1);
            })
        };
        let waker = {
            let home = home.clone();
            loom::thread::spawn(move || home.wake(0))
        };
        let mut seen = home.turn().is_some_and(|now| now[0]);
        waker.join().unwrap();
        home.wake(1);
        late.join().unwrap();
        while let Some(now) = home.turn() {
            seen |= now[0] && now[1];
        }
        assert!(seen);
    });
}

/// How a modelled contender waits: until whoever hands over sets the flag.
#[derive(Clone)]
struct Waiter(Arc<(Mutex<bool>, Condvar)>);

impl Waiter {
    fn new() -> Waiter {
        Waiter(Arc::new((Mutex::new(false), Condvar::new())))
    }
    fn wake(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }
    fn is_woken(&self) -> bool {
        *self.0.0.lock().unwrap()
    }
    fn wait(&self) {
        let mut woken = self.0.0.lock().unwrap();
        while !*woken {
            woken = self.0.1.wait(woken).unwrap();
        }
    }
}

/// What the lock protects: who is inside.
struct Protected {
    entries: u64,
}

/// One contender: takes the lock, or queues and waits for its flag; then claims, works and
/// releases.
fn contend(lock: &Handoff<Protected, Waiter, u64>, inside: &AtomicU64, me: u64) {
    let waiter = Waiter::new();
    let mut value = match lock.attempt(me, me, Some(waiter.clone())) {
        Attempt::Acquired(value) => value,
        Attempt::Busy => {
            waiter.wait();
            lock.claim(me).expect("woken as the owner")
        }
        Attempt::Recursive(_) => unreachable!("nobody locks twice"),
    };
    assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0, "two owners");
    value.entries += 1;
    assert_eq!(inside.fetch_sub(1, Ordering::Relaxed), 1);
    if let Some(next) = lock.release(me, value) {
        next.wake();
    }
}

/// Two and three contenders: one owner at a time, all come through, the lock is free in the end.
#[test]
fn hand_off_between_threads() {
    for contenders in [2, 3] {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = (contenders == 3).then_some(3);
        model.check(move || {
            let lock = Arc::new(Handoff::new(Protected { entries: 0 }));
            let inside = Arc::new(AtomicU64::new(0));
            let others: Vec<_> = (2..=contenders)
                .map(|me| {
                    let (lock, inside) = (lock.clone(), inside.clone());
                    loom::thread::spawn(move || contend(&lock, &inside, me))
                })
                .collect();
            contend(&lock, &inside, 1);
            for other in others {
                other.join().unwrap();
            }
            assert_eq!(
                (lock.owner().0, lock.waiting(), lock.acquired()),
                (0, 0, contenders)
            );
            assert_eq!(lock.claim(0).map(|value| value.entries), Some(contenders));
        });
    }
}

/// A waiter that gives up while the owner releases: either it leaves the queue, or it was handed
/// the lock and passes it on. The lock ends free in both cases, and a third one behind it gets it.
#[test]
fn giving_up_races_with_the_hand_over() {
    loom::model(|| {
        let lock = Arc::new(Handoff::<Protected, Waiter, u64>::new(Protected {
            entries: 0,
        }));
        let Attempt::Acquired(value) = lock.attempt(1, 1, None) else {
            unreachable!()
        };
        let waiters = [Waiter::new(), Waiter::new()];
        for (me, waiter) in (2..).zip(&waiters) {
            assert!(matches!(
                lock.attempt(me, me, Some(waiter.clone())),
                Attempt::Busy
            ));
        }
        let quitter = {
            let lock = lock.clone();
            loom::thread::spawn(move || {
                if let Some(next) = lock.abandon(2) {
                    next.wake();
                }
            })
        };
        if let Some(next) = lock.release(1, value) {
            next.wake();
        }
        quitter.join().unwrap();
        assert!(waiters[1].is_woken(), "the one behind was woken");
        let value = lock.claim(3).expect("and owns the lock");
        assert!(lock.release(3, value).is_none());
        assert_eq!((lock.owner().0, lock.waiting()), (0, 0));
    });
}

/// Takes what it is granted up, and wakes whom that names: a waiter's loop, without the suspend.
fn take_up(lock: &tickets::Tickets<Arc<()>, Arc<Notify>, ()>, me: u64, granted: &Notify) {
    // A wake may be spurious, as a coroutine's.
    let next = loop {
        granted.wait();
        if let Some((_, next)) = lock.claim(me) {
            break next;
        }
    };
    if let Some(next) = next {
        next.notify();
    }
}

fn wake(next: Option<Arc<Notify>>) {
    if let Some(next) = next {
        next.notify();
    }
}

/// Rule 4.3: a writer, a reader and a reader that upgrades, each on its own thread: a writer is
/// alone, and everybody gets in (else the model would not end).
#[test]
fn tickets_between_threads() {
    use tickets::{Attempt, Tickets, Upgrade, Want};
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let lock: Arc<Tickets<Arc<()>, Arc<Notify>, ()>> = Arc::new(Tickets::new(Arc::new(())));
        // What is protected: readers count up by one, a writer by 100.
        let inside = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = [Want::Write, Want::Read]
            .into_iter()
            .enumerate()
            .map(|(i, want)| {
                let (lock, inside) = (lock.clone(), inside.clone());
                loom::thread::spawn(move || member(&lock, &inside, i as u64 + 1, want))
            })
            .collect();
        let me = 3;
        member_begins(&lock, me, Want::Read);
        let readers = inside.fetch_add(1, Ordering::SeqCst);
        assert!(readers < 100, "a reader beside a writer");
        inside.fetch_sub(1, Ordering::SeqCst);
        let granted = Arc::new(Notify::new());
        match lock.upgrade(me, (), granted.clone()) {
            Upgrade::Alone(_) => {}
            Upgrade::Queued { wake: next, .. } => {
                wake(next);
                take_up(&lock, me, &granted);
            }
        }
        assert_eq!(
            inside.fetch_add(100, Ordering::SeqCst),
            0,
            "a writer is alone"
        );
        inside.fetch_sub(100, Ordering::SeqCst);
        let (_, next) = lock.downgrade(me, Arc::new(()));
        wake(next);
        wake(lock.release_read(me));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(lock.state(), (0, 0, 0));
        assert!(matches!(
            lock.attempt(9, Want::Write, (), None),
            Attempt::Acquired(_)
        ));
    });

    fn member_begins(lock: &Tickets<Arc<()>, Arc<Notify>, ()>, me: u64, want: Want) {
        let granted = Arc::new(Notify::new());
        match lock.attempt(me, want, (), Some(granted.clone())) {
            Attempt::Acquired(_) => {}
            Attempt::Busy => take_up(lock, me, &granted),
            Attempt::Recursive(()) => unreachable!("each locks once"),
        }
    }

    fn member(lock: &Tickets<Arc<()>, Arc<Notify>, ()>, inside: &AtomicU64, me: u64, want: Want) {
        member_begins(lock, me, want);
        let step = if want == Want::Write { 100 } else { 1 };
        let others = inside.fetch_add(step, Ordering::SeqCst);
        assert!(
            others < 100 && (want == Want::Read || others == 0),
            "beside a writer"
        );
        inside.fetch_sub(step, Ordering::SeqCst);
        wake(match want {
            Want::Read => lock.release_read(me),
            Want::Write => lock.release_write(me, Arc::new(())),
        });
    }
}
