//! Power cuts: every state in which a cut at one place of a simulated disk's log may leave it.
//!
//! The disk logs writes in the order in which it was *sent* them and flushes at their end, each
//! with what it covered. Cut after `n` entries, it holds what those flushes covered, and of the
//! other, *pending* writes any choice: the drive's cache writes back in any order. All choices are
//! too many; these are the ones in which mistakes show:
//!
//! * nothing pending arrives, or everything;
//! * all but one, for each one: whatever should have waited for it did not;
//! * a few random choices, sector by sector;
//! * everything, with the newest write torn at each 512 bytes. (An older torn write is its own
//!   prefix's newest.)

use coblock::block::drivers::sim::{Keep, LogEntry, SimDisk};

use super::rng::Rng;

/// Random choices for each place.
const CHOICES: u64 = 4;

/// Most places at which one write is torn; a longer one is torn at evenly spread ones.
const TEARS: u64 = 16;

/// What may have arrived when the power went after `at` entries of `log`, the log of `disk`.
pub fn choices(disk: &SimDisk, log: &[LogEntry], at: usize, rng: &mut Rng) -> Vec<Keep> {
    let pending = disk.pending_at(at);
    if pending == 0 {
        return vec![Keep::Nothing];
    }
    let mut keeps = vec![Keep::Nothing, Keep::Everything];
    if pending > 1 {
        // With one pending this is "nothing".
        keeps.extend((0..pending).map(Keep::AllBut));
        keeps.extend((0..CHOICES).map(|_| Keep::Seed(rng.next())));
    }
    // Only where the cut comes just after the write was sent: later cuts would tear it again.
    if let Some(LogEntry::Write { data, .. }) = log[..at].last() {
        let sectors = data.len().div_ceil(512) as u64;
        let step = (sectors / TEARS).max(1);
        keeps.extend(
            (step..sectors)
                .step_by(usize::try_from(step).expect("a small write"))
                .map(Keep::Torn),
        );
    }
    keeps
}
