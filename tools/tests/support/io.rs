//! `coblock io` and `qemu-io` side by side: the same command line, each in its own copy of a folder
//! of images.
//!
//! Both are called as `qemu-io`, so messages are compared to the letter; only times are hidden.

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Result_, have};

const REFERENCE: &str = "qemu-io";

/// True when the reference can be run; says aloud when not.
pub fn have_reference() -> bool {
    let found = have(REFERENCE) && have("qemu-img");
    if !found {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI needs the reference"
        );
        writeln!(
            std::io::stderr(),
            "SKIPPED: {REFERENCE} and qemu-img are not installed"
        )
        .expect("standard error");
    }
    found
}

/// Runs a program of the reference in `folder`; its standard output. It must succeed.
pub fn must(program: &str, words: &[&str], folder: &Path) -> String {
    let (status, stdout) = reference(program, words, folder);
    assert_eq!(status, Some(0), "{program} {words:?}: {stdout}");
    stdout
}

/// The same; its exit status too.
pub fn reference(program: &str, words: &[&str], folder: &Path) -> (Option<i32>, String) {
    let output = Command::new(program)
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let both = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&both).into_owned(),
    )
}

/// Copies of a folder, one for each program.
pub struct Pair {
    root: tempfile::TempDir,
}

/// Who works in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// `qemu-io`
    Reference,
    /// `coblock io`
    Ours,
}

impl Pair {
    /// Two copies of `images`, holes kept.
    pub fn of(images: &Path) -> Self {
        let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pair = Self { root };
        for who in [Who::Reference, Who::Ours] {
            copy(images, &pair.folder(who));
        }
        pair
    }

    /// Where this program works.
    pub fn folder(&self, who: Who) -> PathBuf {
        self.root.path().join(match who {
            Who::Reference => "reference",
            Who::Ours => "ours",
        })
    }

    /// Runs the command line in this program's copy; `input` is its standard input.
    pub fn run<S: AsRef<OsStr>>(&self, who: Who, words: &[S], input: &str) -> Result_ {
        let program = match who {
            Who::Reference => REFERENCE,
            Who::Ours => env!("CARGO_BIN_EXE_coblock"),
        };
        let mut child = Command::new(program)
            .arg0(REFERENCE)
            .args(words)
            .current_dir(self.folder(who))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A program that ends without reading all of it is fine.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Result_ {
            stdout: hide_times(&text(output.stdout)),
            stderr: text(output.stderr),
            status: output.status.code(),
        }
    }

    /// What is different about `image`: its guest's bytes, what is allocated, damage in ours.
    pub fn differences(&self, image: &str) -> Vec<String> {
        let mut found = Vec::new();
        let [theirs, ours] = [Who::Reference, Who::Ours].map(|who| self.folder(who).join(image));
        if fs::read(&theirs).unwrap() == fs::read(&ours).unwrap() {
            return found;
        }
        let root = self.root.path();
        let [theirs, ours] = [&theirs, &ours].map(|path| path.to_str().unwrap());
        let format = format_of(ours);
        let words = ["compare", "-f", format, "-F", format, theirs, ours];
        let (status, text) = reference("qemu-img", &words, root);
        if status != Some(0) {
            found.push(format!("{image}: {text}"));
        }
        let [theirs_map, ours_map] = [theirs, ours].map(|path| map(path, format, root));
        if theirs_map != ours_map {
            found.push(format!(
                "{image}: the reference allocates\n{}\n{image}: ours allocates\n{}",
                theirs_map.join("\n"),
                ours_map.join("\n")
            ));
        }
        if format == "qcow2" {
            let (status, text) = reference("qemu-img", &["check", "-f", format, ours], root);
            if status != Some(0) {
                found.push(format!("{image}: {text}"));
            }
        }
        found
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .args(["-a", "--sparse=always"])
        .args([from, to])
        .status()
        .unwrap();
    assert!(copied.success(), "copying {}", from.display());
}

fn format_of(path: &str) -> &'static str {
    let start = fs::read(path).unwrap();
    if start.starts_with(b"QFI\xfb") {
        "qcow2"
    } else {
        "raw"
    }
}

/// What is allocated where, neighbours of one kind joined, without places on the host.
fn map(path: &str, format: &str, folder: &Path) -> Vec<String> {
    let words = ["map", "--output=json", "-f", format, path];
    let text = must("qemu-img", &words, folder);
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut joined: Vec<(u64, u64, String)> = Vec::new();
    for extent in list.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap();
        // Data that also reads as zeros lies in a hole of the file, where one of the two did not
        // write zeros.
        let keys: &[&str] = if extent["data"] == true {
            &["depth", "data", "compressed"]
        } else {
            &["depth", "present", "zero", "data", "compressed"]
        };
        let kind: Vec<String> = keys
            .iter()
            .map(|key| format!("{key}={}", extent[key]))
            .collect();
        let kind = kind.join(" ");
        let (start, len) = (number("start"), number("length"));
        match joined.last_mut() {
            Some((_, end, last)) if *last == kind => *end = start + len,
            _ => joined.push((start, start + len, kind)),
        }
    }
    let line = |(start, end, kind): (u64, u64, String)| format!("{start:#x}..{end:#x} {kind}");
    joined.into_iter().map(line).collect()
}

/// Hides how long requests took and how fast that was.
fn hide_times(text: &str) -> String {
    let line = |line: &str| {
        if let Some((before, _)) = line.split_once(", 1 ops; ") {
            return format!("{before}, 1 ops\n");
        }
        match line.split_once(",1,") {
            Some((len, rest)) if rest.split(',').count() == 3 => format!("{len},1\n"),
            _ => format!("{line}\n"),
        }
    };
    text.lines().map(line).collect()
}
