//! `cargo xtask sanitize`: tests under AddressSanitizer and valgrind.
//!
//! Each must know every stack and every switch, or it reports what is none and misses what is; the
//! feature `sanitizer` of the coroutine library tells the first. A tool that is missing is
//! `SKIPPED`, aloud, and so is each program that it cannot run (`docs/testing.md` says why).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::Outcome;
use crate::child::asked;

const USAGE: &str = "\
Usage: cargo xtask sanitize [asan|valgrind] [--short] [PROGRAM...]

  asan      every test of the workspace under AddressSanitizer
  valgrind  tests of the coroutine library under valgrind's memcheck
            (neither of them: both)
  --short   only a few test programs of the coroutine library, for CI
  PROGRAM   only test programs of these names
";

const COROUTINE: &str = "coblock-coroutine";

/// A few programs that switch in every way; valgrind runs the first five, being fifty times slower.
const FEW: &[&str] = &["nesting", "ownership", "continuations", "locks", "rwlock"];

/// So many of them in a short run.
const SHORT: usize = 3;

const ASAN: &str = "AddressSanitizer";

/// A coroutine that rests is a root that the leak checker does not see; use after return would move
/// the locals that tests look at to the heap.
const ASAN_OPTIONS: &str = "detect_leaks=0:detect_stack_use_after_return=0";

/// Programs with coroutines of loom's, of which nobody tells it.
const ASAN_SKIPPED: &[&str] = &[
    "loom_protocols",
    "loom_graph_lock",
    "loom_request_table",
    "models",
];

/// What `args` ask for.
#[derive(Default)]
struct Wanted<'a> {
    tool: Option<&'a str>,
    short: bool,
    programs: Vec<&'a str>,
}

impl Wanted<'_> {
    fn has(&self, tool: &str) -> bool {
        self.tool.is_none_or(|wanted| wanted == tool)
    }

    fn wants(&self, program: &str) -> bool {
        if self.programs.is_empty() {
            return !self.short || FEW[..SHORT].contains(&program);
        }
        self.programs.contains(&program)
    }
}

/// Runs what `args` say.
pub fn run(args: &[String]) -> Outcome {
    let mut wanted = Wanted::default();
    for arg in args {
        match arg.as_str() {
            "--short" => wanted.short = true,
            "asan" | "valgrind" if wanted.tool.is_none() => wanted.tool = Some(arg),
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(());
            }
            option if option.starts_with('-') => {
                return Err(format!("unknown option '{option}'\n\n{USAGE}"));
            }
            program => wanted.programs.push(program),
        }
    }
    if wanted.has("asan") {
        asan(&wanted)?;
    }
    if wanted.has("valgrind") {
        valgrind(&wanted)?;
    }
    Ok(())
}

/// Whether this compiler has the runtime of AddressSanitizer.
fn has_asan() -> Result<bool, String> {
    let libraries = asked("rustc", &["--print", "target-libdir"])?;
    Ok(Path::new(libraries.trim())
        .read_dir()
        .is_ok_and(|mut files| {
            files.any(|file| {
                file.is_ok_and(|file| file.file_name().to_string_lossy().contains("rt.asan"))
            })
        }))
}

/// Builds and runs test programs with AddressSanitizer. The option is one of nightly compilers; the
/// bootstrap variable lets the pinned one take it.
fn asan(wanted: &Wanted<'_>) -> Outcome {
    let version = asked("rustc", &["-vV"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc does not tell its host")?;
    if !has_asan()? {
        println!("SKIPPED: {ASAN}: this compiler has no runtime for it ({host})");
        return Ok(());
    }
    // Other flags mean other files: not beside those of other builds.
    let target = crate::target_dir().join("sanitize");
    let reports = target.join("reports");
    if reports.exists() {
        std::fs::remove_dir_all(&reports).map_err(|e| format!("{}: {e}", reports.display()))?;
    }
    std::fs::create_dir_all(&reports).map_err(|e| format!("{}: {e}", reports.display()))?;

    let mut build = Command::new("cargo");
    build
        .current_dir(crate::workspace())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("CARGO_TARGET_DIR", &target)
        .args(["test", "--target", host])
        .args(["--features", "coblock-coroutine/sanitizer"]);
    if wanted.short {
        build.args(["--package", COROUTINE]);
        FEW[..SHORT]
            .iter()
            .for_each(|name| _ = build.args(["--test", name]));
    } else {
        build.args(["--workspace", "--exclude", "xtask"]);
        build.args(["--lib", "--bins", "--tests"]);
    }

    let began = Instant::now();
    let (mut ran, mut failed) = (0, Vec::new());
    for program in programs(&mut build)? {
        let name = &program.name;
        if !wanted.wants(name) {
            continue;
        }
        if ASAN_SKIPPED.contains(&name.as_str()) {
            println!("SKIPPED: {ASAN}: {name}");
            continue;
        }
        let log = reports.join(name);
        let mut command = Command::new(&program.path);
        command
            .current_dir(&program.folder)
            .env(
                "ASAN_OPTIONS",
                format!("{ASAN_OPTIONS}:log_path={}", log.display()),
            )
            .env("COBLOCK_TEST_INSTRUMENTED", "1")
            // Frames are several times larger with marks around every local.
            .env("RUST_MIN_STACK", "33554432")
            .arg("--quiet");
        ran += 1;
        if let Err(why) = timed(&format!("{ASAN}: {name}"), &mut command) {
            println!("{why}");
            failed.push(program.name);
        }
    }
    // Every process that met something has left a file, those that tests start too.
    let told = reports
        .read_dir()
        .map_err(|e| format!("{}: {e}", reports.display()))?;
    let told: Vec<PathBuf> = told.flatten().map(|file| file.path()).collect();
    for path in &told {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        let summary = text.lines().find(|line| line.starts_with("SUMMARY"));
        println!("{}: {}", path.display(), summary.unwrap_or("a report"));
    }
    println!(
        "{ASAN}: {ran} test programs, {} failed, {} reports, {:.0} s",
        failed.len(),
        told.len(),
        began.elapsed().as_secs_f64()
    );
    match (ran, failed.is_empty() && told.is_empty()) {
        (0, _) => Err("no such test program".into()),
        (_, true) => Ok(()),
        (_, false) => Err(format!("{ASAN}: {}", failed.join(" "))),
    }
}

/// Builds as usual, and runs each test program under valgrind.
fn valgrind(wanted: &Wanted<'_>) -> Outcome {
    if asked("valgrind", &["--version"]).is_err() {
        println!("SKIPPED: valgrind is not installed");
        return Ok(());
    }
    let mut build = Command::new("cargo");
    build
        .current_dir(crate::workspace())
        .args(["test", "--package", COROUTINE]);
    FEW.iter().for_each(|name| _ = build.args(["--test", name]));
    for program in programs(&mut build)? {
        if !wanted.wants(&program.name) {
            continue;
        }
        let mut command = Command::new("valgrind");
        command
            .args(["--quiet", "--error-exitcode=9"])
            .arg(program.path)
            .args(["--quiet", "--test-threads=1"]);
        timed(&format!("valgrind: {}", program.name), &mut command)?;
    }
    Ok(())
}

/// Runs a command and tells how long it took.
fn timed(what: &str, command: &mut Command) -> Outcome {
    let began = Instant::now();
    let status = command.status().map_err(|e| format!("{what}: {e}"))?;
    let seconds = began.elapsed().as_secs_f64();
    if !status.success() {
        return Err(format!("FAILED {what}: {status} ({seconds:.0} s)"));
    }
    println!("ok: {what} ({seconds:.0} s)");
    Ok(())
}

/// A test program, and the folder of its package.
struct Program {
    name: String,
    path: PathBuf,
    folder: PathBuf,
}

/// Builds the test programs of a `cargo test`, and tells where they are.
fn programs(build: &mut Command) -> Result<Vec<Program>, String> {
    let output = build
        .args(["--quiet", "--no-run", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo test --no-run: {}", output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = |message: Value| {
        if message["profile"]["test"] != true {
            return None;
        }
        Some(Program {
            name: message["target"]["name"].as_str()?.to_string(),
            path: message["executable"].as_str()?.into(),
            folder: Path::new(message["manifest_path"].as_str()?)
                .parent()?
                .into(),
        })
    };
    Ok(messages.filter_map(program).collect())
}
