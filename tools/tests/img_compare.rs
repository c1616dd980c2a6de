//! `coblock img compare` beside `qemu-img compare`: the same images, the same words, the same
//! output to the letter, the same exit status.

mod support;

use support::{Programs, differs_but_for_causes, extents};

/// Runs every line through both programs.
fn same(lines: &[String]) {
    if let Some(programs) = Programs::with_images("extents-compare", extents::make) {
        programs.compare(lines, |theirs, ours| theirs != ours);
    }
}

#[test]
fn command_lines_that_are_wrong() {
    let lines = [
        "compare",
        "compare raw",
        "compare raw raw raw",
        "compare -f",
        "compare -z raw raw",
        "compare -t none raw raw",
        "compare --zzz raw raw",
        "compare --format raw raw raw",
        "compare --output=json raw raw",
        "compare -T foo raw raw",
        "compare -T foo raw",
        "compare --object foo raw raw",
        "compare --object foo,id=x raw raw",
        "compare --image-opts -f raw raw raw",
        "compare --image-opts -F raw raw raw",
        "compare --image-opts raw raw",
        "compare nope raw",
        "compare raw nope",
        "compare -q nope raw",
        "compare -p nope raw",
        "compare -p raw nope",
        "compare -s nope raw",
        "compare -p -T foo raw raw",
        "compare -p --image-opts raw raw",
        "compare -p -f raw --image-opts raw raw",
        "compare -p --object foo,id=x raw raw",
        "compare nope nope2",
        "compare -f foo raw raw",
        "compare -F foo raw raw",
        "compare -f qcow2 raw raw",
        "compare -F qcow2 raw raw",
        "compare -f qcow2 -F qcow2 raw nope",
        "compare orphan raw",
        "compare raw orphan",
        "compare '' raw",
        "compare raw sub",
    ];
    same(&lines.map(String::from));
}

#[test]
fn options() {
    let lines = [
        "compare -f raw -F raw raw raw",
        "compare --a-format raw --b-format=raw raw raw",
        "compare --a raw raw onraw",
        "compare -U -T none raw raw",
        "compare -T directsync base base",
        "compare -T none u1000 v1000",
        "compare -T none u70000 u70000",
        "compare --cache unsafe base base",
        "compare --strict --quiet base same",
        "compare -pq base same",
        "compare -ps base same",
        "compare -psU base base",
        "compare --progress --quiet raw base",
        "compare --image-opts driver=raw,file.filename=raw driver=qcow2,file.filename=onraw",
        "compare --image-opts driver=null-co,size=1M driver=raw,file.filename=hole",
        "compare --image-opts driver=raw,offset=64k,size=64k,file.filename=raw file.filename=raw",
        "compare null-co:// null-co://",
        "compare --image-opts driver=qcow2,file.filename=orphan,backing= file.filename=hole",
        "compare \"json:{'driver':'qcow2','file.filename':'orphan','backing':null}\" hole",
        "compare -F raw base base",
        "compare \"json:{'driver':'qcow2','file.filename':'base'}\" base",
    ];
    same(&lines.map(String::from));
}

/// Every image with every other one, in both orders.
#[test]
fn pairs_of_images() {
    let images = [
        "raw",
        "hole",
        "zeros",
        "empty",
        "u1000",
        "base",
        "same",
        "q4k",
        "zlib",
        "over",
        "longer",
        "onraw",
        "unallocated",
        "kept",
        "metadata2",
        "two",
        "two7",
    ];
    let mut lines = Vec::new();
    for a in images {
        for b in images {
            lines.push(format!("compare -p {a} {b}"));
        }
    }
    same(&lines);
}

/// Strict mode compares what is allocated, too.
#[test]
fn pairs_of_images_in_strict_mode() {
    let images = [
        "hole",
        "zeros",
        "rawfull",
        "unallocated",
        "zero",
        "kept",
        "written",
        "falloc",
        "full",
        "lazy",
        "'a,b c'",
    ];
    let mut lines = Vec::new();
    for a in images {
        for b in images {
            lines.push(format!("compare -s {a} {b}"));
        }
    }
    for (a, b) in [
        ("raw", "onraw"),
        ("base", "empty1"),
        ("base", "over"),
        ("over", "over2"),
        ("compressed", "base"),
        ("metadata", "metadata2"),
        ("u1000", "u700"),
        ("u1000", "v1000"),
    ] {
        for (a, b) in [(a, b), (b, a), (a, a)] {
            lines.push(format!("compare -s {a} {b}"));
        }
    }
    same(&lines);
}

#[test]
fn many_layers_formats_and_odd_lengths() {
    let mut lines = Vec::new();
    for (a, b) in [
        ("raw", "q512"),
        ("raw", "v2"),
        ("base", "empty1"),
        ("over", "over2"),
        ("base", "compressed"),
        ("zlib", "zstd"),
        ("shorter", "longer"),
        ("coarse", "q512"),
        ("v2over", "base"),
        ("u700", "u1000"),
        ("u1000", "v1000"),
        ("u700", "v1000"),
        ("three", "empty"),
        ("u70000", "raw"),
        ("size1000", "hole"),
        ("size66000", "lazy"),
        ("truncated", "lazy"),
        ("beyond", "lazy"),
        ("huge", "unallocated"),
        ("snapshot", "sub/over"),
        ("q2m", "base"),
    ] {
        lines.push(format!("compare {a} {b}"));
        lines.push(format!("compare {b} {a}"));
    }
    same(&lines);
}

/// The same sentence and status as from the reference; ours adds where it was.
#[test]
fn damaged_images() {
    let Some(programs) = Programs::with_images("extents-compare", extents::make) else {
        return;
    };
    let mut lines = Vec::new();
    for image in extents::DAMAGED {
        for other in ["lazy", "zlib", "unallocated", "empty"] {
            for options in ["", "-q", "-s"] {
                lines.push(format!("compare {options} {image} {other}"));
                lines.push(format!("compare {options} {other} {image}"));
            }
        }
    }
    programs.compare(&lines, differs_but_for_causes);
}
