//! Requests without a pause, from coroutines on threads of their own.

use super::World;
use coblock_aio::{AioContext, ContextOptions, EngineKind, IoThread};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A thread with a context.
pub fn io_thread(name: impl Into<String>, engine: EngineKind) -> IoThread {
    IoThread::new(ContextOptions {
        engine,
        ..ContextOptions::named(name)
    })
    .unwrap()
}

/// Threads, and what goes on there. Dropped by a test that fails, it lets the threads go.
pub struct Load {
    threads: Vec<IoThread>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    panicked: AtomicBool,
    /// Coroutines that have not ended.
    left: AtomicUsize,
    rounds: AtomicU64,
}

/// A coroutine, until it ends in any way.
struct Alive(Arc<State>);

impl Drop for Alive {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Ordering::Relaxed);
        }
        self.0.left.fetch_sub(1, Ordering::Release);
    }
}

impl Load {
    /// So many threads, without any load yet.
    pub fn new(threads: usize, engine: EngineKind) -> Load {
        let threads = (0..threads).map(|n| io_thread(format!("io {n}"), engine));
        Load {
            threads: threads.collect(),
            state: Arc::default(),
        }
    }

    /// Starts a coroutine on the `n`th thread, counted round and round. It calls `round` with 0, 1, 2
    /// and so on until the load is stopped.
    pub fn start(&self, n: usize, mut round: impl FnMut(&Co, u64) + Send + 'static) {
        self.state.left.fetch_add(1, Ordering::Relaxed);
        let alive = Alive(self.state.clone());
        let body = move |co: &Co| {
            let state = &alive.0;
            for number in 0.. {
                if state.stop.load(Ordering::Relaxed) {
                    break;
                }
                round(co, number);
                state.rounds.fetch_add(1, Ordering::Relaxed);
                coblock_aio::co::reschedule(co);
            }
        };
        let context = self.threads[n % self.threads.len()].context();
        context.spawn("load", body).unwrap();
    }

    /// Rounds that all coroutines together have ended.
    pub fn rounds(&self) -> u64 {
        self.state.rounds.load(Ordering::Relaxed)
    }

    /// Has one of them panicked? The end of the load tells how.
    pub fn has_failed(&self) -> bool {
        self.state.panicked.load(Ordering::Relaxed)
    }

    /// Polls until so many rounds more have ended, or one has panicked.
    pub fn goes_on(&self, world: &World, rounds: u64) {
        let enough = self.rounds() + rounds;
        while self.rounds() < enough && !self.has_failed() {
            world.home.poll(false);
            std::thread::yield_now();
        }
    }

    /// The threads' contexts.
    pub fn contexts(&self) -> impl Iterator<Item = &Arc<AioContext>> {
        self.threads.iter().map(IoThread::context)
    }

    /// Lets every coroutine end its round, and waits for all.
    pub fn stop(&self, world: &World) {
        self.state.stop.store(true, Ordering::Relaxed);
        while self.state.left.load(Ordering::Acquire) > 0 && !self.has_failed() {
            world.home.poll(false);
            std::thread::yield_now();
        }
    }

    /// The same, and the threads end: with the panic of a coroutine, if one had one.
    pub fn end(mut self, world: &World) {
        self.stop(world);
        for thread in self.threads.drain(..) {
            thread.stop();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
    }
}
