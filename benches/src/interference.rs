//! What a guest's work loses while the host shrinks and grows its memory.
//!
//! One vCPU, pinned to a core; the VMM's other threads are on another. Its pace is measured over time
//! by STREAM's triad (memory bandwidth) and by FTQ (computing time), undisturbed and while the host
//! resizes the free memory beside it, one after the other in each round, in alternating order. The
//! `+alloc` variants allocate, touch and free memory between their samples, so that resizes meet a
//! guest that wants the very frames; the time for that is a figure of its own (`beside`).
//!
//! At the start of each disturbed run all free frames are backed. In the first half it is
//! taken slice by slice, evenly spread, so that the reclaim of touched memory falls on as many samples
//! as there are slices; in the second half the limit goes up and down all the time.

use crate::candidates::Candidate;
use crate::crew;
use crate::error::{BenchError, SizeError};
use crate::guest::{ask, grow, measure, shrink, touch_and_free};
use crate::interrupt;
use crate::plot::{Line, Panel};
use crate::progress::{Progress, Show};
use crate::room;
use crate::series::{Series, Table};
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_control::report::SampleReport;
use llfree_monitor::memory::Backing;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;
use shared_layout::HUGE_SIZE;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmm::vm::Vm;

/// Memory that the guest needs besides its arrays and allocations: image, records, samples.
const GUEST_OWN: u64 = 32 << 20;
/// FTQ's quantum.
const QUANTUM_US: u64 = 1000;
/// Slices in which touched memory is taken.
const SLICES: u64 = 64;
/// Between two resizes: the host's time is not all theirs.
const PAUSE: Duration = Duration::from_millis(2);

/// The measurement.
pub(crate) struct Plan {
    pub(crate) candidates: Vec<&'static Candidate>,
    pub(crate) mem: u64,
    /// Of STREAM's arrays.
    pub(crate) bytes: u64,
    /// Memory that the `+alloc` variants allocate.
    pub(crate) beside: u64,
    pub(crate) millis: u64,
    pub(crate) iterations: u32,
}

/// A load, and whether it allocates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Load {
    name: &'static str,
    unit: &'static str,
    stream: bool,
    allocates: bool,
}

const LOADS: [Load; 4] = [
    Load { name: "stream", unit: "MB/s", stream: true, allocates: false },
    Load { name: "ftq", unit: "units", stream: false, allocates: false },
    Load { name: "stream+alloc", unit: "MB/s", stream: true, allocates: true },
    Load { name: "ftq+alloc", unit: "units", stream: false, allocates: true },
];

impl Load {
    fn request(self, plan: &Plan) -> GuestRequest {
        let (millis, beside_bytes) = (plan.millis, if self.allocates { plan.beside } else { 0 });
        if self.stream {
            GuestRequest::Stream { millis, bytes: plan.bytes, beside_bytes }
        } else {
            GuestRequest::Ftq { millis, quantum_us: QUANTUM_US, beside_bytes }
        }
    }
}

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    candidate: &'static str,
    /// The load.
    op: &'static str,
    unit: &'static str,
    /// Mean and 1st percentile of an undisturbed run, and of one with resizes; medians over rounds.
    quiet_mean: f64,
    quiet_p1: f64,
    resized_mean: f64,
    resized_p1: f64,
    /// Disturbed over undisturbed, of the same round; least, median and most of all rounds.
    mean_ratio_min: f64,
    mean_ratio_median: f64,
    mean_ratio_max: f64,
    p1_ratio_min: f64,
    p1_ratio_median: f64,
    p1_ratio_max: f64,
    /// Microseconds to allocate, touch and free a 2 MiB frame beside the samples, in both runs.
    quiet_beside_us: f64,
    resized_beside_us: f64,
    /// Shrinks and grows in a run, and the frames that they moved; medians.
    resizes: f64,
    moved_frames: f64,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<12} {:<13} {:>6} {:>10} {:>10} {:>10} {:>8} {:>8} {:>10} {:>10} {:>8} {:>9}\n",
            "candidate",
            "load",
            "unit",
            "mean",
            "resized",
            "p1",
            "mean/qt.",
            "p1/qt.",
            "beside us",
            "resized",
            "resizes",
            "frames"
        );
        for row in rows {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:<12} {:<13} {:>6} {:>10.0} {:>10.0} {:>10.0} {:>8.4} {:>8.4} {:>10.1} {:>10.1} {:>8.0} {:>9.0}",
                row.candidate,
                row.op,
                row.unit,
                row.quiet_mean,
                row.resized_mean,
                row.resized_p1,
                row.mean_ratio_median,
                row.p1_ratio_median,
                row.quiet_beside_us,
                row.resized_beside_us,
                row.resizes,
                row.moved_frames
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        !self.mean_ratio_median.is_nan()
    }
}

/// Runs of one kind.
#[derive(Default)]
struct Side {
    mean: Series,
    p1: Series,
    beside_us: Series,
}

/// The results of one candidate's rounds under one load.
#[derive(Default)]
struct Cell {
    quiet: Side,
    resized: Side,
    mean_ratio: Series,
    p1_ratio: Series,
    resizes: Series,
    moved: Series,
}

/// One run.
struct Run {
    samples: SampleReport,
    beside_us: f64,
    resizes: u32,
    moved: u64,
}

impl Cell {
    fn add(&mut self, quiet: &Run, resized: &Run) {
        for (side, run) in [(&mut self.quiet, quiet), (&mut self.resized, resized)] {
            side.mean.push(run.samples.mean as f64);
            side.p1.push(run.samples.p1 as f64);
            side.beside_us.push(run.beside_us);
        }
        self.mean_ratio.push(resized.samples.mean as f64 / quiet.samples.mean as f64);
        self.p1_ratio.push(resized.samples.p1 as f64 / quiet.samples.p1 as f64);
        self.resizes.push(resized.resizes.into());
        self.moved.push(resized.moved as f64);
    }

    fn row(&self, candidate: &'static str, load: Load) -> Row {
        Row {
            candidate,
            op: load.name,
            unit: load.unit,
            quiet_mean: self.quiet.mean.median(),
            quiet_p1: self.quiet.p1.median(),
            resized_mean: self.resized.mean.median(),
            resized_p1: self.resized.p1.median(),
            mean_ratio_min: self.mean_ratio.min(),
            mean_ratio_median: self.mean_ratio.median(),
            mean_ratio_max: self.mean_ratio.max(),
            p1_ratio_min: self.p1_ratio.min(),
            p1_ratio_median: self.p1_ratio.median(),
            p1_ratio_max: self.p1_ratio.max(),
            quiet_beside_us: self.quiet.beside_us.median(),
            resized_beside_us: self.resized.beside_us.median(),
            resizes: self.resizes.median(),
            moved_frames: self.moved.median(),
        }
    }
}

struct Subject {
    candidate: &'static str,
    vm: Vm,
    cells: [Cell; LOADS.len()],
}

/// Measures `plan.iterations` rounds after one to warm up.
pub(crate) fn run(plan: &Plan, show: Show) -> Result<Vec<Row>, BenchError> {
    // On a thread of its own: the caller's cores stay as they are.
    let work = || {
        let cores = crew::cores()?;
        let (guest, host) = match cores[..] {
            [one] => (one, one),
            [first, second, ..] => (first, second),
            [] => return Err(BenchError::Cores(std::io::ErrorKind::NotFound.into())),
        };
        if guest == host {
            log::warn!("there is only one core: the guest loses all CPU time that the host spends on itself");
        }
        // All threads that the VMM starts inherit it, but vCPUs, which have a core of their own.
        let mut set = CpuSet::new();
        set.set(host);
        sched_setaffinity(None, &set).map_err(|errno| BenchError::Cores(errno.into()))?;
        run_pinned(plan, guest as u32, show)
    };
    // A panic would have ended the process already.
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|_| unreachable!()))
}

fn run_pinned(plan: &Plan, guest_core: u32, show: Show) -> Result<Vec<Row>, BenchError> {
    let least = least_limit(plan);
    if plan.mem / 2 < least {
        let (mem, least) = (Bytes(plan.mem), Bytes(2 * least));
        return Err(SizeError::NothingToResize { mem, least }.into());
    }
    // A run without resizes leaves all of its guest's memory there for the others' turns.
    let bytes = plan.mem.saturating_mul(plan.candidates.len() as u64);
    room::check(room::of_guests(plan.candidates.len(), bytes))?;
    let mut subjects = Vec::new();
    for candidate in &plan.candidates {
        let mut config = candidate.config(Bytes(plan.mem), 1, Backing::Anon);
        // The process may be allowed fewer cores by now than the vCPU's.
        config.pin = vec![guest_core];
        subjects.push(Subject { candidate: candidate.name, vm: Vm::launch(config)?, cells: Default::default() });
    }
    let rounds = plan.iterations + 1;
    let steps = rounds * 2 * LOADS.len() as u32;
    let mut progress = Progress::new(show, "interference", subjects.iter().map(|subject| (subject.candidate, steps)));
    for round in 0..rounds {
        for subject in &mut subjects {
            let loads = LOADS.into_iter().zip(&mut subject.cells);
            for (load, cell) in loads.take_while(|_| !interrupt::requested()) {
                let mut runs = [None, None];
                // The second one gets the other's warm caches and its throttled core.
                let order = if round % 2 == 0 { [false, true] } else { [true, false] };
                for resized in order {
                    let detail = if resized { format!("{}, resized", load.name) } else { load.name.to_owned() };
                    let run = || one_run(&subject.vm, plan, load, resized);
                    runs[usize::from(resized)] = Some(progress.step(subject.candidate, &detail, run)?);
                }
                if let [Some(quiet), Some(resized)] = &runs
                    && round > 0
                {
                    cell.add(quiet, resized);
                }
            }
        }
    }
    let rows = subjects.iter().flat_map(|subject| {
        LOADS.into_iter().zip(&subject.cells).map(|(load, cell)| cell.row(subject.candidate, load))
    });
    Ok(rows.collect())
}

/// The limit that every load can live with.
fn least_limit(plan: &Plan) -> u64 {
    (plan.bytes + plan.beside + GUEST_OWN).next_multiple_of(HUGE_SIZE)
}

fn one_run(vm: &Vm, plan: &Plan, load: Load, resized: bool) -> Result<Run, BenchError> {
    // All free frames are backed.
    touch_and_free(vm, plan.mem - GUEST_OWN)?;
    let over = AtomicBool::new(false);
    let (measured, resizes) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let measured = measure(vm, &load.request(plan));
            over.store(true, Ordering::Relaxed);
            measured
        });
        let resizes = if resized { resize(vm, plan, &over) } else { Ok((0, 0)) };
        // A panic would have ended the process already.
        (load.join().unwrap_or_else(|_| unreachable!()), resizes)
    });
    let ((report, samples), (resizes, moved)) = (measured?, resizes?);
    grow(vm, plan.mem)?;
    ask(vm, &GuestRequest::Idle)?;
    let beside_us = samples.beside_ns as f64 / 1000.0 / report.blocks.max(1) as f64;
    Ok(Run { samples, beside_us, resizes, moved })
}

/// Shrinks and grows until the load is over; how often, and the frames moved.
fn resize(vm: &Vm, plan: &Plan, over: &AtomicBool) -> Result<(u32, u64), BenchError> {
    let least = least_limit(plan);
    let start = Instant::now();
    let half = Duration::from_millis(plan.millis) / 2;
    let (mut resizes, mut moved) = (0, 0);
    let mut count = |frames: u32| {
        resizes += 1;
        moved += u64::from(frames);
    };
    let slice = ((plan.mem - least) / SLICES).next_multiple_of(HUGE_SIZE);
    let mut limit = plan.mem;
    // The load takes its own memory first.
    for number in 1..=SLICES as u32 {
        std::thread::sleep((half * number / SLICES as u32).saturating_sub(start.elapsed()));
        if over.load(Ordering::Relaxed) {
            break;
        }
        limit = limit.saturating_sub(slice).max(least);
        count(shrink(vm, limit)?.frames);
    }
    while !over.load(Ordering::Relaxed) {
        count(grow(vm, plan.mem)?.frames);
        std::thread::sleep(PAUSE);
        count(shrink(vm, least)?.frames);
        std::thread::sleep(PAUSE);
    }
    Ok((resizes, moved))
}

type Ratio = fn(&Row) -> f64;

/// The remaining pace, a panel for mean and one for the 1st percentile.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let ratios: [(&str, Ratio); 2] = [
        ("mean while resized, over undisturbed", |row| row.mean_ratio_median),
        ("1st percentile while resized, over undisturbed", |row| row.p1_ratio_median),
    ];
    let panel = |(title, ratio): (&str, Ratio)| {
        let mut panel = Panel { title: title.to_owned(), y_label: "ratio", ..Panel::default() };
        panel.x_names = LOADS.iter().map(|load| load.name.to_owned()).collect();
        panel.lines.push(Line::guide("undisturbed", [(0.0, 1.0), (LOADS.len() as f64 - 1.0, 1.0)]));
        for row in rows {
            let x = LOADS.iter().position(|load| load.name == row.op).unwrap_or_default();
            panel.point(row.candidate.to_owned(), row.candidate, false, (x as f64, ratio(row)));
        }
        panel
    };
    ratios.into_iter().map(panel).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::ELASTIC;
    use test_support::skipped;

    fn run_of(mean: u64, p1: u64) -> Run {
        let samples = SampleReport { count: 1, mean, p1, ..SampleReport::default() };
        Run { samples, beside_us: 1.0, resizes: 2, moved: 3 }
    }

    #[test]
    fn ratios_are_of_runs_in_the_same_round() {
        let mut cell = Cell::default();
        // The machine was half as fast in the second round; the ratio does not care.
        cell.add(&run_of(1000, 800), &run_of(990, 720));
        cell.add(&run_of(500, 400), &run_of(495, 360));
        let row = cell.row("llfree", LOADS[0]);
        assert_eq!((row.mean_ratio_median, row.p1_ratio_median), (0.99, 0.9));
        assert_eq!((row.quiet_mean, row.resizes, row.moved_frames), (750.0, 2.0, 3.0));
        assert_eq!(panels(&[row])[1].lines.len(), 2);
    }

    fn plan(mem: u64) -> Plan {
        let candidates = ELASTIC.iter().collect();
        Plan { candidates, mem, bytes: 12 << 20, beside: 8 << 20, millis: 30, iterations: 1 }
    }

    #[test]
    fn every_load_is_measured_with_and_without_resizes() {
        if let Err(error) = vmm::boot::open_kvm() {
            return skipped(llfree_base::error_line(&error));
        }
        let rows =
            run(&plan(256 << 20), Show::Nothing).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
        assert_eq!(rows.len(), ELASTIC.len() * LOADS.len());
        for row in &rows {
            assert!(row.quiet_mean > 0.0 && row.moved_frames > 0.0, "{row:?}");
            // A device's driver on a busy machine can take all of a vCPU, and FTQ counts what is left.
            assert!(row.resized_mean > 0.0 || row.op.starts_with("ftq"), "{row:?}");
            assert_eq!(row.quiet_beside_us > 0.0, row.op.ends_with("+alloc"), "{row:?}");
        }
        assert!(run(&plan(64 << 20), Show::Nothing).is_err(), "nothing is left to resize");
    }
}
