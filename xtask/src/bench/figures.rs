//! From samples to figures: medians, ratios within a round, and whether the goals are met.

use serde_json::{Map, Value, json};

use super::engines::{Engine, Sample};
use super::measure::Measured;
use super::rows::Goal;

/// How much CPU growth beside the floor's own is allowed.
const GROWTH: f64 = 1.1;

/// A goal, and what was measured.
pub struct Verdict {
    /// In words, with its number.
    pub goal: String,
    /// What the goal's number is compared with; `None` where a figure that it needs is missing.
    pub measured: Option<f64>,
    pub met: bool,
}

/// The value of a sample that a ratio is about.
pub type Figure = fn(&Sample) -> f64;

pub const CPU: Figure = |s| s.cpu;
pub const RATE: Figure = |s| s.rate;

/// Least, median and most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub least: f64,
    pub median: f64,
    pub most: f64,
}

impl Spread {
    /// Of `values`; `None` if there is none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let (&least, &most) = (sorted.first()?, sorted.last()?);
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Some(Spread {
            least,
            median,
            most,
        })
    }
}

impl Measured {
    /// Least, median and most of `figure` over the rounds of `engine`.
    pub fn spread(&self, engine: Engine, figure: Figure) -> Option<Spread> {
        Spread::of(self.samples(engine).iter().map(figure))
    }

    /// Median over the rounds of ours to `other`'s in the same round.
    pub fn ratio(&self, other: Engine, figure: Figure) -> Option<f64> {
        self.ratio_to_best(&[other], figure, f64::min)
    }

    /// The same to the best of `others` in each round; `better` chooses between two.
    fn ratio_to_best(
        &self,
        others: &[Engine],
        figure: Figure,
        better: fn(f64, f64) -> f64,
    ) -> Option<f64> {
        let ours = self.samples(Engine::Coblock).iter().enumerate();
        let ratios = ours.filter_map(|(round, ours)| {
            let theirs = others.iter().filter_map(|&e| self.samples(e).get(round));
            Some(figure(ours) / theirs.map(figure).reduce(better)?)
        });
        Some(Spread::of(ratios)?.median)
    }

    /// The implementations of others that took part.
    fn others(&self) -> Vec<Engine> {
        let engines = self.columns.iter().map(|column| column.engine);
        engines.filter(|engine| engine.is_other()).collect()
    }

    /// Requests per second, ours to the most of the others in the same round.
    pub fn rate_to_best(&self) -> Option<f64> {
        self.ratio_to_best(&self.others(), RATE, f64::max)
    }

    /// Whether each goal of the row is met. `all` are the rows of this run.
    pub fn verdicts(&self, all: &[Measured]) -> Vec<Verdict> {
        let verdicts = self.row.goals.iter().map(|goal| self.verdict(goal, all));
        verdicts.collect()
    }

    fn verdict(&self, goal: &Goal, all: &[Measured]) -> Verdict {
        let at_most = |text: String, limit: f64, measured: Option<f64>| Verdict {
            goal: text,
            measured,
            met: measured.is_some_and(|m| m <= limit),
        };
        let at_least = |text: String, limit: f64, measured: Option<f64>| Verdict {
            goal: text,
            measured,
            met: measured.is_some_and(|m| m >= limit),
        };
        match *goal {
            Goal::CpuToFloor(limit) => at_most(
                format!("CPU <= {limit} x floor"),
                limit,
                self.ratio(Engine::Floor, CPU),
            ),
            Goal::CpuToQemu(limit) => at_most(
                format!("CPU <= {limit} x qemu"),
                limit,
                self.ratio(Engine::Qemu, CPU),
            ),
            Goal::CpuToBest => at_most(
                "CPU <= the best other's".into(),
                1.0,
                self.ratio_to_best(&self.others(), CPU, f64::min),
            ),
            Goal::RateToFloor(limit) => at_least(
                format!("requests/s >= {limit} x floor"),
                limit,
                self.ratio(Engine::Floor, RATE),
            ),
            Goal::RateToQemu => at_least(
                "requests/s >= qemu's".into(),
                1.0,
                self.ratio(Engine::Qemu, RATE),
            ),
            Goal::RateToBest => at_least(
                "requests/s >= the best other's".into(),
                1.0,
                self.rate_to_best(),
            ),
            Goal::ResidentMib(limit) => at_most(
                format!("resident <= {limit} MiB"),
                limit,
                self.resident_mib(Engine::Coblock),
            ),
            Goal::GrowsAsFloor(base) => {
                let base_row = all.iter().find(|m| m.row.name == base);
                let here = self.ratio(Engine::Floor, CPU);
                let there = base_row.and_then(|m| m.ratio(Engine::Floor, CPU));
                let growth = here.zip(there).map(|(here, there)| here / there);
                at_most(
                    format!("CPU / floor <= {GROWTH} x that of {base}"),
                    GROWTH,
                    growth,
                )
            }
        }
    }

    /// Largest resident set of any run, in MiB.
    pub fn resident_mib(&self, engine: Engine) -> Option<f64> {
        let most = self.samples(engine).iter().map(|s| s.rss_kib).max()?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let mib = most as f64 / 1024.0;
        Some(mib)
    }

    /// Everything, for the file.
    pub fn json(&self, all: &[Measured]) -> Value {
        let engines = self.columns.iter().map(|column| {
            let each = |figure: Figure| {
                let values = column.samples.iter().map(figure);
                values.map(rounded).collect::<Vec<f64>>()
            };
            let figures = json!({
                "cpu_seconds_per_100k": each(CPU),
                "requests_per_second": each(RATE),
                "max_resident_mib": self.resident_mib(column.engine).map(rounded),
                "trouble": column.trouble,
            });
            (column.engine.name().to_string(), figures)
        });
        let goals = self.verdicts(all).into_iter().map(|verdict| {
            json!({
                "goal": verdict.goal,
                "measured": verdict.measured.map(rounded),
                "met": verdict.met,
            })
        });
        json!({
            "row": self.row.name,
            "requests": self.count,
            "skipped": self.skipped,
            "cpu_to_floor": self.ratio(Engine::Floor, CPU).map(rounded),
            "cpu_to_qemu": self.ratio(Engine::Qemu, CPU).map(rounded),
            "rate_to_best_other": self.rate_to_best().map(rounded),
            "goals": goals.collect::<Vec<_>>(),
            "engines": Map::from_iter(engines),
        })
    }
}

/// Four digits after the point: more is noise.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::super::measure::Column;
    use super::super::rows::ROWS;
    use super::*;

    fn measured(columns: &[(Engine, &[(f64, f64)])]) -> Measured {
        let columns = columns.iter().map(|(engine, samples)| Column {
            engine: *engine,
            samples: samples
                .iter()
                .map(|&(cpu, rate)| Sample {
                    cpu,
                    rate,
                    rss_kib: 2048,
                })
                .collect(),
            failed: false,
            trouble: None,
        });
        Measured {
            row: &ROWS[0],
            count: 1,
            columns: columns.collect(),
            skipped: None,
        }
    }

    /// An even number of rounds has no middle one: the median lies between the two.
    #[test]
    fn median_of_odd_and_even() {
        let median = |values: &[f64]| Spread::of(values.iter().copied()).unwrap().median;
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(Spread::of([].into_iter()), None);
    }

    /// Ratios are taken within a round: two rounds of a machine that became twice as slow show the
    /// same ratio twice, where a ratio of medians would mix them.
    #[test]
    fn ratios_are_within_a_round() {
        let ours = [(1.0, 10.0), (2.0, 5.0), (8.0, 1.0)];
        let floor = [(2.0, 20.0), (4.0, 10.0), (4.0, 2.0)];
        let m = measured(&[(Engine::Coblock, &ours), (Engine::Floor, &floor)]);
        assert_eq!(m.ratio(Engine::Floor, CPU), Some(0.5));
        assert_eq!(m.ratio(Engine::Floor, RATE), Some(0.5));
        assert_eq!(m.ratio(Engine::Qemu, CPU), None);
    }

    /// The best other is chosen round by round, and the floor is no other.
    #[test]
    fn best_other_is_of_each_round() {
        let m = measured(&[
            (Engine::Coblock, &[(1.0, 12.0), (1.0, 12.0)]),
            (Engine::Floor, &[(0.1, 100.0), (0.1, 100.0)]),
            (Engine::Qemu, &[(2.0, 6.0), (4.0, 3.0)]),
            (Engine::Imago, &[(4.0, 3.0), (2.0, 6.0)]),
            (Engine::Qcow2Rs, &[]),
        ]);
        assert_eq!(m.rate_to_best(), Some(2.0));
        let best = m.verdict(&Goal::CpuToBest, &[]);
        assert_eq!((best.measured, best.met), (Some(0.5), true));
    }

    /// A goal whose figures are missing is not met.
    #[test]
    fn a_goal_without_figures_is_missed() {
        let m = measured(&[(Engine::Coblock, &[(1.0, 1.0)])]);
        for goal in [
            Goal::CpuToFloor(9.0),
            Goal::RateToBest,
            Goal::GrowsAsFloor("nothing"),
        ] {
            let verdict = m.verdict(&goal, &[]);
            assert_eq!((verdict.measured, verdict.met), (None, false));
        }
        assert!(m.verdict(&Goal::ResidentMib(2.0), &[]).met);
        assert!(!m.verdict(&Goal::ResidentMib(1.9), &[]).met);
    }
}
