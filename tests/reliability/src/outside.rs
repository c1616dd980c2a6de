//! Parts that are programs of their own: started by cargo, counted by what they print.
//!
//! The mutants need a build that has them, and scripts against the reference need the program
//! that users call, in the build of its own tests.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use super::judge::Verdict;
use super::part::{Figure, Part, Plan, Report};

/// The same scripts through `coblock io` and `qemu-io`. (R8.)
pub const SCRIPTS: Part = Part {
    name: "scripts",
    promise: "the same script through our program and through the reference's: they print the same \
              and leave the same disk, and the image is sound",
    run: scripts,
};

/// Every mutant is caught.
pub const MUTANTS: Part = Part {
    name: "mutants",
    promise: "could the machine fail: for each mistake that the product can be told to make, \
              somebody notices",
    run: mutants,
};

/// What a line of `tools/tests/io_scripts.rs` ends with, behind the number.
const COMPARED: &str = " scripts compared";
/// The end of the last line of `cargo xtask mutants`.
const CAUGHT: &str = " mutants caught";

fn scripts(plan: &Plan, report: &mut Report) {
    let wanted: u64 = plan.scale.pick(20, 200, 50_000);
    let mut skipped = false;
    let mut compared = 0;
    // The whole workspace, as in CI's `cargo test`: nothing is then built with other features.
    let words = "test --quiet --workspace --test io_scripts -- --nocapture";
    let many = ("COBLOCK_TEST_SCRIPTS", wanted.to_string());
    let ended = cargo(words, Some(many), |line| {
        // The harness may have begun the line with its own words.
        let number = line.strip_suffix(COMPARED);
        let number = number.and_then(|text| text.split(' ').next_back());
        match number.and_then(|number| number.parse::<u64>().ok()) {
            Some(number) => compared += number,
            None if line.contains("SKIPPED") => {
                skipped = true;
                report.say(line);
            }
            None => {}
        }
    });
    report.count(Figure::Scripts, compared);
    let ended = match ended {
        Ok(()) if compared < wanted && !skipped => Err(format!("only {compared} of {wanted}")),
        ended => ended,
    };
    if let Err(why) = ended {
        report.fail(&format!("cargo {words}"), &why);
    }
}

fn mutants(_: &Plan, report: &mut Report) {
    let words = "xtask mutants";
    let mut survivors = Vec::new();
    let mut whole = false;
    let ended = cargo(words, None, |line| {
        if line.contains(": SURVIVED, ") {
            survivors.push(line.to_string());
        }
        if let Some((caught, all)) = caught(line) {
            report.count(Figure::Mutants, caught);
            report.say(format!("{caught} of {all}{CAUGHT}"));
            whole = true;
        }
    });
    for survivor in &survivors {
        report.fail(&format!("cargo {words}"), survivor);
    }
    match ended {
        Err(why) if survivors.is_empty() => report.fail(&format!("cargo {words}"), &why),
        Ok(()) if !whole => report.fail(&format!("cargo {words}"), "it does not say how many"),
        _ => {}
    }
}

/// Both numbers of `M of N mutants caught`.
fn caught(line: &str) -> Option<(u64, u64)> {
    let (caught, all) = line.strip_suffix(CAUGHT)?.split_once(" of ")?;
    Some((caught.parse().ok()?, all.parse().ok()?))
}

/// Runs cargo in the workspace, with a variable more, and passes what it prints to `hear` and on to our own output.
///
/// # Errors
/// It cannot be started, or ends without success.
fn cargo(words: &str, env: Option<(&str, String)>, mut hear: impl FnMut(&str)) -> Verdict {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut child = Command::new("cargo")
        .args(words.split(' '))
        .envs(env)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    for line in lines {
        let line = line.map_err(|e| e.to_string())?;
        println!("   | {line}");
        hear(line.trim_end());
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("cargo {words}: {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last line of the hunt is understood, and no other.
    #[test]
    fn the_last_line_has_the_figure() {
        assert_eq!(caught("31 of 33 mutants caught"), Some((31, 33)));
        assert_eq!(caught("cache     a mistake: caught by x, 1 s: y"), None);
    }
}
