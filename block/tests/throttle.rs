//! Limits on requests (rule 8.1), on a virtual clock, to the nanosecond.

mod support;

use coblock_aio::{Clock, ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::SimDisk;
use coblock_block::throttle::{Direction, Limit, ThrottleConfig, ThrottleGroup};
use coblock_block::{BlockBackend, Drain, ErrorKind, Options, Preallocation};
use coblock_coroutine::Coroutine;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use support::{PLAIN, World, end, settle, sim, sim_world, start};

const MS: u64 = 1_000_000;

fn group(world: &World, config: ThrottleConfig) -> Arc<ThrottleGroup> {
    ThrottleGroup::new("group", world.home.context().clock(), config).unwrap()
}

fn iops(average: u64) -> ThrottleConfig {
    ThrottleConfig {
        iops_total: Limit::average(average),
        ..ThrottleConfig::default()
    }
}

/// When which request was over.
type Times = Rc<RefCell<Vec<(u64, &'static str)>>>;

/// Starts a request that notes when it is over.
fn request(
    world: &World,
    backend: &Arc<BlockBackend>,
    times: &Times,
    name: &'static str,
    len: usize,
) {
    let (times, context) = (times.clone(), world.home.context().clone());
    start(world, backend, move |co, backend| {
        if name.starts_with('w') {
            backend.pwrite(co, 0, &vec![0; len][..], PLAIN)?;
        } else {
            backend.pread(co, 0, &mut vec![0; len][..])?;
        }
        times.borrow_mut().push((context.now_ns(), name));
        Ok(())
    });
}

/// Polls until so many are over; time passes.
fn until(world: &World, times: &Times, count: usize) {
    while times.borrow().len() < count {
        world.home.poll(true);
    }
}

/// Rule 8.1: ten a second: what 100 ms give may come at once and one more, then each waits its
/// time, exactly.
#[test]
fn rule_8_1_operations_go_at_exact_times() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    backend.set_throttle(Some(&group(&world, iops(10))));
    let times = Times::default();
    for name in ["r0", "w1", "r2", "r3", "r4"] {
        request(&world, &backend, &times, name, 512);
    }
    assert_eq!((times.borrow().len(), backend.in_flight()), (2, 3));
    until(&world, &times, 5);
    let expected = [
        (0, "r0"),
        (0, "w1"),
        (100 * MS, "r2"),
        (200 * MS, "r3"),
        (300 * MS, "r4"),
    ];
    assert_eq!(*times.borrow(), expected);
    end(world, backend);
}

/// Rule 8.1: who comes when it is time for one who waits, and before the timer has said so, waits
/// behind.
#[test]
fn rule_8_1_nobody_overtakes_who_waits() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    backend.set_throttle(Some(&group(&world, iops(10))));
    let times = Times::default();
    for name in ["r0", "r1", "r2"] {
        request(&world, &backend, &times, name, 512);
    }
    let clock = world.clock.clone().unwrap();
    clock.advance_to(100 * MS);
    request(&world, &backend, &times, "r3", 512);
    assert_eq!(times.borrow().len(), 2);
    until(&world, &times, 4);
    assert_eq!(times.borrow()[2..], [(100 * MS, "r2"), (200 * MS, "r3")]);
    end(world, backend);
}

/// Rule 8.1: bytes, with odd numbers: rounded up to the nanosecond, and no error adds up.
#[test]
fn rule_8_1_bytes_go_at_exact_times() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let config = ThrottleConfig {
        bps_read: Limit::average(3000),
        ..ThrottleConfig::default()
    };
    backend.set_throttle(Some(&group(&world, config)));
    let times = Times::default();
    for name in ["r", "r", "r", "w", "r"] {
        request(&world, &backend, &times, name, 1000);
    }
    until(&world, &times, 5);
    // The bucket holds 300: (1000 - 300) / 3000 s, then 1000 / 3000 s each; writes are free.
    let at = |thousands: u64| (thousands * 1000 - 300) * 1_000_000_000;
    let expected = [1u64, 2, 3].map(|n| at(n).div_ceil(3000));
    assert_eq!(
        *times.borrow(),
        [
            (0, "r"),
            (0, "w"),
            (expected[0], "r"),
            (expected[1], "r"),
            (expected[2], "r")
        ]
    );
    end(world, backend);
}

/// Rule 8.1: a burst goes as fast as it may for as long as it may.
#[test]
fn rule_8_1_bursts() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let config = ThrottleConfig {
        iops_total: Limit {
            average: 1,
            max: 4,
            burst_seconds: 1,
        },
        iops_size: 512,
        ..ThrottleConfig::default()
    };
    backend.set_throttle(Some(&group(&world, config)));
    let times = Times::default();
    // The second counts as two of 512.
    for (name, len) in [
        ("r", 512),
        ("r", 1024),
        ("r", 512),
        ("r", 512),
        ("r", 512),
        ("r", 512),
    ] {
        request(&world, &backend, &times, name, len);
    }
    until(&world, &times, 6);
    let times: Vec<u64> = times.borrow().iter().map(|(at, _)| at / MS).collect();
    assert_eq!(times, [0, 0, 0, 0, 1000, 2000]);
    end(world, backend);
}

/// Rule 8.1: members of a group take turns; within one it is first come, first served.
#[test]
fn rule_8_1_members_take_turns() {
    let (one, two) = (SimDisk::new(4096), SimDisk::new(4096));
    let (world, first) = sim_world(&one, &[]);
    let second = Arc::new(world.open(sim(&two)).unwrap());
    let shared = group(&world, iops(10));
    first.set_throttle(Some(&shared));
    second.set_throttle(Some(&shared));
    let times = Times::default();
    for name in ["ra", "rb", "rc", "rd", "re"] {
        request(&world, &first, &times, name, 512);
    }
    for name in ["r1", "r2"] {
        request(&world, &second, &times, name, 512);
    }
    assert_eq!(shared.waiting(), 5);
    until(&world, &times, 7);
    let order: Vec<&str> = times.borrow().iter().map(|(_, name)| *name).collect();
    assert_eq!(order, ["ra", "rb", "r1", "rc", "r2", "rd", "re"]);
    assert_eq!(times.borrow()[6].0, 500 * MS, "one limit for both");
    world.run(|co| second.close(co)).unwrap();
    drop(second);
    end(world, first);
}

/// Rule 8.1: a group works over contexts; each request goes on in its own.
#[test]
fn rule_8_1_members_in_several_contexts() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let clock = world.clock.clone().unwrap();
    let homes: Vec<Home> = (0..3)
        .map(|n| {
            Home::new(ContextOptions {
                engine: EngineKind::None,
                clock: Clock::Virtual(clock.clone()),
                ..ContextOptions::named(format!("queue {n}"))
            })
            .unwrap()
        })
        .collect();
    backend.set_throttle(Some(&group(&world, iops(10))));
    let times = Rc::new(RefCell::new(Vec::new()));
    for round in 0..2 {
        for (n, home) in homes.iter().enumerate() {
            let (backend, times, clock) = (backend.clone(), times.clone(), clock.clone());
            home.spawn("request", move |co| {
                backend.pread(co, 0, &mut [0; 512][..]).unwrap();
                assert_eq!(coblock_aio::current().unwrap().name(), format!("queue {n}"));
                times.borrow_mut().push((clock.now_ns() / MS, round, n));
            });
        }
    }
    while times.borrow().len() < 6 {
        let progress = homes.iter().fold(false, |any, home| home.poll(false) | any);
        if !progress {
            clock.advance_to(clock.now_ns() + MS);
        }
    }
    assert_eq!(
        *times.borrow(),
        [
            (0, 0, 0),
            (0, 0, 1),
            (100, 0, 2),
            (200, 1, 0),
            (300, 1, 1),
            (400, 1, 2)
        ]
    );
    for home in homes {
        home.close();
    }
    end(world, backend);
}

/// Rule 8.1: one group of three disks, each used in a context of its own, under each of the six limits:
/// ten requests a second, to the nanosecond, members in turn, and each goes on where it was sent.
#[test]
fn rule_8_1_a_group_of_disks_in_several_contexts() {
    /// Which limit of a group.
    type Of = fn(&mut ThrottleConfig) -> &mut Limit;
    let (ops, bytes) = (Limit::average(10), Limit::average(10 * 512));
    let limits: [(&str, Of, Limit, bool); 8] = [
        ("iops-total, reads", |c| &mut c.iops_total, ops, false),
        ("iops-total, writes", |c| &mut c.iops_total, ops, true),
        ("iops-read", |c| &mut c.iops_read, ops, false),
        ("iops-write", |c| &mut c.iops_write, ops, true),
        ("bps-total, reads", |c| &mut c.bps_total, bytes, false),
        ("bps-total, writes", |c| &mut c.bps_total, bytes, true),
        ("bps-read", |c| &mut c.bps_read, bytes, false),
        ("bps-write", |c| &mut c.bps_write, bytes, true),
    ];
    for (name, of, limit, writes) in limits {
        let (world, first) = sim_world(&SimDisk::new(4096), &[]);
        let open = || Arc::new(world.open(sim(&SimDisk::new(4096))).unwrap());
        let backends = [first, open(), open()];
        let clock = world.clock.clone().unwrap();
        let homes = [0, 1, 2].map(|n| {
            Home::new(ContextOptions {
                engine: EngineKind::None,
                clock: Clock::Virtual(clock.clone()),
                ..ContextOptions::named(format!("queue {n}"))
            })
            .unwrap()
        });
        let mut config = ThrottleConfig::default();
        *of(&mut config) = limit;
        let group = group(&world, config);
        for backend in &backends {
            backend.set_throttle(Some(&group));
        }
        let ended = Rc::new(RefCell::new(Vec::new()));
        for _ in 0..2 {
            for (n, (home, backend)) in homes.iter().zip(&backends).enumerate() {
                let (backend, ended) = (backend.clone(), ended.clone());
                home.spawn("request", move |co| {
                    match writes {
                        true => backend.pwrite(co, 0, &[0; 512][..], PLAIN).unwrap(),
                        false => backend.pread(co, 0, &mut [0; 512][..]).unwrap(),
                    }
                    assert_eq!(coblock_aio::current().unwrap().name(), format!("queue {n}"));
                    ended.borrow_mut().push(n);
                });
            }
        }
        let began = clock.now_ns();
        let ended_at = |ns| {
            clock.advance_to(ns);
            while homes.iter().fold(false, |any, home| home.poll(false) | any) {}
            ended.borrow().clone()
        };
        let mut expected = vec![0, 1];
        assert_eq!(ended_at(began), expected, "{name}");
        for (nth, member) in [2, 0, 1, 2].into_iter().enumerate() {
            let due = began + (nth as u64 + 1) * 100 * MS;
            assert_eq!(ended_at(due - 1), expected, "{name}: a nanosecond early");
            expected.push(member);
            assert_eq!(ended_at(due), expected, "{name}: {due}");
        }
        let [first, others @ ..] = backends;
        for backend in others {
            world.run(|co| backend.close(co)).unwrap();
        }
        for home in homes {
            home.close();
        }
        drop(group);
        end(world, first);
    }
}

/// Rule 8.1: who is unwound while it waits leaves nothing behind in its context: the next one waits in
/// its own.
#[test]
fn rule_8_1_who_leaves_the_queue_takes_nothing_along() {
    let world = World::simulated();
    let other = Home::new(ContextOptions {
        engine: EngineKind::None,
        clock: Clock::Virtual(world.clock.clone().unwrap()),
        ..ContextOptions::named("other")
    })
    .unwrap();
    let shared = group(&world, iops(10));
    let (one, two) = (shared.join(), shared.join());
    let leaves = Coroutine::new(move |co| {
        for _ in 0..3 {
            one.wait(co, Direction::Read, 512);
        }
    })
    .unwrap();
    other.with(|| leaves.enter());
    let ended = Rc::new(RefCell::new(false));
    world.home.spawn("the next", {
        let ended = ended.clone();
        move |co| {
            two.wait(co, Direction::Read, 512);
            *ended.borrow_mut() = true;
        }
    });
    assert_eq!(shared.waiting(), 2);
    drop(leaves);
    other.close();
    while !*ended.borrow() {
        world.home.poll(true);
    }
    assert_eq!(world.home.context().now_ns(), 100 * MS);
    drop(shared);
    world.end();
}

/// Rules 5.5, 8.1: a drained section lifts limits: it begins at once, and limits hold again
/// afterwards.
#[test]
fn rule_5_5_a_section_lifts_limits() {
    for by_node in [false, true] {
        let disk = SimDisk::new(4096);
        let world = World::simulated();
        let shared = group(&world, iops(1));
        world.graph.add_throttle_group(&shared).unwrap();
        let options = if by_node {
            Options::new()
                .with("driver", "throttle")
                .with("throttle-group", "group")
                .with("file.driver", "sim")
                .with_object("file.disk", disk.clone())
        } else {
            sim(&disk)
        };
        let backend = Arc::new(world.open(options).unwrap());
        if !by_node {
            backend.set_throttle(Some(&shared));
        }
        let times = Times::default();
        for _ in 0..6 {
            request(&world, &backend, &times, "r", 512);
        }
        assert_eq!(shared.waiting(), 5);
        let section = world.home.with(|| backend.drain_blocking());
        assert_eq!(
            (times.borrow().len(), world.home.context().now_ns()),
            (6, 0)
        );
        drop(section);
        // What passed was paid for: six, of which the bucket holds a tenth.
        request(&world, &backend, &times, "r", 512);
        until(&world, &times, 7);
        assert_eq!(times.borrow()[6].0, 5900 * MS);
        end(world, backend);
    }
}

/// Rule 8.1: limits change while requests wait, for all members; without limits they go on, and so
/// they do when the backend is closed.
#[test]
fn rule_8_1_limits_change() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let shared = group(&world, iops(1));
    backend.set_throttle(Some(&shared));
    let times = Times::default();
    for _ in 0..5 {
        request(&world, &backend, &times, "r", 512);
    }
    assert!(
        shared
            .set_config(ThrottleConfig {
                iops_size: 1,
                ..ThrottleConfig::default()
            })
            .is_err()
    );
    assert_eq!((shared.config(), shared.waiting()), (iops(1), 4));
    shared.set_config(iops(100)).unwrap();
    until(&world, &times, 5);
    assert_eq!(times.borrow()[4].0, 0, "a new bucket holds ten");
    shared.set_config(iops(1)).unwrap();
    for _ in 0..4 {
        request(&world, &backend, &times, "r", 512);
    }
    assert_eq!(shared.waiting(), 3);
    backend.set_throttle(None);
    settle(&world);
    assert_eq!((times.borrow().len(), shared.waiting()), (9, 0));
    backend.set_throttle(Some(&shared));
    request(&world, &backend, &times, "r", 512);
    assert_eq!(shared.waiting(), 1);
    // What waits is in flight, so closing waits for it.
    end(world, backend);
    assert_eq!(times.borrow().last(), Some(&(0, "r")));
}

/// Requests that fail at once, and flushes, cost nothing.
#[test]
fn what_does_no_io_is_not_limited() {
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let shared = group(&world, iops(1));
    backend.set_throttle(Some(&shared));
    world.run(|co| {
        for _ in 0..5 {
            let error = backend.pread(co, 4096, &mut [0; 512][..]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds);
            backend.flush(co).unwrap();
        }
    });
    assert_eq!(world.home.context().now_ns(), 0);
    end(world, backend);
}

/// Names of groups: unknown, missing, taken.
#[test]
fn groups_are_found_by_name() {
    let world = World::simulated();
    let shared = group(&world, iops(1));
    world.graph.add_throttle_group(&shared).unwrap();
    let again = world.graph.add_throttle_group(&shared).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::InUse);
    let node = |name: Option<&str>| {
        let options = Options::new()
            .with("driver", "throttle")
            .with("file.driver", "null-co");
        world
            .open(match name {
                Some(name) => options.with("throttle-group", name),
                None => options,
            })
            .map(|backend| world.close(backend).unwrap())
    };
    assert_eq!(node(Some("other")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(node(None).unwrap_err().kind(), ErrorKind::MissingOption);
    node(Some("group")).unwrap();
    assert!(world.graph.remove_throttle_group("group").is_some());
    assert_eq!(node(Some("group")).unwrap_err().kind(), ErrorKind::NotFound);
    world.end();
}

/// A disk grows through the filter as it does without, its space taken at once.
#[test]
fn space_is_taken_through_the_filter() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, [1; 4096]).unwrap();
    let world = World::with_engine(EngineKind::Threads);
    world
        .graph
        .add_throttle_group(&group(&world, iops(1000)))
        .unwrap();
    let options = Options::new()
        .with("driver", "throttle")
        .with("throttle-group", "group")
        .with("file.driver", "file")
        .with("file.filename", path.to_str().unwrap());
    let backend = world.open(options).unwrap();
    world
        .run(|co| backend.grow_preallocated(co, 1 << 20, Preallocation::Full))
        .unwrap();
    assert_eq!(backend.len(), 1 << 20);
    world.close(backend).unwrap();
    let grown = std::fs::read(&path).unwrap();
    assert_eq!(grown.len(), 1 << 20);
    assert!(grown[4096..].iter().all(|byte| *byte == 0));
    assert!(world.graph.remove_throttle_group("group").is_some());
    world.end();
}

/// Rules 5.5, 8.1: a copy that waits for the limits of its target is not in flight on its source: a
/// section of the source once lasted as long as they said.
#[test]
fn a_copy_that_waits_for_its_target_leaves_its_source_alone() {
    let (one, two) = (SimDisk::with_contents(&[7; 4096]), SimDisk::new(4096));
    let (world, from) = sim_world(&one, &[]);
    let to = Arc::new(world.open(sim(&two)).unwrap());
    let slow = ThrottleConfig {
        bps_total: Limit::average(512),
        ..ThrottleConfig::default()
    };
    to.set_throttle(Some(&group(&world, slow)));
    let times = Times::default();
    let copy = |name: &'static str| {
        let (times, context, to) = (times.clone(), world.home.context().clone(), to.clone());
        start(&world, &from, move |co, from| {
            from.copy_range(co, 0, &to, 0, 512)?;
            times.borrow_mut().push((context.now_ns(), name));
            Ok(())
        });
    };
    copy("first");
    copy("second");
    assert_eq!(
        (times.borrow().len(), from.in_flight(), to.in_flight()),
        (1, 0, 0)
    );
    let before = world.home.context().now_ns();
    drop(world.home.with(|| from.drain_blocking()));
    assert_eq!(world.home.context().now_ns(), before, "at once");
    until(&world, &times, 2);
    // The bucket holds 51.2 bytes: (512 - 51.2) / 512 s.
    assert_eq!(*times.borrow(), [(0, "first"), (900 * MS, "second")]);
    world.run(|co| to.close(co)).unwrap();
    drop(to);
    end(world, from);
}

/// Rule 8.1: a copy that its target holds back when it has waited for the limits of its source does not
/// wait for them again, nor for those of the target.
#[test]
fn a_copy_that_is_held_back_pays_once() {
    let (one, two) = (SimDisk::with_contents(&[7; 4096]), SimDisk::new(4096));
    let (world, from) = sim_world(&one, &[]);
    let to = Arc::new(world.open(sim(&two)).unwrap());
    from.set_throttle(Some(&group(&world, iops(10))));
    to.set_throttle(Some(&group(&world, iops(10))));
    let times = Times::default();
    let copy = |name: &'static str| {
        let (times, context, to) = (times.clone(), world.home.context().clone(), to.clone());
        start(&world, &from, move |co, from| {
            from.copy_range(co, 0, &to, 0, 512)?;
            times.borrow_mut().push((context.now_ns(), name));
            Ok(())
        });
    };
    // Two may come at once; the third waits for the limits of the target, then for no others.
    for name in ["c0", "c1", "c2"] {
        copy(name);
    }
    assert_eq!((times.borrow().len(), from.in_flight()), (2, 0));
    // While a read stands in its way at the source the target is drained.
    request(&world, &from, &times, "r3", 512);
    assert_eq!((times.borrow().len(), from.in_flight()), (2, 1));
    world.clock.as_ref().unwrap().advance(100 * MS);
    while world.home.poll(false) {}
    // The read has gone on, and the copy waits for the source.
    assert_eq!((times.borrow().len(), from.in_flight()), (3, 1));
    let section = world.home.with(|| to.drain_blocking());
    world.clock.as_ref().unwrap().advance(100 * MS);
    while world.home.poll(false) {}
    assert_eq!(
        (times.borrow().len(), from.in_flight(), to.queued()),
        (3, 0, 1)
    );
    // Limits are full again if it pays again now.
    request(&world, &from, &times, "r4", 512);
    drop(section);
    while world.home.poll(false) {}
    assert_eq!(times.borrow().last(), Some(&(200 * MS, "c2")));
    until(&world, &times, 5);
    assert_eq!(times.borrow().last(), Some(&(300 * MS, "r4")));
    world.run(|co| to.close(co)).unwrap();
    drop(to);
    end(world, from);
}
