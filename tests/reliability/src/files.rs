//! Loads on real files, judged by the model and by our own check; the reference's judgement is
//! added by who calls.

use std::path::Path;

use coblock::aio::EngineKind;
use coblock::block::LikeReference;
use coblock::block::drivers::sim::SimDisk;

use super::model::History;
use super::session::{self, Session};
use super::swarm::Params;
use super::{image, load, sim, soundness};

/// Loads the image at `path` with the script of `params`, reopens it with nothing shared, and
/// returns what it reads as now. `history` says what it held before.
pub fn load_and_judge(
    path: &Path,
    name: &str,
    params: &Params,
    mut history: History,
    engine: EngineKind,
    direct: bool,
) -> Vec<u8> {
    let gate = LikeReference::new();
    let session = Session::new(engine);
    let disk = session
        .open(session::image("qcow2", path, direct), &gate)
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    history.allow_racing_reads();
    let mut loaded = load::run(&session.home, &disk, &params.script(), history);
    assert!(
        loaded.peak >= 32,
        "{name}: only {} requests were in flight at once",
        loaded.peak
    );
    session.close(disk);
    session.end();

    let session = Session::new(engine);
    let options = session::image("qcow2", path, direct).with("read-only", "on");
    let disk = session
        .open(options, &gate)
        .unwrap_or_else(|e| panic!("{name}, reopened: {e}"));
    let bytes = session.home.run(|co| load::read_all(co, &disk, 1 << 20));
    session.close(disk);
    session.end();
    let token = loaded.history.begin_read();
    // What was added reads as zeros.
    let (known, added) = bytes.split_at(usize::try_from(params.size).expect("a small disk"));
    assert!(added.iter().all(|b| *b == 0), "{name}: added bytes");
    let judged = loaded.history.end_read(&token, 0, known);
    judged.unwrap_or_else(|v| panic!("{name}, read back: {v}"));
    bytes
}

/// Empty images of several geometries in a file, loaded with both engines, through the page cache
/// and past it.
pub fn load_all_ways(seeds: std::ops::Range<u64>) {
    let folder = session::folder();
    let path = folder.path().join("disk.qcow2");
    for seed in seeds {
        let params = Params {
            in_flight: 64,
            ..Params::draw(seed)
        };
        for engine in session::engines() {
            for direct in [false, true] {
                std::fs::write(&path, image::empty(&params.setting(), None))
                    .expect("a file in our folder");
                let name = format!("seed {seed} {engine:?} direct {direct}");
                let history = History::new(params.size, params.unit, seed);
                load_and_judge(&path, &name, &params, history, engine, direct);
                let disk = SimDisk::with_contents(&std::fs::read(&path).expect("it is ours"));
                let session = sim::session();
                assert_eq!(
                    soundness::check(&session, &disk),
                    Ok((0, 0)),
                    "{name}: corruptions and leaks"
                );
                session.end();
            }
        }
    }
}
