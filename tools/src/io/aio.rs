//! `aio_read`, `aio_write`, `aio_flush`: requests beside the commands, whose results come when they
//! come.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use coblock::block::{self, AioRequest, RequestFlags};

use super::Shell;
use super::args::{self, Buffer, DEFAULT_PATTERN};
use super::commands::{Call, Failure};
use super::report::{Report, dump};
use super::request::{Letters, check_pattern, mismatch, offset_and_lengths};
use crate::getopt::Opt;
use crate::output::Output;

/// Results that wait to be printed.
#[derive(Clone, Debug, Default)]
pub(super) struct Results(Arc<Mutex<String>>);

impl Results {
    fn add(&self, text: &str) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push_str(text);
    }

    /// Prints what waits.
    pub(super) fn print(&self, out: &mut Output) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = mem::take(&mut *waiting);
        if !waiting.is_empty() {
            out.text(waiting);
        }
    }
}

/// What is said of a request when it is over.
struct Story {
    results: Results,
    verb: &'static str,
    /// What failed, if it does.
    what: &'static str,
    offset: u64,
    len: u64,
    began: Instant,
    quiet: bool,
    machine: bool,
}

impl Story {
    /// Tells how it ended; `seen` is what else is said when it went well, before the statistics.
    fn tell(self, result: &block::Result<()>, wrong: Option<String>, seen: String) {
        if let Err(error) = result {
            let why = block::errno_text(error.errno());
            self.results.add(&format!("{} failed: {why}\n", self.what));
            return;
        }
        let mut text = String::new();
        if let Some(wrong) = wrong {
            text = wrong + "\n";
        }
        if !self.quiet {
            let report = Report {
                verb: self.verb,
                offset: self.offset,
                len: self.len,
                took: self.began.elapsed(),
                machine: self.machine,
            };
            text.push_str(&seen);
            text.push_str(&report.lines());
        }
        self.results.add(&text);
    }
}

impl Shell<'_> {
    fn story(
        &self,
        letters: &Letters,
        (verb, what): (&'static str, &'static str),
        offset: u64,
        len: u64,
    ) -> Story {
        Story {
            results: self.results.clone(),
            verb,
            what,
            offset,
            len,
            began: Instant::now(),
            quiet: letters.has(b'q'),
            machine: letters.has(b'C'),
        }
    }

    /// Remembers a request that was submitted.
    fn submitted(&mut self, request: block::Result<AioRequest>) -> Result<(), Failure> {
        let request = request.map_err(|error| Failure::Error(error.to_string()))?;
        if let Some(image) = &mut self.image {
            image.running.retain(|request| !request.is_over());
            image.running.push(request);
        }
        Ok(())
    }
}

const READ: &[Opt<u8>] = &[
    Opt::flag(b'C', Some(b'C'), None),
    Opt::value(b'P', Some(b'P'), None),
    Opt::flag(b'i', Some(b'i'), None),
    Opt::flag(b'q', Some(b'q'), None),
    Opt::flag(b'r', Some(b'r'), None),
    Opt::flag(b'v', Some(b'v'), None),
];

/// `aio_read`
pub(super) fn read(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, READ, check_pattern)?;
    if letters.has(b'i') {
        // There are no statistics that it could be counted in.
        shell.line("injecting invalid read request");
        return Ok(());
    }
    let (offset, lens) = offset_and_lengths(&letters)?;
    let len = lens.iter().sum();
    let mut buffer = Buffer::new(len, 0, shell.misalign)?;
    let image = shell.image();
    buffer.cover(image.inside(offset, len));
    let byte = letters.pattern()?;
    let verbose = letters.has(b'v');
    let story = shell.story(&letters, ("read", "readv"), offset, len);
    let done = move |result: block::Result<()>, buffer: Buffer| {
        let data = buffer.whole();
        let wrong = byte.and_then(|byte| mismatch(data, byte, offset));
        let seen = if verbose {
            dump(data, offset)
        } else {
            String::new()
        };
        story.tell(&result, wrong, seen);
    };
    let backend = shell.backend();
    let request = image
        .session
        .home
        .with(|| backend.aio_pread(offset, buffer, done));
    shell.submitted(request)
}

const WRITE: &[Opt<u8>] = &[
    Opt::flag(b'C', Some(b'C'), None),
    Opt::flag(b'f', Some(b'f'), None),
    Opt::flag(b'i', Some(b'i'), None),
    Opt::flag(b'q', Some(b'q'), None),
    Opt::flag(b'r', Some(b'r'), None),
    Opt::flag(b'u', Some(b'u'), None),
    Opt::flag(b'z', Some(b'z'), None),
    Opt::value(b'P', Some(b'P'), None),
];

/// `aio_write`
pub(super) fn write(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, WRITE, check_pattern)?;
    if letters.operands.len() < 2 {
        return Err(Failure::Usage);
    }
    let has = |letter| letters.has(letter);
    let refused = [
        (
            has(b'z') && letters.operands.len() != 2,
            "-z supports only a single length parameter",
        ),
        (has(b'u') && !has(b'z'), "-u requires -z to be specified"),
        (
            has(b'z') && has(b'r'),
            "cannot combine zero write with registered I/O buffer",
        ),
    ];
    if let Some((_, why)) = refused.iter().find(|(wrong, _)| *wrong) {
        return Err(Failure::Result((*why).into()));
    }
    if has(b'i') {
        shell.line("injecting invalid write request");
        return Ok(());
    }
    let mut flags = shell.write_flags(has(b'f'));
    let names = ("wrote", "aio_write");
    if has(b'z') {
        let offset = args::bytes(&letters.operands[0])?;
        let len = args::bytes(&letters.operands[1])?;
        flags.set(RequestFlags::MAY_UNMAP, has(b'u'));
        let story = shell.story(&letters, names, offset, len);
        if let Err(error) = shell.image().grow_to(offset, len) {
            story.tell(&Err(error), None, String::new());
            return Ok(());
        }
        let done = move |result: block::Result<()>| story.tell(&result, None, String::new());
        let backend = shell.backend();
        let home = &shell.image().session.home;
        let request = home.with(|| backend.aio_pwrite_zeroes(offset, len, flags, done));
        return shell.submitted(request);
    }
    let (offset, lens) = offset_and_lengths(&letters)?;
    let len = lens.iter().sum();
    let byte = letters.pattern()?.unwrap_or(DEFAULT_PATTERN);
    let buffer = Buffer::new(len, byte, shell.misalign)?;
    let story = shell.story(&letters, names, offset, len);
    let image = shell.image();
    let prepared = image
        .check_first_sector(offset, &buffer)
        .and_then(|()| image.grow_to(offset, len));
    if let Err(error) = prepared {
        story.tell(&Err(error), None, String::new());
        return Ok(());
    }
    let done = move |result: block::Result<()>, _| story.tell(&result, None, String::new());
    let backend = shell.backend();
    let home = &image.session.home;
    let request = home.with(|| backend.aio_pwrite(offset, buffer, flags, done));
    shell.submitted(request)
}

/// `aio_flush`
pub(super) fn flush(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    let image = shell.image();
    while image.is_busy() {
        image.session.home.poll(true);
    }
    Ok(())
}
