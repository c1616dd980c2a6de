//! Is there an order in which each read returned the newest write?
//!
//! Every write of a unit has a content of its own, so it is known which write a read has seen, and
//! the question has a short answer (Gibbons and Korach, "Testing shared memories", 1997, section
//! 3.2). A write and all that have seen it are a *cluster*. Some instant of each of them lies in
//! the time for which its content is the newest, so with
//!
//! ```text
//!   f   the first end of one of the cluster
//!   s   the last begin of one of the cluster
//! ```
//!
//! the content is the newest from `f` to `s`, if `f` is before `s` (the zone is *forward*), and else
//! for some instant between `s` and `f` (the zone is *backward*). There is an order exactly when no
//! two forward zones overlap, and no backward zone lies within a forward one.

use super::WriteId;

/// First end and last begin of a write and of those who have seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zone {
    first_end: u64,
    last_begin: u64,
}

impl Zone {
    /// Of a write that nobody has seen; without an end it goes on.
    pub(super) fn of_write(began: u64, ended: Option<u64>) -> Zone {
        Zone {
            first_end: ended.unwrap_or(u64::MAX),
            last_begin: began,
        }
    }

    fn with(self, other: Zone) -> Zone {
        Zone {
            first_end: self.first_end.min(other.first_end),
            last_begin: self.last_begin.max(other.last_begin),
        }
    }

    fn is_forward(self) -> bool {
        self.first_end < self.last_begin
    }

    /// Does `self`, which is forward, leave no instant for `other`?
    fn covers(self, other: Zone) -> bool {
        match other.is_forward() {
            true => self.first_end.max(other.first_end) < self.last_begin.min(other.last_begin),
            false => self.first_end < other.last_begin && other.first_end < self.last_begin,
        }
    }

    /// Is there no order of both?
    pub(super) fn conflicts(self, other: Zone) -> bool {
        self.is_forward() && self.covers(other) || other.is_forward() && other.covers(self)
    }
}

/// What reads of one unit have returned.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Vec<(WriteId, Zone)>);

impl Seen {
    /// A read from `began` to `ended` returned the content of `id`.
    pub(super) fn add(&mut self, id: WriteId, began: u64, ended: u64) {
        let read = Zone::of_write(began, Some(ended));
        match self.0.iter_mut().find(|(its, _)| *its == id) {
            Some((_, zone)) => *zone = zone.with(read),
            None => self.0.push((id, read)),
        }
    }

    /// The zone of write `id`, which by itself has `write`.
    pub(super) fn zone(&self, id: WriteId, write: Zone) -> Zone {
        let reads = self.0.iter().find(|(its, _)| *its == id);
        reads.map_or(write, |(_, reads)| write.with(*reads))
    }
}
