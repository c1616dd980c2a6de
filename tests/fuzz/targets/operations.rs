//! Bytes as operations on an image and on a byte array.
#![no_main]

coblock_fuzz::program!("operations");
