//! The tables, as Markdown that is also easy to read on a terminal.

use std::fmt::Write;

use super::engines::Engine;
use super::figures::{CPU, Figure, RATE};
use super::measure::Measured;

/// CPU, requests per second, goals, and what went wrong.
pub fn tables(all: &[Measured]) -> String {
    let engines = engines(all);
    let mut text = String::new();
    let mut cpu = Table::new(&["CPU s per 100 000"], &engines, &["x floor", "x qemu"]);
    let mut rate = Table::new(&["requests/s"], &engines, &["x best other", "resident MiB"]);
    for measured in all {
        let ratio = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.2}"));
        let cells = |figure: Figure, digits: usize| -> Vec<String> {
            let cell = |engine: &Engine| match measured.spread(*engine, figure) {
                Some(spread) => format!("{:.digits$}", spread.median),
                None => "-".into(),
            };
            engines.iter().map(cell).collect()
        };
        let name = vec![measured.row.name.to_string()];
        let to_floor = ratio(measured.ratio(Engine::Floor, CPU));
        let to_qemu = ratio(measured.ratio(Engine::Qemu, CPU));
        cpu.row([name.clone(), cells(CPU, 3), vec![to_floor, to_qemu]].concat());
        let resident = measured.resident_mib(Engine::Coblock);
        let resident = resident.map_or("-".into(), |mib| format!("{mib:.1}"));
        let to_best = ratio(measured.rate_to_best());
        rate.row([name, cells(RATE, 0), vec![to_best, resident]].concat());
    }
    let mut goals = Table::new(&["row", "goal", "measured", ""], &[], &[]);
    for measured in all {
        for verdict in measured.verdicts(all) {
            let value = verdict.measured.map_or("-".into(), |v| format!("{v:.2}"));
            let met = match (verdict.measured, verdict.met) {
                (None, _) => "not measured",
                (_, true) => "met",
                (_, false) => "**missed**",
            };
            goals.row(vec![
                measured.row.name.into(),
                verdict.goal,
                value,
                met.into(),
            ]);
        }
    }
    for table in [cpu, rate, goals] {
        writeln!(text, "{}", table.markdown()).expect("text grows");
    }
    for trouble in troubles(all) {
        writeln!(text, "- {trouble}").expect("text grows");
    }
    text
}

/// The programs that any row has, in their order.
pub fn engines(all: &[Measured]) -> Vec<Engine> {
    let mut engines: Vec<Engine> = Vec::new();
    for column in all.iter().flat_map(|measured| &measured.columns) {
        engines.push(column.engine);
    }
    engines.sort();
    engines.dedup();
    engines
}

fn troubles(all: &[Measured]) -> Vec<String> {
    let mut troubles = Vec::new();
    for measured in all {
        if let Some(why) = &measured.skipped {
            troubles.push(format!("{}: not measured: {why}", measured.row.name));
        }
        let notes = measured.columns.iter().filter_map(|c| c.trouble.as_deref());
        troubles.extend(notes.map(|why| why.replace('\n', "; ")));
    }
    troubles
}

/// Cells, of which the first column is text and the others stand to the right.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(first: &[&str], engines: &[Engine], last: &[&str]) -> Table {
        let names = engines.iter().map(|engine| engine.name());
        let head = first
            .iter()
            .copied()
            .chain(names)
            .chain(last.iter().copied());
        Table {
            rows: vec![head.map(str::to_string).collect()],
        }
    }

    fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.rows[0].len(), "a cell for each column");
        self.rows.push(cells);
    }

    fn markdown(&self) -> String {
        let columns = self.rows[0].len();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].chars().count());
                cells.max().unwrap_or(0).max(3)
            })
            .collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            let cells = row
                .iter()
                .zip(&widths)
                .enumerate()
                .map(|(column, (cell, width))| {
                    if column == 0 {
                        format!("{cell:<width$}")
                    } else {
                        format!("{cell:>width$}")
                    }
                });
            writeln!(text, "| {} |", cells.collect::<Vec<_>>().join(" | ")).expect("text grows");
            if number == 0 {
                let rules = widths
                    .iter()
                    .enumerate()
                    .map(|(column, width)| match column {
                        0 => "-".repeat(*width),
                        _ => format!("{}:", "-".repeat(width - 1)),
                    });
                writeln!(text, "| {} |", rules.collect::<Vec<_>>().join(" | "))
                    .expect("text grows");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The columns line up for the eye as well as for Markdown.
    #[test]
    fn a_table_lines_up() {
        let mut table = Table::new(&["row"], &[Engine::Qemu], &["x"]);
        table.row(vec!["a long name".into(), "1".into(), "0.25".into()]);
        assert_eq!(
            table.markdown(),
            "| row         | qemu |    x |\n\
             | ----------- | ---: | ---: |\n\
             | a long name |    1 | 0.25 |\n"
        );
    }
}
