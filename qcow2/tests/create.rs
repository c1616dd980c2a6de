//! New images: the same bytes as the reference's, clean for its check, refused where it refuses.

mod support;

use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use coblock_block::Options;
use coblock_block::drivers::sim::{Fault, Match, SimDisk};
use coblock_qcow2::create::{CreateOptions, Preallocation, create};
use coblock_qcow2::header::CompressionType;
use coblock_qcow2::info::Info;
use coblock_qcow2::types::Version;
use support::image::{report, with_file, with_options};
use support::{qemu_img, said, text};

fn make(path: &Path, options: &CreateOptions) -> coblock_block::Result<()> {
    std::fs::write(path, b"something that was there before").unwrap();
    with_file(path, true, |file| create(file, options))
}

/// Options as the reference spells them.
fn spelled(options: &CreateOptions) -> String {
    let mut out = format!(
        "compat={},cluster_size={},refcount_bits={},compression_type={},lazy_refcounts={}",
        options.version.compat(),
        options.cluster_size,
        options.refcount_bits,
        options.compression.name(),
        if options.lazy_refcounts { "on" } else { "off" },
    );
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    if let Some(name) = &options.backing_file {
        out += &format!(",backing_file={}", text(name));
    }
    if let Some(format) = &options.backing_format {
        out += &format!(",backing_fmt={}", text(format));
    }
    match options.preallocation {
        Preallocation::Off => {}
        Preallocation::Metadata => out += ",preallocation=metadata",
        Preallocation::Falloc => out += ",preallocation=falloc",
        Preallocation::Full => out += ",preallocation=full",
    }
    out
}

fn matrix() -> Vec<CreateOptions> {
    let plain = CreateOptions::new(1 << 20);
    let mut all = Vec::new();
    for bits in 9..=21 {
        all.push(CreateOptions {
            cluster_size: 1 << bits,
            ..plain.clone()
        });
    }
    for order in 0..=6 {
        all.push(CreateOptions {
            refcount_bits: 1 << order,
            ..plain.clone()
        });
        all.push(CreateOptions {
            refcount_bits: 1 << order,
            cluster_size: 512,
            ..plain.clone()
        });
    }
    for virtual_size in [0, 1, 511, 512, 70_001, 1 << 30, 1 << 40, 1 << 50] {
        all.push(CreateOptions {
            virtual_size,
            ..plain.clone()
        });
        all.push(CreateOptions {
            virtual_size,
            version: Version::V2,
            ..plain.clone()
        });
    }
    all.push(CreateOptions {
        virtual_size: 1 << 30,
        cluster_size: 512,
        ..plain.clone()
    });
    for version in [Version::V2, Version::V3] {
        all.push(CreateOptions {
            version,
            backing_file: Some(b"base.raw".to_vec()),
            backing_format: Some(b"raw".to_vec()),
            ..plain.clone()
        });
        all.push(CreateOptions {
            version,
            cluster_size: 1024,
            backing_file: Some(vec![b'n'; 200]),
            backing_format: Some(b"raw".to_vec()),
            ..plain.clone()
        });
    }
    all.push(CreateOptions {
        compression: CompressionType::Zstd,
        ..plain.clone()
    });
    all.push(CreateOptions {
        lazy_refcounts: true,
        ..plain
    });
    all
}

/// What `qemu-img create` says to the same options; `None` where it is missing.
fn reference(path: &Path, spelled: &str, options: &CreateOptions) -> Option<Output> {
    let size = options.virtual_size.to_string();
    let args = ["create", "-q", "-u", "-f", "qcow2", "-o", spelled];
    qemu_img(&[&args[..], &[text(path), &size]].concat())
}

/// Every byte, and the length of the file, as `qemu-img create` writes them.
#[test]
fn bytes_of_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    for options in matrix() {
        let spelled = spelled(&options);
        make(&ours, &options).unwrap();
        let Some(output) = reference(&theirs, &spelled, &options) else {
            return;
        };
        assert!(output.status.success(), "{spelled}: {}", said(&output));
        let (a, b) = (
            std::fs::read(&ours).unwrap(),
            std::fs::read(&theirs).unwrap(),
        );
        let differs = a.iter().zip(&b).position(|(a, b)| a != b);
        assert!(
            a == b,
            "{spelled} {}: {} and {} bytes, {differs:x?}",
            options.virtual_size,
            a.len(),
            b.len()
        );
    }
}

/// Sizes whose tables the reference places elsewhere, and preallocated images: clean, and as it
/// describes its own.
#[test]
fn clean_for_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let plain = CreateOptions::new(3_000_000);
    let mut all = vec![
        CreateOptions {
            virtual_size: 40 << 30,
            cluster_size: 512,
            ..plain.clone()
        },
        CreateOptions {
            virtual_size: 1 << 34,
            cluster_size: 512,
            refcount_bits: 64,
            ..plain.clone()
        },
        CreateOptions {
            virtual_size: 1 << 33,
            cluster_size: 512,
            refcount_bits: 1,
            ..plain.clone()
        },
        CreateOptions {
            virtual_size: 1 << 60,
            cluster_size: 2 << 20,
            ..plain.clone()
        },
    ];
    for preallocation in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        for (cluster_size, refcount_bits) in
            [(512, 64), (512, 16), (4096, 1), (65536, 16), (2 << 20, 8)]
        {
            all.push(CreateOptions {
                cluster_size,
                refcount_bits,
                preallocation,
                ..plain.clone()
            });
        }
        all.push(CreateOptions {
            virtual_size: 0,
            preallocation,
            ..plain.clone()
        });
    }
    for options in all {
        let spelled = spelled(&options);
        make(&ours, &options).unwrap();
        let (report, findings) = with_file(&ours, false, report).unwrap();
        assert!(report.is_clean(), "{spelled}: {findings:?}");
        let Some(output) = qemu_img(&["check", "-f", "qcow2", text(&ours)]) else {
            return;
        };
        assert!(output.status.success(), "{spelled}: {}", said(&output));
        let output = reference(&theirs, &spelled, &options).unwrap();
        assert!(output.status.success(), "{spelled}");
        let info = |path: &Path| {
            let output = qemu_img(&["info", "-f", "qcow2", text(path)]).unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            // Up to the sizes of the file itself.
            let text: Vec<_> = text
                .lines()
                .filter(|line| !line.starts_with("image:") && !line.starts_with("disk size"))
                .take_while(|line| !line.starts_with("Child node"))
                .map(str::to_owned)
                .collect();
            text
        };
        assert_eq!(info(&ours), info(&theirs), "{spelled}");
        if options.virtual_size < 1 << 32 {
            let same = qemu_img(&[
                "compare",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                text(&ours),
                text(&theirs),
            ]);
            assert!(
                same.unwrap().status.success(),
                "{spelled}: the contents differ"
            );
            // The same clusters have their place: ours leave no more to allocate.
            let (theirs, _) = with_file(&theirs, false, support::image::report).unwrap();
            assert_eq!(
                report.allocated_clusters, theirs.allocated_clusters,
                "{spelled}"
            );
        }
        let info = with_file(&ours, false, Info::read).unwrap();
        assert_eq!(
            info.virtual_size,
            options.virtual_size.next_multiple_of(512)
        );
        assert_eq!(u64::from(info.refcount_bits), options.refcount_bits);
    }
}

/// Each write and each flush fails once: an error, and no image, or the whole of it.
#[test]
fn every_write_fails_once() {
    let options = CreateOptions {
        preallocation: Preallocation::Full,
        cluster_size: 512,
        ..CreateOptions::new(40_000)
    };
    let whole = {
        let disk = SimDisk::new(0);
        make_on(&disk, &options).unwrap();
        disk.contents()
    };
    let mut failed = 0;
    for what in [Match::writes(), Match::flushes(), Match::any()] {
        for n in 0.. {
            let disk = SimDisk::with_contents(&whole);
            disk.fail(Fault::new(what.clone(), 28).after(n).from_then_on());
            let result = make_on(&disk, &options);
            let left = disk.contents();
            match result {
                Err(error) => {
                    failed += 1;
                    assert_eq!(error.errno(), 28, "{error}");
                    let no_image = left.len() < 4 || left[..4] != *b"QFI\xfb";
                    // The last flush may fail after all is written; truncating may fail before
                    // anything is.
                    assert!(no_image || left == whole, "{n}: neither nothing nor all");
                }
                Ok(()) => {
                    assert!(left == whole);
                    break;
                }
            }
        }
    }
    assert!(failed > 6, "only {failed} failures");
}

fn make_on(disk: &Arc<SimDisk>, options: &CreateOptions) -> coblock_block::Result<()> {
    let sim = Options::new()
        .with("driver", "sim")
        .with_object("disk", disk.clone());
    with_options(sim, |file| create(file, options))
}

/// A device cannot change its length: it has to be long enough, and the image needs no more of it.
#[test]
fn on_a_device() {
    let device = |disk: &Arc<SimDisk>| {
        Options::new()
            .with("driver", "raw")
            .with("size", disk.len().to_string())
            .with("file.driver", "sim")
            .with_object("file.disk", disk.clone())
    };
    let make = |len| {
        let disk = SimDisk::with_contents(&vec![0xaa; len]);
        let options = CreateOptions::new(1 << 20);
        let made = with_options(device(&disk), |file| create(file, &options));
        (made, disk)
    };
    let error = make(0x3_0000).0.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("bytes of the device: 196616, at most 196608"),
        "{error}"
    );
    let (made, disk) = make(0x8_0000);
    made.unwrap();
    let (report, findings) = with_options(device(&disk), report).unwrap();
    assert!(report.is_clean(), "{findings:?}");
}

/// What cannot be had is refused in words, by us and by the reference alike, and leaves no image.
#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let plain = CreateOptions::new(1 << 20);
    let v2 = CreateOptions {
        version: Version::V2,
        ..plain.clone()
    };
    let cluster = |cluster_size| CreateOptions {
        cluster_size,
        ..plain.clone()
    };
    let refcount = |refcount_bits| CreateOptions {
        refcount_bits,
        ..plain.clone()
    };
    let sized = |virtual_size, cluster_size| CreateOptions {
        virtual_size,
        cluster_size,
        ..plain.clone()
    };
    for (options, part) in [
        (cluster(0), "power of two"),
        (cluster(256), "power of two"),
        (cluster(1000), "power of two"),
        (cluster(4 << 20), "power of two"),
        (refcount(0), "64 bits"),
        (refcount(3), "64 bits"),
        (refcount(128), "64 bits"),
        (
            CreateOptions {
                refcount_bits: 8,
                ..v2.clone()
            },
            "level 1.1",
        ),
        (
            CreateOptions {
                lazy_refcounts: true,
                ..v2.clone()
            },
            "level 1.1",
        ),
        (
            CreateOptions {
                compression: CompressionType::Zstd,
                ..v2
            },
            "level 1.1",
        ),
        (sized((128 << 30) + 1, 512), "too big"),
        (sized(1 << 62, 65536), "too big"),
        (sized((1 << 63) - 512, 2 << 20), "too big"),
        (
            CreateOptions {
                backing_format: Some(b"raw".to_vec()),
                ..plain.clone()
            },
            "without backing file",
        ),
        (
            CreateOptions {
                backing_file: Some(b"b".to_vec()),
                backing_format: Some(b"raw".to_vec()),
                preallocation: Preallocation::Metadata,
                ..plain.clone()
            },
            "at the same time",
        ),
        (
            CreateOptions {
                backing_file: Some(vec![b'b'; 1024]),
                backing_format: Some(b"raw".to_vec()),
                ..plain.clone()
            },
            "1024 bytes",
        ),
    ] {
        let spelled = spelled(&options);
        let error = make(&ours, &options).unwrap_err().to_string();
        assert!(error.contains(part), "{spelled}: {error}");
        let mut start = vec![0; 4];
        let file = std::fs::read(&ours).unwrap();
        start[..4.min(file.len())].copy_from_slice(&file[..4.min(file.len())]);
        assert_ne!(start, b"QFI\xfb", "{spelled}: an image all the same");
        let Some(output) = reference(&theirs, &spelled, &options) else {
            continue;
        };
        assert!(
            !output.status.success(),
            "{spelled}: the reference makes it"
        );
    }
    for (option, part) in [
        ("encryption", Some("encrypted")),
        ("encrypt.key-secret", Some("encrypted")),
        ("extended_l2", Some("extended L2")),
        ("data_file", Some("external data file")),
        ("data_file_raw", Some("external data file")),
        ("cluster_size", None),
    ] {
        let said = CreateOptions::refusal(option).map(|error| error.to_string());
        assert_eq!(said.is_some(), part.is_some(), "{option}");
        assert!(
            said.is_none_or(|said| said.contains(part.unwrap())),
            "{option}"
        );
    }
}
