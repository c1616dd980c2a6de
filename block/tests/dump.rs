//! A graph is told for people and programs.

mod support;

use coblock_block::drivers::sim::{Match, SimDisk};
use coblock_block::{BlockBackend, Drain, Options};
use std::sync::Arc;
use support::{PLAIN, World, end, settle, start};

/// The node `top`, raw, on the simulated `disk`, with a backend.
fn top_on_disk() -> (World, Arc<SimDisk>, Arc<BlockBackend>) {
    let world = World::simulated();
    let disk = SimDisk::new(4096);
    let options = Options::new()
        .with("driver", "raw")
        .with("node-name", "top")
        .with("file.driver", "sim")
        .with("file.node-name", "disk")
        .with_object("file.disk", disk.clone());
    let backend = Arc::new(world.open(options).unwrap());
    (world, disk, backend)
}

/// Nodes, edges, sections and requests in flight, in both languages; names are quoted.
#[test]
fn a_graph_is_dumped() {
    let (world, disk, backend) = top_on_disk();
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
            r#""users":1,"drained-sections":0,"home":"sim","children":[],"requests":[{"kind":"write","#,
            r#""offset":512,"len":1024,"serialising":false}]},"#,
            r#"{"name":"top","driver":"raw","filename":"sim","len":4096,"read-only":false,"#,
            r#""users":1,"drained-sections":0,"home":"sim","#,
            r#""children":[{"name":"file","role":"filtered","node":"disk"}],"#,
            r#""requests":[{"kind":"write","offset":512,"len":1024,"serialising":false}]}]}"#,
        )
    );
    dump.nodes[0].filename = "a \"b\"\\c\n\u{1}".to_owned();
    let dot = dump.to_dot();
    for line in [
        r#"  "disk" [label="disk\nsim, 4096 bytes\na \"b\"\\c\n\u0001\nin context sim\nwrite 1024 at 512"];"#,
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

/// Who is stuck, and what each coroutine waits for, told together while nothing moves.
#[test]
fn requests_in_flight_are_dumped() {
    let (world, disk, backend) = top_on_disk();
    let idle = world.graph.dump_requests(false);
    assert!(idle.busy.is_empty() && idle.to_json().starts_with(r#"{"busy":[],"#));
    let hold = disk.hold(Match::writes());
    let write = start(&world, &backend, |co, backend| {
        backend.pwrite(co, 512, &[1; 1024][..], PLAIN)
    });
    settle(&world);
    let dump = world.graph.dump_requests(false);
    let mut who: Vec<(&str, usize)> = dump
        .busy
        .iter()
        .map(|busy| (busy.who.as_str(), busy.requests.len()))
        .collect();
    who.sort_unstable();
    let wanted = [
        ("a backend of node 'top'", 1),
        ("node 'disk'", 1),
        ("node 'top'", 1),
    ];
    assert_eq!(who, wanted);
    let standing = &dump.coroutines.standing;
    assert_eq!(standing.len(), 1, "tests run on threads of their own");
    assert!(standing[0].at.is_some(), "it tells where it waits");
    let text = dump.to_string();
    for line in [
        "a backend of node 'top': 1 in flight",
        "  write 1024 at 512",
    ] {
        assert!(text.lines().any(|is| is == line), "{text} lacks {line}");
    }
    let json = dump.to_json();
    for part in [
        r#"{"who":"node 'disk'","otherwise":false,"requests":[{"kind":"write","offset":512,"len":1024,"#,
        r#""at":""#,
    ] {
        assert!(json.contains(part), "{json} lacks {part}");
    }
    drop(hold);
    settle(&world);
    assert!(matches!(*write.borrow(), Some(Ok(()))));
    end(world, backend);
}
