//! The cost of allocating and freeing blocks, against allocators that a user would pick instead.
//!
//! | bench | what a thread does | timed |
//! |---|---|---|
//! | `bulk` | allocates its share of half the memory, frees it in order | `alloc`, `free` |
//! | `random` | the same, freed in random order | `alloc`, `free` |
//! | `cross` | the same, freed through another thread's handle (alone: a second handle) | `alloc`, `free` |
//! | `repeat` | allocates and frees one block, again and again | `pair` |
//! | `host` | changes the state of its share of the huge frames, by a claim each | `evict`, `installed`, `hold`, `release` |
//!
//! Every cell (bench, order, threads, allocator) starts each round on a fresh instance and lasts
//! for 100,000 operations or more, in as many passes as that takes. The time of a whole loop is
//! divided by its operations and averaged over the threads. The cells take turns, round after
//! round, and each measures its own compare-and-swap: a row is compared with the machine as it was
//! when the row was measured. `host` rows have a floor beside them: `entry-cas`, the transition of
//! the shared word alone.

use crate::allocator::Allocator;
use crate::error::{BenchError, Exhausted};
use crate::frames::frames;
use crate::interrupt;
use crate::passes::{Bench, Blocks, Measured, Once, state_changes};
use crate::plot::{Line, Panel};
use crate::progress::{Progress, Show};
use crate::series::{Series, Table};
use crate::tables::{Claims, Entries, Tables};
use serde::Serialize;
use shared_layout::Order;
use std::fmt::Write as _;

/// The measurement.
pub(crate) struct Plan {
    pub(crate) benches: Vec<Bench>,
    pub(crate) orders: Vec<Order>,
    pub(crate) threads: Vec<u32>,
    pub(crate) allocators: Vec<Allocator>,
    pub(crate) huge_frames: u32,
    pub(crate) iterations: u32,
    /// Cores that this process may use.
    pub(crate) cores: Vec<usize>,
}

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) bench: &'static str,
    pub(crate) order: u8,
    pub(crate) threads: u32,
    pub(crate) allocator: &'static str,
    pub(crate) op: &'static str,
    /// Nanoseconds an operation, the fastest round.
    pub(crate) ns_min: f64,
    pub(crate) ns_median: f64,
    pub(crate) ns_max: f64,
    /// Nanoseconds of an uncontended compare-and-swap, the median over the same rounds.
    pub(crate) cas_ns: f64,
    /// Median over that.
    pub(crate) ratio_to_cas: f64,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<7} {:>5} {:>7} {:<13} {:<9} {:>9} {:>9} {:>9} {:>6} {:>7}\n",
            "bench", "order", "threads", "allocator", "op", "ns min", "median", "max", "cas", "to cas"
        );
        for row in rows {
            let Row { bench, order, threads, allocator, op, ns_min, ns_median, ns_max, cas_ns, ratio_to_cas } = row;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{bench:<7} {order:>5} {threads:>7} {allocator:<13} {op:<9} {ns_min:>9.2} {ns_median:>9.2} \
                 {ns_max:>9.2} {cas_ns:>6.2} {ratio_to_cas:>7.2}"
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        !self.ns_median.is_nan()
    }
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

struct Cell {
    bench: Bench,
    order: Order,
    threads: u32,
    subject: Subject,
    ops: Vec<(&'static str, Series)>,
    cas: Series,
}

impl Cell {
    fn measure(&self, plan: &Plan) -> Result<Measured, BenchError> {
        let (threads, cores) = (self.threads, &plan.cores[..]);
        let count = count(plan.huge_frames, threads, self.order);
        let blocks = Blocks { bench: self.bench, order: self.order, count, threads, cores };
        match self.subject {
            Subject::Blocks(allocator) => allocator.with(plan.huge_frames, blocks),
            Subject::Claims => {
                let tables = Tables::new(plan.huge_frames);
                state_changes(&Claims::new(&tables), plan.huge_frames, threads, cores)
            }
            Subject::Entries => {
                let tables = Tables::new(plan.huge_frames);
                state_changes(&Entries::new(&tables), plan.huge_frames, threads, cores)
            }
        }
    }

    fn rows(&self) -> impl Iterator<Item = Row> + use<'_> {
        self.ops.iter().map(|(op, series)| Row {
            bench: self.bench.name(),
            order: self.order.get(),
            threads: self.threads,
            allocator: self.subject.name(),
            op,
            ns_min: series.min(),
            ns_median: series.median(),
            ns_max: series.max(),
            cas_ns: self.cas.median(),
            ratio_to_cas: series.median() / self.cas.median(),
        })
    }
}

/// Blocks that each thread allocates: half the memory belongs to all of them together.
fn count(huge_frames: u32, threads: u32, order: Order) -> usize {
    (frames(huge_frames) / 2 / u64::from(threads) / order.frames()) as usize
}

fn cells(plan: &Plan) -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut add = |bench, order, threads, subject| {
        cells.push(Cell { bench, order, threads, subject, ops: Vec::new(), cas: Series::default() });
    };
    for &bench in &plan.benches {
        for &threads in &plan.threads {
            if bench == Bench::Host {
                add(bench, Order::HUGE, threads, Subject::Claims);
                add(bench, Order::HUGE, threads, Subject::Entries);
                continue;
            }
            for &order in &plan.orders {
                let able = plan.allocators.iter().filter(|a| a.supports(order, plan.huge_frames));
                able.for_each(|allocator| add(bench, order, threads, Subject::Blocks(*allocator)));
            }
        }
    }
    cells
}

/// Measures every cell `iterations` times, after one round to warm up.
pub(crate) fn run(plan: &Plan, show: Show) -> Result<Vec<Row>, BenchError> {
    plan.check()?;
    let mut cells = cells(plan);
    let rounds = plan.iterations + 1;
    let mut progress = Progress::new(show, "alloc", cells.iter().map(|cell| (cell.subject.name(), rounds)));
    for round in 0..rounds {
        for cell in cells.iter_mut().take_while(|_| !interrupt::requested()) {
            let detail = format!("{}, order {}, threads {}", cell.bench.name(), cell.order.get(), cell.threads);
            let measured = progress.step(cell.subject.name(), &detail, || cell.measure(plan))?;
            if round == 0 {
                cell.ops = measured.ops.iter().map(|(op, _)| (*op, Series::default())).collect();
                continue;
            }
            cell.cas.push(measured.cas_ns);
            cell.ops.iter_mut().zip(measured.ops).for_each(|((_, series), (_, ns))| series.push(ns));
        }
    }
    Ok(cells.iter().flat_map(Cell::rows).collect())
}

/// Runs the loops of `bench` once on one thread, untimed; says how many operations of each kind.
pub(crate) fn once(plan: &Plan, bench: Bench) -> Result<String, BenchError> {
    plan.check()?;
    let mut text = String::new();
    for &order in &plan.orders {
        for allocator in plan.allocators.iter().filter(|a| a.supports(order, plan.huge_frames)) {
            let count = count(plan.huge_frames, 1, order);
            let done = allocator.with(plan.huge_frames, Once(bench, order, count));
            let (bench, order, allocator) = (bench.name(), order.get(), allocator.name());
            let done = done.ok_or(BenchError::Exhausted(Exhausted { bench, order }))?;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{bench}, order {order}, {allocator}: {done} operations of each kind");
        }
    }
    Ok(text)
}

impl Plan {
    fn check(&self) -> Result<(), BenchError> {
        let most = self.threads.iter().copied().max().unwrap_or(1);
        if most as usize > self.cores.len() {
            return Err(BenchError::Threads { threads: most, cores: self.cores.len() });
        }
        let largest = self.orders.iter().copied().max().unwrap_or(Order::BASE);
        // A block for every thread, in half the memory, and a huge frame for every thread.
        let least = (2 * u64::from(most) * largest.frames()).div_ceil(Order::HUGE.frames()).max(u64::from(most));
        if u64::from(self.huge_frames) < least {
            return Err(BenchError::TooSmall { huge_frames: self.huge_frames, threads: most, least });
        }
        Ok(())
    }
}

/// A panel for each bench and op: cost over orders, or over threads if there is one order only.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    let blocks = || rows.iter().filter(|row| row.bench != Bench::Host.name());
    let over_threads = blocks().all(|row| row.order == rows[0].order);
    let most = blocks().map(|row| row.threads).max().unwrap_or(1);
    for row in blocks() {
        let title = format!("{}: {}", row.bench, row.op);
        let x = if over_threads { f64::from(row.threads) } else { f64::from(row.order) };
        let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            panels.push(Panel {
                title,
                x_label: if over_threads { "threads" } else { "order" },
                y_label: "ns",
                log_y: true,
                ..Panel::default()
            });
            panels.len() - 1
        });
        // Over orders, the lines for several threads are dashed and those between are left out.
        if !over_threads && row.threads != 1 && row.threads != most {
            continue;
        }
        let dashed = !over_threads && row.threads > 1;
        let name = if dashed { format!("{}, {most} threads", row.allocator) } else { row.allocator.to_owned() };
        panels[index].point(name, row.allocator, dashed, (x, row.ns_median));
    }
    for panel in &mut panels {
        let ends = panel.x_range();
        let cas = blocks().map(|row| row.cas_ns).sum::<f64>() / blocks().count().max(1) as f64;
        panel.lines.push(Line::guide("1 CAS", [(ends.0, cas), (ends.1, cas)]));
    }
    panels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crew;

    fn plan(threads: &[u32], huge_frames: u32) -> Plan {
        Plan {
            benches: vec![Bench::Bulk, Bench::Repeat, Bench::Random, Bench::Cross, Bench::Host],
            orders: vec![Order::BASE, Order::MAX],
            threads: threads.to_vec(),
            allocators: vec![Allocator::Llfree, Allocator::Queue],
            huge_frames,
            iterations: 1,
            cores: crew::cores().expect("a process has cores"),
        }
    }

    #[test]
    fn a_baseline_is_left_out_where_it_has_no_such_order() {
        let rows = run(&plan(&[1], 16), Show::Nothing).expect("half the memory is enough");
        // alloc and free of three benches and a pair, for llfree twice and the queue once; four
        // state changes of two kinds.
        assert_eq!(rows.len(), 7 * 3 + 4 * 2);
        assert!(rows.iter().all(|row| row.allocator != "queue" || row.order == 0));
        assert!(rows.iter().all(|row| row.ns_min > 0.0 && row.ns_min <= row.ns_max && row.cas_ns > 0.0));
        assert!(panels(&rows).iter().all(|panel| panel.title != "host: evict"));
    }

    #[test]
    fn all_cores_work_together() {
        let cores = crew::cores().expect("a process has cores").len() as u32;
        let rows = run(&plan(&[cores], 64 * cores), Show::Nothing).expect("half the memory is enough");
        assert!(rows.iter().all(|row| row.threads == cores));
    }

    #[test]
    fn plans_beyond_the_machine_or_the_memory_are_refused() {
        let few = run(&plan(&[1], 1), Show::Nothing).expect_err("no block of order 10");
        assert!(few.to_string().contains("use at least 8 MiB"), "{few}");
        let many = run(&plan(&[100_000], 64), Show::Nothing).expect_err("nobody has so many cores");
        assert!(many.to_string().contains("100000"), "{many}");
    }

    #[test]
    fn loops_without_a_clock_do_every_operation() {
        let text = once(&plan(&[1], 8), Bench::Random).expect("half the memory is enough");
        assert!(text.contains("random, order 0, llfree: 2048 operations of each kind"), "{text}");
    }
}
