//! `check`: is the metadata of an image consistent?
//!
//! Reads only. The words of a finding are the library's, which follow the reference; exit codes are
//! 0 (clean), 1 (could not be checked), 2 (corruptions), 3 (leaks) and 63 (the format has nothing
//! to check).

use std::fmt;

use coblock::block::{self, BlockBackend};
use coblock::coroutine::Co;
use coblock::qcow2::check::{self, CheckReport, Event, Finding};
use coblock::qcow2::image_file::ImageFile;

use super::{Call, Command, Failure, Format, one_image, text};
use crate::explain::{explain, qcow2_error};
use crate::getopt::Opt;
use crate::json::Json;
use crate::open::{Engine, Session};
use crate::output::{Output, with_name};
use crate::spec::{Access, Cache, ImageSpec};

pub(super) const COMMAND: Command = Command {
    word: "check",
    about: "Check the consistency of an image",
    usage: "check [-f FMT | --image-opts] [-T CACHE_MODE] [-U] [-q] [--output human|json] FILENAME

  -h, --help
     print this help and exit
  -q, --quiet
     print errors only
  -f, --format FMT
     format of the image; without it the first bytes decide
  --image-opts
     FILENAME is a list of options, like driver=qcow2,file.filename=disk.qcow2
  -T, --cache CACHE_MODE
     none, writeback, writethrough, directsync or unsafe (writeback)
  -U, --force-share
     open the image even if somebody else is writing to it
  --output human|json
     how to print (human)
  -r, --repair leaks|all
     refused: repair is not available
  --object OBJDEF
     limits that driver=throttle names: throttle-group,id=NAME,x-iops-total=N and so on",
    run,
};

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Help,
    Quiet,
    Format,
    Cache,
    Repair,
    Output,
    Object,
    ImageOpts,
    ForceShare,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::flag(Id::Quiet, Some(b'q'), Some("quiet")),
    Opt::value(Id::Format, Some(b'f'), Some("format")),
    Opt::value(Id::Cache, Some(b'T'), Some("cache")),
    Opt::value(Id::Repair, Some(b'r'), Some("repair")),
    Opt::value(Id::Output, None, Some("output")),
    Opt::value(Id::Object, None, Some("object")),
    Opt::flag(Id::ImageOpts, None, Some("image-opts")),
    Opt::flag(Id::ForceShare, Some(b'U'), Some("force-share")),
];

/// Most lines for one finding that counts many times: an image must not decide how long we print.
const REPEATS_MAX: u64 = 1000;

/// Most lines for all findings together, for the same reason.
const LINES_MAX: u64 = 10_000;

/// Most findings that are kept to be printed in the reference's order; more are printed as they
/// come.
const LATE_MAX: usize = 10_000;

/// The format has nothing to check.
const NOT_SUPPORTED: u8 = 63;

fn run(call: &mut Call<'_>) -> Result<u8, Failure> {
    let mut getopt = call.options(OPTIONS);
    let (mut format, mut output, mut cache) = (None, Format::Human, None);
    let (mut quiet, mut image_opts, mut force_share, mut repair) = (false, false, false, false);
    while let Some((id, value)) = getopt.next_option()? {
        let value = value.unwrap_or_default();
        match id {
            Id::Help => return Err(call.help()),
            Id::Quiet => quiet = true,
            Id::Format => format = Some(text(Some(value))),
            Id::Cache => cache = Some(value),
            Id::Repair if value == "leaks" || value == "all" => repair = true,
            Id::Repair => {
                let problem = "--repair (-r) expects 'leaks' or 'all' not '";
                return Err(Failure::Usage(with_name(problem, &value, "'")));
            }
            Id::Output => output = Format::parse(&value)?,
            Id::Object => call.define(Some(value))?,
            Id::ImageOpts => image_opts = true,
            Id::ForceShare => force_share = true,
        }
    }
    let image = one_image(getopt.operands())?;
    let naming = super::naming(image_opts, format.as_deref())?;
    let cache = match cache {
        None => Cache::Writeback,
        Some(word) => Cache::parse(&word)
            .ok_or_else(|| with_name("Invalid source cache option: ", &word, ""))?,
    };
    if repair {
        return Err("--repair (-r) is not available: images are only read"
            .to_owned()
            .into());
    }
    let spec = super::image_spec(call, &image, naming)?;
    let session = call.session(Engine::Auto)?;
    let access = Access {
        force_share,
        cache,
        ..Access::READ
    };
    let out = &*call.out;
    let result = session
        .home
        .run(|co| check_image(co, &session, &spec, access, out));
    session.close();
    let report = result?;
    match output {
        Format::Human if quiet => {}
        Format::Human => {
            for line in human(&report) {
                call.out.line(line);
            }
        }
        Format::Json => {
            call.out
                .line(json(&report, &spec.shown, spec.driver()).pretty());
        }
    }
    if report.check_errors > 0 {
        call.out.error("Check failed");
    }
    Ok(status(&report))
}

/// Checks one image, and prints each finding.
fn check_image(
    co: &Co,
    session: &Session,
    spec: &ImageSpec,
    access: Access,
    out: &Output,
) -> Result<CheckReport, Failure> {
    let qcow2 = spec.driver() == "qcow2";
    match session.open(co, spec, access) {
        Ok(backend) => backend
            .close(co)
            .map_err(|error| spec.could_not_open(&error))?,
        // The format's driver refuses damaged images; these are what a check is for.
        Err(error) if qcow2 && qcow2_error(&error).is_some() => {}
        Err(error) => return Err(spec.could_not_open(&error).into()),
    }
    if !qcow2 {
        let message = b"This image format does not support checks".to_vec();
        return Err(Failure::Status(NOT_SUPPORTED, message));
    }
    let node = session
        .open_node(co, spec.file_options(access))
        .map_err(|error| spec.could_not_open(&error))?;
    let file = BlockBackend::new(&session.graph, node);
    let result = check_file(co, &file, spec, out);
    let closed = file.close(co);
    let report = result.map_err(|error| spec.could_not_open(&error))?;
    closed.map_err(|error| explain(&error))?;
    Ok(report)
}

fn check_file(
    co: &Co,
    file: &BlockBackend,
    spec: &ImageSpec,
    out: &Output,
) -> block::Result<CheckReport> {
    let image = ImageFile::of_backend(co, file).with_memory_limit(spec.memory_limit()?);
    let header = image.read_header()?;
    let mut late = Vec::new();
    let mut printer = Printer {
        out,
        lines: 0,
        left_out: 0,
    };
    let mut event = |event: Event<'_>| {
        if let Event::Finding { finding, times } = event {
            // The reference compares these flags in a pass of its own, at the end; we see them on
            // the way.
            let is_late = matches!(finding, Finding::L1Copied { .. } | Finding::L2Copied { .. });
            if is_late && late.len() < LATE_MAX {
                late.push((finding.to_string(), times));
            } else {
                printer.finding(finding, times);
            }
        }
    };
    let result = check::check(&image, &header, &mut event);
    for (line, times) in late {
        printer.finding(line, times);
    }
    if printer.left_out > 0 {
        out.note(format!("({} findings more)", printer.left_out));
    }
    result
}

/// Prints findings, not more of them than somebody may read.
struct Printer<'a> {
    out: &'a Output,
    lines: u64,
    /// Findings that were not printed.
    left_out: u64,
}

impl Printer<'_> {
    fn finding(&mut self, finding: impl fmt::Display, times: u64) {
        let most = REPEATS_MAX.min(LINES_MAX.saturating_sub(self.lines));
        if most == 0 {
            self.left_out = self.left_out.saturating_add(times);
            return;
        }
        let line = finding.to_string();
        for _ in 0..times.min(most) {
            self.out.note(&line);
        }
        self.lines += times.min(most);
        if times > most {
            let more = times - most;
            self.out.note(format!("(the same {more} times more)"));
        }
    }
}

fn status(report: &CheckReport) -> u8 {
    match report {
        r if r.check_errors > 0 => 1,
        r if r.corruptions > 0 => 2,
        r if r.leaks > 0 => 3,
        _ => 0,
    }
}

fn human(report: &CheckReport) -> Vec<String> {
    let mut out = Vec::new();
    if report.is_clean() {
        out.push("No errors were found on the image.".to_owned());
    }
    if report.corruptions > 0 {
        out.push(format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        out.push(format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.",
            report.leaks
        ));
    }
    if report.check_errors > 0 {
        out.push(format!(
            "\n{} internal errors have occurred during the check.",
            report.check_errors
        ));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let allocated = report.allocated_clusters;
        out.push(format!(
            "{allocated}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.total_clusters,
            percent(allocated, report.total_clusters),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    if report.image_end_offset > 0 {
        out.push(format!("Image end offset: {}", report.image_end_offset));
    }
    out
}

#[expect(clippy::cast_precision_loss, reason = "two decimals are printed")]
fn percent(part: u64, of: u64) -> f64 {
    part as f64 * 100.0 / of as f64
}

/// In the order of the reference, which leaves out what is zero.
fn json(report: &CheckReport, filename: &str, format: &str) -> Json {
    let mut members = Vec::new();
    let mut number = |key: &'static str, value: u64, always: bool| {
        if value > 0 || always {
            members.push((key, Json::from(value)));
        }
    };
    number("image-end-offset", report.image_end_offset, false);
    number("compressed-clusters", report.compressed_clusters, false);
    number("total-clusters", report.total_clusters, false);
    number("corruptions", report.corruptions, false);
    number("check-errors", report.check_errors, true);
    number("leaks", report.leaks, false);
    number("allocated-clusters", report.allocated_clusters, false);
    members.extend([
        ("filename", Json::from(filename)),
        ("format", Json::from(format)),
    ]);
    if report.fragmented_clusters > 0 {
        members.push(("fragmented-clusters", report.fragmented_clusters.into()));
    }
    Json::object(members)
}
