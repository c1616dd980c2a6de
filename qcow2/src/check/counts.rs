//! How many references each host cluster has, counted in memory.
//!
//! Counts are kept in chunks. A chunk with few references is a short sorted list, so that a file of
//! many holes costs little; with more it becomes an array, two bytes a cluster. A count stops where
//! the image's refcounts stop; references beyond are told to the caller.

use crate::budget::Budget;
use crate::error::Error;
use crate::types::{HostCluster, index};
use crate::width::RefcountWidth;

/// Clusters of one chunk.
const CHUNK: usize = 4096;
/// Clusters with references that a list holds at most.
const FEW: usize = 64;
/// Bytes of a list's entry, with the room that lists keep for more.
const FEW_COST: u64 = 2 * size_of::<(u16, u64)>() as u64;
const MEMORY: &str = "bytes of memory to count references";

/// Counts of one chunk, as wide as they have to be.
#[derive(Debug)]
enum Chunk {
    /// Cluster in the chunk and its count, sorted.
    Few(Vec<(u16, u64)>),
    Narrow(Box<[u16]>),
    Wide(Box<[u64]>),
}

impl Chunk {
    fn get(&self, at: usize) -> u64 {
        match self {
            Self::Few(counts) => find(counts, at).map_or(0, |place| counts[place].1),
            Self::Narrow(counts) => counts[at].into(),
            Self::Wide(counts) => counts[at],
        }
    }

    /// The list as an array.
    fn spread(counts: &[(u16, u64)], wide: bool) -> Self {
        if wide {
            let mut array = vec![0; CHUNK].into_boxed_slice();
            counts
                .iter()
                .for_each(|(at, count)| array[usize::from(*at)] = *count);
            Self::Wide(array)
        } else {
            let mut array = vec![0; CHUNK].into_boxed_slice();
            counts
                .iter()
                .for_each(|(at, count)| array[usize::from(*at)] = narrow(*count));
            Self::Narrow(array)
        }
    }
}

/// References of every host cluster.
#[derive(Debug)]
pub struct Counts {
    chunks: Vec<Option<Chunk>>,
    max: u64,
}

impl Counts {
    /// No reference to any cluster.
    pub fn new(width: RefcountWidth) -> Self {
        Self {
            chunks: Vec::new(),
            max: width.max(),
        }
    }

    /// References of a cluster.
    pub fn get(&self, cluster: HostCluster) -> u64 {
        let at = index(cluster.get());
        match self.chunks.get(at / CHUNK) {
            Some(Some(chunk)) => chunk.get(at % CHUNK),
            Some(None) | None => 0,
        }
    }

    /// The clusters from `from` up to `to` that have references, in order.
    pub fn referenced(&self, from: u64, to: u64) -> Vec<HostCluster> {
        let mut out = Vec::new();
        let mut at = from;
        while at < to {
            let slot = index(at) / CHUNK;
            let start = (slot * CHUNK) as u64;
            let end = to.min(start + CHUNK as u64);
            let inside = |place: u64| (at..end).contains(&place);
            match self.chunks.get(slot) {
                Some(None) => {}
                None => break,
                Some(Some(Chunk::Few(counts))) => {
                    let places = counts.iter().map(|(at, _)| start + u64::from(*at));
                    out.extend(places.filter(|place| inside(*place)).map(HostCluster));
                }
                Some(Some(_)) => {
                    out.extend(
                        (at..end)
                            .map(HostCluster)
                            .filter(|place| self.get(*place) > 0),
                    );
                }
            }
            at = end;
        }
        out
    }

    /// Counts `times` more references, in memory out of `budget`; gives how many of them the image's
    /// refcounts cannot hold.
    ///
    /// # Errors
    /// `LimitExceeded` when the counts would need more memory than is left.
    pub fn add(
        &mut self,
        cluster: HostCluster,
        times: u64,
        budget: &mut Budget,
    ) -> Result<u64, Error> {
        let at = index(cluster.get());
        let (slot, at) = (at / CHUNK, at % CHUNK);
        if slot >= self.chunks.len() {
            let more = slot + 1 - self.chunks.len();
            budget.take(MEMORY, 2 * (more * size_of::<Option<Chunk>>()) as u64)?;
            self.chunks.resize_with(slot + 1, || None);
        }
        let chunk = self.chunks[slot].get_or_insert_with(|| Chunk::Few(Vec::with_capacity(1)));
        if let Chunk::Few(counts) = chunk
            && counts.len() == FEW
            && find(counts, at).is_err()
        {
            let wide = self.max > u16::MAX.into();
            budget.take(MEMORY, (CHUNK * if wide { 8 } else { 2 }) as u64)?;
            *chunk = Chunk::spread(counts, wide);
        }
        let max = self.max;
        Ok(match chunk {
            Chunk::Few(counts) => {
                let place = match find(counts, at) {
                    Ok(place) => place,
                    Err(place) => {
                        budget.take(MEMORY, FEW_COST)?;
                        let at = u16::try_from(at).expect("inside a chunk");
                        counts.insert(place, (at, 0));
                        place
                    }
                };
                let (new, lost) = count_up(counts[place].1, times, max);
                counts[place].1 = new;
                lost
            }
            Chunk::Narrow(counts) => {
                let (new, lost) = count_up(counts[at].into(), times, max);
                counts[at] = narrow(new);
                lost
            }
            Chunk::Wide(counts) => {
                let (new, lost) = count_up(counts[at], times, max);
                counts[at] = new;
                lost
            }
        })
    }
}

/// Where a cluster is in a list, or would be.
fn find(counts: &[(u16, u64)], at: usize) -> Result<usize, usize> {
    counts.binary_search_by_key(&at, |(at, _)| usize::from(*at))
}

fn narrow(count: u64) -> u16 {
    u16::try_from(count).expect("the greatest 16-bit refcount")
}

/// `count + times`, stopped at `max`, and by how much it was stopped.
fn count_up(count: u64, times: u64, max: u64) -> (u64, u64) {
    let room = max - count;
    (count + times.min(room), times.saturating_sub(room))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_stop_at_the_width() {
        for (order, add, want, lost) in [
            (0, [1, 0], 1, 0),
            (0, [1, 2], 1, 2),
            (3, [200, 100], 255, 45),
            (4, [65_535, 1], 65_535, 1),
            (5, [1 << 31, 1 << 31], u64::from(u32::MAX), 1),
            (6, [u64::MAX, 3], u64::MAX, 3),
        ] {
            let mut budget = Budget::new(1 << 20);
            let mut counts = Counts::new(RefcountWidth::new(order));
            let cluster = HostCluster(9000);
            assert!(counts.referenced(0, 1 << 30).is_empty());
            assert_eq!(counts.get(cluster), 0);
            let told = counts.add(cluster, add[0], &mut budget).unwrap()
                + counts.add(cluster, add[1], &mut budget).unwrap();
            assert_eq!(
                (counts.get(cluster), told),
                (want, lost),
                "order {order}: {add:?}"
            );
            assert_eq!(counts.get(HostCluster(9001)), 0);
            assert_eq!(counts.referenced(0, 1 << 30), [cluster]);
            assert_eq!(counts.referenced(9000, 9001), [cluster]);
            assert!(
                counts.referenced(0, 9000).is_empty()
                    && counts.referenced(9001, 1 << 30).is_empty()
            );
        }
    }

    /// Lists and arrays hold the same, whatever order references come in.
    #[test]
    fn many_in_a_chunk() {
        for order in [2, 4, 6] {
            let mut budget = Budget::new(1 << 20);
            let mut counts = Counts::new(RefcountWidth::new(order));
            for round in 0..3_u64 {
                for number in 0..500_u64 {
                    let cluster = HostCluster(number * 37 % 5000);
                    let before = counts.get(cluster);
                    assert_eq!(counts.add(cluster, 1, &mut budget).unwrap(), 0);
                    assert_eq!((before, counts.get(cluster)), (round, round + 1));
                }
            }
            let used = counts.referenced(0, 6000);
            assert_eq!(used.len(), 500);
            assert!(used.is_sorted() && used.iter().all(|cluster| counts.get(*cluster) == 3));
        }
    }
}
