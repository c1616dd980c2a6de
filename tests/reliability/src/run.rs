//! Runs parts, prints what they say, and writes their figures down.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use serde_json::{Map, Value};

use super::parallel::message;
use super::part::{Figure, Part, Plan, Report, Scale};

/// What a part came to.
pub struct Done {
    pub part: Part,
    pub report: Report,
    pub seconds: f64,
}

/// Runs `parts` one after the other and prints each when it has ended.
pub fn run(parts: &[Part], plan: &Plan) -> Vec<Done> {
    let all = parts.iter().map(|part| {
        println!("== {}: {}", part.name, part.promise);
        let began = Instant::now();
        let mut report = Report::default();
        let ended = catch_unwind(AssertUnwindSafe(|| (part.run)(plan, &mut report)));
        if let Err(panic) = ended {
            let replay = format!("cargo xtask reliability --part {}", part.name);
            report.fail(&replay, &format!("the part itself: {}", message(&*panic)));
        }
        let done = Done {
            part: *part,
            report,
            seconds: began.elapsed().as_secs_f64(),
        };
        print(&done);
        done
    });
    all.collect()
}

fn print(done: &Done) {
    for note in &done.report.notes {
        println!("   {note}");
    }
    for failure in &done.report.failures {
        println!("   FAILED {failure}");
    }
    println!("   {}, {:.1} s", figures(&done.report), done.seconds);
}

fn figures(report: &Report) -> String {
    let mut words: Vec<String> = report
        .figures
        .iter()
        .map(|(figure, count)| format!("{count} {}", figure.name()))
        .collect();
    words.push(format!("{} failures", report.failures.len()));
    words.join(", ")
}

fn total(done: &[Done], figure: Figure) -> u64 {
    done.iter()
        .filter_map(|d| d.report.figures.get(&figure))
        .sum()
}

/// How many failures there were.
pub fn failures(done: &[Done]) -> u64 {
    done.iter().map(|d| d.report.failures.len() as u64).sum()
}

/// What a run of all parts has to come to, where it is not `--tenth`; scripts look after themselves,
/// since they need the reference.
const LEAST: [(Figure, u64); 4] = [
    (Figure::States, 100_000),
    (Figure::Runs, 30_000),
    (Figure::Seeds, 2_000),
    (Figure::Kills, 200),
];

/// Which figures are too small for what was promised.
pub fn shortfalls(done: &[Done]) -> Vec<String> {
    let short = LEAST
        .iter()
        .filter(|(figure, least)| total(done, *figure) < *least);
    let say = |(figure, least): &(Figure, u64)| {
        let (made, name) = (total(done, *figure), figure.name());
        format!("only {made} {name}; {least} were promised")
    };
    short.map(say).collect()
}

/// One line with everything.
pub fn summary(done: &[Done]) -> String {
    let mut words: Vec<String> = Figure::ALL
        .iter()
        .map(|figure| format!("{} {}", total(done, *figure), figure.name()))
        .collect();
    words.push(format!("{} failures", failures(done)));
    words.push(format!("{:.0} seconds", seconds(done)));
    words.join(", ")
}

fn seconds(done: &[Done]) -> f64 {
    done.iter().map(|d| d.seconds).sum()
}

/// The figures for programs.
pub fn to_json(done: &[Done]) -> String {
    let mut fields: Map<String, Value> = Figure::ALL
        .iter()
        .map(|figure| (figure.name().to_string(), total(done, *figure).into()))
        .collect();
    fields.insert("failures".to_string(), failures(done).into());
    fields.insert("seconds".to_string(), seconds(done).round().into());
    format!("{:#}\n", Value::Object(fields))
}

/// The figures for people: `docs/reliability.md`.
pub fn to_markdown(done: &[Done], scale: Scale) -> String {
    let command = match scale {
        Scale::Tenth => "cargo xtask reliability --tenth",
        Scale::Ci if total(done, Figure::Mutants) > 0 => "cargo xtask reliability",
        Scale::Ci => "cargo xtask reliability --ci",
        Scale::Release => "cargo xtask reliability --release-figures",
    };
    let mut text = format!(
        "# Reliability in figures\n\n\
         Written by `{command}`, which anyone can run again; `testing.md` says what each part does. Seeds and scripts are\n\
         fixed, so the same figures come out of the same code; only the seconds belong to the machine.\n\n\
         | part | what it shows | figures | failures | seconds |\n|---|---|---|---|---|\n"
    );
    for d in done {
        let counts: Vec<String> = d
            .report
            .figures
            .iter()
            .map(|(figure, count)| format!("{count} {}", figure.name()))
            .collect();
        writeln!(
            text,
            "| `{}` | {} | {} | {} | {:.0} |",
            d.part.name,
            d.part.promise,
            counts.join(", "),
            d.report.failures.len(),
            d.seconds
        )
        .expect("a string grows");
    }
    writeln!(text, "\nIn all: {}.", summary(done)).expect("a string grows");
    for d in done.iter().filter(|d| !d.report.notes.is_empty()) {
        writeln!(text, "\n## {}\n", d.part.name).expect("a string grows");
        for note in &d.report.notes {
            writeln!(text, "- {note}").expect("a string grows");
        }
    }
    text
}

/// Writes a file, and says where.
pub fn write(path: &Path, text: &str) -> Result<(), String> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    println!("written: {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: Part = Part {
        name: "example",
        promise: "adds up",
        run: |_, report| {
            report.count(Figure::States, 7);
            report.say("a note");
            report.fail("this command", "why");
        },
    };

    /// Figures of all parts are added up, and a part that panics has failed.
    #[test]
    fn figures_add_up() {
        let broken = Part {
            run: |_, _| panic!("broken"),
            ..PART
        };
        let plan = Plan {
            scale: Scale::Tenth,
            jobs: 1,
            quick: true,
        };
        let done = run(&[PART, PART, broken], &plan);
        assert_eq!(shortfalls(&done).len(), 4);
        assert_eq!(shortfalls(&done)[0], "only 14 states; 100000 were promised");
        let json: Value = serde_json::from_str(&to_json(&done)).unwrap();
        assert_eq!(
            (&json["states"], &json["failures"]),
            (&14.into(), &3.into())
        );
        assert_eq!(json["mutants"], 0);
        assert!(to_markdown(&done, Scale::Ci).contains("| `example` | adds up | 7 states | 1 |"));
    }
}
