//! Waiting for requests outside of coroutines (rule 3.8): every completion wakes who waits.

mod support;

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{ErrorKind, RequestFlags};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use support::load::io_thread;
use support::{World, end, null, panics, sim_world, start};

/// The main home waits for requests that run, and end, on another thread: well, with an error, and
/// with nothing done.
#[test]
fn rule_3_8_completions_on_another_thread_kick() {
    let world = World::with_engine(EngineKind::Threads);
    let thread = io_thread("io", EngineKind::Threads);
    let backend = null(&world, 200_000);
    let over = Arc::new(AtomicUsize::new(0));
    for round in 1..=50 {
        let (tell, hear) = mpsc::channel();
        let (inner, told) = (backend.clone(), over.clone());
        thread.context().oneshot(move || {
            let far = inner.len();
            for (offset, len) in [(0, 4096), (far, 1), (0, 0)] {
                let told = told.clone();
                let done = move |result: coblock_block::Result<()>, _buf| {
                    assert_eq!(result.is_ok(), offset != far);
                    told.fetch_add(1, Ordering::Relaxed);
                };
                inner.aio_pread(offset, vec![0; len], done).unwrap();
            }
            tell.send(()).unwrap();
        });
        hear.recv().unwrap();
        world.home.with(|| backend.wait_idle(thread.context()));
        // The request is counted until its callback returned.
        assert_eq!(over.load(Ordering::Relaxed), 3 * round);
        assert_eq!(backend.in_flight(), 0);
    }
    drop(thread);
    end(world, backend);
}

/// A home waits for its own context: a request that fails late, one that was never held up, and
/// none at all.
#[test]
fn rule_3_8_a_home_waits_for_its_own_requests() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let context = world.home.context().clone();
    world.home.with(|| backend.wait_idle(&context));

    disk.fail(Fault::new(Match::writes(), libc::EIO));
    let hold = disk.hold(Match::writes());
    let write = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[1; 512][..], RequestFlags::empty())
    });
    let flush = start(&world, &backend, |co, backend| backend.flush(co));
    support::settle(&world);
    assert_eq!(backend.in_flight(), 1, "the flush had nothing to do");
    assert!(flush.borrow().is_some());
    context.oneshot(move || drop(hold));
    world.home.with(|| backend.wait_idle(&context));
    let error = write.borrow_mut().take().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    end(world, backend);
}

/// Who drives neither the context of the requests nor the main one may not wait: each could wait
/// for the other.
#[test]
fn rule_3_8_not_between_two_others() {
    let world = World::simulated();
    let backend = null(&world, 0);
    let other = World::simulated();
    let refused = panics(|| {
        other.home.with(|| backend.wait_idle(world.home.context()));
    });
    assert!(refused.contains("rule 3.8"), "{refused}");
    other.end();
    end(world, backend);
}
