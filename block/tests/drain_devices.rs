//! What devices do when sections begin: threads that stop (rule 5.9), limits of time, kicks (rule 5.5).

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{BlockBackend, Device, Drain, Options};
use coblock_coroutine::{Co, ThreadLock};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use support::{PLAIN, World, end, settle, sim_world, start};

fn read(co: &Co, backend: &BlockBackend) -> coblock_block::Result<()> {
    backend.pread(co, 0, &mut [0; 512][..])
}

/// Waits for another thread; one that does not come fails the test.
fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::yield_now();
    }
}

/// A queue with a thread of its own, which waits for one request after the other.
struct Queue {
    /// Position in the guest's queue, kept over sections.
    position: AtomicU32,
    running: ThreadLock<Option<std::thread::JoinHandle<()>>>,
    stop: AtomicBool,
    begun: AtomicBool,
}

impl Queue {
    fn new() -> Arc<Queue> {
        Arc::new(Queue {
            position: AtomicU32::new(0),
            running: ThreadLock::new(None),
            stop: AtomicBool::new(true),
            begun: AtomicBool::new(false),
        })
    }

    fn position(&self) -> u32 {
        self.position.load(Ordering::Relaxed)
    }

    /// The guest's notification starts the thread.
    fn notify(self: &Arc<Queue>, backend: &Arc<BlockBackend>) {
        self.stop.store(false, Ordering::Relaxed);
        let (queue, backend) = (self.clone(), backend.clone());
        let thread = std::thread::spawn(move || {
            let home = Home::new(ContextOptions {
                engine: EngineKind::None,
                ..ContextOptions::named("vring")
            })
            .unwrap();
            while !queue.stop.load(Ordering::Relaxed) {
                home.run(|co| read(co, &backend)).unwrap();
                queue.position.fetch_add(1, Ordering::Relaxed);
            }
            home.close();
        });
        *self.running.lock() = Some(thread);
    }
}

impl Device for Queue {
    fn drained_begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    fn drain_threads(&self) {
        assert!(self.begun.swap(false, Ordering::Relaxed), "told before");
        // One request that is under way, and one that began just now.
        let before = self.position();
        wait_for("the thread is held back while it is to stop", || {
            self.position() >= before + 2
        });
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.running.lock().take();
        if let Some(thread) = thread {
            thread.join().unwrap();
        }
    }
}

/// Rule 5.9: a device with a thread of its own stops it, keeps where it was in its queue, and goes
/// on from there with the guest's next notification. Its requests were held back once before it had
/// stopped: the thread waited for the end of the section, and the section for the thread.
#[test]
fn rule_5_9_threads_of_devices_stop() {
    let world = World::with_engine(EngineKind::None);
    let options = Options::new().with("driver", "null-co");
    let backend = Arc::new(world.open(options).unwrap());
    let device = Queue::new();
    backend.set_device(Some(device.clone()));
    for (queueing, in_coroutine) in [(true, false), (true, true), (false, false)] {
        backend.set_request_queueing(queueing);
        let before = device.position();
        device.notify(&backend);
        wait_for("the thread does requests", || {
            device.position() >= before + 10
        });
        let section = match in_coroutine {
            true => world.run(|co| world.graph.drain(co)),
            false => world.home.with(|| world.graph.drain_blocking()),
        };
        assert!(device.running.lock().is_none());
        assert_eq!(backend.in_flight(), 0);
        if queueing {
            // From then on they are held back.
            let ended = start(&world, &backend, read);
            settle(&world);
            assert!(ended.borrow().is_none());
            assert_eq!(backend.queued(), 1);
        }
        drop(section);
        settle(&world);
    }
    backend.set_device(None);
    end(world, backend);
}

/// The time that devices take to stop their threads counts, too.
#[test]
fn rule_5_9_the_limit_covers_devices() {
    struct Slow(coblock_aio::VirtualClock);
    impl Device for Slow {
        fn drain_threads(&self) {
            self.0.advance(5_000_000_000);
        }
    }
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let clock = world.clock.clone().unwrap();
    backend.set_device(Some(Arc::new(Slow(clock))));
    let hold = disk.hold(Match::writes());
    let ended = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 0, &[1; 512][..], PLAIN)
    });
    let limit = Duration::from_secs(3);
    let now = || world.home.context().now_ns();
    let before = now();
    let outside = world
        .home
        .with(|| world.graph.drain_blocking_within(limit))
        .unwrap_err();
    assert_eq!(
        now() - before,
        5_000_000_000,
        "no more than the device took"
    );
    let inside = world.run(|co| world.graph.drain_within(co, limit));
    assert_eq!(inside.unwrap_err(), outside);
    assert_eq!(now() - before, 10_000_000_000);
    drop(hold);
    settle(&world);
    assert!(matches!(*ended.borrow(), Some(Ok(()))));
    // Nobody is busy: then a section begins, however long that took.
    let section = world.home.with(|| world.graph.drain_blocking_within(limit));
    drop(section.unwrap());
    backend.set_device(None);
    end(world, backend);
}

/// Rule 5.5: a device may say from a callback of a section that it is not busy any more. Who waits
/// for another section of it went on at once, under the lock of the graph, and panicked there.
#[test]
fn rule_5_5_a_device_kicks_from_its_callbacks() {
    struct Shared {
        other: ThreadLock<Option<Arc<BlockBackend>>>,
        busy: AtomicBool,
        from_poll: bool,
    }
    impl Shared {
        fn kick(&self) {
            let other = self.other.lock().clone();
            if let Some(other) = other {
                self.busy.store(false, Ordering::Relaxed);
                other.kick();
            }
        }
    }
    /// One device on two backends: what the second is told ends the work of the first.
    struct First(Arc<Shared>);
    struct Second(Arc<Shared>);
    impl Device for First {
        fn drained_poll(&self) -> bool {
            self.0.busy.load(Ordering::Relaxed)
        }
    }
    impl Device for Second {
        fn drained_begin(&self) {
            if !self.0.from_poll {
                self.0.kick();
            }
        }
        fn drained_poll(&self) -> bool {
            if self.0.from_poll {
                self.0.kick();
            }
            false
        }
    }
    for from_poll in [false, true] {
        let (one, two) = (SimDisk::new(4096), SimDisk::new(4096));
        // The one that kicks is asked first.
        let (world, second) = sim_world(&two, &[]);
        let first = Arc::new(world.open(support::sim(&one)).unwrap());
        let shared = Arc::new(Shared {
            other: ThreadLock::new(Some(first.clone())),
            busy: AtomicBool::new(true),
            from_poll,
        });
        first.set_device(Some(Arc::new(First(shared.clone()))));
        let drained = Rc::new(Cell::new(0));
        let waits = |world: &World| {
            let (first, drained) = (first.clone(), drained.clone());
            world.home.spawn("first", move |co| {
                drop(first.drain(co));
                drained.set(drained.get() + 1);
            });
            settle(world);
        };
        waits(&world);
        assert_eq!(drained.get(), 0, "the device is busy");
        second.set_device(Some(Arc::new(Second(shared.clone()))));
        drop(world.home.with(|| second.drain_blocking()));
        settle(&world);
        assert_eq!(drained.get(), 1);
        // The same in a section of all nodes.
        shared.busy.store(true, Ordering::Relaxed);
        second.set_device(None);
        waits(&world);
        assert_eq!(drained.get(), 1);
        second.set_device(Some(Arc::new(Second(shared.clone()))));
        drop(world.home.with(|| world.graph.drain_blocking()));
        settle(&world);
        assert_eq!(drained.get(), 2);
        *shared.other.lock() = None;
        for backend in [&first, &second] {
            backend.set_device(None);
        }
        world.run(|co| first.close(co)).unwrap();
        drop((first, shared));
        end(world, second);
    }
}
