//! The life of a running VM: pause, resume, stop.
//!
//! **Pause**: vCPUs first, as they notify devices and wait for them; then devices, whose requests at work
//! end. From then on nothing changes guest memory for the guest: no step of a vCPU, no queue, no input.
//! **Resume** is the reverse. Both wait for a bounded time: what does not come is named, and the VM runs on
//! as before. The owner of the memory goes on all the while: it needs no guest to shrink, grow,
//! reclaim, audit or validate, and what a vCPU would have given up meanwhile comes after the resume.
//!
//! One of them runs at a time. A stop waits for neither: its orders are final, so a pause at work finds
//! that all have settled.

use super::{PauseError, Vm, VmError};
use crate::agent::AgentError;
use crate::devices::worker::{self, Worker, WorkerControl};
use crate::parking::Order;
use crate::vcpu;
use llfree_base::lock;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long all vCPUs may take to pause, and after them all devices.
pub const PAUSE: Duration = Duration::from_secs(2);

/// What a pause or a resume did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LifeChange {
    /// False if the VM was so already.
    pub changed: bool,
    /// From the call to the VM as it was to be.
    pub duration: Duration,
    /// How long the VM has been paused, or was; `None` if it was not.
    pub paused_for: Option<Duration>,
}

impl Vm {
    /// Pauses the guest: when this returns, no vCPU makes a step and no device touches guest memory.
    /// A VM that is paused already stays so.
    ///
    /// # Errors
    /// [`PauseError`] after [`PAUSE`] or twice that; the end of the VM.
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
        // What has ended has settled, too.
        self.check_alive()?;
        *lock(&self.life.paused_since) = Some(Instant::now());
        Ok(LifeChange { changed: true, duration: start.elapsed(), paused_for: None })
    }

    /// Has a paused guest go on where it was. One that runs just runs.
    ///
    /// # Errors
    /// The end of the VM.
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

    /// Since when the VM is paused; `None` while it runs.
    #[must_use]
    pub fn paused_since(&self) -> Option<Instant> {
        *lock(&self.life.paused_since)
    }

    /// Whether it is.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused_since().is_some()
    }

    /// Stops the vCPUs and waits for them; the guest's memory stays until the `Vm` is dropped.
    /// Ends what others do for the guest at its next step: commands, waiting shrinks, passes.
    pub fn stop(&self) {
        let first_time = !self.life.stopped.swap(true, Ordering::AcqRel);
        self.monitor.stop();
        self.auto_reclaim.stop();
        self.agents.stop();
        self.guest.stop();
        if let Some(violations) = &self.violations {
            violations.release();
        }
        vcpu::stop(&self.vcpus);
        // After the vCPUs, which notify them.
        worker::end(std::mem::take(&mut *lock(&self.workers)));
        if let Some(violations) = &self.violations {
            violations.finish();
        }
        let counters = &self.monitor.counters;
        let (all, held) = (counters.violations.get(), counters.held_violations.get());
        if first_time && all > 0 {
            log::warn!("{all} times in all the guest touched memory that it did not have, {held} of them held frames");
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

    /// Not the workers themselves: a stop takes those.
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
