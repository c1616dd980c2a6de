//! What a switch and a life of a coroutine cost, beside a function call and raw corosensei, as
//! ratios of one run.
//!
//! `taskset -c 1 cargo bench -p coblock-coroutine` prints nanoseconds of CPU time and multiples of
//! a function call; a word after `--` runs only the rows that contain it. With `once ROW N` it runs
//! one body N times and prints nothing, for counting instructions.

mod support {
    pub mod cpu_time;
}

use std::cell::Cell;
use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;

use coblock_coroutine::{Co, Coroutine, IoWait, Ready, Schedule, State, start};

use support::cpu_time::cpu_ns;

/// A body runs what it measures `n` times.
type Body = fn(u64);

const ROWS: &[(&str, u64, Body)] = &[
    ("function call", 20_000_000, function_call),
    ("corosensei: yield + resume", 10_000_000, raw_yield),
    ("yield + resume", 10_000_000, yield_resume),
    (
        "yield + resume, in a function of its own",
        5_000_000,
        yield_in_function,
    ),
    ("wait for an operation + complete", 10_000_000, io_wait),
    (
        "corosensei: down 10 frames, yield, up",
        2_000_000,
        raw_down_up,
    ),
    ("down 10 frames, yield, up", 2_000_000, down_up),
    ("round robin over 16", 5_000_000, round_robin::<16>),
    ("round robin over 1024", 2_000_000, round_robin::<1024>),
    (
        "corosensei: create + run + finish, stack kept",
        2_000_000,
        raw_life,
    ),
    ("create + run + finish", 5_000_000, life),
    ("start in a home, with one wait", 5_000_000, life_in_home),
    ("start in a home, 32 alive", 5_000_000, lives_in_home),
    ("nesting 1000 deep, per level", 1_000_000, nesting),
];

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    if let [once, row, n] = &args[..]
        && once == "once"
    {
        let (_, _, body) = ROWS
            .iter()
            .find(|(name, ..)| name == row)
            .expect("no such row");
        return body(n.parse().expect("a number"));
    }
    let wanted = |name: &str| args.is_empty() || args.iter().any(|a| name.contains(a.as_str()));
    let mut call = None;
    println!("{:<50} {:>9} {:>9}", "", "ns", "x call");
    for &(name, n, body) in ROWS {
        if !wanted(name) && call.is_some() {
            continue;
        }
        body(n / 50 + 1);
        let mut rounds: Vec<f64> = (0..5)
            .map(|_| cpu_ns(|| body(n / 5)) / (n / 5) as f64)
            .collect();
        rounds.sort_by(f64::total_cmp);
        let ns = rounds[1];
        let call = *call.get_or_insert(ns);
        println!("{name:<50} {ns:>9.2} {:>9.1}", ns / call);
    }
    println!("{:?}", coblock_coroutine::stats());
}

#[inline(never)]
fn callee(x: u64) -> u64 {
    black_box(x)
}

fn function_call(n: u64) {
    for i in 0..n {
        black_box(callee(i));
    }
}

fn raw_yield(n: u64) {
    let mut co = corosensei::Coroutine::new(move |y: &corosensei::Yielder<(), ()>, ()| {
        for _ in 0..n {
            y.suspend(());
        }
    });
    while co.resume(()).as_yield().is_some() {}
}

fn yield_resume(n: u64) {
    let co = Coroutine::new(move |co| {
        for _ in 0..n {
            co.suspend();
        }
    })
    .unwrap();
    while co.enter() == State::Suspended {}
}

#[inline(never)]
fn wrapped(co: &Co) {
    co.suspend();
    black_box(());
}

fn yield_in_function(n: u64) {
    let co = Coroutine::new(move |co| {
        for _ in 0..n {
            wrapped(co);
        }
    })
    .unwrap();
    while co.enter() == State::Suspended {}
}

fn io_wait(n: u64) {
    // Where the completion finds the operation; an engine keeps its address in the same way.
    let slot: Rc<Cell<*const IoWait>> = Rc::new(Cell::new(std::ptr::null()));
    let inner = slot.clone();
    let co = Coroutine::new(move |co| {
        for _ in 0..n {
            let wait = IoWait::new("nothing");
            wait.submitted();
            inner.set(&wait);
            black_box(wait.wait(co));
        }
        inner.set(std::ptr::null());
    })
    .unwrap();
    co.enter();
    // SAFETY: set by the coroutine that waits in the frame of the operation.
    while let Some(wait) = unsafe { slot.get().as_ref() } {
        wait.complete(1);
    }
}

/// Ten distinct functions: one recursive function would flatter the return predictor.
#[inline(never)]
fn frame<const D: u32>(f: &dyn Fn()) {
    match D {
        9 => frame::<8>(f),
        8 => frame::<7>(f),
        7 => frame::<6>(f),
        6 => frame::<5>(f),
        5 => frame::<4>(f),
        4 => frame::<3>(f),
        3 => frame::<2>(f),
        2 => frame::<1>(f),
        1 => frame::<0>(f),
        _ => f(),
    }
    // Keeps the frame: no tail call.
    black_box(D);
}

fn raw_down_up(n: u64) {
    let mut co = corosensei::Coroutine::new(move |y: &corosensei::Yielder<(), ()>, ()| {
        for _ in 0..n {
            frame::<9>(&|| y.suspend(()));
        }
    });
    while co.resume(()).as_yield().is_some() {}
}

fn down_up(n: u64) {
    let co = Coroutine::new(move |co| {
        for _ in 0..n {
            frame::<9>(&|| co.suspend());
        }
    })
    .unwrap();
    while co.enter() == State::Suspended {}
}

fn round_robin<const N: u64>(n: u64) {
    let all: Vec<Coroutine> = (0..N)
        .map(|_| {
            Coroutine::new(move |co| {
                for _ in 0..n / N {
                    co.suspend();
                }
            })
            .unwrap()
        })
        .collect();
    for _ in 0..=n / N {
        for co in &all {
            co.enter();
        }
    }
}

fn raw_life(n: u64) {
    let mut stack = corosensei::stack::DefaultStack::new(256 << 10).unwrap();
    for i in 0..n {
        let mut co =
            corosensei::Coroutine::with_stack(stack, move |_: &corosensei::Yielder<(), ()>, ()| {
                black_box(i);
            });
        co.resume(());
        stack = co.into_stack();
    }
}

fn life(n: u64) {
    for i in 0..n {
        let co = Coroutine::new(move |_| {
            black_box(i);
        })
        .unwrap();
        co.enter();
    }
}

/// A home whose only thread is this one.
struct Here;

impl Schedule for Here {
    fn schedule(&self, ready: Ready) {
        ready.enter();
    }
    fn is_home(&self) -> bool {
        true
    }
    fn name(&self) -> &str {
        "here"
    }
}

thread_local!(static WAITS: Cell<*const IoWait> = const { Cell::new(std::ptr::null()) });

/// Starts a coroutine that waits for one operation, and tells where that is.
#[inline(always)]
fn wait_once(co: &Co) {
    let wait = IoWait::new("nothing");
    wait.submitted();
    WAITS.set(&wait);
    black_box(wait.wait(co));
}

fn life_in_home(n: u64) {
    let home: Arc<dyn Schedule> = Arc::new(Here);
    for _ in 0..n {
        start(&home, "life", wait_once).unwrap();
        // SAFETY: the coroutine waits in the frame of the operation.
        unsafe { &*WAITS.get() }.complete(1);
    }
}

fn lives_in_home(n: u64) {
    let home: Arc<dyn Schedule> = Arc::new(Here);
    let mut waits = [std::ptr::null::<IoWait>(); 32];
    for i in 0..n.max(64) {
        let slot = (i % 32) as usize;
        if i >= 32 {
            // SAFETY: the coroutine waits in the frame of the operation.
            unsafe { &*waits[slot] }.complete(1);
        }
        start(&home, "life", wait_once).unwrap();
        waits[slot] = WAITS.get();
    }
    for wait in waits {
        // SAFETY: as above.
        unsafe { &*wait }.complete(1);
    }
}

fn nesting(n: u64) {
    fn level(left: u32) {
        if left > 0 {
            Coroutine::new(move |_| level(left - 1)).unwrap().enter();
        }
    }
    for _ in 0..n / 1000 {
        level(1000);
    }
}
