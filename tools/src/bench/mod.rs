//! `coblock bench`: the main job.
//!
//! ```text
//!   cli      what to do
//!   image    what it runs on: found, or made and removed
//!   queues   several loads at once, each in a thread of its own
//!   load     many requests at once, each a coroutine; checked on the way        pattern: what a sector holds
//!   verify   the image opened anew, all of it read                              ledger: what each block must hold
//!   report   what came out                                                      histogram: latencies
//! ```

pub mod cli;
mod histogram;
mod image;
mod ledger;
mod load;
mod pattern;
mod queues;
mod report;
mod verify;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coblock::block::BlockBackend;
use coblock::coroutine;
use coblock::qcow2::check::{self, CheckReport};
use coblock::qcow2::image_file::ImageFile;
use coblock::qcow2::{Qcow2, Qcow2Stats};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::time::{ClockId, clock_gettime};

use crate::explain::explain;
use crate::open::{Engine, Session};
use crate::output::{FAILURE, Output, os_message};
use crate::spec::{Access, ImageSpec};
use cli::Config;
use image::Image;
use ledger::Ledger;
use report::Report;
use verify::Tail;

/// How often the progress line changes.
const PROGRESS: Duration = Duration::from_millis(100);

/// Runs the job.
pub fn run(config: &Config) -> ExitCode {
    let mut out = Output::new("coblock bench");
    let status = match job(config, &mut out) {
        Ok(status) => status,
        Err(message) => {
            out.error(message);
            FAILURE
        }
    };
    ExitCode::from(out.finish(status))
}

/// Status after Ctrl-C, as a shell would give it.
const INTERRUPTED: u8 = 130;

fn job(config: &Config, out: &mut Output) -> Result<u8, String> {
    let interrupted = watch_signals()?;
    let image = Image::prepare(config)?;
    let job = Job {
        config,
        image: &image,
        interrupted: &interrupted,
    };
    let result = job.run(out);
    image.remove(out);
    let report = result?;
    for message in &report.outcome.messages {
        out.error(message);
    }
    out.line(if config.json {
        report.json().pretty()
    } else {
        report.human()
    });
    Ok(match report.is_good() {
        _ if report.interrupted => INTERRUPTED,
        true => 0,
        false => FAILURE,
    })
}

/// The first Ctrl-C ends the job early but in order, so that a temporary image is removed; a second
/// one ends the program.
fn watch_signals() -> Result<Arc<AtomicBool>, String> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::flag::{register, register_conditional_shutdown};
    let interrupted = Arc::new(AtomicBool::new(false));
    let watch = || -> std::io::Result<()> {
        for signal in [SIGINT, SIGTERM] {
            register_conditional_shutdown(signal, INTERRUPTED.into(), interrupted.clone())?;
            register(signal, interrupted.clone())?;
        }
        Ok(())
    };
    match watch() {
        Ok(()) => Ok(interrupted),
        Err(error) => Err(format!("signals: {}", os_message(&error))),
    }
}

/// One run, with what it was asked for.
struct Job<'c, 'i> {
    config: &'c Config,
    image: &'i Image,
    interrupted: &'i Arc<AtomicBool>,
}

/// What a load leaves behind for those who look at the image afterwards.
struct Loaded<'a> {
    report: Report<'a>,
    ledger: Option<Arc<Ledger>>,
    tail: Tail,
}

impl<'c> Job<'c, '_> {
    fn run(&self, out: &mut Output) -> Result<Report<'c>, String> {
        let qcow2 = self.image.spec.driver() == "qcow2";
        let writes = self.config.rw.writes();
        let leaks_before = match qcow2 && writes && !self.image.new {
            true => self.check()?.leaks,
            false => 0,
        };
        let Loaded {
            mut report,
            ledger,
            tail,
        } = self.load(out)?;
        report.leaks_before = leaks_before;
        if let Some(ledger) = ledger.filter(|_| self.config.verify) {
            self.verify(&mut report, ledger, tail)?;
        }
        if qcow2 && (writes || self.config.verify) {
            report.check = Some(self.check()?);
        }
        Ok(report)
    }

    /// Runs the load, and closes the image.
    fn load(&self, out: &mut Output) -> Result<Loaded<'c>, String> {
        let config = self.config;
        let session = Session::new(config.engine)?;
        let mut ledger = None;
        if let Some(backing) = &self.image.backing {
            match self.fill_backing(&session, backing) {
                Ok(filled) => ledger = Some(filled),
                Err(why) => {
                    session.close();
                    return Err(why);
                }
            }
        }
        let lay_out = self.image.new && ledger.is_none() && !config.rw.writes();
        let access = Access {
            write: config.rw.writes() || lay_out,
            cache: config.cache,
            ..Access::READ
        };
        let opened = session
            .home
            .run(|co| session.open(co, &self.image.spec, access));
        let backend = match opened {
            Ok(backend) => Arc::new(backend),
            Err(error) => {
                session.close();
                return Err(self.image.spec.could_not_open(&error));
            }
        };
        let result = self.load_on(&session, &backend, (ledger, lay_out), out);
        let closed = session.home.run(|co| backend.close(co));
        drop(backend);
        session.close();
        let mut loaded = result?;
        if let Err(error) = closed {
            loaded.report.outcome.failed(format!(
                "{}: close: {}",
                self.image.path,
                explain(&error)
            ));
        }
        Ok(loaded)
    }

    fn load_on(
        &self,
        session: &Session,
        backend: &Arc<BlockBackend>,
        (filled, lay_out): (Option<Arc<Ledger>>, bool),
        out: &mut Output,
    ) -> Result<Loaded<'c>, String> {
        let config = self.config;
        let path = &self.image.path;
        let block_size = config.block_size as u64;
        let used = config
            .size
            .map_or(backend.len(), |size| size.min(backend.len()));
        let blocks = usize::try_from(used / block_size).unwrap_or(usize::MAX);
        if blocks == 0 {
            return Err(format!(
                "{path}: {used} bytes are not one block of {block_size}"
            ));
        }
        let (mut ledger, tail) = match filled {
            Some(ledger) => {
                self.warm_up(session, backend, &ledger)?;
                (Some(ledger), Tail::default())
            }
            None => self.ledger(session, backend)?,
        };
        if lay_out {
            let ledger = ledger.get_or_insert(self.new_ledger(blocks)?);
            self.lay_out(session, backend, ledger)?;
        }
        let ledger = ledger.filter(|_| config.rw.writes() || config.verify);
        let engine = session.home.context().engine_name();
        let format = self.image.spec.driver().to_owned();
        if !config.json {
            out.line(Report::headline(config, &format, used, engine));
            out.flush();
        }
        let progress = Progress::new(config);
        let (cpu_before, coroutines_before) = (cpu_time(), coroutine::stats());
        let counted_before = qcow2_stats(backend);
        let statistics_before = backend.statistics();
        let target = load::Target {
            backend: backend.clone(),
            path,
            blocks,
            ledger: ledger.clone(),
            queue: 0,
            requests: config.requests,
            interrupted: self.interrupted,
        };
        let show = |time, done| progress.show(time, done);
        let (outcome, queues) = match config.queues {
            None => (load::run(config, &session.home, target, show)?, Vec::new()),
            Some(count) => queues::run(config, &session.home, &target, count, show)?,
        };
        let cpu = cpu_time().saturating_sub(cpu_before);
        let mut coroutines = since(coroutine::stats(), coroutines_before);
        for queue in &queues {
            coroutines.created += queue.coroutines.created;
            coroutines.reused += queue.coroutines.reused;
            coroutines.finished += queue.coroutines.finished;
            coroutines.switches += queue.coroutines.switches;
            coroutines.stale_wakes += queue.coroutines.stale_wakes;
        }
        progress.clear();
        let report = Report {
            config,
            format,
            used,
            engine,
            outcome,
            queues,
            cpu,
            coroutines,
            qcow2: qcow2_stats(backend).map(|now| counted(now, counted_before.unwrap_or_default())),
            backend: backend.statistics().since(&statistics_before),
            verified: None,
            check: None,
            leaks_before: 0,
            interrupted: self.interrupted.load(Ordering::Relaxed),
        };
        Ok(Loaded {
            report,
            ledger,
            tail,
        })
    }

    /// The ledger that the load needs, if any; knows what an image holds that is not ours.
    fn ledger(
        &self,
        session: &Session,
        backend: &Arc<BlockBackend>,
    ) -> Result<(Option<Arc<Ledger>>, Tail), String> {
        let config = self.config;
        if !config.rw.writes() && !config.verify {
            return Ok((None, Tail::default()));
        }
        let blocks = usize::try_from(backend.len() / config.block_size as u64);
        let blocks = blocks.unwrap_or(usize::MAX);
        if self.image.new || !config.verify {
            return Ok((Some(self.new_ledger(blocks)?), Tail::default()));
        }
        let mut ledger = Ledger::new(blocks, config.block_size, config.seed).map_err(no_memory)?;
        ledger.expect_content().map_err(no_memory)?;
        let (ledger, tail) = verify::remember(session, backend, ledger)
            .map_err(|why| format!("{}: {why}", self.image.path))?;
        Ok((Some(Arc::new(ledger)), tail))
    }

    fn new_ledger(&self, blocks: usize) -> Result<Arc<Ledger>, String> {
        let config = self.config;
        let ledger = Ledger::new(blocks, config.block_size, config.seed).map_err(no_memory)?;
        Ok(Arc::new(ledger))
    }

    /// Fills the empty image that shall be below.
    fn fill_backing(&self, session: &Session, spec: &ImageSpec) -> Result<Arc<Ledger>, String> {
        let access = Access {
            write: true,
            cache: self.config.cache,
            ..Access::READ
        };
        let opened = session.home.run(|co| session.open(co, spec, access));
        let backend = Arc::new(opened.map_err(|error| spec.could_not_open(&error))?);
        let blocks = backend.len() / self.config.block_size as u64;
        let filled = self
            .new_ledger(usize::try_from(blocks).unwrap_or(usize::MAX))
            .and_then(|ledger| self.lay_out(session, &backend, &ledger).map(|()| ledger));
        let closed = session.home.run(|co| backend.close(co));
        let filled = filled?;
        closed.map_err(|error| format!("{}: close: {}", spec.shown, explain(&error)))?;
        Ok(filled)
    }

    /// Fills a new image: every block once.
    fn lay_out(
        &self,
        session: &Session,
        backend: &Arc<BlockBackend>,
        ledger: &Arc<Ledger>,
    ) -> Result<(), String> {
        self.write_some(session, backend, ledger, (cli::Pattern::Write, 1))
    }

    /// Gives about two in five clusters of an overlay a place.
    fn warm_up(
        &self,
        session: &Session,
        backend: &Arc<BlockBackend>,
        ledger: &Arc<Ledger>,
    ) -> Result<(), String> {
        self.write_some(session, backend, ledger, (cli::Pattern::RandWrite, 4))
    }

    /// Writes one in `share` of the blocks, not measured.
    fn write_some(
        &self,
        session: &Session,
        backend: &Arc<BlockBackend>,
        ledger: &Arc<Ledger>,
        (rw, share): (cli::Pattern, usize),
    ) -> Result<(), String> {
        let mut config = self.config.clone();
        config.rw = rw;
        config.queues = None;
        config.runtime = Duration::MAX;
        let blocks = ledger.blocks();
        let target = load::Target {
            backend: backend.clone(),
            path: &self.image.path,
            blocks,
            ledger: Some(ledger.clone()),
            queue: 0,
            requests: Some((blocks / share) as u64),
            interrupted: self.interrupted,
        };
        let outcome = load::run(&config, &session.home, target, |_, _| {})?;
        match outcome.messages.into_iter().next() {
            Some(message) => Err(message),
            None => Ok(()),
        }
    }

    /// Opens the image anew, with nothing shared, and checks all that it holds.
    fn verify(
        &self,
        report: &mut Report<'c>,
        ledger: Arc<Ledger>,
        tail: Tail,
    ) -> Result<(), String> {
        let began = Instant::now();
        let session = Session::new(self.config.engine)?;
        let access = Access {
            cache: self.config.cache,
            ..Access::READ
        };
        let opened = session
            .home
            .run(|co| session.open(co, &self.image.spec, access));
        let backend = match opened {
            Ok(backend) => Arc::new(backend),
            Err(error) => {
                session.close();
                return Err(self.image.spec.could_not_open(&error));
            }
        };
        let blocks = ledger.blocks() as u64;
        let before = std::mem::take(&mut report.outcome);
        let result = verify::verify(&session, &backend, &self.image.path, ledger, tail, before);
        let closed = session.home.run(|co| backend.close(co));
        drop(backend);
        session.close();
        report.outcome = result.map_err(|why| format!("{}: {why}", self.image.path))?;
        closed.map_err(|error| format!("{}: close: {}", self.image.path, explain(&error)))?;
        report.verified = Some((blocks, began.elapsed()));
        Ok(())
    }

    /// Checks the metadata.
    fn check(&self) -> Result<CheckReport, String> {
        let session = Session::new(Engine::Auto)?;
        let spec = &self.image.spec;
        let result = session.home.run(|co| {
            let node = session.open_node(co, spec.file_options(Access::READ))?;
            let file = BlockBackend::new(&session.graph, node);
            let image = ImageFile::of_backend(co, &file);
            let checked = image
                .read_header()
                .and_then(|header| check::check(&image, &header, &mut |_| {}));
            let closed = file.close(co);
            checked.and_then(|report| closed.map(|()| report))
        });
        session.close();
        result.map_err(|error| format!("{}: check: {}", self.image.path, explain(&error)))
    }
}

fn no_memory(bytes: usize) -> String {
    format!("no memory for {bytes} bytes that describe blocks")
}

/// CPU time of this process so far, its kernel workers included.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

fn qcow2_stats(backend: &BlockBackend) -> Option<Qcow2Stats> {
    let node = backend.node();
    let driver = node.driver();
    let driver = driver.as_any()?;
    driver.downcast_ref::<Qcow2>().map(Qcow2::stats)
}

/// What happened between two looks.
fn counted(now: Qcow2Stats, before: Qcow2Stats) -> Qcow2Stats {
    Qcow2Stats {
        l2_misses: now.l2_misses - before.l2_misses,
        l2_evictions: now.l2_evictions - before.l2_evictions,
        refcount_misses: now.refcount_misses - before.refcount_misses,
        refcount_evictions: now.refcount_evictions - before.refcount_evictions,
        slices_cleaned: now.slices_cleaned - before.slices_cleaned,
        metadata_locks: now.metadata_locks - before.metadata_locks,
        dependency_waits: now.dependency_waits - before.dependency_waits,
        refcount_blocks_added: now.refcount_blocks_added - before.refcount_blocks_added,
        tables_grown: now.tables_grown - before.tables_grown,
        clusters_inflated: now.clusters_inflated - before.clusters_inflated,
    }
}

/// The same for coroutines; what exists now is as it is.
fn since(mut now: coroutine::Stats, before: coroutine::Stats) -> coroutine::Stats {
    now.created -= before.created;
    now.reused -= before.reused;
    now.finished -= before.finished;
    now.switches -= before.switches;
    now.stale_wakes -= before.stale_wakes;
    now
}

/// The line that tells how far the job is; only on a terminal.
struct Progress {
    bar: Option<ProgressBar>,
    shown: std::cell::Cell<Duration>,
    runtime: Duration,
}

impl Progress {
    fn new(config: &Config) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self {
            bar,
            shown: std::cell::Cell::new(Duration::ZERO),
            runtime: config.runtime,
        }
    }

    fn show(&self, time: Duration, done: u64) {
        let Some(bar) = &self.bar else { return };
        if time < self.shown.get() + PROGRESS {
            return;
        }
        self.shown.set(time);
        let rate = u128::from(done) * 1000 / time.as_millis().max(1);
        bar.set_message(format!(
            "{:.1} of {:.0} s, {done} requests, {rate} IOPS",
            time.as_secs_f64(),
            self.runtime.as_secs_f64()
        ));
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
