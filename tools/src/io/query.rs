//! `alloc`, `map`, `length`, `info`, `truncate`: what an image is, and how long.

use coblock::block::{self, BlockBackend, Preallocation};
use coblock::qcow2::image_file::ImageFile;
use coblock::qcow2::info::Info as Qcow2Info;

use super::Shell;
use super::args::{self, SECTOR};
use super::commands::{Call, Failure};
use super::open::{Image, is_about_corruption};
use super::report::size;
use super::request::{Letters, failed};
use crate::explain::{explain, explain_briefly};
use crate::getopt::Opt;
use crate::img::specific_lines;
use crate::spec::Access;

impl Image {
    /// Whether the image's own layer holds the first bytes of a range, and how many of them; none
    /// past the end.
    fn is_allocated(&self, offset: u64, len: u64) -> block::Result<(bool, u64)> {
        let backend = &self.backend;
        let home = &self.session.home;
        let (allocated, here) = home.run(|co| backend.is_allocated(co, offset, len))?;
        if here > 0 && offset + here == backend.len() {
            // The last sector counts as whole.
            return Ok((allocated, len.min(self.len() - offset)));
        }
        Ok((allocated, here))
    }
}

/// `alloc`
pub(super) fn alloc(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let start = args::bytes(&call.words[0])?;
    let count = call
        .words
        .get(1)
        .map_or(Ok(SECTOR), |word| args::bytes(word))?;
    let (mut seen, mut sum) = (0, 0);
    while seen < count {
        let status = shell.image().is_allocated(start + seen, count - seen);
        let (allocated, len) = status.map_err(|error| failed("is_allocated", &error))?;
        if len == 0 {
            break;
        }
        seen += len;
        if allocated {
            sum += len;
        }
    }
    let offset = size(start);
    shell.line(format!("{sum}/{seen} bytes allocated at offset {offset}"));
    Ok(())
}

/// `map`
pub(super) fn map(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    let end = known_len(shell.image()).map_err(|error| {
        Failure::Error(format!(
            "Failed to query image length: {}",
            block::errno_text(error.errno())
        ))
    })?;
    let mut at = 0;
    let mut next = None;
    while at < end {
        let (allocated, mut len) = match next.take() {
            Some(found) => found,
            None => status(shell.image(), at)?,
        };
        // One line for neighbours of one kind.
        while len > 0 && at + len < end {
            // What is wrong there is said when it is that part's turn.
            let Ok((also, more)) = status(shell.image(), at + len) else {
                break;
            };
            if also != allocated || more == 0 {
                next = Some((also, more));
                break;
            }
            len += more;
        }
        if len == 0 {
            return Err(Failure::Error("Unexpected end of image".into()));
        }
        shell.line(format!(
            "{} ({len:#x}) bytes {} allocated at offset {} ({at:#x})",
            size(len),
            if allocated { "   " } else { "not" },
            size(at)
        ));
        at += len;
    }
    Ok(())
}

fn status(image: &Image, at: u64) -> Result<(bool, u64), Failure> {
    image.is_allocated(at, image.len() - at).map_err(|error| {
        Failure::Error(format!(
            "Failed to get allocation status: {}",
            block::errno_text(error.errno())
        ))
    })
}

/// The length of an image that is still there: of one that turned out to be corrupt, nothing is
/// told any more.
fn known_len(image: &Image) -> block::Result<u64> {
    match image.is_allocated(0, SECTOR) {
        Err(error) if is_about_corruption(&error) => Err(error),
        _ => Ok(image.len()),
    }
}

/// `length`
pub(super) fn length(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    let len = known_len(shell.image()).map_err(|error| {
        Failure::Result(format!("getlength: {}", block::errno_text(error.errno())))
    })?;
    shell.line(size(len));
    Ok(())
}

/// `info`
pub(super) fn info(shell: &mut Shell<'_>, _: &Call<'_>) -> Result<(), Failure> {
    let image = shell.image();
    if known_len(image).is_err() {
        return Err(Failure::Told);
    }
    let driver = image.spec.driver().to_owned();
    let file = image.spec.keys.get("file.driver").map(str::to_owned);
    let qcow2 = match driver.as_str() {
        "qcow2" => Some(read_qcow2(image).map_err(|error| Failure::Error(explain(&error)))?),
        _ => None,
    };
    shell.line(format!("format name: {driver}"));
    if file.is_none() {
        // A protocol is told twice: it could be called by another name.
        shell.line(format!("format name: {driver}"));
    }
    if file.as_deref().unwrap_or(&driver) == "null-co" && qcow2.is_none() {
        return Err(Failure::Told);
    }
    let (cluster, vm_state) = qcow2.as_ref().map_or((0, 0), geometry);
    shell.line(format!("cluster size: {}", size(cluster)));
    shell.line(format!("vm state offset: {}", size(vm_state)));
    if let Some(info) = qcow2 {
        for line in specific_lines(&info) {
            shell.line(line);
        }
    }
    Ok(())
}

/// Bytes of a cluster, and where the state of a virtual machine would begin: behind the last table
/// that the disk needs.
fn geometry(info: &Qcow2Info) -> (u64, u64) {
    let cluster = info.cluster_size;
    let entry = if info.extended_l2 { 16 } else { 8 };
    let table_covers = cluster / entry * cluster;
    let tables = info.virtual_size.div_ceil(table_covers);
    (cluster, tables.saturating_mul(table_covers))
}

/// Reads what the header says, through a second look at the file that locks nothing.
fn read_qcow2(image: &Image) -> block::Result<Qcow2Info> {
    let access = Access {
        force_share: true,
        ..Access::READ
    };
    let session = &image.session;
    session.home.run(|co| {
        image.backend.flush(co)?;
        let node = session.open_node(co, image.spec.file_options(access))?;
        let file = BlockBackend::new(&session.graph, node);
        let info = image.spec.memory_limit().and_then(|limit| {
            let reader = ImageFile::of_backend(co, &file).with_memory_limit(limit);
            Qcow2Info::read(&reader)
        });
        let closed = file.close(co);
        let info = info?;
        closed?;
        Ok(info)
    })
}

const TRUNCATE: &[Opt<u8>] = &[Opt::value(b'm', Some(b'm'), None)];

/// `truncate`
pub(super) fn truncate(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let mut mode = Preallocation::Off;
    let letters = Letters::new(call, TRUNCATE, |_, value| {
        let named = Preallocation::NAMES.iter().find(|(name, _)| *name == value);
        let Some((_, named)) = named else {
            return Err(Failure::Error(format!(
                "Invalid preallocation mode '{value}'"
            )));
        };
        mode = *named;
        Ok(())
    })?;
    // What an error repeats is the first word, options moved to the front, as the reference has it.
    let first = call
        .words
        .iter()
        .find(|w| w.len() > 1 && w.starts_with('-'));
    let operand = letters.operands.first();
    let shown = first.or(operand).map_or("", String::as_str);
    let len = args::bytes_shown(operand.map_or("", String::as_str), shown)?;
    let image = shell.image();
    let backend = &image.backend;
    let result = image.session.home.run(|co| match mode {
        Preallocation::Off => backend.truncate(co, len, false),
        mode => backend.grow_preallocated(co, len, mode),
    });
    result.map_err(|error| {
        Failure::Error(if is_about_corruption(&error) {
            "No medium inserted".into()
        } else {
            explain_briefly(&error)
        })
    })
}
