//! The current context of a thread (rule 3.9), and what the home counts.
//!
//! A thread-local says which home the thread drives now: the innermost of its polls and
//! [`Home::with`](crate::Home::with). Worker threads have none. Every look at it goes through one
//! function that is not inlined and keeps nothing, so that no address of a thread-local lives over
//! a suspend (rule 1.8).

use crate::bottom_half::Work;
use crate::context::AioContext;
use crate::home::Core;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

thread_local! {
    /// Not dropped with its thread: [`Driving`] puts back what was there before, in the end nothing.
    /// So each look at it is a load, not a call that asks whether the thread is ending.
    static CURRENT: RefCell<ManuallyDrop<Option<Rc<Core>>>> =
        const { RefCell::new(ManuallyDrop::new(None)) };
}

thread_local! {
    /// Where the thread entered something in which it must not poll, and what that is.
    static STILL: Cell<Option<(&'static str, &'static Location<'static>)>> = const { Cell::new(None) };
}

/// While it lives, its thread does not poll; see [`refuse_polls`].
#[must_use = "polls are refused until it is dropped"]
#[derive(Debug)]
pub struct RefusePolls {
    before: Option<(&'static str, &'static Location<'static>)>,
    on_its_thread: PhantomData<*const ()>,
}

/// Every poll of the calling thread panics until the guard is dropped, and names `what` and where
/// this was called.
#[track_caller]
pub fn refuse_polls(what: &'static str) -> RefusePolls {
    RefusePolls {
        before: STILL.replace(Some((what, Location::caller()))),
        on_its_thread: PhantomData,
    }
}

impl Drop for RefusePolls {
    fn drop(&mut self) {
        STILL.set(self.before);
    }
}

/// A thread is about to poll.
#[inline]
#[track_caller]
pub(crate) fn may_poll(context: &AioContext) {
    if let Some((what, at)) = STILL.get() {
        panic!(
            "poll of context '{}' inside of {at}: {what}",
            context.name()
        );
    }
}

/// Makes the thread drive `core`; gives back what it drove before.
fn drive(core: Option<Rc<Core>>) -> Option<Rc<Core>> {
    let core = ManuallyDrop::new(core);
    ManuallyDrop::into_inner(CURRENT.with(|current| current.replace(core)))
}

/// Calls `f` with the home that this thread drives. `f` neither suspends nor runs other people's
/// code.
#[inline(never)]
pub(crate) fn with_core<R>(f: impl FnOnce(Option<&Rc<Core>>) -> R) -> R {
    CURRENT.with(|current| f(current.borrow().as_ref()))
}

/// The home that this thread drives, for longer.
pub(crate) fn core() -> Option<Rc<Core>> {
    with_core(|core| core.cloned())
}

/// While it lives, the thread drives `core`; afterwards what it drove before.
pub(crate) struct Driving {
    before: Option<Rc<Core>>,
}

impl Driving {
    pub fn new(core: &Rc<Core>) -> Self {
        Driving {
            before: drive(Some(core.clone())),
        }
    }

    /// The same for what is about to enter coroutines: where no pass of a loop has told them the
    /// time of late, it is told.
    pub fn telling_time(core: &Rc<Core>) -> Self {
        let driving = Driving::new(core);
        if driving.before.is_none() {
            core.context.note_time();
        }
        driving
    }
}

impl Drop for Driving {
    fn drop(&mut self) {
        drive(self.before.take());
    }
}

/// The context that the calling thread drives now; `None` on worker threads.
pub fn current() -> Option<Arc<AioContext>> {
    with_core(|core| core.map(|core| core.context.clone()))
}

/// Number of the current context, without touching its reference count; see [`AioContext::id`].
pub fn current_id() -> Option<u64> {
    with_core(|core| core.map(|core| core.context.id()))
}

pub(crate) fn is_current(context: &AioContext) -> bool {
    with_core(|core| core.is_some_and(|core| std::ptr::eq(&*core.context, context)))
}

/// Posts to the plain list if the caller is the home of `context`, else gives `work` back.
pub(crate) fn post_local(context: &AioContext, work: Work) -> Option<Work> {
    with_core(|core| match core {
        Some(core) if std::ptr::eq(&*core.context, context) => {
            core.work.push(&context.remote, work);
            None
        }
        _ => Some(work),
    })
}

/// A live coroutine of the current context, counted by name. Lives in the coroutine's frame, and
/// refers to no thread: the coroutine ends in the context that is current then.
pub(crate) struct Live {
    name: &'static str,
}

impl Live {
    pub fn begin(core: &Core, name: &'static str) -> Self {
        core.count_live(name, 1);
        Live { name }
    }

    /// The guard of a coroutine that is counted here already; its drop ends that.
    pub fn of(name: &'static str) -> Self {
        Live { name }
    }

    /// In the current context.
    pub fn begin_here(name: &'static str) -> Self {
        with_core(|core| Live::begin(core.expect("a coroutine of a home runs in it"), name))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // Without a context only when a coroutine is unwound after its home: nobody counts then.
        with_core(|core| core.map(|core| core.count_live(self.name, -1)));
    }
}

impl Core {
    /// Counts coroutines that begin or end here.
    fn count_live(&self, name: &'static str, change: isize) {
        let live = &self.context.live;
        live.store(
            live.load(Ordering::Relaxed).wrapping_add_signed(change),
            Ordering::Relaxed,
        );
        let mut names = self.live_names.borrow_mut();
        match names
            .iter_mut()
            .find(|(known, _)| std::ptr::eq(*known, name))
        {
            Some((_, count)) => *count = count.wrapping_add_signed(change),
            None => names.push((name, 1)),
        }
    }
}
