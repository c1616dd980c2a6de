//! A home for tests: a queue, and the thread that drives it.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use coblock_coroutine::{Departure, Ready, Schedule};

/// The simplest home there is. Belongs to the thread that made it, until another one adopts it.
pub struct TestHome {
    name: String,
    queue: Mutex<VecDeque<Ready>>,
    arrived: Condvar,
    driver: Mutex<ThreadId>,
}

impl TestHome {
    pub fn new(name: &str) -> Arc<TestHome> {
        Arc::new(TestHome {
            name: name.to_string(),
            queue: Mutex::default(),
            arrived: Condvar::new(),
            driver: Mutex::new(std::thread::current().id()),
        })
    }

    pub fn schedule_of(self: &Arc<Self>) -> Arc<dyn Schedule> {
        self.clone()
    }

    /// From now on the calling thread drives it.
    pub fn adopt(&self) {
        *self.driver.lock().unwrap() = std::thread::current().id();
    }

    pub fn pop(&self) -> Option<Ready> {
        self.queue.lock().unwrap().pop_front()
    }

    /// Enters what is scheduled now, and what that schedules; how many there were.
    pub fn run(&self) -> usize {
        let mut entered = 0;
        while let Some(ready) = self.pop() {
            ready.enter();
            entered += 1;
        }
        entered
    }

    /// Waits for something, at most a moment; then enters what is scheduled.
    pub fn turn(&self) {
        let mut queue = self.queue.lock().unwrap();
        if queue.is_empty() {
            queue = self
                .arrived
                .wait_timeout(queue, Duration::from_millis(20))
                .unwrap()
                .0;
        }
        drop(queue);
        self.run();
    }

    /// Drives until `done`, at most two minutes.
    pub fn drive_until(&self, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            if done() {
                return;
            }
            self.turn();
        }
        panic!(
            "home '{}' was driven for two minutes and its condition never came",
            self.name
        );
    }

    pub fn queued(&self) -> usize {
        self.queue.lock().unwrap().len()
    }
}

impl Schedule for TestHome {
    fn schedule(&self, ready: Ready) {
        self.queue.lock().unwrap().push_back(ready);
        self.arrived.notify_one();
    }
    fn is_home(&self) -> bool {
        *self.driver.lock().unwrap() == std::thread::current().id()
    }
    fn name(&self) -> &str {
        &self.name
    }
}

/// A home with its own thread, which also lets departures go.
pub struct Driven {
    pub home: Arc<TestHome>,
    pub departures: Arc<Mutex<Vec<Departure>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Driven {
    pub fn new(name: &str) -> Driven {
        let home = TestHome::new(name);
        let (departures, stop) = (
            Arc::new(Mutex::new(Vec::<Departure>::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let thread = {
            let (home, departures, stop) = (home.clone(), departures.clone(), stop.clone());
            std::thread::spawn(move || {
                home.adopt();
                home.drive_until(|| {
                    while let Some(departure) = { departures.lock().unwrap().pop() } {
                        departure.depart();
                    }
                    stop.load(Ordering::SeqCst)
                });
            })
        };
        while home.is_home() {
            std::thread::yield_now();
        }
        Driven {
            home,
            departures,
            stop,
            thread: Some(thread),
        }
    }

    pub fn id(&self) -> std::thread::ThreadId {
        self.thread.as_ref().unwrap().thread().id()
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Waits until `done`, at most a minute of rests.
pub fn until(done: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("it never came");
}

/// The message of a panic.
pub fn message(panic: &(dyn Any + Send)) -> String {
    if let Some(s) = panic.downcast_ref::<String>() {
        s.clone()
    } else if let Some(s) = panic.downcast_ref::<&str>() {
        (*s).to_string()
    } else {
        "not a message".to_string()
    }
}

/// Runs `f`, which must panic, and returns the message.
pub fn refused<R>(f: impl FnOnce() -> R) -> String {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(_) => panic!("this was not refused"),
        Err(panic) => message(&*panic),
    }
}

/// Runs this test binary again, with only the ignored-by-default child part of test `name`, and
/// returns its standard error and how it ended.
pub fn child(name: &str) -> (String, std::process::ExitStatus) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    (
        String::from_utf8_lossy(&output.stderr).into_owned(),
        output.status,
    )
}

pub const CHILD: &str = "COBLOCK_COROUTINE_TEST_CHILD";

/// Runs `body`, the whole of test `name`, in a process of its own.
///
/// For what looks at figures of the whole process (stacks between the threads, trimmed or mapped
/// ones): the other tests of a binary run in threads of the same process, and a thread that ends
/// gives its stacks to the others even after its test is over.
pub fn in_own_process(name: &str, body: impl FnOnce()) {
    const WHOLE: &str = "the whole test has run";
    if is_child(name) {
        body();
        eprintln!("{WHOLE}");
        return;
    }
    let (stderr, status) = child(name);
    assert!(
        status.success() && stderr.contains(WHOLE),
        "{status:?} {stderr}"
    );
}

/// Whether this process is the child that [`child`] started for test `name`.
pub fn is_child(name: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|child| child == name)
}
