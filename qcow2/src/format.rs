//! How a qcow2 node is opened: its options, its header, and the files that it names.

use coblock_block::{
    ChildRole, Driver, Error as BlockError, ErrorKind, OpenDriver, Opening, Result,
};
use coblock_coroutine::Co;

use crate::budget::{Budget, MEMORY_LIMIT_DEFAULT};
use crate::cache::SliceCache;
use crate::error::Error;
use crate::header::{Compatible, Header};
use crate::image::{CacheSizes, PassDiscard, Qcow2, RequestMode, Tuning};
use crate::image_file::ImageFile;
use crate::memtable::MemTable;
use crate::overlap::ClusterFilter;
use crate::spec;
use crate::types::Version;

/// The opener of qcow2 images, to be registered under `"qcow2"`.
///
/// Options besides those of every node: `file` (needed); `backing` (options of the backing file,
/// instead of what the image says; empty: none is opened); `l2-cache-size` and
/// `refcount-cache-size` (bytes); `request-mode` (`mutex` or `serial`, see [`RequestMode`]);
/// `lazy-refcounts` (what the image says; see [`Tuning`]); `pass-discard-request` (on) and
/// `pass-discard-other` (off): see [`PassDiscard`]; `memory-limit` (64 MiB): how many bytes of memory
/// the image may ask for, see [`budget`](crate::budget).
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenQcow2;

impl OpenDriver for OpenQcow2 {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let l2 = opening.options().take_size("l2-cache-size")?;
        let refcounts = opening.options().take_size("refcount-cache-size")?;
        let mode = match opening.options().take_str("request-mode")?.as_deref() {
            None | Some("mutex") => RequestMode::Mutex,
            Some("serial") => RequestMode::Serial,
            Some(other) => {
                let message = format!("request-mode is '{other}', but must be 'mutex' or 'serial'");
                return Err(BlockError::new(ErrorKind::Invalid, message));
            }
        };
        let memory_limit = opening.options().take_size("memory-limit")?;
        let memory_limit = memory_limit.unwrap_or(MEMORY_LIMIT_DEFAULT);
        let lazy_refcounts = opening.options().take_bool("lazy-refcounts")?;
        let mut switch = |name: &str, default: bool| {
            let given = opening.options().take_bool(name)?;
            Ok::<_, BlockError>(given.unwrap_or(default))
        };
        let pass_discard = PassDiscard {
            request: switch("pass-discard-request", true)?,
            other: switch("pass-discard-other", false)?,
        };
        let file = opening.open_child(co, "file", ChildRole::Storage)?;
        let graph = opening.graph().read(co);
        let look = ImageFile::new(co, &graph, &file).with_memory_limit(memory_limit);
        let header = look.read_header()?;
        let mut budget = look.budget_beside(&header)?;
        take_tables(&header, &mut budget)?;
        let caches = cache_sizes(&header, l2, refcounts, &mut budget)?;
        let read_only = opening.is_read_only();
        if let Some(name) = &header.backing_file {
            let text = |bytes: &[u8], what: &str| {
                String::from_utf8(bytes.to_vec()).map_err(|_| {
                    BlockError::new(ErrorKind::Invalid, format!("{what} is not valid UTF-8"))
                })
            };
            let name = text(name, "backing file name")?;
            let format = header
                .backing_format()
                .map(|f| text(f, "backing format"))
                .transpose()?;
            opening.dependent("backing", ChildRole::Backing, &name, format.as_deref())?;
        } else if opening.options().get("backing") == Some("") {
            // "No backing file" is true of an image without one.
            opening.options().take("backing");
        }
        if lazy_refcounts == Some(true) && header.geometry.version() == Version::V2 {
            return Err(Error::LazyNeedsVersion3.into());
        }
        let from_header = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        let tuning = Tuning {
            caches,
            mode,
            lazy_refcounts: lazy_refcounts.unwrap_or(from_header),
            pass_discard,
            memory_limit,
        };
        let image = Qcow2::open(co, &graph, file, header, read_only, tuning)?;
        Ok(Box::new(image))
    }
}

/// Takes what stays in memory while the image is open, besides the caches.
fn take_tables(header: &Header, budget: &mut Budget) -> Result<()> {
    let geometry = header.geometry;
    let l1_entries = u64::from(header.l1_entries);
    let l1_bytes = l1_entries * spec::TABLE_ENTRY_LEN;
    let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    let table_entries = table_bytes / spec::TABLE_ENTRY_LEN;
    let filter = ClusterFilter::memory(l1_entries + table_entries);
    // What is beyond the virtual size is never looked up.
    let l2_words = geometry.l1_entries() * geometry.cluster_size() / spec::TABLE_ENTRY_LEN;
    for (what, need) in [
        (
            "bytes of memory for the L1 table",
            MemTable::memory(l1_bytes),
        ),
        (
            "bytes of memory for the refcount table",
            MemTable::memory(table_bytes),
        ),
        ("bytes of memory for the filter of tables", filter),
        (
            "bytes of memory for the directory of L2 tables",
            SliceCache::directory_memory(geometry.cluster_size(), l2_words),
        ),
    ] {
        budget.take(what, need)?;
    }
    Ok(())
}

/// Sizes that the caller gave are the caller's; those that the image decides fit in its budget.
fn cache_sizes(
    header: &Header,
    l2: Option<u64>,
    refcounts: Option<u64>,
    budget: &mut Budget,
) -> Result<CacheSizes> {
    let least = CacheSizes::smallest_for(header.geometry);
    let mut sizes = CacheSizes::default_for(header.geometry);
    if refcounts.is_none() {
        budget.take("bytes of memory for cached refcounts", sizes.refcounts)?;
    }
    if l2.is_none() {
        sizes.l2 = sizes.l2.min(budget.left()).max(least.l2);
        budget.take("bytes of memory for cached L2 tables", sizes.l2)?;
    }
    for (what, given, least, size) in [
        ("l2-cache-size", l2, least.l2, &mut sizes.l2),
        (
            "refcount-cache-size",
            refcounts,
            least.refcounts,
            &mut sizes.refcounts,
        ),
    ] {
        match given {
            None => {}
            Some(bytes) if (least..=CACHE_MAX).contains(&bytes) => *size = bytes,
            Some(bytes) => {
                return Err(BlockError::new(
                    ErrorKind::Invalid,
                    format!("{what} is {bytes}, but must be between {least} and {CACHE_MAX}"),
                ));
            }
        }
    }
    Ok(sizes)
}

/// Most bytes that a cache may be given.
const CACHE_MAX: u64 = 1 << 30;
