//! Could the tests fail? Each mutant is a mistake in the product; each must be caught.
//!
//! A mutant is compiled in under the feature `mutants`, as `mutant!("its name")` beside the line
//! that it leaves out, swaps or forgets. A process makes one of them and goes hunting: hunters are
//! small workloads with their oracles. It is caught when a hunter fails, panics, aborts or hangs.
//! With no mutant chosen, every hunter must pass, or the catch means nothing.
//!
//! ```text
//!   reliability mutants             for each name: a child with a time limit
//!     reliability mutant NAME         hunter 1, states 1 2 3 ..   hunter 2 ..   says where it is
//!     TEST PROGRAM --exact TEST       for those that a test of a crate finds by its name (named.rs)
//! ```

mod named;

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::hunters;

/// Tells a program which mistake to make.
const CHOICE: &str = "COBLOCK_MUTANT";

/// What a mutant is a mistake in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    Mapping,
    Refcounts,
    Cache,
    Locks,
    Graph,
    Sections,
    Moves,
    Limits,
    Requests,
}

/// Those that are hunted, by the name at their place in the sources; the others are in `named.rs`.
pub const ALL: &[(Area, &str)] = &[
    (Area::Mapping, "mappings before counts"),
    (Area::Mapping, "no flush between counts and mappings"),
    (Area::Mapping, "no flush at the end of a flush"),
    (Area::Mapping, "no wait for a pending allocation"),
    (Area::Mapping, "what is in front of the data is not copied"),
    (Area::Mapping, "what is behind the data is not copied"),
    (Area::Mapping, "the last cluster of a run is not mapped"),
    (
        Area::Mapping,
        "a new table is published before it is written",
    ),
    (Area::Mapping, "shared clusters are written in place"),
    (
        Area::Mapping,
        "a longer disk comes before what hides its backing file",
    ),
    (Area::Refcounts, "freed clusters do not wait for a flush"),
    (Area::Refcounts, "clusters are freed under their readers"),
    (Area::Refcounts, "freed clusters are forgotten"),
    (
        Area::Refcounts,
        "clusters are free before their holes are punched",
    ),
    (Area::Refcounts, "a count above one goes to zero"),
    (
        Area::Refcounts,
        "a new refcount block does not count itself",
    ),
    (Area::Refcounts, "a count is written without its neighbours"),
    (Area::Refcounts, "no flush after the refcount table"),
    (
        Area::Refcounts,
        "the header switches to a table that is not flushed",
    ),
    (Area::Refcounts, "a lazy image is not marked dirty"),
    (Area::Cache, "dirty slices are evicted"),
    (Area::Cache, "pinned slices are evicted"),
    (Area::Cache, "an evicted slice stays in the directory"),
    (
        Area::Cache,
        "a change while a slice is written is forgotten",
    ),
    (Area::Cache, "slices are written side by side that are not"),
    (Area::Cache, "slices of a table that moved keep their place"),
    (Area::Cache, "a load wakes nobody"),
    (Area::Locks, "two passes at a time"),
    (Area::Locks, "an allocation forgets who waits for it"),
    (Area::Locks, "a mutex wakes nobody"),
    (Area::Locks, "a queue wakes only its first"),
    (Area::Locks, "a request that ends wakes nobody"),
    (
        Area::Locks,
        "serialising requests do not exclude each other",
    ),
    (
        Area::Locks,
        "a section does not see the requests of other contexts",
    ),
    (Area::Locks, "a section holds no request back"),
    (Area::Locks, "the turn of the throttled is not passed on"),
    (Area::Locks, "unshared bytes are not locked"),
    (Area::Locks, "nobody looks who else has the file"),
    (Area::Graph, "the end of a section lets nobody go on"),
    (Area::Graph, "a reader that leaves wakes no transaction"),
    (Area::Graph, "a transaction lets its nodes go too early"),
    (Area::Graph, "a user stays with the node that it leaves"),
    (Area::Graph, "a filter keeps its length"),
    (Area::Graph, "an abort leaves what was prepared"),
    (
        Area::Graph,
        "permissions are taken that others do not share",
    ),
];

/// How long the hunters may take where there is no mutant.
const LIMIT: Duration = Duration::from_secs(600);

/// A child that has ended.
struct Ended {
    /// Nothing if it had to be killed.
    status: Option<std::process::ExitStatus>,
    said: String,
    complained: String,
    seconds: f64,
}

impl Ended {
    fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// The last thing that it said it was doing.
    fn at(&self) -> &str {
        self.said.lines().last().unwrap_or("the start")
    }

    /// Why it failed: the first line of its complaints.
    fn why(&self) -> String {
        if self.status.is_none() {
            return "it hangs".to_owned();
        }
        let mut lines = self.complained.lines();
        let told = lines.find(|line| !line.is_empty() && !line.starts_with("thread "));
        told.unwrap_or_default().chars().take(120).collect()
    }
}

/// Looks for each mutant whose name contains `wanted`, and prints a line for each. True if all were
/// caught.
///
/// # Errors
/// The hunters or the tests find something where there is no mutant, or no child can be started.
pub fn run(wanted: &str) -> Result<bool, String> {
    if !cfg!(feature = "mutants") {
        return Err("built without the feature `mutants`; run `cargo xtask mutants`".to_string());
    }
    let chosen: Vec<_> = ALL
        .iter()
        .filter(|(_, name)| name.contains(wanted))
        .collect();
    let mut caught = 0;
    if !chosen.is_empty() {
        let honest = hunt("", LIMIT)?;
        if !honest.succeeded() {
            let (at, why) = (honest.at(), honest.why());
            return Err(format!(
                "without any mutant the hunters find something: {at} {why}"
            ));
        }
        println!("no mutant: nothing found, {:.1} s", honest.seconds);
        // Whoever takes so much longer than without a mutant hangs.
        let patience = Duration::from_secs_f64(60.0 + 4.0 * honest.seconds);
        for (area, name) in &chosen {
            let ended = hunt(name, patience)?;
            let area = format!("{area:?}").to_lowercase();
            let seconds = ended.seconds;
            if ended.succeeded() {
                println!("{area:9} {name}: SURVIVED, {seconds:.1} s");
            } else {
                caught += 1;
                let (at, why) = (ended.at(), ended.why());
                println!("{area:9} {name}: caught by {at}, {seconds:.1} s: {why}");
            }
        }
    }
    let (caught_by_tests, tried) = named::run(wanted)?;
    let (caught, all) = (caught + caught_by_tests, chosen.len() + tried);
    if all == 0 {
        return Err(format!("no mutant has '{wanted}' in its name"));
    }
    println!("{caught} of {all} mutants caught");
    Ok(caught == all)
}

fn hunt(name: &str, limit: Duration) -> Result<Ended, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(program);
    command.args(["mutant", name]).env_remove(CHOICE);
    child(&mut command, limit)
}

/// Runs `command` to its end, or kills it.
fn child(command: &mut Command, limit: Duration) -> Result<Ended, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let began = Instant::now();
    // Both are read to their ends by threads of their own, so that the child never waits for us.
    let said = reader(child.stdout.take());
    let complained = reader(child.stderr.take());
    let status = wait(&mut child, began, limit)?;
    Ok(Ended {
        status,
        seconds: began.elapsed().as_secs_f64(),
        said: said.join().unwrap_or_default(),
        complained: complained.join().unwrap_or_default(),
    })
}

fn reader(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error counts.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The child's status; nothing if it had to be killed.
fn wait(
    child: &mut Child,
    began: Instant,
    limit: Duration,
) -> Result<Option<std::process::ExitStatus>, String> {
    loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            return Ok(Some(status));
        }
        if began.elapsed() > limit {
            child.kill().map_err(|e| e.to_string())?;
            child.wait().map_err(|e| e.to_string())?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The child: makes the mistake `name` (none where it is empty) and lets all hunters run.
///
/// # Errors
/// What a hunter found.
pub fn make(name: &str) -> Result<(), String> {
    if !name.is_empty() {
        choose(name)?;
    }
    // A panic is a find, and its stacks are not unwound: what a mistake has left may hang there.
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        let place = panic.location().map(ToString::to_string);
        eprintln!("{message} ({})", place.unwrap_or_default());
        std::process::exit(1);
    }));
    for (hunter, states, run) in hunters::ALL {
        for state in 0..*states {
            // Before it runs: it may not come back.
            println!("{hunter}, state {}", state + 1);
            std::io::stdout().flush().map_err(|e| e.to_string())?;
            run(state).map_err(|why| format!("{hunter} {state}: {why}"))?;
        }
    }
    Ok(())
}

#[cfg(feature = "mutants")]
fn choose(name: &str) -> Result<(), String> {
    if !ALL.iter().any(|(_, known)| *known == name) {
        return Err(format!("no mutant '{name}'"));
    }
    coblock::coroutine::mutants::choose(name);
    Ok(())
}

#[cfg(not(feature = "mutants"))]
fn choose(name: &str) -> Result<(), String> {
    Err(format!("'{name}': built without the feature `mutants`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    fn in_sources() -> BTreeSet<String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut found = BTreeSet::new();
        let mut folders: Vec<_> = ["coroutine/src", "aio/src", "block/src", "qcow2/src"]
            .map(|folder| root.join(folder))
            .into();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs")
                    && !path.ends_with("coroutine/src/mutant.rs")
                {
                    let text = std::fs::read_to_string(path).unwrap();
                    let names = text.split("mutant!(\"").skip(1);
                    found.extend(names.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
                }
            }
        }
        found
    }

    fn all() -> impl Iterator<Item = (Area, &'static str)> {
        let named = named::ALL.iter().map(|(area, name, ..)| (*area, *name));
        ALL.iter().copied().chain(named)
    }

    /// The lists name every mutant of the sources once and no other, and have enough of each kind.
    #[test]
    fn the_lists_are_whole() {
        let listed: BTreeSet<String> = all().map(|(_, name)| name.to_owned()).collect();
        assert_eq!(listed, in_sources());
        assert_eq!(listed.len(), all().count(), "one is listed twice");
        let mut kinds = BTreeMap::new();
        for (area, _) in all() {
            *kinds.entry(area).or_insert(0) += 1;
        }
        assert!(
            kinds.len() == 9 && kinds.values().all(|many| *many >= 3),
            "{kinds:?}"
        );
        assert!(listed.len() >= 80);
    }

    /// Each test that is to find a mistake is in the program that is said to have it.
    #[test]
    fn named_tests_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for (_, mutant, program, test) in named::ALL {
            let (name, file) = program.split_once('/').unwrap();
            let (path, function) = match test.rsplit_once("::tests::") {
                Some((module, function)) => (format!("src/{module}/tests"), function),
                None => (format!("tests/{file}"), *test),
            };
            let path = root.join(name).join(path).with_extension("rs");
            let text = std::fs::read_to_string(&path)
                .unwrap_or_else(|e| panic!("'{mutant}': {}: {e}", path.display()));
            assert!(
                text.contains(&format!("#[test]\nfn {function}()")),
                "'{mutant}': {} has no test {function}",
                path.display()
            );
        }
    }

    /// Nothing of a mutant is in a program that is built without the feature: not even its name.
    #[test]
    fn normal_builds_have_no_mutants() {
        if cfg!(feature = "mutants") {
            return;
        }
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        // This test's own list holds each name once; a second one would be the product's.
        for (_, name) in all() {
            let times = program
                .windows(name.len())
                .filter(|bytes| *bytes == name.as_bytes())
                .count();
            assert!(times <= 1, "'{name}' is in this program {times} times");
        }
    }
}
