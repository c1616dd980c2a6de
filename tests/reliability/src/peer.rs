//! The reference tools, `qemu-img` and `qemu-io`, as judges.
//!
//! They are not part of this project and may be missing: then a test says so aloud and ends, except
//! under `CI=true`, where a comparison that did not happen is a failure.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// True if both tools are there. Otherwise prints `SKIPPED` with the reason, or fails under CI.
pub fn present(test: &str) -> bool {
    for tool in ["qemu-img", "qemu-io"] {
        if let Err(error) = Command::new(tool).arg("--version").output() {
            let why =
                format!("{test}: cannot run {tool} ({error}); Debian: apt-get install qemu-utils");
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
            skipped(&why);
            return false;
        }
    }
    true
}

/// Says that something was not tested, past the harness' capture of output.
pub fn skipped(why: &str) {
    use std::io::Write as _;
    // A write to the stream itself is not captured, as `eprintln!` is; that it fails may be ignored
    // only if nobody could see it anyway.
    writeln!(std::io::stderr(), "SKIPPED: {why}").expect("standard error can be written");
}

/// Runs `qemu-img` with `words`; panics with its output if it fails.
pub fn qemu_img<S: AsRef<OsStr>>(words: &[S]) -> String {
    run("qemu-img", words)
}

/// Runs `qemu-io -f FORMAT` on `image` with one `-c` for each command; panics if it fails.
pub fn qemu_io(format: &str, image: &Path, commands: &[String]) -> String {
    qemu_io_with(&["-f", format], image, commands)
}

/// The same with any options.
pub fn qemu_io_with(options: &[&str], image: &Path, commands: &[String]) -> String {
    let mut words: Vec<&OsStr> = options.iter().map(AsRef::as_ref).collect();
    for command in commands {
        words.push("-c".as_ref());
        words.push(command.as_ref());
    }
    words.push(image.as_ref());
    let output = run("qemu-io", &words);
    // qemu-io's exit status does not tell of a failed read or a wrong pattern in every version.
    for bad in ["failed", "rror"] {
        assert!(
            !output.contains(bad),
            "qemu-io {image:?} {commands:?}:\n{output}"
        );
    }
    output
}

fn run<S: AsRef<OsStr>>(tool: &str, words: &[S]) -> String {
    let output = output(tool, words);
    let text = text(&output);
    let words: Vec<_> = words.iter().map(AsRef::as_ref).collect();
    assert!(
        output.status.success(),
        "{tool} {words:?}: {}\n{text}",
        output.status
    );
    text
}

fn output<S: AsRef<OsStr>>(tool: &str, words: &[S]) -> Output {
    Command::new(tool)
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {tool}: {e}"))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// What `qemu-img check --output=json` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Check {
    /// Wrong references: data is or will be lost.
    pub corruptions: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
}

/// Lets `qemu-img check` judge a qcow2 image. Panics if it cannot finish its check.
pub fn check(image: &Path) -> Check {
    let words: [&OsStr; 5] = [
        "check".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "--output=json".as_ref(),
        image.as_ref(),
    ];
    let output = output("qemu-img", &words);
    // 0: sound; 2: corrupt; 3: leaks. 1 and 63: the check itself did not work.
    let code = output.status.code();
    assert!(
        matches!(code, Some(0 | 2 | 3)),
        "qemu-img check {image:?}: {code:?}\n{}",
        text(&output)
    );
    let report: Value = serde_json::from_slice(&output.stdout).expect("qemu-img check prints JSON");
    assert_eq!(
        report["check-errors"], 0,
        "qemu-img check {image:?}: {report}"
    );
    let count = |key: &str| report[key].as_u64().unwrap_or(0);
    Check {
        corruptions: count("corruptions"),
        leaks: count("leaks"),
    }
}

/// The guest's view of an image, byte for byte, through `qemu-img convert -O raw`.
pub fn content(format: &str, image: &Path) -> Vec<u8> {
    let raw = image.with_extension("content-as-raw");
    let words: [&OsStr; 7] = [
        "convert".as_ref(),
        "-f".as_ref(),
        format.as_ref(),
        "-O".as_ref(),
        "raw".as_ref(),
        image.as_ref(),
        raw.as_ref(),
    ];
    qemu_img(&words);
    let bytes = std::fs::read(&raw).expect("qemu-img wrote it");
    std::fs::remove_file(&raw).expect("it is ours");
    bytes
}
