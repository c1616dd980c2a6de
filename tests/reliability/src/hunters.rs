//! Small workloads with their oracles, for hunting mutants: the first ones take milliseconds, the
//! last ones go wherever the swarm leads.

mod graph;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use coblock::aio::EngineKind;
use coblock::block::drivers::sim::{Match, SimDisk};
use coblock::block::{
    BlockBackend, DenyAll, ErrorKind, Options, RequestFlags, RequestKind, RequestTable,
};
use coblock::coroutine::CoQueue;
use coblock::qcow2::header::Header;

use super::judge::{Judge, Verdict};
use super::play::play;
use super::rng::Rng;
use super::script::{Op, Script, Setting};
use super::session::Session;
use super::swarm::Params;
use super::{crash, image, sim, soundness};

/// Name, how many states there are, what is done in each.
pub type Hunter = (&'static str, u64, fn(u64) -> Verdict);

/// All hunters, the quick ones first.
pub const ALL: &[Hunter] = &[
    ("lock bytes", LOCK_CASES.len() as u64, lock_bytes),
    ("serialising requests", 1, serialising),
    ("shared clusters", 1, shared_clusters),
    ("a reader of a freed cluster", 1, reader_of_a_freed_cluster),
    ("a pass during a flush", 1, pass_during_a_flush),
    ("limits", 1, limits),
    ("permissions", 1, graph::permissions),
    ("steps of a transaction", 1, graph::steps),
    ("a transaction that fails", 1, graph::abort),
    ("the last reader", 1, graph::last_reader),
    ("former seeds", FORMER.len() as u64, former_seed),
    ("simulated seeds", 24, simulated),
    ("power cuts", 24, power_cut),
    ("scripts", 1, scripts),
    ("the whole stack", 40, whole_stack),
];

/// Read-only? May others write?
type Opens = (bool, bool);

/// Who has the file, who wants it, and may they?
const LOCK_CASES: [(Opens, Opens, bool); 6] = [
    ((false, false), (false, false), false),
    ((false, false), (true, false), false),
    ((true, false), (false, false), false),
    ((true, false), (true, false), true),
    ((true, true), (false, true), true),
    ((true, false), (false, true), false),
];

/// Two graphs want the same file, as two processes would.
fn lock_bytes(state: u64) -> Verdict {
    let (first, second, fits) = LOCK_CASES[usize::try_from(state).expect("few")];
    let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    let options = |(read_only, share): (bool, bool)| {
        let word = |on: bool| if on { "on" } else { "off" };
        Options::file(file.path().to_str().expect("text"))
            .with("read-only", word(read_only))
            .with("share-rw", word(share))
    };
    let [one, other] = [EngineKind::Threads; 2].map(Session::new);
    let has = one
        .open(options(first), &DenyAll)
        .map_err(|e| e.to_string())?;
    let got = other.open(options(second), &DenyAll);
    let verdict = match (&got, fits) {
        (Ok(_), true) => Ok(()),
        (Err(error), false) if error.kind() == ErrorKind::Locked => Ok(()),
        (got, fits) => Err(format!("{got:?}, but may they? {fits}")),
    };
    if let Ok(got) = got {
        other.close(got);
    }
    one.close(has);
    one.end();
    other.end();
    verdict
}

/// Two requests on the same bytes, both serialising: the second one waits, and goes on when the
/// first has ended.
fn serialising(_: u64) -> Verdict {
    let session = sim::session();
    let table = Rc::new(RequestTable::new());
    let gate = Rc::new(CoQueue::new());
    let (inside, done, met) = (
        Rc::new(Cell::new(false)),
        Rc::new(Cell::new(false)),
        Rc::new(Cell::new(false)),
    );
    for first in [true, false] {
        let (table, gate, graph) = (table.clone(), gate.clone(), session.graph.clone());
        let (inside, done, met) = (inside.clone(), done.clone(), met.clone());
        session.home.spawn("request", move |co| {
            let slot = graph.read(co).slot();
            let request = table.begin(slot, 512, 512, RequestKind::Write);
            request.serialise(co, 0, 4096);
            if first {
                inside.set(true);
                gate.wait(co);
                inside.set(false);
            } else {
                met.set(inside.get());
                done.set(true);
            }
        });
    }
    let settle = || while session.home.poll(false) {};
    settle();
    let early = done.get();
    gate.wake_all();
    settle();
    if early || met.get() {
        return Err("they are on the same bytes at once".to_string());
    }
    if !done.get() {
        return Err("the second one waits for ever".to_string());
    }
    session.end();
    Ok(())
}

const CLUSTER: usize = 4096;

fn word(disk: &SimDisk, at: u64) -> u64 {
    u64::from_be_bytes(disk.peek(at, 8).try_into().expect("eight bytes"))
}

/// An image whose L2 table and clusters have a second owner, as after a snapshot: the owner's bytes
/// never change.
fn shared_clusters(_: u64) -> Verdict {
    const COPIED: u64 = 1 << 63;
    let setting = Setting::default();
    let disk = SimDisk::with_contents(&image::empty(&setting, None));
    let session = sim::session();
    let fill = |backend: &Arc<BlockBackend>, byte: u8, clusters: std::ops::Range<u64>| {
        session.home.run(|co| {
            for at in clusters {
                let data = vec![byte; CLUSTER];
                backend
                    .pwrite(co, at * CLUSTER as u64, &data[..], RequestFlags::empty())
                    .map_err(|e| e.to_string())?;
            }
            backend.flush(co).map_err(|e| e.to_string())
        })
    };
    let backend = session
        .open(sim::image(&disk), &DenyAll)
        .map_err(|e| e.to_string())?;
    fill(&backend, 1, 0..4)?;
    session.close(backend);

    // The second owner: every count is two, no copied flag.
    let header: Header = soundness::header(&disk);
    let l1 = header.l1_offset.get();
    let table = word(&disk, l1) & !COPIED;
    let mut kept = vec![table];
    disk.poke(l1, &table.to_be_bytes());
    for slot in 0..4 {
        let host = word(&disk, table + slot * 8) & !COPIED;
        disk.poke(table + slot * 8, &host.to_be_bytes());
        kept.push(host);
    }
    let counts = word(&disk, header.refcount_table_offset.get());
    for host in &kept {
        disk.poke(counts + host / CLUSTER as u64 * 2, &2u16.to_be_bytes());
    }
    let before: Vec<Vec<u8>> = kept.iter().map(|host| disk.peek(*host, CLUSTER)).collect();

    let backend = session
        .open(sim::image(&disk), &DenyAll)
        .map_err(|e| e.to_string())?;
    session.home.run(|co| {
        let mut first = vec![0; CLUSTER];
        backend
            .pread(co, 0, &mut first[..])
            .map_err(|e| e.to_string())
    })?;
    // Twice, so that what the first pass gave back could be used by the second.
    for round in 2..5 {
        fill(&backend, round, 0..3)?;
        fill(
            &backend,
            round,
            8 * u64::from(round)..8 * u64::from(round) + 6,
        )?;
    }
    session.close(backend);
    for (host, bytes) in kept.iter().zip(before) {
        if disk.peek(*host, CLUSTER) != bytes {
            return Err(format!(
                "the other owner's cluster at {host:#x} has changed"
            ));
        }
    }
    let (corruptions, _) = soundness::check(&session, &disk)?;
    session.end();
    match corruptions {
        0 => Ok(()),
        many => Err(format!("{many} corruptions")),
    }
}

/// A read that is under way while its cluster is discarded, the discard made durable, and new
/// clusters written: what it returns is the old data, or zeros, never another cluster's.
fn reader_of_a_freed_cluster(_: u64) -> Verdict {
    let disk = SimDisk::with_contents(&image::empty(&Setting::default(), None));
    let session = sim::session();
    let backend = session
        .open(sim::image(&disk), &DenyAll)
        .map_err(|e| e.to_string())?;
    let write = |cluster: u64, byte: u8| {
        session.home.run(|co| {
            let data = vec![byte; CLUSTER];
            backend
                .pwrite(
                    co,
                    cluster * CLUSTER as u64,
                    &data[..],
                    RequestFlags::empty(),
                )
                .and_then(|()| backend.flush(co))
                .map_err(|e| e.to_string())
        })
    };
    write(0, 1)?;
    let header = soundness::header(&disk);
    let table = word(&disk, header.l1_offset.get()) & !(1 << 63);
    let host = word(&disk, table) & !(1 << 63);
    let hold = disk.hold(Match::reads().touching(host..host + CLUSTER as u64));
    let read = Rc::new(Cell::new(None));
    let (result, its) = (read.clone(), backend.clone());
    session.home.spawn("read", move |co| {
        let mut data = vec![9; CLUSTER];
        let done = its.pread(co, 0, &mut data[..]);
        result.set(Some(done.map(|()| data)));
    });
    while session.home.poll(false) {}
    if hold.waiting() != 1 {
        return Err("the read is not under way".to_string());
    }
    session
        .home
        .run(|co| backend.pdiscard(co, 0, CLUSTER as u64))
        .map_err(|e| e.to_string())?;
    for cluster in 1..4 {
        write(cluster, 2)?;
    }
    hold.release_all();
    while session.home.poll(false) {}
    let data = read.take().ok_or("the read waits for ever")?;
    let data = data.map_err(|e| e.to_string())?;
    session.close(backend);
    session.end();
    match data.iter().find(|byte| **byte > 1) {
        None => Ok(()),
        Some(byte) => Err(format!("it found {byte}, which is another cluster's")),
    }
}

/// A full cache asks for a pass of write-back while a flush is in the middle of one: it waits for
/// its turn, or the older copy of a table could land on the newer one. What both wrote is there
/// afterwards. (What is found is a panic: what waits for the other could not be unwound.)
fn pass_during_a_flush(_: u64) -> Verdict {
    /// Bytes that one L2 table maps.
    const STRIDE: u64 = (CLUSTER * CLUSTER / 8) as u64;
    let setting = Setting {
        size: 64 << 20,
        ..Setting::default()
    };
    let disk = SimDisk::with_contents(&image::empty(&setting, None));
    let session = sim::session();
    let open = |disk: &Arc<SimDisk>| {
        let options = sim::image_with_smallest_caches(disk);
        session.open(options, &DenyAll).map_err(|e| e.to_string())
    };
    let backend = open(&disk)?;
    let start = |numbers: std::ops::Range<u8>| {
        let done = Rc::new(Cell::new(None));
        let (result, its) = (done.clone(), backend.clone());
        session.home.spawn("write and flush", move |co| {
            let wrote = numbers.into_iter().try_for_each(|number| {
                let at = u64::from(number) * STRIDE;
                its.pwrite(co, at, &[1 + number; CLUSTER][..], RequestFlags::empty())
            });
            result.set(Some(wrote.and_then(|()| its.flush(co))));
        });
        while session.home.poll(false) {}
        done
    };
    let ended = |done: Rc<Cell<Option<coblock::block::Result<()>>>>| {
        let result = done.take().expect("a write or a flush waits for ever");
        result.map_err(|e| e.to_string())
    };
    ended(start(0..1))?;
    let counts = word(&disk, soundness::header(&disk).refcount_table_offset.get());
    let hold = disk.hold(Match::writes().touching(counts..counts + CLUSTER as u64));
    let first = start(1..2);
    assert_eq!(hold.waiting(), 1, "no flush is writing counts");
    let second = start(2..20);
    assert_eq!(hold.waiting(), 1, "two passes write counts at once");
    let waits = second.take();
    assert!(waits.is_none(), "what fills the cache does not wait");
    drop(hold);
    while session.home.poll(false) {}
    ended(first)?;
    ended(second)?;
    // What a power cut now would leave, and not what the caches know.
    let left = SimDisk::with_contents(&disk.contents());
    session.close(backend);
    let backend = open(&left)?;
    for number in 0..20 {
        let mut data = vec![0; CLUSTER];
        session
            .home
            .run(|co| backend.pread(co, u64::from(number) * STRIDE, &mut data[..]))
            .map_err(|e| e.to_string())?;
        assert_eq!(
            data,
            [1 + number; CLUSTER],
            "what was flushed, write {number}"
        );
    }
    session.close(backend);
    session.end();
    Ok(())
}

/// Two queues with limits that stay: each request that is let go lets the next one go in its time.
fn limits(_: u64) -> Verdict {
    let mut script = Script {
        setting: Setting {
            queues: 2,
            in_flight: 8,
            ..Setting::default()
        },
        ops: vec![Op::Throttle { iops: 200, bps: 0 }],
    };
    let read = Op::Read {
        offset: 0,
        len: 4096,
    };
    script.ops.extend([read; 100]);
    // Panics when nothing can ever happen again.
    match play(&script).now_ns {
        300_000_000.. => Ok(()),
        early => Err(format!("100 requests after {early} ns")),
    }
}

/// Seeds that found mistakes of the graph.
const FORMER: [u64; 3] = [21, 140, 693];

fn former_seed(state: u64) -> Verdict {
    let seed = FORMER[usize::try_from(state).expect("few")];
    super::seeds::judge_seed(seed).map(drop)
}

/// Scripts of former mistakes, cut everywhere.
fn scripts(_: u64) -> Verdict {
    let wanted = |name: &str| name.contains("growing-over-a-backing-file");
    let (_, script) = super::scripts::all()
        .into_iter()
        .find(|(name, _)| wanted(name))
        .ok_or("the script is not there")?;
    super::power_cuts::judge_script(&script).map(drop)
}

/// A seed with everything: queues, sections, limits, filters, resizes, failures.
fn whole_stack(seed: u64) -> Verdict {
    super::seeds::judge_seed(seed).map(drop)
}

/// A run of the swarm.
fn simulated(seed: u64) -> Verdict {
    let mut played = play(&Params::draw(seed).script());
    let judge = Judge::default();
    let judged = judge.after_all(&mut played);
    judge.end();
    judged
}

/// A short run of the swarm, cut at places that a seed draws.
fn power_cut(seed: u64) -> Verdict {
    let mut params = Params::draw(seed);
    // Tables that grow, on every third.
    let grows = seed % 3 == 2;
    params = Params {
        cluster_bits: if grows { 9 } else { 10 + (seed % 3) as u32 },
        refcount_order: if grows { 6 } else { 4 },
        version: 3,
        size: if grows { 3 << 20 } else { 256 << 10 },
        unit: 512,
        max_len: 8 << 10,
        in_flight: 8,
        writes: 75,
        flushes: 12,
        zeros: 25,
        hot: 50,
        requests: if grows { 10 } else { 90 },
        fill: if grows { 9 << 18 } else { 0 },
        copies: 0,
        lazy: seed % 4 == 3,
        ..params
    };
    let played = play(&params.script());
    let judge = Judge::default();
    if grows && played.stats.tables_grown == 0 {
        return Err("no table has grown".to_string());
    }
    let mut rng = Rng::new(seed);
    let mut cuts = played.stage.disk.power_cuts();
    for at in 0..=played.log.len() {
        cuts.go_to(at);
        for keep in crash::choices(&cuts, at, &mut rng) {
            // All states of all seeds would take minutes; these are enough for what is hunted.
            if !rng.chance(12) {
                continue;
            }
            let (left, _) = cuts.left(&keep);
            judge
                .after_power_cut(&played.stage, &played.history, at, &left)
                .map_err(|why| format!("cut after {at}, {keep:?}: {why}"))?;
        }
    }
    judge.end();
    Ok(())
}
