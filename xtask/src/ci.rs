//! `cargo xtask ci`: the same script as CI, with the same arguments.

use std::process::Command;

use crate::Outcome;

/// Runs `.ci/run` with `steps`; none means all.
pub fn run(steps: &[String]) -> Outcome {
    let script = crate::workspace().join(".ci/run");
    let status = Command::new(&script)
        .args(steps)
        .status()
        .map_err(|e| format!("cannot run {}: {e}", script.display()))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{}: {status}", script.display()))
    }
}
