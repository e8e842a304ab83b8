//! A VM's devices: how their notifications reach their threads, how their interrupts reach a guest
//! that has none, and resizes that a device's driver carries out.
//!
//! What a resize reports as freed is the kernel's account of guest RAM before and after it, not what
//! the driver gave away.

use super::{LaunchError, Resize, Vm, VmError};
use crate::agent::Agents;
use crate::boot::Platform;
use crate::devices::Devices;
use crate::devices::irq::Notifier;
use crate::devices::mmio::QUEUE_NOTIFY;
use crate::devices::worker::Worker;
use crate::elastic::ResizeError;
use kvm_ioctls::{IoEventAddress, VmFd};
use llfree_base::thread::Spawner;
use llfree_monitor::{MonitorError, Pass};
use shared_layout::{ControlWord, HUGE_SIZE};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

impl Vm {
    /// Whether a resize by a device that began `elapsed` ago still gets somewhere; false without one, and
    /// while the VM is paused, as its driver is.
    #[must_use]
    pub fn is_device_moving(&self, elapsed: Duration) -> bool {
        !self.is_paused() && self.elastic.as_ref().is_some_and(|device| device.is_moving(elapsed))
    }

    /// Has the device's driver move memory until the limit is `target`, or `keep_waiting` says no.
    pub(super) fn resize_by_device(
        &self,
        target: u64,
        keep_waiting: impl Fn(Duration) -> bool,
    ) -> Result<Resize, VmError> {
        let device = self.elastic.as_ref().ok_or(ResizeError::NotElastic)?;
        let (before, resident) = (device.limit(), self.ram_resident()?);
        let start = Instant::now();
        let over = || self.life.is_stopped() || self.ended().is_some();
        let duration =
            device.resize(target, || self.agents.notify_driver(), |elapsed| !over() && keep_waiting(elapsed))?;
        let waited = start.elapsed().saturating_sub(duration);
        let (actual, freed) = (device.limit(), resident.saturating_sub(self.ram_resident()?));
        // Both are at most RAM, whose huge frames fit a u32.
        let frames = |bytes: u64| (bytes / HUGE_SIZE) as u32;
        let pass = Pass { frames: frames(before.abs_diff(actual)), discarded: frames(freed) };
        Ok(Resize { target, actual, pass, duration, waited })
    }

    fn ram_resident(&self) -> Result<u64, VmError> {
        let residency = self.monitor.ram().residency().map_err(MonitorError::Residency)?;
        Ok(residency.resident_bytes)
    }
}

/// What the interrupts of all devices are to a guest that has none: a word to poll, and a nudge for
/// a vCPU that sleeps.
pub(super) fn interrupt(platform: Arc<Platform>, agents: Arc<Agents>) -> Notifier {
    let events = AtomicU64::new(0);
    Box::new(move || {
        let number = events.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        platform.table().set_control(ControlWord::DeviceEvents, number);
        agents.notify_driver();
    })
}

/// Gives each queue's notification to the device's thread, without an exit to a vCPU's.
pub(super) fn start(vm: &VmFd, devices: &Devices, threads: &Spawner) -> Result<Vec<Worker>, LaunchError> {
    devices
        .iter()
        .map(|(page, device)| {
            for (queue, event) in device.events().iter().enumerate() {
                let address = IoEventAddress::Mmio(page + QUEUE_NOTIFY);
                vm.register_ioevent(event, &address, queue as u32)
                    .map_err(|source| LaunchError::Kvm { step: "take a queue's notifications", source })?;
            }
            Worker::start(device.clone(), threads)
                .map_err(|source| LaunchError::Host { step: "start a device's thread", source })
        })
        .collect()
}
