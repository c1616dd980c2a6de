//! Power cuts: every state in which a cut at one place of a simulated disk's log may leave it.
//!
//! The disk logs writes in the order in which it was *sent* them and flushes at their end, each
//! with what it covered. Cut after `n` entries, it holds what those flushes covered, and of the
//! other, *pending* writes any choice: the drive's cache writes back in any order. All choices are
//! too many; these are the ones in which mistakes show:
//!
//! * nothing pending arrives, or everything;
//! * all but one, for each one: whatever should have waited for it did not;
//! * sixteen random choices, sector by sector;
//! * everything, with the newest write torn at each 512 bytes. (An older torn write is its own
//!   prefix's newest.)
//!
//! Different choices often leave the same bytes; such a state is counted once, and looked at once.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use coblock::block::drivers::sim::{Keep, LogEntry, PowerCuts};

use super::judge::{Judge, Verdict};
use super::layers::Cuts;
use super::model::Content;
use super::peer;
use super::play::Played;
use super::rng::Rng;
use super::soundness;

/// Random choices for each place.
const CHOICES: u64 = 16;

/// Units of states whose contents are remembered.
const REMEMBERED: usize = 1 << 20;

/// Which states are judged by more than our own oracles: those whose digest is a multiple.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// About one in so many states is checked by the reference.
    pub reference: u64,
    /// About one in so many states is written to from end to end.
    pub goes_on: u64,
    /// About one in so many states is repaired: no leak is left, and nothing reads otherwise.
    pub repaired: u64,
    /// Most states at one place, drawn from all; 0: all of them.
    pub per_place: usize,
}

/// What was judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Places of the log.
    pub places: u64,
    /// Choices of what arrived, over all places.
    pub choices: u64,
    /// Of these, the ones that left bytes which no choice shortly before had left: reopened and
    /// checked.
    pub states: u64,
    /// States that the reference checked too.
    pub reference: u64,
    /// States that were repaired.
    pub repaired: u64,
    /// Compressed clusters that were inflated while the workload ran.
    pub inflated: u64,
}

impl Counted {
    /// Adds.
    pub fn add(&mut self, more: Counted) {
        self.places += more.places;
        self.choices += more.choices;
        self.states += more.states;
        self.reference += more.reference;
        self.repaired += more.repaired;
        self.inflated += more.inflated;
    }
}

/// What may have arrived when the power goes here.
pub fn choices(cuts: &PowerCuts, at: usize, rng: &mut Rng) -> Vec<Keep> {
    let pending = cuts.pending();
    if pending == 0 {
        return vec![Keep::Nothing];
    }
    let mut keeps = vec![Keep::Nothing, Keep::Everything];
    if pending > 1 {
        // With one pending this is "nothing".
        keeps.extend((0..pending).map(Keep::AllBut));
    }
    keeps.extend((0..CHOICES).map(|_| Keep::Seed(rng.next())));
    // Only where the cut comes just after the write was sent: later cuts would tear it again.
    if at > 0
        && let LogEntry::Write { data, .. } = cuts.entry(at - 1)
    {
        let sectors = data.len().div_ceil(512) as u64;
        keeps.extend((1..sectors).map(Keep::Torn));
    }
    keeps
}

/// Contents of states seen lately, by digest.
#[derive(Default)]
struct Seen {
    units: HashMap<u64, Rc<Vec<Content>>>,
    order: VecDeque<u64>,
}

impl Seen {
    fn remember(&mut self, digest: u64, units: Vec<Content>) {
        let most = REMEMBERED / units.len().max(1);
        self.units.insert(digest, Rc::new(units));
        self.order.push_back(digest);
        if self.order.len() > most
            && let Some(oldest) = self.order.pop_front()
        {
            self.units.remove(&oldest);
        }
    }
}

/// Cuts the power at `places` of a run's log and judges every state.
///
/// # Errors
/// The first state that is wrong: where the cut was, what arrived, and what an oracle said.
pub fn cut_at(
    judge: &Judge,
    played: &Played,
    places: impl IntoIterator<Item = usize>,
    sample: Sample,
) -> Verdict<Counted> {
    let mut cuts = Cuts::new(&played.stage);
    let mut rng = Rng::new(!played.stage.setting.seed);
    let mut counted = Counted {
        inflated: played.stats.clusters_inflated,
        ..Counted::default()
    };
    let mut seen = Seen::default();
    let folder = tempfile::tempdir().map_err(|e| format!("a folder: {e}"))?;
    for at in places {
        cuts.go_to(at);
        counted.places += 1;
        let mut keeps = cuts.choices(&mut rng);
        while sample.per_place > 0 && keeps.len() > sample.per_place {
            let left_out = usize::try_from(rng.below(keeps.len() as u64)).expect("an index");
            keeps.swap_remove(left_out);
        }
        for keep in keeps {
            let story = |why: String| {
                let len = cuts.log_len();
                format!("power cut after {at} of {len} entries, kept {keep:?}: {why}")
            };
            counted.choices += 1;
            let (stage, digest) = cuts.left(&keep);
            let left = stage.top();
            if let Some(units) = seen.units.get(&digest) {
                // The same bytes, but more may have been flushed or begun.
                let judged = played.history.units_after_power_cut(at, units);
                judged.map_err(|v| story(v.to_string()))?;
                let len = soundness::disk_len(&left);
                let judged = played.history.len_after_power_cut(at, len);
                judged.map_err(story)?;
                continue;
            }
            counted.states += 1;
            let units = judge
                .after_power_cut(&stage, &played.history, at, &left)
                .map_err(story)?;
            seen.remember(digest, units);
            if digest.is_multiple_of(sample.reference) && peer::present("power cuts") {
                judge
                    .reference_agrees(&stage, &left, folder.path())
                    .map_err(story)?;
                counted.reference += 1;
            }
            if digest.is_multiple_of(sample.repaired) {
                judge.is_repaired(&stage, &left).map_err(story)?;
                counted.repaired += 1;
            }
            if digest.is_multiple_of(sample.goes_on) {
                judge.goes_on(&stage, &left).map_err(story)?;
            }
        }
    }
    Ok(counted)
}

/// The same at every place after the run's `mark`.
pub fn cut_everywhere(judge: &Judge, played: &Played, sample: Sample) -> Verdict<Counted> {
    cut_at(judge, played, played.mark..=played.log.len(), sample)
}
