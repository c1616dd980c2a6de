//! Part: every request to the file fails, one after the other. (R3; rule 9.3, "errors of each step
//! are returned".)
//!
//! A workload is played once to count what the file is sent; then once for every request, every kind
//! of failure, "it alone" and "from then on".
//!
//! ```text
//!   EIO, ENOSPC          reads, writes, flushes, zeroes, resizes        somebody is told
//!   failed flush         flushes                                        and every later flush fails
//!   short, EINTR, EAGAIN reads, writes                                  nobody notices
//! ```
//! On large images what fails comes after a `mark`, and is a sample (with all named points); of
//! short sequences every two requests fail together. A named point at which no workload's file broke
//! is a failure of this part.
//!
//! Always: no panic, an end within a minute of virtual time, no coroutine, node or request left; only
//! a request that was hit fails, or one after something was poisoned; the image is sound, and reads
//! as after a power cut.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use std::collections::{BTreeMap, BTreeSet};

use coblock::block::drivers::sim::{Counts, Fault, Match, Op as DiskOp};
use coblock::block::{ErrorKind, Event};

use super::judge::{Judge, Verdict};
use super::load::OnError;
use super::parallel::each;
use super::part::{Figure, Part, Plan, Report};
use super::play::{Played, Stage, play, play_on, play_with};
use super::power_cuts;
use super::rng::Rng;
use super::script::{Op, Script};
use super::swarm::Params;

/// This part.
pub const PART: Part = Part {
    name: "faults",
    promise: "every request to the file fails, in every way, once and from then on: somebody is told, \
              nothing hangs, nothing flushed is lost, the image is sound",
    run: |plan, report| run(plan, report),
};

/// How often each named point of a workload is one at which the file breaks; that the request itself
/// fails comes anyway.
const EVENT_TIMES: u64 = 3;

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Io,
    NoSpace,
    /// A write arrives in part, then fails.
    Torn,
    Short,
    Interrupted,
    PutOff,
}

/// A failure at one place of a run.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    op: DiskOp,
    /// So many requests of that kind go well first, counted from when the image is open.
    nth: u64,
    kind: Kind,
    from_then_on: bool,
    /// Not the nth request of the kind, but the next one after this point is reached for the nth time.
    event: Option<Event>,
    /// A second request fails, so many after this one; then both are of any kind.
    also: Option<u64>,
}

/// Everything that a file may be asked.
const ANY: [DiskOp; 6] = [
    DiskOp::Read,
    DiskOp::Write,
    DiskOp::Flush,
    DiskOp::Zero,
    DiskOp::Discard,
    DiskOp::Resize,
];

/// Kinds of requests, how they may fail, and how often each is sent.
fn ways(counts: &Counts) -> [(DiskOp, u64, &'static [Kind]); 6] {
    use Kind::{Interrupted, Io, NoSpace, PutOff, Short, Torn};
    [
        (
            DiskOp::Read,
            counts.reads,
            &[Io, Short, Interrupted, PutOff],
        ),
        (
            DiskOp::Write,
            counts.writes,
            &[Io, NoSpace, Torn, Short, Interrupted, PutOff],
        ),
        (DiskOp::Flush, counts.flushes, &[Io, NoSpace]),
        (DiskOp::Zero, counts.zeroes, &[Io, NoSpace]),
        (DiskOp::Discard, counts.discards, &[Io]),
        (DiskOp::Resize, counts.resizes, &[Io, NoSpace]),
    ]
}

impl Kind {
    /// Does the file's driver go on as if nothing had been?
    fn is_absorbed(self) -> bool {
        matches!(self, Kind::Short | Kind::Interrupted | Kind::PutOff)
    }
}

impl Failure {
    fn faults(self) -> Vec<Fault> {
        let mut faults = vec![self.first()];
        if let Some(behind) = self.also {
            let second = Fault::new(Match::ops(&ANY), libc::EIO);
            faults.push(second.after(self.nth + behind));
        }
        faults
    }

    fn first(self) -> Fault {
        let what = match self.event {
            Some(_) => Match::ops(&[DiskOp::Read, DiskOp::Write, DiskOp::Flush]),
            None if self.also.is_some() => Match::ops(&ANY),
            None => Match::ops(&[self.op]),
        };
        let fault = match self.kind {
            Kind::Io => Fault::new(what, libc::EIO),
            Kind::NoSpace => Fault::new(what, libc::ENOSPC),
            Kind::Torn => Fault::new(what, libc::EIO).torn(512),
            Kind::Short => Fault::short(what),
            Kind::Interrupted => Fault::new(what, libc::EINTR),
            Kind::PutOff => Fault::new(what, libc::EAGAIN),
        };
        let fault = fault.after(self.nth);
        let fault = match self.event {
            Some(event) => fault.at(event),
            None => fault,
        };
        if self.from_then_on {
            fault.from_then_on()
        } else {
            fault
        }
    }
}

/// What a run with a failure saw.
#[derive(Default)]
struct Watch {
    /// Faults that hit, by what the file was asked.
    hits: RefCell<Vec<DiskOp>>,
    /// A flush failed since the image was opened.
    flush_failed: Cell<bool>,
    /// No two requests of the script are in flight at once.
    one_by_one: bool,
    /// An error at a request that no fault had hit.
    wrong: RefCell<Option<String>>,
}

/// What the file is sent, and which points are reached, after the `mark` of a script, or else after
/// the image was opened.
fn sent(script: &Script) -> Verdict<(Counts, BTreeMap<Event, u64>)> {
    let played = play(script);
    let before = Rc::new(RefCell::new((Counts::default(), BTreeMap::new())));
    let again = {
        let before = before.clone();
        play_with(script, move |stage, load| {
            let disk = stage.disk.clone();
            before.borrow_mut().0 = disk.counts();
            load.after_each(move |ended| {
                if ended.op == Op::Mark {
                    *before.borrow_mut() = (disk.counts(), disk.events());
                }
            })
        })
    };
    if again.log != played.log {
        return Err(format!("two runs differ\n{script}"));
    }
    let (since, events_before) = before.take();
    let (counts, mut events) = (again.stage.disk.counts(), again.stage.disk.events());
    for (event, count) in &mut events {
        *count -= events_before.get(event).copied().unwrap_or(0);
    }
    let counts = Counts {
        reads: counts.reads - since.reads,
        writes: counts.writes - since.writes,
        flushes: counts.flushes - since.flushes,
        zeroes: counts.zeroes - since.zeroes,
        discards: counts.discards - since.discards,
        resizes: counts.resizes - since.resizes,
        ..counts
    };
    Ok((counts, events))
}

/// All failures of one workload.
///
/// # Errors
/// When the workload fails without any.
pub fn failures(script: &Script) -> Verdict<Vec<Failure>> {
    let (counts, events) = sent(script)?;
    let mut all = Vec::new();
    for (op, count, kinds) in ways(&counts) {
        for nth in 0..count {
            for &kind in kinds {
                for from_then_on in [false, true] {
                    all.push(Failure {
                        op,
                        nth,
                        kind,
                        from_then_on,
                        event: None,
                        also: None,
                    });
                }
            }
        }
    }
    for (event, count) in events {
        for nth in 0..count.min(EVENT_TIMES) {
            all.push(Failure {
                op: DiskOp::Status,
                nth,
                kind: Kind::Io,
                from_then_on: false,
                event: Some(event),
                also: None,
            });
        }
    }
    Ok(all)
}

/// Every two requests of a short workload.
///
/// # Errors
/// When the workload fails without any failure.
pub fn pairs(script: &Script) -> Verdict<Vec<Failure>> {
    let (counts, _) = sent(script)?;
    let all: u64 = ways(&counts).iter().map(|(_, count, _)| count).sum();
    let pair = |nth, behind| Failure {
        // Of any kind.
        op: DiskOp::Status,
        nth,
        kind: Kind::Io,
        from_then_on: false,
        event: None,
        also: Some(behind),
    };
    // What fails may be tried again, so the second one may lie behind the last.
    let second = |nth| (1..=all - nth).map(move |behind| pair(nth, behind));
    Ok((0..all).flat_map(second).collect())
}

/// The workload of a seed: that of the power cuts.
pub fn workload(seed: u64) -> Script {
    power_cuts::workload(seed)
}

/// A run on a disk of a megabyte or more: half of it is full, then it changes, gets shorter and
/// longer.
pub fn large(seed: u64) -> Script {
    let params = Params {
        requests: 8,
        fill: 0,
        in_flight: 4,
        ..Params::draw(seed)
    };
    let mut script = params.script();
    let size = script.setting.size;
    let piece = 128 << 10;
    let full = (0..size / 2 / piece).map(|nth| {
        let len = usize::try_from(piece).expect("short");
        Op::write(nth * piece, len)
    });
    let mut ops: Vec<Op> = full.chain([Op::Wait, Op::Flush, Op::Mark]).collect();
    ops.append(&mut script.ops);
    let third = size / 3 / 512 * 512;
    ops.extend([Op::Shrink { len: third }, Op::Flush]);
    ops.extend([
        Op::Grow { len: size + piece },
        Op::write(size / 2 / 512 * 512, 512),
    ]);
    script.ops = ops;
    script
}

/// Plays a script with one failure and judges what is left; tells whether the failure met a request.
///
/// # Errors
/// What an oracle says.
pub fn judge_failure(judge: &Judge, script: &Script, failure: Failure) -> Verdict<bool> {
    let watch = Rc::new(Watch {
        one_by_one: script.setting.in_flight == 1,
        ..Watch::default()
    });
    let seen = watch.clone();
    let stage = Stage {
        // One run in four: it costs as much as the run.
        audit: failure.nth.is_multiple_of(4),
        ..Stage::new(&script.setting)
    };
    let history = stage.history();
    let marked = script.ops.contains(&Op::Mark);
    let played = play_on(stage, history, script, |stage, load| {
        let disk = stage.disk.clone();
        let fail = move || failure.faults().into_iter().for_each(|f| disk.fail(f));
        if !marked {
            fail();
        }
        let disk = stage.disk.clone();
        load.on_error(OnError::Count).after_each(move |ended| {
            if ended.op == Op::Mark {
                fail();
            }
            let (mine, others): (Vec<_>, Vec<_>) = disk
                .take_hits()
                .into_iter()
                .partition(|(co, _)| *co == ended.co.id());
            seen.note(&mine, ended.op, ended.error);
            // Those of other requests wait for their ends.
            disk.put_hits(others);
        })
    });
    let told = played.errors > 0 || played.flushed.is_err() || played.closed.is_err();
    if let Some(wrong) = watch.wrong.take() {
        return Err(wrong);
    }
    judge_told(&failure, &watch, &played, told)?;
    let stage = &played.stage;
    stage.disk.clear_faults();
    let top = stage.top();
    judge.sound(&top).or_else(|why| {
        // Counts of a lazy image are made by the next open.
        if stage.setting.lazy { Ok(0) } else { Err(why) }
    })?;
    judge.after_power_cut(stage, &played.history, usize::MAX, &top)?;
    Ok(!watch.hits.borrow().is_empty())
}

/// Was everybody told who had to be, and nobody else?
fn judge_told(failure: &Failure, watch: &Watch, played: &Played, told: bool) -> Verdict {
    let Played {
        errors,
        flushed,
        closed,
        ..
    } = played;
    let story = || format!("{errors} requests failed, flush {flushed:?}, close {closed:?}");
    if failure.kind.is_absorbed() && told {
        return Err(format!("an absorbed failure was told: {}", story()));
    }
    let tells = |op: &DiskOp| matches!(op, DiskOp::Read | DiskOp::Write | DiskOp::Flush);
    let must_tell = match failure.kind {
        _ if failure.also.is_some() || failure.event.is_some() => {
            watch.hits.borrow().iter().any(tells)
        }
        _ if failure.kind.is_absorbed() => false,
        // A disk that is full once: freed clusters are made ready, and what failed is tried again.
        Kind::NoSpace => failure.from_then_on && failure.op == DiskOp::Write,
        // Giving back space is advice, and zeroes and sizes have other ways.
        _ => tells(&failure.op),
    };
    if must_tell && !told {
        return Err(format!("nobody was told: {}", story()));
    }
    if watch.flush_failed.get() && (flushed.is_ok() || closed.is_ok()) {
        return Err(format!(
            "a flush succeeded after one had failed: {}",
            story()
        ));
    }
    Ok(())
}

impl Watch {
    /// A request has ended; `hits` are the faults that met what it asked of the file.
    fn note(&self, hits: &[(u64, DiskOp)], op: Op, error: Option<&coblock::block::Error>) {
        self.hits.borrow_mut().extend(hits.iter().map(|(_, op)| op));
        if op == Op::Reopen {
            self.flush_failed.set(false);
        } else if hits.iter().any(|(_, op)| *op == DiskOp::Flush) {
            self.flush_failed.set(true);
        }
        let Some(error) = error else {
            // With others in flight it may have begun before the one that failed.
            if op == Op::Flush && self.flush_failed.get() && self.one_by_one {
                let why = "a flush succeeded after one had failed".to_string();
                self.wrong.borrow_mut().get_or_insert(why);
            }
            return;
        };
        // Poison: what is in memory and what is in the file may differ.
        let poisoned = error.kind() == ErrorKind::Poisoned;
        // An image that could not be opened again is closed for all that come.
        let closed = error.kind() == ErrorKind::Closed;
        if hits.is_empty() && !poisoned && !closed {
            let hits = self.hits.borrow();
            let why =
                format!("{op} failed though nothing of it did: {error}; hit before: {hits:?}");
            self.wrong.borrow_mut().get_or_insert(why);
        }
    }
}

/// Which failures of a workload.
#[derive(Clone, Copy)]
enum Take {
    Each,
    /// About so many, drawn from all.
    Sample(u64),
    Pairs,
}

impl Take {
    /// Where its runs are counted.
    fn column(self) -> usize {
        match self {
            Take::Each => 0,
            Take::Sample(_) => 1,
            Take::Pairs => 2,
        }
    }
}

fn run(plan: &Plan, report: &mut Report) {
    let scale = plan.scale;
    let mut items: Vec<(String, Script, Take)> = Vec::new();
    for (replay, script) in super::scripts::all() {
        let take = match script.setting.size < 1 << 20 {
            true => Take::Each,
            false => Take::Sample(scale.pick(60, 400, u64::MAX)),
        };
        items.push((replay, script, take));
    }
    for seed in 0..scale.pick(5, 75, 600) {
        let replay = format!("cargo xtask reliability --faults-of {seed}");
        items.push((replay, workload(seed), Take::Each));
    }
    let replay = || "cargo xtask reliability --faults-of FILE (the lines below)".to_string();
    for seed in 0..scale.pick(1, 8, 200) {
        let take = Take::Sample(scale.pick(60, 250, 5_000));
        items.push((replay(), large(seed), take));
    }
    let short = super::exhaustive::scripts(2);
    for script in short.into_iter().step_by(scale.pick(197, 17, 1)) {
        items.push((replay(), script, Take::Pairs));
    }
    let mut runs = [0; 3];
    let mut events = BTreeSet::new();
    let results = each(plan.jobs, &items, |(_, script, take)| {
        let all = match take {
            Take::Pairs => pairs(script)?,
            Take::Each | Take::Sample(_) => failures(script)?,
        };
        judge_all(script, &sample(all, *take, script.setting.seed))
    });
    for ((replay, script, take), result) in items.iter().zip(results) {
        match result.and_then(|judged| judged) {
            Ok((more, reached)) => {
                runs[take.column()] += more;
                events.extend(reached);
            }
            Err(why) => report.fail(replay, &format!("{why}\n{script}")),
        }
    }
    let names = |reached: bool| {
        let those = Event::ALL.iter().filter(|e| events.contains(e) == reached);
        let names: Vec<&str> = those.map(|event| event.name()).collect();
        names.join(", ")
    };
    report.say(format!(
        "named points at which the file broke: {}",
        names(true)
    ));
    if events.len() < Event::ALL.len() {
        let why = format!("named points at which no file broke: {}", names(false));
        report.fail("cargo xtask reliability --part faults", &why);
    }
    let [each, large, pairs] = runs;
    report.count(Figure::Runs, each + large + pairs);
    report.say(format!(
        "{} workloads; {each} runs in which one request to the file failed, or all from one on; {large} of \
         the same on disks of a megabyte and more; {pairs} in which two requests failed",
        items.len()
    ));
}

/// Those that are to be judged.
fn sample(mut all: Vec<Failure>, take: Take, seed: u64) -> Vec<Failure> {
    if let Take::Sample(most) = take {
        let (mut rng, len) = (Rng::new(seed), all.len() as u64);
        all.retain(|failure| failure.event.is_some() || rng.below(len) < most);
    }
    all
}

/// Every failure of one script; tells how many.
///
/// # Errors
/// The first that an oracle does not like.
pub fn judge_script(script: &Script) -> Verdict<u64> {
    Ok(judge_all(script, &failures(script)?)?.0)
}

fn judge_all(script: &Script, all: &[Failure]) -> Verdict<(u64, BTreeSet<Event>)> {
    let judge = Judge::default();
    let mut events = BTreeSet::new();
    for failure in all {
        let met = judge_failure(&judge, script, *failure);
        if met.map_err(|why| format!("{failure:?}: {why}"))? {
            events.extend(failure.event);
        }
    }
    judge.end();
    Ok((all.len() as u64, events))
}
