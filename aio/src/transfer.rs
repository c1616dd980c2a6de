//! What follows an attempt to transfer that was short, interrupted or put off. Pure: no I/O here. For
//! our engines, and for a simulated one that wants to go on as they do.
//!
//! ```text
//!   attempt -> all          done
//!           -> some         go on behind it
//!           -> 0            read: end of the file      write: no space
//!           -> EINTR, EAGAIN  again; after several in a row on a thread, where it just waits
//!           -> EINVAL       read, behind some: direct I/O at an unaligned end of the file
//!           -> other        the error
//! ```

use std::io;

/// How often in a row an attempt may be put off before it goes to a thread.
const ATTEMPTS: u32 = 8;

/// Where the next attempt begins, and by whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Next {
    /// Bytes that are done.
    pub done: usize,
    /// The engine has put it off too often.
    pub on_thread: bool,
}

/// One transfer of `len` bytes, between two attempts.
struct Progress {
    len: usize,
    done: usize,
    put_off: u32,
}

/// What an attempt came to.
enum Step {
    GoOn,
    All,
    Nothing,
    Failed(i32),
}

impl Progress {
    fn new(len: usize) -> Self {
        Progress {
            len,
            done: 0,
            put_off: 0,
        }
    }

    fn take(&mut self, result: i32) -> Step {
        match usize::try_from(result) {
            Ok(0) => Step::Nothing,
            Ok(count) => {
                self.put_off = 0;
                self.done += count;
                assert!(
                    self.done <= self.len,
                    "the kernel transferred more than it was asked to"
                );
                if self.done == self.len {
                    Step::All
                } else {
                    Step::GoOn
                }
            }
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => {
                self.put_off += 1;
                Step::GoOn
            }
            Err(_) => Step::Failed(-result),
        }
    }

    fn next(&self) -> Next {
        Next {
            done: self.done,
            on_thread: self.put_off > ATTEMPTS,
        }
    }
}

/// Goes on after an attempt to read `len` bytes at `offset` that gave `result`; tells how many
/// came. `file_len` is asked only when the end of the file may lie between two blocks. Results are as
/// of a system call: bytes, or a negative errno. Suspends if `attempt` does.
///
/// # Errors
/// What an attempt failed with for good.
///
/// # Panics
/// When attempts transfer more than `len` in all.
pub fn finish_read(
    offset: u64,
    len: usize,
    mut result: i32,
    mut attempt: impl FnMut(Next) -> i32,
    file_len: impl FnOnce() -> io::Result<u64>,
) -> io::Result<usize> {
    let mut progress = Progress::new(len);
    loop {
        match progress.take(result) {
            Step::GoOn => result = attempt(progress.next()),
            Step::All | Step::Nothing => return Ok(progress.done),
            Step::Failed(libc::EINVAL) if progress.done > 0 => {
                let at_end = offset + progress.done as u64 >= file_len()?;
                let error = || io::Error::from_raw_os_error(libc::EINVAL);
                return if at_end {
                    Ok(progress.done)
                } else {
                    Err(error())
                };
            }
            Step::Failed(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Goes on after an attempt to write `len` bytes that gave `result`. Suspends if `attempt` does.
///
/// # Errors
/// What an attempt failed with for good; `ENOSPC` after one that took nothing and said nothing.
///
/// # Panics
/// When attempts transfer more than `len` in all.
pub fn finish_write(
    len: usize,
    mut result: i32,
    mut attempt: impl FnMut(Next) -> i32,
) -> io::Result<()> {
    let mut progress = Progress::new(len);
    loop {
        match progress.take(result) {
            Step::GoOn => result = attempt(progress.next()),
            Step::All => return Ok(()),
            Step::Nothing => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Step::Failed(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTR: i32 = -libc::EINTR;
    const AGAIN: i32 = -libc::EAGAIN;
    const INVAL: i32 = -libc::EINVAL;
    const IO: i32 = -libc::EIO;

    /// Plays the results; gives what came out and where each attempt began.
    fn play<R>(
        results: &[i32],
        run: impl FnOnce(i32, &mut dyn FnMut(Next) -> i32) -> R,
    ) -> (R, Vec<usize>) {
        let (mut at, mut rest) = (Vec::new(), results.iter().copied());
        let first = rest.next().unwrap();
        let mut attempt = |next: Next| {
            at.push(next.done);
            rest.next().expect("no attempt after the end")
        };
        let out = run(first, &mut attempt);
        assert_eq!(rest.len(), 0, "it stopped too early");
        (out, at)
    }

    #[test]
    fn reads() {
        for (name, results, want, attempts) in [
            ("all at once", &[100][..], Ok(100), &[][..]),
            ("in three pieces", &[50, 30, 20], Ok(100), &[50, 80]),
            ("the end of the file", &[60, 0], Ok(60), &[60]),
            ("nothing at all", &[0], Ok(0), &[]),
            ("interrupted", &[INTR, AGAIN, 100], Ok(100), &[0, 0]),
            (
                "interrupted between pieces",
                &[40, INTR, 60],
                Ok(100),
                &[40, 40],
            ),
            ("direct, unaligned end", &[60, INVAL], Ok(60), &[60]),
            (
                "direct, not the end",
                &[10, INVAL],
                Err(libc::EINVAL),
                &[10],
            ),
            ("not aligned", &[INVAL], Err(libc::EINVAL), &[]),
            ("broken", &[40, IO], Err(libc::EIO), &[40]),
        ] {
            let (got, at) = play(results, |first, attempt| {
                finish_read(1000, 100, first, attempt, || Ok(1060))
            });
            assert_eq!(got.map_err(|e| e.raw_os_error().unwrap()), want, "{name}");
            assert_eq!(at, attempts, "{name}");
        }
    }

    #[test]
    fn writes() {
        for (name, results, want) in [
            ("all at once", &[100][..], Ok(())),
            ("in pieces, interrupted", &[1, INTR, 98, AGAIN, 1], Ok(())),
            (
                "takes nothing and says nothing",
                &[40, 0],
                Err(libc::ENOSPC),
            ),
            ("broken", &[IO], Err(libc::EIO)),
            (
                "not aligned behind a short one",
                &[60, INVAL],
                Err(libc::EINVAL),
            ),
        ] {
            let (got, _) = play(results, |first, attempt| finish_write(100, first, attempt));
            assert_eq!(got.map_err(|e| e.raw_os_error().unwrap()), want, "{name}");
        }
    }

    /// Put off again and again it goes to a thread; progress gives the engine another chance.
    #[test]
    fn put_off_too_often() {
        let mut where_to = Vec::new();
        let mut results = vec![AGAIN; 9];
        results.extend([10, AGAIN, 90]);
        let mut rest = results.into_iter().skip(1);
        let attempt = |next: Next| {
            where_to.push(next.on_thread);
            rest.next().unwrap()
        };
        finish_write(100, AGAIN, attempt).unwrap();
        let mut want = vec![false; 8];
        want.extend([true, false, false]);
        assert_eq!(where_to, want);
    }

    #[test]
    #[should_panic(expected = "more than it was asked to")]
    fn more_than_asked_for_is_refused() {
        let _never = finish_write(10, 11, |_| 0);
    }
}
