//! How a model is walked: in a process of its own.
//!
//! For each interleaving loom maps a stack a thread and unmaps it again. Two tests that do so in one process wait for
//! each other's mappings, and the walk takes longer than one test after the other.

use loom::model::Builder;
use std::process::Command;
use std::string::String;
use std::{env, println};

/// Set in a process that walks one model.
const ALONE: &str = "LLFREE_MODEL_ALONE";

/// Walks every interleaving of `body` that the bounds of `model` allow.
///
/// Where the harness gives each test a thread of its own, that has the test's name.
#[track_caller]
pub(super) fn walk(model: &Builder, body: impl Fn() + Send + Sync + 'static) {
    let thread = std::thread::current();
    match thread.name() {
        Some(test) if test.contains("::") && env::var_os(ALONE).is_none() => alone(test),
        _ => model.check(body),
    }
}

#[track_caller]
fn alone(test: &str) {
    let mut command = Command::new(env::current_exe().expect("this test"));
    let output = command.args(["--exact", test, "--nocapture"]).env(ALONE, "1").output().expect("it starts");
    let [said, errors] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    println!("{said}{errors}");
    assert!(output.status.success(), "{test} failed in a process of its own, {}", output.status);
    assert!(said.contains("1 passed"), "{test} did not run");
}
