//! The drivers of this crate.

pub mod copy_on_read;
pub mod file;
pub(crate) mod filtered;
pub mod null;
pub mod raw;
pub mod sim;
pub mod throttle;

pub use filtered::Filtered;
