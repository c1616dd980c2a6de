//! Promise: a tenth of what `cargo xtask reliability --ci` runs finds nothing. The parts and their
//! oracles are in the package `tests/reliability`.

use crate::support::part::{Figure, Part, Plan, Report, Scale};
use crate::support::{exhaustive, faults, power_cuts, seeds, threads};

/// Runs a tenth of a part; it must have done at least so much.
fn tenth(part: Part, figure: Figure, least: u64) {
    let plan = Plan {
        scale: Scale::Tenth,
        jobs: 1,
        quick: true,
    };
    let mut report = Report::default();
    (part.run)(&plan, &mut report);
    println!("{}", report.notes.join("\n"));
    assert!(report.failures.is_empty(), "{}", report.failures.join("\n"));
    let done = report.figures.get(&figure).copied().unwrap_or(0);
    assert!(done >= least, "only {done} {}", figure.name());
}

/// Rule 9.3: the power goes at every write of workloads from seeds and scripts.
#[test]
fn power_cuts_lose_nothing() {
    tenth(power_cuts::PART, Figure::States, 8_000);
}

/// Rule 9.3: the same for every single operation of the alphabet.
#[test]
fn every_operation_survives_a_power_cut() {
    tenth(exhaustive::PART, Figure::States, 1_500);
}

/// Rule 9.3, "errors of each step are returned": every request to the file fails once, and for good.
#[test]
fn every_failure_is_told() {
    tenth(faults::PART, Figure::Runs, 3_000);
}

/// Rules 9.1 to 9.4: the whole stack by seed, and the same seed twice.
#[test]
fn seeds_obey_the_model() {
    tenth(seeds::PART, Figure::Seeds, 200);
}

/// Rules 3.8 to 3.10, 5.1, 9.1 to 9.4: four real threads send requests to one image.
#[test]
fn threads_share_an_image() {
    tenth(threads::PART, Figure::Requests, 10_000);
}
