//! What does a request through the ring cost above the ring itself?
//!
//! 4 KiB reads from the page cache, at depth 1 and 32: once by a plain loop over the io-uring crate
//! (the floor), once by coroutines of a home, a new one for each request. Rounds alternate, and
//! only the ratio of one run means something.

use coblock_aio::{ContextOptions, EngineKind, Home, Medium, co};
use io_uring::{IoUring, opcode, types::Fd};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;

const BLOCK: usize = 4096;
const BLOCKS: usize = 16_384;
const REQUESTS: u64 = 100_000;
const ROUNDS: usize = 5;

/// Where request `n` reads, in blocks.
fn place(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50
}

/// Nanoseconds of CPU that this thread has used; other programs disturb it less than the clock.
fn cpu_ns() -> f64 {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    line.split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .expect("a number")
}

fn floor(file: &File, depth: u64) -> f64 {
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(64)
        .expect("a ring");
    let mut buffers = vec![vec![0u8; BLOCK]; usize::try_from(depth).expect("small")];
    let began = cpu_ns();
    let (mut started, mut ended) = (0, 0);
    let mut push = |ring: &mut IoUring, slot: u64, n: u64| {
        let buf = &mut buffers[usize::try_from(slot).expect("small")];
        let len = u32::try_from(BLOCK).expect("small");
        let entry = opcode::Read::new(Fd(file.as_raw_fd()), buf.as_mut_ptr(), len)
            .offset(place(n) * BLOCK as u64)
            .build()
            .user_data(slot);
        // SAFETY: the buffer of the slot is used by this request alone until its completion is
        // seen, and lives until all are.
        unsafe { ring.submission().push(&entry) }.expect("space");
    };
    while started < depth {
        push(&mut ring, started, started);
        started += 1;
    }
    while ended < REQUESTS {
        ring.submit_and_wait(1).expect("enter");
        loop {
            let Some(done) = ring.completion().next() else {
                break;
            };
            assert_eq!(done.result(), 4096);
            ended += 1;
            if started < REQUESTS {
                push(&mut ring, done.user_data(), started);
                started += 1;
            }
        }
    }
    (cpu_ns() - began) / REQUESTS as f64
}

struct Run {
    file: Rc<File>,
    /// Lets the loop serve reads that are alone.
    cached: bool,
    started: Cell<u64>,
    ended: Cell<u64>,
}

/// The buffer goes from each request to the next one, as the floor's do.
fn start_next(run: &Rc<Run>, mut buf: Box<[u8; BLOCK]>) {
    let n = run.started.get();
    if n == REQUESTS {
        return;
    }
    run.started.set(n + 1);
    let run = run.clone();
    coblock_aio::spawn("reader", move |c| {
        let at = place(n) * BLOCK as u64;
        let target = (&mut *buf).into();
        let result = if run.cached {
            co::read_from(c, run.file.as_fd(), Medium::PageCache, at, target)
        } else {
            co::read(c, run.file.as_fd(), at, target)
        };
        result.expect("a read");
        run.ended.set(run.ended.get() + 1);
        start_next(&run, buf);
    })
    .expect("a stack");
}

fn ours(home: &Home, file: &Rc<File>, cached: bool, depth: u64) -> f64 {
    let run = Rc::new(Run {
        cached,
        file: file.clone(),
        started: Cell::new(0),
        ended: Cell::new(0),
    });
    let began = cpu_ns();
    home.with(|| (0..depth).for_each(|_| start_next(&run, Box::new([0; BLOCK]))));
    while run.ended.get() < REQUESTS {
        home.poll(true);
    }
    (cpu_ns() - began) / REQUESTS as f64
}

fn main() {
    let home = Home::new(ContextOptions {
        engine: EngineKind::IoUring,
        ..ContextOptions::named("bench")
    });
    let Ok(home) = home.inspect_err(|why| println!("no io_uring here: {why}")) else {
        return;
    };
    let file = tempfile::tempfile().expect("a temporary file");
    std::io::Write::write_all(&mut &file, &vec![7; BLOCK * BLOCKS]).expect("64 MiB");
    let file = Rc::new(file);
    for (depth, cached) in [(1, false), (1, true), (32, false), (32, true)] {
        let (mut least_floor, mut least_ours) = (f64::MAX, f64::MAX);
        for _ in 0..ROUNDS {
            least_floor = least_floor.min(floor(&file, depth));
            least_ours = least_ours.min(ours(&home, &file, cached, depth));
        }
        println!(
            "depth {depth:2}{}: floor {least_floor:.0} ns, coroutines {least_ours:.0} ns CPU a request, \
             ratio {:.3}",
            if cached { ", cached" } else { "        " },
            least_ours / least_floor
        );
    }
    let stats = home.stats();
    println!(
        "{} requests, {} enters, {} passes",
        stats.ring_requests, stats.ring_enters, stats.passes
    );
    home.close();
}
