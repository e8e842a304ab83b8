//! A guest under measurement: commands that must succeed, and resizes counted by what they moved.

use crate::error::BenchError;
use llfree_base::units::Bytes;
use llfree_control::protocol::{BurstTouch, GuestRequest};
use llfree_control::report::{GuestOutcome, GuestReport, SampleReport};
use llfree_monitor::memory::Supply;
use shared_layout::HUGE_SIZE;
use std::time::{Duration, Instant};
use vmm::vm::{Resize, Vm};

/// Time that a resize may wait for its guest.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time that a pool may take to fill.
const REFILL: Duration = Duration::from_secs(5);

/// Runs a command that must go well.
pub(crate) fn ask(vm: &Vm, request: &GuestRequest) -> Result<GuestReport, BenchError> {
    let report = vm.run_guest(request)?;
    if report.outcome == GuestOutcome::Ok && report.mismatches == 0 {
        return Ok(report);
    }
    let (verb, got) = (request.verb(), Bytes(report.bytes));
    Err(BenchError::Guest(format!("'{verb}' came to {got} ({:?})", report.outcome)))
}

/// Runs a command that measures.
pub(crate) fn measure(vm: &Vm, request: &GuestRequest) -> Result<(GuestReport, SampleReport), BenchError> {
    let report = ask(vm, request)?;
    match report.samples.clone() {
        Some(samples) if samples.count > 0 => Ok((report, samples)),
        _ => Err(BenchError::Guest(format!("'{}' measured nothing: does the guest have a clock?", request.verb()))),
    }
}

/// Allocates and touches, frees, and gives all caches back: what was touched is free for the host.
pub(crate) fn touch_and_free(vm: &Vm, bytes: u64) -> Result<(), BenchError> {
    ask(vm, &GuestRequest::Burst { bytes, touch: BurstTouch::Pages, keep: false, single: false })?;
    ask(vm, &GuestRequest::Idle).map(drop)
}

/// Waits until the pool is full, if there is one; not forever. Until then its thread has a CPU that
/// is not counted.
pub(crate) fn fill_pool(supply: &Supply) {
    let start = Instant::now();
    let full = || {
        let pool = supply.pool_status();
        // One that follows demand may have less to keep.
        pool.resident_bytes >= pool.goal_bytes
    };
    while !full() && start.elapsed() < REFILL {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A resize and the huge frames that it moved, by the limit.
pub(crate) struct Moved {
    pub(crate) duration: Duration,
    pub(crate) frames: u32,
}

impl Moved {
    fn new(before: u64, resize: &Resize) -> Self {
        let frames = before.abs_diff(resize.actual) / HUGE_SIZE;
        Self { duration: resize.duration, frames: u32::try_from(frames).unwrap_or(u32::MAX) }
    }
}

/// Lowers the limit, as far as the guest lets go.
pub(crate) fn shrink(vm: &Vm, to: u64) -> Result<Moved, BenchError> {
    let before = limit(vm);
    let resize = vm.shrink(to, |elapsed| elapsed < PATIENCE || vm.elastic().is_moving(elapsed))?;
    Ok(Moved::new(before, &resize))
}

/// Raises the limit.
pub(crate) fn grow(vm: &Vm, to: u64) -> Result<Moved, BenchError> {
    let before = limit(vm);
    Ok(Moved::new(before, &vm.grow(to)?))
}

/// The guest's limit, in bytes.
fn limit(vm: &Vm) -> u64 {
    vm.limit()
}

/// Takes the memory of all free frames.
pub(crate) fn evict_all(vm: &Vm) -> Result<u32, BenchError> {
    Ok(vm.monitor().evict(u32::MAX).map_err(vmm::vm::VmError::from)?.discarded)
}
