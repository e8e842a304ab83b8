//! Devices: virtio ones, for guests with standard drivers, and what a Linux guest expects of a PC.
//!
//! What all virtio devices have in common comes first; then each device in its folder. How to add
//! one is in `docs/devices.md`.
//!
//! | module | what lives there |
//! |---|---|
//! | [`mmio`] | the registers of a device and its queues: virtio-mmio version 2 |
//! | [`request`] | one descriptor chain, copied and checked |
//! | [`irq`] | how a device tells its driver |
//! | [`worker`] | the thread on which a device serves its queues |
//! | [`progress`] | where the control plane waits for a device |
//! | [`balloon`] | the guest gives pages to the host and takes them back |
//! | [`mem`] | the guest plugs and unplugs blocks of its RAM |
//! | [`blk`] | disks: files of the host |
//! | [`rng`] | random numbers of the host |
//! | [`console`] | a stream of bytes to an agent in the guest |
//! | [`net`] | frames between the guest and a tap of the host |
//! | [`serial`] | the serial port of a PC, which is no virtio device |
//! | [`pc`] | the other ports of a PC: reset, power-off, panic |
//!
//! A driver may write anything into registers, rings and buffers, at any time. Each word is read
//! once; what a device does for one notification is bounded; and what no driver may do ends as a
//! [`DriverError`]: counted, and the device asks for a reset and does nothing more until it gets it.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod irq;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pc;
pub mod progress;
pub mod request;
pub mod rng;
pub mod serial;
pub mod worker;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod source_tests;
#[cfg(test)]
mod tests;

use crate::roles;
use guest_abi::devices::DEVICE_BYTES;
use llfree_base::thread::Role;
use mmio::Transport;
use request::Request;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// What a device does; the transport does what all devices have in common.
pub trait VirtioDevice: Send {
    /// Its number in the standard.
    fn id(&self) -> u32;
    /// A short name for logs.
    fn name(&self) -> &'static str;
    /// What its thread may ask of the kernel.
    fn role(&self) -> Role {
        roles::DEVICE
    }
    /// The most descriptors of each of its queues.
    fn queue_sizes(&self) -> &[u16];
    /// Its own feature bits; the transport adds those of all devices.
    fn features(&self) -> u64;
    /// The driver is ready and understands these features.
    fn start(&mut self, features: u64);
    /// Back to the state after the start of the VM.
    fn reset(&mut self);
    /// Its configuration space, whole.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration space; false if it must not.
    fn write_config(&mut self, offset: u64, bytes: &[u8]) -> bool;
    /// Serves a request.
    ///
    /// # Errors
    /// What no driver may send.
    fn serve(&mut self, queue: usize, request: &Request<'_>) -> Result<Served, DriverError>;
    /// How often [`tick`](Self::tick) wants to be called, if at all.
    fn interval(&self) -> Option<Duration> {
        None
    }
    /// Time has passed: a kept request to give back, as its queue and its head.
    fn tick(&mut self) -> Option<(usize, u16)> {
        None
    }
    /// Descriptors that have work for a queue when they become readable. Asked once, before the
    /// device is first served.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
}

/// A descriptor of the host's that makes its queue worth serving.
///
/// It is waited for edge-triggered: it counts as one event however much there is to read. So the
/// device reads until `WouldBlock`, or until the queue has no more requests, and answers
/// [`Served::Later`] only after it saw the `WouldBlock`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Non-blocking, open as long as the device lives, and no source of another queue.
    pub fd: RawFd,
    /// The queue to serve.
    pub queue: usize,
}

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Served {
    /// Back to the driver; so many bytes were written into it.
    Done(u32),
    /// The device keeps it, and gives back what it kept before.
    Kept {
        /// Head of the request that was kept so far.
        instead_of: Option<u16>,
    },
    /// Not now: the request stays the first of its queue, nothing was written into it, and the
    /// device is asked again when a [`Source`] of the queue fires. It is also asked whenever the
    /// driver notifies the queue, which a driver need not do while requests wait.
    Later,
}

/// What a driver must not do.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A step of the initialisation out of order.
    #[error("device status {from:#x} cannot become {to:#x}")]
    Status {
        /// Before.
        from: u32,
        /// What was written.
        to: u32,
    },
    /// A register in the wrong state, or a value that it cannot take.
    #[error("register {register:#x} cannot take {value:#x} now")]
    Register {
        /// Its offset.
        register: u64,
        /// What was written.
        value: u32,
    },
    /// Rings that are not in RAM.
    #[error("queue {queue} has a ring that is misaligned or not all in RAM")]
    Ring {
        /// Which.
        queue: usize,
    },
    /// The ring of available requests makes no sense.
    #[error("queue {queue} offers more requests than it has descriptors, or one that it has not")]
    Available {
        /// Which.
        queue: usize,
    },
    /// A chain without an end, or too long.
    #[error("the descriptor chain from {head} on loops, leads nowhere or is too long")]
    Chain {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer that is not in RAM.
    #[error("a buffer of {bytes} bytes at {address:#x} is not all in RAM")]
    Buffer {
        /// Guest-physical address.
        address: u64,
        /// Its length.
        bytes: u32,
    },
    /// A request of the wrong length.
    #[error("{bytes} bytes are {allowed}")]
    Length {
        /// What there was.
        bytes: u64,
        /// What is wrong with that.
        allowed: &'static str,
    },
}

/// Has a file that may not grow any more (`ulimit -f`) be an error of the write to it, be it a disk's or
/// the console's, and not the end of the process; call once before the first device is served.
///
/// # Errors
/// If the kernel refuses the signal handler.
pub fn outlive_file_limits() -> io::Result<()> {
    // What it notes nobody asks: the write says so itself.
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop)
}

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

    /// How many.
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
