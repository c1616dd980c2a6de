//! Refcounts as the image tells them: refcount table in memory, blocks read in slices and kept in a
//! bounded cache.

use coblock_block::Result;

use crate::budget::Budget;
use crate::check::Broken;
use crate::fields::be64;
use crate::header::Header;
use crate::image_file::{Hole, ImageFile};
use crate::spec;
use crate::types::{Geometry, HostCluster, index};
use crate::width::RefcountWidth;

/// Slices that are kept; 16 MiB, the refcounts of 512 GiB with the usual sizes.
const SLICES: usize = 4096;
/// Most bytes of a slice.
const SLICE_LEN: u64 = 4096;

/// A part of a refcount block.
struct Slice {
    /// Which part of all refcounts it is.
    number: u64,
    data: Vec<u8>,
}

/// Refcounts on disk.
pub struct DiskRefcounts<'a> {
    file: &'a ImageFile<'a>,
    geometry: Geometry,
    width: RefcountWidth,
    /// The refcount table as it is on disk.
    table: Vec<u64>,
    slices: Vec<Option<Slice>>,
    hole: Hole,
    /// Refcounts in a slice: a power of two.
    slice_entries: u64,
}

impl<'a> DiskRefcounts<'a> {
    /// Reads the refcount table: at most 8 MiB. May suspend.
    ///
    /// # Errors
    /// More memory than is left, or what reading returned.
    pub fn read(file: &'a ImageFile<'a>, header: &Header, budget: &mut Budget) -> Result<Self> {
        let geometry = header.geometry;
        let width = RefcountWidth::new(geometry.refcount_order());
        let len = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        assert!(
            len <= spec::REFCOUNT_TABLE_LEN_MAX,
            "a decoded header has bounded tables"
        );
        // As bytes, then as entries; and the slices, of which most images need few.
        budget.take("bytes of memory for the refcount table", 2 * len)?;
        let slice_len = SLICE_LEN.min(geometry.cluster_size());
        let slices = len / spec::TABLE_ENTRY_LEN * geometry.cluster_size();
        budget.take(
            "bytes of memory for refcount blocks",
            slices.min(SLICES as u64 * slice_len),
        )?;
        let mut bytes = vec![0; index(len)];
        file.read(header.refcount_table_offset.get(), &mut bytes)?;
        let table = bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
        Ok(Self {
            file,
            geometry,
            width,
            table,
            hole: Hole::default(),
            slices: std::iter::repeat_with(|| None).take(SLICES).collect(),
            slice_entries: slice_len * 8 / u64::from(width.bits()),
        })
    }

    /// The refcount table as it is on disk.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Refcounts that are read together.
    pub fn slice_entries(&self) -> u64 {
        self.slice_entries
    }

    /// Whether all refcounts that are read together with that of `cluster` are zero. May suspend.
    ///
    /// # Errors
    /// As [`DiskRefcounts::get`].
    pub fn are_zero(&mut self, cluster: HostCluster) -> std::result::Result<bool, Broken> {
        Ok(self
            .slice(cluster)?
            .is_none_or(|slice| slice.iter().all(|byte| *byte == 0)))
    }

    fn block(&self, cluster: HostCluster) -> u64 {
        let slot = index(self.geometry.refcount_table_index(cluster));
        self.table.get(slot).copied().unwrap_or(0) & !spec::REFCOUNT_TABLE_RESERVED
    }

    /// The refcount of a cluster, whether the file reaches it or not. May suspend.
    ///
    /// # Errors
    /// A block that is not cluster-aligned, or cannot be read.
    pub fn get(&mut self, cluster: HostCluster) -> std::result::Result<u64, Broken> {
        let at = index(cluster.get() % self.slice_entries);
        let width = self.width;
        Ok(self.slice(cluster)?.map_or(0, |slice| width.get(slice, at)))
    }

    /// The part of a refcount block that has the refcount of `cluster`; `None` where there is no
    /// block.
    fn slice(&mut self, cluster: HostCluster) -> std::result::Result<Option<&[u8]>, Broken> {
        let block = self.block(cluster);
        if block == 0 {
            return Ok(None);
        }
        if !self.geometry.is_aligned(block) {
            return Err(Broken);
        }
        let number = cluster.get() / self.slice_entries;
        let slot = &mut self.slices[index(number) % SLICES];
        if slot.as_ref().is_none_or(|slice| slice.number != number) {
            let len = self.slice_entries * u64::from(self.width.bits()) / 8;
            let in_block = self.geometry.refcount_block_index(cluster) as u64 / self.slice_entries;
            let offset = block + in_block * len;
            if self.hole.covers(offset, len) {
                return Ok(None);
            }
            let mut data = slot
                .take()
                .map_or_else(|| vec![0; index(len)], |slice| slice.data);
            self.file.read(offset, &mut data).map_err(|_| Broken)?;
            if data.iter().all(|byte| *byte == 0) {
                self.hole.zeros_at(self.file, offset);
            }
            *slot = Some(Slice { number, data });
        }
        let Some(slice) = slot else {
            unreachable!("the slice was just put there")
        };
        Ok(Some(&slice.data))
    }
}
