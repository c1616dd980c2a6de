//! How a qcow2 node is opened: its options, its header, and the files that it names.

use coblock_block::{
    Changes, ChildRole, Driver, Error as BlockError, ErrorKind, GraphRead, OpenDriver, Opening,
    Result,
};
use coblock_coroutine::Co;

use crate::budget::Budget;
use crate::cache::SliceCache;
use crate::error::Error;
use crate::header::{Header, Incompatible};
use crate::image::Qcow2;
use crate::image_file::ImageFile;
use crate::memtable::MemTable;
use crate::overlap::ClusterFilter;
use crate::spec;
use crate::tuning::{Given, Tuning};
use crate::types::Version;

/// The opener of qcow2 images, to be registered under `"qcow2"`.
///
/// Options besides those of every node: `file` (needed); `backing` (options of the backing file,
/// instead of what the image says; empty: none is opened); `cache-size`, `l2-cache-size`,
/// `refcount-cache-size` and `l2-cache-entry-size` (bytes); `cache-clean-interval` (seconds, 600);
/// `request-mode` (`mutex` or `serial`, see [`RequestMode`](crate::RequestMode)); `lazy-refcounts`
/// (what the image says; see [`Tuning`]); `pass-discard-request` and
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
        let tuning = tuning(&look, &given, &header)?;
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
        refuse_lazy_version_2(&tuning, &header)?;
        let context = opening.graph().main_context().clone();
        let image = Qcow2::open(co, &context, &graph, file, header, read_only, tuning)?;
        Ok(Box::new(image))
    }
}

impl Qcow2 {
    /// The same image as it will be with other options. This one is as after closing then, and goes
    /// on as well.
    ///
    /// # Errors
    /// For the options; what writing back or reading returned; for an image that has to be repaired
    /// first.
    pub(crate) fn successor(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        to: &mut Changes<'_>,
    ) -> Result<Qcow2> {
        let given = Given::take(&mut to.options)?;
        self.check_intact()?;
        self.write_out(co, graph)?;
        let look = ImageFile::new(co, graph, &self.file).with_memory_limit(given.memory_limit);
        let header = look.read_header()?;
        let tuning = tuning(&look, &given, &header)?;
        refuse_lazy_version_2(&tuning, &header)?;
        header.validate(self.file.len(graph))?;
        if to.read_only {
            header.ensure_readable()?;
        } else {
            header.ensure_writable()?;
            if header.incompatible.contains(Incompatible::DIRTY) {
                return Err(Error::NeedsRepair.into());
            }
        }
        let context = graph.graph().main_context();
        let file = self.file.clone();
        let next = Qcow2::load(co, context, graph, file, header, to.read_only, tuning)?;
        if let Some(backing) = to.child(ChildRole::Backing) {
            next.attach(ChildRole::Backing, backing.clone())?;
        }
        Ok(next)
    }
}

/// What the options mean for the image whose header this is, within what it may cost.
fn tuning(look: &ImageFile<'_>, given: &Given, header: &Header) -> Result<Tuning> {
    let mut budget = look.budget_beside(header)?;
    take_tables(header, &mut budget)?;
    given.for_image(header.geometry, &mut budget)
}

fn refuse_lazy_version_2(tuning: &Tuning, header: &Header) -> Result<()> {
    if tuning.lazy_refcounts == Some(true) && header.geometry.version() == Version::V2 {
        return Err(Error::LazyNeedsVersion3.into());
    }
    Ok(())
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
