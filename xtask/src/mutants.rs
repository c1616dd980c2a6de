//! `cargo xtask mutants`: builds the reliability machine with the feature `mutants`, which the
//! product has nowhere else, and lets it hunt.

use std::process::Command;

use crate::{Outcome, workspace};

/// Hunts the mutants whose names contain these words; all, where there are none.
pub fn run(words: &[String]) -> Outcome {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace())
        // A folder of its own: the feature would make everything else be built anew each time.
        .arg("run")
        .arg("--quiet")
        .arg("--target-dir")
        .arg(crate::target_dir().join("mutants"))
        .args(["--profile", "reliability", "--package", "coblock-reliability"])
        .args(["--features", "mutants"])
        .args(["--", "mutants"])
        .arg(words.join(" "));
    let status = cargo.status().map_err(|e| format!("cargo: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("mutants: {status}"))
    }
}
