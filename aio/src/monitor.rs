//! How a loop watches descriptors: with an epoll set, or with poll(2) where there is none.
//!
//! ```text
//!              thread engine waits in     ring engine waits in
//!   epoll      epoll_wait                 io_uring_enter; the ring watches the set
//!   poll(2)    ppoll                      ppoll; completions raise the context's notifier
//! ```
//!
//! A list for poll(2) is made anew for each wait, from what is set then. The kernel does not see a
//! change during a wait, so [`AioContext`](crate::AioContext) wakes the loop after each. It costs a
//! system call a pass and time for each descriptor: a fallback.

use crate::notifier::EventNotifier;
use crate::sys::event::{self, Epoll, Event, PollFd, watch_notifier};
use coblock_coroutine::ThreadLock;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

/// Reports taken from an epoll set at once.
const EVENTS: usize = 64;

/// Token of the context's own notifier.
pub(crate) const NOTIFIER_TOKEN: u64 = 0;

/// How a context watches descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MonitorKind {
    /// epoll where the kernel has it, else poll(2); the log says why not.
    #[default]
    Auto,
    /// epoll, or making the context fails.
    Epoll,
    /// poll(2); works everywhere.
    Poll,
}

impl std::str::FromStr for MonitorKind {
    type Err = io::Error;

    fn from_str(word: &str) -> io::Result<Self> {
        Ok(match word {
            "auto" => MonitorKind::Auto,
            "epoll" => MonitorKind::Epoll,
            "poll" => MonitorKind::Poll,
            _ => {
                let message = format!("unknown monitor '{word}': auto, epoll or poll");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        })
    }
}

/// What one look at the descriptors gave.
pub(crate) struct Reported {
    /// How many.
    pub count: usize,
    /// Something may be left: space ran out, or a state that lasts was reported.
    pub may_repeat: bool,
}

impl Reported {
    /// Nothing.
    pub const NOTHING: Reported = Reported {
        count: 0,
        may_repeat: false,
    };
}

/// The descriptors that a context watches, its notifier among them. Changed by any thread.
pub(crate) enum Monitor {
    Epoll(Epoll),
    Poll(PollList),
}

impl Monitor {
    /// Watches `notifier` and nothing else.
    pub fn new(kind: MonitorKind, name: &str, notifier: &EventNotifier) -> io::Result<Self> {
        Self::choose(kind, name, notifier, Epoll::new)
    }

    fn choose(
        kind: MonitorKind,
        name: &str,
        notifier: &EventNotifier,
        epoll: impl FnOnce() -> io::Result<Epoll>,
    ) -> io::Result<Self> {
        let list = || Monitor::Poll(PollList::new(notifier));
        let epoll = match kind {
            MonitorKind::Poll => return Ok(list()),
            MonitorKind::Auto | MonitorKind::Epoll => epoll(),
        };
        match epoll {
            Ok(epoll) => {
                watch_notifier(&epoll, notifier, NOTIFIER_TOKEN)?;
                Ok(Monitor::Epoll(epoll))
            }
            // Not in this kernel, or not for this process. Out of descriptors is another matter.
            Err(why)
                if kind == MonitorKind::Auto
                    && matches!(why.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) =>
            {
                log::warn!("context '{name}': poll(2) instead of epoll: {why}");
                Ok(list())
            }
            Err(error) => Err(error),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Monitor::Epoll(_) => "epoll",
            Monitor::Poll(_) => "poll",
        }
    }

    /// Is a change seen only by the next wait, so that the loop is to be woken?
    pub fn must_wake(&self) -> bool {
        matches!(self, Monitor::Poll(_))
    }

    /// The set, if there is one.
    pub fn epoll(&self) -> Option<&Epoll> {
        match self {
            Monitor::Epoll(epoll) => Some(epoll),
            Monitor::Poll(_) => None,
        }
    }

    /// Watches `fd` for `events`; reports carry `token`.
    pub fn add(&self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        match self {
            Monitor::Epoll(epoll) => epoll.add(fd, events, token),
            Monitor::Poll(list) => list.add(fd, events, token),
        }
    }

    /// Watches for something else, or under another token.
    pub fn modify(&self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        match self {
            Monitor::Epoll(epoll) => epoll.modify(fd, events, token),
            Monitor::Poll(list) => list.add(fd, events, token),
        }
    }

    /// Watches `fd` no more.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        match self {
            Monitor::Epoll(epoll) => epoll.remove(fd),
            Monitor::Poll(list) => {
                list.watched.lock().remove(&fd);
                Ok(())
            }
        }
    }

    /// What a foreign loop has to watch in place of this one.
    pub fn watched(&self) -> Vec<PollFd> {
        match self {
            Monitor::Epoll(epoll) => {
                vec![PollFd::new(epoll.as_fd().as_raw_fd(), event::ready::READ)]
            }
            Monitor::Poll(list) => list.entries().0,
        }
    }

    /// Waits for up to `timeout_ns` (`None`: for ever), and tells `report` tokens and events.
    pub fn wait(
        &self,
        notifier: &EventNotifier,
        timeout_ns: Option<u64>,
        report: impl FnMut(u64, u32),
    ) -> io::Result<Reported> {
        match self {
            Monitor::Epoll(epoll) => wait_for_set(epoll, timeout_ns, report),
            Monitor::Poll(list) => list.wait(notifier, timeout_ns, report),
        }
    }
}

fn wait_for_set(
    epoll: &Epoll,
    timeout_ns: Option<u64>,
    mut report: impl FnMut(u64, u32),
) -> io::Result<Reported> {
    let mut events = [Event::EMPTY; EVENTS];
    let count = epoll.wait(&mut events, timeout_ns)?;
    let mut reported = Reported {
        count,
        may_repeat: count == EVENTS,
    };
    for event in &events[..count] {
        report(event.token(), event.events());
        reported.may_repeat |= event.token() != NOTIFIER_TOKEN;
    }
    Ok(reported)
}

/// Descriptors for poll(2): number, events, token.
pub(crate) struct PollList {
    watched: ThreadLock<BTreeMap<RawFd, (u32, u64)>>,
}

impl PollList {
    fn new(notifier: &EventNotifier) -> Self {
        let first = (
            notifier.as_fd().as_raw_fd(),
            (event::ready::READ, NOTIFIER_TOKEN),
        );
        PollList {
            watched: ThreadLock::new(BTreeMap::from([first])),
        }
    }

    fn add(&self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        // poll(2) calls these always ready; epoll refuses them, and so do we.
        if event::is_always_ready(fd)? {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.watched.lock().insert(fd, (events, token));
        Ok(())
    }

    fn entries(&self) -> (Vec<PollFd>, Vec<u64>) {
        let watched = self.watched.lock();
        let entries = watched
            .iter()
            .map(|(fd, (events, token))| (PollFd::new(*fd, *events), *token));
        entries.unzip()
    }

    fn wait(
        &self,
        notifier: &EventNotifier,
        timeout_ns: Option<u64>,
        mut report: impl FnMut(u64, u32),
    ) -> io::Result<Reported> {
        let (mut entries, tokens) = self.entries();
        event::poll_all(&mut entries, timeout_ns)?;
        let mut reported = Reported::NOTHING;
        for (entry, token) in entries.iter().zip(tokens) {
            if entry.is_closed() {
                self.forget(entry.fd(), token);
            } else if entry.events() != 0 {
                reported.count += 1;
                reported.may_repeat |= token != NOTIFIER_TOKEN;
                if token == NOTIFIER_TOKEN {
                    // An epoll set reports it once; a list, until it is lowered.
                    notifier.test_and_clear();
                }
                report(token, entry.events());
            }
        }
        Ok(reported)
    }

    /// Closed before its handler was removed: not watched any more, unless set anew meanwhile.
    #[cold]
    fn forget(&self, fd: RawFd, token: u64) {
        let mut watched = self.watched.lock();
        if watched.get(&fd).is_some_and(|(_, now)| *now == token) {
            watched.remove(&fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel, or a sandbox, without epoll: `auto` falls back to poll(2), `epoll` says so. Being
    /// out of descriptors is an error in every case.
    #[test]
    fn auto_falls_back() {
        let notifier = EventNotifier::new().unwrap();
        for (kind, errno, want) in [
            (MonitorKind::Auto, 0, Ok("epoll")),
            (MonitorKind::Auto, libc::ENOSYS, Ok("poll")),
            (MonitorKind::Auto, libc::EPERM, Ok("poll")),
            (MonitorKind::Auto, libc::EMFILE, Err(Some(libc::EMFILE))),
            (MonitorKind::Epoll, 0, Ok("epoll")),
            (MonitorKind::Epoll, libc::ENOSYS, Err(Some(libc::ENOSYS))),
            (MonitorKind::Poll, libc::EMFILE, Ok("poll")),
        ] {
            let epoll = || match errno {
                0 => Epoll::new(),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
            let made = Monitor::choose(kind, "test", &notifier, epoll);
            let made = made.map(|m| m.name()).map_err(|e| e.raw_os_error());
            assert_eq!(made, want, "{kind:?}, epoll gives {errno}");
        }
        for word in ["auto", "epoll", "poll"] {
            let kind: MonitorKind = word.parse().unwrap();
            assert_eq!(format!("{kind:?}").to_lowercase(), word);
        }
        assert!("select".parse::<MonitorKind>().is_err());
    }
}
