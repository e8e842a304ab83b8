//! Memory that a virtio device's driver moves: set a target, tell the driver, and watch the device's
//! own accounting until it says that the target was reached.
//!
//! Residency is not tracked here: the guest's frames get memory when they are touched, and all that is
//! known is what the driver gave away. What a resize reports as freed is the difference between the
//! kernel's figures for guest RAM before and after it.

use super::error::{DeviceError, MoveError, ResizeError};
use super::way::{Elasticity, Parts};
use crate::devices::VirtioDevice;
use crate::devices::mmio::Transport;
use crate::devices::progress::Progress;
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::memory::GuestRam;
use llfree_monitor::{Direction, MonitorError, Pass, Resize};
use shared_layout::HUGE_SIZE;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A resize without a deadline gives up after this long without a step towards its target.
const GIVE_UP: Duration = Duration::from_secs(2);
/// How often the guest is kicked while nothing moves: its driver may have given up before memory
/// became free.
const NUDGE: Duration = Duration::from_millis(50);

/// The host's end of a device that moves memory: the device's own accounting. Sizes are in bytes.
pub(super) trait Books: Send + Sync {
    /// How much of `memory` the guest may use now.
    fn limit(&self, memory: u64) -> u64;

    /// How much of `memory` the guest should end up with.
    fn target(&self, memory: u64) -> u64;

    /// Sets the target; telling the driver is up to the caller.
    fn set_target(&self, memory: u64, target: u64) -> Result<(), ResizeError>;

    /// The driver's steps towards the target.
    fn progress(&self) -> &Progress;

    /// How often to tell the driver again while a resize waits; `None` if it retries on its own.
    fn tell_again(&self) -> Option<Duration> {
        None
    }

    /// Adds the device's numbers to a status.
    fn describe(&self, status: &mut ElasticStatus);
}

/// A device that moves memory.
pub(super) struct ByDevice {
    kind: ElasticKind,
    books: Arc<dyn Books>,
    transport: Arc<Transport>,
    ram: Arc<GuestRam>,
    /// Wakes an idle guest.
    nudge: Box<dyn Fn() + Send + Sync>,
}

impl ByDevice {
    pub(super) fn build(
        kind: ElasticKind,
        books: Arc<dyn Books>,
        device: Box<dyn VirtioDevice>,
        parts: Parts<'_>,
    ) -> Result<Arc<Self>, DeviceError> {
        let ram = parts.ram.clone();
        let transport = Transport::new(device, ram.clone(), parts.notifier).map_err(DeviceError::Host)?;
        Ok(Arc::new(Self { kind, books, transport: Arc::new(transport), ram, nudge: parts.nudge }))
    }

    /// Sets `target` without waiting for the driver, which may not be there yet.
    pub(super) fn ask_for(&self, target: u64) -> Result<(), ResizeError> {
        self.books.set_target(self.ram.bytes(), target)?;
        self.transport.config_changed();
        Ok(())
    }

    /// Sets `target` and waits until it is reached or `keep_waiting` says no. Returns the time until the
    /// driver's last step.
    fn drive(&self, target: u64, keep_waiting: &dyn Fn(Duration) -> bool) -> Result<Duration, ResizeError> {
        let start = Instant::now();
        self.books.set_target(self.ram.bytes(), target)?;
        let grows = target > self.limit();
        let mut seen = self.books.progress().last().0;
        self.transport.config_changed();
        let mut told = Instant::now();
        let reached = || if grows { self.limit() >= target } else { self.limit() <= target };
        while !reached() && keep_waiting(start.elapsed()) {
            let now = self.books.progress().wait(seen, NUDGE);
            if now == seen {
                (self.nudge)();
                if self.books.tell_again().is_some_and(|interval| told.elapsed() >= interval) {
                    self.transport.config_changed();
                    told = Instant::now();
                }
            }
            seen = now;
        }
        Ok(self.books.progress().last().1.saturating_duration_since(start))
    }

    fn ram_resident(&self) -> Result<u64, MoveError> {
        Ok(self.ram.residency().map_err(MonitorError::Residency)?.resident_bytes)
    }
}

impl Elasticity for ByDevice {
    fn limit(&self) -> u64 {
        self.books.limit(self.ram.bytes())
    }

    fn wanted(&self) -> u64 {
        self.limit().saturating_sub(self.books.target(self.ram.bytes()))
    }

    fn resize(&self, _: Direction, target: u64, keep_waiting: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError> {
        let (before, resident) = (self.limit(), self.ram_resident()?);
        let start = Instant::now();
        let duration = self.drive(target, keep_waiting)?;
        let waited = start.elapsed().saturating_sub(duration);
        let (actual, freed) = (self.limit(), resident.saturating_sub(self.ram_resident()?));
        // Both are at most RAM, whose huge frames fit a u32.
        let frames = |bytes: u64| (bytes / HUGE_SIZE) as u32;
        let pass = Pass { frames: frames(before.abs_diff(actual)), discarded: frames(freed), freed_bytes: freed };
        Ok(Resize { target, actual, pass, duration, waited })
    }

    fn is_moving(&self, elapsed: Duration) -> bool {
        let idle = self.books.progress().last().1.elapsed();
        idle.min(elapsed) < GIVE_UP
    }

    fn transport(&self) -> Option<&Arc<Transport>> {
        Some(&self.transport)
    }

    fn status(&self) -> ElasticStatus {
        let mut status = ElasticStatus {
            kind: self.kind.into(),
            driven: self.transport.is_driven(),
            device_errors: self.transport.driver_errors(),
            ..ElasticStatus::default()
        };
        self.books.describe(&mut status);
        status
    }
}
