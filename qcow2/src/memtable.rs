//! A table that is in memory as a whole: the L1 table and the refcount table.
//!
//! Reading an entry is one load. Changed entries are remembered and written back alone, never with
//! their neighbours: a neighbour may have changed later, and what it points at may not be in the
//! file yet.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use coblock_coroutine::ThreadLock;

use crate::lazy::LazyWords;
use crate::spec::TABLE_ENTRY_LEN;
use crate::types::HostOffset;

/// Entries in host byte order, and where they lie in the file.
pub(crate) struct MemTable {
    entries: LazyWords,
    len: AtomicU64,
    place: ThreadLock<Place>,
}

struct Place {
    offset: HostOffset,
    /// Entries that the file does not have, by index.
    dirty: BTreeMap<u64, u64>,
}

/// Neighbouring changed entries, as bytes for the file.
pub(crate) struct StagedEntries {
    first: u64,
    pub host: HostOffset,
    pub bytes: Vec<u8>,
}

impl MemTable {
    /// A table of `entries` that lies at `offset`, all zero until [`MemTable::load`].
    pub fn new(offset: HostOffset, entries: u64) -> Self {
        MemTable {
            entries: LazyWords::new(),
            len: AtomicU64::new(entries),
            place: ThreadLock::new(Place {
                offset,
                dirty: BTreeMap::new(),
            }),
        }
    }

    /// Takes entries from `first` on as they were read: `bytes` are big-endian.
    pub fn load(&self, first: u64, bytes: &[u8]) {
        for (index, raw) in (first..self.len()).zip(bytes.chunks_exact(8)) {
            let entry = u64::from_be_bytes(raw.try_into().expect("chunks of eight"));
            if entry != 0 {
                self.entries.ensure(index).store(entry, Release);
            }
        }
    }

    /// Bytes of memory that a table of so many bytes takes at most.
    pub const fn memory(bytes: u64) -> u64 {
        LazyWords::memory(bytes / TABLE_ENTRY_LEN)
    }

    /// Entries in the table.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len.load(Acquire)
    }

    /// Where the table lies.
    pub fn offset(&self) -> HostOffset {
        self.place.lock().offset
    }

    /// Bytes of the table in the file, without the rest of its last cluster.
    pub fn bytes(&self) -> u64 {
        self.len() * TABLE_ENTRY_LEN
    }

    /// Entry `index`; zero past the end.
    #[inline]
    pub fn get(&self, index: u64) -> u64 {
        self.entries
            .get(index)
            .map_or(0, |entry| entry.load(Acquire))
    }

    /// Changes entry `index`; the file gets it with the next write-back.
    pub fn set(&self, index: u64, entry: u64) {
        assert!(
            index < self.len(),
            "entry {index} of a table of {}",
            self.len()
        );
        let mut place = self.place.lock();
        self.entries.ensure(index).store(entry, Release);
        place.dirty.insert(index, entry);
    }

    /// Non-zero entries with their indices.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        (0..self.len())
            .map(|index| (index, self.get(index)))
            .filter(|&(_, entry)| entry != 0)
    }

    /// Takes the changed entries, in runs of neighbours.
    pub fn stage_dirty(&self) -> Vec<StagedEntries> {
        let mut place = self.place.lock();
        let dirty = std::mem::take(&mut place.dirty);
        let mut runs: Vec<StagedEntries> = Vec::new();
        for (index, entry) in dirty {
            let bytes = entry.to_be_bytes();
            match runs.last_mut() {
                Some(run) if run.first + run.bytes.len() as u64 / TABLE_ENTRY_LEN == index => {
                    run.bytes.extend(bytes);
                }
                _ => runs.push(StagedEntries {
                    first: index,
                    host: HostOffset(place.offset.0 + index * TABLE_ENTRY_LEN),
                    bytes: bytes.to_vec(),
                }),
            }
        }
        runs
    }

    /// Gives back entries that did not reach the file. One that changed again keeps its newer
    /// value.
    pub fn unstage(&self, runs: &[StagedEntries]) {
        let mut place = self.place.lock();
        for run in runs {
            for (nth, raw) in run.bytes.chunks_exact(8).enumerate() {
                let entry = u64::from_be_bytes(raw.try_into().expect("chunks of eight"));
                place.dirty.entry(run.first + nth as u64).or_insert(entry);
            }
        }
    }

    /// Is there an entry that the file does not have?
    pub fn has_dirty(&self) -> bool {
        !self.place.lock().dirty.is_empty()
    }

    /// All entries as bytes for the file, zero-filled to `entries`.
    pub fn to_bytes(&self, entries: u64) -> Vec<u8> {
        (0..entries)
            .flat_map(|index| self.get(index).to_be_bytes())
            .collect()
    }

    /// The file has a longer copy of the table at `offset`, with every entry as it is now and these
    /// `added`.
    pub fn moved(&self, offset: HostOffset, entries: u64, added: &[(u64, u64)]) {
        let mut place = self.place.lock();
        assert!(
            place.dirty.is_empty(),
            "entries were changed while the table was copied"
        );
        place.offset = offset;
        for &(index, entry) in added {
            self.entries.ensure(index).store(entry, Release);
        }
        self.len.store(entries, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changed entries come out alone and in runs, and come back only where nothing newer stands.
    #[test]
    fn stages_only_what_changed() {
        let table = MemTable::new(HostOffset(0x1000), 10);
        for index in [1, 2, 5] {
            table.set(index, index * 0x1_0000);
        }
        let runs = table.stage_dirty();
        let places: Vec<_> = runs.iter().map(|r| (r.host.0, r.bytes.len())).collect();
        assert_eq!(places, [(0x1008, 16), (0x1028, 8)]);
        assert!(!table.has_dirty());
        table.set(5, 7);
        table.unstage(&runs);
        let again = table.stage_dirty();
        assert_eq!(again[1].bytes, 7u64.to_be_bytes(), "the newer value wins");
        assert_eq!(again[0].bytes.len(), 16);
    }
}
