//! What lies behind a descriptor changes how a request goes, never what it does.

mod support;

use coblock_aio::{ContextOptions, Home, Job, Medium, WorkPool, co};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

/// A file on tmpfs, or nothing, said aloud.
fn in_memory(test: &str) -> Option<File> {
    let file = tempfile::tempfile_in("/dev/shm").ok();
    let file = file.filter(|file| matches!(Medium::of(file.as_fd(), false), Ok(Medium::Memory)));
    if file.is_none() {
        writeln!(
            std::io::stderr(),
            "SKIPPED: {test}: /dev/shm is no tmpfs here"
        )
        .expect("standard error");
    }
    file
}

/// Every medium, short and long requests, many at once: what was written is read back.
#[test]
fn same_content_whatever_the_medium() {
    let file = Rc::new(tempfile::tempfile().unwrap());
    support::each_engine(|home, engine| {
        for medium in [
            Medium::Device,
            Medium::PageCache,
            Medium::PageCacheNowait,
            Medium::Memory,
        ] {
            let done = Rc::new(Cell::new(0));
            for n in 0..40u8 {
                let (file, done) = (file.clone(), done.clone());
                home.spawn("request", move |c| {
                    let len = if n % 8 == 0 { 200_000 } else { 4096 };
                    let at = u64::from(n) << 20;
                    let data = vec![n + 1; len];
                    co::write_to(c, file.as_fd(), medium, at, data.as_slice().into()).unwrap();
                    let mut back = vec![0; len];
                    let target = back.as_mut_slice().into();
                    let got = co::read_from(c, file.as_fd(), medium, at, target).unwrap();
                    assert_eq!(got, len);
                    done.set(done.get() + usize::from(back == data));
                });
            }
            while home.context().live_coroutines() > 0 {
                home.poll(true);
            }
            assert_eq!(done.get(), 40, "{medium:?} with {engine}");
        }
    });
}

/// Short requests to memory are done at once; long ones go to the ring.
#[test]
fn memory_needs_no_ring() {
    let Some(home) = support::ring(8) else { return };
    let Some(file) = in_memory("memory_needs_no_ring") else {
        return;
    };
    let before = home.stats().ring_requests;
    home.run(|c| {
        let data = vec![7; 1 << 20];
        for at in 0..40 {
            let at = at << 12;
            co::write_to(c, file.as_fd(), Medium::Memory, at, (&data[..4096]).into()).unwrap();
        }
    });
    assert_eq!(home.stats().ring_requests, before);
    home.run(|c| {
        let mut data = vec![0; 1 << 20];
        let target = data.as_mut_slice().into();
        let got = co::read_from(c, file.as_fd(), Medium::Memory, 0, target).unwrap();
        assert_eq!(got, 40 << 12, "the end of the file");
    });
    assert!(home.stats().ring_requests > before);
    home.close();
}

/// A coroutine whose every request is done at once does not keep others from running.
#[test]
fn memory_lets_others_have_a_turn() {
    let Some(file) = in_memory("memory_lets_others_have_a_turn") else {
        return;
    };
    let file = Rc::new(file);
    support::each_engine(|home, engine| {
        let stop = Rc::new(Cell::new(false));
        let turns = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (file, stop, turns) = (file.clone(), stop.clone(), turns.clone());
            home.spawn("busy", move |c| {
                while !stop.get() {
                    co::write_to(c, file.as_fd(), Medium::Memory, 0, (&[1; 512]).into()).unwrap();
                    turns.set(turns.get() + 1);
                }
            });
        }
        home.spawn("last", move |c| {
            co::reschedule(c);
            stop.set(true);
        });
        while home.context().live_coroutines() > 0 {
            home.poll(true);
        }
        assert!(turns.get() >= 3, "with {engine}");
    });
}

/// Device nodes lie on a tmpfs and are none.
#[test]
fn kinds_are_told_apart() {
    let null = File::open("/dev/null").unwrap();
    assert_ne!(Medium::of(null.as_fd(), false).unwrap(), Medium::Memory);
    let manifest = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
    let cached = Medium::of(manifest.as_fd(), false).unwrap();
    let direct = Medium::of(manifest.as_fd(), true).unwrap();
    if cached == Medium::Memory {
        assert_eq!(direct, Medium::Memory, "O_DIRECT means nothing there");
    } else {
        assert!(matches!(
            cached,
            Medium::PageCache | Medium::PageCacheNowait
        ));
        assert_eq!(direct, Medium::Device);
    }
}

/// Many writes through the page cache go to one thread; those that are nearly alone to the ring.
#[test]
fn many_cached_writes_are_one_thread() {
    let Some(home) = support::ring(64) else {
        return;
    };
    let file = Rc::new(tempfile::tempfile().unwrap());
    let before = home.stats().ring_requests;
    for n in 0..32u64 {
        let file = file.clone();
        home.spawn("writer", move |c| {
            for _ in 0..10 {
                let source = [1; 512];
                let source = (&source).into();
                co::write_to(c, file.as_fd(), Medium::PageCache, n * 512, source).unwrap();
            }
        });
    }
    while home.context().live_coroutines() > 0 {
        home.poll(true);
    }
    let by_ring = home.stats().ring_requests - before;
    assert!((3..160).contains(&by_ring), "{by_ring} of 320 by the ring");
    home.run(|c| {
        for _ in 0..10 {
            co::write_to(c, file.as_fd(), Medium::PageCache, 0, (&[2; 512]).into()).unwrap();
        }
    });
    assert_eq!(home.stats().ring_requests - before, by_ring + 10);
    assert_eq!(file.metadata().unwrap().len(), 32 * 512);
    home.close();
}

/// Each of them hears of its own error.
#[test]
fn errors_of_cached_writes() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let read_only = Rc::new(File::open(file.path()).unwrap());
    support::each_engine(|home, engine| {
        let errors = Rc::new(RefCell::new(Vec::new()));
        for n in 0..20 {
            let (file, read_only, errors) =
                (file.reopen().unwrap(), read_only.clone(), errors.clone());
            home.spawn("writer", move |c| {
                let fd = if n % 2 == 0 {
                    file.as_fd()
                } else {
                    read_only.as_fd()
                };
                let wrote = co::write_to(c, fd, Medium::PageCache, n * 512, (&[1; 512]).into());
                let errno = wrote.err().and_then(|error| error.raw_os_error());
                errors.borrow_mut().push((n % 2, errno));
            });
        }
        while home.context().live_coroutines() > 0 {
            home.poll(true);
        }
        let errors = errors.borrow();
        assert_eq!(errors.len(), 20);
        for (odd, errno) in errors.iter() {
            let want = (*odd == 1).then_some(libc::EBADF);
            assert_eq!(*errno, want, "with {engine}");
        }
    });
}

/// A pool that drops its jobs, as one does that ends.
struct Dropping;

impl WorkPool for Dropping {
    fn submit(&self, work: Job) {
        std::thread::spawn(move || drop(work)).join().unwrap();
    }
}

/// Whoever waits for a job that was dropped hears of that.
#[test]
fn a_dropped_job_cancels_its_writes() {
    let options = ContextOptions {
        pool: Some(Arc::new(Dropping)),
        ..support::options("threads")
    };
    let home = Home::new(options).unwrap();
    let file = tempfile::tempfile().unwrap();
    for _ in 0..3 {
        let wrote =
            home.run(|c| co::write_to(c, file.as_fd(), Medium::PageCache, 0, (&[1; 512]).into()));
        assert_eq!(wrote.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    }
    home.close();
}
