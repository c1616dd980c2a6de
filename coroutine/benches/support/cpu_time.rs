//! The clock of the benches.

/// CPU time of this thread.
pub fn cpu_ns(f: impl FnOnce()) -> f64 {
    fn now() -> f64 {
        let mut t = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: writes to our own timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
        t.tv_sec as f64 * 1e9 + t.tv_nsec as f64
    }
    let start = now();
    f();
    now() - start
}
