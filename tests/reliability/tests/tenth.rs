//! A tenth of CI's processes that are killed and of its broken inputs; the other parts' tenths are in
//! `tests/suite/reliability.rs`, which needs no program of its own.

use std::process::Command;

fn tenth(part: &str, figure: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_reliability"))
        .args(["run", "--tenth", "--part", part])
        .output()
        .expect("the program can be run");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
    let last = told.lines().last().unwrap_or_default();
    assert!(
        last.contains(figure) && last.contains(" 0 failures"),
        "{told}"
    );
}

#[test]
fn killed_processes_lose_nothing_that_was_flushed() {
    tenth("kills", " 20 kills,");
}

#[test]
fn broken_inputs_are_told() {
    tenth("fuzz", " 8000 executions,");
}
