//! Making an image: the file, what is in it, and what becomes of it after an error.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use coblock::block::{self, BlockBackend, Options, RequestFlags};
use coblock::coroutine::Co;
use coblock::qcow2::create::{self as qcow2_create, Preallocation};
use coblock::qcow2::image_file::ImageFile;

use super::super::create_options::{CreateOptions, FILE, QCOW2, RAW};
use super::checked::{preallocation, qcow2_options};
use crate::explain::explain;
use crate::open::{Engine, Session};
use crate::output::os_message;

/// Formats that can be made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    Raw,
    Qcow2,
}

pub(super) fn made(format: &str) -> Result<Made, String> {
    match format {
        // A file of the host is as raw as it gets.
        "raw" | "file" => Ok(Made::Raw),
        "qcow2" => Ok(Made::Qcow2),
        "null-co" => Err(format!(
            "Format driver '{format}' does not support image creation"
        )),
        _ => Err(format!("Unknown file format '{format}'")),
    }
}

/// Makes the file and what is in it.
pub(super) fn make(
    session: &Session,
    format: Made,
    format_name: &str,
    path: &str,
    options: &CreateOptions,
) -> Result<(), String> {
    let qcow2 = match format {
        Made::Qcow2 => Some(qcow2_options(options)?),
        Made::Raw => None,
    };
    let preallocated = preallocation(options, format)?;
    if options
        .number("extent_size_hint")
        .is_some_and(|hint| hint > 0)
    {
        return Err("extent_size_hint is not supported".into());
    }
    let size = options.number("size").unwrap_or(0);
    let existed = Path::new(path).exists();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(path)
        .map_err(|error| format!("Could not create '{path}': {}", os_message(&error)))?;
    let regular = file.metadata().is_ok_and(|m| m.is_file());
    if options.switch("nocow") {
        no_copy_on_write(&file);
    }
    let kept = file.try_clone().map_err(|error| os_message(&error))?;
    let node = Options::new()
        .with("driver", "file")
        .with("filename", path)
        .with("share-rw", "off")
        .with_fd("fd", file.into());
    let result = session.home.run(|co| {
        let node = session.open_node(co, node)?;
        let backend = BlockBackend::new(&session.graph, node);
        let made = if regular {
            backend.truncate(co, 0, true)
        } else {
            Ok(())
        };
        let made = made.and_then(|()| match &qcow2 {
            Some(options) => qcow2_create::create(&ImageFile::of_backend(co, &backend), options),
            None => make_raw(co, &backend, &kept, size, preallocated, regular),
        });
        let closed = backend.close(co);
        made.and(closed)
    });
    let Err(error) = result else { return Ok(()) };
    // What is there now is no image; the reference removes it too. A file that is in use was not
    // touched.
    let untouched = error.kind() == block::ErrorKind::Locked;
    if regular && !untouched && (format == Made::Qcow2 || !existed) {
        // Already failing: what the removal says would hide why.
        let _ = std::fs::remove_file(path);
    }
    if error.errno() == rustix::io::Errno::FBIG.raw_os_error() {
        let advice = if format == Made::Qcow2 {
            " (try using a larger cluster size)"
        } else {
            ""
        };
        return Err(format!(
            "The image size is too large for file format '{format_name}'{advice}"
        ));
    }
    Err(explain(&error))
}

/// Bytes that are written at once for `preallocation=full`.
const PIECE: usize = 2 << 20;

/// Bytes of the first block of any device.
const FIRST_BLOCK: usize = 4096;

fn make_raw(
    co: &Co,
    backend: &BlockBackend,
    file: &File,
    size: u64,
    preallocated: Preallocation,
    regular: bool,
) -> block::Result<()> {
    let size = size.checked_next_multiple_of(512).unwrap_or(size);
    if !regular {
        if size > backend.len() {
            let message = "Cannot grow device files";
            return Err(block::Error::new(block::ErrorKind::Invalid, message));
        }
        return Ok(());
    }
    backend
        .truncate(co, size, true)
        .map_err(|error| error.context("Could not resize file"))?;
    match preallocated {
        // The first block is stored, as in the reference: direct I/O cannot find its alignment out
        // in a hole.
        Preallocation::Off | Preallocation::Metadata => {
            let zeros = [0; FIRST_BLOCK];
            let len = usize::try_from(size).map_or(FIRST_BLOCK, |size| size.min(FIRST_BLOCK));
            backend
                .pwrite(co, 0, &zeros[..len], RequestFlags::empty())
                .map_err(|error| error.context("Could not write the first block"))
        }
        Preallocation::Falloc if size == 0 => Ok(()),
        Preallocation::Falloc => {
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(file, flags, 0, size).map_err(|errno| {
                block::Error::from_io("Could not preallocate data for the new file", errno.into())
            })
        }
        Preallocation::Full => {
            let zeros = vec![0; PIECE];
            let mut at = 0;
            while at < size {
                let len = usize::try_from(size - at).map_or(PIECE, |left| left.min(PIECE));
                backend
                    .pwrite(co, at, &zeros[..len], RequestFlags::empty())
                    .map_err(|error| error.context("Could not write zeros for preallocation"))?;
                at += len as u64;
            }
            backend.flush(co)
        }
    }
}

/// Asks the file system not to copy on write. Only btrfs knows what that is; elsewhere the option
/// means nothing, as in the reference.
fn no_copy_on_write(file: &File) {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    if let Ok(flags) = ioctl_getflags(file)
        && let Err(errno) = ioctl_setflags(file, flags | IFlags::NOCOW)
    {
        log::debug!("nocow: {errno}");
    }
}

/// Makes an image for our own use; options that are not given have their defaults.
///
/// # Errors
/// What went wrong, in words.
pub fn make_image(
    path: &str,
    format: &str,
    size: u64,
    given: &[(&str, &str)],
) -> Result<(), String> {
    let made = made(format)?;
    let mut options = CreateOptions::new(if made == Made::Qcow2 { QCOW2 } else { RAW }, FILE);
    options.set("size", &size.to_string())?;
    for (key, value) in given {
        options.set(key, value)?;
    }
    let session = Session::new(Engine::Auto)?;
    let result = make(&session, made, format, path, &options);
    session.close();
    result
}

/// Makes an empty qcow2 image of `size` bytes over a backing file that whoever opens it names.
///
/// # Errors
/// What went wrong, in words.
pub fn make_overlay(session: &Session, path: &str, size: u64) -> Result<(), String> {
    let mut options = CreateOptions::new(QCOW2, FILE);
    options.set("size", &size.to_string())?;
    options.set("backing_file", "below")?;
    options.set("backing_fmt", "raw")?;
    make(session, Made::Qcow2, "qcow2", path, &options)
}
