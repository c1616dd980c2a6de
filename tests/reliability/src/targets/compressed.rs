//! Target `compressed`: bytes as the compressed data of one cluster, in a sound image.
//!
//! ```text
//!   byte 0      method, cluster size
//!        1      where in a sector the data begins; how many sectors the descriptor says
//!        2, 3   what the guest writes over it afterwards
//!        4 ..   the stream
//! ```
//!
//! Guest clusters 0 and 1 have the same descriptor, and the counts say so. Whatever the stream is:
//! both read the same, whole and in pieces; a write to the one leaves the other; the image stays
//! sound.

use std::sync::Arc;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{BlockBackend, DenyAll, RequestFlags};
use flate2::{Compress, Compression, FlushCompress};
use zstd::zstd_safe::CParameter;

use super::{session, told};
use crate::rng::Rng;
use crate::script::Setting;
use crate::session::Session;
use crate::{image, sim, soundness};

/// The option bytes in front of a stream.
const HEAD: usize = 4;

/// Byte 0, bits 1 and 2. Not 2 MiB: the point is the stream, and small ones come round sooner.
const CLUSTER_BITS: [u32; 4] = [9, 10, 12, 16];

fn setting(options: u8) -> Setting {
    let cluster_bits = CLUSTER_BITS[usize::from(options >> 1 & 3)];
    Setting {
        cluster_bits,
        size: 4 << cluster_bits,
        zstd: options & 1 == 1,
        ..Setting::default()
    }
}

/// An image whose first two clusters have `stream` as their compressed data.
fn disk(setting: &Setting, shape: u8, stream: &[u8]) -> Arc<SimDisk> {
    let cluster = 1usize << setting.cluster_bits;
    let mut bytes = image::empty(setting, None);
    let table = bytes.len();
    let host = table + cluster + usize::from(shape >> 3) * 8;
    // qcow2 specification, "Compressed Clusters Descriptor": the field has cluster_bits - 8 bits.
    let most = (1usize << (setting.cluster_bits - 8)) - 1;
    let exact = (host + stream.len().max(1) - 1) / 512 - host / 512;
    let sectors = match shape & 7 {
        5 => exact / 2,
        6 => exact.saturating_sub(1),
        7 => exact + 1,
        _ => exact,
    };
    let sectors = sectors.min(most);
    let end = (host / 512 + sectors + 1) * 512;
    bytes.resize(end.max(host + stream.len()).next_multiple_of(cluster), 0);
    bytes[host..host + stream.len()].copy_from_slice(stream);
    // What a descriptor does not reach is nobody's: not in the file.
    bytes.truncate(end.next_multiple_of(cluster));
    let entry = 1 << 62 | (sectors as u64) << (70 - setting.cluster_bits) | host as u64;
    let l1_entry = 3 * cluster;
    bytes[l1_entry..l1_entry + 8].copy_from_slice(&(table as u64 | 1 << 63).to_be_bytes());
    for guest in 0..2 {
        let slot = table + 8 * guest;
        bytes[slot..slot + 8].copy_from_slice(&entry.to_be_bytes());
    }
    let block = &mut bytes[2 * cluster..3 * cluster];
    image::set_refcount(block, table / cluster, 16, 1);
    for index in host / cluster..=(end - 1) / cluster {
        image::set_refcount(block, index, 16, 2);
    }
    SimDisk::with_contents(&bytes)
}

/// Reads one cluster: whole, and then in two pieces, which must say the same.
fn read(session: &Session, backend: &BlockBackend, guest: u64, cluster: u64) -> Option<Vec<u8>> {
    let len = usize::try_from(cluster).expect("small");
    let (mut whole, mut pieces) = (vec![0xee; len], vec![0xdd; len]);
    let (at, cut) = (guest * cluster, cluster / 3);
    let (first, second) = pieces.split_at_mut(len / 3);
    let (one, two) = session.home.run(|co| {
        let one = backend.pread(co, at, &mut whole[..]);
        let two = backend
            .pread(co, at, first)
            .and_then(|()| backend.pread(co, at + cut, second));
        (one, two)
    });
    assert_eq!(
        one.is_ok(),
        two.is_ok(),
        "whole and in pieces: {one:?} {two:?}"
    );
    one.ok()?;
    assert!(
        whole == pieces,
        "read whole and in pieces: not the same bytes"
    );
    Some(whole)
}

/// Bytes as the compressed data of one cluster.
///
/// # Panics
/// A finding.
pub fn compressed(bytes: &[u8]) -> String {
    let option = |nth: usize| bytes.get(nth).copied().unwrap_or(0);
    let setting = setting(option(0));
    let cluster = setting.cluster();
    let stream = bytes.get(HEAD..).unwrap_or_default();
    let stream = &stream[..stream.len().min(2 << setting.cluster_bits).min(32 << 10)];
    let disk = disk(&setting, option(1), stream);
    let session = session();
    let backend = session
        .open(sim::image(&disk), &DenyAll)
        .expect("a sound image");
    let before = read(&session, &backend, 0, cluster);
    let mut buf = vec![0; usize::try_from(cluster).expect("small")];
    let signature = format!(
        "{} {} {} {}",
        setting.zstd,
        setting.cluster_bits,
        // What the guest is told when it cannot be read.
        told(&session.home.run(|co| backend.pread(co, 0, &mut buf[..]))),
        before.as_deref().map_or(String::new(), form),
    );

    let at = u64::from(option(2)) * cluster / 256;
    let len = (1 + u64::from(option(3)) * cluster / 128).min(cluster - at);
    let data = vec![0x77; usize::try_from(len).expect("small")];
    let wrote = session
        .home
        .run(|co| backend.pwrite(co, at, &data[..], RequestFlags::empty()));
    // The rest of the cluster has to come from the stream, where the write does not fill it.
    assert_eq!(
        wrote.is_ok(),
        before.is_some() || len == cluster,
        "a write of {len} bytes at {at}: {wrote:?}"
    );
    let want = match wrote {
        Err(_) => None,
        Ok(()) => {
            let start = usize::try_from(at).expect("small");
            let mut want = before.clone().unwrap_or_else(|| data.clone());
            want[start..start + data.len()].copy_from_slice(&data);
            Some(want)
        }
    };
    let check = |backend: &BlockBackend| {
        let (written, other) = (
            read(&session, backend, 0, cluster),
            read(&session, backend, 1, cluster),
        );
        assert!(written == want, "the written cluster reads otherwise");
        assert!(other == before, "the other cluster reads otherwise");
    };
    check(&backend);
    session.close(backend);
    assert_eq!(
        soundness::check(&session, &disk),
        Ok((0, 0)),
        "corruptions and leaks"
    );
    let again = session
        .open(sim::image(&disk).with("read-only", "on"), &DenyAll)
        .expect("reopen");
    check(&again);
    session.close(again);
    session.end();
    signature
}

/// What a cluster looks like: how many different bytes, how often they change.
fn form(cluster: &[u8]) -> String {
    let kinds: std::collections::BTreeSet<u8> = cluster.iter().copied().collect();
    let changes = cluster.windows(2).filter(|pair| pair[0] != pair[1]).count();
    format!(
        "{} kinds, {} changes",
        kinds.len().ilog2(),
        (changes + 1).ilog2()
    )
}

/// Streams that are valid, of both methods and every cluster size: stored, fixed and dynamic codes;
/// blocks of raw, repeated and compressed bytes, with and without a checksum.
pub fn bases() -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new(), vec![1; HEAD]];
    for (bits, cluster_bits) in (0_u8..).zip(CLUSTER_BITS) {
        for content in contents(1 << cluster_bits) {
            for stream in deflated(&content) {
                all.push([&[bits << 1, 0, 0x40, 0x10], &stream[..]].concat());
            }
            for stream in zstandard(&content) {
                all.push([&[bits << 1 | 1, 0, 0x40, 0x10], &stream[..]].concat());
            }
        }
    }
    // Longer than a cluster is data that nobody would store so.
    all.retain(|input| {
        let cluster = 1 << setting(input.first().copied().unwrap_or(0)).cluster_bits;
        input.len() <= HEAD + cluster
    });
    all
}

fn contents(len: usize) -> [Vec<u8>; 4] {
    let mut rng = Rng::new(len as u64);
    let text = b"a block layer for virtual machine monitors, ";
    let stamped = |n: usize| {
        if n % 512 < 128 {
            (n / 7) as u64 * 31
        } else {
            0
        }
    };
    [
        vec![0x41; len],
        text.iter().copied().cycle().take(len).collect(),
        (0..len).map(|n| stamped(n).to_le_bytes()[0]).collect(),
        (0..len)
            .map(|_| rng.pick(&[0, 1, 2, 3, 0x80, 0xff]))
            .collect(),
    ]
}

fn deflated(content: &[u8]) -> Vec<Vec<u8>> {
    let pack = |level| {
        let mut packed = Vec::with_capacity(2 * content.len() + 64);
        // The reference inflates with a window of 4 KiB.
        Compress::new_with_window_bits(Compression::new(level), false, 12)
            .compress_vec(content, &mut packed, FlushCompress::Finish)
            .expect("no dictionary");
        packed
    };
    [0, 1, 9].map(pack).into()
}

fn zstandard(content: &[u8]) -> Vec<Vec<u8>> {
    let pack = |(level, checksum, size)| {
        let mut packer = zstd::bulk::Compressor::new(level).expect("a level");
        for parameter in [
            CParameter::ChecksumFlag(checksum),
            CParameter::ContentSizeFlag(size),
        ] {
            packer.set_parameter(parameter).expect("a parameter");
        }
        packer.compress(content).expect("room for it")
    };
    [(-5, false, true), (3, true, true), (19, false, false)]
        .map(pack)
        .into()
}

/// Changes the option bytes, or a few of the stream's.
pub fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    if bytes.len() > HEAD && rng.chance(25) {
        let at = usize::try_from(rng.below(HEAD as u64)).expect("small");
        bytes[at] = rng.next().to_le_bytes()[0];
        return;
    }
    let mut stream = bytes.split_off(bytes.len().min(HEAD));
    bytes.resize(HEAD, 0);
    for _ in 0..1 + rng.below(3) {
        let at = usize::try_from(rng.below(stream.len().max(1) as u64)).expect("small");
        match rng.below(8) {
            0 => stream.truncate(at),
            1 if stream.len() < 4096 => {
                let again = stream[at..stream.len().min(at + 16)].to_vec();
                stream.splice(at..at, again);
            }
            2 if at < stream.len() => _ = stream.remove(at),
            _ => {
                if let Some(byte) = stream.get_mut(at) {
                    *byte ^= 1 << rng.below(8);
                }
            }
        }
    }
    bytes.append(&mut stream);
}
