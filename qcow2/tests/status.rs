//! Block status of images equals what `qemu-img map` tells, entry by entry, and stays true to the
//! bytes.

mod support;

use coblock_block::{BlockBackend, ErrorKind, RequestFlags, Status};
use coblock_coroutine::Co;
use serde_json::{Value, json};
use std::path::Path;
use support::world::with_image;
use support::{qemu_img, qemu_io, said, text};

const NONE: RequestFlags = RequestFlags::empty();

/// One entry of a map, as the reference has it.
fn entry(start: u64, status: &Status) -> Value {
    let mut entry = json!({
        "start": start, "length": status.len, "depth": status.depth, "present": status.allocated,
        "zero": status.zero, "data": status.data, "compressed": status.compressed,
    });
    if let Some((_, offset)) = &status.place {
        entry["offset"] = json!(offset);
    }
    entry
}

/// The reference joins entries that go on where the one before ended.
fn push(map: &mut Vec<Value>, next: Value) {
    if let Some(last) = map.last_mut() {
        let same = |key: &str| last[key] == next[key];
        let len = last["length"].as_u64().unwrap();
        let beside = match (last.get("offset"), next.get("offset")) {
            (None, None) => true,
            (Some(a), Some(b)) => a.as_u64().unwrap() + len == b.as_u64().unwrap(),
            _ => false,
        };
        let alike = ["depth", "present", "zero", "data", "compressed"]
            .into_iter()
            .all(same);
        if alike && beside {
            last["length"] = json!(len + next["length"].as_u64().unwrap());
            return;
        }
    }
    map.push(next);
}

/// Our map of a range. `step` is the most that is asked for at once.
fn map(co: &Co, backend: &BlockBackend, step: u64) -> Vec<Value> {
    let (mut map, mut at, len) = (Vec::new(), 0, backend.len());
    while at < len {
        let status = backend.map(co, at, step.min(len - at)).unwrap();
        assert!((1..=step.min(len - at)).contains(&status.len), "{status:?}");
        assert_eq!(status.eof, at + status.len == len, "{at}: {status:?}");
        push(&mut map, entry(at, &status));
        at += status.len;
    }
    map
}

/// The reference's map; `None`, said aloud, without it.
fn their_map(path: &Path) -> Option<Vec<Value>> {
    let output = qemu_img(&["map", "--output=json", text(path)])?;
    assert!(output.status.success(), "{}", said(&output));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// Makes an image by the reference. `None` without it.
fn make(path: &Path, create: &[&str], size: &str, commands: &[&str]) -> Option<()> {
    let mut args = vec!["create", "-q"];
    args.extend(create);
    args.extend([text(path), size]);
    let output = qemu_img(&args)?;
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    if !commands.is_empty() {
        let mut args = Vec::new();
        for command in commands {
            args.extend(["-c", command]);
        }
        let format = create[1];
        args.extend(["-f", format, text(path)]);
        let output = qemu_io(&args)?;
        assert!(output.status.success(), "{args:?}: {}", said(&output));
    }
    Some(())
}

/// Images of every kind of cluster, and chains, are mapped like the reference maps them.
#[test]
fn images_are_mapped_like_the_reference() {
    let writes = &[
        "write -P 1 0 192k",
        "write -P 2 300k 5k",
        "write -z 512k 256k",
        "write -c -P 3 1M 64k",
        "write -c -P 4 1088k 64k",
        "write -P 5 1536k 128k",
        "write -z 1536k 64k",
        "write -P 6 1920k 64k",
        "discard 1920k 64k",
        "write -P 7 3M 3M",
    ][..];
    let mut compared = 0;
    for (name, options, size, commands) in [
        ("empty", "", "8M", &[][..]),
        ("every kind of cluster", "", "8M", writes),
        ("small clusters", "cluster_size=4k", "8M", writes),
        (
            "large clusters",
            "cluster_size=1M",
            "8M",
            &["write -P 1 2M 1M", "write -z 4M 1M"],
        ),
        (
            "version 2",
            "compat=0.10",
            "8M",
            &["write -P 1 0 192k", "write -P 1 4M 64k"],
        ),
        ("an odd end", "", "8000000", &["write -P 1 7800k 12k"]),
        (
            "far away",
            "cluster_size=512",
            "300M",
            &["write -P 1 299M 4k", "write -P 1 100M 64k"],
        ),
        ("metadata preallocated", "preallocation=metadata", "8M", &[]),
        (
            "the same, written",
            "preallocation=metadata",
            "8M",
            &["write -P 1 1M 4k", "write -z 2M 1M"],
        ),
        ("space preallocated", "preallocation=falloc", "8M", &[]),
        ("all preallocated", "preallocation=full", "1M", &[]),
        (
            "zstd",
            "compression_type=zstd",
            "4M",
            &["write -c -P 1 0 64k", "write -c -P 2 128k 64k"],
        ),
    ] {
        for chained in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("top.qcow2");
            let mut create = vec!["-f", "qcow2"];
            if !options.is_empty() {
                create.extend(["-o", options]);
            }
            if chained {
                if options.contains("preallocation") {
                    continue;
                }
                let base = folder.path().join("base.raw");
                let middle = folder.path().join("middle.qcow2");
                let made = make(
                    &base,
                    &["-f", "raw"],
                    "6M",
                    &["write -P 1 200k 400k", "write -P 1 4M 1M"],
                )
                .and_then(|()| {
                    let create = ["-f", "qcow2", "-b", "base.raw", "-F", "raw"];
                    let commands = [
                        "write -P 2 64k 300k",
                        "write -z 4100k 100k",
                        "write -P 2 6500k 10k",
                    ];
                    make(&middle, &create, "7M", &commands)
                });
                if made.is_none() {
                    return;
                }
                create.extend(["-b", "middle.qcow2", "-F", "qcow2"]);
            }
            let Some(()) = make(&path, &create, size, commands) else {
                return;
            };
            let Some(theirs) = their_map(&path) else {
                return;
            };
            for step in [u64::MAX, 3000 * 512, 64 << 10] {
                let ours = with_image(&path, |co, backend| map(co, backend, step));
                assert_eq!(
                    ours, theirs,
                    "{name}, chained: {chained}, in steps of {step}"
                );
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 20, "images that were compared");
}

/// Any byte may be asked about: the answer is the same as from the start of its run, and never
/// wrong about zeros.
#[test]
fn every_offset_tells_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.qcow2");
    let commands = [
        "write -P 1 0 6k",
        "write -P 2 9k 2k",
        "write -z 16k 8k",
        "write -c -P 3 32k 4k",
        "write -P 4 60k 3k",
    ];
    let Some(()) = make(
        &path,
        &["-f", "qcow2", "-o", "cluster_size=4k"],
        "65000",
        &commands,
    ) else {
        return;
    };
    with_image(&path, |co, backend| {
        let mut bytes = vec![0; 65024];
        backend.pread(co, 0, &mut bytes[..]).unwrap();
        let whole = map(co, backend, u64::MAX);
        for run in &whole {
            let (start, len) = (
                run["start"].as_u64().unwrap(),
                run["length"].as_u64().unwrap(),
            );
            for skip in (0..len).step_by(509) {
                let status = backend.map(co, start + skip, len - skip).unwrap();
                let mut told = entry(start, &status);
                told["length"] = json!(status.len + skip);
                if let Some((_, offset)) = &status.place {
                    told["offset"] = json!(offset - skip);
                }
                assert_eq!(&told, run, "{skip} bytes into it");
                let range =
                    usize::try_from(start + skip).unwrap()..usize::try_from(start + len).unwrap();
                assert!(!status.zero || bytes[range].iter().all(|byte| *byte == 0));
            }
        }
    });
}

/// A status follows what is done to the image: written, zeroed, discarded, grown.
#[test]
fn a_status_follows_changes() {
    const K: u64 = 1 << 10;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changing.qcow2");
    let Some(()) = make(&path, &["-f", "qcow2"], "1M", &[]) else {
        return;
    };
    with_image(&path, |co, backend| {
        let told = |offset, len| {
            let status = backend.block_status(co, offset, len).unwrap();
            (status.len, status.data, status.zero, status.allocated)
        };
        assert_eq!(told(0, 1 << 20), (1 << 20, false, true, false));
        backend.pwrite(co, 100 * K, &[1; 1000][..], NONE).unwrap();
        assert_eq!(told(0, 1 << 20), (64 * K, false, true, false));
        assert_eq!(told(64 * K, 1 << 20), (64 * K, true, false, true));
        backend.pwrite_zeroes(co, 64 * K, 64 * K, NONE).unwrap();
        assert_eq!(told(64 * K, 1 << 20), (64 * K, false, true, true));
        backend.pwrite(co, 64 * K, &[1; 1000][..], NONE).unwrap();
        assert_eq!(told(70 * K, 10), (10, true, false, true));
        backend.pdiscard(co, 64 * K, 64 * K).unwrap();
        assert_eq!(told(64 * K, 1 << 20), (64 * K, false, true, true));
        backend.truncate(co, 2 << 20, true).unwrap();
        assert_eq!(
            told(128 * K, 2 << 20),
            ((2 << 20) - 128 * K, false, true, false)
        );
        assert_eq!(told(2 << 20, 1), (0, false, false, false));
        assert!(backend.allocated_bytes(co).unwrap() > 0);
    });
}

/// Zeroes on a part of a cluster allocate nothing where the rest reads as zeros: in an empty image,
/// over an empty part of a backing file, in a cluster that is zeros already. Beside data they are
/// written.
#[test]
fn zeroes_on_a_part_of_a_cluster() {
    const K: u64 = 1 << 10;
    let folder = tempfile::tempdir().unwrap();
    let path = |name| folder.path().join(name);
    let (below, above) = (path("below.qcow2"), path("above.qcow2"));
    let create = ["-f", "qcow2", "-o", "cluster_size=4k"];
    let data = ["write -P 1 0 64k", "write -P 1 100k 28k"];
    let Some(()) = make(&below, &create, "1M", &data) else {
        return;
    };
    let over = ["-f", "qcow2", "-F", "qcow2", "-b", below.to_str().unwrap()];
    make(&above, &over, "1M", &[]).unwrap();
    let part = RequestFlags::NO_FALLBACK;
    with_image(&above, |co, backend| {
        let told = |offset| {
            let status = backend.block_status(co, offset, 1).unwrap();
            (status.data, status.zero, status.allocated)
        };
        let zeros = (false, true, true);
        for (name, offset, len) in [
            ("nothing below", 200 * K, K),
            ("two halves of clusters", 300 * K, 40 * K),
            ("once more", 201 * K, 1),
            ("all that is data below", 100 * K, 28 * K),
        ] {
            let zeroed = backend.pwrite_zeroes(co, offset, len, part);
            assert!(zeroed.is_ok(), "{name}: {zeroed:?}");
            for at in [offset, offset + len - 1] {
                assert_eq!(told(at), zeros, "{name}: {at}");
            }
        }
        let beside = backend.pwrite_zeroes(co, 0, K, part).unwrap_err();
        assert_eq!(beside.kind(), ErrorKind::NotSupported);
        assert_eq!(told(0), (false, false, false));
        backend.pwrite_zeroes(co, 0, K, NONE).unwrap();
        assert_eq!(told(0), (true, false, true));
        let mut bytes = [9; 2048];
        backend.pread(co, 0, &mut bytes[..]).unwrap();
        assert!(bytes[..1024].iter().all(|&b| b == 0) && bytes[1024..].iter().all(|&b| b == 1));
        backend.pwrite(co, 200 * K, &[7; 10][..], NONE).unwrap();
        let mut bytes = [9; 20];
        backend.pread(co, 200 * K - 5, &mut bytes[..]).unwrap();
        assert_eq!(bytes[5..15], [7; 10]);
        assert_eq!((bytes[0], bytes[19]), (0, 0));
    });
}

/// The work of one question is bounded: an empty disk of a petabyte is told in parts, each at once.
#[test]
fn a_huge_empty_image_is_told_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.qcow2");
    let Some(()) = make(&path, &["-f", "qcow2", "-o", "cluster_size=2M"], "1P", &[]) else {
        return;
    };
    with_image(&path, |co, backend| {
        let status = backend.map(co, 0, u64::MAX).unwrap();
        // 64 L1 entries, of 512 GiB each.
        assert_eq!((status.len, status.zero), (64 << 39, true));
        assert_eq!(map(co, backend, u64::MAX).len(), 1);
    });
}
