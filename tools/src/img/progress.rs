//! How far a command is, as the reference shows it: `    (12.50/100%)`, over and over on one line.
//!
//! Without `-p` nobody sees it, until the program gets SIGUSR1: then the next step tells it once,
//! on standard error.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGUSR1;

use crate::output::{Output, os_message};

/// Smaller steps are not worth a line.
const STEP_PERCENT: f32 = 2.0;

/// How far a command is.
pub(super) struct Progress {
    shown: bool,
    /// The user sent a signal.
    asked: Arc<AtomicBool>,
    /// Percent, and how many of them were told. So exact and no more, as the reference counts them:
    /// its rounding shows.
    done: f32,
    told: f32,
}

impl Progress {
    /// At the beginning; nothing is printed yet.
    ///
    /// # Errors
    /// The signal cannot be watched.
    pub(super) fn new(shown: bool) -> Result<Self, String> {
        let asked = Arc::default();
        signal_hook::flag::register(SIGUSR1, Arc::clone(&asked))
            .map_err(|error| format!("signals: {}", os_message(&error)))?;
        Ok(Self {
            shown,
            asked,
            done: 0.0,
            told: 0.0,
        })
    }

    /// Tells that nothing is done yet.
    pub(super) fn begin(&self, out: &mut Output) {
        if self.shown {
            self.tell(out);
        }
    }

    /// `part` more of `whole` is done.
    #[expect(clippy::cast_precision_loss, reason = "two decimals are printed")]
    pub(super) fn add(&mut self, part: u64, whole: u64, out: &mut Output) {
        self.done = (self.done + part as f32 / whole as f32 * 100.0).min(100.0);
        if self.asked.swap(false, Ordering::Relaxed) && !self.shown {
            out.note(self.text());
        }
        #[expect(clippy::float_cmp, reason = "the reference does so")]
        let is_end = self.done == 100.0;
        if self.shown && (self.done - self.told > STEP_PERCENT || is_end) {
            self.told = self.done;
            self.tell(out);
        }
    }

    /// Ends the line.
    pub(super) fn end(&self, out: &mut Output) {
        if self.shown {
            out.line("");
        }
    }

    fn tell(&self, out: &mut Output) {
        out.text(format!("{}\r", self.text()));
        out.flush();
    }

    fn text(&self) -> String {
        format!("    ({:.2}/100%)", self.done)
    }
}
