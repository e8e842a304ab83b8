//! Helpers that tests of several crates share: how a test says that it cannot run here, and how it has a process for itself.

use std::env;
use std::fmt::Display;
use std::io::Write;
use std::process::{Command, Stdio};

/// Written past the test harness, which shows nobody what a passing test prints.
pub fn skipped(reason: impl Display) {
    let test = std::thread::current();
    let name = test.name().unwrap_or("a test");
    // In one piece and on a line of its own, for the harness writes at the same time.
    let line = format!("\nSKIPPED: {name}: {reason}\n");
    // Without a place to say it the test is skipped all the same.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Set in a process that runs one test.
const ALONE: &str = "LLFREE_TEST_ALONE";

/// Runs what a test is about in a process of its own, beside others of its kind: for what would change the whole process,
/// or wait for what another test does to it.
///
/// Where the harness gives no test a thread with its name (one thread for all), it runs here.
///
/// # Panics
/// Where the test fails.
#[track_caller]
pub fn in_own_process(body: impl FnOnce()) {
    let thread = std::thread::current();
    match thread.name() {
        Some(test) if test != "main" && env::var_os(ALONE).is_none() => alone(test),
        _ => body(),
    }
}

#[track_caller]
fn alone(test: &str) {
    let mut command = Command::new(env::current_exe().expect("this test"));
    command.args(["--exact", test, "--nocapture"]).env(ALONE, "1");
    // What it says of a test that cannot run here is not kept back.
    let output = command.stderr(Stdio::inherit()).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{test} failed in a process of its own, {}", output.status);
    assert!(said.contains("1 passed"), "{test} did not run");
}
