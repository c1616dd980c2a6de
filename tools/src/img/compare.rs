//! `compare`: do two images have the same contents?
//!
//! ```text
//!   walk     one coroutine at a time asks both images what comes next, and cuts a step off: nothing to read, one image
//!            that must be zeros, or both to be compared
//!   check    many coroutines read and compare the steps, each a small piece at a time, so that what was read is still
//!            in the processor's cache when it is looked at
//!   settle   verdicts count in the order of the steps, whichever was first: what is printed does not depend on time
//! ```
//! The larger image must read as zeros past the end of the smaller one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::rc::Rc;

use coblock::aio::AlignedBuf;
use coblock::block::{self, Status};
use coblock::coroutine::{Co, CoMutex};

use super::disk::{Disk, SECTOR};
use super::progress::Progress;
use super::{Call, Command, Failure, text};
use crate::explain::explain;
use crate::getopt::Opt;
use crate::open::{Engine, Session};
use crate::output::{Output, with_name};
use crate::spec::{Access, Cache, ImageSpec};

pub(super) const COMMAND: Command = Command {
    word: "compare",
    about: "Check if two images have the same contents",
    usage: "compare [--image-opts | [-f FMT] [-F FMT]] [-s] [-T CACHE_MODE] [-U] [-p] [-q]
        FILENAME1 FILENAME2

  -h, --help
     print this help and exit
  -q, --quiet
     print errors only
  -p, --progress
     tell how far the comparison is
  -f, --a-format FMT
     format of the first image; without it the first bytes decide
  -F, --b-format FMT
     format of the second image; without it the first bytes decide
  --image-opts
     FILENAMEs are lists of options, like driver=qcow2,file.filename=disk.qcow2
  -s, --strict
     sizes, and what is allocated, must be equal too
  -T, --cache CACHE_MODE
     none, writeback, writethrough, directsync or unsafe (writeback)
  -U, --force-share
     open the images even if somebody else is writing to them
  --object OBJDEF
     limits that driver=throttle names: throttle-group,id=NAME,x-iops-total=N and so on

Exit status: 0 equal, 1 different, 2 an image could not be opened, 3 an image could not say what is
allocated, 4 an image could not be read.",
    run,
};

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Help,
    FormatA,
    FormatB,
    Cache,
    Progress,
    Quiet,
    Strict,
    Object,
    ImageOpts,
    ForceShare,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::value(Id::FormatA, Some(b'f'), Some("a-format")),
    Opt::value(Id::FormatB, Some(b'F'), Some("b-format")),
    Opt::value(Id::Cache, Some(b'T'), Some("cache")),
    Opt::flag(Id::Progress, Some(b'p'), Some("progress")),
    Opt::flag(Id::Quiet, Some(b'q'), Some("quiet")),
    Opt::flag(Id::Strict, Some(b's'), Some("strict")),
    Opt::value(Id::Object, None, Some("object")),
    Opt::flag(Id::ImageOpts, None, Some("image-opts")),
    Opt::flag(Id::ForceShare, Some(b'U'), Some("force-share")),
];

/// An image could not be opened.
const NOT_OPENED: u8 = 2;
/// An image could not say what is allocated.
const NO_STATUS: u8 = 3;
/// An image could not be read.
const NOT_READ: u8 = 4;

/// Longest step that is read, as in the reference, where it shows in the progress.
const STEP_MAX: u64 = 2 << 20;

/// Bytes that are read at once: enough that handing them to a thread costs little beside copying
/// them, and so few that they are still in the processor's cache when they are compared.
const PIECE: usize = 512 << 10;

/// Steps that are checked at the same time.
const IN_FLIGHT: usize = 4;

/// What the command line says.
struct Plan {
    images: [OsString; 2],
    formats: [Option<String>; 2],
    image_opts: bool,
    force_share: bool,
    cache: Option<OsString>,
    strict: bool,
    quiet: bool,
}

fn run(call: &mut Call<'_>) -> Result<u8, Failure> {
    let mut getopt = call.options(OPTIONS);
    let mut plan = Plan {
        images: Default::default(),
        formats: [None, None],
        image_opts: false,
        force_share: false,
        cache: None,
        strict: false,
        quiet: false,
    };
    let mut progress = false;
    while let Some((id, value)) = getopt.next_option()? {
        match id {
            Id::Help => return Err(call.help()),
            Id::FormatA => plan.formats[0] = Some(text(value)),
            Id::FormatB => plan.formats[1] = Some(text(value)),
            Id::Cache => plan.cache = value,
            Id::Progress => progress = true,
            Id::Quiet => plan.quiet = true,
            Id::Strict => plan.strict = true,
            Id::Object => call.define(value).map_err(not_opened)?,
            Id::ImageOpts => plan.image_opts = true,
            Id::ForceShare => plan.force_share = true,
        }
    }
    plan.images = getopt
        .operands()
        .try_into()
        .map_err(|_| Failure::Usage(b"Expecting two image file names".to_vec()))?;
    // Who is to be quiet tells nobody how far it is.
    let mut progress = Progress::new(progress && !plan.quiet)?;
    let result = compare(call, &plan, &mut progress);
    progress.end(call.out);
    result
}

/// Wrong names and images that cannot be opened have an exit status of their own.
fn not_opened(failure: Failure) -> Failure {
    match failure {
        Failure::Failed(message) => Failure::Status(NOT_OPENED, message),
        other => other,
    }
}

fn compare(call: &mut Call<'_>, plan: &Plan, progress: &mut Progress) -> Result<u8, Failure> {
    let cache = match &plan.cache {
        None => Cache::Writeback,
        Some(word) => Cache::parse(word).ok_or_else(|| {
            let message = with_name("Invalid source cache option: ", word, "");
            Failure::Status(NOT_OPENED, message)
        })?,
    };
    let access = Access {
        force_share: plan.force_share,
        cache,
        ..Access::READ
    };
    let spec = |index: usize| {
        let format = plan.formats[index].as_deref();
        let naming = super::naming(plan.image_opts, format).map_err(not_opened)?;
        super::image_spec(call, &plan.images[index], naming).map_err(not_opened)
    };
    let specs = [spec(0)?, spec(1)?];
    // Out of the page cache several threads copy at once; from the device itself nobody copies.
    let engine = if cache.is_direct() {
        Engine::Auto
    } else {
        Engine::Threads
    };
    let session = call.session(engine)?;
    let opened = session
        .home
        .run(|co| open_both(co, &session, &specs, access));
    let result = match opened {
        Ok(disks) => {
            let mut report = Report {
                quiet: plan.quiet,
                progress,
                out: call.out,
            };
            compare_disks(&session, disks, plan.strict, &mut report)
        }
        Err(message) => Err(Failure::Status(NOT_OPENED, message.into_bytes())),
    };
    session.close();
    result
}

fn compare_disks(
    session: &Session,
    disks: [Disk; 2],
    strict: bool,
    report: &mut Report<'_>,
) -> Result<u8, Failure> {
    report.progress.begin(report.out);
    let sizes_differ = disks[0].len != disks[1].len;
    let comparison = Rc::new(Comparison::new(disks, strict));
    let result = if strict && sizes_differ {
        report.line("Strict mode: Image size mismatch!");
        Ok(1)
    } else {
        comparison.run(session, report)
    };
    let mut closed = Ok(());
    for disk in &comparison.disks {
        closed = closed.and(session.home.run(|co| disk.close(co)));
    }
    let status = result?;
    closed?;
    Ok(status)
}

fn open_both(
    co: &Co,
    session: &Session,
    specs: &[ImageSpec; 2],
    access: Access,
) -> Result<[Disk; 2], String> {
    let a = Disk::open(co, session, &specs[0], access)?;
    match Disk::open(co, session, &specs[1], access) {
        Ok(b) => Ok([a, b]),
        Err(message) => a.close(co).and(Err(message)),
    }
}

/// What the user is told.
struct Report<'a> {
    quiet: bool,
    progress: &'a mut Progress,
    out: &'a mut Output,
}

impl Report<'_> {
    fn line(&mut self, line: &str) {
        if !self.quiet {
            self.out.line(line);
        }
    }
}

/// What must be done to know whether a range is equal.
#[derive(Clone, Copy)]
enum Check {
    /// Nothing: both read as zeros.
    Nothing,
    /// This image must read as zeros; the other one does, or ends before.
    Zeros(usize),
    /// Both must read the same.
    Both,
}

/// A range that both images say one thing about.
#[derive(Clone, Copy)]
struct Step {
    offset: u64,
    len: u64,
    check: Check,
}

/// What is known about a step.
enum Verdict {
    Equal,
    /// Data, from this offset on.
    Different(u64),
    /// What is allocated, in strict mode.
    StatusDiffers,
    /// Exit status and message.
    Failed(u8, String),
}

/// Where the next step begins.
#[derive(Default)]
struct Walk {
    offset: u64,
    /// What each image said last, and where that ends: steps are often shorter.
    known: [Option<(Status, u64)>; 2],
    /// How many steps there were.
    steps: u64,
    /// There are no more.
    ended: bool,
}

/// What the coroutines share.
struct Comparison {
    disks: [Disk; 2],
    strict: bool,
    walk: CoMutex<Walk>,
    /// Verdicts that were not told yet, by the number of the step.
    verdicts: RefCell<BTreeMap<u64, (Step, Verdict)>>,
    /// Nobody needs more verdicts.
    stop: Cell<bool>,
    running: Cell<usize>,
}

impl Comparison {
    fn new(disks: [Disk; 2], strict: bool) -> Self {
        Self {
            disks,
            strict,
            walk: CoMutex::new(Walk::default()),
            verdicts: RefCell::default(),
            stop: Cell::new(false),
            running: Cell::new(0),
        }
    }

    /// Length of the smaller image.
    fn common_len(&self) -> u64 {
        self.disks[0].len.min(self.disks[1].len)
    }

    /// Length of the larger image.
    fn total_len(&self) -> u64 {
        self.disks[0].len.max(self.disks[1].len)
    }

    /// Compares; the exit status.
    fn run(self: &Rc<Self>, session: &Session, report: &mut Report<'_>) -> Result<u8, Failure> {
        let alignment = self.disks.iter().map(Disk::mem_alignment).max();
        let alignment = alignment.unwrap_or(1).max(4096);
        for _ in 0..IN_FLIGHT {
            let buffer = || AlignedBuf::try_new(PIECE, alignment);
            let (Ok(first), Ok(second)) = (buffer(), buffer()) else {
                self.stop.set(true);
                return Err("Could not allocate buffers: out of memory"
                    .to_owned()
                    .into());
            };
            let here = self.clone();
            let started = session.home.try_spawn("compare", move |co| {
                here.running.set(here.running.get() + 1);
                here.work(co, [first, second]);
                here.running.set(here.running.get() - 1);
            });
            if let Err(error) = started {
                self.stop.set(true);
                self.wait(session);
                return Err(format!("Could not start comparing: {error}").into());
            }
        }
        let mut told = 0;
        let result = loop {
            let running = self.running.get() > 0;
            if let Some(end) = self.settle(&mut told, report) {
                break end;
            }
            if !running {
                report.line("Images are identical.");
                break Ok(0);
            }
            session.home.poll(true);
        };
        self.stop.set(true);
        self.wait(session);
        result
    }

    /// Until nobody is at work.
    fn wait(&self, session: &Session) {
        while self.running.get() > 0 {
            session.home.poll(true);
        }
    }

    /// Takes step after step until there is none.
    fn work(&self, co: &Co, mut buffers: [AlignedBuf; 2]) {
        while !self.stop.get() {
            let mut walk = self.walk.lock(co);
            let Some((step, verdict)) = self.step(co, &mut walk) else {
                return;
            };
            let number = walk.steps;
            walk.steps += 1;
            walk.offset = step.offset + step.len;
            walk.ended = verdict.is_some();
            drop(walk);
            let verdict = verdict.unwrap_or_else(|| self.check(co, step, &mut buffers));
            self.verdicts.borrow_mut().insert(number, (step, verdict));
        }
    }

    /// The next step, with its verdict where the question could not be answered or was enough.
    fn step(&self, co: &Co, walk: &mut Walk) -> Option<(Step, Option<Verdict>)> {
        let offset = walk.offset;
        if walk.ended || offset >= self.total_len() {
            return None;
        }
        let mut step = Step {
            offset,
            len: self.total_len() - offset,
            check: Check::Nothing,
        };
        for (disk, known) in self.disks.iter().zip(&mut walk.known) {
            known.take_if(|(_, end)| *end <= offset);
            if known.is_some() || offset >= disk.len {
                continue;
            }
            match disk.status(co, offset, disk.len - offset) {
                Ok(status) => {
                    let end = offset + status.len;
                    *known = Some((status, end));
                }
                Err(error) => return Some((step, Some(no_status(disk, &error)))),
            }
        }
        for (_, end) in walk.known.iter().flatten() {
            step.len = step.len.min(end - offset);
        }
        if let (true, [Some((a, _)), Some((b, _))]) = (self.strict, &walk.known)
            && traits(a) != traits(b)
        {
            return Some((step, Some(Verdict::StatusDiffers)));
        }
        let is_data = |index: usize| {
            let known = walk.known[index].as_ref();
            known.is_some_and(|(status, _)| status.data && !status.zero)
        };
        step.check = match (is_data(0), is_data(1)) {
            (false, false) => Check::Nothing,
            (true, false) => Check::Zeros(0),
            (false, true) => Check::Zeros(1),
            (true, true) => Check::Both,
        };
        if !matches!(step.check, Check::Nothing) {
            step.len = step.len.min(STEP_MAX);
        }
        Some((step, None))
    }

    /// Reads what a step needs.
    fn check(&self, co: &Co, step: Step, [first, second]: &mut [AlignedBuf; 2]) -> Verdict {
        let mut different = None;
        let mut done = 0;
        let end = if matches!(step.check, Check::Nothing) {
            0
        } else {
            step.len
        };
        while done < end && !self.stop.get() {
            let here = usize::try_from(end - done).map_or(PIECE, |left| left.min(PIECE));
            let (first, second) = (&mut first[..here], &mut second[..here]);
            let at = step.offset + done;
            let read = |index: usize, into: &mut [u8]| {
                let disk = &self.disks[index];
                let result = disk.read(co, at, into);
                result.map_err(|error| not_read(disk, step.offset, &error))
            };
            let compared = match step.check {
                Check::Nothing => Ok(None),
                Check::Zeros(index) => read(index, first).map(|()| first_data(first)),
                Check::Both => read(0, first)
                    .and_then(|()| read(1, second))
                    .map(|()| first_difference(first, second)),
            };
            match compared {
                // What is behind it is read all the same: an error there counts more.
                Ok(Some(sector)) if different.is_none() => different = Some(at + sector),
                Ok(_) => {}
                Err(verdict) => return verdict,
            }
            done += here as u64;
        }
        different.map_or(Verdict::Equal, Verdict::Different)
    }

    /// Tells what is known, in the order of the steps; the end, if this is one.
    fn settle(&self, told: &mut u64, report: &mut Report<'_>) -> Option<Result<u8, Failure>> {
        while let Some((step, verdict)) = self.verdicts.borrow_mut().remove(told) {
            *told += 1;
            if step.offset == self.common_len() {
                report.line("Warning: Image size mismatch!");
            }
            match verdict {
                Verdict::Equal => report.progress.add(step.len, self.total_len(), report.out),
                Verdict::Different(offset) => {
                    report.line(&format!("Content mismatch at offset {offset}!"));
                    return Some(Ok(1));
                }
                Verdict::StatusDiffers => {
                    let at = step.offset;
                    report.line(&format!("Strict mode: Offset {at} block status mismatch!"));
                    return Some(Ok(1));
                }
                Verdict::Failed(status, message) => {
                    return Some(Err(Failure::Status(status, message.into_bytes())));
                }
            }
        }
        None
    }
}

/// What strict mode compares.
fn traits(status: &Status) -> (bool, bool, bool, bool, bool, bool) {
    (
        status.data,
        status.zero,
        status.allocated,
        status.compressed,
        status.place.is_some(),
        status.eof,
    )
}

/// The reference's sentence; what the library says on a second line.
fn no_status(disk: &Disk, error: &block::Error) -> Verdict {
    let message = format!(
        "Sector allocation test failed for {}\n{}",
        disk.shown,
        explain(error)
    );
    Verdict::Failed(NO_STATUS, message)
}

/// The same for data.
fn not_read(disk: &Disk, offset: u64, error: &block::Error) -> Verdict {
    let message = format!(
        "Error while reading offset {offset} of {}: {}\n{}",
        disk.shown,
        block::errno_text(error.errno()),
        explain(error)
    );
    Verdict::Failed(NOT_READ, message)
}

/// Where the first sector begins that is not zero.
fn first_data(data: &[u8]) -> Option<u64> {
    let sectors = data.chunks(SECTOR);
    first(sectors.map(|sector| sector == &ZEROS[..sector.len()]))
}

/// Where the first sector begins that is not the same.
fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    first(a.chunks(SECTOR).zip(b.chunks(SECTOR)).map(|(a, b)| a == b))
}

fn first(mut equal: impl Iterator<Item = bool>) -> Option<u64> {
    let index = equal.position(|equal| !equal)?;
    Some((index * SECTOR) as u64)
}

const ZEROS: [u8; SECTOR] = [0; SECTOR];
