//! `open`, `close`, `reopen`: the image that the other commands work on.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use coblock::aio::co;
use coblock::block::{self, AioRequest, BlockBackend};

use super::Shell;
use super::args::SECTOR;
use super::commands::{Call, Failure};
use crate::explain::explain;
use crate::getopt::{Getopt, Opt};
use crate::image_opts::Pairs;
use crate::open::{Engine, Session};
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
    read_only: bool,
    snapshot: bool,
    copy_on_read: bool,
    force_share: bool,
    cache: Cache,
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

    fn engine(&self) -> Result<Engine, String> {
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

    /// The part of `len` bytes at `offset` that the file has, where the rest is in its last, odd sector.
    pub(super) fn inside(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len);
        if end <= self.len() {
            len.min(self.backend.len().saturating_sub(offset))
        } else {
            len
        }
    }

    /// Whether `data` may be written at `offset`: not if it makes a raw image, whose format was guessed, look like
    /// another one. A file whose last sector is odd grows to the end of what is written.
    pub(super) fn prepare_write(&self, offset: u64, data: &[u8]) -> block::Result<()> {
        let end = offset.saturating_add(data.len() as u64);
        let (backend, spec) = (&self.backend, &self.spec);
        self.session.home.run(|co| {
            if spec.probed && spec.driver() == "raw" && offset < SECTOR && end <= self.len() {
                let mut start = [0; 512];
                let here = usize::try_from(backend.len()).map_or(start.len(), |n| n.min(start.len()));
                backend.pread(co, 0, &mut start[..here])?;
                let at = usize::try_from(offset).unwrap_or(start.len());
                for (old, new) in start[at..].iter_mut().zip(data) {
                    *old = *new;
                }
                if guess(&start) != "raw" {
                    let why = "the first sector of an image of guessed format would look like another format";
                    return Err(block::Error::new(block::ErrorKind::ReadOnly, why));
                }
            }
            if end > backend.len() && end <= self.len() {
                backend.truncate(co, end, false)?;
            }
            Ok(())
        })
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

/// `reopen`
pub(super) fn reopen(_: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    if call.words.is_empty() {
        return Ok(());
    }
    Err(Failure::Error(
        "reopen: changing options of an open image is not supported: close and open it".into(),
    ))
}

impl Shell<'_> {
    /// Opens an image, unless one is open.
    pub(super) fn open_image(
        &mut self,
        name: Option<&OsStr>,
        with: OpenWith,
    ) -> Result<(), Failure> {
        if self.image.is_some() {
            return Err(Failure::Error("file open already, try 'help close'".into()));
        }
        let failed = |why: String| {
            Failure::Error(match name.filter(|_| !self.image_opts) {
                Some(name) => format!("can't open device {}: {why}", name.to_string_lossy()),
                None => format!("can't open: {why}"),
            })
        };
        if with.copy_on_read {
            return Err(failed("copy-on-read is not supported".into()));
        }
        if with.snapshot {
            return Err(failed("temporary snapshots are not supported".into()));
        }
        let naming = Naming {
            image_opts: self.image_opts,
            format: None,
        };
        if naming.image_opts
            && let Some(name) = name
        {
            let pairs = Pairs::parse(&name.to_string_lossy(), Some("file"));
            standard::warn_switches(&pairs, self.out);
        }
        let mut spec = ImageSpec::with_options(name, &with.options, naming).map_err(failed)?;
        if spec.keys.get("discard").is_none() {
            let mode = if with.discard { "unmap" } else { "ignore" };
            spec.keys.set("discard", mode);
        }
        if !with.read_only && spec.forbids_writing() {
            return Err(failed("Block node is read-only".into()));
        }
        let session = Session::new(with.engine().map_err(failed)?).map_err(failed)?;
        let access = Access {
            write: !with.read_only,
            force_share: with.force_share,
            cache: with.cache,
            alone: false,
        };
        let backend = match session.home.run(|co| session.open(co, &spec, access)) {
            Ok(backend) => Arc::new(backend),
            Err(error) => {
                session.close();
                return Err(failed(explain(&error)));
            }
        };
        if spec.probed && spec.driver() == "raw" && access.write {
            standard::warn_probed_raw(self.out, &spec.shown);
        }
        self.image = Some(Image {
            session,
            backend,
            spec,
            write: access.write,
            write_through: with.cache.is_write_through(),
            running: Vec::new(),
        });
        Ok(())
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
            Err(error) => {
                let why = explain(&error);
                self.out
                    .error(format!("Failed to close '{}': {why}", image.spec.shown));
                false
            }
        }
    }
}
