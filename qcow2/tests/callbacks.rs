//! Requests with callbacks on an image: a synchronous request in a callback works in both request
//! modes (rules 2.4, 2.6).

mod support;

use coblock_aio::EngineKind;
use coblock_block::{DenyAll, Mixed, Options, RequestFlags};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::world::World;

/// In serial mode a request has left the line before its callback runs: the original did it after,
/// and hung.
#[test]
fn rule_2_6_a_synchronous_request_in_a_callback() {
    for mode in ["mutex", "serial"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.qcow2");
        std::fs::write(&path, support::empty_image(16)).unwrap();
        let world = World::new(EngineKind::Threads);
        let options =
            Options::format_on_file("qcow2", support::text(&path)).with("request-mode", mode);
        let opened = world.home.run(|co| world.open(co, &DenyAll, options));
        let backend = Arc::new(opened.unwrap());
        let over = Arc::new(AtomicBool::new(false));
        let (inner, told) = (backend.clone(), over.clone());
        let none = RequestFlags::empty();
        let request = world.home.with(|| {
            backend.aio_pwrite(100_000, vec![7; 5000], none, move |result, written| {
                result.unwrap();
                let mixed = Mixed::nested(&inner);
                let mut read = vec![0; 5000];
                mixed.pread(100_000, &mut read).unwrap();
                assert_eq!(read, written);
                mixed.pwrite(300_000, &read, none).unwrap();
                mixed.flush().unwrap();
                told.store(true, Ordering::Relaxed);
            })
        });
        world.home.run(|co| request.unwrap().cancel(co));
        assert!(over.load(Ordering::Relaxed), "{mode}");
        world.home.run(|co| {
            let mut read = vec![0; 5000];
            backend.pread(co, 300_000, &mut read[..]).unwrap();
            assert_eq!(read, [7; 5000], "{mode}");
            backend.close(co).unwrap();
        });
        drop(backend);
        world.end();
    }
}
