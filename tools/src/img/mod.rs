//! `coblock img`: the commands of `qemu-img` 10.0.2 that we have, with its options, output and exit
//! codes.
//!
//! `docs/compat.md` says option by option what is there and what is refused.

mod bench;
mod check;
mod compare;
mod create;
mod create_options;
mod disk;
mod info;
mod info_print;
mod luks;
mod map;
mod progress;

pub use create::{make_image, make_overlay};
pub use info_print::specific_lines;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use crate::getopt::{Getopt, Opt, Order, UsageError};
use crate::objects::{Next, Objects};
use crate::open::{Engine, Session};
use crate::output::{FAILURE, Output, with_name};
use crate::spec::{ImageSpec, Naming, could_not_open};
use crate::standard::{self, FORMATS, trace, version_line};

/// A command: its word, what it does, its body.
struct Command {
    word: &'static str,
    about: &'static str,
    usage: &'static str,
    run: fn(&mut Call<'_>) -> Result<u8, Failure>,
}

const COMMANDS: [Command; 6] = [
    bench::COMMAND,
    check::COMMAND,
    compare::COMMAND,
    create::COMMAND,
    info::COMMAND,
    map::COMMAND,
];

/// Commands of the reference that we do not have; calling one is told apart from a typing error.
const ABSENT: [&str; 9] = [
    "amend", "bitmap", "commit", "convert", "dd", "measure", "rebase", "resize", "snapshot",
];

/// One call of a command.
struct Call<'a> {
    /// Words behind the command's.
    words: Vec<OsString>,
    out: &'a mut Output,
    command: &'static Command,
    /// What the command line defined.
    objects: Objects,
}

/// Why a command ends early.
enum Failure {
    /// The command line is wrong: the message, then where to find help.
    Usage(Vec<u8>),
    /// As [`Failure::Usage`], the message beginning with the command's word too: it came from the
    /// option parser.
    Option(UsageError),
    /// Something else: the message.
    Failed(Vec<u8>),
    /// Another exit code: the message.
    Status(u8, Vec<u8>),
    /// Nothing is wrong: help was asked for and given.
    Done,
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Self::Option(error)
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Failed(message.into_bytes())
    }
}

impl From<Vec<u8>> for Failure {
    fn from(message: Vec<u8>) -> Self {
        Self::Failed(message)
    }
}

/// Options that every command has; each has its own table around them.
#[derive(Clone, Copy, PartialEq)]
enum Top {
    Help,
    Version,
    Trace,
}

const TOP: &[Opt<Top>] = &[
    Opt::flag(Top::Help, Some(b'h'), Some("help")),
    Opt::flag(Top::Version, Some(b'V'), Some("version")),
    Opt::value(Top::Trace, Some(b'T'), Some("trace")),
];

/// Runs the command line behind the program's name; the status to exit with.
pub fn run(words: Vec<OsString>, out: &mut Output) -> u8 {
    let mut getopt = Getopt::new(TOP, Order::StopAtOperand, words);
    loop {
        match getopt.next_option() {
            Ok(None) => break,
            Ok(Some((Top::Help, _))) => return help(out),
            Ok(Some((Top::Version, _))) => return version(out),
            Ok(Some((Top::Trace, value))) => {
                if let Err(message) = trace(&value.unwrap_or_default(), out) {
                    out.error(message);
                    return FAILURE;
                }
            }
            Err(error) => {
                out.error(error.message());
                return try_help(out, "");
            }
        }
    }
    let mut words = getopt.operands().into_iter();
    let Some(word) = words.next() else {
        out.error("Not enough arguments");
        return try_help(out, "");
    };
    let Some(command) = COMMANDS.iter().find(|c| word == c.word) else {
        let absent = ABSENT.iter().any(|&w| word == w);
        let problem = if absent {
            "Command not available: "
        } else {
            "Command not found: "
        };
        out.error(with_name(problem, &word, ""));
        return try_help(out, "");
    };
    let mut call = Call {
        words: words.collect(),
        out,
        command,
        objects: Objects::default(),
    };
    let result = (command.run)(&mut call);
    let out = call.out;
    match result {
        Ok(status) => status,
        Err(Failure::Done) => 0,
        Err(Failure::Failed(message)) => {
            out.error(message);
            FAILURE
        }
        Err(Failure::Status(status, message)) => {
            out.error(message);
            status
        }
        Err(Failure::Usage(message)) => {
            out.error(message);
            try_help(out, command.word)
        }
        Err(Failure::Option(error)) => {
            let start = format!("{} {}: ", out.name(), command.word);
            out.note([start.as_bytes(), &error.message()].concat());
            try_help(out, command.word)
        }
    }
}

fn try_help(out: &Output, word: &str) -> u8 {
    let space = if word.is_empty() { "" } else { " " };
    out.note(format!(
        "Try '{}{space}{word} --help' for more info",
        out.name()
    ));
    FAILURE
}

fn version(out: &mut Output) -> u8 {
    out.line(version_line(out.name()));
    0
}

fn help(out: &mut Output) -> u8 {
    let name = out.name().to_owned();
    let mut text = format!(
        "{}\n\
         Works on disk images. Usage:\n\n  \
         {name} [standard options] COMMAND [--help | command options]\n\n\
         Standard options:\n  \
         -h, --help\n     print this help and exit\n  \
         -V, --version\n     print the version and exit\n  \
         -T, --trace PATTERN\n     accepted for compatibility: there are no trace events\n\n\
         Commands ({name} COMMAND --help tells their options):\n\n",
        version_line(&name)
    );
    for command in &COMMANDS {
        text.push_str(&format!("  {} - {}\n", command.word, command.about));
    }
    text.push_str(&format!("\nSupported formats: {FORMATS}"));
    out.line(text);
    0
}

impl Call<'_> {
    /// A parser of this call's options.
    fn options<T: Copy + PartialEq>(&mut self, table: &'static [Opt<T>]) -> Getopt<'static, T> {
        Getopt::new(table, Order::Permute, std::mem::take(&mut self.words))
    }

    /// Prints the command's usage.
    fn help(&mut self) -> Failure {
        let name = self.out.name();
        let usage = self.command.usage.replace("{name}", name);
        let text = format!("{}. Usage:\n\n  {name} {usage}", self.command.about);
        self.out.line(text);
        Failure::Done
    }
}

/// The only operand.
fn one_image(operands: Vec<OsString>) -> Result<OsString, Failure> {
    <[OsString; 1]>::try_from(operands)
        .map(|[image]| image)
        .map_err(|_| Failure::Usage(b"Expecting one image file name".to_vec()))
}

impl Call<'_> {
    /// `--object`.
    ///
    /// # Errors
    /// The reference's sentence; [`Failure::Done`] after help.
    fn define(&mut self, value: Option<OsString>) -> Result<(), Failure> {
        match self.objects.define(&value.unwrap_or_default(), self.out) {
            Ok(Next::GoOn) => Ok(()),
            Ok(Next::End) => Err(Failure::Done),
            Err(message) => Err(message.into()),
        }
    }

    /// A graph for the images of the command, which finds its objects.
    fn session(&self, engine: Engine) -> Result<Session, String> {
        let session = Session::new(engine)?;
        self.objects.add_to(&session.graph);
        Ok(session)
    }
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Format {
    #[default]
    Human,
    Json,
}

impl Format {
    fn parse(value: &OsStr) -> Result<Self, Failure> {
        match value.as_bytes() {
            b"human" => Ok(Self::Human),
            b"json" => Ok(Self::Json),
            _ => Err(Failure::Usage(with_name(
                "--output expects 'human' or 'json' not '",
                value,
                "'",
            ))),
        }
    }
}

/// A value that must be text, because it is compared with names.
fn text(value: Option<OsString>) -> String {
    value.unwrap_or_default().to_string_lossy().into_owned()
}

/// How the image is named.
fn naming(image_opts: bool, format: Option<&str>) -> Result<Naming<'_>, Failure> {
    if image_opts && format.is_some() {
        return Err("--image-opts and --format are mutually exclusive"
            .to_owned()
            .into());
    }
    Ok(Naming { image_opts, format })
}

/// Reads what the user called the image, with the reference's warnings.
fn image_spec(call: &Call<'_>, image: &OsStr, naming: Naming<'_>) -> Result<ImageSpec, Failure> {
    if naming.image_opts {
        let pairs = crate::image_opts::Pairs::parse(&image.to_string_lossy(), Some("file"));
        standard::warn_switches(&pairs, call.out);
    }
    let spec = ImageSpec::new(image, naming)
        .map_err(|why| could_not_open(&image.to_string_lossy(), &why))?;
    if spec.empty_backing {
        let instead = "Use of \"backing\": \"\" is deprecated; use \"backing\": null instead";
        call.out.warning(instead);
    }
    Ok(spec)
}
