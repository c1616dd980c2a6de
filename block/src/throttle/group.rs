//! A group of members that share limits, and the requests that wait (rule 8.1).
//!
//! Everything is under one thread lock, held for a few statements. A direction in which somebody
//! waits has one armed timer, in the context of the request that is next; when it fires, that
//! request is granted, the turn goes to the next member, and the timer is armed for it.

use super::Direction;
use super::bucket::{Bucket, at_least_one, whole};
use super::config::{Limit, ThrottleConfig};
use crate::error::{Error, ErrorKind, Result};
use coblock_aio::{AioContext, Clock, Timer};
use coblock_coroutine::{Co, ThreadLock, WakeHandle, mutant};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Weak};

struct Waiting {
    ticket: u64,
    len: u64,
    context: Arc<AioContext>,
    handle: WakeHandle,
}

#[derive(Default)]
struct Queues {
    read: VecDeque<Waiting>,
    write: VecDeque<Waiting>,
    /// Drained sections: while there are any, requests pass at once.
    lifted: u32,
}

impl Queues {
    fn of(&mut self, direction: Direction) -> &mut VecDeque<Waiting> {
        match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        }
    }
}

#[derive(Default)]
struct Turn {
    /// Who was granted last: the turn goes on after it.
    last: u64,
    timer: Option<Timer>,
    /// Which arming the timer's callback belongs to.
    armed: u64,
}

struct State {
    config: ThrottleConfig,
    /// As [`limits`].
    buckets: [Bucket; 6],
    leaked_ns: u64,
    members: BTreeMap<u64, Queues>,
    next_member: u64,
    next_ticket: u64,
    read: Turn,
    write: Turn,
}

/// Buckets in the order of [`State::buckets`], and which a request of that direction fills.
fn limits(config: &ThrottleConfig, direction: Direction) -> [(usize, Limit, bool); 4] {
    let (bps, iops) = match direction {
        Direction::Read => ((1, config.bps_read), (4, config.iops_read)),
        Direction::Write => ((2, config.bps_write), (5, config.iops_write)),
    };
    [
        (0, config.bps_total, true),
        (bps.0, bps.1, true),
        (3, config.iops_total, false),
        (iops.0, iops.1, false),
    ]
}

impl State {
    fn turn(&mut self, direction: Direction) -> &mut Turn {
        match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        }
    }

    fn leak(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.leaked_ns);
        self.leaked_ns = now_ns;
        let config = self.config;
        let all = [
            config.bps_total,
            config.bps_read,
            config.bps_write,
            config.iops_total,
            config.iops_read,
            config.iops_write,
        ];
        for (bucket, limit) in self.buckets.iter_mut().zip(&all) {
            bucket.leak(limit, elapsed);
        }
    }

    fn wait_ns(&self, direction: Direction) -> u64 {
        limits(&self.config, direction)
            .iter()
            .map(|(index, limit, _)| self.buckets[*index].wait_ns(limit))
            .max()
            .unwrap_or(0)
    }

    fn account(&mut self, direction: Direction, len: u64) {
        let operations = match self.config.iops_size {
            0 => whole(1),
            size => at_least_one(len, size),
        };
        for (index, limit, in_bytes) in limits(&self.config, direction) {
            let amount = if in_bytes { whole(len) } else { operations };
            self.buckets[index].add(&limit, amount);
        }
    }

    /// The member whose turn it is among those that wait.
    fn next(&mut self, direction: Direction) -> Option<u64> {
        let last = match mutant!("the turn of the throttled does not go around") {
            true => 0,
            false => self.turn(direction).last,
        };
        let waits =
            |(id, queues): (&u64, &mut Queues)| (!queues.of(direction).is_empty()).then_some(*id);
        let after = self.members.range_mut(last + 1..).find_map(waits);
        after.or_else(|| self.members.range_mut(..=last).find_map(waits))
    }

    fn grant(&mut self, direction: Direction, member: u64) -> WakeHandle {
        let queues = self.members.get_mut(&member).expect("a member that waits");
        let waiting = queues.of(direction).pop_front().expect("somebody waits");
        self.account(direction, waiting.len);
        self.turn(direction).last = member;
        waiting.handle
    }
}

/// Limits that several backends and throttle nodes share, in any contexts that run by one clock.
pub struct ThrottleGroup {
    name: String,
    clock: Clock,
    state: ThreadLock<State>,
}

impl ThrottleGroup {
    /// A group with `config`, on the clock of its members' contexts.
    ///
    /// # Errors
    /// `Invalid`: limits that contradict each other.
    pub fn new(
        name: impl Into<String>,
        clock: &Clock,
        config: ThrottleConfig,
    ) -> Result<Arc<ThrottleGroup>> {
        config.check()?;
        Ok(Arc::new(ThrottleGroup {
            name: name.into(),
            clock: clock.clone(),
            state: ThreadLock::new(State {
                config,
                buckets: [Bucket::default(); 6],
                leaked_ns: clock.now_ns(),
                members: BTreeMap::new(),
                next_member: 1,
                next_ticket: 0,
                read: Turn::default(),
                write: Turn::default(),
            }),
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Do the timers of `context` go by the clock of the group?
    ///
    /// # Errors
    /// `Invalid`: they do not; it can serve no member.
    pub(crate) fn check_clock(&self, context: &AioContext) -> Result<()> {
        if context.clock().is_same(&self.clock) {
            return Ok(());
        }
        let (name, context) = (&self.name, context.name());
        let message =
            format!("Throttle group '{name}' runs by another clock than context '{context}'");
        Err(Error::new(ErrorKind::Invalid, message))
    }

    /// The limits.
    pub fn config(&self) -> ThrottleConfig {
        self.state.lock().config
    }

    /// Sets new limits, for all members at once; buckets are empty then, and who waits is looked at
    /// anew. Any thread.
    ///
    /// # Errors
    /// `Invalid`; the old limits stay.
    pub fn set_config(self: &Arc<Self>, config: ThrottleConfig) -> Result<()> {
        config.check()?;
        {
            let mut state = self.state.lock();
            state.config = config;
            state.buckets = [Bucket::default(); 6];
            state.leaked_ns = self.clock.now_ns();
        }
        for direction in [Direction::Read, Direction::Write] {
            if !mutant!("new limits restart nobody") {
                self.go_on(direction, None);
            }
        }
        Ok(())
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        let state = self.state.lock();
        let members = state.members.values();
        members.map(|m| m.read.len() + m.write.len()).sum()
    }

    /// One more user of the limits; it leaves when the last clone of the result is dropped.
    pub fn join(self: &Arc<Self>) -> Arc<Member> {
        let mut state = self.state.lock();
        let id = state.next_member;
        state.next_member += 1;
        state.members.insert(id, Queues::default());
        Arc::new(Member {
            group: self.clone(),
            id,
        })
    }

    /// Grants what may go on in that direction, and arms the timer for the next. `fired`: the
    /// arming whose timer calls.
    fn go_on(self: &Arc<Self>, direction: Direction, fired: Option<u64>) {
        let mut granted = Vec::new();
        let stale = {
            let mut state = self.state.lock();
            if fired.is_some_and(|armed| armed != state.turn(direction).armed) {
                return;
            }
            let now = self.clock.now_ns();
            state.leak(now);
            let stale = state.turn(direction).timer.take();
            while let Some(member) = state.next(direction) {
                let wait = state.wait_ns(direction);
                if wait > 0 {
                    if !mutant!("the turn of the throttled is not passed on") {
                        self.arm(&mut state, direction, member, now.saturating_add(wait));
                    }
                    break;
                }
                granted.push(state.grant(direction, member));
            }
            stale
        };
        drop(stale);
        for handle in granted {
            handle.schedule();
        }
    }

    fn arm(self: &Arc<Self>, state: &mut State, direction: Direction, member: u64, at_ns: u64) {
        let queues = state.members.get_mut(&member).expect("a member that waits");
        let context = queues.of(direction)[0].context.clone();
        let turn = state.turn(direction);
        turn.armed += 1;
        let (armed, group) = (turn.armed, Arc::downgrade(self));
        let timer = context.timer_on(&self.clock, "throttle", move || {
            if let Some(group) = Weak::upgrade(&group) {
                group.go_on(direction, Some(armed));
            }
        });
        timer.arm_at(at_ns);
        turn.timer = Some(timer);
    }
}

impl fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, waiting) = (&self.name, self.waiting());
        write!(f, "ThrottleGroup('{name}', {waiting} waiting)")
    }
}

/// A user of a group's limits.
pub struct Member {
    group: Arc<ThrottleGroup>,
    id: u64,
}

impl Member {
    /// The group.
    pub fn group(&self) -> &Arc<ThrottleGroup> {
        &self.group
    }

    /// Suspends until the limits let a request of `len` bytes go on. In the current context.
    ///
    /// # Panics
    /// Outside of every context, and in one that runs by another clock than the group.
    pub fn wait(&self, co: &Co, direction: Direction, len: u64) {
        let context = coblock_aio::current().expect("a throttled request runs in a context");
        assert!(
            context.clock().is_same(&self.group.clock),
            "throttle group '{}' runs by another clock than context '{}'",
            self.group.name,
            context.name()
        );
        let ticket = {
            let mut state = self.group.state.lock();
            let now = self.group.clock.now_ns();
            state.leak(now);
            let somebody_waits = state.turn(direction).timer.is_some()
                && !mutant!("a request overtakes throttled ones");
            let lifted = state.members[&self.id].lifted > 0;
            if lifted || (!somebody_waits && state.wait_ns(direction) == 0) {
                state.account(direction, len);
                if !lifted {
                    state.turn(direction).last = self.id;
                }
                return;
            }
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            let waiting = Waiting {
                ticket,
                len,
                context,
                handle: co.wake_handle(),
            };
            let queues = state.members.get_mut(&self.id).expect("we are a member");
            queues.of(direction).push_back(waiting);
            if !somebody_waits {
                let at = now.saturating_add(state.wait_ns(direction));
                self.group.arm(&mut state, direction, self.id, at);
            }
            ticket
        };
        let place = Place {
            member: self,
            direction,
            ticket,
        };
        while place.is_queued() {
            co.suspend();
        }
    }

    /// A drained section begins or ends: while there is one, requests of this member pass at once,
    /// and those that wait go on.
    pub(crate) fn lift(&self, on: bool) {
        let mut granted = Vec::new();
        {
            let mut state = self.group.state.lock();
            state.leak(self.group.clock.now_ns());
            let queues = state.members.get_mut(&self.id).expect("we are a member");
            if on {
                queues.lifted += 1;
            } else {
                queues.lifted -= 1;
            }
            for direction in [Direction::Read, Direction::Write] {
                while on
                    && !mutant!("a section leaves the throttled waiting")
                    && !state
                        .members
                        .entry(self.id)
                        .or_default()
                        .of(direction)
                        .is_empty()
                {
                    granted.push(state.grant(direction, self.id));
                }
            }
        }
        if !granted.is_empty() {
            for direction in [Direction::Read, Direction::Write] {
                self.group.go_on(direction, None);
            }
        }
        for handle in granted {
            handle.schedule();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.state.lock().members.remove(&self.id);
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member {} of {:?}", self.id, self.group)
    }
}

/// A place in a queue; a coroutine that is unwound while it waits leaves it.
struct Place<'a> {
    member: &'a Member,
    direction: Direction,
    ticket: u64,
}

impl Place<'_> {
    fn is_queued(&self) -> bool {
        let mut state = self.member.group.state.lock();
        let queues = state.members.get_mut(&self.member.id);
        let queues = queues.expect("we are a member");
        let mut queue = queues.of(self.direction).iter();
        queue.any(|waiting| waiting.ticket == self.ticket)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.is_queued() {
            return;
        }
        {
            let mut state = self.member.group.state.lock();
            let queues = state.members.get_mut(&self.member.id);
            let queue = queues.expect("we are a member").of(self.direction);
            queue.retain(|waiting| waiting.ticket != self.ticket);
        }
        if !mutant!("who leaves a throttled queue takes its timer along") {
            self.member.group.go_on(self.direction, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coblock_aio::VirtualClock;

    /// Rule 8.1: a read and a write of n bytes are n in the bucket of each and 2n in that of both;
    /// each is one operation, or as many of the size of operations as it is long, in fractions.
    /// (/throttle/accounting)
    #[test]
    fn rule_8_1_what_a_request_counts() {
        let limit = Limit::average(1);
        let parts = ThrottleConfig {
            bps_read: limit,
            bps_write: limit,
            iops_read: limit,
            iops_write: limit,
            iops_size: 1000,
            ..ThrottleConfig::default()
        };
        let totals = ThrottleConfig {
            bps_total: limit,
            iops_total: limit,
            iops_size: 1000,
            ..ThrottleConfig::default()
        };
        let levels = |config, len| {
            let clock = Clock::Virtual(VirtualClock::new());
            let group = ThrottleGroup::new("group", &clock, config).expect("valid limits");
            let mut state = group.state.lock();
            state.account(Direction::Read, len);
            state.account(Direction::Write, len);
            state.buckets.map(|bucket| bucket.level)
        };
        let one = whole(1);
        for (len, operations) in [(512, one), (1000, one), (2500, whole(5) / 2)] {
            let bytes = whole(len);
            let want = [0, bytes, bytes, 0, operations, operations];
            assert_eq!(levels(parts, len), want, "parts, {len} bytes");
            let want = [2 * bytes, 0, 0, 2 * operations, 0, 0];
            assert_eq!(levels(totals, len), want, "totals, {len} bytes");
        }
    }

    /// Rule 8.1: limits are read as they were set; setting empties the buckets and begins their time
    /// anew. (/throttle/config_functions)
    #[test]
    fn rule_8_1_limits_are_read_as_they_were_set() {
        let virtual_clock = VirtualClock::new();
        let clock = Clock::Virtual(virtual_clock.clone());
        let config = |average| ThrottleConfig {
            bps_read: Limit {
                average,
                max: 2 * average,
                burst_seconds: 3,
            },
            iops_write: Limit::average(average),
            iops_size: 512,
            ..ThrottleConfig::default()
        };
        let group = ThrottleGroup::new("group", &clock, config(10)).expect("valid limits");
        assert_eq!(group.config(), config(10));
        group.state.lock().account(Direction::Read, 4096);
        virtual_clock.advance_to(5_000_000_000);
        group.set_config(config(20)).expect("valid limits");
        assert_eq!(group.config(), config(20));
        let state = group.state.lock();
        assert_eq!(state.leaked_ns, 5_000_000_000);
        assert_eq!(state.buckets, [Bucket::default(); 6]);
    }
}
