//! The script language: what a run does to a disk, as values and as text.
//!
//! A script is a [`Setting`] (what the image is like, how it is opened, how many requests are in
//! flight) and a list of [`Op`]s, which are sent in order. A seed generates one (`swarm.rs`,
//! `exhaustive.rs`), a human reads and writes it:
//!
//! ```text
//! # a comment
//! image version=3 cluster-bits=12 refcount-order=4 size=0x100000 backing=0x80000 compressed=4 kept=8 lazy
//! open serial small-caches queues=2 copy-on-read throttle-node ignore-discards
//! run seed=7 unit=512 in-flight=8 delay-us=200
//! write 0x1000 4096
//! flush
//! zero 0x0 512 unmap fua
//! move 1
//! drain
//! insert throttle
//! snapshot
//! ```
//!
//! A new feature adds its operation here, what it does to the disk in `load.rs`, and what it means in
//! `model.rs`; then every part of the machine uses it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use coblock::block::RequestFlags;

use super::changes::Change;

/// One request, or a step between requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `len` bytes at `offset`.
    Read { offset: u64, len: usize },
    /// Write `len` bytes at `offset`, stamped by the model.
    Write {
        offset: u64,
        len: usize,
        flags: RequestFlags,
    },
    /// Make `len` bytes at `offset` zeros.
    Zero {
        offset: u64,
        len: usize,
        flags: RequestFlags,
    },
    /// Give back the storage of `len` bytes at `offset`.
    Discard { offset: u64, len: usize },
    /// Copy `len` bytes, stamped by the model, from another disk to `offset`.
    Copy { offset: u64, len: usize },
    /// Make the disk `len` bytes long, if it is shorter.
    Grow { len: u64 },
    /// Make the disk `len` bytes long, if it is longer.
    Shrink { len: u64 },
    /// Make the disk `len` bytes long in a drained section, as a management tool does.
    Resize { len: u64 },
    /// A change of the graph.
    Change(Change),
    /// A drained section of the disk's node, held for a while.
    Drain,
    /// The same of all nodes.
    DrainAll,
    /// The main home takes the graph lock for writing.
    Lock,
    /// Whoever takes it sends what it takes from now on in the context of that queue.
    Move { queue: usize },
    /// Requests keep to these limits from now on: operations and bytes in a second; 0 is none.
    Throttle { iops: u64, bps: u64 },
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
            | Op::Write { offset, len, .. }
            | Op::Zero { offset, len, .. }
            | Op::Discard { offset, len }
            | Op::Copy { offset, len } => Some((offset, len)),
            Op::Grow { .. }
            | Op::Shrink { .. }
            | Op::Resize { .. }
            | Op::Change(_)
            | Op::Drain
            | Op::DrainAll
            | Op::Lock
            | Op::Move { .. }
            | Op::Throttle { .. }
            | Op::Flush
            | Op::Wait
            | Op::Reopen
            | Op::Mark => None,
        }
    }

    /// A write without flags.
    pub fn write(offset: u64, len: usize) -> Op {
        let flags = RequestFlags::empty();
        Op::Write { offset, len, flags }
    }

    /// Its first word in a script.
    pub fn word(&self) -> &'static str {
        match self {
            Op::Read { .. } => "read",
            Op::Write { .. } => "write",
            Op::Zero { .. } => "zero",
            Op::Discard { .. } => "discard",
            Op::Copy { .. } => "copy",
            Op::Grow { .. } => "grow",
            Op::Shrink { .. } => "shrink",
            Op::Resize { .. } => "resize",
            Op::Change(change) => change.word(),
            Op::Drain => "drain",
            Op::DrainAll => "drain-all",
            Op::Lock => "lock",
            Op::Move { .. } => "move",
            Op::Throttle { .. } => "throttle",
            Op::Flush => "flush",
            Op::Wait => "wait",
            Op::Reopen => "reopen",
            Op::Mark => "mark",
        }
    }

    fn flags(&self) -> RequestFlags {
        match *self {
            Op::Write { flags, .. } | Op::Zero { flags, .. } => flags,
            _ => RequestFlags::empty(),
        }
    }

    /// Does an overlay come above the image?
    pub fn is_snapshot(&self) -> bool {
        matches!(self, Op::Change(Change::Snapshot { .. }))
    }

    /// Must nothing else be in flight?
    pub fn alone(&self) -> bool {
        matches!(self, Op::Wait | Op::Reopen | Op::Mark)
    }
}

/// Words of flags that follow a write or zeros.
const FLAGS: [(&str, RequestFlags); 4] = [
    ("fua", RequestFlags::FUA),
    ("unmap", RequestFlags::MAY_UNMAP),
    ("fast", RequestFlags::NO_FALLBACK),
    ("serialising", RequestFlags::SERIALISING),
];

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        if let Some((offset, len)) = self.range() {
            write!(f, " {offset:#x} {len}")?;
        }
        for (word, flag) in FLAGS {
            if self.flags().contains(flag) {
                write!(f, " {word}")?;
            }
        }
        match *self {
            Op::Grow { len } | Op::Shrink { len } | Op::Resize { len } => {
                write!(f, " {len:#x}")
            }
            Op::Change(change) => f.write_str(change.behind()),
            Op::Move { queue } => write!(f, " {queue}"),
            Op::Throttle { iops, bps } => write!(f, " {iops} {bps}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let unknown = || format!("no operation: '{line}'");
        let size = |word: &str| usize::try_from(number(word)?).map_err(|e| e.to_string());
        Ok(match words[..] {
            [
                word @ ("read" | "write" | "zero" | "discard" | "copy"),
                at,
                len,
                ref rest @ ..,
            ] => {
                let (offset, len) = (number(at)?, size(len)?);
                let mut flags = RequestFlags::empty();
                for word in rest {
                    let known = FLAGS.iter().find(|(name, _)| name == word);
                    flags |= known.ok_or_else(unknown)?.1;
                }
                match word {
                    "write" => Op::Write { offset, len, flags },
                    "zero" => Op::Zero { offset, len, flags },
                    _ if !rest.is_empty() => return Err(unknown()),
                    "read" => Op::Read { offset, len },
                    "discard" => Op::Discard { offset, len },
                    _ => Op::Copy { offset, len },
                }
            }
            ["grow", len] => Op::Grow { len: number(len)? },
            ["shrink", len] => Op::Shrink { len: number(len)? },
            ["resize", len] => Op::Resize { len: number(len)? },
            ["drain"] => Op::Drain,
            ["drain-all"] => Op::DrainAll,
            ["lock"] => Op::Lock,
            ["move", queue] => Op::Move {
                queue: size(queue)?,
            },
            ["throttle", iops, bps] => Op::Throttle {
                iops: number(iops)?,
                bps: number(bps)?,
            },
            ["flush"] => Op::Flush,
            ["wait"] => Op::Wait,
            ["reopen"] => Op::Reopen,
            ["mark"] => Op::Mark,
            _ => Op::Change(Change::read(&words).ok_or_else(unknown)?),
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
    /// Plain clusters that the image begins with, and an internal snapshot that shares everything;
    /// 0: there is none.
    pub kept: u64,
    /// Refcounts are lazy, and the image dirty while it is open.
    pub lazy: bool,
    /// Requests take turns (serial mode).
    pub serial: bool,
    /// The smallest caches that are legal.
    pub small_caches: bool,
    /// Contexts that send requests.
    pub queues: usize,
    /// Requests go through a filter that copies on read.
    pub copy_on_read: bool,
    /// Limits are those of a filter node, not of the user.
    pub throttle_node: bool,
    /// Discards are ignored, as the driver does unless told otherwise.
    pub ignore_discards: bool,
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
            kept: 0,
            lazy: false,
            serial: false,
            small_caches: true,
            queues: 1,
            copy_on_read: false,
            throttle_node: false,
            ignore_discards: false,
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
            "kept" => self.kept = number(value)?,
            "lazy" => self.lazy = true,
            "serial" => self.serial = true,
            "small-caches" => self.small_caches = true,
            "queues" => self.queues = count(value)?,
            "copy-on-read" => self.copy_on_read = true,
            "throttle-node" => self.throttle_node = true,
            "ignore-discards" => self.ignore_discards = true,
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
            "image version={} cluster-bits={} refcount-order={} size={:#x} backing={:#x} compressed={} kept={}{}{}",
            self.version,
            self.cluster_bits,
            self.refcount_order,
            self.size,
            self.backing,
            self.compressed,
            self.kept,
            word(self.zstd, " zstd"),
            word(self.lazy, " lazy"),
        )?;
        writeln!(
            f,
            "open queues={}{}{}{}{}{}",
            self.queues,
            word(self.serial, " serial"),
            word(self.small_caches, " small-caches"),
            word(self.copy_on_read, " copy-on-read"),
            word(self.throttle_node, " throttle-node"),
            word(self.ignore_discards, " ignore-discards"),
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
    /// What it makes use of: its operations, their flags, and the settings that name a feature.
    pub fn words(&self) -> BTreeSet<&'static str> {
        let setting = &self.setting;
        let features = [
            ("two queues or more", setting.queues > 1),
            ("backing", setting.backing > 0),
            ("compressed", setting.compressed > 0),
            ("internal snapshot", setting.kept > 0),
            ("lazy", setting.lazy),
            ("serial", setting.serial),
            ("copy-on-read", setting.copy_on_read),
            ("throttle-node", setting.throttle_node),
            ("ignore-discards", setting.ignore_discards),
        ];
        let features = features.into_iter().filter(|(_, has)| *has);
        let mut words: BTreeSet<_> = features.map(|(word, _)| word).collect();
        for op in &self.ops {
            words.insert(op.word());
            let flags = FLAGS.iter().filter(|(_, flag)| op.flags().contains(*flag));
            words.extend(flags.map(|(word, _)| *word));
        }
        words
    }

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
        if self.setting.kept > 0 && (self.setting.version < 3 || self.setting.refcount_order < 3) {
            return Err("an internal snapshot needs version 3 and counts of 8 bits".to_string());
        }
        for op in &self.ops {
            if let Some((offset, len)) = op.range()
                && (len == 0 || offset + len as u64 > size || !whole(offset) || !whole(len as u64))
            {
                return Err(format!("{op}: not on the units of the disk"));
            }
            let fits = match *op {
                // Sectors, so that the format takes it.
                Op::Shrink { len } => len <= size && whole(len) && len.is_multiple_of(512),
                Op::Grow { len } => len >= size,
                Op::Resize { len } => len.is_multiple_of(512) && whole(len.min(size)),
                Op::Move { queue } | Op::Change(Change::Home { queue }) => queue < queues,
                _ => true,
            };
            if !fits {
                return Err(format!("{op}: not with this disk and these queues"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changes;
    use crate::swarm::Params;

    /// What is written is read again, for every operation that the swarm draws.
    #[test]
    fn text_is_read_back() {
        for seed in 0..100 {
            let mut script = Params::draw(seed).script();
            script.setting.queues = 4;
            script
                .ops
                .extend([Op::Wait, Op::Reopen, Op::Mark, Op::Drain]);
            script
                .ops
                .extend([Op::DrainAll, Op::Lock, Op::Move { queue: 0 }]);
            script.ops.push(Op::Shrink { len: 512 });
            script.ops.push(Op::Resize { len: 512 });
            script.ops.extend(changes::all().map(Op::Change));
            script.ops.push(Op::Throttle { iops: 9, bps: 0 });
            script.ops.push(Op::Write {
                offset: 0,
                len: 512,
                flags: RequestFlags::all(),
            });
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
            ("image version=2 kept=1", "needs version 3"),
            ("image size=0x1000\nwrite 0x1000 512", "not on the units"),
            ("discard 0x1000 512 fua", "line 1: no operation"),
            ("move 1", "not with this disk and these queues"),
            ("insert throttle high", "no operation"),
            ("resize 1000", "not with this disk and these queues"),
            ("shrink 0x10000000", "not with this disk and these queues"),
        ] {
            let error = text.parse::<Script>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
