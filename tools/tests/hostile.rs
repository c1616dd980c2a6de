//! Hostile images through the program: each public weakness of this format's programs, by its name.
//!
//! The images are those of `coblock-qcow2`'s own test of the same name, as files. Every one is
//! described, checked, mapped, read and written by a process that may have 256 MiB of addresses
//! and little processor time. Wanted: exit status 0, or 1 to 3 with a message; no signal, no
//! panic, no file described by opening another one that it names, and nobody who waits for ever.

#[path = "../../qcow2/tests/support/mod.rs"]
mod images;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use coblock::block::drivers::sim::SimDisk;
use images::corpus::{add_extension, cases};
use images::{empty_image, put32, put64};

/// Writes what is on the disk to a file with the same holes; `false`, where the file system has no
/// files of such a length.
fn store(disk: &SimDisk, path: &Path) -> bool {
    let file = File::create(path).unwrap();
    if file.set_len(disk.len()).is_err() {
        return false;
    }
    let mut at = 0;
    while let Some((is_data, len)) = disk.extent(at) {
        if is_data {
            let bytes = disk.peek(at, usize::try_from(len).unwrap());
            file.write_all_at(&bytes, at).unwrap();
        }
        at += len;
    }
    true
}

/// Runs our program inside the limits; the kernel sends a signal to who uses more time. A second
/// is the goal for the program as it is released; here it is built with every check.
fn limited(args: &[&str], path: &Path) -> Output {
    // What checks accesses has tables of terabytes of addresses, and takes longer.
    let limits = match std::env::var_os("COBLOCK_TEST_INSTRUMENTED") {
        None => "ulimit -v 262144; ulimit -t 3",
        Some(_) => "ulimit -t 60",
    };
    let mut run = Command::new("sh");
    run.args(["-c", &format!("{limits}; exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_coblock"))
        .args(args)
        .arg(path)
        // Reports of panics with a backtrace take long to make, and a panic is what we look for.
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null());
    run.output().unwrap()
}

/// What the process left behind, in one line, where that is wrong.
fn wrong(output: &Output) -> Option<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.chars().take(500).collect();
    let Some(status) = output.status.code() else {
        return Some(format!("{}: {said}", output.status));
    };
    let spoken = !said.trim().is_empty() || !output.stdout.is_empty();
    (status > 3 || said.contains("panicked") || (status > 0 && !spoken))
        .then(|| format!("status {status}: {said}"))
}

const USES: [&[&str]; 6] = [
    &["img", "info", "-f", "qcow2"],
    &["img", "info", "-f", "qcow2", "--output=json"],
    &["img", "check", "-f", "qcow2"],
    &["img", "map", "-f", "qcow2", "--output=json"],
    &["io", "-f", "qcow2", "-r", "-c", "read 0 64k"],
    &["io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush"],
];

/// Every image of the corpus, used in every way.
#[test]
fn the_program_survives_every_image() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut failures = Vec::new();
    let mut runs = 0;
    for (number, case) in cases().into_iter().enumerate() {
        let path = dir.path().join(format!("{number}.qcow2"));
        if !store(&(case.disk)(), &path) {
            writeln!(
                std::io::stderr(),
                "SKIPPED: {}: no file here can be so long",
                case.name
            )
            .expect("standard error");
            continue;
        }
        for args in USES {
            let output = limited(args, &path);
            if let Some(why) = wrong(&output) {
                failures.push(format!("{}: {}: {why}", case.name, args.join(" ")));
            }
            runs += 1;
        }
        std::fs::remove_file(path).unwrap();
    }
    println!("{runs} runs on hostile images");
    assert!(runs > 200, "only {runs} runs");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// CVE-2024-4467, CVE-2024-32498, CVE-2015-5163: `info` opens nothing but the file that the user
/// named, and nobody waits for a file that an image names. It is a FIFO here: its opener would wait
/// for ever. (A check opens backing files, through the tool's gate, as the reference does.)
#[test]
fn describing_opens_nothing_else() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let fifo = dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let name = fifo.to_str().unwrap();
    let in_json = format!(r#"json:{{"driver":"file","filename":"{name}"}}"#);
    for (what, incompatible, kind, text) in [
        ("a data file", 4, 0x4441_5441, name),
        ("a data file in JSON", 4, 0x4441_5441, in_json.as_str()),
        ("a backing file", 0, 0, name),
        ("a backing file in JSON", 0, 0, in_json.as_str()),
    ] {
        let mut image = empty_image(16);
        put64(&mut image, 72, incompatible);
        if kind == 0 {
            put64(&mut image, 8, 0x400);
            put32(&mut image, 16, u32::try_from(text.len()).unwrap());
            image[0x400..0x400 + text.len()].copy_from_slice(text.as_bytes());
            add_extension(&mut image, 0xe279_2aca, b"raw");
        } else {
            add_extension(&mut image, kind, text.as_bytes());
        }
        let path = dir.path().join("image");
        std::fs::write(&path, image).unwrap();
        for args in [&["img", "info"][..], &["img", "check", "-f", "qcow2"]] {
            let mut run = Command::new("timeout");
            run.args(["60", env!("CARGO_BIN_EXE_coblock")])
                .args(args)
                .arg(&path)
                .stdin(Stdio::null());
            let output = run.output().unwrap();
            // 124: it had to be stopped.
            assert_ne!(output.status.code(), Some(124), "{what}: {args:?} waits");
            assert!(wrong(&output).is_none(), "{what}: {args:?}: {output:?}");
        }
    }
}

/// CVE-2008-2004, CVE-2008-1945, CVE-2013-1922, CVE-2026-27211: a guest writes the header of
/// another format over its raw disk, and waits for the next start. Through a disk whose format was
/// guessed it cannot; through one whose format was given it can, and nobody guesses then.
#[test]
fn a_guest_cannot_turn_its_raw_disk_into_an_image() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = dir.path().join("disk.raw");
    let header = dir.path().join("header");
    let mut image = empty_image(16);
    put64(&mut image, 8, 0x400);
    put32(&mut image, 16, 11);
    image[0x400..0x40b].copy_from_slice(b"/etc/passwd");
    std::fs::write(&header, &image[..4096]).unwrap();
    let write = format!("write -q -s {} 0 4k", header.display());

    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let guessed = limited(&["io", "-c", &write], &disk);
    assert_eq!(
        std::fs::read(&disk).unwrap()[..4],
        [0; 4],
        "the guest's header is on a disk whose format was guessed: {guessed:?}"
    );

    let given = limited(&["io", "-f", "raw", "-c", &write], &disk);
    assert!(given.status.success(), "{given:?}");
    assert_eq!(std::fs::read(&disk).unwrap()[..4], *b"QFI\xfb");
    let info = limited(&["img", "info", "-f", "raw"], &disk);
    let said = String::from_utf8_lossy(&info.stdout).into_owned();
    assert!(
        info.status.success() && said.contains("file format: raw") && !said.contains("passwd"),
        "{said}"
    );
}

/// CVE-2012-2652: the overlay of a disk that is opened for throw-away writes cannot be guessed or
/// replaced by others: it has no name while it is in use.
#[test]
fn a_throw_away_overlay_has_no_name() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (disk, temp) = (dir.path().join("disk.raw"), dir.path().join("tmp"));
    std::fs::create_dir(&temp).unwrap();
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let mut run = Command::new(env!("CARGO_BIN_EXE_coblock"));
    run.args(["io", "-f", "raw", "-s", "-c", "write -q 0 64k"])
        .arg(&disk)
        .env("TMPDIR", &temp);
    let output = run.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_dir(&temp).unwrap().count(), 0);
    assert_eq!(std::fs::read(&disk).unwrap(), vec![7; 1 << 20]);
}
