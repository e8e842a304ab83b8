//! The cost of a frame (order 0) when memory is almost full.
//!
//! All memory is allocated, then frames are freed at random until the level is reached. Timed are
//! loops that allocate half of what is free, from a quarter above the level's free frames to a
//! quarter below; between them as many random frames are freed, which is timed too. So the free
//! frames stay as scattered as chance makes them, and the allocator as near to the level as a
//! loop that is long enough to be timed allows.

use crate::allocator::Allocator;
use crate::crew::{cas_ns, nanoseconds, on_cores};
use crate::error::{BenchError, Exhausted, SizeError};
use crate::frames::{FAILED, Frames, Visit, frames};
use crate::interrupt;
use crate::measured::{Measured, Timed};
use crate::passes::{LEAST_OPS, PATIENCE, alloc_loop, free_loop};
use crate::plot::{Line, Panel};
use crate::progress::{Progress, Show};
use crate::series::{Series, Table};
use llfree_base::units::Bytes;
use serde::Serialize;
use shared_layout::{HUGE_SIZE, Order};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Fill levels, in thousandths of all frames.
const LEVELS: [u32; 4] = [500, 900, 990, 999];

/// Below this, the last level has no more than a handful of free frames.
const LEAST_HUGE_FRAMES: u32 = 32;

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    bench: &'static str,
    fill_percent: f64,
    allocator: &'static str,
    op: &'static str,
    /// Nanoseconds an operation, the fastest round.
    ns_min: f64,
    ns_median: f64,
    ns_max: f64,
    /// Nanoseconds of an uncontended compare-and-swap, the median over the same rounds.
    cas_ns: f64,
    /// Median over that.
    ratio_to_cas: f64,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:>6} {:<13} {:<6} {:>9} {:>9} {:>9} {:>6} {:>7}\n",
            "% full", "allocator", "op", "ns min", "median", "max", "cas", "to cas"
        );
        for row in rows {
            let Row { bench: _, fill_percent, allocator, op, ns_min, ns_median, ns_max, cas_ns, ratio_to_cas } = row;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{fill_percent:>6.1} {allocator:<13} {op:<6} {ns_min:>9.2} {ns_median:>9.2} {ns_max:>9.2} \
                 {cas_ns:>6.2} {ratio_to_cas:>7.2}"
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        !self.ns_median.is_nan()
    }
}

/// What a round takes for each huge frame.
const USUAL: Duration = Duration::from_micros(25);

/// One round of one level.
pub(crate) struct Level<'a> {
    pub(crate) per_mille: u32,
    pub(crate) huge_frames: u32,
    pub(crate) seed: u64,
    pub(crate) cores: &'a [usize],
}

impl Visit for Level<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, frames: &F) -> Self::Output {
        let exhausted = || BenchError::Exhausted(Exhausted { bench: "fill", order: 0 });
        on_cores(self.cores, 1, |_, _| self.measure(frames))?.pop().flatten().ok_or_else(exhausted)
    }
}

impl Level<'_> {
    fn measure<F: Frames>(&self, allocator: &F) -> Option<Measured> {
        let mut handle = allocator.handle();
        let mut random = fastrand::Rng::with_seed(self.seed);
        let mut held = vec![FAILED; frames(self.huge_frames) as usize];
        let free_at_level = (held.len() as u64 * u64::from(1000 - self.per_mille) / 1000) as usize;
        alloc_loop(&mut handle, &mut held, Order::BASE);
        let mut ok = !held.contains(&FAILED);
        random.shuffle(&mut held);
        let used = held.len() - free_at_level - free_at_level / 4;
        ok = ok && free_loop(&mut handle, &held[used..], Order::BASE);

        let count = free_at_level / 2;
        let (mut alloc, mut free, mut ops) = (0.0, 0.0, 0);
        let cas_ns = cas_ns();
        let begin = Instant::now();
        while ok && (ops == 0 || (ops < LEAST_OPS && begin.elapsed() < PATIENCE)) {
            let tail = used..used + count;
            let start = Instant::now();
            alloc_loop(&mut handle, &mut held[tail.clone()], Order::BASE);
            alloc += nanoseconds(start, 1);
            ok = !held[tail.clone()].contains(&FAILED);
            // Any of the used frames may be freed, not only those of this loop.
            for i in tail.clone() {
                held.swap(i, random.usize(..=i));
            }
            let start = Instant::now();
            ok = ok && free_loop(&mut handle, &held[tail], Order::BASE);
            free += nanoseconds(start, 1);
            ops += count as u64;
        }
        let timed = |op, sum: f64| Timed { op, ns: sum / ops.max(1) as f64, count: ops };
        ok.then(|| Measured { cas_ns, ops: vec![timed("alloc", alloc), timed("free", free)] })
    }
}

/// Measures every level and allocator `iterations` times, after one round to warm up.
pub(crate) fn run(
    allocators: &[Allocator],
    huge_frames: u32,
    iterations: u32,
    cores: &[usize],
    show: Show,
) -> Result<Vec<Row>, BenchError> {
    if huge_frames < LEAST_HUGE_FRAMES {
        let (mem, least) = (Bytes(u64::from(huge_frames) * HUGE_SIZE), Bytes(u64::from(LEAST_HUGE_FRAMES) * HUGE_SIZE));
        return Err(SizeError::TooSmallToFill { mem, least }.into());
    }
    let mut cells: Vec<(u32, Allocator, [Series; 2], Series)> = Vec::new();
    for per_mille in LEVELS {
        let able = allocators.iter().filter(|a| a.supports(Order::BASE, huge_frames));
        cells.extend(able.map(|allocator| (per_mille, *allocator, Default::default(), Series::default())));
    }
    let rounds = iterations + 1;
    let usual = USUAL * huge_frames;
    let steps = cells.iter().map(|(_, allocator, ..)| (allocator.name(), rounds, usual));
    let mut progress = Progress::new(show, "fill", steps);
    for round in 0..rounds {
        for (per_mille, allocator, series, cas) in cells.iter_mut().take_while(|_| !interrupt::requested()) {
            let level = Level { per_mille: *per_mille, huge_frames, seed: u64::from(round), cores };
            let detail = format!("{} % full", percent(*per_mille));
            let measured = progress.step(allocator.name(), &detail, || allocator.with(huge_frames, level))?;
            if round > 0 {
                cas.push(measured.cas_ns);
                series.iter_mut().zip(measured.ops).for_each(|(series, op)| series.push(op.ns));
            }
        }
    }
    let rows = cells.iter().flat_map(|(per_mille, allocator, series, cas)| {
        ["alloc", "free"].into_iter().zip(series).map(|(op, series)| Row {
            bench: "fill",
            fill_percent: percent(*per_mille),
            allocator: allocator.name(),
            op,
            ns_min: series.min(),
            ns_median: series.median(),
            ns_max: series.max(),
            cas_ns: cas.median(),
            ratio_to_cas: series.median() / cas.median(),
        })
    });
    Ok(rows.collect())
}

fn percent(per_mille: u32) -> f64 {
    f64::from(per_mille) / 10.0
}

/// Cost over the level, which is drawn as the share that is free.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    ["alloc", "free"]
        .into_iter()
        .map(|op| {
            let mut panel = Panel {
                title: format!("fill: {op}"),
                x_label: "% of memory that is used",
                y_label: "ns",
                log_y: true,
                x_names: LEVELS.iter().map(|level| format!("{}", percent(*level))).collect(),
                ..Panel::default()
            };
            let mine = || rows.iter().filter(|row| row.op == op);
            for row in mine() {
                let level = LEVELS.iter().position(|level| percent(*level) == row.fill_percent).unwrap_or(0);
                panel.point(row.allocator.to_owned(), row.allocator, false, (level as f64, row.ns_median));
            }
            let cas = mine().map(|row| row.cas_ns).sum::<f64>() / mine().count().max(1) as f64;
            let ends = panel.x_range();
            panel.lines.push(Line::guide("1 CAS", [(ends.0, cas), (ends.1, cas)]));
            panel
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crew;

    #[test]
    fn every_level_of_every_allocator_is_measured() {
        let cores = crew::cores().expect("a process has cores");
        let rows = run(&[Allocator::Llfree, Allocator::Bitmap], LEAST_HUGE_FRAMES, 1, &cores, Show::Nothing)
            .expect("room is left");
        assert_eq!(rows.len(), 2 * 2 * LEVELS.len());
        assert!(rows.iter().all(|row| row.ns_median > 0.0 && row.ratio_to_cas > 0.0));
        assert_eq!(panels(&rows).len(), 2);
    }

    #[test]
    fn too_little_memory_is_refused() {
        assert!(matches!(run(&[Allocator::Llfree], 1, 1, &[0], Show::Nothing), Err(BenchError::Size(_))));
    }
}
