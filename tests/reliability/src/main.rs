//! The program of the machine; `cargo xtask reliability` and `cargo xtask sim` run it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use coblock_reliability::part::{Plan, Scale};
use coblock_reliability::power_cuts::{judge_script, workload};
use coblock_reliability::script::Script;
use coblock_reliability::{faults, fuzz, kills, mutants, outside, parts, run, seeds};

const USAGE: &str = "\
Usage: cargo xtask reliability [OPTIONS]

Runs every part of the reliability machine and prints what each shows.

  --tenth             a tenth of what CI runs
  --ci                what CI runs; without an option: this and the mutants
  --release-figures   what is run before a release
  --part NAME         only this part; may be given several times
  --jobs N            threads (default: one for each core)
  --script FILE       plays this script, or the one of that name in scripts/, and cuts the power everywhere
  --power-cuts-of N   the same for the workload of a seed
  --faults-of N|FILE  every failure of the workload of a seed, or of a script
  --json FILE         where the figures go (of a run of everything: target/reliability.json)
  --docs FILE         where the page with the figures goes (of a run of everything: docs/reliability.md)
";

const SIM_USAGE: &str = "\
Usage: cargo xtask sim --seed N | --seeds K [--first-seed F] [--jobs N]

Simulates the whole stack by seed: one with a trace of every request, or many with a line of figures.
";

fn main() -> ExitCode {
    coblock::coroutine::install_overflow_handler();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match words.first().map(String::as_str) {
        Some("sim") => simulate(&words[1..]),
        Some("run") => reliability(&words[1..]),
        Some("fuzz") => fuzz::run(&words[1..]),
        Some("victim") => kills::victim(&words[1..]),
        Some("mutants") => mutants::run(words.get(1).map_or("", String::as_str)),
        Some("mutant") => mutants::make(words.get(1).map_or("", String::as_str)).map(|()| true),
        _ => Err(USAGE.to_string()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Runs seeds; true if nothing failed.
fn simulate(words: &[String]) -> Result<bool, String> {
    let (mut seed, mut seeds, mut first) = (None, None, 0);
    let mut jobs = cores();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let number = words
            .next()
            .ok_or(format!("{word} needs a number\n\n{SIM_USAGE}"));
        let number = number?.parse::<u64>().map_err(|e| format!("{word}: {e}"))?;
        match word.as_str() {
            "--seed" => seed = Some(number),
            "--seeds" => seeds = Some(number),
            "--first-seed" => first = number,
            "--jobs" => jobs = usize::try_from(number).map_err(|e| format!("--jobs: {e}"))?,
            other => return Err(format!("unknown option '{other}'\n\n{SIM_USAGE}")),
        }
    }
    match (seed, seeds) {
        (Some(seed), None) => {
            let outcome = seeds::replay(seed).map_err(|why| format!("seed {seed}: {why}"))?;
            println!("seed {seed}: {outcome:?}");
            Ok(true)
        }
        (None, Some(count)) => {
            let many = seeds::many(first, count, u64::MAX, jobs);
            for (seed, why) in &many.failures {
                println!("FAILED seed {seed}: {why}\n  replay: cargo xtask sim --seed {seed}");
            }
            println!("{}\n{}", many.words_line(), many.mechanisms_line());
            println!("{}", many.line());
            Ok(many.failures.is_empty())
        }
        _ => Err(SIM_USAGE.to_string()),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The script in a file, or one of ours by its name.
fn read_script(name: &str) -> Result<Script, String> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("scripts")
        .join(name);
    let path = if ours.exists() { ours } else { name.into() };
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    text.parse()
}

/// Plays a script and cuts the power everywhere.
fn one_script(script: &Script) -> Result<bool, String> {
    println!("{script}");
    let counted = judge_script(script)?;
    println!("{counted:?}");
    Ok(true)
}

/// Runs parts; true if nothing failed.
fn reliability(words: &[String]) -> Result<bool, String> {
    let mut plan = Plan {
        scale: Scale::Ci,
        jobs: cores(),
        quick: false,
    };
    let (mut names, mut json, mut docs) = (Vec::new(), None, None);
    // The hunt takes longer than CI has.
    let mut hunt = true;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .ok_or(format!("{word} needs a value\n\n{USAGE}"))
        };
        match word.as_str() {
            "--tenth" => (plan.scale, plan.quick, hunt) = (Scale::Tenth, true, false),
            "--ci" => (plan.scale, plan.quick, hunt) = (Scale::Ci, true, false),
            "--release-figures" => plan.scale = Scale::Release,
            "--part" => names.push(value()?.clone()),
            "--jobs" => plan.jobs = value()?.parse().map_err(|e| format!("--jobs: {e}"))?,
            "--script" => {
                return one_script(&read_script(value()?)?);
            }
            "--power-cuts-of" => {
                let seed = value()?.parse();
                return one_script(&workload(
                    seed.map_err(|e| format!("--power-cuts-of: {e}"))?,
                ));
            }
            "--faults-of" => {
                let named = value()?;
                let script = match named.parse() {
                    Ok(seed) => faults::workload(seed),
                    Err(_) => read_script(named)?,
                };
                println!("{script}");
                println!("{} runs", faults::judge_script(&script)?);
                return Ok(true);
            }
            "--json" => json = Some(PathBuf::from(value()?)),
            "--docs" => docs = Some(PathBuf::from(value()?)),
            "--help" => {
                print!("{USAGE}");
                return Ok(true);
            }
            other => return Err(format!("unknown option '{other}'\n\n{USAGE}")),
        }
    }
    let known = |name: &String| parts::ALL.iter().any(|part| part.name == name);
    if let Some(name) = names.iter().find(|name| !known(name)) {
        let all: Vec<&str> = parts::ALL.iter().map(|part| part.name).collect();
        return Err(format!("no part '{name}'; there are {}", all.join(", ")));
    }
    let chosen: Vec<_> = parts::ALL
        .iter()
        .filter(|part| match names.is_empty() {
            true => hunt || part.name != outside::MUTANTS.name,
            false => names.iter().any(|name| name == part.name),
        })
        .copied()
        .collect();
    let done = run::run(&chosen, &plan);
    if names.is_empty() && !hunt {
        println!(
            "left out, because it takes minutes: the part mutants; `cargo xtask mutants` runs it"
        );
    }
    let short = match names.is_empty() && plan.scale > Scale::Tenth {
        true => run::shortfalls(&done),
        false => Vec::new(),
    };
    for short in &short {
        println!("FAILED {short}");
    }
    println!("{}", run::summary(&done));
    if let Some(path) = json {
        run::write(&path, &run::to_json(&done))?;
    }
    if let Some(path) = docs {
        run::write(&path, &run::to_markdown(&done, plan.scale))?;
    }
    Ok(run::failures(&done) == 0 && short.is_empty())
}
