//! `read`, `readv`, `write`, `writev`, `discard`, `flush`: requests that are over when the command
//! is.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::time::Instant;

use coblock::aio::{Gather, Scatter};
use coblock::block::{self, MAX_REQUEST, RequestFlags};
use coblock::coroutine::Co;

use super::Shell;
use super::args::{self, Buffer, DEFAULT_PATTERN, SECTOR};
use super::commands::{Call, Failure};
use super::report::{Report, dump};
use crate::getopt::{Getopt, Opt};
use crate::output::os_message;

/// Options by their letter.
type Letter = Opt<u8>;

const fn flag(letter: u8) -> Letter {
    Opt::flag(letter, Some(letter), None)
}

const fn value(letter: u8) -> Letter {
    Opt::value(letter, Some(letter), None)
}

/// The letters of a call with their values, and its other words.
pub(super) struct Letters {
    given: Vec<(u8, String)>,
    pub(super) operands: Vec<String>,
}

impl Letters {
    /// Takes the words of a call apart; `check` sees each option in turn.
    pub(super) fn new(
        call: &Call<'_>,
        table: &'static [Letter],
        mut check: impl FnMut(u8, &str) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let mut getopt = Getopt::letters(table, call.words.iter().map(OsString::from).collect());
        let mut given = Vec::new();
        while let Some((letter, value)) = getopt.next_option()? {
            let value = value.unwrap_or_default().to_string_lossy().into_owned();
            check(letter, &value)?;
            given.push((letter, value));
        }
        let operands = getopt.operands().into_iter();
        let operands = operands.map(|word| word.to_string_lossy().into_owned());
        Ok(Self {
            given,
            operands: operands.collect(),
        })
    }

    /// Was this letter given?
    pub(super) fn has(&self, letter: u8) -> bool {
        self.given.iter().any(|(given, _)| *given == letter)
    }

    /// The last value of this letter.
    fn value(&self, letter: u8) -> Option<&str> {
        let mut given = self.given.iter().rev();
        let found = given.find(|(given, _)| *given == letter);
        found.map(|(_, value)| value.as_str())
    }

    /// The byte of `-P`, which was checked.
    pub(super) fn pattern(&self) -> Result<Option<u8>, Failure> {
        self.value(b'P').map(args::pattern).transpose()
    }

    fn two(&self) -> Result<(&str, &str), Failure> {
        match &self.operands[..] {
            [offset, len] => Ok((offset, len)),
            _ => Err(Failure::Usage),
        }
    }
}

/// Checks patterns where they stand on the line.
pub(super) fn check_pattern(letter: u8, value: &str) -> Result<(), Failure> {
    match letter {
        b'P' => args::pattern(value).map(|_| ()),
        _ => Ok(()),
    }
}

/// "read failed: ...", in the kernel's words.
pub(super) fn failed(what: &str, error: &block::Error) -> Failure {
    Failure::Result(format!(
        "{what} failed: {}",
        block::errno_text(error.errno())
    ))
}

/// Where a read is not what it should be.
pub(super) fn mismatch(data: &[u8], byte: u8, offset: u64) -> Option<String> {
    let differs = data.iter().any(|&b| b != byte);
    differs.then(|| {
        format!(
            "Pattern verification failed at offset {offset}, {} bytes",
            data.len()
        )
    })
}

/// Requests of the state of a virtual machine are counted in sectors.
fn check_sectors(offset: u64, len: u64) -> Result<(), Failure> {
    for (what, number) in [("offset", offset), ("count", len)] {
        if !number.is_multiple_of(SECTOR) {
            return Err(Failure::Result(format!(
                "{number} is not a sector-aligned value for '{what}'"
            )));
        }
    }
    Ok(())
}

/// No format of ours keeps the state of a virtual machine yet.
fn no_vm_state(what: &str) -> Failure {
    failed(
        what,
        &block::Error::new(
            block::ErrorKind::NotSupported,
            "the state of a virtual machine",
        ),
    )
}

impl Shell<'_> {
    /// Reads all of `buffer`, in pieces of these lengths; zeros where the last sector is not whole.
    fn read_pieces(&self, offset: u64, buffer: &mut Buffer, lens: &[u64]) -> block::Result<()> {
        let image = self.image();
        buffer.cover(image.inside(offset, buffer.len() as u64));
        let mut scatter = Scatter::new();
        let mut rest = &mut buffer[..];
        for len in lens {
            let len = usize::try_from(*len).unwrap_or(usize::MAX).min(rest.len());
            let (piece, behind) = rest.split_at_mut(len);
            scatter.push(piece);
            rest = behind;
        }
        let backend = &image.backend;
        let whole = scatter.as_iovec_mut();
        image
            .session
            .home
            .run(|co| backend.pread(co, offset, whole))
    }

    /// Writes all of `buffer`, in pieces of these lengths.
    fn write_pieces(
        &self,
        offset: u64,
        buffer: &Buffer,
        lens: &[u64],
        fua: bool,
    ) -> block::Result<()> {
        let image = self.image();
        image.check_first_sector(offset, buffer)?;
        image.grow_to(offset, buffer.len() as u64)?;
        let mut gather = Gather::new();
        let mut rest = &buffer[..];
        for len in lens {
            let len = usize::try_from(*len).unwrap_or(usize::MAX).min(rest.len());
            let (piece, behind) = rest.split_at(len);
            gather.push(piece);
            rest = behind;
        }
        let flags = self.write_flags(fua);
        let backend = &image.backend;
        let whole = gather.as_iovec();
        image
            .session
            .home
            .run(|co| backend.pwrite(co, offset, whole, flags))
    }

    /// Flags of a write: on stable storage where it, or the cache mode, says so.
    pub(super) fn write_flags(&self, fua: bool) -> RequestFlags {
        if fua || self.image().write_through {
            RequestFlags::FUA
        } else {
            RequestFlags::empty()
        }
    }

    /// Runs a request on the image.
    fn request(
        &self,
        run: impl FnOnce(&Co, &block::BlockBackend) -> block::Result<()>,
    ) -> block::Result<()> {
        let image = self.image();
        image.session.home.run(|co| run(co, &image.backend))
    }

    /// Prints what was read, and how long it took.
    fn report_read(&mut self, letters: &Letters, data: &[u8], offset: u64, began: Instant) {
        let took = began.elapsed();
        if letters.has(b'q') {
            return;
        }
        if letters.has(b'v') {
            self.text(dump(data, offset));
        }
        self.report("read", letters, offset, data.len() as u64, took);
    }

    /// Prints how long a request took, unless nobody wants to know.
    fn report(
        &mut self,
        verb: &'static str,
        letters: &Letters,
        offset: u64,
        len: u64,
        took: std::time::Duration,
    ) {
        if !letters.has(b'q') {
            let report = Report {
                verb,
                offset,
                len,
                took,
                machine: letters.has(b'C'),
            };
            self.text(report.lines());
        }
    }
}

const READ: &[Letter] = &[
    flag(b'b'),
    flag(b'C'),
    flag(b'p'),
    flag(b'q'),
    flag(b'r'),
    flag(b'v'),
    value(b'l'),
    value(b'P'),
    value(b's'),
];

/// `read`
pub(super) fn read(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, READ, |letter, value| match letter {
        b'l' | b's' => args::bytes(value).map(|_| ()),
        _ => check_pattern(letter, value),
    })?;
    let (offset, len) = letters.two()?;
    let (offset, len_word) = (args::bytes(offset)?, len);
    let len = args::bytes(len_word)?;
    if len > MAX_REQUEST {
        return Err(Failure::Result(format!(
            "length cannot exceed {MAX_REQUEST}, given {len_word}"
        )));
    }
    let pattern = letters.pattern()?;
    if pattern.is_none() && (letters.has(b'l') || letters.has(b's')) {
        return Err(Failure::Usage);
    }
    let start = letters.value(b's').map_or(Ok(0), args::bytes)?;
    let compared = letters
        .value(b'l')
        .map_or(Ok(len.saturating_sub(start)), args::bytes)?;
    if start > len || compared > len - start {
        return Err(Failure::Result(
            "pattern verification range exceeds end of read data".into(),
        ));
    }
    if letters.has(b'b') {
        check_sectors(offset, len)?;
        return Err(no_vm_state("read"));
    }
    let mut buffer = Buffer::new(len, 0, shell.misalign)?;
    let began = Instant::now();
    shell
        .read_pieces(offset, &mut buffer, &[len])
        .map_err(|error| failed("read", &error))?;
    let wrong = pattern.and_then(|byte| {
        let range = usize::try_from(start).ok()?..usize::try_from(start + compared).ok()?;
        mismatch(&buffer.whole()[range], byte, offset + start)
    });
    finish_read(shell, &letters, &buffer, offset, began, wrong)
}

const READV: &[Letter] = &[flag(b'C'), value(b'P'), flag(b'q'), flag(b'r'), flag(b'v')];

/// `readv`
pub(super) fn readv(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, READV, check_pattern)?;
    let (offset, lens) = offset_and_lengths(&letters)?;
    let mut buffer = Buffer::new(lens.iter().sum(), 0, shell.misalign)?;
    let began = Instant::now();
    shell
        .read_pieces(offset, &mut buffer, &lens)
        .map_err(|error| failed("readv", &error))?;
    let byte = letters.pattern()?;
    let wrong = byte.and_then(|byte| mismatch(buffer.whole(), byte, offset));
    finish_read(shell, &letters, &buffer, offset, began, wrong)
}

/// What is said of a read that succeeded, and perhaps is not what it should be.
fn finish_read(
    shell: &mut Shell<'_>,
    letters: &Letters,
    buffer: &Buffer,
    offset: u64,
    began: Instant,
    wrong: Option<String>,
) -> Result<(), Failure> {
    let failed = wrong.is_some();
    if let Some(wrong) = wrong {
        shell.line(wrong);
    }
    shell.report_read(letters, buffer.whole(), offset, began);
    if failed { Err(Failure::Told) } else { Ok(()) }
}

/// The operands of a request with several buffers.
pub(super) fn offset_and_lengths(letters: &Letters) -> Result<(u64, Vec<u64>), Failure> {
    match &letters.operands[..] {
        [offset, lens @ ..] if !lens.is_empty() => Ok((args::bytes(offset)?, args::lengths(lens)?)),
        _ => Err(Failure::Usage),
    }
}

const WRITE: &[Letter] = &[
    flag(b'b'),
    flag(b'c'),
    flag(b'C'),
    flag(b'f'),
    flag(b'n'),
    flag(b'p'),
    value(b'P'),
    flag(b'q'),
    flag(b'r'),
    value(b's'),
    flag(b'u'),
    flag(b'z'),
];

/// `write`
pub(super) fn write(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, WRITE, check_pattern)?;
    let (offset, len_word) = letters.two()?;
    let has = |letter| letters.has(letter);
    let refused = [
        (
            has(b'b') && has(b'z'),
            "-b and -z cannot be specified at the same time",
        ),
        (
            has(b'f') && (has(b'b') || has(b'c')),
            "-f and -b or -c cannot be specified at the same time",
        ),
        (has(b'n') && !has(b'z'), "-n requires -z to be specified"),
        (has(b'u') && !has(b'z'), "-u requires -z to be specified"),
        (
            has(b'z') && has(b'r'),
            "cannot combine zero write with registered I/O buffer",
        ),
        (
            [b'z', b'P', b's'].iter().filter(|&&l| has(l)).count() > 1,
            "Only one of -z, -P, and -s can be specified at the same time",
        ),
    ];
    if let Some((_, why)) = refused.iter().find(|(wrong, _)| *wrong) {
        return Err(Failure::Result((*why).into()));
    }
    let offset = args::bytes(offset)?;
    let len = args::bytes(len_word)?;
    if len > MAX_REQUEST && !has(b'n') {
        return Err(Failure::Result(format!(
            "length cannot exceed {MAX_REQUEST} without -n, given {len_word}"
        )));
    }
    if has(b'b') || has(b'c') {
        check_sectors(offset, len)?;
    }
    let began;
    let result = if has(b'z') {
        let mut flags = shell.write_flags(has(b'f'));
        flags.set(RequestFlags::MAY_UNMAP, has(b'u'));
        flags.set(RequestFlags::NO_FALLBACK, has(b'n'));
        began = Instant::now();
        shell.image().grow_to(offset, len).and_then(|()| {
            shell.request(|co, backend| backend.pwrite_zeroes(co, offset, len, flags))
        })
    } else {
        let byte = letters.pattern()?.unwrap_or(DEFAULT_PATTERN);
        let mut buffer = Buffer::new(len, byte, shell.misalign)?;
        if let Some(file) = letters.value(b's') {
            fill_from(&mut buffer, file)?;
        }
        began = Instant::now();
        if has(b'b') {
            return Err(no_vm_state("write"));
        }
        if has(b'c') {
            write_compressed(shell, offset, len)
        } else {
            shell.write_pieces(offset, &buffer, &[len], has(b'f'))
        }
    };
    result.map_err(|error| failed("write", &error))?;
    shell.report("wrote", &letters, offset, len, began.elapsed());
    Ok(())
}

/// Compressed clusters are only read.
fn write_compressed(shell: &Shell<'_>, offset: u64, len: u64) -> block::Result<()> {
    let kind = if offset.saturating_add(len) > shell.image().len() {
        block::ErrorKind::OutOfBounds
    } else {
        block::ErrorKind::NotSupported
    };
    Err(block::Error::new(
        kind,
        "compressed writes are not supported",
    ))
}

/// Fills a buffer with the content of a file, again and again.
fn fill_from(buffer: &mut Buffer, file: &str) -> Result<(), Failure> {
    let told = |error: std::io::Error| Failure::Note(format!("{file}: {}", os_message(&error)));
    let mut content = Vec::new();
    let file_handle = File::open(file).map_err(told)?;
    file_handle
        .take(buffer.len() as u64)
        .read_to_end(&mut content)
        .map_err(told)?;
    if content.is_empty() {
        return Err(Failure::Note(format!("{file}: file is empty")));
    }
    for piece in buffer.chunks_mut(content.len()) {
        piece.copy_from_slice(&content[..piece.len()]);
    }
    Ok(())
}

const WRITEV: &[Letter] = &[flag(b'C'), flag(b'f'), flag(b'q'), flag(b'r'), value(b'P')];

/// `writev`
pub(super) fn writev(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, WRITEV, check_pattern)?;
    let (offset, lens) = offset_and_lengths(&letters)?;
    let byte = letters.pattern()?.unwrap_or(DEFAULT_PATTERN);
    let len = lens.iter().sum();
    let buffer = Buffer::new(len, byte, shell.misalign)?;
    let began = Instant::now();
    shell
        .write_pieces(offset, &buffer, &lens, letters.has(b'f'))
        .map_err(|error| failed("writev", &error))?;
    shell.report("wrote", &letters, offset, len, began.elapsed());
    Ok(())
}

const DISCARD: &[Letter] = &[flag(b'C'), flag(b'q')];

/// `discard`
pub(super) fn discard(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let letters = Letters::new(call, DISCARD, |_, _| Ok(()))?;
    let (offset, len_word) = letters.two()?;
    let offset = args::bytes(offset)?;
    let len = args::bytes(len_word)?;
    if len > MAX_REQUEST {
        return Err(Failure::Result(format!(
            "length cannot exceed {MAX_REQUEST}, given {len_word}"
        )));
    }
    let began = Instant::now();
    let inside = shell.image().inside(offset, len);
    shell
        .request(|co, backend| backend.pdiscard(co, offset, inside))
        .map_err(|error| failed("discard", &error))?;
    shell.report("discard", &letters, offset, len, began.elapsed());
    Ok(())
}

/// `flush`
pub(super) fn flush(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    // The reference has no words for a flush that failed.
    shell
        .request(|co, backend| backend.flush(co))
        .map_err(|_| Failure::Told)
}
