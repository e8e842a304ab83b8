//! [`Devices`]: all devices of a VM, as its vCPUs reach them.

use super::mmio::Transport;
use guest_abi::devices::DEVICE_BYTES;
use std::sync::Arc;

/// All devices of a VM, as its vCPUs reach them.
#[derive(Default)]
pub struct Devices {
    base: u64,
    slots: Vec<Arc<Transport>>,
}

impl Devices {
    /// These devices, their pages from `base` on: as many as the caller has room for there.
    #[must_use]
    pub fn new(base: u64, slots: Vec<Arc<Transport>>) -> Self {
        Self { base, slots }
    }

    /// The number of devices.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Each device, and the guest-physical address of its page.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Arc<Transport>)> {
        self.slots.iter().enumerate().map(|(slot, device)| (self.base + slot as u64 * DEVICE_BYTES, device))
    }

    /// A vCPU reads; false if no device is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        self.find(address).map(|(device, offset)| device.read(offset, data)).is_some()
    }

    /// A vCPU writes; false if no device is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.find(address).map(|(device, offset)| device.write(offset, data)).is_some()
    }

    fn find(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(self.base)?;
        let slot = self.slots.get(usize::try_from(offset / DEVICE_BYTES).ok()?)?;
        Some((slot, offset % DEVICE_BYTES))
    }
}
