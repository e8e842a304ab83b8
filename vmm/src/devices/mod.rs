//! Devices: virtio ones, for guests with standard drivers, and what a Linux guest expects of a PC.
//!
//! What all virtio devices have in common comes first; then each device in its folder. How to add
//! one is in `docs/devices.md`.
//!
//! | module | what lives there |
//! |---|---|
//! | `device`, `driver_error` | what a device does, and drivers' violations |
//! | `bus` | all devices of a VM |
//! | [`mmio`], `state` | the registers of a device and its queues: virtio-mmio version 2 |
//! | `outside` | requests that wait for the host, and the threads that do that |
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
//! | [`serial`] | the serial port of a PC, which is not a virtio device |
//! | [`pc`] | the other ports of a PC: reset, power-off, panic |
//!
//! A driver may write anything into registers, rings and buffers, at any time. Each word is read
//! once; the work for one notification is bounded; and a violation becomes a [`DriverError`]: it is
//! counted, and the device asks for a reset and does nothing more until it gets it.

pub mod balloon;
pub mod blk;
mod bus;
pub mod console;
mod device;
mod driver_error;
pub mod irq;
pub mod mem;
pub mod mmio;
pub mod net;
mod outside;
pub mod pc;
pub mod progress;
pub mod request;
pub mod rng;
pub mod serial;
mod state;
pub mod worker;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod outside_tests;
#[cfg(test)]
mod resize_tests;
#[cfg(test)]
mod source_tests;
#[cfg(test)]
mod tests;

pub use bus::Devices;
pub use device::{Notes, Served, Source, Task, VirtioDevice};
pub use driver_error::DriverError;

use std::io;
use std::sync::Arc;

/// Makes a write to a file that may not grow any more (`ulimit -f`), a disk's or the console's, fail
/// with an error instead of ending the process. Call once before the first device is served.
///
/// # Errors
/// If the kernel refuses the signal handler.
pub fn outlive_file_limits() -> io::Result<()> {
    // The flag is never read: the write itself fails.
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop)
}
