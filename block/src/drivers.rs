//! The drivers of this crate.

pub mod file;
pub mod null;
pub mod raw;
pub mod sim;
pub mod throttle;
