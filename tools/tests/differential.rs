//! The same command lines through `coblock img` and through `qemu-img`: standard output, standard
//! error and exit status must be equal, but for the program's name. What differs on purpose is in
//! `docs/compat.md` and has a test of its own.
//!
//! Each program works in its own copy of one folder of images. Without `qemu-img` the tests say so
//! and pass.

mod support;

use support::Programs;
use support::images::{FIXTURES, same};

#[test]
fn standard_options() {
    same(&[
        "",
        "foo",
        "--foo",
        "-T",
        "--=x",
        "--trace",
        "-q create",
        "-é",
        "-Th",
        "--trace=foo=bar info base",
        "--trace enable=foo info base",
        "-T foo -T bar info base",
        "-- info base",
    ]);
}

#[test]
fn command_lines_that_are_wrong() {
    same(&[
        "create",
        "create -f",
        "create -z",
        "create --zzz",
        "create --zzz=1",
        "create --o help",
        "create --=x",
        "create --help=x",
        "create a 1M 2M",
        "create --ob a",
        "info",
        "info a b",
        "info --output=foo base",
        "info --output base",
        "info --output",
        "info -q base",
        "info --cache none base",
        "info --f base",
        "info --fo raw base",
        "info --fo=raw base",
        "info -Uz base",
        "info -é base",
        "info --image-opts=1 base",
        "info --=x base",
        "info -f",
        "info base -- -U",
        "info -- -U",
        "info -",
        "info -image-opts base",
        "info -U=1 base",
        "info --image-opts -f qcow2 base",
        "info --object foo base",
        "check",
        "check a b",
        "check -r foo base",
        "check -r",
        "check -z",
        "check --output=x base",
        "check -T foo base",
        "check --image-opts -f qcow2 base",
        "check --=x",
        "bench",
        "bench a b",
        "bench -z",
        "bench --=x",
        "bench --quiet base",
        "bench -t foo base",
        "bench -i foo base",
        "bench --image-opts -f qcow2 base",
    ]);
}

#[test]
fn files_that_cannot_be_opened() {
    let names = [
        "nope", "''", "sub", "foo:bar", "sub/nope", "nope/x", "json:", "'json:{'", "json:[]",
    ];
    let mut lines = Vec::new();
    for command in [
        "info",
        "info --output=json",
        "info -f raw",
        "check",
        "bench",
        "bench -w",
    ] {
        for name in names {
            lines.push(format!("{command} {name}"));
        }
    }
    for format in ["foo", "''", "QCOW2"] {
        for command in ["info", "check", "bench"] {
            lines.push(format!("{command} -f {format} base"));
        }
    }
    lines.push("info -f qcow2 raw".into());
    lines.push("info -f qcow2 three".into());
    lines.push("info -f qcow2 empty".into());
    lines.push("check -f qcow2 raw".into());
    lines.push("info header80".into());
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn info() {
    let images = [
        "base",
        "raw",
        "over",
        "onraw",
        "orphan",
        "orphan2",
        "v2",
        "small",
        "ext",
        "zstd",
        "datafile",
        "prealloc",
        "snap",
        "bitmaps",
        "sub/over",
        "'a,b c'",
        "three",
        "empty",
        "corrupt",
        "dirty",
        "future",
        "named",
        "luks",
        "essiv",
        "aes",
        "file:co:lon",
        "./co:lon",
        "co:lon",
        "file:base",
        "./base",
        "sub/../base",
        "header4096",
    ];
    let mut lines = Vec::new();
    for image in images {
        for options in ["", "--output=json", "-U"] {
            lines.push(format!("info {options} {image}"));
        }
    }
    for image in ["over2", "sub/over", "base", "orphan", "onraw", "raw"] {
        for options in ["--backing-chain", "-b --output=json"] {
            lines.push(format!("info {options} {image}"));
        }
    }
    for rest in [
        "-f raw base",
        "-f qcow2 base",
        "-f file raw",
        "--out json base",
        "-fraw base",
        "-Ubf raw raw",
    ] {
        lines.push(format!("info {rest}"));
    }
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn image_options() {
    let options = [
        "base",
        "driver=qcow2,file.filename=base",
        "driver=qcow2,file.driver=file,file.filename=base",
        "driver=qcow2,file.filename=base,foo=bar",
        "driver=qcow2,file.filename=base,file.foo=bar",
        "driver=foo,file.filename=base",
        "filename=base",
        "file.filename=base",
        "file.filename=raw",
        "''",
        "driver=qcow2",
        "driver=qcow2,file=base",
        "driver=file,filename=raw",
        "driver=qcow2,file.filename=nope",
        "driver=qcow2,file.filename=base,cache.direct=on",
        "driver=qcow2,file.filename=base,cache.direct=x",
        "driver=qcow2,file.filename=base,read-only=x",
        "driver=raw,file.filename=a,,b",
        "'driver=qcow2,file.filename=a,,b c'",
        "driver=raw,file.filename=raw,driver=qcow2",
        "driver=raw,file.filename=raw,file.filename=nope",
        "driver=raw,filename=raw",
        "qcow2,file.filename=base",
        "driver=qcow2,file.filename=base,",
        "driver=,file.filename=base",
        "driver=qcow2,file.driver=foo,file.filename=x",
        "driver=qcow2,file.driver=file",
        "driver=qcow2,file.filename=",
        "driver=raw,file.filename=raw,read-only",
        "driver=raw,file.filename=raw,noread-only",
        "driver=raw,file.filename=raw,force-share=on",
        "driver=raw,file.filename=raw,node-name=1x",
        "driver=raw,file.filename=raw,cache=none",
        "driver=null-co",
        "driver=raw,file.filename=raw,size=512",
        "driver=raw,file.filename=raw,offset=1k",
        "driver=raw,file.filename=raw,offset=2M,size=1M",
        "driver=raw,file.filename=raw,size=5",
        "driver=raw,file.filename=raw,offset=1x",
        "driver=null-co,size=1G",
        "driver=null-co,size=1M,read-zeroes=on",
        "driver=qcow2,file.filename=over,backing.driver=raw",
        "driver=qcow2,file.filename=over,backing.driver=qcow2,backing.file.filename=base",
        "driver=qcow2,file.filename=orphan,backing=",
        "driver=raw,file.driver=null-co,file.size=1M",
        "driver=raw,file.driver=null-co",
        "driver=qcow2,file.filename=base,node-name=foo,file.locking=off,discard=unmap",
    ];
    let mut lines: Vec<String> = options
        .iter()
        .map(|o| format!("info --image-opts {o}"))
        .collect();
    lines.extend(
        options
            .iter()
            .take(4)
            .map(|o| format!("check --image-opts {o}")),
    );
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn json_file_names() {
    let names = [
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"base"}}"#,
        r#"{"driver":"qcow2","file.filename":"base"}"#,
        r#"{"driver":"qcow2","file.driver":"file","file":{"filename":"base"}}"#,
        r#"{"a":1}"#,
        "{}",
        "{} x",
        "x",
        "\"x",
        "\"x\"",
        "5",
        r#"{"driver":"qcow2" "file"}"#,
        r#"{"driver":"qcow2",}"#,
        "{driver}",
        r#"{"driver":"qcow2","file":{"driver":"file","filename":5}}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":null}}"#,
        r#"{"driver":"qcow2","file":[1]}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"base","x":1.5}}"#,
        r#"{"a":01}"#,
        r#"{"a":-}"#,
        r#"{"a":1.}"#,
        r#"{"a":"\x"}"#,
        r#"{"a":"\u12"}"#,
        r#"{"a":1,"a":2}"#,
        r#"{"driver":"raw","file":null}"#,
        r#"{"driver":"raw","file":{}}"#,
        r#"{"driver":"raw","file":{"driver":"file","filename":"base"},"read-only":"on"}"#,
        r#"{"driver":"raw","file":"x","file.filename":"base"}"#,
    ];
    let lines: Vec<String> = names.iter().map(|n| format!("info 'json:{n}'")).collect();
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn check() {
    let mut lines = Vec::new();
    for image in [
        "base",
        "small",
        "v2",
        "prealloc",
        "snap",
        "bitmaps",
        "over",
        "raw",
        "three",
        "leak",
        "wrong",
        "both",
        "zstd",
        "header4096",
        "corrupt",
        "dirty",
    ] {
        for options in [
            "",
            "--output=json",
            "-q",
            "-U",
            "-T none",
            "-T unsafe -f qcow2",
        ] {
            lines.push(format!("check {options} {image}"));
        }
    }
    lines.push("check --output=json --image-opts driver=qcow2,file.filename=over".into());
    lines.push("check --output=json file:base".into());
    lines.push("info \"json:{'driver':'raw','file.filename':'raw','size':4096}\"".into());
    lines.push("info \"json:{'driver':'qcow2','file.filename':'orphan','backing':null}\"".into());
    lines.push("check -f raw raw".into());
    lines.push("check -f raw base".into());
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn bench() {
    same(&[
        "bench -c 10 base",
        "bench -c 0 base",
        "bench -c -1 base",
        "bench -c x base",
        "bench -c 1k base",
        "bench -c 010 base",
        "bench -c 99999999999 base",
        "bench -c 10 -d 0 base",
        "bench -c 10 -d -1 base",
        "bench -c 10 -d 1k base",
        "bench -c 10 -d 100000 base",
        "bench -d 5 -d 6 -c 10 base",
        "bench -c 10 -s 0 base",
        "bench -c 10 -s 512 base",
        "bench -c 10 -s 513 base",
        "bench -c 10 -s 1k base",
        "bench -c 10 -s 1.5k base",
        "bench -c 10 -s 4G base",
        "bench -c 10 -s -1 base",
        "bench -c 10 -S 0 base",
        "bench -c 10 -S 8k base",
        "bench -c 10 -S x base",
        "bench -c 10 -S 4G base",
        "bench -c 10 -o 1M base",
        "bench -c 10 -o -1 base",
        "bench -c 3 -o 5 raw",
        "bench -c 30 -s 1 -S 9999 raw",
        "bench -w -c 10 base",
        "bench -w -c 10 over",
        "bench -w -c 10 --pattern 255 base",
        "bench -w -c 10 --pattern 256 base",
        "bench --pattern x base",
        "bench -c 10 --pattern 1 base",
        "bench -c 10 --flush-interval 2 base",
        "bench -w -c 10 --flush-interval 2 base",
        "bench --flush-interval x base",
        "bench --flush-interval -1 -w base",
        "bench -w -c 10 --flush-interval 0 base",
        "bench -w -c 100 --flush-interval 20 -d 10 base",
        "bench -w -c 100 --flush-interval 20 --no-drain -d 10 base",
        "bench -w -c 10 --no-drain -d 10 base",
        "bench -c 10 --no-drain base",
        "bench -n -c 10 base",
        "bench -i native -c 10 base",
        "bench -i io_uring -c 10 base",
        "bench -i threads -c 10 base",
        "bench -t writethrough -w -c 10 base",
        "bench -t unsafe -w -c 10 base",
        "bench -t none -c 10 base",
        "bench -t directsync -w -c 10 base",
        "bench -q -c 10 base",
        "bench -U -c 10 base",
        "bench -U -w -c 10 base",
        "bench --image-opts -c 10 driver=qcow2,file.filename=base",
        "bench -f raw -c 10 raw",
        "bench -w -f raw -c 10 raw",
        "bench -c 10 raw",
        "bench -w -c 10 raw",
        "bench -w -c 3 --image-opts driver=qcow2,file.filename=base,read-only=on",
        "bench -c 10 orphan",
        "bench -c 10 null-co://",
        "bench -w -c 10 --image-opts driver=null-co,size=1M",
        "bench -w -c 10 v2",
        "bench -w -c 10 small",
        "bench -w -c 10 corrupt",
        "bench -w -c 10 dirty",
    ]);
}

/// A request that fails: the reference's line comes first; ours adds which request it was.
#[test]
fn bench_names_the_request_that_failed() {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    for (line, request) in [
        (
            "bench -c 10 -o 10M base",
            "read of 4096 bytes at offset 10485760",
        ),
        (
            "bench -c 3 -o 10485000 base",
            "read of 4096 bytes at offset 10485000",
        ),
        (
            "bench -w -c 1 -o 20M base",
            "write of 4096 bytes at offset 20971520",
        ),
        (
            "bench -c 10 -s 3M raw",
            "read of 3145728 bytes at offset 9437184",
        ),
    ] {
        let (theirs, ours) = (programs.reference(line), programs.ours(line));
        assert_eq!(
            (theirs.status, &theirs.stdout),
            (ours.status, &ours.stdout),
            "{line}"
        );
        let first = theirs.stderr.lines().next();
        assert_eq!(ours.stderr.lines().next(), first, "{line}");
        assert!(ours.stderr.contains(request), "{line}: {}", ours.stderr);
    }
}

/// What differs on purpose, as `docs/compat.md` tells.
#[test]
fn deliberate_differences() {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    for (line, status, told) in [
        // Metadata is not encrypted: no key is needed to check it.
        ("check luks", 0, "No errors were found"),
        ("check -r all leak", 1, "--repair (-r) is not available"),
        (
            "create --object secret,id=s,data=x new 1M",
            1,
            "does not accept value 'secret'",
        ),
        (
            "create -f qcow2 -o extended_l2=on new 1M",
            1,
            "extended_l2: extended L2 entries are not",
        ),
        (
            "create -f qcow2 -o data_file=x new 1M",
            1,
            "data_file: images with an external data",
        ),
        (
            "create -f qcow2 -o encrypt.format=luks new 1M",
            1,
            "encrypted images are not supported",
        ),
        (
            "create -f raw -o extent_size_hint=1M new 1M",
            1,
            "extent_size_hint is not supported",
        ),
        ("convert base new", 1, "Command not available: convert"),
        ("info vmdk", 1, "Unknown driver 'vmdk'"),
        ("info nbd://localhost", 1, "Unknown protocol 'nbd'"),
        (
            "bench -n -t none base",
            1,
            "aio=native was specified, but is not supported in this build",
        ),
        ("bench -c 1 luks", 1, "the image is encrypted"),
        ("bench -c 1 ext", 1, "extended L2 entries are not supported"),
        ("--trace file=x info base", 1, "there are no trace events"),
        ("--version", 0, "qemu-img version 10.0.2 (coblock "),
        (
            "--help",
            0,
            "Supported formats: copy-on-read file null-co qcow2 raw throttle",
        ),
    ] {
        let ours = programs.ours(line);
        assert_eq!(ours.status, Some(status), "{line}: {ours}");
        let found = ours.stdout.contains(told) || ours.stderr.contains(told);
        assert!(found, "{line}: {ours}");
    }
}

/// `info` opens nothing beyond the named file: what it names may be missing.
#[test]
fn info_opens_the_named_file_only() {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    for image in ["orphan", "datafile"] {
        let (result, _) = programs.ours_in(&format!("info {image}"));
        assert_eq!(result.status, Some(0), "{image}: {result}");
    }
}
