//! Empty qcow2 images, made from the specification alone: the tests of writing do not lean on our
//! own `create`.
//!
//! ```text
//!   cluster 0   header, backing file's format and name
//!           1   refcount table
//!           2   first refcount block
//!           3.. L1 table
//!             (what compressed.rs and kept.rs add)
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

/// An image that grows; its one refcount block counts all of it.
pub struct File<'a> {
    pub image: &'a mut Vec<u8>,
    /// Bytes of a cluster.
    pub cluster: usize,
    /// Of a refcount.
    bits: usize,
    /// Where the next compressed data may go, without a gap.
    end: usize,
}

impl<'a> File<'a> {
    /// The image of `setting`.
    pub fn new(image: &'a mut Vec<u8>, setting: &Setting) -> Self {
        File {
            image,
            cluster: usize::try_from(setting.cluster()).expect("a cluster"),
            bits: 1 << setting.refcount_order,
            end: 0,
        }
    }

    /// How many clusters it has.
    pub fn clusters(&self) -> usize {
        self.image.len() / self.cluster
    }

    pub fn get64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.image[at..at + 8].try_into().expect("eight bytes"))
    }

    pub fn put64(&mut self, at: usize, value: u64) {
        self.image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// Sets the count of a host cluster, which was lower.
    pub fn count(&mut self, index: usize, count: u8) {
        assert!(
            index < self.cluster * 8 / self.bits,
            "one refcount block is enough for the start"
        );
        let block = &mut self.image[2 * self.cluster..3 * self.cluster];
        set_refcount(block, index, self.bits, count);
    }

    /// The count of a host cluster.
    pub fn counted(&self, index: usize) -> u8 {
        let block = &self.image[2 * self.cluster..3 * self.cluster];
        if self.bits < 8 {
            block[index * self.bits / 8] >> (index * self.bits % 8) & ((1 << self.bits) - 1)
        } else {
            block[(index + 1) * self.bits / 8 - 1]
        }
    }

    /// A new cluster of zeros at the end; its offset.
    pub fn add_cluster(&mut self) -> usize {
        let at = self.image.len();
        self.image.resize(at + self.cluster, 0);
        at
    }

    /// Where the L2 entry of the cluster at `offset` lies; adds its table if there is none.
    pub fn l2_entry(&mut self, offset: u64) -> usize {
        let index = usize::try_from(offset / self.cluster as u64).expect("a small disk");
        let entries = self.cluster / 8;
        let l1_entry = 3 * self.cluster + index / entries * 8;
        if self.get64(l1_entry) == 0 {
            let table = self.add_cluster();
            self.count(table / self.cluster, 1);
            self.put64(l1_entry, table as u64 | 1 << 63);
        }
        let table = self.get64(l1_entry) & !(1 << 63);
        usize::try_from(table).expect("a small file") + index % entries * 8
    }

    /// Puts `data` behind what was put before, if the counts allow it, and counts it.
    pub fn place(&mut self, data: &[u8]) -> usize {
        let most = u8::MAX >> 8_usize.saturating_sub(self.bits);
        let last = self.end.saturating_sub(1) / self.cluster;
        let is_newest = (last + 1) * self.cluster == self.image.len();
        if self.end == 0 || !is_newest || self.counted(last) == most {
            self.end = self.image.len();
        }
        let host = self.end;
        self.end += data.len();
        while self.image.len() < self.end {
            self.add_cluster();
        }
        self.image[host..self.end].copy_from_slice(data);
        for index in host / self.cluster..=(self.end - 1) / self.cluster {
            let count = self.counted(index) + 1;
            self.count(index, count);
        }
        host
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
