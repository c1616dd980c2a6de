//! A thread that drives one context for its whole life.

use crate::context::{AioContext, ContextOptions};
use crate::home::Home;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long coroutines may take to end before the log names what a stopping thread waits for.
const PATIENCE: Duration = Duration::from_secs(5);

/// A thread and its context.
#[derive(Debug)]
pub struct IoThread {
    context: Arc<AioContext>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread named like the context, which polls from now on.
    ///
    /// # Errors
    /// Those of [`Home::new`]; when no thread is to be had.
    pub fn new(options: ContextOptions) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, hear) = mpsc::sync_channel(1);
        let seen = stop.clone();
        let thread = thread::Builder::new()
            .name(options.name.clone())
            .spawn(move || {
                let home = match Home::new(options) {
                    Ok(home) => home,
                    Err(error) => return told.send(Err(error)).expect("the maker waits"),
                };
                told.send(Ok(home.context().clone()))
                    .expect("the maker waits");
                drop(told);
                drive(&home, &seen);
                home.close();
            })?;
        match hear.recv().map_err(io::Error::other)? {
            Ok(context) => Ok(IoThread {
                context,
                stop,
                thread: Some(thread),
            }),
            Err(error) => {
                thread.join().expect("it has only failed to make a context");
                Err(error)
            }
        }
    }

    /// The part that any thread may use. It may be kept longer than the thread lives.
    pub fn context(&self) -> &Arc<AioContext> {
        &self.context
    }

    /// Ends the thread when its coroutines have ended, and waits for that. Dropping does the same.
    ///
    /// # Panics
    /// With the panic of the thread; when something of rule 3.3 was left in the context.
    pub fn stop(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.stop.store(true, Ordering::Release);
        self.context.notify();
        match thread.join() {
            Ok(()) => {}
            // A second panic would abort before the first is reported.
            Err(_) if thread::panicking() => {}
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

fn drive(home: &Home, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        home.poll(true);
    }
    let context = home.context();
    let complain = context.timer("stopping", {
        let weak = Arc::downgrade(context);
        move || {
            if let Some(context) = weak.upgrade() {
                log::warn!("waiting for the coroutines of a thread that stops: {context:?}");
            }
        }
    });
    complain.arm_in(PATIENCE);
    while context.live_coroutines() > 0 {
        home.poll(true);
    }
}
