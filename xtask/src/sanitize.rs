//! `cargo xtask sanitize`: the tests of the coroutine library under AddressSanitizer and valgrind.
//!
//! Both must know each stack and each switch, or they report what is none and miss what is; so this
//! shows that they do (`docs/testing.md`). A tool that is missing is `SKIPPED`, aloud.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::Outcome;
use crate::child::asked;

const USAGE: &str = "\
Usage: cargo xtask sanitize [asan|valgrind] [--short]

  asan      under AddressSanitizer
  valgrind  under valgrind's memcheck
            (neither: both)
  --short   only a few test programs of each, for CI
";

const PACKAGE: &str = "coblock-coroutine";

/// Test programs that AddressSanitizer can run; `docs/testing.md` says why not the others.
const ASAN: &[&str] = &[
    "nesting",
    "ownership",
    "continuations",
    "dump",
    "locks",
    "moving",
    "pool",
    "refusals",
    "rwlock",
    "unit_behaviours",
    "wakes",
    "model",
    "allocations",
];

/// Those that valgrind runs; it is some fifty times slower.
const VALGRIND: &[&str] = &["nesting", "ownership", "continuations", "locks", "rwlock"];

/// So many of each list in a short run.
const SHORT: usize = 3;

/// Runs what `args` say.
pub fn run(args: &[String]) -> Outcome {
    let (mut short, mut only) = (false, None);
    for arg in args {
        match arg.as_str() {
            "--short" => short = true,
            "asan" | "valgrind" if only.is_none() => only = Some(arg.as_str()),
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(());
            }
            other => return Err(format!("unknown word '{other}'\n\n{USAGE}")),
        }
    }
    let of = |all: &'static [&str]| &all[..if short { SHORT } else { all.len() }];
    if only != Some("valgrind") {
        asan(of(ASAN))?;
    }
    if only != Some("asan") {
        valgrind(of(VALGRIND))?;
    }
    Ok(())
}

/// Builds and runs with AddressSanitizer. The option is one of nightly compilers; the bootstrap
/// variable lets the pinned one take it.
fn asan(tests: &[&str]) -> Outcome {
    let host = asked("rustc", &["-vV"])?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc does not tell its host")?;
    let libraries = asked("rustc", &["--print", "target-libdir"])?;
    let runtime = Path::new(libraries.trim());
    let has_runtime = runtime.read_dir().is_ok_and(|mut files| {
        files.any(|file| {
            file.is_ok_and(|file| file.file_name().to_string_lossy().contains("rt.asan"))
        })
    });
    if !has_runtime {
        println!("SKIPPED: AddressSanitizer: this compiler has no runtime for it ({host})");
        return Ok(());
    }
    let mut command = Command::new("cargo");
    command
        .current_dir(crate::workspace())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
        // Other flags mean other files: not beside those of other builds.
        .env("CARGO_TARGET_DIR", crate::target_dir().join("sanitize"))
        .args(["test", "--quiet", "--no-fail-fast", "--target", host])
        .args(["--package", PACKAGE, "--features", "sanitizer"]);
    for test in tests {
        command.args(["--test", test]);
    }
    timed(
        &format!("AddressSanitizer: {}", tests.join(" ")),
        &mut command,
    )
}

/// Builds as usual, and runs each test program under valgrind.
fn valgrind(tests: &[&str]) -> Outcome {
    if asked("valgrind", &["--version"]).is_err() {
        println!("SKIPPED: valgrind is not installed");
        return Ok(());
    }
    for (name, program) in programs(tests)? {
        let mut command = Command::new("valgrind");
        command
            .args(["--quiet", "--error-exitcode=9"])
            .arg(program)
            .args(["--quiet", "--test-threads=1"]);
        timed(&format!("valgrind: {name}"), &mut command)?;
    }
    Ok(())
}

/// Runs a command and tells how long it took.
fn timed(what: &str, command: &mut Command) -> Outcome {
    let began = Instant::now();
    let status = command.status().map_err(|e| format!("{what}: {e}"))?;
    if !status.success() {
        return Err(format!("{what}: {status}"));
    }
    println!("ok: {what} ({:.0} s)", began.elapsed().as_secs_f64());
    Ok(())
}

/// Builds test programs, and tells where they are.
fn programs<'a>(tests: &[&'a str]) -> Result<Vec<(&'a str, PathBuf)>, String> {
    let mut command = Command::new("cargo");
    command
        .current_dir(crate::workspace())
        .args(["test", "--quiet", "--no-run", "--message-format=json"])
        .args(["--package", PACKAGE])
        .stderr(Stdio::inherit());
    for test in tests {
        command.args(["--test", test]);
    }
    let output = command
        .output()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo test --no-run: {}", output.status));
    }
    let told: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let find = |test: &&'a str| {
        told.iter()
            .filter(|message| message["target"]["name"] == **test)
            .find_map(|message| message["executable"].as_str())
            .map(|program| (*test, PathBuf::from(program)))
            .ok_or_else(|| format!("cargo does not tell where test {test} is"))
    };
    tests.iter().map(find).collect()
}
