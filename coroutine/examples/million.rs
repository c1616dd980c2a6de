//! How many coroutines fit: makes N of them (a million if not told), each suspended on a guarded
//! stack of 256 KiB, and prints mappings, memory and CPU time.
//!
//! `cargo run --release -p coblock-coroutine --example million -- 1000000`

use coblock_coroutine::{Coroutine, State, guard_kind, stats, trim_idle};

fn main() {
    let wanted: usize = std::env::args()
        .nth(1)
        .map_or(1_000_000, |n| n.parse().expect("a number of coroutines"));
    let mut all: Vec<Coroutine> = Vec::with_capacity(wanted);
    let (maps, memory) = (mappings(), memory());
    let began = cpu_ns();
    let mut stopped = None;
    for _ in 0..wanted {
        match Coroutine::new(|co| co.suspend()) {
            Ok(co) => {
                assert_eq!(co.enter(), State::Suspended);
                all.push(co);
            }
            Err(why) => {
                stopped = Some(why);
                break;
            }
        }
    }
    let n = all.len().max(1);
    let took = (cpu_ns() - began) as f64 / n as f64;
    let per = |now: u64, before: u64| (now.saturating_sub(before)) as f64 * 1024.0 / n as f64;
    let now = self::memory();
    println!("{} coroutines suspended ({})", all.len(), guard_kind());
    if let Some(why) = stopped {
        println!("then: {why}");
    }
    println!(
        "mappings: {} more, arenas: {}",
        mappings() - maps,
        stats().arenas_mapped
    );
    println!("resident: {:.0} bytes each", per(now.0, memory.0));
    println!("page tables: {:.0} bytes each", per(now.1, memory.1));
    println!("create and enter, first use of the stack: {took:.0} ns");
    let began = cpu_ns();
    for co in &all {
        assert_eq!(co.enter(), State::Finished);
    }
    println!("finish: {:.0} ns", (cpu_ns() - began) as f64 / n as f64);
    let began = cpu_ns();
    let mut trimmed = 0;
    loop {
        let batch = trim_idle(256);
        trimmed += batch;
        if batch < 256 {
            break;
        }
    }
    let took = (cpu_ns() - began) as f64 / trimmed.max(1) as f64;
    println!("trimmed {trimmed} in batches of 256: {took:.0} ns each");
    println!("{:?}", stats());
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count())
}

/// Resident memory and page tables, in KiB.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    (field("VmRSS:"), field("VmPTE:"))
}

/// CPU time of this process.
fn cpu_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes to our own timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
