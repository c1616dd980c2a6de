//! Rule 5.7 and hazard Q21 on a table alone.

use super::*;
use crate::graph::Graph;
use coblock_aio::{ContextOptions, EngineKind, Home};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

struct World {
    home: Home,
    graph: Arc<Graph>,
    table: Arc<RequestTable>,
    /// What happened, in order.
    events: Rc<RefCell<Vec<&'static str>>>,
}

impl World {
    fn new() -> World {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named("table")
        };
        let home = Home::new(options).unwrap();
        let graph = Graph::new(home.context());
        World {
            home,
            graph,
            table: Arc::default(),
            events: Rc::default(),
        }
    }

    /// A coroutine that begins a request, waits its turn, notes its name, and ends when its gate is
    /// opened.
    fn request(
        &self,
        name: &'static str,
        offset: u64,
        len: u64,
        serialising: bool,
    ) -> Rc<RefCell<Option<WakeHandle>>> {
        let gate = Rc::new(RefCell::new(None));
        let (graph, table) = (self.graph.clone(), self.table.clone());
        let (events, handle) = (self.events.clone(), gate.clone());
        self.home.spawn(name, move |co| {
            let guard = graph.read(co);
            let request = table.begin(guard.slot(), offset, len, RequestKind::Write);
            if serialising {
                request.serialise(co, offset, len);
            } else if !table.is_plain() {
                request.wait_for_conflicts(co);
            }
            events.borrow_mut().push(name);
            *handle.borrow_mut() = Some(co.wake_handle());
            while handle.borrow().is_some() {
                co.suspend();
            }
        });
        gate
    }

    /// Lets a request that has its turn end.
    fn end(&self, gate: &Rc<RefCell<Option<WakeHandle>>>) {
        let handle = gate.borrow_mut().take().expect("the request has its turn");
        self.home.with(|| handle.wake());
        while self.home.poll(false) {}
    }

    fn events(&self) -> Vec<&'static str> {
        self.events.borrow().clone()
    }

    fn finish(self) {
        assert_eq!(self.table.in_flight(), 0);
        assert!(self.table.is_plain());
        assert!(self.table.waits.lock().list.is_empty());
        drop(self.graph);
        self.home.close();
    }
}

/// Rule 5.7: every request is counted from its begin to its end, however many there are.
#[test]
fn any_number_of_requests_is_counted() {
    let world = World::new();
    world.home.run(|co| {
        let guard = world.graph.read(co);
        let table = &world.table;
        let mut requests = Vec::new();
        for n in 0..300u64 {
            requests.push(table.begin(guard.slot(), n * 10, 10, RequestKind::Read));
            assert_eq!(table.in_flight() as u64, n + 1);
        }
        let mut offsets: Vec<u64> = table
            .snapshot()
            .iter()
            .map(|request| request.range.unwrap().0)
            .collect();
        offsets.sort_unstable();
        assert_eq!(offsets, (0..300).map(|n| n * 10).collect::<Vec<_>>());
        assert!(table.overlapping(2999..5000) && !table.overlapping(3000..5000));
        let places = requests.iter().map(|request| request.key().chunk).max();
        requests.retain(|request| request.key().place % 2 == 0);
        assert_eq!(table.in_flight(), requests.len());
        while requests.len() < 300 {
            requests.push(table.begin(guard.slot(), 0, 1, RequestKind::Read));
        }
        assert_eq!(table.in_flight(), 300);
        let reused = requests.iter().map(|request| request.key().chunk).max();
        assert_eq!(reused, places, "places that became free are used again");
        let mut keys: Vec<_> = requests
            .iter()
            .map(|r| (r.key().chunk, r.key().place))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 300, "no place has two requests");
        drop(requests);
        assert_eq!(table.in_flight(), 0);
        assert_eq!(table.begin(guard.slot(), 0, 1, RequestKind::Read).index, 0);
    });
    world.finish();
}

/// Rule 9.2 needs it: a request whose range is not known overlaps everything, until it is.
#[test]
fn an_unknown_range_overlaps_everything() {
    let world = World::new();
    world.home.run(|co| {
        let guard = world.graph.read(co);
        let request = world.table.begin_unknown(guard.slot(), RequestKind::Read);
        assert!(world.table.overlapping(0..1) && world.table.overlapping(1 << 60..(1 << 60) + 1));
        assert_eq!(world.table.snapshot()[0].range, None);
        request.set_range(4096, 512);
        assert!(!world.table.overlapping(0..4096) && world.table.overlapping(4607..4608));
        assert!(!world.table.overlapping(4608..u64::MAX));
        let mut seen = Vec::new();
        world.table.for_each(|range| seen.push(range));
        assert_eq!(seen, [Some(4096..4608)]);
    });
    world.finish();
}

/// Its range is set once: somebody may have relied on it.
#[test]
#[should_panic(expected = "set twice")]
fn a_range_is_set_once() {
    let world = World::new();
    world.home.run(|co| {
        let guard = world.graph.read(co);
        let request = world.table.begin_unknown(guard.slot(), RequestKind::Read);
        request.set_range(0, 1);
        request.set_range(0, 2);
    });
}

/// Hazard Q21: a serialising request waits for those that overlap it, and later ones wait for it;
/// others do not.
#[test]
fn a_serialising_request_is_alone_on_its_range() {
    let world = World::new();
    let early = world.request("early", 0, 100, false);
    let serialising = world.request("serialising", 50, 100, true);
    let late = world.request("late", 120, 10, false);
    let elsewhere = world.request("elsewhere", 150, 100, false);
    assert_eq!(world.events(), ["early", "elsewhere"]);
    world.end(&early);
    assert_eq!(world.events(), ["early", "elsewhere", "serialising"]);
    world.end(&serialising);
    assert_eq!(
        world.events(),
        ["early", "elsewhere", "serialising", "late"]
    );
    world.end(&late);
    world.end(&elsewhere);
    world.finish();
}

/// Hazard Q21: ordinary requests that keep coming do not starve a serialising one, which waits only
/// for what was there before.
#[test]
fn a_serialising_request_does_not_starve() {
    let world = World::new();
    let first = world.request("first", 0, 100, false);
    let serialising = world.request("serialising", 0, 100, true);
    let later: Vec<_> = (0..5)
        .map(|_| world.request("later", 0, 100, false))
        .collect();
    world.end(&first);
    assert_eq!(world.events(), ["first", "serialising"]);
    world.end(&serialising);
    for gate in &later {
        world.end(gate);
    }
    assert_eq!(world.events().len(), 7);
    world.finish();
}

/// Hazard Q21: a request that already waits for us is not waited for. Two that become serialising
/// while both are there would else wait for each other.
#[test]
fn requests_do_not_wait_in_a_circle() {
    let world = World::new();
    let (graph, table) = (&world.graph, &world.table);
    let order = Rc::new(RefCell::new(Vec::new()));
    world.home.run(|co| {
        let guard = graph.read(co);
        // Both are in the table before either serialises.
        let mine = table.begin(guard.slot(), 0, 10, RequestKind::Write);
        let (graph, other, noted) = (graph.clone(), table.clone(), order.clone());
        world.home.spawn("other", move |co| {
            let guard = graph.read(co);
            let request = other.begin(guard.slot(), 0, 10, RequestKind::Write);
            request.serialise(co, 0, 10);
            noted.borrow_mut().push("other");
        });
        assert_eq!(table.in_flight(), 2);
        mine.serialise(co, 0, 10);
        order.borrow_mut().push("mine");
    });
    while world.home.poll(false) {}
    assert_eq!(
        *order.borrow(),
        ["other", "mine"],
        "by turn: the other one serialised first"
    );
    world.finish();
}

/// The padded range of a request counts, not the one that it began with.
#[test]
fn serialising_takes_the_wider_range() {
    let world = World::new();
    world.home.run(|co| {
        let guard = world.graph.read(co);
        let request = world.table.begin(guard.slot(), 100, 50, RequestKind::Write);
        request.serialise(co, 0, 512);
        let seen = world.table.snapshot()[0];
        assert_eq!((seen.range, seen.serialising), (Some((0, 512)), true));
        request.serialise(co, 256, 512);
        assert_eq!(world.table.snapshot()[0].range, Some((0, 768)));
        assert!(!world.table.is_plain());
    });
    world.finish();
}

/// Rule 5.7: who waits for idle goes on when the last request has ended, and not before.
#[test]
fn idle_is_when_the_last_one_ended() {
    let world = World::new();
    let (one, two) = (
        world.request("one", 0, 1, false),
        world.request("two", 5, 1, false),
    );
    let (table, events) = (world.table.clone(), world.events.clone());
    world.home.spawn("idle", move |co| {
        table.wait_idle(co);
        events.borrow_mut().push("idle");
    });
    let (table, events) = (world.table.clone(), world.events.clone());
    world.home.spawn("range", move |co| {
        table.wait_for_overlapping(co, 0..2);
        events.borrow_mut().push("range");
    });
    world.end(&one);
    assert_eq!(world.events(), ["one", "two", "range"]);
    world.end(&two);
    assert_eq!(world.events(), ["one", "two", "range", "idle"]);
    world.finish();
}

/// A waiter of another thread is woken there.
#[test]
fn a_waiter_in_another_context_is_woken() {
    let world = World::new();
    let (graph, table) = (world.graph.clone(), world.table.clone());
    let (begun, wait) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        let options = ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named("other")
        };
        let home = Home::new(options).unwrap();
        home.run(|co| {
            let guard = graph.read(co);
            let _request = table.begin(guard.slot(), 0, 10, RequestKind::Write);
            begun.send(()).unwrap();
            let end = std::time::Instant::now() + std::time::Duration::from_millis(30);
            while std::time::Instant::now() < end {
                std::hint::spin_loop();
            }
        });
        drop(graph);
        home.close();
    });
    wait.recv().unwrap();
    world.home.run(|co| {
        let guard = world.graph.read(co);
        let request = world.table.begin(guard.slot(), 5, 10, RequestKind::Write);
        request.serialise(co, 5, 10);
        assert_eq!(world.table.in_flight(), 1, "the other one has ended");
    });
    other.join().unwrap();
    world.finish();
}
