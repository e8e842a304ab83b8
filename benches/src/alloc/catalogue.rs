//! The workloads by name: with which sizes, orders and threads each is measured, in a default run and in a full one.

use crate::allocator::Allocator;
use crate::loads::CrowdKind;
use crate::passes::Bench;
use shared_layout::Order;
use std::time::Duration;

/// What a thread does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A loop over one order.
    Loop(Bench),
    /// All orders, at a percentage of memory, after a warm-up of at least `wear` times the operations that are timed.
    Mixed {
        percent: u32,
        wear: u64,
    },
    Halves,
    Refuse,
    /// The same beside a host that holds half of memory.
    Shrunk,
    Crowd(CrowdKind),
    /// At a percentage of memory.
    Replace(u32),
    Fresh,
    Aged,
    /// At thousandths of memory.
    Full(u32),
    Epoch,
    Cache,
}

/// A workload.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    /// The name in rows and on the command line; what stands before a dash names all that begin with it.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// GiB of frames: in a default run, and in a full one.
    gib: [&'static [u32]; 2],
    /// Rounds to measure at most: those that take long to set up have fewer.
    pub(crate) rounds: u32,
    /// Operations of a thread in a round, likewise; loops have a rule of their own.
    operations: [u64; 2],
}

/// A default run and a full one: how long a round may take before it ends with fewer operations.
const PATIENCE: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(20)];
/// Other allocators take part up to this size: several need a word or more a frame.
const BASELINE_GIB: u32 = 1;

const ALL_ROUNDS: u32 = u32::MAX;

const fn looped(name: &'static str, bench: Bench) -> Entry {
    Entry { name, kind: Kind::Loop(bench), gib: [&[4]; 2], rounds: ALL_ROUNDS, operations: [0; 2] }
}

const fn mixed(name: &'static str, percent: u32) -> Entry {
    let gib: [&[u32]; 2] = [&[1], &[1, 8, 64]];
    Entry { name, kind: Kind::Mixed { percent, wear: 0 }, gib, rounds: 5, operations: [200_000, 1_500_000] }
}

/// In a default run 12 million steps of each thread: in 1 GiB, 95 % used, blocks of order 6 and more are gone by then.
const WEAR: u64 = 60;

/// The same when it has gone on for long.
const fn worn(name: &'static str, percent: u32) -> Entry {
    Entry { kind: Kind::Mixed { percent, wear: WEAR }, gib: [&[1], &[1, 8]], rounds: 3, ..mixed(name, percent) }
}

const fn replace(name: &'static str, percent: u32) -> Entry {
    let gib: [&[u32]; 2] = [&[8], &[8, 64]];
    Entry { name, kind: Kind::Replace(percent), gib, rounds: 5, operations: [200_000, 2_000_000] }
}

const fn full(name: &'static str, per_mille: u32) -> Entry {
    Entry { name, kind: Kind::Full(per_mille), gib: [&[8], &[8, 64]], rounds: 5, operations: [0; 2] }
}

const fn crowd(name: &'static str, kind: CrowdKind) -> Entry {
    Entry { name, kind: Kind::Crowd(kind), gib: [&[8], &[8]], rounds: 3, operations: [100_000, 1_000_000] }
}

/// All of them, in the order of the rows.
static ENTRIES: [Entry; 23] = [
    looped("bulk", Bench::Bulk),
    looped("repeat", Bench::Repeat),
    looped("random", Bench::Random),
    looped("cross", Bench::Cross),
    looped("host", Bench::Host),
    mixed("mixed-50", 50),
    mixed("mixed-80", 80),
    mixed("mixed-90", 90),
    mixed("mixed-95", 95),
    worn("worn-95", 95),
    Entry { name: "half-fragmented", kind: Kind::Halves, gib: [&[8], &[1, 8, 64]], rounds: 5, operations: [0; 2] },
    Entry { name: "refuse", kind: Kind::Refuse, gib: [&[1, 8], &[1, 8, 64]], rounds: 5, operations: [0; 2] },
    Entry { name: "shrunk", kind: Kind::Shrunk, gib: [&[8], &[1, 8, 64]], rounds: 5, operations: [0; 2] },
    crowd("oversubscribed-few", CrowdKind::Few),
    crowd("oversubscribed-mixed", CrowdKind::Mixed),
    replace("replace-50", 50),
    replace("replace-90", 90),
    Entry { name: "fresh", kind: Kind::Fresh, gib: [&[8], &[8, 64]], rounds: 5, operations: [1_000_000, 10_000_000] },
    Entry { name: "aged", kind: Kind::Aged, gib: [&[8], &[8, 64]], rounds: 5, operations: [1_000_000, 10_000_000] },
    full("full-99", 990),
    full("full-99.9", 999),
    Entry { name: "epoch", kind: Kind::Epoch, gib: [&[64], &[64, 1024]], rounds: 5, operations: [0; 2] },
    Entry { name: "cache", kind: Kind::Cache, gib: [&[1, 64], &[1, 8, 64, 1024]], rounds: 3, operations: [0; 2] },
];

/// The workloads that one word of the command line names.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Selection(pub(crate) Vec<&'static Entry>);

impl Selection {
    /// Those that all of the words name, each once, in the order of the rows.
    pub(crate) fn join(selections: &[Self]) -> Vec<&'static Entry> {
        ENTRIES.iter().filter(|entry| selections.iter().any(|selection| selection.0.contains(entry))).collect()
    }
}

impl std::str::FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_meant = |entry: &&Entry| {
            text == "all" || entry.name.strip_prefix(text).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        let meant: Vec<_> = ENTRIES.iter().filter(is_meant).collect();
        if meant.is_empty() {
            let names: Vec<_> = ENTRIES.iter().map(|entry| entry.name).collect();
            return Err(format!("'{text}' is no workload; use all, {}", names.join(", ")));
        }
        Ok(Self(meant))
    }
}

impl Entry {
    pub(crate) fn gib(&self, full: bool) -> &'static [u32] {
        self.gib[usize::from(full)]
    }

    pub(crate) fn operations(&self, full: bool) -> u64 {
        self.operations[usize::from(full)]
    }

    pub(crate) fn patience(full: bool) -> Duration {
        PATIENCE[usize::from(full)]
    }

    /// The orders of its rows, `None` for one row over several: all that it has of those that are `wanted`, or else
    /// some.
    pub(crate) fn orders(&self, wanted: Option<&[Order]>, full: bool) -> Vec<Option<Order>> {
        let some: &[u8] = if full { &[0, 3, 6, 9] } else { &[0] };
        let (usual, all): (Vec<u8>, std::ops::RangeInclusive<u8>) = match self.kind {
            Kind::Mixed { .. } | Kind::Crowd(CrowdKind::Mixed) => return vec![None],
            Kind::Loop(Bench::Host) => return vec![Some(Order::HUGE)],
            Kind::Loop(_) => ((0..=10).collect(), 0..=10),
            Kind::Halves => ((1..=9).collect(), 1..=9),
            Kind::Refuse | Kind::Shrunk => ((0..=9).collect(), 0..=9),
            Kind::Crowd(CrowdKind::Few) | Kind::Full(_) => (vec![0], 0..=0),
            Kind::Replace(_) => (vec![0], 0..=9),
            Kind::Fresh | Kind::Aged => (some.to_vec(), 0..=9),
            Kind::Epoch => (vec![0, 9], 0..=9),
            Kind::Cache => (if full { some.to_vec() } else { vec![0, 9] }, 0..=9),
        };
        let usual = usual.into_iter().filter_map(Order::new);
        match wanted {
            Some(wanted) => wanted.iter().copied().filter(|order| all.contains(&order.get())).map(Some).collect(),
            None => usual.map(Some).collect(),
        }
    }

    /// The threads of its rows; `wanted` are as many as there are cores, or fewer.
    pub(crate) fn threads(&self, wanted: &[u32], full: bool) -> Vec<u32> {
        match self.kind {
            Kind::Loop(_) | Kind::Mixed { .. } => wanted.to_vec(),
            Kind::Crowd(_) => if full { &[2, 8, 64][..] } else { &[2, 64] }.to_vec(),
            _ => vec![1],
        }
    }

    /// Whether an allocator has what it needs; `gib` are its own sizes, not one that was asked for.
    pub(crate) fn admits(
        &self,
        allocator: Allocator,
        order: Option<Order>,
        huge_frames: u32,
        gib: Option<u32>,
    ) -> bool {
        let ours = matches!(allocator, Allocator::Llfree | Allocator::LlfreeShared);
        let small = matches!(self.kind, Kind::Loop(_)) || gib.is_none_or(|gib| gib <= BASELINE_GIB);
        let has_host = matches!(self.kind, Kind::Epoch | Kind::Shrunk);
        allocator.supports(order.unwrap_or(Order::MAX), huge_frames) && (ours || small && !has_host)
    }

    /// Huge frames that it needs at least.
    pub(crate) fn least_huge_frames(&self) -> u32 {
        // Two stretches of half-fragmented memory, a few blocks of order 9 for each of several handles.
        if matches!(self.kind, Kind::Loop(_)) { 1 } else { 64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(words: &[&str]) -> Vec<&'static str> {
        let selections: Vec<Selection> = words.iter().map(|word| word.parse().expect("there is one")).collect();
        Selection::join(&selections).iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn a_word_means_a_workload_or_a_family() {
        assert_eq!(names(&["mixed-80"]), ["mixed-80"]);
        assert_eq!(names(&["mixed"]), ["mixed-50", "mixed-80", "mixed-90", "mixed-95"]);
        assert_eq!(names(&["worn"]), ["worn-95"]);
        assert_eq!(names(&["refuse"]), ["refuse"]);
        assert_eq!(names(&["full", "bulk", "full-99"]), ["bulk", "full-99", "full-99.9"]);
        assert_eq!(names(&["all"]).len(), ENTRIES.len());
        let error = "mix".parse::<Selection>().expect_err("a part of a word");
        assert!(error.contains("'mix' is no workload") && error.contains("mixed-50"), "{error}");
    }

    #[test]
    fn names_are_different() {
        let mut all = names(&["all"]);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), ENTRIES.len());
    }

    #[test]
    fn a_full_run_has_all_of_a_default_one() {
        for entry in &ENTRIES {
            assert!(entry.gib(false).iter().all(|gib| entry.gib(true).contains(gib)), "{}", entry.name);
            let full = entry.orders(None, true);
            assert!(entry.orders(None, false).iter().all(|order| full.contains(order)), "{}", entry.name);
            assert!(entry.operations(false) <= entry.operations(true), "{}", entry.name);
        }
    }

    #[test]
    fn only_orders_that_a_workload_has_are_measured() {
        let orders = |name: &str, wanted: &[u8]| {
            let wanted: Vec<_> = wanted.iter().filter_map(|order| Order::new(*order)).collect();
            let entry = ENTRIES.iter().find(|entry| entry.name == name).expect("there is one");
            Vec::from_iter(entry.orders(Some(&wanted), false).iter().map(|order| order.map(Order::get)))
        };
        assert_eq!(orders("half-fragmented", &[0, 5, 9, 10]), [Some(5), Some(9)]);
        assert_eq!(orders("mixed-80", &[3]), [None]);
        assert_eq!(orders("full-99", &[3]), []);
    }
}
