//! The atomics and fences under the two lock-free protocols of this crate.
//!
//! A module of its own so that a model can put its own in this place.

pub(crate) use coblock_aio::{heavy_fence, light_fence};
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
