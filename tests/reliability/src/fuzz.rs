//! Fuzzing without a fuzzer: targets are plain functions of bytes, inputs come from a seed.
//!
//! ```text
//!   corpus + images of our own  --mutator-->  input  --target-->  signature: what it was told
//!                                                                    | never seen before?
//!                                                                    v
//!                                                            one more to mutate from
//! ```
//!
//! A panic, a leak of nodes or coroutines, or a difference to the model is a finding; its input is
//! left in a file. The mutator knows the format: it keeps the magic and breaks fields, entries and
//! counts (`qcow2/tests/support/damage.rs`). Everything is in memory, and a seed gives the same run
//! twice.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use coblock::block::drivers::sim::SimDisk;

use super::image;
use super::images::damage;
use super::images::rng::Rng as Damages;
use super::parallel::{each, message};
use super::part::{Figure, Part, Plan, Report};
use super::rng::Rng;
use super::script::Setting;
use super::targets;

/// Something that takes any bytes and returns what it was told.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]) -> String,
    /// Changes an input a little, by what the target's bytes mean.
    pub mutate: fn(&mut Vec<u8>, &mut Rng),
    /// What there is to mutate from besides the corpus.
    bases: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "open",
        run: targets::open,
        mutate: mutate_image,
        bases: image_bases,
    },
    Target {
        name: "operations",
        run: targets::operations,
        mutate: mutate_bytes,
        bases: || vec![(0..=255).collect(), vec![0x5a; 96]],
    },
    Target {
        name: "options",
        run: targets::options,
        mutate: mutate_text,
        bases: option_bases,
    },
    Target {
        name: "compressed",
        run: targets::compressed::compressed,
        mutate: targets::compressed::mutate,
        bases: targets::compressed::bases,
    },
];

/// This part.
pub const PART: Part = Part {
    name: "fuzz",
    promise: "images, operations, options and compressed clusters that a seed breaks: a result or an \
              error, never a panic, and never other bytes than the model's",
    run: |plan, report| part(plan, report),
};

fn part(plan: &Plan, report: &mut Report) {
    let executions = plan.scale.pick(2_000, 20_000, 2_000_000);
    for (target, result) in TARGETS.iter().zip(each(plan.jobs, TARGETS, |target| {
        fuzz(target, executions, 1)
    })) {
        let replay = format!(
            "cargo xtask fuzz --target {} --executions {executions}",
            target.name
        );
        match result {
            Ok(out) => {
                report.count(Figure::Executions, out.executions);
                report.say(format!(
                    "{}: {} executions, {} different ends",
                    target.name, out.executions, out.signatures
                ));
                for (why, _) in out.findings {
                    report.fail(&replay, &why);
                }
            }
            Err(why) => report.fail(&replay, &why),
        }
    }
}

/// Most inputs that are remembered in a run; the oldest stay.
const POOL_MAX: usize = 4096;
/// Longest input that goes into the committed corpus.
const KEEP_LEN_MAX: usize = 24 << 10;
/// Most files of one target in the committed corpus.
const KEEP_MAX: usize = 120;

/// Where the committed corpus of a target is.
pub fn corpus_folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target)
}

/// The committed corpus of a target, by name; empty where there is none.
pub fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    inputs(&corpus_folder(target)).unwrap_or_default()
}

/// The files of a folder, by name.
fn inputs(folder: &Path) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        files.push((name.into_owned(), std::fs::read(&path)?));
    }
    files.sort();
    Ok(files)
}

/// The target of that name.
///
/// # Errors
/// There is none; which there are.
pub fn target(name: &str) -> Result<&'static Target, String> {
    let found = TARGETS.iter().find(|target| target.name == name);
    found.ok_or_else(|| {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        format!("no target '{name}'; there are {}", names.join(", "))
    })
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Fuzzed {
    pub executions: u64,
    /// Different things that inputs were told.
    pub signatures: usize,
    /// Inputs that were told something new, in the order in which they were found.
    pub kept: Vec<Vec<u8>>,
    /// What went wrong, with the input.
    pub findings: Vec<(String, Vec<u8>)>,
}

/// Gives `target` so many inputs. Ends early after ten findings.
pub fn fuzz(target: &Target, executions: u64, seed: u64) -> Fuzzed {
    fuzz_from(target, Vec::new(), executions, seed)
}

/// The same, with more inputs to mutate from, which may be kept themselves.
pub fn fuzz_from(target: &Target, more: Vec<Vec<u8>>, executions: u64, seed: u64) -> Fuzzed {
    let mut rng = Rng::new(seed);
    let mut pool: Vec<Vec<u8>> = corpus(target.name).into_iter().map(|(_, b)| b).collect();
    pool.extend((target.bases)());
    let (mut seen, mut out) = (BTreeSet::new(), Fuzzed::default());
    let ours = pool.len() as u64;
    pool.extend(more);
    let planned = pool.len() as u64;
    for number in 0..executions.max(planned) {
        let input = if number < planned {
            pool[usize::try_from(number).expect("few")].clone()
        } else {
            let from = usize::try_from(rng.below(pool.len() as u64)).expect("few");
            let mut input = pool[from].clone();
            (target.mutate)(&mut input, &mut rng);
            input
        };
        out.executions += 1;
        match catch_unwind(AssertUnwindSafe(|| (target.run)(&input))) {
            Ok(signature) => {
                let is_new = seen.insert(signature) && number >= ours;
                if is_new && number >= planned && pool.len() < POOL_MAX {
                    pool.push(input.clone());
                }
                if is_new && out.kept.len() < POOL_MAX {
                    out.kept.push(input);
                }
            }
            Err(panic) => {
                out.findings.push((message(&*panic), input));
                if out.findings.len() == 10 {
                    break;
                }
            }
        }
    }
    out.signatures = seen.len();
    out
}

/// `reliability fuzz --target T --executions N --seed S [--from FOLDER] [--keep]`: prints a line for
/// each target; true if nothing was found. Inputs of the folder, such as libFuzzer leaves, come
/// first. With `--keep` the corpus grows by what was told something new.
///
/// # Errors
/// Words that mean nothing, files that cannot be written.
pub fn run(words: &[String]) -> Result<bool, String> {
    let (mut name, mut executions, mut seed, mut keep) = (None, 100_000, 1, false);
    let mut more = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--target" => name = Some(value()?.clone()),
            "--executions" => executions = value()?.parse().map_err(|e| format!("{word}: {e}"))?,
            "--seed" => seed = value()?.parse().map_err(|e| format!("{word}: {e}"))?,
            "--from" => {
                let folder = value()?;
                let files = inputs(Path::new(folder)).map_err(|e| format!("{folder}: {e}"))?;
                more.extend(files.into_iter().map(|(_, bytes)| bytes));
            }
            "--keep" => keep = true,
            other => {
                return Err(format!(
                    "unknown option '{other}'\n\n\
                     Usage: cargo xtask fuzz [--target T] [--executions N] [--seed S] [--from FOLDER] [--keep]"
                ));
            }
        }
    }
    let chosen: Vec<&Target> = match &name {
        Some(name) => vec![target(name)?],
        None => TARGETS.iter().collect(),
    };
    let mut clean = true;
    for target in chosen {
        let began = std::time::Instant::now();
        let out = fuzz_from(target, more.clone(), executions, seed);
        let seconds = began.elapsed().as_secs_f64();
        for (number, (why, input)) in out.findings.iter().enumerate() {
            let path = std::env::temp_dir().join(format!("{}-{seed}-{number}", target.name));
            std::fs::write(&path, input).map_err(|e| format!("{}: {e}", path.display()))?;
            println!("FOUND {why}\n  input: {}", path.display());
        }
        println!(
            "{}: {} executions, {} signatures, {} findings, {:.0} a second",
            target.name,
            out.executions,
            out.signatures,
            out.findings.len(),
            out.executions as f64 / seconds
        );
        clean &= out.findings.is_empty();
        if keep {
            keep_corpus(target, &out.kept)?;
        }
    }
    Ok(clean)
}

/// Adds inputs to the committed corpus: each of its files is told something else. Shorter ones come
/// first.
fn keep_corpus(target: &Target, kept: &[Vec<u8>]) -> Result<(), String> {
    let folder = corpus_folder(target.name);
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let old = corpus(target.name);
    let mut seen: BTreeSet<String> = old.iter().map(|(_, bytes)| (target.run)(bytes)).collect();
    let mut kept: Vec<&Vec<u8>> = kept.iter().collect();
    kept.sort_by_key(|input| input.len());
    let mut number = old.len();
    for input in kept {
        if number == KEEP_MAX || input.len() > KEEP_LEN_MAX {
            break;
        }
        if seen.insert((target.run)(input)) {
            let path = folder.join(format!("{number:03}"));
            std::fs::write(&path, input).map_err(|e| format!("{}: {e}", path.display()))?;
            number += 1;
        }
    }
    println!("{}: {number} files", folder.display());
    Ok(())
}

/// Small images: every width of a refcount, both versions, written to.
fn image_bases() -> Vec<Vec<u8>> {
    let cases = [
        (9, 4, 3),
        (9, 4, 2),
        (9, 0, 3),
        (9, 6, 3),
        (10, 3, 3),
        (12, 5, 3),
    ];
    let mut bases: Vec<Vec<u8>> = cases
        .map(|(cluster_bits, refcount_order, version)| {
            let setting = Setting {
                cluster_bits,
                refcount_order,
                version,
                size: 128 << 10,
                ..Setting::default()
            };
            let disk = SimDisk::with_contents(&image::empty(&setting, None));
            targets::fill(&disk);
            disk.contents()
        })
        .into();
    // One that names a backing file, with its format.
    let setting = Setting {
        cluster_bits: 9,
        size: 64 << 10,
        ..Setting::default()
    };
    bases.push(image::empty(&setting, Some("base.raw")));
    bases
}

/// Breaks fields that the mutator knows, or bytes of the first cluster behind the magic.
fn mutate_image(image: &mut Vec<u8>, rng: &mut Rng) {
    let field = |at: usize| {
        let bytes = image.get(at..at + 4);
        bytes.map_or(0, |b| u32::from_be_bytes(b.try_into().expect("four")))
    };
    let bits = field(20);
    // The mutator walks all tables: L1, refcount table, snapshots, bitmaps must be of some size.
    let small = field(36) < 1 << 14 && field(56) < 64 && field(60) < 64 && field(112) == 0;
    let whole = (9..=16).contains(&bits) && image.len() >= 1 << bits && image.len() >= 4096;
    let whole = whole && small;
    if whole && !rng.chance(20) {
        damage::damage(image, &mut Damages(rng.next() ^ 0x5eed));
        return;
    }
    for _ in 0..1 + rng.below(4) {
        let end = image.len().min(512) as u64;
        if end <= 4 {
            return;
        }
        let at = usize::try_from(4 + rng.below(end - 4)).expect("small");
        image[at] = value(rng, image[at]);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a byte is wanted")]
fn value(rng: &mut Rng, old: u8) -> u8 {
    match rng.below(4) {
        0 => old ^ (1 << rng.below(8)),
        1 => old.wrapping_add(1),
        2 => rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
        _ => rng.next() as u8,
    }
}

fn mutate_bytes(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(6) {
        let at = usize::try_from(rng.below(bytes.len().max(1) as u64)).expect("small");
        match rng.below(6) {
            0 if bytes.len() < 4096 => bytes.insert(at, value(rng, 0)),
            1 if bytes.len() > 1 => _ = bytes.remove(at),
            2 => bytes.truncate(at),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value(rng, *byte);
                }
            }
        }
    }
}

const WORDS: [&str; 18] = [
    "json:",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    ",,",
    "=",
    "driver",
    "file.filename",
    "\\u0000",
    "\\",
    "1e400",
    "-",
    "null",
    "true",
];

fn mutate_text(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = usize::try_from(rng.below(bytes.len() as u64 + 1)).expect("small");
    if rng.chance(60) && bytes.len() < 1024 {
        let word = rng.pick(&WORDS).bytes();
        bytes.splice(at..at, word);
    } else {
        mutate_bytes(bytes, rng);
    }
}

fn option_bases() -> Vec<Vec<u8>> {
    [
        "driver=qcow2,file.driver=file,file.filename=a,,b",
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a"},"x":[1,null,true,-1.5e3]}"#,
        r#"{"a":"\ud83d\ude00\n"}"#,
        "",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each input of the committed corpus is served without a panic, and each is told something
    /// else: the corpus is minimal, and within its size.
    #[test]
    fn the_corpus_is_replayed() {
        let mut bytes = 0;
        for target in TARGETS {
            let files = corpus(target.name);
            assert!(files.len() >= 2, "{}: {} files", target.name, files.len());
            let mut seen = BTreeSet::new();
            for (name, input) in files {
                bytes += input.len();
                let signature = (target.run)(&input);
                assert!(
                    seen.insert(signature.clone()),
                    "{}/{name}: another input is told the same: {signature}",
                    target.name
                );
            }
        }
        assert!(bytes < 1 << 20, "a corpus of {bytes} bytes");
    }

    /// A few hundred fresh inputs for each target; the same seed gives the same run.
    #[test]
    fn fresh_inputs() {
        for target in TARGETS {
            let out = fuzz(target, 300, 7);
            let found: Vec<&String> = out.findings.iter().map(|(why, _)| why).collect();
            assert!(found.is_empty(), "{}: {found:?}", target.name);
            assert!(out.signatures > 3, "{}: {out:?}", target.name);
            let again = fuzz(target, 100, 8);
            assert_eq!(again.kept, fuzz(target, 100, 8).kept, "{}", target.name);
        }
    }

    /// The canary: a target that breaks its promise is found out, with the input.
    #[test]
    fn canary_a_panic_is_found() {
        let broken = Target {
            name: "canary",
            run: |bytes| {
                assert!(!bytes.contains(&0x80), "a panic");
                String::new()
            },
            mutate: mutate_bytes,
            bases: || vec![vec![1; 16]],
        };
        let out = fuzz(&broken, 2000, 1);
        assert!(!out.findings.is_empty());
        assert!(
            out.findings
                .iter()
                .all(|(why, input)| why == "a panic" && input.contains(&0x80))
        );
    }
}
