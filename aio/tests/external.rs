//! External handlers (rule 3.6): they rest while a counter is above zero, others do not.

mod support;

use coblock_aio::{AioContext, EventNotifier, FdHandler, Home};
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use support::{Count, each_drive, each_engine, options, quiet};

/// A notifier with a handler that lowers it and counts.
struct Bell {
    event: Arc<EventNotifier>,
    calls: Count,
    context: Arc<AioContext>,
}

impl Bell {
    fn new(home: &Home, external: bool) -> Self {
        let bell = Bell {
            event: Arc::new(EventNotifier::new().unwrap()),
            calls: Count::default(),
            context: home.context().clone(),
        };
        bell.set(external);
        bell
    }

    fn set(&self, external: bool) {
        let (event, calls) = (self.event.clone(), self.calls.clone());
        let handler = FdHandler::new().on_read(move || {
            assert!(event.test_and_clear(), "called for nothing");
            calls.add();
        });
        let handler = if external {
            handler.external()
        } else {
            handler
        };
        self.context.set_fd_handler(self.fd(), handler).unwrap();
    }

    fn fd(&self) -> i32 {
        self.event.as_fd().as_raw_fd()
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.context.remove_fd_handler(self.fd());
    }
}

/// Rule 3.6: while the counter is above zero, external handlers are not called and others are; at
/// zero what became ready meanwhile is called. (/aio/external-client)
#[test]
fn external_handlers_rest() {
    each_drive(|home, drive| {
        let (outside, inside) = (Bell::new(home, true), Bell::new(home, false));
        for depth in 1..=3 {
            (0..depth).for_each(|_| home.context().disable_external());
            assert_eq!(home.context().external_disabled(), depth);
            outside.event.set();
            for left in (1..=depth).rev() {
                quiet(drive);
                inside.event.set();
                assert!(
                    drive.poll(true),
                    "{drive:?}: others are served, {left} left"
                );
                home.context().enable_external();
            }
            assert_eq!(outside.calls.get(), depth as usize - 1, "{drive:?}");
            assert!(drive.poll(true), "{drive:?}: enabled again");
            assert_eq!(outside.calls.get(), depth as usize, "{drive:?}");
            quiet(drive);
        }
        assert_eq!(inside.calls.get(), 1 + 2 + 3);
    });
}

/// Rule 3.6, "not waited for": a loop whose only ready descriptor is external sleeps until its
/// timer, and does not spin.
#[test]
fn external_handlers_are_not_waited_for() {
    each_drive(|home, drive| {
        let outside = Bell::new(home, true);
        let fired = Count::default();
        let fires = fired.clone();
        let timer = home.context().timer("end of the wait", move || {
            fires.add();
        });
        home.context().disable_external();
        outside.event.set();
        timer.arm_in(Duration::from_millis(30));
        let before = home.stats().passes;
        while fired.get() == 0 {
            drive.poll(true);
        }
        let passes = home.stats().passes - before;
        assert!(passes < 10, "{drive:?}: {passes} passes in one wait");
        assert_eq!(outside.calls.get(), 0);
        home.context().enable_external();
        assert!(drive.poll(true));
        assert_eq!(outside.calls.get(), 1);
    });
}

/// Rule 3.6, "nor dispatched": reported in the same pass as the handler that disables. It is not
/// called, nor forgotten.
#[test]
fn disabled_between_report_and_call() {
    each_drive(|home, drive| {
        let outside = [Bell::new(home, true), Bell::new(home, true)];
        // Whichever comes first disables: the other one has been reported, and rests.
        let first = Count::default();
        for bell in &outside {
            let (event, calls) = (bell.event.clone(), bell.calls.clone());
            let (context, first) = (home.context().clone(), first.clone());
            let handler = FdHandler::new().external().on_read(move || {
                assert!(event.test_and_clear(), "called for nothing");
                calls.add();
                if first.add() == 1 {
                    context.disable_external();
                }
            });
            bell.context.set_fd_handler(bell.fd(), handler).unwrap();
            bell.event.set();
        }
        let calls = || outside[0].calls.get() + outside[1].calls.get();
        assert!(drive.poll(true));
        assert_eq!(calls(), 1, "{drive:?}");
        quiet(drive);
        assert_eq!(calls(), 1, "{drive:?}");
        home.context().enable_external();
        assert!(drive.poll(true));
        assert_eq!(calls(), 2, "{drive:?}: it was not forgotten");
        quiet(drive);
    });
}

/// Rule 3.6: its own read callback disables: the write callback of the same event rests too.
#[test]
fn disabled_between_read_and_write() {
    each_drive(|home, drive| {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &theirs, b"x").unwrap();
        let (reads, writes) = (Count::default(), Count::default());
        let (read, write, context) = (reads.clone(), writes.clone(), home.context().clone());
        let handler = FdHandler::new()
            .external()
            .on_read(move || {
                read.add();
                context.disable_external();
            })
            .on_write(move || {
                write.add();
            });
        let fd = ours.as_raw_fd();
        home.context().set_fd_handler(fd, handler).unwrap();
        assert!(drive.poll(true));
        assert_eq!((reads.get(), writes.get()), (1, 0), "{drive:?}");
        home.context().remove_fd_handler(fd);
        home.context().enable_external();
        quiet(drive);
    });
}

/// Set, replaced and removed while external handlers rest.
#[test]
fn changed_while_they_rest() {
    each_drive(|home, drive| {
        home.context().disable_external();
        let bell = Bell::new(home, true);
        bell.event.set();
        quiet(drive);
        bell.set(false);
        assert!(drive.poll(true), "{drive:?}: not external any more");
        assert_eq!(bell.calls.get(), 1);
        bell.set(true);
        bell.event.set();
        quiet(drive);
        bell.set(true);
        quiet(drive);
        let removed = Bell::new(home, true);
        removed.event.set();
        drop(removed);
        let file = tempfile::tempfile().unwrap();
        let regular = FdHandler::new().external().on_read(|| ());
        let refused = home.context().set_fd_handler(file.as_raw_fd(), regular);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
        home.context().enable_external();
        assert!(drive.poll(true), "{drive:?}: what was set meanwhile works");
        assert_eq!(bell.calls.get(), 2);
        quiet(drive);
    });
}

/// Rule 3.6: reaching zero wakes a loop that sleeps, from another thread.
#[test]
fn the_last_enable_wakes_the_loop() {
    each_engine(|home, engine| {
        let bell = Bell::new(home, true);
        let context = home.context();
        context.disable_external();
        context.disable_external();
        bell.event.set();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                context.enable_external();
                std::thread::sleep(Duration::from_millis(20));
                context.enable_external();
            });
            while bell.calls.get() == 0 {
                home.poll(true);
            }
        });
        assert_eq!(bell.calls.get(), 1, "{engine}");
        // With nothing ready it wakes all the same.
        context.disable_external();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                context.enable_external();
            });
            while context.external_disabled() > 0 {
                home.poll(true);
            }
        });
    });
}

/// Rule 3.6: counted from many threads, the counter ends where it began.
#[test]
fn counted_from_many_threads() {
    each_engine(|home, engine| {
        let bell = Bell::new(home, true);
        let context = home.context();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        context.disable_external();
                        context.enable_external();
                    }
                });
            }
            for _ in 0..50 {
                bell.event.set();
                home.poll(false);
            }
        });
        assert_eq!(context.external_disabled(), 0, "{engine}");
        bell.event.set();
        let before = bell.calls.get();
        while bell.calls.get() == before {
            home.poll(true);
        }
    });
}

/// Rule 3.6: external handlers that rest are not asked by a busy-polling loop, and do not keep it
/// from asking the others.
#[test]
fn busy_polling_leaves_out_those_that_rest() {
    each_engine(|home, engine| {
        home.set_busy_poll(Duration::from_secs(3600));
        let deaf = Bell::new(home, true);
        let (asks, calls) = (Count::default(), Count::default());
        let silent = EventNotifier::new().unwrap();
        let (asked, called) = (asks.clone(), calls.clone());
        let ready = move || asked.add() > 0;
        let askable = FdHandler::new().busy_poll(ready, move || {
            called.add();
        });
        let fd = silent.as_fd().as_raw_fd();
        home.context().set_fd_handler(fd, askable.clone()).unwrap();
        home.context().disable_external();
        assert!(
            home.poll(true),
            "{engine}: the deaf one rests, so the other is asked"
        );
        assert_eq!((asks.get(), calls.get()), (1, 1), "{engine}");
        home.context()
            .set_fd_handler(fd, askable.external())
            .unwrap();
        assert!(!home.poll(false), "{engine}");
        let timer = home.context().timer("end of the wait", || ());
        timer.arm_in(Duration::from_millis(10));
        while timer.deadline_ns().is_some() {
            home.poll(true);
        }
        assert_eq!((asks.get(), calls.get()), (1, 1), "{engine}: both rest");
        home.context().enable_external();
        home.context().remove_fd_handler(fd);
        drop(deaf);
    });
}

/// Rule 3.6: an enable without a disable is refused, with both places.
#[test]
fn underflow_names_both_places() {
    let refusal = |context: &AioContext| {
        let refused = catch_unwind(AssertUnwindSafe(|| context.enable_external()));
        let message = refused.expect_err("refused").downcast::<String>();
        *message.expect("a message")
    };
    let home = Home::new(options("none")).unwrap();
    let never = refusal(home.context());
    assert!(never.contains("never were disabled"), "{never}");
    home.context().disable_external();
    let line = line!() + 1;
    home.context().enable_external();
    let message = refusal(home.context());
    let last = format!("ended at {}:{line}:", file!());
    assert!(message.contains(&last), "{message}, not {last}");
    assert!(message.contains("enabled at ") && message.contains("(rule 3.6)"));
    assert_eq!(home.context().external_disabled(), 0, "nothing has changed");
}
