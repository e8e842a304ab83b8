//! Pause and resume, as the protocol has them, and what a status says of them.

use crate::vcpu::VcpuHandle;
use crate::vm::{LifeChange, Vm, VmError};
use llfree_control::report::{ExitCounts, LifeReport, VcpuStatus, VmState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Pauses the VM, or resumes it.
pub(super) fn change(vm: &Vm, pauses: bool) -> Result<LifeReport, VmError> {
    let report = |state, change: LifeChange| LifeReport {
        state,
        changed: change.changed,
        duration_us: u64::try_from(change.duration.as_micros()).unwrap_or(u64::MAX),
        paused_ms: change.paused_for.map(millis),
    };
    match pauses {
        true => Ok(report(VmState::Paused, vm.pause()?)),
        false => Ok(report(VmState::Running, vm.resume()?)),
    }
}

/// Whether the guest runs, and for how many milliseconds it has not.
pub(super) fn state(vm: &Vm) -> (VmState, Option<u64>) {
    match vm.paused_since() {
        Some(since) => (VmState::Paused, Some(millis(since.elapsed()))),
        None => (VmState::Running, None),
    }
}

/// A vCPU's line of a status.
pub(super) fn vcpu_status(vcpu: &VcpuHandle) -> VcpuStatus {
    let counters = vcpu.counters();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let state = match counters.busy.load(Ordering::Relaxed) {
        _ if vcpu.parking().is_parked() => "paused",
        true => "running",
        false => "waiting",
    };
    VcpuStatus {
        index: vcpu.index(),
        exits: ExitCounts { mmio: count(&counters.mmio), pio: count(&counters.pio), other: count(&counters.other) },
        calls: count(&counters.calls),
        state: state.to_owned(),
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
