//! Empty qcow2 images, made from the specification alone: the tests of writing do not lean on our
//! own `create`.
//!
//! ```text
//!   cluster 0   header, backing file's format and name
//!           1   refcount table
//!           2   first refcount block
//!           3.. L1 table
//!             (what compressed.rs adds)
//! ```

use super::script::Setting;

/// The bytes of an empty image with the geometry of `setting`; with a name, over a backing file, which
/// is raw unless its name ends in `.qcow2`.
pub fn empty(setting: &Setting, backing: Option<&str>) -> Vec<u8> {
    let cluster = 1usize << setting.cluster_bits;
    let bits = 1usize << setting.refcount_order;
    // qcow2 specification, "Refcount table": an L2 table has cluster_size / 8 entries, each for one
    // cluster.
    let l2_covers = (cluster * cluster / 8) as u64;
    let l1_entries = usize::try_from(setting.size.div_ceil(l2_covers)).expect("a small disk");
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let used = 3 + l1_clusters;
    assert!(
        used <= cluster * 8 / bits,
        "one refcount block is enough for the start: {setting:?}"
    );

    let mut bytes = vec![0; used * cluster];
    let put32 = |bytes: &mut [u8], at: usize, value: usize| {
        let value = u32::try_from(value).expect("a field of 32 bits");
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    };
    let put64 = |bytes: &mut [u8], at: usize, value: u64| {
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes())
    };
    bytes[..4].copy_from_slice(b"QFI\xfb");
    put32(&mut bytes, 4, usize::from(setting.version));
    put32(&mut bytes, 20, setting.cluster_bits as usize);
    put64(&mut bytes, 24, setting.size);
    put32(&mut bytes, 36, l1_entries);
    put64(&mut bytes, 40, 3 * cluster as u64);
    put64(&mut bytes, 48, cluster as u64);
    put32(&mut bytes, 56, 1);
    let mut end = 72;
    if setting.version == 3 {
        put32(&mut bytes, 84, usize::from(setting.lazy));
        put32(&mut bytes, 96, setting.refcount_order as usize);
        end = 104;
        if setting.zstd {
            // Incompatible feature bit 3, and the compression type, in a header that is longer.
            put32(&mut bytes, 76, 8);
            bytes[104] = 1;
            end = 112;
        }
        put32(&mut bytes, 100, end);
    } else {
        assert_eq!(setting.refcount_order, 4, "version 2 has counts of 16 bits");
        assert!(!setting.lazy, "version 2 has no dirty bit");
        assert!(!setting.zstd, "version 2 has one compression type");
    }
    if let Some(name) = backing {
        // Header extension "backing file format name", then the end of the extensions, then the
        // name.
        put32(&mut bytes, end, 0xe279_2aca);
        let format = if name.ends_with(".qcow2") {
            "qcow2"
        } else {
            "raw"
        };
        put32(&mut bytes, end + 4, format.len());
        bytes[end + 8..end + 8 + format.len()].copy_from_slice(format.as_bytes());
        end += 24;
        put64(&mut bytes, 8, end as u64);
        put32(&mut bytes, 16, name.len());
        bytes[end..end + name.len()].copy_from_slice(name.as_bytes());
    }
    put64(&mut bytes, cluster, 2 * cluster as u64);
    for index in 0..used {
        set_refcount(&mut bytes[2 * cluster..3 * cluster], index, bits, 1);
    }
    bytes
}

/// Sets count `index` of a refcount block, which was lower.
pub fn set_refcount(block: &mut [u8], index: usize, bits: usize, count: u8) {
    if bits < 8 {
        // Counts below a byte lie from the lowest bits upwards.
        let shift = index * bits % 8;
        let byte = &mut block[index * bits / 8];
        *byte &= !(((1 << bits) - 1) << shift);
        *byte |= count << shift;
    } else {
        block[(index + 1) * bits / 8 - 1] = count;
    }
}

#[cfg(test)]
mod tests {
    use crate::peer;
    use crate::swarm::Params;

    /// The reference finds our empty images sound, in every geometry that the swarm draws.
    #[test]
    fn empty_images_are_sound() {
        if !peer::present("empty_images_are_sound") {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("empty.qcow2");
        std::fs::write(folder.path().join("base.raw"), [1; 512]).expect("a file in our folder");
        for seed in 0..40 {
            let setting = Params::draw(seed).setting();
            for backing in [None, Some("base.raw")] {
                std::fs::write(&path, super::empty(&setting, backing))
                    .expect("a file in our folder");
                assert_eq!(peer::check(&path), peer::Check::default(), "{setting:?}");
            }
            let info = peer::qemu_img(&["info", "-U", path.to_str().expect("text")]);
            assert!(info.contains("backing file format: raw"), "{info}");
        }
    }
}
