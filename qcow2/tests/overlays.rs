//! Snapshots of running disks: overlays come above several of them, together or not at all (rule
//! 8.2).

mod support;

use std::rc::Rc;
use std::sync::Arc;

use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{
    Action, BlockBackend, DenyAll, Error, ErrorKind, GraphWrite, Node, Options, Result,
    Transaction, open,
};
use coblock_coroutine::Co;
use support::rig::*;
use support::{put32, put64};

/// An image whose header names a backing file.
fn overlay_image() -> Arc<SimDisk> {
    let mut image = fresh_image();
    put64(&mut image, 8, 200);
    put32(&mut image, 16, 4);
    image[200..204].copy_from_slice(b"base");
    SimDisk::with_contents(&image)
}

struct Disk {
    backend: Rc<BlockBackend>,
    base: Arc<SimDisk>,
    over: Arc<SimDisk>,
    overlay: Arc<Node>,
}

impl Disk {
    /// A qcow2 image in use, and an open overlay that stands on its node.
    fn new(f: &Fixture, name: &str) -> Disk {
        let options = |disk: &Arc<SimDisk>, name: &str| {
            Options::new()
                .with("driver", "qcow2")
                .with("node-name", name)
                .with("file.driver", "sim")
                .with_object("file.disk", disk.clone())
        };
        let (base, over) = (SimDisk::with_contents(&fresh_image()), overlay_image());
        let backend = f.open_with(options(&base, name)).unwrap();
        let above = options(&over, &format!("{name}-overlay")).with("backing", name);
        let opened = |co: &_| open(co, &f.graph, &f.registry, &DenyAll, above);
        Disk {
            overlay: f.home.run(opened).unwrap(),
            backend,
            base,
            over,
        }
    }
}

fn dump(f: &Fixture) -> String {
    f.home
        .with(|| f.graph.read_in_main(|main| f.graph.dump(main).to_json()))
}

/// An action that cannot be prepared.
struct Fails;

impl Action for Fails {
    fn prepare(&mut self, _co: &Co) -> Result<()> {
        Err(Error::new(ErrorKind::NoSpace, "told to fail"))
    }

    fn commit(&mut self, _graph: &mut GraphWrite<'_>) {
        panic!("it was not prepared");
    }
}

/// Rule 8.2: two disks get their overlays, with a write on its way on one of them; or neither does.
#[test]
fn rule_8_2_snapshots_of_several_disks_happen_together() {
    let f = Fixture::new();
    let disks = [Disk::new(&f, "one"), Disk::new(&f, "two")];
    for (disk, byte) in disks.iter().zip([1, 2]) {
        f.write(&disk.backend, 0, CLUSTER, byte);
    }
    f.write(&disks[0].backend, CLUSTER, CLUSTER, 3);
    let before = dump(&f);
    for fails in [true, false] {
        let hold = disks[0].base.hold(Match::writes());
        let writing = f.start_write(&disks[0].backend, CLUSTER, CLUSTER, 9);
        let mut transaction = Transaction::new(&f.graph);
        for disk in &disks {
            transaction.insert(&disk.overlay);
        }
        if fails {
            transaction.action(&[], Box::new(Fails));
        }
        let done = Outcome::default();
        let told = done.clone();
        f.home
            .spawn("snapshot", move |co| told.set(transaction.run(co)));
        f.settle();
        assert!(
            !writing.is_done() && !done.is_done(),
            "it waits for the write"
        );
        drop(hold);
        assert_eq!(f.wait(&done).is_err(), fails);
        f.wait(&writing).unwrap();
        let moved = disks
            .iter()
            .filter(|disk| Arc::ptr_eq(&disk.backend.node(), &disk.overlay));
        assert_eq!(moved.count(), if fails { 0 } else { 2 });
        if fails {
            assert_eq!(dump(&f), before);
        }
    }
    let frozen: Vec<_> = disks.iter().map(|disk| disk.base.contents()).collect();
    for (disk, byte) in disks.iter().zip([1, 2]) {
        f.write(&disk.backend, 512, 512, 7);
        f.flush(&disk.backend);
        let data = f.read(&disk.backend, 0, CLUSTER);
        assert!(
            data[..512].iter().all(|is| *is == byte),
            "what was there before is still read"
        );
        assert!(data[512..1024].iter().all(|is| *is == 7));
    }
    assert_eq!(f.read(&disks[0].backend, CLUSTER, CLUSTER), vec![9; 4096]);
    for (disk, frozen) in disks.iter().zip(frozen) {
        assert_eq!(disk.base.contents(), frozen, "a snapshot does not change");
        assert!(
            disk.over.contents().len() > fresh_image().len(),
            "writes go to the overlay"
        );
    }
    for disk in disks {
        drop(disk.overlay);
        f.home.run(|co| disk.backend.close(co)).unwrap();
    }
    assert_eq!(f.graph.live_nodes(), 0);
}
