//! Images whose header says something impossible: every command refuses them in the reference's
//! words.

mod support;

use std::fs;
use std::path::Path;

use support::Programs;

/// Name of the image, offset of the field in the header, its bytes.
const CHANGES: &[(&str, usize, &[u8])] = &[
    ("version9", 4, &[0, 0, 0, 9]),
    ("backing-far", 8, &[0xff; 8]),
    ("backing-outside", 8, &[0, 0, 0, 0, 0, 2, 0, 0]),
    ("cluster-bits-8", 20, &[0, 0, 0, 8]),
    ("cluster-bits-22", 20, &[0, 0, 0, 22]),
    ("cluster-bits-63", 20, &[0, 0, 0, 63]),
    ("size-max", 24, &[0xff; 8]),
    ("size-2-to-60", 24, &[0x10, 0, 0, 0, 0, 0, 0, 0]),
    ("size-2-to-50", 24, &[0, 4, 0, 0, 0, 0, 0, 0]),
    ("crypt-method-3", 32, &[0, 0, 0, 3]),
    ("l1-size-max", 36, &[0xff; 4]),
    ("l1-size-i32", 36, &[0x7f, 0xff, 0xff, 0xff]),
    ("l1-size-0", 36, &[0; 4]),
    (
        "l1-unaligned",
        40,
        &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef],
    ),
    (
        "refcounts-unaligned",
        48,
        &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef],
    ),
    (
        "refcounts-far",
        48,
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ),
    ("refcounts-max", 56, &[0xff; 4]),
    ("refcounts-many", 56, &[0, 2, 0, 1]),
    ("refcounts-none", 56, &[0; 4]),
    ("order-7", 96, &[0, 0, 0, 7]),
    ("order-max", 96, &[0xff; 4]),
    ("header-max", 100, &[0xff; 4]),
    ("header-50", 100, &[0, 0, 0, 50]),
    ("header-72", 100, &[0, 0, 0, 72]),
    ("compression-5", 104, &[5]),
    ("compression-1", 104, &[1]),
    ("compression-bit", 79, &[8]),
    ("unknown-bit", 79, &[0x20]),
    (
        "extension-2g",
        112,
        &[0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff],
    ),
    (
        "extension-max",
        112,
        &[0x12, 0x34, 0x56, 0x78, 0xff, 0xff, 0xff, 0xff],
    ),
    ("extension-64k", 112, &[0x12, 0x34, 0x56, 0x78, 0, 1, 0, 0]),
];

/// The same where `check` tells more than we do: it goes on with the rest of such an image.
const SNAPSHOTS: &[(&str, usize, &[u8])] = &[
    ("snapshots-max", 60, &[0xff; 4]),
    ("snapshots-i32", 60, &[0x7f, 0xff, 0xff, 0xff]),
    (
        "snapshots-unaligned",
        64,
        &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef],
    ),
];

fn make(folder: &Path) {
    support::reference_must("qemu-img create -q -f qcow2 image 64M", folder);
    let image = fs::read(folder.join("image")).unwrap();
    for (name, at, bytes) in CHANGES.iter().chain(SNAPSHOTS) {
        let mut changed = image.clone();
        changed[*at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(folder.join(name), changed).unwrap();
    }
}

#[test]
fn impossible_headers_are_refused_in_the_references_words() {
    let Some(programs) = Programs::with_images("headers", make) else {
        return;
    };
    let mut lines = Vec::new();
    for (name, _, _) in CHANGES.iter().chain(SNAPSHOTS) {
        for command in [
            "info",
            "map",
            "map --output=json",
            "compare image",
            "bench -c 1",
        ] {
            lines.push(format!("{command} {name}"));
        }
    }
    for (name, _, _) in CHANGES {
        lines.push(format!("check {name}"));
        lines.push(format!("create -q -f qcow2 -b {name} -F qcow2 new"));
    }
    programs.compare(&lines, |theirs, ours| theirs != ours);
}
