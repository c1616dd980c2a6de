//! Blocking calls of coroutines on a pool of threads.
//!
//! The closure may borrow from the coroutine's stack: the coroutine waits in an operation that only
//! the closure's end completes. Its result comes back through the context's list of work.

use crate::bottom_half::Work;
use crate::context::AioContext;
use crate::current::current;
use crate::sys::pending::{Pending, lend};
use crate::thread_pool::Job;
use coblock_coroutine::{Co, IoWait};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

/// Completes `pending` in `context`, from any thread.
fn post_completion(context: &AioContext, pending: Pending, result: i32) {
    context.post(Work::Done(pending, result));
}

/// Completes its operation when dropped: also when a pool drops a job without running it.
struct Finish {
    context: Arc<AioContext>,
    pending: Option<Pending>,
}

impl Drop for Finish {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            post_completion(&self.context, pending, 0);
        }
    }
}

/// The closure, where its outcome goes, and then, dropped last, the completion.
struct Lent<'a, F, R> {
    f: F,
    outcome: &'a mut Option<std::thread::Result<R>>,
    finish: Finish,
}

impl<R, F: FnOnce() -> R> Lent<'_, F, R> {
    fn run(self) {
        let Lent { f, outcome, finish } = self;
        *outcome = Some(catch_unwind(AssertUnwindSafe(f)));
        drop(finish);
    }
}

/// Runs `f` on the pool of the current context; suspends meanwhile. See [`crate::co::on_pool`].
#[inline(never)]
pub(crate) fn on_pool<R: Send>(co: &Co, f: impl FnOnce() -> R + Send) -> R {
    let context = current().expect("on_pool outside of every context");
    let pool = context.pool().clone();
    let wait = IoWait::new("work on the thread pool");
    let mut outcome = None;
    let finish = Finish {
        context,
        pending: Some(Pending::new(&wait)),
    };
    let lent = Lent {
        f,
        outcome: &mut outcome,
        finish,
    };
    let wait_for_it = || {
        wait.wait(co);
    };
    lend(
        Box::new(move || lent.run()),
        |job| pool.submit(Job::boxed(job)),
        wait_for_it,
    );
    match outcome {
        Some(Ok(result)) => result,
        Some(Err(panic)) => resume_unwind(panic),
        None => panic!("the pool dropped a job that a coroutine waited for"),
    }
}
