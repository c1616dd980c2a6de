//! Waiting for a condition from outside of coroutines, the loop going on meanwhile (rule 3.8).
//!
//! ```text
//!   who calls                        whose condition        what it polls
//!   the home of a context            that context's         that context
//!   the home of the main context     anybody's              the main context
//!   any other                        another's              refused: each could wait for the other
//! ```
//!
//! Who changes a condition calls [`AioWait::kick`] afterwards: every completion does, with an error
//! or with nothing done too.

use crate::context::AioContext;
use crate::home::poll;
use crate::waiters::Waiters;
use coblock_coroutine::{ThreadLock, mutant};
use std::fmt;
use std::sync::Arc;

/// Where one program's changes and waiters meet; shared by all its contexts. Any thread.
pub struct AioWait {
    main: Arc<AioContext>,
    waiters: Waiters,
    /// What the waiters poll; one entry for each, so perhaps several of one context (nested).
    polled: ThreadLock<Vec<Arc<AioContext>>>,
}

impl AioWait {
    /// Its main context is the one whose home may wait for anything.
    pub fn new(main: &Arc<AioContext>) -> Self {
        AioWait {
            main: main.clone(),
            waiters: Waiters::new(),
            polled: ThreadLock::new(Vec::new()),
        }
    }

    /// The context whose home may wait for anything.
    pub fn main(&self) -> &Arc<AioContext> {
        &self.main
    }

    /// Polls while `condition`, which is about things that happen in `context`; tells whether it
    /// was true at first. Handlers run inside. `condition` runs on the calling thread, after each
    /// pass.
    ///
    /// # Panics
    /// In a coroutine: that suspends. When the caller drives neither `context` nor the main one
    /// (rule 3.8). With a panic of `condition` or of a handler.
    #[track_caller]
    pub fn wait_while(&self, context: &Arc<AioContext>, condition: impl FnMut() -> bool) -> bool {
        self.wait_while_around(context, condition, |poll| poll())
    }

    /// The same; each poll is inside `around`.
    #[track_caller]
    pub(crate) fn wait_while_around(
        &self,
        context: &Arc<AioContext>,
        mut condition: impl FnMut() -> bool,
        around: impl Fn(&dyn Fn()),
    ) -> bool {
        let polled = self.to_poll(context);
        crate::home::refuse_in_coroutine(polled);
        let _waiting = Waiting::begin(self, polled);
        let mut waited = false;
        while condition() {
            waited = true;
            around(&|| {
                poll(true);
            });
        }
        waited
    }

    #[track_caller]
    fn to_poll<'a>(&'a self, context: &'a Arc<AioContext>) -> &'a Arc<AioContext> {
        [context, &self.main]
            .into_iter()
            .find(|allowed| allowed.is_current())
            .unwrap_or_else(|| {
                let current = crate::current::current();
                panic!(
                    "waiting for context '{}' in {}: only its own home may, or that of the main \
                     context '{}' (rule 3.8)",
                    context.name(),
                    current.map_or_else(
                        || "a thread that drives no context".to_owned(),
                        |current| format!("context '{}'", current.name())
                    ),
                    self.main.name()
                )
            })
    }

    /// After each change of something that may be waited for: wakes whoever waits. Without waiters
    /// it costs a load. Any thread, also in coroutines.
    #[inline(always)]
    pub fn kick(&self) {
        if self.waiters.must_wake() && !mutant!("a change wakes nobody who waits outside") {
            self.wake_all();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_all(&self) {
        let polled = self.polled.lock().clone();
        for context in polled {
            // A waiter on this very thread tests when the pass that calls this has ended.
            context.kick();
        }
    }
}

impl fmt::Debug for AioWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let polled = self.polled.lock().clone();
        f.debug_struct("AioWait")
            .field("main", &self.main.name())
            .field(
                "waiting_in",
                &polled.iter().map(|c| c.name()).collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}

/// One waiter; counted while it lives, also when a panic ends it.
struct Waiting<'a> {
    wait: &'a AioWait,
    polled: &'a Arc<AioContext>,
}

impl<'a> Waiting<'a> {
    fn begin(wait: &'a AioWait, polled: &'a Arc<AioContext>) -> Self {
        // In the list first: who sees the count finds it there.
        wait.polled.lock().push(polled.clone());
        wait.waiters.enter();
        Waiting { wait, polled }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.wait.waiters.leave();
        let mut polled = self.wait.polled.lock();
        let mine = polled.iter().position(|c| Arc::ptr_eq(c, self.polled));
        polled.swap_remove(mine.expect("put there when the wait began"));
    }
}
