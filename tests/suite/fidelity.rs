//! Promise: every rule that we follow has a row in `docs/fidelity/` and a test that cites it, and every
//! row's test exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The rules that are built so far.
const RULES: &[&str] = &[
    "1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.7", "1.8", "1.9", "1.10", //
    "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "2.7", //
    "3.1", "3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8", "3.9", "3.10", "3.11", //
    "4.1", "4.2", "4.3", "4.4", //
    "5.1", "5.2", "5.3", "5.4", "5.5", "5.6", "5.7", "5.9", "5.10", "5.11", //
    "6.1", "6.2", "6.3", "6.4", //
    "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8", "7.9", //
    "8.1", "8.2", "8.3", //
    "9.1", "9.2", "9.3", "9.4",
];

/// Folders with sources whose functions a row may name.
const SOURCES: [&str; 8] = [
    "coroutine",
    "aio",
    "block",
    "qcow2",
    "src",
    "tools",
    "tests",
    "xtask",
];

/// A rule without a row is not followed on purpose, and a row without its test is a claim.
#[test]
fn every_rule_has_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Named {
        tests,
        helpers,
        refusals,
        cited,
    } = named(root);
    let mut rows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for crate_name in ["coroutine", "aio", "block", "qcow2", "unit-behaviours"] {
        let path = root
            .join("docs/fidelity")
            .join(crate_name)
            .with_extension("md");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut column = None;
        for line in text.lines() {
            let cells: Vec<&str> = line
                .trim()
                .trim_matches('|')
                .split('|')
                .map(str::trim)
                .collect();
            if !line.trim_start().starts_with('|') {
                column = None;
                continue;
            }
            if let Some(at) = cells
                .iter()
                .position(|c| c.eq_ignore_ascii_case("test") || c.eq_ignore_ascii_case("tests"))
            {
                column = Some(at);
                continue;
            }
            let rule = cells[0].trim_matches(|c| c == '*' || c == '`');
            // Rows of other tables (unit behaviours, bad input) name tests, too.
            let is_rule = rule.starts_with(|c: char| c.is_ascii_digit());
            let Some(column) = column else {
                continue;
            };
            let named = names(cells.get(column).unwrap_or(&""));
            // What the reference tests and we do not: it waits for something, or there is nothing.
            let why = cells.get(column + 1).copied().unwrap_or_default();
            let is_case = crate_name == "unit-behaviours" && !rule.starts_with("--");
            if is_case && named.is_empty() && why.len() < 10 {
                wrong.push(format!("{crate_name}.md: {rule}: neither a test nor why"));
            }
            // A rule that comes later may have its row already, without a test.
            if is_rule && named.is_empty() && rule.split(',').any(|r| RULES.contains(&r.trim())) {
                wrong.push(format!("{crate_name}.md: rule {rule} names no test"));
            }
            for name in named {
                let said = |before: &str| cells[column].contains(&format!("{before} `{name}`"));
                let found = if said("doc test of") {
                    refusals.contains(&name)
                } else if said("that use") {
                    helpers.contains(&name)
                } else {
                    tests.contains(&name)
                };
                if !found {
                    wrong.push(format!(
                        "{crate_name}.md: rule {rule}: no test function `{name}`"
                    ));
                }
                for rule in rule.split(',').map(str::trim).filter(|_| is_rule) {
                    rows.entry(rule.to_string())
                        .or_default()
                        .insert(name.clone());
                }
            }
        }
    }
    wrong.extend(
        RULES
            .iter()
            .filter(|r| !rows.contains_key(**r))
            .map(|r| format!("rule {r}: no row")),
    );
    let uncited = RULES.iter().filter(|r| !cited.contains(**r));
    wrong.extend(uncited.map(|r| format!("rule {r}: no test cites it")));
    assert!(wrong.is_empty(), "docs/fidelity:\n{}", wrong.join("\n"));
}

/// The last part of each path in backticks.
fn names(cell: &str) -> Vec<String> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .map(|path| path.rsplit("::").next().unwrap_or(path).trim_end_matches("()").to_string())
        // A file is where the test lies, not its name.
        .filter(|name| !name.contains('/') && !name.contains('.'))
        .collect()
}

/// What a row may name.
#[derive(Default)]
struct Named {
    /// Functions below a test attribute.
    tests: BTreeSet<String>,
    /// All other functions: "all tests that use `each_engine`".
    helpers: BTreeSet<String>,
    /// Types whose documentation shows what does not compile: "the doc test of `Node`".
    refusals: BTreeSet<String>,
    /// Rules that a test cites: in its documentation, "Rules 3.1, 4.4", or in its name,
    /// `rule_3_1_`.
    cited: BTreeSet<String>,
}

fn named(root: &Path) -> Named {
    let mut named = Named::default();
    for folder in SOURCES {
        let mut folders = vec![root.join(folder)];
        while let Some(folder) = folders.pop() {
            for path in entries(&folder) {
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") {
                    named.collect(&fs::read_to_string(&path).expect("a source file"));
                }
            }
        }
    }
    named
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    entries.map(|e| e.expect("readable").path()).collect()
}

impl Named {
    fn collect(&mut self, source: &str) {
        let name = |rest: &str| -> String {
            rest.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        let (mut attribute, mut refused) = (false, false);
        let mut said = String::new();
        for line in source.lines().map(str::trim) {
            // `proptest!` and loom's models carry the same attribute.
            attribute |= line.starts_with("#[test]");
            if let Some(words) = line.strip_prefix("///") {
                said += words;
            }
            // The documentation of a type, up to its own line.
            refused |= line.starts_with("/// ```compile_fail");
            let line = line.strip_prefix("pub ").unwrap_or(line);
            if let Some(rest) = line.strip_prefix("fn ") {
                let functions = if attribute {
                    self.cited.extend(rules_in(&said, rest));
                    &mut self.tests
                } else {
                    &mut self.helpers
                };
                functions.insert(name(rest));
                attribute = false;
            }
            if !line.starts_with("///") && !line.starts_with("#[") {
                said.clear();
            }
            if let Some(rest) = line.strip_prefix("struct ") {
                if refused {
                    self.refusals.insert(name(rest));
                }
                refused = false;
            }
        }
    }
}

/// The rules that a test with this documentation and this name cites.
fn rules_in(said: &str, name: &str) -> Vec<String> {
    let mut rules = Vec::new();
    let mut parts = name.split('_').skip_while(|part| *part != "rule").skip(1);
    if let (Some(section), Some(number)) = (parts.next(), parts.next()) {
        rules.push(format!("{section}.{number}"));
    }
    if said.contains("Rule") || said.contains("rule") {
        let words = said.split(|c: char| !c.is_ascii_digit() && c != '.');
        rules.extend(words.map(|word| word.trim_matches('.').to_string()));
    }
    rules
}

/// The reader of tables sees what it should: paths are cut, files are no tests, and only tests
/// count.
#[test]
fn rows_and_tests_are_read_rightly() {
    assert_eq!(
        names("`a::b::one`, `two()` in `aio/src/x.rs`"),
        ["one", "two"]
    );
    let mut found = Named::default();
    let source = [
        "fn helper() {}",
        "/// Rules 3.1, 4.4: as it says.",
        "#[test]",
        "#[should_panic]",
        "fn real() {}",
        "/// Rule 9.9, of no test.",
        "fn other() {}",
        "pub struct Plain;",
        "/// ```compile_fail",
        "pub struct Refused;",
    ]
    .join("\n");
    found.collect(&source);
    let list = |set: BTreeSet<String>| set.into_iter().collect::<Vec<_>>();
    assert_eq!(list(found.tests), ["real"]);
    assert_eq!(list(found.helpers), ["helper", "other"]);
    assert_eq!(list(found.refusals), ["Refused"]);
    assert!(
        ["3.1", "4.4"]
            .iter()
            .all(|rule| found.cited.contains(*rule))
    );
    assert!(!found.cited.contains("9.9"));
    assert_eq!(rules_in("", "rule_5_10_what() {"), ["5.10"]);
}
