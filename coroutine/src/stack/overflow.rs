//! A message for a coroutine that has used up its stack.
//!
//! Without it an overflow dies by SIGSEGV in the guard page, silently. [`install_overflow_handler`]
//! adds a handler that recognises a fault in one of our guard pages, names the coroutine and
//! aborts; every other fault goes on to the handler that was there before. The library never
//! installs it by itself.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::control::Control;
use super::{Arena, Fresh, GUARD, size_of_class};

/// Bytes of the stack on which the handler runs.
const ALTERNATE_STACK: usize = 64 << 10;

/// The handler is in place.
static INSTALLED: AtomicBool = AtomicBool::new(false);
/// What handled SIGSEGV before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

thread_local! {
    /// This thread has an alternate stack, its own or one of ours.
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Makes a stack overflow in a coroutine die with a message that names the coroutine.
///
/// For the whole process, once; calling it again only prepares the calling thread. A signal handler
/// needs an alternate stack per thread: the calling thread gets one now, every other thread when it
/// next asks the pool for more stacks (threads made by `std` have one anyway). Call it early, from
/// `main`.
pub fn install_overflow_handler() {
    static INSTALL: std::sync::Once = std::sync::Once::new();
    INSTALL.call_once(|| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        let set_mask = {
            let action = action.as_mut_ptr();
            // SAFETY: `action` points to our own zeroed memory; the field is plain data.
            unsafe { &raw mut (*action).sa_mask }
        };
        // SAFETY: points into our own memory.
        unsafe { libc::sigemptyset(set_mask) };
        // SAFETY: a sigaction is plain data, for which all zeros is a value.
        let mut action = unsafe { action.assume_init() };
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: both point to sigactions of our own; the handler is async-signal-safe (see
        // there).
        let refused = unsafe { libc::sigaction(libc::SIGSEGV, &action, previous.as_mut_ptr()) };
        assert_eq!(refused, 0, "sigaction(SIGSEGV) takes any handler");
        // SAFETY: zeroed, and then filled in by the call that succeeded.
        let previous = unsafe { previous.assume_init() };
        assert!(PREVIOUS.set(previous).is_ok(), "installed once");
        INSTALLED.store(true, Ordering::Release);
    });
    prepare_thread();
}

/// Gives the calling thread an alternate stack if the handler is in place and the thread has none.
pub(crate) fn prepare_thread() {
    if !INSTALLED.load(Ordering::Acquire) || PREPARED.replace(true) {
        return;
    }
    let mut old = MaybeUninit::<libc::stack_t>::zeroed();
    // SAFETY: only asks; the answer goes to our own memory.
    unsafe { libc::sigaltstack(ptr::null(), old.as_mut_ptr()) };
    // SAFETY: plain data, zeroed, and filled in by the call.
    let old = unsafe { old.assume_init() };
    if old.ss_flags & libc::SS_DISABLE == 0 {
        return;
    }
    // Lives as long as the thread may take a signal, which is longer than any destructor of ours:
    // never freed.
    let memory: &'static mut [MaybeUninit<u8>] = Box::leak(Box::new_uninit_slice(ALTERNATE_STACK));
    let new = libc::stack_t {
        ss_sp: memory.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: ALTERNATE_STACK,
    };
    // SAFETY: `memory` is leaked for this purpose and used by nobody else.
    let refused = unsafe { libc::sigaltstack(&new, ptr::null_mut()) };
    assert_eq!(refused, 0, "sigaltstack takes 64 KiB");
}

/// The name of the coroutine in whose guard page `address` lies.
///
/// Async-signal-safe: reads atomics, mapped memory, and nothing else.
fn overflowed(address: usize) -> Option<&'static str> {
    let mut next: Option<&'static Arena> = super::ARENAS.get();
    while let Some(arena) = next {
        next = arena.next;
        let Some(offset) = address.checked_sub(arena.low).filter(|o| *o < arena.bytes) else {
            continue;
        };
        let size = size_of_class(arena.class);
        let index = offset / size;
        if offset % size >= GUARD || index >= arena.carved.load(Ordering::Acquire) {
            return None;
        }
        let low = ptr::with_exposed_provenance_mut(arena.low + index * size);
        let slot = Fresh {
            low,
            index,
            count: 1,
        };
        let control: *const Control = slot.control_address(arena.class).cast();
        // SAFETY: the slot is carved, its memory mapped; a coroutine runs over the end of this very
        // stack, so its control block is in place, and the code that could change it is the one
        // that was interrupted.
        let control = unsafe { &*control };
        return Some(control.name.get());
    }
    None
}

/// The handler. Only calls that are async-signal-safe: `write`, `abort`, `sigaction`.
extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let info_of_fault = unsafe { &*info };
    // SAFETY: for SIGSEGV the union holds the address.
    let address = unsafe { info_of_fault.si_addr() }.addr();
    if let Some(name) = overflowed(address) {
        for part in ["\ncoroutine '", name, "' has overflowed its stack\n"] {
            // SAFETY: the bytes are those of a live `str`.
            unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
        }
        // SAFETY: has no precondition, and may be called in a handler.
        unsafe { libc::abort() };
    }
    chain(signal, info, context);
}

/// Passes the fault on to whoever handled it before; returning makes the instruction fault again.
fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(previous) = PREVIOUS.get() else {
        return reset(signal);
    };
    match previous.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => reset(signal),
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: an action with SA_SIGINFO was set with a function of this type.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: an action without SA_SIGINFO was set with a function of this type.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// Back to the default action: the fault that follows kills the process.
fn reset(signal: libc::c_int) {
    // SAFETY: has no precondition for a valid signal number.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
