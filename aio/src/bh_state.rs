//! The states of a bottom half, and who moves them (rule 3.2).
//!
//! One word: three flags and a ticket. Scheduling draws a new ticket and inserts an entry with it
//! into the context's list; the entry runs only if its ticket is still the current one. So an entry
//! whose schedule was cancelled stays in the list as a dead one, and scheduling again puts a new
//! one at the end: first scheduled, first run, also after a cancel.
//!
//! ```text
//!              schedule: ticket + 1, insert               begin(ticket): run it
//!   idle state ---------------------------> SCHEDULED ---------------------------> idle state
//!       ^                                       |
//!       +---------------- cancel ---------------+           DELETED is for ever, from any state
//! ```
//!
//! Every attempt to schedule is a read-modify-write, even when it changes nothing: the callback
//! then sees what *each* scheduler wrote before, not only what the first one wrote (rule 3.3).
//!
//! `super::sync` has the atomics of std, or of loom where the machine is model-checked.

use super::sync::{AtomicU64, Ordering};

/// Set while an entry of the list is to run. Whoever turns it from 0 to 1 inserts, nobody else
/// does: so scheduling twice runs once. The loop clears it *before* the call, so that a callback
/// may schedule itself again.
const SCHEDULED: u64 = 1;
/// The scheduled entry is an idle one: it does not count as progress and does not end a wait at
/// once.
const IDLE: u64 = 2;
/// Will not run any more. Set by the owner of the handle, never cleared.
const DELETED: u64 = 4;

const FLAGS: u64 = SCHEDULED | IDLE | DELETED;
const ONE_TICKET: u64 = 1 << 32;

/// Names one act of scheduling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// How an entry of the list stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Cancelled, deleted, or replaced by a newer one.
    Dead,
    /// To be run, counts as progress.
    Regular,
    /// To be run, does not count.
    Idle,
}

/// The word.
#[derive(Debug)]
pub struct BhState(AtomicU64);

impl BhState {
    /// Not scheduled.
    pub fn new() -> Self {
        BhState(AtomicU64::new(0))
    }

    /// Asks for a run. `Some`: the caller inserts an entry with this ticket. `None`: it is going to
    /// run anyway (a regular request for an idle one replaces it), or is deleted.
    #[must_use]
    pub fn schedule(&self, idle: bool) -> Option<Ticket> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let runs_anyway = now & SCHEDULED != 0 && (idle || now & IDLE == 0);
            let unchanged = runs_anyway || now & DELETED != 0;
            let next = if unchanged {
                now
            } else {
                let ticket = (now & !FLAGS).wrapping_add(ONE_TICKET);
                ticket | SCHEDULED | if idle { IDLE } else { 0 }
            };
            match self
                .0
                .compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) if unchanged => return None,
                Ok(_) => return Some(Ticket(next & !FLAGS)),
                Err(other) => now = other,
            }
        }
    }

    /// It will not run, unless it already started. True: it was scheduled.
    pub fn cancel(&self) -> bool {
        self.0.fetch_and(!(SCHEDULED | IDLE), Ordering::AcqRel) & SCHEDULED != 0
    }

    /// It will never run again, unless it already started.
    pub fn delete(&self) {
        self.0.fetch_or(DELETED, Ordering::AcqRel);
    }

    /// How the entry with this ticket stands now.
    #[must_use]
    pub fn look(&self, ticket: Ticket) -> Entry {
        Self::entry(self.0.load(Ordering::Relaxed), ticket)
    }

    /// The loop takes the entry with this ticket to run it; not when it is dead.
    #[must_use]
    pub fn begin(&self, ticket: Ticket) -> Entry {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let entry = Self::entry(now, ticket);
            if entry == Entry::Dead {
                return entry;
            }
            let next = now & !(SCHEDULED | IDLE);
            match self
                .0
                .compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return entry,
                Err(other) => now = other,
            }
        }
    }

    fn entry(word: u64, ticket: Ticket) -> Entry {
        match word {
            _ if word & !FLAGS != ticket.0 || word & SCHEDULED == 0 || word & DELETED != 0 => {
                Entry::Dead
            }
            _ if word & IDLE != 0 => Entry::Idle,
            _ => Entry::Regular,
        }
    }
}
