//! The list of all parts, in the order in which they run.

use super::part::Part;
use super::{exhaustive, faults, fuzz, kills, outside, power_cuts, seeds, threads};

/// Every part of the machine.
pub const ALL: &[Part] = &[
    power_cuts::PART,
    exhaustive::PART,
    faults::PART,
    seeds::PART,
    threads::PART,
    kills::PART,
    fuzz::PART,
    outside::SCRIPTS,
    outside::MUTANTS,
];
