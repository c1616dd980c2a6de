//! The check's verdict and counts equal the reference's, on damaged images of every kind.

mod support;

use std::path::Path;

use coblock_qcow2::check::{CheckReport, Finding};
use coblock_qcow2::info::Info;
use support::damage::{damage, make, recipes, seeds};
use support::image::{report, with_child, with_file};
use support::rng::Rng;
use support::{
    add_cluster, add_l2, add_snapshots, empty_image, put32, put64, qemu_img, said, snapshot, text,
};

/// The reference's report, in the same form.
fn theirs(path: &Path) -> Option<(Result<CheckReport, String>, String)> {
    let output = qemu_img(&["check", "-U", "-f", "qcow2", "--output=json", text(path)])?;
    let json = String::from_utf8_lossy(&output.stdout).into_owned();
    let field = |name: &str| -> u64 {
        let key = format!("\"{name}\": ");
        json.find(&key).map_or(0, |at| {
            let rest = &json[at + key.len()..];
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
            rest[..end].parse().unwrap()
        })
    };
    let report = if json.contains("check-errors") {
        Ok(CheckReport {
            corruptions: field("corruptions"),
            leaks: field("leaks"),
            check_errors: field("check-errors"),
            image_end_offset: field("image-end-offset"),
            total_clusters: field("total-clusters"),
            allocated_clusters: field("allocated-clusters"),
            fragmented_clusters: field("fragmented-clusters"),
            compressed_clusters: field("compressed-clusters"),
        })
    } else {
        Err("no report".into())
    };
    Some((report, said(&output)))
}

/// Whether the findings are told in the reference's words, as often as it does; in whatever order.
///
/// Not compared: more than we keep, and refcounts that cannot be read, which we tell once for a
/// range.
fn same_words(findings: &[(Finding, u64)], said: &str) -> bool {
    let unreadable = |finding: &Finding| matches!(finding, Finding::RefcountUnreadable { .. });
    let count: u64 = findings.iter().map(|(_, times)| times).sum();
    if findings.len() >= 100 || count >= 1000 || findings.iter().any(|(f, _)| unreadable(f)) {
        return true;
    }
    let mut ours: Vec<String> = findings
        .iter()
        .flat_map(|(finding, times)| (0..*times).map(move |_| finding.to_string()))
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    // That warning ends without a new line.
    let said = said.replace("on the image file to fix.", "\n");
    let noise = [
        "qemu-img: warning",
        "qcow2: ",
        "Some clusters may be leaked",
    ];
    let mut theirs: Vec<&str> = said
        .lines()
        .filter(|line| !line.is_empty() && !noise.iter().any(|noise| line.starts_with(noise)))
        .collect();
    ours.sort_unstable();
    theirs.sort_unstable();
    ours == theirs
}

/// At least 200 damaged images: same verdict, same counts; and described by `info` where the
/// reference describes them.
#[test]
fn damaged_images_as_qemu_img_sees_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.qcow2");
    let mut bases = Vec::new();
    for recipe in recipes() {
        let Some(base) = make(&recipe, dir.path()) else {
            return;
        };
        bases.push((recipe, base));
    }
    let mut wrong = Vec::new();
    for seed in seeds(240) {
        let mut rng = Rng(seed ^ 0x5eed);
        let (recipe, base) = &bases[rng.index(bases.len())];
        let mut image = base.clone();
        let done = damage(&mut image, &mut rng);
        std::fs::write(&path, &image).unwrap();
        let Some((want, said)) = theirs(&path) else {
            return;
        };
        let ours = if seed % 4 == 0 {
            with_child(&path, report)
        } else {
            with_file(&path, false, report)
        };
        let (got, lines) = match ours {
            Ok((report, findings)) => (Ok(report), findings),
            Err(error) => (Err(error.to_string()), Vec::new()),
        };
        let info = with_file(&path, false, Info::read).map(drop);
        let theirs = qemu_img(&["info", "-U", "-f", "qcow2", text(&path)]).unwrap();
        if info.is_ok() != theirs.status.success() {
            wrong.push(seed);
            eprintln!(
                "seed {seed}: {recipe:?} {done:#?}\n  info   {info:?}\n  theirs {}",
                self::said(&theirs)
            );
        }
        let same = match (&got, &want) {
            (Ok(got), Ok(want)) => got == want && same_words(&lines, &said),
            (got, want) => got.is_err() == want.is_err(),
        };
        if !same {
            wrong.push(seed);
            let lines: Vec<_> = lines
                .iter()
                .take(12)
                .map(|(finding, n)| format!("{finding} x{n}"))
                .collect();
            let said: Vec<_> = said.lines().take(12).collect();
            eprintln!(
                "seed {seed}: {recipe:?}\n  damage {done:#?}\n  ours   {got:?} {lines:#?}\n  theirs {want:?} {said:#?}"
            );
        }
    }
    assert!(
        wrong.is_empty(),
        "different verdicts for the seeds {wrong:?}"
    );
}

const COPIED: u64 = 1 << 63;

/// Name, change to the empty image of 64 KiB clusters, corruptions, leaks, check errors, allocated
/// clusters.
type Named = (&'static str, fn(&mut Vec<u8>), u64, u64, u64, u64);

/// One damage each, with the counts that the reference gave; where it is installed it is asked
/// again.
const NAMED: &[Named] = &[
    ("nothing", |_| {}, 0, 0, 0, 0),
    (
        "a leaked cluster",
        |image| _ = add_cluster(image),
        0,
        1,
        0,
        0,
    ),
    (
        "the header is not counted",
        |image| image[0x2_0001] = 0,
        1,
        0,
        0,
        0,
    ),
    (
        "the header is counted twice",
        |image| image[0x2_0001] = 2,
        0,
        1,
        0,
        0,
    ),
    (
        "data",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[at | COPIED]);
        },
        0,
        0,
        0,
        1,
    ),
    (
        "data without copied flag",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[at]);
        },
        1,
        0,
        0,
        1,
    ),
    (
        "data twice",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[at | COPIED, at | COPIED]);
        },
        1,
        0,
        0,
        2,
    ),
    (
        "zero cluster, kept",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[at | COPIED | 1]);
        },
        0,
        0,
        0,
        1,
    ),
    (
        "zero cluster, none",
        |image| _ = add_l2(image, &[1]),
        0,
        0,
        0,
        0,
    ),
    (
        "data not aligned",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[(at + 512) | COPIED]);
        },
        2,
        0,
        0,
        1,
    ),
    (
        "data past the end",
        |image| _ = add_l2(image, &[1 << 40]),
        1,
        0,
        0,
        1,
    ),
    (
        "reserved bit of an L2 entry",
        |image| _ = add_l2(image, &[4]),
        1,
        0,
        0,
        0,
    ),
    (
        "compressed",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[1 << 62 | at]);
        },
        0,
        0,
        0,
        1,
    ),
    (
        "compressed, copied",
        |image| {
            let at = add_cluster(image);
            add_l2(image, &[COPIED | 1 << 62 | at]);
        },
        1,
        0,
        0,
        1,
    ),
    (
        "L2 table without copied flag",
        |image| {
            let at = add_l2(image, &[]);
            put64(image, 0x3_0000, at);
        },
        1,
        0,
        0,
        0,
    ),
    (
        "L2 table not aligned",
        |image| {
            let at = add_l2(image, &[]);
            put64(image, 0x3_0000, (at + 512) | COPIED);
        },
        2,
        0,
        0,
        0,
    ),
    (
        "L2 table past the end",
        |image| put64(image, 0x3_0000, 1 << 40),
        1,
        0,
        0,
        0,
    ),
    (
        "reserved bit of an L1 entry",
        |image| {
            let at = add_l2(image, &[]);
            put64(image, 0x3_0000, at | COPIED | 2);
        },
        1,
        0,
        0,
        0,
    ),
    (
        "refcount block not aligned",
        |image| put64(image, 0x1_0000, 0x2_0200),
        1,
        0,
        4,
        0,
    ),
    (
        "refcount block past the end",
        |image| put64(image, 0x1_0008, 1 << 40),
        1,
        0,
        0,
        0,
    ),
    (
        "refcount block twice",
        |image| put64(image, 0x1_0008, 0x2_0000),
        2,
        0,
        0,
        0,
    ),
    (
        "reserved bit of a refcount table entry",
        |image| put64(image, 0x1_0000, 0x2_0001),
        1,
        1,
        0,
        0,
    ),
    ("no refcount table", |image| put32(image, 56, 0), 2, 0, 0, 0),
    (
        "L1 table past the end",
        |image| put64(image, 40, 1 << 40),
        1,
        1,
        0,
        0,
    ),
    (
        "a snapshot",
        |image| {
            let l1 = add_cluster(image);
            add_snapshots(image, &snapshot(l1, 1, b"1"), 1);
        },
        0,
        0,
        0,
        0,
    ),
    (
        "a snapshot's L1 table not aligned",
        |image| add_snapshots(image, &snapshot(0x3_0200, 1, b"1"), 1),
        1,
        0,
        0,
        0,
    ),
    (
        "a snapshot's L1 table too large",
        |image| add_snapshots(image, &snapshot(0x3_0000, u32::MAX, b"1"), 1),
        1,
        0,
        0,
        0,
    ),
    (
        "a snapshot over the disk's L1 table",
        |image| add_snapshots(image, &snapshot(0x3_0000, 1, b"1"), 1),
        1,
        0,
        0,
        0,
    ),
    (
        "a file that ends inside its last cluster",
        |image| image.truncate(0x3_0008),
        0,
        0,
        0,
        0,
    ),
    (
        "a file that ends before its L1 table",
        |image| image.truncate(0x2_0000),
        4,
        0,
        0,
        0,
    ),
];

/// Every kind of finding by itself.
#[test]
fn named_damage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("named.qcow2");
    for (name, change, corruptions, leaks, check_errors, allocated) in NAMED {
        let mut image = empty_image(16);
        change(&mut image);
        std::fs::write(&path, &image).unwrap();
        let (got, findings) = with_file(&path, false, report).unwrap();
        let counts = (
            got.corruptions,
            got.leaks,
            got.check_errors,
            got.allocated_clusters,
        );
        assert_eq!(
            counts,
            (*corruptions, *leaks, *check_errors, *allocated),
            "{name}: {findings:?}"
        );
        assert_eq!(got.is_clean(), corruptions + leaks + check_errors == 0);
        if let Some((want, said)) = theirs(&path) {
            assert_eq!(Ok(got), want, "{name}: {said}");
            assert!(same_words(&findings, &said), "{name}: {findings:?}\n{said}");
        }
    }
}

/// Refcounts of every width stop where they end: one reference more is a corruption, and counted.
#[test]
fn more_references_than_a_refcount_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.qcow2");
    for order in 0..=6_u32 {
        let bits = 1 << order;
        // L2 entries that all name one cluster: two more than its refcount holds, where a table has
        // so many.
        let most = if bits < 13 { (1_u64 << bits) - 1 } else { 1000 };
        let mut image = empty_image(16);
        put32(&mut image, 96, order);
        let data = add_cluster(&mut image);
        let times = usize::try_from(most).unwrap() + 2;
        let table = add_l2(&mut image, &vec![data; times]);
        // Refcounts of this width: everything once, the data `most` times.
        let width = coblock_qcow2::width::RefcountWidth::new(order);
        image[0x2_0000..0x3_0000].fill(0);
        for cluster in 0..6 {
            width.set(&mut image[0x2_0000..0x3_0000], cluster, 1);
        }
        width.set(&mut image[0x2_0000..0x3_0000], 4, most);
        assert_eq!((data, table), (0x4_0000, 0x5_0000));
        std::fs::write(&path, &image).unwrap();
        let (got, _) = with_file(&path, false, report).unwrap();
        let lost = times as u64 - most;
        // One refcount of one means that the copied flag is missing, each time.
        let flags = if most == 1 { times as u64 } else { 0 };
        let corruptions = if bits < 13 { lost + flags } else { 1 };
        assert_eq!(got.corruptions, corruptions, "{bits} bits");
        if let Some((want, said)) = theirs(&path) {
            assert_eq!(Ok(got), want, "{bits} bits: {said}");
        }
    }
}
