//! Rules 7.3, 7.4: a reader that moves to another context is counted all the time, and leaves where
//! it is then.

mod support;

use coblock_aio::{ContextOptions, EngineKind, Home, IoThread, move_to};
use coblock_block::{Graph, Options, RequestFlags};
use coblock_coroutine::Co;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::World;

fn options(name: &str) -> ContextOptions {
    ContextOptions {
        engine: EngineKind::None,
        ..ContextOptions::named(name)
    }
}

/// Goes to a context that has not used the graph before: its slot is made when the guard ends
/// there.
fn read_here_leave_there(
    co: &Co,
    graph: &Arc<Graph>,
    there: &Arc<coblock_aio::AioContext>,
    arrived: &AtomicBool,
    go_on: &AtomicBool,
) {
    let guard = graph.read(co);
    // SAFETY: the frames of this coroutine hold the guard, which looks its context up when it ends,
    // and references to what is `Sync`; nothing else is bound to the old thread.
    unsafe { move_to(co, there) };
    arrived.store(true, Ordering::SeqCst);
    while !go_on.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
    drop(guard);
}

/// Rule 7.3: one count goes to one and the other to minus one; their sum was right all the time,
/// and is zero at the end.
#[test]
fn a_reader_leaves_in_the_context_where_it_is() {
    let home = Home::new(options("here")).unwrap();
    let there = IoThread::new(options("there")).unwrap();
    let graph = Graph::new(home.context());
    let arrived = Arc::new(AtomicBool::new(false));
    let go_on = Arc::new(AtomicBool::new(false));
    home.context()
        .spawn("reader", {
            let (graph, context) = (graph.clone(), there.context().clone());
            let (arrived, go_on) = (arrived.clone(), go_on.clone());
            move |co| read_here_leave_there(co, &graph, &context, &arrived, &go_on)
        })
        .unwrap();
    while !arrived.load(Ordering::SeqCst) {
        home.poll(false);
    }
    assert_eq!(graph.readers(), 1, "it moved, and still reads");
    go_on.store(true, Ordering::SeqCst);
    while graph.readers() != 0 {
        std::thread::yield_now();
    }
    home.run(|co| {
        let _guard = graph.read(co);
        assert_eq!(graph.readers(), 1, "other readers are counted as before");
    });
    let third = Home::new(options("third")).unwrap();
    let slot = third.run(|co| graph.read(co).slot().index());
    assert_eq!(slot, 2, "the reader left in the other one, which is 1");
    third.close();
    // Rule 7.4: the negative count of the other context outlives it.
    there.stop();
    assert_eq!(graph.readers(), 0);
    let next = Home::new(options("next")).unwrap();
    next.run(|co| {
        let guard = graph.read(co);
        assert_eq!(
            (guard.slot().index(), graph.readers()),
            (1, 1),
            "the slot of the dead one"
        );
    });
    assert_eq!(graph.readers(), 0);
    drop(graph);
    next.close();
    home.close();
}

/// A graph tells who reads it and what is in it.
#[test]
fn debug_tells_the_state() {
    let world = World::simulated();
    let disk = coblock_block::drivers::sim::SimDisk::new(512);
    let node = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk);
    let backend = world.open(node.with("node-name", "disk0")).unwrap();
    world.run(|co| {
        backend
            .pwrite(co, 0, &[1; 512][..], RequestFlags::empty())
            .unwrap();
        let guard = world.graph.read(co);
        let told = format!("{:?} {guard:?} {backend:?}", world.graph);
        for words in ["disk0", "readers: 1", "len: 512", "requests: []"] {
            assert!(told.contains(words), "{told} does not say {words}");
        }
    });
    world.close(backend).unwrap();
    world.end();
}
