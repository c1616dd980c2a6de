//! Timers of a context (rule 3.7).
//!
//! A context has one list per clock: its own clock's, and one for each other clock that a timer was
//! made for. A list is sorted by time, then by the order of arming. The earliest time of a list is
//! also in an atomic: a loop without armed timers takes no lock and reads no clock.
//!
//! An entry is removed before its callback runs. Each arming has a running number, and a pass fires
//! only those armed before it began: what a callback arms again runs in a later pass, even when its
//! time has come already.

use crate::clock::Clock;
use crate::context::AioContext;
use crate::sys::pending::Pending;
use coblock_coroutine::ThreadLock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// No timer is armed.
pub(crate) const NEVER: u64 = u64::MAX;

/// Time, then number of the arming.
type Key = (u64, u64);

enum Action {
    Call(Arc<Inner>),
    Resume(Pending),
    Once(Box<dyn FnOnce() + Send>),
}

struct Inner {
    name: &'static str,
    callback: Box<dyn Fn() + Send + Sync>,
    /// Its key in the queue; only touched under the queue's lock.
    armed: ThreadLock<Option<Key>>,
}

/// The armed timers of one clock.
pub(crate) struct TimerList {
    clock: Clock,
    /// Time of the first entry, or [`NEVER`]. Written under the lock.
    earliest: AtomicU64,
    queue: ThreadLock<Queue>,
}

#[derive(Default)]
struct Queue {
    entries: BTreeMap<Key, Action>,
    next_number: u64,
}

impl TimerList {
    fn new(clock: Clock) -> Self {
        TimerList {
            clock,
            earliest: AtomicU64::new(NEVER),
            queue: ThreadLock::new(Queue::default()),
        }
    }

    fn publish_earliest(&self, queue: &Queue) {
        let first = queue
            .entries
            .first_key_value()
            .map_or(NEVER, |(key, _)| key.0);
        self.earliest.store(first, Ordering::Release);
    }

    /// Inserts; `true`: it is the earliest now.
    fn insert(&self, queue: &mut Queue, at_ns: u64, action: Action) -> (Key, bool) {
        let key = (at_ns, queue.next_number);
        queue.next_number += 1;
        queue.entries.insert(key, action);
        let is_first = queue
            .entries
            .first_key_value()
            .is_some_and(|(first, _)| *first == key);
        self.publish_earliest(queue);
        (key, is_first)
    }

    fn arm(&self, inner: &Arc<Inner>, at_ns: u64) -> bool {
        // `NEVER` itself is not a time: such a timer fires after 584 years all the same.
        let at_ns = at_ns.min(NEVER - 1);
        let mut queue = self.queue.lock();
        let mut armed = inner.armed.lock();
        if let Some(old) = armed.take() {
            queue.entries.remove(&old);
        }
        let (key, is_first) = self.insert(&mut queue, at_ns, Action::Call(inner.clone()));
        *armed = Some(key);
        is_first
    }

    fn disarm(&self, inner: &Inner) -> bool {
        let mut queue = self.queue.lock();
        let removed = inner
            .armed
            .lock()
            .take()
            .and_then(|key| queue.entries.remove(&key));
        self.publish_earliest(&queue);
        // The entry may hold the last reference to the callback, whose drop is other people's code.
        drop(queue);
        removed.is_some()
    }

    fn fire(&self) -> bool {
        if self.earliest.load(Ordering::Acquire) == NEVER {
            return false;
        }
        let now = self.clock.now_ns();
        let limit = self.queue.lock().next_number;
        let mut fired = false;
        while let Some(action) = self.take_due(now, limit) {
            fired = true;
            match action {
                Action::Call(inner) => (inner.callback)(),
                Action::Resume(pending) => pending.complete(0),
                Action::Once(call) => call(),
            }
        }
        fired
    }

    fn take_due(&self, now: u64, limit: u64) -> Option<Action> {
        let mut queue = self.queue.lock();
        let due = queue.entries.keys().take_while(|key| key.0 <= now);
        let key = *due.into_iter().find(|key| key.1 < limit)?;
        let action = queue.entries.remove(&key)?;
        if let Action::Call(inner) = &action {
            *inner.armed.lock() = None;
        }
        self.publish_earliest(&queue);
        Some(action)
    }
}

/// All timers of a context. Any thread, except [`fire`](Self::fire) and
/// [`arm_wait`](Self::arm_wait): home.
pub(crate) struct Timers {
    own: Arc<TimerList>,
    others: ThreadLock<Vec<Arc<TimerList>>>,
    has_others: AtomicBool,
}

impl Timers {
    pub fn new(clock: Clock) -> Self {
        Timers {
            own: Arc::new(TimerList::new(clock)),
            others: ThreadLock::new(Vec::new()),
            has_others: AtomicBool::new(false),
        }
    }

    /// The list for `clock`; a clock that was not known is added.
    pub fn list(&self, context: &Arc<AioContext>, clock: &Clock) -> Arc<TimerList> {
        if let Clock::Virtual(clock) = clock {
            clock.register(context);
        }
        if self.own.clock.is_same(clock) {
            return self.own.clone();
        }
        let mut others = self.others.lock();
        if let Some(list) = others.iter().find(|list| list.clock.is_same(clock)) {
            return list.clone();
        }
        let list = Arc::new(TimerList::new(clock.clone()));
        others.push(list.clone());
        self.has_others.store(true, Ordering::Release);
        list
    }

    /// Resumes a waiting operation at `at_ns` of the context's own clock.
    pub fn arm_wait(&self, at_ns: u64, pending: Pending) {
        let mut queue = self.own.queue.lock();
        self.own
            .insert(&mut queue, at_ns.min(NEVER - 1), Action::Resume(pending));
    }

    /// Calls `f` once at `at_ns` of the context's own clock.
    pub fn arm_once(&self, at_ns: u64, f: impl FnOnce() + Send + 'static) {
        let mut queue = self.own.queue.lock();
        self.own
            .insert(&mut queue, at_ns.min(NEVER - 1), Action::Once(Box::new(f)));
    }

    fn other_lists(&self) -> Vec<Arc<TimerList>> {
        if self.has_others.load(Ordering::Acquire) {
            self.others.lock().clone()
        } else {
            vec![]
        }
    }

    /// Runs what is due and was armed before; tells whether something ran.
    pub fn fire(&self) -> bool {
        let mut fired = self.own.fire();
        for list in self.other_lists() {
            fired |= list.fire();
        }
        fired
    }

    /// How long a loop may wait, in real nanoseconds; `None`: no timer ends the wait by itself. A
    /// virtual clock that moves notifies.
    pub fn timeout_ns(&self) -> Option<u64> {
        let wait_of = |list: &TimerList| {
            let earliest = list.earliest.load(Ordering::Acquire);
            if earliest == NEVER {
                return None;
            }
            let left = earliest.saturating_sub(list.clock.now_ns());
            match list.clock {
                Clock::Virtual(_) if left > 0 => None,
                _ => Some(left),
            }
        };
        let others = self.other_lists();
        let waits = others.iter().filter_map(|list| wait_of(list));
        wait_of(&self.own).into_iter().chain(waits).min()
    }

    /// Time of the earliest timer of the context's own clock.
    pub fn deadline_ns(&self) -> Option<u64> {
        Some(self.own.earliest.load(Ordering::Acquire)).filter(|at| *at != NEVER)
    }

    /// Names of the armed ones, for a refusal.
    pub fn armed(&self) -> Vec<String> {
        let mut names = Vec::new();
        for list in std::iter::once(self.own.clone()).chain(self.other_lists()) {
            for action in list.queue.lock().entries.values() {
                names.push(match action {
                    Action::Call(inner) => format!("timer '{}'", inner.name),
                    Action::Resume(_) => "sleeping coroutine".to_owned(),
                    Action::Once(_) => "one-shot timer".to_owned(),
                });
            }
        }
        names
    }
}

/// A callback of a context at a time (rule 3.7).
///
/// All methods from any thread; times are those of the clock that it was made with. Dropping it
/// disarms it. A callback that already started goes on.
pub struct Timer {
    inner: Arc<Inner>,
    list: Arc<TimerList>,
    context: Arc<AioContext>,
}

impl Timer {
    pub(crate) fn new(
        context: &Arc<AioContext>,
        list: Arc<TimerList>,
        name: &'static str,
        callback: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let inner = Arc::new(Inner {
            name,
            callback,
            armed: ThreadLock::new(None),
        });
        Timer {
            inner,
            list,
            context: context.clone(),
        }
    }

    /// Fires once at `at_ns`; a time that has passed means the next pass. Replaces an earlier
    /// arming.
    pub fn arm_at(&self, at_ns: u64) {
        if self.list.arm(&self.inner, at_ns) {
            self.context.kick_if_waiting();
        }
    }

    /// Fires once after `delay` from now.
    pub fn arm_in(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.arm_at(self.list.clock.now_ns().saturating_add(delay));
    }

    /// Does not fire; tells whether it was armed.
    pub fn disarm(&self) -> bool {
        self.list.disarm(&self.inner)
    }

    /// When it fires, if it is armed.
    pub fn deadline_ns(&self) -> Option<u64> {
        let _queue = self.list.queue.lock();
        self.inner.armed.lock().map(|key| key.0)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Timer('{}' at {:?})",
            self.inner.name,
            self.deadline_ns()
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::{ContextOptions, EngineKind, Home};
    use std::time::Duration;

    /// Rule 3.7: only a timer that is armed elsewhere wakes the loop. One that the home's thread arms
    /// between two polls once made the next blocking one return at once.
    #[test]
    fn armed_by_the_thread_of_the_home_between_polls() {
        let options = |name: &str| ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named(name)
        };
        let (home, another) = (Home::new(options("a")), Home::new(options("b")));
        let (home, another) = (home.expect("a context"), another.expect("a context"));
        let context = home.context();
        let timer = context.timer("test", || {});
        let may_sleep = || {
            let may = context.notify.announce();
            context.notify.accept();
            may
        };
        timer.arm_in(Duration::from_secs(3600));
        assert!(may_sleep(), "between polls");
        home.with(|| timer.arm_in(Duration::from_secs(3000)));
        assert!(may_sleep(), "at home");
        another.with(|| timer.arm_in(Duration::from_secs(2000)));
        assert!(!may_sleep(), "in a pass of another home of the thread");
        assert_ne!(home.timeout_ns(), Some(0));
        timer.arm_in(Duration::from_secs(1500));
        assert!(
            !may_sleep(),
            "a loop of somebody else was told a longer time"
        );
        std::thread::scope(|scope| {
            scope.spawn(|| timer.arm_in(Duration::from_secs(1000)));
        });
        assert!(!may_sleep(), "on another thread");
        drop(timer);
        another.close();
        home.close();
    }
}
