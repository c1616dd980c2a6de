//! The suite: one file a promise, one binary for all. `docs/testing.md` says how they work.

use coblock_reliability as support;

mod cached_path;
mod complete;
mod fidelity;
mod power_cut;
mod reliability;
mod same_as_qemu_io;
mod simulated;
mod they_read_ours;
mod we_read_theirs;
