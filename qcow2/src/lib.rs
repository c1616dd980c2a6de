//! The qcow2 image format.
//!
//! An image is a file of clusters. The guest's disk is found through two levels of tables, the use
//! of every cluster is counted in refcounts:
//!
//! ```text
//!   cluster 0                     guest offset -> host offset
//!  +----------------------+
//!  | header               |      +----------+      +----------+      +------------+
//!  |   extensions         |  +-> | L1 table | ---> | L2 table | ---> | data       |
//!  |   backing file name  |  |   |  ...     |      |  ...     |      | compressed |
//!  |   l1_table_offset ---|--+   +----------+      +----------+      +------------+
//!  |   snapshots_offset --|----> snapshot table -> an L1 table for each snapshot
//!  |   refcount_table ----|--+
//!  +----------------------+  |   +----------------+      +----------------+
//!                            +-> | refcount table | ---> | refcount block |   how often each host cluster
//!                                +----------------+      +----------------+   is referred to
//! ```
//!
//! Modules from top to bottom; each uses only those below it:
//!
//! | module | what |
//! |---|---|
//! | [`check`] | the consistency of all metadata |
//! | [`audit`] | for tests: counts against references while requests are in flight |
//! | [`create`], [`layout`] | a new image, and where its tables are |
//! | [`info`], [`snapshot`], [`bitmap`] | what an image says about itself |
//! | [`image_file`] | the file below, for operations on whole images |
//! | [`mod@format`] | opening an image |
//! | `driver` | what it does for its node: read, write, flush |
//! | `resize`, `shrink` | changing the size of the disk |
//! | `copy` | copies by the host, from and to an image |
//! | `cow`, `zero` | writes, zeroes and discards that change the mapping |
//! | `status` | what the bytes of the guest's disk are, without reading them |
//! | `header_bits` | the dirty and the corrupt bit |
//! | `writeback` | what reaches the file in which order |
//! | `alloc`, `refcount` | which host clusters are free |
//! | `mapping` | from guest offset to host offset |
//! | `compress` | inflating a compressed cluster |
//! | [`image`] | an open image: its tables, caches, counters |
//! | `cache`, `cleaner`, `memtable`, `lazy`, `overlap`, `claims` | tables in memory |
//! | [`budget`] | how much memory an image may ask for |
//! | `tuning` | what the options of a node choose |
//! | [`header`], [`extension`], [`feature`] | the first cluster |
//! | [`entry`], [`width`] | entries of L1, L2 and refcount tables; refcounts of 1 to 64 bits |
//! | [`types`] | offsets, clusters, [`types::Geometry`] |
//! | [`error`], [`spec`] | what can be wrong, and the limits |
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods)]
#![deny(clippy::little_endian_bytes)]

mod alloc;
pub mod audit;
pub mod bitmap;
pub mod budget;
mod cache;
pub mod check;
mod claims;
mod cleaner;
mod compress;
mod copy;
mod cow;
pub mod create;
mod driver;
pub mod entry;
pub mod error;
pub mod extension;
pub mod feature;
pub(crate) mod fields;
pub mod format;
pub mod header;
mod header_bits;
pub mod image;
pub mod image_file;
pub mod info;
pub mod layout;
mod lazy;
mod mapping;
mod memtable;
mod overlap;
mod refcount;
mod resize;
mod shrink;
pub mod snapshot;
pub mod spec;
mod status;
mod tuning;
pub mod types;
pub mod width;
mod writeback;
mod zero;

pub use budget::{Budget, MEMORY_LIMIT_DEFAULT};
pub use error::{Error, Result};
pub use format::OpenQcow2;
pub use header_bits::EVENTS;
pub use image::{Qcow2, Qcow2Stats};
pub use tuning::{CacheSizes, OverlapCheck, PassDiscard, RequestMode, Tuning};
