//! The story of rules 6.1 to 6.4: a device that submits outside of the event loop's descriptors
//! writes while a copy of its disk is being finished.
//!
//! A coroutine stands for the job that mirrors a disk: it copies, drains the disk, copies what
//! changed meanwhile, and only then do the device's writes go to the copy. In the drained section
//! the device's callbacks run all the same: they are plain ones of the main loop.

mod support;

use coblock_aio::{AioContext, Postponer};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{BlockBackend, Device, Drain};
use coblock_coroutine::ThreadLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::{PLAIN, World, settle, sim};

const LEN: usize = 16 << 10;
const BLOCK: usize = 4096;

/// What the device does with a write that comes in a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// Submits it: what such devices did.
    AtOnce,
    /// Postpones it, and runs what was postponed last first: the original.
    Reversed,
    /// Postpones it by ours.
    InOrder,
}

/// IDE-like: callbacks of the main loop, and no descriptor.
struct Ide {
    policy: Policy,
    context: Arc<AioContext>,
    postponer: Postponer,
    stack: ThreadLock<Vec<Box<dyn FnOnce() + Send>>>,
    /// Where requests go: the disk, then its copy.
    backend: ThreadLock<Arc<BlockBackend>>,
}

impl Device for Ide {
    fn drained_begin(&self) {
        self.context.disable_external();
    }

    fn drained_end(&self) {
        self.context.enable_external();
        let stack = std::mem::take(&mut *self.stack.lock());
        for action in stack.into_iter().rev() {
            self.context.oneshot(action);
        }
    }
}

/// The guest writes: a callback of the main loop.
fn guest_writes(ide: &Arc<Ide>, block: usize, byte: u8) {
    let submit = {
        let ide = ide.clone();
        move || {
            let backend = ide.backend.lock().clone();
            let offset = (block * BLOCK) as u64;
            backend
                .aio_pwrite(offset, vec![byte; BLOCK], PLAIN, |result, _| {
                    result.unwrap();
                })
                .unwrap();
        }
    };
    match ide.policy {
        Policy::AtOnce => submit(),
        Policy::InOrder if ide.postponer.must_postpone() => {
            ide.postponer.postpone(submit);
        }
        Policy::Reversed if ide.context.external_disabled() > 0 => {
            ide.stack.lock().push(Box::new(submit));
        }
        _ => submit(),
    }
}

/// Runs the story; returns the copy, and what the guest wrote.
fn story(policy: Policy) -> (Vec<u8>, Vec<u8>) {
    let world = World::simulated();
    let (disk, copy) = (SimDisk::with_contents(&[1; LEN]), SimDisk::new(LEN as u64));
    let source = Arc::new(world.open(sim(&disk)).unwrap());
    let target = Arc::new(world.open(sim(&copy)).unwrap());
    // Such a device does not go through a queue: that is the point.
    source.set_request_queueing(false);
    let context = world.home.context().clone();
    let ide = Arc::new(Ide {
        policy,
        postponer: context.postponer("ide"),
        context: context.clone(),
        stack: ThreadLock::new(Vec::new()),
        backend: ThreadLock::new(source.clone()),
    });
    source.set_device(Some(ide.clone()));

    let hold = copy.hold(Match::writes());
    let finished = Arc::new(AtomicBool::new(false));
    world.home.spawn("mirror", {
        let (source, target, ide) = (source.clone(), target.clone(), ide.clone());
        let finished = finished.clone();
        move |co| {
            let section = source.drain(co);
            // What is left to copy, block by block.
            for block in 0..LEN / BLOCK {
                let at = (block * BLOCK) as u64;
                let mut buf = vec![0; BLOCK];
                source.pread(co, at, &mut buf[..]).unwrap();
                target.pwrite(co, at, &buf[..], PLAIN).unwrap();
            }
            // From now on the guest uses the copy.
            *ide.backend.lock() = target.clone();
            drop(section);
            finished.store(true, Ordering::Relaxed);
        }
    });
    settle(&world);
    // Block 0 is on its way to the copy; block 1 has not been read.
    assert_eq!(hold.waiting(), 1);
    let mut guest = vec![1; LEN];
    for (block, byte) in [(0, 2), (0, 3), (1, 4), (1, 5)] {
        let ide = ide.clone();
        context.oneshot(move || guest_writes(&ide, block, byte));
        guest[block * BLOCK..][..BLOCK].fill(byte);
    }
    settle(&world);
    drop(hold);
    settle(&world);
    assert!(finished.load(Ordering::Relaxed));

    let result = copy.contents();
    source.set_device(None);
    drop(ide);
    for backend in [source, target] {
        world.run(|co| backend.close(co)).unwrap();
    }
    world.end();
    (result, guest)
}

/// Rules 6.1 to 6.3: without postponing the copy lacks writes; in the original's order an old
/// write wins over a new one; with ours the copy is what the guest wrote.
#[test]
fn rule_6_1_the_story_of_the_ide_disk() {
    let (copy, guest) = story(Policy::AtOnce);
    assert_eq!(
        copy[0], 1,
        "both writes to block 0 came too late for the copy"
    );
    assert_ne!(copy, guest);
    let (copy, guest) = story(Policy::Reversed);
    assert_eq!([copy[0], copy[BLOCK]], [2, 4], "the older writes won");
    assert_ne!(copy, guest);
    let (copy, guest) = story(Policy::InOrder);
    assert_eq!(copy, guest);
}
