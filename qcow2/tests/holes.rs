//! The space of freed clusters goes back to the file while others go on.

mod support;

use coblock_block::drivers::sim::{Match, Op};
use coblock_qcow2::Qcow2;
use support::rig::*;

/// Q13 and rule 9.2: while a hole is punched, writes allocate, and none of them gets the cluster; its
/// count goes down afterwards, and then it serves again.
#[test]
fn rule_9_2_holes_are_punched_beside_other_metadata() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, 2 * CLUSTER, 0x11);
    f.flush(&disk);
    let freed = BEHIND_TABLES.start;
    assert_eq!(f.disk.peek(freed, 2), [0x11; 2], "the first data cluster");

    f.home.run(|co| disk.pdiscard(co, 0, CLUSTER)).unwrap();
    let hold = f.disk.hold(Match::ops(&[Op::Discard]));
    let flushing = {
        let (disk, outcome) = (disk.clone(), Outcome::default());
        let result = outcome.clone();
        f.home.spawn("flush", move |co| result.set(disk.flush(co)));
        outcome
    };
    while hold.waiting() == 0 {
        f.home.poll(true);
    }
    // The metadata mutex is free: this one allocates, and ends.
    f.write(&disk, 16 * CLUSTER, CLUSTER, 0x22);
    assert!(!flushing.is_done());
    assert_ne!(
        f.disk.peek(freed, 1),
        [0x22],
        "not the cluster that is being punched"
    );
    let audit = || {
        let driver = disk.node().driver();
        let image = driver.as_any().unwrap().downcast_ref::<Qcow2>().unwrap();
        let peek = |at: u64, bytes: &mut [u8]| bytes.copy_from_slice(&f.disk.peek(at, bytes.len()));
        let audit = f.home.run(|co| image.audit(co, &peek));
        audit.expect("nobody changes metadata now").unwrap()
    };
    let during = audit();
    assert_eq!(during.leaked, 0);

    hold.release_all();
    drop(hold);
    f.wait(&flushing).unwrap();
    let after = audit();
    assert_eq!((after.leaked, after.counted), (0, during.counted - 1));
    f.write(&disk, 17 * CLUSTER, CLUSTER, 0x33);
    assert_eq!(f.disk.peek(freed, 1), [0x33], "it serves again");
    assert_eq!(f.read(&disk, 0, 1), [0]);
    assert_eq!(f.read(&disk, CLUSTER, 1), [0x11]);
    assert_eq!(f.read(&disk, 16 * CLUSTER, 1), [0x22]);
    f.home.run(|co| disk.close(co)).unwrap();
}
