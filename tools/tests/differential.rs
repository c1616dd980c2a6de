//! The same command lines through `coblock img` and through `qemu-img`: standard output, standard
//! error and exit status must be equal, but for the program's name. What differs on purpose is in
//! `docs/compat.md` and has a test of its own.
//!
//! Each program works in its own copy of one folder of images. Without `qemu-img` the tests say so
//! and pass.

mod support;

use std::os::unix::fs::MetadataExt as _;

use support::{Programs, Result_};

/// Images that the commands work on, made by the reference.
const FIXTURES: &[&str] = &[
    "create -q -f qcow2 base 10M",
    "create -q -f raw raw 10M",
    "create -q -f qcow2 -b base -F qcow2 over",
    "create -q -f qcow2 -b over -F qcow2 over2",
    "create -q -f qcow2 -b raw -F raw onraw",
    "create -q -f qcow2 -u -b nope -F qcow2 orphan 1M",
    "create -q -f qcow2 -u -b nope orphan2 -F raw 1M",
    "create -q -f qcow2 -o compat=0.10 v2 10M",
    "create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=1,cluster_size=512 small 1M",
    "create -q -f qcow2 -o extended_l2=on ext 1M",
    "create -q -f qcow2 -o compression_type=zstd zstd 1M",
    "create -q -f qcow2 -o data_file=df,data_file_raw=on datafile 1M",
    "create -q -f qcow2 -o preallocation=metadata prealloc 3M",
    "create -q -f qcow2 snap 1M",
    "snapshot -c one snap",
    "snapshot -c 'two three' snap",
    "create -q -f qcow2 bitmaps 1M",
    "bitmap --add bitmaps b0",
    "bitmap --add --disable -g 128k bitmaps b1",
    "create -q -f qcow2 sub/base 2M",
    "create -q -f qcow2 -b base -F qcow2 sub/over",
    "create -q -f qcow2 'a,b c' 1M",
    "create -q -f vmdk vmdk 1M",
    "create -q -f qcow2 corrupt 10M",
    "create -q -f qcow2 dirty 10M",
    "create -q -f qcow2 future 10M",
    "create -q -f qcow2 named 10M",
    "create -q -f qcow2 -b base -F qcow2 file:co:lon",
    "create -q -f qcow2 --object secret,id=s,data=abc \
     -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks 1M",
    "create -q -f qcow2 --object secret,id=s,data=abc \
     -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-mode=cbc \
     -o encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256 essiv 1M",
    "create -q -f qcow2 --object secret,id=s,data=abcdefgh \
     -o encrypt.format=aes,encrypt.key-secret=s aes 1M",
];

/// Runs every line through both programs, each time in fresh copies of the images, and lists the
/// lines that differ.
fn same(lines: &[&str]) {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    let mut wrong = Vec::new();
    for line in lines {
        let (theirs, ours) = (programs.reference(line), programs.ours(line));
        if theirs != ours {
            wrong.push(format!(
                "== {line}\n-- reference\n{theirs}\n-- ours\n{ours}"
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} differ\n{}",
        wrong.len(),
        lines.len(),
        wrong.join("\n")
    );
}

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
fn create_sizes() {
    let sizes = [
        "1",
        "0",
        "00",
        "010",
        "0x",
        "0x10",
        "0X10",
        "0x10k",
        "0x1.8",
        ".5k",
        "5.k",
        ".k",
        ".",
        "1.k",
        "1.5b",
        "1.5",
        "1B",
        "1b",
        "1K",
        "1T",
        "1.0001k",
        "0.0001k",
        "0.5",
        "0.0",
        "0.9k",
        "1e2",
        "1E5",
        "inf",
        "nan",
        "-0",
        "' -1'",
        "-1k",
        "' 5'",
        "'5 '",
        "+5",
        "++5",
        "1,5k",
        "1kk",
        "k",
        "''",
        "8E",
        "16E",
        "9223372036854775808",
        "18446744073709551616",
        "1.9999999999999999999k",
        "513",
        "511",
        "1.5M",
        "64P",
    ];
    let lines: Vec<String> = sizes
        .iter()
        .map(|s| format!("create -f qcow2 new -- {s}"))
        .collect();
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn create_options() {
    let options = [
        "cluster_size=4k",
        "cluster_size=1000",
        "cluster_size=256",
        "cluster_size=4M",
        "cluster_size=0",
        "cluster_size=-1",
        "cluster_size=1.5k",
        "cluster_size=4096,cluster_size=512",
        "cluster_size",
        "compat=0.10",
        "compat=v2",
        "compat=v3",
        "compat=1.1",
        "compat=0.42",
        "compat=",
        "compat",
        "compat=v2,lazy_refcounts=on",
        "lazy_refcounts=on",
        "lazy_refcounts",
        "nolazy_refcounts",
        "lazy_refcounts=maybe",
        "lazy_refcounts=yes",
        "lazy_refcounts=ON",
        "refcount_bits=1",
        "refcount_bits=3",
        "refcount_bits=64",
        "refcount_bits=128",
        "refcount_bits=0",
        "refcount_bits=-1",
        "refcount_bits=1k",
        "refcount_bits=08",
        "refcount_bits=18446744073709551616",
        "refcount_bits=8,compat=0.10",
        "compression_type=zstd",
        "compression_type=foo",
        "compression_type=zstd,compat=0.10",
        "preallocation=off",
        "preallocation=1234",
        "preallocation=",
        "extended_l2=on,cluster_size=4k",
        "extended_l2=on,compat=v2",
        "extended_l2=off",
        "data_file_raw=on",
        "data_file=df2,compat=v2",
        "encrypt.format=foo",
        "encryption=off",
        "encrypt.iter-time=x",
        "foo=bar",
        "foo",
        "=1",
        "''",
        ",",
        "compat=v3,",
        ",compat=v3",
        "backing_file=nope",
        "backing_file=",
        "backing_fmt=raw",
        "id=foo",
        "size=2M",
        "help=x",
    ];
    let mut lines: Vec<String> = options
        .iter()
        .map(|o| format!("create -f qcow2 -o {o} new 1M"))
        .collect();
    for line in [
        "create -f qcow2 -o size=2M new",
        "create -f qcow2 -o size=bar new",
        "create -f qcow2 -o size=-1 new",
        "create -f qcow2 -o size=16E new",
        "create -f qcow2 -o size=1M,, new",
        "create -f qcow2 -o nosize new",
        "create -f qcow2 -o cluster_size=512 -o cluster_size=1k new 1M",
        "create -f qcow2 -o cluster_size=512 new 1T",
        "create -f qcow2 --opt size=1M new",
        "create -f qcow2 -of new 1M",
        "create -q -f qcow2 new 1M",
        "create new -q 1M -f qcow2",
        "create -f raw -o cluster_size=1 new 1M",
        "create -f raw -o preallocation=falloc new 1M",
        "create -f raw -o preallocation=full new 1M",
        "create -f raw -o preallocation=metadata new 1M",
        "create -f raw -o preallocation=foo new 1M",
        "create -f raw -o nocow=on new 1M",
        "create -f raw -o size=1M new",
        "create -f raw -o size=1M -o size=2M new",
        "create -f raw new 1M",
        "create new 513",
        "create -f file new 1M",
        "create -f foo new 1M",
        "create -f foo new 1X",
        "create -f raw new",
        "create -f qcow2 new",
        "create new 1X",
        "create -f qcow2 sub 1M",
        "create -f qcow2 nope/x 1M",
        "create -f qcow2 '' 1M",
        "create -f raw '' 1M",
        "create -f raw sub 1M",
        "create -f qcow2 'a b' 1M",
        "create -f qcow2 file:b 1M",
        "create -f qcow2 foo:bar 1M",
        "create -f qcow2 json:x 1M",
        "create -f qcow2 ./foo:bar 1M",
        "create -f qcow2 -o help",
        "create -f qcow2 -o '?' new",
        "create -f qcow2 -o size=1M,help new",
        "create -f qcow2 -o help -o ''",
        "create -f qcow2 -o help=x",
        "create -f qcow2 -o size=help new",
        "create -f raw -o help",
        "create -f raw -o help new",
        "create -f foo -o help",
        "create -f qcow2 -o help foo:bar",
        "create -f qcow2 -o list",
    ] {
        lines.push(line.to_owned());
    }
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn create_with_a_backing_file() {
    same(&[
        "create -f qcow2 -b base new",
        "create -f qcow2 -b base -F qcow2 new",
        "create -f qcow2 -b base -F raw new",
        "create -f qcow2 -b raw -F raw new",
        "create -f qcow2 -b raw -F qcow2 new",
        "create -f qcow2 -b raw new",
        "create -f qcow2 -b nope -F qcow2 new",
        "create -f qcow2 -b nope new",
        "create -f qcow2 -b nope -F qcow2 new 1M",
        "create -f qcow2 -u -b nope -F qcow2 new",
        "create -f qcow2 -u -b nope -F qcow2 new 1M",
        "create -f qcow2 -u -b nope new 1M",
        "create -f qcow2 -u -b base new",
        "create -f qcow2 -F qcow2 new 1M",
        "create -f qcow2 -b base -F foo new",
        "create -f qcow2 -b base -F '' new",
        "create -f qcow2 -b base -F qcow2 -o backing_file=raw new",
        "create -f qcow2 -o backing_file=base,backing_fmt=qcow2 new",
        "create -f qcow2 -o backing_file=base,backing_fmt=raw -F qcow2 new",
        "create -f qcow2 -b '' new 1M",
        "create -f qcow2 -b '' new",
        "create -f qcow2 -b base -F qcow2 base",
        "create -f qcow2 -b base -F qcow2 new 20M",
        "create -f qcow2 -b base -F qcow2 new 5M",
        "create -f qcow2 -b over2 -F qcow2 new",
        "create -f qcow2 -b orphan -F qcow2 new",
        "create -f qcow2 -b base -F file new",
        "create -f qcow2 -b base -F qcow2 sub/new",
        "create -f qcow2 -b over -F qcow2 sub/new",
        "create -f qcow2 -u -b 'x,y' -F raw new 1M",
        "create -f qcow2 -o preallocation=metadata -b base -F qcow2 new",
        "create -f raw -b base new 1M",
        "create -f raw -F qcow2 new 1M",
        "create -f raw -u new",
        "create -f qcow2 -u new",
        r#"create -f qcow2 -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}' -F qcow2 new"#,
    ]);
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

/// What both programs made is the same image to the reference.
#[test]
fn created_images_are_equal_to_the_reference() {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    for line in [
        "create -q -f qcow2 new 10M",
        "create -q -f qcow2 new 0",
        "create -q -f qcow2 -o cluster_size=512 new 3M",
        "create -q -f qcow2 -o cluster_size=2M new 1T",
        "create -q -f qcow2 -o compat=v2 new 10M",
        "create -q -f qcow2 -o refcount_bits=1 new 10M",
        "create -q -f qcow2 -o refcount_bits=64,cluster_size=4k new 10M",
        "create -q -f qcow2 -o lazy_refcounts=on,compression_type=zstd new 10M",
        "create -q -f qcow2 -b base -F qcow2 new",
        "create -q -f qcow2 -b raw -F raw new 20M",
        "create -q -f qcow2 -u -b nope -F raw new 20M",
        "create -q -f raw new 10M",
    ] {
        let facts = |made: Result_, folder: &std::path::Path| {
            assert_eq!(made.status, Some(0), "{line}: {made}");
            programs.facts(folder, "new")
        };
        let theirs = {
            let (made, folder) = programs.reference_in(line);
            facts(made, &folder)
        };
        let ours = {
            let (made, folder) = programs.ours_in(line);
            if !line.contains("nope") {
                let checked = programs.check(&folder, "new");
                assert!(matches!(checked, 0 | 63), "{line}: check says {checked}");
            }
            facts(made, &folder)
        };
        assert_eq!(theirs, ours, "{line}");
    }
}

/// The first block of a raw image is stored, the rest are holes: direct I/O cannot find its
/// alignment out in a hole.
#[test]
fn created_raw_images_begin_with_a_block() {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    for size in ["0", "512", "1000", "4096", "5000", "3M"] {
        let line = format!("create -q -f raw new {size}");
        let blocks = |(made, folder): (Result_, std::path::PathBuf)| {
            assert_eq!(made.status, Some(0), "{line}: {made}");
            let metadata = std::fs::metadata(folder.join("new")).unwrap();
            (metadata.len(), metadata.blocks())
        };
        let theirs = blocks(programs.reference_in(&line));
        assert_eq!(theirs, blocks(programs.ours_in(&line)), "{line}");
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
        ("--help", 0, "Supported formats: file null-co qcow2 raw"),
    ] {
        let ours = programs.ours(line);
        assert_eq!(ours.status, Some(status), "{line}: {ours}");
        let found = ours.stdout.contains(told) || ours.stderr.contains(told);
        assert!(found, "{line}: {ours}");
    }
}

/// Nothing is touched by a `create` that its options rule out: the reference empties or removes the
/// file.
#[test]
fn a_refused_create_leaves_an_existing_file_alone() {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    for options in [
        "refcount_bits=3",
        "cluster_size=1000",
        "compat=0.42",
        "extended_l2=on",
    ] {
        let (result, folder) =
            programs.ours_in(&format!("create -q -f qcow2 -o {options} three 1M"));
        assert_eq!(result.status, Some(1), "{options}: {result}");
        assert_eq!(
            std::fs::read(folder.join("three")).unwrap(),
            b"abc",
            "{options}"
        );
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
