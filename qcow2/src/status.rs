//! Block status: what the bytes of the guest's disk are, without reading them.
//!
//! | L2 entry | data | zero | where |
//! |---|---|---|---|
//! | unallocated | | | the backing file decides; without one they are zeros |
//! | zero | | yes | the cluster that is kept, if one is |
//! | data | yes | where the file has a hole, in images with preallocated metadata | the file |
//! | compressed | yes | | nowhere byte for byte |
//!
//! An answer covers a run of clusters of one kind which lie side by side, over several slices of L2
//! tables as long as these are in the cache, and no more than [`SLICES_MAX`] of them. It is put
//! together without a suspend, so it was true at one time.

use coblock_block::types::in_memory;
use coblock_block::{Child, DriverStatus, GraphRead, Place, Precision, RequestKind, Result};
use coblock_coroutine::Co;

use crate::cache::Words;
use crate::entry::{L1Entry, L2Entry};
use crate::image::Qcow2;
use crate::image_file::{Hole, ImageFile};
use crate::types::{GuestOffset, HostCluster, HostOffset};

/// Slices, or L1 entries without a table, that one answer looks at: bounds the time of a call.
const SLICES_MAX: usize = 64;

/// What a run of clusters is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unallocated,
    Zero {
        /// Where the first byte would be.
        kept: Option<HostOffset>,
    },
    Data {
        host: HostOffset,
    },
    Compressed,
}

impl Kind {
    /// What one L2 entry says about the byte at `in_cluster` of its cluster.
    fn of(entry: L2Entry, in_cluster: u64) -> Kind {
        let inside = |host: HostOffset| HostOffset(host.0 + in_cluster);
        match entry {
            L2Entry::Unallocated => Kind::Unallocated,
            L2Entry::Zero { host, .. } => Kind::Zero {
                kept: host.map(inside),
            },
            L2Entry::Data { host, .. } => Kind::Data { host: inside(host) },
            L2Entry::Compressed { .. } => Kind::Compressed,
        }
    }

    /// Does `next`, which begins `after` bytes later, go on where this one is?
    fn goes_on(self, next: Kind, after: u64) -> bool {
        let beside = |host: HostOffset, next: HostOffset| host.0.checked_add(after) == Some(next.0);
        match (self, next) {
            (Kind::Zero { kept: Some(host) }, Kind::Zero { kept: Some(next) })
            | (Kind::Data { host }, Kind::Data { host: next }) => beside(host, next),
            (Kind::Zero { kept: None }, Kind::Zero { kept: None })
            | (Kind::Unallocated, Kind::Unallocated)
            | (Kind::Compressed, Kind::Compressed) => true,
            _ => false,
        }
    }
}

/// Clusters of one kind, from the byte that was asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    kind: Kind,
    len: u64,
}

impl Qcow2 {
    /// See [`coblock_block::Driver::block_status`].
    pub(crate) fn status<'g>(
        &'g self,
        co: &Co,
        graph: &'g GraphRead<'_>,
        at: GuestOffset,
        len: u64,
        precision: Precision,
    ) -> Result<DriverStatus<'g>> {
        let look_into_file =
            precision == Precision::Zeroes && self.has_preallocated_metadata(co, graph);
        loop {
            let in_flight = self
                .in_flight
                .begin_unknown(graph.slot(), RequestKind::Other);
            let Some(Run { kind, len }) = self.run(at, len)? else {
                drop(in_flight);
                self.load_l2(co, graph, at)?;
                continue;
            };
            let in_file = |offset: HostOffset| Place::In {
                child: &self.file,
                offset: offset.0,
            };
            return match kind {
                Kind::Unallocated => Ok(DriverStatus::unallocated(len)),
                Kind::Zero { kept: None } => Ok(DriverStatus::zero(len)),
                Kind::Zero { kept: Some(host) } => {
                    Ok(DriverStatus::zero(len).placed(in_file(host)))
                }
                Kind::Compressed => Ok(DriverStatus {
                    compressed: true,
                    ..DriverStatus::data(len)
                }),
                Kind::Data { host } if look_into_file => {
                    // Rule 9.2: nobody else gets these clusters while their place in the file is
                    // looked at.
                    in_flight.set_range(host.0, len);
                    let mut status = data_in(&self.file, co, graph, host, len)?;
                    status.place = in_file(host);
                    Ok(status)
                }
                Kind::Data { host } => Ok(DriverStatus::data(len).placed(in_file(host))),
            };
        }
    }

    /// The run from `at` on, of at most `len` bytes. Nothing where its first entry is not in the
    /// cache. Does not suspend.
    fn run(&self, at: GuestOffset, len: u64) -> Result<Option<Run>> {
        let Some(mut run) = self.run_in_slice(at, len)? else {
            return Ok(None);
        };
        for _ in 1..SLICES_MAX {
            let next_at = GuestOffset(at.0 + run.len);
            // Inside a slice it ended for a reason.
            if run.len >= len || !next_at.0.is_multiple_of(self.slice_coverage()) {
                break;
            }
            // An error there is an error of who asks about that.
            let Ok(Some(next)) = self.run_in_slice(next_at, len - run.len) else {
                break;
            };
            if !run.kind.goes_on(next.kind, run.len) {
                break;
            }
            run.len += next.len;
        }
        Ok(Some(run))
    }

    /// Bytes of the guest's disk that one slice of an L2 table maps.
    fn slice_coverage(&self) -> u64 {
        self.l2.slice_bytes() / 8 * self.geometry.cluster_size()
    }

    /// The same of what one slice, or one L1 entry, tells.
    fn run_in_slice(&self, at: GuestOffset, len: u64) -> Result<Option<Run>> {
        let (slice, index) = self.l2_place(at);
        let look = |words: Words<'_>| self.run_in_words(words, index, at, len);
        if let Some(run) = self.l2.peek(slice, look) {
            return run.map(Some);
        }
        let index = self.geometry.l1_index(at) as u64;
        let entry = L1Entry::decode(self.l1.get(index), index, self.geometry)?;
        if entry.host.is_some() {
            return Ok(None);
        }
        let coverage = self.geometry.l1_entry_coverage();
        Ok(Some(Run {
            kind: Kind::Unallocated,
            len: len.min(coverage - at.0 % coverage),
        }))
    }

    fn run_in_words(
        &self,
        words: Words<'_>,
        index: usize,
        at: GuestOffset,
        len: u64,
    ) -> Result<Run> {
        let kind_at = |nth: usize, at: GuestOffset| {
            let entry = words.get(index + nth);
            let in_cluster = self.geometry.offset_in_cluster(at);
            L2Entry::decode(entry, at, self.geometry).map(|entry| Kind::of(entry, in_cluster))
        };
        let size = self.geometry.cluster_size();
        let kind = kind_at(0, at)?;
        let mut known = size - self.geometry.offset_in_cluster(at);
        for nth in 1..words.len() - index {
            if known >= len {
                break;
            }
            match kind_at(nth, GuestOffset(at.0 + known)) {
                Ok(next) if kind.goes_on(next, known) => known += size,
                _ => break,
            }
        }
        Ok(Run {
            kind,
            len: known.min(len),
        })
    }

    /// Are clusters in use of which the file holds nothing? Then the file knows better than the
    /// tables what reads as zeros. Found out once, as the reference does: by comparing how many
    /// clusters are counted with how much storage the file takes up. What cannot be found out is
    /// no.
    fn has_preallocated_metadata(&self, co: &Co, graph: &GraphRead<'_>) -> bool {
        if let Some(known) = self.preallocated.get() {
            return *known;
        }
        match self.compare_counts_with_storage(co, graph) {
            Ok(found) => *self.preallocated.get_or_init(|| found),
            Err(error) => {
                log::debug!("whether the metadata is preallocated is not known: {error}");
                false
            }
        }
    }

    fn compare_counts_with_storage(&self, co: &Co, graph: &GraphRead<'_>) -> Result<bool> {
        let size = self.geometry.cluster_size();
        let stored = self.file.allocated_bytes(co, graph)? / size;
        let threshold = (stored.saturating_mul(10) / 9).max(stored + 2);
        let clusters = self.file.len(graph) / size;
        if clusters <= threshold {
            return Ok(false);
        }
        let per_slice = self.counts_per_slice() as u64;
        let mut in_use = 0;
        let file = ImageFile::new(co, graph, &self.file);
        let mut hole = Hole::default();
        for first in (0..clusters).step_by(in_memory(per_slice)) {
            let slot = self.geometry.refcount_table_index(HostCluster(first));
            let block = self.refcount_table.get(slot);
            if hole.covers(block, size) {
                continue;
            }
            let Some((pin, _)) = self.pin_refcounts(co, graph, HostCluster(first))? else {
                continue;
            };
            let here = in_memory(per_slice.min(clusters - first));
            let counted = (0..here)
                .filter(|index| self.count_at(&pin, *index) != 0)
                .count() as u64;
            drop(pin);
            if counted == 0 {
                hole.zeros_at(&file, block);
            }
            in_use += counted;
            if in_use > threshold {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Data at `host`, and zeros where `file` says so or ends before.
fn data_in<'g>(
    file: &Child,
    co: &Co,
    graph: &GraphRead<'_>,
    host: HostOffset,
    len: u64,
) -> Result<DriverStatus<'g>> {
    let below = file.block_status(co, graph, host.0, len)?;
    Ok(match below.len {
        0 => DriverStatus {
            zero: true,
            ..DriverStatus::data(len)
        },
        // A hole up to the end of the file goes on behind it.
        _ if below.zero && below.eof => DriverStatus {
            zero: true,
            ..DriverStatus::data(len)
        },
        below_len => DriverStatus {
            zero: below.zero,
            ..DriverStatus::data(below_len)
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which cluster continues a run of which.
    #[test]
    fn runs_go_on_where_they_are() {
        let data = |host| Kind::Data {
            host: HostOffset(host),
        };
        let kept = |host| Kind::Zero {
            kept: Some(HostOffset(host)),
        };
        let zero = Kind::Zero { kept: None };
        for (name, first, next, want) in [
            ("side by side", data(0x5_0000), data(0x6_0000), true),
            (
                "from the middle of a cluster",
                data(0x5_8000),
                data(0x6_0000),
                false,
            ),
            ("elsewhere", data(0x5_0000), data(0x8_0000), false),
            ("backwards", data(0x6_0000), data(0x5_0000), false),
            ("kept side by side", kept(0x5_0000), kept(0x6_0000), true),
            ("kept elsewhere", kept(0x5_0000), kept(0x7_0000), false),
            ("one kept, one not", kept(0x5_0000), zero, false),
            ("none kept", zero, zero, true),
            (
                "data, then zeros kept",
                data(0x5_0000),
                kept(0x6_0000),
                false,
            ),
            ("unallocated", Kind::Unallocated, Kind::Unallocated, true),
            ("unallocated, then zeros", Kind::Unallocated, zero, false),
            ("compressed", Kind::Compressed, Kind::Compressed, true),
            (
                "compressed, then data",
                Kind::Compressed,
                data(0x6_0000),
                false,
            ),
        ] {
            assert_eq!(first.goes_on(next, 0x1_0000), want, "{name}");
        }
        assert!(
            data(0x5_8000).goes_on(data(0x6_0000), 0x8000),
            "the rest of a cluster"
        );
    }
}
