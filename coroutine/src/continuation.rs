//! Continuations: coroutines that pass a value each way, with the operations of gtk-vnc
//! ([`Continuation`], rules 1.1, 1.2, 1.6).
//!
//! ```text
//!   gtk-vnc             here
//!   coroutine_init      Continuation::init           stack size, name, release hook
//!   coroutine_yieldto   Continuation::yield_to       value in  ->  value out, or the result
//!   coroutine_yield     Own::yield_with              value out ->  the next value in
//!   coroutine_self      itself()                     the leader, or one that was created
//!   ..._is_leader       is_leader()
//!   coroutine_release   the hook's answer            Release::{Free, Keep, Veto}
//!   coroutine_swap      none: the switch is asymmetric (decision 0040)
//! ```
//! One value travels at a time, there is no queue; results of operations live in the frame that
//! waits for them, so [`Coroutine`] itself passes none. A continuation is a `Coroutine` without a
//! home, with two cells beside it.
//!
//! ```
//! use coblock_coroutine::continuation::{Continuation, Passed};
//!
//! let sum = Continuation::init(Default::default(), |own, first: u32| {
//!     let second = own.yield_with(first + 1);
//!     format!("{first} and {second}")
//! })?;
//! assert_eq!(sum.yield_to(1), Passed::Yielded(2));
//! assert_eq!(sum.yield_to(5), Passed::Returned("1 and 5".to_string()));
//! # Ok::<(), coblock_coroutine::Error>(())
//! ```

use std::cell::Cell;
use std::fmt;
use std::panic::Location;
use std::rc::Rc;

use crate::co::{self, Co, State};
use crate::coroutine::{Coroutine, CoroutineOptions, KeptSlot};
use crate::error::Error;
pub use crate::release::{Ended, Hook, Release};
use crate::stack;

/// How to make a continuation.
pub struct Options {
    /// For messages.
    pub name: &'static str,
    /// Bytes of stack, its guard page included; rounded up to a power of two of at least 16 KiB.
    pub stack_size: usize,
    /// Runs in the resumer when the continuation has ended, however that came: before the entry
    /// call returns. None: the stack is kept for the pool.
    pub release: Option<Hook>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            name: "unnamed",
            stack_size: stack::DEFAULT_STACK_SIZE,
            release: None,
        }
    }
}

/// What a call of [`Continuation::yield_to`] came back with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Passed<O, R> {
    /// It yielded this and can be entered again.
    Yielded(O),
    /// Its entry function returned this.
    Returned(R),
}

/// A coroutine that takes an `I` at each entry, and answers with an `O`, or with an `R` at its end.
///
/// Dropping it is dropping a [`Coroutine`]: a suspended one is unwound.
#[must_use = "dropped at once, it never runs"]
pub struct Continuation<I, O, R = O> {
    // Dropped first: unwinding it may still yield, and its hook may veto.
    coroutine: Coroutine,
    kept: KeptSlot,
    link: Rc<Link<I, O, R>>,
    stack_size: usize,
}

/// What passes between the two sides.
struct Link<I, O, R> {
    input: Cell<Option<I>>,
    output: Cell<Option<O>>,
    result: Cell<Option<R>>,
}

/// A continuation's own side: in its entry function, to yield.
pub struct Own<'a, I, O> {
    co: &'a Co,
    input: &'a Cell<Option<I>>,
    output: &'a Cell<Option<O>>,
}

impl<I: 'static, O: 'static, R: 'static> Continuation<I, O, R> {
    /// A continuation that will run `entry`. The value of the first [`yield_to`] is its argument.
    ///
    /// # Errors
    /// When there is no stack to be had, or none of that size.
    ///
    /// [`yield_to`]: Continuation::yield_to
    #[track_caller]
    pub fn init<F>(options: Options, entry: F) -> Result<Self, Error>
    where
        F: for<'a> FnOnce(&'a Own<'a, I, O>, I) -> R + 'static,
    {
        let link = Rc::new(Link {
            input: Cell::new(None),
            output: Cell::new(None),
            result: Cell::new(None),
        });
        let inside = link.clone();
        let coroutine = Coroutine::with_options(
            &CoroutineOptions {
                name: options.name,
                stack_size: options.stack_size,
                home: None,
            },
            move |co| {
                let own = Own {
                    co,
                    input: &inside.input,
                    output: &inside.output,
                };
                let first = own.take();
                let result = entry(&own, first);
                inside.result.set(Some(result));
            },
        )?;
        if let Some(hook) = options.release {
            coroutine.set_release_hook(hook);
        }
        Ok(Continuation {
            stack_size: coroutine.stack_size(),
            kept: coroutine.kept_slot(),
            coroutine,
            link,
        })
    }

    /// Enters it with `value`, which is the argument of its entry function, or what its pending
    /// yield returns; comes back with what it yields or returns (rule 1.2).
    ///
    /// # Panics
    /// With the panic of the continuation or of its release hook. And, naming the places, if it
    /// runs, has entered another one, or has finished (rule 1.4), before any switch and without
    /// taking the value in; or if it suspended without a value (for a lock, say).
    #[track_caller]
    pub fn yield_to(&self, value: I) -> Passed<O, R> {
        let caller = Location::caller();
        self.coroutine.refuse_unless_enterable(caller);
        if let Some(untaken) = self.link.input.replace(Some(value)) {
            // One value each way: the one that is on its way stays.
            self.link.input.set(Some(untaken));
            panic!(
                "{:?} entered at {caller}, but it has not taken the last value yet",
                self.coroutine
            );
        }
        match self.coroutine.enter() {
            State::Finished => match self.link.result.take() {
                Some(result) => Passed::Returned(result),
                None => panic!(
                    "{:?} entered at {caller} ended without a result",
                    self.coroutine
                ),
            },
            State::Suspended => match self.link.output.take() {
                Some(output) => Passed::Yielded(output),
                None => panic!(
                    "{:?} entered at {caller} suspended without a value",
                    self.coroutine
                ),
            },
        }
    }

    /// Bytes of its stack, guard page and control block included.
    pub fn stack_size(&self) -> usize {
        self.stack_size
    }

    /// Number of its life, unique in this process.
    pub fn id(&self) -> u64 {
        self.coroutine.id()
    }

    /// The name that it was made with.
    pub fn name(&self) -> &'static str {
        self.coroutine.name()
    }

    /// Whether it runs, or has entered another one and waits for that to come back.
    pub fn entered(&self) -> bool {
        self.coroutine.entered()
    }

    /// Whether it has ended.
    pub fn exited(&self) -> bool {
        self.coroutine.finished()
    }

    /// Whether it has ended and its release hook vetoed: its stack stays until the handle is
    /// dropped.
    pub fn vetoed(&self) -> bool {
        self.kept.is_kept()
    }
}

impl<I, O> Own<'_, I, O> {
    /// Suspends, with `value` as what the entry call returns; comes back with the value of the next
    /// entry call (rule 1.2).
    ///
    /// A wake by other means than [`Continuation::yield_to`] brings no value, and does not end it.
    ///
    /// # Panics
    /// For the reasons of [`Co::suspend`]; or if nobody has taken the last value.
    #[track_caller]
    pub fn yield_with(&self, value: O) -> I {
        if let Some(untaken) = self.output.replace(Some(value)) {
            // One value each way: the one that is on its way stays.
            self.output.set(Some(untaken));
            panic!(
                "{:?} yields at {}, but nobody has taken its last value",
                self.co,
                Location::caller()
            );
        }
        self.co.suspend();
        self.take()
    }

    /// The token of this coroutine, for functions that may suspend.
    pub fn co(&self) -> &Co {
        self.co
    }

    #[track_caller]
    fn take(&self) -> I {
        loop {
            if let Some(value) = self.input.take() {
                return value;
            }
            self.co.suspend();
        }
    }
}

/// Who runs: rule 1.1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Itself {
    /// The thread's own stack.
    Leader,
    /// The coroutine with this number, see [`Continuation::id`].
    Created(u64),
}

/// What runs on this thread now. Always legal.
pub fn itself() -> Itself {
    co::with_current(|current| current.map_or(Itself::Leader, |co| Itself::Created(co.id())))
}

/// Whether this is the thread's own stack.
pub fn is_leader() -> bool {
    !co::in_coroutine()
}

impl<I, O, R> fmt::Debug for Continuation<I, O, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Continuation of {:?}", self.coroutine)
    }
}
