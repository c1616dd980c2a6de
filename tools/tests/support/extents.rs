//! Images whose extents are of every kind: what `map` and `compare` are tested on.

use std::fs;
use std::path::Path;

/// Command lines of the reference that make the images.
const MADE: &[&str] = &[
    // Raw: data between holes, zeros that are stored, nothing at all, more than anybody could read.
    "qemu-img create -q -f raw raw 4M",
    "qemu-io -f raw -c 'write -P 5 64k 64k' -c 'write -P 6 1M 1M' raw",
    "qemu-img create -q -f raw zeros 1M",
    "qemu-io -f raw -c 'write -P 0 0 1M' zeros",
    "qemu-img create -q -f raw hole 1M",
    "qemu-img create -q -f raw huge 3T",
    "qemu-io -f raw -c 'write -P 7 2T 64k' huge",
    "qemu-img create -q -f raw -o preallocation=falloc rawfalloc 1M",
    "qemu-img create -q -f raw -o preallocation=full rawfull 1M",
    // Clusters of several sizes, with every kind of extent that one layer can have.
    "qemu-img create -q -f qcow2 -o cluster_size=512 q512 4M",
    "qemu-io -c 'write -P 5 64k 64k' -c 'write -P 6 1M 1M' -c 'write -z 2M 100k' -c 'write 3M 3k' \
     -c 'write -z 3M 1k' -c 'discard 1M 1k' q512",
    "qemu-img create -q -f qcow2 -o cluster_size=4k q4k 4M",
    "qemu-io -c 'write -P 5 64k 64k' -c 'write -P 6 1M 1M' -c 'write -z 2M 100k' -c 'write 3M 12k' \
     -c 'write -z 3M 4k' -c 'discard 1M 8k' q4k",
    "qemu-img create -q -f qcow2 base 4M",
    "qemu-io -c 'write -P 5 64k 64k' -c 'write -P 6 1M 1M' -c 'write -z 2M 128k' -c 'write 3M 256k' \
     -c 'write -z 3M 64k' -c 'write -z -u 3200k 64k' -c 'discard 1M 64k' base",
    "qemu-img create -q -f qcow2 -o cluster_size=2M q2m 10M",
    "qemu-io -c 'write -P 5 64k 64k' -c 'write -P 6 3M 1M' -c 'write -z 6M 2M' q2m",
    "qemu-img create -q -f qcow2 -o compat=0.10 v2 4M",
    "qemu-io -c 'write -P 5 64k 64k' -c 'write -P 6 1M 1M' -c 'discard 1M 64k' v2",
    // The first megabytes of the base again: data, but elsewhere.
    "qemu-img create -q -f qcow2 same 4M",
    "qemu-io -c 'write -P 6 1088k 960k' -c 'write -P 5 64k 64k' -c 'write -P 0xcd 3136k 64k' \
     -c 'write -P 0xcd 3264k 64k' same",
    "qemu-img create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=64 lazy 1M",
    "qemu-io -c 'write -P 5 64k 1000' lazy",
    "qemu-img create -q -f qcow2 unallocated 1M",
    "qemu-img create -q -f qcow2 zero 1M",
    "qemu-io -c 'write -z 0 1M' zero",
    "qemu-img create -q -f qcow2 kept 1M",
    "qemu-io -c 'write 0 1M' -c 'write -z 0 1M' kept",
    "qemu-img create -q -f qcow2 written 1M",
    "qemu-io -c 'write -P 0 0 1M' written",
    "qemu-img create -q -f qcow2 two 2M",
    "qemu-io -c 'write -P 0 1536k 64k' two",
    "qemu-img create -q -f qcow2 two7 2M",
    "qemu-io -c 'write -P 0 1M 64k' -c 'write -P 7 1536k 1' two7",
    // Compressed.
    "qemu-img create -q -f qcow2 zlib 4M",
    "qemu-io -c 'write -c -P 5 64k 64k' -c 'write -c -P 6 1M 64k' -c 'write -P 6 1088k 64k' zlib",
    "qemu-img create -q -f qcow2 -o compression_type=zstd zstd 4M",
    "qemu-io -c 'write -c -P 5 64k 64k' -c 'write -P 6 1M 64k' -c 'write -c -P 6 1088k 64k' zstd",
    "qemu-img convert -c -O qcow2 base compressed",
    // Preallocated, and partly used.
    "qemu-img create -q -f qcow2 -o preallocation=metadata metadata 3M",
    "qemu-img create -q -f qcow2 -o preallocation=metadata metadata2 3M",
    "qemu-io -c 'write 1M 64k' -c 'write -P 0 2M 4k' metadata2",
    "qemu-img create -q -f qcow2 -o preallocation=falloc falloc 1M",
    "qemu-img create -q -f qcow2 -o preallocation=full full 1M",
    // Chains: over the same length, shorter ones, several levels, another format, another folder.
    "qemu-img create -q -f qcow2 -b base -F qcow2 over",
    "qemu-io -c 'write -P 1 0 128k' -c 'write -z 1M 512k' -c 'discard 3M 128k' over",
    "qemu-img create -q -f qcow2 -b over -F qcow2 over2",
    "qemu-io -c 'write -P 2 1152k 64k' over2",
    "qemu-img create -q -f qcow2 -b base -F qcow2 empty1",
    "qemu-img create -q -f qcow2 -b base -F qcow2 longer 5M",
    "qemu-io -c 'write -P 3 4608k 64k' longer",
    "qemu-img create -q -f qcow2 -b longer -F qcow2 -u shorter 3M",
    "qemu-img create -q -f qcow2 -b q512 -F qcow2 -o cluster_size=2M coarse 6M",
    "qemu-img create -q -f qcow2 -b raw -F raw onraw",
    "qemu-io -c 'write -P 4 2M 64k' onraw",
    "qemu-img create -q -f qcow2 -o compat=0.10 -b base -F qcow2 v2over",
    "qemu-io -c 'discard 1088k 64k' v2over",
    "qemu-img create -q -f qcow2 sub/base 2M",
    "qemu-io -c 'write 0 64k' sub/base",
    "qemu-img create -q -f qcow2 -b base -F qcow2 sub/over",
    "qemu-img create -q -f qcow2 -b nope -F qcow2 -u orphan 1M",
    // Snapshots keep clusters that the disk has no more.
    "qemu-img create -q -f qcow2 snapshot 4M",
    "qemu-io -c 'write 0 128k' snapshot",
    "qemu-img snapshot -c one snapshot",
    "qemu-io -c 'write 64k 128k' snapshot",
    "qemu-img create -q -f qcow2 'a,b c' 1M",
    "qemu-io -c 'write 64k 64k' 'a,b c'",
    "qemu-img create -q -f qcow2 file:co:lon 1M",
    "qemu-io -c 'write 64k 64k' file:co:lon",
];

/// Images that the commands can read to the end.
pub const SOUND: &[&str] = &[
    "raw",
    "zeros",
    "hole",
    "huge",
    "rawfalloc",
    "rawfull",
    "three",
    "empty",
    "u1000",
    "u700",
    "v1000",
    "u70000",
    "q512",
    "q4k",
    "base",
    "q2m",
    "v2",
    "same",
    "lazy",
    "unallocated",
    "zero",
    "kept",
    "written",
    "two",
    "two7",
    "zlib",
    "zstd",
    "compressed",
    "metadata",
    "metadata2",
    "falloc",
    "full",
    "over",
    "over2",
    "empty1",
    "longer",
    "shorter",
    "coarse",
    "onraw",
    "v2over",
    "sub/over",
    "snapshot",
    "'a,b c'",
    "file:co:lon",
    "./co:lon",
    "size1000",
    "size66000",
    "truncated",
    "beyond",
];

/// Images with an entry that is wrong, or data that cannot be inflated.
pub const DAMAGED: &[&str] = &["badl2", "badl1", "badzlib"];

/// Makes all of them in `folder`.
pub fn make(folder: &Path) {
    fs::create_dir(folder.join("sub")).unwrap();
    for line in MADE {
        super::reference_must(line, folder);
    }
    let write = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).unwrap();
    // Bytes without a pattern that a shift would not show.
    let bytes: Vec<u8> = (0..70_000_u64)
        .map(|n| ((n * n) >> 7).to_le_bytes()[0] | 1)
        .collect();
    write("three", b"abc");
    write("empty", b"");
    write("u1000", &bytes[..1000]);
    write("u700", &bytes[..700]);
    write("u70000", &bytes);
    let mut other = bytes[..1000].to_vec();
    other[650] ^= 0x80;
    write("v1000", &other);
    damage(folder);
}

/// Images whose header, tables or data say something that the reference's tools never write.
fn damage(folder: &Path) {
    let image = fs::read(folder.join("lazy")).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let place = |entry: u64| usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap();
    let l1 = place(be64(40));
    let l2 = place(be64(l1));
    let changed = |name: &str, at: usize, value: u64| {
        let mut image = image.clone();
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
        fs::write(folder.join(name), image).unwrap();
    };
    changed("size1000", 24, 1000);
    changed("size66000", 24, 66_000);
    changed("badl2", l2 + 8, be64(l2 + 8) | 0x200);
    changed("badl1", l1, be64(l1) | 0x200);
    changed("beyond", l1, (1 << 63) | 0x1000_0000);
    let data = place(be64(l2 + 8));
    fs::write(folder.join("truncated"), &image[..data]).unwrap();
    let mut image = fs::read(folder.join("zlib")).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let entry = be64(place(be64(place(be64(40)))) + 8);
    let data = usize::try_from(entry & ((1 << 54) - 1)).unwrap();
    image[data..]
        .iter_mut()
        .take(64)
        .for_each(|byte| *byte = 0xff);
    fs::write(folder.join("badzlib"), image).unwrap();
}
