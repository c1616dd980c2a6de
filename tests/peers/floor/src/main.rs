//! The floor: what remains when the mapping costs one look-up in memory and everything else is the
//! kernel.
//!
//! `--threads` threads (one), a ring each, `-d` slots in all; each slot has a buffer of its own, and
//! each thread takes every N-th request. Nothing is registered with the rings. Only clusters that exist can be read or written; loading the mapping is not measured.

mod mapping;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;

use io_uring::{IoUring, opcode, types};
use mapping::Mapping;
use peer_common::{Buffer, Meter, Plan};

/// `O_DIRECT` of this architecture, which std does not name.
#[cfg(any(target_arch = "x86_64", target_arch = "riscv64"))]
const O_DIRECT: i32 = 0o40000;
#[cfg(target_arch = "aarch64")]
const O_DIRECT: i32 = 0o200_000;

fn main() -> ExitCode {
    peer_common::main(true, run)
}

fn run(plan: Plan) -> Result<(), String> {
    let mapping = Mapping::load(&plan.image)?;
    let mut files = Vec::new();
    for path in &mapping.files {
        let file = OpenOptions::new()
            .read(true)
            .write(plan.write && files.is_empty())
            .custom_flags(if plan.direct { O_DIRECT } else { 0 })
            .open(path)
            .map_err(|e| format!("{}: {e}", path.display()))?;
        files.push(file);
    }
    let mut meter = Meter::begin();
    if plan.threads > plan.depth {
        return Err("more threads than requests in flight".into());
    }
    std::thread::scope(|scope| {
        let thread = |number| {
            let (plan, mapping, files) = (&plan, &mapping, &files);
            scope.spawn(move || requests(number, plan, mapping, files))
        };
        let threads: Vec<_> = (1..plan.threads).map(thread).collect();
        let mut outcome = requests(0, &plan, &mapping, &files);
        for thread in threads {
            outcome = outcome.and(thread.join().expect("a panic ends the process"));
        }
        outcome
    })?;
    meter.requests_done();
    if plan.write {
        files[0].sync_data().map_err(|e| format!("flush: {e}"))?;
    }
    meter.print(&plan);
    Ok(())
}

/// Sends the share of thread `number`, with its share of `depth` at once.
fn requests(number: usize, plan: &Plan, mapping: &Mapping, files: &[File]) -> Result<(), String> {
    let threads = plan.threads;
    let depth = plan.depth / threads + usize::from(number < plan.depth % threads);
    let entries = u32::try_from(depth.next_power_of_two().max(2))
        .map_err(|_| "too many requests in flight")?;
    let len = u32::try_from(plan.size).map_err(|_| "too large a request")?;
    let mut buffers: Vec<Buffer> = (0..depth)
        .map(|_| Buffer::new(plan.size, plan.pattern))
        .collect();
    let ring: io::Result<IoUring> = IoUring::builder()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .build(entries);
    let mut ring = ring.map_err(|e| format!("io_uring: {e}"))?;
    let mut free: Vec<usize> = (0..depth).rev().collect();
    let (mut next, mut in_flight) = (number as u64, 0);
    let mut failure = None;
    while in_flight > 0 || (next < plan.count && failure.is_none()) {
        while next < plan.count && failure.is_none() {
            let Some(slot) = free.pop() else { break };
            let guest = plan.offset_of(next, mapping.disk);
            let Some((file, host)) = mapping.find(guest) else {
                failure = Some(format!("no cluster at guest offset {guest}"));
                break;
            };
            if plan.write && file != 0 {
                failure = Some(format!("guest offset {guest} lies in a backing file"));
                break;
            }
            next += threads as u64;
            let fd = types::Fd(files[file].as_raw_fd());
            let memory = buffers[slot].bytes_mut().as_mut_ptr();
            let entry = if plan.write {
                opcode::Write::new(fd, memory, len).offset(host).build()
            } else {
                opcode::Read::new(fd, memory, len).offset(host).build()
            };
            // SAFETY: the slot's buffer has `len` bytes and is neither touched nor moved until the
            // slot is free again, which is when its completion was seen; this loop ends only when
            // every slot is, and a panic ends the process (Cargo.toml). The file outlives it.
            let pushed = unsafe { ring.submission().push(&entry.user_data(slot as u64)) };
            pushed.expect("the ring has an entry for each slot");
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Requests may be on their way, so their memory must stay: no return from here.
            Err(e) => panic!("io_uring_enter: {e}"),
        }
        for completion in ring.completion() {
            if u32::try_from(completion.result()) != Ok(len) {
                failure.get_or_insert(format!("a request ended with {}", completion.result()));
            }
            free.push(usize::try_from(completion.user_data()).expect("a slot's number"));
            in_flight -= 1;
        }
    }
    failure.map_or(Ok(()), Err)
}
