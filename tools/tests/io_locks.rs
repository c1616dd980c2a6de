//! Who may have an image open together: `coblock io` and `qemu-io` in every pairing.
//!
//! What is right is not written here: it is what two of the reference say to each other in the same
//! run. (Reliability: locking and ownership.)

mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use support::io::have_reference;

/// Whose program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Reference,
    Ours,
}

const BOTH: [Who; 2] = [Who::Reference, Who::Ours];

fn program(who: Who) -> Command {
    match who {
        Who::Reference => Command::new("qemu-io"),
        Who::Ours => {
            let mut run = Command::new(env!("CARGO_BIN_EXE_coblock"));
            run.arg("io");
            run
        }
    }
}

/// How an image is opened.
const MODES: [(&str, &[&str]); 4] = [
    ("rw", &[]),
    ("ro", &["-r"]),
    ("ro, shared", &["-r", "-U"]),
    // Refused by itself: who writes must not share.
    ("rw, shared", &["-U"]),
];

/// A program with an image open, which goes on reading commands.
struct Holder {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Holder {
    /// Opens `image`; returns when its locks are there. Nothing if it is refused.
    fn open(who: Who, image: &Path, format: &str, mode: &[&str]) -> Option<Self> {
        let mut child = program(who)
            .args(["-f", format])
            .args(mode)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut holder = Self {
            input: child.stdin.take(),
            child,
            output,
        };
        holder.settle().then_some(holder)
    }

    /// Asks for something that is answered only when everything before is done; false if the
    /// program has ended, or has no image.
    fn settle(&mut self) -> bool {
        let input = self.input.as_mut().unwrap();
        // A program that has ended reads nothing, which its output tells.
        let _ = input.write_all(b"length\n");
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.contains("MiB")
    }

    /// Gives it a command that prints nothing.
    fn tell(&mut self, command: &str) {
        let input = self.input.as_mut().unwrap();
        input.write_all(command.as_bytes()).unwrap();
        // The prompt for it, and the next one: then it is done. Two lines at once would not do: the
        // reference takes both out of the pipe, and looks at the second only when a third comes.
        let mut said = String::new();
        while said.matches("io> ").count() < 2 {
            let mut byte = [0];
            self.output.read_exact(&mut byte).unwrap();
            said.push(char::from(byte[0]));
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.input.take());
        self.child.wait().expect("it ends at the end of its input");
    }
}

/// What a second one is told: the sentence about the lock; empty when it gets the image.
fn verdict(who: Who, image: &Path, format: &str, mode: &[&str]) -> String {
    let output = program(who)
        .args(["-f", format, "-c", "length"])
        .args(mode)
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), text.is_empty(), "{who:?}: {text}");
    let hint = format!("Is another process using the image [{}]?", image.display());
    match text.find("Failed to get") {
        None if text.is_empty() => text,
        None => "refused for another reason".to_owned(),
        Some(start) => {
            assert!(text.contains(&hint), "{who:?}: {text}");
            text[start..].lines().next().unwrap_or_default().to_owned()
        }
    }
}

fn images(folder: &Path) -> Vec<(&'static str, std::path::PathBuf)> {
    let made = ["qcow2", "raw"].map(|format| {
        let image = folder.join(format!("disk.{format}"));
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&image)
            .arg("4M")
            .status()
            .unwrap();
        assert!(status.success());
        (format, image)
    });
    made.into()
}

/// {ours, reference} x {rw, ro, ro -U, rw -U}, squared, for a format and for raw: 128 pairings.
#[test]
fn every_pairing_is_as_among_the_reference() {
    if !have_reference() {
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut wrong, mut pairings, mut refused) = (Vec::new(), 0, 0);
    for (format, image) in images(folder.path()) {
        for (first_name, first) in MODES {
            let verdicts = |holder: Who| {
                let held = Holder::open(holder, &image, format, first);
                let seen: Vec<_> = MODES
                    .iter()
                    .flat_map(|(_, second)| BOTH.map(|who| verdict(who, &image, format, second)))
                    .collect();
                (held.is_some(), seen)
            };
            let (theirs, ours) = (verdicts(Who::Reference), verdicts(Who::Ours));
            // Among the reference: what it says to itself, for each way of the second one.
            let want: Vec<_> = theirs.1.chunks(2).map(|both| both[0].clone()).collect();
            for (holder, (held, seen)) in [("the reference", theirs.clone()), ("we", ours)] {
                if held != theirs.0 {
                    wrong.push(format!("{format}: {holder} alone as {first_name}: {held}"));
                }
                for (nth, got) in seen.iter().enumerate() {
                    let (second, comes) = (MODES[nth / 2].0, BOTH[nth % 2]);
                    pairings += 1;
                    refused += usize::from(!got.is_empty());
                    if *got != want[nth / 2] {
                        wrong.push(format!(
                            "{format}: {holder} as {first_name}, then {comes:?} as {second}: \
                             '{got}' instead of '{}'",
                            want[nth / 2]
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(pairings, 128);
    assert!(refused >= 24, "the reference refuses some: {refused}");
}

/// Who reopens an image gives up the locks of a writer, or takes them: others then get what they
/// get from the reference that does the same.
#[test]
fn reopening_changes_the_locks() {
    if !have_reference() {
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut changed = 0;
    for (format, image) in images(folder.path()) {
        for (from, to, command) in [("rw", 1, "reopen -r\n"), ("ro", 0, "reopen -w\n")] {
            let from = if from == "rw" { MODES[0].1 } else { MODES[1].1 };
            let run = |holder: Who| {
                let mut held = Holder::open(holder, &image, format, from).unwrap();
                let look = || {
                    let seconds = [MODES[0].1, MODES[1].1];
                    seconds.map(|second| BOTH.map(|who| verdict(who, &image, format, second)))
                };
                let before = look();
                held.tell(command);
                (before, look())
            };
            let (theirs, ours) = (run(Who::Reference), run(Who::Ours));
            assert_eq!(ours, theirs, "{format}: {command}, to {}", MODES[to].0);
            changed += usize::from(theirs.0 != theirs.1);
        }
    }
    assert!(changed >= 2, "reopening changes locks: {changed}");
}

/// Killed while it writes: nothing is left that keeps the next one out.
#[test]
fn the_locks_of_a_killed_program_are_gone() {
    if !have_reference() {
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (format, image) in images(folder.path()) {
        let mut held = Holder::open(Who::Ours, &image, format, &[]).unwrap();
        held.tell("write -q 0 64k\n");
        held.child.kill().unwrap();
        held.child.wait().unwrap();
        for who in BOTH {
            assert_eq!(verdict(who, &image, format, &[]), "", "{format}: {who:?}");
        }
    }
}
