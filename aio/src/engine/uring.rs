//! The io_uring engine: one ring per home.
//!
//! ```text
//!   request:   entry --> submission queue (or backlog)  ..  IoWait in the waiting frame
//!   pass:      one io_uring_enter hands over all entries and waits
//!   complete:  user data = address of the IoWait  -->  resume its coroutine, in the loop, at once
//! ```
//!
//! * No allocation per request: an entry is written straight into the queue. When the queue is
//!   full, what is in it is handed over at once. When as many requests are in flight as the
//!   completion queue holds, further ones wait in a backlog, so that the queue never overflows.
//! * The ring watches the context's epoll set with a multishot poll, so one wait is for everything.
//!   Such a poll tells of changes, not of states: after each report the set is read until it has
//!   nothing more to say before the loop may sleep again ([`Uring::hot`]).
//! * Where the loop waits elsewhere, in poll(2) or as part of a foreign loop, the kernel raises an
//!   eventfd for completions ([`Uring::raise`]): with `DEFER_TASKRUN` the ring's own descriptor
//!   becomes readable only when somebody enters the kernel.
//! * A read that may be served from the page cache is held back while it is alone. When the pass
//!   ends and it still is, the loop reads it itself, without waiting for a device, which is cheaper
//!   than the ring; else it goes with the others ([`Held`]).
//! * The ring is for one thread (`SINGLE_ISSUER`), and completions are delivered when that thread
//!   enters the kernel (`DEFER_TASKRUN`, else `COOP_TASKRUN`, each with `TASKRUN_FLAG`, so that a
//!   poll that does not wait sees that it must enter).

mod requests;
mod ring_fd;

pub(crate) use requests::{fallocate, poll, read, read_cached, sync, write};

use ring_fd::RingFd;

use super::{collect, tolerate_signal};
use crate::buf::{IoVecMut, RawSegment};
use crate::context::{AioContext, RingDelivery};
use crate::fd_handler::ReadyList;
use crate::monitor::Reported;
use crate::notifier::EventNotifier;
use crate::sys::event::Epoll;
use crate::sys::file::read_at_nowait;
use crate::sys::pending::Pending;
use io_uring::cqueue::Entry as Done;
use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// User data of the poll of the epoll set; no IoWait has this address.
const WATCH: u64 = 0;

/// `IORING_CQE_F_MORE`: the multishot request goes on.
const MORE: u32 = 1 << 1;

/// Completions that the queue holds at least.
const COMPLETIONS: u32 = 4096;

/// Passes without another attempt after the loop could not serve a read itself: doubling from the
/// first to the last.
const PAUSES: std::ops::RangeInclusive<u32> = 16..=4096;

/// A read that is held back, because it may be alone.
#[derive(Clone, Copy)]
struct Held {
    fd: RawFd,
    base: *mut u8,
    len: u32,
    offset: u64,
    /// User data: a [`Pending`].
    data: u64,
}

impl Held {
    fn entry(&self) -> Entry {
        let read = opcode::Read::new(Fd(self.fd), self.base, self.len);
        read.offset(self.offset).build().user_data(self.data)
    }
}

/// The ring of one home.
pub(crate) struct Uring {
    /// Before the ring, which it is of: fields are dropped in their order.
    fd: RingFd,
    ring: RefCell<IoUring>,
    held: Cell<Option<Held>>,
    /// User data and result of a read that the loop has served itself.
    served: Cell<Option<(u64, i32)>>,
    /// Passes until a read is held back again, and how many after the next refusal.
    pause: Cell<u32>,
    next_pause: Cell<u32>,
    /// Entries that wait for space.
    backlog: RefCell<VecDeque<Entry>>,
    /// Completions that were taken out of the queue, and whose coroutines are not resumed yet.
    taken: RefCell<VecDeque<Done>>,
    /// Entries in the submission queue or in the kernel.
    in_flight: Cell<u32>,
    /// Most that may be in flight: one place stays free for the poll.
    limit: u32,
    /// The epoll set that is watched.
    watched: Cell<RawFd>,
    /// The epoll set may have something to say that no completion will tell.
    hot: Cell<bool>,
    /// Requests queued, and system calls made for them.
    requests: Cell<u64>,
    enters: Cell<u64>,
    /// Without it, a poll that does not wait cannot know whether it must enter the kernel.
    has_taskrun_flag: bool,
}

impl Uring {
    /// A ring with `depth` entries, with the best flags from `best` on that the kernel takes.
    pub fn new(depth: u32, best: RingDelivery) -> io::Result<Self> {
        type Flags = fn(&mut io_uring::Builder);
        let attempts: [(RingDelivery, Flags); 3] = [
            (RingDelivery::Deferred, |b| {
                b.setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag();
            }),
            (RingDelivery::Cooperative, |b| {
                b.setup_coop_taskrun().setup_taskrun_flag();
            }),
            (RingDelivery::Interrupting, |_| {}),
        ];
        let mut refusal = None;
        for (delivery, flags) in attempts {
            if delivery < best {
                continue;
            }
            let mut builder = IoUring::builder();
            builder
                .setup_clamp()
                .setup_cqsize(COMPLETIONS.max(depth.saturating_mul(2)));
            flags(&mut builder);
            match builder.build(depth.max(1)) {
                Ok(ring) => {
                    log::debug!("ring of {depth} entries: {delivery:?}");
                    let has_taskrun_flag = delivery != RingDelivery::Interrupting;
                    return Self::with_ring(ring, has_taskrun_flag);
                }
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.unwrap_or_else(|| io::Error::from(io::ErrorKind::Unsupported)))
    }

    fn with_ring(ring: IoUring, has_taskrun_flag: bool) -> io::Result<Self> {
        let params = ring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            return Err(io::Error::other(
                "this kernel's io_uring is older than Linux 5.11",
            ));
        }
        let limit = params.cq_entries() - 1;
        Ok(Uring {
            fd: RingFd::of(ring.as_raw_fd()),
            ring: RefCell::new(ring),
            held: Cell::new(None),
            served: Cell::new(None),
            pause: Cell::new(0),
            next_pause: Cell::new(*PAUSES.start()),
            backlog: RefCell::new(VecDeque::new()),
            taken: RefCell::new(VecDeque::new()),
            in_flight: Cell::new(0),
            limit,
            watched: Cell::new(-1),
            hot: Cell::new(true),
            requests: Cell::new(0),
            enters: Cell::new(0),
            has_taskrun_flag,
        })
    }

    /// Watches the epoll set, which must live as long as the ring.
    pub fn watch(&self, epoll: &Epoll) -> io::Result<()> {
        self.watched.set(epoll.as_fd().as_raw_fd());
        self.push_watch();
        Ok(())
    }

    fn push_watch(&self) {
        let readable = libc::POLLIN.cast_unsigned().into();
        let entry = opcode::PollAdd::new(Fd(self.watched.get()), readable)
            .multi(true)
            .build();
        self.hot.set(true);
        // SAFETY: a poll has no memory of ours.
        unsafe { self.push_now(&entry.user_data(WATCH)) };
    }

    /// Requests, and `io_uring_enter` calls.
    pub fn counts(&self) -> (u64, u64) {
        (self.requests.get(), self.enters.get())
    }

    /// From now on completions raise `event`, which must live as long as the ring.
    pub fn raise(&self, event: &EventNotifier) -> io::Result<()> {
        let fd = event.as_fd().as_raw_fd();
        self.ring.borrow().submitter().register_eventfd(fd)
    }

    /// Queues a request.
    ///
    /// # Safety
    /// The entry's user data is a [`Pending`], and the memory that it names stays valid until that
    /// is completed.
    #[inline(always)]
    unsafe fn push(&self, entry: &Entry) {
        self.requests.set(self.requests.get() + 1);
        if self.held.get().is_some() {
            self.push_held();
        }
        if self.in_flight.get() >= self.limit {
            self.backlog.borrow_mut().push_back(entry.clone());
            return;
        }
        self.in_flight.set(self.in_flight.get() + 1);
        // SAFETY: the caller's promise is the one that is asked for.
        if unsafe { self.ring.borrow_mut().submission().push(entry) }.is_err() {
            // SAFETY: as above.
            unsafe { self.push_into_full(entry) };
        }
    }

    /// # Safety
    /// As for [`push`](Self::push).
    #[cold]
    #[inline(never)]
    unsafe fn push_into_full(&self, entry: &Entry) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.enter(0, None);
        // SAFETY: as for `push`.
        unsafe { self.push_now(entry) };
    }

    /// Queues an entry, or puts it at the end of the backlog.
    ///
    /// # Safety
    /// As for [`push`](Self::push); or the entry is the poll, which names no memory.
    unsafe fn push_now(&self, entry: &Entry) {
        // SAFETY: the caller's promise is the one that is asked for.
        match unsafe { self.ring.borrow_mut().submission().push(entry) } {
            Ok(()) if entry.get_user_data() != WATCH => {
                self.in_flight.set(self.in_flight.get() + 1)
            }
            Ok(()) => {}
            Err(_full) => self.backlog.borrow_mut().push_back(entry.clone()),
        }
    }

    /// Moves the backlog into the queue as far as there is space.
    #[cold]
    #[inline(never)]
    fn drain_backlog(&self) {
        let mut backlog = self.backlog.borrow_mut();
        let mut ring = self.ring.borrow_mut();
        while self.in_flight.get() < self.limit
            && let Some(entry) = backlog.front()
        {
            // SAFETY: whoever put it into the backlog made the promise that is asked for, and
            // waits.
            if unsafe { ring.submission().push(entry) }.is_err() {
                return;
            }
            if entry.get_user_data() != WATCH {
                self.in_flight.set(self.in_flight.get() + 1);
            }
            backlog.pop_front();
        }
    }

    /// Holds a read back if it is the first of its pass and nothing is in flight, else queues it.
    ///
    /// # Safety
    /// As for [`push`](Self::push).
    #[inline(always)]
    unsafe fn hold(&self, read: Held) {
        let alone = self.in_flight.get() == 0 && self.held.get().is_none();
        if alone && self.pause.get() == 0 {
            self.requests.set(self.requests.get() + 1);
            self.held.set(Some(read));
        } else {
            // SAFETY: the caller's promise is the one that is asked for.
            unsafe { self.push(&read.entry()) };
        }
    }

    /// It is not alone, or cannot be served at once: it goes into the queue.
    #[inline(never)]
    fn push_held(&self) {
        if let Some(held) = self.held.take() {
            // Counted when it was held; `push` counts too.
            self.requests.set(self.requests.get() - 1);
            // SAFETY: whoever held it made the promise that is asked for, and waits.
            unsafe { self.push(&held.entry()) };
        }
    }

    /// The pass ends and one read is held: serves it from the page cache, or queues it.
    #[inline(never)]
    fn serve_held(&self) {
        let Some(held) = self.held.get() else { return };
        // SAFETY: whoever held it promised that the memory may be written until its completion.
        let mut target = RawSegment {
            base: held.base,
            len: held.len as usize,
        };
        // SAFETY: the segment is the one of the read, whose frame waits; nobody else uses it.
        let mut buf = unsafe { IoVecMut::from_raw_parts(std::slice::from_mut(&mut target)) };
        // SAFETY: the descriptor was borrowed by the frame that waits, so it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(held.fd) };
        if let Ok(count) = read_at_nowait(fd, held.offset, &mut buf)
            && let Ok(count) = i32::try_from(count)
        {
            self.held.set(None);
            self.next_pause.set(*PAUSES.start());
            self.served.set(Some((held.data, count)));
        } else {
            // Not in the cache, or not possible for this file: the ring finds out what there is.
            self.pause.set(self.next_pause.get());
            self.next_pause
                .set((self.next_pause.get() * 2).min(*PAUSES.end()));
            self.push_held();
        }
    }

    /// Hands the queue to the kernel and waits for `want` completions.
    fn enter(&self, want: u32, timeout_ns: Option<u64>) {
        self.enters.set(self.enters.get() + 1);
        let (queued, deferred) = {
            let mut ring = self.ring.borrow_mut();
            let queue = ring.submission();
            (queue.len(), queue.taskrun() || queue.cq_overflow())
        };
        let queued = u32::try_from(queued).expect("at most the depth of the ring");
        if let Err(error) = self.fd.enter(queued, want, deferred, timeout_ns) {
            self.enter_failed(&error);
        }
    }

    #[cold]
    #[inline(never)]
    fn enter_failed(&self, error: &io::Error) {
        match error.raw_os_error() {
            // Time is up; a signal came: the loop looks what there is.
            Some(libc::ETIME | libc::EINTR) => {}
            // The kernel wants completions reaped, or is short of memory: the entries stay queued
            // and the next pass tries again.
            Some(libc::EBUSY | libc::EAGAIN) => std::thread::yield_now(),
            _ => panic!("io_uring_enter: {error}"),
        }
    }

    /// Hands queued requests to the kernel without waiting.
    pub fn submit(&self) {
        self.push_held();
        if !self.backlog.borrow().is_empty() {
            self.drain_backlog();
        }
        let queued = !self.ring.borrow_mut().submission().is_empty();
        if queued || self.must_enter() {
            self.enter(0, None);
        }
    }

    /// Does the kernel hold completions back until it is entered?
    fn must_enter(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        let queue = ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Is something to be completed without any wait?
    pub fn has_completions(&self) -> bool {
        // A held read is as good as complete: serving it does not wait.
        self.held.get().is_some()
            || !self.taken.borrow().is_empty()
            || !self.ring.borrow_mut().completion().is_empty()
    }

    /// Hands queued requests to the kernel and waits for a completion, or for the time-out.
    pub fn wait(&self, context: &AioContext, ready: &ReadyList, timeout_ns: Option<u64>) {
        if context.monitor.epoll().is_none() {
            return self.wait_beside(context, ready, timeout_ns);
        }
        let mut timeout_ns = timeout_ns;
        if !self.has_taskrun_flag {
            self.hot.set(true);
        }
        if self.hot.get() && self.read_set(context, ready) {
            timeout_ns = Some(0);
        }
        if self.held.get().is_some() {
            self.serve_held();
        }
        self.pause.set(self.pause.get().saturating_sub(1));
        if timeout_ns == Some(0) {
            self.submit();
        } else {
            if !self.backlog.borrow().is_empty() {
                self.drain_backlog();
            }
            self.enter(1, timeout_ns);
        }
        self.take_deferred();
    }

    /// Takes the completions that the kernel still holds back: with `DEFER_TASKRUN` it hands out at
    /// most 20 each time that it is entered (`IO_LOCAL_TW_DEFAULT_MAX`, since Linux 6.13). What a
    /// device finished together is taken together, because what the coroutines ask for next is then
    /// submitted together; in parts, reads with O_DIRECT cost a fifth more (docs/performance.md).
    fn take_deferred(&self) {
        // Each round has a completion, and nobody asks for more meanwhile.
        for _ in 0..self.in_flight.get() {
            if !self.must_enter() {
                return;
            }
            self.enter(0, None);
        }
    }

    /// The same where no set is watched by the ring: hands requests over, waits in poll(2) for the
    /// context's descriptors, and takes in what the kernel holds back.
    #[cold]
    #[inline(never)]
    fn wait_beside(&self, context: &AioContext, ready: &ReadyList, timeout_ns: Option<u64>) {
        self.hot.set(false);
        if self.held.get().is_some() {
            self.serve_held();
        }
        self.pause.set(self.pause.get().saturating_sub(1));
        self.submit();
        let timeout_ns = if self.served.get().is_some() || self.has_completions() {
            Some(0)
        } else {
            timeout_ns
        };
        let reported = collect(context, ready, timeout_ns);
        tolerate_signal(reported, Reported::NOTHING);
        self.submit();
    }

    /// Takes the reports of the epoll set; tells whether there were any.
    fn read_set(&self, context: &AioContext, ready: &ReadyList) -> bool {
        let nothing = Reported {
            count: 0,
            may_repeat: true,
        };
        let reported = tolerate_signal(collect(context, ready, Some(0)), nothing);
        self.hot.set(reported.may_repeat);
        reported.count > 0
    }

    /// The next completion; asks the processor for the memory of those after it. What waits has left
    /// its stack long ago, and with many in flight nothing of it is in the cache: first for the
    /// `IoWait`, a step later, when that is here, for the frames and the control block that it leads
    /// to.
    #[inline(always)]
    fn next_taken(&self) -> Option<Done> {
        let mut taken = self.taken.borrow_mut();
        let done = taken.pop_front()?;
        if let Some(next) = taken.front()
            && next.user_data() != WATCH
        {
            // SAFETY: user data other than that of the poll is that of a `Pending`, which is not
            // completed yet: only what `next_taken` has given out is.
            unsafe { Pending::prefetch_waiter(next.user_data()) };
        }
        if let Some(later) = taken.get(1) {
            Pending::prefetch(later.user_data());
        }
        Some(done)
    }

    /// Resumes the coroutines whose requests are complete; tells whether there was one.
    pub fn complete(&self, context: &AioContext, ready: &ReadyList) -> bool {
        let waiting = {
            let mut taken = self.taken.borrow_mut();
            taken.extend(self.ring.borrow_mut().completion());
            taken.len()
        };
        let mut progress = false;
        if let Some((data, result)) = self.served.take() {
            progress = true;
            // SAFETY: the user data of a held read is a `Pending`; it did not go into the ring, and
            // was taken out here.
            let pending = unsafe { Pending::from_user_data(data) };
            pending.complete(result);
        }
        for _ in 0..waiting {
            // One at a time: a coroutine that panics leaves the others where they are.
            let Some(done) = self.next_taken() else {
                break;
            };
            if done.user_data() == WATCH {
                self.hot.set(true);
                if done.flags() & MORE == 0 {
                    self.push_watch();
                }
                continue;
            }
            progress = true;
            self.in_flight.set(self.in_flight.get() - 1);
            // SAFETY: every other entry has the user data of a `Pending`, and the kernel gives it
            // back exactly once, since none is multishot.
            let pending = unsafe { Pending::from_user_data(done.user_data()) };
            pending.complete(done.result());
        }
        if self.hot.get() {
            self.read_set(context, ready);
        }
        progress
    }
}
