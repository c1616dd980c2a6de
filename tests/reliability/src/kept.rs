//! An internal snapshot that an image begins with, made from the specification alone.
//!
//! It shares everything with the disk, compressed clusters too: every L2 table and data cluster has
//! one count more, and nothing that the disk's tables lead to may be written to.
//!
//! ```text
//!   ..  L1 table of the disk
//!       L2 tables, data                  shared         ]
//!       L1 table of the snapshot         a copy         ] nobody may change a byte of these
//!       snapshot table                   one entry      ]
//! ```

use std::collections::BTreeSet;

use coblock::block::drivers::sim::SimDisk;

use super::compressed::{self, Cluster};
use super::image::File;
use super::judge::Verdict;
use super::model::stamp;
use super::script::Setting;

/// Bit 63 of L1 and L2 entries: the count is exactly one.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry.
const COMPRESSED: u64 = 1 << 62;
/// What an L1 or L2 entry says of where something is.
const HOST: u64 = 0x00ff_ffff_ffff_fe00;

/// The plain clusters that an image of `setting` begins with: the first that are not compressed.
pub fn clusters(setting: &Setting) -> Vec<Cluster> {
    let taken: BTreeSet<u64> = compressed::clusters(setting)
        .iter()
        .map(|cluster| cluster.offset)
        .collect();
    let whole = (0..setting.size / setting.cluster()).map(|index| index * setting.cluster());
    let free = whole.filter(|offset| !taken.contains(offset));
    let most = usize::try_from(setting.kept).expect("few");
    let cluster = |offset| {
        let mut content = vec![0; usize::try_from(setting.cluster()).expect("a cluster")];
        stamp(&mut content, offset, setting.unit, setting.seed, 0);
        Cluster { offset, content }
    };
    free.take(most).map(cluster).collect()
}

/// What the snapshot owns of a file, as it was in the beginning.
#[derive(Default)]
pub struct Snapshot {
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Snapshot {
    /// Is it as it was?
    ///
    /// # Errors
    /// Where it is not.
    pub fn is_whole(&self, disk: &SimDisk) -> Verdict {
        for (at, bytes) in &self.pieces {
            let now = disk.peek(*at, bytes.len());
            if let Some(first) = (0..bytes.len()).find(|&byte| now[byte] != bytes[byte]) {
                let at = at + first as u64;
                return Err(format!(
                    "what an internal snapshot owns was written to at {at:#x}"
                ));
            }
        }
        Ok(())
    }
}

/// Adds these clusters to the image of `setting`, which may have compressed ones already, and a
/// snapshot of it; nothing where the setting has none.
pub fn add(image: &mut Vec<u8>, setting: &Setting) -> Snapshot {
    if setting.kept == 0 {
        return Snapshot::default();
    }
    let mut file = File::new(image, setting);
    for Cluster { offset, content } in clusters(setting) {
        let entry = file.l2_entry(offset);
        let host = file.add_cluster();
        file.image[host..host + content.len()].copy_from_slice(&content);
        file.count(host / file.cluster, 1);
        file.put64(entry, host as u64 | COPIED);
    }
    let l1_at = 3 * file.cluster;
    let field = file.image[36..40].try_into().expect("four bytes");
    let l1_entries = u32::from_be_bytes(field);
    let l1_len = 8 * l1_entries as usize;
    share(&mut file, setting, l1_at, l1_len);

    let l1_copy = file.add_cluster();
    while file.image.len() < l1_copy + l1_len {
        file.add_cluster();
    }
    file.image.copy_within(l1_at..l1_at + l1_len, l1_copy);
    let table = file.add_cluster();
    for index in l1_copy / file.cluster..file.clusters() {
        file.count(index, 1);
    }
    // qcow2 specification, "Snapshots": with 16 bytes of extra data, then ID and name.
    let words = [
        (0, (l1_copy as u64).to_be_bytes()),
        (
            8,
            [l1_entries.to_be_bytes(), [0, 1, 0, 4]]
                .concat()
                .try_into()
                .expect("eight"),
        ),
        (32, [0, 0, 0, 0, 0, 0, 0, 16]),
        (48, setting.size.to_be_bytes()),
        (56, *b"1kept\0\0\0"),
    ];
    for (at, bytes) in words {
        file.image[table + at..table + at + 8].copy_from_slice(&bytes);
    }
    file.image[60..64].copy_from_slice(&1u32.to_be_bytes());
    file.put64(64, table as u64);

    let piece = |at: usize, end: usize| (at as u64, file.image[at..end].to_vec());
    let first = (l1_at + l1_len).next_multiple_of(file.cluster);
    Snapshot {
        pieces: vec![piece(60, 72), piece(first, file.image.len())],
    }
}

/// Counts everything that an L1 table leads to once more, and takes the marks away that say that it
/// is counted once.
fn share(file: &mut File<'_>, setting: &Setting, l1_at: usize, l1_len: usize) {
    let more = |file: &mut File<'_>, index: usize| file.count(index, file.counted(index) + 1);
    for l1_entry in (l1_at..l1_at + l1_len).step_by(8) {
        let table = file.get64(l1_entry) & HOST;
        if table == 0 {
            continue;
        }
        file.put64(l1_entry, table);
        let table = usize::try_from(table).expect("a small file");
        more(file, table / file.cluster);
        for at in (table..table + file.cluster).step_by(8) {
            let entry = file.get64(at);
            if entry & COMPRESSED != 0 {
                for index in compressed::host_clusters(setting, entry) {
                    more(file, index);
                }
            } else if entry != 0 {
                file.put64(at, entry & !COPIED);
                let host = usize::try_from(entry & HOST).expect("a small file");
                more(file, host / file.cluster);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::empty;
    use crate::peer;

    /// The reference finds these images sound, and reads what the model says, of the disk and of the
    /// snapshot.
    #[test]
    fn the_reference_reads_the_snapshot() {
        if !peer::present("the_reference_reads_the_snapshot") {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let [path, raw] = ["kept.qcow2", "kept.raw"].map(|name| folder.path().join(name));
        let [from, to] = [&path, &raw].map(|path| path.to_str().expect("text"));
        for (cluster_bits, refcount_order, compressed) in [(9, 6, 0), (12, 3, 7), (16, 4, 4)] {
            let setting = Setting {
                cluster_bits,
                refcount_order,
                compressed,
                kept: 5,
                size: 24 << cluster_bits,
                ..Setting::default()
            };
            let mut image = empty(&setting, None);
            compressed::add(&mut image, &setting);
            let kept = add(&mut image, &setting);
            std::fs::write(&path, &image).expect("a file in our folder");
            assert_eq!(peer::check(&path), peer::Check::default(), "{setting:?}");
            let mut expected = vec![0; usize::try_from(setting.size).expect("a small disk")];
            let all = [compressed::clusters(&setting), clusters(&setting)].concat();
            for Cluster { offset, content } in all {
                let at = usize::try_from(offset).expect("a small disk");
                expected[at..at + content.len()].copy_from_slice(&content);
            }
            assert!(peer::content("qcow2", &path) == expected, "{setting:?}");
            let name = "snapshot.name=kept";
            peer::qemu_img(&["convert", "-l", name, "-f", "qcow2", "-O", "raw", from, to]);
            assert!(
                std::fs::read(&raw).expect("written") == expected,
                "{setting:?}"
            );

            // The oracle sees a byte.
            let disk = SimDisk::with_contents(&image);
            assert_eq!(kept.is_whole(&disk), Ok(()));
            *image.last_mut().expect("not empty") ^= 1;
            assert!(kept.is_whole(&SimDisk::with_contents(&image)).is_err());
        }
    }
}
