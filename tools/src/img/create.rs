//! `create`: makes a new image.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use coblock::block::{self, BlockBackend, Options, RequestFlags};
use coblock::coroutine::Co;
use coblock::qcow2::create::{self as qcow2_create, Preallocation};
use coblock::qcow2::header::CompressionType;
use coblock::qcow2::image_file::ImageFile;
use coblock::qcow2::types::Version;

use super::create_options::{CreateOptions, FILE, QCOW2, RAW};
use super::{Call, Command, Failure, text};
use crate::explain::explain;
use crate::getopt::Opt;
use crate::image_opts;
use crate::open::{Engine, Session};
use crate::output::{os_message, with_name};
use crate::size::size_argument;
use crate::spec::{Access, ImageSpec, Naming, protocol};

pub(super) const COMMAND: Command = Command {
    word: "create",
    about: "Create a new image",
    usage: "create [-f FMT] [-o OPTIONS] [-b BACKING_FILE [-F BACKING_FMT]] [-u] [-q]
        FILENAME [SIZE[bkKMGTPE]]

  -h, --help
     print this help and exit
  -q, --quiet
     print errors only
  -f, --format FMT
     format of the new image (raw)
  -o, --options OPTIONS
     options of the format, like cluster_size=4k,compat=v3 (-o help lists them)
  -b, --backing BACKING_FILE
     the image that is read where the new one holds nothing
  -F, --backing-format BACKING_FMT
     its format
  -u, --backing-unsafe
     do not look at the backing file
  --object OBJDEF
     limits that driver=throttle names: throttle-group,id=NAME,x-iops-total=N and so on
  SIZE
     size of the disk; without it that of the backing file",
    run,
};

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Help,
    Quiet,
    Object,
    Format,
    Backing,
    BackingFormat,
    BackingUnsafe,
    Options,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::flag(Id::Quiet, Some(b'q'), Some("quiet")),
    Opt::value(Id::Object, None, Some("object")),
    Opt::value(Id::Format, Some(b'f'), Some("format")),
    Opt::value(Id::Backing, Some(b'b'), Some("backing")),
    Opt::value(Id::BackingFormat, Some(b'F'), Some("backing-format")),
    Opt::flag(Id::BackingUnsafe, Some(b'u'), Some("backing-unsafe")),
    Opt::value(Id::Options, Some(b'o'), Some("options")),
];

/// What the command line says.
#[derive(Default)]
struct Given {
    format: String,
    options: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    backing_unsafe: bool,
    quiet: bool,
    size: Option<u64>,
}

fn run(call: &mut Call<'_>) -> Result<u8, Failure> {
    let mut getopt = call.options(OPTIONS);
    let mut given = Given {
        format: "raw".into(),
        ..Given::default()
    };
    while let Some((id, value)) = getopt.next_option()? {
        match id {
            Id::Help => return Err(call.help()),
            Id::Quiet => given.quiet = true,
            Id::Object => call.define(value)?,
            Id::Format => given.format = text(value),
            Id::Backing => given.backing = Some(text(value)),
            Id::BackingFormat => given.backing_format = Some(text(value)),
            Id::BackingUnsafe => given.backing_unsafe = true,
            Id::Options => {
                let list = text(value);
                if !image_opts::is_valid_list(&list) {
                    return Err(format!("Invalid option list: {list}").into());
                }
                given.options = Some(match given.options.take() {
                    Some(before) => format!("{before},{list}"),
                    None => list,
                });
            }
        }
    }
    let mut operands = getopt.operands().into_iter();
    let filename = operands.next();
    if given
        .options
        .as_deref()
        .is_some_and(image_opts::asks_for_help)
    {
        return help(call, &given.format, filename);
    }
    let Some(filename) = filename else {
        return Err(Failure::Usage(b"Expecting image file name".to_vec()));
    };
    if let Some(size) = operands.next() {
        let size = text(Some(size));
        given.size = Some(size_argument("image size", &size, 0, i64::MAX as u64)?);
    }
    if let Some(extra) = operands.next() {
        return Err(Failure::Usage(with_name(
            "Unexpected argument: ",
            &extra,
            "",
        )));
    }
    let Some(filename) = filename.to_str() else {
        return Err(with_name("the name is not UTF-8: ", &filename, "").into());
    };
    create(call, filename, &given)
        .map_err(|why| Failure::Failed(format!("{filename}: {why}").into_bytes()))?;
    Ok(0)
}

/// Formats that can be made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Raw,
    Qcow2,
}

fn made(format: &str) -> Result<Made, String> {
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

fn help(call: &mut Call<'_>, format: &str, filename: Option<OsString>) -> Result<u8, Failure> {
    let own = match made(format)? {
        Made::Qcow2 => QCOW2,
        Made::Raw if format == "file" => FILE,
        Made::Raw => RAW,
    };
    match filename {
        Some(filename) => {
            protocol(&filename.to_string_lossy())?;
            let options = CreateOptions::new(own, FILE);
            call.out
                .line(format!("Supported options:\n{}", options.help()));
        }
        None => {
            let options = CreateOptions::new(own, &[]);
            call.out.line(format!(
                "Supported {format} options:\n{}\n\n\
                 The protocol level may support further options.\n\
                 Specify the target filename to include those options.",
                options.help()
            ));
        }
    }
    Ok(0)
}

fn create(call: &mut Call<'_>, filename: &str, given: &Given) -> Result<(), String> {
    let format = made(&given.format)?;
    let (below, path) = protocol(filename)?;
    if below != "file" {
        return Err(format!(
            "Protocol driver '{below}' does not support image creation"
        ));
    }
    let own = if format == Made::Qcow2 { QCOW2 } else { RAW };
    let mut options = CreateOptions::new(own, FILE);
    if let Some(list) = &given.options {
        options.parse(list)?;
    }
    if let Some(size) = given.size {
        if options.number("size").is_some() {
            return Err("The image size must be specified only once".into());
        }
        options.set("size", &size.to_string())?;
    }
    for (key, value, what) in [
        ("backing_file", &given.backing, "Backing file"),
        ("backing_fmt", &given.backing_format, "Backing file format"),
    ] {
        if let Some(value) = value {
            if !options.has(key) {
                return Err(format!(
                    "{what} not supported for file format '{}'",
                    given.format
                ));
            }
            options.set(key, value)?;
        }
    }
    let session = call.session(Engine::Auto)?;
    let result = look_at_backing(&session, filename, given, &mut options).and_then(|()| {
        if options.number("size").is_none_or(|size| size == u64::MAX) {
            return Err("Image creation needs a size parameter".into());
        }
        if !given.quiet {
            let line = format!(
                "Formatting '{filename}', fmt={}{}",
                given.format,
                options.print()
            );
            call.out.line(line);
            call.out.flush();
        }
        make(&session, format, &given.format, path, &options)
    });
    session.close();
    result
}

/// Checks the backing file, and takes the size from it.
fn look_at_backing(
    session: &Session,
    filename: &str,
    given: &Given,
    options: &mut CreateOptions,
) -> Result<(), String> {
    let Some(backing) = options.text("backing_file").map(str::to_owned) else {
        return Ok(());
    };
    let format = options.text("backing_fmt").map(str::to_owned);
    if backing.is_empty() {
        return Err("Expected backing file name, got empty string".into());
    }
    if backing == filename {
        return Err(
            "Error: Trying to create an image with the same filename as the backing file".into(),
        );
    }
    if given.backing_unsafe {
        return match format {
            None => Err("Backing file specified without backing format".into()),
            Some(_) => Ok(()),
        };
    }
    let failed = |why: String| format!("{why}\nCould not open backing image.");
    // The name is the user's own, so it may be anything that a command line takes; a path is
    // relative to the new image.
    let from_here = match protocol(&backing) {
        Ok(("file", path)) if path == backing && !path.starts_with('/') => {
            let directory = Path::new(filename).parent().unwrap_or(Path::new(""));
            directory.join(path).to_string_lossy().into_owned()
        }
        _ => backing,
    };
    let naming = Naming {
        image_opts: false,
        format: format.as_deref(),
    };
    let spec = ImageSpec::new(from_here.as_ref(), naming).map_err(failed)?;
    let len = session.home.run(|co| {
        let backend = session.open(co, &spec, Access::READ)?;
        let len = backend.len();
        backend.close(co)?;
        Ok(len)
    });
    let len = len.map_err(|error: block::Error| failed(explain(&error)))?;
    if format.is_none() {
        return Err(format!(
            "Backing file specified without backing format\nDetected format of {}.",
            spec.driver()
        ));
    }
    if options.number("size").is_none() {
        let whole_sectors = len.checked_next_multiple_of(512).unwrap_or(len);
        options.set("size", &whole_sectors.to_string())?;
    }
    Ok(())
}

/// How much is allocated from the start.
fn preallocation(options: &CreateOptions, format: Made) -> Result<Preallocation, String> {
    match options.text("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some("metadata") if format == Made::Qcow2 => Ok(Preallocation::Metadata),
        Some("metadata") => Err("Unsupported preallocation mode: metadata".into()),
        Some(mode) if format == Made::Qcow2 => Err(format!(
            "Parameter 'preallocation' does not accept value '{mode}'"
        )),
        Some(mode) => Err(format!("invalid parameter value: {mode}")),
    }
}

/// All that can be wrong with the options of a qcow2 image, before any file is touched.
fn qcow2_options(options: &CreateOptions) -> Result<qcow2_create::CreateOptions, String> {
    let size = options.number("size").unwrap_or(0);
    let mut out = qcow2_create::CreateOptions::new(size);
    out.version = match options.text("compat") {
        None | Some("v3" | "1.1") => Version::V3,
        Some("v2" | "0.10") => Version::V2,
        Some(other) => {
            return Err(format!(
                "Parameter 'version' does not accept value '{other}'"
            ));
        }
    };
    out.preallocation = preallocation(options, Made::Qcow2)?;
    out.compression = match options.text("compression_type") {
        None | Some("zlib") => CompressionType::Zlib,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => {
            return Err(format!(
                "Parameter 'compression-type' does not accept value '{other}'"
            ));
        }
    };
    out.cluster_size = options.number("cluster_size").unwrap_or(out.cluster_size);
    out.refcount_bits = options.number("refcount_bits").unwrap_or(out.refcount_bits);
    out.lazy_refcounts = options.switch("lazy_refcounts");
    out.backing_file = options
        .text("backing_file")
        .map(|name| name.as_bytes().to_vec());
    out.backing_format = options
        .text("backing_fmt")
        .map(|name| name.as_bytes().to_vec());
    refuse_encryption(options)?;
    if options
        .text("backing_fmt")
        .is_some_and(|f| !super::FORMATS.split(' ').any(|w| w == f))
    {
        let format = options.text("backing_fmt").unwrap_or("");
        return Err(format!(
            "Parameter 'backing-fmt' does not accept value '{format}'"
        ));
    }
    if options.switch("data_file_raw") && options.text("data_file").is_none() {
        return Err("data-file-raw requires data-file".into());
    }
    let v2 = out.version == Version::V2;
    if options.text("data_file").is_some() && v2 {
        return Err(
            "External data files are only supported with compatibility level 1.1 and above \
                    (use version=v3 or greater)"
                .into(),
        );
    }
    if options.switch("extended_l2") {
        if v2 {
            return Err(
                "Extended L2 entries are only supported with compatibility level 1.1 and \
                        above (use version=v3 or greater)"
                    .into(),
            );
        }
        if out.cluster_size < 16384 {
            return Err(
                "Extended L2 entries are only supported with cluster sizes of at least \
                        16384 bytes"
                    .into(),
            );
        }
    }
    let refused = [
        ("data_file", options.text("data_file").is_some()),
        ("extended_l2", options.switch("extended_l2")),
    ];
    for (key, _) in refused.iter().filter(|(_, given)| *given) {
        if let Some(error) = qcow2_create::CreateOptions::refusal(key) {
            return Err(format!("{key}: {error}"));
        }
    }
    if out.backing_file.is_some() && out.preallocation != Preallocation::Off {
        return Err(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
                .into(),
        );
    }
    out.geometry().map_err(|error| error.to_string())?;
    Ok(out)
}

/// Encrypted images cannot be made; wrong words are told first, as by the reference.
fn refuse_encryption(options: &CreateOptions) -> Result<(), String> {
    let asked = [
        "encrypt.format",
        "encrypt.key-secret",
        "encrypt.cipher-alg",
        "encrypt.cipher-mode",
        "encrypt.ivgen-alg",
        "encrypt.ivgen-hash-alg",
        "encrypt.hash-alg",
    ];
    let any = asked.iter().find(|key| options.text(key).is_some());
    let number = options
        .number("encrypt.iter-time")
        .map(|_| &"encrypt.iter-time");
    let on = options.switch("encryption").then_some(&"encryption");
    match options.text("encrypt.format") {
        Some("aes" | "luks") | None => {}
        Some(other) => {
            return Err(format!(
                "Parameter 'format' does not accept value '{other}'"
            ));
        }
    }
    match any.or(number).or(on) {
        None => Ok(()),
        Some(key) => Err(match qcow2_create::CreateOptions::refusal(key) {
            Some(error) => format!("{key}: {error}"),
            None => format!("{key} is not supported"),
        }),
    }
}

/// Makes the file and what is in it.
fn make(
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
