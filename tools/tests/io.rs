//! The same command lines through `coblock io` and through `qemu-io`: standard output, standard
//! error and exit status must be equal, and so must be the images afterwards. What differs on
//! purpose is in `docs/compat.md` and has a test of its own. Without the reference the tests say so
//! and pass.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use support::io::{Pair, Who, have_reference, must};
use support::words;

/// Images that commands work on, some of them for writing.
const IMAGES: [&str; 7] = ["base", "raw", "over", "comp", "odd", "v2", "lazy"];

fn images() -> Option<&'static Path> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    if !have_reference() {
        return None;
    }
    let folder = FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("io-images");
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        fs::create_dir_all(&folder).unwrap();
        for line in [
            "qemu-img create -q -f qcow2 base 10M",
            "qemu-img create -q -f raw raw 10M",
            "qemu-img create -q -f qcow2 -o compat=v2 v2 10M",
            "qemu-img create -q -f qcow2 -o lazy_refcounts=on lazy 10M",
            "qemu-img create -q -f qcow2 -b base -F qcow2 over 20M",
            "qemu-img create -q -f qcow2 -u -b null-co:// -F raw onnull 1M",
            "qemu-io -c 'write 0 64k' -c 'write -P 3 1M 192k' base",
            "qemu-io -c 'write 3M 64k' over",
            "qemu-io -f raw -c 'write -P 7 1M 64k' raw",
            "qemu-img convert -c -O qcow2 base comp",
        ] {
            let line = words(line);
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            must(line[0], &line[1..], &folder);
        }
        let write = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).unwrap();
        write("odd", b"abc");
        write("empty", b"");
        write("pattern", b"ab,.;:-_~! \x7fZz09");
        write("magic", b"QFI\xfb\0\0\0\x03");
        let mut broken = fs::read(folder.join("base")).unwrap();
        let word = |image: &[u8], at: usize| {
            let word = image[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_be_bytes(word) & !(1 << 63)).expect("in the file")
        };
        let table = word(&broken, word(&broken, 40));
        // Guest clusters 1 and 2: a place that is none, and the table itself.
        for (slot, host) in [(1, 0x5_0200), (2, table as u64)] {
            broken[table + slot * 8..][..8].copy_from_slice(&(1 << 63 | host).to_be_bytes());
        }
        write("broken", &broken);
        folder
    });
    Some(folder)
}

/// Runs every line through both programs, each time in fresh copies, and lists what differs.
fn same(lines: &[&str]) {
    let Some(images) = images() else {
        return;
    };
    let mut wrong = Vec::new();
    for line in lines {
        let pair = Pair::of(images);
        let words = words(line);
        let [theirs, ours] = [Who::Reference, Who::Ours].map(|who| pair.run(who, &words, ""));
        let mut differ = Vec::new();
        if theirs != ours {
            differ.push(format!("-- reference\n{theirs}\n-- ours\n{ours}"));
        }
        for image in IMAGES {
            differ.extend(pair.differences(image));
        }
        if !differ.is_empty() {
            wrong.push(format!("== {line}\n{}", differ.join("\n")));
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
fn options_of_the_program() {
    same(&[
        "nope",
        "''",
        "foo:bar",
        "json:{}",
        "-c length base",
        "-c length -f qcow2 base",
        "-c length -f raw base",
        "-c length -f qcow2 raw",
        "-c length -f foo base",
        "-c length -f foo nope",
        "-f raw nope",
        "-c length -r base",
        "-c length -U base",
        "-c length -U -r base",
        "-c length -t foo base",
        "-c length -t none -i threads base",
        "-c length -t writethrough base",
        "-c length -t directsync base",
        "-c length -i foo base",
        "-c length -i io_uring base",
        "-c length -k base",
        "-c length -i native base",
        "-c length -d foo base",
        "-c length -T foo base",
        "-c length --trace=foo base",
        "-c length --object foo base",
        "-c length --image-opts -f qcow2 driver=qcow2,file.filename=base",
        "-c length --image-opts driver=qcow2,file.filename=base",
        "-c length --image-opts driver=qcow2,file.filename=nope",
        "-c length --image-opts driver=qcow2,file.filename=base,foo=bar",
        "-c length --image-opts foo=bar",
        "-c length --image-opts ''",
        "-c length -c map --image-opts driver=raw,file.filename=raw,offset=512,size=1M",
        "-c 'read 0 64k' onnull",
        "-n -m -c 'write -P 5 1 3' -c 'read -P 5 1 3' base",
        "--cmd=length --read-only --force-share base",
        "-c 'write 0 64k' -c quit -c 'read -P 1 0 1' base",
    ]);
}

#[test]
fn words_of_commands() {
    same(&[
        "-c foo -c '' -c ' ' -c rv -c m -c length;length base",
        "-c 'write' -c 'write 0' -c 'write 0 1 2' -c 'write -y 0 1' -c 'write -P' -c 'write -P 256 0 1k' base",
        "-c 'write x 1k' -c 'write 0 x' -c 'write -1 1k' -c 'write 0 4G' -c 'write 8E 1k' -c 'write 0 8E' base",
        "-c 'write 9223372036854775808 1' -c 'write 16E 1k' -c 'write 1e3 1' -c 'write 1kb 1' base",
        "-c 'write 0 -- -1' -c 'write -- -1 1k' -c 'write -- 0 -1' -c 'read --foo 0 1' -c 'read --P 0 1' base",
        "-c 'write 0x10 0x10' -c 'write 1.5k 1' -c 'write 010 1' -c 'write 1K 1' -c 'write   5    5' base",
        "-c 'read -P 0x10 0 1' -c 'read -P -1 0 1' -c 'read -P 010 0 1' -c 'read -P 1k 0 1' base",
        "-c 'write -n 0 64k' -c 'write -u 0 64k' -c 'write -zP 3 0 64k' -c 'write -zs foo 0 64k' base",
        "-c 'write -s foo -P 3 0 64k' -c 'write -bz 0 64k' -c 'write -fb 0 64k' -c 'write -fc 0 64k' base",
        "-c 'write -zr 0 64k' -c 'write -bu 0 64k' -c 'read -b 1 3' -c 'read -b 0 3' -c 'write -b 0 3' base",
        "-c 'write -c 0 3' -c 'write -c 3 512' -c 'write -c 100M 512' base",
        "-c 'writev 0' -c 'writev 0 x' -c 'writev 0 1k x' -c 'writev -P 300 0 1k' -c 'writev 0 2G 2G' base",
        "-c 'readv -b 0 1k' -c 'readv 0 3G' -c 'readv 0 1G 1G' -c 'readv x 1' base",
        "-c 'aio_write -z 0 64k 64k' -c 'aio_write -u 0 64k' -c 'aio_write -zr 0 64k' -c 'aio_write -P 300 0 1' base",
        "-c 'aio_write x 1' -c 'aio_write 0 x' -c 'aio_write -z 0 x' -c 'aio_write -z x 1k' -c 'aio_write 0' base",
        "-c 'aio_write -z 0' -c 'aio_write -n 0 1k' -c 'aio_read 0' -c 'aio_read x 1' -c 'aio_read 0 x' base",
        "-c 'aio_read -P 300 0 1' -c 'aio_read 0 3G' -c 'aio_write 0 3G' base",
        "-c 'discard 0 3G' -c 'discard 0 2147483136' -c 'discard 0 2147483137' -c 'discard 0' -c 'discard -x 0 1' base",
        "-c 'write -z 0 2147483137' -c 'write -z -n 0 3G' -c 'write 9223372036854775807 1k' base",
        "-c 'read -s 1 0 64' -c 'read -l 1 0 64' -c 'read -s x 0 64' -c 'read -l x 0 64' -c 'read 0 3G' base",
        "-c 'read -P 1 -s 100 0 64' -c 'read -P 1 -s 10 -l 100 0 64' base",
        "-c 'alloc' -c 'alloc x' -c 'alloc 0 x' -c 'alloc -1' -c 'alloc 0 1 2' base",
        "-c 'truncate' -c 'truncate -1' -c 'truncate -- -1' -c 'truncate 8E' -c 'truncate -m off' base",
        "-c 'truncate -m' -c 'truncate -z 1M' -c 'truncate -m foo 1M' -c 'truncate 1 2' -c 'truncate 513' base",
        "-c 'map 1' -c 'length 1' -c 'info 1' -c 'close 1' -c 'flush 1' -c 'aio_flush 1' -c 'abort 1' base",
        "-c sleep -c 'sleep -1' -c 'sleep 1.5' -c 'sleep x' -c 'sleep 0x1' -c 'sleep 010' base",
        "-c sigraise -c 'sigraise x' -c 'sigraise 0' -c 'sigraise 100' -c 'sigraise 65' base",
        "-c 'break a b' -c 'break a' -c 'resume x' -c 'remove_break x' -c wait_break base",
        "-c 'zone_report 0 1' -c 'zone_open 0 1' -c 'zone_append 0 1' -c 'zone_append 0 512 512' base",
        "-c 'zone_reset 0 1' -c 'zone_finish 0 1' -c 'zone_close 0 1' -c zone_open -c 'zone_open x 1' base",
        "-c help",
        "-c '?' -c 'help x' -c 'help a b' -c 'help length' -c '? ?' -c 'help map'",
        "-c 'r 0 1' -c 'w 0 1' -c f -c 'd 0 1' -c l -c i -c 'a 0' -c 't 11M' -c c -c 'o base' -c 'f 1' -c q base",
        "-c r -c 'r -y 0 1' -c 'w -y 0 1' base",
    ]);
}

#[test]
fn commands_that_need_an_image() {
    same(&[
        "-c read -c aio_flush -c flush -c sleep -c 'sleep 1' -c info -c reopen -c 'sigraise 0' -c 'read -y'",
        "-c alloc -c map -c length -c break -c zone_open -c discard -c truncate -c close",
        "-r -c 'write 0' -c 'write -y 0 1' -c 'aio_write 0 1k' -c 'truncate 1k' -c 'discard 0 1' -c flush base",
        "-r -c 'writev 0 1k' -c 'aio_write -z 0 1k' -c 'truncate -m foo 1' -c 'zone_append 0 512 512' base",
        "-c close -c 'read 0 1k' -c 'open base' -c 'read 0 1k' -c 'open raw' -c close -c close base",
    ]);
}

#[test]
fn reads_and_writes() {
    same(&[
        "-c 'write 0 64k' -c 'read -P 1 0 64k' -c 'read -P 0xcd 0 64k' -c 'read 0 1k' base",
        "-c 'write 1 3' -c 'read -v 0 64' -c 'read -C 0 64' -c 'read -q 0 64' -c 'read -v 5 20' base",
        "-c 'write 0 0' -c 'write -z 0 0' -c 'read 0 0' -c 'read -P 1 0 0' -c 'discard 0 0' base",
        "-c 'write -f 0 64k' -c 'write -fz 0 64k' -c 'write -r 0 64k' -c 'write -p 0 64k' -c 'write -q 0 64k' base",
        "-c 'write -C 0 64k' -c 'write -Cz 0 64k' -c 'read -r 0 64k' -c 'read -rv 0 6' -c 'read -p 0 1k' base",
        "-c 'read -P 1 -l 10 0 64' -c 'read -P 1 -s 10 0 64' -c 'read -P 1 -s 10 -l 1 4096 64' base",
        "-c 'writev 0 1k 1k' -c 'writev 0 1k 1k 3' -c 'writev -P 9 0 1k 1k 3' -c 'read -v 0 1k' base",
        "-c 'writev -q 0 1k' -c 'writev -C 0 1k' -c 'writev -f 0 1k' -c 'writev -r 0 1k 2k' base",
        "-c 'readv 0 1k 1k' -c 'readv -v 0 1k 16' -c 'readv -P 9 0 1k' -c 'readv -q 0 1k' -c 'readv 0 0' base",
        "-c 'write 100M 4k' -c 'read 100M 4k' -c 'writev 20M 1k' -c 'readv 9M 512k 512k 512k' base",
        "-c 'write -s nope 0 1' -c 'write -s . 0 40' -c 'write -s empty 0 40' -f raw raw",
        "-c 'write -s pattern 0 40' -c 'read -v 0 40' -f raw raw",
        "-c 'read -P 3 1M 192k' -c 'write 1M 1k' -c 'read -v 1M 1040' comp",
        "-c 'write -P 5 1 3' -c 'read -P 5 1 3' -t none raw",
        "-t writeback -c 'write 0 2M' -c 'read -P 0xcd 0 2M' over",
        "-t unsafe -c 'write 0 2M' -c flush -c 'read -P 0xcd 0 2M' over",
        "-c 'write -P 1 0 64k' -c 'write -P 2 64k 64k' -c 'read -P 2 64k 64k' lazy",
    ]);
}

#[test]
fn requests_beside_the_commands() {
    same(&[
        "-c 'aio_write 0 64k' -c aio_flush -c 'aio_read -P 0xcd 0 64k' -c aio_flush base",
        "-c 'aio_write 0 64k' raw",
        "-c 'aio_write 0 64k' -c close -c 'open raw' -c 'read -P 0xcd 0 64k' raw",
        "-c 'aio_read -v 0 20' -c aio_flush -c 'aio_read -P 9 0 64k' -c aio_flush -c 'aio_read -q 0 1' base",
        "-c 'aio_read -C 0 64k' -c aio_flush -c 'aio_read -i 0 64k' -c 'aio_write -i 0 64k' base",
        "-c 'aio_read -i 0 x' -c 'aio_write -i 0 x' -c 'aio_write -iz 0 3G' base",
        "-c 'aio_read 100M 64k' -c aio_flush -c 'aio_write 100M 64k' -c aio_flush -c 'aio_write -z 100M 64k' base",
        "-c 'aio_write -z 0 64k' -c aio_flush -c 'aio_write -zu 0 64k' -c aio_flush -c 'aio_write -fz 0 64k' base",
        "-c 'aio_write -f 0 64k' -c aio_flush -c 'aio_write -P 3 0 64k 64k 3' -c aio_flush -c 'aio_write -q 0 1' base",
        "-c 'aio_write -C 0 1k' -c aio_flush -c 'aio_write -z 0 3G' -c aio_flush -c 'aio_write -z 0 0' base",
        "-c 'aio_read 0 0' -c aio_flush -c 'aio_read 0 1k 1k' base",
        // Over at once, so that its callback comes in the sleep however long that is.
        "-c 'aio_write 0 64k' -c 'sleep 1' -c 'read 0 64k' --image-opts driver=null-co,size=1G",
    ]);
}

#[test]
fn what_an_image_is() {
    same(&[
        "-c map -c 'alloc 0' -c 'alloc 0 1M' -c 'alloc 11M' -c 'alloc 0 20M' -c 'alloc 9.9M 1M' base",
        "-c 'alloc 1' -c 'alloc 1 1' -c 'alloc 0 3' -c 'alloc 0 0' -c 'alloc 60k 20k' -c 'alloc 513 1024' base",
        "-c map -c 'alloc 0 20M' -c length -c info over",
        "-c map -c 'alloc 0 2M' -c info comp",
        "-c map -c info -f raw raw",
        "-c map -c length -f raw empty",
        "-c info v2",
        "-c info lazy",
        "-c info -c length -f file odd",
        "-c 'discard 0 64k' -c 'discard -q 1M 64k' -c 'discard -C 1M 128k' -c map base",
        "-c 'discard 0 64k' -c map over",
        "-c 'discard 3M 64k' -c map -c 'write -z 4M 64k' -c map over",
        "-c 'write -z 3M 64k' -c map -c 'write -zu 0 64k' -c map -c 'alloc 0 1M' over",
        "-c 'write -zu 0 64k' -c 'write -z 1M 64k' -c 'write -zn 2M 64k' -c map base",
        "-c 'write -z 0 64k' -c 'discard 1M 64k' -c map v2",
        "-d ignore -c 'discard 0 64k' -c map base",
        "--image-opts -d ignore -c 'discard 0 64k' -c map driver=qcow2,file.filename=base,discard=unmap",
        "--image-opts -c 'discard 0 64k' -c map driver=qcow2,file.filename=base,discard=ignore",
        "-c 'truncate 20M' -c length -c 'read 15M 64k' -c 'truncate -m off 21M' -c length base",
        "-c 'truncate 20M' -c length -c 'truncate 1M' -c length -f raw raw",
        "-c map -c length -c 'truncate 1M' --image-opts driver=null-co,size=1G",
        "-c 'read -P 5 0 1k' -c 'alloc 0 10M' -c info --image-opts driver=null-co,size=1G",
        "-c 'write 0 1M' -c 'discard 0 1M' -c 'write -z 0 1M' --image-opts driver=null-co,size=1G",
    ]);
}

/// A disk that becomes shorter, or grows with its space taken at once.
#[test]
fn truncation() {
    same(&[
        "-c 'truncate 1M' -c length -c map -c 'read -P 0 512k 512k' -c 'truncate 2M' -c map -c 'read 1M 1M' base",
        "-c 'write -P 3 0 8M' -c 'truncate 5M' -c 'truncate 0' -c length -c map -c 'truncate 1M' -c 'read -P 0 0 1M' base",
        "-c 'write -P 3 0 4M' -c 'truncate 2049k' -c length -c 'read -P 3 0 2049k' -c map base",
        "-c 'truncate 1M' -c 'truncate 3M' -c 'read 0 3M' -c map over",
        "-c 'write -P 3 0 4M' -c 'truncate 65k' -c 'read -P 3 0 65k' -c map v2",
        "-c 'truncate 64k' -c length -c 'read 0 64k' -c map comp",
        "-c 'truncate 1M' -c 'write -P 5 0 1M' -c 'truncate 256k' -c map lazy",
        "-c 'truncate -m metadata 12M' -c length -c 'read -P 0 10M 2M' -c 'truncate -m metadata 1M' base",
        "-c 'truncate -m falloc 12M' -c length -c 'read -P 0 10M 2M' -c 'truncate -m falloc 1M' base",
        "-c 'truncate -m full 12M' -c length -c 'read -P 0 10M 2M' -c 'truncate -m full 1M' base",
        "-f raw -c 'truncate -m metadata 12M' -c 'truncate -m falloc 12M' -c length -c 'truncate -m full 13M' raw",
        "-f raw -c 'truncate -m falloc 1k' -c 'truncate -m full 1k' -c length -c 'truncate 1k' -c length raw",
        "-r -c 'truncate -m full 12M' -c 'truncate 1M' base",
    ]);
}

/// Reads that write what they found below.
#[test]
fn copy_on_read() {
    same(&[
        "-C -c 'read 0 1k' -c map -c 'read 1M 200k' -c map -c 'alloc 0 4M' over",
        "-C -c 'read 0 64k' -c 'write -P 9 32k 64k' -c 'read 0 256k' -c map -c 'discard 0 64k' -c map over",
        "-C -c 'aio_read 100k 300k' -c aio_flush -c map over",
        "-C -c 'read 0 1M' -c map -c info -c length over",
        "-C -c 'read 0 1M' -c map base",
        "-C -f raw -c 'read 0 1M' -c map raw",
        "-C -r -c 'read 0 1M' over",
        "-c 'open -C over' -c 'read 3M 1k' -c map -c close -c 'open -rC over'",
        "-C -c 'reopen -o cache.direct=on' -c 'read 0 1k' -c 'reopen -o driver=raw' -c map over",
        "--image-opts -c 'read 0 64k' -c 'alloc 0 128k' driver=copy-on-read,file.driver=qcow2,file.file.filename=over",
        "-C -s -c 'read 0 64k' -c 'read 1M 64k' over",
    ]);
}

/// Options of the driver, wherever they can be given.
#[test]
fn options_of_qcow2() {
    same(&[
        "-c 'open -o driver=qcow2,cache-size=1M,l2-cache-size=2M base' -c 'open -o driver=qcow2,l2-cache-entry-size=100 base'",
        "-c 'open -o driver=qcow2,overlap-check=foo base' -c 'open -o driver=qcow2,overlap-check.foo=on base'",
        "-c 'open -o driver=qcow2,cache-clean-interval=-1 base' -c 'open -o driver=qcow2,cache-clean-interval=x base'",
        "-c 'open -o driver=qcow2,overlap-check.template=all,overlap-check=none base'",
        "--image-opts -c 'write 0 64k' driver=qcow2,cache-size=1M,cache-clean-interval=1,overlap-check=all,file.filename=base",
        "--image-opts -c 'write 0 64k' driver=qcow2,pass-discard-snapshot=off,overlap-check.main-header=off,file.filename=base",
        "-c 'reopen -o cache-clean-interval=5' -c 'read 0 1k' -c 'reopen -o cache-clean-interval=5000000000' -c 'read 0 1k' base",
        "-c 'reopen -o l2-cache-size=64k,l2-cache-entry-size=512' -c 'write 0 1M' base",
    ]);
}

/// A file whose length is not a multiple of 512 bytes: the disk is, and it grows by writes there.
#[test]
fn a_last_sector_that_is_not_whole() {
    same(&[
        "-f raw -c length -c map -c 'read -v 0 10' -c 'write 0 600' -c 'write 0 512' -c length odd",
        "-f raw -c 'write 2 2' -c 'aio_read -v 0 8' -c aio_flush -c 'discard 0 512' -c 'alloc 0 1k' odd",
        "-f raw -c 'aio_write 2 2' -c aio_flush -c 'read -v 0 10' -c 'write -c 0 1k' odd",
        "-f raw -c 'write -z 4 2' -c 'read -v 0 10' -c 'aio_write -z 0 512' -c aio_flush odd",
        "-f raw -c 'read 0 512' -c 'read 0 513' -c 'truncate 5' -c length -c 'truncate 1024' -c length odd",
        "-f file -c 'truncate 3k' -c length odd",
    ]);
}

/// A raw image of guessed format must not come to look like another one.
#[test]
fn the_first_sector_of_a_guessed_image() {
    same(&[
        "-c 'write -s magic 0 512' -c 'read -v 0 16' -c 'write -s magic 0 8' -c 'read -v 0 16' raw",
        "-c 'write -s magic 512 8' -c 'aio_write -P 0 0 1k' raw",
        "-f raw -c 'write -s magic 0 512' raw",
        "-c 'write -P 0x46 1 1' -c 'write -P 0x49 2 1' -c 'write -P 0xfb 3 1' -c 'write -P 0x51 0 1' raw",
    ]);
}

#[test]
fn open_and_close() {
    same(&[
        "-c 'open base' -c length -c 'open raw' -c close -c 'open nope' -c length -c open -c 'open base raw'",
        "-c 'open -z base' -c 'open -t foo base' -c 'open -i foo base' -c 'open -d foo base' -c 'open -U base'",
        "-c 'open -rU base' -c 'write 0 1' -c close -c 'open -r' -c 'open -k base' -c 'open foo:bar'",
        "-c 'open -o driver=qcow2 base' -c length -c close -c 'open -o driver=qcow2,file.filename=base' -c length",
        "-c 'open -o foo=1 base' -c 'open -o foo base' -c 'open -o x' -c 'open json:{}'",
        "-c 'open -o driver=qcow2 -o cache.direct=on base' -c length",
        "-c 'open -o read-only=on base' -c 'open -ro read-only=on base' -c length",
        "-c 'open -d ignore base' -c 'discard 0 64k' -c map",
        "--image-opts -c 'open driver=qcow2,file.filename=base' -c length",
        "--image-opts -c 'open driver=qcow2,file.filename=bas' -c 'open -o driver=qcow2 file.filename=base'",
    ]);
}

#[test]
fn reopen() {
    same(&[
        "-c reopen -c 'reopen -r -w' -c 'reopen -c foo' -c 'reopen x' -c 'reopen -z' base",
        "-c 'reopen -r' -c 'write 0 1k' -c 'reopen -w' -c 'write 0 1k' base",
        "-r -c 'reopen -w' -c 'write 0 1k' -c 'read -P 0xcd 0 1k' base",
        "-c 'reopen -c none' -c 'read 0 1k' -c 'reopen -o cache.direct=off' -c 'read 0 1k' base",
        "-r -c 'reopen -o read-only=on' -c 'write 0 1k' -c 'read 0 1k' base",
        "-c 'reopen -o foo=bar' -c 'reopen -o driver=raw' -c 'reopen -o driver=qcow2' -c 'read 0 1k' base",
        "-c 'reopen -o backing.driver=file' -c 'reopen -o backing.driver=qcow2' -c 'reopen -o file.driver=x' over",
        "-c 'reopen -o file.node-name=x' -c 'reopen -o backing.node-name=x' over",
        "-c 'open -o node-name=x base' -c 'reopen -o node-name=x' -c 'reopen -o node-name=y'",
        "-c 'reopen -r -o read-only=off' -c 'reopen -c none -o cache.direct=on' base",
        "-c 'reopen -o read-only=maybe' -c 'reopen -o cache.direct=x' -c 'reopen -o cache.no-flush=x' base",
        "-c 'write 0 1k' -c 'reopen -r' -c 'read -P 0xcd 0 1k' -c map over",
    ]);
}

/// Writes go to an image that is gone afterwards.
#[test]
fn snapshots() {
    same(&[
        "-s -c 'write -P 7 0 64k' -c map -c 'read -P 7 0 64k' -c length -c info base",
        "-s -c 'write -P 7 0 64k' -c 'read -P 7 0 64k' -c 'read -P 3 1M 192k' over",
        "-s -f raw -c 'write 1 2' -c 'read -v 0 8' -c 'read -P 7 1M 64k' raw",
        "-r -s -c 'write 0 64k' base",
        "-c 'open -s base' -c 'write 0 1k' -c close -c 'open base' -c 'read -P 0xcd 0 64k'",
        "-s nope",
    ]);
}

/// Commands from standard input: prompts, and what comes between them.
#[test]
fn standard_input() {
    let Some(images) = images() else {
        return;
    };
    for input in [
        "",
        "\n",
        "quit",
        "read 0 1k\nfoo\nwrite -y 0 1k\nwrite 0\nmap\n\n   \nread  0   1k   \n#x\nquit\nread 0 1k",
        "read -P 1 0 1k\nquit\n",
        "close\nread 0 1\nopen base\nread -P 0xcd 0 64k",
        "aio_write -P 5 0 64k\naio_flush\nread -P 5 0 64k\n",
        &format!("read 0 1k{}5\nlength\n", " ".repeat(2000)),
    ] {
        let pair = Pair::of(images);
        let [theirs, ours] = [Who::Reference, Who::Ours].map(|who| pair.run(who, &["base"], input));
        assert_eq!(ours.to_string(), theirs.to_string(), "{input:?}");
        assert_eq!(pair.differences("base"), [""; 0], "{input:?}");
    }
}

/// A crash is one: nothing is written out, results so far are told or not, as by the reference.
#[test]
fn crashes() {
    same(&[
        "-c 'read 0 1' -c abort base",
        "-c 'read 0 1' -c 'sigraise 15' base",
        "-c 'read 0 1' -c 'sigraise 9' base",
    ]);
}

/// What differs on purpose, as `docs/compat.md` tells.
#[test]
fn deliberate_differences() {
    let Some(images) = images() else {
        return;
    };
    for (line, status, told) in [
        ("--version", 0, "qemu-io version 10.0.2 (coblock "),
        ("--help", 0, "Usage: qemu-io "),
        ("-z", 1, "qemu-io: invalid option -- 'z'"),
        (
            "--object",
            1,
            "qemu-io: option '--object' requires an argument",
        ),
        (
            "-c 'reopen -o read-only=on' base",
            1,
            "cannot support read-write users",
        ),
        ("a b", 1, "Usage: qemu-io "),
        ("-k -n -c length base", 1, "aio=native was specified"),
        (
            "-c 'write -c 0 64k' base",
            1,
            "write failed: Operation not supported",
        ),
        (
            "-c 'write -b 0 64k' base",
            1,
            "write failed: Operation not supported",
        ),
        (
            "-c 'read -b 0 64k' base",
            1,
            "read failed: Operation not supported",
        ),
        ("-c 'help read' base", 0, "read [-abCqrv]"),
        (
            "-c 'wait_break x' base",
            1,
            "Could not wait for a breakpoint",
        ),
        (
            "--object secret,id=a,data=b base",
            1,
            "does not accept value 'secret'",
        ),
    ] {
        let pair = Pair::of(images);
        let ours = pair.run(Who::Ours, &words(line), "");
        assert_eq!(ours.status, Some(status), "{line}: {ours}");
        let found = ours.stdout.contains(told) || ours.stderr.contains(told);
        assert!(found, "{line}: {ours}");
    }
}

/// Called through a link whose name ends in `-io`, messages and prompts begin with that name.
#[test]
fn the_name_decides() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("my-io");
    symlink(env!("CARGO_BIN_EXE_coblock"), &link).unwrap();
    let run = |words: &[&str]| {
        let program = Command::new(&link).args(words).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(program.stdout), text(program.stderr))
    };
    let (_, stderr) = run(&["nope"]);
    assert!(
        stderr.starts_with("my-io: can't open device nope: Could not open 'nope': "),
        "{stderr}"
    );
    assert_eq!(run(&[]).0, "my-io> ");
    let (stdout, stderr) = run(&["-z"]);
    assert!(stdout.starts_with("Usage: my-io "), "{stdout}");
    let called = format!("{}: invalid option -- 'z'\n", link.display());
    assert_eq!(stderr, called);
}

/// An image found to be corrupt is gone for all later commands if it was open for writing; one that
/// is only read goes on.
#[test]
fn corrupt_images() {
    let after = "-c 'read 0 512' -c 'write 0 512' -c 'write -z 0 64k' -c 'discard 0 64k' -c flush \
                 -c map -c 'alloc 0 64k' -c 'alloc 128k' -c length -c info -c 'truncate 32M' \
                 -c 'aio_read 0 512' -c aio_flush broken";
    let lines: Vec<String> = ["", "-r "]
        .into_iter()
        .flat_map(|mode| {
            [
                "read 64k 512",
                "write 64k 512",
                "write 128k 512",
                "read 128k 512",
                "alloc 64k",
                "map",
            ]
            .map(|first| format!("{mode}-c '{first}' {after}"))
        })
        .collect();
    let Some(images) = images() else {
        return;
    };
    for line in lines {
        let pair = Pair::of(images);
        let words = words(&line);
        let [theirs, ours] = [Who::Reference, Who::Ours].map(|who| pair.run(who, &words, ""));
        assert!(
            theirs == ours,
            "== {line}\n-- reference\n{theirs}\n-- ours\n{ours}"
        );
        let headers = [Who::Reference, Who::Ours].map(|who| {
            let image = fs::read(pair.folder(who).join("broken")).unwrap();
            image[72..80].to_vec()
        });
        assert_eq!(headers[0], headers[1], "{line}: marked");
    }
}

/// `--object throttle-group` and `driver=throttle`: what is understood and what is refused, in the
/// reference's words. Limits do not show here but in time.
#[test]
fn throttle_groups() {
    let image = "driver=throttle,throttle-group=tg0,file.driver=qcow2,file.file.filename=base";
    let group =
        |words: &str| format!("--object throttle-group,{words} --image-opts -c length {image}");
    let mut lines: Vec<String> = [
        "id=tg0,x-iops-total=5",
        "id=tg0,limits.iops-total=5,limits.iops-total-max=50,limits.iops-total-max-length=3",
        "id=tg0,x-iops-total=5,limits.iops-total-max=3",
        "id=tg0,x-iops-total=5,x-iops-read=3",
        "id=tg0,x-bps-write=5,x-bps-total=3",
        "id=tg0,x-iops-total=x",
        "id=tg0,x-iops-total=1M",
        "id=tg0,x-iops-total=0x10",
        "id=tg0,x-iops-total=-1",
        "id=tg0,limits.iops-total=-1",
        "id=tg0,limits.iops-total=x",
        "id=tg0,x-iops-total=1000000000000001",
        "id=tg0,x-iops-total-max=5",
        "id=tg0,x-bps-total=5,x-bps-total-max-length=2",
        "id=tg0,x-bps-total-max-length=0",
        "id=tg0,x-iops-size=4096",
        "id=tg0,x-iops-size=4096,x-iops-write=7",
        "id=tg0,limits.bps-total=5,limits.bps-total-max=500000000000000,limits.bps-total-max-length=5",
        "id=tg0,limits.bps-total=5,limits.bps-total-max=50,limits.bps-total-max-length=5000000000",
        "id=tg0,x-foo=1",
        "id=tg0,limits.foo=1",
        "id=tg0,foo=1",
        "id=tg0,limits=5",
        "id=tg0,x-iops-total",
        "id=tg1",
        "id=1x",
        "x-iops-total=5",
        "id=tg0 --object throttle-group,id=tg0",
        "id=tg0 --object foo",
        "help",
    ]
    .into_iter()
    .map(group)
    .collect();
    lines.extend([
        format!("--image-opts -c length {image}"),
        format!("--object foo,id=x --image-opts -c length {image}"),
        format!("--object '' --image-opts -c length {image}"),
        format!(
            "--object '{{\"qom-type\":\"throttle-group\",\"id\":\"tg0\",\"limits\":{{\"iops-total\":5}}}}' \
             --image-opts -c 'read 0 64k' -c 'write -P 5 64k 64k' -c 'discard 0 64k' -c map -c flush {image}"
        ),
        "--object throttle-group,id=tg0 --image-opts -c length \
         driver=throttle,file.driver=qcow2,file.file.filename=base"
            .to_owned(),
        "--object throttle-group,id=tg0 --image-opts -c length \
         driver=throttle,throttle-group=tg0,file.driver=qcow2,file.file.filename=nope"
            .to_owned(),
        "--image-opts -c length throttling.iops-total=5,driver=qcow2,file.filename=base".to_owned(),
        format!("-s --object throttle-group,id=tg0 --image-opts -c 'write 0 64k' -c map {image}"),
    ]);
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    same(&lines);
}
