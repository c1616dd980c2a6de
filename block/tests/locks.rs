//! Image locks, as seen by the reference's tools and by ourselves (reliability: locking and
//! ownership).

mod support;

use coblock_block::{BlockBackend, ErrorKind, Options, Perm, Permissions, Result, Transaction};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use support::World;
use support::storage::OpenStorage;

/// The reference's tool, or a word that it is missing.
fn has_reference() -> bool {
    let found = Command::new("qemu-io").arg("--version").output().is_ok()
        && Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI needs the reference"
        );
        writeln!(
            std::io::stderr(),
            "SKIPPED: qemu-io and qemu-img are not installed: nothing is compared"
        )
        .expect("standard error");
    }
    found
}

/// `qemu-io` with an image open; it ends when dropped.
struct Reference(Child);

impl Reference {
    /// Opens `image`, and returns when its locks are there.
    fn hold(image: &Path, format: &str, more: &[&str]) -> Reference {
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .args(more)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers only when the image is open.
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"length\n").unwrap();
        let mut answer = std::io::BufReader::new(child.stdout.as_mut().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut answer, &mut line).unwrap();
        assert!(!line.is_empty(), "qemu-io says its length");
        child.stdin = Some(input);
        Reference(child)
    }

    /// What it says when it tries; empty when it gets the image.
    fn complaint(image: &Path, format: &str, more: &[&str]) -> String {
        let output = Command::new("qemu-io")
            .args(["-f", format, "-c", "length"])
            .args(more)
            .arg(image)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), text.is_empty(), "{text}");
        text
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().expect("qemu-io ends at the end of its input");
    }
}

/// Opens the way a format does: as storage that is not shared. `raw` passes on what its own users
/// want, as the reference does.
fn open(
    world: &World,
    image: &Path,
    format: &str,
    read_only: bool,
    share: bool,
) -> Result<BlockBackend> {
    let on = |word: bool| if word { "on" } else { "off" };
    let driver = if format == "raw" { "raw" } else { "storage" };
    let options = Options::format_on_file(driver, image.to_str().unwrap())
        .with("read-only", on(read_only))
        .with("force-share", on(share));
    world.open(options)
}

fn world() -> World {
    let mut world = World::with_engine(coblock_aio::EngineKind::Threads);
    world.registry.register("storage", Box::new(OpenStorage));
    world
}

/// Who has the image first, and how the second one opens it: read-write or read-only, and with
/// `-U`.
const MODES: [(&str, bool, bool); 3] = [
    ("rw", false, false),
    ("ro", true, false),
    ("ro, shared", true, true),
];

fn switches(read_only: bool, share: bool) -> Vec<&'static str> {
    let mut switches = Vec::new();
    if read_only {
        switches.push("-r");
    }
    if share {
        switches.push("-U");
    }
    switches
}

fn shape(complaint: &str, image: &Path) -> String {
    let hint = format!("Is another process using the image [{}]?", image.display());
    let Some(start) = complaint.find("Failed to get") else {
        return String::new();
    };
    let line = complaint[start..].lines().next().unwrap();
    let told = if complaint.contains(&hint) {
        " + hint"
    } else {
        ""
    };
    format!("{line}{told}")
}

/// The whole matrix of {ours, reference} x {rw, ro, shared} for a format and for raw: whoever comes
/// second gets the verdict, and the words, that the reference has for two of itself.
#[test]
fn locks_exclude_as_the_reference_does() {
    if !has_reference() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for format in ["qcow2", "raw"] {
        let image = dir.path().join(format!("disk.{format}"));
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&image)
            .arg("1M")
            .status()
            .unwrap();
        assert!(made.success());
        for (first_name, first_ro, first_share) in MODES {
            for (second_name, second_ro, second_share) in MODES {
                let case = format!("{format}: {first_name}, then {second_name}");
                let first_switches = switches(first_ro, first_share);
                let second_switches = switches(second_ro, second_share);
                let ours =
                    |world: &World| match open(world, &image, format, second_ro, second_share) {
                        Ok(backend) => {
                            world.close(backend).unwrap();
                            String::new()
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::Locked, "{case}");
                            shape(&format!("{error}\n{}", error.hint().unwrap()), &image)
                                .replace(&format!(" (file '{}')", image.display()), "")
                        }
                    };
                let theirs = || {
                    shape(
                        &Reference::complaint(&image, format, &second_switches),
                        &image,
                    )
                };

                let reference_holds = Reference::hold(&image, format, &first_switches);
                let want = theirs();
                refused += usize::from(!want.is_empty());
                let world = world();
                assert_eq!(ours(&world), want, "{case}: the reference holds, we come");
                drop(reference_holds);

                let we_hold = open(&world, &image, format, first_ro, first_share).unwrap();
                assert_eq!(theirs(), want, "{case}: we hold, the reference comes");
                assert_eq!(ours(&world), want, "{case}: we hold, we come");
                world.close(we_hold).unwrap();
                assert_eq!(theirs(), "", "{case}: nobody holds");
                world.end();
            }
        }
    }
    assert!(refused >= 3, "the reference refuses some: {refused}");
}

/// Two of us, without the reference: a format excludes writers; raw excludes them when asked.
#[test]
fn locks_exclude_among_ourselves() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    std::fs::write(&image, [0; 4096]).unwrap();
    let world = world();
    let writer = open(&world, &image, "format", false, false).unwrap();
    let refused = open(&world, &image, "format", false, false).unwrap_err();
    assert_eq!(refused.message(), "Failed to get \"write\" lock");
    let hint = format!("Is another process using the image [{}]?", image.display());
    assert_eq!(refused.hint(), Some(&*hint));
    assert!(
        refused.to_string().contains(image.to_str().unwrap()),
        "{refused}"
    );
    let refused = open(&world, &image, "format", true, false).unwrap_err();
    assert_eq!(refused.message(), "Failed to get shared \"write\" lock");
    world
        .close(open(&world, &image, "format", true, true).unwrap())
        .unwrap();
    let unlocked = Options::format_on_file("storage", image.to_str().unwrap());
    world
        .close(world.open(unlocked.with("file.locking", "off")).unwrap())
        .unwrap();
    world.close(writer).unwrap();

    let raw = |share: &str| {
        Options::format_on_file("raw", image.to_str().unwrap()).with("share-rw", share)
    };
    let one = world.open(raw("on")).unwrap();
    let two = world.open(raw("on")).unwrap();
    assert_eq!(
        world.open(raw("off")).unwrap_err().kind(),
        ErrorKind::Locked
    );
    world.close(one).unwrap();
    world.close(two).unwrap();
    let alone = world.open(raw("off")).unwrap();
    assert_eq!(
        world.open(raw("on")).unwrap_err().message(),
        "Failed to get \"write\" lock"
    );
    world.close(alone).unwrap();
    world.end();
}

/// Locks are taken on a file that was passed in, too, and given back at close though the caller
/// keeps a duplicate.
#[test]
fn a_file_that_was_passed_in_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    std::fs::write(&image, [0; 4096]).unwrap();
    let world = world();
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let passed = Options::new()
        .with("driver", "storage")
        .with("file.driver", "file")
        .with_fd("file.fd", file.try_clone().unwrap().into());
    let holder = world.open(passed).unwrap();
    assert_eq!(
        open(&world, &image, "format", false, false)
            .unwrap_err()
            .kind(),
        ErrorKind::Locked
    );
    world.close(holder).unwrap();
    world
        .close(open(&world, &image, "format", false, false).unwrap())
        .unwrap();
    drop(file);

    let read_only = File::open(&image).unwrap();
    let passed = Options::new()
        .with("driver", "file")
        .with_fd("fd", read_only.into());
    let refused = world.open(passed).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    world.end();
}

/// Locks belong to the open file description: whoever closes another descriptor of the file, or a
/// duplicate of ours, takes none of them away (locks of a process would be gone), nor does a child
/// that had a duplicate and ends. Closing the image gives them back though a child still has one.
/// (Reliability: locking and ownership.)
#[test]
fn duplicates_and_children_neither_lose_nor_keep_locks() {
    if !has_reference() {
        return;
    }
    /// A process with this descriptor, which ends when its input is closed.
    fn child_with(file: &File) -> Child {
        Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::from(file.try_clone().unwrap()))
            .spawn()
            .unwrap()
    }
    fn end(mut child: Child) {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("1M")
        .status()
        .unwrap();
    assert!(made.success());
    let told = || shape(&Reference::complaint(&image, "qcow2", &[]), &image);
    let world = world();
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let passed = Options::new()
        .with("driver", "storage")
        .with("file.driver", "file")
        .with_fd("file.fd", file.try_clone().unwrap().into());
    let holder = world.open(passed).unwrap();
    let want = told();
    assert!(want.contains("lock"), "we hold it: {want}");
    drop(File::open(&image).unwrap());
    assert_eq!(told(), want, "the process closed another description");
    end(child_with(&file));
    assert_eq!(told(), want, "a child closed a duplicate by ending");
    let child = child_with(&file);
    drop(file);
    assert_eq!(told(), want, "the caller closed its duplicate");
    world.close(holder).unwrap();
    assert_eq!(told(), "", "closed, while a child has a duplicate");
    end(child);
    world.end();
}

/// A process made by `fork` alone, which has every descriptor of ours, those too that an `exec` would
/// close. It waits until it is ended.
struct Forked {
    pid: libc::pid_t,
    gate: std::io::PipeWriter,
}

impl Forked {
    fn new() -> Forked {
        let (end, gate) = std::io::pipe().unwrap();
        // SAFETY: the new process has one thread and no lock that another one held; so it only
        // calls what is allowed there (close, read, _exit), and never returns.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "{}", std::io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: this process' own descriptor, which nobody uses any more.
            unsafe { libc::close(gate.as_raw_fd()) };
            let mut byte = 0_u8;
            // SAFETY: one byte, into a local; it ends when the other process has closed the gate.
            unsafe { libc::read(end.as_raw_fd(), (&raw mut byte).cast(), 1) };
            // SAFETY: ends the process, and runs nothing of what the other one has planned.
            unsafe { libc::_exit(0) };
        }
        Forked { pid, gate }
    }

    fn end(self) {
        drop(self.gate);
        // SAFETY: our own child, which nobody else waits for; no status is asked.
        let waited = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
        assert_eq!(waited, self.pid);
    }
}

/// A child that was forked and runs no other program has our descriptors themselves: its end takes
/// no lock away, and closing the image gives the locks back while it lives. (Reliability: locking
/// and ownership.)
#[test]
fn a_fork_neither_loses_nor_keeps_locks() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    std::fs::write(&image, [0; 4096]).unwrap();
    let world = world();
    let open = || open(&world, &image, "storage", false, false);
    let refused = || open().map(drop).map_err(|error| error.kind());
    let holder = open().unwrap();
    Forked::new().end();
    assert_eq!(refused(), Err(ErrorKind::Locked), "a child has ended");
    let child = Forked::new();
    world.close(holder).unwrap();
    let next = open().expect("closed, while a child has the file open");
    child.end();
    assert_eq!(refused(), Err(ErrorKind::Locked), "another child has ended");
    world.close(next).unwrap();
    world.end();
}

/// A refused open leaves no lock behind.
#[test]
fn a_refused_open_leaves_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    std::fs::write(&image, [0; 4096]).unwrap();
    let world = world();
    let passed = File::options().read(true).write(true).open(&image).unwrap();
    let reader = open(&world, &image, "format", true, false).unwrap();
    let options = Options::new()
        .with("driver", "storage")
        .with("file.driver", "file")
        .with_fd("file.fd", passed.try_clone().unwrap().into());
    assert_eq!(world.open(options).unwrap_err().kind(), ErrorKind::Locked);
    // The description that failed is still open; a second reader must not see any lock of it.
    world
        .close(open(&world, &image, "format", true, false).unwrap())
        .unwrap();
    world.close(reader).unwrap();
    drop(passed);
    world.end();
}

/// An image that becomes writable is locked before it can be written: by then another process that
/// writes it is found, and one that comes later finds us. A handle that was not given the permission
/// does not write, though its node could: nothing would say so to others.
#[test]
fn a_reopened_image_is_not_written_without_its_lock() {
    if !has_reference() {
        return;
    }
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    let disk = open(&world, &image, "raw", true, false).unwrap();
    let permissions = |held| Permissions {
        held,
        shared: Perm::all(),
    };
    let writes = permissions(Perm::CONSISTENT_READ | Perm::WRITE);
    let reopen = |changes: &[(&str, &str)], hold: Option<Permissions>| {
        let mut transaction = Transaction::new(&world.graph);
        let changes = changes.iter().copied().collect();
        transaction.reopen_options(&disk.node(), changes)?;
        if let Some(hold) = hold {
            transaction.set_permissions(&disk, hold);
        }
        world.run(|co| transaction.run(co))
    };
    // What is there already: the other process goes on reading the image.
    let data = std::fs::read(&image).unwrap();
    let write = || world.run(|co| disk.pwrite(co, 0, &data[..512], support::PLAIN));

    // Another process writes: together with the lock nothing changes, without it we cannot write.
    let other = Reference::hold(&image, "qcow2", &[]);
    let refused = reopen(&[("read-only", "off")], Some(writes)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked, "{refused}");
    assert!(disk.node().is_read_only());
    reopen(&[("read-only", "off")], None).unwrap();
    assert!(!disk.node().is_read_only());
    assert_eq!(write().unwrap_err().kind(), ErrorKind::ReadOnly);
    let refused = disk.set_permissions(writes).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked, "{refused}");
    assert_eq!(write().unwrap_err().kind(), ErrorKind::ReadOnly);
    drop(other);

    // It has ended: the lock comes with the permission, and keeps the next one out.
    assert_eq!(Reference::complaint(&image, "qcow2", &[]), "");
    disk.set_permissions(writes).unwrap();
    assert!(Reference::complaint(&image, "qcow2", &[]).contains("lock"));
    write().unwrap();
    reopen(
        &[("read-only", "on")],
        Some(permissions(Perm::CONSISTENT_READ)),
    )
    .unwrap();
    assert_eq!(Reference::complaint(&image, "qcow2", &[]), "");
    reopen(&[("read-only", "off")], Some(writes)).unwrap();
    assert!(Reference::complaint(&image, "qcow2", &[]).contains("lock"));
    write().unwrap();
    world.close(disk).unwrap();
    world.end();
}
