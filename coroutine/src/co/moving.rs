//! Really moving a coroutine to another home (rule 3.10, "reschedule self"): unsafe, and apart from
//! everything else.
//!
//! ```text
//!   old thread, in the coroutine      old thread, its home                 new thread, its home
//!     move_to(home, post)
//!       post(Departure) ------------> (a bottom half keeps it)
//!       suspends, `Waiting`
//!                                     departure.depart():
//!                                       not bound to a thread any more
//!                                       home.schedule(Ready) -----------> Ready::enter():
//!                                                                           bound to this thread
//!     ... goes on here <--------------------------------------------------- resumes
//! ```
//! First suspended, then scheduled: otherwise the new home could enter a coroutine that still runs.
//! Wake handles from before the move still work: a wake that reaches the old home is passed on to
//! the new one.

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Co, Described, with_thread};
use crate::schedule::{Ready, Schedule};
use crate::stack::control::{Control, Phase};

/// A coroutine that has said where it wants to go, and is about to suspend. Any thread may keep it;
/// only the old one may let it depart.
#[must_use = "the coroutine waits until it departs"]
pub struct Departure {
    control: &'static Control,
    life: u64,
    to: Arc<dyn Schedule>,
    at: &'static Location<'static>,
}

impl Co {
    /// Moves the running coroutine to `home` and its thread; in its own home it does nothing (rule
    /// 3.10).
    ///
    /// `post` must see to it that the old home calls [`Departure::depart`] later, on the old
    /// thread, outside coroutines: a bottom half, say. When this returns, the coroutine runs in
    /// `home`.
    ///
    /// # Safety
    /// Everything on the coroutine's stack must bear to go on on another thread:
    /// - values that are not `Send` (an `Rc` shared with the old thread, a guard of a thread's
    ///   lock) must not be there, nor a reference that [`Co::home`] gave;
    /// - if the coroutine is driven by hand, its handle must not be used any more, not even
    ///   dropped, once it runs on another thread;
    /// - no reference to a thread-local may live over the call. The compiler may keep the *address*
    ///   of a thread-local over it, too: no function that is on the stack now may touch the same
    ///   thread-local before and after the call, directly or through what is inlined into it.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`].
    #[inline(never)]
    #[track_caller]
    pub unsafe fn move_to(&self, home: &Arc<dyn Schedule>, post: impl FnOnce(Departure)) {
        let at = Location::caller();
        self.refuse_unless_running("moved to another home", at);
        self.refuse_where_none_may(at);
        if self.home().is_some_and(|own| Arc::ptr_eq(own, home)) {
            return;
        }
        post(Departure {
            control: self.control(),
            life: self.id(),
            to: home.clone(),
            at,
        });
        self.wait_for("the move to another home", at, |_| {});
    }
}

impl Departure {
    /// Hands the coroutine over to its new home. On the old thread, after the coroutine has
    /// suspended.
    ///
    /// # Panics
    /// If the coroutine has not suspended yet, or on another thread than the one that it leaves.
    #[track_caller]
    pub fn depart(self) {
        let Departure {
            control,
            life,
            to,
            at,
        } = self;
        let here = with_thread(crate::pool::Thread::number);
        assert!(
            control.life.load(Ordering::Acquire) == life
                && control.thread.load(Ordering::Relaxed) == here,
            "a coroutine that wants to move (asked for at {at}) departs at {} from another thread",
            Location::caller()
        );
        assert!(
            control.phase.get() == Phase::Waiting,
            "{} departs at {} before it has suspended",
            Described(control),
            Location::caller()
        );
        control.detached.set(true);
        control.phase.set(Phase::Suspended);
        control.moved.set(true);
        // For wakes that still go to the old home.
        *control
            .forward
            .lock()
            .expect("nothing panics under this lock") = Some((life, to.clone()));
        // SAFETY: this thread owns the life (checked), which is suspended in `move_to`, where no
        // reference to its home lives.
        unsafe { control.drop_home(|| ()) };
        // SAFETY: as above; it has none now.
        unsafe { control.set_home(&to) };
        control.thread.store(0, Ordering::Release);
        to.schedule(Ready::first(control, life, &to, at));
    }
}

/// Where a wake of a life that is not bound to the calling thread shall go: to the home that it has
/// moved to.
pub(crate) fn forwarded(control: &Control, life: u64) -> Option<Arc<dyn Schedule>> {
    let forward = control
        .forward
        .lock()
        .expect("nothing panics under this lock");
    forward
        .as_ref()
        .filter(|(moved, _)| *moved == life)
        .map(|(_, home)| home.clone())
}

/// Ends the forwarding of a life that is over.
#[cold]
pub(super) fn forget(control: &Control) {
    control.moved.set(false);
    let forward = control
        .forward
        .lock()
        .expect("nothing panics under this lock")
        .take();
    drop(forward);
}
