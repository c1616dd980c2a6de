//! How a qcow2 node is opened: its options, its header, and the files that it names.

use coblock_block::{
    ChildRole, Driver, Error as BlockError, ErrorKind, OpenDriver, Opening, Result,
};
use coblock_coroutine::Co;

use crate::budget::Budget;
use crate::cache::SliceCache;
use crate::error::Error;
use crate::header::Header;
use crate::image::Qcow2;
use crate::image_file::ImageFile;
use crate::memtable::MemTable;
use crate::overlap::ClusterFilter;
use crate::spec;
use crate::tuning::Given;
use crate::types::Version;

/// The opener of qcow2 images, to be registered under `"qcow2"`.
///
/// Options besides those of every node: `file` (needed); `backing` (options of the backing file,
/// instead of what the image says; empty: none is opened); `cache-size`, `l2-cache-size`,
/// `refcount-cache-size` and `l2-cache-entry-size` (bytes); `cache-clean-interval` (seconds, 600);
/// `request-mode` (`mutex` or `serial`, see [`RequestMode`](crate::RequestMode)); `lazy-refcounts`
/// (what the image says; see [`Tuning`](crate::Tuning)); `pass-discard-request` and
/// `pass-discard-snapshot` (on), `pass-discard-other` (off): see
/// [`PassDiscard`](crate::PassDiscard); `overlap-check` or `overlap-check.template` (`none`,
/// `constant`, `cached`, `all`) and `overlap-check.STRUCTURE` (`on`, `off`): see
/// [`OverlapCheck`](crate::OverlapCheck); `memory-limit` (64 MiB): how many bytes of memory the image
/// may ask for, see [`budget`](crate::budget).
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenQcow2;

impl OpenDriver for OpenQcow2 {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let given = Given::take(opening.options())?;
        let file = opening.open_child(co, "file", ChildRole::Storage)?;
        let graph = opening.graph().read(co);
        let look = ImageFile::new(co, &graph, &file).with_memory_limit(given.memory_limit);
        let header = look.read_header()?;
        let mut budget = look.budget_beside(&header)?;
        take_tables(&header, &mut budget)?;
        let tuning = given.for_image(header.geometry, &mut budget)?;
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
        if tuning.lazy_refcounts == Some(true) && header.geometry.version() == Version::V2 {
            return Err(Error::LazyNeedsVersion3.into());
        }
        let context = opening.graph().main_context().clone();
        let image = Qcow2::open(co, &context, &graph, file, header, read_only, tuning)?;
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
