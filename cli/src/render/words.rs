//! Words and numbers as all reports have them.

use llfree_base::metrics::{Metered, Unit, walk};
use llfree_base::printable;
use llfree_base::units::Bytes;
use llfree_control::report::{ElasticKind, ElasticStatus, Word};
use std::fmt::{Display, Write};

/// A row's label and its value.
pub(super) type Row = (&'static str, String);

/// A number of things.
pub(super) fn plural(count: u64, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

/// A word of the VM's, made printable.
pub(super) fn word<T: Display>(word: &Word<T>) -> String {
    printable(&word.to_string())
}

/// A part's counters that have a label and are above 0: `, 3 MiB read, 2 I/O errors`.
pub(super) fn listed(counts: &impl Metered) -> String {
    let mut text = String::new();
    walk(counts, &mut |metric| {
        let Some(word) = metric.word.filter(|_| metric.value > 0) else { return };
        // Writing to a String cannot fail.
        let _ = match metric.unit {
            Unit::Bytes => write!(text, ", {} {word}", Bytes(metric.value)),
            Unit::Milliseconds => write!(text, ", {} {word}", millis(metric.value)),
            Unit::Count => write!(text, ", {} {word}", metric.value),
        };
    });
    text
}

/// Whether the VM's memory stays as it is.
pub(super) fn is_none(elastic: &ElasticStatus) -> bool {
    elastic.kind == ElasticKind::None
}

pub(super) fn millis(ms: u64) -> String {
    micros(ms.saturating_mul(1000))
}

/// A time in a readable unit, from microseconds.
#[must_use]
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}
