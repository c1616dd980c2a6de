//! Part: every sequence of a few operations, cut at every write. (R2.)
//!
//! Nothing random: an alphabet of operations on the same few clusters, all words of up to two letters
//! (three for a release), on an image with and without a backing file, in clusters of 64 KiB and
//! 4 KiB, and on one of 4 KiB whose other clusters are compressed. What comes before a word is
//! durable.

use coblock::block::RequestFlags;

use super::crash::{Counted, Sample};
use super::parallel::each;
use super::part::{Figure, Part, Plan, Report};
use super::power_cuts::judge_cuts;
use super::script::{Op, Script, Setting};

/// This part.
pub const PART: Part = Part {
    name: "exhaustive",
    promise: "every sequence of operations up to a length, on two cluster sizes, with the power cut at \
              every write",
    run: |plan, report| run(plan, report),
};

/// Nearly all images here are alike, so few go to the reference.
const SAMPLE: Sample = Sample {
    reference: 251,
    goes_on: 31,
    repaired: 7,
    per_place: 0,
};

/// The alphabet, for clusters of `c` bytes. Clusters 0 and 1 are written and durable; with a backing
/// file, 0 to 5 read as it does otherwise.
fn alphabet(c: u64) -> Vec<Op> {
    let len = usize::try_from(c).expect("a cluster");
    vec![
        // In place, and a part of a cluster.
        Op::write(c, len),
        Op::write(512, 512),
        // New: over the edge of two clusters, and a part of one.
        Op::write(2 * c + c / 2, len),
        Op::write(4 * c + 1024, 512),
        Op::Zero {
            offset: c,
            len,
            flags: RequestFlags::empty(),
        },
        Op::Zero {
            offset: 0,
            len: 2 * len,
            flags: RequestFlags::MAY_UNMAP,
        },
        Op::Discard {
            offset: c,
            len: 2 * len,
        },
        Op::Copy { offset: 3 * c, len },
        Op::Grow { len: 9 * c },
        // In the middle of a written cluster.
        Op::Shrink { len: c + c / 2 },
        Op::Flush,
        Op::Reopen,
    ]
}

/// What comes before each word.
fn before(c: u64) -> [Op; 3] {
    let len = usize::try_from(2 * c).expect("two clusters");
    [Op::write(0, len), Op::Flush, Op::Mark]
}

/// Every word of `letters` with one to `longest` of them.
fn words(letters: &[Op], longest: usize) -> Vec<Vec<Op>> {
    let mut all = Vec::new();
    let mut last = vec![Vec::new()];
    for _ in 0..longest {
        last = last
            .iter()
            .flat_map(|word: &Vec<Op>| letters.iter().map(|op| [&word[..], &[*op]].concat()))
            .collect();
        all.extend(last.iter().cloned());
    }
    all
}

/// All scripts of words up to `longest`.
pub fn scripts(longest: usize) -> Vec<Script> {
    let mut scripts = Vec::new();
    for cluster_bits in [16, 12] {
        let c = 1 << cluster_bits;
        let mut images = vec![(0, 0), (5 * c + 512, 0)];
        if cluster_bits == 12 {
            images.push((0, 4));
        }
        for (backing, compressed) in images {
            for word in words(&alphabet(c), longest) {
                let setting = Setting {
                    cluster_bits,
                    size: 8 * c,
                    backing,
                    compressed,
                    delay_us: 0,
                    ..Setting::default()
                };
                let ops = before(c).into_iter().chain(word).collect();
                scripts.push(Script { setting, ops });
            }
        }
    }
    scripts
}

fn run(plan: &Plan, report: &mut Report) {
    let scripts = scripts(plan.scale.pick(1, 2, 3));
    let mut total = Counted::default();
    for result in each(plan.jobs, &scripts, |script| judge_cuts(script, SAMPLE)) {
        match result.and_then(|judged| judged) {
            Ok(counted) => total.add(counted),
            Err(why) => report.fail(
                "cargo xtask reliability --script FILE (the lines above)",
                &why,
            ),
        }
    }
    report.count(Figure::States, total.states);
    if total.inflated == 0 {
        report.fail("exhaustive", "no sequence met a compressed cluster");
    }
    report.say(format!(
        "{} sequences, cut at {} places in {} ways: {} different states, {} of them checked by qemu-img, {} repaired",
        scripts.len(),
        total.places,
        total.choices,
        total.states,
        total.reference,
        total.repaired
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many as there are, and all of them can be played.
    #[test]
    fn sequences_are_complete() {
        let letters = alphabet(4096).len();
        let all = scripts(2);
        assert_eq!(all.len(), 5 * (letters + letters * letters));
        for script in all {
            script.judge().unwrap_or_else(|e| panic!("{e}\n{script}"));
        }
    }
}
