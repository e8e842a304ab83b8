//! [`Cell`]: what is measured in one process, and its text. Plain values.

use clap::ValueEnum;
use std::fmt;
use std::str::FromStr;

/// The allocators to choose from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Allocator {
    /// This project's, with automatic reclaim as it is by default
    Llfree,
    /// The same, which never gives anything back: a mere pool
    LlfreePooled,
    /// lgalloc 0.7 with its background worker as Materialize has it
    Lgalloc,
    /// The same, which returns eagerly what its caches do not hold
    LgallocEager,
    /// glibc's
    System,
    /// mmap, MADV_HUGEPAGE, munmap
    Mmap,
}

/// What threads do with objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Op {
    /// Allocate one and free it
    Pair,
    /// The same, with a write to each page in between
    PairTouched,
    /// Allocate 256 MiB of them, then free these
    Batch,
    /// The same, with a write to each page
    BatchTouched,
    /// Allocate objects for another thread to free
    Cross,
    /// 512 MiB of them for a moment, ten times a second: the time of all in a period
    Steady,
}

pub(super) fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().replace('-', "_")).unwrap_or_default()
}

impl fmt::Display for Allocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&name(self).replace('_', "-"))
    }
}

/// One cell, as `--once` takes it: allocator:size:threads:op, and behind it, for the last round, how many seconds it waits for
/// memory to go back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Cell {
    pub(super) allocator: Allocator,
    pub(super) bytes: u64,
    pub(super) threads: u32,
    pub(super) op: Op,
    pub(super) settles: Option<u64>,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { allocator, bytes, threads, op, settles } = self;
        write!(f, "{allocator}:{bytes}:{threads}:{}", name(op).replace('_', "-"))?;
        settles.map_or(Ok(()), |seconds| write!(f, ":{seconds}"))
    }
}

impl FromStr for Cell {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not allocator:bytes:threads:op");
        let mut parts = text.split(':');
        let mut next = || parts.next().ok_or_else(bad);
        let (allocator, bytes, threads, op) = (next()?, next()?, next()?, next()?);
        Ok(Self {
            allocator: Allocator::from_str(allocator, false)?,
            bytes: bytes.parse().map_err(|_| bad())?,
            threads: threads.parse().map_err(|_| bad())?,
            op: Op::from_str(op, false)?,
            settles: parts.next().map(|seconds| seconds.parse().map_err(|_| bad())).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_what_its_text_says() {
        let cell = Cell {
            allocator: Allocator::LlfreePooled,
            bytes: 2 << 20,
            threads: 2,
            op: Op::PairTouched,
            settles: Some(5),
        };
        assert_eq!(cell.to_string(), "llfree-pooled:2097152:2:pair-touched:5");
        for cell in [cell, Cell { settles: None, ..cell }] {
            assert_eq!(cell.to_string().parse(), Ok(cell));
        }
        for bad in ["", "llfree", "heap:1:1:pair", "llfree:x:1:pair", "llfree:1:1:dance"] {
            bad.parse::<Cell>().expect_err(bad);
        }
    }
}
