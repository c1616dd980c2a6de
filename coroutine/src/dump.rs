//! Every coroutine of a thread, on request: who waits, for what, where, since when ([`dump`]).
//!
//! A suspended coroutine tells its backtrace itself: it is resumed for just that, captures it on
//! its own stack, and suspends again; so no unwinder has to know what a stack at rest looks like.

use std::backtrace::Backtrace;
use std::fmt;
use std::panic::Location;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::co::{self, describe, with_thread};
use crate::stack;
use crate::stack::control::{Control, Phase};

/// What a thread's coroutines do; its `Display` is for people.
#[derive(Debug)]
#[non_exhaustive]
pub struct Dump {
    /// The live coroutines of the calling thread, in order of their creation.
    pub standing: Vec<Standing>,
    /// How many more live on other threads, or have not begun.
    pub elsewhere: usize,
}

/// Where one coroutine stands.
#[derive(Debug)]
#[non_exhaustive]
pub struct Standing {
    /// Number of its life.
    pub id: u64,
    /// The name that it was created with.
    pub name: &'static str,
    /// Where it was created.
    pub created: &'static Location<'static>,
    /// What it does, in words.
    pub state: &'static str,
    /// The operation that it waits for.
    pub waits_for: Option<&'static str>,
    /// Where it suspended; `None`: it runs, or has not begun.
    pub at: Option<&'static Location<'static>>,
    /// Nanoseconds since it was last entered, by the clock and to the accuracy of
    /// [`note_time`](crate::note_time): with an event loop of `coblock-aio`, the beginning of that
    /// pass of the loop. `None`: nobody had noted the time.
    pub entered_ago: Option<u64>,
    /// Name of its home.
    pub home: Option<String>,
    /// High-water mark of its stack since that was last trimmed, in bytes, a multiple of the page
    /// size.
    pub stack_used: usize,
    /// All its calls, the innermost first; if asked for, and it has suspended.
    pub backtrace: Option<Backtrace>,
}

/// What the live coroutines of the calling thread do; with `backtraces`, each suspended one tells
/// its calls.
///
/// From anywhere, even inside a coroutine. To see those of another thread, ask there: post it to
/// the home. A backtrace needs a few KiB of the suspended coroutine's own stack.
pub fn dump(backtraces: bool) -> Dump {
    let mut all = Dump {
        standing: Vec::new(),
        elsewhere: 0,
    };
    with_thread(|thread| {
        stack::for_each_control(|control| {
            let id = control.life.load(Ordering::Acquire);
            if id == 0 || id & crate::stack::control::KEPT != 0 {
                return;
            }
            if control.thread.load(Ordering::Acquire) != thread.number() {
                all.elsewhere += 1;
                return;
            }
            let mut standing = look(control, id, thread.now.get());
            if backtraces {
                standing.backtrace = co::backtrace_of(thread, control);
            }
            all.standing.push(standing);
        });
    });
    all.standing.sort_by_key(|standing| standing.id);
    all
}

/// A coroutine of the calling thread.
fn look(control: &'static Control, id: u64, now: u64) -> Standing {
    let phase = control.phase.get();
    let rests = control.suspended.get()
        && matches!(phase, Phase::Suspended | Phase::Waiting | Phase::Queued);
    Standing {
        id,
        name: control.name.get(),
        created: control.created.get(),
        state: describe(phase),
        waits_for: (phase == Phase::Waiting).then(|| control.waits_for.get()),
        at: rests.then(|| control.suspended_at.get()),
        entered_ago: match control.entered_at.get() {
            then if then != 0 && phase != Phase::New => Some(now.saturating_sub(then)),
            _ => None,
        },
        home: co::Co::of(control)
            .home()
            .map(|home| home.name().to_string()),
        stack_used: stack::high_water(control),
        backtrace: None,
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "life {} '{}': {}", self.id, self.name, self.state)?;
        if let Some(what) = self.waits_for {
            write!(f, " '{what}'")?;
        }
        if let Some(at) = self.at {
            write!(f, " at {at}")?;
        }
        if let Some(ns) = self.entered_ago {
            let what = if self.at.is_some() {
                "since"
            } else {
                "entered"
            };
            write!(f, ", {what} {:?} ago", Duration::from_nanos(ns))?;
        }
        write!(f, "; created at {}", self.created)?;
        if let Some(home) = &self.home {
            write!(f, "; home '{home}'")?;
        }
        write!(f, "; {} KiB of stack used", self.stack_used >> 10)?;
        match &self.backtrace {
            Some(backtrace) => write!(f, "\n{backtrace}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for standing in &self.standing {
            writeln!(f, "{standing}")?;
        }
        write!(
            f,
            "{} here, {} elsewhere",
            self.standing.len(),
            self.elsewhere
        )
    }
}
