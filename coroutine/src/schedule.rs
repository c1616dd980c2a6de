//! Who runs a coroutine again, and how it is asked to: [`Schedule`], [`Ready`], [`WakeHandle`].
//!
//! ```text
//!   WakeHandle::wake()                                      rule 3.10
//!      |
//!      +-- its life is over ............................... counted, nothing else
//!      +-- another thread drives its home ................. home.schedule(Ready)  -->  Ready::enter()
//!      +-- here, on the leader ............................ resumed now
//!      +-- here, in a coroutine ........................... queued on the running one (rule 1.9)
//!      +-- here, and it runs (or has entered another) ..... its next suspend returns at once
//! ```

use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::co::{self, Described, with_thread};
use crate::pool::{Thread, bump};
use crate::stack::control::{Control, Phase};

/// A home: whoever runs coroutines on one thread, an event loop mostly. Door 1 of the three between
/// the crates.
pub trait Schedule: Send + Sync {
    /// Arranges that the home calls [`Ready::enter`], on its own stack, first in, first out. From
    /// any thread; must not enter by itself.
    fn schedule(&self, ready: Ready);

    /// Whether the calling thread drives this home right now.
    fn is_home(&self) -> bool;

    /// For messages.
    fn name(&self) -> &str;
}

/// One wake of one life of a coroutine, on its way to its home. Any thread may carry it; the home
/// enters it.
#[must_use = "a coroutine waits for this wake"]
pub struct Ready {
    control: &'static Control,
    life: u64,
    /// The coroutine is bound to no thread yet (it has never run, or it moves), and this is the
    /// only thing that may touch it: the home where it shall go on.
    first: Option<Arc<dyn Schedule>>,
    by: &'static Location<'static>,
}

impl Ready {
    pub(crate) fn first(
        control: &'static Control,
        life: u64,
        home: &Arc<dyn Schedule>,
        by: &'static Location<'static>,
    ) -> Ready {
        Ready {
            control,
            life,
            first: Some(home.clone()),
            by,
        }
    }

    /// Resumes the coroutine; on the thread that drives its home. In a coroutine it is queued
    /// instead (rule 1.9).
    ///
    /// False: stale (its life is over: counted) or spurious (it is not suspended; then the wake is
    /// remembered).
    ///
    /// # Panics
    /// With the panic of the coroutine; or on a thread that is not its home's.
    #[track_caller]
    pub fn enter(mut self) -> bool {
        let (control, life) = (self.control, self.life);
        let caller = Location::caller();
        with_thread(|thread| {
            if control.life.load(Ordering::Acquire) != life {
                bump(&thread.stale_wakes);
                return false;
            }
            if let Some(home) = &self.first {
                // From its first entry on, a coroutine is bound to its thread: this must be the
                // right one.
                assert!(
                    home.is_home(),
                    "{} entered at {caller}, but this thread does not drive its home '{}'",
                    Described(control),
                    home.name()
                );
                co::bind(thread, control);
                // Not `Drop`'s to clean up any more.
                self.first = None;
            }
            control.mark.clear(life);
            wake_here(thread, control, life, caller)
        })
    }
}

impl Drop for Ready {
    /// A scheduler that drops a wake loses it; a coroutine that never ran is dropped with it. One
    /// that was moving between homes waits for ever.
    fn drop(&mut self) {
        let control = self.control;
        control.mark.clear(self.life);
        if self.first.is_some()
            && control.life.load(Ordering::Acquire) == self.life
            && control.phase.get() == Phase::New
        {
            with_thread(|thread| co::drop_unstarted(thread, control));
        }
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ready(life {}, scheduled at {})", self.life, self.by)
    }
}

/// Wakes one life of one coroutine, from any thread. A stale one counts, and does nothing else.
#[derive(Clone)]
pub struct WakeHandle {
    control: &'static Control,
    life: u64,
    home: Option<Arc<dyn Schedule>>,
}

impl WakeHandle {
    pub(crate) fn new(
        control: &'static Control,
        life: u64,
        home: Option<Arc<dyn Schedule>>,
    ) -> WakeHandle {
        WakeHandle {
            control,
            life,
            home,
        }
    }

    /// Number of the life that it wakes; see [`Co::id`](crate::Co::id).
    pub fn id(&self) -> u64 {
        self.life
    }

    /// Wakes the coroutine (rule 3.10): see the head of this file for what happens where.
    ///
    /// # Panics
    /// With the panic of a coroutine that it resumes now; or if the coroutine has no home and
    /// belongs to another thread.
    #[inline(never)]
    #[track_caller]
    pub fn wake(&self) {
        let caller = Location::caller();
        let WakeHandle {
            control,
            life,
            ref home,
        } = *self;
        if control.life.load(Ordering::Acquire) != life {
            return with_thread(|thread| bump(&thread.stale_wakes));
        }
        if let Some(home) = home
            && !home.is_home()
        {
            control.set_marked_by(caller);
            if control.mark.set(life) {
                home.schedule(Ready {
                    control,
                    life,
                    first: None,
                    by: caller,
                });
            }
            return;
        }
        with_thread(|thread| {
            wake_here(thread, control, life, caller);
        });
    }

    /// Asks the home to resume the coroutine later, even from its own thread: first in, first out
    /// (rule 3.10 "schedule").
    ///
    /// # Panics
    /// If the coroutine has no home.
    #[track_caller]
    pub fn schedule(&self) {
        let caller = Location::caller();
        let WakeHandle {
            control,
            life,
            ref home,
        } = *self;
        if control.life.load(Ordering::Acquire) != life {
            return with_thread(|thread| bump(&thread.stale_wakes));
        }
        let Some(home) = home else {
            panic!("a coroutine without a home (life {life}) was scheduled at {caller}");
        };
        control.set_marked_by(caller);
        if control.mark.set(life) {
            home.schedule(Ready {
                control,
                life,
                first: None,
                by: caller,
            });
        }
    }
}

impl fmt::Debug for WakeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let home = self.home.as_ref().map_or("none", |home| home.name());
        write!(f, "WakeHandle(life {}, home {home})", self.life)
    }
}

/// Wakes a live coroutine whose home this thread drives, or which has none. False: it is not
/// suspended.
fn wake_here(
    thread: &Thread,
    control: &'static Control,
    life: u64,
    caller: &'static Location<'static>,
) -> bool {
    // Checked before anything else of it is read: a coroutine stays on its thread (rule 1.8).
    if control.thread.load(Ordering::Acquire) != thread.number() {
        return wake_elsewhere(control, life, caller);
    }
    match control.phase.get() {
        Phase::New | Phase::Suspended => {
            if control.homed().get() {
                control.detached.set(true);
            }
            control.set_marked_by(caller);
            co::resume_or_queue(thread, control);
            true
        }
        // It runs soon, and looks at its condition then.
        Phase::Queued => true,
        phase @ (Phase::Running | Phase::Roused | Phase::Entered | Phase::Waiting) => {
            control.pending.set(true);
            if phase == Phase::Running {
                control.phase.set(Phase::Roused);
            }
            bump(&thread.stale_wakes);
            false
        }
        Phase::Free | Phase::Finished | Phase::Kept => {
            unreachable!("a live coroutine has not finished")
        }
    }
}

/// A wake that has reached a thread which does not drive the coroutine's home: passed on if it has
/// moved since, else refused.
#[cold]
#[inline(never)]
fn wake_elsewhere(
    control: &'static Control,
    life: u64,
    caller: &'static Location<'static>,
) -> bool {
    let Some(home) = co::forwarded(control, life) else {
        panic!(
            "a coroutine (life {life}) was woken at {caller} on a thread that does not drive its \
             home"
        );
    };
    post(control, life, &home, caller);
    true
}

/// Hands a wake over to the home, if it is the first one since the home has taken the last.
fn post(
    control: &'static Control,
    life: u64,
    home: &Arc<dyn Schedule>,
    by: &'static Location<'static>,
) {
    control.set_marked_by(by);
    if control.mark.set(life) {
        home.schedule(Ready {
            control,
            life,
            first: None,
            by,
        });
    }
}
