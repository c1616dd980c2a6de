//! Changing the size of the guest's disk.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use coblock_aio::IoVec;
use coblock_block::{Error as BlockError, ErrorKind, GraphRead, RequestFlags, Result};
use coblock_coroutine::Co;

use crate::error::Error;
use crate::image::{Meta, Qcow2, header_field};
use crate::spec;
use crate::types::HostCluster;
use crate::writeback::Counts;

impl Qcow2 {
    /// Makes the disk `len` bytes long; what is added is not allocated.
    ///
    /// # Errors
    /// A shorter disk, one that is not whole sectors, the limits of the format, or I/O; the size is as before then.
    pub(crate) fn resize(&self, co: &Co, graph: &GraphRead<'_>, len: u64) -> Result<()> {
        self.check_intact()?;
        if !len.is_multiple_of(512) {
            let why = "The new size must be a multiple of 512";
            return Err(BlockError::new(ErrorKind::Invalid, why));
        }
        let geometry = self.geometry.with_virtual_size(len)?;
        let mut meta = self.meta.lock(co);
        let old = self.size.load(Acquire);
        if len < old {
            return Err(Error::Unsupported {
                feature: "shrinking images",
            }
            .into());
        }
        if geometry.l1_entries() > self.l1.len() {
            self.grow_l1(co, graph, &mut meta, geometry.l1_entries())?;
        }
        self.switch_header(co, graph, spec::HEADER_AT_SIZE, &len.to_be_bytes())?;
        self.size.store(len, Release);
        Ok(())
    }

    /// Moves the L1 table to a greater one with at least `entries`. (Hazard O8.)
    fn grow_l1(&self, co: &Co, graph: &GraphRead<'_>, meta: &mut Meta, entries: u64) -> Result<()> {
        let geometry = self.geometry;
        let old_len = self.l1.len();
        let entries = entries.max(old_len + old_len / 2);
        let bytes = entries * spec::TABLE_ENTRY_LEN;
        if bytes > spec::L1_LEN_MAX {
            return Err(Error::L1TooLarge { bytes }.into());
        }
        let run = self.allocate(co, graph, meta, geometry.clusters(bytes).0, true)?;
        // Every table that the copy will name is complete in the file, and the counts of the new place are durable.
        self.write_back(co, graph, true, Counts::Written)?;
        let table = self.l1.to_bytes(entries);
        let none = RequestFlags::empty();
        self.file
            .pwrite(co, graph, run.start.0, IoVec::from(&table[..]), none)?;
        self.file.flush(co, graph)?;
        let mut field = [0; 12];
        field[..4].copy_from_slice(&header_field(entries).to_be_bytes());
        field[4..].copy_from_slice(&run.start.0.to_be_bytes());
        self.switch_header(co, graph, spec::HEADER_AT_L1_SIZE, &field)?;
        let old = self.l1.offset();
        self.l1.moved(run.start, entries, &[]);
        let first = geometry.host_cluster(run.start).0;
        for nth in 0..run.clusters {
            self.tables.insert(HostCluster(first + nth));
        }
        self.counters.tables_grown.fetch_add(1, Relaxed);
        for nth in 0..geometry.clusters(old_len * spec::TABLE_ENTRY_LEN).0 {
            let cluster = HostCluster(geometry.host_cluster(old).0 + nth);
            self.change_refcount(co, graph, meta, cluster, false)?;
        }
        Ok(())
    }
}
