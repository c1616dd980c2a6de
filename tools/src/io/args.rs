//! Words of commands: numbers of bytes, patterns, and the memory of a request.

use std::ops::{Deref, DerefMut};

use coblock::aio::AlignedBuf;
use coblock::block::MAX_REQUEST;

use super::commands::Failure;
use crate::size::{NumberError, parse_number, parse_size};

/// Bytes of a sector, in which images are counted.
pub(super) const SECTOR: u64 = 512;

/// What a request writes when nobody says.
pub(super) const DEFAULT_PATTERN: u8 = 0xcd;

/// A number of bytes, below 2^63.
pub(super) fn bytes(word: &str) -> Result<u64, Failure> {
    bytes_shown(word, word)
}

/// The same; `shown` is what an error repeats.
pub(super) fn bytes_shown(word: &str, shown: &str) -> Result<u64, Failure> {
    let number = parse_size(word).and_then(|number| match i64::try_from(number) {
        Ok(_) => Ok(number),
        Err(_) => Err(NumberError::OutOfRange),
    });
    number.map_err(|error| {
        Failure::Result(match error {
            NumberError::Malformed => format!(
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {shown}"
            ),
            NumberError::OutOfRange => format!("Parsing error: argument too large -- {shown}"),
        })
    })
}

/// A byte.
pub(super) fn pattern(word: &str) -> Result<u8, Failure> {
    let byte = parse_number(word).ok().and_then(|n| u8::try_from(n).ok());
    byte.ok_or_else(|| Failure::Result(format!("{word} is not a valid pattern byte")))
}

/// Lengths of the buffers of one request.
pub(super) fn lengths(words: &[String]) -> Result<Vec<u64>, Failure> {
    let mut lengths = Vec::new();
    let mut sum = 0;
    for word in words {
        let len = bytes(word)?;
        if len > MAX_REQUEST {
            return Err(Failure::Result(format!(
                "Argument '{word}' exceeds maximum size {MAX_REQUEST}"
            )));
        }
        if sum + len > MAX_REQUEST {
            return Err(Failure::Result(format!(
                "The total number of bytes exceed the maximum size {MAX_REQUEST}"
            )));
        }
        sum += len;
        lengths.push(len);
    }
    Ok(lengths)
}

/// Memory of a request. As a slice it is what the request is about; reads past the end of a file
/// whose last sector is not whole leave the rest zero.
pub(super) struct Buffer {
    memory: AlignedBuf,
    start: usize,
    covered: usize,
}

impl Buffer {
    /// `len` bytes, each `byte`; where direct I/O wants them, or with `misalign` just beside.
    pub(super) fn new(len: u64, byte: u8, misalign: bool) -> Result<Self, Failure> {
        const BESIDE: usize = 16;
        let start = if misalign { BESIDE } else { 0 };
        let out_of_memory = || Failure::Error(format!("Could not allocate {len} bytes"));
        let covered = usize::try_from(len).map_err(|_| out_of_memory())?;
        let mut memory = AlignedBuf::try_new(covered + start, 4096).map_err(|_| out_of_memory())?;
        if byte != 0 {
            memory.fill(byte);
        }
        Ok(Self {
            memory,
            start,
            covered,
        })
    }

    /// Leaves what is behind `len` bytes out of the request; it is zero from now on.
    pub(super) fn cover(&mut self, len: u64) {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.covered = self.covered.min(len);
        let end = self.start + self.covered;
        self.memory[end..].fill(0);
    }

    /// All of it, also what the request is not about.
    pub(super) fn whole(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..][..self.covered]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.covered]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_what_the_request_is_about() {
        for misalign in [false, true] {
            let mut buffer = Buffer::new(10, 7, misalign).ok().unwrap();
            assert_eq!((buffer.len(), buffer.whole()), (10, &[7; 10][..]));
            buffer.cover(20);
            assert_eq!(buffer.len(), 10);
            buffer.cover(4);
            assert_eq!(&buffer[..], [7; 4]);
            assert_eq!(buffer.whole(), [7, 7, 7, 7, 0, 0, 0, 0, 0, 0]);
        }
    }
}
