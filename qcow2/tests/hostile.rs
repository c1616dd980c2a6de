//! Hostile images: each public weakness of this format's programs, by its name.
//!
//! Every image is described, checked, read and written. Wanted: a result or a clear error, no
//! panic, nothing opened but the file itself, less than a second of processor time and less than
//! 128 MiB of memory each.

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{
    DenyAll, Dependent, ErrorKind, LikeReference, OpenGate, Options, RequestFlags, Result,
};
use coblock_coroutine::Co;
use coblock_qcow2::create::{CreateOptions, create};
use coblock_qcow2::image_file::ImageFile;
use coblock_qcow2::info::Info;
use support::corpus::Want::{self, Bad, Good};
use support::corpus::{add_extension, cases, changed};
use support::damage::{damage, seeds};
use support::rng::Rng;
use support::world::{World, image_on, sim};
use support::{add_cluster, add_l2, add_snapshots, empty_image, put32, put64, snapshot};

/// Tests that measure this process run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // Another test that failed is told by itself.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A gate that must not be asked.
struct NobodyAsks;

impl OpenGate for NobodyAsks {
    fn dependent(&self, wanted: &Dependent<'_>) -> Result<Options> {
        panic!("a look at the image asks for {wanted:?}");
    }
}

/// Looks at the file without its format.
fn look<R>(
    world: &World,
    disk: &Arc<SimDisk>,
    f: impl FnOnce(&ImageFile<'_>) -> Result<R>,
) -> Result<R> {
    world.home.run(|co| {
        let file = world.open(co, &NobodyAsks, sim(disk))?;
        let result = f(&ImageFile::of_backend(co, &file));
        file.close(co)?;
        result
    })
}

/// Opens the image, reads (or writes) its first and last clusters, flushes, closes.
fn use_it(world: &World, disk: &Arc<SimDisk>, write: bool) -> Result<()> {
    let options = image_on(disk).with("read-only", if write { "off" } else { "on" });
    world.home.run(|co| {
        let image = world.open(co, &DenyAll, options)?;
        let len = image.len().min(0x2_0000);
        let mut buf = vec![0x77; usize::try_from(len).unwrap()];
        let last = image.len() - len;
        let mut result = Ok(());
        for at in [0, last] {
            let done = if write {
                image.pwrite(co, at, &buf[..], RequestFlags::empty())
            } else {
                image.pread(co, at, &mut buf[..])
            };
            result = result.and(done);
        }
        if write {
            result = result.and(image.flush(co));
        }
        // An image that refused a write may refuse to close well, too.
        let closed = image.close(co);
        result.and(closed)
    })
}

/// Processor time of this process in milliseconds.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    // User and system time, in hundredths of a second.
    10 * (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap())
}

/// Memory of this process in KiB: `VmRSS` now, `VmHWM` the most since the last [`forget_peak`].
fn memory_kib(which: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(which)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

fn judge(name: &str, what: &str, got: Result<()>, want: Want) {
    match (got, want) {
        (Ok(()), Good) => {}
        (Err(error), Bad(part)) if error.to_string().contains(part) => {}
        (got, want) => panic!("{name}: {what} gave {got:?} instead of {want:?}"),
    }
}

/// The table of weaknesses in `docs/fidelity/qcow2.md` names each one of the corpus, and each that
/// it leaves to the corpus is there. (That the tests it names exist is looked at with the rules.)
#[test]
fn the_table_of_weaknesses_is_whole() {
    let page = include_str!("../../docs/fidelity/qcow2.md");
    let (_, table) = page.split_once("## Public weaknesses").unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| CVE-"));
    let of_corpus: BTreeSet<&str> = rows
        .filter(|row| row.contains("`hostile_images`"))
        .map(|row| row[2..].split(' ').next().unwrap())
        .collect();
    let names = cases()
        .into_iter()
        .filter_map(|case| case.name.split_once(':'));
    let generated: BTreeSet<&str> = names
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("CVE-"))
        .collect();
    assert_eq!(of_corpus, generated);
}

#[test]
fn hostile_images() {
    let _alone = alone();
    let verbose = std::env::var_os("COBLOCK_TEST_VERBOSE").is_some();
    // A program that counts its lines or checks its accesses is slower and larger.
    let more = std::env::var_os("COBLOCK_TEST_INSTRUMENTED").map_or(1, |_| 20);
    for case in cases() {
        let world = World::new(EngineKind::None);
        let disk = (case.disk)();
        forget_peak();
        let (cpu, memory) = (cpu_ms(), memory_kib("VmRSS:"));
        let info = look(&world, &disk, |file| Info::read(file).map(drop));
        let report = look(&world, &disk, support::image::report);
        let read = use_it(&world, &disk, false);
        let write = use_it(&world, &disk, true);
        let (cpu, memory) = (cpu_ms() - cpu, memory_kib("VmHWM:").saturating_sub(memory));
        if verbose {
            println!("{}\n  {cpu} ms, {memory} KiB\n  info {info:?}", case.name);
            println!(
                "  check {:?}\n  read {read:?}\n  write {write:?}",
                report.as_ref().map(|r| r.0)
            );
            world.end();
            continue;
        }
        judge(case.name, "info", info, case.info);
        judge(case.name, "check", report.map(drop), case.check);
        judge(case.name, "read", read, case.read);
        judge(case.name, "write", write, case.write);
        world.end();
        assert!(
            cpu < 1000 * more,
            "{}: {cpu} ms of processor time",
            case.name
        );
        assert!(
            memory < more * (128 << 10),
            "{}: {memory} KiB more memory",
            case.name
        );
    }
}

/// CVE-2014-0146: each read of looking at and of opening an image with snapshots fails once. An
/// error each time, and nothing left behind.
#[test]
fn every_read_fails_once() {
    let _alone = alone();
    let build = || {
        changed(|image| {
            let l1 = add_cluster(image);
            add_l2(image, &[]);
            add_snapshots(image, &snapshot(l1, 1, b"1"), 1);
        })
    };
    let mut failed = 0;
    for n in 0.. {
        let mut hit = false;
        for what in 0..4 {
            let world = World::new(EngineKind::None);
            let disk = build();
            disk.fail(Fault::new(Match::reads(), 5).after(n));
            let result = match what {
                0 => look(&world, &disk, |file| Info::read(file).map(drop)),
                1 => look(&world, &disk, |file| {
                    let (report, _) = support::image::report(file)?;
                    // A table that could not be read is told in the report.
                    if report.check_errors > 0 {
                        return Err(coblock_block::Error::new(
                            ErrorKind::Io,
                            "told in the report",
                        ));
                    }
                    Ok(())
                }),
                _ => use_it(&world, &disk, what == 3),
            };
            if let Err(error) = result {
                hit = true;
                failed += 1;
                assert_eq!(error.kind(), ErrorKind::Io, "read {n}, {what}: {error}");
            }
            world.end();
        }
        if !hit {
            break;
        }
    }
    assert!(failed > 8, "only {failed} reads failed");
}

/// Chains of backing files that end in themselves or never: an error that says so, whatever the
/// gate lets through.
#[test]
fn backing_chains_without_end() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, backing: &str| {
        let mut image = empty_image(12);
        put64(&mut image, 8, 0x200);
        put32(&mut image, 16, u32::try_from(backing.len()).unwrap());
        image[0x200..0x200 + backing.len()].copy_from_slice(backing.as_bytes());
        add_extension(&mut image, 0xe279_2aca, b"qcow2");
        std::fs::write(dir.path().join(name), image).unwrap();
    };
    write("self", "self");
    write("a", "b");
    write("b", "./a");
    std::os::unix::fs::symlink("link", dir.path().join("target")).unwrap();
    write("link", "target");
    for n in 0..300 {
        write(&format!("deep{n}"), &format!("deep{}", n + 1));
    }
    std::fs::write(dir.path().join("deep300"), empty_image(12)).unwrap();
    for name in ["self", "a", "link", "deep0"] {
        let world = World::new(EngineKind::Threads);
        let path = dir.path().join(name);
        let options =
            Options::format_on_file("qcow2", support::text(&path)).with("read-only", "on");
        let opened = |co: &Co| world.open(co, &LikeReference::new(), options).map(drop);
        let error = world.home.run(opened).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Chain, "{name}: {error}");
        world.end();
    }
}

/// An image that our own driver wrote, of this geometry.
fn written(cluster_size: u64, refcount_bits: u64) -> Vec<u8> {
    let world = World::new(EngineKind::None);
    let disk = SimDisk::new(0);
    let mut options = CreateOptions::new(1 << 20);
    (options.cluster_size, options.refcount_bits) = (cluster_size, refcount_bits);
    world.home.run(|co| {
        let file = world.open(co, &DenyAll, sim(&disk)).unwrap();
        create(&ImageFile::of_backend(co, &file), &options).unwrap();
        file.close(co).unwrap();
    });
    use_it(&world, &disk, true).unwrap();
    world.end();
    disk.contents()
}

/// Damage at random: whatever is done with the image, there is a result or an error, and nothing is
/// left behind. Needs no tools of the reference.
#[test]
fn damage_at_random() {
    let _alone = alone();
    let bases = [(512, 16), (512, 1), (1024, 64), (4096, 16), (65536, 8)]
        .map(|(cluster_size, refcount_bits)| written(cluster_size, refcount_bits));
    let (mut refused, mut worked) = (0, 0);
    for seed in seeds(400) {
        let mut rng = Rng(seed ^ 0x5eed);
        let mut image = bases[rng.index(bases.len())].clone();
        let done = damage(&mut image, &mut rng);
        let disk = SimDisk::with_contents(&image);
        let cpu = cpu_ms();
        let world = World::new(EngineKind::None);
        let _ = look(&world, &disk, |file| Info::read(file).map(drop));
        let _ = look(&world, &disk, support::image::report);
        for write in [false, true, true] {
            match use_it(&world, &disk, write) {
                Ok(()) => worked += 1,
                Err(_) => refused += 1,
            }
        }
        world.end();
        // Both tests of this program may run at once.
        assert!(
            cpu_ms() - cpu < 3000,
            "seed {seed}: {done:?} takes for ever"
        );
    }
    assert!(
        refused > 100 && worked > 100,
        "{refused} refused, {worked} worked: too much of one"
    );
}
