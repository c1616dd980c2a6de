//! The programs that are compared: how each is built, started with a row's requests, and read.
//!
//! All take the flags of `qemu-img bench`. CPU is that of the whole process by wait4, start-up, the
//! kernel's workers and the last flush included; only the floor tells its own, because loading the
//! whole mapping is no part of it. Requests per second are by the time that the program prints for
//! reads, and by the whole process's for writes: so the flush at the end counts for everybody.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::rows::{REQUEST, Row};
use crate::child;

/// A run that takes longer is given up.
const LIMIT: Duration = Duration::from_secs(180);

/// Who is measured, in the order of the table's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Engine {
    Coblock,
    /// No implementation: the mapping in memory and one ring.
    Floor,
    Qemu,
    Imago,
    Qcow2Rs,
}

impl Engine {
    pub const PEERS: [Engine; 3] = [Engine::Floor, Engine::Imago, Engine::Qcow2Rs];

    pub fn name(self) -> &'static str {
        match self {
            Engine::Coblock => "coblock",
            Engine::Floor => "floor",
            Engine::Qemu => "qemu",
            Engine::Imago => "imago",
            Engine::Qcow2Rs => "qcow2-rs",
        }
    }

    /// Somebody else's implementation, which the best of is taken from.
    pub fn is_other(self) -> bool {
        !matches!(self, Engine::Coblock | Engine::Floor)
    }
}

/// What one run of one program showed.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// CPU seconds for 100 000 requests.
    pub cpu: f64,
    /// Requests per second.
    pub rate: f64,
    pub rss_kib: i64,
}

/// The programs that are there.
pub struct Programs {
    /// In the order of the columns.
    pub found: Vec<(Engine, PathBuf)>,
    /// Name and version of each, for the report.
    pub versions: Vec<(&'static str, String)>,
    /// Why a program that was asked for is not there.
    pub missing: Vec<String>,
}

impl Programs {
    /// Ours.
    pub fn coblock(&self) -> &Path {
        // It comes first.
        &self.found[0].1
    }

    /// The one that is this engine, if it was asked for and could be built.
    pub fn path_of(&self, engine: Engine) -> Option<&Path> {
        let mut found = self.found.iter();
        let (_, path) = found.find(|(e, _)| *e == engine)?;
        Some(path)
    }

    /// Builds ours, unless `coblock` names it, and each of `peers`.
    ///
    /// # Errors
    /// Ours cannot be built, or there is no qemu-img. A peer that cannot be built is only told.
    pub fn build(coblock: Option<&Path>, peers: &[Engine]) -> Result<Programs, String> {
        let ours = match coblock {
            Some(path) => path.to_path_buf(),
            None => {
                cargo_build(&["--package", "coblock-tools"])?;
                crate::target_dir().join("release/coblock")
            }
        };
        let mut programs = Programs {
            found: vec![(Engine::Coblock, ours), (Engine::Qemu, "qemu-img".into())],
            versions: vec![
                (Engine::Coblock.name(), env!("CARGO_PKG_VERSION").into()),
                (Engine::Qemu.name(), qemu_version()?),
            ],
            missing: Vec::new(),
        };
        let manifest = crate::workspace().join("tests/peers/Cargo.toml");
        let target = crate::target_dir().join("peers");
        let lock = std::fs::read_to_string(manifest.with_file_name("Cargo.lock"))
            .map_err(|e| format!("Cargo.lock of the peers: {e}"))?;
        for &peer in peers {
            let built = cargo_build(&[
                "--locked",
                "--manifest-path",
                &manifest.to_string_lossy(),
                "--target-dir",
                &target.to_string_lossy(),
                "--package",
                &format!("peer-{}", peer.name()),
            ]);
            match built {
                Ok(()) => {
                    let path = target.join("release").join(peer.name());
                    programs.found.push((peer, path));
                    if peer.is_other() {
                        let version = locked_version(&lock, peer.name());
                        programs.versions.push((peer.name(), version));
                    }
                }
                Err(why) => {
                    let why = format!(
                        "{} cannot be built, its column stays empty: {why}",
                        peer.name()
                    );
                    eprintln!("{why}");
                    programs.missing.push(why);
                }
            }
        }
        programs.found.sort();
        Ok(programs)
    }

    /// Sends `row`'s requests with `engine` to `image`, and tells what it cost.
    ///
    /// # Errors
    /// The program does not start or end, fails, or prints something else than expected.
    pub fn measure(&self, engine: Engine, run: &Run<'_>) -> Result<Sample, String> {
        let path = self.path_of(engine);
        let path = path.expect("only programs that were found are asked for");
        let mut command = Command::new(path);
        let mut count = run.count;
        match engine {
            Engine::Coblock => {
                command.args(["img", "bench", "-f", "qcow2", "-i", "io_uring"]);
            }
            Engine::Qemu => {
                command.args(["bench", "-f", "qcow2", "-i", "io_uring"]);
                count = run.row.requests_of_qemu(count);
            }
            // Its calls to the kernel block, so past the page cache one thread has one request
            // in flight; within it, more threads only cost more.
            Engine::Imago if run.row.direct => {
                command.arg(format!("--threads={}", run.row.depth));
            }
            Engine::Imago | Engine::Floor | Engine::Qcow2Rs => {}
        }
        command.args(["-t", if run.row.direct { "none" } else { "writeback" }]);
        command.args(["-c", &count.to_string(), "-d", &run.row.depth.to_string()]);
        command.args(["-s", &REQUEST.to_string(), "-S", &run.step.to_string()]);
        command.args(["-o", &run.offset.to_string()]);
        if run.row.write {
            command.args(["-w", &format!("--pattern={}", run.pattern)]);
        }
        command.arg(run.image);
        let done = child::run(&mut command, LIMIT)?;
        if done.status != 0 {
            return Err(format!(
                "wait status {:#x}: {}",
                done.status,
                done.stderr.trim()
            ));
        }
        let told = Told::read(engine, &done.stdout)
            .ok_or_else(|| format!("unexpected output: {}", done.stdout.trim()))?;
        let cpu = match engine {
            Engine::Floor => told.cpu_seconds.ok_or("no CPU time in its output")?,
            _ => done.cpu.as_secs_f64(),
        };
        let seconds = if run.row.write {
            done.wall.as_secs_f64()
        } else {
            told.seconds
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let count = count as f64;
        Ok(Sample {
            cpu: cpu * 1e5 / count,
            // A quick program prints less than its last digit.
            rate: count / seconds.max(1e-6),
            rss_kib: done.rss_kib,
        })
    }
}

/// One run of a row.
pub struct Run<'a> {
    pub row: &'a Row,
    pub image: &'a Path,
    pub count: u64,
    pub offset: u64,
    pub step: u64,
    pub pattern: u8,
}

/// What a program says about its run.
#[derive(Debug, PartialEq)]
pub struct Told {
    /// From the first request to the last.
    pub seconds: f64,
    cpu_seconds: Option<f64>,
}

impl Told {
    pub fn read(engine: Engine, output: &str) -> Option<Told> {
        if matches!(engine, Engine::Coblock | Engine::Qemu) {
            let (_, rest) = output.split_once("Run completed in ")?;
            let seconds = rest.split_whitespace().next()?.parse().ok()?;
            return Some(Told {
                seconds,
                cpu_seconds: None,
            });
        }
        let line: Value = serde_json::from_str(output).ok()?;
        Some(Told {
            seconds: line["seconds"].as_f64()?,
            cpu_seconds: line["cpu_seconds"].as_f64(),
        })
    }
}

fn cargo_build(words: &[&str]) -> Result<(), String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--quiet"])
        .args(words)
        .current_dir(crate::workspace())
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cargo build {}: {status}", words.join(" ")))
    }
}

fn qemu_version() -> Result<String, String> {
    let output = Command::new("qemu-img")
        .arg("--version")
        .output()
        .map_err(|e| format!("cannot run qemu-img (Debian: apt-get install qemu-utils): {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().nth(2);
    Ok(version.unwrap_or("of unknown version").to_string())
}

/// The version of package `name` that a Cargo.lock fixes.
fn locked_version(lock: &str, name: &str) -> String {
    let wanted = format!("name = \"{name}\"");
    let mut lines = lock.lines().skip_while(|line| *line != wanted).skip(1);
    let version = lines.next().and_then(|line| line.split('"').nth(1));
    version.unwrap_or("of unknown version").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two kinds of output are read; anything else is an error, not a zero.
    #[test]
    fn output_is_read() {
        let words = "Sending 8 read requests\nRun completed in 0.125 seconds.\n";
        let line = "{\"requests\":8,\"seconds\":0.25,\"flush_seconds\":0.5,\"cpu_seconds\":0.75}\n";
        let told = |seconds, cpu_seconds| {
            Some(Told {
                seconds,
                cpu_seconds,
            })
        };
        assert_eq!(Told::read(Engine::Qemu, words), told(0.125, None));
        assert_eq!(Told::read(Engine::Coblock, words), told(0.125, None));
        assert_eq!(Told::read(Engine::Floor, line), told(0.25, Some(0.75)));
        assert_eq!(Told::read(Engine::Qemu, "nothing"), None);
        assert_eq!(Told::read(Engine::Imago, words), None);
    }

    /// The version is that of the package itself, not of one that is named like it.
    #[test]
    fn versions_come_from_the_lock() {
        let lock = "[[package]]\nname = \"peer-imago\"\nversion = \"0.0.0\"\n\n\
                    [[package]]\nname = \"imago\"\nversion = \"0.2.6\"\n";
        assert_eq!(locked_version(lock, "imago"), "0.2.6");
        assert_eq!(locked_version(lock, "other"), "of unknown version");
    }
}
