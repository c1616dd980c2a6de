//! A home, a graph and the drivers, as a program would set them up; and the end of every test:
//! nothing is left alive.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use coblock::aio::{ContextOptions, EngineKind, Home, MonitorKind};
use coblock::block::{BlockBackend, DriverRegistry, Graph, OpenGate, Options};

/// The engines that this machine has, and that the environment did not forbid: with
/// `COBLOCK_TEST_ENGINE=threads` the whole suite runs on threads, as on a kernel without io_uring.
pub fn engines() -> Vec<EngineKind> {
    match std::env::var("COBLOCK_TEST_ENGINE").as_deref() {
        Ok("threads") => vec![EngineKind::Threads],
        Ok("io_uring") => vec![EngineKind::IoUring],
        Ok(other) => panic!("COBLOCK_TEST_ENGINE={other}: expected threads or io_uring"),
        Err(_) if has_io_uring() => vec![EngineKind::IoUring, EngineKind::Threads],
        Err(_) => vec![EngineKind::Threads],
    }
}

/// How descriptors are watched: as the library likes, or by `COBLOCK_TEST_MONITOR=poll` with
/// poll(2).
fn monitor() -> MonitorKind {
    match std::env::var("COBLOCK_TEST_MONITOR") {
        Ok(word) => word.parse().expect("COBLOCK_TEST_MONITOR"),
        Err(_) => MonitorKind::Auto,
    }
}

/// The engine to use where one is enough.
pub fn engine() -> EngineKind {
    engines()[0]
}

fn has_io_uring() -> bool {
    match Home::new(ContextOptions {
        engine: EngineKind::IoUring,
        ..ContextOptions::default()
    }) {
        Ok(home) => {
            home.close();
            true
        }
        Err(error) => {
            super::peer::skipped(&format!("io_uring: {error}; testing threads only"));
            false
        }
    }
}

/// The drivers that a program has.
pub fn registry() -> DriverRegistry {
    let mut registry = DriverRegistry::with_builtin();
    registry.register("qcow2", Box::new(coblock::qcow2::OpenQcow2));
    registry
}

/// What one test needs to open images.
pub struct Session {
    pub home: Home,
    pub graph: Arc<Graph>,
    pub registry: DriverRegistry,
}

impl Session {
    /// On real files.
    pub fn new(engine: EngineKind) -> Self {
        Self::with(ContextOptions {
            engine,
            monitor: monitor(),
            ..ContextOptions::named("suite")
        })
    }

    /// On whatever `options` say.
    pub fn with(options: ContextOptions) -> Self {
        let home = Home::new(options).expect("a context");
        let graph = Graph::new(home.context());
        Session {
            home,
            graph,
            registry: registry(),
        }
    }

    /// Opens what `options` describe, as a user's handle.
    pub fn open(
        &self,
        options: Options,
        gate: &dyn OpenGate,
    ) -> coblock::block::Result<Arc<BlockBackend>> {
        self.home.run(|co| {
            let node = coblock::block::open(co, &self.graph, &self.registry, gate, options)?;
            Ok(Arc::new(BlockBackend::new(&self.graph, node)))
        })
    }

    /// Closes a disk; nobody else holds it.
    pub fn close(&self, backend: Arc<BlockBackend>) {
        self.home.run(|co| backend.close(co)).expect("close");
        drop(Arc::into_inner(backend).expect("nobody else holds this disk"));
    }

    /// The end of a test: no node lives, and no coroutine.
    pub fn end(self) {
        assert_eq!(self.graph.live_nodes(), 0, "nodes that outlive their test");
        drop(self.graph);
        while self.home.poll(false) {}
        assert_eq!(
            self.home.context().live_coroutines(),
            0,
            "coroutines that outlive their test"
        );
        self.home.close();
    }
}

/// A folder on a real file system, for direct I/O: the temporary folder may be in memory.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(target_folder()).expect("a folder below the target folder")
}

/// A folder that stays, below the target folder. Cargo names one to tests only, so an example uses
/// its program's own.
pub fn target_folder() -> PathBuf {
    match option_env!("CARGO_TARGET_TMPDIR") {
        Some(folder) => folder.into(),
        None => std::env::current_exe()
            .expect("a program")
            .parent()
            .expect("in a folder")
            .to_path_buf(),
    }
}

/// Options for an image file.
pub fn image(format: &str, path: &Path, direct: bool) -> Options {
    let path = path.to_str().expect("a path that is text");
    Options::format_on_file(format, path)
        .with("discard", "unmap")
        .with("file.cache.direct", if direct { "on" } else { "off" })
}
