//! An event that any thread can raise and a loop can wait for.
//!
//! It counts: raising it ten times is one event when it is looked at afterwards. Each context has
//! one that wakes it from its wait, and programs may make more and give them to
//! [`set_fd_handler`](crate::AioContext::set_fd_handler).

use crate::sys::event::{eventfd, eventfd_clear, eventfd_raise};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// An eventfd.
#[derive(Debug)]
pub struct EventNotifier(OwnedFd);

impl EventNotifier {
    /// A new one, not raised.
    ///
    /// # Errors
    /// When the process or the system is out of descriptors.
    pub fn new() -> io::Result<Self> {
        eventfd().map(EventNotifier)
    }

    /// Raises it: its descriptor becomes readable. Any thread.
    pub fn set(&self) {
        eventfd_raise(self.as_fd()).expect("an eventfd can be written");
    }

    /// Lowers it; tells whether it was raised. Any thread.
    pub fn test_and_clear(&self) -> bool {
        eventfd_clear(self.as_fd()).expect("an eventfd can be read")
    }
}

impl AsFd for EventNotifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event::poll_readable;

    #[test]
    fn raising_often_is_one_event() {
        let event = EventNotifier::new().unwrap();
        assert!(!event.test_and_clear());
        assert!(!poll_readable(event.as_fd(), Some(0)).unwrap());
        event.set();
        event.set();
        assert!(poll_readable(event.as_fd(), None).unwrap());
        assert!(event.test_and_clear());
        assert!(!event.test_and_clear());
    }
}
