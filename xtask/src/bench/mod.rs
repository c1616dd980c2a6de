//! `cargo xtask bench`: `coblock img bench` beside `qemu-img bench`, the other implementations, and
//! the floor below them all.
//!
//! ```text
//!   options   which rows, which programs, how much
//!   rows      what is measured, and the goals
//!   engines   the programs: built, started, read
//!   images    made, judged, removed
//!   measure   rounds in rotating order
//!   figures   medians, ratios within a round, verdicts
//!   table, chart, record     what comes out
//!   queues    two queues beside one: a run of its own
//!   graph     the graph's lock, drained sections, statistics: a run of its own
//! ```
//!
//! All programs send the same requests to the same image (for writes: to a copy each), round by
//! round, in an order that rotates. Results are ratios within a round; absolute figures stand
//! beside them. After every write the image is judged by `qemu-img check` and compared with
//! QEMU's, guest byte by guest byte; none of that is measured.

mod chart;
mod engines;
mod figures;
mod graph;
mod images;
mod measure;
mod options;
mod queues;
mod record;
mod rows;
mod table;

use std::fs;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use engines::{Engine, Programs};
use images::Images;
use measure::{Bench, Measured};
use options::{Options, USAGE};
use queues::Queues;
use record::Part;

use crate::Outcome;

/// The part of `docs/benchmarks.md` that the rows fill.
const REQUESTS: Part = Part {
    name: "requests",
    cpu_title: "CPU seconds per 100 000 requests of 4 KiB: median, least to most (less is better)",
    rate_title: "Requests of 4 KiB per second: median, least to most (more is better)",
};
/// The part that `--sweep` fills.
const SWEEPS: Part = Part {
    name: "sweep",
    cpu_title: "CPU seconds per 100 000 cached reads of 4 KiB: median, least to most",
    rate_title: "Cached reads of 4 KiB per second: median, least to most",
};

/// Runs the comparison and prints its tables.
pub fn run(words: &[String]) -> Outcome {
    let Some(options) = Options::parse(words)? else {
        print!("{USAGE}");
        return Ok(());
    };
    if options.graph {
        return run_graph(&options);
    }
    fs::create_dir_all(&options.dir).map_err(|e| format!("{}: {e}", options.dir.display()))?;
    let programs = Programs::build(options.coblock.as_deref(), &options.peers)?;
    let heading = heading(&options, &programs);
    println!("{heading}\n");
    if options.queues {
        return run_queues(&options, &programs, &heading);
    }
    let bench = Bench {
        programs,
        images: Images::new(&options.dir, options.size)?,
        rounds: options.rounds,
        scale: options.scale,
        size: options.size,
    };
    let measured = measure_all(&bench, &options)?;
    println!("{}", table::tables(&measured));
    println!(
        "Written images were checked clean and compared equal, unless a line above says else."
    );

    let rows = measured.iter().map(|row| row.json(&measured));
    let report = json!({
        "measured": heading,
        "rounds": options.rounds,
        "missing": bench.programs.missing,
        "rows": rows.collect::<Vec<_>>(),
    });
    let text = serde_json::to_string_pretty(&report).expect("numbers and text serialise");
    fs::write(&options.json, text + "\n")
        .map_err(|e| format!("{}: {e}", options.json.display()))?;
    println!("Figures in {}.", options.json.display());
    if options.record {
        let part = if options.sweep { &SWEEPS } else { &REQUESTS };
        record::record(part, &heading, &measured, &report)?;
        println!("Recorded in docs/benchmarks.md.");
    }
    Ok(())
}

/// Two queues beside one.
fn run_queues(options: &Options, programs: &Programs, heading: &str) -> Outcome {
    let queues = Queues {
        coblock: programs.coblock(),
        floor: programs.path_of(Engine::Floor),
        dir: &options.dir,
        size: options.size,
        rounds: options.rounds,
    };
    put_out(options, "queues", heading, queues.measure()?)
}

/// The graph's lock, drained sections, statistics.
fn run_graph(options: &Options) -> Outcome {
    let heading = format!(
        "coblock {}; {}, {} rounds, load {} at the start.",
        env!("CARGO_PKG_VERSION"),
        machine(),
        options.rounds,
        load()
    );
    println!("{heading}\n");
    put_out(options, "graph", &heading, graph::measure(options.rounds)?)
}

/// Prints a part that has one table, and records it.
fn put_out(
    options: &Options,
    part: &str,
    heading: &str,
    (table, mut report): (String, serde_json::Value),
) -> Outcome {
    println!("{table}");
    report["measured"] = heading.into();
    let text = serde_json::to_string_pretty(&report).expect("numbers and text serialise") + "\n";
    fs::write(&options.json, &text).map_err(|e| format!("{}: {e}", options.json.display()))?;
    println!("Figures in {}.", options.json.display());
    if options.record {
        record::write(&format!("benchmarks-{part}.json"), &text)?;
        record::put(part, &format!("{heading}\n\n{table}"))?;
        println!("Recorded in docs/benchmarks.md.");
    }
    Ok(())
}

fn measure_all(bench: &Bench, options: &Options) -> Result<Vec<Measured>, String> {
    let rows = options.rows();
    let progress = ProgressBar::new(rows.iter().map(|row| bench.runs(row)).sum());
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} runs, {eta} left · {msg}");
    progress.set_style(style.expect("the template is well formed"));
    let mut measured = Vec::new();
    for row in rows {
        measured.push(bench.measure(row, &progress)?);
        if progress.is_hidden() {
            eprintln!("measured: {}", row.name);
        }
    }
    progress.finish_and_clear();
    Ok(measured)
}

/// What was measured, where and how: enough to read the figures without this source.
fn heading(options: &Options, programs: &Programs) -> String {
    let versions = programs
        .versions
        .iter()
        .map(|(name, version)| format!("{name} {version}"));
    let versions: Vec<String> = versions.collect();
    format!(
        "{}; {}, images of {} MiB on {}, {} rounds, scale {}, load {} at the start.",
        versions.join(", "),
        machine(),
        options.size >> 20,
        images::file_system(&options.dir).unwrap_or_else(|| "an unknown file system".into()),
        options.rounds,
        options.scale,
        load(),
    )
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Kernel and processors.
fn machine() -> String {
    let cpu_info = read("/proc/cpuinfo");
    let model = cpu_info.lines().find(|line| line.starts_with("model name"));
    let model = model
        .and_then(|line| line.split(": ").nth(1))
        .unwrap_or("unknown CPU");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("Linux {}, {cores} x {model}", kernel.trim())
}

/// How many processes wanted to run, in the last minute.
fn load() -> String {
    let load = read("/proc/loadavg");
    let first = load.split_whitespace().next();
    first.unwrap_or("unknown").to_string()
}
