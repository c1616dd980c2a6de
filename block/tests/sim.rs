//! The simulated disk: what tests rely on when they cut its power, fail it, hold it.

mod support;

use coblock_block::drivers::sim::{Fault, Keep, LogEntry, Match, SimDisk};
use coblock_block::{Options, RequestFlags};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::time::Duration;
use support::{Start, World};

const PLAIN: RequestFlags = RequestFlags::empty();

fn sim(disk: &Arc<SimDisk>) -> Options {
    Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone())
}

/// Which of three writes are there after a power cut: one byte for each kilobyte.
fn left(disk: &SimDisk) -> Vec<u8> {
    (0..3).map(|n| disk.peek(n * 1024, 1)[0]).collect()
}

/// Reliability, contract 1 and 2: what was flushed is there, the rest is there or not, in pieces of
/// 512 bytes.
#[test]
fn a_power_cut_keeps_what_was_flushed() {
    let disk = SimDisk::new(8192);
    let world = World::simulated();
    let backend = world.open(sim(&disk)).unwrap();
    world.run(|co| {
        backend.pwrite(co, 0, &[1; 1024][..], PLAIN).unwrap();
        backend.flush(co).unwrap();
        backend.pwrite(co, 1024, &[2; 1024][..], PLAIN).unwrap();
        backend.pwrite(co, 2048, &[3; 1024][..], PLAIN).unwrap();
    });
    let at = disk.log_len();
    assert_eq!(
        (
            at,
            disk.pending_at(at),
            disk.pending_at(1),
            disk.pending_at(2)
        ),
        (4, 2, 1, 0)
    );
    for (keep, want) in [
        (Keep::Nothing, [1, 0, 0]),
        (Keep::Everything, [1, 2, 3]),
        (Keep::AllBut(0), [1, 0, 3]),
        (Keep::AllBut(1), [1, 2, 0]),
        (Keep::Torn(0), [1, 2, 0]),
        (Keep::Torn(1), [1, 2, 3]),
    ] {
        assert_eq!(left(&disk.after_power_cut(at, &keep)), want, "{keep:?}");
    }
    let torn = disk.after_power_cut(at, &Keep::Torn(1));
    assert_eq!(
        (torn.peek(2048, 512), torn.peek(2560, 512)),
        (vec![3; 512], vec![0; 512])
    );
    assert_eq!(left(&disk.after_power_cut(1, &Keep::Nothing)), [0, 0, 0]);
    assert_eq!(left(&disk.after_power_cut(1, &Keep::Everything)), [1, 0, 0]);
    let (mut both, mut half) = (false, false);
    for seed in 0..64 {
        let after = disk.after_power_cut(at, &Keep::Seed(seed));
        assert_eq!(
            after.contents(),
            disk.after_power_cut(at, &Keep::Seed(seed)).contents()
        );
        let sectors = [after.peek(1024, 512), after.peek(1536, 512)];
        for sector in &sectors {
            assert!(
                *sector == [0; 512] || *sector == [2; 512],
                "never mixed below a sector"
            );
        }
        both |= sectors == [vec![2; 512], vec![2; 512]];
        half |= sectors[0] != sectors[1];
    }
    assert!(both && half);
    // A disk of its own: it can be opened, written, and cut again.
    let after = disk.after_power_cut(at, &Keep::Nothing);
    let again = world.open(sim(&after)).unwrap();
    world
        .run(|co| again.pwrite(co, 1024, &[9; 512][..], PLAIN))
        .unwrap();
    assert_eq!(
        left(&after.after_power_cut(1, &Keep::Everything)),
        [1, 9, 0]
    );
    assert_eq!(left(&disk), [1, 2, 3]);
    world.close(again).unwrap();
    world.close(backend).unwrap();
    world.end();
}

/// A flush covers the writes that had ended when it began, and no other.
#[test]
fn a_flush_covers_what_had_ended() {
    let disk = SimDisk::new(8192);
    let world = World::simulated();
    let backend = Arc::new(world.open(sim(&disk)).unwrap());
    world
        .run(|co| backend.pwrite(co, 0, &[1; 1024][..], PLAIN))
        .unwrap();
    let slow = disk.hold(Match::writes().touching(1024..2048));
    let flush = disk.hold(Match::flushes());
    let used = backend.clone();
    world.home.spawn("slow", move |co| {
        used.pwrite(co, 1024, &[2; 1024][..], PLAIN).unwrap()
    });
    let used = backend.clone();
    world.home.spawn("flush", move |co| used.flush(co).unwrap());
    assert_eq!((slow.waiting(), flush.waiting()), (1, 1));
    slow.release_all();
    world
        .run(|co| backend.pwrite(co, 2048, &[3; 1024][..], PLAIN))
        .unwrap();
    flush.release_all();
    while world.home.poll(false) {}
    assert_eq!(
        disk.log().last(),
        Some(&LogEntry::Flush { covered: vec![0] })
    );
    let at = disk.log_len();
    assert_eq!(left(&disk.after_power_cut(at, &Keep::Nothing)), [1, 0, 0]);
    drop((slow, flush));
    world.run(|co| backend.close(co)).unwrap();
    drop(backend);
    world.end();
}

/// Writes that overlap, both unflushed: the one that ended last is on top, whichever was sent
/// first.
#[test]
fn the_last_to_end_is_on_top() {
    let disk = SimDisk::new(1024);
    let world = World::simulated();
    let backend = Arc::new(world.open(sim(&disk)).unwrap());
    let hold = disk.hold(Match::writes());
    for byte in [1, 2] {
        let used = backend.clone();
        world.home.spawn("write", move |co| {
            used.pwrite(co, 0, &[byte; 512][..], PLAIN).unwrap()
        });
    }
    // The second one ends first.
    assert!(hold.release(1));
    while world.home.poll(false) {}
    assert!(hold.release(0));
    while world.home.poll(false) {}
    assert!(!hold.release(0));
    assert_eq!(disk.peek(0, 1), [1]);
    assert_eq!(disk.after_power_cut(2, &Keep::Everything).peek(0, 1), [1]);
    assert_eq!(disk.after_power_cut(2, &Keep::AllBut(0)).peek(0, 1), [2]);
    drop(hold);
    world.run(|co| backend.close(co)).unwrap();
    drop(backend);
    world.end();
}

/// Lengths are contents too: growth and resizes that were not flushed may be lost.
#[test]
fn lengths_survive_like_contents() {
    let disk = SimDisk::new(1024);
    let world = World::simulated();
    let backend = world.open(sim(&disk)).unwrap();
    world.run(|co| {
        backend.truncate(co, 4096, true).unwrap();
        backend.flush(co).unwrap();
        backend.truncate(co, 512, true).unwrap();
    });
    assert_eq!(disk.len(), 512);
    assert_eq!(disk.after_power_cut(3, &Keep::Nothing).len(), 4096);
    assert_eq!(disk.after_power_cut(3, &Keep::Everything).len(), 512);
    assert_eq!(disk.after_power_cut(1, &Keep::Nothing).len(), 1024);
    disk.checkpoint();
    assert_eq!(
        (
            disk.log_len(),
            disk.after_power_cut(0, &Keep::Nothing).len()
        ),
        (0, 512)
    );
    world.close(backend).unwrap();
    world.end();
}

/// Without power every request fails, those in flight too.
#[test]
fn without_power_everything_fails() {
    let disk = SimDisk::new(1024);
    let world = World::simulated();
    let backend = Arc::new(world.open(sim(&disk)).unwrap());
    let hold = disk.hold(Match::writes());
    let used = backend.clone();
    world.home.spawn("write", move |co| {
        assert_eq!(
            used.pwrite(co, 0, &[1; 512][..], PLAIN)
                .unwrap_err()
                .errno(),
            libc::EIO
        );
    });
    disk.power_off();
    drop(hold);
    while world.home.poll(false) {}
    world.run(|co| {
        assert_eq!(
            backend.pread(co, 0, &mut [0; 1][..]).unwrap_err().errno(),
            libc::EIO
        );
        assert_eq!(backend.close(co).unwrap_err().errno(), libc::EIO);
    });
    assert_eq!(disk.contents(), [0; 1024]);
    assert_eq!(
        disk.after_power_cut(1, &Keep::Everything).peek(0, 1),
        [1],
        "it was sent"
    );
    drop(backend);
    world.end();
}

/// Faults: the nth that matches, so many times, or from then on.
#[test]
fn faults_hit_the_nth() {
    let disk = SimDisk::new(8192);
    let world = World::simulated();
    let backend = world.open(sim(&disk)).unwrap();
    let pattern = |world: &World| {
        let tries = (0..6).map(|n| {
            world
                .run(|co| backend.pwrite(co, n * 512, &[1; 512][..], PLAIN))
                .is_ok()
        });
        tries.collect::<Vec<_>>()
    };
    disk.fail(Fault::new(Match::writes(), libc::EIO).after(2));
    assert_eq!(pattern(&world), [true, true, false, true, true, true]);
    disk.fail(Fault::new(Match::any(), libc::EIO).after(1).times(2));
    assert_eq!(pattern(&world), [true, false, false, true, true, true]);
    disk.fail(Fault::new(Match::writes().touching(1024..1025), libc::ENOSPC).from_then_on());
    assert_eq!(pattern(&world), [true, true, false, true, true, true]);
    disk.clear_faults();
    disk.fail(Fault::new(Match::reads(), libc::EIO));
    assert_eq!(pattern(&world), [true; 6], "a write is no read");
    disk.clear_faults();
    world.close(backend).unwrap();
    world.end();
}

/// Delays are virtual time, and reorder by seed.
#[test]
fn delays_reorder_by_seed() {
    let run = |seed| {
        let disk = SimDisk::new(65536);
        disk.delay(seed, Duration::from_secs(1000));
        let world = World::simulated();
        let backend = Arc::new(world.open(sim(&disk)).unwrap());
        let order = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let starts = (0..16u64).map(|n| {
            let (backend, order) = (backend.clone(), order.clone());
            let body = move |co: &Co| {
                backend.pread(co, n * 512, &mut [0; 512][..]).unwrap();
                order.borrow_mut().push(n);
            };
            Box::new(body) as Start
        });
        world.run_all(starts.collect());
        world.run(|co| backend.close(co)).unwrap();
        drop(backend);
        world.end();
        assert_eq!(disk.most_in_flight(), 16);
        order.take()
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
    assert_ne!(first, (0..16).collect::<Vec<_>>());
}
