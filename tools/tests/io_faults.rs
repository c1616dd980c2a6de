//! Promise: where the kernel itself refuses to write (a file may not grow, a file system is full, a
//! disk is broken), the request that met it is told why, what had been flushed is there, and the
//! image is sound and goes on working. (Reliability R10; `reliability.rs` of the suite has simulated
//! failures.)

use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Bytes of a write.
const LEN: u64 = 64 << 10;
/// Writes, which together are more than there is room for.
const WRITES: u64 = 120;
/// The byte that the last write leaves where the first has written.
const LAST: u64 = 250;

/// Cluster size and options of `coblock io`. With the smallest clusters, tables and refcount
/// blocks are among what does not fit.
const WAYS: [(&str, &[&str]); 4] = [
    ("512", &["-t", "writeback"]),
    ("64k", &["-t", "writeback"]),
    ("512", &["-i", "threads"]),
    ("4k", &["-i", "threads"]),
];

fn coblock() -> &'static str {
    env!("CARGO_BIN_EXE_coblock")
}

/// Runs a command to its end; what it prints, and its exit status.
fn run(command: &mut Command) -> (String, Option<i32>) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (text, output.status.code())
}

/// Runs `coblock` with these words; it must succeed.
fn must(words: &[&str]) {
    let (text, status) = run(Command::new(coblock()).args(words));
    assert_eq!(status, Some(0), "{words:?}: {text}");
}

/// Writes to a new image in `folder` until there is no room, each write on stable storage when it
/// returns, and looks at what is there afterwards. `start` starts `coblock io`.
fn fill(folder: &Path, start: impl Fn() -> Command, refusal: &str) {
    let image = folder.join("image.qcow2");
    let image = image.to_str().unwrap();
    for (cluster, options) in WAYS {
        let name = format!("clusters of {cluster}, {options:?}");
        let shape = format!("cluster_size={cluster}");
        must(&[
            "img", "create", "-q", "-f", "qcow2", "-o", &shape, image, "64M",
        ]);
        let (text, status) = run(writes(&mut start(), options).arg(image));
        assert_eq!(status, Some(1), "{name}: {text}");
        let told = told(&name, &text, refusal);
        let written = told.iter().filter(|wrote| **wrote).count();
        assert!(written > 20 && told.len() - written > 5, "{name}: {text}");
        assert!(told[0] && told[told.len() - 1], "{name}: {text}");
        look(&name, image, &told);
        std::fs::remove_file(image).unwrap();
    }
}

/// Adds the writes to a `coblock io`: each in its place and on stable storage when it returns; in
/// the end once more in the place of the first, which needs no room.
fn writes<'io>(io: &'io mut Command, options: &[&str]) -> &'io mut Command {
    io.args(["-f", "qcow2"]).args(options);
    for number in 0..WRITES {
        let write = format!("write -f -P {} {} {LEN}", number + 1, number * LEN);
        io.args(["-c", &write]);
    }
    io.args(["-c", &format!("write -f -P {LAST} 0 {LEN}")])
}

/// What each of them was told: done, or else `refusal`.
fn told(name: &str, text: &str, refusal: &str) -> Vec<bool> {
    let told: Vec<bool> = text
        .lines()
        .filter(|line| !line.starts_with("64 KiB, 1 ops"))
        .map(
            |line| match line.starts_with("wrote 65536/65536 bytes at") {
                false if line == format!("write failed: {refusal}") => false,
                wrote => {
                    assert!(wrote, "{name}: {line}");
                    true
                }
            },
        )
        .collect();
    assert_eq!(told.len() as u64, WRITES + 1, "{name}: {text}");
    told
}

/// The image is sound, and what was told to be on stable storage is there.
fn look(name: &str, image: &str, told: &[bool]) {
    must(&["img", "check", "-q", "-f", "qcow2", image]);
    let mut io = Command::new(coblock());
    io.args(["io", "-r", "-f", "qcow2"]);
    if told.last() == Some(&true) {
        io.args(["-c", &format!("read -P {LAST} 0 {LEN}")]);
    }
    for (number, _) in (0..WRITES).zip(told).skip(1).filter(|(_, wrote)| **wrote) {
        let read = format!("read -P {} {} {LEN}", number + 1, number * LEN);
        io.args(["-c", &read]);
    }
    let (text, status) = run(io.arg(image));
    let differs = text.contains("verification failed");
    assert!(status == Some(0) && !differs, "{name}: {text}");
}

/// A file that may not grow: RLIMIT_FSIZE, with its signal ignored.
#[test]
fn a_file_that_may_not_grow() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let start = || {
        let mut shell = Command::new("sh");
        // In units of 512 bytes: 4 MiB.
        let line = "trap '' XFSZ; ulimit -f 8192; exec \"$0\" io \"$@\"";
        shell.args(["-c", line, coblock()]);
        shell
    };
    fill(folder.path(), start, "File too large");
}

/// A file system in a file, mounted; unmounted in the end.
struct Mounted(PathBuf);

impl Mounted {
    /// `None` where this machine has no such thing for us.
    fn new(folder: &Path) -> Option<Self> {
        let file = folder.join("filesystem");
        let at = folder.join("mounted");
        std::fs::create_dir(&at).unwrap();
        File::create(&file).unwrap().set_len(8 << 20).unwrap();
        let done = |program: &str, words: &[&str]| {
            let status = Command::new(program)
                .args(words)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            status.is_ok_and(|status| status.success())
        };
        let (file, place) = (file.to_str().unwrap(), at.to_str().unwrap());
        let mounted = done("mkfs.ext4", &["-q", "-F", file])
            && done("mount", &["-t", "ext4", "-o", "loop", file, place]);
        mounted.then_some(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // If it fails the folder cannot be removed, which is said then.
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A file system that is full, on a loop device.
#[test]
fn a_file_system_that_is_full() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(mounted) = Mounted::new(folder.path()) else {
        writeln!(
            std::io::stderr(),
            "SKIPPED: no file system can be made and mounted on a loop device here"
        )
        .expect("standard error");
        return;
    };
    let start = || {
        let mut io = Command::new(coblock());
        io.arg("io");
        io
    };
    fill(&mounted.0, start, "No space left on device");
}

/// A file on a disk that breaks, mounted by a program in user space.
struct Broken {
    daemon: Child,
    /// Takes the mount away, and ends the program with it.
    end: Command,
}

/// Half a MiB apart, behind the tables of an empty image: each refuses one write.
const SECTORS: std::ops::Range<u64> = 1..8;

impl Broken {
    /// Starts a program that mounts at `at`, and writes its number to a file when it has; why not,
    /// where this machine has no such thing for us.
    fn start(command: &Command, at: &Path) -> Result<Child, String> {
        let (pid, log) = (at.with_extension("pid"), at.with_extension("log"));
        std::fs::write(at, []).unwrap();
        let _ = std::fs::remove_file(&pid);
        let program = command.get_program().to_string_lossy().into_owned();
        // In front of all else: some take the rest of the line as a command.
        let mut whole = Command::new(&program);
        let daemon = whole.arg("--pidfile").arg(&pid).args(command.get_args());
        let mut daemon = daemon
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .map_err(|e| format!("{program}: {e}"))?;
        for _ in 0..6000 {
            if pid.exists() {
                return Ok(daemon);
            }
            if daemon.try_wait().unwrap().is_some() {
                let why = std::fs::read_to_string(&log).unwrap();
                return Err(format!("{program}: {}", why.trim()));
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        daemon.kill().unwrap();
        panic!("a minute, and {program} is not ready");
    }

    /// The reference's daemon: each of `SECTORS` refuses one write.
    fn in_sectors(file: &Path, at: &Path) -> Result<Self, String> {
        let errors: Vec<String> = SECTORS
            .map(|number| {
                let sector = number * (512 << 10) / 512;
                format!(
                    r#"{{"event":"none","iotype":"write","errno":5,"sector":{sector},"once":true}}"#
                )
            })
            .collect();
        let disk = format!(
            r#"{{"driver":"blkdebug","node-name":"disk","image":"file","inject-error":[{}]}}"#,
            errors.join(",")
        );
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,filename={}",
                file.display()
            ))
            .args(["--blockdev", &disk, "--export"])
            .arg(format!(
                "type=fuse,id=export,node-name=disk,mountpoint={},writable=on,growable=on",
                at.display()
            ));
        let daemon = Self::start(&daemon, at)?;
        let mut end = Command::new("kill");
        end.arg(daemon.id().to_string());
        Ok(Self { daemon, end })
    }

    /// nbdkit with its error filter, below nbdfuse: every write is refused with `errno` while
    /// `switches[0]` exists, and every read with EIO while `switches[1]` does.
    fn while_switched(
        file: &Path,
        at: &Path,
        errno: &str,
        switches: &[PathBuf; 2],
    ) -> Result<Self, String> {
        let mut daemon = Command::new("nbdfuse");
        daemon.arg(at).args(["--command", "nbdkit", "-s"]);
        daemon.args(["--exit-with-parent", "--filter=error", "file"]);
        daemon.arg(file);
        for (kind, errno, switch) in [
            ("pwrite", errno, &switches[0]),
            ("pread", "EIO", &switches[1]),
        ] {
            daemon.arg(format!("error-{kind}={errno}"));
            daemon.arg(format!("error-{kind}-rate=100%"));
            daemon.arg(format!("error-{kind}-file={}", switch.display()));
        }
        let daemon = Self::start(&daemon, at)?;
        let mut end = Command::new("sh");
        end.args(["-c", r#"fusermount3 -u "$0" 2>/dev/null || umount "$0""#]);
        end.arg(at);
        Ok(Self { daemon, end })
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        let asked = self.end.status().is_ok_and(|status| status.success());
        if !asked {
            // It must not outlive the test.
            let _ = self.daemon.kill();
        }
        let ended = self.daemon.wait().unwrap();
        if !std::thread::panicking() {
            assert!(asked && ended.success(), "{:?}: {ended}", self.end);
        }
    }
}

/// A disk that breaks below a file system in user space, which writes through: those requests fail
/// that meet it, and no other.
#[test]
fn a_disk_that_breaks() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (file, at) = (
        folder.path().join("image.qcow2"),
        folder.path().join("mounted"),
    );
    let image = file.to_str().unwrap();
    for (cluster, options) in [
        ("64k", &["-t", "none"][..]),
        ("4k", &["-t", "none", "-i", "threads"]),
        ("64k", &["-t", "writeback"]),
    ] {
        let name = format!("clusters of {cluster}, {options:?}");
        let shape = format!("cluster_size={cluster}");
        must(&[
            "img", "create", "-q", "-f", "qcow2", "-o", &shape, image, "64M",
        ]);
        let broken = match Broken::in_sectors(&file, &at) {
            Ok(broken) => broken,
            Err(why) => {
                writeln!(std::io::stderr(), "SKIPPED: no disk that breaks: {why}")
                    .expect("standard error");
                return;
            }
        };
        let (text, status) = run(writes(Command::new(coblock()).arg("io"), options).arg(&at));
        drop(broken);
        assert_eq!(status, Some(1), "{name}: {text}");
        let told = told(&name, &text, "Input/output error");
        let failed = told.iter().filter(|wrote| !**wrote).count();
        assert!(told[0], "{name}: {text}");
        let broken = usize::try_from(SECTORS.end - SECTORS.start).unwrap();
        assert!((3..=broken).contains(&failed), "{name}: {text}");
        look(&name, image, &told);
        // The broken sectors work again: so does the image.
        must(&[
            "io",
            "-f",
            "qcow2",
            "-c",
            "write 0 60M",
            "-c",
            "flush",
            image,
        ]);
        must(&["img", "check", "-q", "-f", "qcow2", image]);
    }
}

/// A `coblock io` that is told one command after the other.
struct Io {
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Io {
    fn start(options: &[&str], image: &Path) -> Self {
        let mut child = Command::new(coblock())
            .args(["io", "-f", "qcow2"])
            .args(options)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            child,
            commands,
            answers,
        }
    }

    /// What it answers to a command, without the line about how long it took.
    fn say(&mut self, command: &str) -> String {
        writeln!(self.commands, "{command}").unwrap();
        loop {
            let line = self.answers.next().expect("an answer").unwrap();
            let line = line.trim_start_matches("coblock io> ");
            if !line.contains(" ops; ") {
                return line.to_string();
            }
        }
    }

    /// Writes durably; true if that is what it says, else it must be `refusal`.
    fn wrote(&mut self, byte: u64, offset: u64, refusal: &str) -> bool {
        let answer = self.say(&format!("write -f -P {byte} {offset} {LEN}"));
        let refused = answer == format!("write failed: {refusal}");
        let wrote = answer == format!("wrote {LEN}/{LEN} bytes at offset {offset}");
        assert!(refused != wrote, "{answer}");
        wrote
    }

    /// Flushes. Whether that failed is not printed, as by the reference.
    fn flush(&mut self) {
        let answer = self.say("flush\nread 0 512");
        assert_eq!(answer, "read 512/512 bytes at offset 0");
    }

    /// Ends it; it must be able to save everything.
    fn end(self) {
        let Self {
            mut child,
            commands,
            answers,
        } = self;
        drop(commands);
        let rest: Vec<_> = answers.map(Result::unwrap).collect();
        assert!(!rest.iter().any(|line| line.contains("failed")), "{rest:?}");
        // Of commands that failed, that is.
        assert_eq!(child.wait().unwrap().code(), Some(1), "{rest:?}");
    }
}

/// nbdkit's error filter through a file that nbdfuse mounts: what is written or read while the disk
/// is broken is told so, nothing else is, and what was told to be durable is there.
#[test]
fn nbdkit_error_filter() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name| folder.path().join(name);
    let (file, at) = (path("image.qcow2"), path("mounted"));
    let switches = [path("no-writes"), path("no-reads")];
    let [no_writes, no_reads] = &switches;
    let image = file.to_str().unwrap();
    for (cluster, options, errno, refusal) in [
        ("64k", &["-t", "none"][..], "EIO", "Input/output error"),
        (
            "4k",
            &["-t", "none", "-i", "threads"],
            "ENOSPC",
            "No space left on device",
        ),
        ("4k", &["-t", "none"], "ENOSPC", "No space left on device"),
        (
            "64k",
            &["-t", "none", "-i", "threads"],
            "EIO",
            "Input/output error",
        ),
    ] {
        let name = format!("clusters of {cluster}, {options:?}, {errno}");
        let shape = format!("cluster_size={cluster}");
        must(&[
            "img", "create", "-q", "-f", "qcow2", "-o", &shape, image, "64M",
        ]);
        // The server's disk has one length for ever.
        let whole = File::options().write(true).open(&file).unwrap();
        whole.set_len(80 << 20).unwrap();
        let broken = match Broken::while_switched(&file, &at, errno, &switches) {
            Ok(broken) => broken,
            Err(why) => {
                writeln!(
                    std::io::stderr(),
                    "SKIPPED: no nbdkit below a mounted file: {why}"
                )
                .expect("standard error");
                return;
            }
        };
        let mut io = Io::start(options, &at);
        let while_broken = 40..60;
        let mut told = Vec::new();
        for number in 0..WRITES {
            if number == while_broken.start {
                std::fs::write(no_writes, []).unwrap();
                assert!(!io.wrote(LAST, 0, refusal), "{name}: in place");
            }
            if number == while_broken.end {
                std::fs::remove_file(no_writes).unwrap();
            }
            let wrote = io.wrote(number + 1, number * LEN, refusal);
            assert_eq!(wrote, !while_broken.contains(&number), "{name}: {number}");
            told.push(wrote);
        }

        // A new mapping that cannot be written back at first.
        let late = 60 << 20;
        let answer = io.say(&format!("write -P 9 {late} {LEN}"));
        assert!(answer.starts_with("wrote 65536/65536"), "{name}: {answer}");
        std::fs::write(no_writes, []).unwrap();
        io.flush();
        std::fs::remove_file(no_writes).unwrap();
        io.flush();

        std::fs::write(no_reads, []).unwrap();
        let second = format!("read -P 2 {LEN} {LEN}");
        let answer = io.say(&second);
        assert_eq!(answer, "read failed: Input/output error", "{name}");
        std::fs::remove_file(no_reads).unwrap();
        let answer = io.say(&second);
        assert!(answer.starts_with("read 65536/65536"), "{name}: {answer}");

        told.push(io.wrote(LAST, 0, refusal));
        io.end();
        drop(broken);
        look(&name, image, &told);
        let read = format!("read -P 9 {late} {LEN}");
        let (text, _) =
            run(Command::new(coblock()).args(["io", "-r", "-f", "qcow2", "-c", &read, image]));
        assert!(text.starts_with("read 65536/65536"), "{name}: {text}");
        must(&[
            "io",
            "-f",
            "qcow2",
            "-c",
            "write 0 60M",
            "-c",
            "flush",
            image,
        ]);
        must(&["img", "check", "-q", "-f", "qcow2", image]);
    }
}
