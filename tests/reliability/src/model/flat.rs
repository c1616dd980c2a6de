//! The disk of requests that do not overlap in time: an array of bytes.

/// An array of bytes: what a disk holds after requests that do not overlap in time.
pub struct FlatDisk {
    bytes: Vec<u8>,
}

impl FlatDisk {
    /// A disk of `size` bytes that reads as zeros.
    pub fn new(size: u64) -> Self {
        FlatDisk {
            bytes: vec![0; usize::try_from(size).expect("a small disk")],
        }
    }

    /// Writes `buf` at `offset`.
    pub fn write(&mut self, offset: u64, buf: &[u8]) {
        let at = usize::try_from(offset).expect("a small disk");
        self.bytes[at..at + buf.len()].copy_from_slice(buf);
    }

    /// The bytes at `offset`.
    pub fn read(&self, offset: u64, len: usize) -> &[u8] {
        let at = usize::try_from(offset).expect("a small disk");
        &self.bytes[at..at + len]
    }

    /// The whole disk.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Panics with the first byte that differs.
pub fn assert_same(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#04x}, expected {:#04x}",
            found[at], expected[at]
        );
    }
}
