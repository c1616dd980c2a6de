//! `cargo xtask bench`: `coblock img bench` against `qemu-img bench`, side by side.
//!
//! Both programs get the same flags on the same image (for writes: on copies of it), round by round, the order rotated
//! every round, so that a slow minute of a shared machine hits both. The result of a row is the median over rounds of
//! the ratio *within* a round, of CPU time per request and of requests per second; absolute figures are printed beside
//! it. CPU comes from wait4 and includes start-up and the kernel's workers. After every write both images are judged by
//! `qemu-img check` and compared with each other, guest byte by guest byte.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::{Outcome, child};

const USAGE: &str = "\
Usage: cargo xtask bench [OPTIONS]

  --rounds N      rounds per row (5)
  --size MIB      size of the image, in MiB (1024)
  --scale F       multiplies the number of requests of every row (1.0)
  --only WORDS    rows whose name contains every one of these comma-separated words
  --dir DIR       where the images go; must allow O_DIRECT (a folder under the target folder)
  --json FILE     where the figures go (bench.json in the target folder)
  --coblock FILE  program to measure instead of building it
";

/// One line of the table.
struct Row {
    name: &'static str,
    write: bool,
    direct: bool,
    depth: u32,
    /// Requests in one run, before `--scale`.
    count: u64,
}

/// At depth 1 qemu-img 10.0.2 recurses once for each read that completes at once, and overflows its stack somewhere below
/// 200 000 of them; so these rows stay well below that.
const ROWS: [Row; 8] = [
    Row {
        name: "read cached d1",
        write: false,
        direct: false,
        depth: 1,
        count: 50_000,
    },
    Row {
        name: "read cached d32",
        write: false,
        direct: false,
        depth: 32,
        count: 400_000,
    },
    Row {
        name: "read direct d1",
        write: false,
        direct: true,
        depth: 1,
        count: 20_000,
    },
    Row {
        name: "read direct d32",
        write: false,
        direct: true,
        depth: 32,
        count: 100_000,
    },
    Row {
        name: "write cached d1",
        write: true,
        direct: false,
        depth: 1,
        count: 50_000,
    },
    Row {
        name: "write cached d32",
        write: true,
        direct: false,
        depth: 32,
        count: 200_000,
    },
    Row {
        name: "write direct d1",
        write: true,
        direct: true,
        depth: 1,
        count: 20_000,
    },
    Row {
        name: "write direct d32",
        write: true,
        direct: true,
        depth: 32,
        count: 100_000,
    },
];

/// Bytes of one request.
const REQUEST: u64 = 4096;

struct Options {
    rounds: usize,
    size: u64,
    scale: f64,
    only: Vec<String>,
    dir: PathBuf,
    json: PathBuf,
    coblock: Option<PathBuf>,
}

/// One run of one program.
#[derive(Clone, Copy)]
struct Sample {
    /// CPU nanoseconds for each request.
    cpu_ns: f64,
    /// Requests per second, by the time that the program itself prints.
    rate: f64,
    rss_kib: i64,
}

/// The two programs, in the order of the table's columns.
const ENGINES: [&str; 2] = ["coblock", "qemu"];

/// Runs the comparison and prints its table.
pub fn run(words: &[String]) -> Outcome {
    let Some(options) = parse(words)? else {
        print!("{USAGE}");
        return Ok(());
    };
    let coblock = match &options.coblock {
        Some(path) => path.clone(),
        None => build()?,
    };
    let version = qemu_version()?;
    fs::create_dir_all(&options.dir).map_err(|e| format!("{}: {e}", options.dir.display()))?;
    let bench = Bench {
        images: Images::make(&options)?,
        coblock,
        options,
    };
    println!("{version}");
    println!("{}", bench.machine());
    println!(
        "{:<17} {:>9} {:>9} {:>6}  {:>9} {:>9} {:>6}",
        "", "CPU ns", "CPU ns", "", "req/s", "req/s", ""
    );
    println!(
        "{:<17} {:>9} {:>9} {:>6}  {:>9} {:>9} {:>6}",
        "4 KiB, io_uring", "coblock", "qemu", "ratio", "coblock", "qemu", "ratio"
    );
    let mut rows = Vec::new();
    for row in ROWS.iter().filter(|r| {
        bench
            .options
            .only
            .iter()
            .all(|w| r.name.contains(w.as_str()))
    }) {
        rows.push(bench.row(row)?);
    }
    let report = json!({ "qemu": version, "rounds": bench.options.rounds, "rows": rows });
    let text = serde_json::to_string_pretty(&report).expect("numbers and text serialise");
    fs::write(&bench.options.json, text + "\n")
        .map_err(|e| format!("{}: {e}", bench.options.json.display()))?;
    println!(
        "ratio: median over {} rounds of coblock/qemu in the same round",
        bench.options.rounds
    );
    println!(
        "written images: checked clean and equal; figures in {}",
        bench.options.json.display()
    );
    bench.images.remove()
}

struct Bench {
    images: Images,
    coblock: PathBuf,
    options: Options,
}

impl Bench {
    /// Measures one row, prints its line, and returns its JSON.
    fn row(&self, row: &Row) -> Result<Value, String> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a positive count"
        )]
        let count = ((row.count as f64 * self.options.scale) as u64).max(u64::from(row.depth));
        let mut samples: [Vec<Sample>; 2] = Default::default();
        for round in 0..=self.options.rounds {
            let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
            for engine in order {
                // Round 0 only warms the page cache, and is short.
                let count = if round == 0 {
                    (count / 8).max(u64::from(row.depth))
                } else {
                    count
                };
                let sample = self.measure(engine, row, count, round)?;
                if round > 0 {
                    samples[engine].push(sample);
                }
            }
            if row.write {
                self.images
                    .judge()
                    .map_err(|e| format!("{} round {round}: {e}", row.name))?;
            }
        }
        let of = |engine: usize, f: fn(&Sample) -> f64| median(samples[engine].iter().map(f));
        let ratio = |f: fn(&Sample) -> f64| {
            median(
                samples[0]
                    .iter()
                    .zip(&samples[1])
                    .map(|(ours, theirs)| f(ours) / f(theirs)),
            )
        };
        let (cpu, rate) = (ratio(|s| s.cpu_ns), ratio(|s| s.rate));
        println!(
            "{:<17} {:>9.0} {:>9.0} {:>6.2}  {:>9.0} {:>9.0} {:>6.2}",
            row.name,
            of(0, |s| s.cpu_ns),
            of(1, |s| s.cpu_ns),
            cpu,
            of(0, |s| s.rate),
            of(1, |s| s.rate),
            rate
        );
        let engines = ENGINES.iter().enumerate().map(|(engine, name)| {
            let all = |f: fn(&Sample) -> f64| samples[engine].iter().map(f).collect::<Vec<_>>();
            let rss = samples[engine].iter().map(|s| s.rss_kib).max();
            let figures = json!({
                "cpu_ns_per_request": all(|s| s.cpu_ns),
                "requests_per_second": all(|s| s.rate),
                "max_rss_kib": rss,
            });
            ((*name).to_string(), figures)
        });
        Ok(json!({
            "row": row.name,
            "requests": count,
            "cpu_ratio": cpu,
            "rate_ratio": rate,
            "engines": serde_json::Map::from_iter(engines),
        }))
    }

    /// One run of one program.
    fn measure(
        &self,
        engine: usize,
        row: &Row,
        count: u64,
        round: usize,
    ) -> Result<Sample, String> {
        let mut command = if engine == 0 {
            let mut command = Command::new(&self.coblock);
            command.arg("img");
            command
        } else {
            Command::new("qemu-img")
        };
        command.args(["bench", "-f", "qcow2", "-i", "io_uring"]);
        command.args(["-t", if row.direct { "none" } else { "writeback" }]);
        command.args(["-c", &count.to_string(), "-d", &row.depth.to_string()]);
        command.args(["-s", &REQUEST.to_string(), "-S", &self.stride().to_string()]);
        if row.write {
            // A pattern of its own each round, so that the comparison sees this round's writes.
            command.args(["-w", &format!("--pattern={}", 1 + round % 255)]);
            command.arg(&self.images.written[engine]);
        } else {
            command.arg(&self.images.base);
        }
        let done = child::run(&mut command)?;
        if done.status != 0 {
            return Err(format!(
                "{command:?}: wait status {:#x}\n{}",
                done.status, done.stdout
            ));
        }
        let seconds = run_time(&done.stdout).unwrap_or(done.wall.as_secs_f64());
        Ok(Sample {
            cpu_ns: done.cpu.as_secs_f64() * 1e9 / count as f64,
            rate: count as f64 / seconds,
            rss_kib: done.rss_kib,
        })
    }

    /// An odd number of requests near the golden section of the image: every block once before any twice, far apart.
    fn stride(&self) -> u64 {
        let blocks = self.options.size / REQUEST;
        // qemu-img takes strides below 2^31.
        let step = (blocks * 618 / 1000).min((1 << 31) / REQUEST - 1) | 1;
        step * REQUEST
    }

    fn machine(&self) -> String {
        let read = |path: &str| {
            fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_string()
        };
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        format!(
            "Linux {}, {cores} cores, image of {} MiB in {}",
            read("/proc/sys/kernel/osrelease"),
            self.options.size >> 20,
            self.options.dir.display()
        )
    }
}

/// The images of one run: one that is only read, and a copy for each program to write to.
struct Images {
    base: PathBuf,
    written: [PathBuf; 2],
}

impl Images {
    /// Makes a fully allocated image with different content in every block, and its two copies.
    fn make(options: &Options) -> Result<Self, String> {
        let raw = options.dir.join("base.raw");
        let base = options.dir.join("base.qcow2");
        let written = ENGINES.map(|e| options.dir.join(format!("{e}.qcow2")));
        let mut block = vec![0u8; 1 << 20];
        let mut file = fs::File::create(&raw).map_err(|e| format!("{}: {e}", raw.display()))?;
        let mut state = 1u64;
        for _ in 0..options.size >> 20 {
            for word in block.chunks_exact_mut(8) {
                // xorshift64: any content that is not zero will do.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_be_bytes());
            }
            std::io::Write::write_all(&mut file, &block)
                .map_err(|e| format!("{}: {e}", raw.display()))?;
        }
        drop(file);
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &base])?;
        fs::remove_file(&raw).map_err(|e| format!("{}: {e}", raw.display()))?;
        for copy in &written {
            fs::copy(&base, copy).map_err(|e| format!("{}: {e}", copy.display()))?;
        }
        Ok(Images { base, written })
    }

    /// Both written images are sound, and equal.
    fn judge(&self) -> Outcome {
        for image in &self.written {
            qemu_img(&["check", "-q", "-f", "qcow2"], &[image])?;
        }
        let [ours, theirs] = &self.written;
        qemu_img(
            &["compare", "-q", "-f", "qcow2", "-F", "qcow2"],
            &[ours, theirs],
        )
    }

    fn remove(&self) -> Outcome {
        for image in self.written.iter().chain([&self.base]) {
            fs::remove_file(image).map_err(|e| format!("{}: {e}", image.display()))?;
        }
        Ok(())
    }
}

fn parse(words: &[String]) -> Result<Option<Options>, String> {
    let target = crate::target_dir();
    let mut options = Options {
        rounds: 5,
        size: 1024 << 20,
        scale: 1.0,
        only: Vec::new(),
        dir: target.join("xtask-bench"),
        json: target.join("bench.json"),
        coblock: None,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--help" || word == "-h" {
            return Ok(None);
        }
        let known = [
            "--rounds",
            "--size",
            "--scale",
            "--only",
            "--dir",
            "--json",
            "--coblock",
        ];
        if !known.contains(&word.as_str()) {
            return Err(format!("unknown option '{word}'\n\n{USAGE}"));
        }
        let value = words
            .next()
            .ok_or_else(|| format!("{word} needs a value"))?;
        let bad = |e: &dyn std::fmt::Display| format!("{word} {value}: {e}");
        match word.as_str() {
            "--rounds" => options.rounds = value.parse().map_err(|e| bad(&e))?,
            "--size" => {
                let mib: u64 = value.parse().map_err(|e| bad(&e))?;
                options.size = mib << 20;
            }
            "--scale" => options.scale = value.parse().map_err(|e| bad(&e))?,
            "--only" => options.only = value.split(',').map(str::to_string).collect(),
            "--dir" => options.dir = value.into(),
            "--json" => options.json = value.into(),
            _ => options.coblock = Some(value.into()),
        }
    }
    if options.rounds == 0 || options.size == 0 {
        return Err("--rounds and --size must be above zero".into());
    }
    Ok(Some(options))
}

/// Builds the program as a user would, and tells where it is.
fn build() -> Result<PathBuf, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "coblock-tools"])
        .current_dir(crate::workspace())
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !status.success() {
        return Err(format!("cargo build: {status}"));
    }
    Ok(crate::target_dir().join("release/coblock"))
}

fn qemu_version() -> Result<String, String> {
    let output = Command::new("qemu-img")
        .arg("--version")
        .output()
        .map_err(|e| format!("cannot run qemu-img (Debian: apt-get install qemu-utils): {e}"))?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .next()
        .unwrap_or_default()
        .to_string())
}

fn qemu_img(words: &[&str], files: &[&Path]) -> Outcome {
    let output = Command::new("qemu-img")
        .args(words)
        .args(files)
        .output()
        .map_err(|e| format!("cannot run qemu-img: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "qemu-img {words:?} {files:?}: {}\n{text}",
        output.status
    ))
}

/// The seconds in "Run completed in 1.234 seconds.", which both programs print.
fn run_time(output: &str) -> Option<f64> {
    let (_, rest) = output.split_once("Run completed in ")?;
    rest.split_whitespace().next()?.parse().ok()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An even number of rounds has no middle one: the median lies between the two.
    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }

    /// The time that the programs print is taken, not the time with start-up.
    #[test]
    fn run_time_is_read_from_the_output() {
        let output = "Sending 8 read requests\nRun completed in 0.125 seconds.\n";
        assert_eq!(run_time(output), Some(0.125));
        assert_eq!(run_time("nothing"), None);
    }

    /// An option without its value, and one that nobody knows, are errors.
    #[test]
    fn options_are_checked() {
        let words = |w: &[&str]| w.iter().map(|s| (*s).to_string()).collect::<Vec<_>>();
        assert!(parse(&words(&["--rounds"])).is_err());
        assert!(parse(&words(&["--speed", "9"])).is_err());
        assert!(parse(&words(&["--rounds", "0"])).is_err());
        assert_eq!(
            parse(&words(&["--rounds", "3"])).unwrap().unwrap().rounds,
            3
        );
    }
}
