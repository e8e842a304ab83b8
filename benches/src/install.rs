//! Installs as a guest feels them: what each allocation of an unbacked 2 MiB frame takes,
//! while nothing else goes on and while the host takes memory.
//!
//! A round of a VM: a burst warms the host's memory up (what was freed is gone after some two
//! seconds, and then costs milliseconds to get back), the host evicts all of it, the next burst is
//! measured. `reclaim` has more going on during the burst: a second VM in the same process, whose
//! memory is touched and free, is shrunk slice by slice for as long as the burst takes, and between
//! two slices the first VM's own limit goes down and up by as much. (Touched free memory in the first
//! VM itself would be the first that its guest takes, and nothing would be installed.)
//!
//! The guest asks for each frame alone (`single`: the latency of an install), or for runs of them
//! (`ahead`, as it does on its own: most allocations wait for nothing, few for many frames).
//!
//! Limits in the same run: `MADV_POPULATE_WRITE` of single frames, `UFFDIO_MOVE` of frames that have
//! memory, and between them an install out of a pool without a guest.

use crate::candidates::Candidate;
use crate::error::{BenchError, SizeError};
use crate::guest::{ask, evict_all, fill_pool, grow, measure, touch_and_free};
use crate::interrupt;
use crate::mover::Mover;
use crate::plot::Panel;
use crate::progress::{Progress, Show};
use crate::room;
use crate::series::{Series, Table};
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_control::protocol::{BurstTouch, GuestRequest};
use llfree_monitor::memory::{Backing, Fill, GuestRam, PoolConfig, Supply, UseUserfaultfd};
use serde::Serialize;
use shared_layout::{HUGE_SIZE, HugeId, HugeRange};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmm::vm::{Vm, VmConfig};

/// Frames that the host takes at once during a burst.
const SLICE: u64 = 32 * HUGE_SIZE;
/// At most so much more than the usual pool has a candidate with a large one.
const LARGE_POOLS: u64 = 512 << 20;
/// The name of the raw calls in the progress line.
const RAW: &str = "raw";
/// Frames of the raw calls.
const RAW_FRAMES: u32 = 128;

/// The measurement.
pub(crate) struct Plan {
    pub(crate) candidates: Vec<&'static Candidate>,
    pub(crate) cpus: Vec<u32>,
    pub(crate) mem: u64,
    pub(crate) burst: u64,
    pub(crate) reclaim: u64,
    pub(crate) iterations: u32,
}

impl Plan {
    /// The plan, made smaller until what it touches fits in `available` bytes; an error if it makes
    /// no sense.
    pub(crate) fn fitted(mut self, available: u64) -> Result<Self, BenchError> {
        let (burst, own) = (Bytes(self.burst), Bytes(self.mem / 2));
        if self.burst < HUGE_SIZE || burst > own {
            return Err(SizeError::Burst { burst, half: own }.into());
        }
        if self.reclaim > self.mem / 2 {
            let reclaim = Bytes(self.reclaim);
            return Err(SizeError::Reclaim { reclaim, half: own }.into());
        }
        let whole = |bytes: u64| bytes / HUGE_SIZE * HUGE_SIZE;
        while self.reclaim > 0 && self.burst + self.reclaim > available / 2 && self.burst > 64 << 20 {
            (self.mem, self.burst, self.reclaim) =
                (whole(self.mem / 2), whole(self.burst / 2), whole(self.reclaim / 2));
        }
        Ok(self)
    }

    /// What a round of a VM takes: some milliseconds for each frame of its bursts.
    fn usual_round(&self) -> Duration {
        Duration::from_millis(3) * (self.burst / HUGE_SIZE) as u32
    }
}

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    /// The way that frames get their memory, or the raw call.
    candidate: &'static str,
    /// 0 without a guest.
    vcpus: u32,
    /// How the guest asks: for each frame alone (`single`), or for runs of them (`ahead`).
    asks: &'static str,
    /// `quiet`, or `reclaim`.
    beside: &'static str,
    /// Frames allocated in a round.
    frames: u32,
    /// Frames installed in a round, and the calls for them; medians.
    installed: f64,
    calls: f64,
    /// Nanoseconds of one allocation in a round, medians over rounds.
    p50_ns: f64,
    p99_ns: f64,
    p999_ns: f64,
    mean_ns: f64,
    /// Microseconds a frame, allocated and touched, of all vCPUs together.
    us_per_frame_min: f64,
    us_per_frame_median: f64,
    us_per_frame_max: f64,
    /// Backed frames that the host took meanwhile, the median.
    reclaimed: f64,
    /// Median microseconds a frame over those of the raw populate.
    ratio_to_populate: f64,
    /// p99 over that of the quiet VM.
    p99_to_quiet: f64,
    /// Frames a second over those of one vCPU.
    throughput_to_one_vcpu: f64,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<12} {:>5} {:<6} {:<8} {:>6} {:>9} {:>9} {:>10} {:>10} {:>11} {:>9} {:>9} {:>8} {:>8} {:>8}\n",
            "candidate",
            "vCPUs",
            "asks",
            "beside",
            "frames",
            "installed",
            "calls",
            "p50 ns",
            "p99 ns",
            "p99.9 ns",
            "us/frame",
            "reclaimed",
            "to pop.",
            "p99/qt.",
            "to 1 CPU"
        );
        for row in rows {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:<12} {:>5} {:<6} {:<8} {:>6} {:>9.0} {:>9.0} {:>10.0} {:>10.0} {:>11.0} {:>9.2} {:>9.0} {:>8.3} {:>8.2} {:>8.2}",
                row.candidate,
                row.vcpus,
                row.asks,
                row.beside,
                row.frames,
                row.installed,
                row.calls,
                row.p50_ns,
                row.p99_ns,
                row.p999_ns,
                row.us_per_frame_median,
                row.reclaimed,
                row.ratio_to_populate,
                row.p99_to_quiet,
                row.throughput_to_one_vcpu
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        !self.us_per_frame_median.is_nan()
    }
}

/// The results of one VM's rounds in one setting.
#[derive(Default)]
struct Cell {
    p50: Series,
    p99: Series,
    p999: Series,
    mean: Series,
    us_per_frame: Series,
    installed: Series,
    calls: Series,
    reclaimed: Series,
}

impl Cell {
    fn row(&self, candidate: &'static str, vcpus: u32, setting: Setting, frames: u32) -> Row {
        Row {
            candidate,
            vcpus,
            asks: setting.asks,
            beside: setting.beside,
            frames,
            installed: self.installed.median(),
            calls: self.calls.median(),
            p50_ns: self.p50.median(),
            p99_ns: self.p99.median(),
            p999_ns: self.p999.median(),
            mean_ns: self.mean.median(),
            us_per_frame_min: self.us_per_frame.min(),
            us_per_frame_median: self.us_per_frame.median(),
            us_per_frame_max: self.us_per_frame.max(),
            reclaimed: self.reclaimed.median(),
            ratio_to_populate: f64::NAN,
            p99_to_quiet: f64::NAN,
            throughput_to_one_vcpu: f64::NAN,
        }
    }

    /// A series of single calls, as if it were a burst.
    fn raw(&mut self, mut nanos: Vec<u64>) {
        nanos.sort_unstable();
        let rank = |permille: usize| nanos[(nanos.len() * permille).div_ceil(1000).max(1) - 1] as f64;
        let mean = nanos.iter().sum::<u64>() as f64 / nanos.len() as f64;
        self.p50.push(rank(500));
        self.p99.push(rank(990));
        self.p999.push(rank(999));
        self.mean.push(mean);
        self.us_per_frame.push(mean / 1000.0);
        self.installed.push(nanos.len() as f64);
        self.calls.push(nanos.len() as f64);
        self.reclaimed.push(0.0);
    }
}

/// The way that a burst is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Setting {
    asks: &'static str,
    beside: &'static str,
}

const SETTINGS: [Setting; 4] = [
    Setting { asks: SINGLE, beside: QUIET },
    Setting { asks: SINGLE, beside: RECLAIM },
    Setting { asks: "ahead", beside: QUIET },
    Setting { asks: "ahead", beside: RECLAIM },
];
const SINGLE: &str = "single";
const QUIET: &str = "quiet";
const RECLAIM: &str = "reclaim";

/// A VM under measurement.
struct Subject {
    candidate: &'static str,
    vm: Vm,
    cells: [Cell; SETTINGS.len()],
}

/// Measures `plan.iterations` rounds after one to warm up.
pub(crate) fn run(plan: &Plan, show: Show) -> Result<Vec<Row>, BenchError> {
    let guests = plan.candidates.len() * plan.cpus.len() + usize::from(plan.reclaim > 0);
    // One candidate has the largest pool there is.
    room::check(room::of_guests(guests, plan.burst + plan.reclaim + LARGE_POOLS * plan.cpus.len() as u64))?;
    let mut subjects = Vec::new();
    for candidate in &plan.candidates {
        for cpus in &plan.cpus {
            let vm = Vm::launch(candidate.config(Bytes(plan.mem), *cpus, Backing::Anon))?;
            subjects.push(Subject { candidate: candidate.name, vm, cells: Default::default() });
        }
    }
    let neighbour = match plan.reclaim {
        0 => None,
        bytes => Some(Vm::launch(VmConfig::new(Bytes(bytes + SLICE), 1, Backing::Anon))?),
    };
    let raw = Raw::new()?;
    let mut limits: [Cell; 3] = Default::default();
    let rounds = plan.iterations + 1;
    let names = subjects.iter().map(Subject::name).chain([RAW.to_owned()]);
    let usual = plan.usual_round();
    let mut progress = Progress::new(show, "install", names.map(|name| (name, rounds, usual)));
    for round in 0..rounds {
        for subject in subjects.iter_mut().take_while(|_| !interrupt::requested()) {
            let name = subject.name();
            progress.step(&name, "", || subject.round(plan, neighbour.as_ref()))?;
        }
        let interrupted = interrupt::requested();
        if !interrupted {
            progress.step(RAW, "", || raw.round(&mut limits))?;
        }
        if round == 0 {
            subjects.iter_mut().for_each(|subject| subject.cells = Default::default());
            limits = Default::default();
        }
        if interrupted {
            break;
        }
    }
    let mut rows = Vec::new();
    for subject in &subjects {
        let vcpus = subject.vm.config().cpus;
        let measured = |setting: &Setting| plan.reclaim > 0 || setting.beside == QUIET;
        for (setting, cell) in SETTINGS.into_iter().zip(&subject.cells).filter(|(setting, _)| measured(setting)) {
            rows.push(cell.row(subject.candidate, vcpus, setting, (plan.burst / HUGE_SIZE) as u32));
        }
    }
    let [populate, from_pool, moved] = &limits;
    rows.push(populate.row("raw-populate", 0, SETTINGS[0], RAW_FRAMES));
    if raw.supply.is_some() {
        rows.push(from_pool.row("raw-pool", 0, SETTINGS[0], RAW_FRAMES));
    }
    if raw.mover.is_some() {
        rows.push(moved.row("raw-move", 0, SETTINGS[0], RAW_FRAMES));
    }
    compare(&mut rows, populate.us_per_frame.median());
    Ok(rows)
}

/// Fills in what depends on other rows.
fn compare(rows: &mut [Row], populate_us: f64) {
    let all = rows.to_vec();
    for row in rows {
        row.ratio_to_populate = row.us_per_frame_median / populate_us;
        let like = |vcpus: u32, beside: &str| {
            let same = |r: &&Row| (r.candidate, r.asks) == (row.candidate, row.asks);
            all.iter().filter(same).find(|r| r.vcpus == vcpus && r.beside == beside)
        };
        if let Some(quiet) = like(row.vcpus, QUIET) {
            row.p99_to_quiet = row.p99_ns / quiet.p99_ns;
        }
        if let Some(one) = like(1, row.beside) {
            row.throughput_to_one_vcpu = one.us_per_frame_median / row.us_per_frame_median;
        }
    }
}

impl Subject {
    /// Its name in the progress line.
    fn name(&self) -> String {
        let cpus = self.vm.config().cpus;
        format!("{}, {cpus} vCPU{}", self.candidate, if cpus == 1 { "" } else { "s" })
    }

    fn round(&mut self, plan: &Plan, neighbour: Option<&Vm>) -> Result<(), BenchError> {
        let mut quiet = Duration::ZERO;
        for (cell, setting) in SETTINGS.into_iter().enumerate() {
            match (setting.beside, neighbour) {
                (QUIET, _) => quiet = self.burst(plan, cell, |_, _| Ok(0))?,
                (_, Some(neighbour)) => {
                    grow(neighbour, neighbour.config().memory.0)?;
                    touch_and_free(neighbour, plan.reclaim)?;
                    self.burst(plan, cell, |vm, over| reclaim_beside(vm, neighbour, plan, quiet, over))?;
                    grow(&self.vm, plan.mem)?;
                }
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// One measured burst, with `beside` on this thread; how long it took.
    fn burst(
        &mut self,
        plan: &Plan,
        cell: usize,
        beside: impl FnOnce(&Vm, &AtomicBool) -> Result<u32, BenchError>,
    ) -> Result<Duration, BenchError> {
        let vm = &self.vm;
        touch_and_free(vm, plan.burst)?;
        evict_all(vm)?;
        fill_pool(vm.monitor().supply());
        let installs = || vm.monitor().counters.installs.get();
        let calls = ask(vm, &GuestRequest::Stats)?.install_calls;
        let before = installs();
        let single = SETTINGS[cell].asks == SINGLE;
        let over = AtomicBool::new(false);
        let (measured, reclaimed) = std::thread::scope(|scope| {
            let burst = scope.spawn(|| {
                // Kept: the first to finish must not free frames that the others then need no install for.
                let request = GuestRequest::Burst { bytes: plan.burst, touch: BurstTouch::Pages, keep: true, single };
                let measured = measure(vm, &request);
                over.store(true, Ordering::Relaxed);
                measured
            });
            let reclaimed = beside(vm, &over);
            // A panic would have ended the process already.
            (burst.join().unwrap_or_else(|_| unreachable!()), reclaimed)
        });
        let ((report, samples), reclaimed) = (measured?, reclaimed?);
        let installed = installs() - before;
        let busy_ns = samples.mean as f64 * samples.count as f64 + samples.beside_ns as f64;
        let all_ns = busy_ns / f64::from(vm.config().cpus);
        let cell = &mut self.cells[cell];
        cell.p50.push(samples.p50 as f64);
        cell.p99.push(samples.p99 as f64);
        cell.p999.push(samples.p999 as f64);
        cell.mean.push(samples.mean as f64);
        cell.us_per_frame.push(all_ns / 1000.0 / samples.count as f64);
        cell.installed.push(installed as f64);
        cell.calls.push(report.install_calls.saturating_sub(calls) as f64);
        cell.reclaimed.push(f64::from(reclaimed));
        ask(vm, &GuestRequest::Free { bytes: None, random: false })?;
        ask(vm, &GuestRequest::Idle)?;
        evict_all(vm)?;
        Ok(Duration::from_nanos(all_ns as u64))
    }
}

/// Shrinks the neighbour in slices until the burst is over, and the VM itself down and up between
/// them; the frames that were backed. The slices are spread over the time that the burst
/// took when it was `quiet`, if they need less.
fn reclaim_beside(vm: &Vm, neighbour: &Vm, plan: &Plan, quiet: Duration, over: &AtomicBool) -> Result<u32, BenchError> {
    let slices = (plan.reclaim / SLICE).max(1);
    let start = Instant::now();
    let mut taken = 0;
    for slice in 1.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        if slice <= slices {
            let to = (neighbour.config().memory.0 - slice * SLICE) / HUGE_SIZE;
            taken += neighbour.monitor().shrink(to as u32).map_err(vmm::vm::VmError::from)?.discarded;
        }
        vm.shrink(plan.mem - plan.reclaim, |_| false)?;
        vm.grow(plan.mem)?;
        let due = quiet.mul_f64(slice.min(slices) as f64 / slices as f64);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    Ok(taken)
}

/// Memory without a guest, for the calls that limit an install.
struct Raw {
    populated: GuestRam,
    /// `None` where no memory can be moved.
    supply: Option<(Arc<GuestRam>, Supply)>,
    mover: Option<Mover>,
}

impl Raw {
    fn new() -> Result<Self, BenchError> {
        let ram = || GuestRam::new(u64::from(RAW_FRAMES) * HUGE_SIZE, Backing::Anon);
        let target = Arc::new(ram()?);
        let pool = PoolConfig { huge_frames: RAW_FRAMES, rate: 0, fill: Fill::Always };
        // Without userfaultfd there is no such limit, and nothing to compare with it.
        let supply = Supply::new(target.clone(), pool, UseUserfaultfd::On, &Spawner::default())
            .ok()
            .map(|supply| (target, supply));
        Ok(Self { populated: ram()?, supply, mover: Mover::new(RAW_FRAMES).ok() })
    }

    fn round(&self, [populate, from_pool, moved]: &mut [Cell; 3]) -> Result<(), BenchError> {
        self.populated.populate(HugeRange::saturating(HugeId(0), RAW_FRAMES))?;
        self.populated.discard(HugeRange::saturating(HugeId(0), RAW_FRAMES))?;
        populate.raw(timed(|huge| Ok(self.populated.populate(huge)?))?);
        self.populated.discard(HugeRange::saturating(HugeId(0), RAW_FRAMES))?;
        if let Some((ram, supply)) = &self.supply {
            fill_pool(supply);
            let install = |huge| supply.install(huge).map_err(|shortfall| shortfall.error.into());
            from_pool.raw(timed(install)?);
            ram.discard(HugeRange::saturating(HugeId(0), RAW_FRAMES))?;
        }
        if let Some(mover) = &self.mover {
            mover.prepare()?;
            moved.raw(timed(|huge| Ok(mover.move_frame(huge)?))?);
        }
        Ok(())
    }
}

fn timed(mut call: impl FnMut(HugeId) -> Result<(), BenchError>) -> Result<Vec<u64>, BenchError> {
    (0..RAW_FRAMES)
        .map(|huge| {
            let start = Instant::now();
            call(HugeId(huge))?;
            Ok(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
        })
        .collect()
}

/// Latencies over candidates, a line a percentile.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for row in rows.iter().filter(|row| row.vcpus > 0) {
        let title = format!("{} vCPU, asks {}, {}", row.vcpus, row.asks, row.beside);
        let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            let panel = Panel { title, x_label: "memory from", y_label: "us", log_y: true, ..Panel::default() };
            panels.push(panel);
            panels.len() - 1
        });
        let panel = &mut panels[index];
        let x = panel.x_names.len() as f64;
        panel.x_names.push(row.candidate.to_owned());
        for (name, ns) in [("p50", row.p50_ns), ("p99", row.p99_ns), ("p99.9", row.p999_ns)] {
            panel.point(name.to_owned(), name, false, (x, ns / 1000.0));
        }
    }
    panels
}

#[cfg(test)]
mod tests;
