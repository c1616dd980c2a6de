//! Changes of the graph while requests go on: filters that come and go, snapshots, other options.
//! (Rules 5.4, 7.5, 8.2, 8.3.)

use std::sync::Arc;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{self, Action, BlockBackend, DenyAll, ErrorKind, Graph, GraphWrite, Node};
use coblock::block::{Options, Reopen, RequestFlags, Transaction, close_unused, open};
use coblock::coroutine::Co;

use super::layers::Overlays;
use super::load::{Effect, Failed, Shared};
use super::play::Stage;
use super::request::{LIMITS, Sender};
use super::script::Setting;
use super::{image, session, sim};

/// A filter that changes nothing of what the disk reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    CopyOnRead,
    Throttle,
}

/// One transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A filter comes: above everything, or just above the image.
    Insert { filter: Filter, low: bool },
    /// The filter that came last goes.
    Remove,
    /// Another one takes the place of the filter that came last.
    Replace { filter: Filter },
    /// Discards reach the image, or are ignored.
    Options { discard: bool },
    /// A filter would come, if the image became read-only in the same transaction. It does not.
    Refused,
    /// An overlay comes above the image; with `two`, one above a second disk, too.
    Snapshot { two: bool },
    /// All nodes get the context of that queue as their home. (Rule 8.3.)
    Home { queue: usize },
}

/// All of them, as they are written in a script.
const WORDS: [(&str, &str, Change); 16] = {
    use Filter::{CopyOnRead, Throttle};
    const fn insert(filter: Filter, low: bool) -> Change {
        Change::Insert { filter, low }
    }
    const fn replace(filter: Filter) -> Change {
        Change::Replace { filter }
    }
    [
        ("insert", " copy-on-read", insert(CopyOnRead, false)),
        ("insert", " copy-on-read low", insert(CopyOnRead, true)),
        ("insert", " throttle", insert(Throttle, false)),
        ("insert", " throttle low", insert(Throttle, true)),
        ("remove", "", Change::Remove),
        ("replace", " copy-on-read", replace(CopyOnRead)),
        ("replace", " throttle", replace(Throttle)),
        ("options", " unmap", Change::Options { discard: true }),
        ("options", " ignore", Change::Options { discard: false }),
        ("refused", "", Change::Refused),
        ("snapshot", "", Change::Snapshot { two: false }),
        ("snapshot-two", "", Change::Snapshot { two: true }),
        ("home", " 0", Change::Home { queue: 0 }),
        ("home", " 1", Change::Home { queue: 1 }),
        ("home", " 2", Change::Home { queue: 2 }),
        ("home", " 3", Change::Home { queue: 3 }),
    ]
};

/// Every change.
pub fn all() -> impl Iterator<Item = Change> {
    WORDS.iter().map(|(.., change)| *change)
}

impl Change {
    fn written(self) -> (&'static str, &'static str) {
        let mut words = WORDS.iter().filter(|(.., change)| *change == self);
        let (word, behind, _) = words.next().expect("each has a word");
        (word, behind)
    }

    /// Its first word in a script.
    pub fn word(self) -> &'static str {
        self.written().0
    }

    /// What is written behind it.
    pub fn behind(self) -> &'static str {
        self.written().1
    }

    /// Reads the words of a line; nothing if they say something else.
    pub fn read(line: &[&str]) -> Option<Change> {
        let line = line.join(" ");
        let is_this = |word: &str, behind: &str| line.strip_prefix(word) == Some(behind);
        let mut words = WORDS.iter();
        words
            .find(|(word, behind, _)| is_this(word, behind))
            .map(|found| found.2)
    }
}

impl Filter {
    fn options(self, below: &str) -> Options {
        let options = Options::new().with("file", below);
        match self {
            Filter::CopyOnRead => options.with("driver", "copy-on-read"),
            Filter::Throttle => options
                .with("driver", "throttle")
                .with("throttle-group", LIMITS),
        }
    }
}

/// Notes the moment in which an overlay becomes the disk's image.
struct Note {
    overlays: Overlays,
    disk: Arc<SimDisk>,
}

impl Action for Note {
    fn prepare(&mut self, _co: &Co) -> block::Result<()> {
        Ok(())
    }

    fn commit(&mut self, _graph: &mut GraphWrite<'_>) {
        self.overlays.push(self.disk.clone());
    }
}

fn make(co: &Co, graph: &Arc<Graph>, options: Options) -> block::Result<Arc<Node>> {
    open(co, graph, &session::registry(), &DenyAll, options)
}

/// Runs it; what was opened for it is closed where it fails.
fn run(
    co: &Co,
    graph: &Arc<Graph>,
    mut transaction: Transaction,
    opened: Vec<Arc<Node>>,
) -> block::Result<()> {
    let result = transaction.run(co);
    drop(transaction);
    if result.is_err() {
        for node in opened {
            // What lies below may be broken, which the transaction has told.
            let _ = close_unused(co, graph, node);
        }
    }
    result
}

impl Shared {
    /// One at a time, so that it is known what came last.
    pub(crate) fn change(&self, sender: &Sender<'_>, change: Change) -> Result<(), Failed> {
        let mut inserted = self.inserted.lock(sender.co);
        self.state.borrow_mut().changes.begin();
        let result = self.make_change(sender, change, &mut inserted);
        self.state.borrow_mut().changes.end();
        if let Some(effect) = result? {
            self.happened(effect);
        }
        Ok(())
    }

    /// Makes it, and says what it did.
    fn make_change(
        &self,
        sender: &Sender<'_>,
        change: Change,
        inserted: &mut Vec<Arc<Node>>,
    ) -> block::Result<Option<Effect>> {
        let graph = sender.backend.graph();
        let image = || {
            let overlays = self.stage().overlays;
            graph.find_node(&overlays.node_name(overlays.count()))
        };
        let closed = || block::Error::new(ErrorKind::Closed, "the image is closed");
        let image = image().ok_or_else(closed)?;
        match change {
            Change::Insert { filter, low } => {
                self.group(graph);
                let top = sender.send(|co, backend| {
                    let below = if low { image } else { backend.node() };
                    let top = make(co, graph, filter.options(below.name()))?;
                    let mut transaction = Transaction::new(graph);
                    transaction.insert(&top);
                    run(co, graph, transaction, vec![top.clone()])?;
                    Ok::<_, block::Error>(top)
                })?;
                inserted.push(top);
            }
            Change::Remove => {
                let Some(top) = inserted.pop() else {
                    return Ok(None);
                };
                let mut transaction = Transaction::new(graph);
                transaction.remove(&top);
                let result = sender.send(|co, _| run(co, graph, transaction, Vec::new()));
                if result.is_err() {
                    inserted.push(top);
                }
                result?;
            }
            Change::Replace { filter } => {
                let Some(old) = inserted.pop() else {
                    return Ok(None);
                };
                self.group(graph);
                let (result, stays) = sender.send(|co, _| replace(co, graph, &old, filter));
                inserted.push(stays.unwrap_or(old));
                result?;
            }
            Change::Options { discard } => {
                let mut transaction = Transaction::new(graph);
                let to = Reopen {
                    discard: Some(discard),
                    ..Reopen::default()
                };
                transaction.reopen(&image, to);
                sender.send(|co, _| run(co, graph, transaction, Vec::new()))?;
                return Ok(None);
            }
            Change::Refused => {
                sender.send(|co, backend| refused(co, backend, &image))?;
                return Ok(None);
            }
            Change::Home { queue } => {
                let home = self.context(queue);
                let before = sender.backend.home_context();
                sender.send(|co, backend| backend.move_to(co, home))?;
                assert!(Arc::ptr_eq(&sender.backend.home_context(), home));
                return Ok((!Arc::ptr_eq(&before, home)).then_some(Effect::HomeMove));
            }
            Change::Snapshot { two } => {
                // An overlay is as long as what it comes above.
                let _layout = self.layout.write(sender.co);
                let stage = self.stage();
                sender.send(|co, backend| snapshot(co, backend, &stage, &image, two))?;
            }
        }
        Ok(Some(Effect::GraphChange))
    }
}

/// The filter that has the place now, if it is the new one.
fn replace(
    co: &Co,
    graph: &Arc<Graph>,
    old: &Arc<Node>,
    filter: Filter,
) -> (block::Result<()>, Option<Arc<Node>>) {
    let below = {
        let guard = graph.read(co);
        old.children(&guard)[0].node(&guard).name().to_owned()
    };
    let new = match make(co, graph, filter.options(&below)) {
        Ok(new) => new,
        Err(error) => return (Err(error), None),
    };
    let mut transaction = Transaction::new(graph);
    transaction.replace(old, &new);
    let result = run(co, graph, transaction, vec![new.clone()]);
    let stays = result.is_ok().then_some(new);
    (result, stays)
}

/// Rule 8.2: all or nothing.
fn refused(co: &Co, backend: &Arc<BlockBackend>, image: &Arc<Node>) -> block::Result<()> {
    let (graph, before) = (backend.graph(), backend.node());
    let top = make(co, graph, Filter::CopyOnRead.options(before.name()))?;
    let mut transaction = Transaction::new(graph);
    let to = Reopen {
        read_only: Some(true),
        ..Reopen::default()
    };
    transaction.insert(&top).reopen(image, to);
    let result = run(co, graph, transaction, vec![top]);
    assert!(
        Arc::ptr_eq(&backend.node(), &before),
        "a transaction that ended with {result:?} has changed the graph"
    );
    match result {
        Err(error) if error.kind() == ErrorKind::ReadOnly => Ok(()),
        Err(error) => Err(error),
        Ok(()) => panic!("an image that is written to became read-only"),
    }
}

fn snapshot(
    co: &Co,
    backend: &Arc<BlockBackend>,
    stage: &Stage,
    image: &Arc<Node>,
    two: bool,
) -> block::Result<()> {
    let graph = backend.graph();
    let (disk, options) = stage.overlay(image.len());
    let overlay = make(co, graph, options.with("backing", image.name()))?;
    let mut transaction = Transaction::new(graph);
    let note = Note {
        overlays: stage.overlays.clone(),
        disk,
    };
    transaction.insert(&overlay);
    transaction.action(std::slice::from_ref(image), Box::new(note));
    let mut opened = vec![overlay];
    if !two {
        return run(co, graph, transaction, opened);
    }
    let second = Second::open(co, graph)?;
    transaction.insert(&second.overlay);
    opened.push(second.overlay.clone());
    let result = run(co, graph, transaction, opened);
    second.end(co, result.is_ok())?;
    result
}

/// A disk that has its snapshot together with the first one.
struct Second {
    backend: BlockBackend,
    before: Arc<Node>,
    overlay: Arc<Node>,
    below: Arc<SimDisk>,
}

/// Its bytes.
const SECOND: usize = 4096;

impl Second {
    fn open(co: &Co, graph: &Arc<Graph>) -> block::Result<Second> {
        let below = SimDisk::with_contents(&[1; SECOND]);
        let options = Options::new()
            .with("driver", "sim")
            .with_object("disk", below.clone());
        let before = make(co, graph, options)?;
        let backend = BlockBackend::new(graph, before.clone());
        let setting = Setting {
            size: SECOND as u64,
            ..Setting::default()
        };
        let empty = SimDisk::with_contents(&image::empty(&setting, Some("second.raw")));
        let options = sim::image(&empty).with("backing", before.name());
        Ok(Second {
            overlay: make(co, graph, options)?,
            backend,
            before,
            below,
        })
    }

    /// Both disks have their overlays, or none.
    fn end(self, co: &Co, snapshot: bool) -> block::Result<()> {
        let stands_on = self.backend.node();
        assert_eq!(
            Arc::ptr_eq(&stands_on, &self.before),
            !snapshot,
            "the second disk has {stands_on:?}; a snapshot of both: {snapshot}"
        );
        let none = RequestFlags::empty();
        self.backend.pwrite(co, 512, &[2; 512][..], none)?;
        let mut bytes = vec![0; SECOND];
        self.backend.pread(co, 0, &mut bytes[..])?;
        let wanted = |at| if at / 512 == 1 { 2 } else { 1 };
        assert!((0..).zip(&bytes).all(|(at, byte)| *byte == wanted(at)));
        let below = self.below.peek(512, 1)[0];
        assert_eq!(below, if snapshot { 1 } else { 2 }, "what lies below");
        drop((stands_on, self.before, self.overlay));
        self.backend.close(co)
    }
}
