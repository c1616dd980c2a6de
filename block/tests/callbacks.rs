//! The face with callbacks (rule 2.4): where and when they run, what they get, what they may do.

mod support;

use coblock_aio::{AlignedBuf, ContextOptions, EngineKind, Home, IoThread};
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::{AioRequest, BlockBackend, ErrorKind, Mixed, Options, Result};
use coblock_coroutine::in_coroutine;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use support::{PLAIN, World, end, engines, pattern, settle, sim_world, start};

/// What a callback was given, once it ran.
type Got<B> = Arc<Mutex<Option<(Result<()>, B)>>>;

fn got<B>() -> (Got<B>, impl FnOnce(Result<()>, B)) {
    let got = Got::default();
    let told = got.clone();
    let done = move |result, buf| {
        assert!(!in_coroutine(), "a callback in a coroutine");
        *told.lock().unwrap() = Some((result, buf));
    };
    (got, done)
}

fn ran<B>(got: &Got<B>) -> bool {
    got.lock().unwrap().is_some()
}

/// Submits as a handler of the loop would.
fn submit(world: &World, f: impl FnOnce() -> Result<AioRequest>) -> AioRequest {
    world.home.with(f).unwrap()
}

/// Rule 2.4: a request that is over before the submitting call returned calls back later all the
/// same, from a bottom half of the submitter's context.
#[test]
fn a_callback_never_runs_in_the_submitting_call() {
    let world = World::simulated();
    let options = Options::new()
        .with("driver", "null-co")
        .with("read-zeroes", "on");
    let backend = Arc::new(world.open(options).unwrap());
    let context = world.home.context().clone();
    let (got, done) = got();
    let request = submit(&world, || {
        backend.aio_pread(0, vec![7_u8; 100], move |result, buf| {
            assert!(context.is_current());
            done(result, buf);
        })
    });
    assert!(!ran(&got) && !request.is_over());
    assert!(world.home.poll(false), "a callback is progress");
    assert!(request.is_over());
    let (result, buf) = got.lock().unwrap().take().unwrap();
    result.unwrap();
    assert_eq!(buf, [0; 100]);

    // Also for a submitter in a coroutine: not before it suspends or ends.
    let (got, done) = self::got();
    world.run(|_| {
        let request = backend.aio_pread(0, vec![7_u8; 100], done).unwrap();
        assert!(!ran(&got) && !request.is_over());
    });
    settle(&world);
    assert!(ran(&got));
    drop(request);
    end(world, backend);
}

/// Every kind of request does what its plain form does; the buffer comes back.
#[test]
fn all_kinds_of_requests() {
    let disk = SimDisk::with_contents(&[9; 8192]);
    let (world, backend) = sim_world(&disk, &[("discard", "unmap")]);
    let data: Arc<[u8]> = pattern(1, 1000).into();
    let (wrote, done) = got();
    submit(&world, || {
        backend.aio_pwrite(100, data.clone(), PLAIN, done)
    });
    settle(&world);
    let (result, buf) = wrote.lock().unwrap().take().unwrap();
    result.unwrap();
    assert_eq!(buf, data);

    let (read, done) = got();
    let buf = AlignedBuf::try_new(1000, 512).unwrap();
    submit(&world, || backend.aio_pread(100, buf, done));
    settle(&world);
    let (result, buf) = read.lock().unwrap().take().unwrap();
    result.unwrap();
    assert_eq!(buf[..], data[..]);

    let count = Arc::new(AtomicUsize::new(0));
    let done = || {
        let count = count.clone();
        move |result: Result<()>| {
            result.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    submit(&world, || backend.aio_pwrite_zeroes(0, 4096, PLAIN, done()));
    submit(&world, || backend.aio_pdiscard(4096, 4096, done()));
    settle(&world);
    submit(&world, || backend.aio_flush(done()));
    settle(&world);
    assert_eq!(count.load(Ordering::Relaxed), 3);
    assert_eq!(disk.contents(), [0; 8192]);
    let counts = disk.counts();
    assert_eq!((counts.zeroes, counts.discards, counts.flushes), (1, 1, 1));
    end(world, backend);
}

/// Rule 2.1 in this face: a completion after the suspend, out of order, and with an error; the
/// buffer comes back with each.
#[test]
fn completions_come_when_they_come() {
    let disk = SimDisk::with_contents(&[9; 8192]);
    let (world, backend) = sim_world(&disk, &[]);
    let hold = disk.hold(Match::reads());
    let (first, first_done) = got();
    let (second, second_done) = got();
    submit(&world, || backend.aio_pread(0, vec![0; 512], first_done));
    submit(&world, || backend.aio_pread(512, vec![0; 512], second_done));
    settle(&world);
    assert!(!ran(&first) && !ran(&second));
    assert!(world.home.with(|| hold.release(1)));
    assert!(!ran(&second), "the end of a request is no callback yet");
    settle(&world);
    assert!(!ran(&first) && ran(&second));
    drop(hold);
    settle(&world);
    assert!(ran(&first));

    disk.fail(Fault::new(Match::reads(), libc::EIO));
    for (name, offset, errno) in [
        ("from the disk", 0, libc::EIO),
        ("before it went anywhere", 8192, libc::EIO),
    ] {
        let (failed, done) = got();
        submit(&world, || backend.aio_pread(offset, vec![3; 512], done));
        assert!(!ran(&failed), "{name}");
        settle(&world);
        let (result, buf) = failed.lock().unwrap().take().unwrap();
        assert_eq!(
            (result.unwrap_err().errno(), buf.len()),
            (errno, 512),
            "{name}"
        );
    }
    end(world, backend);
}

/// Rule 2.4: a callback comes in the context of the submitter, whoever else polls.
#[test]
fn a_callback_waits_for_the_submitters_context() {
    let world = World::simulated();
    let options = Options::new().with("driver", "null-co");
    let backend = Arc::new(world.open(options).unwrap());
    let other = Home::new(ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named("other")
    })
    .unwrap();
    let (got, done) = got();
    other.with(|| {
        let context = other.context().clone();
        let submitted = backend.aio_pread(0, vec![0_u8; 512], move |result, buf| {
            assert!(context.is_current());
            done(result, buf);
        });
        submitted.unwrap();
    });
    settle(&world);
    assert!(!ran(&got), "the main context has nothing to do with it");
    while other.poll(false) {}
    assert!(ran(&got));
    other.close();
    end(world, backend);
}

/// Rule 2.1: completions from other threads, with both engines.
#[test]
fn completions_come_from_other_threads() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [0; 1 << 16]).unwrap();
        let world = World::with_engine(engine);
        let options = Options::file(path.to_str().unwrap());
        let backend = Arc::new(world.open(options).unwrap());
        let data = pattern(2, 1 << 16);
        let writes: Vec<_> = (0_u64..16)
            .map(|nth| {
                let at = usize::try_from(nth * 4096).unwrap();
                let (got, done) = got();
                let part = data[at..at + 4096].to_vec();
                submit(&world, || backend.aio_pwrite(nth * 4096, part, PLAIN, done));
                got
            })
            .collect();
        while !writes.iter().all(ran) {
            world.home.poll(true);
        }
        for wrote in writes {
            wrote.lock().unwrap().take().unwrap().0.unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), data, "{engine:?}");
        end(world, backend);
    }
}

/// Rule 5.7: in flight until the callback returned, and close waits so long.
#[test]
fn in_flight_until_the_callback_returned() {
    let disk = SimDisk::new(8192);
    let (world, backend) = sim_world(&disk, &[]);
    let hold = disk.hold(Match::reads());
    let seen = Arc::new(AtomicUsize::new(0));
    let (inside, count) = (Arc::downgrade(&backend), seen.clone());
    submit(&world, || {
        backend.aio_pread(0, vec![0; 512], move |result, _| {
            result.unwrap();
            count.store(inside.upgrade().unwrap().in_flight(), Ordering::Relaxed);
        })
    });
    assert_eq!(backend.in_flight(), 1);
    let closed = start(&world, &backend, |co, backend| backend.close(co));
    settle(&world);
    assert!(world.home.with(|| hold.release(0)));
    // The request is over, its callback was not called.
    assert_eq!((backend.in_flight(), seen.load(Ordering::Relaxed)), (1, 0));
    assert!(
        closed.borrow().is_none(),
        "close does not wait for the callback"
    );
    settle(&world);
    assert_eq!((backend.in_flight(), seen.load(Ordering::Relaxed)), (0, 1));
    assert!(matches!(*closed.borrow(), Some(Ok(()))));
    drop((hold, backend));
    world.end();
}

/// test-block-backend, drain_aio_error: without a medium a request ends with ENOMEDIUM, not in the
/// submitting call, and whoever waits for the backend waits for the callback.
#[test]
fn without_a_medium_a_request_fails_later() {
    let disk = SimDisk::new(8192);
    let (world, backend) = sim_world(&disk, &[]);
    world.run(|co| backend.close(co)).unwrap();
    let (failed, done) = got();
    submit(&world, || backend.aio_pwrite(0, vec![1; 512], PLAIN, done));
    assert!(!ran(&failed));
    assert_eq!(backend.in_flight(), 1);
    world.run(|co| backend.close(co)).unwrap();
    let (result, _) = failed.lock().unwrap().take().expect("close waited for it");
    let error = result.unwrap_err();
    assert_eq!(
        (error.kind(), error.errno()),
        (ErrorKind::Closed, libc::ENOMEDIUM)
    );
    drop(backend);
    world.end();
}

/// A synchronous request in a callback works, and so does another with a callback.
#[test]
fn a_callback_may_do_requests() {
    let disk = SimDisk::with_contents(&[9; 8192]);
    let (world, backend) = sim_world(&disk, &[]);
    let (last, done) = got();
    let inner = backend.clone();
    submit(&world, || {
        backend.aio_pread(0, vec![0; 512], move |result, buf| {
            result.unwrap();
            let mixed = Mixed::nested(&inner);
            mixed.pwrite(4096, &[5; 512], PLAIN).unwrap();
            let mut back = [0; 512];
            mixed.pread(4096, &mut back).unwrap();
            assert_eq!((back, &buf[..]), ([5; 512], &[9; 512][..]));
            inner.aio_pread(4096, buf, done).unwrap();
        })
    });
    settle(&world);
    let (result, buf) = last.lock().unwrap().take().unwrap();
    result.unwrap();
    assert_eq!(buf, [5; 512]);
    end(world, backend);
}

/// Cancel runs a request to its end and returns when the callback ran: in a coroutine, and in a
/// callback of the context.
#[test]
fn cancel_returns_when_the_callback_ran() {
    let disk = SimDisk::new(8192);
    let (world, backend) = sim_world(&disk, &[]);
    disk.delay(1, std::time::Duration::from_millis(10));
    let (read, done) = got();
    let request = submit(&world, || backend.aio_pread(0, vec![0; 512], done));
    assert!(!request.is_over());
    world.run(|co| request.cancel(co));
    assert!(request.is_over() && ran(&read));
    // Over already: nothing to wait for.
    world.run(|co| request.cancel(co));

    let (read, done) = got();
    let request = submit(&world, || backend.aio_pread(0, vec![0; 512], done));
    let (told, result) = mpsc::channel();
    world.home.context().oneshot(move || {
        request.cancel_nested();
        told.send(request.is_over()).unwrap();
    });
    while !ran(&read) || backend.in_flight() > 0 {
        world.home.poll(true);
    }
    assert!(result.recv().unwrap());
    end(world, backend);
}

/// A request cannot be cancelled in its own callback, nor where its context does not turn, and not
/// submitted where nobody could call back.
#[test]
fn what_could_not_end_is_refused() {
    let disk = SimDisk::new(8192);
    let (world, backend) = sim_world(&disk, &[]);
    let own: Arc<Mutex<Option<AioRequest>>> = Arc::default();
    let (handle, (told, result)) = (own.clone(), mpsc::channel());
    let request = submit(&world, || {
        backend.aio_pread(0, vec![0; 512], move |_, _| {
            let request = handle.lock().unwrap().clone().unwrap();
            let refused = catch_unwind(AssertUnwindSafe(|| request.cancel_nested()));
            told.send(refused.is_err()).unwrap();
        })
    });
    *own.lock().unwrap() = Some(request.clone());
    settle(&world);
    assert!(result.recv().unwrap(), "cancelled in its own callback");
    let elsewhere = catch_unwind(AssertUnwindSafe(|| request.cancel_nested()));
    assert!(
        elsewhere.is_err(),
        "cancelled where its context does not turn"
    );
    let nowhere = catch_unwind(AssertUnwindSafe(|| backend.aio_flush(drop)));
    assert!(nowhere.is_err(), "submitted outside of every context");
    drop((own, request));
    end(world, backend);
}

/// A callback that panics is over: nobody waits for it for ever.
#[test]
fn a_callback_that_panics_is_over() {
    let disk = SimDisk::new(8192);
    let (world, backend) = sim_world(&disk, &[]);
    let request = submit(&world, || backend.aio_flush(|_| panic!("on purpose")));
    let panicked = catch_unwind(AssertUnwindSafe(|| settle(&world)));
    assert!(panicked.is_err());
    settle(&world);
    assert!(request.is_over());
    assert_eq!(backend.in_flight(), 0);
    end(world, backend);
}

/// Rule 2.4: each submitter is called back in its own context.
#[test]
fn callbacks_run_where_they_were_submitted() {
    let world = World::with_engine(EngineKind::Threads);
    let options = Options::new().with("driver", "null-co");
    let backend: Arc<BlockBackend> = Arc::new(world.open(options).unwrap());
    let threads: Vec<IoThread> = (0..2)
        .map(|nth| IoThread::new(ContextOptions::named(format!("thread {nth}"))).unwrap())
        .collect();
    let (told, names) = mpsc::channel();
    for thread in &threads {
        let (backend, told, context) = (backend.clone(), told.clone(), thread.context().clone());
        thread.context().oneshot(move || {
            let done = move |result: Result<()>, _| {
                result.unwrap();
                told.send((context.name().to_owned(), context.is_current()))
                    .unwrap();
            };
            backend.aio_pread(0, vec![0; 512], done).unwrap();
        });
    }
    let mut seen = [names.recv().unwrap(), names.recv().unwrap()];
    seen.sort();
    assert_eq!(
        seen,
        [("thread 0".to_owned(), true), ("thread 1".to_owned(), true)]
    );
    world.run(|co| backend.close(co)).unwrap();
    for thread in threads {
        thread.stop();
    }
    drop(backend);
    world.end();
}
