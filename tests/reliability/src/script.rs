//! The script language: what a run does to a disk, as values and as text.
//!
//! A script is a [`Setting`] (what the image is like, how it is opened, how many requests are in
//! flight) and a list of [`Op`]s, which are sent in order. A seed generates one (`swarm.rs`,
//! `exhaustive.rs`), a human reads and writes it:
//!
//! ```text
//! # a comment
//! image version=3 cluster-bits=12 refcount-order=4 size=0x100000 backing=0x80000 compressed=4 lazy
//! open serial small-caches queues=2
//! run seed=7 unit=512 in-flight=8 delay-us=200
//! write 0x1000 4096
//! flush
//! zero 0x0 512 unmap
//! ```
//!
//! A new feature adds its operation here, what it does to the disk in `load.rs`, and what it means in
//! `model.rs`; then every part of the machine uses it.

use std::fmt;
use std::str::FromStr;

/// One request, or a step between requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Read `len` bytes at `offset`.
    Read { offset: u64, len: usize },
    /// Write `len` bytes at `offset`, stamped by the model.
    Write { offset: u64, len: usize },
    /// Make `len` bytes at `offset` zeros; with `unmap` the storage may go.
    Zero {
        offset: u64,
        len: usize,
        unmap: bool,
    },
    /// Give back the storage of `len` bytes at `offset`.
    Discard { offset: u64, len: usize },
    /// Copy `len` bytes, stamped by the model, from another disk to `offset`.
    Copy { offset: u64, len: usize },
    /// Make the disk `len` bytes long, if it is shorter.
    Grow { len: u64 },
    /// Make everything that has ended durable.
    Flush,
    /// Nothing is sent before everything that was sent has ended.
    Wait,
    /// The same, and the image is closed and opened again.
    Reopen,
    /// The same, and what came before is preparation: no power cut there.
    Mark,
}

impl Op {
    /// Bytes of the guest's disk that it touches.
    pub fn range(&self) -> Option<(u64, usize)> {
        match *self {
            Op::Read { offset, len }
            | Op::Write { offset, len }
            | Op::Zero { offset, len, .. }
            | Op::Discard { offset, len }
            | Op::Copy { offset, len } => Some((offset, len)),
            Op::Grow { .. } | Op::Flush | Op::Wait | Op::Reopen | Op::Mark => None,
        }
    }

    /// Must nothing else be in flight?
    pub fn alone(&self) -> bool {
        matches!(self, Op::Wait | Op::Reopen | Op::Mark)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Read { offset, len } => write!(f, "read {offset:#x} {len}"),
            Op::Write { offset, len } => write!(f, "write {offset:#x} {len}"),
            Op::Zero { offset, len, unmap } => {
                let unmap = if unmap { " unmap" } else { "" };
                write!(f, "zero {offset:#x} {len}{unmap}")
            }
            Op::Discard { offset, len } => write!(f, "discard {offset:#x} {len}"),
            Op::Copy { offset, len } => write!(f, "copy {offset:#x} {len}"),
            Op::Grow { len } => write!(f, "grow {len:#x}"),
            Op::Flush => f.write_str("flush"),
            Op::Wait => f.write_str("wait"),
            Op::Reopen => f.write_str("reopen"),
            Op::Mark => f.write_str("mark"),
        }
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let range = |offset: &str, len: &str| -> Result<(u64, usize), String> {
            let len = usize::try_from(number(len)?).map_err(|e| e.to_string())?;
            Ok((number(offset)?, len))
        };
        Ok(match words[..] {
            ["read", at, len] => range(at, len).map(|(offset, len)| Op::Read { offset, len })?,
            ["write", at, len] => range(at, len).map(|(offset, len)| Op::Write { offset, len })?,
            ["zero", at, len] => range(at, len).map(|(offset, len)| Op::Zero {
                offset,
                len,
                unmap: false,
            })?,
            ["zero", at, len, "unmap"] => range(at, len).map(|(offset, len)| Op::Zero {
                offset,
                len,
                unmap: true,
            })?,
            ["discard", at, len] => {
                range(at, len).map(|(offset, len)| Op::Discard { offset, len })?
            }
            ["copy", at, len] => range(at, len).map(|(offset, len)| Op::Copy { offset, len })?,
            ["grow", len] => Op::Grow { len: number(len)? },
            ["flush"] => Op::Flush,
            ["wait"] => Op::Wait,
            ["reopen"] => Op::Reopen,
            ["mark"] => Op::Mark,
            _ => return Err(format!("no operation: '{line}'")),
        })
    }
}

fn number(word: &str) -> Result<u64, String> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    }
    .map_err(|e| format!("'{word}': {e}"))
}

/// What the image is like, how it is opened, and how its requests are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Of stamps, delays and schedule.
    pub seed: u64,
    pub version: u8,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes of a raw backing file full of the model's stamps; 0: there is none.
    pub backing: u64,
    /// Compressed clusters that the image begins with.
    pub compressed: u64,
    /// They are compressed by zstd.
    pub zstd: bool,
    /// Refcounts are lazy, and the image dirty while it is open.
    pub lazy: bool,
    /// Requests take turns (serial mode).
    pub serial: bool,
    /// The smallest caches that are legal.
    pub small_caches: bool,
    /// Contexts that send requests.
    pub queues: usize,
    /// Requests begin and end at multiples of it; the model's unit.
    pub unit: usize,
    /// Requests in flight at once.
    pub in_flight: usize,
    /// Most microseconds that a request takes in the file below, at random.
    pub delay_us: u64,
}

impl Default for Setting {
    fn default() -> Self {
        Setting {
            seed: 0,
            version: 3,
            cluster_bits: 12,
            refcount_order: 4,
            size: 1 << 20,
            backing: 0,
            compressed: 0,
            zstd: false,
            lazy: false,
            serial: false,
            small_caches: true,
            queues: 1,
            unit: 512,
            in_flight: 1,
            delay_us: 200,
        }
    }
}

impl Setting {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn set(&mut self, word: &str) -> Result<(), String> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let small = |value| number(value).and_then(|n| u32::try_from(n).map_err(|e| e.to_string()));
        let count =
            |value| number(value).and_then(|n| usize::try_from(n).map_err(|e| e.to_string()));
        match key {
            "seed" => self.seed = number(value)?,
            "version" => self.version = u8::try_from(small(value)?).map_err(|e| e.to_string())?,
            "cluster-bits" => self.cluster_bits = small(value)?,
            "refcount-order" => self.refcount_order = small(value)?,
            "size" => self.size = number(value)?,
            "backing" => self.backing = number(value)?,
            "compressed" => self.compressed = number(value)?,
            "zstd" => self.zstd = true,
            "lazy" => self.lazy = true,
            "serial" => self.serial = true,
            "small-caches" => self.small_caches = true,
            "queues" => self.queues = count(value)?,
            "unit" => self.unit = count(value)?,
            "in-flight" => self.in_flight = count(value)?,
            "delay-us" => self.delay_us = number(value)?,
            _ => return Err(format!("no setting: '{word}'")),
        }
        Ok(())
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |set: bool, word: &'static str| if set { word } else { "" };
        writeln!(
            f,
            "image version={} cluster-bits={} refcount-order={} size={:#x} backing={:#x} compressed={}{}{}",
            self.version,
            self.cluster_bits,
            self.refcount_order,
            self.size,
            self.backing,
            self.compressed,
            word(self.zstd, " zstd"),
            word(self.lazy, " lazy"),
        )?;
        writeln!(
            f,
            "open queues={}{}{}",
            self.queues,
            word(self.serial, " serial"),
            word(self.small_caches, " small-caches"),
        )?;
        write!(
            f,
            "run seed={} unit={} in-flight={} delay-us={}",
            self.seed, self.unit, self.in_flight, self.delay_us
        )
    }
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    pub setting: Setting,
    /// In the order in which they are sent.
    pub ops: Vec<Op>,
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.setting)?;
        self.ops.iter().try_for_each(|op| write!(f, "\n{op}"))
    }
}

impl FromStr for Script {
    type Err = String;

    /// Reads the text; the message of an error names the line.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut script = Script {
            setting: Setting {
                small_caches: false,
                ..Setting::default()
            },
            ops: Vec::new(),
        };
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            let mut words = line.split_whitespace();
            let read = match words.next() {
                None => Ok(()),
                Some("image" | "open" | "run") => {
                    words.try_for_each(|word| script.setting.set(word))
                }
                Some(_) => line.parse().map(|op| script.ops.push(op)),
            };
            read.map_err(|why| format!("line {number}: {why}"))?;
        }
        script.judge()?;
        Ok(script)
    }
}

impl Script {
    /// Is it one that can be run? Requests lie inside the disk and on its units.
    ///
    /// # Errors
    /// What is wrong.
    pub fn judge(&self) -> Result<(), String> {
        let Setting {
            unit,
            size,
            backing,
            in_flight,
            queues,
            ..
        } = self.setting;
        let whole = |n: u64| n.is_multiple_of(unit as u64);
        if unit < super::model::MIN_UNIT || !unit.is_multiple_of(8) || !whole(size) {
            return Err(format!("a disk of {size} bytes in units of {unit}"));
        }
        if backing > size || !whole(backing) || in_flight == 0 || queues == 0 {
            return Err("a setting that makes no sense".to_string());
        }
        for op in &self.ops {
            if let Some((offset, len)) = op.range()
                && (len == 0 || offset + len as u64 > size || !whole(offset) || !whole(len as u64))
            {
                return Err(format!("{op}: not on the units of the disk"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm::Params;

    /// What is written is read again, for every operation that the swarm draws.
    #[test]
    fn text_is_read_back() {
        for seed in 0..100 {
            let mut script = Params::draw(seed).script();
            script.ops.extend([Op::Wait, Op::Reopen, Op::Mark]);
            let text = script.to_string();
            assert_eq!(text.parse().as_ref(), Ok(&script), "{text}");
        }
    }

    /// Nonsense is refused, with its line.
    #[test]
    fn nonsense_is_refused() {
        for (text, why) in [
            ("run unit=512\nwrite 0 100", "not on the units"),
            ("run unit=512\n\nwrote 0 512", "line 3: no operation"),
            ("image size=many", "line 1: 'many'"),
            ("image colour=red", "no setting"),
            ("image size=0x1000\nwrite 0x1000 512", "not on the units"),
        ] {
            let error = text.parse::<Script>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
