//! The oracles: what an image on a simulated disk must be, after a run, a failure or a power cut.

use std::path::Path;
use std::sync::Arc;

use coblock::block::drivers::sim::SimDisk;
use coblock::block::{BlockBackend, Options, RequestFlags};
use coblock::coroutine::Co;
use coblock::qcow2::header::Incompatible;

use super::layers;
use super::model::{Content, History};
use super::peer;
use super::play::{BACKING, Played, Stage};
use super::session::Session;
use super::{sim, soundness};

/// What is wrong, in words.
pub type Verdict<T = ()> = Result<T, String>;

/// Opens images and looks at them; one for each thread.
pub struct Judge {
    session: Session,
}

impl Default for Judge {
    fn default() -> Self {
        Judge {
            session: sim::session(),
        }
    }
}

impl Judge {
    /// The end of a judge: nothing that it opened is left.
    pub fn end(self) {
        self.session.end();
    }

    fn open(&self, stage: &Stage, options: Options) -> Verdict<Arc<BlockBackend>> {
        self.session
            .open(options, &stage.gate())
            .map_err(|e| format!("open: {e}"))
    }

    /// Opens the image on `disk`, and closes it after `f`.
    fn with<R>(
        &self,
        stage: &Stage,
        options: Options,
        f: impl FnOnce(&Co, &BlockBackend) -> Verdict<R>,
    ) -> Verdict<R> {
        let backend = self.open(stage, options)?;
        let result = self.session.home.run(|co| {
            let result = f(co, &backend);
            let closed = backend.close(co).map_err(|e| format!("close: {e}"));
            result.and_then(|value| closed.map(|()| value))
        });
        drop(Arc::into_inner(backend).expect("nobody else holds this disk"));
        result
    }

    /// The guest's disk as the image on `disk` has it; what was added to its end must be zeros.
    pub fn contents(&self, stage: &Stage, disk: &Arc<SimDisk>) -> Verdict<Vec<u8>> {
        let options = sim::image(disk).with("read-only", "on");
        self.with(stage, options, |co, backend| {
            read(co, backend, stage.setting.size)
        })
    }

    /// What our check finds: no corruption; the number of leaks.
    pub fn sound(&self, disk: &Arc<SimDisk>) -> Verdict<u64> {
        match soundness::check(&self.session, disk)? {
            (0, leaks) => Ok(leaks),
            (corruptions, leaks) => Err(format!("{corruptions} corruptions, {leaks} leaks")),
        }
    }

    /// After a run in which nothing failed: no leak either, and every unit as the history says.
    pub fn after_all(&self, played: &mut Played) -> Verdict {
        played.stage.snapshot_is_whole()?;
        for disk in played.stage.layers() {
            let leaks = self.sound(&disk)?;
            if leaks > 0 {
                return Err(format!("{leaks} leaks"));
            }
        }
        let top = played.stage.top();
        let bytes = self.contents(&played.stage, &top)?;
        let len = soundness::disk_len(&top);
        played.history.len_now(len)?;
        let token = played.history.begin_read();
        let judged = played.history.end_read(&token, 0, &bytes);
        judged.map_err(|v| format!("reopened: {v}"))
    }

    /// What a power cut left after `at` entries of the log: sound but for leaks (unless it says that
    /// it is dirty), every unit as the history allows; a dirty image is repaired by opening it, and
    /// reads the same then. Returns what every unit holds.
    pub fn after_power_cut(
        &self,
        stage: &Stage,
        history: &History,
        at: usize,
        left: &Arc<SimDisk>,
    ) -> Verdict<Vec<Content>> {
        stage.snapshot_is_whole()?;
        let dirty = is_dirty(left);
        if !dirty {
            self.sound(left)?;
        }
        let layers = stage.layers();
        for below in &layers[..layers.len() - 1] {
            if !is_dirty(below) {
                self.sound(below)
                    .map_err(|why| format!("a lower image: {why}"))?;
            }
        }
        history.len_after_power_cut(at, soundness::disk_len(left))?;
        let bytes = self.contents(stage, left)?;
        let units = history.contents(&bytes);
        history
            .units_after_power_cut(at, &units)
            .map_err(|v| v.explain(history, &bytes))?;
        if dirty {
            let repaired = SimDisk::with_contents(&left.contents());
            let again = self.with(stage, sim::image(&repaired), |co, backend| {
                read(co, backend, stage.setting.size)
            })?;
            if again != bytes {
                return Err("repaired, it reads otherwise".to_string());
            }
            self.sound(&repaired)
                .map_err(|e| format!("repaired: {e}"))?;
        }
        Ok(units)
    }

    /// Refcounts that are made anew leave no leak, and every byte of the disk as it was.
    pub fn is_repaired(&self, stage: &Stage, left: &Arc<SimDisk>) -> Verdict {
        let repaired = SimDisk::with_contents(&left.contents());
        soundness::repair(&self.session, &repaired)?;
        match self.sound(&repaired)? {
            0 => {}
            leaks => return Err(format!("repaired, it has {leaks} leaks")),
        }
        match self.contents(stage, &repaired)? == self.contents(stage, left)? {
            true => Ok(()),
            false => Err("repaired, it reads otherwise".to_string()),
        }
    }

    /// The image can be written to as if nothing had happened, from end to end, and is sound then.
    pub fn goes_on(&self, stage: &Stage, left: &Arc<SimDisk>) -> Verdict {
        let setting = &stage.setting;
        let mut history = History::new(setting.size, setting.unit, setting.seed + 1);
        self.with(stage, sim::image(left), |co, backend| {
            if backend.len() < setting.size {
                let grown = backend.truncate(co, setting.size, true);
                grown.map_err(|e| format!("grow: {e}"))?;
            }
            let step = usize::try_from(setting.size.min(1 << 16)).expect("small");
            let mut buf = vec![0; step];
            for offset in (0..setting.size).step_by(step) {
                let left = usize::try_from(setting.size - offset).expect("a small disk");
                let part = buf.len().min(left);
                let id = history.begin_write(offset, &mut buf[..part], 0);
                backend
                    .pwrite(co, offset, &buf[..part], RequestFlags::empty())
                    .map_err(|e| format!("write at {offset:#x}: {e}"))?;
                history.end_write(id);
            }
            backend.flush(co).map_err(|e| format!("flush: {e}"))?;
            let token = history.begin_read();
            let bytes = read(co, backend, setting.size)?;
            let judged = history.end_read(&token, 0, &bytes);
            judged.map_err(|v| format!("written to again: {v}"))
        })?;
        self.sound(left)
            .map(drop)
            .map_err(|e| format!("written to again: {e}"))
    }

    /// The reference's check agrees: no corruption. A dirty image is repaired by it, and is sound
    /// then; one with leaks too, and reads the same. `folder` is for files.
    pub fn reference_agrees(&self, stage: &Stage, left: &Arc<SimDisk>, folder: &Path) -> Verdict {
        let path = folder.join("left.qcow2");
        let write = |path: &Path, disk: &SimDisk| {
            std::fs::write(path, disk.contents()).map_err(|e| format!("{}: {e}", path.display()))
        };
        write(&path, left)?;
        write(&folder.join(BACKING), &stage.base)?;
        for (nth, below) in stage.layers().iter().enumerate() {
            write(&folder.join(layers::file_name(nth)), below)?;
        }
        let name = path.to_str().expect("text");
        if is_dirty(left) {
            peer::qemu_img(&["check", "-q", "-r", "all", name]);
        }
        let found = peer::check(&path);
        if found.corruptions > 0 {
            return Err(format!("qemu-img check: {} corruptions", found.corruptions));
        }
        if found.leaks == 0 {
            return Ok(());
        }
        peer::qemu_img(&["check", "-q", "-r", "leaks", name]);
        let found = peer::check(&path);
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let repaired = SimDisk::with_contents(&bytes);
        if found != peer::Check::default()
            || self.contents(stage, &repaired)? != self.contents(stage, left)?
        {
            return Err(format!("its leaks repaired by qemu-img: {found:?}"));
        }
        Ok(())
    }
}

/// Does the header say that counts may be behind?
fn is_dirty(disk: &SimDisk) -> bool {
    let header = soundness::header(disk);
    header.incompatible.contains(Incompatible::DIRTY)
}

/// The first `size` bytes; zeros must follow.
fn read(co: &Co, backend: &BlockBackend, size: u64) -> Verdict<Vec<u8>> {
    const STEP: usize = 1 << 18;
    let len = usize::try_from(backend.len()).expect("a small disk");
    let mut bytes = vec![0xa5; len];
    for (index, piece) in bytes.chunks_mut(STEP).enumerate() {
        let offset = (index * STEP) as u64;
        backend
            .pread(co, offset, piece)
            .map_err(|e| format!("read at {offset:#x}: {e}"))?;
    }
    // It may have become shorter.
    let added = bytes.split_off(usize::try_from(size).expect("a small disk").min(len));
    if added.iter().any(|b| *b != 0) {
        return Err("what was added is not zeros".to_string());
    }
    Ok(bytes)
}
