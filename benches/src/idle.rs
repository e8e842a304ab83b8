//! What an idle VM costs its host: CPU time of the whole process while the guest waits for work.
//!
//! The control threads run as in the real binary, with their audits of resident memory. The same VM
//! is measured without automatic reclaim, with it as `on` sets it, and with the shortest interval
//! there is; rounds take turns. The time in a scan is the thread's own account, with caches as cold as
//! a pause between two scans leaves them.

use crate::error::BenchError;
use crate::interrupt;
use crate::progress::{Progress, Show};
use crate::series::{Series, Table};
use llfree_base::choices::{Settings, Switch};
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_monitor::memory::Backing;
use serde::Serialize;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::service::{self, Service};
use vmm::vm::{Vm, VmConfig};

/// One line of the figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    bench: &'static str,
    /// The setting of automatic reclaim.
    auto_reclaim: &'static str,
    memory_bytes: u64,
    /// CPU time of the process for each second that passed.
    cpu_us_per_s_min: f64,
    cpu_us_per_s_median: f64,
    cpu_us_per_s_max: f64,
    /// The median as a share of one core.
    core_percent: f64,
    /// Scans in all rounds.
    scans: u64,
    /// Mean time in a scan, a GiB of guest memory; absent without scans.
    scan_us_per_gib: Option<f64>,
}

impl Table for Row {
    fn table(rows: &[Self]) -> String {
        let mut text = format!(
            "{:<16} {:>8} {:>12} {:>9} {:>9} {:>8} {:>6} {:>12}\n",
            "auto-reclaim", "memory", "us CPU/s min", "median", "max", "% core", "scans", "us scan/GiB"
        );
        for row in rows {
            let scan = row.scan_us_per_gib.map_or_else(|| "-".to_owned(), |us| format!("{us:.3}"));
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:<16} {:>8} {:>12.1} {:>9.1} {:>9.1} {:>8.4} {:>6} {scan:>12}",
                row.auto_reclaim,
                Bytes(row.memory_bytes).to_string(),
                row.cpu_us_per_s_min,
                row.cpu_us_per_s_median,
                row.cpu_us_per_s_max,
                row.core_percent,
                row.scans
            );
        }
        text
    }

    fn is_measured(&self) -> bool {
        !self.cpu_us_per_s_median.is_nan()
    }
}

struct Candidate {
    name: &'static str,
    switch: Switch,
    cpu: Series,
    scans: u64,
    scan_time: Duration,
}

impl Candidate {
    /// Lets the VM idle for `time`; adds to the books if this is `measured`.
    fn wait(&mut self, vm: &Arc<Vm>, time: Duration, measured: bool) -> Result<(), BenchError> {
        service::auto_reclaim(vm, self.switch)?;
        let before = vm.auto_reclaim().status();
        let (cpu, start) = (process_cpu(), Instant::now());
        std::thread::sleep(time);
        let share = (process_cpu().saturating_sub(cpu)).as_secs_f64() / start.elapsed().as_secs_f64();
        let after = vm.auto_reclaim().status();
        if measured {
            self.cpu.push(share * 1e6);
            self.scans += after.scans - before.scans;
            self.scan_time += after.scan_time.saturating_sub(before.scan_time);
        }
        Ok(())
    }
}

/// Measures each setting `iterations` times for `time`, after a round to warm up.
pub(crate) fn run(mem: Bytes, time: Duration, iterations: u32, show: Show) -> Result<Vec<Row>, BenchError> {
    let vm = Arc::new(Vm::launch(VmConfig::new(mem, 1, Backing::Anon))?);
    let _service = Service::start(vm.clone(), "idle")?;
    vm.run_guest(&GuestRequest::Stats)?;
    let shortest = Settings { interval: Duration::from_millis(100), ..Settings::default() };
    let candidate = |name, settings| {
        let (cpu, scan_time) = (Series::default(), Duration::ZERO);
        Candidate { name, switch: Switch(settings), cpu, scans: 0, scan_time }
    };
    let mut candidates = [
        candidate("off", None),
        candidate("on", Some(Settings::default())),
        candidate("interval=100ms", Some(shortest)),
    ];
    let rounds = iterations + 1;
    let mut progress =
        Progress::new(show, "idle", candidates.each_ref().map(|candidate| (candidate.name, rounds, time)));
    for round in 0..rounds {
        for candidate in candidates.iter_mut().take_while(|_| !interrupt::requested()) {
            progress.step(candidate.name, "", || candidate.wait(&vm, time, round > 0))?;
        }
    }
    let gib = mem.0 as f64 / Bytes::GIB as f64;
    let row = |candidate: &Candidate| Row {
        bench: "idle",
        auto_reclaim: candidate.name,
        memory_bytes: mem.0,
        cpu_us_per_s_min: candidate.cpu.min(),
        cpu_us_per_s_median: candidate.cpu.median(),
        cpu_us_per_s_max: candidate.cpu.max(),
        core_percent: candidate.cpu.median() / 1e4,
        scans: candidate.scans,
        scan_us_per_gib: (candidate.scans > 0)
            .then(|| candidate.scan_time.as_secs_f64() * 1e6 / candidate.scans as f64 / gib),
    };
    Ok(candidates.iter().map(row).collect())
}

/// CPU time that all threads of this process took so far.
fn process_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    // A process has taken no negative time, and nanoseconds are below a second.
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
