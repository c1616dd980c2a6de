//! Asymmetric fences: the common side pays nothing, the rare side a system call.
//!
//! Two sides each publish something and then look at what the other published; at least one must
//! see the other. Ordinarily both need a full fence between. Here the common side runs
//! [`light_fence`], which only keeps the compiler from reordering, and the rare side
//! [`heavy_fence`], which makes the kernel run a full fence on every processor that runs a thread
//! of this process (`membarrier(2)`, private expedited).
//!
//! Where the kernel refuses, or the program does ([`use_full_fences`]), both are ordinary full
//! fences; so they are under ThreadSanitizer, which would see no fence at all on the common side.
//! The choice is made once, before the first heavy fence; a light fence that runs before the choice
//! is a full one, which is right with either.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence, fence};

/// [`UNDECIDED`] until [`prepare_fences`]; then for good what the kernel answered.
///
/// A property of the process, as the registration with the kernel is.
static MODE: AtomicU8 = AtomicU8::new(UNDECIDED);
const UNDECIDED: u8 = 0;
const FULL: u8 = 1;
const ASYMMETRIC: u8 = 2;

/// `MEMBARRIER_CMD_PRIVATE_EXPEDITED` of linux/membarrier.h.
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
/// `MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED` of linux/membarrier.h.
const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// What [`MODE`] became: asymmetric or not.
static DECIDED: OnceLock<bool> = OnceLock::new();

fn decide(ask: impl FnOnce() -> bool) -> bool {
    *DECIDED.get_or_init(|| {
        let agreed = ask();
        MODE.store(if agreed { ASYMMETRIC } else { FULL }, Ordering::Release);
        agreed
    })
}

/// Both sides pay for full fences, and the kernel is not asked for `membarrier`: for a program whose
/// seccomp filter would kill it for that call, and for measuring what the fences cost. Any thread,
/// before the first [`crate::Home`] of the process is made.
///
/// `false`: too late, light fences are light already, which needs `membarrier` from now on.
#[must_use]
pub fn use_full_fences() -> bool {
    !decide(|| false)
}

/// Registers with the kernel, once a process; afterwards light fences are light. Any thread.
///
/// Tells whether the kernel agreed. Making a [`crate::Home`] calls it.
pub fn prepare_fences() -> bool {
    decide(|| {
        let agreed = !cfg!(thread_sanitizer)
            && membarrier(REGISTER_PRIVATE_EXPEDITED)
            && membarrier(PRIVATE_EXPEDITED);
        if !agreed {
            log::info!("membarrier is not to be had here: full fences on both sides");
        }
        agreed
    })
}

/// The common side: between publishing and looking. Pairs only with [`heavy_fence`]. Any thread.
#[inline(always)]
pub fn light_fence() {
    if MODE.load(Ordering::Relaxed) == ASYMMETRIC {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// The rare side: between publishing and looking. Takes microseconds. Any thread.
pub fn heavy_fence() {
    fence(Ordering::SeqCst);
    if prepare_fences() {
        assert!(
            membarrier(PRIVATE_EXPEDITED),
            "membarrier fails though it was registered"
        );
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    /// Store buffering: with one light and one heavy side, never do both miss the other's store.
    #[test]
    fn one_side_always_sees_the_other() {
        prepare_fences();
        let (x, y, round) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        let rounds = 5_000;
        let reach = |word: &AtomicU32, n| {
            while word.load(Ordering::Acquire) < n {
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            let light = scope.spawn(|| {
                let one_round = |n| {
                    reach(&round, n);
                    x.store(n, Ordering::Relaxed);
                    light_fence();
                    y.load(Ordering::Relaxed) >= n
                };
                (1..=rounds).map(one_round).collect::<Vec<bool>>()
            });
            let one_round = |n| {
                reach(&x, n - 1);
                round.store(n, Ordering::Release);
                y.store(n, Ordering::Relaxed);
                heavy_fence();
                x.load(Ordering::Relaxed) >= n
            };
            let heavy: Vec<bool> = (1..=rounds).map(one_round).collect();
            for (n, (light, heavy)) in light.join().unwrap().into_iter().zip(heavy).enumerate() {
                assert!(light || heavy, "round {n}: both sides missed the other");
            }
        });
    }
}
