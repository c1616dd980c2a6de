//! `cargo xtask reliability` and `cargo xtask sim`: the machine of `tests/reliability`, built
//! optimised with assertions, and where its figures go.

use std::process::Command;

use crate::Outcome;

/// Runs all parts, or those that `words` name; a run of all of them writes the figures down.
pub fn run(words: &[String]) -> Outcome {
    let mut all = vec!["run".to_string()];
    all.extend(words.iter().cloned());
    let whole = words
        .iter()
        .all(|word| matches!(word.as_str(), "--ci" | "--release-figures"));
    if whole {
        let json = crate::target_dir().join("reliability.json");
        all.extend(["--json".to_string(), json.display().to_string()]);
    }
    // The page has the mutants, too, which CI leaves out.
    if whole && !words.iter().any(|word| word == "--ci") {
        let docs = crate::workspace().join("docs/reliability.md");
        all.extend(["--docs".to_string(), docs.display().to_string()]);
    }
    machine(&all)
}

/// Simulates seeds.
pub fn sim(words: &[String]) -> Outcome {
    let mut all = vec!["sim".to_string()];
    all.extend(words.iter().cloned());
    machine(&all)
}

/// Gives fuzz targets inputs.
pub fn fuzz(words: &[String]) -> Outcome {
    let mut all = vec!["fuzz".to_string()];
    all.extend(words.iter().cloned());
    machine(&all)
}

fn machine(words: &[String]) -> Outcome {
    let status = Command::new("cargo")
        .args(["run", "--quiet", "--profile", "reliability"])
        .args(["--package", "coblock-reliability", "--"])
        .args(words)
        .current_dir(crate::workspace())
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("reliability: {status}"))
    }
}
