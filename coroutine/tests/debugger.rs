//! `tools/gdb_coroutines.py` in a real gdb, on a live process and on a core file of it.

mod support;

#[path = "../examples/asleep.rs"]
mod asleep;

use std::io::Write as _;
use std::process::Command;

use support::is_child;

const STOP: &str = "break debugger::asleep::look_here";
const WALK: &str = "coroutines bt";

/// What gdb looks at.
enum On<'a> {
    /// A test of this binary, as a child.
    Test(&'a str),
    /// A core file of this binary.
    Core(&'a str),
}

/// Runs gdb with `commands`. None: it cannot be run here, which is said aloud.
fn gdb(on: On<'_>, commands: &[&str]) -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        writeln!(
            std::io::stderr(),
            "SKIPPED: the script knows the stacks of x86-64 only"
        )
        .expect("standard error");
        return None;
    }
    let program = std::env::current_exe().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/gdb_coroutines.py");
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch"]);
    gdb.args(["-iex", "set debuginfod enabled off"]);
    gdb.args(["-ex", &format!("source {script}")]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    match on {
        On::Core(core) => gdb.arg(program).arg(core),
        On::Test(name) => gdb
            .arg("--args")
            .arg(program)
            .args([name, "--exact", "--nocapture", "--test-threads=1"])
            .env(support::CHILD, name),
    };
    let output = match gdb.output() {
        Ok(output) => output,
        Err(why) => {
            writeln!(std::io::stderr(), "SKIPPED: gdb cannot be run: {why}")
                .expect("standard error");
            return None;
        }
    };
    let told = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy);
    let told = told.concat();
    for missing in [
        "ptrace: Operation not permitted",
        "\"Python\" language is not supported",
    ] {
        if told.contains(missing) {
            writeln!(std::io::stderr(), "SKIPPED: gdb says: {missing}").expect("standard error");
            return None;
        }
    }
    Some(told)
}

/// Each coroutine is told with its name, its state, where it was created and where it waits, and
/// the functions that it is in; and the program goes on.
#[test]
fn gdb_walks_suspended_coroutines() {
    const NAME: &str = "gdb_walks_suspended_coroutines";
    if is_child(NAME) {
        return asleep::main().unwrap();
    }
    let Some(told) = gdb(
        On::Test(NAME),
        &[STOP, "run", WALK, "coroutines bt 99999", "continue"],
    ) else {
        return;
    };
    assert!(told.contains("all have woken up"), "{told}");
    assert!(told.contains("no coroutine has life 99999"), "{told}");
    check(&told);
}

/// The same in a core file. With guards by mprotect: where there are guard markers, the core files
/// that gdb writes have zeros.
#[test]
fn gdb_walks_coroutines_of_a_core_file() {
    const NAME: &str = "gdb_walks_coroutines_of_a_core_file";
    if is_child(NAME) {
        coblock_coroutine::force_mprotect_guards();
        return asleep::main().unwrap();
    }
    let core = format!(
        "{}/asleep-{}",
        env!("CARGO_TARGET_TMPDIR"),
        std::process::id()
    );
    let write = format!("generate-core-file {core}");
    if gdb(On::Test(NAME), &[STOP, "run", &write, "kill"]).is_none() {
        return;
    }
    let told = gdb(On::Core(&core), &[WALK]);
    std::fs::remove_file(&core).unwrap();
    check(&told.expect("gdb was there a moment ago"));
}

fn check(told: &str) {
    let lines: Vec<&str> = told.lines().collect();
    let place = |wanted: &str| {
        let found = lines.iter().position(|line| line.contains(wanted));
        found.unwrap_or_else(|| panic!("no '{wanted}' in {told}"))
    };
    let hungry = place("'hungry': suspended at coroutine/");
    let reader = place("'reader': waiting for an operation 'the morning paper' at coroutine/");
    let unborn = place("'unborn': not started; created at coroutine/");
    assert_eq!(lines[unborn + 1], "3 coroutines", "{told}");
    let calls = |from: usize, to: usize, function: &str| {
        let calls = lines[from + 1..to].iter();
        calls.filter(|line| line.contains(function)).count()
    };
    assert_eq!(
        calls(hungry, reader, "asleep::waits_for_dinner"),
        3,
        "{told}"
    );
    assert_eq!(
        calls(reader, unborn, "asleep::reads_the_paper"),
        1,
        "{told}"
    );
    assert_eq!(
        calls(hungry, reader, "in debugger::asleep::main::"),
        1,
        "{told}"
    );
}
