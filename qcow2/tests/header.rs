//! Every limit of the header, one below and one above it, and the reference's opinion of each;
//! round trips.

mod support;

use coblock_qcow2::error::{Error, Table};
use coblock_qcow2::extension::{Extension, FeatureKind, FeatureName, feature_names};
use coblock_qcow2::header::{CompressionType, Header, Incompatible};
use coblock_qcow2::types::{HostOffset, Version};
use proptest::prelude::*;
use support::{empty_image, put32, put64};

/// A change to the empty image: offset, width in bytes, value.
type Put = (usize, usize, u64);

struct Case {
    name: &'static str,
    cluster_bits: u32,
    puts: Vec<Put>,
    /// `None`: the image opens; else a part of the message.
    refused: Option<&'static str>,
}

fn image(case: &Case) -> Vec<u8> {
    let mut image = empty_image(case.cluster_bits);
    for (at, width, value) in &case.puts {
        image[*at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
    image
}

fn case(name: &'static str, refused: Option<&'static str>, puts: &[Put]) -> Case {
    Case {
        name,
        cluster_bits: 16,
        puts: puts.to_vec(),
        refused,
    }
}

/// Limits of `docs/qcow2-layout.md` at the last value that is good and the first that is not.
fn cases() -> Vec<Case> {
    const EXT: usize = 112;
    let extension = |kind: u64, len: u64| [(EXT, 4, kind), (EXT + 4, 4, len)];
    let with = |puts: &[Put], more: &[Put]| [puts, more].concat();
    let bitmaps = |count, reserved, len, offset| {
        with(
            &extension(0x2385_2875, 24),
            &[
                (EXT + 8, 4, count),
                (EXT + 12, 4, reserved),
                (EXT + 16, 8, len),
                (EXT + 24, 8, offset),
                (88, 8, 1),
            ],
        )
    };
    let mut cases = vec![
        case("as it is", None, &[]),
        case("magic", Some("not a qcow2 image"), &[(3, 1, 0xfa)]),
        case("version 1", Some("version 1"), &[(4, 4, 1)]),
        case("version 2", None, &[(4, 4, 2)]),
        case("version 4", Some("version 4"), &[(4, 4, 4)]),
        case("clusters of 256 bytes", Some("2^8"), &[(20, 4, 8)]),
        case("clusters of 4 MiB", Some("2^22"), &[(20, 4, 22)]),
        case(
            "cluster bits that wrap a shift",
            Some("2^80"),
            &[(20, 4, 80)],
        ),
        case(
            "header length below the fixed part",
            Some("header length 103"),
            &[(100, 4, 103)],
        ),
        case("header length is the fixed part", None, &[(100, 4, 104)]),
        case("header length is the cluster", None, &[(100, 4, 65536)]),
        case(
            "header length past the cluster",
            Some("header length 65537"),
            &[(100, 4, 65537)],
        ),
        case("backing name at the cluster's end", None, &[(8, 8, 65536)]),
        case(
            "backing name past the cluster",
            Some("0x10001"),
            &[(8, 8, 65537)],
        ),
        case(
            "backing name far past the cluster",
            Some("outside"),
            &[(8, 8, u64::MAX)],
        ),
        case(
            "backing name of no room",
            Some("at most 0"),
            &[(8, 8, 65536), (16, 4, 1)],
        ),
        case(
            "backing name of 1023 bytes",
            None,
            &[(8, 8, 0x400), (16, 4, 1023)],
        ),
        case(
            "backing name of 1024 bytes",
            Some("1024"),
            &[(8, 8, 0x400), (16, 4, 1024)],
        ),
        case(
            "backing name fills the cluster",
            None,
            &[(8, 8, 65436), (16, 4, 100)],
        ),
        case(
            "backing name leaves the cluster",
            Some("at most 100"),
            &[(8, 8, 65436), (16, 4, 101)],
        ),
        case("backing length without offset", None, &[(16, 4, 5000)]),
        case("refcounts of 64 bits", None, &[(96, 4, 6)]),
        case("refcounts of 128 bits", Some("order 7"), &[(96, 4, 7)]),
        case("encryption method 3", Some("method 3"), &[(32, 4, 3)]),
        case(
            "LUKS without its header",
            Some("no encryption header"),
            &[(32, 4, 2)],
        ),
        case("incompatible bit 5", Some("bit 5"), &[(72, 8, 0x20)]),
        case("incompatible bit 63", Some("bit 63"), &[(72, 8, 1 << 63)]),
        case("every compatible bit", None, &[(80, 8, u64::MAX)]),
        case("unknown autoclear bits", None, &[(88, 8, !3)]),
        case("refcount table of 8 MiB", None, &[(56, 4, 128)]),
        case(
            "refcount table past 8 MiB",
            Some("too large"),
            &[(56, 4, 129)],
        ),
        case(
            "refcount table of 2^32 clusters",
            Some("too large"),
            &[(56, 4, 0xffff_ffff)],
        ),
        case(
            "refcount table not aligned",
            Some("refcount table offset"),
            &[(48, 8, 0x1_0200)],
        ),
        case(
            "refcount table past 2^63",
            Some("refcount table offset"),
            &[(48, 8, 0x7fff_ffff_ffff_0000)],
        ),
        case(
            "refcount table negative",
            Some("refcount table offset"),
            &[(48, 8, 1 << 63)],
        ),
        case("L1 table of 32 MiB", None, &[(36, 4, 4 << 20)]),
        case(
            "L1 table past 32 MiB",
            Some("too large"),
            &[(36, 4, (4 << 20) + 1)],
        ),
        case("no L1 table", Some("too small"), &[(36, 4, 0)]),
        case(
            "L1 table not aligned",
            Some("L1 table offset"),
            &[(40, 8, 0x3_0200)],
        ),
        case(
            "L1 table past 2^63",
            Some("L1 table offset"),
            &[(40, 8, 0xffff_ffff_ffff_0000)],
        ),
        case(
            "size that the L1 table just covers",
            None,
            &[(24, 8, 512 << 20)],
        ),
        case(
            "size past the L1 table",
            Some("too small"),
            &[(24, 8, (512 << 20) + 1)],
        ),
        case("size of 2^61", Some("too big"), &[(24, 8, 1 << 61)]),
        case(
            "size of 2^63 - 1",
            Some("too big"),
            &[(24, 8, (1 << 63) - 1)],
        ),
        case("size of 2^63", Some("too large"), &[(24, 8, 1 << 63)]),
        case("size of 2^64 - 1", Some("too large"), &[(24, 8, u64::MAX)]),
        case("empty disk", None, &[(24, 8, 0)]),
        case("size not a multiple of 512", None, &[(24, 8, 1_000_001)]),
        case(
            "65537 snapshots",
            Some("snapshot table is too large"),
            &[(60, 4, 65537)],
        ),
        case(
            "snapshot table not aligned",
            Some("snapshot table offset"),
            &[(64, 8, 0x200)],
        ),
        case(
            "snapshot table negative",
            Some("snapshot table offset"),
            &[(64, 8, 1 << 63)],
        ),
        case(
            "compression type without its bit",
            Some("bit is not set"),
            &[(104, 1, 1)],
        ),
        case(
            "compression bit without a type",
            Some("bit is set"),
            &[(72, 8, 8)],
        ),
        case(
            "compression type 2",
            Some("type 2"),
            &[(72, 8, 8), (104, 1, 2)],
        ),
        case("zstd", None, &[(72, 8, 8), (104, 1, 1)]),
        case(
            "unknown header fields",
            None,
            &[(105, 1, 7), (100, 4, 128), (120, 8, 0x1234)],
        ),
        case("marked as corrupt", None, &[(72, 8, 2)]),
        case("marked as dirty", None, &[(72, 8, 1)]),
        case(
            "unknown extension that fills the cluster",
            None,
            &extension(0x1234_5678, 65536 - 120),
        ),
        case(
            "unknown extension past the cluster",
            Some("ends at 0x10000"),
            &extension(0x1234_5678, 65536 - 119),
        ),
        case(
            "extension of 2^32 - 1 bytes",
            Some("has 4294967295 bytes"),
            &extension(0x1234_5678, 0xffff_ffff),
        ),
        case(
            "extension up to the backing name",
            None,
            &with(&extension(0x1234_5678, 136), &[(8, 8, 0x100), (16, 4, 9)]),
        ),
        case(
            "extension into the backing name",
            Some("ends at 0x100"),
            &with(&extension(0x1234_5678, 137), &[(8, 8, 0x100), (16, 4, 9)]),
        ),
        case(
            "backing format of 15 bytes",
            None,
            &extension(0xe279_2aca, 15),
        ),
        case(
            "backing format of 16 bytes",
            Some("less than 16"),
            &extension(0xe279_2aca, 16),
        ),
        case(
            "encryption header without LUKS",
            Some("not encrypted"),
            &extension(0x0537_be77, 16),
        ),
        case(
            "bitmaps extension of 23 bytes",
            Some("exactly 24"),
            &extension(0x2385_2875, 23),
        ),
        case(
            "bitmaps extension of zeros, not valid",
            None,
            &extension(0x2385_2875, 24),
        ),
        case(
            "bitmaps extension: no bitmap",
            Some("at least one"),
            &bitmaps(0, 0, 32, 0x4_0000),
        ),
        case(
            "bitmaps extension: 65536 bitmaps",
            Some("at most 65535"),
            &bitmaps(65536, 0, 4 << 20, 0x4_0000),
        ),
        case(
            "bitmaps extension: reserved",
            Some("must be zero"),
            &bitmaps(1, 1, 32, 0x4_0000),
        ),
        case(
            "bitmaps extension: not aligned",
            Some("multiple of the cluster"),
            &bitmaps(1, 0, 32, 0x4_0200),
        ),
        case(
            "bitmaps extension: directory past 64 MiB",
            Some("at most 64 MiB"),
            &bitmaps(1, 0, (64 << 20) + 1, 0x4_0000),
        ),
        case(
            "feature names with a broken end",
            None,
            &extension(0x6803_f857, 95),
        ),
    ];
    for (name, cluster_bits, refused) in [
        ("extended L2 with clusters of 16 KiB", 14, None),
        ("extended L2 with clusters of 8 KiB", 13, Some("subcluster")),
    ] {
        cases.push(Case {
            name,
            cluster_bits,
            puts: vec![(72, 8, 16)],
            refused,
        });
    }
    for cluster_bits in 9..=21 {
        cases.push(Case {
            name: "every cluster size",
            cluster_bits,
            puts: vec![],
            refused: None,
        });
    }
    cases
}

#[test]
fn limits() {
    for case in cases() {
        let image = image(&case);
        match (Header::decode(&image), case.refused) {
            (Ok(header), None) => {
                let again = header.encode().unwrap();
                assert_eq!(Header::decode(&again), Ok(header), "{}", case.name);
            }
            (Err(error), Some(part)) => {
                assert!(error.to_string().contains(part), "{}: {error}", case.name);
            }
            (got, _) => panic!("{}: {got:?}", case.name),
        }
    }
}

/// The reference opens exactly what we open.
#[test]
fn limits_as_qemu_img_sees_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.qcow2");
    for case in cases() {
        std::fs::write(&path, image(&case)).unwrap();
        let Some(output) = support::qemu_img(&["info", "-U", "-f", "qcow2", support::text(&path)])
        else {
            return;
        };
        let said = support::said(&output);
        assert_eq!(
            output.status.success(),
            case.refused.is_none(),
            "{}: {said}",
            case.name
        );
    }
}

#[test]
fn a_short_file() {
    let image = empty_image(16);
    for (len, good) in [
        (0, false),
        (7, false),
        (71, false),
        (103, false),
        (104, true),
        (512, true),
    ] {
        let got = Header::decode(&image[..len]);
        match got {
            Ok(header) => {
                assert!(good, "{len} bytes");
                // Its tables are not there, and that is told by the length.
                let table = header.validate(len as u64).unwrap_err();
                assert!(matches!(
                    table,
                    Error::TablePastEnd {
                        table: Table::ActiveL1,
                        ..
                    }
                ));
            }
            Err(Error::Truncated { len: told, .. }) => assert!(!good && told == len as u64),
            Err(error) => panic!("{len} bytes: {error}"),
        }
    }
    let v2 = |len: usize| {
        let mut image = image[..len].to_vec();
        put32(&mut image, 4, 2);
        Header::decode(&image)
    };
    assert_eq!(v2(71), Err(Error::Truncated { len: 71, need: 72 }));
    assert!(v2(72).is_ok());
}

#[test]
fn tables_past_the_end_of_the_file() {
    let image = empty_image(16);
    let header = Header::decode(&image).unwrap();
    assert_eq!(header.validate(image.len() as u64), Ok(()));
    // The last table may end without its zeros, as the reference writes it.
    assert_eq!(header.validate(0x3_0008), Ok(()));
    let file_len = 0x3_0007;
    let (table, offset, len) = (Table::ActiveL1, HostOffset(0x3_0000), 8);
    assert_eq!(
        header.validate(file_len),
        Err(Error::TablePastEnd {
            table,
            offset,
            len,
            file_len
        })
    );
    let mut moved = header.clone();
    moved.refcount_table_offset = HostOffset(1 << 40);
    assert!(matches!(
        moved.validate(image.len() as u64),
        Err(Error::TablePastEnd {
            table: Table::Refcount,
            ..
        })
    ));
    moved.refcount_table_clusters = 0;
    assert_eq!(
        moved.validate(image.len() as u64),
        Err(Error::NoRefcountTable)
    );
}

/// A feature that we lack is named by the image's own table.
#[test]
fn unknown_features_have_names() {
    let mut header = Header::decode(&empty_image(16)).unwrap();
    let mut names = feature_names();
    names.push(FeatureName::new(
        FeatureKind::INCOMPATIBLE,
        40,
        "time travel",
    ));
    header.extensions = vec![Extension::FeatureNames(names)];
    let mut image = header.encode().unwrap();
    put64(&mut image, 72, 1 << 40 | 1 << 41);
    let error = Header::decode(&image).unwrap_err();
    assert_eq!(
        error.to_string(),
        "unsupported qcow2 feature(s): time travel, incompatible feature bit 41"
    );
}

/// What an image may be used for: encrypted, external data file and extended L2 not at all, corrupt
/// for reading only.
#[test]
fn uses() {
    for (name, puts, readable, writable) in [
        ("plain", vec![], true, true),
        ("corrupt", vec![(72, 8, 2)], true, false),
        ("dirty", vec![(72, 8, 1)], true, true),
        ("AES", vec![(32, 4, 1)], false, false),
        ("data file", vec![(72, 8, 4)], false, false),
        ("extended L2", vec![(72, 8, 16)], false, false),
        ("zstd", vec![(72, 8, 8), (104, 1, 1)], true, true),
    ] {
        let header = Header::decode(&image(&case(name, None, &puts))).unwrap();
        assert_eq!(header.ensure_readable().is_ok(), readable, "{name}");
        assert_eq!(header.ensure_writable().is_ok(), writable, "{name}");
    }
    let header = Header::decode(&image(&case("", None, &[(72, 8, 16)]))).unwrap();
    let text = header.ensure_readable().unwrap_err().to_string();
    assert_eq!(text, "extended L2 entries are not supported");
}

#[test]
fn a_header_that_does_not_fit() {
    let mut header = Header::decode(&empty_image(9)).unwrap();
    header.backing_file = Some(vec![b'x'; 400]);
    assert_eq!(header.encode().unwrap().len(), 512);
    header.backing_file = Some(vec![b'x'; 401]);
    assert_eq!(
        header.encode(),
        Err(Error::HeaderTooLarge {
            need: 513,
            have: 512
        })
    );
    let mut header = Header::decode(&empty_image(16)).unwrap();
    header.backing_file = Some(vec![b'x'; 1024]);
    assert_eq!(
        header.encode(),
        Err(Error::BackingLength {
            found: 1024,
            max: 1023
        })
    );
}

fn any_extension() -> impl Strategy<Value = Extension> {
    let data = || proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..16).prop_map(Extension::BackingFormat),
        data().prop_map(Extension::DataFile),
        Just(Extension::FeatureNames(feature_names())),
        (0x9000_0000_u32.., data()).prop_filter_map("known types", |(kind, data)| {
            (kind != 0xe279_2aca).then_some(Extension::Unknown { kind, data })
        }),
    ]
}

proptest! {
    /// What was read is written back, unknown fields, bits and extensions too.
    #[test]
    fn round_trip(
        extensions in proptest::collection::vec(any_extension(), 0..6), backing in proptest::option::of("[ -~]{1,300}"),
        unknown in proptest::collection::vec(any::<u8>(), 0..90), compatible: u64, autoclear: u64, order in 0_u32..=6,
        snapshots in 0_u32..=65536, zstd: bool,
    ) {
        let mut image = empty_image(16);
        put32(&mut image, 60, snapshots);
        put64(&mut image, 80, compatible);
        put64(&mut image, 88, autoclear & !1);
        put32(&mut image, 96, order);
        let mut header = Header::decode(&image).unwrap();
        header.header_len = 105 + u32::try_from(unknown.len()).unwrap();
        header.unknown_fields = unknown;
        header.extensions = extensions;
        header.backing_file = backing.map(String::into_bytes);
        if zstd {
            header.compression = CompressionType::Zstd;
            header.incompatible |= Incompatible::COMPRESSION;
        }
        let bytes = header.encode().unwrap();
        prop_assert_eq!(bytes.len(), 65536);
        let again = Header::decode(&bytes).unwrap();
        prop_assert_eq!(&again, &header);
        prop_assert_eq!(again.encode().unwrap(), bytes);
    }

    /// Any bytes give a header or an error, and a header can be written back.
    #[test]
    fn any_bytes(
        mut image in proptest::collection::vec(any::<u8>(), 0..700), bits in 9_u32..=21, v3: bool, sane: bool,
        puts in proptest::collection::vec((0_usize..140, any::<u8>()), 0..6),
    ) {
        if sane {
            image = empty_image(bits);
            for (at, value) in puts {
                image[at] = value;
            }
        } else if image.len() >= 24 {
            put32(&mut image, 0, 0x5146_49fb);
            put32(&mut image, 4, if v3 { 3 } else { 2 });
            put32(&mut image, 20, bits);
        }
        if let Ok(header) = Header::decode(&image) {
            prop_assert!(header.geometry.version() == Version::V3 || header.header_len == 72);
            // Only a name or extensions that overlapped something before can be too long now.
            if let Ok(bytes) = header.encode() {
                prop_assert_eq!(Header::decode(&bytes), Ok(header));
            }
        }
    }
}
