//! `tools/gdb_coroutines.py` in a real gdb, on a live process and on a core file of it.

mod support;

#[path = "../examples/asleep.rs"]
mod asleep;

use std::process::Command;

use support::is_child;

const NAME: &str = "gdb_walks_suspended_coroutines";

/// Runs gdb with `commands`, on this binary's own test, or on `core`. None: it cannot be run here.
fn gdb(core: Option<&str>, commands: &[&str]) -> Option<String> {
    let program = std::env::current_exe().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/gdb_coroutines.py");
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch"]);
    gdb.args(["-iex", "set debuginfod enabled off"]);
    gdb.args(["-ex", &format!("source {script}")]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    match core {
        Some(core) => gdb.arg(program).arg(core),
        None => gdb
            .arg("--args")
            .arg(program)
            .args([NAME, "--exact", "--nocapture", "--test-threads=1"])
            .env(support::CHILD, NAME),
    };
    let output = match gdb.output() {
        Ok(output) => output,
        Err(why) => {
            println!("SKIPPED: gdb cannot be run: {why}");
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
            println!("SKIPPED: gdb says: {missing}");
            return None;
        }
    }
    Some(told)
}

/// Each coroutine is told with its name, its state, where it was created and where it waits, and
/// the functions that it is in; from outside, and from a core file; and the program goes on.
#[test]
fn gdb_walks_suspended_coroutines() {
    if is_child(NAME) {
        asleep::main().unwrap();
        return;
    }
    if !cfg!(target_arch = "x86_64") {
        println!("SKIPPED: the script knows the stacks of x86-64 only");
        return;
    }
    let core = format!(
        "{}/asleep-{}",
        env!("CARGO_TARGET_TMPDIR"),
        std::process::id()
    );
    let commands = [
        "break debugger::asleep::look_here",
        "run",
        "coroutines bt",
        "coroutines bt 99999",
        &format!("generate-core-file {core}"),
        "continue",
    ];
    let Some(told) = gdb(None, &commands) else {
        return;
    };
    assert!(told.contains("all have woken up"), "{told}");
    assert!(told.contains("no coroutine has life 99999"), "{told}");
    check(&told);
    let told = gdb(Some(&core), &["coroutines bt"]);
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
