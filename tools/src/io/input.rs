//! Commands from standard input: a prompt, a line, its results.
//!
//! While nobody types, requests that run beside the commands go on and print their results.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use coblock::aio::co::{self, Interest};

use super::Shell;

/// Longest line in bytes, its newline included; what is longer is taken apart, as by the reference.
const LONGEST: usize = 1023;

/// What was read of standard input and not yet used.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    ended: bool,
}

impl Shell<'_> {
    /// Runs the commands of standard input; whether all went well.
    pub(super) fn run_input(&mut self) -> bool {
        let mut lines = Lines::default();
        let mut good = true;
        while !self.quit {
            let prompt = format!("{}> ", self.out.name());
            self.text(prompt);
            self.out.flush();
            let Some(line) = self.next_line(&mut lines) else {
                break;
            };
            good &= self.run_line(OsStr::from_bytes(&line));
        }
        good
    }

    /// The next line without its newline; `None` at the end.
    fn next_line(&mut self, lines: &mut Lines) -> Option<Vec<u8>> {
        loop {
            if let Some(line) = lines.take() {
                return Some(line);
            }
            if lines.ended {
                return None;
            }
            self.wait_for_input();
            lines.fill();
        }
    }

    /// Drives requests until there is something to read.
    fn wait_for_input(&mut self) {
        let Some(image) = self.image.as_ref().filter(|image| image.is_busy()) else {
            return;
        };
        let home = &image.session.home;
        let typed = Rc::new(Cell::new(false));
        let told = typed.clone();
        home.spawn("standard input", move |co| {
            // What cannot be watched, like a file, can be read at once.
            let _ = co::fd_ready(co, io::stdin().as_fd(), Interest::Read);
            told.set(true);
        });
        while !typed.get() {
            home.poll(true);
            self.results.print(self.out);
            self.out.flush();
        }
    }
}

impl Lines {
    fn take(&mut self) -> Option<Vec<u8>> {
        let newline = self.buffer.iter().position(|&byte| byte == b'\n');
        let end = match newline {
            Some(at) if at < LONGEST => at + 1,
            _ if self.buffer.len() >= LONGEST => LONGEST,
            _ if self.ended && !self.buffer.is_empty() => self.buffer.len(),
            _ => return None,
        };
        let mut line: Vec<u8> = self.buffer.drain(..end).collect();
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        Some(line)
    }

    fn fill(&mut self) {
        let mut part = [0; 4096];
        match rustix::io::read(io::stdin(), &mut part) {
            Ok(0) => self.ended = true,
            Ok(len) => self.buffer.extend_from_slice(&part[..len]),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => self.ended = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_newlines_at_the_end_and_at_the_limit() {
        let mut lines = Lines {
            buffer: b"a\n\nb".to_vec(),
            ended: false,
        };
        assert_eq!(lines.take(), Some(b"a".to_vec()));
        assert_eq!(lines.take(), Some(b"".to_vec()));
        assert_eq!(lines.take(), None);
        lines.ended = true;
        assert_eq!(lines.take(), Some(b"b".to_vec()));
        assert_eq!(lines.take(), None);
        lines.buffer = vec![b'x'; LONGEST + 1];
        assert_eq!(lines.take().map(|line| line.len()), Some(LONGEST));
        assert_eq!(lines.take(), Some(b"x".to_vec()));
    }
}
