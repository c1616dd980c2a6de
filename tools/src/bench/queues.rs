//! Several loads on one image at the same time, each in a thread that drives a loop of its own.
//!
//! ```text
//!   main thread    polls the main context: what its nodes' timers and sections need
//!   queue 0..N     a context each; requests to the one backend; blocks are claimed in the shared ledger
//! ```

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use coblock::aio::{AioContext, ContextOptions, Home};
use coblock::coroutine::{self, Stats};

use super::cli::Config;
use super::load::{self, Outcome, Target};
use crate::output::os_message;

/// How often the main thread looks how far the queues are.
const TICK: Duration = Duration::from_millis(100);

/// What one queue did.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    /// Completed requests.
    pub requests: u64,
    /// From its first request to its last completion.
    pub elapsed: Duration,
    /// What the coroutines of its thread did.
    pub coroutines: Stats,
}

/// Requests of one queue so far: on a cache line of its own, because its queue writes it.
#[derive(Default)]
#[repr(align(128))]
struct Done(AtomicU64);

/// Counts a queue as running until it ends, however that is.
struct Running<'a> {
    count: &'a AtomicUsize,
    main: &'a AioContext,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Release);
        self.main.notify();
    }
}

/// Runs `count` loads at once, whose blocks and requests are those of `target`, while `main` is
/// driven; what all of them did, and what each did.
///
/// # Errors
/// A queue could not set up its loop or its buffers.
pub fn run(
    config: &Config,
    main: &Home,
    target: &Target<'_>,
    count: usize,
    mut progress: impl FnMut(Duration, u64),
) -> Result<(Outcome, Vec<Queue>), String> {
    let main_context = main.context();
    let kind = config.engine.kind();
    let began = Instant::now();
    let done: Vec<Done> = (0..count).map(|_| Done::default()).collect();
    let running = AtomicUsize::new(count);
    let start = Barrier::new(count);
    let queue = |index: usize| {
        let _running = Running {
            count: &running,
            main: main_context,
        };
        let options = ContextOptions {
            engine: kind,
            ..ContextOptions::named(format!("queue {index}"))
        };
        let home = Home::new(options);
        // Even one that failed: the others wait for it.
        start.wait();
        let home = home.map_err(|error| format!("queue {index}: {}", os_message(&error)))?;
        let mine = Target {
            queue: index,
            requests: target.requests.map(|all| share(all, count, index)),
            ..target.clone()
        };
        let done = &done[index].0;
        let outcome = load::run(config, &home, mine, |_, so_far| {
            done.store(so_far, Ordering::Relaxed);
        });
        home.close();
        outcome.map(|outcome| (outcome, coroutine::stats()))
    };
    let outcomes = std::thread::scope(|scope| {
        let queue = &queue;
        let threads: Vec<_> = (0..count)
            .map(|index| scope.spawn(move || queue(index)))
            .collect();
        let tick = main_context.timer("bench: progress", || {});
        while running.load(Ordering::Acquire) > 0 {
            tick.arm_in(TICK);
            main.poll(true);
            let so_far = done.iter().map(|done| done.0.load(Ordering::Relaxed));
            progress(began.elapsed(), so_far.sum());
        }
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect::<Result<Vec<_>, String>>()
    })?;
    let mut all = Outcome::default();
    let mut queues = Vec::new();
    for (outcome, coroutines) in outcomes {
        queues.push(Queue {
            requests: outcome.requests(),
            elapsed: outcome.elapsed,
            coroutines,
        });
        all.add(outcome);
    }
    Ok((all, queues))
}

/// The part of `all` requests that one queue sends.
fn share(all: u64, count: usize, index: usize) -> u64 {
    let (count, index) = (count as u64, index as u64);
    all / count + u64::from(index < all % count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        for (all, count) in [(10, 1), (10, 3), (2, 4), (0, 2)] {
            let sum: u64 = (0..count).map(|index| share(all, count, index)).sum();
            assert_eq!(sum, all, "{all} over {count}");
        }
    }
}
