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
//! Always: no panic, an end within a minute of virtual time, no coroutine, node or request left; only
//! a request that was hit fails, or one after something was poisoned; the image is sound, and reads
//! as after a power cut.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use std::collections::BTreeSet;

use coblock::block::drivers::sim::{Counts, Fault, Match, Op as DiskOp};
use coblock::block::{ErrorKind, Event};

use super::judge::{Judge, Verdict};
use super::load::OnError;
use super::parallel::each;
use super::part::{Figure, Part, Plan, Report};
use super::play::{Played, Stage, play, play_on, play_with};
use super::power_cuts::workload;
use super::script::{Op, Script};

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
}

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
    fn fault(self) -> Fault {
        let what = match self.event {
            Some(_) => Match::ops(&[DiskOp::Read, DiskOp::Write, DiskOp::Flush]),
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
    /// An error at a request that no fault had hit.
    wrong: RefCell<Option<String>>,
}

/// All failures of one workload.
///
/// # Errors
/// When the workload fails without any.
pub fn failures(script: &Script) -> Verdict<Vec<Failure>> {
    let played = play(script);
    let opened = Rc::new(Cell::new(Counts::default()));
    let (counts, events) = {
        let opened = opened.clone();
        let again = play_with(script, move |stage, load| {
            opened.set(stage.disk.counts());
            load
        });
        if again.log != played.log {
            return Err(format!("two runs differ\n{script}"));
        }
        (again.stage.disk.counts(), again.stage.disk.events())
    };
    let since = opened.get();
    let counts = Counts {
        reads: counts.reads - since.reads,
        writes: counts.writes - since.writes,
        flushes: counts.flushes - since.flushes,
        ..counts
    };
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
            });
        }
    }
    Ok(all)
}

/// Plays a script with one failure and judges what is left.
///
/// # Errors
/// What an oracle says.
pub fn judge_failure(judge: &Judge, script: &Script, failure: Failure) -> Verdict {
    let watch = Rc::new(Watch::default());
    let seen = watch.clone();
    let stage = Stage {
        // One run in four: it costs as much as the run.
        audit: failure.nth.is_multiple_of(4),
        ..Stage::new(&script.setting)
    };
    let history = stage.history();
    let played = play_on(stage, history, script, |stage, load| {
        stage.disk.fail(failure.fault());
        let disk = stage.disk.clone();
        load.on_error(OnError::Count).after_each(move |ended| {
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
    judge.sound(&stage.disk).or_else(|why| {
        // Counts of a lazy image are made by the next open.
        if stage.setting.lazy { Ok(0) } else { Err(why) }
    })?;
    let left = judge.after_power_cut(stage, &played.history, usize::MAX, &stage.disk);
    left.map(drop)
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
    let must_tell = match failure.kind {
        _ if failure.kind.is_absorbed() => false,
        // A disk that is full once: freed clusters are made ready, and what failed is tried again.
        Kind::NoSpace => failure.from_then_on && failure.op == DiskOp::Write,
        // Giving back space is advice, and zeroes and sizes have other ways.
        _ => matches!(failure.op, DiskOp::Read | DiskOp::Write | DiskOp::Flush),
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
        let Some(error) = error else { return };
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

fn run(plan: &Plan, report: &mut Report) {
    let seeds = plan.scale.pick(5, 75, 600);
    let mut items: Vec<(String, Script)> = super::scripts::all();
    // A load of a megabyte does not get more interesting by failing at each of its pieces.
    items.retain(|(_, script)| script.setting.size < 1 << 20);
    let replay = |seed| format!("cargo xtask reliability --faults-of {seed}");
    items.extend((0..seeds).map(|seed| (replay(seed), workload(seed))));
    let mut runs = 0;
    let mut events = BTreeSet::new();
    for ((replay, script), result) in items
        .iter()
        .zip(each(plan.jobs, &items, |(_, script)| judge_script(script)))
    {
        match result.and_then(|judged| judged) {
            Ok((more, reached)) => {
                runs += more;
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
    report.say(format!(
        "named points that no workload came to: {}",
        names(false)
    ));
    report.count(Figure::Runs, runs);
    report.say(format!(
        "{} workloads, {runs} runs in which one request to the file failed, or all from one on",
        items.len()
    ));
}

/// Every failure of one script; tells how many.
///
/// # Errors
/// The first that an oracle does not like.
pub fn judge_script(script: &Script) -> Verdict<(u64, BTreeSet<Event>)> {
    let all = failures(script)?;
    let judge = Judge::default();
    for failure in &all {
        judge_failure(&judge, script, *failure).map_err(|why| format!("{failure:?}: {why}"))?;
    }
    judge.end();
    let events = all.iter().filter_map(|failure| failure.event).collect();
    Ok((all.len() as u64, events))
}
