//! The command line of `cargo xtask bench`.

use std::path::PathBuf;

use super::engines::Engine;
use super::rows::{ROWS, Row, SWEEP};

pub const USAGE: &str = "\
Usage: cargo xtask bench [OPTIONS]

  --quick         the eight cells of cached and direct reads and overwrites, without peers
  --sweep         size of the image and requests in flight, instead of the rows
  --queues        two queues beside one, instead of the rows
  --graph         graph lock, drained sections, statistics, instead of the rows
  --only NAMES    rows whose name contains all words of one of these comma-separated names
  --peers NAMES   which of floor,imago,qcow2-rs are built and measured too (all), or none
  --rounds N      rounds per row (5)
  --scale F       multiplies the number of requests of every row (1.0)
  --size MIB      data in an image, in MiB, a power of two (1024)
  --dir DIR       where the images go; must allow O_DIRECT (a folder under the target folder)
  --json FILE     where the figures go (bench*.json in the target folder)
  --record        write docs/benchmarks* too; needs every row
  --coblock FILE  program to measure instead of building it
";

pub struct Options {
    pub quick: bool,
    pub sweep: bool,
    pub queues: bool,
    pub graph: bool,
    only: Vec<Vec<String>>,
    pub peers: Vec<Engine>,
    pub rounds: usize,
    pub scale: f64,
    /// Bytes.
    pub size: u64,
    pub dir: PathBuf,
    pub json: PathBuf,
    pub record: bool,
    pub coblock: Option<PathBuf>,
}

impl Options {
    /// Reads the words after `bench`; `None` when help is asked for.
    ///
    /// # Errors
    /// An unknown option, a missing or impossible value, a name that no row has.
    pub fn parse(words: &[String]) -> Result<Option<Options>, String> {
        let target = crate::target_dir();
        let mut options = Options {
            quick: false,
            sweep: false,
            queues: false,
            graph: false,
            only: Vec::new(),
            peers: Engine::PEERS.to_vec(),
            rounds: 5,
            scale: 1.0,
            size: 1024 << 20,
            dir: target.join("xtask-bench"),
            json: PathBuf::new(),
            record: false,
            coblock: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--help" | "-h" => return Ok(None),
                "--quick" => options.quick = true,
                "--sweep" => options.sweep = true,
                "--queues" => options.queues = true,
                "--graph" => options.graph = true,
                "--record" => options.record = true,
                option => {
                    let value = words.next().map(String::as_str);
                    options.set(option, value)?;
                }
            }
        }
        options.check()?;
        if options.json.as_os_str().is_empty() {
            let name = match options {
                _ if options.queues => "bench-queues.json",
                _ if options.graph => "bench-graph.json",
                _ if options.sweep => "bench-sweep.json",
                _ => "bench.json",
            };
            options.json = target.join(name);
        }
        if options.quick || options.graph {
            options.peers.clear();
        }
        if options.queues {
            options.peers.retain(|peer| *peer == Engine::Floor);
        }
        Ok(Some(options))
    }

    /// An option that has a value.
    fn set(&mut self, option: &str, value: Option<&str>) -> Result<(), String> {
        let known = [
            "--only",
            "--peers",
            "--rounds",
            "--scale",
            "--size",
            "--dir",
            "--json",
            "--coblock",
        ];
        if !known.contains(&option) {
            return Err(format!("unknown option '{option}'\n\n{USAGE}"));
        }
        let value = value.ok_or_else(|| format!("{option} needs a value"))?;
        let bad = |e: &dyn std::fmt::Display| format!("{option} {value}: {e}");
        match option {
            "--only" => {
                let words = |name: &str| name.split_whitespace().map(str::to_string).collect();
                self.only = value.split(',').map(words).collect();
            }
            "--peers" => self.peers = peers(value)?,
            "--rounds" => self.rounds = value.parse().map_err(|e| bad(&e))?,
            "--scale" => self.scale = value.parse().map_err(|e| bad(&e))?,
            "--size" => {
                let mib: u64 = value.parse().map_err(|e| bad(&e))?;
                self.size = mib.checked_mul(1 << 20).ok_or_else(|| bad(&"too large"))?;
            }
            "--dir" => self.dir = value.into(),
            "--json" => self.json = value.into(),
            _ => self.coblock = Some(value.into()),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if self.rounds == 0 || !self.scale.is_finite() || self.scale <= 0.0 {
            return Err("--rounds and --scale must be above zero".into());
        }
        // Below, the clusters of 1 TiB would lie further apart than qemu-img can step.
        if !self.size.is_power_of_two() || self.size < 64 << 20 {
            return Err("--size must be a power of two, and at least 64".into());
        }
        let parts = [self.quick, self.sweep, self.queues, self.graph];
        if parts.into_iter().filter(|&part| part).count() > 1 {
            return Err("--quick, --sweep, --queues and --graph exclude each other".into());
        }
        if self.record && (self.quick || !self.only.is_empty()) {
            return Err("--record needs every row".into());
        }
        if self.rows().is_empty() {
            return Err("--only names no row".into());
        }
        Ok(())
    }

    /// The rows that are asked for.
    pub fn rows(&self) -> Vec<&'static Row> {
        let all: &'static [Row] = if self.sweep { &SWEEP } else { &ROWS };
        let named = |row: &Row| {
            let has = |words: &Vec<String>| words.iter().all(|word| row.name.contains(word));
            self.only.is_empty() || self.only.iter().any(has)
        };
        let wanted = |row: &&Row| named(row) && (row.cell || !self.quick);
        all.iter().filter(wanted).collect()
    }
}

fn peers(names: &str) -> Result<Vec<Engine>, String> {
    if names == "none" {
        return Ok(Vec::new());
    }
    let peer = |name: &str| {
        let found = Engine::PEERS.into_iter().find(|peer| peer.name() == name);
        found.ok_or_else(|| format!("--peers: there is no '{name}'"))
    };
    names.split(',').map(peer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Option<Options>, String> {
        let words: Vec<String> = words.iter().map(|s| (*s).to_string()).collect();
        Options::parse(&words)
    }

    /// An option without its value, one that nobody knows, and values that make no sense.
    #[test]
    fn options_are_checked() {
        for words in [
            &["--rounds"][..],
            &["--speed", "9"],
            &["--rounds", "0"],
            &["--scale", "-1"],
            &["--size", "1000"],
            &["--only", "nothing like it"],
            &["--peers", "floor,somebody"],
            &["--record", "--only", "chain"],
            &["--quick", "--sweep"],
            &["--queues", "--sweep"],
            &["--graph", "--queues"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        assert!(parse(&["--help"]).unwrap().is_none());
        assert_eq!(parse(&["--rounds", "3"]).unwrap().unwrap().rounds, 3);
    }

    /// Which rows and which peers the options choose.
    #[test]
    fn rows_and_peers_are_chosen() {
        let rows = |words: &[&str]| parse(words).unwrap().unwrap().rows().len();
        assert_eq!(rows(&[]), ROWS.len());
        assert_eq!(rows(&["--sweep"]), SWEEP.len());
        assert_eq!(rows(&["--quick"]), 8);
        assert_eq!(rows(&["--only", "chain,read direct"]), 3);
        let peers = |words: &[&str]| parse(words).unwrap().unwrap().peers;
        assert_eq!(peers(&["--peers", "none"]), []);
        assert_eq!(peers(&["--quick"]), []);
        assert_eq!(peers(&["--peers", "imago"]), [Engine::Imago]);
        assert_eq!(peers(&["--queues"]), [Engine::Floor]);
        assert_eq!(peers(&["--graph"]), []);
    }
}
