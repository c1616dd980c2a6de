//! A program that has no `membarrier`: in a process of its own, since the choice is the process'.

use coblock_aio::{ContextOptions, Home, heavy_fence, use_full_fences};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// `MEMBARRIER_CMD_GET_REGISTRATIONS` of linux/membarrier.h; Linux 6.3.
const GET_REGISTRATIONS: libc::c_int = 1 << 9;

/// Chosen before the first home, full fences stay, the kernel is never asked, and no wake-up is
/// lost.
#[test]
fn full_fences_serve_without_membarrier() {
    assert!(use_full_fences());
    let home = Home::new(ContextOptions::named("full fences")).expect("a context");
    let woken = Arc::new(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let (context, woken) = (home.context().clone(), &woken);
        scope.spawn(move || {
            for _ in 0..1000 {
                let woken = woken.clone();
                context.oneshot(move || {
                    woken.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        while woken.load(Ordering::Relaxed) < 1000 {
            home.poll(true);
        }
    });
    heavy_fence();
    home.close();
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    let registered = unsafe { libc::syscall(libc::SYS_membarrier, GET_REGISTRATIONS, 0, 0) };
    // Below zero: the kernel does not know the question.
    assert!(registered <= 0, "registered for {registered:#x}");
    assert!(use_full_fences(), "once chosen it stays");
}
