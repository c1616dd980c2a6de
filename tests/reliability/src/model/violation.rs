//! A content that must not be, and its story.

use std::fmt;

use super::content::{Content, stamp};
use super::{History, Puts, WriteId, index};

/// A content that must not be.
#[derive(Debug)]
pub struct Violation {
    /// Byte offset of the unit.
    pub offset: u64,
    /// What is there.
    pub found: Content,
    /// Which writes might be there.
    pub allowed: Vec<WriteId>,
    /// Of what a mixture consists.
    pub mixture: String,
}

impl Violation {
    /// The same with what a mixture consists of; `bytes` are the whole disk.
    pub fn explain(mut self, history: &History, bytes: &[u8]) -> String {
        if self.found == Content::Foreign {
            let unit = usize::try_from(self.offset).expect("a small disk");
            let piece = &bytes[unit..unit + history.unit];
            let ids = &history.units[unit / history.unit];
            self.mixture = history.mixture(piece, self.offset, ids);
        }
        self.to_string()
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "byte {:#x}: found {:?}{}, allowed {:?}",
            self.offset, self.found, self.mixture, self.allowed
        )
    }
}

impl History {
    /// Which bytes of a unit come from which write, for a message.
    pub(super) fn mixture(&self, piece: &[u8], offset: u64, ids: &[WriteId]) -> String {
        let mut text = String::new();
        let mut stamped = vec![0; self.unit];
        for &id in ids {
            stamp(&mut stamped, offset, self.unit, self.salt, id);
            if self.writes[index(id)].puts != Puts::Stamp {
                stamped.fill(0);
            }
            let same: Vec<usize> = (0..self.unit)
                .step_by(8)
                .filter(|at| stamped[*at..*at + 8] == piece[*at..*at + 8])
                .collect();
            if let (Some(first), Some(last)) = (same.first(), same.last()) {
                let w = &self.writes[index(id)];
                text += &format!(
                    " [{} words in {first}..{} of {w:?} {id}]",
                    same.len(),
                    last + 8
                );
            }
        }
        text += &format!(" now {}", self.now);
        text
    }
}
