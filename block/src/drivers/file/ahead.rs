//! Growing a file ahead of its writers.
//!
//! A write past the end of a file changes its length, so the file system does one after the other,
//! in a worker of the kernel; with `O_DIRECT` on ext4 each costs several times a write inside. So
//! when writes come near the end, the file system sets space aside beyond it in one large step, and
//! the writes that follow find themselves inside the file. What was set aside reads as zeros, as
//! what is past the end does.
//!
//! ```text
//!   0                      len                reserved
//!   |---- written ---------|---- set aside ---|        a crash leaves it, close cuts it off
//! ```
//! Steps are half of the file's length, at most 64 MiB: a small file is not made large, and a large
//! one takes one call in 64 MiB. Where the file system cannot, or has no space, nothing happens:
//! the write itself says what is to be said.

use coblock_coroutine::{Co, CoMutex};
use rustix::process::{Resource, getrlimit};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes.
const LONGEST_STEP: u64 = 64 << 20;
const SHORTEST_STEP: u64 = 1 << 20;

/// How far a file was grown.
pub(super) struct Ahead {
    /// Writes that end above are worth a look; `u64::MAX`: none ever is.
    watch_above: AtomicU64,
    /// End of what was set aside; 0: nothing was.
    reserved: CoMutex<u64>,
}

impl Ahead {
    /// For a file of `len` bytes that may be written, and grows in a file system.
    pub(super) fn of_file(len: u64) -> Ahead {
        Ahead {
            watch_above: AtomicU64::new(len),
            reserved: CoMutex::new(0),
        }
    }

    /// For what never grows, or does not gain by it.
    pub(super) fn never() -> Ahead {
        Ahead::of_file(u64::MAX)
    }

    /// A write from `offset` to `end` comes: grows the file if that is worth it. Suspends then.
    #[inline(always)]
    pub(super) fn before_write(&self, co: &Co, file: &File, offset: u64, end: u64) {
        if end > self.watch_above.load(Ordering::Relaxed) {
            self.grow(co, file, offset, end);
        }
    }

    #[cold]
    #[inline(never)]
    fn grow(&self, co: &Co, file: &File, offset: u64, end: u64) {
        let mut reserved = self.reserved.lock(co);
        let watched = self.watch_above.load(Ordering::Relaxed);
        if end <= watched {
            return; // Somebody else has grown it meanwhile.
        }
        let step = (end / 2).min(LONGEST_STEP);
        if step < SHORTEST_STEP {
            return;
        }
        // A write far past the end leaves a hole behind it, as it would by itself.
        let from = if offset - offset.min(watched) > step {
            offset
        } else {
            watched
        };
        let to = end.saturating_add(step);
        // The kernel answers with a signal that kills when this limit is passed.
        let allowed = getrlimit(Resource::Fsize)
            .current
            .is_none_or(|most| to <= most);
        if allowed && coblock_aio::co::allocate(co, file.as_fd(), from, to - from, false).is_ok() {
            *reserved = to;
            self.watch_above.store(to, Ordering::Relaxed);
        } else {
            self.watch_above.store(u64::MAX, Ordering::Relaxed);
        }
    }

    /// The file has been given the length `len`; nothing is set aside any more.
    pub(super) fn was_resized(&self, co: &Co, len: u64) {
        let mut reserved = self.reserved.lock(co);
        *reserved = 0;
        if self.watch_above.load(Ordering::Relaxed) != u64::MAX {
            self.watch_above.store(len, Ordering::Relaxed);
        }
    }

    /// The file of `len` bytes has been opened so that it can grow.
    pub(super) fn may_grow(&self, co: &Co, len: u64) {
        let reserved = self.reserved.lock(co);
        let watched = self.watch_above.load(Ordering::Relaxed);
        if *reserved == 0 && watched == u64::MAX {
            self.watch_above.store(len, Ordering::Relaxed);
        }
    }

    /// Cuts off what was set aside and not used: the file has `len` bytes. Suspends.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn cut(&self, co: &Co, file: &File, len: u64) -> io::Result<()> {
        let mut reserved = self.reserved.lock(co);
        let end = std::mem::take(&mut *reserved);
        if end <= len {
            return Ok(());
        }
        coblock_aio::co::on_pool(co, || {
            // A file that has another length now belongs to somebody else, too.
            if file.metadata()?.len() == end {
                file.set_len(len)?;
            }
            Ok(())
        })
    }
}
