//! What the options of a node choose, beyond its files: how it works, not what it is.
//!
//! Names, rules and words of errors are the reference's. A cache that is asked to be smaller than
//! it can be is as small as it can be; more than a GiB is never used.

use std::time::Duration;

use coblock_block::{Error as BlockError, ErrorKind, Options, Result};

use crate::budget::{Budget, MEMORY_LIMIT_DEFAULT};
use crate::cache::{SLICE_BYTES_DEFAULT, SLICE_BYTES_MIN, SLOTS_MIN};
use crate::types::Geometry;

/// How requests of one image share it (rule 2.6). Both modes give the same images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestMode {
    /// Metadata is changed by one request at a time, data I/O is parallel.
    #[default]
    Mutex,
    /// One request at a time, strictly first in first out: what the conversion of 2011 began with,
    /// to compare with.
    Serial,
}

/// Sizes of the caches, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSizes {
    /// For L2 tables.
    pub l2: u64,
    /// For refcount blocks.
    pub refcounts: u64,
    /// Bytes of an L2 table that are read and kept together.
    pub l2_entry: u64,
}

/// What the options of a node choose, beyond its files.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// How large the caches are.
    pub caches: CacheSizes,
    /// How long a part of a table stays cached at least that nobody uses; zero: for ever.
    pub clean_interval: Duration,
    /// How requests share the image.
    pub mode: RequestMode,
    /// Refcounts may be behind the file's mappings while the image is open, and the dirty bit says
    /// so. Version 3 only. `None`: as the image says.
    pub lazy_refcounts: Option<bool>,
    /// Which freed clusters give their space back.
    pub pass_discard: PassDiscard,
    /// Which tables no write may touch.
    pub overlap_check: OverlapCheck,
    /// Bytes of memory that the image may ask for while it is opened.
    pub memory_limit: u64,
}

/// Which freed clusters give their space back to the file system.
#[derive(Clone, Copy, Debug)]
pub struct PassDiscard {
    /// Those that a discard freed, or zeroes that may unmap.
    pub request: bool,
    /// Those that a snapshot held. There is no operation on snapshots yet that frees any.
    pub snapshot: bool,
    /// Those of tables that moved.
    pub other: bool,
}

bitflags::bitflags! {
    /// Structures that a write is kept from touching. (Hazard O14.)
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OverlapCheck: u8 {
        /// The header.
        const MAIN_HEADER = 1 << 0;
        /// The L1 table of the disk.
        const ACTIVE_L1 = 1 << 1;
        /// Its L2 tables.
        const ACTIVE_L2 = 1 << 2;
        /// The refcount table.
        const REFCOUNT_TABLE = 1 << 3;
        /// Refcount blocks.
        const REFCOUNT_BLOCK = 1 << 4;
        /// The snapshot table.
        const SNAPSHOT_TABLE = 1 << 5;
        /// L1 tables of snapshots.
        const INACTIVE_L1 = 1 << 6;
        /// L2 tables of snapshots.
        const INACTIVE_L2 = 1 << 7;
    }
}

impl OverlapCheck {
    /// The reference's `constant`: what stays where it is while the image is open.
    pub const CONSTANT: Self = Self::MAIN_HEADER
        .union(Self::ACTIVE_L1)
        .union(Self::REFCOUNT_TABLE)
        .union(Self::SNAPSHOT_TABLE);
    /// The reference's `cached`, and its default: what can be told without reading.
    pub const CACHED: Self = Self::CONSTANT
        .union(Self::ACTIVE_L2)
        .union(Self::REFCOUNT_BLOCK)
        .union(Self::INACTIVE_L1);

    /// Structures by the names of their options.
    const NAMES: [(&str, Self); 8] = [
        ("main-header", Self::MAIN_HEADER),
        ("active-l1", Self::ACTIVE_L1),
        ("active-l2", Self::ACTIVE_L2),
        ("refcount-table", Self::REFCOUNT_TABLE),
        ("refcount-block", Self::REFCOUNT_BLOCK),
        ("snapshot-table", Self::SNAPSHOT_TABLE),
        ("inactive-l1", Self::INACTIVE_L1),
        ("inactive-l2", Self::INACTIVE_L2),
    ];

    fn take(options: &mut Options) -> Result<Self> {
        let whole = options.take_str("overlap-check")?;
        let template = options.take_str("overlap-check.template")?;
        if let (Some(whole), Some(template)) = (&whole, &template)
            && whole != template
        {
            return Err(invalid(format!(
                "Conflicting values for qcow2 options 'overlap-check' ('{whole}') and \
                 'overlap-check.template' ('{template}')"
            )));
        }
        let word = whole.or(template);
        let mut check = match word.as_deref().unwrap_or("cached") {
            "none" => Self::empty(),
            "constant" => Self::CONSTANT,
            "cached" => Self::CACHED,
            "all" => Self::all(),
            other => {
                return Err(invalid(format!(
                    "Unsupported value '{other}' for qcow2 option 'overlap-check'. Allowed are \
                     any of the following: none, constant, cached, all"
                )));
            }
        };
        for (name, structure) in Self::NAMES {
            if let Some(on) = options.take_bool(&format!("overlap-check.{name}"))? {
                check.set(structure, on);
            }
        }
        // Accepted and of no effect in the reference too, as long as there are no bitmaps.
        options.take_bool("overlap-check.bitmap-directory")?;
        Ok(check)
    }
}

/// Most bytes for L2 slices unless told otherwise: maps 256 GiB in clusters of 64 KiB.
pub const L2_CACHE_DEFAULT_MAX: u64 = 32 << 20;
/// Fewest bytes for L2 slices unless told otherwise: a small disk may grow, and unused slots cost
/// nothing.
pub const L2_CACHE_DEFAULT_MIN: u64 = 1 << 20;
/// Bytes for refcount slices unless told otherwise: counts 8 GiB in clusters of 64 KiB at a time,
/// which suits an allocator that goes from low to high.
pub const REFCOUNT_CACHE_DEFAULT: u64 = 256 << 10;
/// Most bytes that a cache uses.
const CACHE_MAX: u64 = 1 << 30;
/// How long an unused part stays unless told otherwise.
const CLEAN_INTERVAL_DEFAULT: u64 = 600;
/// Most parts of tables in a cache, as the reference counts them.
const ENTRIES_MAX: u64 = i32::MAX as u64;

impl CacheSizes {
    /// What an image of this geometry gets unless told otherwise: enough for all L2 tables, up to a
    /// limit.
    #[must_use]
    pub fn default_for(geometry: Geometry) -> Self {
        CacheSizes {
            l2: l2_tables(geometry).clamp(L2_CACHE_DEFAULT_MIN, L2_CACHE_DEFAULT_MAX),
            refcounts: REFCOUNT_CACHE_DEFAULT,
            l2_entry: slice_bytes(geometry),
        }
    }

    /// The smallest caches that an image of this geometry works with.
    #[must_use]
    pub fn smallest_for(geometry: Geometry) -> Self {
        let least = SLOTS_MIN as u64 * slice_bytes(geometry);
        CacheSizes {
            l2: least,
            refcounts: least,
            l2_entry: slice_bytes(geometry),
        }
    }
}

/// Bytes of all L2 tables together.
fn l2_tables(geometry: Geometry) -> u64 {
    geometry.virtual_size().div_ceil(geometry.cluster_size()) * 8
}

/// Bytes of a slice unless told otherwise.
pub(crate) fn slice_bytes(geometry: Geometry) -> u64 {
    geometry.cluster_size().min(SLICE_BYTES_DEFAULT)
}

/// The options as they were given; what they mean depends on the image.
pub(crate) struct Given {
    cache: Option<u64>,
    l2: Option<u64>,
    refcounts: Option<u64>,
    l2_entry: Option<u64>,
    clean_interval: u64,
    mode: RequestMode,
    lazy_refcounts: Option<bool>,
    pass_discard: PassDiscard,
    overlap_check: OverlapCheck,
    /// Bytes of memory that the image may ask for.
    pub(crate) memory_limit: u64,
}

impl Given {
    /// Takes them out of the options of a node.
    pub(crate) fn take(options: &mut Options) -> Result<Self> {
        let clean_interval = take_seconds(options, "cache-clean-interval")?;
        let given = Given {
            cache: options.take_size("cache-size")?,
            l2: options.take_size("l2-cache-size")?,
            refcounts: options.take_size("refcount-cache-size")?,
            l2_entry: options.take_size("l2-cache-entry-size")?,
            clean_interval: clean_interval.unwrap_or(CLEAN_INTERVAL_DEFAULT),
            mode: match options.take_str("request-mode")?.as_deref() {
                None | Some("mutex") => RequestMode::Mutex,
                Some("serial") => RequestMode::Serial,
                Some(other) => {
                    return Err(invalid(format!(
                        "request-mode is '{other}', but must be 'mutex' or 'serial'"
                    )));
                }
            },
            lazy_refcounts: options.take_bool("lazy-refcounts")?,
            pass_discard: PassDiscard {
                request: options.take_bool("pass-discard-request")?.unwrap_or(true),
                snapshot: options.take_bool("pass-discard-snapshot")?.unwrap_or(true),
                other: options.take_bool("pass-discard-other")?.unwrap_or(false),
            },
            overlap_check: OverlapCheck::take(options)?,
            memory_limit: options
                .take_size("memory-limit")?
                .unwrap_or(MEMORY_LIMIT_DEFAULT),
        };
        for (what, refused) in [(
            "discard-no-unref",
            "keeping the references of what is discarded",
        )] {
            if options.take_bool(what)? == Some(true) {
                let message = format!("'{what}': {refused} is not supported");
                return Err(BlockError::new(ErrorKind::NotSupported, message));
            }
        }
        Ok(given)
    }

    /// What they mean for an image. Sizes that were given are the caller's; those that the image
    /// decides fit in its budget.
    pub(crate) fn for_image(&self, geometry: Geometry, budget: &mut Budget) -> Result<Tuning> {
        Ok(Tuning {
            caches: self.caches(geometry, budget)?,
            clean_interval: Duration::from_secs(self.clean_interval),
            mode: self.mode,
            lazy_refcounts: self.lazy_refcounts,
            pass_discard: self.pass_discard,
            overlap_check: self.overlap_check,
            memory_limit: self.memory_limit,
        })
    }

    fn caches(&self, geometry: Geometry, budget: &mut Budget) -> Result<CacheSizes> {
        let cluster = geometry.cluster_size();
        let l2_entry = self.l2_entry.unwrap_or_else(|| slice_bytes(geometry));
        if !l2_entry.is_power_of_two() || !(SLICE_BYTES_MIN..=cluster).contains(&l2_entry) {
            return Err(invalid(format!(
                "L2 cache entry size must be a power of two between {SLICE_BYTES_MIN} and the \
                 cluster size ({cluster})"
            )));
        }
        let default = CacheSizes::default_for(geometry);
        let (l2, refcounts) = match (self.cache, self.l2, self.refcounts) {
            (Some(_), Some(_), Some(_)) => {
                return Err(invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the \
                     same time",
                ));
            }
            (Some(all), Some(l2), None) if l2 > all => {
                return Err(invalid("l2-cache-size may not exceed cache-size"));
            }
            (Some(all), None, Some(refcounts)) if refcounts > all => {
                return Err(invalid("refcount-cache-size may not exceed cache-size"));
            }
            (Some(all), Some(l2), None) => (l2, all - l2),
            (Some(all), None, Some(refcounts)) => (all - refcounts, refcounts),
            (Some(all), None, None) => {
                // Refcounts get little until every L2 table has its place.
                let refcounts = REFCOUNT_CACHE_DEFAULT.min(all);
                let l2 = (all - refcounts).min(l2_tables(geometry).max(L2_CACHE_DEFAULT_MIN));
                (l2, all - l2)
            }
            (None, l2, refcounts) => {
                let refcounts = match refcounts {
                    Some(bytes) => bytes,
                    None => {
                        budget.take("bytes of memory for cached refcounts", default.refcounts)?;
                        default.refcounts
                    }
                };
                let l2 = match l2 {
                    Some(bytes) => bytes,
                    None => {
                        let least = CacheSizes::smallest_for(geometry).l2;
                        let bytes = default.l2.min(budget.left()).max(least);
                        budget.take("bytes of memory for cached L2 tables", bytes)?;
                        bytes
                    }
                };
                (l2, refcounts)
            }
        };
        if l2 / l2_entry > ENTRIES_MAX {
            return Err(invalid("L2 cache size too big"));
        }
        if refcounts / cluster > ENTRIES_MAX {
            return Err(invalid("Refcount cache size too big"));
        }
        let least = SLOTS_MIN as u64;
        Ok(CacheSizes {
            l2: l2.min(CACHE_MAX).max(least * l2_entry),
            refcounts: refcounts.min(CACHE_MAX).max(least * slice_bytes(geometry)),
            l2_entry,
        })
    }
}

/// Takes a number of seconds that fits 32 bits.
fn take_seconds(options: &mut Options, key: &str) -> Result<Option<u64>> {
    // A negative number is one that is too big, as in the reference.
    let negative = options
        .get(key)
        .and_then(|text| text.strip_prefix('-'))
        .is_some_and(|digits| digits.parse::<u64>().is_ok_and(|n| n > 0));
    if negative {
        return Err(invalid("Cache clean interval too big"));
    }
    match options.take_u64(key)? {
        Some(seconds) if seconds > u32::MAX.into() => Err(invalid("Cache clean interval too big")),
        other => Ok(other),
    }
}

fn invalid(message: impl Into<String>) -> BlockError {
    BlockError::new(ErrorKind::Invalid, message.into())
}
