//! A ring ends with the thread that drives it. Descriptors and mappings are of the whole process: so
//! this is a test binary of its own, with one test.

mod support;

use coblock_aio::{ContextOptions, Home, IoThread, co};
use std::fs;
use std::os::fd::AsFd;
use std::sync::mpsc;
use support::{Scratch, options, ring};

/// What the process has open, and of these the rings; and the mappings of rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    descriptors: usize,
    rings: usize,
    mappings: usize,
}

impl Open {
    fn now() -> Open {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        // That directory is one of them.
        let links: Vec<_> = links
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .collect();
        let is_ring = |name: &str| name.contains("[io_uring]");
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        Open {
            descriptors: links.len(),
            rings: links
                .iter()
                .filter(|to| is_ring(&to.to_string_lossy()))
                .count(),
            mappings: maps.lines().filter(|line| is_ring(line)).count(),
        }
    }
}

fn thread() -> IoThread {
    IoThread::new(ContextOptions {
        ring_depth: 64,
        ..options("io_uring")
    })
    .unwrap()
}

/// Writes, flushes and reads in the context of `thread`.
fn work(thread: &IoThread, scratch: &Scratch) {
    let file = scratch.create();
    let (done, wait) = mpsc::channel();
    let begun = thread.context().spawn("work", move |c| {
        co::write(c, file.as_fd(), 0, (&[7; 4096][..]).into()).unwrap();
        co::sync(c, file.as_fd(), true).unwrap();
        let mut back = [0; 4096];
        co::read(c, file.as_fd(), 0, (&mut back[..]).into()).unwrap();
        drop(file);
        done.send(back[4095]).unwrap();
    });
    begun.unwrap();
    assert_eq!(wait.recv().unwrap(), 7);
}

/// However a home ends, its ring goes with it, descriptor and mappings: with the end of its thread, with
/// its context still held by somebody else, in a foreign loop, and when the thread panics.
#[test]
fn a_ring_ends_with_its_home() {
    let Some(first) = ring(64) else { return };
    first.close();
    let scratch = Scratch::on_disk("ring");
    // What lives as long as the process is there afterwards.
    let once = thread();
    work(&once, &scratch);
    once.stop();
    let before = Open::now();
    assert_eq!((before.rings, before.mappings), (0, 0), "{before:?}");

    for round in 0..32 {
        let one = thread();
        let two = thread();
        let now = Open::now();
        assert_eq!(now.rings, 2, "{now:?}");
        assert!(now.mappings >= 2, "{now:?}");
        work(&one, &scratch);
        work(&two, &scratch);
        one.stop();
        assert_eq!(Open::now().rings, 1, "the other one goes on");
        work(&two, &scratch);
        drop(two);
        assert_eq!(Open::now(), before, "round {round}");
    }

    // Somebody keeps the context: the ring is the home's.
    let last = thread();
    let kept = last.context().clone();
    work(&last, &scratch);
    last.stop();
    let now = Open::now();
    assert_eq!((now.rings, now.mappings), (0, 0), "{now:?}");
    assert!(kept.has_ended());
    drop(kept);
    assert_eq!(Open::now(), before);

    // A foreign loop has a descriptor of its own for both, and the kernel raises another one.
    std::thread::spawn(|| {
        let home = ring(64).unwrap();
        home.timeout_ns();
        assert!(home.fd().as_fd().try_clone_to_owned().is_ok());
        home.dispatch();
        home.close();
    })
    .join()
    .unwrap();
    assert_eq!(Open::now(), before, "a foreign loop");

    let panicked = std::thread::spawn(|| {
        let home: Home = ring(64).unwrap();
        home.poll(false);
        panic!("told to");
    });
    assert!(panicked.join().is_err());
    assert_eq!(Open::now(), before, "the thread panicked");
}
