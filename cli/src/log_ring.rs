//! The log in memory: the newest lines, for `llfree-vmm logs`, whatever became of stderr.

use crate::log_writer::LOG;
use llfree_control::feed::{Feed, Subscription};
use std::io;
use std::sync::{Arc, LazyLock};

/// Bytes of lines that are kept: some thousand.
const KEPT: usize = 128 << 10;

static RING: LazyLock<Arc<Feed>> = LazyLock::new(|| Arc::new(Feed::new(KEPT, lost)));

/// Keeps a line.
pub fn keep(line: &[u8]) {
    RING.push(&without_colour(line));
}

/// The lines that are kept, and those that come.
#[must_use]
pub fn subscribe() -> Subscription {
    Subscription::to(RING.clone())
}

/// The lines that are kept.
#[must_use]
pub fn so_far() -> Vec<u8> {
    RING.kept()
}

fn lost(lines: u64, _: u64) -> Vec<u8> {
    format!("[{lines} lines are missing here: they came faster than they were read]\n").into_bytes()
}

/// A line without the sequences that colour it on a terminal.
fn without_colour(line: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.windows(2).position(|pair| pair == b"\x1b[") {
        plain.extend_from_slice(&rest[..at]);
        let sequence = &rest[at + 2..];
        let end = sequence.iter().position(|byte| byte.is_ascii_alphabetic()).map_or(sequence.len(), |end| end + 1);
        rest = &sequence[end..];
    }
    plain.extend_from_slice(rest);
    plain
}

/// For a logger, which hands over a whole line with each call: the log's writer, and the ring.
pub struct Tee;

impl io::Write for Tee {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        keep(line);
        LOG.print(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_stays_on_the_terminal() {
        let plain = without_colour(b"\x1b[90m[\x1b[0m2026 \x1b[33mWARN\x1b[0m x] text\n");
        assert_eq!(String::from_utf8(plain).expect("text"), "[2026 WARN x] text\n");
        assert_eq!(without_colour(b"a\x1b[12"), b"a");
    }
}
