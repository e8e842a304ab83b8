//! Starts the threads of a VM's devices, and connects queue notifications to them.

use super::LaunchError;
use crate::devices::Devices;
use crate::devices::mmio::QUEUE_NOTIFY;
use crate::devices::worker::Worker;
use kvm_ioctls::{IoEventAddress, VmFd};
use llfree_base::thread::Spawner;

/// Starts a thread per device. KVM signals a queue's notification to it directly, without an exit to
/// the vCPU's thread.
pub(super) fn start(vm: &VmFd, devices: &Devices, threads: &Spawner) -> Result<Vec<Worker>, LaunchError> {
    devices
        .iter()
        .map(|(page, device)| {
            for (queue, event) in device.events().iter().enumerate() {
                let address = IoEventAddress::Mmio(page + QUEUE_NOTIFY);
                vm.register_ioevent(event, &address, queue as u32)
                    .map_err(|source| LaunchError::Kvm { step: "register a queue's notification event", source })?;
            }
            Worker::start(device.clone(), threads)
                .map_err(|source| LaunchError::Host { step: "start a device's thread", source })
        })
        .collect()
}
