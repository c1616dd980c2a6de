//! Promise: a read or an overwrite whose mapping is cached takes no coroutine lock (rules 2.6,
//! 9.2). What it must not do besides, allocate on the heap, is counted by the program
//! `tests/no_allocation.rs`.

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{DenyAll, RequestFlags};

use crate::support::model::History;
use crate::support::swarm::Params;
use crate::support::{image, load, play, sim};

/// A whole script of reads and overwrites on a written image never touches the metadata mutex; the
/// first write to a new cluster does, so the counter counts.
#[test]
fn cached_requests_take_no_lock() {
    for seed in 4000..4010 {
        let params = Params {
            flushes: 0,
            zeros: 0,
            copies: 0,
            ..Params::draw(seed)
        };
        let session = sim::session();
        let disk = SimDisk::with_contents(&image::empty(&params.setting(), None));
        disk.delay(seed, std::time::Duration::from_micros(100));
        // Room for all tables of this small image, and to spare.
        let options = sim::image(&disk).with("l2-cache-size", "16M");
        let backend = session.open(options, &DenyAll).expect("open");
        let mut history = History::new(params.size, params.unit, seed);
        session.home.run(|co| {
            let mut buf = vec![0; 1 << 16];
            for offset in (0..params.size).step_by(buf.len()) {
                let id = history.begin_write(offset, &mut buf, 0);
                backend
                    .pwrite(co, offset, &*buf, RequestFlags::empty())
                    .expect("write");
                history.end_write(id);
            }
            backend.flush(co).expect("flush");
        });
        let filled = play::stats(&backend);
        assert!(
            filled.metadata_locks > 0,
            "seed {seed}: allocating took no lock, so nothing is counted"
        );
        load::run(&session.home, &backend, &params.script(), history);
        let loaded = play::stats(&backend);
        assert_eq!(
            loaded.metadata_locks, filled.metadata_locks,
            "seed {seed}: locks taken"
        );
        assert_eq!(
            loaded.l2_misses, filled.l2_misses,
            "seed {seed}: not everything was cached"
        );
        session.close(backend);
        session.end();
    }
}
