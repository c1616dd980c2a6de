//! Block status: what a layer holds, what a chain reads, and where a range is allocated.

mod support;

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_block::throttle::{ThrottleConfig, ThrottleGroup};
use coblock_block::types::{bytes, in_memory};
use coblock_block::{
    BlockBackend, Child, ChildRole, Driver, DriverStatus, ErrorKind, GraphRead, Limits, Mixed,
    OpenDriver, Opening, Options, Place, Precision, Result, Status,
};
use coblock_coroutine::Co;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use support::{World, end, engines, settle, sim, sim_world, start};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
/// Blocks of a [`Layer`].
const BLOCK: u64 = 64 * K;

/// Length, data, zero, allocated, end, offset.
type Told = (u64, bool, bool, bool, bool, Option<u64>);

fn told(status: &Status) -> Told {
    let offset = status.place.as_ref().map(|(_, offset)| *offset);
    (
        status.len,
        status.data,
        status.zero,
        status.allocated,
        status.eof,
        offset,
    )
}

/// A format with a letter for each block: `d` data, `z` zeros, `.` not held. Reads and writes go
/// nowhere.
#[derive(Debug)]
struct OpenLayer;

struct Layer {
    letters: String,
    /// Opened to be found as an edge of the node.
    _backing: Option<Arc<Child>>,
}

impl OpenDriver for OpenLayer {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let letters = opening.options().take_str("letters")?.expect("letters");
        let has_backing = opening.options().take_bool("chained")?.unwrap_or(false);
        let _backing = if has_backing {
            Some(opening.open_child(co, "backing", ChildRole::Backing)?)
        } else {
            None
        };
        Ok(Box::new(Layer { letters, _backing }))
    }
}

impl Driver for Layer {
    fn format(&self) -> &'static str {
        "layer"
    }

    support::requests::takes_all_requests!();

    fn block_status<'g>(
        &'g self,
        _: &Co,
        _: &'g GraphRead<'_>,
        offset: u64,
        len: u64,
        _: Precision,
    ) -> Result<DriverStatus<'g>> {
        let rest = &self.letters[in_memory(offset / BLOCK)..];
        let first = rest.chars().next().expect("inside the node");
        let run = rest.chars().take_while(|letter| *letter == first).count();
        let len = len.min(bytes(run) * BLOCK - offset % BLOCK);
        Ok(match first {
            'd' => DriverStatus::data(len).placed(Place::Here(offset)),
            'z' => DriverStatus::zero(len),
            _ => DriverStatus::unallocated(len),
        })
    }

    fn len(&self) -> u64 {
        bytes(self.letters.len()) * BLOCK
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn is_format(&self) -> bool {
        true
    }
}

/// A chain of layers, the top one first; a name is the node's name as well.
fn chain(layers: &[(&str, &str)]) -> Options {
    let mut options = Options::new();
    let mut prefix = String::new();
    for (nth, (name, letters)) in layers.iter().enumerate() {
        let key = |key: &str| format!("{prefix}{key}");
        options = options
            .with(&key("driver"), "layer")
            .with(&key("node-name"), *name)
            .with(&key("letters"), *letters);
        if nth + 1 < layers.len() {
            options = options.with(&key("chained"), "on");
        }
        prefix.push_str("backing.");
    }
    options
}

fn layered_world(options: Options) -> (World, Arc<BlockBackend>) {
    let mut world = World::simulated();
    world.registry.register("layer", Box::new(OpenLayer));
    let backend = Arc::new(world.open(options).unwrap());
    (world, backend)
}

/// All that a call tells, from the first byte to the last.
fn walk(len: u64, mut ask: impl FnMut(u64, u64) -> Result<Status>) -> Vec<(u64, Status)> {
    let mut at = 0;
    let mut all = Vec::new();
    while at < len {
        let status = ask(at, len - at).unwrap();
        assert!(status.len > 0 && status.len <= len - at, "{status:?}");
        assert_eq!(status.eof, at + status.len == len, "{at}: {status:?}");
        let here = at;
        at += status.len;
        all.push((here, status));
    }
    all
}

/// Pages of a simulated disk are data once written, and zeros before and after
/// (test-block-iothread, block_status: allocated follows the driver; nothing for an empty range and
/// past the end).
#[test]
fn a_disk_tells_what_was_written() {
    let disk = SimDisk::new(64 * K);
    disk.poke(8 * K, &[1; 8192]);
    let (world, backend) = sim_world(&disk, &[]);
    for (name, offset, len, want) in [
        (
            "before",
            0,
            64 * K,
            (8 * K, false, true, true, false, Some(0)),
        ),
        (
            "less than there is",
            0,
            10,
            (10, false, true, true, false, Some(0)),
        ),
        (
            "data",
            8 * K,
            64 * K,
            (8 * K, true, false, true, false, Some(8 * K)),
        ),
        (
            "an odd byte",
            9001,
            64 * K,
            (16 * K - 9001, true, false, true, false, Some(9001)),
        ),
        (
            "to the end",
            16 * K,
            48 * K,
            (48 * K, false, true, true, true, Some(16 * K)),
        ),
        (
            "over the end",
            60 * K,
            M,
            (4 * K, false, true, true, true, Some(60 * K)),
        ),
        ("nothing", 8 * K, 0, (0, false, false, false, false, None)),
        (
            "nothing at the end",
            64 * K,
            0,
            (0, false, false, false, true, None),
        ),
        (
            "past the end",
            65 * K,
            10,
            (0, false, false, false, true, None),
        ),
        (
            "far past it",
            u64::MAX,
            u64::MAX,
            (0, false, false, false, true, None),
        ),
    ] {
        let status = world
            .run(|co| backend.block_status(co, offset, len))
            .unwrap();
        assert_eq!(told(&status), want, "{name}");
        let (is_allocated, len) = world
            .run(|co| backend.is_allocated(co, offset, len))
            .unwrap();
        assert_eq!((is_allocated, len), (want.3, want.0), "{name}");
        let mixed = Mixed::new(&backend, &world.home)
            .block_status(offset, len)
            .unwrap();
        assert_eq!(told(&mixed).0, len.min(want.0), "{name}: the mixed face");
    }
    end(world, backend);
}

/// A driver that says nothing about status holds everything; `null-co` says what its options say.
#[test]
fn drivers_without_storage() {
    let world = World::simulated();
    for (name, more, want) in [
        (
            "neither data nor zeros",
            &[][..],
            (M, false, false, false, true, None),
        ),
        (
            "zeros",
            &[("read-zeroes", "on")],
            (M, false, true, true, true, Some(0)),
        ),
    ] {
        let options = more.iter().fold(
            Options::new().with("driver", "null-co").with("size", "1M"),
            |options, (key, value)| options.with(key, *value),
        );
        let backend = world.open(options).unwrap();
        let status = world.run(|co| backend.block_status(co, 0, M)).unwrap();
        assert_eq!(told(&status), want, "{name}");
        assert_eq!(world.run(|co| backend.allocated_bytes(co)).unwrap(), 0);
        world.close(backend).unwrap();
    }
    world.end();
}

/// `raw` passes the question on, shifted, and its part ends where it ends.
#[test]
fn raw_passes_the_question_on() {
    let disk = SimDisk::new(64 * K);
    disk.poke(8 * K, &[1; 8192]);
    let world = World::simulated();
    let options = Options::new()
        .with("driver", "raw")
        .with("offset", "4096")
        .with("size", "10k")
        .with("file.driver", "sim")
        .with("file.node-name", "below")
        .with_object("file.disk", disk);
    let backend = world.open(options).unwrap();
    let all = walk(10 * K, |at, len| {
        world.run(|co| backend.block_status(co, at, len))
    });
    let told: Vec<Told> = all.iter().map(|(_, status)| told(status)).collect();
    assert_eq!(
        told,
        [
            (4 * K, false, true, true, false, Some(4 * K)),
            (6 * K, true, false, true, true, Some(8 * K)),
        ]
    );
    let (place, _) = all[0].1.place.as_ref().unwrap();
    assert_eq!(place.name(), "below");
    drop(all);
    world.close(backend).unwrap();
    world.end();
}

/// Answers end at whole blocks of the node; a block of both kinds is data.
#[test]
fn answers_end_at_whole_blocks() {
    let disk = SimDisk::new(64 * K);
    disk.poke(12 * K, &[1; 4096]);
    let (world, backend) = sim_world(&disk, &[("request-alignment", "8192")]);
    let all = walk(64 * K, |at, len| {
        world.run(|co| backend.block_status(co, at, len))
    });
    let told: Vec<Told> = all.iter().map(|(_, status)| told(status)).collect();
    assert_eq!(
        told,
        [
            (8 * K, false, true, true, false, Some(0)),
            (8 * K, true, false, true, false, Some(8 * K)),
            (48 * K, false, true, true, true, Some(16 * K)),
        ]
    );
    drop(all);
    end(world, backend);
}

/// A file tells its holes, with both engines, and how much storage it takes up.
#[test]
fn a_file_tells_its_holes() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sparse");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(4 * M).unwrap();
        file.write_all_at(&vec![1; in_memory(M)], M).unwrap();
        let world = World::with_engine(engine);
        let backend = world.open(Options::file(path.to_str().unwrap())).unwrap();
        let all = walk(4 * M, |at, len| {
            world.run(|co| backend.block_status(co, at, len))
        });
        let told: Vec<Told> = all.iter().map(|(_, status)| told(status)).collect();
        assert_eq!(
            told,
            [
                (M, false, true, true, false, Some(0)),
                (M, true, false, true, false, Some(M)),
                (2 * M, false, true, true, true, Some(2 * M)),
            ],
            "{engine:?}"
        );
        let stored = world.run(|co| backend.allocated_bytes(co)).unwrap();
        assert!((M..2 * M).contains(&stored), "{stored} bytes are stored");
        // Where it is allocated is told without looking for holes.
        let found = world.run(|co| backend.is_allocated(co, 0, 4 * M)).unwrap();
        assert_eq!(found, (true, 4 * M));
        drop(all);
        world.close(backend).unwrap();
        world.end();
    }
}

/// A question is in flight until it is answered (rule 5.7), its failure tells where, and a closed
/// backend answers none.
#[test]
fn a_question_is_a_request() {
    let disk = SimDisk::new(M);
    let (world, backend) = sim_world(&disk, &[]);
    let hold = disk.hold(Match::statuses());
    let asked = start(&world, &backend, |co, backend| {
        backend.block_status(co, 0, 100).map(drop)
    });
    settle(&world);
    assert_eq!((backend.in_flight(), backend.node().in_flight()), (1, 1));
    let closed = start(&world, &backend, |co, backend| backend.close(co));
    settle(&world);
    assert!(closed.borrow().is_none(), "close waits for the question");
    drop(hold);
    settle(&world);
    assert!(matches!(*asked.borrow(), Some(Ok(()))));
    assert!(matches!(*closed.borrow(), Some(Ok(()))));
    let error = world.run(|co| backend.map(co, 0, 100)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    drop(backend);
    world.end();

    let (world, backend) = sim_world(&disk, &[]);
    disk.fail(Fault::new(Match::statuses(), libc::ENOSPC));
    let error = world.run(|co| backend.map(co, 512, 100)).unwrap_err();
    assert_eq!((error.errno(), error.offset()), (libc::ENOSPC, Some(512)));
    assert_eq!(disk.counts().statuses, 2);
    end(world, backend);
}

/// One layer tells of itself: what it does not hold is zeros only where no backing file can hold
/// it.
#[test]
fn one_layer() {
    let (world, backend) = layered_world(chain(&[("top", "d.z..."), ("base", "dddd")]));
    let all = walk(6 * BLOCK, |at, len| {
        world.run(|co| backend.block_status(co, at, len))
    });
    let told: Vec<Told> = all.iter().map(|(_, status)| told(status)).collect();
    assert_eq!(
        told,
        [
            (BLOCK, true, false, true, false, Some(0)),
            (BLOCK, false, false, false, false, None),
            (BLOCK, false, true, true, false, None),
            // From inside the backing file over its end: the file must be asked.
            (3 * BLOCK, false, false, false, true, None),
        ]
    );
    let past = world
        .run(|co| backend.block_status(co, 4 * BLOCK, BLOCK))
        .unwrap();
    assert_eq!(told_of(&past), (false, true, false));
    drop(all);
    end(world, backend);
}

/// Data, zero, allocated.
fn told_of(status: &Status) -> (bool, bool, bool) {
    (status.data, status.zero, status.allocated)
}

/// The map of a chain, as letters: which layer decides, and what the bytes are there.
fn map_of(world: &World, backend: &BlockBackend) -> String {
    let all = walk(backend.len(), |at, len| {
        world.run(|co| backend.map(co, at, len))
    });
    let parts = all.iter().map(|(_, status)| {
        let what = match told_of(status) {
            (true, false, true) => 'd',
            (false, true, true) => 'z',
            (false, true, false) => '.',
            other => panic!("{other:?}"),
        };
        let blocks = in_memory(status.len / BLOCK);
        format!("{what}{} ", status.depth).repeat(blocks)
    });
    parts.collect::<String>().trim_end().to_owned()
}

/// Down a chain to the layer that decides, over layers that are shorter or longer.
#[test]
fn chains_are_mapped() {
    for (name, layers, want) in [
        ("one layer", &["dz.d"][..], "d0 z0 .0 d0"),
        ("two layers", &["d.z.", "dd.z"], "d0 d1 z0 z1"),
        ("nobody holds it", &["..", "..", ".."], ".2 .2"),
        (
            "the middle hides the base",
            &["....", "z.z.", "dddd"],
            "z1 d2 z1 d2",
        ),
        ("a short backing file", &["....", "dd"], "d1 d1 .0 .0"),
        ("a short middle", &["....", ".d", "dddd"], "d2 d1 .0 .0"),
        ("a long backing file", &["..", "dzdd"], "d1 z1"),
    ] {
        let names = ["a", "b", "c"];
        let named: Vec<(&str, &str)> = names.into_iter().zip(layers.iter().copied()).collect();
        let (world, backend) = layered_world(chain(&named));
        assert_eq!(map_of(&world, &backend), want, "{name}");
        end(world, backend);
    }
}

/// Which layers above a base hold a range; the base itself is not asked.
#[test]
fn allocation_above_a_base() {
    let layers = [("top", "d......"), ("middle", ".d.z"), ("base", "dddd")];
    for (name, base, want) in [
        // A layer that is shorter than the one above holds zeros past its end.
        ("no base", None, "1111111"),
        ("above the base", Some("base"), "1101111"),
        ("above the middle", Some("middle"), "1000000"),
        ("above the top", Some("top"), "0000000"),
    ] {
        let (world, backend) = layered_world(chain(&layers));
        let base = base.map(|name| world.graph.find_node(name).unwrap());
        let len = backend.len();
        let (mut at, mut letters, mut zeroes) = (0, String::new(), Vec::new());
        while at < len {
            let (is_allocated, part) = world
                .run(|co| backend.is_allocated_above(co, base.as_ref(), at, len - at))
                .unwrap();
            let status = world
                .run(|co| backend.block_status_above(co, base.as_ref(), at, part))
                .unwrap();
            assert_eq!(
                (status.allocated, status.len),
                (is_allocated, part),
                "{name} {at}"
            );
            let letter = if is_allocated { "1" } else { "0" };
            letters.push_str(&letter.repeat(in_memory(part / BLOCK)));
            if status.allocated && status.zero {
                zeroes.push((at / BLOCK, status.depth));
            }
            at += part;
        }
        assert_eq!(letters, want, "{name}");
        if want == "1111111" {
            assert_eq!(zeroes, [(3, 1), (4, 1)], "{name}");
        }
        drop(base);
        end(world, backend);
    }
}

/// A filter in a chain is no layer of its own: the range is shifted, depth counts images.
#[test]
fn filters_are_passed_through() {
    let options = Options::new()
        .with("driver", "layer")
        .with("letters", "d...")
        .with("chained", "on")
        .with("backing.driver", "raw")
        .with("backing.node-name", "filter")
        .with("backing.offset", "64k")
        .with("backing.file.driver", "layer")
        .with("backing.file.node-name", "below")
        .with("backing.file.letters", "dzd.");
    let (world, backend) = layered_world(options);
    assert_eq!(map_of(&world, &backend), "d0 d1 .1 .0");
    let status = world.run(|co| backend.map(co, 2 * BLOCK, BLOCK)).unwrap();
    assert_eq!(status.depth, 1);
    // A base may be a filter, or below one.
    for name in ["filter", "below"] {
        let base = world.graph.find_node(name);
        let found = world
            .run(|co| backend.is_allocated_above(co, base.as_ref(), BLOCK, BLOCK))
            .unwrap();
        assert_eq!(found, (false, BLOCK), "above {name}");
    }
    end(world, backend);
}

/// Every other filter tells what the chain below it is.
#[test]
fn all_filters_tell_what_is_below() {
    let below = chain(&[("top", "d.z."), ("base", "dzd.")]);
    for (filter, group) in [("throttle", Some("group")), ("copy-on-read", None)] {
        let mut world = World::simulated();
        world.registry.register("layer", Box::new(OpenLayer));
        let clock = world.home.context().clock();
        let shared = ThrottleGroup::new("group", clock, ThrottleConfig::default()).unwrap();
        world.graph.add_throttle_group(&shared).unwrap();
        let mut options = Options::new().with("driver", filter);
        if let Some(group) = group {
            options = options.with("throttle-group", group);
        }
        options.nest("file", below.clone());
        let backend = Arc::new(world.open(options).unwrap());
        assert_eq!(map_of(&world, &backend), "d0 z1 z0 .1", "{filter}");
        end(world, backend);
    }
}

/// What a raw file of the host is equals what `qemu-img map` tells.
#[test]
fn a_sparse_file_is_mapped_like_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(3 * M + 5 * 512).unwrap();
    for at in [0, 5 * 4096, M, 2 * M + 512, 3 * M + 2048] {
        file.write_all_at(&[1; 500], at).unwrap();
    }
    let path = path.to_str().unwrap();
    let Ok(output) = std::process::Command::new("qemu-img")
        .args(["map", "--output=json", "-f", "raw", path])
        .output()
    else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI needs qemu-img"
        );
        writeln!(std::io::stderr(), "SKIPPED: qemu-img is not installed").expect("standard error");
        return;
    };
    let theirs = String::from_utf8(output.stdout).unwrap();
    let world = World::with_engine(EngineKind::Threads);
    let backend = world.open(Options::format_on_file("raw", path)).unwrap();
    let all = walk(backend.len(), |at, len| {
        world.run(|co| backend.map(co, at, len))
    });
    let lines: Vec<String> = all
        .iter()
        .map(|(start, status)| {
            let (len, data, zero, present, _, offset) = told(status);
            let (depth, compressed) = (status.depth, status.compressed);
            let offset = offset.expect("of a file");
            format!(
                "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
                 \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}, \"offset\": {offset}}}"
            )
        })
        .collect();
    assert_eq!(format!("[{}]\n", lines.join(",\n")), theirs);
    drop(all);
    world.close(backend).unwrap();
    world.end();
}

/// A disk on simulated storage may be asked in any context: an answer belongs to none.
#[test]
fn a_place_outlives_the_question() {
    let disk = SimDisk::new(M);
    let world = World::simulated();
    let backend = world.open(sim(&disk)).unwrap();
    let status = world.run(|co| backend.block_status(co, 0, M)).unwrap();
    world.close(backend).unwrap();
    let (node, offset) = status.place.expect("a disk has places");
    assert_eq!((node.format(), offset), ("sim", 0));
    assert_eq!(world.graph.live_nodes(), 1, "it is kept, closed");
    drop(node);
    world.end();
}
