//! How notifications of a VM's devices reach their threads.

use super::LaunchError;
use crate::devices::Devices;
use crate::devices::mmio::QUEUE_NOTIFY;
use crate::devices::worker::Worker;
use kvm_ioctls::{IoEventAddress, VmFd};
use llfree_base::thread::Spawner;

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
