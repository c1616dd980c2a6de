//! What users of a node see of a drained section (rules 5.5 to 5.7 and 5.9): their requests queue,
//! operations and callbacks are waited for, devices stop their threads.

mod support;

use coblock_aio::{Clock, ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{Drain, ErrorKind};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use support::{PLAIN, end, read_sector, settle, sim, sim_world, start};

/// Rule 5.5: requests wait in order, are not in flight meanwhile, and go on when the last section
/// has ended.
#[test]
fn rule_5_5_requests_queue_in_order() {
    let disk = SimDisk::new(64 << 10);
    let (world, backend) = sim_world(&disk, &[]);
    let sections = world
        .home
        .with(|| (backend.drain_blocking(), backend.node().drain_blocking()));
    let order = Rc::new(RefCell::new(Vec::new()));
    for n in 0..5u64 {
        let order = order.clone();
        start(&world, &backend, move |co, backend| {
            backend.pwrite(co, n * 512, &[1; 512][..], PLAIN)?;
            order.borrow_mut().push(n);
            Ok(())
        });
    }
    settle(&world);
    assert_eq!((backend.queued(), backend.in_flight()), (5, 0));
    drop(sections.0);
    settle(&world);
    assert_eq!(backend.queued(), 5, "one section is left");
    drop(sections.1);
    settle(&world);
    assert_eq!(*order.borrow(), [0, 1, 2, 3, 4]);
    end(world, backend);
}

/// Rule 5.5: a request that may go on is counted before it is woken: a section that begins before
/// it ran waits for it.
#[test]
fn rule_5_5_a_woken_request_is_counted_before_it_runs() {
    let disk = SimDisk::new(64 << 10);
    let (world, backend) = sim_world(&disk, &[]);
    let other = Home::new(ContextOptions {
        engine: EngineKind::None,
        clock: Clock::Virtual(world.clock.clone().unwrap()),
        ..ContextOptions::named("other")
    })
    .unwrap();
    let section = world.home.with(|| backend.drain_blocking());
    let done = Rc::new(Cell::new(false));
    other.spawn("request", {
        let (backend, done) = (backend.clone(), done.clone());
        move |co| {
            read_sector(co, &backend).unwrap();
            done.set(true);
        }
    });
    assert_eq!(backend.queued(), 1);
    drop(section);
    assert!(!done.get(), "its context was not polled");
    let late = world
        .home
        .with(|| backend.drain_blocking_within(Duration::from_secs(1)));
    let busy = late.unwrap_err().busy;
    assert_eq!((busy.len(), busy[0].otherwise), (1, true), "{busy:?}");
    other.poll(false);
    assert!(done.get());
    drop(world.home.with(|| backend.drain_blocking()));
    end(world, backend);
    other.close();
}

/// Rule 5.6: who does not queue is not held back, and turning that off lets those go on that wait.
#[test]
fn rule_5_6_queueing_is_off_for_some_users() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let section = world.home.with(|| backend.drain_blocking());
    let ended = start(&world, &backend, read_sector);
    settle(&world);
    assert!(ended.borrow().is_none());
    backend.set_request_queueing(false);
    settle(&world);
    assert!(matches!(*ended.borrow(), Some(Ok(()))));
    world.run(|co| read_sector(co, &backend)).unwrap();
    drop(section);
    end(world, backend);
}

/// Rule 5.6: an operation made of several requests: the device's own section waits for its end, a
/// node's section holds its next request back.
#[test]
fn rule_5_6_operations_of_several_requests() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let step = Rc::new(Cell::new(0));
    let go_on = Arc::new(AtomicBool::new(false));
    world.home.spawn("operation", {
        let (backend, step, go_on) = (backend.clone(), step.clone(), go_on.clone());
        move |co| {
            let operation = backend.operation();
            read_sector(co, &backend).unwrap();
            step.set(1);
            while !go_on.load(Ordering::Relaxed) {
                coblock_aio::co::reschedule(co);
            }
            read_sector(co, &backend).unwrap();
            step.set(2);
            drop(operation);
        }
    });
    assert_eq!(step.get(), 1);
    let late = world
        .home
        .with(|| backend.drain_blocking_within(Duration::ZERO));
    assert!(late.unwrap_err().busy[0].otherwise);
    let section = world.home.with(|| backend.node().drain_blocking());
    go_on.store(true, Ordering::Relaxed);
    settle(&world);
    assert_eq!(
        (step.get(), backend.queued()),
        (1, 1),
        "held back in the middle"
    );
    drop(section);
    settle(&world);
    assert_eq!(step.get(), 2);
    drop(world.home.with(|| backend.drain_blocking()));
    end(world, backend);
}

/// Rule 5.7: a request with a callback is waited for until the callback returned.
#[test]
fn rule_5_7_a_section_waits_for_callbacks() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let called = Arc::new(AtomicBool::new(false));
    world.home.with(|| {
        let told = called.clone();
        backend
            .aio_pread(0, vec![0; 512], move |result, _| {
                result.unwrap();
                told.store(true, Ordering::Relaxed);
            })
            .unwrap();
        let _section = backend.drain_blocking();
        assert!(called.load(Ordering::Relaxed));
    });
    end(world, backend);
}

/// Rules 5.5, 5.7: requests with callbacks and copies between backends are held back, too.
#[test]
fn rule_5_5_callbacks_and_copies_are_held_back() {
    let (from_disk, to_disk) = (SimDisk::with_contents(&[7; 4096]), SimDisk::new(4096));
    let (world, from) = sim_world(&from_disk, &[]);
    let to = Arc::new(world.open(sim(&to_disk)).unwrap());
    let done = Arc::new(AtomicU32::new(0));
    for drained in [&from, &to] {
        let section = world.home.with(|| drained.drain_blocking());
        let ended = start(&world, &from, {
            let to = to.clone();
            move |co, from| from.copy_range(co, 0, &to, 0, 4096)
        });
        world.home.with(|| {
            let done = done.clone();
            let told = move |result: coblock_block::Result<()>| {
                result.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            };
            from.aio_copy_range(0, &to, 0, 4096, told).unwrap();
        });
        settle(&world);
        assert!(ended.borrow().is_none());
        assert_eq!((from.in_flight(), to.in_flight()), (0, 0));
        drop(section);
        settle(&world);
        assert!(matches!(*ended.borrow(), Some(Ok(()))));
    }
    assert_eq!(done.load(Ordering::Relaxed), 2);
    assert_eq!(to_disk.contents(), [7; 4096]);
    world.run(|co| to.close(co)).unwrap();
    drop(to);
    end(world, from);
}

/// A backend that is closed in a section lets those go that wait, with an error.
#[test]
fn closing_in_a_section_ends_who_waits() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let section = world.home.with(|| backend.drain_blocking());
    let ended = start(&world, &backend, read_sector);
    settle(&world);
    assert!(ended.borrow().is_none());
    world.run(|co| backend.close(co)).unwrap();
    let error = ended.borrow_mut().take().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    drop(section);
    drop(backend);
    world.end();
}
