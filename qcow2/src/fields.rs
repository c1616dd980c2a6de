//! Big-endian numbers at fixed places of a structure on disk.
//!
//! Reading past the end gives zeros, as the reference reads a file that ends early. Writing past
//! the end is our own mistake and panics.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

/// `N` bytes at `at`.
pub(crate) fn array<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    let rest = data.get(at..).unwrap_or_default();
    for (to, from) in out.iter_mut().zip(rest) {
        *to = *from;
    }
    out
}

/// The byte at `at`.
pub(crate) fn be8(data: &[u8], at: usize) -> u8 {
    data.get(at).copied().unwrap_or(0)
}

/// The 32-bit number at `at`.
pub(crate) fn be32(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(data, at))
}

/// The 64-bit number at `at`.
pub(crate) fn be64(data: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(data, at))
}

/// `len` bytes at `at`, as far as there are any, with zeros for the rest.
pub(crate) fn bytes(data: &[u8], at: usize, len: usize) -> Vec<u8> {
    let mut out: Vec<u8> = data
        .get(at..)
        .unwrap_or_default()
        .iter()
        .take(len)
        .copied()
        .collect();
    out.resize(len, 0);
    out
}

/// The 16-bit number at `at`.
pub(crate) fn be16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(data, at))
}
