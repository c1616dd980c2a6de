//! Descriptor handlers (rule 3.5), driven by the loop's own poll and by a foreign loop, with each
//! engine.

mod support;

use coblock_aio::{ContextOptions, EventNotifier, FdHandler, Home};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Count, Log, each_drive, each_engine, quiet};

struct Watched {
    event: Arc<EventNotifier>,
    calls: Count,
}

impl Watched {
    /// A notifier whose handler lowers it and counts, up to `again` times raising it again.
    fn new(home: &Home, again: usize) -> Self {
        let watched = Watched {
            event: Arc::new(EventNotifier::new().unwrap()),
            calls: Count::default(),
        };
        let (event, calls) = (watched.event.clone(), watched.calls.clone());
        let handler = FdHandler::new().on_read(move || {
            assert!(event.test_and_clear(), "called for nothing");
            if calls.add() < again {
                event.set();
            }
        });
        home.context()
            .set_fd_handler(watched.fd(), handler)
            .unwrap();
        watched
    }

    fn fd(&self) -> i32 {
        self.event.as_fd().as_raw_fd()
    }

    fn remove(self, home: &Home) {
        home.context().remove_fd_handler(self.fd());
    }
}

/// Never signalled, never called; adding and removing is no progress. (/aio/event/add-remove)
#[test]
fn add_remove() {
    each_drive(|home, drive| {
        let watched = Watched::new(home, 0);
        quiet(drive);
        assert_eq!(watched.calls.get(), 0);
        watched.remove(home);
        quiet(drive);
    });
}

/// One signal, one call. (/aio/event/wait)
#[test]
fn one_signal_one_call() {
    each_drive(|home, drive| {
        let watched = Watched::new(home, 0);
        watched.event.set();
        assert!(drive.poll(true));
        assert_eq!(watched.calls.get(), 1);
        quiet(drive);
        let (event, calls) = (watched.event.clone(), watched.calls.clone());
        watched.remove(home);
        event.set();
        quiet(drive);
        assert_eq!(calls.get(), 1, "removed");
    });
}

/// A second notifier is not called for the first. (/aio/event/wait/no-flush-cb)
#[test]
fn two_notifiers() {
    each_drive(|home, drive| {
        let (first, second) = (Watched::new(home, 0), Watched::new(home, 0));
        for n in 1..=3 {
            first.event.set();
            assert!(drive.poll(true));
            assert_eq!((first.calls.get(), second.calls.get()), (n, n - 1));
            second.event.set();
            assert!(drive.poll(true));
            assert_eq!((first.calls.get(), second.calls.get()), (n, n));
        }
        quiet(drive);
        first.remove(home);
        second.remove(home);
    });
}

/// A handler that signals itself is called once a pass. (/aio/event/flush)
#[test]
fn signals_itself() {
    each_drive(|home, drive| {
        let watched = Watched::new(home, 10);
        watched.event.set();
        for n in 1..=10 {
            assert!(drive.poll(true), "{n}");
            assert_eq!(watched.calls.get(), n, "once a pass");
        }
        quiet(drive);
        watched.remove(home);
    });
}

/// Rule 3.5: read before write, in one pass.
#[test]
fn read_before_write() {
    each_drive(|home, drive| {
        let log = Log::default();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &theirs, b"x").unwrap();
        let fd = ours.as_raw_fd();
        let (read, write, ours) = (log.clone(), log.clone(), Arc::new(ours));
        let reader = ours.clone();
        let handler = FdHandler::new()
            .on_write(move || write.say("write"))
            .on_read(move || {
                std::io::Read::read_exact(&mut &*reader, &mut [0]).unwrap();
                read.say("read");
            });
        home.context().set_fd_handler(fd, handler).unwrap();
        assert!(drive.poll(true));
        assert_eq!(log.take(), ["read", "write"]);
        assert!(drive.poll(true), "a state that lasts is reported again");
        assert_eq!(log.take(), ["write"]);
        // Hang-up is for both.
        drop(theirs);
        let write = log.clone();
        let (say, context) = (log.clone(), home.context().clone());
        let handler = FdHandler::new()
            .on_write(move || write.say("write"))
            .on_read(move || {
                say.say("read");
                context.remove_fd_handler(fd);
            });
        home.context().set_fd_handler(fd, handler).unwrap();
        assert!(drive.poll(true));
        assert_eq!(
            log.take(),
            ["read"],
            "removed by its read callback: not called any more"
        );
        quiet(drive);
    });
}

/// Rule 3.5: a handler that removes another one in the same pass: that one is not called any more,
/// and what it owns is freed. Setting again replaces.
#[test]
fn removed_by_another() {
    each_drive(|home, drive| {
        let events: Vec<_> = (0..2)
            .map(|_| Arc::new(EventNotifier::new().unwrap()))
            .collect();
        let fds: Vec<_> = events
            .iter()
            .map(|event| event.as_fd().as_raw_fd())
            .collect();
        let (calls, owned) = (Count::default(), Arc::new(()));
        for own in 0..2 {
            let (event, other) = (events[own].clone(), fds[1 - own]);
            let (calls, owned, context) = (calls.clone(), owned.clone(), home.context().clone());
            let handler = FdHandler::new().on_read(move || {
                let _owned = &owned;
                calls.add();
                event.test_and_clear();
                context.remove_fd_handler(other);
            });
            home.context().set_fd_handler(fds[own], handler).unwrap();
        }
        events.iter().for_each(|event| event.set());
        assert!(drive.poll(true));
        assert_eq!(calls.get(), 1, "whichever came first removed the other");
        quiet(drive);
        assert_eq!(Arc::strong_count(&owned), 2, "the removed one is freed");
        let replaced = Count::default();
        for (fd, event) in fds.iter().zip(&events) {
            let (event, replaced) = (event.clone(), replaced.clone());
            let handler = FdHandler::new().on_read(move || {
                event.test_and_clear();
                replaced.add();
            });
            home.context().set_fd_handler(*fd, handler).unwrap();
        }
        assert_eq!(Arc::strong_count(&owned), 1, "replaced: freed");
        events.iter().for_each(|event| event.set());
        while replaced.get() < 2 {
            assert!(drive.poll(true));
        }
        assert_eq!((calls.get(), replaced.get()), (1, 2));
        fds.iter()
            .for_each(|fd| home.context().remove_fd_handler(*fd));
    });
}

/// Rule 3.5: one event is dispatched once, also when a handler before it in the pass polls
/// (nested): the nested poll dispatches it, the outer pass does not again.
#[test]
fn one_event_is_dispatched_once() {
    each_drive(|home, drive| {
        let events: Vec<_> = (0..3)
            .map(|_| Arc::new(EventNotifier::new().unwrap()))
            .collect();
        let (calls, nested) = (Count::default(), Count::default());
        for event in &events {
            let (mine, calls, nested) = (event.clone(), calls.clone(), nested.clone());
            let handler = FdHandler::new().on_read(move || {
                assert!(mine.test_and_clear(), "an event was dispatched twice");
                if calls.add() == 1 {
                    // The others are ready too: reported to the outer pass, and to this one.
                    while coblock_aio::poll(false) {}
                    assert_eq!(calls.get(), 3, "the nested poll did all of it");
                    nested.add();
                }
            });
            home.context()
                .set_fd_handler(event.as_fd().as_raw_fd(), handler)
                .unwrap();
        }
        events.iter().for_each(|event| event.set());
        assert!(drive.poll(true));
        assert_eq!((calls.get(), nested.get()), (3, 1));
        quiet(drive);
        events
            .iter()
            .for_each(|e| home.context().remove_fd_handler(e.as_fd().as_raw_fd()));
    });
}

/// A descriptor closed before its handler was removed, and its number used again: the new one
/// works.
#[test]
fn descriptor_numbers_are_used_again() {
    each_drive(|home, drive| {
        let event = Arc::new(EventNotifier::new().unwrap());
        // Far above what the other tests of this program use, so that the number is free again.
        let dup = |at: i32| {
            // SAFETY: duplicates an open descriptor; touches no memory.
            let fd = unsafe { libc::fcntl(event.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, at) };
            assert!(fd >= at);
            // SAFETY: just made, no other owner.
            unsafe { OwnedFd::from_raw_fd(fd) }
        };
        let first = dup(900);
        let fd = first.as_raw_fd();
        home.context()
            .set_fd_handler(fd, FdHandler::new().on_read(|| panic!("closed")))
            .unwrap();
        drop(first);
        let second = dup(fd);
        assert_eq!(second.as_raw_fd(), fd);
        let (calls, mine) = (Count::default(), event.clone());
        let count = calls.clone();
        let handler = FdHandler::new().on_read(move || {
            mine.test_and_clear();
            count.add();
        });
        home.context().set_fd_handler(fd, handler).unwrap();
        event.set();
        assert!(drive.poll(true));
        assert_eq!(calls.get(), 1);
        home.context().remove_fd_handler(fd);
    });
}

/// A descriptor that cannot be waited for is an error, and changes nothing.
#[test]
fn what_cannot_be_watched_is_an_error() {
    each_engine(|home, _| {
        let file = tempfile::tempfile().unwrap();
        let refused = home
            .context()
            .set_fd_handler(file.as_raw_fd(), FdHandler::new().on_read(|| ()));
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
        home.context().remove_fd_handler(file.as_raw_fd());
    });
}

/// Set and signalled from another thread while the loop sleeps: it wakes.
#[test]
fn set_from_another_thread() {
    each_engine(|home, _| {
        let calls = Count::default();
        let event = Arc::new(EventNotifier::new().unwrap());
        std::thread::scope(|scope| {
            let (context, count, event) = (home.context().clone(), calls.clone(), event.clone());
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                let mine = event.clone();
                let handler = FdHandler::new().on_read(move || {
                    mine.test_and_clear();
                    count.add();
                });
                context
                    .set_fd_handler(event.as_fd().as_raw_fd(), handler)
                    .unwrap();
                event.set();
            });
            while calls.get() == 0 {
                home.poll(true);
            }
        });
        home.context().remove_fd_handler(event.as_fd().as_raw_fd());
    });
}

/// With busy polling, a poll-ready callback that polls itself is not called again from inside, the
/// nested poll sees other events, and the handler works afterwards. (/nested-aio-poll)
#[test]
fn nested_poll_in_a_poll_ready_callback() {
    each_engine(|home, engine| {
        home.set_busy_poll(Duration::from_millis(100));
        let polled = Arc::new(EventNotifier::new().unwrap());
        let (ready, done) = (Count::default(), Count::default());
        let depth = Arc::new(Mutex::new(()));
        let (event, count, in_callback) = (polled.clone(), ready.clone(), depth.clone());
        let (half, halves) = (Count::default(), Arc::new(Mutex::new(Vec::new())));
        let (hit, keep) = (half.clone(), halves.clone());
        // Not lowered before the nested poll: it stays ready all the while.
        let look = polled.clone();
        let handler = FdHandler::new().busy_poll(
            move || coblock_aio::sys::event::poll_readable(look.as_fd(), Some(0)).unwrap(),
            move || {
                let _once = in_callback.try_lock().expect("called again from inside");
                count.add();
                let context = coblock_aio::current().unwrap();
                let hit = hit.clone();
                let other = context.bottom_half("other", move || {
                    hit.add();
                });
                other.schedule();
                keep.lock().unwrap().push(other);
                while coblock_aio::poll(false) {}
                event.test_and_clear();
            },
        );
        home.context()
            .set_fd_handler(polled.as_fd().as_raw_fd(), handler)
            .unwrap();
        let timer = home.context().timer("end of a wait", move || {
            done.add();
        });
        for n in 1..=3 {
            polled.set();
            timer.arm_in(Duration::from_millis(200));
            assert!(home.poll(true), "{engine}");
            assert_eq!((ready.get(), half.get()), (n, n), "{engine}");
        }
        halves.lock().unwrap().clear();
        home.context().remove_fd_handler(polled.as_fd().as_raw_fd());
    });
}

/// A loop where one handler cannot be asked does not busy-poll; it waits and works.
#[test]
fn busy_polling_needs_all_handlers() {
    each_engine(|home, _| {
        home.set_busy_poll(Duration::from_secs(3600));
        let (asked, plain) = (Count::default(), Arc::new(EventNotifier::new().unwrap()));
        let (count, calls, mine) = (asked.clone(), Count::default(), plain.clone());
        let silent = EventNotifier::new().unwrap();
        let ask = move || {
            count.add();
            false
        };
        let askable = FdHandler::new().on_read(|| ()).busy_poll(ask, || ());
        home.context()
            .set_fd_handler(silent.as_fd().as_raw_fd(), askable)
            .unwrap();
        let add = calls.clone();
        let deaf = FdHandler::new().on_read(move || {
            mine.test_and_clear();
            add.add();
        });
        home.context()
            .set_fd_handler(plain.as_fd().as_raw_fd(), deaf)
            .unwrap();
        plain.set();
        assert!(home.poll(true));
        assert_eq!((calls.get(), asked.get()), (1, 0));
        home.context().remove_fd_handler(plain.as_fd().as_raw_fd());
        home.context().remove_fd_handler(silent.as_fd().as_raw_fd());
    });
}

/// The ring's poll of the set is told of changes only: a state that lasts, met while the loop was
/// busy with something else, must not be slept over.
#[test]
fn a_lasting_state_is_not_slept_over() {
    each_engine(|home, engine| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &theirs, b"twelve bytes").unwrap();
        let (calls, ours) = (Count::default(), Arc::new(ours));
        let (count, reader) = (calls.clone(), ours.clone());
        let handler = FdHandler::new().on_read(move || {
            std::io::Read::read_exact(&mut &*reader, &mut [0]).unwrap();
            count.add();
        });
        home.context()
            .set_fd_handler(ours.as_raw_fd(), handler)
            .unwrap();
        for n in 1..=12 {
            assert!(home.poll(true), "{engine}");
            assert_eq!(calls.get(), n, "{engine}: one byte a pass");
        }
        home.context().remove_fd_handler(ours.as_raw_fd());
    });
}

/// More descriptors than the kernel reports at once: all are served.
#[test]
fn more_descriptors_than_one_report() {
    each_engine(|home, engine| {
        let events: Vec<_> = (0..200)
            .map(|_| Arc::new(EventNotifier::new().unwrap()))
            .collect();
        let calls = Count::default();
        for event in &events {
            let (mine, calls) = (event.clone(), calls.clone());
            let handler = FdHandler::new().on_read(move || {
                mine.test_and_clear();
                calls.add();
            });
            home.context()
                .set_fd_handler(event.as_fd().as_raw_fd(), handler)
                .unwrap();
            event.set();
        }
        while calls.get() < events.len() {
            assert!(home.poll(true), "{engine}");
        }
        assert!(!home.poll(false), "{engine}");
        events
            .iter()
            .for_each(|e| home.context().remove_fd_handler(e.as_fd().as_raw_fd()));
    });
}

/// A kernel without io_uring: `auto` falls back to threads, and everything above works there too.
#[test]
fn auto_always_gives_a_home() {
    let home = Home::new(ContextOptions::named("auto")).unwrap();
    assert!(["io_uring", "threads"].contains(&home.context().engine_name()));
    home.close();
}
