//! What drivers say to people: corruption that a request ran into, on standard error, as the
//! reference's drivers do it.

use std::io::{self, Write as _};

use log::{LevelFilter, Log, Metadata, Record};

/// Shows records of drivers that are meant to be seen.
struct Events;

impl Log for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == coblock::qcow2::EVENTS
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // The target is the driver's name.
            let line = format!("{}: {}\n", record.target(), record.args());
            // When standard error is gone there is nobody left to tell.
            let _ = io::stderr().lock().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// From now on such records are shown.
pub fn show() {
    static EVENTS: Events = Events;
    // Another logger is there only where somebody made it before, and it decides then.
    if log::set_logger(&EVENTS).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
}
