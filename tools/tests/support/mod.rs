//! Runs our program and the reference, each in its own copy of the same images.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod extents;
pub mod images;
pub mod io;

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The name that our program is called by; longer than the reference's by nothing, so that columns
/// stay.
const OUR_NAME: &str = "ours-img";
const REFERENCE: &str = "qemu-img";

/// What a command left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Result_ {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status; `None` when a signal ended it.
    pub status: Option<i32>,
}

impl fmt::Display for Result_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}[stderr]\n{}[status {:?}]",
            self.stdout, self.stderr, self.status
        )
    }
}

/// Both programs, the images that all tests of this process share, and a folder for copies of them.
pub struct Programs {
    images: PathBuf,
    root: tempfile::TempDir,
}

/// Words of a command line; single quotes keep what is between them together.
pub fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = None;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_with(String::new);
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_with(String::new).push(c),
        }
    }
    words.extend(word);
    words
}

/// True when the program can be run.
pub fn have(program: &str) -> bool {
    let mut run = Command::new(program);
    run.arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    matches!(run.status(), Ok(status) if status.success())
}

/// Do the two differ in more than the lines that say what was wrong and where, which only ours has?
pub fn differs_but_for_causes(theirs: &Result_, ours: &Result_) -> bool {
    let told = |result: &Result_| {
        let mut lines = result.stderr.lines();
        lines
            .find(|line| line.starts_with("qemu-img: "))
            .map(str::to_owned)
    };
    (&theirs.stdout, theirs.status, told(theirs)) != (&ours.stdout, ours.status, told(ours))
}

impl Programs {
    /// Makes the images, once; `None`, said aloud, without the reference.
    pub fn find(fixtures: &[&str]) -> Option<Self> {
        static IMAGES: OnceLock<Option<PathBuf>> = OnceLock::new();
        let images = IMAGES.get_or_init(|| make_images(fixtures)).clone();
        let Some(images) = images else {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "CI needs the reference"
            );
            writeln!(std::io::stderr(), "SKIPPED: {REFERENCE} is not installed")
                .expect("standard error");
            return None;
        };
        let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        symlink(env!("CARGO_BIN_EXE_coblock"), root.path().join(OUR_NAME)).unwrap();
        Some(Self { images, root })
    }

    /// With the images that `make` puts into the folder called `name`, once for all tests of this
    /// process; `None`, said aloud, without the reference.
    pub fn with_images(name: &str, make: fn(&Path)) -> Option<Self> {
        static IMAGES: OnceLock<PathBuf> = OnceLock::new();
        if !have(REFERENCE) || !have("qemu-io") {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "CI needs the reference"
            );
            writeln!(
                std::io::stderr(),
                "SKIPPED: {REFERENCE} and qemu-io are not installed"
            )
            .expect("standard error");
            return None;
        }
        let images = IMAGES.get_or_init(|| {
            let images = new_folder(name);
            make(&images);
            images
        });
        let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        symlink(env!("CARGO_BIN_EXE_coblock"), root.path().join(OUR_NAME)).unwrap();
        let images = images.clone();
        Some(Self { images, root })
    }

    /// Runs every line through both programs and lists the lines that differ, by `differ`.
    pub fn compare(&self, lines: &[String], differ: impl Fn(&Result_, &Result_) -> bool) {
        let mut wrong = Vec::new();
        for line in lines {
            let (theirs, ours) = (self.reference(line), self.ours(line));
            if differ(&theirs, &ours) {
                wrong.push(format!(
                    "== {line}\n-- reference\n{theirs}\n-- ours\n{ours}"
                ));
            }
        }
        assert!(
            wrong.is_empty(),
            "{} of {} differ\n{}",
            wrong.len(),
            lines.len(),
            wrong.join("\n")
        );
    }

    /// The images; for a command that writes, a new folder with copies of them, holes kept.
    fn folder(&self, line: &str) -> PathBuf {
        if !line.contains("create") && !line.contains("bench") {
            return self.images.clone();
        }
        let folder = self.root.path().join("work");
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        let copied = Command::new("cp")
            .args(["-a", "--sparse=always"])
            .arg(&self.images)
            .arg(&folder)
            .status()
            .unwrap();
        assert!(copied.success(), "copying images for {line}");
        folder
    }

    /// Runs the reference in fresh copies of the images.
    pub fn reference(&self, line: &str) -> Result_ {
        self.reference_in(line).0
    }

    /// Runs our program in fresh copies of the images.
    pub fn ours(&self, line: &str) -> Result_ {
        self.ours_in(line).0
    }

    /// As [`Programs::reference`], with the folder.
    pub fn reference_in(&self, line: &str) -> (Result_, PathBuf) {
        let folder = self.folder(line);
        (mask(run(REFERENCE, &words(line), &folder)), folder)
    }

    /// As [`Programs::ours`], with the folder; our name in messages is replaced by the reference's.
    pub fn ours_in(&self, line: &str) -> (Result_, PathBuf) {
        let folder = self.folder(line);
        let program = self.root.path().join(OUR_NAME);
        let mut result = run(&program.to_string_lossy(), &words(line), &folder);
        result.stdout = result.stdout.replace(OUR_NAME, REFERENCE);
        result.stderr = result.stderr.replace(OUR_NAME, REFERENCE);
        (mask(result), folder)
    }

    /// What the reference says about an image, without sizes on the host.
    pub fn facts(&self, folder: &Path, image: &str) -> String {
        let words = ["info", "--output=json", image].map(String::from);
        let told = run(REFERENCE, &words, folder);
        assert_eq!(told.status, Some(0), "{told}");
        let kept = told
            .stdout
            .lines()
            .filter(|line| !line.contains("actual-size"));
        // The first virtual size is that of the file, whose layout is ours to choose.
        let mut lines: Vec<_> = kept.collect();
        let file_len = lines.iter().position(|line| line.contains("virtual-size"));
        lines.remove(file_len.unwrap());
        lines.join("\n")
    }

    /// Exit status of the reference's check.
    pub fn check(&self, folder: &Path, image: &str) -> i32 {
        let words = ["check", "-q", image].map(String::from);
        run(REFERENCE, &words, folder).status.unwrap_or(-1)
    }
}

fn make_images(fixtures: &[&str]) -> Option<PathBuf> {
    if !have(REFERENCE) {
        return None;
    }
    let images = new_folder("images");
    fs::create_dir(images.join("sub")).unwrap();
    for line in fixtures {
        let made = run(REFERENCE, &words(line), &images);
        assert_eq!(made.status, Some(0), "{line}: {made}");
    }
    odd_images(&images);
    Some(images)
}

/// An empty folder that is there until the next run.
fn new_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn run(program: &str, words: &[String], folder: &Path) -> Result_ {
    let output = Command::new(program)
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Result_ {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        status: output.status.code(),
    }
}

/// Runs a program of the reference, which must succeed.
pub fn reference_must(line: &str, folder: &Path) {
    let words = words(line);
    let made = run(&words[0], &words[1..], folder);
    assert_eq!(made.status, Some(0), "{line}: {made}");
}

/// Hides how long a run took.
fn mask(mut result: Result_) -> Result_ {
    let lines = result
        .stdout
        .lines()
        .map(|line| match line.split_once("Run completed in ") {
            Some(("", _)) => "Run completed in X seconds.".to_owned(),
            _ => line.to_owned(),
        });
    result.stdout = lines.map(|line| line + "\n").collect();
    result
}

/// Images that the reference does not make: odd lengths, damage, feature bits.
fn odd_images(images: &Path) {
    let at = |name: &str| images.join(name);
    fs::write(at("three"), b"abc").unwrap();
    fs::write(at("empty"), b"").unwrap();
    let base = fs::read(at("base")).unwrap();
    fs::write(at("header4096"), &base[..4096]).unwrap();
    fs::write(at("header80"), &base[..80]).unwrap();
    for (name, byte, value) in [("corrupt", 79, 2), ("dirty", 79, 1), ("future", 72, 0x80)] {
        let mut image = fs::read(at(name)).unwrap();
        image[byte] = value;
        fs::write(at(name), image).unwrap();
    }
    // A feature name table of one entry that is cut short, in place of the usual one, and a feature
    // that it names.
    let mut named = fs::read(at("named")).unwrap();
    named[72] = 0x80;
    let table = named[..4096]
        .windows(4)
        .position(|w| w == [0x68, 0x03, 0xf8, 0x57])
        .unwrap();
    named[table + 4..table + 8].copy_from_slice(&14_u32.to_be_bytes());
    named[table + 8..table + 4096].fill(0);
    named[table + 8..table + 22].copy_from_slice(b"\0\x3fTest feature");
    fs::write(at("named"), named).unwrap();
    // A written image, then a mapping taken away (a leak), a refcount taken away (a corruption),
    // and both.
    let io = Command::new("qemu-io")
        .args(["-c", "write 0 1M", "-c", "write 2M 1M"])
        .arg(at("base"))
        .stdout(Stdio::null())
        .status();
    assert!(io.is_ok_and(|s| s.success()), "qemu-io writes to an image");
    let image = fs::read(at("base")).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let place = |entry: u64| usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap();
    let l2 = place(be64(place(be64(40))));
    let refcounts = place(be64(place(be64(48))));
    let mut leak = image.clone();
    leak[l2 + 8 * 33..][..8].fill(0);
    let mut wrong = image.clone();
    wrong[refcounts + 2 * 6..][..2].fill(0);
    let mut both = leak.clone();
    both[refcounts + 2 * 6..][..2].fill(0);
    for (name, bytes) in [("leak", leak), ("wrong", wrong), ("both", both)] {
        fs::write(at(name), bytes).unwrap();
    }
}
