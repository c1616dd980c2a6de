//! Random scripts of entering, suspending, waking, dropping and panicking coroutines, against a
//! model that is too simple to be wrong: the same rules (1.2 to 1.6, 1.9, 1.10) written down with
//! lists and recursion, without any stack of its own.
//!
//! Some of the coroutines are continuations with a release hook: values go both ways. At any time
//! somebody may ask for the dump, with backtraces: it must tell what the model knows, and change
//! nothing.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use coblock_coroutine::continuation::{Continuation, Options, Own, Passed, Release};
use coblock_coroutine::{
    Co, Coroutine, CoroutineOptions, State, WakeHandle, dump, in_coroutine, stats,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Coroutines in a run.
const COUNT: usize = 5;
/// From here on they are continuations.
const VALUED: usize = 3;
const NAMES: [&str; COUNT] = ["0", "1", "2", "3", "4"];

/// What the one with this number says at its step `at`.
fn output(me: usize, at: usize) -> usize {
    me * 1000 + at
}

/// What a coroutine, or the leader, does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Suspend,
    Enter(usize),
    Wake(usize),
    Drop(usize),
    Dump,
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
    /// Continuation `.0` was entered with this value.
    Got(usize, usize),
    /// What a coroutine owned was dropped.
    End(usize),
    /// The release hook of a continuation ran.
    Released(usize),
    /// Each live one: its number, its state, and whether it told its calls.
    Dumped(Vec<(usize, &'static str, bool)>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Outcome {
    Suspended,
    Finished,
    Yielded(usize),
    Returned(usize),
    Panicked(usize),
    Refused,
}

/// What the leader may do.
fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..COUNT).prop_map(Step::Enter),
        5 => (0..COUNT).prop_map(Step::Wake),
        1 => (0..COUNT).prop_map(Step::Drop),
        1 => Just(Step::Dump),
    ]
}

/// What a coroutine may do.
fn own_step() -> impl Strategy<Value = Step> {
    prop_oneof![12 => step(), 4 => Just(Step::Suspend), 1 => Just(Step::Panic)]
}

/// What each coroutine does, what the leader does, and what each release hook answers.
type Script = (Vec<Vec<Step>>, Vec<Step>, Vec<u8>);

fn scripts() -> impl Strategy<Value = Script> {
    (
        vec(vec(own_step(), 0..12), COUNT),
        vec(step(), 1..40),
        vec(0..3_u8, COUNT),
    )
}

// ---- the real thing

enum Handle {
    Plain(Coroutine),
    Valued(Continuation<usize, usize, usize>),
}

impl Handle {
    fn entered(&self) -> bool {
        match self {
            Handle::Plain(it) => it.entered(),
            Handle::Valued(it) => it.entered(),
        }
    }

    fn enter(&self, input: usize) -> Outcome {
        let entry = || match self {
            Handle::Plain(it) => match it.enter() {
                State::Suspended => Outcome::Suspended,
                State::Finished => Outcome::Finished,
            },
            Handle::Valued(it) => match it.yield_to(input) {
                Passed::Yielded(value) => Outcome::Yielded(value),
                Passed::Returned(value) => Outcome::Returned(value),
            },
        };
        match catch_unwind(AssertUnwindSafe(entry)) {
            Ok(outcome) => outcome,
            Err(panic) => panicked_as(&*panic).map_or(Outcome::Refused, Outcome::Panicked),
        }
    }
}

#[derive(Default)]
struct World {
    log: RefCell<Vec<Event>>,
    handles: RefCell<Vec<Option<Rc<Handle>>>>,
    wakers: RefCell<Vec<Option<WakeHandle>>>,
    /// The value that the next entry brings along.
    input: Cell<usize>,
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
                let input = self.input.replace(self.input.get() + 1);
                let outcome = handle.enter(input);
                self.log(Event::Entered(other, outcome));
            }
            Step::Dump => {
                let told = dump(true).standing.into_iter().map(|one| {
                    let number = one.name.parse().expect("named by number");
                    assert_eq!(one.at.is_some(), one.backtrace.is_some(), "{one}");
                    (number, one.state, one.at.is_some())
                });
                self.log(Event::Dumped(told.collect()));
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

impl World {
    fn play(&self, co: &Co, me: usize, script: Vec<Step>, suspend: impl Fn(usize)) {
        self.wakers.borrow_mut()[me] = Some(co.wake_handle());
        for (at, step) in script.into_iter().enumerate() {
            self.log(Event::At(me, at));
            match step {
                Step::Suspend => suspend(at),
                Step::Panic => std::panic::resume_unwind(Box::new(me)),
                step => self.perform(step),
            }
        }
    }
}

fn plain(world: &Rc<World>, me: usize, script: Vec<Step>) -> Handle {
    let (guard, world) = (OnDrop(world.clone(), me), world.clone());
    let options = CoroutineOptions {
        name: NAMES[me],
        ..Default::default()
    };
    let body = move |co: &Co| {
        let _guard = guard;
        world.play(co, me, script, |_| co.suspend());
    };
    Handle::Plain(Coroutine::with_options(&options, body).unwrap())
}

fn valued(world: &Rc<World>, me: usize, script: Vec<Step>, answer: u8) -> Handle {
    let (guard, inside, hook) = (OnDrop(world.clone(), me), world.clone(), world.clone());
    let options = Options {
        name: NAMES[me],
        release: Some(Box::new(move |_| {
            hook.log(Event::Released(me));
            [Release::Free, Release::Keep, Release::Veto][usize::from(answer)]
        })),
        ..Options::default()
    };
    let body = move |own: &Own<usize, usize>, first: usize| {
        let _guard = guard;
        inside.log(Event::Got(me, first));
        inside.play(own.co(), me, script, |at| {
            let got = own.yield_with(output(me, at));
            inside.log(Event::Got(me, got));
        });
        output(me, 999)
    };
    Handle::Valued(Continuation::init(options, body).unwrap())
}

fn real((scripts, leader, answers): &Script) -> Vec<Event> {
    let live = stats().live();
    let world = Rc::new(World::default());
    *world.wakers.borrow_mut() = vec![None; COUNT];
    for (me, script) in scripts.iter().enumerate() {
        let handle = match me {
            VALUED.. => valued(&world, me, script.clone(), answers[me]),
            _ => plain(&world, me, script.clone()),
        };
        world.handles.borrow_mut().push(Some(Rc::new(handle)));
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
    /// The value on its way in, and the one that nobody has taken yet.
    input: [Option<usize>; COUNT],
    output: [Option<usize>; COUNT],
    /// The value that the next entry brings along.
    next_input: usize,
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
            if let Err(who) = self.run(next, &mut woken) {
                panic = panic.or(Some(who.map_or(Outcome::Refused, Outcome::Panicked)));
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

    /// An error is a panic: its own, or one with words.
    fn run(&mut self, i: usize, woken: &mut Vec<usize>) -> Result<(), Option<usize>> {
        if self.doomed[i] {
            self.end(i);
            return Ok(());
        }
        if i >= VALUED {
            // Only a value ends a yield: a wake without one does not.
            self.pending[i] = false;
            let Some(value) = self.input[i].take() else {
                self.phase[i] = Phase::Suspended;
                return Ok(());
            };
            self.log.push(Event::Got(i, value));
        }
        (self.phase[i], self.ran[i]) = (Phase::Running, true);
        while let Some(step) = self.scripts[i].get(self.at[i]) {
            self.log.push(Event::At(i, self.at[i]));
            self.at[i] += 1;
            match *step {
                Step::Suspend if i >= VALUED => {
                    if self.output[i].is_some() {
                        // One value each way: it panics, with words.
                        self.end(i);
                        return Err(None);
                    }
                    self.output[i] = Some(output(i, self.at[i] - 1));
                    self.phase[i] = Phase::Suspended;
                    return Ok(());
                }
                Step::Suspend if self.pending[i] => self.pending[i] = false,
                Step::Suspend => {
                    self.phase[i] = Phase::Suspended;
                    return Ok(());
                }
                Step::Panic => {
                    self.end(i);
                    return Err(Some(i));
                }
                Step::Wake(other) => match self.phase[other] {
                    Phase::Suspended => {
                        self.phase[other] = Phase::Queued;
                        woken.push(other);
                    }
                    Phase::Running => self.pending[other] = true,
                    Phase::New | Phase::Queued | Phase::Over => {}
                },
                Step::Enter(_) | Step::Drop(_) | Step::Dump => self.perform(*step, Some(i)),
            }
        }
        self.end(i);
        Ok(())
    }

    fn end(&mut self, i: usize) {
        self.phase[i] = Phase::Over;
        self.log.push(Event::End(i));
        if i >= VALUED {
            self.log.push(Event::Released(i));
        }
    }

    /// The dump of coroutine `current`, or of the leader.
    fn dump(&mut self, current: Option<usize>) {
        let mut told = Vec::new();
        for i in 0..COUNT {
            let (state, rests) = match self.phase[i] {
                Phase::New => ("not started", false),
                Phase::Suspended => ("suspended", true),
                Phase::Queued => ("woken and queued", true),
                Phase::Running if current == Some(i) => ("running", false),
                Phase::Running => ("waiting for another coroutine that it has entered", false),
                Phase::Over => continue,
            };
            told.push((i, state, rests));
        }
        self.log.push(Event::Dumped(told));
    }

    /// A step of the leader, or one that is the same for all.
    fn perform(&mut self, step: Step, who: Option<usize>) {
        match step {
            Step::Suspend | Step::Panic => unreachable!(),
            Step::Dump => self.dump(who),
            Step::Enter(other) if self.handle[other] => {
                let value = self.next_input;
                self.next_input += 1;
                let outcome = match self.phase[other] {
                    Phase::New | Phase::Suspended => {
                        self.calls[other] += 1;
                        self.input[other] = Some(value);
                        let outcome = self.resume(other);
                        self.calls[other] -= 1;
                        match outcome {
                            Outcome::Suspended if other >= VALUED => {
                                Outcome::Yielded(self.output[other].take().unwrap())
                            }
                            Outcome::Finished if other >= VALUED => {
                                Outcome::Returned(output(other, 999))
                            }
                            outcome => outcome,
                        }
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

fn model((scripts, leader, _): &Script) -> Vec<Event> {
    let mut model = Model {
        scripts,
        phase: [Phase::New; COUNT],
        at: [0; COUNT],
        pending: [false; COUNT],
        handle: [true; COUNT],
        ran: [false; COUNT],
        calls: [0; COUNT],
        doomed: [false; COUNT],
        input: [None; COUNT],
        output: [None; COUNT],
        next_input: 0,
        log: Vec::new(),
    };
    for step in leader {
        model.perform(*step, None);
    }
    for i in 0..COUNT {
        model.perform(Step::Drop(i), None);
    }
    assert!(
        model.phase.iter().all(|phase| *phase == Phase::Over),
        "dropping ends what is left"
    );
    model.log
}

/// Rules 1.2 to 1.6, 1.9, 1.10 in random order; and each kind of event was seen.
#[test]
fn scripts_run_as_in_the_model() {
    let config = ProptestConfig {
        cases: 3000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let seen = Cell::new([0_u32; 10]);
    let ran = TestRunner::new(config).run(&scripts(), |script| {
        let log = real(&script);
        prop_assert_eq!(&log, &model(&script));
        let mut kinds = seen.get();
        for event in log {
            kinds[match event {
                Event::Entered(_, Outcome::Suspended) => 0,
                Event::Entered(_, Outcome::Finished) => 1,
                Event::Entered(_, Outcome::Panicked(_)) => 2,
                Event::Entered(_, Outcome::Refused) => 3,
                Event::Woke(_, Ok(())) => 4,
                Event::Woke(_, Err(_)) => 5,
                Event::Entered(_, Outcome::Yielded(_)) => 6,
                Event::Entered(_, Outcome::Returned(_)) => 7,
                Event::Dumped(all) if all.iter().any(|(.., rests)| *rests) => 8,
                Event::Released(_) => 9,
                Event::At(..) | Event::Got(..) | Event::End(_) | Event::Dumped(_) => continue,
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
