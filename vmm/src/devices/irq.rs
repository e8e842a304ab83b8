//! [`Irq`]: how a device tells its driver that something happened.
//!
//! The bits stay in a status word until the driver acknowledges them. Each new one is also an
//! event, which KVM can take as an interrupt line (`KVM_IRQFD`) for guests that have an interrupt
//! controller, and a call, which wakes a guest that has none and polls.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The device used a buffer.
pub const USED_BUFFER: u32 = virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
/// The device's configuration changed, or it needs a reset.
pub const CONFIG_CHANGE: u32 = virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

/// Called to tell a guest without interrupts.
pub type Notifier = Box<dyn Fn() + Send + Sync>;

/// The interrupt of one device.
pub struct Irq {
    status: AtomicU32,
    event: EventFd,
    notifier: Notifier,
}

impl Irq {
    /// An interrupt that is not raised; `notifier` is called each time it is.
    ///
    /// # Errors
    /// The host cannot create an event.
    pub fn new(notifier: Notifier) -> io::Result<Self> {
        Ok(Self { status: AtomicU32::new(0), event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, notifier })
    }

    /// Raises the interrupt for these reasons.
    pub fn trigger(&self, reasons: u32) {
        // Release: a driver that sees the bit sees what the device wrote before.
        self.status.fetch_or(reasons, Ordering::Release);
        // Fails only after 2^64 events that nobody read, and then the line is up anyway.
        let _ = self.event.write(1);
        (self.notifier)();
    }

    /// The reasons that the driver has not acknowledged.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The driver acknowledges reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::AcqRel);
    }

    /// Readable after each interrupt; for an in-kernel interrupt controller.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_reason_stands_until_it_is_acknowledged() {
        let calls = Arc::new(AtomicU32::new(0));
        let count = calls.clone();
        let notifier = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let irq = Irq::new(notifier).expect("an eventfd");
        irq.trigger(USED_BUFFER);
        irq.trigger(CONFIG_CHANGE);
        assert_eq!(irq.status(), 3);
        irq.acknowledge(USED_BUFFER);
        assert_eq!(irq.status(), CONFIG_CHANGE);
        assert_eq!(irq.event().read().expect("an event"), 2);
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }
}
