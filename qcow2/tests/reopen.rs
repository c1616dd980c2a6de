//! Images that get other options, and other backing files, while they are open.

mod support;

use std::rc::Rc;
use std::sync::Arc;

use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{
    BlockBackend, ErrorKind, Node, Options, Perm, Permissions, Reopen, RequestFlags, Result,
    Transaction, open,
};
use coblock_qcow2::Qcow2;
use support::rig::*;

fn reopen(f: &Fixture, disk: &BlockBackend, changes: Options) -> Result<()> {
    let mut transaction = Transaction::new(&f.graph);
    transaction.reopen_options(&disk.node(), changes)?;
    f.home.run(|co| transaction.run(co))
}

fn may_write(disk: &BlockBackend, writes: bool) -> Result<()> {
    let mut held = Perm::CONSISTENT_READ;
    held.set(Perm::WRITE, writes);
    let shared = Perm::all();
    disk.set_permissions(Permissions { held, shared })
}

fn word(disk: &SimDisk, at: u64) -> u64 {
    u64::from_be_bytes(disk.peek(at, 8).try_into().unwrap())
}

fn close(f: Fixture, disk: Rc<BlockBackend>) {
    f.home.run(|co| disk.close(co)).unwrap();
    drop(disk);
    assert_eq!(f.graph.live_nodes(), 0);
    drop(f.graph);
    f.home.close();
}

/// Rule 8.2: an image becomes read-only and writable again. Read-only, the file is as after closing:
/// nothing of it is in memory alone; writable, autoclear bits go before the first write.
#[test]
fn rule_8_2_an_image_becomes_read_only_and_writable_again() {
    const AUTOCLEAR: u64 = 88;
    const INCOMPATIBLE: u64 = 72;
    let f = Fixture::new();
    let disk = f
        .open_with(f.options().with("lazy-refcounts", "on"))
        .unwrap();
    f.write(&disk, 0, CLUSTER, 0x11);
    f.flush(&disk);
    assert_eq!(word(&f.disk, INCOMPATIBLE), 1, "lazy, so dirty");
    let refused = reopen(&f, &disk, Options::new().with("read-only", "on")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly, "somebody writes");
    f.write(&disk, CLUSTER, CLUSTER, 0x22);

    may_write(&disk, false).unwrap();
    reopen(&f, &disk, Options::new().with("read-only", "on")).unwrap();
    let node = disk.node();
    assert!(node.is_read_only());
    assert_eq!(word(&f.disk, INCOMPATIBLE), 0, "clean");
    assert_eq!(f.disk.peek(REFCOUNT_BLOCK + 2 * 6, 2), [0, 1], "counted");
    assert_eq!(f.read(&disk, CLUSTER, 1), [0x22]);
    let data = vec![0; 512];
    let refused = f
        .home
        .run(|co| disk.pwrite(co, 0, &data[..], RequestFlags::empty()));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);

    // What somebody else has written since then.
    f.disk.poke(AUTOCLEAR, &5u64.to_be_bytes());
    reopen(&f, &disk, Options::new().with("read-only", "off")).unwrap();
    assert_eq!(word(&f.disk, AUTOCLEAR), 0);
    may_write(&disk, true).unwrap();
    f.write(&disk, 0, 2 * CLUSTER, 0x33);
    assert!(f.read(&disk, 0, 2 * CLUSTER).iter().all(|&b| b == 0x33));
    drop(node);
    close(f, disk);
}

/// An image that has to be repaired does not become writable, and stays as it is; the error says what to
/// do, and that helps.
#[test]
fn an_image_that_needs_repair_stays_read_only() {
    const INCOMPATIBLE: u64 = 72;
    for (name, bits, kind, words) in [
        (
            "dirty",
            1_u64,
            ErrorKind::NotSupported,
            "it has to be opened anew for writing, which repairs it",
        ),
        (
            "corrupt",
            2,
            ErrorKind::ReadOnly,
            "it cannot be opened for writing until it is repaired",
        ),
    ] {
        let f = Fixture::new();
        let disk = f.open();
        f.write(&disk, 0, CLUSTER, 0x11);
        f.home.run(|co| disk.close(co)).unwrap();
        drop(disk);
        let disk = f.open_with(f.options().with("read-only", "on")).unwrap();
        f.disk.poke(INCOMPATIBLE, &bits.to_be_bytes());
        let refused = reopen(&f, &disk, Options::new().with("read-only", "off")).unwrap_err();
        assert_eq!(refused.kind(), kind, "{name}: {refused}");
        assert!(refused.to_string().contains(words), "{name}: {refused}");
        assert!(disk.node().is_read_only() && f.graph.node_names().len() == 2);
        assert_eq!(f.read(&disk, 0, 4), [0x11; 4], "{name}");
        assert_eq!(word(&f.disk, INCOMPATIBLE), bits, "{name}: as it was");
        f.home.run(|co| disk.close(co)).unwrap();
        drop(disk);
        match f.open_with(f.options()) {
            Ok(disk) => {
                assert_eq!(name, "dirty");
                assert_eq!(word(&f.disk, INCOMPATIBLE), 0);
                f.write(&disk, CLUSTER, CLUSTER, 0x22);
                assert_eq!(f.read(&disk, CLUSTER - 1, 2), [0x11, 0x22]);
                close(f, disk);
            }
            Err(error) => {
                assert_eq!((name, error.kind()), ("corrupt", kind), "{error}");
            }
        }
    }
}

/// What tunes an image takes effect while it is open, and what was written stays.
#[test]
fn an_open_image_is_tuned() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, 8 * CLUSTER, 0x44);
    for (changes, want) in [
        ("l2-cache-size=65536,refcount-cache-size=65536", Ok(())),
        ("cache-clean-interval=0", Ok(())),
        ("lazy-refcounts=on,discard=ignore", Ok(())),
        ("pass-discard-request=off,pass-discard-other=on", Ok(())),
        ("overlap-check=all,request-mode=serial", Ok(())),
        ("l2-cache-entry-size=513", Err("power of two")),
        ("cache-size=1048576", Err("may not be set at the same time")),
        ("request-mode=parallel", Err("must be 'mutex' or 'serial'")),
        (
            "preallocation=full",
            Err("Cannot change the option 'preallocation'"),
        ),
        ("backing=nowhere", Err("Cannot find node-name='nowhere'")),
    ] {
        let result = reopen(&f, &disk, Options::parse(changes).unwrap());
        match (result, want) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(words)) => {
                assert!(error.to_string().contains(words), "{changes}: {error}");
            }
            (result, want) => panic!("{changes}: {result:?}, not {want:?}"),
        }
        f.write(&disk, 3 * CLUSTER, 512, 0x55);
        assert_eq!(f.read(&disk, 4 * CLUSTER - 1, 2), [0x44; 2], "{changes}");
    }
    assert!(!disk.node().passes_discards());
    let driver = disk.node().driver();
    let image = driver.as_any().unwrap().downcast_ref::<Qcow2>().unwrap();
    assert_eq!(image.stats().l2_evictions, 0);
    drop(driver);
    close(f, disk);
}

/// Rule 8.2: in the middle of a transaction writing back fails; the image goes on as it was, with
/// everything in memory, and so does the one that was ready already.
#[test]
fn rule_8_2_a_failed_reopen_leaves_every_image_as_it_was() {
    let f = Fixture::new();
    let disk = f.open();
    let second = SimDisk::with_contents(&fresh_image());
    let options = Options::new()
        .with("driver", "qcow2")
        .with("file.driver", "sim")
        .with_object("file.disk", second.clone());
    let other = f.open_with(options).unwrap();
    f.write(&disk, 0, CLUSTER, 0x66);
    f.write(&other, 0, CLUSTER, 0x77);
    let to = Reopen {
        options: Options::new().with("l2-cache-size", "65536"),
        discard: Some(false),
        ..Reopen::default()
    };
    let before = [disk.node().driver(), other.node().driver()];
    second.fail(Fault::new(Match::writes(), libc::EIO).from_then_on());
    let mut transaction = Transaction::new(&f.graph);
    transaction.reopen(&disk.node(), to.clone());
    transaction.reopen(&other.node(), to.clone());
    f.home.run(|co| transaction.run(co)).unwrap_err();
    drop(transaction);
    second.clear_faults();
    for (disk, before) in [&disk, &other].into_iter().zip(&before) {
        assert!(Arc::ptr_eq(&disk.node().driver(), before));
        assert!(!disk.node().is_drained());
    }
    assert!(disk.node().passes_discards());
    f.write(&disk, CLUSTER, CLUSTER, 0x67);
    f.write(&other, CLUSTER, CLUSTER, 0x78);
    let mut transaction = Transaction::new(&f.graph);
    transaction.reopen(&disk.node(), to.clone());
    transaction.reopen(&other.node(), to);
    f.home.run(|co| transaction.run(co)).unwrap();
    drop(transaction);
    assert!(!Arc::ptr_eq(&disk.node().driver(), &before[0]));
    assert_eq!(f.read(&disk, CLUSTER - 1, 2), [0x66, 0x67]);
    assert_eq!(f.read(&other, CLUSTER - 1, 2), [0x77, 0x78]);
    drop(before);
    f.home.run(|co| other.close(co)).unwrap();
    drop(other);
    close(f, disk);
}

fn base(f: &Fixture, name: &str, byte: u8) -> Arc<Node> {
    let disk = SimDisk::with_contents(&vec![byte; 1 << 20]);
    let options = Options::new()
        .with("driver", "sim")
        .with("node-name", name)
        .with("read-only", "on")
        .with_object("disk", disk);
    let gate = coblock_block::DenyAll;
    let opened = |co: &_| open(co, &f.graph, &f.registry, &gate, options);
    f.home.run(opened).unwrap()
}

/// An open image gets a backing file, another one, and none: reads follow, a loop is refused, and a
/// node that nobody uses any more is closed.
#[test]
fn an_open_image_changes_its_backing_file() {
    let f = Fixture::new();
    let disk = f.open();
    f.write(&disk, 0, CLUSTER, 0x99);
    let (one, two) = (base(&f, "one", 1), base(&f, "two", 2));
    let reads = |want: u8| {
        assert_eq!(f.read(&disk, 0, 1), [0x99]);
        assert_eq!(f.read(&disk, 2 * CLUSTER, 1), [want]);
    };
    let backing = |to: &str| reopen(&f, &disk, Options::new().with("backing", to));
    reads(0);
    backing("one").unwrap();
    reads(1);
    backing("one").unwrap();
    assert_eq!((one.users(), two.users()), (1, 0));
    drop(one);
    backing("two").unwrap();
    reads(2);
    assert!(f.graph.find_node("one").is_none(), "closed");
    // Copy on write takes from the new one.
    f.write(&disk, 3 * CLUSTER, 512, 0xaa);
    assert_eq!(f.read(&disk, 3 * CLUSTER + 511, 2), [0xaa, 2]);
    let name = disk.node().name().to_owned();
    let loops = backing(&name).unwrap_err();
    assert_eq!(loops.kind(), ErrorKind::Chain, "{loops}");
    reads(2);
    drop(two);
    backing("").unwrap();
    reads(0);
    assert_eq!(f.graph.node_names().len(), 2);
    close(f, disk);
}
