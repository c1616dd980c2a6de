//! Promise: any request to the file may fail, once or for good, wholly or after its first sector.
//! Somebody is told, nothing hangs, and what the file holds afterwards is as after a power cut: no
//! corruption, nothing lost that a flush had acknowledged. (Rule 9.3, "errors of each step are
//! returned".)

use std::time::Duration;

use coblock::block::DenyAll;
use coblock::block::drivers::sim::{Counts, Fault, Match, SimDisk};

use crate::support::load::{Load, OnError};
use crate::support::model::History;
use crate::support::swarm::Params;
use crate::support::{image, load, sim, soundness};

fn params() -> Params {
    Params {
        seed: 1,
        version: 3,
        cluster_bits: 9,
        refcount_order: 6,
        size: 256 << 10,
        unit: 512,
        max_len: 6 << 10,
        in_flight: 8,
        writes: 75,
        flushes: 12,
        zeros: 20,
        hot: 30,
        requests: 60,
        fill: 0,
        copies: 5,
        lazy: false,
        serial: false,
    }
}

/// Must somebody be told of a failure?
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Yes,
    /// A disk that is full once: freed clusters are made ready, and what failed is tried again.
    Perhaps,
}

/// One load on a disk that fails as `fault` says. Returns how many requests of each kind
/// the disk saw after the image was opened.
fn run(params: &Params, fault: Option<(Fault, Told)>, story: &str) -> Counts {
    let session = sim::session();
    let disk = SimDisk::with_contents(&image::empty(&params.setting(), None));
    disk.delay(params.seed, Duration::from_micros(200));
    let backend = session
        .open(sim::image_with_smallest_caches(&disk), &DenyAll)
        .expect("open");
    let opened = disk.counts();
    let expected = match fault {
        None => Some(false),
        Some((fault, told)) => {
            disk.fail(fault);
            (told == Told::Yes).then_some(true)
        }
    };
    let history = History::new(params.size, params.unit, params.seed);
    let load = Load::new(&backend, &params.script(), history).on_error(OnError::Count);
    let mut loaded = load::run_load(&session.home, load);
    loaded.backend = None;
    let closed = session.home.run(|co| backend.close(co));
    drop(backend);
    let counts = disk.counts();
    let told = loaded.errors > 0 || closed.is_err();
    assert!(
        expected.is_none_or(|e| e == told),
        "{story}: {} failed, close: {closed:?}",
        loaded.errors
    );

    let left = SimDisk::with_contents(&disk.contents());
    let (corruptions, _leaks) =
        soundness::check(&session, &left).unwrap_or_else(|e| panic!("{story}: {e}"));
    assert_eq!(corruptions, 0, "{story}");
    let backend = session
        .open(sim::image(&left).with("read-only", "on"), &DenyAll)
        .expect("reopen");
    let bytes = session
        .home
        .run(|co| load::read_size(co, &backend, 1 << 18, params.size));
    session.close(backend);
    session.end();
    let judged = loaded.history.after_power_cut(usize::MAX, 0, &bytes);
    judged.unwrap_or_else(|v| panic!("{story}: {v}"));
    Counts {
        reads: counts.reads - opened.reads,
        writes: counts.writes - opened.writes,
        flushes: counts.flushes - opened.flushes,
        ..Counts::default()
    }
}

/// The nth write fails, for every n until there is none: once and for good, with EIO and ENOSPC,
/// wholly and torn.
#[test]
fn every_write_fails_once() {
    let params = params();
    let counts = run(&params, None, "nothing fails");
    assert!(counts.writes > 80 && counts.flushes > 10, "{counts:?}");
    for n in 0..counts.writes {
        for errno in [libc::EIO, libc::ENOSPC] {
            let fault = Fault::new(Match::writes(), errno).after(n);
            let once = if errno == libc::ENOSPC {
                Told::Perhaps
            } else {
                Told::Yes
            };
            let run = |fault, told, story: &str| {
                run(&params, Some((fault, told)), &format!("write {n} {story}"))
            };
            run(fault.clone(), once, "failed once");
            run(
                fault.clone().from_then_on(),
                Told::Yes,
                "and all later ones failed",
            );
            run(fault.torn(512), once, "was torn");
        }
    }
}

/// The same for flushes.
#[test]
fn every_flush_fails_once() {
    let params = params();
    let counts = run(&params, None, "nothing fails");
    for n in 0..counts.flushes {
        let fault = Fault::new(Match::flushes(), libc::EIO).after(n);
        run(
            &params,
            Some((fault.clone(), Told::Yes)),
            &format!("flush {n} failed"),
        );
        run(
            &params,
            Some((fault.from_then_on(), Told::Yes)),
            &format!("flushes from {n} failed"),
        );
    }
}

/// The same for reads: of metadata, of data, and of what is copied.
#[test]
fn every_read_fails_once() {
    let params = params();
    let counts = run(&params, None, "nothing fails");
    for n in 0..counts.reads {
        let fault = Fault::new(Match::reads(), libc::EIO).after(n);
        run(
            &params,
            Some((fault.clone(), Told::Yes)),
            &format!("read {n} failed"),
        );
        run(
            &params,
            Some((fault.from_then_on(), Told::Yes)),
            &format!("reads from {n} failed"),
        );
    }
}
