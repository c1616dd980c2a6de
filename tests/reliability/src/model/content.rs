//! What tells writes apart: the content that a write puts into each unit, and back from a content to
//! the write.

use super::WriteId;
use crate::rng::mix;

/// The smallest unit: a place and a number.
pub const MIN_UNIT: usize = 16;

/// What one unit of a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros from end to end.
    Zero,
    /// What [`stamp`] makes for this place and this write (0: a backing file's content).
    Stamp(WriteId),
    /// Nothing that anybody wrote here.
    Foreign,
}

/// Fills `buf`, which begins at byte `offset` of the disk, as write `id` of run `salt` does.
pub fn stamp(buf: &mut [u8], offset: u64, unit: usize, salt: u64, id: WriteId) {
    assert_eq!(buf.len() % unit, 0, "a write covers whole units");
    assert_eq!(offset % unit as u64, 0, "a write begins at a unit");
    for (index, piece) in buf.chunks_exact_mut(unit).enumerate() {
        let place = offset / unit as u64 + index as u64;
        let (head, body) = piece.split_at_mut(8);
        // The number is mixed with the place, so that a unit moved elsewhere does not decode there.
        head.copy_from_slice(&(id ^ mask(place, salt)).to_be_bytes());
        let mut state = mix(id ^ mask(place, salt).rotate_left(17));
        for word in body.chunks_exact_mut(8) {
            word.copy_from_slice(&state.to_be_bytes());
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
    }
}

/// Tells what the unit `piece` at `offset` holds. `limit` is above every number that was given out.
pub fn content(piece: &[u8], offset: u64, salt: u64, limit: WriteId) -> Content {
    if piece.iter().all(|b| *b == 0) {
        return Content::Zero;
    }
    let place = offset / piece.len() as u64;
    let mut head = [0; 8];
    head.copy_from_slice(&piece[..8]);
    let id = u64::from_be_bytes(head) ^ mask(place, salt);
    let mut state = mix(id ^ mask(place, salt).rotate_left(17));
    let body = piece[8..].chunks_exact(8).all(|word| {
        let same = word == state.to_be_bytes();
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        same
    });
    if id < limit && body {
        Content::Stamp(id)
    } else {
        Content::Foreign
    }
}

fn mask(place: u64, salt: u64) -> u64 {
    mix(place ^ mix(salt))
}
