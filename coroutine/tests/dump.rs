//! The debug dump: who waits, for what, where, since when; high-water marks; trimming and limits.

mod support;

use std::cell::RefCell;
use std::io::Write as _;
use std::rc::Rc;
use std::sync::Arc;

use coblock_coroutine::{
    Co, Coroutine, CoroutineOptions, Error, IoWait, Schedule, State, dump, guard_kind, note_time,
    set_stack_limit, start, start_remote, stats, trim_idle,
};
use support::{TestHome, child, in_own_process, is_child};

fn named(name: &'static str, f: impl FnOnce(&Co) + 'static) -> Coroutine {
    let options = CoroutineOptions {
        name,
        ..Default::default()
    };
    Coroutine::with_options(&options, f).unwrap()
}

#[inline(never)]
fn a_function_that_waits(co: &Co) {
    co.suspend();
    std::hint::black_box(());
}

/// Since when a coroutine waits is told by whatever clock its thread was told; one that never ran
/// waits for nothing, and where nobody notes the time nothing is said.
#[test]
fn tells_since_when() {
    let ago = |co: &Coroutine| {
        let all = dump(false).standing;
        let found = all.iter().find(|one| one.id == co.id());
        let one = found.expect("it is there");
        (one.entered_ago, one.to_string())
    };
    let early = named("early", |co| (0..2).for_each(|_| co.suspend()));
    early.enter();
    assert_eq!(ago(&early).0, None, "nobody has noted the time");
    note_time(5_000_000_000);
    let late = named("late", |co| co.suspend());
    early.enter();
    note_time(6_500_000_000);
    late.enter();
    let unborn = named("unborn", |_| ());
    note_time(6_750_000_000);
    let (since, text) = ago(&early);
    assert_eq!(since, Some(1_750_000_000));
    assert!(text.contains(", since 1.75s ago"), "{text}");
    assert_eq!(ago(&late).0, Some(250_000_000));
    assert_eq!(ago(&unborn).0, None, "its stack's last life is over");
    early.enter();
    late.enter();
}

/// Each coroutine of the thread is there, with its state, its place, its operation, its home and a
/// backtrace that names the functions it is in; afterwards all go on as if nobody had asked.
#[test]
fn tells_who_waits_where() {
    let home = TestHome::new("the home");
    let schedule: Arc<dyn Schedule> = home.clone();
    let operation: Rc<RefCell<Option<Rc<IoWait>>>> = Rc::default();
    let by_hand = named("by hand", a_function_that_waits);
    by_hand.enter();
    let kept = operation.clone();
    start(&schedule, "at home", move |co| {
        let wait = Rc::new(IoWait::new("a read"));
        wait.submitted();
        *kept.borrow_mut() = Some(wait.clone());
        assert_eq!(wait.wait(co), 5);
    })
    .unwrap();
    let unborn = named("not begun", |_| ());
    start_remote(&schedule, "on its way", |_| ()).unwrap();

    let all = dump(true);
    let text = all.to_string();
    let find = |name: &str| {
        let found = all.standing.iter().find(|s| s.name == name);
        found.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    let one = find("by hand");
    assert_eq!((one.id, one.state), (by_hand.id(), "suspended"));
    assert!(one.at.unwrap().file().ends_with("dump.rs"));
    assert_eq!(one.at.unwrap().line(), line_of("co.suspend();"));
    assert!(one.stack_used >= 4096, "{one}");
    let trace = one.backtrace.as_ref().unwrap().to_string();
    assert!(trace.contains("a_function_that_waits"), "{trace}");
    let two = find("at home");
    assert_eq!(two.state, "waiting for an operation");
    assert_eq!(
        (two.waits_for, two.home.as_deref()),
        (Some("a read"), Some("the home"))
    );
    let trace = two.backtrace.as_ref().unwrap().to_string();
    assert!(trace.contains("tells_who_waits_where"), "{trace}");
    let three = find("not begun");
    assert!(three.at.is_none() && three.backtrace.is_none(), "{three}");
    assert!(all.elsewhere >= 1, "the one on its way has no thread yet");

    assert_eq!(by_hand.enter(), State::Finished);
    operation.take().unwrap().complete(5);
    assert_eq!(home.run(), 1);
    drop(unborn);
    let names: Vec<_> = dump(false).standing.iter().map(|s| s.name).collect();
    assert!(names.is_empty(), "all over: {names:?}");
}

/// Line of the first place in this file that holds `code`.
fn line_of(code: &str) -> u32 {
    let at = include_str!("dump.rs")
        .lines()
        .position(|line| line.contains(code));
    u32::try_from(at.unwrap()).unwrap() + 1
}

/// A dump inside a coroutine, of a coroutine that has entered it: those that run have no place, and
/// the one that dumps goes on.
#[test]
fn inside_a_coroutine() {
    let asleep = named("asleep", a_function_that_waits);
    asleep.enter();
    let outer = named("outer", |co| {
        let inner = named("inner", |_| {
            let all = dump(true);
            let states: Vec<_> = all
                .standing
                .iter()
                .map(|s| (s.name, s.state, s.at))
                .collect();
            assert_eq!(states.len(), 3, "{all}");
            assert_eq!((states[0].0, states[0].1), ("asleep", "suspended"));
            assert!(states[1].1.contains("has entered") && states[1].2.is_none());
            assert_eq!((states[2].1, states[2].2), ("running", None));
        });
        inner.enter();
        co.suspend();
    });
    assert_eq!(outer.enter(), State::Suspended);
    assert_eq!(outer.enter(), State::Finished);
    assert_eq!(asleep.enter(), State::Finished);
}

/// The high-water mark grows with what is used, is told in pages, and falls when the stack is
/// trimmed.
#[test]
fn high_water_marks() {
    let used = |name: &str| {
        let all = dump(false);
        all.standing
            .iter()
            .find(|s| s.name == name)
            .unwrap()
            .stack_used
    };
    // A size that no other test uses: nobody has left deeper marks on this stack.
    let options = CoroutineOptions {
        name: "eats",
        stack_size: 512 << 10,
        home: None,
    };
    let eater = Coroutine::with_options(&options, |co| {
        eat(0);
        co.suspend();
        eat(100 << 10);
        co.suspend();
    })
    .unwrap();
    eater.enter();
    let little = used("eats");
    assert!((4096..=64 << 10).contains(&little), "{little}");
    eater.enter();
    assert!(
        (100 << 10..=200 << 10).contains(&used("eats")),
        "{}",
        used("eats")
    );
    assert_eq!(eater.enter(), State::Finished);
}

#[inline(never)]
fn eat(bytes: usize) -> usize {
    if bytes == 0 {
        return 0;
    }
    let page = std::hint::black_box([1u8; 4096]);
    eat(bytes.saturating_sub(4096)) + usize::from(page[bytes % 4096])
}

/// Trimming when idle, in batches: a batch is no larger than asked, the last ones used stay warm,
/// and trimmed stacks are used again.
#[test]
fn trims_in_batches() {
    in_own_process("trims_in_batches", || {
        let make = || -> Vec<Coroutine> {
            let all: Vec<_> = (0..100).map(|_| named("many", |co| co.suspend())).collect();
            all.iter()
                .for_each(|co| assert_eq!(co.enter(), State::Suspended));
            all
        };
        for co in make() {
            assert_eq!(co.enter(), State::Finished);
        }
        let before = stats();
        assert_eq!(trim_idle(10), 10);
        let mut trimmed = 10;
        while trim_idle(16) == 16 {
            trimmed += 16;
        }
        let after = stats();
        assert!(trimmed >= 84 - 16, "{trimmed}");
        assert!(after.stacks_free >= 1 && after.stacks_trimmed >= before.stacks_trimmed + 68);
        for co in make() {
            assert_eq!(co.enter(), State::Finished);
        }
    });
}

/// A limit of stacks is an error value, and what exists stays usable.
#[test]
fn a_limit_is_an_error() {
    if is_child("a_limit_is_an_error") {
        set_stack_limit(20);
        let mut all = Vec::new();
        let why = loop {
            match Coroutine::new(|co| co.suspend()) {
                Ok(co) => all.push(co),
                Err(why) => break why,
            }
        };
        assert_eq!(
            (all.len(), why.clone()),
            (20, Error::TooManyStacks { limit: 20 })
        );
        assert!(why.to_string().contains("all 20"), "{why}");
        all.pop();
        all.push(Coroutine::new(|co| co.suspend()).unwrap());
        set_stack_limit(21);
        all.push(Coroutine::new(|co| co.suspend()).unwrap());
        assert_eq!(stats().stacks_mapped, 21);
        std::process::exit(77);
    }
    let (stderr, status) = child("a_limit_is_an_error");
    assert_eq!(status.code(), Some(77), "{stderr}");
}

/// Guards are set one by one when the kernel does not set several with one call, as before 6.14.
#[test]
fn falls_back_when_the_kernel_refuses_batches() {
    if is_child("falls_back_when_the_kernel_refuses_batches") {
        refuse_guard_markers(false);
        let all: Vec<_> = (0..40).map(|_| named("old", |co| co.suspend())).collect();
        all.iter()
            .for_each(|co| assert_eq!(co.enter(), State::Suspended));
        std::process::exit(77);
    }
    let (stderr, status) = child("falls_back_when_the_kernel_refuses_batches");
    assert_eq!(status.code(), Some(77), "{stderr}");
}

/// Guards fall back to mprotect when the call fails at run time: a filter makes `madvise` refuse
/// guard markers with EINVAL, as a kernel before 6.13 does.
#[test]
fn falls_back_when_the_kernel_refuses_markers() {
    if is_child("falls_back_when_the_kernel_refuses_markers") {
        refuse_guard_markers(true);
        uses_mprotect();
    }
    let (stderr, status) = child("falls_back_when_the_kernel_refuses_markers");
    assert_eq!(status.code(), Some(77), "{stderr}");
}

/// The same with memory that is locked: the kernel takes no guard markers there.
#[test]
fn falls_back_in_locked_memory() {
    if cfg!(feature = "sanitizer") {
        writeln!(
            std::io::stderr(),
            "SKIPPED: AddressSanitizer does not let a program lock its memory"
        )
        .expect("standard error");
        return;
    }
    if is_child("falls_back_in_locked_memory") {
        // SAFETY: has no precondition.
        if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } != 0 {
            writeln!(std::io::stderr(), "SKIPPED: this user may not lock memory")
                .expect("standard error");
            std::process::exit(77);
        }
        uses_mprotect();
    }
    let (stderr, status) = child("falls_back_in_locked_memory");
    assert_eq!(status.code(), Some(77), "{stderr}");
}

fn uses_mprotect() -> ! {
    let all: Vec<_> = (0..40).map(|_| named("old", |co| co.suspend())).collect();
    all.iter()
        .for_each(|co| assert_eq!(co.enter(), State::Suspended));
    assert_eq!(guard_kind(), "mprotect");
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(
        maps.lines().filter(|line| line.contains("---p")).count() >= 40,
        "{maps}"
    );
    std::process::exit(77);
}

/// From now on `process_madvise` answers EINVAL in this process; if `single`, so does `madvise(_,
/// _, MADV_GUARD_INSTALL)`.
fn refuse_guard_markers(single: bool) {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let madvise = u32::try_from(libc::SYS_madvise).unwrap();
    let process_madvise = u32::try_from(libc::SYS_process_madvise).unwrap();
    let refused = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EINVAL).unwrap();
    // No advice has this number.
    let marker = if single { 102 } else { u32::MAX };
    let mut filter = [
        statement(load, 0, 0, 0),                // the number of the call
        statement(equal, 3, 0, process_madvise), //
        statement(equal, 0, 3, madvise),         //
        statement(load, 0, 0, 16 + 2 * 8),       // its third argument, the low half
        statement(equal, 0, 1, marker),          // MADV_GUARD_INSTALL
        statement(answer, 0, 0, refused),        //
        statement(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 7,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: plain numbers.
    let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(set, 0, "no new privileges");
    // SAFETY: `program` points to a filter that is valid during the call.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(
        set,
        0,
        "seccomp filter: {}",
        std::io::Error::last_os_error()
    );
}

/// A panic with RUST_BACKTRACE=1 finds its symbols on a default stack.
#[test]
fn a_panic_symbolises_on_a_default_stack() {
    #[inline(never)]
    fn a_function_that_panics(co: &Co) {
        panic!("deliberately, in life {}", co.id());
    }
    if is_child("a_panic_symbolises_on_a_default_stack") {
        // SAFETY: the only thread that looks at the environment now is this one.
        unsafe { std::env::set_var("RUST_BACKTRACE", "1") };
        let co = named("panics", a_function_that_panics);
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| co.enter()));
        std::process::exit(77);
    }
    let (stderr, status) = child("a_panic_symbolises_on_a_default_stack");
    assert_eq!(status.code(), Some(77), "{stderr}");
    assert!(stderr.contains("a_function_that_panics"), "{stderr}");
}
