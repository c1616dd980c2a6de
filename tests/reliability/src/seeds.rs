//! Part: whole-stack simulation by seed. (R5, R6, R7; rules 9.1 to 9.4.)
//!
//! One seed decides everything: image and options, caches, queues and which runs when, how many
//! requests of which kinds are in flight, how late and in which order the disk answers, which of its
//! requests fail, and where the power goes at the end. *Swarm*: each seed has some of these features
//! and not others, so that every combination comes.
//!
//! What is judged: each read as it returns; after each operation the allocator's sets; at the end the
//! image, what it reads as, and the states after a few power cuts. A seed gives the same run again:
//! the hash of everything that happened says so.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use coblock::block::drivers::sim::{Fault, LogEntry, Match, Op as DiskOp};

use super::crash::{Counted, Sample, cut_at};
use super::judge::{Judge, Verdict};
use super::load::{Effect, OnError};
use super::parallel::each;
use super::part::{Figure, Part, Plan, Report};
use super::play::{Played, Stage, play_with};
use super::rng::{Rng, mix};
use super::script::{Op, Script};
use super::swarm::{self, Params};

/// This part.
pub const PART: Part = Part {
    name: "seeds",
    promise: "the whole stack by seed: schedule, order of completions, delays, failures, options, and \
              the power goes at the end",
    run: |plan, report| run(plan, report),
};

/// Few power cuts a seed; the other parts make many.
const SAMPLE: Sample = Sample {
    reference: 97,
    goes_on: 13,
    repaired: 5,
    per_place: 4,
};

/// Places of the log at which a seed's power goes.
const PLACES: u64 = 4;

/// What at least a quarter of the seeds use.
const WANTED: [&str; 22] = [
    "two queues or more",
    "backing",
    "copy-on-read",
    "throttle-node",
    "drain",
    "drain-all",
    "lock",
    "move",
    "throttle",
    "shrink",
    "grow",
    "resize",
    "insert",
    "remove",
    "replace",
    "options",
    "refused",
    "snapshot",
    "home",
    "fua",
    "unmap",
    "faults",
];

/// Mechanisms, each of which has an effect in at least a quarter of the seeds.
const MECHANISMS: [(&str, Effect); 6] = [
    ("drained sections", Effect::Section),
    ("changes of the graph", Effect::GraphChange),
    ("moves between contexts", Effect::HomeMove),
    ("requests through other contexts", Effect::Elsewhere),
    ("changes of limits", Effect::Limit),
    ("faults", Effect::Fault),
];

/// What a seed is.
#[derive(Clone, Debug)]
pub struct Seed {
    pub script: Script,
    /// What fails: kind of request, how many of them go well before, how, and how many fail.
    pub faults: Vec<(DiskOp, u64, i32, u64)>,
}

/// What came of a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Of everything that happened.
    pub hash: u64,
    pub requests: u64,
    pub errors: u64,
    pub cuts: Counted,
    /// How often the allocator's sets were looked at.
    pub audits: u64,
    /// Mechanisms that had an effect.
    pub effects: BTreeSet<Effect>,
}

/// Draws a seed.
pub fn draw(seed: u64) -> Seed {
    let mut rng = Rng::new(seed ^ 0x5eed_0005);
    let mut params = if rng.chance(50) {
        Params::draw_short(seed)
    } else {
        Params {
            fill: 0,
            ..Params::draw(seed)
        }
    };
    params.requests = usize::try_from(rng.between(40, 250)).expect("small");
    params.in_flight = usize::try_from(rng.pick(&[1, 2, 8, 32, 64])).expect("small");
    params.size = params.size.min(2 << 20);
    params.fill = params.fill.min(params.size);
    params.max_len = params.max_len.min(params.size / 4);
    let mut script = params.script();
    let setting = &mut script.setting;
    setting.queues = usize::try_from(rng.pick(&[1, 1, 2, 3, 4])).expect("small");
    setting.delay_us = rng.pick(&[0, 1, 200, 5000]);
    setting.small_caches = rng.chance(60);
    if rng.chance(35) {
        let part = rng.between(1, setting.size / setting.unit as u64);
        setting.backing = part * setting.unit as u64;
    }
    for _ in 0..rng.pick(&[0, 0, 1, 3]) {
        let at = usize::try_from(rng.below(script.ops.len() as u64)).expect("an index");
        let step = if rng.chance(50) { Op::Reopen } else { Op::Wait };
        script.ops.insert(at, step);
    }
    let count = if rng.chance(40) { rng.between(1, 4) } else { 0 };
    let most = script.ops.len() as u64;
    let faults = (0..count).map(|_| fault(&mut rng, most)).collect();
    swarm::add_features(&mut script, &mut Rng::new(seed ^ 0x0ff3_4705));
    swarm::add_steps(&mut script, &mut Rng::new(seed ^ 0x57e9_5000));
    swarm::add_changes(&mut script, &mut Rng::new(seed ^ 0xc4a4_9e50));
    Seed { script, faults }
}

impl Seed {
    /// What it makes use of.
    pub fn words(&self) -> BTreeSet<&'static str> {
        let mut words = self.script.words();
        if !self.faults.is_empty() {
            words.insert("faults");
        }
        words
    }
}

/// A fault of a disk that is sent some `requests`.
fn fault(rng: &mut Rng, requests: u64) -> (DiskOp, u64, i32, u64) {
    let op = rng.pick(&[
        DiskOp::Read,
        DiskOp::Write,
        DiskOp::Write,
        DiskOp::Flush,
        DiskOp::Zero,
        DiskOp::Discard,
        DiskOp::Resize,
    ]);
    let errno = rng.pick(&[libc::EIO, libc::ENOSPC, libc::EINTR, libc::EAGAIN]);
    // Far enough for something to be there, near enough for the run to come so far.
    let nth = match op {
        DiskOp::Read | DiskOp::Write => rng.below(requests / 2),
        _ => rng.below(6),
    };
    (op, nth, errno, rng.pick(&[1, 1, 5, u64::MAX]))
}

/// A hash of everything that happens, in order.
#[derive(Default)]
struct Trace {
    hash: Cell<u64>,
    lines: RefCell<Vec<String>>,
}

impl Trace {
    fn add(&self, value: u64) {
        self.hash.set(mix(self.hash.get() ^ value).wrapping_add(1));
    }

    fn add_text(&self, text: &str) {
        text.bytes().for_each(|byte| self.add(u64::from(byte)));
    }

    fn add_log(&self, log: &[LogEntry]) {
        for entry in log {
            match entry {
                LogEntry::Write { offset, data } => {
                    self.add(*offset);
                    let words = data.chunks(8);
                    let word = |w: &[u8]| w.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
                    words.for_each(|w| self.add(word(w)));
                }
                LogEntry::Zero { offset, len } => {
                    self.add(*offset);
                    self.add(*len);
                }
                LogEntry::Resize { len } => self.add(*len),
                LogEntry::Flush { covered } => covered.iter().for_each(|n| self.add(*n as u64)),
            }
        }
    }
}

/// Plays a seed; `print` gets a line for each request that ended.
fn play_seed(seed: &Seed, trace: &Rc<Trace>, print: bool) -> Played {
    let trace = trace.clone();
    let faults = seed.faults.clone();
    let prepare = move |stage: &Stage, load: super::load::Load| {
        for (op, nth, errno, times) in faults {
            let fault = Fault::new(Match::ops(&[op]), errno).after(nth).times(times);
            stage.disk.fail(fault);
        }
        load.on_error(OnError::Count).after_each(move |ended| {
            let context = coblock::aio::current().expect("a request runs in a context");
            let result = ended.error.map_or("ok".to_string(), |e| e.to_string());
            let line = format!(
                "{:>12} ns  {}  {:>4}  {}  {result}",
                context.now_ns(),
                context.name(),
                ended.index,
                ended.op
            );
            trace.add_text(&line);
            if print {
                trace.lines.borrow_mut().push(line);
            }
        })
    };
    play_with(&seed.script, prepare)
}

/// Runs a seed and judges it.
///
/// # Errors
/// What an oracle says.
pub fn judge_seed(seed: u64) -> Verdict<Outcome> {
    judge_drawn(&draw(seed), seed)
}

fn judge_drawn(seed: &Seed, number: u64) -> Verdict<Outcome> {
    let trace = Rc::new(Trace::default());
    let mut played = play_seed(seed, &trace, false);
    trace.add_log(&played.log);
    trace.add(played.now_ns);
    let judge = Judge::default();
    let judged = judge_end(&judge, seed, &mut played).and_then(|()| {
        let mut rng = Rng::new(number ^ 0x0cc7);
        let len = played.log.len() as u64;
        let mut places: Vec<usize> = (0..PLACES)
            .map(|_| usize::try_from(rng.below(len + 1)).expect("an index"))
            .collect();
        places.sort_unstable();
        cut_at(&judge, &played, places, SAMPLE)
    });
    judge.end();
    let cuts = judged?;
    Ok(Outcome {
        hash: trace.hash.get(),
        requests: played.requests as u64,
        errors: played.errors as u64,
        cuts,
        audits: played.audits,
        effects: played.effects,
    })
}

/// The image as the run left it.
fn judge_end(judge: &Judge, seed: &Seed, played: &mut Played) -> Verdict {
    let well = played.errors == 0 && played.flushed.is_ok() && played.closed.is_ok();
    if seed.faults.is_empty() {
        if !well {
            return Err(format!(
                "{} requests failed, flush {:?}, close {:?}, though no fault was set",
                played.errors, played.flushed, played.closed
            ));
        }
        return judge.after_all(played);
    }
    played.stage.disk.clear_faults();
    let top = played.stage.top();
    judge
        .after_power_cut(&played.stage, &played.history, usize::MAX, &top)
        .map(drop)
}

/// Runs a seed and prints every request in the order in which they ended.
///
/// # Errors
/// What an oracle says, after the trace.
pub fn replay(seed: u64) -> Verdict<Outcome> {
    let drawn = draw(seed);
    println!("{}\n\nfaults {:?}\n", drawn.script, drawn.faults);
    let trace = Rc::new(Trace::default());
    // Where it hangs: what everybody waits for, while they still live.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        eprintln!("{}", coblock::coroutine::dump(true));
    }));
    let played = {
        let trace = trace.clone();
        let play = std::panic::AssertUnwindSafe(|| play_seed(&drawn, &trace, true));
        std::panic::catch_unwind(play)
    };
    for line in trace.lines.borrow().iter() {
        println!("{line}");
    }
    match played {
        Err(panic) => Err(super::parallel::message(&*panic)),
        Ok(played) => {
            println!(
                "\nflush {:?}, close {:?}, {} entries sent to the file",
                played.flushed,
                played.closed,
                played.log.len()
            );
            judge_drawn(&drawn, seed)
        }
    }
}

/// What many seeds came to.
#[derive(Clone, Debug, Default)]
pub struct Many {
    pub seeds: u64,
    pub requests: u64,
    pub errors: u64,
    pub cuts: Counted,
    pub audits: u64,
    /// How many seeds make use of each operation, flag and feature.
    pub words: BTreeMap<&'static str, u64>,
    /// In how many each mechanism had an effect.
    pub mechanisms: BTreeMap<&'static str, u64>,
    pub seconds: f64,
    /// The seed and what was wrong.
    pub failures: Vec<(u64, String)>,
}

impl Many {
    /// How many seeds make use of what.
    pub fn words_line(&self) -> String {
        format!("seeds that make use of: {}", joined(&self.words))
    }

    /// In how many seeds each mechanism had an effect.
    pub fn mechanisms_line(&self) -> String {
        format!(
            "of {} seeds these had an effect in: {}",
            self.seeds,
            joined(&self.mechanisms)
        )
    }

    /// One line.
    pub fn line(&self) -> String {
        format!(
            "{} seeds, {} failures, {} requests, {} power cuts, {:.0} seeds/s",
            self.seeds,
            self.failures.len(),
            self.requests,
            self.cuts.states,
            self.seeds as f64 / self.seconds.max(1e-9)
        )
    }
}

fn joined(counts: &BTreeMap<&str, u64>) -> String {
    let each = counts.iter().map(|(word, many)| format!("{word} {many}"));
    each.collect::<Vec<_>>().join(", ")
}

/// Runs `count` seeds from `first` on; every `twice`th of them two times, which must not differ.
pub fn many(first: u64, count: u64, twice: u64, jobs: usize) -> Many {
    let began = std::time::Instant::now();
    let seeds: Vec<u64> = (first..first + count).collect();
    let results = each(jobs, &seeds, |&seed| {
        let outcome = judge_seed(seed)?;
        if (seed - first).is_multiple_of(twice) && judge_seed(seed)? != outcome {
            return Err("two runs of this seed differ".to_string());
        }
        Ok(outcome)
    });
    let mut many = Many {
        seeds: count,
        ..Many::default()
    };
    for (&seed, result) in seeds.iter().zip(results) {
        for word in draw(seed).words() {
            *many.words.entry(word).or_default() += 1;
        }
        match result.and_then(|judged| judged) {
            Ok(outcome) => {
                many.requests += outcome.requests;
                many.errors += outcome.errors;
                many.audits += outcome.audits;
                many.cuts.add(outcome.cuts);
                let its = MECHANISMS
                    .iter()
                    .filter(|its| outcome.effects.contains(&its.1));
                its.for_each(|(name, _)| *many.mechanisms.entry(*name).or_default() += 1);
            }
            Err(why) => many.failures.push((seed, why)),
        }
    }
    many.seconds = began.elapsed().as_secs_f64();
    many
}

fn run(plan: &Plan, report: &mut Report) {
    let count = plan.scale.pick(200, 2000, 1_000_000);
    let many = many(0, count, count.div_ceil(50), plan.jobs);
    report.count(Figure::Seeds, many.seeds);
    report.count(Figure::States, many.cuts.states);
    if many.cuts.inflated == 0 {
        report.fail("seeds", "no seed met a compressed cluster");
    }
    // A quarter of the seeds ask for each of those that need many queues or change the graph, and in
    // a quarter each mechanism does something.
    let mechanisms = MECHANISMS.map(|(name, _)| (name, &many.mechanisms));
    let words = WANTED.map(|word| (word, &many.words));
    for (word, counts) in mechanisms.into_iter().chain(words) {
        let uses = counts.get(word).copied().unwrap_or(0);
        if uses < count / 4 {
            report.fail("seeds", &format!("only {uses} seeds use '{word}'"));
        }
    }
    report.say(many.line());
    report.say(many.words_line());
    report.say(many.mechanisms_line());
    report.say(format!(
        "{} compressed clusters inflated; {} requests failed because the disk did; {} times counts equalled references with requests in flight; 50 seeds ran twice, with the same hash of everything that happened",
        many.cuts.inflated, many.errors, many.audits
    ));
    for (seed, why) in &many.failures {
        report.fail(&format!("cargo xtask sim --seed {seed}"), why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(seed: u64) {
        judge_seed(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }

    /// A filter was opened, the disk got shorter, and the filter came above it: the disk was as long as
    /// before for its user.
    #[test]
    fn a_filter_opened_before_a_resize() {
        passes(21);
    }

    /// `BlockBackend::resize` waited for requests of a filter that was taken out meanwhile: it resized
    /// the filter, which was closed.
    #[test]
    fn a_resize_meets_a_filter_that_goes() {
        passes(140);
    }

    /// Readers left one after the other while a transaction asked for the graph lock: the last one woke
    /// nobody, and everything stood still.
    #[test]
    fn the_last_reader_wakes_a_transaction() {
        passes(693);
    }
}
