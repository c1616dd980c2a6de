//! A node with a socket moves between contexts (rule 8.3): handlers, timers and reconnects go with it,
//! under load, and with the server dying in drained sections.

mod support;

use coblock_aio::{ContextOptions, EngineKind, IoThread};
use coblock_block::{BlockBackend, Drain, ErrorKind, Options, Transaction};
use coblock_coroutine::Co;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use support::contexts::Contexts;
use support::counted::Calls;
use support::net::{Net, OpenNet, Server};
use support::{PLAIN, World, pattern};

const DELAY: Duration = Duration::from_millis(10);
const SERVER: usize = 3;

/// Contexts "main", "io", "other" and that of the server; one node on it.
fn network(seed: u64) -> (Contexts, Arc<Server>, Arc<Net>, Arc<BlockBackend>) {
    let mut contexts = Contexts::new(seed, &["main", "io", "other", "server"]);
    contexts.registry.register("net", Box::new(OpenNet));
    let server = Server::new(contexts.context(SERVER), 64 << 10);
    let net = Net::new(&server, DELAY);
    let backend = contexts.open(on(&net)).unwrap();
    (contexts, server, net, backend)
}

fn on(net: &Arc<Net>) -> Options {
    Options::new()
        .with("driver", "net")
        .with("node-name", "net")
        .with_object("net", net.clone())
}

fn finish(contexts: Contexts, server: &Arc<Server>, backend: Arc<BlockBackend>) {
    contexts.run(0, |co| backend.close(co)).unwrap();
    server.die();
    contexts.end(vec![backend]);
}

fn read(co: &Co, backend: &BlockBackend) -> Result<u8, i32> {
    let mut data = [0; 512];
    let read = backend.pread(co, 512, &mut data[..]);
    read.map(|()| data[0]).map_err(|error| error.errno())
}

fn move_to(contexts: &Contexts, backend: &BlockBackend, n: usize) {
    let to = contexts.context(n).clone();
    contexts.run(0, |co| backend.move_to(co, &to)).unwrap();
}

/// Starts a read in a context; tells how it ended, once it has.
fn start(
    contexts: &Contexts,
    n: usize,
    backend: &Arc<BlockBackend>,
) -> Rc<Cell<Option<Result<u8, i32>>>> {
    let (backend, ended) = (backend.clone(), Rc::new(Cell::new(None)));
    let told = ended.clone();
    contexts.homes[n].spawn("read", move |co| told.set(Some(read(co, &backend))));
    ended
}

/// Rule 8.3: the connection lives through moves there, further, back, and inside of a section; its
/// handler runs in the home, whoever sends requests. (The driver asserts where it runs.)
#[test]
fn rule_8_3_a_connection_moves_along() {
    let (contexts, server, net, backend) = network(1);
    let mut byte = 0;
    let mut all_contexts_use_it = || {
        for n in 0..3 {
            byte += 1;
            contexts.run(n, |co| {
                backend.pwrite(co, 512, &[byte; 512][..], PLAIN).unwrap();
                assert_eq!(read(co, &backend), Ok(byte));
            });
        }
    };
    all_contexts_use_it();
    for to in [1, 2, 1, 0] {
        move_to(&contexts, &backend, to);
        all_contexts_use_it();
    }
    let section = contexts.run(0, |co| backend.drain(co));
    move_to(&contexts, &backend, 2);
    move_to(&contexts, &backend, 1);
    drop(section);
    all_contexts_use_it();
    assert_eq!(net.notes(), "", "it is the first connection");
    finish(contexts, &server, backend);
}

/// Rule 8.3: a reconnect that is under way goes on in the new home, on its timers.
#[test]
fn rule_8_3_a_reconnect_moves_along() {
    let (contexts, server, net, backend) = network(2);
    server.die();
    contexts.world.run_until(|| !net.is_connected());
    assert_eq!(net.notes(), "lost in main");
    assert!(net.reconnects());
    // In flight without a connection: it waits for one, and fails when a section begins.
    let waits = start(&contexts, 2, &backend);
    contexts.world.settle();
    assert_eq!((waits.get(), net.waiting()), (None, 1));
    move_to(&contexts, &backend, 1);
    assert_eq!(waits.get(), Some(Err(libc::ECONNRESET)));
    assert!(net.reconnects(), "in the new home");
    let waits = start(&contexts, 2, &backend);
    contexts.run(2, |co| coblock_aio::co::sleep(co, 3 * DELAY));
    let refused = net.notes();
    assert!(
        refused.starts_with("refused in io, refused in io"),
        "{refused}"
    );
    server.live();
    contexts.world.run_until(|| waits.get().is_some());
    assert_eq!(waits.get(), Some(Ok(0)), "it waited for the connection");
    assert!(net.notes().ends_with("connected in io"));
    move_to(&contexts, &backend, 0);
    contexts.run(0, |co| assert_eq!(read(co, &backend), Ok(0)));
    finish(contexts, &server, backend);
}

/// Rules 5.1, 8.3: the server dies while a section begins, and inside of one. The section waits for
/// nobody who cannot end, starts no connection, and after a move the next one is made in the new home.
#[test]
fn rule_8_3_the_server_dies_in_a_section() {
    let (contexts, server, net, backend) = network(3);
    server.set_silent(true);
    let reads = start(&contexts, 2, &backend);
    contexts.world.settle();
    assert_eq!(net.waiting(), 1);
    // The move waits for the answer, which never comes.
    let moved = Rc::new(Cell::new(false));
    contexts.homes[0].spawn("move", {
        let (backend, to, moved) = (backend.clone(), contexts.context(1).clone(), moved.clone());
        move |co| {
            backend.move_to(co, &to).unwrap();
            moved.set(true);
        }
    });
    contexts.world.settle();
    assert!(backend.is_quiesced() && !moved.get());
    let held_back = start(&contexts, 2, &backend);
    server.die();
    contexts.world.run_until(|| moved.get());
    assert_eq!(reads.get(), Some(Err(libc::ECONNRESET)));
    assert_eq!(net.notes(), "lost in main");
    assert_eq!(backend.home_context().name(), "io");
    // Who was held back waits for the new connection.
    contexts.world.settle();
    assert_eq!((held_back.get(), net.waiting()), (None, 1));
    server.set_silent(false);
    server.live();
    contexts.world.run_until(|| held_back.get().is_some());
    assert_eq!(held_back.get(), Some(Ok(0)));
    assert_eq!(net.notes(), "connected in io");

    let section = contexts.run(2, |co| backend.drain(co));
    server.die();
    contexts.world.run_until(|| !net.is_connected());
    server.live();
    contexts.run(0, |co| coblock_aio::co::sleep(co, 100 * DELAY));
    assert_eq!(net.notes(), "lost in io");
    assert!(
        !net.is_connected() && !net.reconnects(),
        "nothing is started"
    );
    move_to(&contexts, &backend, 2);
    assert!(!net.reconnects());
    drop(section);
    contexts.world.run_until(|| net.is_connected());
    assert_eq!(net.notes(), "connected in other");
    contexts.run(1, |co| assert_eq!(read(co, &backend), Ok(0)));
    finish(contexts, &server, backend);
}

/// Rules 5.1, 8.3: all that moves is told before one of them is waited for: what is in flight on a filter
/// waits for the connection of the node below, which gives up when that node is told.
#[test]
fn rule_8_3_all_are_told_before_one_is_waited_for() {
    let (contexts, server, net, backend) = network(5);
    let options = Options::new()
        .with("driver", "counted")
        .with("file", "net")
        .with_object("calls", Arc::new(Calls::default()));
    let above = contexts.open(options).unwrap();
    for user in [&above, &backend] {
        user.allow_moves(true);
    }
    server.die();
    contexts.world.run_until(|| !net.is_connected());
    let waits = start(&contexts, 2, &above);
    contexts.world.settle();
    assert_eq!((waits.get(), net.waiting()), (None, 1));
    let mut transaction = Transaction::new(&contexts.graph);
    transaction
        .move_to(&above.node(), contexts.context(1))
        .within(Duration::from_secs(1));
    contexts.run(0, |co| transaction.run(co)).unwrap();
    drop(transaction);
    assert_eq!(waits.get(), Some(Err(libc::ECONNRESET)));
    server.live();
    contexts.run(1, |co| assert_eq!(read(co, &above), Ok(0)));
    contexts.run(0, |co| above.close(co)).unwrap();
    drop(above);
    finish(contexts, &server, backend);
}

/// A server that never answers keeps a move from beginning; with a limit it is an error that names the
/// node, and nothing has changed.
#[test]
fn rule_8_3_a_busy_node_does_not_move() {
    let (contexts, server, net, backend) = network(4);
    backend.allow_moves(true);
    server.set_silent(true);
    let reads = start(&contexts, 2, &backend);
    let before = contexts.dump();
    let mut transaction = Transaction::new(&contexts.graph);
    transaction
        .move_to(&backend.node(), contexts.context(1))
        .within(Duration::from_secs(1));
    let error = contexts.run(0, |co| transaction.run(co)).unwrap_err();
    drop(transaction);
    assert_eq!(error.kind(), ErrorKind::InUse);
    let words =
        "Node 'net' is busy: Draining took too long; busy: node 'net' (Read of 512 bytes at 512)";
    assert!(error.to_string().starts_with(words), "{error}");
    assert_eq!(contexts.dump(), before);
    server.set_silent(false);
    contexts.world.run_until(|| reads.get().is_some());
    assert_eq!((reads.get(), &*net.notes()), (Some(Ok(0)), ""));
    finish(contexts, &server, backend);
}

/// What one of many loaders does: writes until it is written, reads until it is read; only a lost
/// connection may be in the way. No flush: one that fails would poison the node.
fn load(co: &Co, backend: &BlockBackend, at: u64, seed: u64) {
    let (wrote, mut got) = (pattern(seed, 512), vec![0; 512]);
    let until_ok = |what: &mut dyn FnMut() -> coblock_block::Result<()>| {
        while let Err(error) = what() {
            assert_eq!(error.errno(), libc::ECONNRESET, "{error}");
        }
    };
    until_ok(&mut || backend.pwrite(co, at, &wrote[..], PLAIN));
    until_ok(&mut || backend.pread(co, at, &mut got[..]));
    assert_eq!(got, wrote, "at {at}");
}

/// Rule 8.3, on the virtual clock: loaders in three contexts, moves, sections and a server that dies and
/// comes back, in the order that each of 100 seeds decides.
#[test]
fn rule_8_3_moves_in_a_hundred_orders() {
    for seed in 100..200 {
        let (contexts, server, net, backend) = network(seed);
        let left = Rc::new(Cell::new(8));
        for n in 0..6 {
            let (backend, left) = (backend.clone(), left.clone());
            contexts.homes[n % 3].spawn("load", move |co| {
                for round in 0..12 {
                    load(co, &backend, (n as u64) << 12, seed << 8 | round);
                    coblock_aio::co::sleep(co, Duration::from_micros(seed + round));
                }
                left.set(left.get() - 1);
            });
        }
        contexts.homes[0].spawn("server's fate", {
            let (server, left) = (server.clone(), left.clone());
            move |co| {
                for round in 0..4 {
                    coblock_aio::co::sleep(co, Duration::from_micros(400 + 7 * seed));
                    server.die();
                    coblock_aio::co::sleep(co, Duration::from_micros(round * 9 * seed));
                    server.live();
                }
                left.set(left.get() - 1);
            }
        });
        let homes: Vec<_> = (0..3).map(|n| contexts.context(n).clone()).collect();
        contexts.homes[2].spawn("moves", {
            let (backend, left) = (backend.clone(), left.clone());
            move |co| {
                for round in 0..30_u64 {
                    let home = &homes[usize::try_from((seed * 31 + round * 17) % 3).unwrap()];
                    let section = (round % 4 == 0).then(|| backend.drain(co));
                    backend.move_to(co, home).unwrap();
                    drop(section);
                    coblock_aio::co::sleep(co, Duration::from_micros(seed % 13 * 30 + 1));
                }
                left.set(left.get() - 1);
            }
        });
        contexts.world.run_until(|| left.get() == 0);
        assert_eq!((net.waiting(), backend.in_flight()), (0, 0), "seed {seed}");
        assert_eq!(contexts.graph.readers(), 0);
        finish(contexts, &server, backend);
    }
}

/// Rule 8.3, with threads: two disks on one node with a socket, load from two I/O threads and the main
/// one, a server on its own thread that dies and comes back, and moves all the time.
#[test]
fn rule_8_3_a_network_node_moves_under_load() {
    let mut world = World::with_engine(EngineKind::Threads);
    world.registry.register("net", Box::new(OpenNet));
    let thread = |name: &str| {
        IoThread::new(ContextOptions {
            engine: EngineKind::None,
            ..ContextOptions::named(name)
        })
        .unwrap()
    };
    let (serving, threads) = (thread("server"), [thread("io 0"), thread("io 1")]);
    let server = Server::new(serving.context(), 64 << 10);
    let net = Net::new(&server, Duration::from_millis(1));
    let base = world.open(on(&net)).unwrap();
    let raw = || world.open(Options::new().with("driver", "raw").with("file", "net"));
    let disks = [Arc::new(raw().unwrap()), Arc::new(raw().unwrap())];
    world.close(base).unwrap();
    for disk in &disks {
        disk.allow_moves(true);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (left, rounds) = (Arc::new(AtomicUsize::new(6)), Arc::new(AtomicU64::new(0)));
    let homes = [
        threads[0].context().clone(),
        threads[1].context().clone(),
        world.home.context().clone(),
    ];
    for n in 0..6_usize {
        let (stop, left, rounds) = (stop.clone(), left.clone(), rounds.clone());
        let disk = disks[n % 2].clone();
        let body = move |co: &Co| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                load(co, &disk, (n as u64) << 12, round);
                coblock_aio::co::reschedule(co);
                rounds.fetch_add(1, Ordering::Relaxed);
                round += 1;
            }
            left.fetch_sub(1, Ordering::Release);
        };
        homes[n % 3].spawn("load", body).unwrap();
    }
    let went_on = |from: u64| {
        while rounds.load(Ordering::Relaxed) < from + 6 {
            world.home.poll(false);
            std::thread::yield_now();
        }
    };
    let connections = RefCell::new(String::new());
    for round in 0..60 {
        went_on(rounds.load(Ordering::Relaxed));
        if round % 6 == 2 {
            server.die();
        }
        let home = &homes[round % 3];
        world.run(|co| disks[round % 2].move_to(co, home)).unwrap();
        assert_eq!(disks[0].home_context().id(), home.id());
        if round % 6 == 2 {
            server.live();
        }
        connections.borrow_mut().push_str(&net.notes());
    }
    went_on(rounds.load(Ordering::Relaxed));
    stop.store(true, Ordering::Relaxed);
    while left.load(Ordering::Acquire) > 0 {
        world.home.poll(false);
        std::thread::yield_now();
    }
    connections.borrow_mut().push_str(&net.notes());
    let connections = connections.into_inner();
    assert!(connections.contains("lost in") && connections.contains("connected in"));
    for disk in disks {
        world.run(|co| disk.close(co)).unwrap();
    }
    server.die();
    for thread in threads {
        thread.stop();
    }
    serving.stop();
    world.end();
}
