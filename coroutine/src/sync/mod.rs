//! Locks: three that suspend ([`CoMutex`], [`CoRwLock`], [`CoQueue`]) and one that does not
//! ([`ThreadLock`]).

mod mutex;
mod queue;
mod rwlock;
mod thread_lock;

pub use mutex::{CoMutex, CoMutexGuard};
pub use queue::CoQueue;
pub use rwlock::{CoReadGuard, CoRwLock, CoWriteGuard, Upgraded};
pub use thread_lock::{ThreadGuard, ThreadLock};
