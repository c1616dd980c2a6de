//! Both engines against real files: buffered and direct, short at the end, more requests than the
//! queues hold.

mod support;

use coblock_aio::{AlignedBuf, Gather, Home, IoVec, Medium, Scatter, co};
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use support::{Scratch, each_engine, pattern};

/// What was written is read, in one piece and scattered.
#[test]
fn reads_give_what_was_written() {
    each_engine(|home, engine| {
        for scratch in Scratch::all("plain") {
            let file = scratch.create();
            let bytes = pattern(3, 100_000);
            home.run(|c| co::write(c, file.as_fd(), 5, (&bytes[..]).into()))
                .unwrap();
            home.run(|c| co::sync(c, file.as_fd(), true)).unwrap();
            home.run(|c| co::sync(c, file.as_fd(), false)).unwrap();
            let mut back = vec![0; bytes.len()];
            let count = home.run(|c| co::read(c, file.as_fd(), 5, (&mut back[..]).into()));
            assert_eq!(count.unwrap(), bytes.len(), "{engine} {scratch:?}");
            assert!(back == bytes, "{engine} {scratch:?}");
        }
    });
}

/// Scatter lists of any length, longer than the kernel takes at once.
#[test]
fn scatter_lists_of_any_length() {
    each_engine(|home, engine| {
        let file = tempfile::tempfile().unwrap();
        for count in [1, 2, 63, 64, 65, 300] {
            let parts: Vec<Vec<u8>> = (0..count).map(|n| pattern(7, 1 + n % 7)).collect();
            let mut source = Gather::new();
            parts.iter().for_each(|part| source.push(&part[..]));
            let mut back: Vec<Vec<u8>> = parts.iter().map(|part| vec![0; part.len()]).collect();
            let mut target = Scatter::new();
            back.iter_mut().for_each(|part| target.push(&mut part[..]));
            home.run(|c| {
                co::write(c, file.as_fd(), 77, source.as_iovec()).unwrap();
                let len = source.as_iovec().len();
                assert_eq!(
                    co::read(c, file.as_fd(), 77, target.as_iovec_mut()).unwrap(),
                    len
                );
            });
            drop(target);
            assert!(back == parts, "{engine}: {count} segments");
        }
    });
}

/// A read is short only at the end of the file, and empty behind it.
#[test]
fn short_reads_only_at_the_end() {
    each_engine(|home, engine| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10_000).unwrap();
        let mut buf = vec![1u8; 4096];
        for (offset, want) in [
            (0, 4096),
            (5904, 4096),
            (5905, 4095),
            (9999, 1),
            (10_000, 0),
            (1 << 40, 0),
        ] {
            let got = home.run(|c| co::read(c, file.as_fd(), offset, (&mut buf[..]).into()));
            assert_eq!(got.unwrap(), want, "{engine}: at {offset}");
        }
    });
}

/// Direct I/O: aligned requests, and a file whose end is between two blocks.
#[test]
fn direct_io() {
    each_engine(|home, engine| {
        let scratch = Scratch::on_disk("direct");
        let Some(file) = scratch.create_direct() else {
            println!("skipped: no direct I/O in {scratch:?}");
            return;
        };
        let mut buf = AlignedBuf::try_new(64 << 10, 4096).unwrap();
        buf.copy_from_slice(&pattern(9, 64 << 10));
        home.run(|c| co::write(c, file.as_fd(), 4096, (&buf).into()))
            .unwrap();
        file.set_len(4096 + 10_000).unwrap();
        let mut back = AlignedBuf::try_new(64 << 10, 4096).unwrap();
        let got = home
            .run(|c| co::read(c, file.as_fd(), 4096, (&mut back).into()))
            .unwrap();
        assert_eq!(got, 10_000, "{engine}");
        assert!(back[..10_000] == buf[..10_000], "{engine}");
        let refused = home
            .run(|c| co::read(c, file.as_fd(), 1, (&mut back).into()))
            .unwrap_err();
        assert_eq!(
            refused.raw_os_error(),
            Some(libc::EINVAL),
            "{engine}: unaligned"
        );
    });
}

/// Errors of the system come out as they are.
#[test]
fn errors_are_values() {
    each_engine(|home, engine| {
        let scratch = Scratch::on_disk("read-only");
        let read_only = scratch.create_read_only();
        let refused = home.run(|c| co::write(c, read_only.as_fd(), 0, IoVec::from(b"x")));
        assert_eq!(
            refused.unwrap_err().raw_os_error(),
            Some(libc::EBADF),
            "{engine}"
        );
        for offset in [u64::MAX, 1 << 63] {
            let mut byte = [0];
            let refused = home.run(|c| co::read(c, read_only.as_fd(), offset, (&mut byte).into()));
            assert_eq!(
                refused.unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{engine}"
            );
            let cached = |c: &_| {
                co::read_from(
                    c,
                    read_only.as_fd(),
                    Medium::PageCache,
                    offset,
                    (&mut byte).into(),
                )
            };
            assert_eq!(
                home.run(cached).unwrap_err().raw_os_error(),
                Some(libc::EINVAL)
            );
            let refused = home.run(|c| co::write(c, read_only.as_fd(), offset, IoVec::from(b"x")));
            assert_eq!(
                refused.unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{engine}"
            );
        }
        let full = File::options().write(true).open("/dev/full").unwrap();
        let refused = home.run(|c| co::write(c, full.as_fd(), 0, IoVec::from(b"x")));
        assert_eq!(
            refused.unwrap_err().raw_os_error(),
            Some(libc::ENOSPC),
            "{engine}"
        );
    });
}

/// Zeroing, discarding and allocating: contents and lengths afterwards, where the file system can.
#[test]
fn zero_discard_allocate() {
    each_engine(|home, engine| {
        for scratch in Scratch::all("zero") {
            let file = scratch.create();
            let unsupported = |result: io::Result<()>| match result {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => true,
                other => {
                    other.unwrap_or_else(|e| panic!("{engine} {scratch:?}: {e}"));
                    false
                }
            };
            let check = |zeroed: std::ops::Range<usize>, len: usize| {
                let mut back = vec![0; len];
                home.run(|c| co::read(c, file.as_fd(), 0, (&mut back[..]).into()))
                    .unwrap();
                for (at, byte) in back.iter().enumerate() {
                    let want = if zeroed.contains(&at) || at >= 64 << 10 {
                        0
                    } else {
                        7
                    };
                    assert_eq!(*byte, want, "{engine} {scratch:?}: byte {at}");
                }
                assert_eq!(
                    file.metadata().unwrap().len(),
                    len as u64,
                    "{engine} {scratch:?}"
                );
            };
            let refill = || {
                file.set_len(0).unwrap();
                let sevens = vec![7u8; 64 << 10];
                home.run(|c| co::write(c, file.as_fd(), 0, (&sevens[..]).into()))
                    .unwrap();
            };
            for may_unmap in [false, true] {
                refill();
                if !unsupported(home.run(|c| co::zero(c, file.as_fd(), 5000, 9000, may_unmap))) {
                    check(5000..14_000, 64 << 10);
                }
                refill();
                // Past the end: the file grows.
                if !unsupported(
                    home.run(|c| co::zero(c, file.as_fd(), 60 << 10, 8 << 10, may_unmap)),
                ) {
                    check(60 << 10..64 << 10, 68 << 10);
                }
            }
            refill();
            if !unsupported(home.run(|c| co::discard(c, file.as_fd(), 60 << 10, 8 << 10))) {
                check(60 << 10..64 << 10, 64 << 10);
            }
            refill();
            if !unsupported(home.run(|c| co::allocate(c, file.as_fd(), 0, 1 << 20, true))) {
                check(0..0, 64 << 10);
                home.run(|c| co::allocate(c, file.as_fd(), 0, 128 << 10, false))
                    .unwrap();
                check(0..0, 128 << 10);
            }
        }
    });
}

/// 10 000 requests in flight through queues of 8, 256 and 4096 entries; each gets its own bytes.
#[test]
fn more_requests_than_the_queues_hold() {
    const REQUESTS: usize = 10_000;
    for depth in [8, 256, 4096] {
        let Some(home) = support::ring(depth) else {
            return;
        };
        let file = tempfile::tempfile().unwrap();
        let bytes = pattern(1, REQUESTS * 8);
        home.run(|c| co::write(c, file.as_fd(), 0, (&bytes[..]).into()))
            .unwrap();
        let (file, bytes) = (Rc::new(file), Rc::new(bytes));
        let done = Rc::new(Cell::new(0));
        for n in 0..REQUESTS {
            let (file, bytes, done) = (file.clone(), bytes.clone(), done.clone());
            home.spawn("one of many", move |c| {
                let mut word = [0; 8];
                let got = co::read(c, file.as_fd(), n as u64 * 8, (&mut word).into());
                assert_eq!(got.unwrap(), 8, "request {n}");
                let at = n * 8;
                assert_eq!(word, bytes[at..at + 8], "request {n}");
                done.set(done.get() + 1);
            });
        }
        while done.get() < REQUESTS {
            home.poll(true);
        }
        assert_eq!(home.context().live_coroutines(), 0);
        home.close();
    }
}

/// Requests that kernel threads complete wake every kind of loop, a foreign one too. (With a
/// deferred ring its own descriptor stays silent until the kernel is entered.)
#[test]
fn completions_wake_every_loop() {
    support::each_drive(|home, drive| {
        let file = Rc::new(Scratch::on_disk("woken").create());
        for round in 0..20u64 {
            let (file, done) = (file.clone(), Rc::new(Cell::new(false)));
            let end = done.clone();
            home.spawn("writer", move |c| {
                let word = round.to_be_bytes();
                co::write(c, file.as_fd(), round * 8, IoVec::from(&word)).unwrap();
                co::sync(c, file.as_fd(), true).unwrap();
                let mut back = [0; 8];
                co::read(c, file.as_fd(), round * 8, (&mut back).into()).unwrap();
                assert_eq!(back, word);
                end.set(true);
            });
            while !done.get() {
                drive.poll(true);
            }
        }
        assert_eq!(home.context().live_coroutines(), 0, "{drive:?}");
    });
}

/// Many coroutines on the thread engine: all come back, each with its own bytes.
#[test]
fn many_requests_on_few_threads() {
    let home = Home::new(support::options("threads")).unwrap();
    let file = Rc::new(tempfile::tempfile().unwrap());
    let done = Rc::new(Cell::new(0));
    for n in 0..500u64 {
        let (file, done) = (file.clone(), done.clone());
        home.spawn("writer", move |c| {
            co::write(c, file.as_fd(), n * 8, IoVec::from(&n.to_be_bytes())).unwrap();
            let mut back = [0; 8];
            co::read(c, file.as_fd(), n * 8, (&mut back).into()).unwrap();
            assert_eq!(u64::from_be_bytes(back), n);
            done.set(done.get() + 1);
        });
    }
    while done.get() < 500 {
        home.poll(true);
    }
    home.close();
}

/// A context without engine refuses I/O as an error, and runs everything else.
#[test]
fn no_engine_refuses_requests() {
    let home = Home::new(support::options("none")).unwrap();
    let file = tempfile::tempfile().unwrap();
    let refused = home
        .run(|c| co::write(c, file.as_fd(), 0, IoVec::from(b"x")))
        .unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    assert_eq!(home.context().engine_name(), "none");
    assert_eq!(
        home.run(|c| co::on_pool(c, || 7)),
        7,
        "blocking work is no I/O engine"
    );
    home.close();
}

/// Reads that are alone and in the page cache are served by the loop itself, without the ring;
/// those that are not alone go through it; what is not in the cache too. All give the right bytes.
#[test]
fn cached_reads() {
    each_engine(|home, engine| {
        for scratch in Scratch::all("cached") {
            let file = Rc::new(scratch.create());
            let bytes = Rc::new(pattern(4, 100_000));
            home.run(|c| co::write(c, file.as_fd(), 0, (&bytes[..]).into()))
                .unwrap();
            home.run(|c| co::sync(c, file.as_fd(), false)).unwrap();
            let read_all = |drop_cache: bool| {
                home.run(|c| {
                    for n in 0..50 {
                        if drop_cache {
                            // SAFETY: advice about an open descriptor; touches no memory.
                            let advised = unsafe {
                                let fd = std::os::fd::AsRawFd::as_raw_fd(&*file);
                                libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED)
                            };
                            assert_eq!(advised, 0);
                        }
                        let mut back = vec![0; 3000];
                        let at = n as u64 * 1990;
                        let got = co::read_from(
                            c,
                            file.as_fd(),
                            Medium::PageCache,
                            at,
                            (&mut back[..]).into(),
                        );
                        let want = &bytes[n * 1990..(n * 1990 + 3000).min(bytes.len())];
                        assert_eq!(got.unwrap(), want.len(), "{engine} {scratch:?}: {n}");
                        assert!(back[..want.len()] == *want, "{engine} {scratch:?}: {n}");
                    }
                });
            };
            read_all(true);
            read_all(false);
            // Several at once: none is alone.
            let done = Rc::new(Cell::new(0));
            for n in 0..20 {
                let (file, bytes, done) = (file.clone(), bytes.clone(), done.clone());
                home.spawn("one of several", move |c| {
                    for turn in 0..20 {
                        let at = n * 4000 + turn * 100;
                        let mut back = [0; 100];
                        let target = (&mut back).into();
                        co::read_from(c, file.as_fd(), Medium::PageCache, at as u64, target)
                            .unwrap();
                        assert_eq!(back, bytes[at..at + 100]);
                    }
                    done.set(done.get() + 1);
                });
            }
            while done.get() < 20 {
                home.poll(true);
            }
        }
    });
}

/// The loop serves a lonely cached read without a system call of the ring; timers and descriptors
/// go on meanwhile.
#[test]
fn lonely_cached_reads_do_not_enter_the_ring() {
    let Some(home) = support::ring(64) else {
        return;
    };
    let file = Scratch::on_disk("lonely").create();
    file.set_len(4096).unwrap();
    let fired = support::Count::default();
    let count = fired.clone();
    let timer = home.context().timer("meanwhile", move || {
        count.add();
    });
    home.run(|c| {
        // Into the cache.
        co::read(c, file.as_fd(), 0, (&mut [0; 4096]).into()).unwrap();
        co::reschedule(c);
        timer.arm_in(std::time::Duration::ZERO);
        let before = home.stats();
        for _ in 0..100 {
            co::read_from(
                c,
                file.as_fd(),
                Medium::PageCache,
                0,
                (&mut [1; 4096]).into(),
            )
            .unwrap();
        }
        let after = home.stats();
        assert_eq!(
            after.ring_requests - before.ring_requests,
            100,
            "still counted"
        );
        let enters = after.ring_enters - before.ring_enters;
        assert!(enters <= 5, "{enters} enters for 100 reads from the cache");
        assert_eq!(fired.get(), 1);
    });
    home.close();
}
