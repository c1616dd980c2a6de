//! Mistakes that one test of a crate finds, by its name: in what a request never meets or what only a
//! user of the library can ask for.
//!
//! The tests' programs are built once, with the feature; then each test must pass as it is, and fail
//! or hang with its mistake.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Area::{self, Graph, Limits, Locks, Moves, Requests, Sections};
use super::{CHOICE, Ended, child};

/// The mistake, the program (crate and test file, or `lib`) and the test that finds it.
pub const ALL: &[(Area, &str, &str, &str)] = &[
    (
        Sections,
        "what was postponed last runs first",
        "aio/postponed",
        "rule_6_2_in_the_order_postponed",
    ),
    (
        Sections,
        "a new section keeps no postponed action",
        "aio/postponed",
        "rule_6_3_a_new_section_keeps_the_rest",
    ),
    (
        Sections,
        "a request overtakes postponed ones",
        "aio/postponed",
        "rule_6_2_in_the_order_postponed",
    ),
    (
        Sections,
        "postponed actions outlive their owner",
        "aio/postponed",
        "rule_6_4_cancelled_never_runs",
    ),
    (
        Sections,
        "the end of a section runs no postponed action",
        "aio/postponed",
        "rule_6_2_in_the_order_postponed",
    ),
    (
        Sections,
        "sections do not reach upward",
        "block/drain",
        "rule_5_1_a_section_reaches_upward_and_waits_once",
    ),
    (
        Sections,
        "a section does not wait for those above",
        "block/drain",
        "a_section_that_takes_too_long_tells_who_is_busy",
    ),
    (
        Sections,
        "an inner section ends the outer one",
        "block/drain",
        "rule_5_2_sections_nest",
    ),
    (
        Sections,
        "nodes are born outside of sections",
        "block/drain",
        "rule_5_3_nodes_come_and_go_in_a_section_of_all",
    ),
    (
        Sections,
        "who comes to a drained node is not held back",
        "block/drain",
        "rule_5_4_edges_remember_whom_they_quiesced",
    ),
    (
        Sections,
        "who was held back last goes on first",
        "block/drain_users",
        "rule_5_5_requests_queue_in_order",
    ),
    (
        Sections,
        "a request that goes on is not counted",
        "block/drain_users",
        "rule_5_5_a_woken_request_is_counted_before_it_runs",
    ),
    (
        Sections,
        "a request that is held back is in flight",
        "block/drain_users",
        "rule_5_5_requests_queue_in_order",
    ),
    (
        Sections,
        "a section does not wait for operations of several requests",
        "block/drain_users",
        "rule_5_6_operations_of_several_requests",
    ),
    (
        Sections,
        "threads of devices go on in a section",
        "block/drain_devices",
        "rule_5_9_threads_of_devices_stop",
    ),
    (
        Sections,
        "a section that is about to begin is not in flight",
        "block/drain",
        "rule_5_1_from_another_context",
    ),
    (
        Sections,
        "a section looks only at whom it found at first",
        "block/drain_changes",
        "rule_5_11_a_section_waits_for_who_comes_meanwhile",
    ),
    (
        Sections,
        "a section waits for one node before it tells the next",
        "block/network",
        "rule_8_3_all_are_told_before_one_is_waited_for",
    ),
    (
        Locks,
        "a dead context takes its readers along",
        "block/lib",
        "graph_lock::tests::a_dead_context_leaves_its_count_to_the_orphans",
    ),
    (
        Locks,
        "a reader leaves where it came in",
        "block/moved_reader",
        "a_reader_leaves_in_the_context_where_it_is",
    ),
    (
        Locks,
        "a reader that leaves kicks no writer",
        "block/lib",
        "graph_lock::tests::leaving_readers_kick_a_waiting_writer",
    ),
    (
        Locks,
        "the end of a writer wakes no reader",
        "block/lib",
        "graph_lock::tests::readers_wait_for_a_writer_and_come_in_order",
    ),
    (
        Locks,
        "a writer does not look again with its flag set",
        "block/lib",
        "graph_lock::tests::leaving_readers_kick_a_waiting_writer",
    ),
    (
        Locks,
        "readers wait for a writer that waits",
        "block/lib",
        "graph_lock::tests::rule_7_5_a_writer_waits_with_readers_admitted",
    ),
    (
        Locks,
        "requests come while a writer waits",
        "block/graph_write",
        "rule_7_5_no_request_comes_while_a_writer_waits",
    ),
    (
        Locks,
        "a writer does not see who reads without counting",
        "block/graph_write",
        "rule_7_8_polls_and_writers_are_refused_meanwhile",
    ),
    (
        Locks,
        "a change wakes nobody who waits outside",
        "aio/wait_while",
        "the_main_home_waits_for_another_thread",
    ),
    (
        Locks,
        "a wait gives one level of the lock back",
        "aio/context_lock",
        "rule_3_11_a_wait_gives_back_all_levels",
    ),
    (
        Moves,
        "nobody is asked before a move",
        "block/moves",
        "rule_8_3_whoever_refuses_is_named",
    ),
    (
        Moves,
        "who comes while a move drains is not asked",
        "block/moves",
        "rule_8_3_whoever_comes_meanwhile_is_asked",
    ),
    (
        Moves,
        "those above a node that moves stay behind",
        "block/moves",
        "rule_8_3_a_whole_component_moves",
    ),
    (
        Moves,
        "nodes move without being drained",
        "block/moves",
        "rule_8_3_begin_in_the_old_end_in_the_new",
    ),
    (
        Moves,
        "handlers stay in the old home",
        "block/moves",
        "rule_8_3_begin_in_the_old_end_in_the_new",
    ),
    (
        Moves,
        "handlers come to the new home from elsewhere",
        "block/moves",
        "rule_8_3_begin_in_the_old_end_in_the_new",
    ),
    (
        Moves,
        "a move that fails leaves handlers nowhere",
        "block/moves",
        "rule_8_3_a_move_is_part_of_a_transaction",
    ),
    (
        Moves,
        "a device is not told that its node moved",
        "block/moves",
        "rule_8_3_whoever_refuses_is_named",
    ),
    (
        Moves,
        "a home may end with nodes that moved there",
        "block/moves_threads",
        "rule_8_3_a_context_ends_without_nodes",
    ),
    (
        Moves,
        "a closed node keeps its home",
        "block/moves_threads",
        "rule_8_3_a_context_ends_with_closed_nodes",
    ),
    (
        Moves,
        "a new node does not go where those below it live",
        "block/moves",
        "rule_8_3_new_nodes_go_where_theirs_live",
    ),
    (
        Graph,
        "an abort undoes the first step first",
        "block/transactions",
        "rule_8_2_all_or_nothing",
    ),
    (
        Graph,
        "a transaction leaves without cleaning",
        "block/transactions",
        "rule_8_2_all_or_nothing",
    ),
    (
        Graph,
        "what leaves the graph is not flushed",
        "block/transactions",
        "rule_8_2_what_cannot_be_flushed_stays",
    ),
    (
        Graph,
        "limits stay those of a child that has gone",
        "block/transactions",
        "limits_are_those_of_the_new_child",
    ),
    (
        Graph,
        "a driver keeps permissions that somebody refused",
        "block/reopen",
        "rule_8_2_a_refused_writer_is_given_up_by_all",
    ),
    (
        Graph,
        "a read-only node gets writers",
        "block/permissions",
        "rule_8_2_a_node_gets_other_options",
    ),
    (
        Limits,
        "the turn of the throttled does not go around",
        "block/throttle",
        "rule_8_1_members_take_turns",
    ),
    (
        Limits,
        "new limits restart nobody",
        "block/throttle",
        "rule_8_1_limits_change",
    ),
    (
        Limits,
        "a request overtakes throttled ones",
        "block/throttle",
        "rule_8_1_nobody_overtakes_who_waits",
    ),
    (
        Limits,
        "a section leaves the throttled waiting",
        "block/throttle",
        "rule_5_5_a_section_lifts_limits",
    ),
    (
        Limits,
        "who leaves a throttled queue takes its timer along",
        "block/throttle",
        "rule_8_1_who_leaves_the_queue_takes_nothing_along",
    ),
    (
        Requests,
        "callbacks come in the main context",
        "block/callbacks",
        "a_callback_waits_for_the_submitters_context",
    ),
    (
        Requests,
        "a request is over before its callback",
        "block/drain_users",
        "rule_5_7_a_section_waits_for_callbacks",
    ),
    (
        Requests,
        "a request that failed counts as done",
        "block/statistics",
        "each_kind_counts_its_operations_and_bytes",
    ),
];

/// How long a test may take; a mistake may make it hang.
const LIMIT: Duration = Duration::from_secs(60);

/// Each whose name contains `wanted`, with a line for each; how many were caught, of how many.
///
/// # Errors
/// A program cannot be built, or a test fails without a mistake.
pub fn run(wanted: &str) -> Result<(usize, usize), String> {
    let chosen: Vec<_> = ALL
        .iter()
        .filter(|(_, name, ..)| name.contains(wanted))
        .collect();
    let programs = programs(chosen.iter().map(|(_, _, program, _)| *program))?;
    let mut took = BTreeMap::new();
    let mut caught = 0;
    for &&(area, name, program, test) in &chosen {
        let path = &programs[program];
        let seconds = match took.get(&(program, test)) {
            Some(seconds) => *seconds,
            None => honest(path, test)?,
        };
        took.insert((program, test), seconds);
        // Whoever takes so much longer than without a mutant hangs.
        let patience = Duration::from_secs_f64(20.0 + 20.0 * seconds);
        let ended = play(path, test, name, patience)?;
        let area = format!("{area:?}").to_lowercase();
        let seconds = ended.seconds;
        if ended.succeeded() {
            println!("{area:9} {name}: SURVIVED, {program} {test}");
        } else {
            caught += 1;
            let why = ended.why();
            println!("{area:9} {name}: caught by {program} {test}, {seconds:.1} s: {why}");
        }
    }
    Ok((caught, chosen.len()))
}

/// How many seconds a test takes without a mistake; it passes.
fn honest(program: &Path, test: &str) -> Result<f64, String> {
    let ended = play(program, test, "", LIMIT)?;
    // Success alone would be that of no test at all.
    if !ended.succeeded() || !ended.said.contains("1 passed") {
        return Err(format!("{test} without a mutant: {}", ended.why()));
    }
    Ok(ended.seconds)
}

fn play(program: &Path, test: &str, mutant: &str, limit: Duration) -> Result<Ended, String> {
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]);
    command.env(CHOICE, mutant);
    child(&mut command, limit)
}

/// Builds these programs, beside our own, and tells where they are.
fn programs<'a>(
    wanted: impl Iterator<Item = &'a str>,
) -> Result<BTreeMap<&'a str, PathBuf>, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let profile = own.parent().expect("a program is in a folder");
    let target = profile.parent().expect("which is in one for all profiles");
    let mut of_crates: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for program in wanted {
        let (name, _) = program.split_once('/').expect("crate and file");
        of_crates.entry(name).or_default().insert(program);
    }
    let mut found = BTreeMap::new();
    for (name, programs) in of_crates {
        let mut cargo = Command::new("cargo");
        cargo
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
            .args(["test", "--quiet", "--no-run", "--message-format=json"])
            .args(["--profile", "reliability", "--target-dir"])
            .arg(target)
            .args(["--features", "coblock-coroutine/mutants"])
            .args(["--package", &format!("coblock-{name}")])
            .stderr(std::process::Stdio::inherit());
        for program in &programs {
            match program.split_once('/') {
                Some((_, "lib")) => cargo.arg("--lib"),
                Some((_, file)) => cargo.args(["--test", file]),
                None => unreachable!("it was split before"),
            };
        }
        let output = cargo
            .output()
            .map_err(|e| format!("cannot run cargo: {e}"))?;
        if !output.status.success() {
            return Err(format!("the tests of {name}: {}", output.status));
        }
        let built = executables(&String::from_utf8_lossy(&output.stdout));
        for program in programs {
            let file = program.split_once('/').map_or("", |(_, file)| file);
            let file = match file {
                "lib" => format!("coblock_{name}"),
                file => file.to_owned(),
            };
            let path = built.get(&file);
            let path = path.ok_or_else(|| format!("cargo does not say where {program} is"))?;
            found.insert(program, path.clone());
        }
    }
    Ok(found)
}

/// Test programs by the names of their targets, from what cargo says.
fn executables(messages: &str) -> BTreeMap<String, PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, message["executable"].as_str()?.into()))
        })
        .collect()
}
