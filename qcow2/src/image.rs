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

use coblock_aio::{AlignedBuf, IoVec, IoVecMut};
use coblock_block::types::in_memory;
use coblock_block::{Child, GraphRead, RequestFlags, RequestTable, Result};
use coblock_coroutine::{Co, CoMutex, CoMutexGuard, ThreadLock};

use crate::alloc::Frees;
use crate::cache::SliceCache;
use crate::check::rebuild_refcounts;
use crate::cow::PendingAllocation;
use crate::error::Error;
use crate::header::{Autoclear, Header, Incompatible};
use crate::header_bits::HeaderBits;
use crate::image_file::ImageFile;
use crate::memtable::MemTable;
use crate::overlap::ClusterFilter;
use crate::spec;
use crate::types::{Geometry, HostCluster, HostOffset, Version};

/// An open qcow2 image.
pub struct Qcow2 {
    /// Units; the virtual size is [`Qcow2::size`], which grows.
    pub(crate) geometry: Geometry,
    /// Bytes that the guest sees.
    pub(crate) size: AtomicU64,
    pub(crate) header: Header,
    pub(crate) read_only: bool,
    pub(crate) file: Arc<Child>,
    /// Attached after the image was opened, before the first request.
    pub(crate) backing: OnceLock<Arc<Child>>,
    pub(crate) l1: MemTable,
    pub(crate) l2: SliceCache,
    pub(crate) refcount_table: MemTable,
    pub(crate) refcounts: SliceCache,
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
    /// Set once: why the image takes no more changes.
    stopped: OnceLock<String>,
    /// Counts may stay in memory until the image is closed, or their cache is full of changes.
    pub(crate) lazy_refcounts: bool,
    pub(crate) pass_discard: PassDiscard,
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
    /// How often the metadata mutex was taken.
    pub metadata_locks: u64,
    /// Writes that waited for another write's allocation.
    pub dependency_waits: u64,
    /// Refcount blocks that were added.
    pub refcount_blocks_added: u64,
    /// How often the L1 or the refcount table moved to a greater place.
    pub tables_grown: u64,
}

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
#[derive(Clone, Copy, Debug)]
pub struct CacheSizes {
    /// For L2 tables.
    pub l2: u64,
    /// For refcount blocks.
    pub refcounts: u64,
}

/// What the options of a node choose, beyond its files.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// How large the caches are.
    pub caches: CacheSizes,
    /// How requests share the image.
    pub mode: RequestMode,
    /// Refcounts may be behind the file's mappings while the image is open, and the dirty bit says
    /// so. Version 3 only.
    pub lazy_refcounts: bool,
    /// Which freed clusters give their space back.
    pub pass_discard: PassDiscard,
    /// Bytes of memory that the image may ask for while new refcounts are made for a dirty one.
    pub memory_limit: u64,
}

/// Which freed clusters give their space back to the file system.
#[derive(Clone, Copy, Debug)]
pub struct PassDiscard {
    /// Those that a discard freed, or zeroes that may unmap.
    pub request: bool,
    /// Those of tables that moved.
    pub other: bool,
}

/// Most bytes for L2 slices unless told otherwise: maps 256 GiB in clusters of 64 KiB.
pub const L2_CACHE_DEFAULT_MAX: u64 = 32 << 20;
/// Fewest bytes for L2 slices unless told otherwise: a small disk may grow, and unused slots cost
/// nothing.
pub const L2_CACHE_DEFAULT_MIN: u64 = 1 << 20;
/// Bytes for refcount slices unless told otherwise: counts 8 GiB in clusters of 64 KiB at a time,
/// which suits an allocator that goes from low to high.
pub const REFCOUNT_CACHE_DEFAULT: u64 = 256 << 10;

impl CacheSizes {
    /// What an image of this geometry gets unless told otherwise: enough for all L2 tables, up to a
    /// limit.
    #[must_use]
    pub fn default_for(geometry: Geometry) -> Self {
        let tables = geometry.virtual_size().div_ceil(geometry.cluster_size()) * 8;
        CacheSizes {
            l2: tables.clamp(L2_CACHE_DEFAULT_MIN, L2_CACHE_DEFAULT_MAX),
            refcounts: REFCOUNT_CACHE_DEFAULT,
        }
    }

    /// The smallest caches that an image of this geometry works with.
    #[must_use]
    pub fn smallest_for(geometry: Geometry) -> Self {
        let least = SLICES_MIN * slice_bytes(geometry);
        CacheSizes {
            l2: least,
            refcounts: least,
        }
    }
}

/// Fewest slices of a cache.
const SLICES_MIN: u64 = crate::cache::SLOTS_MIN as u64;

fn slice_bytes(geometry: Geometry) -> u64 {
    geometry.cluster_size().min(crate::cache::SLICE_BYTES_MAX)
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Qcow2>();
};

impl Qcow2 {
    /// Opens the image in `file`, whose header was read. A backing file comes by
    /// [`attach`](coblock_block::Driver::attach).
    ///
    /// Suspends. With `read_only` nothing is ever written.
    ///
    /// # Errors
    /// I/O, a damaged header or table, a feature that we do not serve, an image that needs repair
    /// before it is written.
    pub fn open(
        co: &Co,
        graph: &GraphRead<'_>,
        file: Arc<Child>,
        mut header: Header,
        read_only: bool,
        tuning: Tuning,
    ) -> Result<Self> {
        let geometry = header.geometry;
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
        let l1_bytes = u64::from(header.l1_entries) * spec::TABLE_ENTRY_LEN;
        let l1 = read_table(co, graph, &file, header.l1_offset, l1_bytes)?;
        let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        let refcount_table =
            read_table(co, graph, &file, header.refcount_table_offset, table_bytes)?;
        let tables = table_filter(geometry, &header, &l1, &refcount_table);

        if !read_only && geometry.version() == Version::V3 && !header.autoclear.is_empty() {
            // Bits of features that we do not keep up to date. (Hazards O15, Q20.)
            header.autoclear = Autoclear::empty();
            let at = spec::HEADER_AT_AUTOCLEAR;
            file.pwrite(
                co,
                graph,
                at,
                IoVec::from(&[0; 8][..]),
                RequestFlags::empty(),
            )?;
            file.flush(co, graph)?;
        }
        let slice = slice_bytes(geometry);
        Ok(Qcow2 {
            geometry,
            size: AtomicU64::new(geometry.virtual_size()),
            read_only,
            l2: SliceCache::new(slice, tuning.caches.l2),
            refcounts: SliceCache::new(slice, tuning.caches.refcounts),
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
            stopped: OnceLock::new(),
            lazy_refcounts: tuning.lazy_refcounts,
            pass_discard: tuning.pass_discard,
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
            metadata_locks: self.meta.lock_count(),
            dependency_waits: self.counters.dependency_waits.load(Relaxed),
            refcount_blocks_added: self.counters.refcount_blocks_added.load(Relaxed),
            tables_grown: self.counters.tables_grown.load(Relaxed),
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

    /// From now on every change fails: what is in memory and what is in the file may contradict
    /// each other.
    pub(crate) fn take_no_more_changes(&self, why: &str) {
        if self.stopped.set(why.to_owned()).is_ok() {
            log::error!("the image takes no more changes until it is opened again: {why}");
        }
    }

    /// Are there clusters that a flush could make free?
    pub(crate) fn has_freed(&self) -> bool {
        let frees = self.frees.lock();
        !frees.unmapped.is_empty() || !frees.durable.is_empty()
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
            None
        }
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

/// A filter that knows every cluster with a table of the active disk.
fn table_filter(
    geometry: Geometry,
    header: &Header,
    l1: &MemTable,
    refcount_table: &MemTable,
) -> ClusterFilter {
    let filter = ClusterFilter::new(l1.len() + refcount_table.len());
    filter.insert(HostCluster(0));
    let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    for (at, bytes) in [
        (header.l1_offset, l1.bytes()),
        (header.refcount_table_offset, table_bytes),
    ] {
        let first = geometry.host_cluster(at).0;
        for cluster in first..first + geometry.clusters(bytes).0 {
            filter.insert(HostCluster(cluster));
        }
    }
    for (_, entry) in l1.iter() {
        filter.insert(geometry.host_cluster(HostOffset(entry & spec::ENTRY_OFFSET_MASK)));
    }
    for (_, entry) in refcount_table.iter() {
        filter.insert(geometry.host_cluster(HostOffset(entry & !spec::REFCOUNT_TABLE_RESERVED)));
    }
    filter
}
