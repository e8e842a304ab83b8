//! A check, and its row of the table.

use crate::log::{clean_log, last_kill};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

/// A check that failed says what it saw.
pub(crate) type Outcome = Result<String, String>;

/// Whether each check looks into the kernel's log as well, which says there what it found itself.
static WITH_LOG: AtomicBool = AtomicBool::new(false);

/// From now on a check fails with what the kernel has to complain of, too.
pub(crate) fn read_the_log() {
    WITH_LOG.store(true, Relaxed);
}

/// Prints a row of the table.
pub(crate) fn check(failures: &mut u32, name: &str, check: impl FnOnce() -> Outcome) {
    let start = Instant::now();
    let mut outcome = check();
    if outcome.is_ok() && WITH_LOG.load(Relaxed) {
        outcome = clean_log().and(outcome);
    }
    let (verdict, note) = match &outcome {
        Ok(note) => ("passed", note),
        Err(why) => ("FAILED", why),
    };
    *failures += u32::from(outcome.is_err());
    println!("{name:<64} {verdict:<7} {:>4}", start.elapsed().as_secs());
    if !note.is_empty() {
        println!("    ({note})");
    }
    // Which may have to do with it, or not.
    if outcome.is_err() {
        println!("    the last kill in the log:{}", last_kill());
    }
}
