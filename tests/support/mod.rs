//! What the suite's programs share. Each of them uses its own part, so unused items are no finding
//! here.
#![allow(dead_code, reason = "each test program uses its own part")]

pub mod crash;
pub mod files;
pub mod image;
pub mod load;
pub mod model;
pub mod peer;
pub mod rng;
pub mod script;
pub mod session;
pub mod sim;
pub mod soundness;
