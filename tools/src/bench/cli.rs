//! The command line of `coblock bench`, and of `coblock` itself.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::pattern::SECTOR;
use crate::open::Engine;
use crate::output::FAILURE;
use crate::size::{NumberError, parse_size};
use crate::spec::Cache;

/// What requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Read, block after block.
    Read,
    /// Write, block after block.
    Write,
    /// Read at random.
    RandRead,
    /// Write at random.
    RandWrite,
    /// Both at random.
    RandRw,
    /// Reads and writes of several blocks, discards and flushes, at random.
    Mixed,
}

const PATTERNS: [(&str, Pattern); 6] = [
    ("read", Pattern::Read),
    ("write", Pattern::Write),
    ("randread", Pattern::RandRead),
    ("randwrite", Pattern::RandWrite),
    ("randrw", Pattern::RandRw),
    ("mixed", Pattern::Mixed),
];

impl Pattern {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        PATTERNS
            .iter()
            .find(|(_, p)| *p == self)
            .map_or("?", |(name, _)| name)
    }

    /// True when anything is written.
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }

    /// True when blocks come in no order.
    pub fn is_random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
}

/// Everything that the command line says.
#[derive(Clone, Debug)]
pub struct Config {
    /// The image; `None` makes one in a temporary folder and removes it.
    pub image: Option<PathBuf>,
    /// Format of the image; `None` for an existing one means that it is looked at.
    pub format: Option<String>,
    /// What requests do.
    pub rw: Pattern,
    /// Reads in 100 requests of [`Pattern::RandRw`].
    pub read_share: u64,
    /// Bytes of a request, and of a block.
    pub block_size: usize,
    /// Requests in flight, for each queue.
    pub depth: usize,
    /// Threads that send requests, each with a loop of its own; `None` is the main loop alone.
    pub queues: Option<usize>,
    /// The image is an overlay of many small tables, half written, on a backing file that is full.
    pub backing: bool,
    /// Size of the image to make, or how much of an existing one is used; `None` is all of it, or 1
    /// GiB.
    pub size: Option<u64>,
    /// How long requests are sent.
    pub runtime: Duration,
    /// Ends earlier, after this many requests.
    pub requests: Option<u64>,
    /// Whether content is checked, while the job runs and afterwards.
    pub verify: bool,
    /// Who talks to the kernel.
    pub engine: Engine,
    /// The reference's cache modes.
    pub cache: Cache,
    /// Decides which blocks, and is part of what is written.
    pub seed: u64,
    /// JSON instead of a text for people.
    pub json: bool,
    /// An existing image may be written.
    pub allow_write: bool,
}

/// Most bytes of a request of [`Pattern::Mixed`].
const MIXED_BYTES: usize = 64 << 10;

impl Config {
    /// Most blocks that a request takes.
    pub fn blocks_per_request(&self) -> usize {
        match self.rw {
            Pattern::Mixed => (MIXED_BYTES / self.block_size).max(1),
            _ => 1,
        }
    }
}

fn command() -> Command {
    let formats = ["qcow2", "raw"];
    let modes: Vec<_> = Cache::NAMES.iter().map(|(name, _)| *name).collect();
    let bench = Command::new("bench")
        .about("Run an image under concurrent load, and verify it")
        .long_about(
            "Runs many requests at once on a disk image, each in its own coroutine, through all layers.\n\n\
             Without IMAGE a qcow2 image is made in a temporary folder and removed afterwards. Each sector that is \
             written says where it belongs and which write it is from; reads are checked on the way, and afterwards \
             the image is opened anew, all of it is read and checked, untouched blocks too, and then its metadata.",
        )
        .args([
            Arg::new("image").value_name("IMAGE").value_parser(value_parser!(PathBuf)).help("An existing image"),
            Arg::new("format")
                .long("format")
                .value_name("FORMAT")
                .value_parser(PossibleValuesParser::new(formats))
                .help("Format of the image [default: qcow2 for a new one, else what the image looks like]"),
            Arg::new("rw")
                .long("rw")
                .value_name("PATTERN")
                .value_parser(PossibleValuesParser::new(PATTERNS.map(|(name, _)| name)))
                .help("What to do [default: randrw; mixed with --backing; randread for an existing image]"),
            Arg::new("rwmixread")
                .long("rwmixread")
                .value_name("PERCENT")
                .value_parser(value_parser!(u64).range(0..=100))
                .default_value("50")
                .help("Reads in 100 requests of randrw"),
            Arg::new("bs")
                .long("bs")
                .value_name("SIZE")
                .value_parser(block_size)
                .default_value("4k")
                .help("Size of a request, a multiple of 512"),
            Arg::new("iodepth")
                .long("iodepth")
                .value_name("N")
                .value_parser(value_parser!(u32).range(1..=100_000))
                .default_value_if("backing", "true", "8")
                .default_value("64")
                .help("Requests in flight, for each queue [8 with --backing]"),
            Arg::new("queues")
                .long("queues")
                .value_name("N")
                .value_parser(value_parser!(u32).range(1..=64))
                .help("Threads that send requests, each with --iodepth of them [default: the main loop alone]"),
            Arg::new("backing")
                .long("backing")
                .action(ArgAction::SetTrue)
                .conflicts_with_all(["image", "format"])
                .help("Make an overlay with many tables, half written, on a full backing file"),
            Arg::new("size")
                .long("size")
                .value_name("SIZE")
                .value_parser(size)
                .help("Size of the image to make, or how much of IMAGE is used [default: 1G, 256M with --backing; all]"),
            Arg::new("runtime")
                .long("runtime")
                .visible_alias("seconds")
                .value_name("SECONDS")
                .value_parser(seconds)
                .default_value("10")
                .help("How long to send requests"),
            Arg::new("number-ios")
                .long("number-ios")
                .alias("number_ios")
                .value_name("N")
                .value_parser(value_parser!(u64).range(1..))
                .help("Stop after this many requests"),
            Arg::new("verify")
                .long("verify")
                .value_name("BOOL")
                .value_parser(value_parser!(bool))
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .help("Check content [default: true, but false when an existing image is only read]"),
            Arg::new("engine")
                .long("engine")
                .value_name("ENGINE")
                .value_parser(PossibleValuesParser::new(Engine::NAMES.map(|(name, _)| name)))
                .default_value("auto")
                .help("Who talks to the kernel"),
            Arg::new("cache")
                .long("cache")
                .value_name("MODE")
                .value_parser(PossibleValuesParser::new(modes))
                .default_value_if("backing", "true", "unsafe")
                .default_value("writeback")
                .help("Cache mode [unsafe with --backing: what could be lost is not looked at]"),
            Arg::new("seed")
                .long("seed")
                .value_name("N")
                .value_parser(value_parser!(u64))
                .default_value("1")
                .help("Decides which blocks, and is part of what is written"),
            Arg::new("output")
                .long("output")
                .value_name("FORM")
                .value_parser(PossibleValuesParser::new(["human", "json"]))
                .default_value("human")
                .help("How to print results"),
            Arg::new("allow-write")
                .long("allow-write")
                .action(ArgAction::SetTrue)
                .help("Let the job write to an existing image; what it held is lost"),
        ]);
    Command::new("coblock")
        .version(env!("CARGO_PKG_VERSION"))
        .about("A block layer for virtual machines: coroutines, io_uring, qcow2")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(bench)
        .subcommand(
            Command::new("img")
                .about(
                    "Work on images: create, info, check, map, compare, bench (coblock img --help)",
                )
                .disable_help_flag(true),
        )
        .subcommand(
            Command::new("io")
                .about("Read and write an image by commands (coblock io --help)")
                .disable_help_flag(true),
        )
}

/// Runs `coblock` with these words.
pub fn run(words: Vec<OsString>) -> ExitCode {
    let words = std::iter::once(OsString::from("coblock")).chain(words);
    let matches = match command().try_get_matches_from(words) {
        Ok(matches) => matches,
        Err(error) => {
            // Help and version are "errors" that go to standard output and exit with 0.
            let failed = error.use_stderr();
            let written = error.print();
            return ExitCode::from(if failed || written.is_err() {
                FAILURE
            } else {
                0
            });
        }
    };
    match matches.subcommand() {
        Some(("bench", matches)) => super::run(&config(matches)),
        // clap knows no other; `img` and `io` went elsewhere before.
        _ => ExitCode::from(FAILURE),
    }
}

/// Turns what clap accepted into a [`Config`].
fn config(matches: &ArgMatches) -> Config {
    fn word<T: Copy>(matches: &ArgMatches, key: &str, table: &[(&str, T)]) -> Option<T> {
        let word = matches.get_one::<String>(key)?;
        table
            .iter()
            .find(|(name, _)| name == word)
            .map(|(_, value)| *value)
    }
    fn value<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, key: &str) -> T {
        match matches.get_one::<T>(key) {
            Some(value) => value.clone(),
            None => panic!("--{key} has a default in the table of options"),
        }
    }
    let image = matches.get_one::<PathBuf>("image").cloned();
    let backing = matches.get_flag("backing");
    let default = match (&image, backing) {
        (Some(_), _) => Pattern::RandRead,
        (None, true) => Pattern::Mixed,
        (None, false) => Pattern::RandRw,
    };
    let rw = word(matches, "rw", &PATTERNS).unwrap_or(default);
    let verify = matches.get_one::<bool>("verify").copied();
    Config {
        format: matches.get_one::<String>("format").cloned(),
        rw,
        read_share: value(matches, "rwmixread"),
        block_size: value(matches, "bs"),
        depth: value::<u32>(matches, "iodepth") as usize,
        queues: matches.get_one::<u32>("queues").map(|&n| n as usize),
        backing,
        size: matches.get_one::<u64>("size").copied(),
        runtime: value(matches, "runtime"),
        requests: matches.get_one::<u64>("number-ios").copied(),
        verify: verify.unwrap_or(image.is_none() || rw.writes()),
        engine: word(matches, "engine", &Engine::NAMES).unwrap_or(Engine::Auto),
        cache: word(matches, "cache", &Cache::NAMES).unwrap_or(Cache::Writeback),
        seed: value(matches, "seed"),
        json: value::<String>(matches, "output") == "json",
        allow_write: matches.get_flag("allow-write"),
        image,
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| match error {
        NumberError::Malformed => "not a size like 512, 64k or 1.5G".into(),
        NumberError::OutOfRange => "too large".into(),
    })
}

fn block_size(text: &str) -> Result<usize, String> {
    const MAX: usize = 64 << 20;
    let size = usize::try_from(size(text)?).unwrap_or(usize::MAX);
    if size == 0 || !size.is_multiple_of(SECTOR) || size > MAX {
        return Err("must be a multiple of 512, at least 512 and at most 64M".into());
    }
    Ok(size)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    let seconds: f64 = number
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "not a number of seconds".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Config {
        let matches = command().try_get_matches_from(words.split(' ')).unwrap();
        config(matches.subcommand_matches("bench").unwrap())
    }

    #[test]
    fn the_table_of_options_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn plain_bench_shows_everything_and_an_existing_image_is_only_read() {
        let plain = parse("coblock bench");
        assert_eq!(
            (plain.rw, plain.verify, plain.depth),
            (Pattern::RandRw, true, 64)
        );
        assert_eq!((plain.block_size, plain.allow_write), (4096, false));
        let existing = parse("coblock bench x.qcow2");
        assert_eq!((existing.rw, existing.verify), (Pattern::RandRead, false));
        assert!(parse("coblock bench x --verify").verify);
        let mixed = parse("coblock bench --queues 4 --backing --seconds 60");
        assert_eq!((mixed.rw, mixed.queues), (Pattern::Mixed, Some(4)));
        assert_eq!((mixed.depth, mixed.cache), (8, Cache::Unsafe));
        let told = parse("coblock bench --backing --iodepth 64 --cache none");
        assert_eq!((told.depth, told.cache), (64, Cache::None));
        assert_eq!(mixed.blocks_per_request(), 16);
        assert!(!parse("coblock bench --verify=false").verify);
        assert_eq!(
            parse("coblock bench --rw=read --runtime=2.5")
                .runtime
                .as_millis(),
            2500
        );
    }

    #[test]
    fn impossible_values_are_refused() {
        for words in [
            "coblock bench --bs=1000",
            "coblock bench --bs=0",
            "coblock bench --iodepth=0",
            "coblock bench --rw=trim",
            "coblock bench --runtime=x",
            "coblock bench --cache=fast",
            "coblock bench --what",
            "coblock bench --queues=0",
            "coblock bench --backing x.qcow2",
        ] {
            assert!(
                command().try_get_matches_from(words.split(' ')).is_err(),
                "{words}"
            );
        }
    }
}
