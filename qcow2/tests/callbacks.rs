//! Requests with callbacks on an image: a synchronous request in a callback works in both request
//! modes (rules 2.4, 2.6).

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::{
    BlockBackend, DenyAll, DriverRegistry, Graph, Mixed, Options, RequestFlags, open,
};
use coblock_qcow2::OpenQcow2;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

mod support;

/// In serial mode a request has left the line before its callback runs: the original did it after,
/// and hung.
#[test]
fn rule_2_6_a_synchronous_request_in_a_callback() {
    for mode in ["mutex", "serial"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.qcow2");
        std::fs::write(&path, support::empty_image(16)).unwrap();
        let context = ContextOptions {
            engine: EngineKind::Threads,
            ..ContextOptions::default()
        };
        let home = Home::new(context).unwrap();
        let graph = Graph::new(home.context());
        let mut registry = DriverRegistry::with_builtin();
        registry.register("qcow2", Box::new(OpenQcow2));
        let options =
            Options::format_on_file("qcow2", support::text(&path)).with("request-mode", mode);
        let node = home
            .run(|co| open(co, &graph, &registry, &DenyAll, options))
            .unwrap();
        let backend = Arc::new(BlockBackend::new(&graph, node));
        let over = Arc::new(AtomicBool::new(false));
        let (inner, told) = (backend.clone(), over.clone());
        let none = RequestFlags::empty();
        let request = home.with(|| {
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
        home.run(|co| request.unwrap().cancel(co));
        assert!(over.load(Ordering::Relaxed), "{mode}");
        home.run(|co| {
            let mut read = vec![0; 5000];
            backend.pread(co, 300_000, &mut read[..]).unwrap();
            assert_eq!(read, [7; 5000], "{mode}");
            backend.close(co).unwrap();
        });
        drop(backend);
        assert_eq!(graph.live_nodes(), 0);
        home.close();
    }
}
