//! Hunters of mistakes in changes of the graph.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use coblock::block::drivers::sim::{Match, SimDisk};
use coblock::block::{
    self, Action, BlockBackend, DenyAll, ErrorKind, GraphWrite, Node, Options, Perm, Permissions,
    Transaction,
};
use coblock::coroutine::Co;

use crate::judge::Verdict;
use crate::session::Session;
use crate::sim;

fn disk(session: &Session) -> Result<(Arc<SimDisk>, Arc<BlockBackend>), String> {
    let disk = SimDisk::new(4096);
    let options = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone());
    let backend = session.open(options, &DenyAll).map_err(|e| e.to_string())?;
    Ok((disk, backend))
}

/// A user that lets nobody write, beside one that writes.
pub fn permissions(_: u64) -> Verdict {
    let session = sim::session();
    let (_, writer) = disk(&session)?;
    let alone = Permissions {
        held: Perm::CONSISTENT_READ,
        shared: Perm::all() - Perm::WRITE,
    };
    let other = BlockBackend::with_permissions(&session.graph, writer.node(), alone);
    let kind = other.as_ref().err().map(|error| error.kind());
    drop(other);
    session.close(writer);
    session.end();
    match kind {
        Some(ErrorKind::Conflict) => Ok(()),
        other => Err(format!("a conflict of permissions: {other:?}")),
    }
}

/// Looks whether its node is drained whenever it is called.
struct Drained(Arc<Node>, Arc<AtomicU64>);

impl Drained {
    fn look(&self) {
        if !self.0.is_drained() {
            self.1.fetch_add(1, Relaxed);
        }
    }
}

impl Action for Drained {
    fn prepare(&mut self, _: &Co) -> block::Result<()> {
        self.look();
        Ok(())
    }

    fn commit(&mut self, _: &mut GraphWrite<'_>) {
        self.look();
    }

    fn clean(&mut self, _: &Co) {
        self.look();
    }
}

/// Rule 8.2: every touched node is drained from before the first step until after the last one.
pub fn steps(_: u64) -> Verdict {
    let session = sim::session();
    let (_, backend) = disk(&session)?;
    let early = Arc::new(AtomicU64::new(0));
    let mut transaction = Transaction::new(&session.graph);
    let step = Drained(backend.node(), early.clone());
    transaction.action(&[backend.node()], Box::new(step));
    let result = session.home.run(|co| transaction.run(co));
    session.close(backend);
    session.end();
    match (result, early.load(Relaxed)) {
        (Ok(()), 0) => Ok(()),
        (result, many) => Err(format!("{result:?}, {many} steps with requests in flight")),
    }
}

/// Counts what is prepared and not undone.
struct Ready(Arc<AtomicU64>);

impl Action for Ready {
    fn prepare(&mut self, _: &Co) -> block::Result<()> {
        self.0.fetch_add(1, Relaxed);
        Ok(())
    }

    fn commit(&mut self, _: &mut GraphWrite<'_>) {}

    fn abort(&mut self, _: &Co) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Is never ready.
struct Unready;

impl Action for Unready {
    fn prepare(&mut self, _: &Co) -> block::Result<()> {
        Err(block::Error::new(ErrorKind::Invalid, "not ready"))
    }

    fn commit(&mut self, _: &mut GraphWrite<'_>) {
        unreachable!("it was not ready")
    }
}

/// Rule 8.2: what was prepared before the step that fails is undone.
pub fn abort(_: u64) -> Verdict {
    let session = sim::session();
    let prepared = Arc::new(AtomicU64::new(0));
    let mut transaction = Transaction::new(&session.graph);
    transaction.action(&[], Box::new(Ready(prepared.clone())));
    transaction.action(&[], Box::new(Unready));
    let result = session.home.run(|co| transaction.run(co));
    session.end();
    match (result, prepared.load(Relaxed)) {
        (Err(_), 0) => Ok(()),
        (result, left) => Err(format!("{result:?}, {left} steps stay prepared")),
    }
}

/// Rule 7.5: a transaction waits for a reader of the graph, even one of another node, and goes on
/// when it leaves.
pub fn last_reader(_: u64) -> Verdict {
    let session = sim::session();
    let (disk, backend) = disk(&session)?;
    let hold = disk.hold(Match::reads());
    let reader = backend.clone();
    session.home.spawn("reader", move |co| {
        reader.pread(co, 0, &mut [0; 512][..]).expect("a read");
    });
    let settle = || while session.home.poll(false) {};
    settle();
    let done = Arc::new(AtomicBool::new(false));
    let (graph, noted) = (session.graph.clone(), done.clone());
    session.home.spawn("changer", move |co| {
        let mut transaction = Transaction::new(&graph);
        transaction.action(&[], Box::new(Ready(Arc::default())));
        transaction.run(co).expect("nothing is against it");
        noted.store(true, Relaxed);
    });
    settle();
    if done.load(Relaxed) {
        return Err("it does not wait for a reader".to_string());
    }
    drop(hold);
    settle();
    if !done.load(Relaxed) {
        return Err("the last reader has left, and nobody woke the transaction".to_string());
    }
    session.close(backend);
    session.end();
    Ok(())
}
