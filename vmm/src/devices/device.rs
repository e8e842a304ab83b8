//! [`VirtioDevice`]: what a device does; the transport does what all devices have in common.

use super::driver_error::DriverError;
use super::request::Request;
use crate::roles;
use llfree_base::thread::Role;
use log::Level;
use std::os::fd::RawFd;
use std::time::Duration;

/// Lines for the log that a device writes while the transport holds its lock. The transport has them written
/// once it has let go of it, so that no vCPU waits for the log.
#[derive(Default, Debug)]
pub struct Notes(Vec<(Level, String)>);

impl Notes {
    /// Notes a line. Whoever calls it keeps such lines rare.
    pub fn add(&mut self, level: Level, line: String) {
        self.0.push((level, line));
    }

    /// What was noted since the last time.
    #[must_use]
    pub(super) fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// Writes them.
    pub(super) fn log(self) {
        for (level, line) in self.0 {
            log::log!(level, "{line}");
        }
    }
}

/// The part of a request that takes time: it may wait for the host, and runs without the transport's lock,
/// beside others of its device. Returns the bytes that it wrote for the driver.
pub type Task = Box<dyn FnOnce(&Request<'_>) -> Result<u32, DriverError> + Send>;

/// What a device does; the transport does what all devices have in common.
pub trait VirtioDevice: Send {
    /// Its number in the standard.
    fn id(&self) -> u32;
    /// A short name for logs.
    fn name(&self) -> &'static str;
    /// The rights of its thread.
    fn role(&self) -> Role {
        roles::DEVICE
    }
    /// The most descriptors of each of its queues.
    fn queue_sizes(&self) -> &[u16];
    /// Its own feature bits; the transport adds those of all devices.
    fn features(&self) -> u64;
    /// The driver is ready and has accepted these features.
    fn start(&mut self, features: u64);
    /// Returns to the state at the start of the VM.
    fn reset(&mut self);
    /// Its whole configuration space.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration space; false if it must not.
    fn write_config(&mut self, offset: u64, bytes: &[u8]) -> bool;
    /// Serves a request.
    ///
    /// # Errors
    /// A request that no driver may send.
    fn serve(&mut self, queue: usize, request: &Request<'_>) -> Result<Served, DriverError>;
    /// How many threads carry out its [tasks](Served::Outside): so many of its requests are at work at once.
    fn helpers(&self) -> u32 {
        0
    }
    /// What it has to say to the log.
    fn notes(&mut self) -> Option<&mut Notes> {
        None
    }
    /// How often [`tick`](Self::tick) wants to be called, if at all.
    fn interval(&self) -> Option<Duration> {
        None
    }
    /// Time has passed. Returns a kept request to give back, as its queue and its head.
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
/// It is polled edge-triggered: it counts as one event however much there is to read. So the device
/// reads until `WouldBlock`, or until the queue has no more requests, and answers [`Served::Later`]
/// only after it saw the `WouldBlock`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Non-blocking, open as long as the device lives, and not a source of another queue.
    pub fd: RawFd,
    /// The queue to serve.
    pub queue: usize,
}

/// The outcome of serving a request.
pub enum Served {
    /// Back to the driver; this many bytes were written into it.
    Done(u32),
    /// It takes time, and the device's lock is not held for that long. A reset of the device waits for it.
    Outside(Task),
    /// The device keeps it, and gives back what it kept before.
    Kept {
        /// Head of the request that was kept so far.
        instead_of: Option<u16>,
    },
    /// Not yet: the request stays the first of its queue, nothing was written into it, and the
    /// device is asked again when a [`Source`] of the queue fires. It is also asked whenever the
    /// driver notifies the queue, which a driver need not do while requests wait.
    Later,
}
