//! `coblock`: one program, by its first word or by the name it was called.
//!
//! ```text
//!   coblock bench ...              the main job: a real image under concurrent load, verified
//!   coblock img create|info|...    the reference's image tool: its options, output and exit codes
//!   coblock io -c ...              the reference's disk exerciser: its options, commands and output
//!   SOMETHING-img, SOMETHING-io    the same, through links of such names, which messages then begin with
//! ```
#![forbid(unsafe_code)]

mod bench;
mod events;
mod explain;
#[cfg(test)]
mod fuzz;
mod getopt;
mod image_opts;
mod img;
mod io;
mod json;
mod objects;
mod open;
mod output;
mod size;
mod spec;
mod standard;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use output::Output;

fn main() -> ExitCode {
    coblock::coroutine::install_overflow_handler();
    events::show();
    // A write past the limit of a file's size is an error like others, not the end of the program.
    // A signal that cannot be watched leaves the program as it was.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let mut words = std::env::args_os();
    let called = words.next().unwrap_or_default();
    let words: Vec<OsString> = words.collect();
    let name = Path::new(&called).file_name().unwrap_or_default();
    if name.as_bytes().ends_with(b"-img") {
        return run(&name.to_string_lossy(), |out| img::run(words, out));
    }
    if name.as_bytes().ends_with(b"-io") {
        let called = called.to_string_lossy();
        return run(&name.to_string_lossy(), |out| io::run(words, &called, out));
    }
    match words.first().map(|word| word.as_bytes()) {
        Some(b"img") => run("coblock img", |out| img::run(words[1..].to_vec(), out)),
        Some(b"io") => run("coblock io", |out| {
            io::run(words[1..].to_vec(), "coblock io", out)
        }),
        _ => bench::cli::run(words),
    }
}

/// Runs `command`, whose messages begin with `name`; the status to exit with.
fn run(name: &str, command: impl FnOnce(&mut Output) -> u8) -> ExitCode {
    let mut out = Output::new(name);
    let status = command(&mut out);
    ExitCode::from(out.finish(status))
}
