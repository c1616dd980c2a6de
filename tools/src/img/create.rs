//! `create`: makes a new image. Here is what the command line says, and the look at the backing file;
//! `checked` has what can be wrong with options, `make` the making.

mod checked;
mod make;

pub use make::{make_image, make_overlay};

use std::ffi::OsString;
use std::path::Path;

use coblock::block;

use super::create_options::{CreateOptions, FILE, QCOW2, RAW};
use super::{Call, Command, Failure, text};
use crate::explain::explain;
use crate::getopt::Opt;
use crate::image_opts;
use crate::open::{Engine, Session};
use crate::output::with_name;
use crate::size::size_argument;
use crate::spec::{Access, ImageSpec, Naming, protocol};
use make::{Made, made, make};

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
