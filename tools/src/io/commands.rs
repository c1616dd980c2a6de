//! The commands: names, how many words they take, what they need, and their help.

use super::Shell;
use super::{aio, control, open, query, reopen, request};
use crate::getopt::UsageError;

/// A command.
pub(super) struct Command {
    /// Its name.
    pub(super) name: &'static str,
    /// A shorter name.
    short: Option<&'static str>,
    /// How many words may follow; the most only where there is a most.
    words: (usize, Option<usize>),
    /// What it needs before it is called.
    needs: Needs,
    /// Its words, for help.
    usage: &'static str,
    about: &'static str,
    /// More help, lines that begin with a space.
    details: &'static str,
    run: fn(&mut Shell<'_>, &Call<'_>) -> Result<(), Failure>,
}

/// What a command needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Needs {
    Nothing,
    /// An open image.
    Image,
    /// One that may be written.
    Write,
}

/// One call of a command.
pub(super) struct Call<'a> {
    pub(super) command: &'static Command,
    /// Words behind the name.
    pub(super) words: &'a [String],
}

/// Why a command failed, and where that is said.
#[derive(Debug)]
pub(super) enum Failure {
    /// A result that is an error: standard output.
    Result(String),
    /// A message that begins with the program's name: standard error.
    Error(String),
    /// A message as it is: standard error.
    Note(String),
    /// The words are wrong: how they should be, on standard output.
    Usage,
    /// The same; what the option parser says comes first, on standard error.
    Option(UsageError),
    /// Everything was said.
    Told,
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Self::Option(error)
    }
}

impl Command {
    /// The command of that name, or short name.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        COMMANDS
            .iter()
            .find(|command| command.name == name || command.short == Some(name))
    }

    /// Checks what `name` needs, and runs it.
    pub(super) fn call(
        &'static self,
        shell: &mut Shell<'_>,
        name: &str,
        words: &[String],
    ) -> Result<(), Failure> {
        if self.needs >= Needs::Image && shell.image.is_none() {
            return Err(Failure::Note("no file open, try 'help open'".into()));
        }
        let (least, most) = self.words;
        let count = words.len();
        if count < least || most.is_some_and(|most| count > most) {
            let expected = match most {
                None => format!("at least {least}"),
                Some(most) if most == least => least.to_string(),
                Some(most) => format!("between {least} and {most}"),
            };
            return Err(Failure::Note(format!(
                "bad argument count {count} to {name}, expected {expected} arguments"
            )));
        }
        if self.needs == Needs::Write && shell.image.as_ref().is_some_and(|image| !image.write) {
            return Err(Failure::Error("Block node is read-only".into()));
        }
        let call = Call {
            command: self,
            words,
        };
        (self.run)(shell, &call)
    }

    /// One line of help, for the command as the user called it.
    pub(super) fn help_line(&self, name: &str) -> String {
        // The reference has `map` with two spaces.
        let space = if self.usage.is_empty() && self.name != "map" {
            ""
        } else {
            " "
        };
        format!("{name}{space}{} -- {}", self.usage, self.about)
    }
}

/// `help`: of one command, or a line of each.
fn help(shell: &mut Shell<'_>, call: &Call<'_>) -> Result<(), Failure> {
    let Some(name) = call.words.first() else {
        for command in COMMANDS.iter() {
            shell.line(command.help_line(command.name));
        }
        shell.line("\nUse 'help commandname' for extended help.");
        return Ok(());
    };
    let Some(command) = Command::find(name) else {
        shell.line(format!("command {name} not found"));
        return Ok(());
    };
    shell.line(command.help_line(name));
    if !command.details.is_empty() {
        shell.line(command.details);
    }
    Ok(())
}

const ANY: Option<usize> = None;

/// In the order of the alphabet.
static COMMANDS: [Command; 32] = [
    Command {
        name: "abort",
        short: None,
        words: (0, Some(0)),
        needs: Needs::Nothing,
        usage: "",
        about: "simulate a program crash using abort(3)",
        details: "",
        run: control::abort,
    },
    Command {
        name: "aio_flush",
        short: None,
        words: (0, Some(0)),
        needs: Needs::Image,
        usage: "",
        about: "completes all outstanding aio requests",
        details: "",
        run: aio::flush,
    },
    Command {
        name: "aio_read",
        short: None,
        words: (2, ANY),
        needs: Needs::Image,
        usage: "[-Ciqrv] [-P pattern] off len [len..]",
        about: "asynchronously reads a number of bytes",
        details: "
 Starts a read and does not wait for it: its result is printed when it is there, at
 the latest by aio_flush. Several lengths make one request with as many buffers.
 -C  statistics for programs
 -P  the byte that all of it must be
 -i  only count a request that is invalid
 -q  say nothing of success
 -r  register the buffer
 -v  print what was read
",
        run: aio::read,
    },
    Command {
        name: "aio_write",
        short: None,
        words: (2, ANY),
        needs: Needs::Write,
        usage: "[-Cfiqruz] [-P pattern] off len [len..]",
        about: "asynchronously writes a number of bytes",
        details: "
 Starts a write and does not wait for it: its result is printed when it is there, at
 the latest by aio_flush. Several lengths make one request with as many buffers.
 -C  statistics for programs
 -P  the byte to write (0xcd)
 -f  on stable storage when it completes
 -i  only count a request that is invalid
 -q  say nothing of success
 -r  register the buffer
 -u  with -z: the storage may be freed
 -z  write zeroes without a buffer
",
        run: aio::write,
    },
    Command {
        name: "alloc",
        short: Some("a"),
        words: (1, Some(2)),
        needs: Needs::Image,
        usage: "offset [count]",
        about: "checks if offset is allocated in the file",
        details: "",
        run: query::alloc,
    },
    Command {
        name: "break",
        short: None,
        words: (2, Some(2)),
        needs: Needs::Image,
        usage: "event tag",
        about: "sets a breakpoint on event and tags the stopped request as tag",
        details: "",
        run: control::set_break,
    },
    Command {
        name: "close",
        short: Some("c"),
        words: (0, Some(0)),
        needs: Needs::Image,
        usage: "",
        about: "close the current open file",
        details: "",
        run: open::close,
    },
    Command {
        name: "discard",
        short: Some("d"),
        words: (2, ANY),
        needs: Needs::Write,
        usage: "[-Cq] off len",
        about: "discards a number of bytes at a specified offset",
        details: "
 Gives the storage of a range back.
 -C  statistics for programs
 -q  say nothing of success
",
        run: request::discard,
    },
    Command {
        name: "flush",
        short: Some("f"),
        words: (0, Some(0)),
        needs: Needs::Image,
        usage: "",
        about: "flush all in-core file state to disk",
        details: "",
        run: request::flush,
    },
    Command {
        name: "help",
        short: Some("?"),
        words: (0, Some(1)),
        needs: Needs::Nothing,
        usage: "[command]",
        about: "help for one or all commands",
        details: "",
        run: help,
    },
    Command {
        name: "info",
        short: Some("i"),
        words: (0, Some(0)),
        needs: Needs::Image,
        usage: "",
        about: "prints information about the current file",
        details: "",
        run: query::info,
    },
    Command {
        name: "length",
        short: Some("l"),
        words: (0, Some(0)),
        needs: Needs::Image,
        usage: "",
        about: "gets the length of the current file",
        details: "",
        run: query::length,
    },
    Command {
        name: "map",
        short: None,
        words: (0, Some(0)),
        needs: Needs::Image,
        usage: "",
        about: "prints the allocated areas of a file",
        details: "",
        run: query::map,
    },
    Command {
        name: "open",
        short: Some("o"),
        words: (1, ANY),
        needs: Needs::Nothing,
        usage: "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        about: "open the file specified by path",
        details: "
 Opens an image for the other commands; one at a time.
 -r  for reading only
 -s  writes go to a temporary image
 -C  what is read from a backing file is copied
 -n  as -t none
 -U  whatever others do with it
 -k  as -i native
 -i  io_uring, threads or native
 -t  none, writeback, writethrough, directsync or unsafe
 -d  unmap or ignore
 -o  options, like driver=raw,file.filename=disk
",
        run: open::open,
    },
    Command {
        name: "quit",
        short: Some("q"),
        words: (0, ANY),
        needs: Needs::Nothing,
        usage: "",
        about: "exit the program",
        details: "",
        run: control::quit,
    },
    Command {
        name: "read",
        short: Some("r"),
        words: (2, ANY),
        needs: Needs::Image,
        usage: "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        about: "reads a number of bytes at a specified offset",
        details: "
 Reads a range.
 -b  of the state of a virtual machine beside the disk
 -C  statistics for programs
 -P  the byte that all of it must be; with -s and -l a part of it
 -l  how many bytes are compared
 -p  accepted for compatibility
 -q  say nothing of success
 -r  register the buffer
 -s  where the comparison begins
 -v  print what was read
",
        run: request::read,
    },
    Command {
        name: "readv",
        short: None,
        words: (2, ANY),
        needs: Needs::Image,
        usage: "[-Cqrv] [-P pattern] off len [len..]",
        about: "reads a number of bytes at a specified offset",
        details: "
 Reads a range into one buffer for each length.
 -C  statistics for programs
 -P  the byte that all of it must be
 -q  say nothing of success
 -r  register the buffer
 -v  print what was read
",
        run: request::readv,
    },
    Command {
        name: "remove_break",
        short: None,
        words: (1, Some(1)),
        needs: Needs::Image,
        usage: "tag",
        about: "remove a breakpoint by tag",
        details: "",
        run: control::remove_break,
    },
    Command {
        name: "reopen",
        short: None,
        words: (0, ANY),
        needs: Needs::Image,
        usage: "[(-r|-w)] [-c cache] [-o options]",
        about: "reopens an image with new options",
        details: "
 Opens the image again, with other options.
 -r  for reading only
 -w  for writing too
 -c  cache mode, as for open -t
 -o  options, as for open -o
",
        run: reopen::reopen,
    },
    Command {
        name: "resume",
        short: None,
        words: (1, Some(1)),
        needs: Needs::Image,
        usage: "tag",
        about: "resumes the request tagged as tag",
        details: "",
        run: control::resume,
    },
    Command {
        name: "sigraise",
        short: None,
        words: (1, Some(1)),
        needs: Needs::Nothing,
        usage: "signal",
        about: "raises a signal",
        details: "
 Sends the signal of that number to the program itself.
",
        run: control::sigraise,
    },
    Command {
        name: "sleep",
        short: None,
        words: (1, Some(1)),
        needs: Needs::Nothing,
        usage: "",
        about: "waits for the given value in milliseconds",
        details: "",
        run: control::sleep,
    },
    Command {
        name: "truncate",
        short: Some("t"),
        words: (1, Some(3)),
        needs: Needs::Write,
        usage: "[-m prealloc_mode] off",
        about: "truncates the current file at the given offset",
        details: "",
        run: query::truncate,
    },
    Command {
        name: "wait_break",
        short: None,
        words: (1, Some(1)),
        needs: Needs::Image,
        usage: "tag",
        about: "waits for the suspension of a request",
        details: "",
        run: control::wait_break,
    },
    Command {
        name: "write",
        short: Some("w"),
        words: (2, ANY),
        needs: Needs::Write,
        usage: "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        about: "writes a number of bytes at a specified offset",
        details: "
 Writes a range.
 -b  of the state of a virtual machine beside the disk
 -c  compressed
 -C  statistics for programs
 -f  on stable storage when it completes
 -n  with -z: fail where a buffer of zeros would be needed
 -p  accepted for compatibility
 -P  the byte to write (0xcd)
 -q  say nothing of success
 -r  register the buffer
 -s  a file whose content is repeated
 -u  with -z: the storage may be freed
 -z  write zeroes without a buffer
",
        run: request::write,
    },
    Command {
        name: "writev",
        short: None,
        words: (2, ANY),
        needs: Needs::Write,
        usage: "[-Cfqr] [-P pattern] off len [len..]",
        about: "writes a number of bytes at a specified offset",
        details: "
 Writes a range from one buffer for each length.
 -C  statistics for programs
 -P  the byte to write (0xcd)
 -f  on stable storage when it completes
 -q  say nothing of success
 -r  register the buffer
",
        run: request::writev,
    },
    Command {
        name: "zone_append",
        short: None,
        words: (3, Some(4)),
        needs: Needs::Image,
        usage: "offset len [len..]",
        about: "append write a number of bytes at a specified offset",
        details: "",
        run: control::zone,
    },
    Command {
        name: "zone_close",
        short: None,
        words: (2, Some(2)),
        needs: Needs::Image,
        usage: "offset len",
        about: "close a range of zones in zone block device",
        details: "",
        run: control::zone,
    },
    Command {
        name: "zone_finish",
        short: None,
        words: (2, Some(2)),
        needs: Needs::Image,
        usage: "offset len",
        about: "finish a range of zones in zone block device",
        details: "",
        run: control::zone,
    },
    Command {
        name: "zone_open",
        short: None,
        words: (2, Some(2)),
        needs: Needs::Image,
        usage: "offset len",
        about: "explicit open a range of zones in zone block device",
        details: "",
        run: control::zone,
    },
    Command {
        name: "zone_report",
        short: None,
        words: (2, Some(2)),
        needs: Needs::Image,
        usage: "offset number",
        about: "report zone information",
        details: "",
        run: control::zone,
    },
    Command {
        name: "zone_reset",
        short: None,
        words: (2, Some(2)),
        needs: Needs::Image,
        usage: "offset len",
        about: "reset a zone write pointer in zone block device",
        details: "",
        run: control::zone,
    },
];
