//! The images: made when a row first needs them, judged after every write, gone in the end.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::engines::Engine;
use super::rows::{CLUSTER, FRESH_CLUSTERS, Image, REQUEST, Row};
use crate::Outcome;

/// What is written to the reference of the fresh images, and to them.
const FRESH_PATTERN: u8 = 0x5a;

/// Two folders full of images; dropping it removes them.
pub struct Images {
    folder: PathBuf,
    /// On tmpfs; `None` where there is none.
    in_memory: Option<PathBuf>,
    /// Bytes of data in every image but the fresh ones.
    size: u64,
}

impl Images {
    /// New folders below `dir` and, if it is a tmpfs, below /dev/shm.
    pub fn new(dir: &Path, size: u64) -> Result<Images, String> {
        let name = format!("coblock-bench-{}", std::process::id());
        let folder = dir.join(&name);
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let shm = Path::new("/dev/shm");
        let in_memory = (file_system(shm).as_deref() == Some("tmpfs")).then(|| shm.join(&name));
        if let Some(folder) = &in_memory {
            fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        }
        Ok(Images {
            folder,
            in_memory,
            size,
        })
    }

    /// Whether `image` can be had here; else why not.
    pub fn possible(&self, image: Image) -> Outcome {
        match image {
            Image::FreshInMemory if self.in_memory.is_none() => {
                Err("/dev/shm is not a tmpfs".into())
            }
            _ => Ok(()),
        }
    }

    /// What `engine` reads or writes in this row. An image that is only read is made once and then
    /// kept; a fresh one is made anew by every call.
    pub fn of(&self, row: &Row, engine: Engine) -> Result<PathBuf, String> {
        match row.image {
            Image::Full => self.full(),
            Image::Own => {
                let path = self.own(engine);
                if !path.exists() {
                    // QEMU's is always sound, and has what earlier rows wrote.
                    let qemu = self.own(Engine::Qemu);
                    let source = if qemu.exists() { qemu } else { self.full()? };
                    fs::copy(&source, &path).map_err(|e| format!("{}: {e}", path.display()))?;
                }
                Ok(path)
            }
            Image::Fresh => fresh(&self.folder),
            Image::FreshInMemory => {
                fresh(self.in_memory.as_ref().expect("asked `possible` before"))
            }
            Image::Chain => self.chain(),
            Image::Sparse(gib) => self.sparse(gib),
        }
    }

    /// The byte that a write row writes in round `round`.
    pub fn pattern(row: &Row, round: usize) -> u8 {
        match row.image {
            Image::Fresh | Image::FreshInMemory => FRESH_PATTERN,
            // Another one each time, so that the comparison sees this round's writes.
            _ => u8::try_from(1 + round % 255).expect("below 256"),
        }
    }

    /// After one program's run: a fresh image is sound and holds what was written; it is removed.
    pub fn judge_run(&self, row: &Row, path: &Path, count: u64) -> Outcome {
        match row.image {
            Image::Own => check(path),
            Image::Fresh | Image::FreshInMemory => {
                let reference = self.reference(row, count)?;
                check(path)?;
                compare(&reference, path)?;
                fs::remove_file(path).map_err(|e| format!("{}: {e}", path.display()))
            }
            Image::Full | Image::Chain | Image::Sparse(_) => Ok(()),
        }
    }

    /// After all programs' runs of a round: whether `engine` has the data that QEMU has.
    pub fn judge_round(&self, row: &Row, engine: Engine) -> Outcome {
        match row.image {
            Image::Own if engine != Engine::Qemu => {
                compare(&self.own(Engine::Qemu), &self.own(engine))
            }
            _ => Ok(()),
        }
    }

    /// After a failure of `engine`: its copy is made anew when it is next asked for.
    pub fn forget(&self, row: &Row, engine: Engine) {
        if row.image == Image::Own {
            // Removing fails only where there is none.
            let _ = fs::remove_file(self.own(engine));
        }
    }

    fn own(&self, engine: Engine) -> PathBuf {
        self.folder.join(format!("own-{}.qcow2", engine.name()))
    }

    /// Fully allocated, with other content in every block.
    fn full(&self) -> Result<PathBuf, String> {
        let path = self.folder.join("full.qcow2");
        if path.exists() {
            return Ok(path);
        }
        let raw = self.folder.join("full.raw");
        let failed = |e: std::io::Error| format!("{}: {e}", raw.display());
        let mut block = vec![0u8; 1 << 20];
        let mut file = fs::File::create(&raw).map_err(failed)?;
        let mut state = 1u64;
        for _ in 0..self.size >> 20 {
            for word in block.chunks_exact_mut(8) {
                // xorshift64: any content that is not zero will do.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_be_bytes());
            }
            file.write_all(&block).map_err(failed)?;
        }
        drop(file);
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &path])?;
        fs::remove_file(&raw).map_err(failed)?;
        settle(&path, false, true)?;
        Ok(path)
    }

    /// Top, middle and base, with a third of the clusters each.
    fn chain(&self) -> Result<PathBuf, String> {
        let top = self.folder.join("top.qcow2");
        if top.exists() {
            return Ok(top);
        }
        let mut below = self.full()?;
        let third = self.size / CLUSTER / 3;
        for (layer, path) in [(1, self.folder.join("middle.qcow2")), (2, top.clone())] {
            let backing = below.to_string_lossy().into_owned();
            let words = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &backing];
            qemu_img(&words, &[&path])?;
            fill(&path, third, 3 * CLUSTER, layer * CLUSTER)?;
            below = path;
        }
        Ok(top)
    }

    /// `gib` GiB with the clusters of `full` spread evenly over them.
    fn sparse(&self, gib: u64) -> Result<PathBuf, String> {
        let path = self.folder.join(format!("sparse-{gib}.qcow2"));
        if !path.exists() {
            create(&path, gib << 30)?;
            let clusters = self.size / CLUSTER;
            fill(&path, clusters, (gib << 30) / clusters, 0)?;
            // As its writer left it, the same data cost the floor up to a sixth more or less from
            // one image to the next.
            settle(&path, false, true)?;
        }
        Ok(path)
    }

    /// What a fresh image holds after `count` requests, written by QEMU.
    fn reference(&self, row: &Row, count: u64) -> Result<PathBuf, String> {
        let path = self.folder.join(format!("reference-{count}.qcow2"));
        if !path.exists() {
            create(&path, FRESH_CLUSTERS * CLUSTER)?;
            let (offset, step) = row.sequence(self.size);
            write(&path, count, REQUEST, step, offset, FRESH_PATTERN)?;
        }
        Ok(path)
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        for folder in self.in_memory.iter().chain([&self.folder]) {
            if let Err(e) = fs::remove_dir_all(folder) {
                eprintln!("cannot remove {}: {e}", folder.display());
            }
        }
    }
}

/// The type of the file system that `path` lies on; `None` when it cannot be told.
pub fn file_system(path: &Path) -> Option<String> {
    let output = Command::new("df")
        .arg("--output=fstype")
        .arg(path)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().nth(1)?.trim().to_string())
}

/// Brings the file into the page cache (`cached`), or out of it.
///
/// One that is `written` is taken out first in any case: ext4's buffered writes cost twice as much
/// in one file as in its copy when the cache holds them in pages of another size, which depends on
/// who read them before.
pub fn settle(path: &Path, cached: bool, written: bool) -> Outcome {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = fs::File::open(path).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    if written || !cached {
        drop_from_cache(path)?;
    }
    if cached {
        std::io::copy(&mut file, &mut std::io::sink()).map_err(failed)?;
    }
    Ok(())
}

/// dd of coreutils: with nocache and nothing to copy it drops the whole file from the cache.
fn drop_from_cache(path: &Path) -> Outcome {
    let output = Command::new("dd")
        .arg(format!("if={}", path.display()))
        .args(["of=/dev/null", "iflag=nocache", "count=0"])
        .output()
        .map_err(|e| format!("cannot run dd: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn fresh(folder: &Path) -> Result<PathBuf, String> {
    let path = folder.join("fresh.qcow2");
    if path.exists() {
        fs::remove_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    create(&path, FRESH_CLUSTERS * CLUSTER)?;
    Ok(path)
}

fn create(path: &Path, size: u64) -> Outcome {
    let words = ["create", "-q", "-f", "qcow2", "-o", &format!("size={size}")];
    qemu_img(&words, &[path])
}

/// Writes `count` whole clusters.
fn fill(path: &Path, count: u64, step: u64, offset: u64) -> Outcome {
    write(path, count, CLUSTER, step, offset, 7)
}

fn write(path: &Path, count: u64, size: u64, step: u64, offset: u64, pattern: u8) -> Outcome {
    let words = [
        "bench".to_string(),
        "-w".into(),
        format!("--pattern={pattern}"),
        format!("-c{count}"),
        "-d16".into(),
        format!("-s{size}"),
        format!("-S{step}"),
        format!("-o{offset}"),
        "-fqcow2".into(),
    ];
    qemu_img(&words.each_ref().map(String::as_str), &[path])
}

fn check(image: &Path) -> Outcome {
    qemu_img(&["check", "-q", "-f", "qcow2"], &[image])
}

fn compare(one: &Path, other: &Path) -> Outcome {
    qemu_img(
        &["compare", "-q", "-f", "qcow2", "-F", "qcow2"],
        &[one, other],
    )
}

fn qemu_img(words: &[&str], files: &[&Path]) -> Outcome {
    let output = Command::new("qemu-img")
        .args(words)
        .args(files)
        .output()
        .map_err(|e| format!("cannot run qemu-img: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let word = words.first().unwrap_or(&"");
    Err(format!(
        "qemu-img {word}: {}\n{}",
        output.status,
        text.trim()
    ))
}
