//! What `--record` leaves in `docs/`: the figures as JSON, the charts, and the tables, put between
//! two marks in `benchmarks.md`. What is written around them stays.

use std::fs;

use serde_json::Value;

use super::chart::chart;
use super::figures::{CPU, RATE};
use super::measure::Measured;
use super::table::tables;
use crate::Outcome;

/// Which part of the page a run fills.
pub struct Part {
    /// Of the marks, and in the names of the files.
    pub name: &'static str,
    pub cpu_title: &'static str,
    pub rate_title: &'static str,
}

/// Writes the files of `part`. `heading` says what was measured, where and how.
pub fn record(part: &Part, heading: &str, all: &[Measured], report: &Value) -> Outcome {
    let name = part.name;
    let json = serde_json::to_string_pretty(report).expect("numbers and text serialise");
    write(&format!("benchmarks-{name}.json"), &(json + "\n"))?;
    write(
        &format!("benchmarks-{name}-cpu.svg"),
        &chart(part.cpu_title, all, CPU, 3),
    )?;
    write(
        &format!("benchmarks-{name}-rate.svg"),
        &chart(part.rate_title, all, RATE, 0),
    )?;
    put(name, &format!("{heading}\n\n{}", tables(all)))
}

/// Writes a file of `docs/`.
pub fn write(name: &str, text: &str) -> Outcome {
    let path = crate::workspace().join("docs").join(name);
    fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Puts `text` between the marks of the part `name`.
pub fn put(name: &str, text: &str) -> Outcome {
    let path = crate::workspace().join("docs/benchmarks.md");
    let page = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    write("benchmarks.md", &put_between(&page, name, text)?)
}

/// `page` with `text` in place of what stands between its marks named `name`.
fn put_between(page: &str, name: &str, text: &str) -> Result<String, String> {
    let (begin, end) = (
        format!("<!-- begin {name} -->"),
        format!("<!-- end {name} -->"),
    );
    let missing = || format!("docs/benchmarks.md has no '{begin}' before '{end}'");
    let (head, rest) = page.split_once(&begin).ok_or_else(missing)?;
    let (_, tail) = rest.split_once(&end).ok_or_else(missing)?;
    Ok(format!("{head}{begin}\n{}\n{end}{tail}", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what stands between the marks changes, and a second time changes nothing more.
    #[test]
    fn the_rest_of_the_page_stays() {
        let page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n";
        let once = put_between(page, "x", "new\n").unwrap();
        assert_eq!(once, "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n");
        assert_eq!(put_between(&once, "x", "new").unwrap(), once);
        assert!(put_between(page, "y", "new").is_err());
    }

    /// The page has the marks of all parts.
    #[test]
    fn the_page_has_its_marks() {
        let page = include_str!("../../../docs/benchmarks.md");
        let parts = [&super::super::REQUESTS, &super::super::SWEEPS].map(|part| part.name);
        for part in parts.into_iter().chain(["queues", "graph"]) {
            assert!(put_between(page, part, "").is_ok());
        }
    }
}
