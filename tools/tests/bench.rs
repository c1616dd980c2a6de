//! The main job, run as a program: what it prints, what it finds, what it must not touch.

use std::fs;
use std::io::Write as _;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

const COBLOCK: &str = env!("CARGO_BIN_EXE_coblock");

/// A folder on a disk, for images and as the program's temporary folder.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(folder.path().join("tmp")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.0.path())
            .env("TMPDIR", self.path("tmp"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(COBLOCK)
            .args(line.split(' '))
            .output()
            .unwrap()
    }

    /// Runs a job that must end well; its results.
    fn good(&self, line: &str) -> Value {
        let output = self.run(&format!("{line} --output json"));
        assert_eq!(
            output.status.code(),
            Some(0),
            "{line}: {}",
            text(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Nothing is left of temporary images.
    fn assert_clean(&self) {
        assert_eq!(fs::read_dir(self.path("tmp")).unwrap().count(), 0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A raw image that is not ours, and not zero.
fn raw(path: &Path, len: usize) {
    let content: Vec<u8> = (0..len)
        .map(|i| u8::try_from(i * 7 % 251).unwrap())
        .collect();
    fs::write(path, content).unwrap();
}

#[test]
fn results_have_the_promised_shape() {
    let folder = Folder::new();
    let result = folder.good("bench --size 32M --number-ios 20000 --runtime 60");
    for key in ["iops", "bytes_per_second", "cpu_ns_per_request"] {
        assert!(result[key].as_f64().unwrap() > 0.0, "{key}");
    }
    for key in ["p50", "p99", "p999", "max"] {
        assert!(result["latency_ns"][key].as_u64().unwrap() > 0, "{key}");
    }
    assert_eq!(result["requests"], 20_000);
    assert_eq!(
        (&result["errors"], &result["verify_errors"]),
        (&0.into(), &0.into())
    );
    let coroutines = &result["coroutines"];
    assert_eq!(coroutines["created"], 20_000, "a coroutine a request");
    assert!(
        coroutines["pooled"].as_u64().unwrap() >= 19_000,
        "{coroutines}"
    );
    assert!(
        coroutines["switches"].as_u64().unwrap() >= 20_000,
        "{coroutines}"
    );
    assert_eq!(
        result["verified"]["blocks"], 8192,
        "all blocks are read back, untouched ones too"
    );
    assert_eq!(
        (&result["check"]["corruptions"], &result["check"]["leaks"]),
        (&0.into(), &0.into())
    );
    folder.assert_clean();
}

#[test]
fn every_pattern_engine_and_cache_mode_keeps_every_byte() {
    let folder = Folder::new();
    for options in [
        "--rw read",
        "--rw write --bs 64k",
        "--rw randread",
        "--rw randwrite --bs 512",
        "--rw randrw --rwmixread 10 --iodepth 1",
        "--rw randrw --engine threads",
        "--rw randwrite --engine threads --cache none",
        "--rw randrw --cache none",
        "--rw randwrite --cache directsync --iodepth 8",
        "--rw randwrite --cache writethrough --iodepth 8",
        "--rw randrw --cache unsafe --bs 12k --size 12M",
        "--rw randrw --format raw",
        "--rw randrw --iodepth 512 --size 1M",
    ] {
        let size = if options.contains("--size") {
            ""
        } else {
            " --size 8M"
        };
        let line = format!("bench {options}{size} --number-ios 2000 --runtime 60");
        let result = folder.good(&line);
        assert_eq!(result["requests"], 2000, "{line}");
        assert!(result["verified"]["blocks"].as_u64().unwrap() > 0, "{line}");
    }
    folder.assert_clean();
}

/// The same seed makes the same image, whatever the timing: with one request in flight even the
/// layout is the same.
#[test]
fn the_seed_decides() {
    let folder = Folder::new();
    let make = |name: &str, seed: u32| {
        let created = folder.run(&format!("img create -q -f qcow2 {name} 4M"));
        assert!(created.status.success());
        folder.good(&format!(
            "bench {name} --allow-write --rw randwrite --iodepth 1 --number-ios 500 --seed {seed}"
        ));
        fs::read(folder.path(name)).unwrap()
    };
    let (first, again, other) = (make("a", 7), make("b", 7), make("c", 8));
    assert!(first == again, "equal seeds");
    assert!(first != other, "different seeds");
}

#[test]
fn an_existing_image_is_never_written_without_leave() {
    let folder = Folder::new();
    raw(&folder.path("image"), 1 << 20);
    let before = fs::read(folder.path("image")).unwrap();
    for rw in ["write", "randwrite", "randrw"] {
        let output = folder.run(&format!(
            "bench image --format raw --rw {rw} --number-ios 10"
        ));
        assert_eq!(output.status.code(), Some(1), "{rw}");
        assert!(
            text(&output.stderr).contains("--allow-write"),
            "{}",
            text(&output.stderr)
        );
    }
    folder.good("bench image --format raw --number-ios 1000");
    assert!(fs::read(folder.path("image")).unwrap() == before);
}

#[test]
fn content_that_is_not_ours_is_kept_where_nothing_was_written() {
    let folder = Folder::new();
    // The last block is cut short.
    raw(&folder.path("image"), (1 << 20) + 512);
    let before = fs::read(folder.path("image")).unwrap();
    let result = folder
        .good("bench image --format raw --allow-write --rw randrw --size 256k --number-ios 3000");
    assert_eq!(result["verified"]["blocks"], 256);
    let after = fs::read(folder.path("image")).unwrap();
    assert!(before[..256 << 10] != after[..256 << 10], "written");
    assert!(before[256 << 10..] == after[256 << 10..], "beyond --size");
}

/// The canary: a byte that changes behind the job's back is found, and the status says so.
#[test]
fn a_changed_byte_is_found() {
    let folder = Folder::new();
    let image = folder.path("image");
    raw(&image, 4 << 20);
    let mut job = folder
        .command(COBLOCK)
        .args("bench image --format raw --verify --rw read --runtime 2".split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line comes when the job knows what the image holds, and begins to read.
    let mut stdout = BufReader::new(job.stdout.take().unwrap());
    let mut told = String::new();
    stdout.read_line(&mut told).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"!", 1_234_567).unwrap();
    stdout.read_to_string(&mut told).unwrap();
    let output = job.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("WRONG"), "{told}");
    assert!(
        text(&output.stderr).contains("image: offset 1232896"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn damaged_metadata_is_found() {
    let folder = Folder::new();
    assert!(
        folder
            .run("img create -q -f qcow2 image 4M")
            .status
            .success()
    );
    let mut image = fs::read(folder.path("image")).unwrap();
    // The refcount of the header's cluster, at the start of the first refcount block.
    image[2 << 16..(2 << 16) + 2].fill(0);
    fs::write(folder.path("image"), image).unwrap();
    let output = folder.run("bench image --verify --number-ios 100");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    assert!(
        text(&output.stdout).contains("1 corruptions"),
        "{}",
        text(&output.stdout)
    );
}

/// Bad input: a full file is an error that names file and offset, with status 1 and without a
/// panic.
#[test]
fn a_file_that_cannot_grow_is_an_error() {
    let folder = Folder::new();
    // In blocks of 1024 bytes: 8 MiB.
    let line = format!("ulimit -f 8192; exec {COBLOCK} bench --rw write --bs 64k --size 64M");
    let output = folder.command("bash").args(["-c", &line]).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("image.qcow2") && stderr.contains("offset"),
        "{stderr}"
    );
    assert!(stderr.contains("File too large"), "{stderr}");
    folder.assert_clean();
    let line = format!(
        "{COBLOCK} img create -q -f qcow2 full 64M; ulimit -f 1024; \
         exec {COBLOCK} img bench -w -c 100 -s 64k full"
    );
    let output = folder.command("bash").args(["-c", &line]).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.starts_with("coblock img: Failed request: File too large\n"),
        "{stderr}"
    );
    assert!(
        stderr.contains("write of 65536 bytes at offset"),
        "{stderr}"
    );
    // What was acknowledged before is consistent.
    let checked = folder.run("img check -q full");
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked.stderr));
}

#[test]
fn a_small_address_space_is_enough_or_an_error() {
    // What checks accesses has tables of terabytes of addresses.
    if std::env::var_os("COBLOCK_TEST_INSTRUMENTED").is_some() {
        writeln!(
            std::io::stderr(),
            "SKIPPED: an instrumented program needs more addresses"
        )
        .expect("standard error");
        return;
    }
    let folder = Folder::new();
    for (kib, depth) in [(1_000_000, 64), (200_000, 64), (200_000, 100_000)] {
        let line = format!(
            "ulimit -v {kib}; exec {COBLOCK} bench --size 400M --iodepth {depth} --number-ios 2000 \
             --rw randwrite --verify=false"
        );
        let output = folder.command("bash").args(["-c", &line]).output().unwrap();
        let stderr = text(&output.stderr);
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "{kib}: {:?} {stderr}",
            output.status
        );
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
    folder.assert_clean();
}

#[test]
fn an_interrupted_job_tells_what_it_has_and_cleans_up() {
    let folder = Folder::new();
    let job = folder
        .command(COBLOCK)
        .args("bench --size 16M --runtime 60 --output json".split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Signals are watched before the image is made.
    while fs::read_dir(folder.path("tmp")).unwrap().count() == 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(500));
    let killed = Command::new("kill")
        .args(["-INT", &job.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let output = job.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["interrupted"], true);
    assert_eq!(
        (&result["errors"], &result["verify_errors"]),
        (&0.into(), &0.into())
    );
    folder.assert_clean();
}

#[test]
fn wrong_command_lines_end_with_a_message() {
    let folder = Folder::new();
    for (line, message) in [
        (
            "bench missing",
            "Could not open 'missing': Could not open 'missing': No such file",
        ),
        (
            "bench --bs 3k --size 4k",
            "--size=4096 is not a multiple of --bs=3072",
        ),
        ("bench --rw trim", "invalid value 'trim'"),
        ("bench --what", "unexpected argument '--what'"),
        ("what", "unrecognized subcommand 'what'"),
    ] {
        let output = folder.run(line);
        assert_eq!(output.status.code(), Some(1), "{line}");
        let stderr = text(&output.stderr);
        assert!(
            stderr.contains(message) && output.stdout.is_empty(),
            "{line}: {stderr}"
        );
    }
    folder.assert_clean();
}

/// A reader that went away is no reason to complain, and results that nobody got are no success.
#[test]
fn closed_and_full_outputs() {
    let folder = Folder::new();
    assert!(
        folder
            .run("img create -q -f qcow2 image 1M")
            .status
            .success()
    );
    let mut command = folder.command(COBLOCK);
    let mut child = command
        .args(["img", "info", "image"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    // It may have been faster than we were.
    assert!(
        matches!(output.status.code(), Some(0 | 1)),
        "{:?}",
        output.status
    );
    assert_eq!(text(&output.stderr), "");
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = folder
        .command(COBLOCK)
        .args(["img", "info", "image"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        "coblock img: write error: No space left on device\n"
    );
}

/// Requests of several threads, each with a loop of its own, on one image: nothing is lost, and
/// what each did adds up.
#[test]
fn queues_share_one_image() {
    let folder = Folder::new();
    for (queues, options) in [
        (1, "--rw randrw --number-ios 1000"),
        (3, "--rw randrw --number-ios 3001"),
        (2, "--rw write --number-ios 3000"),
        (2, "--rw read --engine threads --number-ios 3000"),
        (3, "--rw mixed --iodepth 8 --cache unsafe --number-ios 1000"),
        (4, "--backing --iodepth 8 --cache unsafe --number-ios 1000"),
    ] {
        let line = format!("bench --queues {queues} --size 8M --runtime 60 {options}");
        let result = folder.good(&line);
        let requests = |result: &Value| result["requests"].as_u64().unwrap();
        let each = result["queues"].as_array().unwrap();
        assert_eq!(each.len(), queues, "{line}");
        let sum: u64 = each.iter().map(requests).sum();
        assert_eq!(requests(&result), sum, "{line}");
        assert!(line.ends_with(&format!(" {sum}")), "{line}: {sum}");
        assert_eq!(result["coroutines"]["created"], sum, "{line}");
        assert_eq!(result["verified"]["blocks"], 2048, "{line}");
        let is_mixed = options.contains("mixed") || options.contains("backing");
        for kind in ["discards", "flushes"] {
            let count = result[kind].as_u64().unwrap();
            assert_eq!(count > 0, is_mixed, "{line}: {count} {kind}");
        }
    }
    folder.assert_clean();
}
