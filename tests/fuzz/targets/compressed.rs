//! Bytes as the compressed data of a cluster.
#![no_main]

coblock_fuzz::program!("compressed");
