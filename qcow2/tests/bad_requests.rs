//! Requests and data that are wrong: errors with file and offset, and the reference's errno.

mod support;

use coblock_block::{ErrorKind, RequestFlags, Result};
use flate2::{Compress, Compression, FlushCompress};
use support::world::with_image;
use support::{get64, qemu_img, qemu_io, said, text};

const NONE: RequestFlags = RequestFlags::empty();

/// Past the end, across it, unaligned, empty, far too long: as the reference does, errno and all.
#[test]
fn ranges_as_in_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let Some(created) = qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "1M"]) else {
        return;
    };
    assert!(created.status.success(), "{}", said(&created));
    let far = i64::MAX.cast_unsigned();
    for (at, len) in [
        (1 << 20, 1),
        ((1 << 20) - 512, 1024),
        ((1 << 20) - 512, 512),
        (far, 1),
        (far - 511, 512),
        (100, 70_000),
        (1, 1),
        (960 << 10, 128 << 10),
        (0, 0),
        (1 << 20, 0),
        (1 << 20, 65536),
    ] {
        for (name, command) in [
            ("read", format!("read {at} {len}")),
            ("write", format!("write {at} {len}")),
            ("zero", format!("write -z {at} {len}")),
            ("unmap", format!("write -z -u {at} {len}")),
            ("discard", format!("discard {at} {len}")),
        ] {
            let theirs = qemu_io(&["-d", "unmap", "-c", &command, text(&path)]).unwrap();
            let words = String::from_utf8_lossy(&theirs.stdout).into_owned() + &said(&theirs);
            let ours: Result<()> = with_image(&path, |co, disk| {
                let size = usize::try_from(len).unwrap();
                match name {
                    "read" => disk.pread(co, at, &mut vec![0; size][..]),
                    "write" => disk.pwrite(co, at, &vec![0xcd; size][..], NONE),
                    "zero" => disk.pwrite_zeroes(co, at, len, NONE),
                    "unmap" => disk.pwrite_zeroes(co, at, len, RequestFlags::MAY_UNMAP),
                    _ => disk.pdiscard(co, at, len),
                }
            });
            match ours {
                Ok(()) => assert!(!words.contains("failed"), "{command}: {words}"),
                Err(error) => {
                    let reason = coblock_block::errno_text(error.errno());
                    assert!(words.contains(&reason), "{command}: {error}; {words}");
                    assert_eq!(
                        (error.kind(), error.offset()),
                        (ErrorKind::OutOfBounds, Some(at))
                    );
                    assert_eq!(error.file(), Some(text(&path)), "{error}");
                }
            }
        }
    }
    // What the reference's tool does not even send.
    let error = with_image(&path, |co, disk| {
        let zeroes = disk.pwrite_zeroes(co, 0, u64::MAX, NONE).unwrap_err();
        let discard = disk.pdiscard(co, u64::MAX, u64::MAX).unwrap_err();
        let long = disk.truncate(co, 1 << 63, true).unwrap_err();
        assert_eq!(
            (zeroes.errno(), discard.errno(), long.errno()),
            (libc::EIO, libc::EIO, libc::EINVAL)
        );
        // More than an L1 table can map.
        disk.truncate(co, (1 << 62) + 512, true).unwrap_err()
    });
    assert_eq!(error.errno(), libc::EFBIG, "{error}");
    let check = qemu_img(&["check", text(&path)]).unwrap();
    assert!(check.status.success(), "{}", said(&check));
}

fn deflate(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() + 64);
    Compress::new(Compression::best(), false)
        .compress_vec(data, &mut out, FlushCompress::Finish)
        .unwrap();
    out
}

/// Compressed data that gives less than a cluster, more, or nothing is an error of the requests
/// that need it, with the place; the rest of the image stays as good as it was. (The reference
/// takes the beginning of a deflate stream that gives more.)
#[test]
fn compressed_clusters_that_are_not_one() {
    let folder = tempfile::tempdir().unwrap();
    let [raw, good, bad] = ["raw", "good", "bad"].map(|name| folder.path().join(name));
    // Hard to compress, so that there is room for other data.
    let mut state = 1_u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 30).to_be_bytes()[3]
    })
    .take(2 << 16)
    .collect();
    std::fs::write(&raw, &noise).unwrap();
    let zstd: fn(&[u8]) -> Vec<u8> = |data| zstd::bulk::compress(data, 3).unwrap();
    for (kind, pack, longer_fails) in [
        ("zlib", deflate as fn(&[u8]) -> Vec<u8>, false),
        ("zstd", zstd, true),
    ] {
        let Some(converted) = qemu_img(&[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            &format!("compression_type={kind}"),
            text(&raw),
            text(&good),
        ]) else {
            return;
        };
        assert!(converted.status.success(), "{}", said(&converted));
        let image = std::fs::read(&good).unwrap();
        let at = |offset: u64| usize::try_from(offset & 0x00ff_ffff_ffff_fe00).unwrap();
        let l2 = at(get64(&image, at(get64(&image, 40))));
        let host = usize::try_from(get64(&image, l2) & ((1 << 54) - 1)).unwrap();
        for (name, data, theirs_fail) in [
            ("less", pack(&vec![b'x'; 60_000]), true),
            ("more", pack(&vec![b'x'; 70_000]), longer_fails),
            ("noise", vec![0xff; 600], true),
        ] {
            let mut image = image.clone();
            image[host..host + data.len()].copy_from_slice(&data);
            std::fs::write(&bad, &image).unwrap();
            let theirs = qemu_io(&["-c", "read 0 64k", text(&bad)]).unwrap();
            let words = String::from_utf8_lossy(&theirs.stdout).into_owned() + &said(&theirs);
            assert_eq!(
                words.contains("Input/output error"),
                theirs_fail,
                "{name}: {words}"
            );
            with_image(&bad, |co, disk| {
                let mut buf = vec![0; 100];
                let read = disk.pread(co, 500, &mut buf[..]).unwrap_err();
                let write = disk.pwrite(co, 100, &[1; 10][..], NONE).unwrap_err();
                for (error, offset) in [(read, 500), (write, 100)] {
                    assert_eq!(
                        (error.kind(), error.errno()),
                        (ErrorKind::Corrupt, libc::EIO),
                        "{name}: {error}"
                    );
                    assert_eq!(
                        (error.file(), error.offset()),
                        (Some(text(&bad)), Some(offset)),
                        "{error}"
                    );
                    assert!(
                        error.to_string().contains(&format!("{host:#x}")),
                        "{name}: {error}"
                    );
                }
                // The neighbour, and a write that needs nothing of the old data.
                let mut next = vec![0; 1 << 16];
                disk.pread(co, 1 << 16, &mut next[..]).unwrap();
                assert!(next == noise[1 << 16..], "{name}");
                disk.pwrite(co, 0, &vec![5; 1 << 16][..], NONE).unwrap();
                disk.pread(co, 500, &mut buf[..]).unwrap();
                assert_eq!(buf, [5; 100], "{name}");
            });
            let check = qemu_img(&["check", text(&bad)]).unwrap();
            assert!(check.status.success(), "{name}: {}", said(&check));
        }
    }
}

/// A backing file that is shorter or longer than the image, or becomes so while the image is open:
/// what is not there reads as zeros, and nothing panics or fails.
#[test]
fn a_chain_that_changes_size() {
    let folder = tempfile::tempdir().unwrap();
    let [base, path] = ["base", "image"].map(|name| folder.path().join(name));
    std::fs::write(&base, vec![7; 300_000]).unwrap();
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        text(&path),
        "1M",
    ];
    let Some(created) = qemu_img(&words) else {
        return;
    };
    assert!(created.status.success(), "{}", said(&created));
    let grow = |len: u64| {
        let file = std::fs::File::options().write(true).open(&base).unwrap();
        file.set_len(len).unwrap();
    };
    with_image(&path, |co, disk| {
        let mut bytes = vec![1; 1 << 20];
        disk.pread(co, 0, &mut bytes[..]).unwrap();
        assert!(
            bytes[..300_000].iter().all(|b| *b == 7) && bytes[300_000..].iter().all(|b| *b == 0)
        );
        // Shorter: the host has no more; also for what is copied on write.
        grow(100_000);
        disk.pread(co, 0, &mut bytes[..]).unwrap();
        assert!(
            bytes[..100_000].iter().all(|b| *b == 7) && bytes[100_000..].iter().all(|b| *b == 0)
        );
        disk.pwrite(co, 200_000, &[9; 100][..], NONE).unwrap();
        // Longer than it was when it was opened: the image does not see that.
        grow(2 << 20);
        disk.pread(co, 0, &mut bytes[..]).unwrap();
        assert!(bytes[200_000..200_100].iter().all(|b| *b == 9));
        let status = disk.map(co, 300_000, 500_000).unwrap();
        assert!(status.len > 0);
        disk.copy_range(co, 50_000, disk, 600_000, 200_000).unwrap();
        disk.pread(co, 600_000, &mut bytes[..50_000]).unwrap();
        assert!(bytes[..50_000].iter().all(|b| *b == 7));
    });
    let check = qemu_img(&["check", text(&path)]).unwrap();
    assert!(check.status.success(), "{}", said(&check));
}
