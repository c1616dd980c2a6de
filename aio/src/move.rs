//! Really moving a coroutine to another context (rule 3.10, "reschedule self").
//!
//! Only for tests of the rules that speak of moved coroutines. Everything else sends work to
//! another context as a new coroutine ([`crate::co::run_in`]) and stays where it is.
//!
//! ```text
//!   old thread                                          new thread
//!   move_to: post a one-shot here, suspend
//!   the one-shot: schedule it in the new context  --->  next pass: bound to this thread, goes on
//! ```

use crate::bottom_half::Work;
use crate::context::{AioContext, Arriving};
use crate::current::{Live, current};
use coblock_coroutine::{Co, Schedule};
use std::sync::Arc;

/// Goes on in `context`: in the same one nothing happens; else the coroutine suspends *first*, and
/// a bottom half of the old context schedules it in the new one (rule 3.10). Suspends.
///
/// # Safety
/// Another thread runs this stack afterwards. So nothing on it may be bound to the old thread: no
/// address of a thread-local, no `Rc`, no handle of a coroutine, no guard of a thread lock, and
/// nothing borrowed that another thread must not use. The coroutine was started by
/// [`AioContext::spawn`] (whose closure is `Send`), and neither by hand nor by
/// [`crate::Home::run`].
///
/// # Panics
/// Where no context is current.
#[track_caller]
pub unsafe fn move_to(co: &Co, context: &Arc<AioContext>) {
    if context.is_current() {
        return;
    }
    let old = current().expect("move_to outside of every context");
    let home: Arc<dyn Schedule> = context.clone();
    // Counted there from now on; the guard at the root of its stack ends the count where it ends.
    let arriving = Arriving::new(context.clone());
    drop(Live::of(co.name()));
    // SAFETY: the caller's promises are those that are asked for. The one-shot runs in a later pass
    // of the old context, whose thread is in this coroutine until it has suspended.
    unsafe {
        co.move_to(&home, |departure| {
            old.post(Work::Once(Box::new(move || departure.depart())));
        });
    }
    std::mem::forget(Live::begin_here(co.name()));
    drop(arriving);
}
