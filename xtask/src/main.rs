//! Development tasks: `cargo xtask TASK`, a module each.
//!
//! They run from anywhere inside the workspace and need nothing but cargo, for `bench` qemu-img,
//! for `counts` and `sanitize` valgrind, and for `coverage` the toolchain's component llvm-tools.

mod bench;
mod child;
mod ci;
mod counts;
mod coverage;
mod graph;
mod mutants;
mod reliability;
mod sanitize;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask TASK

  ci [STEP...]     what CI runs: .ci/run
  reliability [OPTIONS]  power cuts, failures, seeds and all else; writes docs/reliability.md; --help lists the options
  sim [OPTIONS]    one simulated seed with its trace, or many; without options: which there are
  graph [--all]    who uses whom, crate by crate (--all: dependencies from outside too)
  bench [OPTIONS]  ours beside qemu-img bench, other implementations and the floor; --help lists the options
  fuzz [OPTIONS]   --target T --executions N --seed S: inputs that a seed breaks; all targets without T
  mutants [WORDS]  every mistake that the product can be told to make must be caught; WORDS: part of its name
  counts [OPTIONS] instructions per operation against docs/counts.json; --help lists the options
  coverage [--uncovered]  which lines of qcow2/src tests run; below 95 % is a failure
  sanitize [asan|tsan|valgrind] [--short]  tests under AddressSanitizer, ThreadSanitizer and valgrind
";

/// What a task returns: an error is printed as it is, and the exit status is 1.
type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let task = words.next();
    let rest: Vec<String> = words.collect();
    let outcome = match task.as_deref() {
        Some("ci") => ci::run(&rest),
        Some("graph") => graph::run(&rest),
        Some("bench") => bench::run(&rest),
        Some("reliability") => reliability::run(&rest),
        Some("sim") => reliability::sim(&rest),
        Some("fuzz") => reliability::fuzz(&rest),
        Some("mutants") => mutants::run(&rest),
        Some("counts") => counts::run(&rest),
        Some("coverage") => coverage::run(&rest),
        Some("sanitize") => sanitize::run(&rest),
        Some("help" | "--help" | "-h") => {
            print!("{USAGE}");
            Ok(())
        }
        Some(other) => Err(format!("unknown task '{other}'\n\n{USAGE}")),
        None => Err(USAGE.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder: the parent of this package's.
fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies inside the workspace")
}

/// Where cargo puts what it builds.
fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}
