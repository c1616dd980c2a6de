//! The images that command lines of `img` work on, and the comparison of both programs.

use super::Programs;

/// Images that the commands work on, made by the reference.
pub const FIXTURES: &[&str] = &[
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
pub fn same(lines: &[&str]) {
    let Some(programs) = Programs::find(FIXTURES) else {
        return;
    };
    let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    programs.compare(&lines, |theirs, ours| theirs != ours);
}
