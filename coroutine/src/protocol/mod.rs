//! The parts that several threads touch at once, each small enough for an exhaustive model.
//!
//! They take their primitives from `super::sync`, so that a test can include the same files with
//! loom's.

pub(crate) mod handoff;
pub(crate) mod limit;
pub(crate) mod mark;
pub(crate) mod placed;
pub(crate) mod tickets;

/// The primitives of a normal build.
pub(crate) mod sync {
    pub(crate) use crate::sync::ThreadLock;
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
}
