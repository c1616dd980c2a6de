//! `cargo xtask coverage`: which lines of `qcow2/src` the tests of that crate and the suite run.
//!
//! ```text
//!   cargo test, instrumented  ->  a profile for each process  ->  llvm-profdata merge
//!   llvm-cov export           ->  for each line how often     ->  per file and in all
//! ```
//!
//! The lines of unit tests, which lie in the same files, are left out: they run by themselves and
//! would only make the figure look better. Missing tools are `SKIPPED`, aloud.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Outcome;
use crate::child::asked;

const USAGE: &str = "\
Usage: cargo xtask coverage [--uncovered] [--again]

  --uncovered  the lines too that nothing runs
  --again      no tests: the profile of the last run
";

/// The crate whose lines are counted, and the package of the suite, which drives it.
const PACKAGES: &[&str] = &["coblock-qcow2", "coblock"];
const SOURCES: &str = "qcow2/src";
/// Percent of the lines.
const LEAST: f64 = 95.0;

/// For each line that has code, how often it ran.
type Lines = BTreeMap<usize, u64>;

/// Runs what `args` say.
pub fn run(args: &[String]) -> Outcome {
    let (mut uncovered, mut again) = (false, false);
    for arg in args {
        match arg.as_str() {
            "--uncovered" => uncovered = true,
            "--again" => again = true,
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(());
            }
            other => return Err(format!("unknown word '{other}'\n\n{USAGE}")),
        }
    }
    let version = asked("rustc", &["-vV"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc does not tell its host")?;
    let root = PathBuf::from(asked("rustc", &["--print", "sysroot"])?.trim());
    let tools = root.join("lib/rustlib").join(host).join("bin");
    for tool in ["llvm-profdata", "llvm-cov"] {
        if !tools.join(tool).exists() {
            println!("SKIPPED: coverage: no {tool}; `rustup component add llvm-tools` brings it");
            return Ok(());
        }
    }
    let target = crate::target_dir().join("coverage");
    let merged = target.join("all.profdata");
    if !again {
        let profiles = target.join("profiles");
        test(host, &target, &profiles)?;
        merge(&tools, &profiles, &merged)?;
    }
    let found = export(&tools, &merged, &programs(host, &target)?)?;
    report(&found, uncovered)
}

/// `cargo test` of the packages, instrumented, in a folder of its own: other flags mean other files.
fn cargo(host: &str, target: &Path) -> Command {
    let mut command = Command::new("cargo");
    command
        .current_dir(crate::workspace())
        .env("RUSTFLAGS", "-C instrument-coverage")
        // With a target named, the flags are not for build scripts and macros.
        .args(["test", "--quiet", "--lib", "--tests", "--target", host])
        .arg("--target-dir")
        .arg(target);
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    command
}

fn test(host: &str, target: &Path, profiles: &Path) -> Outcome {
    if profiles.exists() {
        std::fs::remove_dir_all(profiles).map_err(|e| format!("{}: {e}", profiles.display()))?;
    }
    // One file a process and program: processes that tests start are counted too.
    let status = cargo(host, target)
        .env("LLVM_PROFILE_FILE", profiles.join("%p-%m.profraw"))
        .env("COBLOCK_TEST_INSTRUMENTED", "1")
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("the tests: {status}")),
    }
}

/// The test programs: they hold the map from counters to lines.
fn programs(host: &str, target: &Path) -> Result<Vec<PathBuf>, String> {
    let output = cargo(host, target)
        .args(["--no-run", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo test --no-run: {}", output.status));
    }
    let programs = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    Ok(programs)
}

fn merge(tools: &Path, profiles: &Path, merged: &Path) -> Outcome {
    let status = Command::new(tools.join("llvm-profdata"))
        .args(["merge", "--sparse", "--output"])
        .arg(merged)
        .arg(profiles)
        .status()
        .map_err(|e| format!("cannot run llvm-profdata: {e}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("llvm-profdata: {status}")),
    }
}

/// How often each line of each source file ran.
fn export(
    tools: &Path,
    merged: &Path,
    programs: &[PathBuf],
) -> Result<BTreeMap<PathBuf, Lines>, String> {
    let (first, others) = programs.split_first().ok_or("no test program")?;
    let mut command = Command::new(tools.join("llvm-cov"));
    command
        .args(["export", "--format=lcov", "--instr-profile"])
        .arg(merged)
        .arg(first);
    for program in others {
        command.arg("--object").arg(program);
    }
    let output = command
        .arg(crate::workspace().join(SOURCES))
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot run llvm-cov: {e}"))?;
    match output.status.success() {
        true => parse(&String::from_utf8_lossy(&output.stdout)),
        false => Err(format!("llvm-cov: {}", output.status)),
    }
}

/// Reads the format of lcov: `SF:file`, and `DA:line,times` for each line.
fn parse(text: &str) -> Result<BTreeMap<PathBuf, Lines>, String> {
    let mut files: BTreeMap<PathBuf, Lines> = BTreeMap::new();
    let mut file = None;
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            file = Some(files.entry(path.into()).or_default());
        } else if let Some(counted) = line.strip_prefix("DA:") {
            let numbers = counted.split_once(',').and_then(|(line, times)| {
                Some((line.parse::<usize>().ok()?, times.parse::<u64>().ok()?))
            });
            let (number, times) = numbers.ok_or_else(|| format!("llvm-cov says '{line}'"))?;
            let lines = file.as_mut().ok_or("llvm-cov counts lines of no file")?;
            *lines.entry(number).or_default() += times;
        }
    }
    Ok(files)
}

/// How many lines of a file are in front of its unit tests, which are its end.
fn product_lines(source: &str) -> usize {
    let mut before = "";
    for (number, line) in source.lines().enumerate() {
        if before == "#[cfg(test)]" && line.starts_with("mod tests {") {
            return number;
        }
        before = line;
    }
    source.lines().count()
}

fn percent(covered: usize, of: usize) -> f64 {
    100.0 * covered as f64 / of.max(1) as f64
}

fn report(files: &BTreeMap<PathBuf, Lines>, uncovered: bool) -> Outcome {
    let folder = crate::workspace().join(SOURCES);
    let (mut all_covered, mut all_lines) = (0, 0);
    println!("  lines  covered  percent  file");
    for (path, lines) in files {
        let source =
            std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let product = product_lines(&source);
        let missed: Vec<usize> = lines
            .range(..=product)
            .filter(|(_, times)| **times == 0)
            .map(|(number, _)| *number)
            .collect();
        let count = lines.range(..=product).count();
        let covered = count - missed.len();
        all_covered += covered;
        all_lines += count;
        let name = path.strip_prefix(&folder).unwrap_or(path).display();
        println!(
            "{count:7}  {covered:7}  {:7.1}  {name}",
            percent(covered, count)
        );
        if uncovered {
            for number in missed {
                let line = source.lines().nth(number - 1).unwrap_or_default();
                println!("           {number:4}: {line}");
            }
        }
    }
    let all = percent(all_covered, all_lines);
    println!("{all_lines:7}  {all_covered:7}  {all:7.1}  in all");
    println!("qcow2: {all:.1} % of lines");
    if all_lines == 0 {
        return Err(format!("no line of {SOURCES} is in any test program"));
    }
    match all >= LEAST {
        true => Ok(()),
        false => Err(format!("below {LEAST} %")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines are those of their file, and a file that is named twice is one.
    #[test]
    fn counts_are_read_by_file() {
        let found = parse("SF:a\nDA:3,0\nDA:4,2\nend_of_record\nSF:b\nDA:3,1\nSF:a\nDA:3,5\n");
        let found = found.unwrap();
        assert_eq!(found[Path::new("a")], Lines::from([(3, 5), (4, 2)]));
        assert_eq!(found[Path::new("b")], Lines::from([(3, 1)]));
        assert!(parse("DA:1,1").is_err());
        assert!(parse("SF:a\nDA:one,1").is_err());
    }

    /// Unit tests are not the product; what only they use beside it is.
    #[test]
    fn unit_tests_are_not_counted() {
        let source = "fn a() {}\n#[cfg(test)]\nfn b() {}\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(product_lines(source), 4);
        assert_eq!(product_lines("fn a() {}\nfn b() {}\n"), 2);
    }
}
