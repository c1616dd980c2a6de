//! Writes through the page cache: a thread of the pool does those of one file one after another.
//!
//! The kernel takes one such write of a file at a time, and most file systems take none without
//! blocking, so the ring gives each to a worker of the kernel and wakes the loop for each
//! completion. Where several are in flight, a thread takes all that wait instead, and tells the
//! loop of several at once (decision 35, docs/performance.md).
//!
//! ```text
//!   home                           lane of the file           thread of the pool
//!   write  --- LentWrite --------> waiting  ----------------> takes all of them
//!          first one: a job                                   writes them in order
//!   resume <-- list of work <-------------------------------- posts up to eight, notifies once
//! ```

use crate::buf::IoVec;
use crate::context::AioContext;
use crate::current::with_core;
use crate::engine::{Engine, uring};
use crate::sys::pending::{LentWrite, Pending, lend_write};
use crate::thread_pool::{Job, Lasting};
use coblock_coroutine::{Co, ThreadLock};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

/// Most completions that wait for each other.
const TOGETHER: usize = 8;

/// From how many others in flight on a write goes to a thread; fewer are cheaper in the ring.
const FROM: u32 = 3;

/// The buffered writes of one home.
#[derive(Default)]
pub(crate) struct Lanes {
    /// Never gets shorter; as many as files were written to at the same time.
    slots: RefCell<Vec<Slot>>,
    /// In lanes and in the ring.
    in_flight: Cell<u32>,
}

/// A lane, and the file whose writes it takes until it has nothing to do and another file asks.
struct Slot {
    fd: RawFd,
    in_flight: u32,
    lane: Arc<Lane>,
}

impl Lanes {
    /// The lane of a file, for one write more: its own, or one that has nothing to do.
    fn enter(&self, fd: RawFd, context: &Arc<AioContext>) -> (usize, Arc<Lane>) {
        let mut slots = self.slots.borrow_mut();
        let own = slots.iter().position(|slot| slot.fd == fd);
        let index = own.or_else(|| slots.iter().position(|slot| slot.in_flight == 0));
        let index = index.unwrap_or_else(|| {
            slots.push(Slot {
                fd,
                in_flight: 0,
                lane: Arc::new(Lane::new(context.clone())),
            });
            slots.len() - 1
        });
        let slot = &mut slots[index];
        slot.fd = fd;
        slot.in_flight += 1;
        (index, slot.lane.clone())
    }

    fn leave(&self, index: usize) {
        self.slots.borrow_mut()[index].in_flight -= 1;
    }
}

/// Writes that are done one after another.
struct Lane {
    context: Arc<AioContext>,
    state: ThreadLock<State>,
}

#[derive(Default)]
struct State {
    waiting: Vec<LentWrite>,
    /// A thread does them, or will.
    has_job: bool,
    /// Lists of the thread, kept for the next one: nothing is allocated for each batch.
    spare: Option<Lists>,
}

#[derive(Default)]
struct Lists {
    writes: Vec<LentWrite>,
    done: Vec<(Pending, i32)>,
}

impl Lane {
    fn new(context: Arc<AioContext>) -> Self {
        Lane {
            context,
            state: ThreadLock::default(),
        }
    }

    fn push(self: &Arc<Self>, write: LentWrite) {
        let mut state = self.state.lock();
        state.waiting.push(write);
        let first = !std::mem::replace(&mut state.has_job, true);
        drop(state);
        if first {
            self.context.pool().submit(Job::lasting(self.clone()));
        }
    }

    /// Takes what waits; the lists are given back when that is nothing, and the job is done.
    fn take(&self, mut lists: Lists) -> Option<Lists> {
        let mut state = self.state.lock();
        std::mem::swap(&mut state.waiting, &mut lists.writes);
        state.has_job = !lists.writes.is_empty();
        if state.has_job {
            Some(lists)
        } else {
            state.spare = Some(lists);
            None
        }
    }

    /// Does all that waits with `write`, and posts the results, at most [`TOGETHER`] at a time.
    fn finish(&self, write: impl Fn(LentWrite) -> (Pending, i32)) {
        let mut lists = self.state.lock().spare.take().unwrap_or_default();
        while let Some(Lists {
            mut writes,
            mut done,
        }) = self.take(lists)
        {
            // The loop has something to do while the rest is written.
            let part = writes.len().div_ceil(2).min(TOGETHER);
            for one in writes.drain(..) {
                done.push(write(one));
                if done.len() == part {
                    self.context.post_completions(done.drain(..));
                }
            }
            self.context.post_completions(done.drain(..));
            lists = Lists { writes, done };
        }
    }
}

impl Lasting for Lane {
    fn run(&self) {
        self.finish(LentWrite::run);
    }

    /// Who waits must hear of that.
    fn dropped(&self) {
        self.finish(LentWrite::refuse);
    }
}

/// Where a write goes.
enum Way {
    Ring,
    Lane(usize, Arc<Lane>),
}

/// One attempt to write; `None`: the current context has no engine for it.
#[inline(never)]
pub(crate) fn write(co: &Co, fd: BorrowedFd<'_>, offset: u64, buf: IoVec<'_>) -> Option<i32> {
    let way = with_core(|core| {
        let core = core.expect("I/O outside of every context: a coroutine of a home does I/O");
        let lanes = &core.lanes;
        let few = lanes.in_flight.get() < FROM;
        let way = match core.engine {
            Engine::None => return None,
            Engine::Uring(_) if few => Way::Ring,
            Engine::Uring(_) | Engine::Threads => {
                let (index, lane) = lanes.enter(fd.as_raw_fd(), &core.context);
                Way::Lane(index, lane)
            }
        };
        lanes.in_flight.set(lanes.in_flight.get() + 1);
        Some(way)
    })?;
    let (lane, result) = match way {
        Way::Ring => (None, uring::write(co, fd, offset, buf)),
        Way::Lane(index, lane) => {
            let result = lend_write(co, fd, offset, buf, |write| lane.push(write));
            (Some(index), Some(result))
        }
    };
    with_core(|core| {
        let core = core.expect("a coroutine goes on where it waited");
        core.lanes.in_flight.set(core.lanes.in_flight.get() - 1);
        if let Some(index) = lane {
            core.lanes.leave(index);
        }
    });
    result
}
