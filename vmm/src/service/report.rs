//! The VM's state and what it did, collected from its parts into the reports of the protocol.

use crate::devices::mmio::Transport;
use crate::devices::net::{NetConfig, NetCounters};
use crate::vcpu::VcpuHandle;
use crate::vm::{Resize, Vm, VmError};
use llfree_base::histogram::DurationCounts;
use llfree_control::report::{
    AutoReclaimReport, CgroupStatus, DeviceStatus, Enforcement, InstallPoolStatus, NetReport, ResizeReport, Shortfall,
    StatusReport, VcpuState, VcpuStatus, VmState,
};
use llfree_monitor::Picture;
use llfree_monitor::auto::AutoStatus;
use llfree_monitor::memory::Supply;
use shared_layout::HUGE_SIZE;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The protocol's report about a resize; `advice` ends the sentence about a shortfall.
#[must_use]
pub fn resize_report(vm: &Vm, resize: &Resize, advice: &str) -> ResizeReport {
    let elastic = vm.elastic().status();
    let view = vm.view(&elastic, &vm.monitor().census());
    let complete = resize.actual == resize.target;
    let shortfall = (!complete).then(|| Shortfall {
        in_use_bytes: view.used,
        fragmented_bytes: view.fragmented,
        wording: vm.why_short(&view, &elastic, resize.actual < resize.target, advice),
    });
    ResizeReport {
        target_bytes: resize.target,
        actual_bytes: resize.actual,
        reclaimable_now_bytes: view.reclaimable,
        complete,
        shortfall,
        pursued: false,
        huge_frames: resize.pass.frames.into(),
        freed_bytes: resize.pass.freed_bytes,
        duration_us: micros(resize.duration),
        waited_us: micros(resize.waited),
        guest: elastic.balloon.and_then(|balloon| balloon.guest).filter(|_| !vm.shares_table()),
    }
}

pub(super) fn auto_report(status: &AutoStatus) -> AutoReclaimReport {
    let settings = status.switch.0;
    AutoReclaimReport {
        on: settings.is_some(),
        settings: settings.map(|settings| settings.to_string()),
        evicted_bytes: status.evicted * HUGE_SIZE,
        scans: status.scans,
        last_scan_ms_ago: status.last_scan.map(|last| millis(last.elapsed())),
        free_bytes: u64::from(status.last.free) * HUGE_SIZE,
        headroom_bytes: u64::from(status.last.headroom) * HUGE_SIZE,
        back_off_bytes: u64::from(status.last.back_off) * HUGE_SIZE,
    }
}

/// All numbers about a VM. Audits residency on the way, so that `violations` is up to date; resident
/// memory is what the audit found, not what it left.
///
/// # Errors
/// The kernel does not report the numbers, or does not take violating memory back.
pub fn status(vm: &Vm, name: &str) -> Result<StatusReport, VmError> {
    let paused_for = vm.paused_since().map(|since| since.elapsed());
    let monitor = vm.monitor();
    let limit_before = vm.limit();
    let Picture { residency: ram, limit, census } = monitor.picture()?;
    // A device's driver moves its limit at any time: the larger one held at some moment of the look.
    let limit = match vm.elastic().table() {
        Some(_) => u64::from(limit) * HUGE_SIZE,
        None => limit_before.max(vm.limit()),
    };
    let install_pool = pool_status(monitor.supply());
    let cost = vm.cost().unwrap_or_default();
    monitor.audit()?;
    let elastic = vm.elastic().status();
    let view = vm.view(&elastic, &census);
    Ok(StatusReport {
        name: name.to_owned(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_ms: millis(vm.uptime()),
        state: if paused_for.is_some() { VmState::Paused } else { VmState::Running }.into(),
        paused_ms: paused_for.map(millis),
        backing: vm.config().backing.into(),
        memory_bytes: vm.config().memory.0,
        limit_bytes: limit,
        wanted_bytes: vm.elastic().wanted(),
        target_bytes: vm.target().map(|target| target.bytes),
        target_age_ms: vm.target().map(|target| millis(target.since.elapsed())),
        resident_bytes: ram.resident_bytes,
        huge_page_bytes: ram.huge_bytes,
        cost_bytes: cost.total(),
        page_table_bytes: cost.page_tables,
        held_bytes: vm.config().memory.0.saturating_sub(limit),
        evicted_bytes: census.evicted * HUGE_SIZE,
        installed_bytes: vm.elastic().table().map_or(0, |_| census.installed * HUGE_SIZE),
        guest_says: view.says.into(),
        guest_used_bytes: view.used,
        guest_free_bytes: view.free,
        reclaimable_now_bytes: view.reclaimable,
        vmm_overhead_bytes: cost.vmm,
        monitor: monitor.counters.counts(),
        enforcement: enforcement(vm).into(),
        on_violation: vm.config().install.on_violation.unwrap_or_default().into(),
        install_pool,
        corrupt_entries: census.corrupt,
        doorbell: vm.doorbell().counters.counts(),
        install_durations: vm.doorbell().install_durations.counts(),
        resize_durations: DurationCounts::default(),
        guest_commands: None,
        auto_reclaim: auto_report(&vm.auto_reclaim().status()),
        cgroup: cgroup_status(vm),
        vcpus: vm.vcpus().iter().map(|vcpu| vcpu_status(vcpu)).collect(),
        elastic,
        disks: vm.disks().iter().map(|disk| disk.status()).collect(),
        nets: vm.nets().map(net_report).collect(),
        agent: vm.guest().agent_status(),
        devices: vm.devices().iter().map(|(_, device)| device_status(device)).collect(),
    })
}

fn pool_status(supply: &Supply) -> InstallPoolStatus {
    let pool = supply.pool_status();
    let (size_bytes, goal_bytes, resident_bytes) = (pool.size_bytes, pool.goal_bytes, pool.resident_bytes);
    InstallPoolStatus { size_bytes, goal_bytes, resident_bytes, counts: supply.counters().counts() }
}

fn enforcement(vm: &Vm) -> Enforcement {
    match vm.elastic().table() {
        Some(_) if vm.is_enforced() => Enforcement::Userfaultfd,
        Some(_) => Enforcement::Audit,
        None => Enforcement::None,
    }
}

fn cgroup_status(vm: &Vm) -> Option<CgroupStatus> {
    let usage = vm.cgroup()?.usage().ok()?;
    Some(CgroupStatus {
        path: usage.path.to_string_lossy().into_owned(),
        memory_max_bytes: usage.max,
        memory_current_bytes: usage.current,
    })
}

fn vcpu_status(vcpu: &VcpuHandle) -> VcpuStatus {
    let counters = vcpu.counters();
    let state = match counters.busy.load(Ordering::Relaxed) {
        _ if vcpu.parking().is_parked() => VcpuState::Paused,
        true => VcpuState::Running,
        false => VcpuState::Waiting,
    };
    VcpuStatus {
        index: vcpu.index(),
        exits: counters.exits.counts(),
        counts: counters.rings.counts(),
        state: state.into(),
    }
}

fn net_report((config, counters): (&NetConfig, &NetCounters)) -> NetReport {
    NetReport { tap: config.tap.clone(), mac: config.mac.to_string(), traffic: counters.status() }
}

fn device_status(device: &Transport) -> DeviceStatus {
    DeviceStatus { name: device.name().to_owned(), driven: device.is_driven(), counts: device.counts() }
}

/// A duration in whole microseconds.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
