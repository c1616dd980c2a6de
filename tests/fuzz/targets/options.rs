//! Bytes as the text of options and of JSON.
#![no_main]

coblock_fuzz::program!("options");
