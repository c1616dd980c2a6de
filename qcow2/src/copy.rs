//! Copies by the host from and to an image: the tables say from and to where in the file.
//!
//! To an image only whole clusters are copied into new ones: what must be copied on write is read,
//! and goes the way of all writes. The rules of `block/src/io/copy_range.rs` hold: nothing here
//! waits for another request while the source is held, so a cluster that another write is about to
//! map is left to that way too.

use coblock_block::{Copied, CopySource, CopyTarget, GraphRead, RequestKind, Result};
use coblock_coroutine::Co;

use crate::cow::{Plan, Wait};
use crate::image::Qcow2;
use crate::mapping::{Extent, Mapped};
use crate::types::GuestOffset;

impl Qcow2 {
    /// Offers a first part of the range to `to`.
    pub(crate) fn copy_extent_from(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        len: u64,
        to: &CopyTarget<'_>,
    ) -> Result<Copied> {
        loop {
            let in_flight = self
                .in_flight
                .begin_unknown(graph.slot(), RequestKind::Other);
            let Some(Extent { what, len }) = self.lookup(at, len)? else {
                drop(in_flight);
                self.load_l2(co, graph, at)?;
                continue;
            };
            return match what {
                Mapped::Data { host, .. } => {
                    // Rule 9.2: nobody else gets the clusters before the host has copied them.
                    in_flight.set_range(host.0, len);
                    self.file.copy_range_from(co, graph, host.0, len, to)
                }
                Mapped::Zero => Ok(Copied::Zeros(len)),
                Mapped::Unallocated => match self.backing.get() {
                    Some(backing) => {
                        drop(in_flight);
                        backing.copy_range_from(co, graph, at.0, len, to)
                    }
                    None => Ok(Copied::Zeros(len)),
                },
                Mapped::Compressed { .. } => Ok(Copied::No),
            };
        }
    }

    /// Takes a first part of `source`; returns how much.
    pub(crate) fn copy_extent_to(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        source: CopySource<'_>,
    ) -> Result<u64> {
        loop {
            let in_flight = self
                .in_flight
                .begin_unknown(graph.slot(), RequestKind::Other);
            let Some(Extent { what, len }) = self.lookup(at, source.len)? else {
                drop(in_flight);
                self.load_l2(co, graph, at)?;
                continue;
            };
            if let Mapped::Data {
                host,
                in_place: true,
            } = what
            {
                in_flight.set_range(host.0, len);
                self.check_no_table(co, graph, host, len)?;
                let source = source.part(0, len);
                return self.file.copy_range_to(co, graph, host.0, source);
            }
            drop(in_flight);
            return self.copy_to_new_clusters(co, graph, at, source);
        }
    }

    /// Takes whole clusters of `source` into new ones; returns how many bytes that were.
    fn copy_to_new_clusters(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        at: GuestOffset,
        source: CopySource<'_>,
    ) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let len = source.len - source.len % size;
        // With blocks greater than clusters, a write of metadata waits for requests in neighbouring
        // clusters.
        let apart = self.file.limits(graph).request_alignment <= size;
        if self.geometry.offset_in_cluster(at) != 0 || len == 0 || !apart {
            return Ok(0);
        }
        let Plan::Allocate(pending, run, cow) = self.plan(co, graph, at, len, Wait::Never)? else {
            return Ok(0);
        };
        let copied = self.copy_whole(co, graph, run.start.0, source.part(0, cow.len));
        Ok(match self.settle(co, graph, &pending, run, copied)? {
            true => cow.len,
            false => 0,
        })
    }

    /// Copies all of `source` to `host`; `false`: the host does not, or not to the end.
    fn copy_whole(
        &self,
        co: &Co,
        graph: &GraphRead<'_>,
        host: u64,
        source: CopySource<'_>,
    ) -> Result<bool> {
        let mut done = 0;
        while done < source.len {
            let rest = source.part(done, source.len - done);
            match self.file.copy_range_to(co, graph, host + done, rest)? {
                0 => return Ok(false),
                part => done += part,
            }
        }
        Ok(true)
    }
}
