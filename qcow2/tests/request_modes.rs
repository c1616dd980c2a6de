//! Rule 2.6: which requests run at the same time, in either request mode, on a simulated disk that
//! holds back what the test says.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod support;

use coblock_block::RequestFlags;
use coblock_block::drivers::sim::Match;
use support::rig::*;

/// Rule 2.6: data I/O on allocated clusters is parallel, and a lookup that hits the cache takes no
/// lock.
#[test]
fn rule_2_6_cached_reads_and_overwrites_do_not_take_the_metadata_mutex() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, 16 * CLUSTER, 1);
    let before = stats(&disk).metadata_locks;
    assert!(before > 0);
    let hold = f.disk.hold(Match::any());
    let writes: Vec<_> = (0..16)
        .map(|n| f.start_write(&disk, n * CLUSTER, 512, 2))
        .collect();
    f.settle();
    assert_eq!(hold.waiting(), 16, "overwrites are in flight together");
    drop(hold);
    f.settle();
    assert!(writes.iter().all(Outcome::is_done));
    assert_eq!(f.read(&disk, 0, 16 * CLUSTER)[511..513], [2, 1]);
    assert_eq!(stats(&disk).metadata_locks, before);
    f.close(disk);
}

/// Rule 2.6: the mutex is released around guest data, so allocating writes of different clusters
/// overlap.
#[test]
fn rule_2_6_allocating_writes_overlap() {
    let f = Fixture::new();
    let disk = f.open();
    let hold = f.disk.hold(Match::writes().touching(BEHIND_TABLES));
    let writes: Vec<_> = (0..8)
        .map(|n| f.start_write(&disk, n * CLUSTER, CLUSTER, n as u8))
        .collect();
    f.settle();
    assert_eq!(hold.waiting(), 8);
    drop(hold);
    f.settle();
    assert!(writes.iter().all(Outcome::is_done));
    assert_eq!(stats(&disk).dependency_waits, 0);
    f.close(disk);
}

/// Rule 2.6, serial mode: one request at a time, first in first out; a request that was waiting
/// starts when the one before it is done, and not later.
#[test]
fn rule_2_6_serial_mode_takes_one_request_at_a_time() {
    let f = Fixture::new();
    let disk = f.open_in("serial");
    let hold = f.disk.hold(Match::writes().touching(BEHIND_TABLES));
    let writes: Vec<_> = (0..8)
        .map(|n| f.start_write(&disk, n * CLUSTER, CLUSTER, 1))
        .collect();
    for done in 0..8 {
        f.settle();
        assert_eq!(hold.waiting(), 1);
        let finished: Vec<bool> = writes.iter().map(Outcome::is_done).collect();
        assert!(
            finished.iter().enumerate().all(|(n, &is)| is == (n < done)),
            "{finished:?}"
        );
        assert!(hold.release(0));
    }
    f.settle();
    assert!(writes.iter().all(Outcome::is_done));
    drop(hold);
    f.close(disk);
}

/// Rule 2.6: a request that is sent at once when another one's result is known does not hang in
/// serial mode. (The original took the finished request off its list after the callback, so it
/// did.)
#[test]
fn rule_2_6_serial_mode_lets_a_finished_request_be_followed() {
    let f = Fixture::new();
    let disk = f.open_in("serial");
    let data = f.home.run(|co| {
        for n in 0..4 {
            disk.pwrite(
                co,
                n * CLUSTER,
                &[n as u8 + 1; 512][..],
                RequestFlags::empty(),
            )
            .unwrap();
            disk.flush(co).unwrap();
        }
        let mut data = [0; 512];
        disk.pread(co, 3 * CLUSTER, &mut data[..]).unwrap();
        data
    });
    assert_eq!(data, [4; 512]);
    f.close(disk);
}

/// Rule 2.6: both modes give identical images, to the byte.
#[test]
fn rule_2_6_both_modes_give_identical_images() {
    let image = |mode: &str| {
        let f = Fixture::new();
        let disk = f.open_in(mode);
        let mut outcomes = Vec::new();
        for n in 0..200u64 {
            let at = n * 7919 % 200 * 5120 % ((1 << 20) - 8192) / 512 * 512;
            outcomes.push(match n % 7 {
                0 => f.start_empty(&disk, at, 8192, n % 2 == 0),
                _ => f.start_write(&disk, at, 512 * (1 + n % 13), n as u8),
            });
            if n % 31 == 0 {
                f.flush(&disk);
            }
        }
        f.settle();
        assert!(
            outcomes.iter().all(|o| matches!(o.take(), Some(Ok(())))),
            "{mode}"
        );
        f.close(disk);
        f.disk.contents()
    };
    assert!(image("mutex") == image("serial"));
}
