//! `img create` beside the reference: command lines as in `differential.rs`, and what they leave.

mod support;

use std::os::unix::fs::MetadataExt as _;

use support::images::{FIXTURES, same};
use support::{Programs, Result_};

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
