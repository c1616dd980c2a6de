//! An image's file, opened for one operation in a loop of its own.

use std::path::Path;
use std::sync::Arc;

use coblock_aio::{ContextOptions, EngineKind, Home};
use coblock_block::{BlockBackend, DenyAll, DriverRegistry, Graph, Options, Result, open};
use coblock_qcow2::check::{CheckReport, Event, Finding, check};
use coblock_qcow2::image_file::ImageFile;

/// Opens the file described by `options`, calls `f`, closes. Nothing is left behind.
pub fn with_options<R>(options: Options, f: impl FnOnce(&ImageFile<'_>) -> Result<R>) -> Result<R> {
    let context = ContextOptions {
        engine: EngineKind::Threads,
        ..ContextOptions::default()
    };
    let home = Home::new(context).unwrap();
    let graph = Graph::new(home.context());
    let registry = DriverRegistry::with_builtin();
    let result = home.run(|co| {
        let node = open(co, &graph, &registry, &DenyAll, options)?;
        let backend = BlockBackend::new(&graph, node);
        let result = f(&ImageFile::of_backend(co, &backend));
        let closed = backend.close(co);
        result.and_then(|value| closed.map(|()| value))
    });
    assert_eq!(graph.live_nodes(), 0);
    assert_eq!(home.context().live_coroutines(), 0);
    home.close();
    result
}

/// The same for a file of the host.
pub fn with_file<R>(
    path: &Path,
    write: bool,
    f: impl FnOnce(&ImageFile<'_>) -> Result<R>,
) -> Result<R> {
    let options =
        Options::file(super::text(path)).with("read-only", if write { "off" } else { "on" });
    with_options(options, f)
}

/// The same below a raw node: through an edge of the graph.
pub fn with_child<R>(path: &Path, f: impl FnOnce(&ImageFile<'_>) -> Result<R>) -> Result<R> {
    let context = ContextOptions {
        engine: EngineKind::Threads,
        ..ContextOptions::default()
    };
    let home = Home::new(context).unwrap();
    let graph = Graph::new(home.context());
    let registry = DriverRegistry::with_builtin();
    let options = Options::format_on_file("raw", super::text(path)).with("read-only", "on");
    let result = home.run(|co| {
        let node = open(co, &graph, &registry, &DenyAll, options)?;
        let backend = BlockBackend::new(&graph, Arc::clone(&node));
        let result = {
            let guard = graph.read(co);
            let children = node.children(&guard);
            f(&ImageFile::new(co, &guard, &children[0]))
        };
        drop(node);
        backend.close(co)?;
        result
    });
    assert_eq!(graph.live_nodes(), 0);
    home.close();
    result
}

/// Our report of an open image, and what was found, up to 100 lines; or why there is none.
pub fn report(file: &ImageFile<'_>) -> Result<(CheckReport, Vec<(Finding, u64)>)> {
    let header = file.read_header()?;
    let mut findings = Vec::new();
    let report = check(file, &header, &mut |event| {
        if let Event::Finding { finding, times } = event
            && findings.len() < 100
        {
            findings.push((finding.clone(), times));
        }
    })?;
    Ok((report, findings))
}
