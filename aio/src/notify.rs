//! Who wakes a loop that is about to sleep, and who need not (rule 3.4).
//!
//! ```text
//!   loop                                  notifier, any thread
//!   announce: sleeping = 1                publish the work
//!   full fence                            notified = 1; was it 1 before? then somebody else goes on
//!   notified? then do not sleep           full fence
//!                                         sleeping? raise the event
//! ```
//!
//! Of the two stores at least one is seen by the other side: either the loop sees `notified` and
//! does not sleep, or the notifier that set it sees `sleeping` and raises the event. However many
//! notify, one of them goes that far, until the loop has consumed `notified`.
//!
//! `notified` stays until a blocking poll consumes it: a poll that does not block may run the work,
//! and the next blocking one then goes round once for nothing, but no kick is lost.
//!
//! `super::sync` has the atomics of std, or of loom where the protocol is model-checked.

use super::sync::{AtomicBool, Ordering, fence};

/// The two flags. The loop's methods are called by its home only.
#[derive(Debug)]
pub struct Notify {
    /// Set by the loop before it sleeps, cleared by it on waking. Nobody else writes it.
    sleeping: AtomicBool,
    /// Set by notifiers after publishing; cleared by the loop *before* it looks at what was
    /// published.
    ///
    /// Everybody writes it by a read-modify-write: the loop that takes the flag of a later notifier
    /// must see what an earlier one published, and only those continue a release sequence.
    notified: AtomicBool,
}

impl Notify {
    /// Awake, nothing published.
    pub fn new() -> Self {
        Notify {
            sleeping: AtomicBool::new(false),
            notified: AtomicBool::new(false),
        }
    }

    /// Notifier: what was to be published is published. True: the caller must raise the event.
    #[must_use]
    pub fn publish(&self) -> bool {
        if self.notified.swap(true, Ordering::Release) {
            return false;
        }
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed)
    }

    /// Loop: says that it will sleep. True: it may, for the event will be raised for what comes
    /// now.
    #[must_use]
    pub fn announce(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.notified.load(Ordering::Relaxed)
    }

    /// Has the loop said that it will sleep? Exact on its own thread.
    pub fn is_announced(&self) -> bool {
        self.sleeping.load(Ordering::Relaxed)
    }

    /// Loop, after a sleep or instead of it: awake again, and what was notified until now is
    /// accepted. The caller looks at the published work afterwards. True: there was a notification.
    pub fn accept(&self) -> bool {
        self.sleeping.store(false, Ordering::Relaxed);
        self.notified.load(Ordering::Relaxed) && self.notified.swap(false, Ordering::Acquire)
    }
}
