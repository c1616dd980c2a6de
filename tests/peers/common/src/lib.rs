//! What the programs of this workspace share: the flags of `qemu-img bench` that they know, its
//! sequence of offsets, aligned buffers, and the line of JSON at the end.
//!
//! Offsets are those of `qemu-img bench` 10: the first is `-o`, each next one lies `-S` bytes
//! further, modulo the size of the disk. Requests are taken in this order by whoever is free.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// The command line.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image.
    pub image: PathBuf,
    /// Write instead of read.
    pub write: bool,
    /// The byte to write.
    pub pattern: u8,
    /// Past the host's page cache.
    pub direct: bool,
    /// Requests in all.
    pub count: u64,
    /// Requests in flight.
    pub depth: usize,
    /// Bytes of one request.
    pub size: usize,
    /// Bytes from one request to the next.
    pub step: u64,
    /// Guest offset of the first request.
    pub offset: u64,
    /// Threads that share the requests in flight.
    pub threads: usize,
}

impl Plan {
    /// Reads the words after the program's name. `threads` tells whether the program knows more
    /// than one.
    ///
    /// # Errors
    /// An unknown flag, a flag without its value, a value out of range, or not exactly one image.
    pub fn parse(words: impl Iterator<Item = String>, threads: bool) -> Result<Plan, String> {
        let mut plan = Plan {
            image: PathBuf::new(),
            write: false,
            pattern: 0,
            direct: false,
            count: 75_000,
            depth: 64,
            size: 4096,
            step: 0,
            offset: 0,
            threads: 1,
        };
        let mut images = Vec::new();
        let mut words = words;
        while let Some(word) = words.next() {
            if word == "-w" {
                plan.write = true;
                continue;
            }
            if !word.starts_with('-') {
                images.push(PathBuf::from(word));
                continue;
            }
            let (flag, value) = match word.split_once('=') {
                Some((flag, value)) => (flag.to_string(), value.to_string()),
                None => match words.next() {
                    Some(value) => (word, value),
                    None => return Err(format!("{word} needs a value, or is unknown")),
                },
            };
            match flag.as_str() {
                "-c" => plan.count = number(&flag, &value)?,
                "-d" => plan.depth = number(&flag, &value)?,
                "-o" => plan.offset = number(&flag, &value)?,
                "-s" => plan.size = number(&flag, &value)?,
                "-S" => plan.step = number(&flag, &value)?,
                "--pattern" => plan.pattern = number(&flag, &value)?,
                "--threads" if threads => plan.threads = number(&flag, &value)?,
                "-t" => {
                    plan.direct = match value.as_str() {
                        "none" => true,
                        "writeback" => false,
                        _ => return Err(format!("-t {value}: only none and writeback")),
                    }
                }
                _ => return Err(format!("unknown flag {flag}")),
            }
        }
        let [image] = &images[..] else {
            return Err(format!("one image, not {}", images.len()));
        };
        plan.image.clone_from(image);
        if plan.depth == 0 || plan.size == 0 || plan.threads == 0 {
            return Err("depth, size and threads must be above zero".into());
        }
        if plan.step == 0 {
            plan.step = plan.size as u64;
        }
        Ok(plan)
    }

    /// Where request number `index` begins on a disk of `disk` bytes.
    pub fn offset_of(&self, index: u64, disk: u64) -> u64 {
        let at = u128::from(self.offset) + u128::from(index) * u128::from(self.step);
        u64::try_from(at % u128::from(disk)).expect("a remainder is below its divisor")
    }
}

fn number<N: std::str::FromStr<Err: Display>>(flag: &str, value: &str) -> Result<N, String> {
    value.parse().map_err(|e| format!("{flag} {value}: {e}"))
}

/// Hands out the numbers of the requests.
pub struct Requests {
    next: AtomicU64,
    count: u64,
}

impl Requests {
    /// All requests of `plan`.
    pub fn of(plan: &Plan) -> Requests {
        Requests {
            next: AtomicU64::new(0),
            count: plan.count,
        }
    }

    /// The next one, until all are taken.
    pub fn take(&self) -> Option<u64> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.count).then_some(index)
    }
}

/// Memory at an address that O_DIRECT takes.
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` bytes, each `fill`, at a multiple of 4096.
    pub fn new(len: usize, fill: u8) -> Buffer {
        const ALIGNMENT: usize = 4096;
        let bytes = vec![fill; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        assert!(start < ALIGNMENT, "the allocator's bytes can be aligned");
        Buffer { bytes, start, len }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// Measures from the open image to the end of the last flush.
pub struct Meter {
    began: Instant,
    cpu: Duration,
    requests_took: Duration,
}

impl Meter {
    /// Begins; the image is open.
    pub fn begin() -> Meter {
        Meter {
            cpu: cpu_time(),
            began: Instant::now(),
            requests_took: Duration::ZERO,
        }
    }

    /// The last request is done; a flush may follow.
    pub fn requests_done(&mut self) {
        self.requests_took = self.began.elapsed();
    }

    /// Everything is done: prints the line.
    pub fn print(self, plan: &Plan) {
        let all = self.began.elapsed();
        let cpu = cpu_time().saturating_sub(self.cpu);
        println!(
            "{{\"requests\":{},\"seconds\":{:.6},\"flush_seconds\":{:.6},\"cpu_seconds\":{:.6}}}",
            plan.count,
            self.requests_took.as_secs_f64(),
            (all - self.requests_took).as_secs_f64(),
            cpu.as_secs_f64(),
        );
    }
}

/// CPU time of all threads of this process, the kernel's workers for its ring included.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(now.tv_sec).expect("a time spent is not negative"),
        u32::try_from(now.tv_nsec).expect("nanoseconds of a second fit"),
    )
}

/// The body of each program's `main`: parses, runs, prints what went wrong.
pub fn main(threads: bool, run: impl FnOnce(Plan) -> Result<(), String>) -> ExitCode {
    match Plan::parse(std::env::args().skip(1), threads).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Result<Plan, String> {
        Plan::parse(words.iter().map(|w| (*w).to_string()), false)
    }

    /// The sequence is that of `qemu-img bench`: it wraps round at the end of the disk.
    #[test]
    fn offsets_wrap() {
        let plan = plan(&["-o", "4096", "-S", "8192", "image"]).unwrap();
        let offsets: Vec<u64> = (0..4).map(|i| plan.offset_of(i, 16384)).collect();
        assert_eq!(offsets, [4096, 12288, 4096, 12288]);
    }

    /// A flag that would be ignored is refused: the figures would be of something else.
    #[test]
    fn unknown_flags_are_refused() {
        assert!(plan(&["-n", "1", "image"]).is_err());
        assert!(plan(&["-t", "unsafe", "image"]).is_err());
        assert!(plan(&["--threads", "2", "image"]).is_err());
        assert!(plan(&["-c"]).is_err());
        assert!(plan(&["a", "b"]).is_err());
        assert!(plan(&["--pattern=256", "image"]).is_err());
        assert_eq!(plan(&["--pattern=7", "-w", "image"]).unwrap().pattern, 7);
    }

    /// Buffers suit O_DIRECT.
    #[test]
    fn buffers_are_aligned() {
        for len in [1, 512, 4096, 65536] {
            let buffer = Buffer::new(len, 3);
            assert_eq!(buffer.bytes().as_ptr().addr() % 4096, 0);
            assert_eq!(buffer.bytes(), vec![3; len]);
        }
    }
}
