//! Random scripts of entering, suspending, waking, dropping and panicking coroutines, against a
//! model that is too simple to be wrong: the same rules (1.3 to 1.5, 1.9, 1.10) written down with
//! lists and recursion, without any stack of its own.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use coblock_coroutine::{Co, Coroutine, State, WakeHandle, in_coroutine, stats};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Coroutines in a run.
const COUNT: usize = 5;

/// What a coroutine, or the leader, does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Suspend,
    Enter(usize),
    Wake(usize),
    Drop(usize),
    Panic,
}

/// What is seen of it.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Event {
    /// Coroutine `.0` is about to do its step `.1`.
    At(usize, usize),
    /// An entry call came back so.
    Entered(usize, Outcome),
    /// The leader's wake of a coroutine came back so.
    Woke(usize, Result<(), usize>),
    /// What a coroutine owned was dropped.
    End(usize),
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Outcome {
    Suspended,
    Finished,
    Panicked(usize),
    Refused,
}

/// What the leader may do.
fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..COUNT).prop_map(Step::Enter),
        5 => (0..COUNT).prop_map(Step::Wake),
        1 => (0..COUNT).prop_map(Step::Drop),
    ]
}

/// What a coroutine may do.
fn own_step() -> impl Strategy<Value = Step> {
    prop_oneof![12 => step(), 4 => Just(Step::Suspend), 1 => Just(Step::Panic)]
}

fn scripts() -> impl Strategy<Value = (Vec<Vec<Step>>, Vec<Step>)> {
    (vec(vec(own_step(), 0..12), COUNT), vec(step(), 1..40))
}

// ---- the real thing

#[derive(Default)]
struct World {
    log: RefCell<Vec<Event>>,
    handles: RefCell<Vec<Option<Rc<Coroutine>>>>,
    wakers: RefCell<Vec<Option<WakeHandle>>>,
}

struct OnDrop(Rc<World>, usize);
impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.log.borrow_mut().push(Event::End(self.1));
    }
}

fn panicked_as(payload: &(dyn std::any::Any + Send)) -> Option<usize> {
    payload.downcast_ref::<usize>().copied()
}

impl World {
    fn log(&self, event: Event) {
        self.log.borrow_mut().push(event);
    }

    fn perform(&self, step: Step) {
        match step {
            Step::Suspend | Step::Panic => unreachable!("done by the body"),
            Step::Enter(other) => {
                let Some(handle) = self.handles.borrow()[other].clone() else {
                    return;
                };
                let outcome = match catch_unwind(AssertUnwindSafe(|| handle.enter())) {
                    Ok(State::Suspended) => Outcome::Suspended,
                    Ok(State::Finished) => Outcome::Finished,
                    Err(panic) => panicked_as(&*panic).map_or(Outcome::Refused, Outcome::Panicked),
                };
                self.log(Event::Entered(other, outcome));
            }
            Step::Wake(other) => {
                let Some(waker) = self.wakers.borrow()[other].clone() else {
                    return;
                };
                if in_coroutine() {
                    return waker.wake();
                }
                let woke = catch_unwind(AssertUnwindSafe(|| waker.wake()));
                self.log(Event::Woke(
                    other,
                    woke.map_err(|panic| panicked_as(&*panic).unwrap()),
                ));
            }
            Step::Drop(other) => {
                let handle = self.handles.borrow()[other].clone();
                // Not while an entry call uses the handle: the table's, and the one just made.
                if handle.is_some_and(|handle| !handle.entered() && Rc::strong_count(&handle) == 2)
                {
                    let last = self.handles.borrow_mut()[other].take();
                    drop(last);
                }
            }
        }
    }
}

fn body(world: Rc<World>, me: usize, script: Vec<Step>) -> impl FnOnce(&Co) {
    let guard = OnDrop(world.clone(), me);
    move |co| {
        let _guard = guard;
        world.wakers.borrow_mut()[me] = Some(co.wake_handle());
        for (at, step) in script.into_iter().enumerate() {
            world.log(Event::At(me, at));
            match step {
                Step::Suspend => co.suspend(),
                Step::Panic => std::panic::resume_unwind(Box::new(me)),
                step => world.perform(step),
            }
        }
    }
}

fn real(scripts: &[Vec<Step>], leader: &[Step]) -> Vec<Event> {
    let live = stats().live();
    let world = Rc::new(World::default());
    *world.wakers.borrow_mut() = vec![None; COUNT];
    for (me, script) in scripts.iter().enumerate() {
        let co = Coroutine::new(body(world.clone(), me, script.clone())).unwrap();
        world.handles.borrow_mut().push(Some(Rc::new(co)));
    }
    for step in leader {
        world.perform(*step);
        assert!(!in_coroutine() && !std::thread::panicking());
    }
    for i in 0..COUNT {
        world.perform(Step::Drop(i));
    }
    assert_eq!(stats().live(), live, "none is left");
    world.log.take()
}

// ---- the model

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    New,
    Suspended,
    Queued,
    Running,
    Over,
}

struct Model<'a> {
    scripts: &'a [Vec<Step>],
    phase: [Phase; COUNT],
    at: [usize; COUNT],
    pending: [bool; COUNT],
    handle: [bool; COUNT],
    ran: [bool; COUNT],
    /// Entry calls under way through its handle.
    calls: [u32; COUNT],
    /// Dropped while it was queued: unwound when its turn comes.
    doomed: [bool; COUNT],
    log: Vec<Event>,
}

impl Model<'_> {
    /// Runs coroutine `i` until it suspends or ends, then what it has woken (which may be `i`
    /// again). How `i` first came back; or its panic, or the first one among the woken.
    fn resume(&mut self, i: usize) -> Outcome {
        let mut queue = vec![i];
        let (mut first, mut panic) = (None, None);
        while !queue.is_empty() {
            let next = queue.remove(0);
            let mut woken = Vec::new();
            if self.run(next, &mut woken).is_err() {
                panic = panic.or(Some(Outcome::Panicked(next)));
            }
            let over = self.phase[next] == Phase::Over;
            first.get_or_insert(if over {
                Outcome::Finished
            } else {
                Outcome::Suspended
            });
            queue.splice(0..0, woken);
        }
        panic.or(first).unwrap()
    }

    fn run(&mut self, i: usize, woken: &mut Vec<usize>) -> Result<(), ()> {
        if self.doomed[i] {
            self.end(i);
            return Ok(());
        }
        (self.phase[i], self.ran[i]) = (Phase::Running, true);
        while let Some(step) = self.scripts[i].get(self.at[i]) {
            self.log.push(Event::At(i, self.at[i]));
            self.at[i] += 1;
            match *step {
                Step::Suspend if self.pending[i] => self.pending[i] = false,
                Step::Suspend => {
                    self.phase[i] = Phase::Suspended;
                    return Ok(());
                }
                Step::Panic => {
                    self.end(i);
                    return Err(());
                }
                Step::Wake(other) => match self.phase[other] {
                    Phase::Suspended => {
                        self.phase[other] = Phase::Queued;
                        woken.push(other);
                    }
                    Phase::Running => self.pending[other] = true,
                    Phase::New | Phase::Queued | Phase::Over => {}
                },
                Step::Enter(_) | Step::Drop(_) => self.perform(*step),
            }
        }
        self.end(i);
        Ok(())
    }

    fn end(&mut self, i: usize) {
        self.phase[i] = Phase::Over;
        self.log.push(Event::End(i));
    }

    /// A step of the leader, or one that is the same for all.
    fn perform(&mut self, step: Step) {
        match step {
            Step::Suspend | Step::Panic => unreachable!(),
            Step::Enter(other) if self.handle[other] => {
                let outcome = match self.phase[other] {
                    Phase::New | Phase::Suspended => {
                        self.calls[other] += 1;
                        let outcome = self.resume(other);
                        self.calls[other] -= 1;
                        outcome
                    }
                    Phase::Queued | Phase::Running | Phase::Over => Outcome::Refused,
                };
                self.log.push(Event::Entered(other, outcome));
            }
            Step::Wake(other) if self.ran[other] => {
                let mut woke = Ok(());
                if self.phase[other] == Phase::Suspended
                    && let Outcome::Panicked(who) = self.resume(other)
                {
                    woke = Err(who);
                }
                self.log.push(Event::Woke(other, woke));
            }
            Step::Drop(other)
                if self.handle[other]
                    && self.phase[other] != Phase::Running
                    && self.calls[other] == 0 =>
            {
                self.handle[other] = false;
                if matches!(self.phase[other], Phase::New | Phase::Suspended) {
                    self.end(other);
                }
                self.doomed[other] = self.phase[other] == Phase::Queued;
            }
            Step::Enter(_) | Step::Wake(_) | Step::Drop(_) => {}
        }
    }
}

fn model(scripts: &[Vec<Step>], leader: &[Step]) -> Vec<Event> {
    let mut model = Model {
        scripts,
        phase: [Phase::New; COUNT],
        at: [0; COUNT],
        pending: [false; COUNT],
        handle: [true; COUNT],
        ran: [false; COUNT],
        calls: [0; COUNT],
        doomed: [false; COUNT],
        log: Vec::new(),
    };
    for step in leader {
        model.perform(*step);
    }
    for i in 0..COUNT {
        model.perform(Step::Drop(i));
    }
    assert!(
        model.phase.iter().all(|phase| *phase == Phase::Over),
        "dropping ends what is left"
    );
    model.log
}

/// Rules 1.3 to 1.5, 1.9, 1.10 in random order; and each kind of event was seen.
#[test]
fn scripts_run_as_in_the_model() {
    let config = ProptestConfig {
        cases: 3000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let seen = Cell::new([0_u32; 6]);
    let ran = TestRunner::new(config).run(&scripts(), |(scripts, leader)| {
        let log = real(&scripts, &leader);
        prop_assert_eq!(&log, &model(&scripts, &leader));
        let mut kinds = seen.get();
        for event in log {
            kinds[match event {
                Event::Entered(_, Outcome::Suspended) => 0,
                Event::Entered(_, Outcome::Finished) => 1,
                Event::Entered(_, Outcome::Panicked(_)) => 2,
                Event::Entered(_, Outcome::Refused) => 3,
                Event::Woke(_, Ok(())) => 4,
                Event::Woke(_, Err(_)) => 5,
                Event::At(..) | Event::End(_) => continue,
            }] += 1;
        }
        seen.set(kinds);
        Ok(())
    });
    if let Err(error) = ran {
        panic!("{error}");
    }
    assert!(
        seen.get().iter().all(|count| *count >= 20),
        "{:?}",
        seen.get()
    );
}
