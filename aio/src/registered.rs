//! Files that the ring of one home knows by a number.
//!
//! ```text
//!   RegisteredFile::new    in a home with a ring: a place in its table of files
//!   request there          names the place: the kernel looks up and counts no descriptor
//!   request elsewhere      names the descriptor
//!   drop                   the place is empty again: at once at home, else in the home's next pass
//! ```
//!
//! A place keeps the file open in the kernel. It belongs to one [`RegisteredFile`] until that is
//! dropped, so a descriptor that is closed and given out anew is never mistaken for another.

use crate::bottom_half::Work;
use crate::context::AioContext;
use crate::current::with_core;
use crate::engine::Engine;
use crate::home::Core;
use io_uring::squeue::Flags;
use io_uring::types::Fd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::sync::{Arc, Weak};

/// A place in the table of files of one ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The ring, as no other of this process is or was called.
    pub ring: u64,
    pub index: u32,
}

/// A file's place in the ring of the home where it was made; empty again when this is dropped.
///
/// What it was made of stays open until then, even if all descriptors of it are closed: so drop
/// this first.
#[derive(Debug)]
pub struct RegisteredFile {
    place: Place,
    context: Weak<AioContext>,
}

impl RegisteredFile {
    /// Registers the file with the home that the thread drives now. `None`: there is no ring, its
    /// table is full, or the kernel has none (before Linux 5.19).
    pub fn new(fd: BorrowedFd<'_>) -> Option<RegisteredFile> {
        with_core(|core| {
            let core = core?;
            let Engine::Uring(ring) = &core.engine else {
                return None;
            };
            Some(RegisteredFile {
                place: ring.register_file(fd)?,
                context: Arc::downgrade(&core.context),
            })
        })
    }
}

/// Empties the place if `core` has it.
fn unregister(core: Option<&Rc<Core>>, place: Place) -> bool {
    match core.map(|core| &core.engine) {
        Some(Engine::Uring(ring)) => ring.unregister_file(place),
        _ => false,
    }
}

impl Drop for RegisteredFile {
    fn drop(&mut self) {
        let place = self.place;
        if with_core(|core| unregister(core, place)) {
            return;
        }
        // With its context the ring is gone, and with that the place.
        if let Some(context) = self.context.upgrade() {
            let there = move || {
                with_core(|core| unregister(core, place));
            };
            context.post_unless_closed(Work::Once(Box::new(there)));
        }
    }
}

/// A file, by its descriptor and, where there is one, its place in a ring.
#[derive(Clone, Copy, Debug)]
pub struct FileRef<'a> {
    fd: BorrowedFd<'a>,
    registered: Option<Place>,
}

impl<'a> FileRef<'a> {
    /// Both are of the same file.
    #[inline]
    pub fn new(fd: BorrowedFd<'a>, registered: Option<&'a RegisteredFile>) -> Self {
        FileRef {
            fd,
            registered: registered.map(|registered| registered.place),
        }
    }

    /// The descriptor.
    #[inline(always)]
    pub fn fd(self) -> BorrowedFd<'a> {
        self.fd
    }

    /// What an entry of `ring` calls the file.
    #[inline(always)]
    pub(crate) fn in_ring(self, ring: u64) -> (Fd, Flags) {
        match self.registered {
            Some(place) if place.ring == ring => (Fd(place.index.cast_signed()), Flags::FIXED_FILE),
            _ => (Fd(self.fd.as_raw_fd()), Flags::empty()),
        }
    }
}

impl<'a> From<BorrowedFd<'a>> for FileRef<'a> {
    #[inline]
    fn from(fd: BorrowedFd<'a>) -> Self {
        FileRef::new(fd, None)
    }
}
