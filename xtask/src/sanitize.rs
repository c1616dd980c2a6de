//! `cargo xtask sanitize`: tests under AddressSanitizer, ThreadSanitizer and valgrind.
//!
//! Each must know every stack and every switch, or it reports what is none and misses what is; the
//! feature `sanitizer` of the coroutine library tells the first, the configuration
//! `thread_sanitizer` the second. A tool that is missing is `SKIPPED`, aloud, and so is each test
//! that it cannot run.
//!
//! That they see is shown each time: the program `canary` does one fault after the other on a
//! coroutine's stack, and each that is not reported is a failure.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::Outcome;
use crate::child::asked;

const USAGE: &str = "\
Usage: cargo xtask sanitize [asan|tsan|valgrind] [--short] [PROGRAM...]

  asan      every test of the workspace under AddressSanitizer
  tsan      tests of coroutines, event loop and block layer, and four threads on one image, under
            ThreadSanitizer
  valgrind  tests of the coroutine library under valgrind's memcheck
            (none of them: all three)
  --short   only a few test programs of the lower libraries, for CI
  PROGRAM   only test programs of these names (and always the canary's faults, which must be reported)
";

const COROUTINE: &str = "coblock-coroutine";

/// What valgrind runs, being fifty times slower: programs that switch in every way.
const UNDER_VALGRIND: &[&str] = &[
    CANARY,
    "nesting",
    "ownership",
    "continuations",
    "locks",
    "rwlock",
];

/// So many of them in a short run.
const UNDER_VALGRIND_SHORT: usize = 4;

/// A sanitizer of the compiler's.
struct Tool {
    name: &'static str,
    /// As our command line calls it, and the end of its runtime's name.
    asked_as: &'static str,
    /// For the compiler: the sanitizer, and what else.
    flags: &'static str,
    /// For the compiler of the C code below us, which `cc` instruments for AddressSanitizer too.
    c_flags: &'static str,
    /// For cargo: features, and which packages' tests.
    arguments: &'static [&'static str],
    /// The same for a short run.
    short: &'static [&'static str],
    /// The standard library must be built with it too.
    builds_std: bool,
    /// Where its options are, and which; the place of its reports is added.
    variable: &'static str,
    options: &'static str,
    /// Of these programs only the tests whose names contain this.
    only: &'static [(&'static str, &'static str)],
    skipped: &'static [Skipped],
    canaries: &'static [Canary],
}

/// The test program with faults on purpose.
const CANARY: &str = "canary";

/// A fault on purpose: a test of [`CANARY`], and the words that a report of it has.
struct Canary {
    test: &'static str,
    reported_as: &'static str,
}

const fn canary(test: &'static str, reported_as: &'static str) -> Canary {
    Canary { test, reported_as }
}

const FREED: &str = "memory::freed_while_it_was_suspended";

/// What a tool cannot run: a program or, where `test` is not empty, one of its tests.
struct Skipped {
    program: &'static str,
    test: &'static str,
    why: &'static str,
}

const fn skipped(program: &'static str, test: &'static str, why: &'static str) -> Skipped {
    Skipped { program, test, why }
}

const LOOM: &str = "its coroutines are loom's, of which nobody tells it";

const ASAN: Tool = Tool {
    name: "AddressSanitizer",
    asked_as: "asan",
    flags: "-Zsanitizer=address",
    // `zstd-sys` builds with -fmerge-all-constants. With it GCC moves constant arrays of functions
    // to static memory, and still marks them as out of scope when the function ends: the second
    // caller is reported (`ZSTD_selectBtGetAllMatches`, in a program of C alone too).
    c_flags: "-fno-sanitize-address-use-after-scope",
    arguments: &[
        "--features=coblock-coroutine/sanitizer",
        "--workspace",
        "--exclude=xtask",
        "--lib",
        "--bins",
        "--tests",
    ],
    short: &[
        "--features=coblock-coroutine/sanitizer",
        "--package=coblock-coroutine",
        "--package=coblock-aio",
        "--test=canary",
        "--test=nesting",
        "--test=ownership",
        "--test=continuations",
        "--test=engines",
    ],
    builds_std: false,
    variable: "ASAN_OPTIONS",
    // A coroutine that rests is a root that the leak checker does not see; use after return would
    // move the locals that tests look at to the heap.
    options: "detect_leaks=0:detect_stack_use_after_return=0",
    only: &[],
    skipped: &[
        skipped(
            "debugger",
            "",
            "gdb does not find its globals, and it leaves no core",
        ),
        skipped("loom_protocols", "", LOOM),
        skipped("loom_graph_lock", "", LOOM),
        skipped("loom_request_table", "", LOOM),
        skipped("models", "", LOOM),
    ],
    canaries: &[
        canary("memory::past_the_end_of_an_array", "stack-buffer-overflow"),
        canary(FREED, "heap-use-after-free"),
        canary("memory::a_local_of_a_life_that_is_over", "use-after-poison"),
    ],
};

const TSAN: Tool = Tool {
    name: "ThreadSanitizer",
    asked_as: "tsan",
    // Calls are not counted, since one that switches is entered as one fibre and left as another:
    // reports name the innermost function alone.
    flags: "-Zsanitizer=thread --cfg thread_sanitizer -Cllvm-args=-tsan-instrument-func-entry-exit=0",
    c_flags: "",
    arguments: &[
        "--package=coblock-coroutine",
        "--package=coblock-aio",
        "--package=coblock-block",
        "--package=coblock",
        "--lib",
        "--tests",
    ],
    short: &[
        "--package=coblock-coroutine",
        "--package=coblock-aio",
        "--test=canary",
        "--test=moving",
        "--test=locks",
        "--test=contexts",
        "--test=wait_while",
    ],
    builds_std: true,
    variable: "TSAN_OPTIONS",
    options: "second_deadlock_stack=1",
    only: &[("suite", "threads_share_an_image")],
    skipped: &[
        skipped("loom_protocols", "", LOOM),
        skipped("loom_graph_lock", "", LOOM),
        skipped("loom_request_table", "", LOOM),
        skipped("models", "", LOOM),
    ],
    canaries: &[
        canary("races::with_another_thread", "data race"),
        canary("races::with_the_thread_that_it_left", "data race"),
    ],
};

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
        self.programs.is_empty() || self.programs.contains(&program)
    }
}

/// Runs what `args` say.
pub fn run(args: &[String]) -> Outcome {
    let mut wanted = Wanted::default();
    for arg in args {
        match arg.as_str() {
            "--short" => wanted.short = true,
            "asan" | "tsan" | "valgrind" if wanted.tool.is_none() => wanted.tool = Some(arg),
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
    for tool in [&ASAN, &TSAN] {
        if wanted.has(tool.asked_as) {
            sanitizer(tool, &wanted)?;
        }
    }
    if wanted.has("valgrind") {
        valgrind(&wanted)?;
    }
    Ok(())
}

/// Why this compiler cannot build for `tool`, if it cannot.
fn missing(tool: &Tool, host: &str) -> Result<Option<String>, String> {
    let libraries = asked("rustc", &["--print", "target-libdir"])?;
    let runtime = format!("rt.{}", tool.asked_as);
    let mut files = Path::new(libraries.trim()).read_dir().into_iter().flatten();
    let has_runtime = files
        .any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().contains(&runtime)));
    if !has_runtime {
        return Ok(Some(format!(
            "this compiler has no runtime for it ({host})"
        )));
    }
    let root = asked("rustc", &["--print", "sysroot"])?;
    let sources = Path::new(root.trim()).join("lib/rustlib/src/rust/library");
    if tool.builds_std && !sources.exists() {
        return Ok(Some(
            "no rust-src; `rustup component add rust-src` brings it".into(),
        ));
    }
    if tool.builds_std {
        let mut fetch = Command::new("cargo");
        fetch
            .args(["fetch", "--quiet", "--locked", "--manifest-path"])
            .arg(sources.join("Cargo.toml"))
            .env("RUSTC_BOOTSTRAP", "1");
        let fetched = fetch.status().map_err(|e| format!("cargo: {e}"))?;
        if !fetched.success() {
            return Ok(Some(
                "what the standard library is built of is not to be had".into(),
            ));
        }
    }
    Ok(None)
}

/// What the sanitizer's runtime says, if it cannot even start `program` on this machine.
fn refuses(tool: &Tool, program: &Program) -> Result<Option<String>, String> {
    let listed = Command::new(&program.path)
        .arg("--list")
        .output()
        .map_err(|e| format!("{}: {e}", program.path.display()))?;
    let said = String::from_utf8_lossy(&listed.stderr);
    let fatal = format!("{}: ", tool.name);
    let mut lines = said.lines();
    let line = lines.find(|line| line.contains("FATAL") && line.contains(&fatal));
    Ok(line.filter(|_| !listed.status.success()).map(str::to_owned))
}

/// Builds and runs test programs with a sanitizer. The option is one of nightly compilers; the
/// bootstrap variable lets the pinned one take it.
fn sanitizer(tool: &Tool, wanted: &Wanted<'_>) -> Outcome {
    let name = tool.name;
    let version = asked("rustc", &["-vV"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc does not tell its host")?;
    if let Some(why) = missing(tool, host)? {
        println!("SKIPPED: {name}: {why}");
        return Ok(());
    }
    // Other flags mean other files: not beside those of other builds.
    let target = crate::target_dir().join(tool.asked_as);
    let reports = target.join("reports");
    if reports.exists() {
        std::fs::remove_dir_all(&reports).map_err(|e| format!("{}: {e}", reports.display()))?;
    }
    std::fs::create_dir_all(&reports).map_err(|e| format!("{}: {e}", reports.display()))?;

    let began = Instant::now();
    let mut build = Command::new("cargo");
    build
        .current_dir(crate::workspace())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", tool.flags)
        .env("CFLAGS", tool.c_flags)
        .env("CARGO_TARGET_DIR", &target)
        .args(["test", "--target", host])
        .args(tool.builds_std.then_some("-Zbuild-std"))
        .args(if wanted.short {
            tool.short
        } else {
            tool.arguments
        });
    let (mut ran, mut failed) = (0, Vec::new());
    let programs = programs(&mut build)?;
    if let Some(program) = programs.first()
        && let Some(why) = refuses(tool, program)?
    {
        println!("SKIPPED: {name}: {why}");
        return Ok(());
    }
    let mut silent = tool.canaries.len();
    for program in programs {
        if program.name == CANARY {
            silent -= tool.reported(&program, &reports)?;
            continue;
        }
        if !wanted.wants(&program.name) {
            continue;
        }
        let Some(mut command) = tool.command(&program, &reports) else {
            continue;
        };
        ran += 1;
        if let Err(why) = timed(&format!("{name}: {}", program.name), &mut command) {
            println!("{why}");
            failed.push(program.name);
        }
    }
    // Every process that met something has left a file, those that tests start too.
    let told = files(&reports)?;
    let mut met = 0;
    for path in &told {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        let mut summaries = text.lines().filter(|line| line.starts_with("SUMMARY"));
        met += summaries.clone().count().max(1);
        let first = summaries.next().unwrap_or("a report");
        println!("{}: {first}", path.display());
    }
    println!(
        "{name}: {ran} test programs, {} failed, {met} reports, {} of {} canaries reported, {:.0} s",
        failed.len(),
        tool.canaries.len() - silent,
        tool.canaries.len(),
        began.elapsed().as_secs_f64()
    );
    if silent > 0 {
        failed.push(CANARY.into());
    }
    match (ran, failed.is_empty() && told.is_empty()) {
        (0, _) => Err("no such test program".into()),
        (_, true) => Ok(()),
        (_, false) => Err(format!("{name}: {}", failed.join(" "))),
    }
}

impl Tool {
    /// How many faults of `canary` are reported; tells each. What it wrote to `reports` goes: the
    /// rest is what nobody wanted.
    fn reported(&self, canary: &Program, reports: &Path) -> Result<usize, String> {
        let mut count = 0;
        for Canary { test, reported_as } in self.canaries {
            let Some(mut command) = self.command(canary, reports) else {
                continue;
            };
            command.args(["--ignored", "--exact", test]);
            // Its end is that of a program with a fault: the sanitizer decides about it.
            command.output().map_err(|e| format!("{test}: {e}"))?;
            let mut seen = false;
            for path in files(reports)? {
                let is_its = path.file_stem().is_some_and(|stem| stem == CANARY);
                if is_its {
                    let text = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
                    seen |= text.contains(reported_as) && text.contains(CANARY);
                    std::fs::remove_file(&path).map_err(|e| e.to_string())?;
                }
            }
            match seen {
                true => println!("ok: {}: {CANARY} {test}: {reported_as}", self.name),
                false => println!("FAILED {}: {CANARY} {test}: nothing reported", self.name),
            }
            count += usize::from(seen);
        }
        Ok(count)
    }

    /// How to run `program`, its reports going to the folder `reports`; nothing if the tool cannot.
    fn command(&self, program: &Program, reports: &Path) -> Option<Command> {
        let log = reports.join(&program.name);
        let mut command = Command::new(&program.path);
        command
            .current_dir(&program.folder)
            .env(
                self.variable,
                format!("{}:log_path={}", self.options, log.display()),
            )
            .env("COBLOCK_TEST_INSTRUMENTED", "1")
            // Frames are several times larger with marks around every local.
            .env("RUST_MIN_STACK", "33554432")
            .arg("--quiet");
        for Skipped { test, why, .. } in self
            .skipped
            .iter()
            .filter(|skipped| skipped.program == program.name)
        {
            println!("SKIPPED: {}: {} {test}: {why}", self.name, program.name);
            if test.is_empty() {
                return None;
            }
            command.args(["--skip", test]);
        }
        let only = self.only.iter().filter(|(its, _)| *its == program.name);
        command.args(only.map(|(_, test)| test));
        Some(command)
    }
}

/// What lies in `folder`.
fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let found = folder
        .read_dir()
        .map_err(|e| format!("{}: {e}", folder.display()))?;
    Ok(found.flatten().map(|file| file.path()).collect())
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
    let few = match wanted.short {
        true => &UNDER_VALGRIND[..UNDER_VALGRIND_SHORT],
        false => UNDER_VALGRIND,
    };
    for name in few {
        build.args(["--test", name]);
    }
    for program in programs(&mut build)? {
        let is_canary = program.name == CANARY;
        if !is_canary && !wanted.wants(&program.name) {
            continue;
        }
        let mut command = Command::new("valgrind");
        command
            .args(["--quiet", "--error-exitcode=9"])
            .arg(program.path)
            .args(["--quiet", "--test-threads=1"]);
        if is_canary {
            command.args(["--ignored", "--exact", FREED]);
            let output = command.output().map_err(|e| format!("valgrind: {e}"))?;
            let said = String::from_utf8_lossy(&output.stderr);
            if output.status.code() != Some(9) || !said.contains("Invalid read") {
                return Err(format!(
                    "FAILED valgrind: {CANARY} {FREED}: nothing reported"
                ));
            }
            println!("ok: valgrind: {CANARY} {FREED}: Invalid read");
        } else {
            timed(&format!("valgrind: {}", program.name), &mut command)?;
        }
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
        .args([
            "--quiet",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
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
