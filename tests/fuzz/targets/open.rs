//! Bytes as an image: described, checked, opened, read, written.
#![no_main]

coblock_fuzz::program!("open");
