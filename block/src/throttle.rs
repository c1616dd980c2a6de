//! Limits on requests per second and bytes per second (rule 8.1).
//!
//! ```text
//!   request -> member (a backend, a throttle node) -> group: six leaky buckets, shared
//!                 queue per direction                 one armed timer per direction
//! ```
//! A request goes on at once if no bucket that it would fill is too full, and nobody waits in its
//! direction. Else it queues at its member, and the group grants one after the other, members in
//! turn, each at the nanosecond at which the buckets have leaked enough. So what a request costs
//! is accounted in one place, at one time.
//!
//! `bucket` and `config` are pure: values in, values out.

mod bucket;
mod config;
mod group;

pub use config::{Limit, ThrottleConfig};
pub use group::{Member, ThrottleGroup};

/// Which way the bytes of a request go. Zeroes and discards are writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To it.
    Write,
}
