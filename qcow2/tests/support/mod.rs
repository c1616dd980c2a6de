//! What several tests of this crate need: raw images in memory, and the reference's tools.
#![allow(dead_code)] // Each test binary uses a part of it.

pub mod corpus;
pub mod damage;
pub mod image;
pub mod rig;
pub mod rng;
pub mod world;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

pub fn put32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

pub fn put64(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

pub fn get32(image: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(image[at..at + 4].try_into().unwrap())
}

pub fn get64(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

/// An empty version 3 image of 1 MiB by hand: header, refcount table, refcount block, L1 table.
pub fn empty_image(cluster_bits: u32) -> Vec<u8> {
    let cluster = 1_usize << cluster_bits;
    let l1_entries = (1_usize << 20).div_ceil(cluster * cluster / 8);
    let mut image = vec![0; cluster * (3 + (l1_entries * 8).div_ceil(cluster))];
    put32(&mut image, 0, 0x5146_49fb);
    put32(&mut image, 4, 3);
    put32(&mut image, 20, cluster_bits);
    put64(&mut image, 24, 1 << 20);
    put32(&mut image, 36, u32::try_from(l1_entries).unwrap());
    put64(&mut image, 40, 3 * cluster as u64);
    put64(&mut image, 48, cluster as u64);
    put32(&mut image, 56, 1);
    put32(&mut image, 96, 4);
    put32(&mut image, 100, 112);
    put64(&mut image, cluster, 2 * cluster as u64);
    let clusters = image.len() / cluster;
    for index in 0..clusters {
        image[2 * cluster + index * 2 + 1] = 1;
    }
    image
}

/// Adds an L2 table with these entries at the end of the image, with refcount one; gives its
/// offset.
pub fn add_l2(image: &mut Vec<u8>, entries: &[u64]) -> u64 {
    let at = add_cluster(image);
    for (slot, entry) in entries.iter().enumerate() {
        put64(image, usize::try_from(at).unwrap() + 8 * slot, *entry);
    }
    put64(image, 0x3_0000, at | 1 << 63);
    at
}

/// Adds a cluster of 64 KiB with refcount one at the end of the image.
pub fn add_cluster(image: &mut Vec<u8>) -> u64 {
    let at = image.len();
    image.resize(at + 0x1_0000, 0);
    image[0x2_0000 + at / 0x1_0000 * 2 + 1] = 1;
    at as u64
}

/// A snapshot table entry without a name.
pub fn snapshot(l1_offset: u64, l1_entries: u32, id: &[u8]) -> Vec<u8> {
    let mut entry = vec![0; 56];
    put64(&mut entry, 0, l1_offset);
    put32(&mut entry, 8, l1_entries);
    put32(&mut entry, 12, u32::try_from(id.len()).unwrap() << 16);
    put32(&mut entry, 36, 16);
    entry.extend_from_slice(id);
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// Adds a snapshot table in a cluster at the end of the image.
pub fn add_snapshots(image: &mut Vec<u8>, table: &[u8], count: u32) {
    let at = add_cluster(image);
    let start = usize::try_from(at).unwrap();
    image.resize(image.len().max(start + table.len()), 0);
    image[start..start + table.len()].copy_from_slice(table);
    put32(image, 60, count);
    put64(image, 64, at);
}

/// Runs `qemu-img`, or tells aloud that it is missing.
pub fn qemu_img(args: &[&str]) -> Option<Output> {
    run("qemu-img", args)
}

/// Runs `qemu-io`, or tells aloud that it is missing.
pub fn qemu_io(args: &[&str]) -> Option<Output> {
    run("qemu-io", args)
}

fn run(tool: &str, args: &[&str]) -> Option<Output> {
    match Command::new(tool).args(args).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "CI needs {tool}"
            );
            writeln!(std::io::stderr(), "SKIPPED: {tool} is not installed")
                .expect("standard error");
            None
        }
        Err(error) => panic!("{tool} {args:?}: {error}"),
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// What a failed tool said.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
