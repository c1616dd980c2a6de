//! Promise: whatever order the disk answers in, with caches that hold next to nothing and at least
//! 32 requests in flight, every read returns what the model allows, and the image is sound at the
//! end: no error, no leak.

use std::collections::BTreeSet;

use crate::support::judge::Judge;
use crate::support::peer;
use crate::support::play::{Played, play};
use crate::support::swarm::Params;

/// How many seeds: 60, or as many as `COBLOCK_TEST_SEEDS` says, for a long run.
fn seeds() -> u64 {
    match std::env::var("COBLOCK_TEST_SEEDS") {
        Ok(text) => text.parse().expect("COBLOCK_TEST_SEEDS is a number"),
        Err(_) => 60,
    }
}

/// One run of the swarm, judged: every read as it returns, and the whole disk after a reopen.
fn run(params: &Params) -> Played {
    let mut played = play(&params.script());
    let judge = Judge::default();
    let judged = judge.after_all(&mut played);
    judged.unwrap_or_else(|e| panic!("seed {}: {e}", params.seed));
    judge.end();
    played
}

/// The swarm: 9.1 to 9.4 under random overlapping reads, writes and flushes. Each run must have
/// been through an eviction, a wait for another write's allocation and a new refcount block, or it
/// has shown nothing; and compressed clusters of both methods must have been read in both modes.
#[test]
fn random_scripts_obey_the_model() {
    let (mut geometries, mut modes) = (BTreeSet::new(), BTreeSet::new());
    let mut inflated = BTreeSet::new();
    for seed in 0..seeds() {
        let params = Params::draw(seed);
        let seen = run(&params);
        assert!(seen.peak >= 32, "seed {seed}: {} in flight", seen.peak);
        assert!(
            seen.stats.l2_evictions > 0,
            "seed {seed}: no eviction: {:?}",
            seen.stats
        );
        assert!(
            // One request at a time waits for nobody.
            seen.stats.dependency_waits > 0 || params.serial,
            "seed {seed}: no dependency wait: {:?}",
            seen.stats
        );
        assert!(
            seen.stats.refcount_blocks_added > 0,
            "seed {seed}: no growth: {:?}",
            seen.stats
        );
        if seen.stats.clusters_inflated > 0 {
            assert!(params.compressed > 0, "seed {seed}: there was none");
            inflated.insert((params.zstd, params.serial));
        }
        modes.insert((params.lazy, params.serial));
        geometries.insert((params.version, params.cluster_bits, params.refcount_order));
    }
    assert!(geometries.len() >= 10, "only {geometries:?}");
    assert_eq!(modes.len(), 4, "lazy or not, serial or not: {modes:?}");
    assert_eq!(
        inflated.len(),
        4,
        "zstd or not, serial or not: {inflated:?}"
    );
}

/// A seed replays step by step: what the disk is sent, in which order, with which bytes, at which
/// time.
#[test]
fn a_seed_gives_the_same_run_twice() {
    for seed in 1000..1006 {
        let params = Params::draw(seed);
        let (first, second) = (run(&params), run(&params));
        let what = |played: &Played| (played.now_ns, played.peak, played.stats);
        assert_eq!(what(&first), what(&second), "seed {seed}: two runs differ");
        assert!(first.log == second.log, "seed {seed}: two logs differ");
    }
}

/// The reference agrees with our check on what the swarm leaves.
#[test]
fn the_reference_finds_them_sound() {
    if !peer::present("the_reference_finds_them_sound") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("swarm.qcow2");
    for seed in 2000..2012 {
        let params = Params::draw(seed);
        let contents = run(&params).stage.disk.contents();
        std::fs::write(&path, contents).expect("a file in our folder");
        assert_eq!(peer::check(&path), peer::Check::default(), "{params:?}");
    }
}
