//! The cost of allocating and freeing blocks, against allocators that a user would pick instead.
//!
//! Loops over blocks of one order, timed as a whole:
//!
//! | bench | what a thread does | ops |
//! |---|---|---|
//! | `bulk` | allocates its share of half the memory, frees it in order | `alloc`, `free` |
//! | `random` | the same, freed in random order | `alloc`, `free` |
//! | `cross` | the same, freed through another thread's handle (alone: a second handle) | `alloc`, `free` |
//! | `repeat` | allocates and frees one block, again and again | `pair` |
//! | `host` | changes the state of its share of the huge frames, by a claim each | `evict`, `installed`, `hold`, `release` |
//!
//! They last for 100,000 operations or more, in as many passes as that takes; the time is divided by the operations and
//! averaged over the threads. `host` rows have a floor beside them: `entry-cas`, the transition of the shared word alone.
//!
//! And memory in states that a loop does not reach, mostly in single operations, each timed (`loads`):
//!
//! | bench | what is measured | ops |
//! |---|---|---|
//! | `mixed-N` | all orders, freed at random, N % used | `alloc`, `free`, `refused`, tails of order 0 and of the others |
//! | `worn-N` | the same after as many steps as wear memory out: small blocks lie where large ones did | the same |
//! | `half-fragmented` | a block while half of memory is free, and half of the rest | `alloc`, tails |
//! | `refuse`, `shrunk` | "out of memory", without a host and beside one that holds half | `first`, `again`, `after-free` |
//! | `oversubscribed-X` | more threads than cores | `wall` with operations a ms, tails of all operations, `refused` |
//! | `replace-N` | a random frame freed and one allocated, N % used | `pair`, `free`, `alloc`, tails |
//! | `fresh` | blocks of unused memory | `alloc`, tails |
//! | `aged` | blocks of memory of which a random half is free | `alloc`, tails, `alloc-worst`: the slowest without the machine's interruptions |
//! | `full-N` | frames of memory that is N % full | `alloc`, `free` |
//! | `epoch` | a handle's allocations after the host returned memory | `first`, `worst`, their maxima |
//! | `cache` | metadata in the caches and out of them | `alloc-hot`, `alloc-cold`, `free-hot`, `free-cold` |
//!
//! Every cell (bench, size, order, threads, allocator) starts each round on a fresh instance. The cells take turns, round
//! after round, and each measures its own compare-and-swap: a row is compared with the machine as it was when the row
//! was measured. `catalogue` says what is measured at which size, `rows` how it is shown.

mod catalogue;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use catalogue::{Entry, Selection};
pub(crate) use rows::{Row, markdown, panels};

use crate::allocator::Allocator;
use crate::error::{BenchError, Exhausted};
use crate::fill::Level;
use crate::frames::{Frames, Visit, frames};
use crate::interrupt;
use crate::loads::{
    Aged, Cache, Crowd, Fresh, Halves, Mixed, Refuse, Replace, Round, SAME_RUNS, aged, first_after_a_return,
    sweep_bytes,
};
use crate::measured::Measured;
use crate::passes::{Bench, Blocks, Once, state_changes};
use crate::progress::{Progress, Show};
use crate::series::Series;
use crate::tables::{Claims, Entries, Llfree, Shared, StateChanges, Tables};
use crate::turns::takes_part;
use catalogue::Kind;
use rows::WALL;
use shared_layout::{HUGE_SIZE, Order};
use std::fmt::Write as _;
use std::time::Duration;

/// Huge frames of a GiB.
const PER_GIB: u32 = ((1 << 30) / HUGE_SIZE) as u32;

/// What a round takes for each huge frame of its memory.
const USUAL: Duration = Duration::from_micros(35);

/// The measurement.
pub(crate) struct Plan {
    pub(crate) entries: Vec<&'static Entry>,
    /// Orders instead of the usual ones of each workload.
    pub(crate) orders: Option<Vec<Order>>,
    pub(crate) threads: Vec<u32>,
    pub(crate) allocators: Vec<Allocator>,
    /// One size instead of the usual ones.
    pub(crate) huge_frames: Option<u32>,
    /// All sizes, orders and operations.
    pub(crate) full: bool,
    /// Operations of a thread in a round instead of the usual ones, where a workload has a number of them.
    pub(crate) operations: Option<u64>,
    pub(crate) iterations: u32,
    /// Cores that this process may use.
    pub(crate) cores: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Subject {
    Blocks(Allocator),
    Claims,
    Entries,
}

impl Subject {
    fn name(self) -> &'static str {
        match self {
            Self::Blocks(allocator) => allocator.name(),
            Self::Claims => Allocator::Llfree.name(),
            Self::Entries => "entry-cas",
        }
    }
}

/// One op of a cell, over the rounds.
#[derive(Default)]
struct Op {
    name: &'static str,
    ns: Series,
    operations: Series,
}

struct Cell {
    entry: &'static Entry,
    huge_frames: u32,
    order: Option<Order>,
    threads: u32,
    subject: Subject,
    ops: Vec<Op>,
    cas: Series,
}

impl Cell {
    fn measure(&self, plan: &Plan, seed: u64) -> Result<Measured, BenchError> {
        let Self { huge_frames, threads, .. } = *self;
        let cores = &plan.cores[..];
        match (self.subject, self.entry.kind) {
            (Subject::Blocks(allocator), Kind::Loop(bench)) => {
                let order = self.order.unwrap_or(Order::BASE);
                let count = count(huge_frames, threads, order);
                allocator.with(huge_frames, Blocks { bench, order, count, threads, cores })
            }
            (Subject::Blocks(allocator), kind) => measure_load(allocator, kind, self.round(plan, seed)),
            (Subject::Claims, _) => {
                let tables = Tables::new(huge_frames);
                state_changes(&Claims::new(&tables), huge_frames, threads, cores)
            }
            (Subject::Entries, _) => {
                let tables = Tables::new(huge_frames);
                state_changes(&Entries::new(&tables), huge_frames, threads, cores)
            }
        }
    }

    fn round<'a>(&self, plan: &'a Plan, seed: u64) -> Round<'a> {
        Round {
            bench: self.entry.name,
            huge_frames: self.huge_frames,
            order: self.order.unwrap_or(Order::BASE),
            threads: self.threads,
            cores: &plan.cores,
            seed,
            operations: plan.operations.unwrap_or_else(|| self.entry.operations(plan.full)),
            patience: Entry::patience(plan.full),
        }
    }

    /// The measured rounds of the run, and those in which this cell takes part.
    fn rounds(&self, plan: &Plan) -> (u32, u32) {
        (plan.iterations, plan.iterations.min(self.entry.rounds))
    }

    /// What a round takes: as much as its memory, and a part of the time that it may take at the most.
    fn usual(&self, plan: &Plan) -> Duration {
        let runs = match (self.entry.kind, self.subject) {
            (Kind::Aged, Subject::Blocks(allocator)) => same_runs(allocator),
            _ => 1,
        };
        (USUAL * self.huge_frames).min(Entry::patience(plan.full) / 7) * runs as u32
    }

    fn add(&mut self, measured: &Measured) {
        self.cas.push(measured.cas_ns);
        for (i, timed) in measured.ops.iter().enumerate() {
            if self.ops.len() <= i {
                self.ops.push(Op { name: timed.op, ..Op::default() });
            }
            self.ops[i].operations.push(timed.count as f64);
            // A round without a single one says nothing about how long it takes.
            if !timed.ns.is_nan() {
                self.ops[i].ns.push(timed.ns);
            }
        }
    }

    fn rows(&self) -> impl Iterator<Item = Row> + use<'_> {
        self.ops.iter().map(|op| Row {
            bench: self.entry.name,
            mem_mib: self.huge_frames * (HUGE_SIZE >> 20) as u32,
            order: self.order.map(Order::get),
            threads: self.threads,
            allocator: self.subject.name(),
            op: op.name,
            rounds: self.cas.count(),
            operations: op.operations.median() as u64,
            ns_min: op.ns.min(),
            ns_median: op.ns.median(),
            ns_max: op.ns.max(),
            cas_ns: self.cas.median(),
            ratio_to_cas: op.ns.median() / self.cas.median(),
            per_ms: (op.name == WALL).then(|| 1e6 / op.ns.median()),
        })
    }
}

/// How often one sequence of allocations is run, to tell the slowest of them from the machine's interruptions. Callers
/// without a handle remember where they were in memory that outlives a table, so theirs are never the same.
fn same_runs(allocator: Allocator) -> usize {
    if matches!(allocator, Allocator::LlfreeShared) { 1 } else { SAME_RUNS }
}

/// A workload that is no loop.
fn measure_load(allocator: Allocator, kind: Kind, round: Round<'_>) -> Result<Measured, BenchError> {
    let huge_frames = round.huge_frames;
    match kind {
        Kind::Mixed { percent, wear } => allocator.with(huge_frames, Mixed { round, percent, wear }),
        Kind::Halves => allocator.with(huge_frames, Halves(round)),
        Kind::Refuse => allocator.with(huge_frames, Refuse { round, hold: None }),
        Kind::Crowd(kind) => allocator.with(huge_frames, Crowd { round, kind }),
        Kind::Replace(percent) => allocator.with(huge_frames, Replace { round, percent }),
        Kind::Fresh => allocator.with(huge_frames, Fresh(round)),
        Kind::Aged => {
            let runs = (0..same_runs(allocator)).map(|_| allocator.with(huge_frames, Aged(round)));
            runs.collect::<Result<_, _>>().map(aged)
        }
        Kind::Full(per_mille) => {
            let Round { seed, cores, .. } = round;
            allocator.with(huge_frames, Level { per_mille, huge_frames, seed, cores })
        }
        Kind::Cache => allocator.with(huge_frames, Cache { round, sweep: sweep_bytes() }),
        // The catalogue admits only ours to what a host does.
        Kind::Epoch | Kind::Shrunk | Kind::Loop(_) => {
            let tables = Tables::new(huge_frames);
            match allocator {
                Allocator::LlfreeShared => beside_a_host(&tables, &Shared(tables.tenant()), kind, round),
                _ => beside_a_host(&tables, &Llfree(tables.tenant()), kind, round),
            }
        }
    }
}

/// One whose host takes part.
fn beside_a_host<F: Frames>(tables: &Tables, tenant: &F, kind: Kind, round: Round<'_>) -> Result<Measured, BenchError> {
    if kind == Kind::Shrunk {
        // As a monitor does.
        tables.say_held_stays();
        let host = Claims::new(tables);
        return Refuse { round, hold: Some(&|huge| host.hold(huge)) }.visit(tenant);
    }
    first_after_a_return(tenant, round, || tables.raise_return_epoch())
}

/// Blocks that each thread allocates: half the memory belongs to all of them together.
fn count(huge_frames: u32, threads: u32, order: Order) -> usize {
    (frames(huge_frames) / 2 / u64::from(threads) / order.frames()) as usize
}

fn cells(plan: &Plan) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &entry in &plan.entries {
        for (huge_frames, gib) in plan.sizes(entry) {
            for threads in entry.threads(&plan.threads, plan.full) {
                for order in entry.orders(plan.orders.as_deref(), plan.full) {
                    let subjects = if entry.kind == Kind::Loop(Bench::Host) {
                        vec![Subject::Claims, Subject::Entries]
                    } else {
                        let able = |a: &&Allocator| entry.admits(**a, order, huge_frames, gib);
                        plan.allocators.iter().filter(able).map(|allocator| Subject::Blocks(*allocator)).collect()
                    };
                    let cell = |subject| {
                        let (ops, cas) = (Vec::new(), Series::default());
                        Cell { entry, huge_frames, order, threads, subject, ops, cas }
                    };
                    cells.extend(subjects.into_iter().map(cell));
                }
            }
        }
    }
    cells
}

/// Measures every cell `iterations` times or as often as its workload may, after one round to warm up.
pub(crate) fn run(plan: &Plan, show: Show) -> Result<Vec<Row>, BenchError> {
    plan.check()?;
    let mut cells = cells(plan);
    let steps = cells.iter().map(|cell| (cell.subject.name(), cell.rounds(plan).1 + 1, cell.usual(plan)));
    let mut progress = Progress::new(show, "alloc", steps);
    for round in 0..=plan.iterations {
        for cell in cells.iter_mut().take_while(|_| !interrupt::requested()) {
            if !takes_part(cell.rounds(plan), round) {
                continue;
            }
            let mut detail = format!("{}, threads {}", cell.entry.name, cell.threads);
            if let Some(order) = cell.order {
                // Writing to a string cannot fail.
                let _ = write!(detail, ", order {}", order.get());
            }
            let measured = progress.step(cell.subject.name(), &detail, || cell.measure(plan, u64::from(round)))?;
            if round > 0 {
                cell.add(&measured);
            }
        }
    }
    Ok(cells.iter().flat_map(Cell::rows).collect())
}

/// Runs the loops of `bench` once on one thread, untimed; says how many operations of each kind.
pub(crate) fn once(plan: &Plan, bench: Bench, huge_frames: u32) -> Result<String, BenchError> {
    plan.check()?;
    let mut text = String::new();
    let all: Vec<Order> = (0..=Order::MAX.get()).filter_map(Order::new).collect();
    for &order in plan.orders.as_ref().unwrap_or(&all) {
        for allocator in plan.allocators.iter().filter(|a| a.supports(order, huge_frames)) {
            let count = count(huge_frames, 1, order);
            let done = allocator.with(huge_frames, Once(bench, order, count));
            let (bench, order, allocator) = (bench.name(), order.get(), allocator.name());
            let done = done.ok_or(BenchError::Exhausted(Exhausted { bench, order }))?;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{bench}, order {order}, {allocator}: {done} operations of each kind");
        }
    }
    Ok(text)
}

impl Plan {
    /// The sizes of a workload in huge frames, with their GiB if they are its own.
    fn sizes(&self, entry: &'static Entry) -> Vec<(u32, Option<u32>)> {
        match self.huge_frames {
            Some(huge_frames) => vec![(huge_frames, None)],
            None => entry.gib(self.full).iter().map(|gib| (gib * PER_GIB, Some(*gib))).collect(),
        }
    }

    fn check(&self) -> Result<(), BenchError> {
        let most = self.threads.iter().copied().max().unwrap_or(1);
        if most as usize > self.cores.len() {
            return Err(BenchError::Threads { threads: most, cores: self.cores.len() });
        }
        let largest = self.orders.iter().flatten().copied().max().unwrap_or(Order::MAX);
        // A block for every thread, in half the memory, and a huge frame for every thread.
        let blocks = (2 * u64::from(most) * largest.frames()).div_ceil(Order::HUGE.frames()).max(u64::from(most));
        let entries = self.entries.iter().map(|entry| u64::from(entry.least_huge_frames()));
        let least = entries.fold(blocks, u64::max);
        match self.huge_frames {
            Some(huge_frames) if u64::from(huge_frames) < least => {
                Err(BenchError::TooSmall { huge_frames, threads: most, least })
            }
            _ => Ok(()),
        }
    }
}
