//! eventfd, epoll and the monotonic clock.

use super::check;
use crate::notifier::EventNotifier;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Nanoseconds of the monotonic clock.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is ours to write, and the clock exists on every Linux.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    assert_eq!(result, 0, "clock_gettime failed");
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// A new eventfd, not blocking, closed on exec, counting from zero.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd takes two integers and touches no memory of ours.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds one to the counter. A counter at its limit is as good as raised, so that is no error.
pub(crate) fn eventfd_raise(fd: BorrowedFd<'_>) -> io::Result<()> {
    let one = 1u64;
    // SAFETY: eight bytes are read from `one`, which lives through the call.
    let written = unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
    match super::check_len(written) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Sets the counter to zero; tells whether it was above.
pub(crate) fn eventfd_clear(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut count = 0u64;
    // SAFETY: at most eight bytes are written to `count`, which lives through the call.
    let read = unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    match super::check_len(read) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        other => other.map(|_| true),
    }
}

/// What a descriptor may be ready for; the bits of `EPOLLIN` and so on.
pub(crate) mod ready {
    /// Something can be read.
    pub const READ: u32 = libc::EPOLLIN.cast_unsigned();
    /// Something can be written.
    pub const WRITE: u32 = libc::EPOLLOUT.cast_unsigned();
    /// Error or hang-up: reported always, to readers and writers.
    pub const BROKEN: u32 = libc::EPOLLERR.cast_unsigned() | libc::EPOLLHUP.cast_unsigned();
    /// Report each new event once, instead of as long as the state lasts.
    pub const EDGE: u32 = libc::EPOLLET.cast_unsigned();
}

/// One report of [`Epoll::wait`].
#[derive(Clone, Copy)]
pub(crate) struct Event(libc::epoll_event);

impl Event {
    /// Space for an event.
    pub const EMPTY: Event = Event(libc::epoll_event { events: 0, u64: 0 });

    /// What [`Epoll::add`] was told.
    pub fn token(self) -> u64 {
        self.0.u64
    }

    /// Bits of [`ready`].
    pub fn events(self) -> u32 {
        self.0.events
    }
}

/// An epoll descriptor. All calls from any thread.
#[derive(Debug)]
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    /// A new one that watches nothing.
    pub fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 takes an integer and touches no memory of ours.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(Epoll(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn control(&self, op: libc::c_int, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: token };
        // SAFETY: `event` lives through the call, which keeps no pointer to it.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), op, fd, &raw mut event) }).map(|_| ())
    }

    /// Watches `fd` for `events`; reports carry `token`.
    pub fn add(&self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, events, token)
    }

    /// Watches for something else, or under another token.
    pub fn modify(&self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, events, token)
    }

    /// Watches `fd` no more.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, 0)
    }

    /// Waits until something is ready or `timeout_ns` passed (`None`: for ever); fills `events` and
    /// tells how many.
    pub fn wait(&self, events: &mut [Event], timeout_ns: Option<u64>) -> io::Result<usize> {
        let space = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
        let first = events.as_mut_ptr().cast::<libc::epoll_event>();
        let millis = match timeout_ns {
            None => -1,
            Some(0) => 0,
            Some(ns) => match self.wait_precisely(events, ns) {
                Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                    libc::c_int::try_from(ns.div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX)
                }
                other => return other,
            },
        };
        let fd = self.0.as_raw_fd();
        // SAFETY: `Event` is `epoll_event` (a tuple struct of just that, see the assertion below),
        // and the kernel writes at most `space` of them into `events`.
        let count = check(unsafe { libc::epoll_wait(fd, first, space, millis) })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The same with a time-out in nanoseconds, since Linux 5.11.
    fn wait_precisely(&self, events: &mut [Event], timeout_ns: u64) -> io::Result<usize> {
        let space = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
        let first = events.as_mut_ptr().cast::<libc::epoll_event>();
        let timeout = timespec(timeout_ns);
        let fd = self.0.as_raw_fd();
        // SAFETY: as for epoll_wait; `timeout` lives through the call, and no signal mask is given.
        let count = check(unsafe {
            libc::epoll_pwait2(fd, first, space, &raw const timeout, std::ptr::null())
        })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// For polling it from another loop.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const _: () = assert!(size_of::<Event>() == size_of::<libc::epoll_event>());

/// The largest second count that the kernel takes without complaint, in any clock.
const MAX_SECONDS: u64 = i32::MAX as u64;

fn timespec(ns: u64) -> libc::timespec {
    let seconds = (ns / 1_000_000_000).min(MAX_SECONDS);
    libc::timespec {
        tv_sec: seconds.cast_signed(),
        tv_nsec: (ns % 1_000_000_000).cast_signed(),
    }
}

/// One descriptor of a list for poll(2).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct PollFd(libc::pollfd);

impl PollFd {
    /// `events`: bits as `POLLIN`, which are those of `EPOLLIN`.
    pub(crate) fn new(fd: RawFd, events: u32) -> Self {
        PollFd(libc::pollfd {
            fd,
            events: i16::try_from(events & (ready::READ | ready::WRITE)).expect("two low bits"),
            revents: 0,
        })
    }

    /// Which descriptor.
    pub fn fd(&self) -> RawFd {
        self.0.fd
    }

    /// What it is to be ready for: bits as `POLLIN`.
    pub fn wanted(&self) -> i16 {
        self.0.events
    }

    /// What the last wait reported, without "not open".
    pub(crate) fn events(&self) -> u32 {
        u32::from((self.0.revents & !libc::POLLNVAL).cast_unsigned())
    }

    /// The last wait found that no such descriptor is open.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.revents & libc::POLLNVAL != 0
    }
}

impl std::fmt::Debug for PollFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PollFd({} for {:#x})", self.fd(), self.wanted())
    }
}

/// Waits with poll(2) until one of the list is ready or `timeout_ns` passed (`None`: for ever);
/// tells how many are. For programs that embed a context in a loop of their own.
///
/// # Errors
/// `EINTR` when a signal came.
pub fn poll_all(list: &mut [PollFd], timeout_ns: Option<u64>) -> io::Result<usize> {
    let timeout = timeout_ns.map(timespec);
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    let first = list.as_mut_ptr().cast::<libc::pollfd>();
    let count = list.len() as libc::nfds_t;
    // SAFETY: `PollFd` is `pollfd`, `count` of them are ours to write, and list and time-out live
    // through the call; no signal mask is given.
    let ready = check(unsafe { libc::ppoll(first, count, timeout, std::ptr::null()) })?;
    Ok(usize::try_from(ready).unwrap_or(0))
}

/// Waits with poll(2) until `fd` can be read or `timeout_ns` passed; tells whether it can.
pub fn poll_readable(fd: BorrowedFd<'_>, timeout_ns: Option<u64>) -> io::Result<bool> {
    let mut one = [PollFd::new(fd.as_raw_fd(), ready::READ)];
    poll_all(&mut one, timeout_ns).map(|count| count > 0)
}

/// Is it of a kind that poll(2) always calls ready, as files and block devices are?
pub(crate) fn is_always_ready(fd: RawFd) -> io::Result<bool> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: one `stat` may be written to where the pointer leads, and lives through the call.
    check(unsafe { libc::fstat(fd, stat.as_mut_ptr()) })?;
    // SAFETY: fstat succeeded, so all of it is written.
    let kind = unsafe { stat.assume_init() }.st_mode & libc::S_IFMT;
    Ok(matches!(
        kind,
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFBLK
    ))
}

/// Used by the loop: watches the notifier, whose events come once each.
pub(crate) fn watch_notifier(
    epoll: &Epoll,
    notifier: &EventNotifier,
    token: u64,
) -> io::Result<()> {
    epoll.add(
        notifier.as_fd().as_raw_fd(),
        ready::READ | ready::EDGE,
        token,
    )
}
