//! A small scheduler: a home is a queue and somebody who empties it. Three tasks share a mutex that
//! suspends, and take turns.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use coblock_coroutine::{CoMutex, Error, Ready, Schedule, dump, start};

struct Scheduler {
    queue: Mutex<VecDeque<Ready>>,
    driver: ThreadId,
}

impl Schedule for Scheduler {
    fn schedule(&self, ready: Ready) {
        self.queue.lock().expect("no panics").push_back(ready);
    }
    fn is_home(&self) -> bool {
        self.driver == std::thread::current().id()
    }
    fn name(&self) -> &str {
        "scheduler"
    }
}

fn main() -> Result<(), Error> {
    let scheduler = Arc::new(Scheduler {
        queue: Mutex::default(),
        driver: std::thread::current().id(),
    });
    let home: Arc<dyn Schedule> = scheduler.clone();
    let log: Rc<CoMutex<Vec<String>>> = Rc::new(CoMutex::new(Vec::new()));
    let order: Rc<RefCell<Vec<u32>>> = Rc::default();
    for task in 0..3 {
        let (log, order) = (log.clone(), order.clone());
        start(&home, "task", move |co| {
            for step in 0..2 {
                let mut log = log.lock(co);
                // To the back of the queue, with the lock held: the others wait in order.
                co.wake_handle().schedule();
                co.suspend();
                log.push(format!("task {task}, step {step}"));
                order.borrow_mut().push(task);
            }
        })?;
    }
    println!("{}", dump(false));
    while let Some(ready) = { scheduler.queue.lock().expect("no panics").pop_front() } {
        ready.enter();
    }
    println!("{:?}", order.borrow());
    assert_eq!(*order.borrow(), [0, 1, 2, 0, 1, 2]);
    Ok(())
}
