//! Helpers that tests of several crates share: how a test says that it cannot run here.

use std::fmt::Display;
use std::io::Write;

/// Written past the test harness, which shows nobody what a passing test prints.
pub fn skipped(reason: impl Display) {
    let test = std::thread::current();
    let name = test.name().unwrap_or("a test");
    // In one piece and on a line of its own, for the harness writes at the same time.
    let line = format!("\nSKIPPED: {name}: {reason}\n");
    // Without a place to say it the test is skipped all the same.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
