//! What the reference's programs have in common: version, trace events, objects, warnings about
//! images.

use std::ffi::OsStr;

use crate::image_opts::Pairs;
use crate::output::Output;

/// The version of the reference whose command lines we follow.
const REFERENCE: &str = "10.0.2";

/// Formats that images can have; the others of the reference are unknown here.
pub const FORMATS: &str = "copy-on-read file null-co qcow2 raw throttle";

/// Scripts read the first number, to know which options there are: it is the reference's.
pub fn version_line(name: &str) -> String {
    format!(
        "{name} version {REFERENCE} (coblock {})",
        env!("CARGO_PKG_VERSION")
    )
}

/// `--trace`: the reference warns about events that it does not have; we have none at all.
///
/// # Errors
/// The sentence for what cannot be done without events.
pub fn trace(value: &OsStr, out: &Output) -> Result<(), String> {
    let text = value.to_string_lossy();
    let pairs = Pairs::parse(&text, Some("enable"));
    for (key, value) in pairs.iter() {
        match key {
            "enable" if value == "help" || value == "?" => {}
            "enable" => out.warning(format!("trace event '{value}' does not exist")),
            "events" | "file" => return Err(format!("--trace {key}=: there are no trace events")),
            _ => return Err(format!("Invalid parameter '{key}'")),
        }
    }
    Ok(())
}

/// Options that were given as switches, which the reference discourages.
pub fn warn_switches(pairs: &Pairs, out: &Output) {
    for (given, meant) in &pairs.switches {
        out.warning(format!(
            "short-form boolean option '{given}' deprecated\nPlease use {meant} instead"
        ));
    }
}

/// A raw image whose format nobody gave is about to be written.
pub fn warn_probed_raw(out: &Output, shown: &str) {
    out.note(format!(
        "WARNING: Image format was not specified for '{shown}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 \
         will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions."
    ));
}
