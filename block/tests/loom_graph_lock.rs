//! Rules 7.2, 7.3, 7.5: the words of the graph lock under every interleaving, against an abstract
//! writer.
//!
//! Asymmetric fences are modelled as sequentially consistent ones on both sides, which is what a
//! barrier in every thread amounts to. Without them the model must fail, and a test shows that it
//! does.

#[path = "../src/graph_lock/protocol.rs"]
mod protocol;

/// What the protocol file finds under this path: loom's atomics.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    thread_local! {
        /// Loom runs all threads of a model on one thread of the system.
        pub(crate) static FENCES: std::cell::Cell<bool> = const { std::cell::Cell::new(true) };
    }

    pub(crate) fn light_fence() {
        if FENCES.get() {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    pub(crate) use light_fence as heavy_fence;
}

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex, Notify};
use loom::thread;
use protocol::{ReaderCount, WriterFlags, writer};

/// A graph lock with two contexts, and what it protects.
struct Model {
    flags: WriterFlags,
    counts: [ReaderCount; 2],
    /// The mutex of the readers' queue and of the orphans.
    queue: Mutex<u32>,
    woken: Condvar,
    kick: Notify,
    /// Loom fails when a reader and the writer are here at the same time.
    edges: UnsafeCell<u32>,
}

impl Model {
    fn new() -> Arc<Model> {
        Arc::new(Model {
            flags: WriterFlags::new(),
            counts: [ReaderCount::new(), ReaderCount::new()],
            queue: Mutex::new(0),
            woken: Condvar::new(),
            kick: Notify::new(),
            edges: UnsafeCell::new(0),
        })
    }

    /// As `GraphLock::read`.
    fn enter(&self, context: usize) {
        while !protocol::enter(&self.counts[context], &self.flags) {
            let mut queue = self.queue.lock().unwrap();
            if !self.flags.owned() {
                return;
            }
            if protocol::leave(&self.counts[context], &self.flags) {
                self.kick.notify();
            }
            while self.flags.owned() {
                queue = self.woken.wait(queue).unwrap();
            }
        }
    }

    fn look(&self) {
        // SAFETY: the lock is held for reading, which is what the model is about: loom reports a
        // writer here.
        self.edges.with(|edges| unsafe { *edges });
    }

    fn leave(&self, context: usize) {
        if protocol::leave(&self.counts[context], &self.flags) {
            self.kick.notify();
        }
    }

    /// As rule 7.5: waits with readers admitted, sets the flag, sums again.
    fn write(&self) {
        writer::announce(&self.flags);
        loop {
            // Readers come and go, contexts die: the scan is a hint, and may be low.
            loop {
                let orphans = self.queue.lock().unwrap();
                if writer::looks_free(protocol::sum(self.counts.iter(), *orphans)) {
                    break;
                }
                drop(orphans);
                self.kick.wait();
            }
            let orphans = self.queue.lock().unwrap();
            if writer::try_own(&self.flags, self.counts.iter(), *orphans) {
                break;
            }
            drop(orphans);
            self.woken.notify_all();
        }
        writer::retract(&self.flags);
        // SAFETY: the lock is held for writing, as above.
        self.edges.with_mut(|edges| unsafe { *edges += 1 });
        {
            let _queue = self.queue.lock().unwrap();
            writer::release(&self.flags);
        }
        self.woken.notify_all();
    }
}

/// Bounded: with any number of preemptions a reader and a writer may step back before each other
/// for ever.
fn bounded() -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder
}

/// What one reader does while a writer writes; both have ended then.
fn beside_a_writer(reads: fn(&Arc<Model>)) -> Arc<Model> {
    let model = Model::new();
    let reader = {
        let model = model.clone();
        thread::spawn(move || reads(&model))
    };
    model.write();
    reader.join().unwrap();
    model
}

fn a_read(model: &Arc<Model>) {
    model.enter(0);
    model.look();
    model.leave(0);
}

fn reader_against_writer() {
    beside_a_writer(a_read);
}

/// Rules 7.2, 7.3: one reader, one writer: never together, and neither waits for ever.
#[test]
fn a_reader_and_a_writer_exclude_each_other() {
    bounded().check(reader_against_writer);
}

/// Two readers in two contexts against a writer.
#[test]
fn two_readers_and_a_writer() {
    bounded().check(|| {
        let model = Model::new();
        let readers: Vec<_> = (0..2)
            .map(|context| {
                let model = model.clone();
                thread::spawn(move || {
                    model.enter(context);
                    model.look();
                    model.leave(context);
                })
            })
            .collect();
        model.write();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

/// Rule 7.3: a reader that enters in one context and leaves in another is counted all the time.
#[test]
fn a_reader_that_moves() {
    bounded().check(|| {
        beside_a_writer(|model| {
            model.enter(0);
            model.look();
            let there = model.clone();
            let moved = thread::spawn(move || {
                there.look();
                there.leave(1);
            });
            moved.join().unwrap();
        });
    });
}

/// Rule 7.5: readers that arrive one after the other do not keep a writer out for ever, and it does
/// not lose one of them.
#[test]
fn readers_one_after_the_other_against_a_writer() {
    bounded().check(|| {
        beside_a_writer(|model| {
            a_read(model);
            a_read(model);
        });
    });
}

/// Rule 7.4: a context dies, and a reader that came in there still reads in another.
#[test]
fn a_context_that_dies_with_readers() {
    bounded().check(|| {
        let model = beside_a_writer(|model| {
            model.enter(0);
            model.look();
            // It moves; its first context ends, and a new one takes the slot.
            let mut orphans = model.queue.lock().unwrap();
            *orphans = orphans.wrapping_add(model.counts[0].retire());
            drop(orphans);
            model.look();
            model.leave(1);
        });
        let orphans = *model.queue.lock().unwrap();
        assert_eq!(protocol::sum(model.counts.iter(), orphans), 0);
    });
}

/// The model sees what it is for: without the fences a reader meets the writer.
#[test]
#[should_panic(expected = "Causality violation")]
fn without_fences_the_model_fails() {
    sync::FENCES.set(false);
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            sync::FENCES.set(true);
        }
    }
    let _restore = Restore;
    bounded().check(reader_against_writer);
}
