//! Compressed clusters that an image begins with, made from the specification alone, with a model
//! of what they hold.
//!
//! Each is full of the stamps of write 0 and of zeros, in a proportion that makes them of different
//! lengths: where counts are wide enough, they lie without a gap, so that some share a host cluster
//! and some reach into the next one.

use std::ops::RangeInclusive;

use flate2::{Compress, Compression, FlushCompress, Status};

use super::image::File;
use super::model::stamp;
use super::rng::Rng;
use super::script::Setting;

/// A cluster that an image begins with.
#[derive(Clone)]
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
    let mut file = File::new(image, setting);
    for Cluster { offset, content } in clusters(setting) {
        let entry = file.l2_entry(offset);
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

/// The host clusters in which the data of a compressed cluster lies, by its descriptor.
pub fn host_clusters(setting: &Setting, descriptor: u64) -> RangeInclusive<usize> {
    let shift = 70 - setting.cluster_bits;
    let place = descriptor & !(1 << 62);
    let host = usize::try_from(place & ((1 << shift) - 1)).expect("a small file");
    let sectors = usize::try_from(place >> shift).expect("few");
    let last = (host / 512 + sectors) * 512;
    host >> setting.cluster_bits..=last >> setting.cluster_bits
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
            let file = File::new(&mut image, &setting);
            let counts = (0..file.clusters()).map(|index| file.counted(index));
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
        let span = |Cluster { offset, .. }: Cluster| {
            let index = usize::try_from(offset / setting.cluster()).expect("a small disk");
            let entries = file.cluster / 8;
            let table = file.get64(3 * file.cluster + index / entries * 8) & !(1 << 63);
            let at = usize::try_from(table).expect("a small file") + index % entries * 8;
            host_clusters(setting, file.get64(at)).into_inner()
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
