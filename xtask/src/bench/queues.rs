//! `cargo xtask bench --queues`: what more queues bring, each a thread with a loop of its own.
//!
//! Every workload runs with one queue and with two in each round, in an order that changes from
//! round to round; the figure is how often the requests of one fit into those of two. Beside the
//! qcow2 image stands a raw file, the floor that one file of the host puts under it, and a disk
//! that does nothing.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::figures::Spread;
use crate::Outcome;

/// How long each run lasts.
const SECONDS: f64 = 2.0;
/// Requests in flight, for each queue.
const DEPTH: u32 = 32;

/// What a workload runs on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Qcow2,
    Raw,
    Null,
}

/// One line of the table.
struct Workload {
    name: &'static str,
    on: On,
    rw: &'static str,
    goal: Goal,
}

/// What two queues must reach.
enum Goal {
    /// So many times the requests of one.
    AtLeast(f64),
    /// That part of what the workload above it does.
    OfFloor(f64),
    /// Only to compare with.
    None,
}

const WORKLOADS: [Workload; 6] = [
    Workload {
        name: "cached reads, raw file",
        on: On::Raw,
        rw: "randread",
        goal: Goal::None,
    },
    Workload {
        name: "cached reads, qcow2",
        on: On::Qcow2,
        rw: "randread",
        goal: Goal::AtLeast(1.7),
    },
    Workload {
        name: "overwrites, raw file",
        on: On::Raw,
        rw: "randwrite",
        goal: Goal::None,
    },
    Workload {
        name: "overwrites, qcow2",
        on: On::Qcow2,
        rw: "randwrite",
        goal: Goal::OfFloor(0.9),
    },
    Workload {
        name: "reads, null",
        on: On::Null,
        rw: "randread",
        goal: Goal::AtLeast(1.7),
    },
    Workload {
        name: "overwrites, null",
        on: On::Null,
        rw: "randwrite",
        goal: Goal::AtLeast(1.7),
    },
];

/// Requests per second of one workload, a pair for each round.
type Rounds = Vec<[f64; 2]>;

/// The images, and the program that runs on them.
pub struct Queues<'a> {
    pub coblock: &'a Path,
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
                let mut iops = [0.0; 2];
                let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
                for at in order {
                    let queues = format!("--queues={}", at + 1);
                    let rw = format!("--rw={}", workload.rw);
                    let (depth, time) =
                        (format!("--iodepth={DEPTH}"), format!("--runtime={SECONDS}"));
                    iops[at] = self.bench(workload.on, &[&queues, &rw, &depth, &time])?;
                }
                rounds.push(iops);
                eprintln!("round {}: {}: {iops:.0?}", round + 1, workload.name);
            }
        }
        Ok(all)
    }

    fn image(&self, on: On) -> String {
        let name = match on {
            On::Qcow2 => "queues.qcow2",
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
    let mut above = None;
    for (workload, rounds) in WORKLOADS.iter().zip(measured) {
        let of = |at: usize| Spread::of(rounds.iter().map(move |round| round[at]));
        let ratio = Spread::of(rounds.iter().map(|[one, two]| two / one));
        let (Some(one), Some(two), Some(ratio)) = (of(0), of(1), ratio) else {
            continue;
        };
        let (goal, needed) = match (&workload.goal, above) {
            (Goal::AtLeast(goal), _) => (format!("at least {goal}"), Some(*goal)),
            (Goal::OfFloor(part), Some(floor)) => {
                let goal = part * floor;
                (
                    format!("at least {goal:.2}, {part} of the raw file's"),
                    Some(goal),
                )
            }
            _ => (String::new(), None),
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
        above = Some(ratio.median);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goals are judged by the middle round, overwrites by what the raw file does.
    #[test]
    fn goals_are_judged() {
        let rounds = |ratio: f64| vec![[100.0, 100.0 * ratio]; 3];
        let measured: Vec<_> = [1.9, 1.8, 1.4, 1.3, 1.6, 1.9].map(rounds).into();
        let text = table(&measured);
        let verdicts: Vec<_> = text
            .lines()
            .skip(2)
            .map(|line| (line.contains(": met"), line.contains("MISSED")))
            .collect();
        let (met, missed, none) = ((true, false), (false, true), (false, false));
        assert_eq!(verdicts, [none, met, none, met, missed, met], "{text}");
    }
}
