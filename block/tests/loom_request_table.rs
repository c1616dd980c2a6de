//! Rule 5.7: requests against somebody who closes the table, under every interleaving.
//!
//! Asymmetric fences are modelled as sequentially consistent ones on both sides. Without them the
//! model must fail.

#[allow(dead_code, reason = "the model has no serialising requests")]
#[path = "../src/request_table/protocol.rs"]
mod protocol;

/// What the protocol file finds under this path: loom's atomics.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};

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
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;
use protocol::{Live, Special, Waiters};

/// A table with two rows, and the driver that it protects from being closed under a request.
struct Model {
    rows: [Live; 2],
    special: Special,
    waiters: Waiters,
    /// The list of waits, with room for one.
    asleep: Mutex<bool>,
    wake: Notify,
    /// Loom fails when a request and the closing are here at the same time.
    driver: UnsafeCell<u32>,
}

impl Model {
    fn new() -> Arc<Model> {
        Arc::new(Model {
            rows: [Live::new(), Live::new()],
            special: Special::new(),
            waiters: Waiters::new(),
            asleep: Mutex::new(false),
            wake: Notify::new(),
            driver: UnsafeCell::new(0),
        })
    }

    /// As `Node::pread`: begins, asks whether the table is plain, ends.
    fn request(&self, row: usize) {
        let live = &self.rows[row];
        let place = live.free();
        live.publish(place);
        if self.special.is_plain() {
            // SAFETY: the request is counted and the table open, which is what the model is about:
            // loom reports a closing here.
            self.driver.with(|driver| unsafe { *driver });
        } else {
            assert!(self.special.is_closed());
        }
        if live.retire(place, &self.waiters) && std::mem::take(&mut *self.asleep.lock().unwrap()) {
            self.wake.notify();
        }
    }

    /// As `Node::close`: refuses, waits until idle, closes the driver.
    fn close(&self) {
        assert!(self.special.close());
        self.waiters.announce();
        loop {
            {
                let mut asleep = self.asleep.lock().unwrap();
                if self.rows.iter().all(|row| row.get() == 0) {
                    break;
                }
                *asleep = true;
            }
            self.wake.wait();
        }
        self.waiters.leave();
        // SAFETY: nothing is in flight and nothing can begin, as above.
        self.driver.with_mut(|driver| unsafe { *driver += 1 });
    }
}

fn requests_and_a_close(requests: usize) {
    let model = Model::new();
    let threads: Vec<_> = (0..requests)
        .map(|row| {
            let model = model.clone();
            thread::spawn(move || model.request(row))
        })
        .collect();
    model.close();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Rule 5.7: a request either finds the table closed, or is waited for; and the wait ends.
#[test]
fn closed_or_counted() {
    loom::model(|| requests_and_a_close(1));
}

/// The same with requests of two contexts.
#[test]
fn closed_or_counted_in_two_contexts() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| requests_and_a_close(2));
}

/// The model sees what it is for: without the fences the driver is closed under a request, or
/// nobody wakes.
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
    loom::model(|| requests_and_a_close(1));
}
