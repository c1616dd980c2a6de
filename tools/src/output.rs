//! How results and messages leave the program.
//!
//! Results are collected and written when the program ends or says so: with standard output and
//! standard error sent to one place, messages then come where scripts written for the reference
//! expect them. Messages begin with the name that the program was called by.

use std::ffi::OsStr;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;

/// Results are collected up to so many bytes, as by the C library.
const COLLECTED_MAX: usize = 4096;

/// Status when something failed.
pub const FAILURE: u8 = 1;

/// The two ways out: collected results, immediate messages.
#[derive(Debug)]
pub struct Output {
    /// Begins every message.
    name: String,
    collected: Vec<u8>,
    /// A terminal sees results as they come.
    immediate: bool,
    /// Standard output is closed or failed; nothing more is written to it.
    broken: bool,
    status_of_break: Option<u8>,
}

impl Output {
    /// For a program that was called `name`.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            collected: Vec::new(),
            immediate: io::stdout().is_terminal(),
            broken: false,
            status_of_break: None,
        }
    }

    /// The name that messages begin with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Collects one line of results, which may repeat file names that are no text.
    pub fn line(&mut self, line: impl AsRef<[u8]>) {
        self.collected.extend_from_slice(line.as_ref());
        self.text("\n");
    }

    /// Collects results that are no whole line, or many.
    pub fn text(&mut self, text: impl AsRef<[u8]>) {
        self.collected.extend_from_slice(text.as_ref());
        if self.immediate || self.collected.len() >= COLLECTED_MAX {
            self.flush();
        }
    }

    /// Writes what was collected.
    ///
    /// A reader that went away ends the output without a word, as its owner wanted; another failure
    /// is reported. Both show in the exit status that [`Output::finish`] gives.
    pub fn flush(&mut self) {
        let collected = std::mem::take(&mut self.collected);
        if self.broken || collected.is_empty() {
            return;
        }
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(&collected).and_then(|()| stdout.flush()) {
            self.broken = true;
            self.status_of_break = Some(FAILURE);
            if error.kind() != io::ErrorKind::BrokenPipe {
                self.error(format!("write error: {}", os_message(&error)));
            }
        }
    }

    /// Reports an error.
    pub fn error(&self, message: impl AsRef<[u8]>) {
        self.message(&[self.name.as_bytes(), b": ", message.as_ref(), b"\n"]);
    }

    /// Reports a warning.
    pub fn warning(&self, message: impl AsRef<[u8]>) {
        self.message(&[
            self.name.as_bytes(),
            b": warning: ",
            message.as_ref(),
            b"\n",
        ]);
    }

    /// Writes `text` to standard error as it is, one newline added.
    pub fn note(&self, text: impl AsRef<[u8]>) {
        self.message(&[text.as_ref(), b"\n"]);
    }

    fn message(&self, parts: &[&[u8]]) {
        // One write a message: lines of several programs on one terminal do not mix. When standard
        // error is gone there is nobody left to tell.
        let _ = io::stderr().lock().write_all(&parts.concat());
    }

    /// Writes the rest; the status to exit with, which is no success if results were lost.
    pub fn finish(mut self, status: u8) -> u8 {
        self.flush();
        match self.status_of_break {
            Some(lost) if status == 0 => lost,
            _ => status,
        }
    }
}

/// The kernel's words for an I/O error, without Rust's addition of the number.
pub fn os_message(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text
            .strip_suffix(&format!(" (os error {code})"))
            .unwrap_or(&text)
            .to_owned(),
        None => text,
    }
}

/// A file name for a message: the bytes between, text around.
pub fn with_name(before: &str, name: &OsStr, after: &str) -> Vec<u8> {
    [before.as_bytes(), name.as_bytes(), after.as_bytes()].concat()
}

/// A size for people: three digits and a binary unit, the next unit from a thousand on.
///
/// `1023 * 1024` is therefore `0.999 MiB`, and 999.5 KiB is `1e+03 KiB`, as the reference prints
/// them.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && u128::from(bytes) >= 1000_u128 << (10 * unit) {
        unit += 1;
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// `%0.3g` of the C library for a value that is not negative and below 1e15.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    // Rust rounds `{:.2e}` as C does; the exponent decides the form, as in C.
    let scientific = format!("{value:.2e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if (-4..3).contains(&exponent) {
        let decimals = usize::try_from(2 - exponent).unwrap_or(0);
        trim(&format!("{value:.decimals$}"))
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{}e{sign}{:02}", trim(digits), exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row was read from the reference program, version 10.0.2, but the one below 512 bytes.
    #[test]
    fn sizes_for_people_look_like_the_references() {
        for (bytes, want) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10_240, "10 KiB"),
            (100_352, "98 KiB"),
            (197_120, "192 KiB"),
            (1_000_448, "977 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_048_576, "1 MiB"),
            (3_510_272, "3.35 MiB"),
            (1_072_693_248, "0.999 GiB"),
            (1_047_527_424, "999 MiB"),
            (1_073_741_824_000, "0.977 TiB"),
            (1_073_634_449_920, "1e+03 GiB"),
            (1_099_511_627_776_000, "0.977 PiB"),
            (1 << 50, "1 PiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), want, "{bytes}");
        }
    }

    #[test]
    fn kernel_messages_come_without_numbers() {
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(os_message(&error), "No such file or directory");
    }
}
