//! `open`, `close`: the image that the other commands work on.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use coblock::aio::co;
use coblock::block::{self, AioRequest, BlockBackend, Options};
use coblock::qcow2;

use super::Shell;
use super::args::SECTOR;
use super::commands::{Call, Failure};
use crate::explain::{explain, qcow2_error};
use crate::getopt::{Getopt, Opt};
use crate::image_opts::Pairs;
use crate::img::make_overlay;
use crate::open::{Engine, Session};
use crate::output::os_message;
use crate::spec::{Access, Cache, ImageSpec, Naming, guess};
use crate::standard;

/// Asynchronous I/O of the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Aio {
    Threads,
    Native,
    IoUring,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub(super) struct OpenWith {
    pub(super) read_only: bool,
    pub(super) snapshot: bool,
    pub(super) copy_on_read: bool,
    force_share: bool,
    pub(super) cache: Cache,
    aio: Option<Aio>,
    discard: bool,
    /// Options of the drivers.
    pub(super) options: Pairs,
}

impl Default for OpenWith {
    fn default() -> Self {
        Self {
            read_only: false,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            cache: Cache::Writethrough,
            aio: None,
            discard: true,
            options: Pairs::default(),
        }
    }
}

impl OpenWith {
    /// Takes one of the options that the program and `open` both have.
    ///
    /// # Errors
    /// The sentence for a value that it cannot have.
    pub(super) fn set(&mut self, letter: u8, value: &OsStr) -> Result<(), String> {
        let shown = value.to_string_lossy();
        match letter {
            b'r' => self.read_only = true,
            b's' => self.snapshot = true,
            b'C' => self.copy_on_read = true,
            b'U' => self.force_share = true,
            b'n' => self.cache = Cache::None,
            b'k' => self.aio = Some(Aio::Native),
            b'i' => {
                self.aio = match value.as_bytes() {
                    b"threads" => Some(Aio::Threads),
                    b"native" => Some(Aio::Native),
                    b"io_uring" => Some(Aio::IoUring),
                    _ => return Err(format!("Invalid aio option: {shown}")),
                }
            }
            b't' => {
                self.cache =
                    Cache::parse(value).ok_or_else(|| format!("Invalid cache option: {shown}"))?;
            }
            b'd' => {
                self.discard = match value.as_bytes() {
                    b"unmap" | b"on" => true,
                    b"ignore" | b"off" => false,
                    _ => return Err(format!("Invalid discard option: {shown}")),
                }
            }
            _ => unreachable!("a letter that no table has"),
        }
        Ok(())
    }

    pub(super) fn engine(&self) -> Result<Engine, String> {
        match self.aio {
            None => Ok(Engine::Auto),
            Some(Aio::Threads) => Ok(Engine::Threads),
            Some(Aio::IoUring) => Ok(Engine::IoUring),
            Some(Aio::Native) if self.cache.is_direct() => {
                Err("aio=native was specified, but is not supported in this build.".into())
            }
            Some(Aio::Native) => Err(
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
                    .into(),
            ),
        }
    }
}

/// The image that is open.
pub(super) struct Image {
    /// Drives its requests.
    pub(super) session: Session,
    /// Its handle.
    pub(super) backend: Arc<BlockBackend>,
    /// What the user called it.
    pub(super) spec: ImageSpec,
    /// May be written.
    pub(super) write: bool,
    /// Every write is on stable storage when it completes.
    pub(super) write_through: bool,
    /// Requests whose results were not yet there when somebody looked.
    pub(super) running: Vec<AioRequest>,
    /// How the user opened it.
    pub(super) with: OpenWith,
    /// Takes the writes, where they do not go to the image.
    _temporary: Option<File>,
}

impl Image {
    /// Bytes of the disk: whole sectors.
    pub(super) fn len(&self) -> u64 {
        let len = self.backend.len();
        len.checked_next_multiple_of(SECTOR).unwrap_or(len)
    }

    /// Are there requests beside the commands?
    pub(super) fn is_busy(&self) -> bool {
        self.running.iter().any(|request| !request.is_over())
    }

    /// The part of `len` bytes at `offset` that the file has, where the rest is in its last, odd
    /// sector.
    pub(super) fn inside(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len);
        if end <= self.len() {
            len.min(self.backend.len().saturating_sub(offset))
        } else {
            len
        }
    }

    /// Whether `data` may be written at `offset`: not if it makes a raw image, whose format was
    /// guessed, look like one of another format.
    pub(super) fn check_first_sector(&self, offset: u64, data: &[u8]) -> block::Result<()> {
        let guessed = self.spec.probed && self.spec.driver() == "raw";
        if !guessed || offset >= SECTOR || offset + data.len() as u64 > self.len() {
            return Ok(());
        }
        let backend = &self.backend;
        let mut start = [0; 512];
        let here = usize::try_from(backend.len()).map_or(start.len(), |n| n.min(start.len()));
        let old = &mut start[..here];
        self.session.home.run(|co| backend.pread(co, 0, old))?;
        let at = usize::try_from(offset).unwrap_or(start.len());
        for (old, new) in start[at..].iter_mut().zip(data) {
            *old = *new;
        }
        if guess(&start) == "raw" {
            return Ok(());
        }
        let why = "the first sector would look like that of another format";
        Err(block::Error::new(block::ErrorKind::ReadOnly, why))
    }

    /// Makes a file whose last sector is not whole long enough for a write there.
    pub(super) fn grow_to(&self, offset: u64, len: u64) -> block::Result<()> {
        let end = offset.saturating_add(len);
        if end <= self.backend.len() || end > self.len() {
            return Ok(());
        }
        let backend = &self.backend;
        self.session.home.run(|co| backend.truncate(co, end, false))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Id {
    With(u8),
    Options,
}

const OPEN: &[Opt<Id>] = &[
    Opt::flag(Id::With(b's'), Some(b's'), None),
    Opt::flag(Id::With(b'n'), Some(b'n'), None),
    Opt::flag(Id::With(b'C'), Some(b'C'), None),
    Opt::flag(Id::With(b'r'), Some(b'r'), None),
    Opt::flag(Id::With(b'k'), Some(b'k'), None),
    Opt::flag(Id::With(b'U'), Some(b'U'), None),
    Opt::value(Id::With(b'i'), Some(b'i'), None),
    Opt::value(Id::With(b't'), Some(b't'), None),
    Opt::value(Id::With(b'd'), Some(b'd'), None),
    Opt::value(Id::Options, Some(b'o'), None),
];

/// `open`
pub(super) fn open(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let words = call.words.iter().map(OsString::from).collect();
    let mut getopt = Getopt::letters(OPEN, words);
    let mut with = OpenWith::default();
    while let Some((id, value)) = getopt.next_option()? {
        let value = value.unwrap_or_default();
        match id {
            Id::With(letter) => with.set(letter, &value).map_err(Failure::Error)?,
            Id::Options if shell.image_opts => {
                return Err(Failure::Result(
                    "--image-opts and 'open -o' are mutually exclusive".into(),
                ));
            }
            Id::Options => {
                let more = Pairs::parse(&value.to_string_lossy(), None);
                standard::warn_switches(&more, shell.out);
                for (key, value) in more.all() {
                    with.options.set(key, value.as_str());
                }
            }
        }
    }
    let operands = getopt.operands();
    if operands.len() > 1 {
        return Err(Failure::Usage);
    }
    shell.open_image(operands.first().map(OsString::as_os_str), with)
}

/// `close`
pub(super) fn close(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    if shell.close_image() {
        Ok(())
    } else {
        Err(Failure::Told)
    }
}

impl Shell<'_> {
    /// Opens an image for the commands, unless one is open.
    pub(super) fn open_image(
        &mut self,
        name: Option<&OsStr>,
        with: OpenWith,
    ) -> Result<(), Failure> {
        if self.image.is_some() {
            return Err(Failure::Error("file open already, try 'help close'".into()));
        }
        if let Some(name) = name.filter(|_| self.image_opts) {
            let pairs = Pairs::parse(&name.to_string_lossy(), Some("file"));
            standard::warn_switches(&pairs, self.out);
        }
        let image = self.make_image(name, with).map_err(|why| {
            Failure::Error(match name.filter(|_| !self.image_opts) {
                Some(name) => format!("can't open device {}: {why}", name.to_string_lossy()),
                None => format!("can't open: {why}"),
            })
        })?;
        let spec = &image.spec;
        if spec.probed && spec.driver() == "raw" && image.write {
            standard::warn_probed_raw(self.out, &spec.shown);
        }
        self.image = Some(image);
        Ok(())
    }

    /// Opens an image.
    pub(super) fn make_image(&self, name: Option<&OsStr>, with: OpenWith) -> Result<Image, String> {
        if with.copy_on_read && with.read_only {
            return Err("Can't use copy-on-read on read-only device".into());
        }
        let naming = Naming {
            image_opts: self.image_opts,
            format: None,
        };
        let mut spec = ImageSpec::with_options(name, &with.options, naming)?;
        if spec.keys.get("discard").is_none() {
            let mode = if with.discard { "unmap" } else { "ignore" };
            spec.keys.set("discard", mode);
        }
        if !with.read_only && spec.forbids_writing() {
            return Err("Block node is read-only".into());
        }
        let session = Session::new(with.engine()?)?;
        self.objects.add_to(&session.graph);
        let access = Access {
            write: !with.read_only,
            force_share: with.force_share,
            cache: with.cache,
            alone: false,
        };
        let opened = if with.snapshot {
            open_snapshot(&session, spec, access, with.copy_on_read)
        } else {
            let opened = open_spec(&session, &spec, access, with.copy_on_read);
            opened
                .map(|backend| (spec, backend, None))
                .map_err(|error| explain(&error))
        };
        match opened {
            Ok((spec, backend, temporary)) => Ok(Image {
                session,
                backend: Arc::new(backend),
                spec,
                write: access.write,
                write_through: with.cache.is_write_through() && !with.snapshot,
                running: Vec::new(),
                with,
                _temporary: temporary,
            }),
            Err(why) => {
                session.close();
                Err(why)
            }
        }
    }

    /// Waits for requests, and closes the image if one is open; whether that went well.
    pub(super) fn close_image(&mut self) -> bool {
        let Some(image) = self.image.take() else {
            return true;
        };
        let Image {
            session, backend, ..
        } = image;
        let closed = session.home.run(|co| {
            let closed = backend.close(co);
            // The coroutines of requests whose callbacks have returned end in their own time.
            while Arc::strong_count(&backend) > 1 {
                co::reschedule(co);
            }
            closed
        });
        drop(backend);
        session.close();
        self.results.print(self.out);
        match closed {
            Ok(()) => true,
            // The request that found it told of it.
            Err(error) if is_about_corruption(&error) => false,
            Err(error) => {
                let why = explain(&error);
                self.out
                    .error(format!("Failed to close '{}': {why}", image.spec.shown));
                false
            }
        }
    }
}

/// Opens an image, below a filter that copies on read if it is wanted.
fn open_spec(
    session: &Session,
    spec: &ImageSpec,
    access: Access,
    copy_on_read: bool,
) -> block::Result<BlockBackend> {
    session.home.run(|co| {
        if !copy_on_read {
            return session.open(co, spec, access);
        }
        // What reaches the image is for its own node to decide.
        let mut options = Options::new()
            .with("driver", "copy-on-read")
            .with("discard", "unmap");
        options.nest("file", spec.options(access));
        let node = session.open_node(co, options)?;
        Ok(BlockBackend::new(&session.graph, node))
    })
}

/// Is it because the image was marked as corrupt that nothing more is written?
pub(super) fn is_about_corruption(error: &block::Error) -> bool {
    matches!(
        qcow2_error(error),
        Some(qcow2::Error::Stopped { why }) if why.starts_with("the image is corrupt")
    )
}

/// What was opened: the image that requests go to, and the file of a temporary one.
type Opened = (ImageSpec, BlockBackend, Option<File>);

/// Opens an image below a temporary one, which takes the writes and is gone with the program.
fn open_snapshot(
    session: &Session,
    mut below: ImageSpec,
    access: Access,
    copy_on_read: bool,
) -> Result<Opened, String> {
    let read = Access {
        write: false,
        ..access
    };
    let len = session.home.run(|co| {
        let backend = session.open(co, &below, read)?;
        let len = backend.len();
        backend.close(co)?;
        Ok(len)
    });
    let len = len.map_err(|error: block::Error| explain(&error))?;
    let len = len.checked_next_multiple_of(SECTOR).unwrap_or(len);
    let file = tempfile::tempfile()
        .map_err(|error| format!("Could not make a temporary file: {}", os_message(&error)))?;
    // It has no name, so nothing is left of it whatever happens.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // The options say what is below; the name in the image only that something is.
    make_overlay(session, &path, len)?;
    let mut top = ImageSpec::file(&path, "qcow2");
    top.shown.clone_from(&below.shown);
    let discard = below.keys.get("discard").unwrap_or("unmap").to_owned();
    top.keys.set("discard", discard);
    below.keys.set("read-only", "on");
    for (key, value) in below.keys.iter() {
        top.keys.set(&format!("backing.{key}"), value);
    }
    let access = Access {
        cache: Cache::Unsafe,
        ..access
    };
    open_spec(session, &top, access, copy_on_read)
        .map(|backend| (top, backend, Some(file)))
        .map_err(|error| explain(&error))
}
