//! Walks along the log of a simulated disk and tells, at each place, what a power cut there would
//! leave. Cheap for all places of a long log: what is durable is kept from one place to the next.

use super::disk::{Logged, SimDisk, State};
use super::log::{Keep, LogEntry, Sectors, apply};
use super::pages::{PAGE, Page, Pages};
use std::collections::BTreeMap;
use std::sync::Arc;

/// All power cuts of one log.
pub struct PowerCuts {
    log: Vec<Logged>,
    /// Places of everything but flushes, in the order in which they ended; those in flight last, as
    /// they were sent.
    order: Vec<usize>,
    durable: Vec<bool>,
    /// So many of `order` are in `pages`: the first ones, as far as they are durable.
    baked: usize,
    pages: Pages,
    len: u64,
    /// Of each page of `pages`, and their sum.
    digests: BTreeMap<u64, u64>,
    digest: u64,
    at: usize,
    /// Places of the entries that may or may not survive, as they were sent.
    pending: Vec<usize>,
}

impl PowerCuts {
    pub(super) fn new(state: &State) -> PowerCuts {
        let log = state.log.clone();
        let mut order: Vec<usize> = (0..log.len())
            .filter(|&index| !matches!(log[index].entry, LogEntry::Flush { .. }))
            .collect();
        order.sort_by_key(|&index| (log[index].ended.unwrap_or(u64::MAX), index));
        let mut cuts = PowerCuts {
            durable: vec![false; log.len()],
            order,
            log,
            baked: 0,
            pages: state.base.clone(),
            len: state.base_len,
            digests: BTreeMap::new(),
            digest: 0,
            at: 0,
            pending: Vec::new(),
        };
        for (number, page) in cuts.pages.iter() {
            let digest = page_digest(number, page);
            cuts.digests.insert(number, digest);
            cuts.digest = cuts.digest.wrapping_add(digest);
        }
        cuts
    }

    /// The log.
    pub fn log_len(&self) -> usize {
        self.log.len()
    }

    /// Entry `index` of the log.
    pub fn entry(&self, index: usize) -> &LogEntry {
        &self.log[index].entry
    }

    /// Goes on to the place after the first `at` entries.
    ///
    /// # Panics
    /// When that lies behind.
    pub fn go_to(&mut self, at: usize) {
        assert!(self.at <= at && at <= self.log.len(), "cuts go forwards");
        for index in self.at..at {
            if let LogEntry::Flush { covered } = &self.log[index].entry {
                for &index in covered {
                    self.durable[index] = true;
                }
            }
        }
        self.at = at;
        while let Some(&index) = self.order.get(self.baked)
            && self.durable[index]
        {
            let entry = &self.log[index].entry;
            let mut changed = Changed::by(entry, &self.pages);
            apply(entry, Sectors::All, &mut self.pages, &mut self.len);
            for (number, _) in changed.pages.drain(..) {
                let digest = self
                    .pages
                    .page(number)
                    .map(|page| page_digest(number, page));
                let before = match digest {
                    Some(digest) => self.digests.insert(number, digest),
                    None => self.digests.remove(&number),
                };
                self.digest = self
                    .digest
                    .wrapping_sub(before.unwrap_or(0))
                    .wrapping_add(digest.unwrap_or(0));
            }
            self.baked += 1;
        }
        self.pending = (0..at)
            .filter(|&index| {
                !self.durable[index] && !matches!(self.log[index].entry, LogEntry::Flush { .. })
            })
            .collect();
    }

    /// How many entries may or may not survive a cut here.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The disk after a cut here, of which `keep` survives: a disk of its own, with an empty log. And
    /// a digest of its contents: with another one, the contents differ.
    pub fn left(&self, keep: &Keep) -> (Arc<SimDisk>, u64) {
        let (mut pages, mut len) = (self.pages.clone(), self.len);
        let newest = self.pending.last().copied();
        let mut digest = self.digest;
        // Pages that differ from the durable ones, as they were there.
        let mut changed: BTreeMap<u64, Option<Page>> = BTreeMap::new();
        for &index in &self.order[self.baked..] {
            if index >= self.at {
                continue;
            }
            let number = || self.pending.binary_search(&index).expect("it is pending");
            let sectors = if self.durable[index] {
                Sectors::All
            } else {
                match *keep {
                    Keep::Nothing => continue,
                    Keep::AllBut(left_out) if left_out == number() => continue,
                    Keep::Torn(sectors) if Some(index) == newest => Sectors::First(sectors),
                    Keep::Seed(seed) => Sectors::by_seed(seed, index),
                    Keep::Everything | Keep::AllBut(_) | Keep::Torn(_) => Sectors::All,
                }
            };
            let entry = &self.log[index].entry;
            for (number, page) in Changed::by(entry, &pages).pages {
                changed.entry(number).or_insert(page);
            }
            apply(entry, sectors, &mut pages, &mut len);
        }
        for (number, before) in changed {
            let after = pages
                .page(number)
                .map_or(0, |page| page_digest(number, page));
            let before = before.map_or(0, |_| self.digests[&number]);
            digest = digest.wrapping_sub(before).wrapping_add(after);
        }
        let digest = digest ^ len.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (SimDisk::from_state(State::holding(pages, len)), digest)
    }
}

/// Pages that an entry may change, as they were before.
struct Changed {
    pages: Vec<(u64, Option<Page>)>,
}

impl Changed {
    fn by(entry: &LogEntry, before: &Pages) -> Self {
        let numbers = match entry {
            LogEntry::Write { offset, data } => {
                let end = offset + data.len() as u64;
                (offset / PAGE as u64..end.div_ceil(PAGE as u64)).collect()
            }
            LogEntry::Zero { offset, len } => before.numbers(*offset, offset + len),
            LogEntry::Resize { len } => before.numbers(*len, u64::MAX),
            LogEntry::Flush { .. } => Vec::new(),
        };
        let with_page = |number| (number, before.page(number).cloned());
        Changed {
            pages: numbers.into_iter().map(with_page).collect(),
        }
    }
}

/// A digest of a page and its place; never that of no page.
fn page_digest(number: u64, page: &Page) -> u64 {
    let mut digest = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.as_chunks::<8>().0 {
        digest = (digest ^ u64::from_le_bytes(*word)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        digest ^= digest >> 29;
    }
    digest
}
