//! Damaged images: a seed picks an image and breaks fields of its metadata, knowing where they are.
//!
//! The damage is of the kinds that software and disks do: an entry with a wrong flag, a wrong
//! offset, another entry's offset; a refcount off by one; a table moved, cut, doubled; a file cut
//! short; and plain noise.

use super::rng::Rng;
use super::{get32, get64, put32, put64, qemu_img, qemu_io, text};
use std::path::Path;

/// Seeds to run: `COBLOCK_TEST_DAMAGE=FROM..TO`, or so many of every day.
pub fn seeds(usual: u64) -> std::ops::Range<u64> {
    let Ok(given) = std::env::var("COBLOCK_TEST_DAMAGE") else {
        return 0..usual;
    };
    let (from, to) = given
        .split_once("..")
        .expect("COBLOCK_TEST_DAMAGE=FROM..TO");
    from.parse().unwrap()..to.parse().unwrap()
}

/// How an image is made before it is damaged.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub options: &'static str,
    pub size: &'static str,
    pub snapshots: u32,
    pub compressed: bool,
    pub backing: bool,
    pub bitmaps: u32,
}

/// Images to damage: small and large clusters, every refcount width, both versions, all kinds of
/// entries.
pub fn recipes() -> Vec<Recipe> {
    let plain = Recipe {
        options: "",
        size: "1M",
        snapshots: 0,
        compressed: false,
        backing: false,
        bitmaps: 0,
    };
    let with = |options: &'static str, snapshots: u32, compressed: bool| Recipe {
        options,
        snapshots,
        compressed,
        ..plain.clone()
    };
    vec![
        with("cluster_size=512", 0, false),
        with("cluster_size=512,refcount_bits=64", 2, true),
        with("cluster_size=512,refcount_bits=1", 0, false),
        with("cluster_size=1k,refcount_bits=2", 1, true),
        with(
            "cluster_size=1k,refcount_bits=4,preallocation=metadata",
            2,
            false,
        ),
        with("cluster_size=2k,refcount_bits=8", 3, true),
        with("cluster_size=4k", 2, true),
        with("cluster_size=4k,compat=0.10", 1, true),
        with("cluster_size=512,compat=0.10", 2, false),
        with("cluster_size=4k,refcount_bits=32", 1, false),
        with("cluster_size=64k", 1, true),
        with(
            "cluster_size=64k,refcount_bits=1,preallocation=metadata",
            0,
            false,
        ),
        with("cluster_size=64k,lazy_refcounts=on", 0, false),
        with("cluster_size=2M", 1, false),
        Recipe {
            backing: true,
            ..with("cluster_size=512", 1, false)
        },
        Recipe {
            size: "70001",
            ..with("cluster_size=512,refcount_bits=2", 1, true)
        },
        Recipe {
            bitmaps: 2,
            ..with("cluster_size=512", 1, false)
        },
        Recipe {
            bitmaps: 1,
            ..with("cluster_size=4k", 0, true)
        },
    ]
}

/// Makes the image with the reference's tools; `None` (said aloud) without them.
pub fn make(recipe: &Recipe, dir: &Path) -> Option<Vec<u8>> {
    let path = dir.join("base.qcow2");
    let path = text(&path);
    let run = |args: &[&str]| {
        let output = qemu_img(args)?;
        assert!(
            output.status.success(),
            "{args:?}: {}",
            super::said(&output)
        );
        Some(())
    };
    let io = |commands: &[&str]| {
        let mut args = vec!["-f", "qcow2"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(path);
        let output = qemu_io(&args)?;
        assert!(
            output.status.success(),
            "{commands:?}: {}",
            super::said(&output)
        );
        Some(())
    };
    let mut create = vec!["create", "-q", "-f", "qcow2", "-u"];
    if !recipe.options.is_empty() {
        create.extend(["-o", recipe.options]);
    }
    if recipe.backing {
        let backing = dir.join("backing.raw");
        std::fs::write(&backing, vec![0x5a; 1 << 20]).unwrap();
        create.extend(["-b", "backing.raw", "-F", "raw"]);
    }
    create.extend([path, recipe.size]);
    run(&create)?;
    io(&["write -P 1 0 10k", "write -P 2 30k 8k", "write -P 3 60k 1k"])?;
    for number in 0..recipe.snapshots {
        run(&["snapshot", "-c", &format!("snapshot {number}"), path])?;
        let write = format!("write -P {} {}k 3k", 10 + number, 7 * number + 4);
        io(&[&write, &format!("write -P 9 {}k 1k", 40 + 6 * number)])?;
    }
    if !recipe.options.contains("0.10") {
        io(&["write -z 32k 4k", "write -z -u 12k 4k"])?;
    }
    if recipe.compressed {
        let unit = if recipe.options.contains("64k") {
            "64k"
        } else {
            "4k"
        };
        let at = if unit == "64k" {
            ["128k", "192k"]
        } else {
            ["48k", "56k"]
        };
        io(&[
            &format!("write -c -P 7 {} {unit}", at[0]),
            &format!("write -c -P 8 {} {unit}", at[1]),
        ])?;
    }
    for number in 0..recipe.bitmaps {
        run(&[
            "bitmap",
            "--add",
            "-g",
            "512",
            path,
            &format!("bitmap-{number}"),
        ])?;
        io(&["write -P 4 20k 2k"])?;
    }
    Some(std::fs::read(path).unwrap())
}

/// Where the metadata of an image is.
struct Map {
    cluster: u64,
    l1: Vec<usize>,
    l2: Vec<usize>,
    refcount_table: Vec<usize>,
    refcounts: Vec<usize>,
    snapshots: Vec<usize>,
    /// Bitmap directory entries.
    bitmaps: Vec<usize>,
    clusters: u64,
}

impl Map {
    fn of(image: &[u8]) -> Self {
        // Damaged before, perhaps: what no image may have is taken for the nearest that one may.
        let cluster = 1_u64 << get32(image, 20).clamp(9, 21);
        let len = image.len() as u64;
        let in_file = |at: u64, bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= len);
        let entries = |at: u64, count: u64| -> Vec<usize> {
            (0..count.min(len / 8))
                .map(|slot| at.saturating_add(slot * 8))
                .filter(|at| in_file(*at, 8))
                .map(|at| usize::try_from(at).unwrap())
                .collect()
        };
        let tables = |slots: &[usize], mask: u64| -> Vec<u64> {
            slots
                .iter()
                .map(|slot| get64(image, *slot) & mask)
                .filter(|at| *at != 0 && in_file(*at, cluster))
                .collect()
        };
        let l1 = entries(get64(image, 40), get32(image, 36).into());
        let l2: Vec<usize> = tables(&l1, 0x00ff_ffff_ffff_fe00)
            .into_iter()
            .flat_map(|at| entries(at, cluster / 8))
            .collect();
        let refcount_table = entries(get64(image, 48), u64::from(get32(image, 56)) * cluster / 8);
        let refcounts = tables(&refcount_table, !0x1ff)
            .into_iter()
            .flat_map(|at| at..at + cluster)
            .map(|at| usize::try_from(at).unwrap())
            .collect();
        let mut snapshots = Vec::new();
        let mut at = get64(image, 64);
        for _ in 0..get32(image, 60) {
            if !in_file(at, 64) {
                break;
            }
            let here = usize::try_from(at).unwrap();
            snapshots.push(here);
            let names = get32(image, here + 12);
            let len = 40
                + u64::from(get32(image, here + 36))
                + u64::from(names >> 16)
                + u64::from(names & 0xffff);
            at += len.next_multiple_of(8);
        }
        Self {
            cluster,
            l1,
            l2,
            refcount_table,
            refcounts,
            snapshots,
            bitmaps: bitmaps(image),
            clusters: len.div_ceil(cluster),
        }
    }
}

/// Breaks one to four things; gives what was done in words.
pub fn damage(image: &mut Vec<u8>, rng: &mut Rng) -> Vec<String> {
    let times = 1 + rng.below(4);
    (0..times).map(|_| damage_once(image, rng)).collect()
}

fn damage_once(image: &mut Vec<u8>, rng: &mut Rng) -> String {
    let map = Map::of(image);
    match rng.below(20) {
        0 => header(image, &map, rng),
        1..=3 => entry(image, "L1", &map.l1.clone(), &map, rng),
        4..=9 => entry(image, "L2", &map.l2.clone(), &map, rng),
        10..=11 => entry(
            image,
            "refcount table",
            &map.refcount_table.clone(),
            &map,
            rng,
        ),
        14..=18 if !map.bitmaps.is_empty() => bitmap(image, &map, rng),
        12..=15 => refcount(image, &map, rng),
        16..=17 => snapshot(image, &map, rng),
        18 => cut(image, &map, rng),
        _ => noise(image, &map, rng),
    }
}

/// A host offset that is not too strange, or very.
fn offset(map: &Map, rng: &mut Rng) -> u64 {
    let somewhere = rng.below(map.clusters + 2) * map.cluster;
    match rng.below(8) {
        0..=3 => somewhere,
        4 => somewhere + rng.below(map.cluster / 512) * 512,
        5 => rng.next() >> rng.below(64) << 9,
        6 => map.clusters * map.cluster + map.cluster * rng.below(1 << 20),
        _ => 1 << (9 + rng.below(47)),
    }
}

fn header(image: &mut [u8], map: &Map, rng: &mut Rng) -> String {
    let fields: [(usize, usize); 12] = [
        (24, 8),
        (36, 4),
        (40, 8),
        (48, 8),
        (56, 4),
        (60, 4),
        (64, 8),
        (80, 8),
        (88, 8),
        (96, 4),
        (4, 4),
        (60, 4),
    ];
    let (at, width) = rng.pick(&fields);
    let old = if width == 8 {
        get64(image, at)
    } else {
        get32(image, at).into()
    };
    let value = match rng.below(6) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ (1 << rng.below(8 * width as u64)),
        3 => offset(map, rng),
        4 => rng.below(20),
        _ => old.wrapping_mul(2),
    };
    match (at, width) {
        // Version 2 or 3; whatever else is refused by everybody.
        (4, _) => put32(image, at, 2 + u32::from(rng.one_in(2))),
        (_, 8) => put64(image, at, value),
        _ => put32(image, at, (value & 0xffff_ffff) as u32),
    }
    format!("header field at {at}: {old:#x} -> {value:#x}")
}

fn entry(image: &mut [u8], what: &str, slots: &[usize], map: &Map, rng: &mut Rng) -> String {
    if slots.is_empty() {
        return format!("no {what} entry");
    }
    // Mostly one that is in use.
    let used: Vec<usize> = slots
        .iter()
        .copied()
        .filter(|at| get64(image, *at) != 0)
        .collect();
    let from = if used.is_empty() || rng.one_in(6) {
        slots
    } else {
        &used
    };
    let at = from[rng.index(from.len())];
    let old = get64(image, at);
    let value = match rng.below(10) {
        0 => 0,
        1 | 2 => old ^ (1 << 63),
        3 => old ^ (1 << rng.below(64)),
        4 => old ^ 1,
        5 => get64(image, slots[rng.index(slots.len())]),
        6 => (old & 0xff00_0000_0000_01ff) | (offset(map, rng) & 0x00ff_ffff_ffff_fe00),
        7 => offset(map, rng) | (rng.below(2) << 63),
        8 => 1 << 62 | rng.below(map.clusters * map.cluster + 4096) | rng.below(8) << 54,
        _ => rng.next(),
    };
    put64(image, at, value);
    format!("{what} entry at {at:#x}: {old:#x} -> {value:#x}")
}

fn refcount(image: &mut [u8], map: &Map, rng: &mut Rng) -> String {
    if map.refcounts.is_empty() {
        return "no refcounts".into();
    }
    let used: Vec<usize> = map
        .refcounts
        .iter()
        .copied()
        .filter(|at| image[*at] != 0)
        .collect();
    let from = if used.is_empty() || rng.one_in(6) {
        &map.refcounts
    } else {
        &used
    };
    let at = from[rng.index(from.len())];
    let old = image[at];
    image[at] = match rng.below(4) {
        0 => 0,
        1 => old.wrapping_add(1),
        2 => old ^ (1 << rng.below(8)),
        _ => (rng.next() & 0xff) as u8,
    };
    format!("refcount byte at {at:#x}: {old:#x} -> {:#x}", image[at])
}

fn snapshot(image: &mut [u8], map: &Map, rng: &mut Rng) -> String {
    if map.snapshots.is_empty() {
        return "no snapshots".into();
    }
    let at = rng.pick(&map.snapshots);
    match rng.below(6) {
        0 => {
            let value = offset(map, rng);
            put64(image, at, value);
            format!("snapshot at {at:#x}: L1 offset {value:#x}")
        }
        1 => {
            let value = rng.pick(&[0, 1, 2, 3, 40, 1000, 4 << 20, (4 << 20) + 1, u32::MAX]);
            put32(image, at + 8, value);
            format!("snapshot at {at:#x}: L1 entries {value:#x}")
        }
        2 => {
            let value = rng.pick(&[0, 0x0001_0000, 0x0001_0001, 0x0002_0040, 0xffff_ffff]);
            put32(image, at + 12, value);
            format!("snapshot at {at:#x}: lengths of id and name {value:#x}")
        }
        3 => {
            let value = rng.pick(&[0, 8, 15, 16, 24, 32, 1024, 1025, u32::MAX]);
            put32(image, at + 36, value);
            format!("snapshot at {at:#x}: extra data {value:#x}")
        }
        // One of its L1 entries.
        _ => {
            let l1 = get64(image, at).saturating_add(8 * rng.below(get32(image, at + 8).into()));
            match usize::try_from(l1).ok().filter(|l1| *l1 <= image.len() - 8) {
                Some(slot) => entry(image, "snapshot L1", &[slot], map, rng),
                None => "no L1 table of a snapshot".into(),
            }
        }
    }
}

/// Where the entries of the bitmap directory are.
fn bitmaps(image: &[u8]) -> Vec<usize> {
    let mut out = Vec::new();
    let mut at = usize::try_from(get32(image, 100)).unwrap();
    while at + 32 < image.len().min(512) {
        let (kind, len) = (get32(image, at), get32(image, at + 4));
        if kind == 0x2385_2875 {
            let mut entry = usize::try_from(get64(image, at + 24)).unwrap_or(usize::MAX);
            for _ in 0..get32(image, at + 8) {
                if entry > image.len() - 64 {
                    break;
                }
                out.push(entry);
                let name = usize::try_from(get32(image, entry + 16) & 0xffff).unwrap();
                entry += (24 + name).next_multiple_of(8);
            }
        }
        if kind == 0 || len > 512 {
            break;
        }
        at += 8 + usize::try_from(len).unwrap().next_multiple_of(8);
    }
    out
}

fn bitmap(image: &mut [u8], map: &Map, rng: &mut Rng) -> String {
    let at = rng.pick(&map.bitmaps);
    let table = usize::try_from(get64(image, at)).unwrap_or(usize::MAX);
    match rng.below(9) {
        0 => {
            let value = offset(map, rng);
            put64(image, at, value);
            format!("bitmap at {at:#x}: table offset {value:#x}")
        }
        1 => {
            let value = rng.pick(&[0, 1, 2, 3, 0x0800_0000, 0x0800_0001, u32::MAX]);
            put32(image, at + 8, value);
            format!("bitmap at {at:#x}: table entries {value:#x}")
        }
        2 => {
            let value = 1 << rng.below(5);
            put32(image, at + 12, value);
            format!("bitmap at {at:#x}: flags {value:#x}")
        }
        3 => {
            let which = rng.index(4);
            image[at + 16 + which] ^= 1 << rng.below(8);
            format!("bitmap at {at:#x}: type, granularity or name {which}")
        }
        4 => {
            let value = rng.pick(&[1, 8, 16, u32::MAX]);
            put32(image, at + 20, value);
            format!("bitmap at {at:#x}: extra data {value:#x}")
        }
        _ if table < image.len() - 8 => {
            let old = get64(image, table);
            let value = match rng.below(6) {
                0 => 0,
                1 => 1,
                2 => old ^ (1 << rng.below(64)),
                3 => offset(map, rng),
                4 => old | 1,
                _ => rng.next(),
            };
            put64(image, table, value);
            format!("bitmap table entry at {table:#x}: {old:#x} -> {value:#x}")
        }
        _ => "no bitmap table".into(),
    }
}

fn cut(image: &mut Vec<u8>, map: &Map, rng: &mut Rng) -> String {
    let len = image.len() as u64;
    let new = match rng.below(5) {
        0 => rng.below(len),
        1 => len - rng.below(map.cluster.min(len)),
        2 => len.next_multiple_of(map.cluster) + map.cluster * rng.below(5),
        3 => rng.below(map.clusters) * map.cluster,
        _ => len + rng.below(3 * map.cluster),
    };
    // At least a header, so that there is something to check.
    image.resize(usize::try_from(new.max(map.cluster)).unwrap(), 0);
    format!("file of {len} bytes -> {new}")
}

fn noise(image: &mut [u8], map: &Map, rng: &mut Rng) -> String {
    let from = usize::try_from(map.cluster).unwrap().min(image.len() - 1);
    let at = from + rng.index(image.len() - from);
    let end = image.len().min(at + 1 + rng.index(64));
    for byte in &mut image[at..end] {
        *byte = (rng.next() & 0xff) as u8;
    }
    format!("noise from {at:#x} to {end:#x}")
}
