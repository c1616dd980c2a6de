//! Part: the power goes at every write. (Rule 9.3, R1.)
//!
//! Workloads come from seeds and from the files in `scripts/`. Each is played once; then every place
//! of the log of what the file was sent is a power cut, with every choice of `crash.rs`.

use super::crash::{Counted, Sample, cut_everywhere};
use super::judge::{Judge, Verdict};
use super::parallel::each;
use super::part::{Figure, Part, Plan, Report};
use super::play::play;
use super::rng::Rng;
use super::script::Script;
use super::swarm::{self, Params};

/// This part.
pub const PART: Part = Part {
    name: "power-cuts",
    promise: "the power goes at every write of every workload: no corruption, every sector as it was \
              flushed or as written since",
    run: |plan, report| run(plan, report),
};

/// One in a hundred states is checked by the reference.
const SAMPLE: Sample = Sample {
    reference: 101,
    goes_on: 97,
    repaired: 11,
    per_place: 0,
};

/// The workload of a seed; some with several queues, flags and resizes, some on an image that begins
/// with an internal snapshot.
pub fn workload(seed: u64) -> Script {
    let mut rng = Rng::new(seed ^ 0xbac4);
    let mut script = Params::draw_short(seed).script();
    let setting = &mut script.setting;
    if rng.chance(30) {
        setting.backing = (setting.size / 2).next_multiple_of(setting.unit as u64);
    }
    if rng.chance(20) {
        setting.small_caches = false;
    }
    if rng.chance(20) {
        let at = usize::try_from(rng.below(script.ops.len() as u64)).expect("an index");
        script.ops.insert(at, super::script::Op::Reopen);
    }
    script.setting.queues = rng.pick(&[1, 1, 2, 3]);
    if rng.chance(40) {
        swarm::add_flags(&mut script, &mut rng);
    }
    if rng.chance(30) {
        swarm::add_resizes(&mut script, &mut rng, 1);
    }
    let setting = &mut script.setting;
    if setting.version > 2 && setting.refcount_order > 2 && rng.chance(30) {
        setting.kept = rng.between(1, 12);
    }
    script
}

/// Plays a script and cuts the power everywhere.
///
/// # Errors
/// What an oracle says, and the script.
pub fn judge_script(script: &Script) -> Verdict<Counted> {
    judge_cuts(script, SAMPLE)
}

/// The same with another sample of the states.
///
/// # Errors
/// As [`judge_script`].
pub fn judge_cuts(script: &Script, sample: Sample) -> Verdict<Counted> {
    let mut played = play(script);
    let judge = Judge::default();
    let judged = judge
        .after_all(&mut played)
        .and_then(|()| cut_everywhere(&judge, &played, sample));
    judge.end();
    judged.map_err(|why| format!("{why}\n{script}"))
}

fn run(plan: &Plan, report: &mut Report) {
    let seeds = plan.scale.pick(8, 192, 20_000);
    let mut items: Vec<(String, Script)> = super::scripts::all();
    let replay = |seed| format!("cargo xtask reliability --power-cuts-of {seed}");
    items.extend((0..seeds).map(|seed| (replay(seed), workload(seed))));
    let mut total = Counted::default();
    let workloads = items.len();
    for (item, result) in items
        .iter()
        .zip(each(plan.jobs, &items, |(_, script)| judge_script(script)))
    {
        match result.and_then(|judged| judged) {
            Ok(counted) => total.add(counted),
            Err(why) => report.fail(&item.0, &why),
        }
    }
    report.count(Figure::States, total.states);
    if total.inflated == 0 {
        report.fail("power-cuts", "no workload met a compressed cluster");
    }
    report.say(format!(
        "{workloads} workloads, cut at {} places in {} ways: {} different states, {} of them checked by qemu-img, {} repaired; {} compressed clusters inflated",
        total.places, total.choices, total.states, total.reference, total.repaired, total.inflated
    ));
}
