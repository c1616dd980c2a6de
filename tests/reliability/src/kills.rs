//! Part: processes that are killed while they write to a real file. (R9.)
//!
//! ```text
//!   this process                          the victim: the same program
//!     makes an image, starts it   ------>   opens it, eight coroutines that write
//!     reads its lines             <------   "b offset len" before a write, "e number" behind it;
//!                                           "f" before a flush, "g number" behind it
//!     SIGKILL after so many lines ------>   .
//!     opens the image, judges it
//! ```
//!
//! A process that dies loses nothing of what the kernel has, but mappings wait in its own memory for
//! a flush, here as in the reference: what a flush covered that had ended is there, what was written
//! since may be. The number of lines is drawn from the seed; what the victim does until
//! the signal arrives belongs to the machine, and the model allows all of it.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{DenyAll, RequestFlags};

use super::image;
use super::judge::{Judge, Verdict};
use super::layers::Overlays;
use super::model::History;
use super::parallel::each;
use super::part::{Figure, Part, Plan, Report};
use super::play::Stage;
use super::rng::Rng;
use super::script::Setting;
use super::session::{self, Session};

/// This part.
pub const PART: Part = Part {
    name: "kills",
    promise: "a process is killed while it writes through the kernel to a real file: everything that \
              was flushed is there, and the image is sound",
    run: |plan, report| run(plan, report),
};

/// Writes in flight at once in a victim.
const WORKERS: usize = 8;
/// Longest write of a victim.
const LEN_MAX: u64 = 12 << 10;
/// A victim that nobody kills ends by itself.
const WRITES_MAX: u64 = 100_000;

/// The image of a seed.
fn setting(seed: u64) -> Setting {
    let mut rng = Rng::new(seed ^ 0x6b11);
    let cluster_bits = rng.pick(&[9, 10, 12, 16]);
    Setting {
        seed,
        cluster_bits,
        refcount_order: rng.pick(&[0, 3, 4, 6]),
        size: 4 << 20,
        lazy: rng.chance(30),
        small_caches: false,
        ..Setting::default()
    }
}

fn run(plan: &Plan, report: &mut Report) {
    let seeds: Vec<u64> = (0..plan.scale.pick(20, 200, 20_000)).collect();
    let (mut kills, mut ended) = (0, 0);
    for (seed, result) in seeds
        .iter()
        .zip(each(plan.jobs, &seeds, |seed| kill(*seed)))
    {
        match result.and_then(|judged| judged) {
            Ok(flushes) => {
                kills += 1;
                ended += flushes;
            }
            Err(why) => {
                let replay = format!("cargo xtask reliability --part kills   # seed {seed}");
                report.fail(&replay, &why);
            }
        }
    }
    report.count(Figure::Kills, kills);
    report.say(format!(
        "{kills} processes killed through {:?} in turn, after {ended} flushes that had ended",
        session::engines()
    ));
}

/// One victim; how many of its flushes had ended.
///
/// # Errors
/// What an oracle says, or a victim that ends by itself.
pub fn kill(seed: u64) -> Verdict<u64> {
    let setting = setting(seed);
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = folder.path().join("victim.qcow2");
    std::fs::write(&path, image::empty(&setting, None)).map_err(|e| e.to_string())?;
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut child = Command::new(program)
        .arg("victim")
        .arg(&path)
        .arg(seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut history = History::new(setting.size, setting.unit, seed);
    history.allow_racing_reads();
    let (mut ended, mut flushes) = (0, Vec::new());
    let mut hear = |line: &str| -> Verdict {
        let words: Vec<u64> = line[1..]
            .split_whitespace()
            .map(|word| word.parse().map_err(|e| format!("'{line}': {e}")))
            .collect::<Verdict<_>>()?;
        match (line.as_bytes()[0], &words[..]) {
            (b'b', [offset, len]) => {
                let mut scratch = vec![0; usize::try_from(*len).expect("short")];
                history.begin_write(*offset, &mut scratch, 0);
            }
            (b'e', [id]) => {
                history.end_write(*id);
            }
            (b'f', []) => flushes.push(history.begin_flush()),
            (b'g', [number]) => {
                let began = usize::try_from(*number).ok().and_then(|n| flushes.get(n));
                history.end_flush(*began.ok_or_else(|| format!("'{line}'"))?, 0);
                ended += 1;
            }
            _ => return Err(format!("the victim says '{line}'")),
        }
        Ok(())
    };
    let until = 40 + Rng::new(seed).below(1200);
    for _ in 0..until {
        match lines.next() {
            Some(line) => hear(&line.map_err(|e| e.to_string())?)?,
            None => return Err("the victim has ended by itself".to_string()),
        }
    }
    child.kill().map_err(|e| e.to_string())?;
    // What it said before it died was true; its last line may be cut off.
    let mut rest: Vec<String> = Vec::new();
    for line in lines {
        rest.push(line.map_err(|e| e.to_string())?);
    }
    child.wait().map_err(|e| e.to_string())?;
    for line in rest.iter().filter(|line| line.ends_with(' ')) {
        hear(line)?;
    }
    judge(&setting, history, &path)?;
    Ok(ended)
}

/// The image that the victim left.
fn judge(setting: &Setting, history: History, path: &Path) -> Verdict {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let left = SimDisk::with_contents(&bytes);
    let stage = Stage {
        setting: setting.clone(),
        disk: left.clone(),
        overlays: Overlays::default(),
        base: SimDisk::new(0),
        kept: std::sync::Arc::default(),
        audit: false,
    };
    let judge = Judge::default();
    // Sound unless dirty, and repaired where it is: as after a power cut that lost nothing.
    judge.after_power_cut(&stage, &history, usize::MAX, &left)?;
    judge.goes_on(&stage, &left)?;
    judge.end();
    Ok(())
}

/// What the workers of a victim share.
struct Shared {
    history: History,
    rng: Rng,
    left: u64,
    /// Flushes that have begun.
    flushes: u64,
}

/// The victim: writes to `path` until it is killed.
///
/// # Errors
/// What the image or the pipe says.
pub fn victim(words: &[String]) -> Result<bool, String> {
    let [path, seed] = words else {
        return Err("victim IMAGE SEED".to_string());
    };
    let seed: u64 = seed.parse().map_err(|e| format!("{seed}: {e}"))?;
    let setting = setting(seed);
    let engines = session::engines();
    let nth = usize::try_from(seed).expect("small") % engines.len();
    let session = Session::new(engines[nth]);
    let backend = session
        .open(session::image("qcow2", Path::new(path), false), &DenyAll)
        .map_err(|e| e.to_string())?;
    let shared = Rc::new(RefCell::new(Shared {
        history: History::new(setting.size, setting.unit, seed),
        rng: Rng::new(seed ^ 0x77),
        left: WRITES_MAX,
        flushes: 0,
    }));
    for _ in 0..WORKERS {
        let (shared, backend) = (shared.clone(), backend.clone());
        let unit = setting.unit as u64;
        let size = setting.size;
        session.home.spawn("writer", move |co| {
            loop {
                let (offset, data, id) = {
                    let mut shared = shared.borrow_mut();
                    if shared.left == 0 {
                        break;
                    }
                    shared.left -= 1;
                    let len = shared.rng.between(1, LEN_MAX).next_multiple_of(unit);
                    let offset = shared.rng.below((size - len) / unit) * unit;
                    let mut data = vec![0; usize::try_from(len).expect("short")];
                    let id = shared.history.begin_write(offset, &mut data, 0);
                    say(format_args!("b {offset} {len}"));
                    (offset, data, id)
                };
                backend
                    .pwrite(co, offset, &data[..], RequestFlags::empty())
                    .expect("a write");
                shared.borrow_mut().history.end_write(id);
                say(format_args!("e {id}"));
                if shared.borrow_mut().rng.chance(5) {
                    let number = shared.borrow().flushes;
                    shared.borrow_mut().flushes += 1;
                    say(format_args!("f"));
                    backend.flush(co).expect("a flush");
                    say(format_args!("g {number}"));
                }
            }
        });
    }
    while shared.borrow().left > 0 {
        session.home.poll(true);
    }
    Ok(true)
}

/// One line, in one write: whole or not there. It ends with a space, so that a part of it is known.
fn say(line: std::fmt::Arguments<'_>) {
    let line = format!("{line} \n");
    let mut out = std::io::stdout().lock();
    let said = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    said.expect("somebody listens");
}
