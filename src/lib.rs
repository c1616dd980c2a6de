//! A block layer for virtual machine monitors, as a library: coroutines over io_uring, a graph of
//! nodes, and qcow2. This package is its face, a crate for each layer:
//!
//! | module | what | begin reading at |
//! |---|---|---|
//! | [`block`] | disks, their graph, and the requests that go through | [`BlockBackend`](block::BlockBackend) |
//! | [`qcow2`] | the image format, registered as a driver | [`OpenQcow2`](qcow2::OpenQcow2) |
//! | [`aio`] | event loops, on this thread or on threads of their own | [`Home`](aio::Home), [`IoThread`](aio::IoThread) |
//! | [`coroutine`] | what requests run in: `co: &Co` says that a call may suspend | [`Co`](coroutine::Co) |
//!
//! A program that makes an image, and uses it as a disk:
//!
//! ```
//! use coblock::aio::{ContextOptions, Home};
//! use coblock::block::{BlockBackend, DenyAll, DriverRegistry, Graph, Options, RequestFlags, open};
//! use coblock::qcow2::OpenQcow2;
//! use coblock::qcow2::create::{CreateOptions, create};
//! use coblock::qcow2::image_file::ImageFile;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Nothing is global: the program makes its loop, its graph and its table of drivers.
//! let home = Home::new(ContextOptions::named("main"))?;
//! let graph = Graph::new(home.context());
//! let mut drivers = DriverRegistry::with_builtin();
//! drivers.register("qcow2", Box::new(OpenQcow2));
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("disk.qcow2");
//! std::fs::File::create(&path)?;
//! let path = path.to_str().ok_or("a name that is UTF-8")?;
//!
//! home.run(|co| {
//!     // `DenyAll`: no image makes us open a file that was not named here.
//!     let file = open(co, &graph, &drivers, &DenyAll, Options::file(path))?;
//!     let file = BlockBackend::new(&graph, file);
//!     create(&ImageFile::of_backend(co, &file), &CreateOptions::new(1 << 30))?;
//!     file.close(co)?;
//!
//!     let image = Options::format_on_file("qcow2", path);
//!     let disk = BlockBackend::new(&graph, open(co, &graph, &drivers, &DenyAll, image)?);
//!     disk.pwrite(co, 1 << 20, &[7; 4096][..], RequestFlags::empty())?;
//!     disk.flush(co)?;
//!     let mut bytes = [0; 4096];
//!     disk.pread(co, 1 << 20, &mut bytes[..])?;
//!     assert_eq!(bytes, [7; 4096]);
//!     disk.close(co)
//! })?;
//! home.close();
//! # Ok(())
//! # }
//! ```
//!
//! A disk may be used from any context: a device's queue on an [`IoThread`](aio::IoThread) sends its
//! requests there. Callers that are in no coroutine have [`block::Mixed`], which waits, and requests
//! with callbacks ([`BlockBackend::aio_pread`](block::BlockBackend::aio_pread)).
pub use coblock_aio as aio;
pub use coblock_block as block;
pub use coblock_coroutine as coroutine;
pub use coblock_qcow2 as qcow2;
