//! One child process, with what it cost: wait4 tells the CPU time of all its threads, kernel workers included.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a finished child did and cost.
pub struct Finished {
    /// Exit status as wait4 gives it; 0 is success.
    pub status: i32,
    /// What it printed on its standard output.
    pub stdout: String,
    /// User and system time of all its threads.
    pub cpu: Duration,
    /// From before the start until it was reaped.
    pub wall: Duration,
    /// Largest resident set, in KiB.
    pub rss_kib: i64,
}

/// Runs `command` to its end; its standard error goes to ours.
///
/// # Errors
/// What kept it from starting, naming the program.
pub fn run(command: &mut Command) -> Result<Finished, String> {
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot run {}: {e}", command.get_program().display()))?;
    let mut stdout = String::new();
    let mut pipe = child.stdout.take().expect("stdout was asked for as a pipe");
    pipe.read_to_string(&mut stdout)
        .map_err(|e| format!("reading a child's output: {e}"))?;
    let (status, usage) = wait4(child.id())?;
    // `Child` has no destructor that waits, so it may go although somebody else has reaped the process.
    drop(child);
    Ok(Finished {
        status,
        stdout,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        wall: began.elapsed(),
        rss_kib: usage.ru_maxrss,
    })
}

fn wait4(pid: u32) -> Result<(i32, libc::rusage), String> {
    let pid = libc::pid_t::try_from(pid).expect("a process id fits pid_t");
    let mut status = 0;
    // SAFETY: rusage consists of integers only, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers come from exclusive borrows of live locals, which wait4 fills and does not keep.
        let reaped = unsafe { libc::wait4(pid, &mut status, 0, &mut usage) };
        if reaped == pid {
            return Ok((status, usage));
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(format!("wait4({pid}): {error}"));
        }
    }
}

fn time(t: libc::timeval) -> Duration {
    let micros =
        u64::try_from(t.tv_sec * 1_000_000 + t.tv_usec).expect("a time spent is not negative");
    Duration::from_micros(micros)
}
