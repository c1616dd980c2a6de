//! Limits: whatever an image asks of memory comes out of one budget that the caller sets.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use coblock_aio::EngineKind;
use coblock_block::drivers::sim::SimDisk;
use coblock_block::{DenyAll, Error, ErrorKind, Result};
use coblock_qcow2::Error as Qcow2Error;
use coblock_qcow2::check::check;
use coblock_qcow2::image_file::ImageFile;
use coblock_qcow2::info::Info;
use support::world::{World, image_on, sim};
use support::{add_cluster, add_l2, add_snapshots, empty_image, put32, put64, snapshot};

/// What is done with an image.
#[derive(Clone, Copy, Debug)]
enum Use {
    Info,
    Check,
    Open,
    /// A dirty image is checked, and gets new refcounts.
    OpenDirty,
}

/// Uses the image with this limit; `None`: the limit that there is when nobody says anything.
fn with_limit(image: &[u8], how: Use, limit: Option<u64>) -> Result<()> {
    let mut image = image.to_vec();
    if matches!(how, Use::OpenDirty) {
        image[79] |= 1;
    }
    on_disk(SimDisk::with_contents(&image), how, limit)
}

fn on_disk(disk: Arc<SimDisk>, how: Use, limit: Option<u64>) -> Result<()> {
    let world = World::new(EngineKind::None);
    let look = matches!(how, Use::Info | Use::Check);
    let mut options = match look {
        true => sim(&disk),
        false => image_on(&disk),
    };
    if let (false, Some(limit)) = (look, limit) {
        options = options.with("memory-limit", limit.to_string());
    }
    let result = world.home.run(|co| {
        let backend = world.open(co, &DenyAll, options)?;
        let mut result = Ok(());
        if look {
            let mut file = ImageFile::of_backend(co, &backend);
            if let Some(limit) = limit {
                file = file.with_memory_limit(limit);
            }
            result = match how {
                Use::Info => Info::read(&file).map(drop),
                _ => file
                    .read_header()
                    .and_then(|header| check(&file, &header, &mut |_| {}).map(drop)),
            };
        }
        let closed = backend.close(co);
        result.and(closed)
    });
    world.end();
    result
}

fn exceeded(error: &Error) -> Option<(&'static str, u64, u64)> {
    use std::error::Error as _;
    let cause = error.source()?.downcast_ref::<Qcow2Error>()?;
    match cause {
        Qcow2Error::LimitExceeded {
            what, need, have, ..
        } => Some((what, *need, *have)),
        _ => None,
    }
}

/// An image with something of everything that is counted: tables, snapshots, bitmaps, data.
fn everything() -> Vec<u8> {
    let mut image = empty_image(16);
    let data = add_cluster(&mut image);
    add_l2(&mut image, &[data | 1 << 63]);
    let l1 = add_cluster(&mut image);
    let table = [snapshot(l1, 1, b"1"), snapshot(l1, 1, b"2")].concat();
    add_snapshots(&mut image, &table, 2);
    let bits = add_cluster(&mut image);
    let directory = add_cluster(&mut image);
    let at = usize::try_from(directory).unwrap();
    put64(&mut image, at, bits);
    put32(&mut image, at + 8, 1);
    image[at + 16..at + 20].copy_from_slice(&[1, 16, 0, 1]);
    image[at + 24] = b'b';
    put32(&mut image, 112, 0x2385_2875);
    put32(&mut image, 116, 24);
    put32(&mut image, 120, 1);
    put64(&mut image, 128, 32);
    put64(&mut image, 136, directory);
    put64(&mut image, 88, 1);
    image
}

/// The names under which the sources take memory out of a budget.
fn taken_in_sources() -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = std::fs::read_to_string(path).unwrap();
            out.extend(
                source
                    .split('"')
                    .filter(|text| text.starts_with("bytes of memory "))
                    .map(str::to_owned),
            );
        }
    }
    out
}

/// Each thing that an image can ask memory for is refused where the limit leaves too little, by its
/// name, with what it needs and what can be done; with exactly what it needs the next one's turn
/// comes, and with enough for all the image is used. No thing in the sources is left out.
#[test]
fn everything_that_an_image_asks_for_is_limited() {
    let image = everything();
    let mut seen = BTreeSet::new();
    for how in [Use::Info, Use::Check, Use::Open, Use::OpenDirty] {
        let mut limit = 0;
        let mut steps = 0;
        while let Err(error) = with_limit(&image, how, Some(limit)) {
            let (what, need, have) =
                exceeded(&error).unwrap_or_else(|| panic!("{how:?} with {limit}: {error}"));
            assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{error}");
            assert!(error.to_string().contains("memory-limit"), "{error}");
            assert!(need > have && have <= limit, "{how:?}: {error}");
            seen.insert(what.to_owned());
            limit += need - have;
            steps += 1;
            assert!(steps < 200, "{how:?}: no end, {error}");
        }
        assert!(steps > 2, "{how:?}: only {steps} things are counted");
        with_limit(&image, how, None).unwrap_or_else(|e| panic!("{how:?}, by default: {e}"));
    }
    assert_eq!(seen, taken_in_sources());
}

/// The cache that the image's size decides becomes smaller before the image is refused; one that
/// the caller asked for is the caller's.
#[test]
fn the_cache_gives_way() {
    // 512 bytes a cluster: L1 table of 32 MiB, refcount table of 8 MiB.
    let mut image = empty_image(9);
    put64(&mut image, 24, 128 << 30);
    put32(&mut image, 36, 4 << 20);
    put64(&mut image, 40, 1 << 20);
    put64(&mut image, 48, 64 << 20);
    put32(&mut image, 56, (8 << 20) / 512);
    let disk = SimDisk::with_contents(&image);
    disk.poke((72 << 20) - 512, &[0; 512]);
    on_disk(disk.clone(), Use::Open, None).unwrap();
    let error = on_disk(disk, Use::Open, Some(40 << 20)).unwrap_err();
    assert!(exceeded(&error).is_some(), "{error}");
}

/// A small file cannot make a check ask for much, however its tables lie over each other: 65 536
/// snapshots with the same L1 table of 32 MiB, in a file of holes.
#[test]
fn shared_tables_cost_once() {
    let mut image = empty_image(9);
    let table: Vec<u8> = (0..65_536_u32)
        .flat_map(|n| snapshot(1 << 30, 4 << 20, n.to_string().as_bytes()))
        .collect();
    put32(&mut image, 60, 65_536);
    put64(&mut image, 64, 16 << 20);
    let disk = SimDisk::with_contents(&image);
    disk.poke(16 << 20, &table);
    disk.poke((2 << 30) - 512, &[0; 512]);
    let began = std::time::Instant::now();
    on_disk(disk, Use::Check, None).unwrap();
    assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
}
