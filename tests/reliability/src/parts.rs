//! The list of all parts, in the order in which they run.

use super::part::Part;

/// Every part of the machine.
pub const ALL: &[Part] = &[];
