//! Large objects against lgalloc, glibc and bare `mmap`: time an operation, and memory a second after the last free.
//!
//! Each cell (an allocator, a size, a number of threads, an operation) runs in a process of its own, which is this
//! program with `--once`; so nobody's memory counts for anybody else. In each round the allocators take turns. The last
//! round goes on for a second, waits another one after its last free, and tells what is resident then, beyond what was
//! before the first object, and what part of the CPU time of those two seconds went into giving memory back.

mod cell;
mod load;

pub(crate) use cell::{Allocator, Cell, Op};

use crate::error::BenchError;
use crate::interrupt;
use crate::plot::Panel;
use crate::progress::{Progress, Show};
use crate::series::{Series, Table};
use cell::name;
use llfree_base::units::Bytes;
use serde::Serialize;
use std::fmt::Write as _;
use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Runs one cell in this process, and says what it came to: nanoseconds, and what it settled to.
pub(crate) fn once(cell: &Cell) -> Result<String, BenchError> {
    let outcome = load::run(cell)?;
    let mut text = outcome.ns.to_string();
    for bytes in outcome.resident.iter().flatten() {
        // Writing to a string cannot fail.
        let _ = write!(text, " {bytes}");
    }
    Ok(text + &outcome.returning.map_or_else(String::new, |part| format!(" {part}")) + "\n")
}

/// What to measure.
pub(crate) struct Plan {
    pub(crate) allocators: Vec<Allocator>,
    pub(crate) sizes: Vec<Bytes>,
    pub(crate) threads: Vec<u32>,
    pub(crate) ops: Vec<Op>,
    pub(crate) iterations: u32,
    /// Seconds that memory has to go back, in the last round.
    pub(crate) settle: u64,
}

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) bench: &'static str,
    pub(crate) allocator: String,
    /// Bytes of an object.
    pub(crate) size: u64,
    pub(crate) threads: u32,
    pub(crate) op: String,
    pub(crate) ns_median: f64,
    /// At the last free.
    pub(crate) resident_at_free_bytes: Option<u64>,
    /// A second after it.
    pub(crate) resident_after_bytes: Option<u64>,
    /// At the end of the wait.
    pub(crate) resident_settled_bytes: Option<u64>,
    /// Median over lgalloc's, or over the first allocator's where lgalloc is not there.
    pub(crate) ratio: f64,
    /// Of the CPU time of that run and the second after it, what a thread of the allocator's took to give memory back.
    pub(crate) returning: Option<f64>,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<14} {:>10} {:>7} {:<14} {:>14} {:>10} {:>10} {:>10} {:>8} {:>9}\n",
            "allocator", "size", "threads", "op", "ns median", "at free", "1 s later", "settled", "ratio", "returning"
        );
        for row in rows {
            let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string());
            let [at_free, after, settled] =
                [row.resident_at_free_bytes, row.resident_after_bytes, row.resident_settled_bytes].map(bytes);
            let returning = row.returning.map_or_else(|| "-".to_owned(), |part| format!("{:.2} %", part * 100.0));
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:<14} {:>10} {:>7} {:<14} {:>14.1} {at_free:>10} {after:>10} {settled:>10} {:>8.3} {returning:>9}",
                row.allocator,
                Bytes(row.size).to_string(),
                row.threads,
                row.op,
                row.ns_median,
                row.ratio
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        self.ns_median.is_finite()
    }
}

/// What a round of a cell takes, the start of its process included.
const USUAL: Duration = Duration::from_millis(150);

/// Measures each cell in turns.
pub(crate) fn run(plan: &Plan, show: Show) -> Result<Vec<Row>, BenchError> {
    let cells = plan.sizes.len() * plan.threads.len() * plan.ops.len();
    let steps = cells as u32 * plan.iterations;
    let names = plan.allocators.iter().map(|allocator| (allocator.to_string(), steps, USUAL));
    let mut progress = Progress::new(show, "objects", names);
    let mut rows = Vec::new();
    for op in &plan.ops {
        for size in &plan.sizes {
            for threads in &plan.threads {
                rows.extend(measure(plan, (*op, *size, *threads), &mut progress)?);
                if interrupt::requested() {
                    return Ok(rows);
                }
            }
        }
    }
    Ok(rows)
}

/// One cell of each allocator, in turns.
fn measure(
    plan: &Plan,
    (op, size, threads): (Op, Bytes, u32),
    progress: &mut Progress,
) -> Result<Vec<Row>, BenchError> {
    let mut series = vec![Series::default(); plan.allocators.len()];
    let mut settled = vec![Settled::default(); plan.allocators.len()];
    for round in 0..plan.iterations {
        for (index, allocator) in plan.allocators.iter().enumerate() {
            let settles = (round + 1 == plan.iterations).then_some(plan.settle);
            let cell = Cell { allocator: *allocator, bytes: size.0, threads, op, settles };
            // Smaller ones it has not.
            if matches!(allocator, Allocator::Lgalloc | Allocator::LgallocEager) && size.0 < 1 << 21 {
                continue;
            }
            let detail = format!("{size}, {threads} threads, {}", name(&op));
            let (ns, after) = progress.step(&allocator.to_string(), &detail, || spawn(&cell))?;
            series[index].push(ns);
            settled[index] = after;
        }
    }
    let is_limit = |allocator: &Allocator| *allocator == Allocator::Lgalloc;
    let limit = plan.allocators.iter().position(is_limit).filter(|index| series[*index].count() > 0).unwrap_or(0);
    let limit = series[limit].median();
    let row = |index: usize| Row {
        bench: "objects",
        allocator: plan.allocators[index].to_string(),
        size: size.0,
        threads,
        op: name(&op),
        ns_median: series[index].median(),
        resident_at_free_bytes: settled[index].resident[0],
        resident_after_bytes: settled[index].resident[1],
        resident_settled_bytes: settled[index].resident[2],
        ratio: series[index].median() / limit,
        returning: settled[index].returning,
    };
    Ok((0..plan.allocators.len()).map(row).filter(Row::is_measured).collect())
}

/// What is resident by and by, and the part of the CPU time that giving back took.
#[derive(Clone, Copy, Default)]
struct Settled {
    resident: [Option<u64>; 3],
    returning: Option<f64>,
}

/// Runs a cell in a process of its own.
fn spawn(cell: &Cell) -> Result<(f64, Settled), BenchError> {
    let program = std::env::current_exe()?;
    let output =
        Command::new(program).args(["objects", "--once", &cell.to_string()]).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_whitespace();
    let ns = words.next().and_then(|ns| ns.parse().ok()).filter(|_| output.status.success());
    let ns = ns.ok_or_else(|| io::Error::other(format!("the process for {cell} ended with {}", output.status)))?;
    let resident = std::array::from_fn(|_| words.next().and_then(|bytes| bytes.parse().ok()));
    Ok((ns, Settled { resident, returning: words.next().and_then(|part| part.parse().ok()) }))
}

/// Two panels for each operation, with bars for each allocator and number of threads: time, and what is resident later.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    let mut sizes: Vec<u64> = rows.iter().map(|row| row.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let parts = [("an operation", "ns", true), ("resident 1 s after the last free", "MiB", false)];
    for (part, y_label, is_time) in parts {
        for row in rows {
            let resident = row.resident_after_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
            let Some(value) = (if is_time { Some(row.ns_median) } else { resident }) else { continue };
            let title = format!("{}: {part}", row.op);
            let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
                panels.push(Panel {
                    title,
                    x_label: "size of an object",
                    y_label,
                    log_y: is_time,
                    x_names: sizes.iter().map(|size| Bytes(*size).to_string()).collect(),
                    ..Panel::default()
                });
                panels.len() - 1
            });
            let at = sizes.iter().position(|size| *size == row.size).unwrap_or(0);
            let line = format!("{}, {} threads", row.allocator, row.threads);
            panels[index].point(line, &row.allocator, row.threads > 1, (at as f64, value));
        }
    }
    panels
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_allocator_does_everything() {
        for allocator in Allocator::value_variants() {
            for op in Op::value_variants().iter().filter(|op| **op != Op::Steady) {
                let cell = Cell { allocator: *allocator, bytes: 4 << 20, threads: 1, op: *op, settles: None };
                let text = once(&cell).expect("there is memory");
                let ns: f64 = text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number");
                assert!(ns > 0.0, "{cell}: {text}");
            }
        }
    }

    #[test]
    fn a_picture_has_every_allocator_in_a_colour_of_its_own_and_what_is_resident() {
        let row = |allocator: &Allocator| Row {
            bench: "objects",
            allocator: allocator.to_string(),
            size: 8 << 20,
            threads: 1,
            op: "pair".to_owned(),
            ns_median: 20.0,
            resident_at_free_bytes: None,
            resident_after_bytes: Some(33 << 20),
            resident_settled_bytes: None,
            ratio: 1.0,
            returning: None,
        };
        let rows: Vec<_> = Allocator::value_variants().iter().map(row).collect();
        let panels = panels(&rows);
        assert_eq!(panels.len(), 2);
        let svg = crate::plot::draw("t", &panels, 2).expect("strings are writable");
        let colours = svg.split("<rect ").filter_map(|rect| Some(rect.split_once("fill=\"#")?.1.get(..6)?.to_owned()));
        let mut colours: Vec<_> = colours.filter(|colour| colour != "FFFFFF").collect();
        assert_eq!(colours.len(), 2 * rows.len(), "a bar in each panel");
        colours.sort();
        colours.dedup();
        assert_eq!(colours.len(), rows.len(), "{colours:?}");
        let size = Bytes(8 << 20).to_string();
        assert!([&*size, "resident 1 s", "lgalloc-eager"].iter().all(|text| svg.contains(text)), "{svg}");
    }

    #[test]
    fn rows_have_the_names_that_scripts_read() {
        let row = Row {
            bench: "objects",
            allocator: "llfree".to_owned(),
            size: 1,
            threads: 1,
            op: "pair".to_owned(),
            ns_median: 1.0,
            resident_at_free_bytes: Some(2),
            resident_after_bytes: None,
            resident_settled_bytes: None,
            ratio: 1.0,
            returning: Some(0.005),
        };
        let json = serde_json::to_string(&row).expect("plain data");
        let keys = [
            r#"{"bench":"objects","allocator":"llfree","size":1,"threads":1,"op":"pair","ns_median":1.0,"#,
            r#""resident_at_free_bytes":2,"resident_after_bytes":null,"resident_settled_bytes":null,"#,
            r#""ratio":1.0,"returning":0.005}"#,
        ];
        assert_eq!(json, keys.concat());
    }
}
