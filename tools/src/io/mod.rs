//! `coblock io`: the commands of `qemu-io` 10.0.2 that we have, with its options, output and exit
//! codes.
//!
//! ```text
//!   mod        options of the program; -c one after the other, or lines from standard input
//!   commands   names, words, needs, help
//!   request    read, readv, write, writev, discard, flush: one at a time
//!   aio        aio_read, aio_write, aio_flush: many at a time, results as they come
//!   query      alloc, map, length, info, truncate
//!   open       open, close
//!   reopen     reopen
//!   control    sleep, sigraise, abort, quit; what no image of ours can
//!   args       numbers, patterns, buffers
//!   report     what results look like
//! ```
//! `docs/compat.md` says option by option what is there and what is refused.

mod aio;
mod args;
mod commands;
mod control;
mod input;
mod open;
mod query;
mod reopen;
mod report;
mod request;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use commands::{Command, Failure};
use open::{Image, OpenWith};

use crate::getopt::{Getopt, Opt, Order};
use crate::objects::{Next, Objects};
use crate::output::{FAILURE, Output};
use crate::standard;

#[derive(Clone, Copy, PartialEq)]
enum Id {
    Object,
    ImageOpts,
    Command,
    Format,
    ReadOnly,
    Snapshot,
    NoCache,
    CopyOnRead,
    Misalign,
    NativeAio,
    Aio,
    Cache,
    Discard,
    Trace,
    ForceShare,
    Help,
    Version,
}

const OPTIONS: &[Opt<Id>] = &[
    Opt::flag(Id::Help, Some(b'h'), Some("help")),
    Opt::flag(Id::Version, Some(b'V'), Some("version")),
    Opt::value(Id::Command, Some(b'c'), Some("cmd")),
    Opt::value(Id::Format, Some(b'f'), Some("format")),
    Opt::flag(Id::ReadOnly, Some(b'r'), Some("read-only")),
    Opt::flag(Id::Snapshot, Some(b's'), Some("snapshot")),
    Opt::flag(Id::NoCache, Some(b'n'), Some("nocache")),
    Opt::flag(Id::CopyOnRead, Some(b'C'), Some("copy-on-read")),
    Opt::flag(Id::Misalign, Some(b'm'), Some("misalign")),
    Opt::flag(Id::NativeAio, Some(b'k'), Some("native-aio")),
    Opt::value(Id::Aio, Some(b'i'), Some("aio")),
    Opt::value(Id::Discard, Some(b'd'), Some("discard")),
    Opt::value(Id::Cache, Some(b't'), Some("cache")),
    Opt::value(Id::Trace, Some(b'T'), Some("trace")),
    Opt::flag(Id::ForceShare, Some(b'U'), Some("force-share")),
    Opt::value(Id::Object, None, Some("object")),
    Opt::flag(Id::ImageOpts, None, Some("image-opts")),
];

/// What commands work on.
struct Shell<'o> {
    out: &'o mut Output,
    image: Option<Image>,
    /// What `--object` defined, for all images.
    objects: Objects,
    /// Results of requests that run beside the commands, not yet printed.
    results: aio::Results,
    /// How every image is named.
    image_opts: bool,
    /// Buffers lie where direct I/O does not want them.
    misalign: bool,
    quit: bool,
}

/// Runs the command line behind the program's name, which the user wrote as `called`; the status to
/// exit with.
pub fn run(words: Vec<OsString>, called: &str, out: &mut Output) -> u8 {
    let mut getopt = Getopt::new(OPTIONS, Order::Permute, words);
    let mut with = OpenWith::default();
    let (mut misalign, mut image_opts, mut format) = (false, false, None);
    let mut commands = Vec::new();
    let mut definitions = Vec::new();
    let mut objects = Objects::default();
    loop {
        let (id, value) = match getopt.next_option() {
            Ok(None) => break,
            Ok(Some((id, value))) => (id, value.unwrap_or_default()),
            Err(error) => {
                out.note([called.as_bytes(), b": ", &error.message()].concat());
                return usage(out, FAILURE);
            }
        };
        let done = match id {
            Id::Help => return usage(out, 0),
            Id::Version => {
                out.line(standard::version_line(out.name()));
                return 0;
            }
            Id::Command => {
                commands.push(value);
                Ok(())
            }
            Id::Format => {
                format = Some(value.to_string_lossy().into_owned());
                Ok(())
            }
            Id::ImageOpts => {
                image_opts = true;
                Ok(())
            }
            Id::Misalign => {
                misalign = true;
                Ok(())
            }
            Id::Object => {
                definitions.push(value);
                Ok(())
            }
            Id::Trace => standard::trace(&value, out),
            Id::ReadOnly => with.set(b'r', &value),
            Id::Snapshot => with.set(b's', &value),
            Id::NoCache => with.set(b'n', &value),
            Id::CopyOnRead => with.set(b'C', &value),
            Id::NativeAio => with.set(b'k', &value),
            Id::Aio => with.set(b'i', &value),
            Id::Cache => with.set(b't', &value),
            Id::Discard => with.set(b'd', &value),
            Id::ForceShare => with.set(b'U', &value),
        };
        if let Err(message) = done {
            out.error(message);
            return FAILURE;
        }
    }
    let operands = getopt.operands();
    if operands.len() > 1 {
        return usage(out, FAILURE);
    }
    if image_opts && format.is_some() {
        out.error("--image-opts and -f are mutually exclusive");
        return FAILURE;
    }
    for definition in definitions {
        match objects.define(&definition, out) {
            Ok(Next::GoOn) => {}
            Ok(Next::End) => return 0,
            Err(message) => {
                out.error(message);
                return FAILURE;
            }
        }
    }
    if let Some(format) = format {
        with.options.set("driver", format);
    }
    let mut shell = Shell {
        out,
        image: None,
        objects,
        results: aio::Results::default(),
        image_opts,
        misalign,
        quit: false,
    };
    if let Some(name) = operands.first()
        && let Err(failure) = shell.open_image(Some(name), with)
    {
        shell.tell(failure, None);
        return FAILURE;
    }
    let good = if commands.is_empty() {
        shell.run_input()
    } else {
        shell.run_each(&commands)
    };
    let closed = shell.close_image();
    if good && closed { 0 } else { FAILURE }
}

fn usage(out: &mut Output, status: u8) -> u8 {
    let name = out.name().to_owned();
    out.line(format!(
        "Usage: {name} [OPTIONS]... [-c STRING]... [file]
Reads and writes disk images

  -c, --cmd STRING      run this command; without it they are read from standard input
  -f, --format FMT      format of the image; without it the first bytes decide
  --image-opts          file is a list of options, like driver=qcow2,file.filename=disk
  -r, --read-only       open for reading only
  -s, --snapshot        writes go to a temporary image
  -n, --nocache         as -t none
  -C, --copy-on-read    copy what is read from a backing file
  -m, --misalign        use memory that is not aligned for direct I/O
  -k, --native-aio      as -i native
  -i, --aio=MODE        io_uring or threads
  -t, --cache=MODE      none, writeback, writethrough, directsync or unsafe (writethrough)
  -d, --discard=MODE    unmap or ignore (unmap)
  -T, --trace PATTERN   accepted for compatibility: there are no trace events
  -U, --force-share     open the image even if somebody else is writing to it
  --object OBJECTDEF    define limits, like throttle-group,id=tg0,x-iops-total=100
  -h, --help            print this help and exit
  -V, --version         print the version and exit

See '{name} -c help' for the commands.
Supported formats: {}",
        standard::FORMATS
    ));
    status
}

impl Shell<'_> {
    /// Prints a line of results, behind those of requests that completed before.
    fn line(&mut self, line: impl AsRef<[u8]>) {
        self.results.print(self.out);
        self.out.line(line);
    }

    /// The same for lines that end with a newline.
    fn text(&mut self, text: impl AsRef<[u8]>) {
        self.results.print(self.out);
        self.out.text(text);
    }

    /// Runs commands; whether all went well.
    fn run_each(&mut self, commands: &[OsString]) -> bool {
        let mut good = true;
        for command in commands {
            if self.quit {
                break;
            }
            good &= self.run_line(command);
        }
        good
    }

    /// Runs one command; whether it went well.
    fn run_line(&mut self, line: &OsStr) -> bool {
        let line = line.as_bytes();
        let words = line.split(|&byte| byte == b' ').filter(|w| !w.is_empty());
        let mut words: Vec<String> = words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        if words.is_empty() {
            return true;
        }
        let name = words.remove(0);
        let Some(command) = Command::find(&name) else {
            self.out.note(format!("command \"{name}\" not found"));
            return false;
        };
        let result = command.call(self, &name, &words);
        self.results.print(self.out);
        match result {
            Ok(()) => true,
            Err(failure) => {
                self.tell(failure, Some((command, &name)));
                false
            }
        }
    }

    fn tell(&mut self, failure: Failure, command: Option<(&Command, &str)>) {
        match failure {
            Failure::Told => {}
            Failure::Result(line) => self.line(line),
            Failure::Error(message) => self.out.error(message),
            Failure::Note(message) => self.out.note(message),
            Failure::Usage => {
                if let Some((command, _)) = command {
                    self.line(command.help_line(command.name));
                }
            }
            Failure::Option(error) => {
                if let Some((command, name)) = command {
                    self.out
                        .note([name.as_bytes(), b": ", &error.message()].concat());
                    self.line(command.help_line(command.name));
                }
            }
        }
    }

    /// The image that a command works on, which was looked for before it was called.
    fn image(&self) -> &Image {
        self.image
            .as_ref()
            .expect("commands that need an image are called with one")
    }

    /// The user's handle of it.
    fn backend(&self) -> Arc<coblock::block::BlockBackend> {
        self.image().backend.clone()
    }
}
