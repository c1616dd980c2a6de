//! `map`: which ranges of an image are data, which are zeros, where they are, and how deep in the
//! backing chain.
//!
//! ```text
//!   Disk::map          one answer of the library for another, each about a first part of what was asked
//!   Extent             neighbours that differ in nothing but their place become one
//!   human | json       printed when the next one is known to be different
//! ```

use std::sync::Arc;

use coblock::block::{self, Node, Status};
use coblock::coroutine::Co;

use super::disk::Disk;
use super::{Call, Command, Failure, Format, one_image, text};
use crate::explain::explain;
use crate::getopt::Opt;
use crate::open::{Engine, Session};
use crate::output::Output;
use crate::size::size_argument;
use crate::spec::{Access, ImageSpec};

pub(super) const COMMAND: Command = Command {
    word: "map",
    about: "Show where the data of an image is",
    usage: "map [-f FMT | --image-opts] [-s OFFSET] [-l LENGTH] [-U] [--output human|json] FILENAME

  -h, --help
     print this help and exit
  -f, --format FMT
     format of the image; without it the first bytes decide
  --image-opts
     FILENAME is a list of options, like driver=qcow2,file.filename=disk.qcow2
  -s, --start-offset OFFSET
     where to begin (0)
  -l, --max-length LENGTH
     how much to look at (to the end)
  -U, --force-share
     open the image even if somebody else is writing to it
  --output human|json
     how to print (human)
  --object OBJDEF
     limits that driver=throttle names: throttle-group,id=NAME,x-iops-total=N and so on",
    run,
};

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Help,
    Format,
    Output,
    Object,
    ImageOpts,
    StartOffset,
    MaxLength,
    ForceShare,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::value(Id::Format, Some(b'f'), Some("format")),
    Opt::value(Id::Output, None, Some("output")),
    Opt::value(Id::Object, None, Some("object")),
    Opt::flag(Id::ImageOpts, None, Some("image-opts")),
    Opt::value(Id::StartOffset, Some(b's'), Some("start-offset")),
    Opt::value(Id::MaxLength, Some(b'l'), Some("max-length")),
    Opt::flag(Id::ForceShare, Some(b'U'), Some("force-share")),
];

fn run(call: &mut Call<'_>) -> Result<u8, Failure> {
    let mut getopt = call.options(OPTIONS);
    let (mut format, mut output) = (None, Format::Human);
    let (mut image_opts, mut force_share) = (false, false);
    let (mut start, mut max_length) = (0, u64::MAX);
    let size = |what: &str, value| size_argument(what, &text(value), 0, i64::MAX as u64);
    while let Some((id, value)) = getopt.next_option()? {
        match id {
            Id::Help => return Err(call.help()),
            Id::Format => format = Some(text(value)),
            Id::Output => output = Format::parse(&value.unwrap_or_default())?,
            Id::Object => call.define(value)?,
            Id::ImageOpts => image_opts = true,
            Id::StartOffset => start = size("start offset", value)?,
            Id::MaxLength => max_length = size("max length", value)?,
            Id::ForceShare => force_share = true,
        }
    }
    let image = one_image(getopt.operands())?;
    let naming = super::naming(image_opts, format.as_deref())?;
    let spec = super::image_spec(call, &image, naming)?;
    let access = Access {
        force_share,
        ..Access::READ
    };
    let session = call.session(Engine::Auto)?;
    let mut printer = Printer {
        out: call.out,
        format: output,
    };
    let range = (start, max_length);
    let result = session
        .home
        .run(|co| map_image(co, &session, &spec, access, range, &mut printer));
    session.close();
    result?;
    Ok(0)
}

fn map_image(
    co: &Co,
    session: &Session,
    spec: &ImageSpec,
    access: Access,
    (start, max_length): (u64, u64),
    printer: &mut Printer<'_>,
) -> Result<(), String> {
    let disk = Disk::open(co, session, spec, access)?;
    printer.begin();
    let end = disk.len.min(start.saturating_add(max_length));
    let mapped = map_range(co, &disk, start, end, printer);
    let closed = disk.close(co);
    mapped?;
    closed
}

/// Tells the extents of a range; of an empty one that it is empty.
fn map_range(
    co: &Co,
    disk: &Disk,
    start: u64,
    end: u64,
    printer: &mut Printer<'_>,
) -> Result<(), String> {
    let mut known = Extent::empty(start);
    while known.end() < end {
        let at = known.end();
        let status = disk
            .map(co, at, end - at)
            .map_err(|error| could_not_read(&error))?;
        let next = Extent::of(at, status);
        if known.goes_on(&next) {
            known.len += next.len;
            continue;
        }
        if known.len > 0 {
            printer.extent(&known, false)?;
        }
        known = next;
    }
    printer.extent(&known, true)
}

/// The reference's sentence; what the library says on a second line.
fn could_not_read(error: &block::Error) -> String {
    format!(
        "Could not read file metadata: {}\n{}",
        block::errno_text(error.errno()),
        explain(error)
    )
}

/// A range of which everything is true that the first byte's status says.
struct Extent {
    start: u64,
    len: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    place: Option<(Arc<Node>, u64)>,
}

impl Extent {
    fn empty(start: u64) -> Self {
        Self {
            start,
            len: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            place: None,
        }
    }

    fn of(start: u64, status: Status) -> Self {
        Self {
            start,
            len: status.len,
            depth: status.depth,
            present: status.allocated,
            zero: status.zero,
            data: status.data,
            compressed: status.compressed,
            place: status.place,
        }
    }

    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Are both one extent? An extent's neighbour is also its neighbour in the file.
    fn goes_on(&self, next: &Extent) -> bool {
        let side_by_side = match (&self.place, &next.place) {
            (None, None) => true,
            (Some((node, at)), Some((next_node, next_at))) => {
                Arc::ptr_eq(node, next_node) && at + self.len == *next_at
            }
            _ => false,
        };
        let kind = |e: &Extent| (e.depth, e.present, e.zero, e.data, e.compressed);
        self.len > 0 && side_by_side && kind(self) == kind(next)
    }
}

struct Printer<'a> {
    out: &'a mut Output,
    format: Format,
}

impl Printer<'_> {
    fn begin(&mut self) {
        match self.format {
            Format::Human => self.row("Offset", "Length", "Mapped to", "File"),
            Format::Json => self.out.text("["),
        }
    }

    /// Fails where a person would be told nothing: data that is not byte for byte in a file.
    fn extent(&mut self, extent: &Extent, is_last: bool) -> Result<(), String> {
        match self.format {
            Format::Human if extent.data && !extent.zero => {
                let Some((node, at)) = &extent.place else {
                    return Err("File contains external, encrypted or compressed clusters.".into());
                };
                let (start, len, at) = (hex(extent.start), hex(extent.len), hex(*at));
                self.row(&start, &len, &at, node.filename());
            }
            Format::Human => {}
            Format::Json => {
                let offset = match &extent.place {
                    Some((_, at)) => format!(", \"offset\": {at}"),
                    None => String::new(),
                };
                self.out.text(format!(
                    "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
                     \"data\": {}, \"compressed\": {}{offset}}}{}",
                    extent.start,
                    extent.len,
                    extent.depth,
                    extent.present,
                    extent.zero,
                    extent.data,
                    extent.compressed,
                    if is_last { "]\n" } else { ",\n" },
                ));
            }
        }
        Ok(())
    }

    fn row(&mut self, offset: &str, length: &str, mapped_to: &str, file: &str) {
        self.out
            .line(format!("{offset:<16}{length:<16}{mapped_to:<16}{file}"));
    }
}

/// As C prints it: zero has no prefix.
fn hex(value: u64) -> String {
    match value {
        0 => "0".into(),
        value => format!("{value:#x}"),
    }
}
