//! The resumer's side: it switches to a coroutine and, when control is back, runs what that has
//! woken, and ends its life if it is over.

use std::panic;
use std::sync::atomic::Ordering;

use super::{Described, moving, with_thread};
use crate::pool::{Thread, bump};
use crate::release::{Ended, Release};
use crate::stack::control::{Control, KEPT, Phase};

/// How a resume came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It suspended, or waits for an operation.
    Suspended,
    /// Its entry function returned.
    Finished,
}

/// Switches to `control` and comes back when it suspends or finishes; then runs what it has woken
/// (rule 1.9).
///
/// `control` is owned by this thread and in phase `New` (with its thread set), `Suspended`,
/// `Waiting` or `Queued`; `running` is [`Control::running`]. A panic inside comes out here, after
/// everything that the coroutine had woken has run.
#[inline(always)]
pub(crate) fn resume(thread: &Thread, control: &'static Control, running: Phase) -> State {
    switch(thread, control, running);
    if control.phase.get() == Phase::Finished {
        finish(thread, control);
        return State::Finished;
    }
    if control.woke().get() {
        let woken = control.take_wakes().map(|(first, _)| first);
        run_woken(thread, woken, None);
    }
    State::Suspended
}

/// The switch itself, with the bookkeeping of who runs.
#[inline(always)]
fn switch(thread: &Thread, control: &'static Control, running: Phase) {
    debug_assert!(
        matches!(
            control.phase.get(),
            Phase::New | Phase::Suspended | Phase::Waiting | Phase::Queued
        ),
        "a resumed coroutine does not run already: {:?}",
        control.phase.get()
    );
    // One load of a global; only while some thread panics does it look at this one.
    if std::thread::panicking() {
        return switch_while_panicking(thread, control, running);
    }
    switch_now(thread, control, running);
}

#[inline(always)]
fn switch_now(thread: &Thread, control: &'static Control, running: Phase) {
    let entered_by = thread.current.replace(Some(control));
    bump(&thread.switches);
    control.entered_at.set(thread.now.get());
    control.phase.set(running);
    if let Some(entered_by) = entered_by {
        entered_by.phase.set(Phase::Entered);
    }
    // SAFETY: all callers of `resume` have checked that this thread owns this life and that it is
    // in one of the phases above, in which its code is on no stack but its own, at rest.
    unsafe { control.switch_in() };
    thread.current.set(entered_by);
    if let Some(entered_by) = entered_by {
        entered_by.phase.set(entered_by.running());
    }
}

/// A destructor that runs because the thread unwinds may enter a coroutine, and that one may
/// suspend: it is not the one that unwinds.
#[cold]
#[inline(never)]
fn switch_while_panicking(thread: &Thread, control: &'static Control, running: Phase) {
    let unwinds = std::thread::panicking();
    control.entered_panicking.set(unwinds);
    switch_now(thread, control, running);
    control.entered_panicking.set(false);
}

/// A payload on its way from a coroutine to its resumer.
type Panic = Box<dyn std::any::Any + Send>;

/// Ends the life of `control`, in its resumer (rule 1.6); then runs what it has woken; then passes
/// its panic on.
#[inline(always)]
fn finish(thread: &Thread, control: &'static Control) {
    if control.ends_plainly() {
        release_homeless(thread, control);
    } else if !control.woke().get() && !control.odd_end().get() && control.holds.get() == [0; 2] {
        release_plain(thread, control);
    } else {
        let woken = control.take_wakes().map(|(first, _)| first);
        finish_otherwise(thread, control, woken);
    }
}

#[cold]
#[inline(never)]
fn finish_otherwise(thread: &Thread, control: &'static Control, woken: Option<&'static Control>) {
    let mut panic = control.panic.take();
    let holds = control.holds.take();
    if holds != [0, 0] && panic.is_none() {
        // Rule 1.10. Raised like any other panic of the coroutine, so that the place is its
        // resumer.
        let [locks, graph] = holds;
        let message = format!(
            "{} finished while it holds {locks} lock(s) and {graph} graph lock(s)",
            Described(control)
        );
        panic = panic::catch_unwind(|| panic!("{message}")).err();
    }
    // A release hook may panic, too; the first panic goes on.
    let released = panic::catch_unwind(panic::AssertUnwindSafe(|| release(thread, control)));
    run_woken(thread, woken, panic.or(released.err()));
}

/// Gives the slot of a finished or never started coroutine back.
#[inline(always)]
pub(crate) fn release(thread: &Thread, control: &'static Control) {
    if control.odd_end().get() {
        release_odd(thread, control);
    } else {
        release_plain(thread, control);
    }
}

/// As [`release`], without a look at how it ended.
#[inline(always)]
fn release_plain(thread: &Thread, control: &'static Control) {
    if !control.homed().get() {
        return release_homeless(thread, control);
    }
    // From here on every handle of this life is stale.
    control.life.store(0, Ordering::Relaxed);
    control.phase.set(Phase::Free);
    if control.moved.get() {
        moving::forget(control);
    }
    // SAFETY: the life is over and was this thread's; its token, the only way to a reference to the
    // home, is gone.
    unsafe { control.drop_home(|| thread.put(control)) };
}

/// As [`release_plain`], of a life without a home.
#[inline(always)]
fn release_homeless(thread: &Thread, control: &'static Control) {
    control.life.store(0, Ordering::Relaxed);
    control.phase.set(Phase::Free);
    thread.put(control);
}

/// As [`release`], for a life that has panicked, or whose hook decides what becomes of the stack
/// (rule 1.6). The life is over already, and current is the resumer.
#[cold]
#[inline(never)]
fn release_odd(thread: &Thread, control: &'static Control) {
    control.odd_end().set(false);
    let Some(hook) = control.release_hook.take() else {
        return release_plain(thread, control);
    };
    let ended = Ended {
        id: control.life.swap(0, Ordering::Relaxed),
        name: control.name.get(),
    };
    control.phase.set(Phase::Free);
    match panic::catch_unwind(panic::AssertUnwindSafe(|| hook(ended))) {
        Ok(Release::Free) => thread.put_cold(control),
        // A handle that is gone keeps nothing.
        Ok(Release::Veto) if !control.detached.get() => {
            control.phase.set(Phase::Kept);
            control.life.store(ended.id | KEPT, Ordering::Relaxed);
        }
        Ok(Release::Keep | Release::Veto) => thread.put(control),
        Err(panic) => {
            thread.put(control);
            panic::resume_unwind(panic);
        }
    }
}

/// Gives a slot to the pool whose hook had vetoed: its handle is gone now.
#[cold]
pub(crate) fn release_kept(thread: &Thread, control: &'static Control) {
    assert_eq!(control.phase.get(), Phase::Kept, "only a kept one comes so");
    control.life.store(0, Ordering::Relaxed);
    control.phase.set(Phase::Free);
    thread.put(control);
}

/// Runs woken coroutines, depth first, from this one frame: what one of them wakes runs before
/// those that were already queued (rule 1.9). The first panic goes on when all have run.
#[cold]
#[inline(never)]
fn run_woken(thread: &Thread, woken: Option<&'static Control>, panic: Option<Panic>) {
    let (mut queue, mut panic) = (woken, panic);
    while let Some(control) = queue {
        queue = control.next.take();
        switch(thread, control, control.running());
        // Taken out before the release: the slot may live again as soon as it is in the pool.
        if let Some((head, tail)) = control.take_wakes() {
            tail.next.set(queue);
            queue = Some(head);
        }
        if control.phase.get() == Phase::Finished {
            if control.holds.get() != [0; 2] || control.odd_end().get() {
                let inside = panic::catch_unwind(panic::AssertUnwindSafe(|| {
                    finish_otherwise(thread, control, None);
                }));
                // One panic can go on; the hook has reported the others.
                panic = panic.or(inside.err());
            } else {
                release(thread, control);
            }
        }
    }
    if let Some(panic) = panic {
        panic::resume_unwind(panic);
    }
}

/// Resumes a waiter of phase `Waiting` whose operation is complete: now, or from the frame that
/// entered the running coroutine.
#[inline(always)]
pub(crate) fn resume_waiter(control: &'static Control) {
    debug_assert_eq!(
        control.phase.get(),
        Phase::Waiting,
        "only a waiter's operation completes"
    );
    with_thread(|thread| resume_or_queue(thread, control));
}

/// Resumes `control` now if the leader runs; else queues it on the running coroutine (rule 1.9).
#[inline(always)]
pub(crate) fn resume_or_queue(thread: &Thread, control: &'static Control) {
    match thread.current.get() {
        None => {
            resume(thread, control, control.running());
        }
        Some(running) => {
            control.phase.set(Phase::Queued);
            running.push_wake(control);
        }
    }
}

/// Ends a life that has never been entered: drops its entry.
pub(crate) fn drop_unstarted(thread: &Thread, control: &'static Control) {
    assert_eq!(
        control.phase.get(),
        Phase::New,
        "only a coroutine that never ran is dropped so"
    );
    // Not enterable any more, even by the entry's own destructors.
    control.phase.set(Phase::Finished);
    let dropped = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        // SAFETY: a coroutine in phase `New` has its entry in place; the phase is left, so nobody
        // runs or drops it again.
        unsafe { control.drop_entry() };
    }));
    release(thread, control);
    if let Err(panic) = dropped {
        panic::resume_unwind(panic);
    }
}
