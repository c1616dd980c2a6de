//! Parts: what `cargo xtask reliability` runs, and the figures that each returns.
//!
//! A part is a function that gets a [`Plan`] (how much) and fills a [`Report`] (what came of it). To
//! add one, write the function and enter it in the list in `main.rs`; its figures are then printed,
//! added up and written to `docs/reliability.md` and `target/reliability.json`.

use std::collections::BTreeMap;

/// How much a part does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scale {
    /// A tenth of CI's, for `cargo test`.
    Tenth,
    /// For each change.
    Ci,
    /// For each release.
    Release,
}

impl Scale {
    /// One of three amounts.
    pub fn pick<T>(self, tenth: T, ci: T, release: T) -> T {
        match self {
            Scale::Tenth => tenth,
            Scale::Ci => ci,
            Scale::Release => release,
        }
    }
}

/// What a part is asked to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub scale: Scale,
    /// Threads that it may keep busy.
    pub jobs: usize,
    /// Less of what only takes time: a run of CI, or of `cargo test`.
    pub quick: bool,
}

/// What is counted. The names are those of `target/reliability.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// Power cuts: disk contents that were reopened and judged.
    States,
    /// Runs in which one request to the file failed.
    Runs,
    /// Simulated seeds.
    Seeds,
    /// Inputs that a fuzz target was given.
    Executions,
    /// Processes that were killed.
    Kills,
    /// Scripts that were compared with the reference.
    Scripts,
    /// Requests of real threads.
    Requests,
    /// Mutants that were caught.
    Mutants,
}

impl Figure {
    /// All of them, in the order in which they are printed.
    pub const ALL: [Figure; 8] = [
        Figure::States,
        Figure::Runs,
        Figure::Seeds,
        Figure::Executions,
        Figure::Kills,
        Figure::Scripts,
        Figure::Requests,
        Figure::Mutants,
    ];

    /// Its name in the JSON file.
    pub fn name(self) -> &'static str {
        match self {
            Figure::States => "states",
            Figure::Runs => "runs",
            Figure::Seeds => "seeds",
            Figure::Executions => "executions",
            Figure::Kills => "kills",
            Figure::Scripts => "scripts",
            Figure::Requests => "requests",
            Figure::Mutants => "mutants",
        }
    }
}

/// What came of a part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub figures: BTreeMap<Figure, u64>,
    /// What went wrong, each with what replays it.
    pub failures: Vec<String>,
    /// Lines for the reader: further figures, and what could not be done here.
    pub notes: Vec<String>,
}

impl Report {
    /// Adds to a figure.
    pub fn count(&mut self, figure: Figure, more: u64) {
        *self.figures.entry(figure).or_default() += more;
    }

    /// Notes a failure; `replay` is a command line or a script.
    pub fn fail(&mut self, replay: &str, why: &str) {
        self.failures.push(format!("{why}\n  replay: {replay}"));
    }

    /// Notes a line for the reader.
    pub fn say(&mut self, line: impl Into<String>) {
        self.notes.push(line.into());
    }
}

/// A part of the machine.
#[derive(Clone, Copy)]
pub struct Part {
    /// One word, for `--part`.
    pub name: &'static str,
    /// What it shows, in a sentence.
    pub promise: &'static str,
    pub run: fn(&Plan, &mut Report),
}
