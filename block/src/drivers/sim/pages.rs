//! Contents of a simulated disk: pages that copies share until one of them writes.

use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) const PAGE: usize = 4096;

/// Bytes by offset; what was never written is zero. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Pages {
    pages: BTreeMap<u64, Page>,
}

/// One page.
pub(super) type Page = Arc<[u8; PAGE]>;

/// Parts of `offset..offset + len` by page: number of the page, where in it, where in the range,
/// how long.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let position = offset + at as u64;
        #[expect(clippy::cast_possible_truncation, reason = "below PAGE")]
        let inside = (position % PAGE as u64) as usize;
        let part = (PAGE - inside).min(len - at);
        let item = (position / PAGE as u64, inside, at, part);
        at += part;
        Some(item)
    })
}

impl Pages {
    pub(super) fn read(&self, offset: u64, to: &mut [u8]) {
        for (page, inside, at, len) in parts(offset, to.len()) {
            match self.pages.get(&page) {
                Some(page) => to[at..at + len].copy_from_slice(&page[inside..inside + len]),
                None => to[at..at + len].fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, from: &[u8]) {
        for (page, inside, at, len) in parts(offset, from.len()) {
            let page = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[inside..inside + len].copy_from_slice(&from[at..at + len]);
        }
    }

    /// Pages that were written to, with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.pages.iter().map(|(number, page)| (*number, page))
    }

    /// Page `number`, if anything was written there.
    pub(super) fn page(&self, number: u64) -> Option<&Page> {
        self.pages.get(&number)
    }

    /// Numbers of the pages of `start..end` that were written to.
    pub(super) fn numbers(&self, start: u64, end: u64) -> Vec<u64> {
        let page = PAGE as u64;
        let range = self.pages.range(start / page..end.div_ceil(page));
        range.map(|(number, _)| *number).collect()
    }

    /// Was anything written at `offset`, and of how many of the `len` bytes, at least one, is that
    /// true? In time that depends on the answer.
    pub(super) fn status(&self, offset: u64, len: u64) -> (bool, u64) {
        let page = PAGE as u64;
        let first = offset / page;
        let next = self.pages.range(first..).next().map(|(number, _)| *number);
        let (is_data, end) = match next {
            Some(number) if number == first => {
                let run = self.pages.range(first..).zip(first..);
                let pages = run.take_while(|((number, _), expected)| *number == expected);
                (true, (first + pages.count() as u64) * page)
            }
            Some(number) => (false, number * page),
            None => (false, u64::MAX),
        };
        (is_data, len.min(end - offset))
    }

    /// Zeros from `start` to `end`, in time that depends on what was written there.
    pub(super) fn zero(&mut self, start: u64, end: u64) {
        let page = PAGE as u64;
        for number in self.numbers(start, end) {
            let (first, last) = (number * page, (number + 1) * page);
            if start <= first && last <= end {
                self.pages.remove(&number);
            } else if let Some(contents) = self.pages.get_mut(&number) {
                #[expect(clippy::cast_possible_truncation, reason = "at most PAGE")]
                let (from, to) = (
                    (start.max(first) - first) as usize,
                    (end.min(last) - first) as usize,
                );
                Arc::make_mut(contents)[from..to].fill(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_behave_like_bytes() {
        let mut pages = Pages::default();
        let mut flat = vec![0u8; 5 * PAGE];
        for (n, (offset, len)) in [(0, 1), (4095, 2), (100, 9000), (8192, 4096), (1, 4094)]
            .iter()
            .enumerate()
        {
            let data = vec![u8::try_from(n + 1).unwrap(); *len];
            pages.write(*offset, &data);
            let at = usize::try_from(*offset).unwrap();
            flat[at..at + len].copy_from_slice(&data);
        }
        let snapshot = pages.clone();
        pages.zero(50, 8200);
        let mut seen = vec![9; 5 * PAGE];
        snapshot.read(0, &mut seen);
        assert_eq!(seen, flat, "a copy does not see what comes later");
        flat[50..8200].fill(0);
        pages.read(0, &mut seen);
        assert_eq!(seen, flat);
    }
}
