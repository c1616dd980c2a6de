//! Signals that interrupt the loop and its requests change nothing (EINTR).

mod support;

use coblock_aio::{IoVec, co};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Scratch, each_engine, pattern};

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_signal: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// While another thread sends signals without pause, reads, writes, syncs and sleeps are right.
#[test]
fn requests_survive_signals() {
    // SAFETY: an all-zero sigaction is a valid one: no flags (so calls are not restarted), no mask.
    let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
    action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the handler touches one atomic; `action` lives through the call.
    let set = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    // SAFETY: asks for the calling thread.
    let me = unsafe { libc::pthread_self() };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: the thread lives longer than this scope.
                unsafe { libc::pthread_kill(me, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let test = || {
            each_engine(|home, engine| {
                let file = Scratch::on_disk("signals").create();
                home.run(|c| {
                    let began = Instant::now();
                    co::sleep(c, Duration::from_millis(100));
                    assert!(began.elapsed() >= Duration::from_millis(100), "{engine}");
                    for n in 0..50u64 {
                        let bytes = pattern(n, 20_000);
                        co::write(c, file.as_fd(), n, IoVec::from(&bytes[..])).unwrap();
                        co::sync(c, file.as_fd(), true).unwrap();
                        let mut back = vec![0; bytes.len()];
                        let got = co::read(c, file.as_fd(), n, (&mut back[..]).into());
                        assert_eq!(got.unwrap(), bytes.len(), "{engine}");
                        assert!(back == bytes, "{engine}");
                    }
                });
            });
        };
        let result = std::panic::catch_unwind(|| {
            // However slowly this machine lets the other thread send them.
            while SIGNALS.load(Ordering::Relaxed) <= 100 {
                test();
            }
        });
        stop.store(true, Ordering::Relaxed);
        result.unwrap();
    });
}
