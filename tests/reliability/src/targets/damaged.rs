//! The promise of target `open` about what a damaged image keeps: whoever writes through it may be
//! refused, but data that was sound and that nobody wrote reads as before.
//!
//! Sound is a guest cluster whose data and L2 table nothing else in the image leads to, and whose
//! data is counted. A cluster that two entries share, or that counts as free, may change with a
//! write elsewhere: no program can know without a whole check, and the reference does not either.
//! What leads where is read here from the bytes, without the driver.

use std::collections::BTreeMap;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{DenyAll, RequestFlags};

use super::session;
use crate::rng::Rng;
use crate::sim;

/// Images that are looked at: small ones, whose references are soon counted.
const IMAGE_MAX: usize = 4 << 20;
const ENTRIES_MAX: u64 = 1 << 14;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The bytes of an image as numbers; past the end there are zeros.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&self, at: u64) -> u8 {
        let at = usize::try_from(at).ok();
        at.and_then(|at| self.0.get(at)).copied().unwrap_or(0)
    }

    /// A big-endian number.
    fn number(&self, at: u64, bytes: u64) -> u64 {
        let next = |number: u64, at: u64| number << 8 | u64::from(self.byte(at));
        (at..at.saturating_add(bytes)).fold(0, next)
    }
}

/// Guest clusters that are sound, and where their data is.
struct Sound {
    cluster: u64,
    /// Guest offset, host offset.
    data: Vec<(u64, u64)>,
}

impl Sound {
    /// What an image has; nothing where its header makes no sense or too much work.
    fn of(image: &[u8]) -> Option<Sound> {
        let b = Bytes(image);
        let (bits, size) = (b.number(20, 4), b.number(24, 8));
        let order = if b.number(4, 4) == 2 {
            4
        } else {
            b.number(96, 4)
        };
        if image.len() > IMAGE_MAX || !(9..=16).contains(&bits) || order > 6 {
            return None;
        }
        let cluster = 1 << bits;
        let (l1, l1_entries) = (b.number(40, 8), b.number(36, 4));
        let (table, table_entries) = (b.number(48, 8), b.number(56, 4) * cluster / 8);
        let snapshots = b.number(60, 4);
        if l1_entries > ENTRIES_MAX || table_entries > ENTRIES_MAX || snapshots > 0 {
            return None;
        }
        let mut paths = BTreeMap::new();
        let mut lead = |from: u64, len: u64| {
            let end = from.saturating_add(len).div_ceil(cluster);
            for number in from / cluster..end {
                *paths.entry(number).or_insert(0_u32) += 1;
            }
        };
        lead(0, cluster);
        lead(l1, l1_entries * 8);
        lead(table, table_entries * 8);
        let entry = |table: u64, nth: u64| b.number(table.saturating_add(8 * nth), 8);
        for nth in 0..table_entries {
            let block = entry(table, nth) & !0x1ff;
            if block != 0 {
                lead(block, cluster);
            }
        }
        let mut data = Vec::new();
        for nth in 0..l1_entries {
            let l2 = entry(l1, nth) & OFFSET;
            if l2 == 0 {
                continue;
            }
            lead(l2, cluster);
            for slot in 0..cluster / 8 {
                let raw = entry(l2, slot);
                let host = raw & OFFSET;
                if raw >> 62 & 1 == 1 {
                    let split = 62 - (bits - 8);
                    let from = raw & ((1 << split) - 1);
                    let sectors = (raw & ((1 << 62) - 1)) >> split;
                    lead(from, (sectors + 1) * 512 - from % 512);
                } else if host != 0 {
                    lead(host, cluster);
                    let guest = (nth * (cluster / 8) + slot) * cluster;
                    if raw & 1 == 0 && host.is_multiple_of(cluster) && guest < size {
                        data.push((guest, host, l2));
                    }
                }
            }
        }
        let alone = |at: u64| paths.get(&(at / cluster)) == Some(&1);
        let counted = |at: u64| {
            let per_block = (cluster * 8) >> order;
            let number = at / cluster;
            if number / per_block >= table_entries {
                return false;
            }
            let block = entry(table, number / per_block);
            let bit = (number % per_block) << order;
            let bits = 1_u64 << order;
            let word = b.number(block.saturating_add(bit / 8), bits.div_ceil(8));
            block % cluster == 0 && block != 0 && word >> (bit % 8) & (u64::MAX >> (64 - bits)) != 0
        };
        let whole = |host: u64| host + cluster <= image.len() as u64;
        data.retain(|&(_, host, l2)| {
            l2 % cluster == 0 && alone(l2) && alone(host) && counted(host) && whole(host)
        });
        let data = data
            .into_iter()
            .map(|(guest, host, _)| (guest, host))
            .collect();
        Some(Sound { cluster, data })
    }

    /// Those that read as their bytes in the file are; their guest offsets with these bytes.
    fn read(&self, image: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let disk = SimDisk::with_contents(image);
        let session = session();
        let mut good = Vec::new();
        if let Ok(backend) = session.open(sim::image(&disk).with("read-only", "on"), &DenyAll) {
            let len = usize::try_from(self.cluster).expect("small");
            for &(guest, host) in &self.data {
                let mut buf = vec![0; len.min(in_memory(backend.len().saturating_sub(guest)))];
                let read = session
                    .home
                    .run(|co| backend.pread(co, guest, &mut buf[..]));
                let host = in_memory(host);
                if read.is_ok() && buf == image[host..host + buf.len()] {
                    good.push((guest, buf));
                }
            }
            session.close(backend);
        }
        session.end();
        good
    }
}

fn in_memory(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

/// Writes, discards and zeroes a few places of the image, which may all fail, and looks at the rest.
///
/// # Panics
/// A finding: something that nobody wrote reads otherwise, or not at all.
pub fn keeps(image: &[u8]) {
    let Some(sound) = Sound::of(image) else {
        return;
    };
    let before = sound.read(image);
    if before.is_empty() {
        return;
    }
    let seed = image.iter().fold(1, |seed: u64, &byte| {
        seed.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte)
    });
    let mut rng = Rng::new(seed);
    let disk = SimDisk::with_contents(image);
    let session = session();
    let mut written = Vec::new();
    if let Ok(backend) = session.open(sim::image(&disk), &DenyAll) {
        for _ in 0..6 {
            let at = rng.below(backend.len());
            let at = if rng.chance(50) {
                at
            } else {
                at & !(sound.cluster - 1)
            };
            let len = (1 + rng.below(3 * sound.cluster)).min(backend.len() - at);
            written.push(at..at + len);
            let data = vec![0x99; in_memory(len)];
            // Any of these may be refused.
            let _ = session.home.run(|co| match rng.below(6) {
                0 => backend.pdiscard(co, at, len),
                1 => backend.pwrite_zeroes(co, at, len, RequestFlags::MAY_UNMAP),
                2 => backend.flush(co),
                _ => backend.pwrite(co, at, &data[..], RequestFlags::empty()),
            });
        }
        let _ = session.home.run(|co| backend.flush(co));
        let _ = session.home.run(|co| backend.close(co));
        drop(backend);
    }
    session.end();

    let session = self::session();
    let backend = session
        .open(sim::image(&disk).with("read-only", "on"), &DenyAll)
        .unwrap_or_else(|error| panic!("after {written:x?} it cannot be opened: {error}"));
    for (guest, bytes) in before {
        let end = guest + bytes.len() as u64;
        if written
            .iter()
            .any(|range| range.start < end && guest < range.end)
        {
            continue;
        }
        let mut buf = vec![0; bytes.len()];
        let read = session
            .home
            .run(|co| backend.pread(co, guest, &mut buf[..]));
        assert!(
            read.is_ok(),
            "after {written:x?} {guest:#x} cannot be read: {read:?}"
        );
        assert!(
            buf == bytes,
            "after {written:x?} {guest:#x} reads otherwise"
        );
    }
    session.close(backend);
    session.end();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image;
    use crate::script::Setting;

    /// The canary: data is found and looked at, in every width of counts; and a cluster that two
    /// entries share, or that nothing counts, is not called sound.
    #[test]
    fn canary_sound_data_is_found() {
        for refcount_order in 0..=6 {
            let setting = Setting {
                cluster_bits: 9,
                refcount_order,
                size: 128 << 10,
                ..Setting::default()
            };
            let disk = SimDisk::with_contents(&image::empty(&setting, None));
            super::super::fill(&disk);
            let mut bytes = disk.contents();
            let sound = Sound::of(&bytes).expect("a small image");
            assert_eq!(
                sound.data.len(),
                128,
                "2^{refcount_order} bits: half was discarded"
            );
            assert_eq!(sound.read(&bytes).len(), 128);
            keeps(&bytes);
            // The last two clusters become one.
            let b = Bytes(&bytes);
            let l2 = b.number(b.number(40, 8) + 8 * 3, 8) & OFFSET;
            let (from, to) = (in_memory(l2) + 62 * 8, in_memory(l2) + 63 * 8);
            bytes.copy_within(from..from + 8, to);
            assert_eq!(Sound::of(&bytes).expect("the same").data.len(), 126);
            // Nothing is counted.
            let table = in_memory(Bytes(&bytes).number(48, 8));
            bytes[table..table + 512].fill(0);
            assert_eq!(Sound::of(&bytes).expect("the same").data.len(), 0);
        }
    }
}
