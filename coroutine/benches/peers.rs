//! Ours beside raw corosensei, the generator crate, an async poll and a function call, in one run.
//!
//! `taskset -c 1 cargo bench -p coblock-coroutine --bench peers` prints a table: nanoseconds of CPU
//! time (median of nine interleaved rounds), and multiples of raw corosensei. With `--svg FILE` it
//! draws the table, too. `once ROW SUBJECT N` does exactly N operations of one row and prints
//! nothing: for counting instructions. `docs/coroutines.md` explains the rows.

mod support {
    pub mod chart;
    pub mod cpu_time;
}

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::VecDeque;
use std::future::Future;
use std::hint::black_box;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread::ThreadId;

use coblock_coroutine::{Coroutine, CoroutineOptions, Ready, Schedule, State, WakeHandle, start};
use corosensei::Yielder;
use corosensei::stack::DefaultStack;
use generator::{Gn, LocalGenerator, Scope};

use support::chart::chart;
use support::cpu_time::cpu_ns;

/// A library under test: create, enter, suspend, and reuse of stacks as it offers it.
trait Lib: 'static {
    const NAME: &'static str;
    type Co: 'static;
    /// What the body needs in order to suspend.
    type Y;
    fn create<F: FnOnce(&Self::Y) + 'static>(f: F) -> Self::Co;
    /// True while it can be entered again.
    fn enter(co: &mut Self::Co) -> bool;
    fn suspend(y: &Self::Y);
    /// Gives the stack of one that has ended back.
    fn finish(co: Self::Co);
    /// Makes a coroutine on a stack that is mapped for it, runs it to its end, and unmaps it.
    fn run_on_a_new_stack();
}

struct Ours;
impl Lib for Ours {
    const NAME: &'static str = "coblock";
    type Co = Coroutine;
    type Y = coblock_coroutine::Co;
    #[inline(always)]
    fn create<F: FnOnce(&Self::Y) + 'static>(f: F) -> Coroutine {
        Coroutine::new(|co| f(co)).expect("a stack")
    }
    #[inline(always)]
    fn enter(co: &mut Coroutine) -> bool {
        co.enter() == State::Suspended
    }
    #[inline(always)]
    fn suspend(y: &Self::Y) {
        y.suspend();
    }
    #[inline(always)]
    fn finish(co: Coroutine) {
        drop(co);
    }
    /// Stacks are never unmapped, and the next coroutine would get this one: so it suspends, and
    /// keeps it for ever. Of a size that no other row uses, so that none is idle.
    fn run_on_a_new_stack() {
        let options = CoroutineOptions {
            stack_size: 512 << 10,
            ..CoroutineOptions::default()
        };
        let co = Coroutine::with_options(&options, |co| co.suspend()).expect("a stack");
        assert_eq!(co.enter(), State::Suspended);
        std::mem::forget(co);
    }
}

struct Raw;
thread_local!(static RAW: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) });
impl Lib for Raw {
    const NAME: &'static str = "corosensei";
    type Co = corosensei::Coroutine<(), (), (), DefaultStack>;
    type Y = Yielder<(), ()>;
    #[inline(always)]
    fn create<F: FnOnce(&Self::Y) + 'static>(f: F) -> Self::Co {
        let stack = RAW.with_borrow_mut(Vec::pop);
        let stack = stack.unwrap_or_else(|| DefaultStack::new(256 << 10).expect("a stack"));
        corosensei::Coroutine::with_stack(stack, |y: &Yielder<(), ()>, ()| f(y))
    }
    #[inline(always)]
    fn enter(co: &mut Self::Co) -> bool {
        co.resume(()).as_yield().is_some()
    }
    #[inline(always)]
    fn suspend(y: &Self::Y) {
        y.suspend(());
    }
    #[inline(always)]
    fn finish(co: Self::Co) {
        RAW.with_borrow_mut(|stacks| stacks.push(co.into_stack()));
    }
    fn run_on_a_new_stack() {
        let mut co = corosensei::Coroutine::with_stack(
            DefaultStack::new(256 << 10).expect("a stack"),
            |_: &Yielder<(), ()>, ()| (),
        );
        co.resume(());
    }
}

type Gen = LocalGenerator<'static, (), ()>;
/// The scope that the crate lends to a body.
struct Lent(UnsafeCell<Scope<'static, 'static, (), ()>>);
fn lent(scope: Scope<'_, '_, (), ()>) -> Lent {
    // SAFETY: only used inside the body that the scope was given to.
    let scope = unsafe {
        std::mem::transmute::<Scope<'_, '_, (), ()>, Scope<'static, 'static, (), ()>>(scope)
    };
    Lent(UnsafeCell::new(scope))
}
struct GeneratorCrate;
thread_local!(static GENS: RefCell<Vec<Gen>> = const { RefCell::new(Vec::new()) });
impl Lib for GeneratorCrate {
    const NAME: &'static str = "generator";
    type Co = Gen;
    type Y = Lent;
    #[inline(always)]
    fn create<F: FnOnce(&Lent) + 'static>(f: F) -> Gen {
        match GENS.with_borrow_mut(Vec::pop) {
            Some(mut kept) => {
                kept.scoped_init(move |s| f(&lent(s)));
                kept
            }
            // Its sizes are in machine words.
            None => Gn::<()>::new_scoped_opt_local((256 << 10) / 8, move |s| f(&lent(s))),
        }
    }
    #[inline(always)]
    fn enter(co: &mut Gen) -> bool {
        co.resume();
        !co.is_done()
    }
    #[inline(always)]
    fn suspend(y: &Lent) {
        // SAFETY: the body has it to itself.
        let scope = unsafe { &mut *y.0.get() };
        scope.yield_with(());
    }
    #[inline(always)]
    fn finish(co: Gen) {
        GENS.with_borrow_mut(|kept| kept.push(co));
    }
    fn run_on_a_new_stack() {
        let mut co = Gn::<()>::new_scoped_opt_local((256 << 10) / 8, move |s| _ = lent(s));
        co.resume();
    }
}

// ---- bodies

fn yields<L: Lib>(n: u64) {
    let left = Rc::new(Cell::new(n));
    let inside = left.clone();
    let mut co = L::create(move |y| {
        while inside.get() > 0 {
            inside.set(inside.get() - 1);
            L::suspend(y);
        }
    });
    while left.get() > 0 {
        L::enter(&mut co);
    }
    assert!(!L::enter(&mut co));
    L::finish(co);
}

/// Ten distinct functions: one recursive function would flatter the return predictor.
#[inline(never)]
fn frame<const D: u32, R>(f: &mut dyn FnMut() -> R) -> R {
    let answer = match D {
        9 => frame::<8, R>(f),
        8 => frame::<7, R>(f),
        7 => frame::<6, R>(f),
        6 => frame::<5, R>(f),
        5 => frame::<4, R>(f),
        4 => frame::<3, R>(f),
        3 => frame::<2, R>(f),
        2 => frame::<1, R>(f),
        1 => frame::<0, R>(f),
        _ => f(),
    };
    // Keeps the frame: no tail call.
    black_box(&answer);
    black_box(D);
    answer
}

fn down_up<L: Lib>(n: u64) {
    let left = Rc::new(Cell::new(n));
    let inside = left.clone();
    let mut co = L::create(move |y| {
        while inside.get() > 0 {
            inside.set(inside.get() - 1);
            frame::<9, ()>(&mut || L::suspend(y));
        }
    });
    while left.get() > 0 {
        L::enter(&mut co);
    }
    assert!(!L::enter(&mut co));
    L::finish(co);
}

fn enter_from_depth<L: Lib>(n: u64) {
    let left = Rc::new(Cell::new(n));
    let inside = left.clone();
    let mut co = L::create(move |y| {
        while inside.get() > 0 {
            inside.set(inside.get() - 1);
            L::suspend(y);
        }
    });
    while left.get() > 0 {
        frame::<9, bool>(&mut || L::enter(&mut co));
    }
    assert!(!L::enter(&mut co));
    L::finish(co);
}

/// A stack that nobody has used before.
fn unpooled<L: Lib>(n: u64) {
    for _ in 0..n {
        L::run_on_a_new_stack();
    }
}

fn lifecycle<L: Lib>(n: u64) {
    let hits = Rc::new(Cell::new(0));
    for _ in 0..n {
        let hit = hits.clone();
        let mut co = L::create(move |_| hit.set(hit.get() + 1));
        L::enter(&mut co);
        L::finish(co);
    }
    assert_eq!(hits.get(), n);
}

fn cost<L: Lib>(n: u64) {
    for _ in 0..n {
        let mut co = L::create(|y| L::suspend(y));
        L::enter(&mut co);
        L::enter(&mut co);
        L::finish(co);
    }
}

fn nest<L: Lib>(left: u64) {
    if left > 0 {
        let mut co = L::create(move |_| nest::<L>(left - 1));
        L::enter(&mut co);
        L::finish(co);
    }
}

fn nesting<L: Lib>(n: u64) {
    (0..n.div_ceil(1000)).for_each(|_| nest::<L>(1000));
}

fn round_robin<L: Lib, const K: u64>(n: u64) {
    let turns = (n / K).max(1);
    let mut all: Vec<L::Co> = untimed(|| {
        let create = |_| L::create(move |y| (0..=turns).for_each(|_| L::suspend(y)));
        let mut all: Vec<L::Co> = (0..K).map(create).collect();
        all.iter_mut().for_each(|co| assert!(L::enter(co)));
        all
    });
    for _ in 0..turns {
        for co in &mut all {
            L::enter(co);
        }
    }
    untimed(|| {
        for mut co in all {
            assert!(!L::enter(&mut co));
            L::finish(co);
        }
    });
}

// ---- the floors

#[inline(never)]
fn callee(x: u64) -> u64 {
    black_box(x)
}

fn calls(n: u64) {
    (0..n).for_each(|i| {
        black_box(callee(i));
    });
}

fn calls_down_up(n: u64) {
    (0..n).for_each(|i| {
        frame::<9, u64>(&mut || callee(i));
    });
}

struct Once(bool);
impl Future for Once {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[inline(never)]
fn poll(task: &mut Task) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    task.as_mut().poll(&mut context).is_pending()
}

fn task(turns: u64) -> Task {
    Box::pin(async move {
        for _ in 0..turns {
            Once(false).await;
        }
    })
}

fn async_yields(n: u64) {
    let mut task = task(n);
    while poll(&mut task) {}
}

fn async_lifecycle(n: u64) {
    for _ in 0..n {
        let state = black_box([0u64; 4]);
        let mut task: Task = Box::pin(async move {
            black_box(&state);
        });
        poll(&mut task);
    }
}

fn async_round_robin<const K: u64>(n: u64) {
    let turns = (n / K).max(1);
    let mut all: Vec<Task> = (0..K).map(|_| task(turns)).collect();
    for _ in 0..=turns {
        all.iter_mut().for_each(|task| {
            poll(task);
        });
    }
}

// ---- a wake from another thread

/// A home with a queue, driven by the thread that made it.
struct Home {
    queue: Mutex<VecDeque<Ready>>,
    arrived: Condvar,
    driver: ThreadId,
}

impl Schedule for Home {
    fn schedule(&self, ready: Ready) {
        self.queue.lock().expect("no panics").push_back(ready);
        self.arrived.notify_one();
    }
    fn is_home(&self) -> bool {
        self.driver == std::thread::current().id()
    }
    fn name(&self) -> &str {
        "bench"
    }
}

/// What posting and taking a wake costs, without any sleep: another thread has posted them all
/// before they are taken.
fn remote_wakes(n: u64) {
    const BATCH: u64 = 64;
    let home = Arc::new(Home {
        queue: Mutex::default(),
        arrived: Condvar::new(),
        driver: std::thread::current().id(),
    });
    let schedule: Arc<dyn Schedule> = home.clone();
    let wakers: Rc<RefCell<Vec<WakeHandle>>> = Rc::default();
    let turns = n.div_ceil(BATCH);
    for _ in 0..BATCH {
        let wakers = wakers.clone();
        start(&schedule, "woken", move |co| {
            wakers.borrow_mut().push(co.wake_handle());
            (0..turns).for_each(|_| co.suspend());
        })
        .expect("a stack");
    }
    let wakers = wakers.take();
    let (begin, posted) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let poster = std::thread::spawn(move || {
        while begin.1.recv().is_ok() {
            wakers.iter().for_each(WakeHandle::wake);
            posted.0.send(()).expect("the bench waits");
        }
    });
    for _ in 0..turns {
        begin.0.send(()).expect("the poster waits");
        posted.1.recv().expect("the poster lives");
        while let Some(ready) = { home.queue.lock().expect("no panics").pop_front() } {
            ready.enter();
        }
    }
    drop(begin.0);
    poster.join().expect("the poster ends");
}

// ---- the table

struct Row {
    row: &'static str,
    subject: &'static str,
    n: u64,
    body: fn(u64),
}

fn add<L: Lib>(rows: &mut Vec<Row>) {
    let mut add = |row, n, body| {
        rows.push(Row {
            row,
            subject: L::NAME,
            n,
            body,
        });
    };
    add("yield", 400_000, yields::<L>);
    add("down10", 100_000, down_up::<L>);
    add("enter-from-10", 200_000, enter_from_depth::<L>);
    add("round-robin-16", 200_000, round_robin::<L, 16>);
    add("round-robin-1024", 200_000, round_robin::<L, 1024>);
    add("round-robin-8192", 160_000, round_robin::<L, 8192>);
    add("lifecycle", 200_000, lifecycle::<L>);
    add("cost", 100_000, cost::<L>);
    add("nesting", 20_000, nesting::<L>);
    add("unpooled", 1_000, unpooled::<L>);
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    add::<Ours>(&mut rows);
    add::<Raw>(&mut rows);
    add::<GeneratorCrate>(&mut rows);
    let mut floor = |row, subject, n, body| {
        rows.push(Row {
            row,
            subject,
            n,
            body,
        });
    };
    floor("yield", "async", 400_000, async_yields as fn(u64));
    floor("lifecycle", "async", 200_000, async_lifecycle);
    floor("round-robin-16", "async", 200_000, async_round_robin::<16>);
    floor(
        "round-robin-1024",
        "async",
        200_000,
        async_round_robin::<1024>,
    );
    floor(
        "round-robin-8192",
        "async",
        160_000,
        async_round_robin::<8192>,
    );
    floor("yield", "call", 400_000, calls);
    floor("down10", "call", 100_000, calls_down_up);
    floor("remote-wake", "coblock", 20_000, remote_wakes);
    rows
}

const SUBJECTS: [&str; 5] = ["call", "async", "corosensei", "generator", "coblock"];
const ROUNDS: usize = 9;

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let rows = rows();
    if let [once, row, subject, n] = &args[..]
        && once == "once"
    {
        let found = rows.iter().find(|r| r.row == row && r.subject == subject);
        return (found.expect("no such row").body)(n.parse().expect("a number"));
    }
    if let [memory, n] = &args[..]
        && memory == "memory"
    {
        return tell_memory(n.parse().expect("a number"));
    }
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); rows.len()];
    for round in 0..=ROUNDS {
        for (row, times) in rows.iter().zip(&mut times) {
            EXCLUDED.set(0.0);
            let ns = (cpu_ns(|| (row.body)(row.n)) - EXCLUDED.get()) / row.n as f64;
            // The first round fills pools and caches.
            if round > 0 {
                times.push(ns);
            }
        }
    }
    let mut names: Vec<&str> = Vec::new();
    let mut table = Vec::new();
    for (row, mut times) in rows.iter().zip(times) {
        times.sort_by(f64::total_cmp);
        if !names.contains(&row.row) {
            names.push(row.row);
        }
        table.push((row.row, row.subject, times[ROUNDS / 2]));
    }
    let of = |row: &str, subject: &str| {
        let found = table.iter().find(|(r, s, _)| *r == row && *s == subject);
        found.map(|(.., ns)| *ns)
    };
    print!("| ns |");
    SUBJECTS.iter().for_each(|s| print!(" {s} |"));
    println!(
        " coblock / corosensei |\n|---|{}---|",
        "---|".repeat(SUBJECTS.len())
    );
    for row in &names {
        print!("| {row} |");
        for subject in SUBJECTS {
            match of(row, subject) {
                Some(ns) => print!(" {ns:.1} |"),
                None => print!(" - |"),
            }
        }
        match (of(row, "coblock"), of(row, "corosensei")) {
            (Some(ours), Some(raw)) => println!(" {:.2} |", ours / raw),
            _ => println!(" - |"),
        }
    }
    println!("\n| coroutines | bytes resident each | of page tables each | mappings more |");
    println!("|---|---|---|---|");
    for n in [1_000, 10_000, 100_000, 1_000_000] {
        // Each in a process of its own.
        let mut child = std::process::Command::new(std::env::current_exe().expect("a name"));
        let ended = child.args(["memory", &n.to_string()]).status();
        assert!(ended.expect("it runs").success(), "{n} coroutines");
    }
    if let [svg, file] = &args[..]
        && svg == "--svg"
    {
        std::fs::write(file, chart(&names, SUBJECTS, &of)).expect("the chart can be written");
    }
}

/// What `n` suspended coroutines take: resident memory, page tables, mappings.
fn tell_memory(n: usize) {
    let used = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux");
        let kib = |field: &str| -> usize {
            let line = status.lines().find(|line| line.starts_with(field));
            let number = line.and_then(|line| line.split_whitespace().nth(1));
            number.expect("a number").parse().expect("a number")
        };
        (kib("VmRSS:"), kib("VmPTE:"), maps.lines().count())
    };
    let mut all = Vec::with_capacity(n);
    let before = used();
    for _ in 0..n {
        all.push(Coroutine::new(|co| co.suspend()).expect("a stack"));
    }
    all.iter()
        .for_each(|co| assert_eq!(co.enter(), State::Suspended));
    let after = used();
    let each = |kib: usize| kib * 1024 / n;
    println!(
        "| {n} | {} | {} | {} |",
        each(after.0 - before.0) - size_of::<Coroutine>(),
        each(after.1 - before.1),
        after.2 - before.2
    );
    std::mem::forget(all);
}

thread_local!(static EXCLUDED: Cell<f64> = const { Cell::new(0.0) });

/// Runs `f` outside of what is measured: setting up and taking down.
fn untimed<R>(f: impl FnOnce() -> R) -> R {
    let mut answer = None;
    let took = cpu_ns(|| answer = Some(f()));
    EXCLUDED.set(EXCLUDED.get() + took);
    answer.expect("it ran")
}
