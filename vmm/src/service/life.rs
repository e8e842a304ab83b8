//! Pause and resume, as the protocol has them, on a thread of their own: a pause waits for vCPUs and for
//! devices, and neither a waiting shrink nor a guest's command may hold it up.

use super::{Job, answer, micros, not_here};
use crate::vcpu::VcpuHandle;
use crate::vm::{LifeChange, Vm, VmError};
use llfree_base::faults;
use llfree_control::protocol::{Reply, Request};
use llfree_control::report::{ExitCounts, LifeReport, VcpuStatus, VmState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// The thread.
pub(super) fn serve(vm: &Vm, jobs: &Receiver<Job>) {
    for (request, responder) in jobs {
        if faults::point(faults::THREAD_DEATH).is_err() {
            return;
        }
        responder.answer(&answer(change(vm, &request)));
    }
}

fn change(vm: &Vm, request: &Request) -> Result<Reply, VmError> {
    let report = |state, change: LifeChange| LifeReport {
        state,
        changed: change.changed,
        duration_us: micros(change.duration),
        paused_ms: change.paused_for.map(millis),
    };
    match request {
        Request::Pause => Ok(Reply::Life(report(VmState::Paused, vm.pause()?))),
        Request::Resume => Ok(Reply::Life(report(VmState::Running, vm.resume()?))),
        _ => Ok(not_here()),
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
