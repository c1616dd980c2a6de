//! One child process, with what it cost: wait4 tells the CPU time of all its threads, kernel
//! workers included.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What a finished child did and cost.
pub struct Finished {
    /// Exit status as wait4 gives it; 0 is success.
    pub status: i32,
    /// What it printed on its standard output.
    pub stdout: String,
    /// What it printed on its standard error.
    pub stderr: String,
    /// User and system time of all its threads.
    pub cpu: Duration,
    /// From before the start until it was reaped.
    pub wall: Duration,
    /// Largest resident set, in KiB; never below that of this process, which it starts from.
    pub rss_kib: i64,
}

/// Runs `command` to its end, and kills it when that takes longer than `limit`.
///
/// # Errors
/// What kept it from starting, naming the program; that it was killed.
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished, String> {
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot run {}: {e}", command.get_program().display()))?;
    let stdout = child.stdout.take().expect("stdout was asked for as a pipe");
    let stderr = child.stderr.take().expect("stderr was asked for as a pipe");
    let (pid, killed, stdout, stderr) = std::thread::scope(|scope| {
        let pid = child.id();
        let (done, is_done) = mpsc::channel();
        let watch = scope.spawn(move || kill_after(&mut child, &is_done, limit));
        let errors = scope.spawn(|| read(stderr));
        let output = read(stdout);
        let errors = errors.join().expect("reading does not panic");
        // Nobody has reaped it, so its number is still its own while the watcher may kill it.
        drop(done);
        let killed = watch.join().expect("watching does not panic");
        (pid, killed, output, errors)
    });
    let (status, usage) = wait4(pid)?;
    if killed {
        return Err(format!("killed after {} s", limit.as_secs()));
    }
    Ok(Finished {
        status,
        stdout: stdout?,
        stderr: stderr?,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        wall: began.elapsed(),
        rss_kib: usage.ru_maxrss,
    })
}

/// What a command prints that is run in the workspace's folder.
///
/// # Errors
/// That it cannot be run, or its status where that is not success.
pub fn asked(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .current_dir(crate::workspace())
        .args(args)
        .output()
        .map_err(|e| format!("cannot run {program}: {e}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{program}: {}", output.status)),
    }
}

/// Waits until the other side of `is_done` is gone, or kills `child` after `limit`; true if it did.
///
/// Takes a borrow, and `Child` has no destructor that waits: the process is reaped by wait4.
fn kill_after(child: &mut Child, is_done: &mpsc::Receiver<()>, limit: Duration) -> bool {
    let late = is_done.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
    late && child.kill().is_ok()
}

fn read(mut pipe: impl Read) -> Result<String, String> {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes)
        .map_err(|e| format!("reading a child's output: {e}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn wait4(pid: u32) -> Result<(i32, libc::rusage), String> {
    let pid = libc::pid_t::try_from(pid).expect("a process id fits pid_t");
    let mut status = 0;
    // SAFETY: rusage consists of integers only, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers come from exclusive borrows of live locals, which wait4 fills and
        // does not keep.
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
