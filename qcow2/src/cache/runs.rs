//! A slice's words as runs: 128 bytes instead of 4 KiB, where few of its clusters are there, or
//! where they lie one after another in the file.
//!
//! ```text
//!   word 0     bit n: the words of run n go up by a step, else they are all equal
//!   words 1-5  two runs each: first word, and the one after the last, 16 bits each
//!   words 6-15 the first word of each run
//! ```
//!
//! What no run holds is zero. This is arithmetic: whatever the words mean, they come back as they
//! were, or the slice is not kept this way.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

/// Words that a slice takes as runs.
pub(super) const RECORD_WORDS: usize = 16;
/// Most runs of a slice.
const RUNS_MAX: usize = 10;
/// Where the bounds begin.
const BOUNDS: usize = 1;
/// Where the first words of the runs begin.
const FIRST: usize = 6;

/// A slice in few words.
pub(super) type Record = [u64; RECORD_WORDS];

/// A run that is being made.
struct Run {
    start: usize,
    end: usize,
    first: u64,
    step: u64,
}

/// The words, in host byte order, as runs. Nothing where there are too many.
pub(super) fn encode(words: impl ExactSizeIterator<Item = u64>, step: u64) -> Option<Record> {
    // Bounds have 16 bits.
    if words.len() > usize::from(u16::MAX) {
        return None;
    }
    let mut record = [0; RECORD_WORDS];
    let mut count = 0;
    let mut open: Option<Run> = None;
    for (index, word) in words.enumerate() {
        if let Some(run) = &mut open {
            let last = run
                .first
                .wrapping_add((run.end - run.start - 1) as u64 * run.step);
            if run.end - run.start == 1 && word == last.wrapping_add(step) {
                run.step = step;
            }
            if word == last.wrapping_add(run.step) {
                run.end += 1;
                continue;
            }
            put(&mut record, &mut count, run)?;
            open = None;
        }
        if word != 0 {
            open = Some(Run {
                start: index,
                end: index + 1,
                first: word,
                step: 0,
            });
        }
    }
    if let Some(run) = &open {
        put(&mut record, &mut count, run)?;
    }
    Some(record)
}

/// Adds a run. Nothing where there is no room.
fn put(record: &mut Record, count: &mut usize, run: &Run) -> Option<()> {
    if *count == RUNS_MAX {
        return None;
    }
    let bounds = run.start as u64 | (run.end as u64) << 16;
    record[0] |= u64::from(run.step != 0) << *count;
    record[BOUNDS + *count / 2] |= bounds << (*count % 2 * 32);
    record[FIRST + *count] = run.first;
    *count += 1;
    Some(())
}

/// What a reader sees of a slice. Words of another slice may come to stand there at any time; then
/// what it says is some number or other.
pub(crate) struct Words<'a>(Kept<'a>);

enum Kept<'a> {
    Whole(&'a [AtomicU64]),
    Runs {
        record: &'a [AtomicU64; RECORD_WORDS],
        step: u64,
        len: usize,
    },
}

impl<'a> Words<'a> {
    /// A slice word by word, as they stand in the file.
    #[inline(always)]
    pub(super) fn whole(words: &'a [AtomicU64]) -> Self {
        Words(Kept::Whole(words))
    }

    /// A slice of `len` words as runs with this step.
    #[inline(always)]
    pub(super) fn runs(record: &'a [AtomicU64; RECORD_WORDS], step: u64, len: usize) -> Self {
        Words(Kept::Runs { record, step, len })
    }

    /// How many there are.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        match self.0 {
            Kept::Whole(words) => words.len(),
            Kept::Runs { len, .. } => len,
        }
    }

    /// Word `index`, below [`Words::len`], in host byte order.
    #[inline(always)]
    pub(crate) fn get(&self, index: usize) -> u64 {
        match self.0 {
            Kept::Whole(words) => u64::from_be(words[index].load(Acquire)),
            Kept::Runs { record, step, .. } => in_runs(record, step, index as u64),
        }
    }
}

#[inline]
fn in_runs(record: &[AtomicU64; RECORD_WORDS], step: u64, index: u64) -> u64 {
    for pair in 0..RUNS_MAX / 2 {
        let bounds = record[BOUNDS + pair].load(Relaxed);
        for half in 0..2 {
            let (start, end) = (
                bounds >> (half * 32) & 0xffff,
                bounds >> (half * 32 + 16) & 0xffff,
            );
            if index >= start && index < end {
                let run = 2 * pair + half;
                let up = (record[0].load(Relaxed) >> run & 1).wrapping_neg() & step;
                let first = record[FIRST + run].load(Relaxed);
                return first.wrapping_add((index - start).wrapping_mul(up));
            }
        }
        // Runs are in order: none is left behind the last.
        if bounds >> 32 == 0 {
            break;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEP: u64 = 65536;
    const COPIED: u64 = 1 << 63;

    fn stored(record: Record) -> [AtomicU64; RECORD_WORDS] {
        record.map(AtomicU64::new)
    }

    /// Whatever is kept as runs comes back word by word.
    fn comes_back(words: &[u64]) -> bool {
        let Some(record) = encode(words.iter().copied(), STEP) else {
            return false;
        };
        let record = stored(record);
        let view = Words::runs(&record, STEP, words.len());
        assert_eq!(view.len(), words.len());
        for (index, &word) in words.iter().enumerate() {
            assert_eq!(view.get(index), word, "word {index} of {words:x?}");
        }
        true
    }

    /// The shapes that images have, and those that just do not fit.
    #[test]
    fn slices_of_known_shapes() {
        let apart = |runs: usize| {
            let mut words = vec![0; 512];
            for run in 0..runs {
                words[run * 50] = COPIED | ((run as u64 * 7 + 5) * STEP);
            }
            words
        };
        let in_order: Vec<u64> = (0..512).map(|n| COPIED | ((n + 9) * STEP)).collect();
        let mut hole = in_order.clone();
        hole[100..200].fill(0);
        let backwards: Vec<u64> = (0..512).map(|n| COPIED | ((999 - n) * STEP)).collect();
        for (name, words, fits) in [
            ("nothing there", vec![0; 512], true),
            ("written in order", in_order, true),
            ("with a hole", hole, true),
            ("zeros without clusters", vec![1; 512], true),
            ("ten clusters apart", apart(10), true),
            ("eleven clusters apart", apart(11), false),
            ("written backwards", backwards, false),
            (
                "the last word alone",
                [vec![0; 511], vec![7]].concat(),
                true,
            ),
            ("the largest slice", vec![1; 262_144], false),
            ("about to wrap", vec![u64::MAX - STEP + 1, 0, 0], true),
        ] {
            assert_eq!(comes_back(&words), fits, "{name}");
        }
    }

    proptest! {
        /// Any words at all, such as a damaged image has: they come back, or are not kept.
        #[test]
        fn any_words_come_back(
            pieces in prop::collection::vec((0u64..6, any::<u64>(), 1usize..40), 1..14)
        ) {
            let mut words = Vec::new();
            for (kind, value, len) in pieces {
                let from = match kind { 0 => 0, 1 => 1, 2 => STEP.wrapping_neg(), _ => value };
                let step = if kind < 3 { 0 } else { STEP * (kind - 3) };
                words.extend((0..len as u64).map(|n| from.wrapping_add(n.wrapping_mul(step))));
            }
            comes_back(&words);
        }

        /// A reader may see a record while another is put in its place: any words give an answer.
        #[test]
        fn garbage_is_some_number(words in any::<[u64; RECORD_WORDS]>(), index in 0usize..512) {
            let record = stored(words);
            Words::runs(&record, STEP, 512).get(index);
        }
    }
}
