//! `cargo xtask bench --queues`: what more queues bring, each a thread with a loop of its own.
//!
//! Every workload runs with one queue and with two in each round, in an order that changes from
//! round to round; the figure is how often the requests of one fit into those of two. Beside the
//! qcow2 image stand the floor (`tests/peers/floor`: a bare ring for each thread, on that same image),
//! a raw file through our own layers, and a disk that does nothing.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::engines::{Engine, Told};
use super::figures::Spread;
use super::rows::stride;
use crate::{Outcome, child};

/// How long each run lasts.
const SECONDS: f64 = 2.0;
/// Requests in flight, for each queue.
const DEPTH: u32 = 32;
/// Bytes of a request.
const REQUEST: u64 = 4096;
/// The floor counts requests instead of time: so many for each of its threads, which is about
/// [`SECONDS`].
const FLOOR_READS: u64 = 1_500_000;
const FLOOR_WRITES: u64 = 400_000;
/// A run of it that takes longer is given up.
const LIMIT: Duration = Duration::from_secs(120);

/// What a workload runs on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Qcow2,
    /// The same image, and nothing of ours above it.
    Floor,
    Raw,
    Null,
}

/// One line of the table.
struct Workload {
    name: &'static str,
    on: On,
    write: bool,
    goal: Goal,
}

/// What two queues must reach.
enum Goal {
    /// So many times the requests of one.
    AtLeast(f64),
    /// That part of what the floor does in the line above.
    OfFloor(f64),
    /// Only to compare with.
    None,
}

const WORKLOADS: [Workload; 8] = [
    Workload {
        name: "cached reads, raw file",
        on: On::Raw,
        write: false,
        goal: Goal::None,
    },
    Workload {
        name: "cached reads, floor",
        on: On::Floor,
        write: false,
        goal: Goal::None,
    },
    Workload {
        name: "cached reads, qcow2",
        on: On::Qcow2,
        write: false,
        goal: Goal::AtLeast(1.7),
    },
    Workload {
        name: "overwrites, raw file",
        on: On::Raw,
        write: true,
        goal: Goal::None,
    },
    Workload {
        name: "overwrites, floor",
        on: On::Floor,
        write: true,
        goal: Goal::None,
    },
    Workload {
        name: "overwrites, qcow2",
        on: On::Qcow2,
        write: true,
        goal: Goal::OfFloor(0.9),
    },
    Workload {
        name: "reads, null",
        on: On::Null,
        write: false,
        goal: Goal::AtLeast(1.7),
    },
    Workload {
        name: "overwrites, null",
        on: On::Null,
        write: true,
        goal: Goal::AtLeast(1.7),
    },
];

/// Requests per second of one workload, a pair for each round; none where it could not be measured.
type Rounds = Vec<[f64; 2]>;

/// The images, and the program that runs on them.
pub struct Queues<'a> {
    pub coblock: &'a Path,
    /// `None`: it cannot be built here.
    pub floor: Option<&'a Path>,
    /// Where the images go.
    pub dir: &'a Path,
    /// Bytes of data in each.
    pub size: u64,
    pub rounds: usize,
}

impl Queues<'_> {
    /// Measures everything: the table, and the figures.
    ///
    /// # Errors
    /// The program cannot be run or fails.
    pub fn measure(&self) -> Result<(String, Value), String> {
        let made = self.make();
        let measured = made.and_then(|()| self.rounds());
        for on in [On::Qcow2, On::Raw] {
            // What was not made need not be removed.
            let _ = fs::remove_file(self.image(on));
        }
        let measured = measured?;
        let rows = WORKLOADS
            .iter()
            .zip(&measured)
            .map(|(workload, rounds)| json!({"name": workload.name, "iops": rounds}));
        let report = json!({"depth": DEPTH, "rows": rows.collect::<Vec<_>>()});
        Ok((table(&measured), report))
    }

    /// Full images.
    fn make(&self) -> Outcome {
        for (on, format) in [(On::Qcow2, "qcow2"), (On::Raw, "raw")] {
            let (path, size) = (self.image(on), self.size.to_string());
            self.run(&["img", "create", "-q", "-f", format, &path, &size])?;
            let blocks = (self.size >> 16).to_string();
            let fill = [
                "--rw=write",
                "--bs=64k",
                "--number-ios",
                &blocks,
                "--runtime=3600",
            ];
            self.bench(on, &fill)?;
        }
        Ok(())
    }

    fn rounds(&self) -> Result<Vec<Rounds>, String> {
        let mut all: Vec<Rounds> = WORKLOADS.iter().map(|_| Vec::new()).collect();
        for round in 0..self.rounds {
            for (workload, rounds) in WORKLOADS.iter().zip(&mut all) {
                if workload.on == On::Floor && self.floor.is_none() {
                    continue;
                }
                let mut iops = [0.0; 2];
                let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
                for at in order {
                    iops[at] = match (workload.on, self.floor) {
                        (On::Floor, Some(floor)) => {
                            self.bare(floor, workload.write, at as u64 + 1)?
                        }
                        _ => self.timed(workload, at + 1)?,
                    };
                }
                rounds.push(iops);
                eprintln!("round {}: {}: {iops:.0?}", round + 1, workload.name);
            }
        }
        Ok(all)
    }

    fn image(&self, on: On) -> String {
        let name = match on {
            On::Qcow2 | On::Floor => "queues.qcow2",
            On::Raw => "queues.raw",
            On::Null => {
                return json!({
                    "driver": "raw",
                    "file": {"driver": "null-co", "size": self.size.to_string()},
                })
                .to_string()
                .replacen('{', "json:{", 1);
            }
        };
        self.dir.join(name).to_string_lossy().into_owned()
    }

    fn timed(&self, workload: &Workload, queues: usize) -> Result<f64, String> {
        let rw = if workload.write {
            "randwrite"
        } else {
            "randread"
        };
        let (queues, rw) = (format!("--queues={queues}"), format!("--rw={rw}"));
        let (depth, time) = (format!("--iodepth={DEPTH}"), format!("--runtime={SECONDS}"));
        self.bench(workload.on, &[&queues, &rw, &depth, &time])
    }

    /// Requests per second of a bare ring in each of `threads` threads.
    fn bare(&self, floor: &Path, write: bool, threads: u64) -> Result<f64, String> {
        let count = threads * if write { FLOOR_WRITES } else { FLOOR_READS };
        let mut command = Command::new(floor);
        command.args(["-t", "writeback", "-s", &REQUEST.to_string()]);
        command.args(["-S", &stride(REQUEST, self.size / REQUEST).to_string()]);
        command.args(["-d", &(u64::from(DEPTH) * threads).to_string()]);
        command.args(["-c", &count.to_string(), "--threads", &threads.to_string()]);
        if write {
            command.args(["-w", "--pattern=7"]);
        }
        command.arg(self.image(On::Floor));
        let done = child::run(&mut command, LIMIT)?;
        let told = Told::read(Engine::Floor, &done.stdout).filter(|_| done.status == 0);
        let told = told.ok_or_else(|| format!("the floor: {}", done.stderr.trim()))?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let count = count as f64;
        Ok(count / told.seconds.max(1e-6))
    }

    /// Requests per second of one run.
    fn bench(&self, on: On, words: &[&str]) -> Result<f64, String> {
        let image = self.image(on);
        let mut all = vec!["bench", &image, "--allow-write", "--verify=false"];
        if on == On::Raw {
            all.push("--format=raw");
        }
        all.push("--output=json");
        all.extend(words);
        let told = self.run(&all)?;
        let told: Value = serde_json::from_str(&told).map_err(|e| format!("{all:?}: {e}"))?;
        let iops = told["iops"].as_f64();
        iops.ok_or_else(|| format!("{all:?}: it told no requests per second"))
    }

    fn run(&self, words: &[&str]) -> Result<String, String> {
        let output = Command::new(self.coblock)
            .args(words)
            .output()
            .map_err(|e| format!("{}: {e}", self.coblock.display()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(format!("coblock {}: {said}", words.join(" ")))
    }
}

/// The figures, for people.
fn table(measured: &[Rounds]) -> String {
    let mut text = String::from(
        "| | one queue, requests/s | two | two / one | goal |\n|---|---|---|---|---|\n",
    );
    let mut floor = None;
    for (workload, rounds) in WORKLOADS.iter().zip(measured) {
        let of = |at: usize| Spread::of(rounds.iter().map(move |round| round[at]));
        let ratio = Spread::of(rounds.iter().map(|[one, two]| two / one));
        let (Some(one), Some(two), Some(ratio)) = (of(0), of(1), ratio) else {
            writeln!(text, "| {} | - | - | - | not measured |", workload.name)
                .expect("a string takes everything");
            floor = None;
            continue;
        };
        let (goal, needed) = match (&workload.goal, floor) {
            (Goal::AtLeast(goal), _) => (format!("at least {goal}"), Some(*goal)),
            (Goal::OfFloor(part), Some(floor)) => {
                let goal = part * floor;
                let goal_text = format!("at least {goal:.2}, {part} of the floor's");
                (goal_text, Some(goal))
            }
            (Goal::OfFloor(_), None) => ("not judged without the floor".to_string(), None),
            (Goal::None, _) => (String::new(), None),
        };
        let verdict = match needed {
            Some(needed) if ratio.median >= needed => ": met",
            Some(_) => ": MISSED",
            None => "",
        };
        writeln!(
            text,
            "| {} | {:.0} | {:.0} | {:.2} | {goal}{verdict} |",
            workload.name, one.median, two.median, ratio.median
        )
        .expect("a string takes everything");
        floor = (workload.on == On::Floor).then_some(ratio.median);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goals are judged by the middle round, overwrites by what the floor does; without it, not.
    #[test]
    fn goals_are_judged() {
        let rounds = |ratio: f64| vec![[100.0, 100.0 * ratio]; 3];
        let verdicts = |measured: &[Rounds]| -> Vec<_> {
            let text = table(measured);
            let lines = text.lines().skip(2);
            lines
                .map(|line| (line.contains(": met"), line.contains("MISSED")))
                .collect()
        };
        let mut measured: Vec<_> = [1.9, 2.0, 1.8, 1.0, 1.4, 1.3, 1.6, 1.9].map(rounds).into();
        let (met, missed, none) = ((true, false), (false, true), (false, false));
        let wanted = [none, none, met, none, none, met, missed, met];
        assert_eq!(verdicts(&measured), wanted);
        measured[4] = rounds(1.5);
        assert_eq!(verdicts(&measured)[5], missed);
        measured[4] = Vec::new();
        assert_eq!(verdicts(&measured)[5], none);
    }
}
