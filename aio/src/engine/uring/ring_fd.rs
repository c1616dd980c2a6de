//! Entering a ring: the system calls by hand, because the descriptor is registered with its thread
//! and the wait has a time-out.

use io_uring::types::Timespec;
use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::time::Duration;

/// `IORING_REGISTER_RING_FDS`, its counterpart, and `IORING_ENTER_REGISTERED_RING` of linux/io_uring.h.
const REGISTER_RING_FDS: libc::c_uint = 20;
const UNREGISTER_RING_FDS: libc::c_uint = 21;
const REGISTERED_RING: libc::c_uint = 1 << 4;
/// `IORING_ENTER_GETEVENTS` and `IORING_ENTER_EXT_ARG`.
const GETEVENTS: libc::c_uint = 1;
const EXT_ARG: libc::c_uint = 1 << 3;

const SYS_ENTER: libc::c_long = libc::SYS_io_uring_enter;

/// `struct io_uring_getevents_arg` of linux/io_uring.h.
#[repr(C)]
struct WaitArgs {
    sigmask: u64,
    sigmask_size: u32,
    padding: u32,
    timeout: *const Timespec,
}

/// What `io_uring_enter` calls a ring. Goes before the ring does.
pub(super) struct RingFd {
    /// The ring's own descriptor.
    ring: RawFd,
    /// An index if it could be registered, else the descriptor.
    fd: libc::c_int,
    flags: libc::c_uint,
}

impl RingFd {
    /// Of this ring, for the calling thread.
    pub(super) fn of(ring: RawFd) -> Self {
        let (fd, flags) = match register(ring) {
            Some(index) => (index, REGISTERED_RING),
            None => (ring, 0),
        };
        RingFd { ring, fd, flags }
    }

    /// Hands `queued` entries to the kernel and waits for `want` completions, or for the time-out;
    /// with `reap` it also delivers those that it holds back.
    #[inline]
    pub(super) fn enter(
        &self,
        queued: u32,
        want: u32,
        reap: bool,
        timeout_ns: Option<u64>,
    ) -> io::Result<()> {
        let mut flags = self.flags;
        if want > 0 || reap {
            flags |= GETEVENTS;
        }
        let result = if want == 0 || timeout_ns.is_none() {
            // SAFETY: the ring is ours, and every entry in it was pushed with the promise about its
            // memory.
            unsafe { libc::syscall(SYS_ENTER, self.fd, queued, want, flags, 0, 0) }
        } else {
            let timeout = timeout_ns.map(|ns| Timespec::from(Duration::from_nanos(ns)));
            let args = WaitArgs {
                sigmask: 0,
                sigmask_size: 0,
                padding: 0,
                timeout: timeout.as_ref().map_or(ptr::null(), ptr::from_ref),
            };
            let (args, size) = (&raw const args, size_of::<WaitArgs>());
            let flags = flags | EXT_ARG;
            // SAFETY: as above, and the arguments live through the call and have the size that is
            // said.
            unsafe { libc::syscall(SYS_ENTER, self.fd, queued, want, flags, args, size) }
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for RingFd {
    /// The thread's table would keep the ring until the thread ends.
    fn drop(&mut self) {
        if self.flags & REGISTERED_RING != 0
            && let Ok(index) = u32::try_from(self.fd)
            && !update(self.ring, UNREGISTER_RING_FDS, &mut Update::new(index, 0))
        {
            log::warn!("a ring stays until its thread ends");
        }
    }
}

/// `struct io_uring_rsrc_update` of linux/io_uring.h.
#[repr(C)]
struct Update {
    index: u32,
    reserved: u32,
    fd: u64,
}

impl Update {
    fn new(index: u32, fd: u64) -> Self {
        Update {
            index,
            reserved: 0,
            fd,
        }
    }
}

/// The descriptor's index in the table of this thread; `None`: older than Linux 5.18.
fn register(fd: RawFd) -> Option<libc::c_int> {
    // The kernel finds an index by itself.
    let mut place = Update::new(u32::MAX, u64::try_from(fd).ok()?);
    update(fd, REGISTER_RING_FDS, &mut place)
        .then(|| libc::c_int::try_from(place.index).ok())
        .flatten()
}

/// Changes one place of the thread's table of rings; tells whether the kernel did it.
fn update(ring: RawFd, call: libc::c_uint, place: &mut Update) -> bool {
    let argument = ptr::from_mut(place);
    // SAFETY: one `io_uring_rsrc_update` that lives through the call; the descriptor is a ring of
    // ours.
    let done = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, call, argument, 1) };
    done == 1
}
