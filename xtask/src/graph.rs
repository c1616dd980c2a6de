//! `cargo xtask graph`: who uses whom, from `cargo metadata`, and whether the crates still stand in
//! one line.
//!
//! The line is checked, not only drawn: a crate that uses one to its right is an error.

use std::process::Command;

use serde_json::Value;

use crate::Outcome;

/// Our crates, each of which may use only those before it.
const LINE: [&str; 6] = [
    "coblock-coroutine",
    "coblock-aio",
    "coblock-block",
    "coblock-qcow2",
    "coblock",
    "coblock-tools",
];

/// Prints the graph; with `--all` the direct dependencies from outside too.
pub fn run(words: &[String]) -> Outcome {
    let all = match words {
        [] => false,
        [word] if word == "--all" => true,
        _ => return Err("usage: cargo xtask graph [--all]".into()),
    };
    let packages = metadata()?;
    let mut wrong = Vec::new();
    for (position, name) in LINE.iter().enumerate() {
        let package = packages
            .iter()
            .find(|p| p["name"] == *name)
            .ok_or_else(|| format!("no package {name} in this workspace"))?;
        let used = used_by(package);
        let (ours, others): (Vec<_>, Vec<_>) =
            used.into_iter().partition(|u| LINE.contains(&u.as_str()));
        println!(
            "{name:<18} <- {}",
            if ours.is_empty() {
                "(nothing)".into()
            } else {
                ours.join(" ")
            }
        );
        if all {
            println!("{:<18}    {}", "", others.join(" "));
        }
        for used in ours {
            if LINE.iter().position(|l| *l == used) >= Some(position) {
                wrong.push(format!(
                    "{name} uses {used}, which does not stand to its left"
                ));
            }
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("\n"))
    }
}

/// The workspace's packages, as cargo describes them.
fn metadata() -> Result<Vec<Value>, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(crate::workspace())
        .output()
        .map_err(|e| format!("cannot run cargo metadata: {e}"))?;
    if !output.status.success() {
        return Err(format!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let mut parsed: Value =
        serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    match parsed["packages"].take() {
        Value::Array(packages) => Ok(packages),
        other => Err(format!("cargo metadata: no list of packages but {other}")),
    }
}

/// What a package uses in its library and programs; development dependencies do not count.
fn used_by(package: &Value) -> Vec<String> {
    let mut used: Vec<String> = package["dependencies"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|d| d["kind"].is_null())
        .filter_map(|d| d["name"].as_str().map(str::to_string))
        .collect();
    used.sort_by_key(|name| (LINE.iter().position(|l| l == name), name.clone()));
    used.dedup();
    used
}
