//! Copied flags that agree with the refcounts, for an image whose counts were made anew.
//!
//! A flag says that its cluster has a count of exactly one, so that it may be overwritten in place.
//! Where new counts say otherwise the flag is what is wrong: set, it would let a write through to
//! data that somebody else refers to as well. The image is dirty until all of them are right and on
//! stable storage, so nobody writes by a flag in between, and after a power cut all of this is done
//! once more.

use coblock_block::Result;

use super::Broken;
use super::disk_refcounts::DiskRefcounts;
use crate::entry::{L1Entry, L2Entry};
use crate::error::Error;
use crate::fields::be64;
use crate::header::Header;
use crate::image_file::ImageFile;
use crate::spec;
use crate::types::{GuestCluster, HostOffset, index};

/// Sets and clears the copied flags of the active disk as its refcounts say. Suspends. Returns how
/// many were wrong.
///
/// # Errors
/// I/O, an entry that is damaged, or a refcount that cannot be read. Some flags may be right then.
pub fn correct_copied_flags(file: &ImageFile<'_>, header: &Header) -> Result<u64> {
    let geometry = header.geometry;
    let mut counts = DiskRefcounts::read(file, header, &mut file.budget_beside(header)?)?;
    let mut is_only = |host: HostOffset| {
        let cluster = geometry.host_cluster(host);
        match counts.get(cluster) {
            Ok(count) => Ok(count == 1),
            Err(Broken) => {
                let why = format!("the refcount of host cluster {cluster} cannot be read");
                Err(coblock_block::Error::from(Error::DirtyAndDamaged { why }))
            }
        }
    };
    let mut corrected = 0;
    let mut l1 = vec![0; index(u64::from(header.l1_entries) * spec::TABLE_ENTRY_LEN)];
    file.read(header.l1_offset.get(), &mut l1)?;
    let mut table = vec![0; geometry.cluster_len()];
    for nth in 0..u64::from(header.l1_entries) {
        let at = nth * spec::TABLE_ENTRY_LEN;
        let entry = L1Entry::decode(be64(&l1, index(at)), nth, geometry)?;
        let Some(host) = entry.host else { continue };
        let copied = is_only(host)?;
        if copied != entry.copied {
            let right = L1Entry { copied, ..entry };
            let at = header.l1_offset.get() + at;
            file.write(at, &right.encode().to_be_bytes())?;
            corrected += 1;
        }
        file.read(host.get(), &mut table)?;
        let before = corrected;
        for (slot, raw) in (0..).zip(table.chunks_exact_mut(8)) {
            let guest = GuestCluster(nth * geometry.l2_entries() as u64 + slot);
            let entry = L2Entry::decode(be64(raw, 0), geometry.guest_start(guest), geometry)?;
            let right = match entry {
                L2Entry::Data { host, .. } => L2Entry::Data {
                    host,
                    copied: is_only(host)?,
                },
                L2Entry::Zero {
                    host: Some(host), ..
                } => L2Entry::Zero {
                    host: Some(host),
                    copied: is_only(host)?,
                },
                other => other,
            };
            if right != entry {
                raw.copy_from_slice(&right.encode(geometry).to_be_bytes());
                corrected += 1;
            }
        }
        if corrected > before {
            file.write(host.get(), &table)?;
        }
    }
    if corrected > 0 {
        file.flush()?;
    }
    Ok(corrected)
}
