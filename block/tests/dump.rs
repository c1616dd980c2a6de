//! A graph is told for people and programs.

mod support;

use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{Drain, Options};
use std::sync::Arc;
use support::{PLAIN, World, end, settle, start};

/// Nodes, edges, sections and requests in flight, in both languages; names are quoted.
#[test]
fn a_graph_is_dumped() {
    let world = World::simulated();
    let disk = SimDisk::new(4096);
    let options = Options::new()
        .with("driver", "raw")
        .with("node-name", "top")
        .with("file.driver", "sim")
        .with("file.node-name", "disk")
        .with_object("file.disk", disk.clone());
    let backend = Arc::new(world.open(options).unwrap());
    let hold = disk.hold(Match::writes());
    let write = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 512, &[1; 1024][..], PLAIN)
    });
    settle(&world);
    let mut dump = world.run(|co| {
        let graph = world.graph.read(co);
        world.graph.dump(&graph)
    });
    assert_eq!(
        dump.to_json(),
        concat!(
            r#"{"nodes":[{"name":"disk","driver":"sim","filename":"sim","len":4096,"read-only":false,"#,
            r#""users":1,"drained-sections":0,"children":[],"requests":[{"kind":"write","#,
            r#""offset":512,"len":1024,"serialising":false}]},"#,
            r#"{"name":"top","driver":"raw","filename":"sim","len":4096,"read-only":false,"#,
            r#""users":1,"drained-sections":0,"#,
            r#""children":[{"name":"file","role":"filtered","node":"disk"}],"#,
            r#""requests":[{"kind":"write","offset":512,"len":1024,"serialising":false}]}]}"#,
        )
    );
    dump.nodes[0].filename = "a \"b\"\\c\n\u{1}".to_owned();
    let dot = dump.to_dot();
    for line in [
        r#"  "disk" [label="disk\nsim, 4096 bytes\na \"b\"\\c\n\u0001\nwrite 1024 at 512"];"#,
        r#"  "top" -> "disk" [label="file (filtered)"];"#,
    ] {
        assert!(dot.lines().any(|is| is == line), "{dot} lacks {line}");
    }
    drop(hold);
    let section = world.home.with(|| backend.drain_blocking());
    assert!(matches!(*write.borrow(), Some(Ok(()))));
    let told = world.run(|co| world.graph.dump(&world.graph.read(co)).to_dot());
    assert!(told.contains("drained 1"), "{told}");
    drop(section);
    end(world, backend);
}
