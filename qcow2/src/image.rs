//! An open image: its tables, its caches, and what keeps it from being written to.
//!
//! Locks, from the outer to the inner: `meta` (a coroutine mutex; held across metadata I/O, never
//! across guest data, reads and writes of copy-on-write, or a wait for another request),
//! `writing_back` (a coroutine mutex; held by one pass, which takes none of the others). All else
//! is short thread locks, which nobody holds over a suspend.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

use coblock_aio::{AioContext, AlignedBuf, IoVecMut};
use coblock_block::types::in_memory;
use coblock_block::{Child, GraphRead, RequestFlags, RequestTable, Result};
use coblock_coroutine::{Co, CoMutex, CoMutexGuard, ThreadLock};

use crate::alloc::Frees;
use crate::cache::SliceCache;
use crate::check::rebuild_refcounts;
use crate::claims::{Claims, Contested};
use crate::cleaner::Cleaner;
use crate::cow::PendingAllocation;
use crate::error::Error;
use crate::header::{Autoclear, Compatible, Header, Incompatible};
use crate::header_bits::HeaderBits;
use crate::image_file::ImageFile;
use crate::memtable::MemTable;
use crate::overlap::{ClusterFilter, SnapshotTables};
use crate::spec;
use crate::tuning::{OverlapCheck, PassDiscard, RequestMode, Tuning, slice_bytes};
use crate::types::{Geometry, HostCluster, HostOffset, Version};

/// An open qcow2 image.
pub struct Qcow2 {
    /// Units; the virtual size is [`Qcow2::size`], which grows.
    pub(crate) geometry: Geometry,
    /// Bytes that the guest sees.
    pub(crate) size: AtomicU64,
    pub(crate) header: Header,
    pub(crate) read_only: bool,
    /// The file has bits of features that we do not keep up to date.
    stale_autoclear: bool,
    pub(crate) file: Arc<Child>,
    /// Attached after the image was opened, before the first request.
    pub(crate) backing: OnceLock<Arc<Child>>,
    pub(crate) l1: MemTable,
    pub(crate) l2: Arc<SliceCache>,
    pub(crate) refcount_table: MemTable,
    pub(crate) refcounts: Arc<SliceCache>,
    /// The metadata mutex of rule 2.6. A lookup that hits the cache does not take it.
    pub(crate) meta: CoMutex<Meta>,
    /// Serial mode of rule 2.6: whoever holds it is the one request; `None` in mutex mode.
    turns: Option<CoMutex<()>>,
    /// One write-back pass at a time.
    pub(crate) writing_back: CoMutex<()>,
    pub(crate) frees: ThreadLock<Frees>,
    /// Host ranges of guest data in flight (rule 9.2). A request enters itself with an unknown
    /// range *before* its lookup.
    pub(crate) in_flight: RequestTable,
    /// Clusters that hold tables.
    pub(crate) tables: ClusterFilter,
    /// Clusters that two tables claim, which are not changed.
    pub(crate) contested: Contested,
    /// Set once: why the image takes no more changes.
    stopped: OnceLock<String>,
    /// Counts may stay in memory until the image is closed, or their cache is full of changes.
    pub(crate) lazy_refcounts: bool,
    pub(crate) pass_discard: PassDiscard,
    pub(crate) overlap_check: OverlapCheck,
    /// Tables of snapshots, which stay where they are while the image is open.
    pub(crate) snapshot_tables: SnapshotTables,
    /// Gives the memory of unused slices back.
    pub(crate) cleaner: Option<Arc<Cleaner>>,
    pub(crate) header_bits: CoMutex<HeaderBits>,
    /// The corrupt bit is set, or would be if the image were writable: said once.
    pub(crate) corrupt: AtomicBool,
    /// Are clusters in use of which the file holds nothing? Asked at the first block status.
    pub(crate) preallocated: OnceLock<bool>,
    pub(crate) counters: Counters,
}

/// What the metadata mutex protects, besides the contents of tables.
pub(crate) struct Meta {
    /// No cluster below this one is free.
    pub cursor: u64,
    /// From this host offset up the file has never held anything.
    pub fresh_from: u64,
    pub pending: Vec<Arc<PendingAllocation>>,
}

impl Meta {
    /// Clusters up to `end` may hold something from now on.
    pub fn clusters_written(&mut self, end: HostOffset) {
        self.fresh_from = self.fresh_from.max(end.0);
    }
}

/// What happened so far; all monotonic.
#[derive(Default)]
pub(crate) struct Counters {
    pub dependency_waits: AtomicU64,
    pub refcount_blocks_added: AtomicU64,
    pub tables_grown: AtomicU64,
    pub clusters_inflated: AtomicU64,
}

/// A copy of the counters of an image, for tests and for people who look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Qcow2Stats {
    /// Slices of L2 tables that were read because they were not cached.
    pub l2_misses: u64,
    /// Slices of L2 tables that gave way to others.
    pub l2_evictions: u64,
    /// Slices of refcount blocks that were read.
    pub refcount_misses: u64,
    /// Slices of refcount blocks that gave way to others.
    pub refcount_evictions: u64,
    /// Slices of either that gave their memory back because nobody used them.
    pub slices_cleaned: u64,
    /// How often the metadata mutex was taken.
    pub metadata_locks: u64,
    /// Writes that waited for another write's allocation.
    pub dependency_waits: u64,
    /// Refcount blocks that were added.
    pub refcount_blocks_added: u64,
    /// How often the L1 or the refcount table moved to a greater place.
    pub tables_grown: u64,
    /// Compressed clusters that were read and inflated.
    pub clusters_inflated: u64,
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Qcow2>();
};

impl Qcow2 {
    /// Opens the image in `file`, whose header was read. A backing file comes by
    /// [`attach`](coblock_block::Driver::attach).
    ///
    /// Suspends. With `read_only` nothing is ever written. `context` runs the timer of
    /// [`Tuning::clean_interval`], until the image is closed.
    ///
    /// # Errors
    /// I/O, a damaged header or table, a feature that we do not serve, an image that needs repair
    /// before it is written.
    pub fn open(
        co: &Co,
        context: &Arc<AioContext>,
        graph: &GraphRead<'_>,
        file: Arc<Child>,
        mut header: Header,
        read_only: bool,
        tuning: Tuning,
    ) -> Result<Self> {
        header.validate(file.len(graph))?;
        if read_only {
            header.ensure_readable()?;
        } else {
            header.ensure_writable()?;
            if header.incompatible.contains(Incompatible::DIRTY) {
                let file = ImageFile::new(co, graph, &file).with_memory_limit(tuning.memory_limit);
                let clusters = rebuild_refcounts(&file, &mut header)?;
                log::warn!("the image was not closed properly: counted {clusters} clusters anew");
            }
        }
        let image = Self::load(co, context, graph, file, header, read_only, tuning)?;
        image.clear_autoclear(co, graph)?;
        Ok(image)
    }

    /// The same without writing anything: of an image that needs no repair, and whose file may not
    /// be writable yet. [`Qcow2::clear_autoclear`] has to follow before anything is written.
    pub(crate) fn load(
        co: &Co,
        context: &Arc<AioContext>,
        graph: &GraphRead<'_>,
        file: Arc<Child>,
        mut header: Header,
        read_only: bool,
        tuning: Tuning,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let l1_bytes = u64::from(header.l1_entries) * spec::TABLE_ENTRY_LEN;
        let l1 = read_table(co, graph, &file, header.l1_offset, l1_bytes)?;
        let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        let refcount_table =
            read_table(co, graph, &file, header.refcount_table_offset, table_bytes)?;
        let snapshot_tables = if read_only {
            SnapshotTables::default()
        } else {
            let image = ImageFile::new(co, graph, &file).with_memory_limit(tuning.memory_limit);
            SnapshotTables::read(&image, &header, tuning.overlap_check)?
        };
        let claims = Claims {
            geometry,
            header: &header,
            l1: &l1,
            refcount_table: &refcount_table,
            snapshots: &snapshot_tables,
        };
        let (tables, contested) = if read_only {
            (claims.filter(), Contested::default())
        } else {
            claims.filter_and_contested()
        };

        let stale_autoclear =
            !read_only && geometry.version() == Version::V3 && !header.autoclear.is_empty();
        if stale_autoclear {
            header.autoclear = Autoclear::empty();
        }
        let l2 = Arc::new(SliceCache::new(
            tuning.caches.l2_entry,
            tuning.caches.l2,
            geometry.cluster_size(),
        ));
        let slice = slice_bytes(geometry);
        let refcounts = Arc::new(SliceCache::new(slice, tuning.caches.refcounts, 0));
        let caches = [l2.clone(), refcounts.clone()];
        let cleaner = Cleaner::start(context, caches, tuning.clean_interval);
        let from_header = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        Ok(Qcow2 {
            geometry,
            size: AtomicU64::new(geometry.virtual_size()),
            read_only,
            stale_autoclear,
            l2,
            refcounts,
            meta: CoMutex::new(Meta {
                cursor: 0,
                fresh_from: file.len(graph).next_multiple_of(geometry.cluster_size()),
                pending: Vec::new(),
            }),
            turns: (tuning.mode == RequestMode::Serial).then(|| CoMutex::new(())),
            writing_back: CoMutex::new(()),
            frees: ThreadLock::new(Frees::default()),
            in_flight: RequestTable::new(),
            tables,
            contested,
            stopped: OnceLock::new(),
            lazy_refcounts: tuning.lazy_refcounts.unwrap_or(from_header),
            pass_discard: tuning.pass_discard,
            overlap_check: tuning.overlap_check,
            snapshot_tables,
            cleaner,
            header_bits: CoMutex::new(HeaderBits::new(header.incompatible)),
            corrupt: AtomicBool::new(header.incompatible.contains(Incompatible::CORRUPT)),
            counters: Counters::default(),
            header,
            file,
            backing: OnceLock::new(),
            preallocated: OnceLock::new(),
            l1,
            refcount_table,
        })
    }

    /// Takes away the bits of features that we do not keep up to date, before the first write.
    /// (Hazards O15, Q20.)
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn clear_autoclear(&self, co: &Co, graph: &GraphRead<'_>) -> Result<()> {
        if self.stale_autoclear {
            self.write_table(co, graph, spec::HEADER_AT_AUTOCLEAR, &[0; 8])?;
            self.file.flush(co, graph)?;
        }
        Ok(())
    }

    /// In serial mode, waits until all requests that came before are done. The turn ends before the
    /// caller hears of its result, so that it may send the next request at once.
    #[inline]
    pub(crate) fn turn(&self, co: &Co) -> Option<CoMutexGuard<'_, ()>> {
        self.turns.as_ref().map(|turns| turns.lock(co))
    }

    /// The same without waiting: nothing where somebody else is at it.
    #[expect(
        clippy::option_option,
        reason = "no turn is needed in mutex mode, which is not the same as none to be had"
    )]
    pub(crate) fn try_turn(&self, co: &Co) -> Option<Option<CoMutexGuard<'_, ()>>> {
        match &self.turns {
            None => Some(None),
            Some(turns) => turns.try_lock(co).map(Some),
        }
    }

    /// Comes to a named point; the next request to the file is what it is about. For tests.
    #[inline]
    pub(crate) fn at(&self, event: coblock_block::Event) {
        self.file.event(event);
    }

    /// The header as it was when the image was opened.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> Qcow2Stats {
        Qcow2Stats {
            l2_misses: self.l2.misses(),
            l2_evictions: self.l2.evictions(),
            refcount_misses: self.refcounts.misses(),
            refcount_evictions: self.refcounts.evictions(),
            slices_cleaned: self.l2.cleaned() + self.refcounts.cleaned(),
            metadata_locks: self.meta.lock_count(),
            dependency_waits: self.counters.dependency_waits.load(Relaxed),
            refcount_blocks_added: self.counters.refcount_blocks_added.load(Relaxed),
            tables_grown: self.counters.tables_grown.load(Relaxed),
            clusters_inflated: self.counters.clusters_inflated.load(Relaxed),
        }
    }

    /// # Errors
    /// The image takes no more changes; why.
    pub(crate) fn check_intact(&self) -> Result<()> {
        match self.stopped.get() {
            None => Ok(()),
            Some(why) => Err(Error::Stopped { why: why.clone() }.into()),
        }
    }

    /// # Errors
    /// The image was open for writing when it was found to be corrupt: nothing of it is shown any
    /// more, as if its medium had been taken out. One that is only read goes on where it can.
    #[inline(always)]
    pub(crate) fn check_readable(&self) -> Result<()> {
        if self.corrupt.load(Relaxed) {
            return self.check_corrupt_readable();
        }
        Ok(())
    }

    #[cold]
    fn check_corrupt_readable(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let why = self.stopped.get().map_or("it is corrupt", String::as_str);
        Err(Error::Stopped { why: why.into() }.into())
    }

    /// From now on every change fails: what is in memory and what is in the file may contradict
    /// each other.
    pub(crate) fn take_no_more_changes(&self, why: &str) {
        if self.stopped.set(why.to_owned()).is_ok() {
            log::error!("the image takes no more changes until it is opened again: {why}");
        }
    }

    /// The same for damage that was found, which was told already.
    pub(crate) fn stop_because_corrupt(&self, what: &Error) {
        // Whatever stopped it first stands.
        let _ = self.stopped.set(format!("the image is corrupt: {what}"));
    }

    /// Are there clusters that a flush could make free?
    pub(crate) fn has_freed(&self) -> bool {
        !self.frees.lock().is_empty()
    }

    /// The table that `cluster` holds a part of, if any.
    #[inline(always)]
    pub(crate) fn table_at(&self, cluster: HostCluster) -> Option<&'static str> {
        if !self.tables.may_contain(cluster) {
            return None;
        }
        self.search_table(cluster)
    }

    /// The same, slow; asked only where the filter says "perhaps".
    #[cold]
    fn search_table(&self, cluster: HostCluster) -> Option<&'static str> {
        let covers = |start: HostOffset, bytes: u64| {
            let first = self.geometry.host_cluster(start).0;
            (first..first + self.geometry.clusters(bytes).0).contains(&cluster.0)
        };
        let host = self.geometry.host_start(cluster).0;
        if cluster.0 == 0 {
            Some("image header")
        } else if covers(self.l1.offset(), self.l1.bytes()) {
            Some("active L1 table")
        } else if covers(self.refcount_table.offset(), self.refcount_table.bytes()) {
            Some("refcount table")
        } else if self
            .l1
            .iter()
            .any(|(_, e)| e & spec::ENTRY_OFFSET_MASK == host)
        {
            Some("L2 table")
        } else if self
            .refcount_table
            .iter()
            .any(|(_, e)| e & !spec::REFCOUNT_TABLE_RESERVED == host)
        {
            Some("refcount block")
        } else {
            self.snapshot_tables.at(cluster)
        }
    }

    /// The same, of the tables that the user wants to be looked after.
    pub(crate) fn protected_at(&self, cluster: HostCluster) -> Option<&'static str> {
        let class = |table: &&str| self.overlap_check.contains(OverlapCheck::of(table));
        self.table_at(cluster).filter(class)
    }
}

/// A buffer of zeros that every driver below takes without copying.
pub(crate) fn buffer(len: usize) -> Result<AlignedBuf> {
    const ALIGNMENT: usize = 4096;
    AlignedBuf::try_new(len, ALIGNMENT)
        .map_err(|e| coblock_block::Error::from_io(format_args!("buffer of {len} bytes"), e))
}

/// A count as a header field.
pub(crate) fn header_field(count: u64) -> u32 {
    u32::try_from(count).expect("tables are bounded far below this")
}

/// How much of a table is read at once.
const TABLE_READ: usize = 1 << 20;

/// Reads a whole table. Its length was bounded when the header was decoded, and its memory comes out
/// of the image's budget.
fn read_table(
    co: &Co,
    graph: &GraphRead<'_>,
    file: &Child,
    at: HostOffset,
    len: u64,
) -> Result<MemTable> {
    let table = MemTable::new(at, len / spec::TABLE_ENTRY_LEN);
    let mut bytes = buffer(in_memory(len).min(TABLE_READ))?;
    let mut done = 0;
    while done < len {
        let piece = bytes.len().min(in_memory(len - done));
        file.pread(
            co,
            graph,
            at.0 + done,
            IoVecMut::from(&mut bytes[..piece]),
            RequestFlags::empty(),
        )?;
        table.load(done / spec::TABLE_ENTRY_LEN, &bytes[..piece]);
        done += piece as u64;
    }
    Ok(table)
}
