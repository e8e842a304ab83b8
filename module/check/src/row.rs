//! A check, and its row of the table.

use std::time::Instant;

/// A check that failed says what it saw.
pub(crate) type Outcome = Result<String, String>;

/// Prints a row of the table.
pub(crate) fn check(failures: &mut u32, name: &str, check: impl FnOnce() -> Outcome) {
    let start = Instant::now();
    let outcome = check();
    let (verdict, note) = match &outcome {
        Ok(note) => ("passed", note),
        Err(why) => ("FAILED", why),
    };
    *failures += u32::from(outcome.is_err());
    println!("{name:<64} {verdict:<7} {:>4}", start.elapsed().as_secs());
    if !note.is_empty() {
        println!("    ({note})");
    }
}
