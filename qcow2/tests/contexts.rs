//! Requests of several contexts on one image at the same time: threads of their own on real files,
//! and contexts that one thread steps on a simulated disk that holds back what a test says.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use coblock_aio::{ContextOptions, EngineKind, Home, IoThread, co};
use coblock_block::drivers::sim::Match;
use coblock_block::{BlockBackend, DenyAll, Graph, Options, RequestFlags, Result, open};
use coblock_coroutine::Co;
use support::rig::*;
use support::world::registry;

/// Another context on the thread of a test.
fn another() -> Home {
    let options = ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named("another")
    };
    Home::new(options).unwrap()
}

fn start_write_in(
    home: &Home,
    disk: &Rc<BlockBackend>,
    at: u64,
    len: u64,
    byte: u8,
) -> (Outcome, Rc<Cell<bool>>) {
    let (disk, outcome, at_home) = (disk.clone(), Outcome::default(), Rc::new(Cell::new(false)));
    let (result, here) = (outcome.clone(), at_home.clone());
    let context = home.context().clone();
    home.spawn("write", move |co| {
        let data = vec![byte; len as usize];
        let wrote = disk.pwrite(co, at, &data[..], RequestFlags::empty());
        here.set(context.is_current());
        result.set(wrote);
    });
    (outcome, at_home)
}

fn settle(homes: &[&Home]) {
    loop {
        let progress = homes
            .iter()
            .map(|home| home.poll(false))
            .collect::<Vec<_>>();
        if !progress.contains(&true) {
            return;
        }
    }
}

/// Rule 2.6: allocating writes of two contexts take the metadata mutex one after the other, and
/// their data is in flight together.
#[test]
fn rule_2_6_allocating_writes_of_several_contexts_overlap() {
    let f = Fixture::new();
    let disk = f.open();
    let other = another();
    let hold = f.disk.hold(Match::writes().touching(BEHIND_TABLES));
    let writes: Vec<_> = (0..8)
        .map(|n| {
            let home = if n % 2 == 0 { &f.home } else { &other };
            start_write_in(home, &disk, n * CLUSTER, CLUSTER, n as u8 + 1)
        })
        .collect();
    settle(&[&f.home, &other]);
    assert_eq!(hold.waiting(), 8, "the data of all is on its way");
    assert!(writes.iter().all(|(outcome, _)| !outcome.is_done()));
    drop(hold);
    settle(&[&f.home, &other]);
    for (n, (outcome, at_home)) in writes.iter().enumerate() {
        outcome.take().expect("nothing holds it back").unwrap();
        assert!(at_home.get(), "write {n} went on in another context");
    }
    assert_eq!(stats(&disk).dependency_waits, 0);
    for n in 0..8 {
        let data = f.read(&disk, n * CLUSTER, CLUSTER);
        assert_eq!(data, vec![n as u8 + 1; CLUSTER as usize], "cluster {n}");
    }
    f.close(disk);
    other.close();
}

/// Rules 9.1, 4.1: a write that waits for the allocation of another context's write is woken in its
/// own context, and loses nothing.
#[test]
fn rule_9_1_a_write_waits_for_one_of_another_context() {
    let f = Fixture::new();
    let disk = f.open();
    let other = another();
    let hold = f.disk.hold(Match::writes().touching(BEHIND_TABLES));
    let first = start_write_in(&f.home, &disk, 0, 512, 1);
    let second = start_write_in(&other, &disk, 1024, 512, 2);
    settle(&[&f.home, &other]);
    assert_eq!(hold.waiting(), 1);
    assert_eq!(stats(&disk).dependency_waits, 1);
    drop(hold);
    settle(&[&f.home, &other]);
    for (outcome, at_home) in [first, second] {
        outcome.take().expect("nothing holds it back").unwrap();
        assert!(at_home.get());
    }
    let data = f.read(&disk, 0, 2048);
    assert_eq!([data[0], data[512], data[1024], data[1536]], [1, 0, 2, 0]);
    f.close(disk);
    other.close();
}

/// Rule 2.6: who finds what it needs in the cache waits for nobody, whatever another context does
/// with the metadata mutex meanwhile.
#[test]
fn rule_2_6_a_hit_waits_for_no_metadata_of_another_context() {
    let f = Fixture::new();
    let disk = f.open();
    let other = another();
    f.write(&disk, CLUSTER, CLUSTER, 8);
    f.close(disk);
    let disk = f.open();
    assert_eq!(f.read(&disk, CLUSTER, 1), [8], "its L2 table is cached");
    // Who allocates reads refcounts under the mutex.
    let counts = REFCOUNT_BLOCK..REFCOUNT_BLOCK + CLUSTER;
    let hold = f.disk.hold(Match::reads().touching(counts));
    let (allocates, _) = start_write_in(&other, &disk, 2 * CLUSTER, CLUSTER, 7);
    settle(&[&f.home, &other]);
    assert_eq!(hold.waiting(), 1, "the mutex is held");
    let locks = stats(&disk).metadata_locks;
    let overwrite = start_write_in(&f.home, &disk, CLUSTER, 512, 5);
    settle(&[&f.home, &other]);
    assert!(overwrite.0.is_done() && !allocates.is_done());
    assert_eq!(f.read(&disk, CLUSTER, CLUSTER)[511..513], [5, 8]);
    assert_eq!(stats(&disk).metadata_locks, locks);
    drop(hold);
    settle(&[&f.home, &other]);
    allocates.take().expect("nothing holds it back").unwrap();
    f.close(disk);
    other.close();
}

/// Threads that send requests.
const THREADS: usize = 3;
/// Coroutines of each.
const LANES: usize = 4;
const SECTOR: u64 = 512;
/// Operations of each coroutine.
const STEPS: u64 = 250;

/// What one coroutine does: it owns every sector whose number is `id` modulo all of them, so each
/// cluster has sectors of all threads, and knows what those hold.
fn work(co: &Co, disk: &BlockBackend, id: u64) -> Result<Vec<u8>> {
    let workers = (THREADS * LANES) as u64;
    let sectors = disk.len() / SECTOR;
    let mine = (sectors - id).div_ceil(workers);
    let mut known = vec![0_u8; mine as usize];
    let mut random = id + 1;
    let mut next = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % below
    };
    for step in 0..STEPS {
        let nth = next(mine);
        let sector = id + nth * workers;
        match next(16) {
            0 => disk.flush(co)?,
            1..=8 => {
                let byte = 1 + (step % 250) as u8;
                disk.pwrite(co, sector * SECTOR, &[byte; 512][..], RequestFlags::empty())?;
                known[nth as usize] = byte;
            }
            _ => {
                let len = (1 + next(40)).min(sectors - sector);
                let mut data = vec![0; (len * SECTOR) as usize];
                disk.pread(co, sector * SECTOR, &mut data[..])?;
                let pieces = data.chunks(SECTOR as usize).step_by(workers as usize);
                for (piece, &want) in pieces.zip(&known[nth as usize..]) {
                    assert!(piece.iter().all(|&b| b == want), "worker {id}, step {step}");
                }
            }
        }
    }
    Ok(known)
}

/// Rule 2.6 and 8.4's ground: three threads write, read and flush sectors of the same clusters of
/// an overlay, whose clusters come from two images below. Nothing is lost, and the image is clean.
/// (Whether one waits for another's allocation is up to the machine; contexts that are stepped do,
/// above.)
#[test]
fn rule_2_6_threads_share_an_overlay() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (name, has_backing) in [("top", true), ("middle", true), ("bottom", false)] {
        let mut bytes = fresh_image();
        if has_backing {
            // Options say which file that is; the name must only be there.
            bytes[512..517].copy_from_slice(b"below");
            support::put64(&mut bytes, 8, 512);
            support::put32(&mut bytes, 16, 5);
        }
        std::fs::write(path(name), bytes).unwrap();
    }
    let home = Home::new(ContextOptions::named("main")).unwrap();
    let graph = Graph::new(home.context());
    let registry = registry();
    let image = |options: Options, prefix: &str, name: &str| {
        options
            .with(&format!("{prefix}driver"), "qcow2")
            .with(&format!("{prefix}file.driver"), "file")
            .with(&format!("{prefix}file.filename"), path(name))
    };
    let opened = |options: Options| {
        let node = home.run(|co| open(co, &graph, &registry, &DenyAll, options));
        BlockBackend::new(&graph, node.unwrap())
    };
    let close = |disk: BlockBackend| {
        home.run(|co| disk.close(co)).unwrap();
    };
    // Below: zeros, written as such in every other cluster of either image.
    for (name, first) in [("bottom", 0), ("middle", 1)] {
        let alone = Options::new().with("backing", "");
        let alone = if name == "bottom" {
            Options::new()
        } else {
            alone
        };
        let disk = opened(image(alone, "", name));
        let zeros = vec![0; CLUSTER as usize];
        for cluster in (first..disk.len() / CLUSTER).step_by(2) {
            let wrote =
                |co: &Co| disk.pwrite(co, cluster * CLUSTER, &zeros[..], RequestFlags::empty());
            home.run(wrote).unwrap();
        }
        close(disk);
    }
    let chain = image(Options::new(), "", "top");
    let chain = image(chain, "backing.", "middle");
    let chain = image(chain, "backing.backing.", "bottom");
    let disk = Arc::new(opened(chain));

    let threads: Vec<_> = (0..THREADS)
        .map(|n| IoThread::new(ContextOptions::named(format!("queue {n}"))).unwrap())
        .collect();
    let known = Rc::new(std::cell::RefCell::new(vec![Vec::new(); THREADS * LANES]));
    for id in 0..THREADS * LANES {
        let context = threads[id % THREADS].context().clone();
        let (known, disk) = (known.clone(), disk.clone());
        home.spawn("worker", move |co| {
            let done = co::run_in(co, &context, "work", |co| work(co, &disk, id as u64));
            known.borrow_mut()[id] = done.unwrap().unwrap();
        });
    }
    while home.context().live_coroutines() > 0 {
        home.poll(true);
    }
    let mut all = vec![0; disk.len() as usize];
    home.run(|co| disk.pread(co, 0, &mut all[..])).unwrap();
    for (sector, data) in all.chunks(SECTOR as usize).enumerate() {
        let (id, nth) = (sector % (THREADS * LANES), sector / (THREADS * LANES));
        let want = known.borrow()[id][nth];
        assert!(data.iter().all(|&b| b == want), "sector {sector}");
    }
    home.run(|co| disk.close(co)).unwrap();
    drop(disk);
    assert_eq!(graph.live_nodes(), 0);
    for thread in threads {
        thread.stop();
    }
    home.close();
    for name in ["top", "middle", "bottom"] {
        let (report, findings) =
            support::image::with_child(path(name).as_ref(), support::image::report).unwrap();
        assert!(report.is_clean(), "{name}: {findings:?}");
    }
}
