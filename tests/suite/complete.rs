//! Promise: the suite is whole. No file is forgotten, and the machinery can fail.

use std::collections::BTreeSet;
use std::path::Path;

use crate::support::model::{History, stamp};

/// Every file beside `main.rs` is a module of it: a forgotten one would be a promise that nobody
/// tests.
#[test]
fn every_file_is_in_the_suite() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite");
    let main = std::fs::read_to_string(folder.join("main.rs")).expect("the suite's own source");
    let listed: BTreeSet<String> = main
        .lines()
        .filter_map(|line| {
            line.strip_prefix("mod ")?
                .strip_suffix(';')
                .map(str::to_string)
        })
        .filter(|name| name != "support")
        .collect();
    let present: BTreeSet<String> = std::fs::read_dir(&folder)
        .expect("the suite's own folder")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| {
            path.file_stem()
                .expect("a file")
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| name != "main")
        .collect();
    assert_eq!(
        listed, present,
        "modules of tests/suite/main.rs and files in tests/suite/"
    );
}

/// The canary: a disk that loses one write must be found out. If this test fails, the models see
/// nothing.
#[test]
#[should_panic(expected = "found Zero")]
fn canary_a_lost_write_is_noticed() {
    let mut history = History::new(1 << 20, 512, 1);
    let mut buf = vec![0; 4096];
    let id = history.begin_write(8192, &mut buf, 0);
    history.end_write(id);
    let mut expected = vec![0; 4096];
    stamp(&mut expected, 8192, 512, 1, id);
    assert_eq!(buf, expected);
    // The disk forgets one sector of it.
    buf[1024..1536].fill(0);
    let token = history.begin_read();
    if let Err(violation) = history.end_read(&token, 8192, &buf) {
        panic!("{violation}");
    }
}
