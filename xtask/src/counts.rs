//! `cargo xtask counts`: instructions per operation, counted by callgrind, against the recorded
//! ones.
//!
//! A *body* is a bench program that does exactly N operations when called with N as its last word
//! (`once ROW SUBJECT N` for the benches of `coroutine`,
//! `once ROW N` for `benches/request.rs`). It runs twice, with two numbers; the
//! difference of the two counts, divided by the difference of the numbers, is the count of one
//! operation: start-up and warming up cancel out. A body must not use io_uring or threads, whose
//! instructions are not its own. To add one: a line in [`BODIES`], then `--record`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};

use crate::Outcome;

const USAGE: &str = "\
Usage: cargo xtask counts [--record] [NAME...]

  --record  writes what was counted to docs/counts.json instead of comparing
  NAME      only bodies whose name contains it
";

/// Counts may differ by so much, in percent.
const TOLERANCE: f64 = 3.0;

/// One thing to count.
struct Body {
    /// Its name in the record.
    name: &'static str,
    package: &'static str,
    bench: &'static str,
    /// Before the number of operations.
    args: &'static [&'static str],
    /// The two numbers of operations.
    n: [u64; 2],
}

const fn coroutine(name: &'static str, args: &'static [&'static str]) -> Body {
    Body {
        name,
        package: "coblock-coroutine",
        bench: "peers",
        args,
        n: [10_000, 20_000],
    }
}

const fn request(name: &'static str, args: &'static [&'static str]) -> Body {
    Body {
        name,
        package: "coblock",
        bench: "request",
        args,
        n: [1_000, 6_000],
    }
}

const BODIES: &[Body] = &[
    coroutine("coroutine: yield + resume", &["once", "yield", "coblock"]),
    coroutine(
        "corosensei: yield + resume",
        &["once", "yield", "corosensei"],
    ),
    coroutine(
        "coroutine: down 10 frames, yield, up",
        &["once", "down10", "coblock"],
    ),
    coroutine(
        "coroutine: enter from 10 frames down",
        &["once", "enter-from-10", "coblock"],
    ),
    coroutine(
        "coroutine: create + run + finish",
        &["once", "lifecycle", "coblock"],
    ),
    coroutine(
        "corosensei: create + run + finish",
        &["once", "lifecycle", "corosensei"],
    ),
    coroutine(
        "coroutine: create + yield + finish",
        &["once", "cost", "coblock"],
    ),
    coroutine(
        "coroutine: nesting, per level",
        &["once", "nesting", "coblock"],
    ),
    request("request: read of null", &["once", "null-read"]),
    request("request: read of sim", &["once", "sim-read"]),
    request("request: overwrite of sim", &["once", "sim-write"]),
    request(
        "request: cached read of qcow2 on sim",
        &["once", "qcow2-read"],
    ),
    request(
        "request: overwrite of qcow2 on sim",
        &["once", "qcow2-write"],
    ),
];

/// Counts, and compares or records.
pub fn run(args: &[String]) -> Outcome {
    let mut record = false;
    let mut wanted = Vec::new();
    for arg in args {
        match arg.as_str() {
            "--record" => record = true,
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(());
            }
            option if option.starts_with('-') => {
                return Err(format!("unknown option '{option}'\n\n{USAGE}"));
            }
            name => wanted.push(name),
        }
    }
    let bodies = BODIES
        .iter()
        .filter(|body| wanted.is_empty() || wanted.iter().any(|name| body.name.contains(name)));
    let path = crate::workspace().join("docs/counts.json");
    let mut recorded = read(&path, record)?;
    let mut programs: Vec<(&str, &str, PathBuf)> = Vec::new();
    let (mut counted, mut failed) = (0, Vec::new());
    println!(
        "{:<40} {:>10} {:>10} {:>8}",
        "instructions of", "recorded", "now", "%"
    );
    for body in bodies {
        let known = programs
            .iter()
            .find(|(package, bench, _)| (*package, *bench) == (body.package, body.bench));
        let program = match known {
            Some((.., program)) => program.clone(),
            None => {
                let program = build(body.package, body.bench)?;
                programs.push((body.package, body.bench, program.clone()));
                program
            }
        };
        let now = count(&program, body)?;
        counted += 1;
        let before = recorded.get(body.name).and_then(Value::as_f64);
        let change = before.map(|before| (now / before - 1.0) * 100.0);
        let tell = |figure: Option<f64>| figure.map_or("-".to_string(), |f| format!("{f:.1}"));
        println!(
            "{:<40} {:>10} {now:>10.1} {:>8}",
            body.name,
            tell(before),
            tell(change)
        );
        match change {
            _ if record => {
                recorded.insert(body.name.to_string(), json!((now * 10.0).round() / 10.0));
            }
            None => failed.push(format!("{}: never recorded", body.name)),
            Some(change) if change > TOLERANCE => {
                failed.push(format!("{}: {change:.1} % more", body.name));
            }
            Some(change) if change < -TOLERANCE => {
                failed.push(format!(
                    "{}: {:.1} % fewer, record that",
                    body.name, -change
                ));
            }
            Some(_) => {}
        }
    }
    if counted == 0 {
        return Err("no body has such a name".to_string());
    }
    if record {
        recorded.retain(|name, _| BODIES.iter().any(|body| body.name == name));
        let text = serde_json::to_string_pretty(&recorded).map_err(|e| e.to_string())?;
        return fs::write(&path, text + "\n").map_err(|e| format!("{}: {e}", path.display()));
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "counts differ from docs/counts.json (cargo xtask counts --record writes it):\n  {}",
            failed.join("\n  ")
        ))
    }
}

fn read(path: &Path, may_be_missing: bool) -> Result<Map<String, Value>, String> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(_) if may_be_missing => return Ok(Map::new()),
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Builds a bench, and tells where it is.
fn build(package: &str, bench: &str) -> Result<PathBuf, String> {
    let output = Command::new("cargo")
        .current_dir(crate::workspace())
        .args(["bench", "--quiet", "--no-run", "--message-format=json"])
        .args(["--package", package, "--bench", bench])
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!(
            "cargo bench --no-run of {bench}: {}",
            output.status
        ));
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == bench)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| format!("cargo does not tell where bench {bench} is"))
}

/// Instructions of one operation.
fn count(program: &Path, body: &Body) -> Result<f64, String> {
    let [few, many] = body.n;
    let count = |n| instructions(program, body.args, n);
    let difference = count(many)?.checked_sub(count(few)?);
    let difference = difference.ok_or_else(|| format!("{}: more takes fewer", body.name))?;
    Ok(difference as f64 / (many - few) as f64)
}

/// Instructions of a whole run.
fn instructions(program: &Path, args: &[&str], n: u64) -> Result<u64, String> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(args)
        .arg(n.to_string())
        .output()
        .map_err(|e| format!("cannot run valgrind: {e}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {}\n{told}", program.display(), output.status));
    }
    told.lines()
        .find_map(|line| line.split_once("Collected :"))
        .and_then(|(_, count)| count.trim().parse().ok())
        .ok_or_else(|| format!("valgrind tells no count:\n{told}"))
}
