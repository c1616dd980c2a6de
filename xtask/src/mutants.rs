//! `cargo xtask mutants`: builds the reliability machine with the feature `mutants`, which the
//! product has nowhere else, and lets it hunt. Before that the main job does, on threads: some
//! mistakes need what one thread does not have. The last line is `M of N mutants caught`.

use std::process::Command;

use crate::{Outcome, workspace};

/// Mistakes that `coblock bench --queues --backing` must find too, within [`SECONDS`].
const ON_THREADS: [&str; 1] = ["clusters are freed under their readers"];
const SECONDS: &str = "60";

/// Hunts the mutants whose names contain these words; all, where there are none.
pub fn run(words: &[String]) -> Outcome {
    let wanted = words.join(" ");
    let chosen: Vec<_> = ON_THREADS
        .into_iter()
        .filter(|name| name.contains(&wanted))
        .collect();
    if !chosen.is_empty() {
        on_threads(&chosen)?;
    }
    let status = cargo("run", "coblock-reliability")
        .args(["--", "mutants"])
        .arg(&wanted)
        .status()
        .map_err(|e| format!("cargo: {e}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("mutants: {status}")),
    }
}

fn cargo(command: &str, package: &str) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace())
        // A folder of its own: the feature would make everything else be built anew each time.
        .args([command, "--quiet", "--target-dir"])
        .arg(crate::target_dir().join("mutants"))
        .args(["--profile", "reliability", "--package", package])
        .args(["--features", "mutants"]);
    cargo
}

/// The main job finds each of these mistakes, and nothing where there is none.
fn on_threads(names: &[&str]) -> Outcome {
    let built = cargo("build", "coblock-tools").status();
    let built = built.map_err(|e| format!("cargo: {e}"))?;
    if !built.success() {
        return Err(format!("mutants: coblock-tools: {built}"));
    }
    let bench = |mutant: &str| {
        let program = crate::target_dir().join("mutants/reliability/coblock");
        let mut bench = Command::new(&program);
        bench.args(["bench", "--queues=4", "--backing", "--verify"]);
        bench.args(["--seconds", SECONDS]);
        if !mutant.is_empty() {
            bench.env("COBLOCK_MUTANT", mutant);
        }
        let output = bench
            .output()
            .map_err(|e| format!("{}: {e}", program.display()))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let first = said.lines().next().unwrap_or_default().to_owned();
        Ok::<_, String>((output.status.success(), first))
    };
    if let (false, said) = bench("")? {
        return Err(format!(
            "the bench on threads fails without a mutant: {said}"
        ));
    }
    println!("threads   no mutant: nothing found");
    for name in names {
        match bench(name)? {
            (true, _) => return Err(format!("threads   {name}: SURVIVED {SECONDS} s")),
            (false, said) => println!("threads   {name}: caught: {said}"),
        }
    }
    Ok(())
}
