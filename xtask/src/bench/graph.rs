//! `cargo xtask bench --graph`: what the graph costs who only passes through it: its lock, drained
//! sections, and what every request pays for statistics and for traces that nobody wants.
//!
//! One program, `block/benches/request.rs`, as it is and with one thing taken out of it at compile
//! time. Each runs once a round, in an order that rotates; prices are differences within a round.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::figures::Spread;
use crate::{child, workspace};

/// A run that takes longer is given up.
const LIMIT: Duration = Duration::from_secs(120);

/// A build of the program, and how it is started.
struct Variant {
    name: &'static str,
    features: &'static [&'static str],
    words: &'static [&'static str],
}

/// The first one is the product.
const VARIANTS: [Variant; 4] = [
    Variant {
        name: "as it is",
        features: &[],
        words: &[],
    },
    Variant {
        name: "full fences",
        features: &[],
        words: &["--full-fences"],
    },
    Variant {
        name: "no statistics",
        features: &["unaccounted"],
        words: &[],
    },
    Variant {
        name: "no traces",
        features: &["untraced"],
        words: &[],
    },
];

const LOCK: &str = "graph lock, read, and unlock";
const READ: &str = "read of null";
const WRITE: &str = "write of null";

/// One line of the table.
struct Line {
    name: &'static str,
    /// Row of the program.
    row: &'static str,
    variant: usize,
    /// Nanoseconds that the same row of this one takes are subtracted.
    less: Option<usize>,
    /// At most so many nanoseconds.
    goal: Option<f64>,
}

impl Line {
    const fn of(name: &'static str, row: &'static str, variant: usize, goal: Option<f64>) -> Line {
        Line {
            name,
            row,
            variant,
            less: None,
            goal,
        }
    }

    /// What the product pays more than a variant does.
    const fn price(name: &'static str, row: &'static str, without: usize) -> Line {
        Line {
            less: Some(without),
            ..Line::of(name, row, 0, None)
        }
    }
}

const LINES: [Line; 12] = [
    Line::of("graph read lock and unlock", LOCK, 0, Some(10.0)),
    Line::of("the same without `membarrier`", LOCK, 1, Some(25.0)),
    Line::of(
        "graph write lock and unlock",
        "graph lock, write, and unlock",
        0,
        None,
    ),
    Line::of(
        "drain of an idle node",
        "drain of an idle node",
        0,
        Some(1e3),
    ),
    Line::of(
        "drain of all of 10 000 nodes",
        "drain of 10 000 nodes",
        0,
        Some(1e7),
    ),
    Line::of("read of null, in a coroutine", READ, 0, None),
    Line::of("write of null, in a coroutine", WRITE, 0, None),
    Line::of("read of null without `membarrier`", READ, 1, None),
    Line::price("statistics of a read", READ, 2),
    Line::price("statistics of a write", WRITE, 2),
    Line::price("traces of a read, off", READ, 3),
    Line::price("traces of a write, off", WRITE, 3),
];

/// Nanoseconds of each row, of each variant.
type Round = [BTreeMap<String, f64>; VARIANTS.len()];

/// Builds all variants and measures `rounds` rounds: the table, and the figures.
///
/// # Errors
/// A variant cannot be built, fails, or does not tell a row.
pub fn measure(rounds: usize) -> Result<(String, Value), String> {
    let programs = VARIANTS.map(|variant| build(variant.features));
    let mut measured = Vec::new();
    for round in 0..rounds {
        let mut samples = Round::default();
        for nth in 0..VARIANTS.len() {
            let number = (nth + round) % VARIANTS.len();
            let program = programs[number].as_ref().map_err(String::clone)?;
            samples[number] = run(program, &VARIANTS[number])?;
        }
        eprintln!("round {}: measured", round + 1);
        measured.push(samples);
    }
    let mut text = String::from("| | median | least | most | goal |\n|---|---|---|---|---|\n");
    let mut report = Map::new();
    for line in &LINES {
        let samples = measured.iter().map(|round| value(line, round));
        let samples = samples.collect::<Result<Vec<_>, _>>()?;
        let spread = Spread::of(samples.iter().copied()).ok_or("no rounds")?;
        text += &row(line, spread);
        report.insert(line.name.to_string(), json!(samples));
    }
    Ok((text, json!({"unit": "ns", "rows": report})))
}

fn value(line: &Line, round: &Round) -> Result<f64, String> {
    let of = |variant: usize| {
        let told = round[variant].get(line.row).copied();
        told.ok_or_else(|| format!("{}: no row '{}'", VARIANTS[variant].name, line.row))
    };
    let less = line.less.map_or(Ok(0.0), of)?;
    Ok(of(line.variant)? - less)
}

fn row(line: &Line, spread: Spread) -> String {
    let goal = match line.goal {
        Some(goal) if spread.median <= goal => format!("at most {}: met", time(goal)),
        Some(goal) => format!("at most {}: MISSED", time(goal)),
        None => String::new(),
    };
    let [median, least, most] = [spread.median, spread.least, spread.most].map(time);
    format!("| {} | {median} | {least} | {most} | {goal} |\n", line.name)
}

/// With the unit that suits it.
fn time(ns: f64) -> String {
    let mut text = String::new();
    if ns.abs() >= 1e6 {
        write!(text, "{:.2} ms", ns / 1e6)
    } else if ns.abs() >= 1e3 {
        write!(text, "{:.2} us", ns / 1e3)
    } else {
        write!(text, "{ns:.1} ns")
    }
    .expect("a string takes everything");
    text
}

/// The program with `features`.
fn build(features: &[&str]) -> Result<PathBuf, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "bench",
            "--quiet",
            "--package",
            "coblock-block",
            "--bench",
            "request",
        ])
        .args([
            "--no-run",
            "--message-format=json",
            "--features",
            &features.join(","),
        ])
        .current_dir(workspace())
        .output()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let messages = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut programs =
        messages.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?)));
    programs
        .next()
        .filter(|_| output.status.success())
        .ok_or_else(|| {
            let errors = String::from_utf8_lossy(&output.stderr);
            format!(
                "the bench with {features:?} cannot be built: {}",
                errors.trim()
            )
        })
}

fn run(program: &PathBuf, variant: &Variant) -> Result<BTreeMap<String, f64>, String> {
    let mut command = Command::new(program);
    command.arg("--once").args(variant.words);
    let done = child::run(&mut command, LIMIT)?;
    if done.status != 0 {
        return Err(format!("{}: {}", variant.name, done.stderr.trim()));
    }
    Ok(read(&done.stdout))
}

/// Lines of a name, a number and `ns`.
fn read(output: &str) -> BTreeMap<String, f64> {
    let row = |line: &str| {
        let (name, number) = line.strip_suffix(" ns")?.trim_end().rsplit_once(' ')?;
        Some((name.trim().to_string(), number.parse().ok()?))
    };
    output.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the bench prints is read, a missing row is an error, and a price is a difference.
    #[test]
    fn rows_are_read_and_judged() {
        let output = "read of null      30.5 ns\ngraph lock, read, and unlock   12.0 ns\nnoise\n";
        let mut round = Round::default();
        round[0] = read(output);
        assert_eq!(round[0].len(), 2);
        round[2] = read("read of null 28.0 ns\n");
        let line = |name: &str| LINES.iter().find(|line| line.name == name).unwrap();
        assert_eq!(value(line("statistics of a read"), &round), Ok(2.5));
        assert!(value(line("statistics of a write"), &round).is_err());
        let lock = line("graph read lock and unlock");
        let spread = |ns| Spread {
            least: ns,
            median: ns,
            most: ns,
        };
        assert!(row(lock, spread(12.0)).contains("at most 10.0 ns: MISSED"));
        assert!(row(lock, spread(9.0)).contains(": met"));
        assert_eq!(
            [1e3, 4.3e6, 2.44].map(time),
            ["1.00 us", "4.30 ms", "2.4 ns"]
        );
    }
}
