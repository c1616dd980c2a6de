//! What ends a process, or needs one of its own: each test runs this binary again with only itself,
//! and looks at how that ends.

// AddressSanitizer handles SIGSEGV itself, and takes memory and mappings of its own.
#![cfg(not(feature = "sanitizer"))]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::rc::Rc;

use coblock_coroutine::{
    Coroutine, CoroutineOptions, Error, IoWait, State, force_mprotect_guards, guard_kind,
    install_overflow_handler, run_scoped, stats,
};
use support::{child, is_child};

const SIGABRT: i32 = libc::SIGABRT;
const SIGSEGV: i32 = libc::SIGSEGV;

/// Uses up any stack.
#[inline(never)]
fn recurse(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 32]);
    if depth == u64::MAX {
        frame[0]
    } else {
        recurse(depth + 1) + frame[31]
    }
}

fn overflow(name: &'static str) {
    let options = CoroutineOptions {
        name,
        ..Default::default()
    };
    let co = Coroutine::with_options(&options, |co| {
        co.suspend();
        std::hint::black_box(recurse(0));
    })
    .unwrap();
    co.enter();
    co.enter();
}

/// An overflow hits the guard page and dies with a message that names the coroutine, on the main
/// thread and on others.
#[test]
fn overflow_names_the_coroutine() {
    if is_child("overflow_names_the_coroutine") {
        install_overflow_handler();
        // A second one, in the middle of an arena, so that the name is that of the right stack.
        let others: Vec<Coroutine> = (0..20).map(|_| Coroutine::new(|_| {}).unwrap()).collect();
        overflow("too deep");
        drop(others);
        unreachable!("the overflow was survived");
    }
    let (stderr, status) = child("overflow_names_the_coroutine");
    assert!(
        stderr.contains("coroutine 'too deep' has overflowed its stack"),
        "{stderr}"
    );
    assert_eq!(status.signal(), Some(SIGABRT), "{stderr}");
}

/// On a thread that `std` did not make, and that has no alternate stack of its own, the pool gives
/// it one.
#[test]
fn overflow_on_a_foreign_thread() {
    extern "C" fn thread(_: *mut libc::c_void) -> *mut libc::c_void {
        overflow("far and deep");
        unreachable!("the overflow was survived");
    }
    if is_child("overflow_on_a_foreign_thread") {
        install_overflow_handler();
        let mut id = std::mem::MaybeUninit::uninit();
        let no = std::ptr::null_mut();
        // SAFETY: default attributes, a function of the right type, no argument.
        let made = unsafe { libc::pthread_create(id.as_mut_ptr(), std::ptr::null(), thread, no) };
        assert_eq!(made, 0);
        // SAFETY: written by the call that succeeded.
        let id = unsafe { id.assume_init() };
        // SAFETY: a thread made above, joined once.
        unsafe { libc::pthread_join(id, std::ptr::null_mut()) };
        unreachable!("the overflow was survived");
    }
    let (stderr, status) = child("overflow_on_a_foreign_thread");
    assert!(
        stderr.contains("coroutine 'far and deep' has overflowed its stack"),
        "{stderr}"
    );
    assert_eq!(status.signal(), Some(SIGABRT), "{stderr}");
}

/// The same where the kernel has no guard regions, with pages protected by mprotect.
#[test]
fn overflow_with_mprotect_guards() {
    if is_child("overflow_with_mprotect_guards") {
        force_mprotect_guards();
        install_overflow_handler();
        let co = Coroutine::new(|co| co.suspend()).unwrap();
        assert_eq!(co.enter(), State::Suspended);
        assert_eq!(guard_kind(), "mprotect");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(
            maps.lines().filter(|line| line.contains("---p")).count() >= 16,
            "{maps}"
        );
        overflow("deep and old");
        unreachable!("the overflow was survived");
    }
    let (stderr, status) = child("overflow_with_mprotect_guards");
    assert!(
        stderr.contains("coroutine 'deep and old' has overflowed its stack"),
        "{stderr}"
    );
    assert_eq!(status.signal(), Some(SIGABRT), "{stderr}");
}

/// Without the handler an overflow dies all the same, and damages nothing first.
#[test]
fn overflow_without_the_handler_dies() {
    if is_child("overflow_without_the_handler_dies") {
        overflow("silent");
        unreachable!("the overflow was survived");
    }
    let (stderr, status) = child("overflow_without_the_handler_dies");
    assert!(status.signal() == Some(SIGSEGV), "{status:?} {stderr}");
    assert!(!stderr.contains("survived"), "{stderr}");
}

/// A fault anywhere else goes on to the handler that was there before: here std's, which lets it
/// kill the process.
#[test]
fn other_faults_go_on() {
    if is_child("other_faults_go_on") {
        install_overflow_handler();
        install_overflow_handler();
        // SAFETY: raises the signal that is under test, with no memory touched.
        unsafe { libc::raise(SIGSEGV) };
        let nowhere = std::hint::black_box(16 as *mut u8);
        // SAFETY: it is not safe; it is meant to fault.
        unsafe { nowhere.write_volatile(1) };
        unreachable!("the fault was survived");
    }
    let (stderr, status) = child("other_faults_go_on");
    assert_eq!(status.signal(), Some(SIGSEGV), "{stderr}");
    assert!(!stderr.contains("coroutine '"), "{stderr}");
}

/// And to a handler of the program's own, of either kind.
#[test]
fn other_faults_reach_the_programs_handler() {
    extern "C" fn plain(_: libc::c_int) {
        // SAFETY: ends the process; allowed in a handler.
        unsafe { libc::_exit(71) };
    }
    if is_child("other_faults_reach_the_programs_handler") {
        let handler: extern "C" fn(libc::c_int) = plain;
        // SAFETY: a handler of the right type, that only calls `_exit`.
        unsafe { libc::signal(SIGSEGV, handler as libc::sighandler_t) };
        install_overflow_handler();
        // SAFETY: it is not safe; it is meant to fault.
        unsafe { std::hint::black_box(16 as *mut u8).write_volatile(1) };
        unreachable!("the fault was survived");
    }
    let (stderr, status) = child("other_faults_reach_the_programs_handler");
    assert_eq!(status.code(), Some(71), "{stderr}");
}

/// Rule 1.10, 2.1: a frame with a submitted, uncompleted operation cannot be unwound: the process
/// aborts and names the operation.
#[test]
fn unwinding_a_submitted_operation_aborts() {
    if is_child("unwinding_a_submitted_operation_aborts") {
        let co = Coroutine::new(|_| {
            let wait = IoWait::new("pwrite of image.qcow2");
            wait.submitted();
            panic!("between submit and wait");
        })
        .unwrap();
        co.enter();
        unreachable!("the frame was unwound");
    }
    let (stderr, status) = child("unwinding_a_submitted_operation_aborts");
    assert!(
        stderr.contains("operation 'pwrite of image.qcow2'"),
        "{stderr}"
    );
    assert_eq!(status.signal(), Some(SIGABRT), "{stderr}");
}

/// If the loop panics while the coroutine of `run_scoped` waits, the process aborts: that coroutine
/// uses the loop's frame.
#[test]
fn a_turn_that_panics_aborts() {
    if is_child("a_turn_that_panics_aborts") {
        let _ = run_scoped(None, |co| co.suspend(), || panic!("the loop broke"));
        unreachable!("the frame was left");
    }
    let (stderr, status) = child("a_turn_that_panics_aborts");
    assert!(
        stderr.contains("run_scoped at coroutine/tests/children.rs:"),
        "{stderr}"
    );
    assert_eq!(status.signal(), Some(SIGABRT), "{stderr}");
}

/// Out of address space is an error value, never an abort; and what exists goes on.
#[test]
fn out_of_memory_is_an_error() {
    if is_child("out_of_memory_is_an_error") {
        let used = 512 << 20;
        let limit = libc::rlimit {
            rlim_cur: used,
            rlim_max: used,
        };
        // SAFETY: plain data in, nothing out.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
        let mut all = Vec::with_capacity(10_000);
        let error = loop {
            match Coroutine::new(|co| co.suspend()) {
                Ok(co) => {
                    co.enter();
                    all.push(co);
                }
                Err(error) => break error,
            }
        };
        assert!(
            matches!(error, Error::OutOfMemory { need: 266_240 }),
            "{error:?}"
        );
        // Smaller arenas were tried before it was given up: most of the space is used.
        assert!(all.len() > 1000, "{}", all.len());
        assert_eq!(stats().live(), i64::try_from(all.len()).unwrap());
        assert!(all.iter().all(|co| co.enter() == State::Finished));
        assert_eq!(Coroutine::new(|_| {}).unwrap().enter(), State::Finished);
        eprintln!("it was an error");
        return;
    }
    let (stderr, status) = child("out_of_memory_is_an_error");
    assert!(
        status.success() && stderr.contains("it was an error"),
        "{status:?} {stderr}"
    );
}

/// Out of mappings (guards by mprotect need two each) is an error value, too.
#[test]
fn out_of_mappings_is_an_error() {
    if is_child("out_of_mappings_is_an_error") {
        force_mprotect_guards();
        let most: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        if most > 200_000 {
            eprintln!("skipped, and it was an error: this machine allows {most} mappings");
            return;
        }
        let options = CoroutineOptions {
            stack_size: 16 << 10,
            ..Default::default()
        };
        let mut all = Vec::new();
        let error = loop {
            match Coroutine::with_options(&options, |_| {}) {
                Ok(co) => all.push(co),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Error::OutOfMappings { need: 2 });
        assert!(all.len() > most / 4, "{}", all.len());
        // So many are in use that even a thread cannot be made; but those that exist run.
        for co in all.drain(..) {
            assert_eq!(co.enter(), State::Finished);
        }
        assert_eq!(
            Coroutine::with_options(&options, |_| {}).unwrap().enter(),
            State::Finished
        );
        eprintln!("it was an error");
        return;
    }
    let (stderr, status) = child("out_of_mappings_is_an_error");
    assert!(
        status.success() && stderr.contains("it was an error"),
        "{status:?} {stderr}"
    );
}

/// With guard regions the number of coroutines is not bounded by mappings: more than max_map_count
/// allows stacks with mprotect, in a few mappings. Above the bounds of the pool, idle stacks give
/// their memory back.
#[test]
fn many_coroutines_in_few_mappings() {
    const MANY: usize = 40_000;
    fn mappings() -> usize {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    }
    fn resident_kib() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
    if is_child("many_coroutines_in_few_mappings") {
        let done = Rc::new(std::cell::Cell::new(0));
        let before = (mappings(), resident_kib());
        let all: Vec<Coroutine> = (0..MANY)
            .map(|_| {
                let done = done.clone();
                let co = Coroutine::new(move |co| {
                    co.suspend();
                    done.set(done.get() + 1);
                })
                .unwrap();
                co.enter();
                co
            })
            .collect();
        let alive = (mappings(), resident_kib());
        if guard_kind() == "MADV_GUARD_INSTALL" {
            assert!(alive.0 - before.0 <= 16, "{} mappings", alive.0 - before.0);
        }
        let each = (alive.1 - before.1) as f64 / MANY as f64;
        assert!(each < 9.0, "{each} KiB for an idle coroutine");
        for co in &all {
            assert_eq!(co.enter(), State::Finished);
        }
        assert_eq!(done.get(), MANY);
        let trimmed = stats().stacks_trimmed;
        assert!(trimmed > MANY as u64 / 2, "{trimmed} stacks trimmed");
        eprintln!(
            "{each:.2} KiB each, {} mappings: all is well",
            alive.0 - before.0
        );
        return;
    }
    let (stderr, status) = child("many_coroutines_in_few_mappings");
    assert!(
        status.success() && stderr.contains("all is well"),
        "{status:?} {stderr}"
    );
}
