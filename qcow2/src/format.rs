//! How a qcow2 node is opened: its options, its header, and the files that it names.

use coblock_aio::{AlignedBuf, IoVecMut};
use coblock_block::{
    Child, ChildRole, Driver, Error as BlockError, ErrorKind, GraphRead, OpenDriver, Opening,
    RequestFlags, Result,
};
use coblock_coroutine::Co;

use crate::driver::{CacheSizes, Qcow2, RequestMode};
use crate::header::Header;
use crate::spec;

/// The opener of qcow2 images, to be registered under `"qcow2"`.
///
/// Options besides those of every node: `file` (needed); `backing` (options of the backing file, instead of what
/// the image says; empty: none is opened); `l2-cache-size` and `refcount-cache-size` (bytes);
/// `request-mode` (`mutex` or `serial`, see [`RequestMode`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenQcow2;

impl OpenDriver for OpenQcow2 {
    fn open(&self, co: &Co, opening: &mut Opening<'_>) -> Result<Box<dyn Driver>> {
        let l2 = opening.options().take_size("l2-cache-size")?;
        let refcounts = opening.options().take_size("refcount-cache-size")?;
        let mode = match opening.options().take_str("request-mode")?.as_deref() {
            None | Some("mutex") => RequestMode::Mutex,
            Some("serial") => RequestMode::Serial,
            Some(other) => {
                let message = format!("request-mode is '{other}', but must be 'mutex' or 'serial'");
                return Err(BlockError::new(ErrorKind::Invalid, message));
            }
        };
        let file = opening.open_child(co, "file", ChildRole::Storage)?;
        let graph = opening.graph().read(co);
        let header = read_header(co, &graph, &file)?;
        let caches = cache_sizes(&header, l2, refcounts)?;
        let read_only = opening.is_read_only();
        if let Some(name) = &header.backing_file {
            let text = |bytes: &[u8], what: &str| {
                String::from_utf8(bytes.to_vec()).map_err(|_| {
                    BlockError::new(ErrorKind::Invalid, format!("{what} is not valid UTF-8"))
                })
            };
            let name = text(name, "backing file name")?;
            let format = header
                .backing_format()
                .map(|f| text(f, "backing format"))
                .transpose()?;
            opening.dependent("backing", ChildRole::Backing, &name, format.as_deref())?;
        } else if opening.options().get("backing") == Some("") {
            // "No backing file" is true of an image without one.
            opening.options().take("backing");
        }
        let image = Qcow2::open(co, &graph, file, header, read_only, caches, mode)?;
        Ok(Box::new(image))
    }
}

/// Reads and decodes the header of the image in `file`. Suspends.
///
/// # Errors
/// I/O, or any field outside its limits.
pub fn read_header(co: &Co, graph: &GraphRead<'_>, file: &Child) -> Result<Header> {
    let none = RequestFlags::empty();
    let mut start = AlignedBuf::try_new(spec::HEADER_LEN_V3 as usize, 4096)
        .map_err(|e| BlockError::from_io("header", e))?;
    // What lies past the end of a short file reads as zeros, which no header is.
    file.pread(co, graph, 0, IoVecMut::from(&mut start[..]), none)?;
    let len = usize::try_from(file.len(graph)).unwrap_or(usize::MAX);
    let here = start.len().min(len);
    let wanted = Header::len_to_read(&start[..here])?.min(len);
    let mut cluster =
        AlignedBuf::try_new(wanted, 4096).map_err(|e| BlockError::from_io("header", e))?;
    file.pread(co, graph, 0, IoVecMut::from(&mut cluster[..]), none)?;
    Ok(Header::decode(&cluster)?)
}

fn cache_sizes(header: &Header, l2: Option<u64>, refcounts: Option<u64>) -> Result<CacheSizes> {
    let least = CacheSizes::smallest_for(header.geometry);
    let mut sizes = CacheSizes::default_for(header.geometry);
    for (what, given, least, size) in [
        ("l2-cache-size", l2, least.l2, &mut sizes.l2),
        (
            "refcount-cache-size",
            refcounts,
            least.refcounts,
            &mut sizes.refcounts,
        ),
    ] {
        match given {
            None => {}
            Some(bytes) if (least..=CACHE_MAX).contains(&bytes) => *size = bytes,
            Some(bytes) => {
                return Err(BlockError::new(
                    ErrorKind::Invalid,
                    format!("{what} is {bytes}, but must be between {least} and {CACHE_MAX}"),
                ));
            }
        }
    }
    Ok(sizes)
}

/// Most bytes that a cache may be given.
const CACHE_MAX: u64 = 1 << 30;
