//! Begin and end of each request, told to a logger. In a process of its own: there is one logger.

mod support;

use coblock_block::REQUESTS;
use coblock_block::drivers::sim::SimDisk;
use log::{LevelFilter, Log, Metadata, Record};
use std::sync::Mutex;
use support::{PLAIN, end, sim_world};

struct Lines(Mutex<Vec<String>>);

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == REQUESTS
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

static LINES: Lines = Lines(Mutex::new(Vec::new()));

/// Both records of a request have one number; the second tells how it ended.
#[test]
fn a_request_is_told_twice_with_one_number() {
    log::set_logger(&LINES).unwrap();
    let disk = SimDisk::new(4096);
    let (world, backend) = sim_world(&disk, &[]);
    let node = backend.node().name().to_owned();
    let write = || {
        world
            .home
            .run(|co| backend.pwrite(co, 0, &[1; 512][..], PLAIN))
            .unwrap()
    };
    write();
    assert!(LINES.0.lock().unwrap().is_empty(), "nobody asked");
    log::set_max_level(LevelFilter::Trace);
    write();
    assert!(
        world
            .home
            .run(|co| backend.pread(co, 4096, &mut [0; 1][..]))
            .is_err()
    );
    log::set_max_level(LevelFilter::Off);
    let lines = LINES.0.lock().unwrap();
    let range = "offset=0 len=512";
    assert!(lines[0].starts_with(&format!(
        "write begins req=1 node={node} {range} coroutine="
    )));
    assert_eq!(
        lines[1],
        format!("write ends req=1 node={node} {range} ret=0")
    );
    let range = "offset=4096 len=1";
    assert!(lines[2].starts_with(&format!("read begins req=2 node={node} {range} coroutine=")));
    assert_eq!(
        lines[3],
        format!("read ends req=2 node={node} {range} ret=-5")
    );
    assert_eq!(lines.len(), 4);
    drop(lines);
    end(world, backend);
}
