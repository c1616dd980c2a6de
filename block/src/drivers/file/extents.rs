//! Data and holes of a file, as the file system tells them.
//!
//! What it does not tell counts as data: that is always true enough. Others may change the file at
//! any time, so two answers that contradict each other are possible, and mean data as well.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Is there a hole at `offset`, and of how many of the `len` bytes is that true? Blocks; `len` is
/// not zero. Moves the position of the open file, which nobody uses.
pub(super) fn look(file: &File, offset: u64, len: u64) -> (bool, u64) {
    match seek(file.as_fd(), SeekFrom::Data(offset)) {
        // No data from here to the end of the file.
        Err(Errno::NXIO) => (true, len),
        Ok(data) if data > offset => (true, len.min(data - offset)),
        Ok(data) if data == offset => match seek(file.as_fd(), SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => (false, len.min(hole - offset)),
            _ => (false, len),
        },
        _ => (false, len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const M: u64 = 1 << 20;

    /// Holes are found where the file system has them, to the byte that was asked for.
    #[test]
    fn data_and_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * M).unwrap();
        file.write_all_at(&[1; 65536], M).unwrap();
        for (name, offset, len, want) in [
            ("before the data", 0, 4 * M, (true, M)),
            ("asked for less than there is", 0, 100, (true, 100)),
            ("an odd byte", 7, 4 * M, (true, M - 7)),
            ("the data", M, 4 * M, (false, 65536)),
            ("the middle of the data", M + 5, 10, (false, 10)),
            ("after the data", M + 65536, 100, (true, 100)),
            (
                "to the end",
                M + 65536,
                3 * M - 65536,
                (true, 3 * M - 65536),
            ),
            ("past the end", 5 * M, 10, (true, 10)),
        ] {
            assert_eq!(look(&file, offset, len), want, "{name}");
        }
    }

    /// A file that cannot say where its holes are is data.
    #[test]
    fn what_is_not_known_is_data() {
        let (pipe, _other) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(pipe));
        assert_eq!(look(&file, 0, 10), (false, 10));
    }
}
