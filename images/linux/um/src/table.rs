//! The table of checks, as the other test beds print it.

use crate::plan::Fault;
use std::time::Instant;

/// Checks so far.
#[derive(Default)]
pub(crate) struct Checks {
    rows: Vec<String>,
    failed: usize,
}

impl Checks {
    /// Runs a check, which says what it saw; whether it passed.
    pub(crate) fn check(&mut self, name: &str, deed: impl FnOnce() -> Result<String, Fault>) -> bool {
        let start = Instant::now();
        let result = deed();
        let (verdict, saw) = match &result {
            Ok(saw) => ("passed", saw.clone()),
            Err(fault) => ("FAILED", fault.to_string()),
        };
        self.failed += usize::from(result.is_err());
        let row = format!("{name:<64} {verdict:<7} {:>4}", start.elapsed().as_secs());
        println!("==> {row}  ({saw})");
        self.rows.push(row);
        result.is_ok()
    }

    /// Whether one did not pass.
    pub(crate) fn failed(&self) -> bool {
        self.failed > 0
    }

    /// Prints all of them; whether all passed.
    pub(crate) fn finish(self) -> bool {
        println!("\n{:<64} {:<7} {:>4}", "check", "verdict", "s");
        for row in &self.rows {
            println!("{row}");
        }
        println!("{} of {} passed", self.rows.len() - self.failed, self.rows.len());
        self.failed == 0
    }
}
