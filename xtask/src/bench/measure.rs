//! One row: rounds in which every program runs once, in an order that rotates, so that a slow
//! minute of a shared machine meets them all.

use indicatif::ProgressBar;

use super::engines::{Engine, Programs, Run, Sample};
use super::images::{self, Images};
use super::rows::Row;

/// What one program did in one row.
pub struct Column {
    pub engine: Engine,
    /// One for each round; empty where the program failed.
    pub samples: Vec<Sample>,
    /// It failed, and does not run again in this row.
    pub failed: bool,
    /// What is wrong with it or with what it wrote. Ours and QEMU have none: their failures end
    /// the whole run.
    pub trouble: Option<String>,
}

/// A row, measured.
pub struct Measured {
    pub row: &'static Row,
    /// Requests in one run.
    pub count: u64,
    pub columns: Vec<Column>,
    /// Why there are no figures.
    pub skipped: Option<String>,
}

impl Measured {
    /// The samples of `engine`, one for each round; none if it failed or was not asked for.
    pub fn samples(&self, engine: Engine) -> &[Sample] {
        let column = self.columns.iter().find(|c| c.engine == engine);
        column.map_or(&[], |c| &c.samples)
    }
}

/// How the rows are measured.
pub struct Bench {
    pub programs: Programs,
    pub images: Images,
    pub rounds: usize,
    pub scale: f64,
    /// Bytes of data in an image.
    pub size: u64,
}

impl Bench {
    /// The programs that can do this row.
    pub fn engines(&self, row: &Row) -> Vec<Engine> {
        let can = |engine: &Engine| match engine {
            // It knows only clusters that are there.
            Engine::Floor => !row.allocates(),
            Engine::Coblock | Engine::Qemu => true,
            // The sweeps ask how ours grows beside the floor.
            Engine::Imago | Engine::Qcow2Rs => !row.is_sweep(),
        };
        let found = self.programs.found.iter().map(|(engine, _)| *engine);
        found.filter(can).collect()
    }

    /// Runs that `row` takes, for the progress bar.
    pub fn runs(&self, row: &Row) -> u64 {
        (self.engines(row).len() * (self.rounds + 1)) as u64
    }

    /// Measures one row.
    ///
    /// # Errors
    /// Our program or QEMU failed, or what they wrote is not sound or not equal.
    pub fn measure(&self, row: &'static Row, progress: &ProgressBar) -> Result<Measured, String> {
        let count = row.requests(self.scale);
        let mut measured = Measured {
            row,
            count,
            columns: Vec::new(),
            skipped: None,
        };
        if let Err(why) = self.images.possible(row.image) {
            measured.skipped = Some(why);
            return Ok(measured);
        }
        let engines = self.engines(row);
        measured
            .columns
            .extend(engines.iter().map(|&engine| Column {
                engine,
                samples: Vec::new(),
                failed: false,
                trouble: None,
            }));
        let place = |engine: Engine, round: usize, why: String| {
            format!("{}, {}, round {round}: {why}", row.name, engine.name())
        };
        for round in 0..=self.rounds {
            // Round 0 only warms up, and is short.
            let count = match round {
                0 => (count / 8).max(row.depth),
                _ => count,
            };
            let mut columns: Vec<&mut Column> = measured.columns.iter_mut().collect();
            columns.rotate_left(round % engines.len());
            for column in &mut columns {
                progress.set_message(format!("{} · {}", row.name, column.engine.name()));
                progress.inc(1);
                if column.failed {
                    continue;
                }
                match self.run(row, column.engine, round, count) {
                    Ok((sample, sound)) => {
                        if round > 0 {
                            column.samples.push(sample);
                        }
                        column.note(sound.map_err(|why| place(column.engine, round, why)))?;
                    }
                    Err(why) => {
                        column.failed = true;
                        column.samples.clear();
                        column.note(Err(place(column.engine, round, why)))?;
                    }
                }
            }
            for column in columns {
                if column.failed {
                    self.images.forget(row, column.engine);
                    continue;
                }
                let equal = self.images.judge_round(row, column.engine);
                column.note(equal.map_err(|why| place(column.engine, round, why)))?;
            }
        }
        Ok(measured)
    }

    /// One run: what it cost, and whether what it wrote is sound.
    fn run(
        &self,
        row: &Row,
        engine: Engine,
        round: usize,
        count: u64,
    ) -> Result<(Sample, Result<(), String>), String> {
        let image = self.images.of(row, engine)?;
        images::settle(&image, !row.direct, row.write)?;
        let (offset, step) = row.sequence(self.size);
        let run = Run {
            row,
            image: &image,
            count,
            offset,
            step,
            pattern: Images::pattern(row, round),
        };
        let sample = self.programs.measure(engine, &run)?;
        Ok((sample, self.images.judge_run(row, &image, count)))
    }
}

impl Column {
    /// Keeps the first trouble of a peer; that of ours or of QEMU is returned.
    fn note(&mut self, outcome: Result<(), String>) -> Result<(), String> {
        match outcome {
            Err(why) if matches!(self.engine, Engine::Coblock | Engine::Qemu) => Err(why),
            Err(why) => {
                self.trouble.get_or_insert(why);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}
