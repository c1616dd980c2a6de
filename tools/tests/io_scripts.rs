//! Random scripts through `coblock io` and `qemu-io`: each in its own copy of the same image, of
//! many shapes, with backing files and compressed clusters among them. What they print must be
//! equal, and so must be what the guest reads afterwards and what is allocated; `qemu-img check`
//! must find nothing wrong with ours.
//!
//! A script follows from its number. `COBLOCK_TEST_SCRIPT=17 cargo test --test io_scripts` runs and
//! prints number 17 alone.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use support::io::{Pair, Who, have_reference, must};
use support::words;

/// Scripts in the suite; `COBLOCK_TEST_SCRIPTS` asks for another number of them.
fn scripts() -> u64 {
    let asked = std::env::var("COBLOCK_TEST_SCRIPTS").ok();
    asked.map_or(200, |number| number.parse().expect("a number"))
}

const KIB: u64 = 1024;

/// An image that scripts work on.
struct Shape {
    name: &'static str,
    /// How it is made, in a folder where the others before it are.
    made_by: &'static [&'static str],
    /// Bytes of the disk.
    size: u64,
    /// Requests like these boundaries.
    cluster: u64,
}

const fn shape(
    name: &'static str,
    size: u64,
    cluster: u64,
    made_by: &'static [&'static str],
) -> Shape {
    Shape {
        name,
        made_by,
        size,
        cluster,
    }
}

const SHAPES: [Shape; 14] = [
    shape(
        "raw",
        1000 * KIB,
        4 * KIB,
        &[
            "qemu-img create -q -f raw raw 1000k",
            "qemu-io -f raw -c 'write -P 11 0 300k' -c 'write -P 12 500k 64k' raw",
        ],
    ),
    shape(
        "c512",
        600 * KIB,
        512,
        &["qemu-img create -q -f qcow2 -o cluster_size=512 c512 600k"],
    ),
    shape(
        "c4k",
        4096 * KIB,
        4 * KIB,
        &["qemu-img create -q -f qcow2 -o cluster_size=4k c4k 4M"],
    ),
    shape(
        "c64k",
        4096 * KIB,
        64 * KIB,
        &["qemu-img create -q -f qcow2 c64k 4M"],
    ),
    // The end of the disk is inside a cluster.
    shape(
        "c2m",
        5000 * KIB,
        2048 * KIB,
        &["qemu-img create -q -f qcow2 -o cluster_size=2M c2m 5000k"],
    ),
    shape(
        "v2",
        2048 * KIB,
        64 * KIB,
        &["qemu-img create -q -f qcow2 -o compat=v2 v2 2M"],
    ),
    shape(
        "prealloc",
        2048 * KIB,
        64 * KIB,
        &["qemu-img create -q -f qcow2 -o preallocation=metadata prealloc 2M"],
    ),
    shape(
        "over_raw",
        1500 * KIB,
        64 * KIB,
        &["qemu-img create -q -f qcow2 -b raw -F raw over_raw 1500k"],
    ),
    shape(
        "over_small",
        4096 * KIB,
        4 * KIB,
        &[
            "qemu-img create -q -f qcow2 -o cluster_size=64k mid 2M",
            "qemu-io -c 'write -P 21 0 200k' -c 'write -z 512k 128k' -c 'write -P 22 1M 1M' mid",
            "qemu-img create -q -f qcow2 -b mid -F qcow2 -o cluster_size=4k over_small 4M",
        ],
    ),
    shape(
        "over_two",
        2048 * KIB,
        64 * KIB,
        &[
            "qemu-img create -q -f qcow2 -b mid -F qcow2 one 2M",
            "qemu-io -c 'write -P 31 100k 300k' -c 'discard 1M 64k' -c 'write -z 1280k 128k' one",
            "qemu-img create -q -f qcow2 -b one -F qcow2 over_two 2M",
        ],
    ),
    shape(
        "v2_over",
        2048 * KIB,
        64 * KIB,
        &["qemu-img create -q -f qcow2 -b mid -F qcow2 -o compat=v2 v2_over 2M"],
    ),
    shape(
        "zlib",
        2048 * KIB,
        64 * KIB,
        &["qemu-img convert -c -O qcow2 mid zlib"],
    ),
    shape(
        "zstd",
        2048 * KIB,
        4 * KIB,
        &["qemu-img convert -c -O qcow2 -o compression_type=zstd,cluster_size=4k mid zstd"],
    ),
    shape(
        "over_zlib",
        2048 * KIB,
        64 * KIB,
        &["qemu-img create -q -f qcow2 -b zlib -F qcow2 over_zlib 2M"],
    ),
];

fn images() -> Option<&'static Path> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    if !have_reference() {
        return None;
    }
    let folder = FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("io-script-images");
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        fs::create_dir_all(&folder).unwrap();
        for line in SHAPES.iter().flat_map(|shape| shape.made_by) {
            let line = words(line);
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            must(line[0], &line[1..], &folder);
        }
        folder
    });
    Some(folder)
}

/// Numbers that follow from a seed (xorshift64*).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.below(1);
        random.below(1);
        random
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[usize::try_from(self.below(words.len() as u64)).unwrap()]
    }
}

/// One script: its image, and the words of the command line.
struct Script {
    shape: &'static Shape,
    words: Vec<String>,
    /// Results of several requests may come in any order.
    unordered: bool,
}

impl Script {
    fn new(number: u64) -> Self {
        let mut random = Random::new(number);
        let shape = &SHAPES[usize::try_from(number).unwrap() % SHAPES.len()];
        let mut script = Self {
            shape,
            words: Vec::new(),
            unordered: false,
        };
        let format = if shape.name == "raw" { "raw" } else { "qcow2" };
        let cache = random.of(&["writeback", "unsafe", "writeback", "writethrough"]);
        script.words = ["-f", format, "-t", cache].map(str::to_owned).to_vec();
        if random.one_in(8) {
            script.words.extend(["-d".to_owned(), "ignore".to_owned()]);
        }
        for _ in 0..12 + random.below(24) {
            script.step(&mut random);
        }
        script.command("map".to_owned());
        script.command("flush".to_owned());
        script.words.push(shape.name.to_owned());
        script
    }

    fn command(&mut self, command: String) {
        self.words.extend(["-c".to_owned(), command]);
    }

    /// A part of the disk, now and then beyond its end.
    fn range(&self, random: &mut Random) -> (u64, u64) {
        let Shape { size, cluster, .. } = *self.shape;
        if random.one_in(40) {
            return (size - random.below(3) * 512, 4096);
        }
        let unit = match random.below(4) {
            0 => 1,
            1 => 512,
            _ => cluster,
        };
        let offset = random.below(size.div_ceil(unit)) * unit;
        let longest = (cluster * 4 / unit).clamp(1, 1 << 12);
        let len = (1 + random.below(longest)) * unit;
        (offset, len.min(size - offset))
    }

    fn step(&mut self, random: &mut Random) {
        let (offset, len) = self.range(random);
        let byte = 1 + random.below(255);
        let command = match random.below(20) {
            0..=4 => format!("write -P {byte} {offset} {len}"),
            5 => format!("writev -P {byte} {offset} {} {}", len / 3, len - len / 3),
            6 => format!("write -z {offset} {len}"),
            7..=8 => format!("write -z -u {offset} {len}"),
            9..=10 => format!("discard {offset} {len}"),
            11..=12 => format!("read -P {byte} {offset} {len}"),
            13 => format!("read -v {offset} {}", len.min(64)),
            14 => "flush".to_owned(),
            15 => "map".to_owned(),
            16 => format!("alloc {offset} {len}"),
            17 => format!("write -f -P {byte} {offset} {len}"),
            _ => return self.beside(random),
        };
        self.command(command);
    }

    /// Some requests at once, none on the clusters of another, and their end.
    fn beside(&mut self, random: &mut Random) {
        let Shape { size, cluster, .. } = *self.shape;
        let mut at = 0;
        let mut requests = 0;
        for _ in 0..1 + random.below(4) {
            at += random.below(size / 3).next_multiple_of(cluster);
            if at >= size {
                break;
            }
            let skip = random.below(cluster.min(size - at));
            let len = (1 + random.below(cluster * 2)).min(size - at - skip);
            let byte = 1 + random.below(255);
            let command = match random.below(5) {
                0 => format!("aio_read -P {byte} {} {len}", at + skip),
                1 => format!("aio_write -z {} {len}", at + skip),
                2 => format!("aio_write -z -u {} {len}", at + skip),
                _ => format!("aio_write -P {byte} {} {len}", at + skip),
            };
            self.command(command);
            requests += 1;
            at = (at + skip + len).next_multiple_of(cluster);
        }
        self.unordered |= requests > 1;
        self.command("aio_flush".to_owned());
    }

    /// What the two programs did differently.
    fn differences(&self, images: &Path) -> Vec<String> {
        let pair = Pair::of(images);
        let [theirs, ours] = [Who::Reference, Who::Ours].map(|who| {
            let mut result = pair.run(who, &self.words, "");
            if self.unordered {
                let mut lines: Vec<_> = result.stdout.lines().collect();
                lines.sort_unstable();
                result.stdout = lines.join("\n");
            }
            result
        });
        let mut found = pair.differences(self.shape.name);
        if theirs != ours {
            let pairs = theirs.stdout.lines().zip(ours.stdout.lines());
            let first = pairs.into_iter().find(|(theirs, ours)| theirs != ours);
            found.push(match first {
                Some((theirs, ours)) => format!("reference: {theirs}\nours:      {ours}"),
                None => format!("-- reference\n{theirs}\n-- ours\n{ours}"),
            });
        }
        found
    }
}

/// Runs every fourth script, so that the test harness runs them on several processors.
fn run(first: u64) {
    let Some(images) = images() else {
        return;
    };
    let chosen = std::env::var("COBLOCK_TEST_SCRIPT").ok();
    let chosen: Option<u64> = chosen.map(|number| number.parse().expect("a number"));
    let mut wrong = Vec::new();
    let mut compared = 0;
    for number in (first..scripts()).step_by(4) {
        if chosen.is_some_and(|chosen| chosen != number) {
            continue;
        }
        let script = Script::new(number);
        if chosen.is_some() {
            println!("{:?}", script.words);
        }
        let found = script.differences(images);
        compared += 1;
        if !found.is_empty() {
            wrong.push(format!(
                "== script {number} on {}: {:?}\n{}",
                script.shape.name,
                script.words,
                found.join("\n")
            ));
        }
    }
    // `cargo xtask reliability` reads this line, and lines of other threads stay apart from it.
    print!("\n{compared} scripts compared\n");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn first_quarter() {
    run(0);
}

#[test]
fn second_quarter() {
    run(1);
}

#[test]
fn third_quarter() {
    run(2);
}

#[test]
fn last_quarter() {
    run(3);
}
