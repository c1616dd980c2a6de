//! Promise: an internal snapshot is whole after a power cut at any write, and so is the disk whose
//! clusters it shares. (Rule 9.3. All other workloads: `reliability.rs`.)

use coblock::block::drivers::sim::{Keep, SimDisk};

use crate::support::crash::{Sample, cut_everywhere};
use crate::support::judge::Judge;
use crate::support::model::assert_same;
use crate::support::peer;
use crate::support::play::{Stage, play, play_on};
use crate::support::swarm::Params;

/// Clusters that a snapshot shares are copied, and the snapshot keeps what it had: as the reference
/// reads it at every place where the power may go.
#[test]
fn image_with_snapshot() {
    if !peer::present("image_with_snapshot") {
        return;
    }
    let params = Params {
        version: 3,
        cluster_bits: 12,
        refcount_order: 3,
        size: 512 << 10,
        flushes: 0,
        // A disk that grows makes the reference read the snapshot as long as it.
        copies: 0,
        lazy: false,
        // The snapshot shares some of them too.
        compressed: 7,
        zstd: false,
        ..Params::draw_short(4)
    };
    let before = play(&params.script());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("snapshot.qcow2");
    std::fs::write(&path, before.stage.disk.contents()).expect("a file in our folder");
    peer::qemu_img(&["snapshot", "-c", "kept", path.to_str().expect("text")]);
    let kept = peer::content("qcow2", &path);

    let stage = Stage {
        disk: SimDisk::with_contents(&std::fs::read(&path).expect("it is ours")),
        ..before.stage
    };
    let script = Params {
        flushes: 15,
        ..params
    }
    .script();
    // Everything so far is durable: the log begins anew.
    let mut history = before.history;
    history.log_begins_anew();
    let played = play_on(stage, history, &script, |_, load| load);

    let judge = Judge::default();
    let sample = Sample {
        reference: 151,
        goes_on: 53,
        repaired: 3,
        per_place: 0,
    };
    let counted = cut_everywhere(&judge, &played, sample);
    let counted = counted.unwrap_or_else(|why| panic!("{why}\n{script}"));
    judge.end();
    assert!(counted.states > 500 && counted.inflated > 0, "{counted:?}");

    let mut cuts = played.stage.disk.power_cuts();
    for at in (0..=cuts.log_len()).step_by(7) {
        cuts.go_to(at);
        let left = cuts.left(&Keep::Seed(at as u64)).0;
        std::fs::write(&path, left.contents()).expect("a file in our folder");
        let raw = path.with_extension("kept");
        let [from, to] = [&path, &raw].map(|p| p.to_str().expect("text"));
        let snapshot = "snapshot.name=kept";
        peer::qemu_img(&[
            "convert", "-l", snapshot, "-f", "qcow2", "-O", "raw", from, to,
        ]);
        let bytes = std::fs::read(&raw).expect("written");
        assert_same(&format!("power cut after {at} entries"), &bytes, &kept);
    }
}
