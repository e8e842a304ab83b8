//! The life of a running VM: pause, resume, stop.
//!
//! **Pause**: vCPUs first, as they notify devices and wait for them; then devices, which finish their
//! current requests. From then on nothing changes guest RAM on the guest's behalf: no vCPU, no queue,
//! no input. Words that the host publishes beside it (limit, device events) may still change. **Resume** is the reverse. A pause waits for a bounded time: a vCPU or device that does not
//! settle is named, and the VM runs on as before. The owner of the memory keeps working all the while:
//! it needs no guest to shrink, grow, reclaim, audit or validate, and what a vCPU would have given up
//! in the meantime comes after the resume.
//!
//! Only one of them runs at a time. A stop waits for neither: its orders are final, so a pause in
//! progress finds that all have settled.

use super::{PauseError, Vm, VmError};
use crate::agent::AgentError;
use crate::devices::worker::{self, Worker, WorkerControl};
use crate::parking::Order;
use crate::vcpu;
use llfree_base::lock;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long all vCPUs together may take to pause, and then all devices together.
pub const PAUSE: Duration = Duration::from_secs(2);

/// What a pause or a resume did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LifeChange {
    /// False if the VM was in that state already.
    pub changed: bool,
    /// From the call until the VM was in that state.
    pub duration: Duration,
    /// How long the VM had been paused before the call; `None` if it was not paused.
    pub paused_for: Option<Duration>,
}

impl Vm {
    /// Pauses the guest: when this returns, no vCPU runs and no device touches guest memory. Pausing a
    /// paused VM changes nothing.
    ///
    /// # Errors
    /// [`PauseError`] after [`PAUSE`] or twice that, or the VM has ended.
    pub fn pause(&self) -> Result<LifeChange, VmError> {
        let start = Instant::now();
        let _turn = lock(&self.life.turn);
        self.check_alive()?;
        if let Some(since) = self.paused_since() {
            let paused_for = Some(since.elapsed());
            return Ok(LifeChange { changed: false, duration: start.elapsed(), paused_for });
        }
        if let Err(error) = self.pause_all() {
            self.run_all();
            return Err(error.into());
        }
        // A thread that has ended counts as settled, too.
        self.check_alive()?;
        *lock(&self.life.paused_since) = Some(Instant::now());
        Ok(LifeChange { changed: true, duration: start.elapsed(), paused_for: None })
    }

    /// Resumes a paused guest where it stopped. Resuming a running VM changes nothing.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn resume(&self) -> Result<LifeChange, VmError> {
        let start = Instant::now();
        let _turn = lock(&self.life.turn);
        self.check_alive()?;
        let since = lock(&self.life.paused_since).take();
        if since.is_some() {
            self.run_all();
        }
        let paused_for = since.map(|since| start.saturating_duration_since(since));
        Ok(LifeChange { changed: since.is_some(), duration: start.elapsed(), paused_for })
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// It has none, is paused, or has ended.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        let _turn = lock(&self.life.turn);
        self.check_alive()?;
        if self.is_paused() {
            return Err(VmError::Paused);
        }
        match self.guest.press_power_button() {
            Ok(true) => Ok(()),
            Ok(false) => Err(VmError::NoPowerButton),
            Err(error) => Err(VmError::Kvm(error)),
        }
    }

    /// When the VM was paused; `None` while it runs.
    #[must_use]
    pub fn paused_since(&self) -> Option<Instant> {
        *lock(&self.life.paused_since)
    }

    /// Whether the VM is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused_since().is_some()
    }

    /// Stops the vCPUs and waits for them; the guest's memory stays until the `Vm` is dropped.
    /// Commands, waiting shrinks and passes stop at their next step.
    pub fn stop(&self) {
        let first_time = !self.life.stopped.swap(true, Ordering::AcqRel);
        self.monitor.stop();
        self.auto_reclaim.stop();
        self.agents.stop();
        self.guest.stop();
        if let Some(violations) = &self.violations {
            violations.release();
        }
        // A vCPU that resets a device may wait for the host's storage.
        self.devices.iter().for_each(|(_, device)| device.release());
        vcpu::stop(&self.vcpus);
        // After the vCPUs, which notify them.
        worker::end(std::mem::take(&mut *lock(&self.workers)));
        if let Some(violations) = &self.violations {
            violations.finish();
        }
        let counters = &self.monitor.counters;
        let (all, held) = (counters.violations.get(), counters.held_violations.get());
        if first_time && all > 0 {
            log::warn!("the guest touched memory that it did not have {all} times, {held} of them in held frames");
        }
    }

    fn pause_all(&self) -> Result<(), PauseError> {
        self.vcpus.iter().for_each(|vcpu| vcpu.parking().give(Order::Pause));
        // Only now: a vCPU whose call comes back unanswered must find its order.
        self.agents.pause();
        self.guest.pause();
        vcpu::settle(&self.vcpus, Instant::now() + PAUSE).map_err(|vcpu| PauseError::Vcpu { vcpu, within: PAUSE })?;
        worker::quiesce(&self.worker_controls(), Instant::now() + PAUSE)
            .map_err(|device| PauseError::Device { device, within: PAUSE })
    }

    fn run_all(&self) {
        worker::resume(&self.worker_controls());
        self.guest.resume();
        self.agents.resume();
        self.vcpus.iter().for_each(|vcpu| vcpu.parking().give(Order::Run));
    }

    /// Handles rather than the workers themselves, which a stop takes.
    fn worker_controls(&self) -> Vec<Arc<WorkerControl>> {
        lock(&self.workers).iter().map(Worker::control).collect()
    }

    fn check_alive(&self) -> Result<(), VmError> {
        match self.ended() {
            Some(end) => Err(end.into()),
            None if self.life.is_stopped() => Err(AgentError::Gone.into()),
            None => Ok(()),
        }
    }
}
