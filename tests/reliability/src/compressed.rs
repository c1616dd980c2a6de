//! Compressed clusters that an image begins with, made from the specification alone, with a model
//! of what they hold.
//!
//! Each is full of the stamps of write 0 and of zeros, in a proportion that makes them of different
//! lengths: where counts are wide enough, they lie without a gap, so that some share a host cluster
//! and some reach into the next one.

use flate2::{Compress, Compression, FlushCompress, Status};

use super::image::set_refcount;
use super::model::stamp;
use super::rng::Rng;
use super::script::Setting;

/// A compressed cluster.
pub struct Cluster {
    /// Where in the guest's disk it begins.
    pub offset: u64,
    /// What the guest reads there.
    pub content: Vec<u8>,
}

/// The clusters that an image of `setting` begins with.
pub fn clusters(setting: &Setting) -> Vec<Cluster> {
    let mut rng = Rng::new(setting.seed ^ 0xc0_1b2e);
    let whole = setting.size / setting.cluster();
    let count = setting.compressed.min(whole);
    // In the first part of the disk, where most requests go.
    let stride = whole.checked_div(count).unwrap_or(1).min(3);
    let cluster = |nth: u64| {
        let offset = (nth * stride + rng.below(stride)) * setting.cluster();
        let content = content(setting, offset, nth, &mut rng);
        Cluster { offset, content }
    };
    (0..count).map(cluster).collect()
}

/// Stamps do not get shorter by compression, zeros go away.
fn content(setting: &Setting, offset: u64, nth: u64, rng: &mut Rng) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(setting.cluster()).expect("a cluster")];
    let units = content.len() / setting.unit;
    let stamped = units * [3, 1, 3, 0][usize::try_from(nth % 4).expect("below 4")] / 4;
    let first = usize::try_from(rng.below(units as u64)).expect("an index");
    for unit in (0..stamped).map(|step| (first + step) % units) {
        let at = unit * setting.unit;
        let piece = &mut content[at..at + setting.unit];
        stamp(piece, offset + at as u64, setting.unit, setting.seed, 0);
    }
    content
}

/// Adds these clusters, and the L2 tables that they need, to the empty image of `setting`.
pub fn add(image: &mut Vec<u8>, setting: &Setting) {
    let mut file = File {
        image,
        cluster: usize::try_from(setting.cluster()).expect("a cluster"),
        bits: 1 << setting.refcount_order,
        end: 0,
    };
    for Cluster { offset, content } in clusters(setting) {
        let entry = file.l2_entry(setting, offset);
        let packed = pack(setting, &content);
        let host = file.place(&packed);
        // qcow2 specification, "Compressed Clusters Descriptor": bit 62, the sectors after the
        // first one, the first byte.
        let sectors = (host + packed.len() - 1) / 512 - host / 512;
        let descriptor = 1 << 62 | (sectors as u64) << (70 - setting.cluster_bits) | host as u64;
        file.put64(entry, descriptor);
    }
}

fn pack(setting: &Setting, content: &[u8]) -> Vec<u8> {
    if setting.zstd {
        return zstd::bulk::compress(content, 3).expect("room for a cluster");
    }
    let mut packed = Vec::with_capacity(2 * content.len());
    // The reference inflates with a window of 4 KiB.
    let status = Compress::new_with_window_bits(Compression::default(), false, 12).compress_vec(
        content,
        &mut packed,
        FlushCompress::Finish,
    );
    assert_eq!(status.expect("no dictionary"), Status::StreamEnd);
    packed
}

/// An image that grows; its one refcount block counts all of it.
struct File<'a> {
    image: &'a mut Vec<u8>,
    cluster: usize,
    /// Of a refcount.
    bits: usize,
    /// Where the next compressed data may go, without a gap.
    end: usize,
}

impl File<'_> {
    fn get64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.image[at..at + 8].try_into().expect("eight bytes"))
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// Sets the count of a host cluster.
    fn count(&mut self, index: usize, count: u8) {
        assert!(
            index < self.cluster * 8 / self.bits,
            "one refcount block is enough for the start"
        );
        let block = &mut self.image[2 * self.cluster..3 * self.cluster];
        set_refcount(block, index, self.bits, count);
    }

    /// The count of a host cluster.
    fn counted(&self, index: usize) -> u8 {
        let block = &self.image[2 * self.cluster..3 * self.cluster];
        if self.bits < 8 {
            block[index * self.bits / 8] >> (index * self.bits % 8) & ((1 << self.bits) - 1)
        } else {
            block[(index + 1) * self.bits / 8 - 1]
        }
    }

    /// A new cluster of zeros at the end; its offset.
    fn add_cluster(&mut self) -> usize {
        let at = self.image.len();
        self.image.resize(at + self.cluster, 0);
        at
    }

    /// Where the L2 entry of the cluster at `offset` lies; adds its table if there is none.
    fn l2_entry(&mut self, setting: &Setting, offset: u64) -> usize {
        let index = usize::try_from(offset / setting.cluster()).expect("a small disk");
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
    fn place(&mut self, data: &[u8]) -> usize {
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
    use std::collections::BTreeSet;

    use super::*;
    use crate::image::empty;
    use crate::peer;
    use crate::power_cuts::workload;
    use crate::swarm::Params;

    /// What there is of them in many images: those that share a host cluster, and those that lie in
    /// two.
    #[test]
    fn some_share_a_host_cluster_and_some_lie_in_two() {
        let (mut kinds, mut shared, mut across) = (BTreeSet::new(), 0, 0);
        for seed in 0..40 {
            let setting = Params::draw_short(seed).setting();
            let mut image = empty(&setting, None);
            let before = image.len();
            add(&mut image, &setting);
            assert_eq!(image.len() > before, setting.compressed > 0);
            kinds.insert((setting.compressed > 0, setting.zstd));
            let file = File {
                image: &mut image,
                cluster: 1 << setting.cluster_bits,
                bits: 1 << setting.refcount_order,
                end: 0,
            };
            let counts = (0..file.image.len() / file.cluster).map(|index| file.counted(index));
            shared += counts.filter(|count| *count > 1).count();
            across += spans(&setting, &file)
                .iter()
                .filter(|(first, last)| first != last)
                .count();
        }
        assert!(kinds.contains(&(true, true)) && kinds.contains(&(true, false)));
        assert!(
            shared > 10 && across > 5,
            "{shared} shared, {across} in two"
        );
    }

    /// The first and the last host cluster of every compressed cluster.
    fn spans(setting: &Setting, file: &File<'_>) -> Vec<(usize, usize)> {
        let shift = 70 - setting.cluster_bits;
        let span = |Cluster { offset, .. }: Cluster| {
            let index = usize::try_from(offset / setting.cluster()).expect("a small disk");
            let entries = file.cluster / 8;
            let table = file.get64(3 * file.cluster + index / entries * 8) & !(1 << 63);
            let at = usize::try_from(table).expect("a small file") + index % entries * 8;
            let entry = file.get64(at) & !(1 << 62);
            let host = usize::try_from(entry & ((1 << shift) - 1)).expect("a small file");
            let sectors = usize::try_from(entry >> shift).expect("few");
            let last = (host / 512 + sectors) * 512 / file.cluster;
            (host / file.cluster, last)
        };
        clusters(setting).into_iter().map(span).collect()
    }

    /// The reference finds these images sound, and reads what the model says.
    #[test]
    fn the_reference_reads_them() {
        if !peer::present("the_reference_reads_them") {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("compressed.qcow2");
        for setting in (0..24).map(|seed| workload(seed).setting) {
            let setting = Setting {
                backing: 0,
                compressed: setting.compressed.max(4),
                ..setting
            };
            let mut image = empty(&setting, None);
            add(&mut image, &setting);
            std::fs::write(&path, &image).expect("a file in our folder");
            assert_eq!(peer::check(&path), peer::Check::default(), "{setting:?}");
            let mut expected = vec![0; usize::try_from(setting.size).expect("a small disk")];
            for Cluster { offset, content } in clusters(&setting) {
                let at = usize::try_from(offset).expect("a small disk");
                expected[at..at + content.len()].copy_from_slice(&content);
            }
            assert!(peer::content("qcow2", &path) == expected, "{setting:?}");
        }
    }
}
