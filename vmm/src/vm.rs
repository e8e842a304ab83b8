//! One virtual machine: its parts put together, started, reported on and stopped.
//!
//! [`Vm::launch`] builds KVM's VM around guest RAM and the platform region above it, loads the guest
//! and starts a thread per vCPU. From then on the monitor owns the memory, and the vCPUs' agents (or
//! the agent in a Linux guest) carry out commands. Dropping a `Vm` stops it.
//!
//! | file | what lives there |
//! |---|---|
//! | `cost` | what the VM costs its host |
//! | `launch` | the steps of a launch |
//! | `life`, `life_state` | pause, resume, stop |
//! | `devices` | starts the devices' threads |
//! | `end` | why the guest ended, and who is told |
//! | `pursuit`, `target` | a limit that was not reached yet |
//! | `request` | requests for the guest's agents |
//! | `view` | what the guest says about its memory |

mod cost;
mod devices;
mod end;
mod guest_tables;
mod launch;
mod life;
mod life_state;
mod pursuit;
mod request;
mod target;
mod view;

pub use crate::config::{LinuxConfig, VmConfig};
pub use crate::error::{LaunchError, LimitError, PauseError, VmError};
pub use cost::Cost;
pub use life::{LifeChange, PAUSE};
pub use llfree_monitor::Resize;
pub use pursuit::Step;
pub use target::Target;

use crate::agent::Agents;
use crate::boot::Platform;
use crate::cgroup::Cgroup;
use crate::devices::Devices;
use crate::devices::blk::DiskControl;
use crate::devices::net::{NetConfig, NetCounters};
use crate::devices::worker::Worker;
use crate::doorbell::Doorbell;
use crate::elastic::{Elasticity, ResizeError, Way};
use crate::exit::ExitReason;
use crate::guest::Guest;
use crate::vcpu::VcpuHandle;
use agent_abi::{Command, Report};
use end::ExitNotifier;
use guest_tables::GuestTables;
use kvm_ioctls::VmFd;
use life_state::LifeState;
use llfree_base::units::Bytes;
use llfree_monitor::auto::AutoReclaim;
use llfree_monitor::{Direction, Monitor, Violations};
use shared_layout::HUGE_SIZE;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use target::Pursuit;
use vmm_sys_util::eventfd::EventFd;

/// The longest time for a resize without a deadline, however steadily it comes nearer to its target: a
/// driver may do so as slowly as it likes. Less than a client's patience.
pub const LONGEST_RESIZE: Duration = Duration::from_secs(9 * 60);

/// A running virtual machine.
pub struct Vm {
    /// Keeps the memslots; not used after the launch. The first field, so that KVM lets go of the
    /// memory before the fields below unmap it: `drop` has ended the vCPUs by then, and a vCPU that
    /// it left behind shares ownership of them.
    _vm: Arc<VmFd>,
    /// `None` where KVM keeps no statistics. It refers to KVM's VM, too.
    guest_tables: Option<GuestTables>,
    /// The running guest; its ports may hold a reference to KVM's VM.
    guest: Arc<dyn Guest>,
    config: VmConfig,
    platform: Arc<Platform>,
    monitor: Arc<Monitor>,
    auto_reclaim: AutoReclaim,
    agents: Arc<Agents>,
    doorbell: Arc<Doorbell>,
    devices: Arc<Devices>,
    disks: Vec<Arc<DiskControl>>,
    nets: Vec<Arc<NetCounters>>,
    elastic: Arc<dyn Elasticity>,
    /// The devices' threads.
    workers: Mutex<Vec<Worker>>,
    vcpus: Vec<Arc<VcpuHandle>>,
    /// `None` if nothing detects violations.
    violations: Option<Violations>,
    life: LifeState,
    pursuit: Pursuit,
    exit_notifier: ExitNotifier,
    started: Instant,
    next_seed: AtomicU32,
    cgroup: OnceLock<Arc<Cgroup>>,
}

impl Vm {
    /// What was launched. For Linux, without the contents of the images, which are in guest memory.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The owner of the guest's memory.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Automatic reclaim: off until it is switched on.
    #[must_use]
    pub fn auto_reclaim(&self) -> &AutoReclaim {
        &self.auto_reclaim
    }

    /// The region shared with the guest, and the boot data beside it.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// The running guest.
    #[must_use]
    pub fn guest(&self) -> &dyn Guest {
        &*self.guest
    }

    /// How the VM's memory moves.
    #[must_use]
    pub fn elastic(&self) -> &dyn Elasticity {
        &*self.elastic
    }

    /// The way in which it moves by now.
    #[must_use]
    pub fn way(&self) -> &dyn Way {
        self.elastic.way(self.config.elastic.way())
    }

    /// The monitor of a VM whose memory is tracked frame by frame; `what` names the operation in the error.
    ///
    /// # Errors
    /// The VM's frames get memory on first touch.
    pub fn tracked(&self, what: &'static str) -> Result<&Monitor, ResizeError> {
        self.elastic.table().ok_or(ResizeError::NoTable { what, kind: self.way().name() })
    }

    /// From now on, makes the maximum of this cgroup, which the process is in, follow the limit. Only
    /// the first call counts.
    pub fn follow_with(&self, cgroup: Arc<Cgroup>) {
        let _ = self.cgroup.set(cgroup);
    }

    /// The cgroup that follows the limit.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.get().map(|cgroup| &**cgroup)
    }

    /// Lowers the cgroup's maximum to what the limit needs, if what is in use allows it by now.
    pub fn settle_cgroup(&self) {
        // Such a guest may take all of it back at any time, and must not be killed for that.
        if self.way().grows_unasked() {
            return;
        }
        if let Some(Err(error)) = self.cgroup().map(|cgroup| cgroup.lower(self.limit())) {
            log::debug!("the cgroup's maximum stays for now: {}", llfree_base::error_line(&error));
        }
    }

    /// The disks, in the order of their flags.
    #[must_use]
    pub fn disks(&self) -> &[Arc<DiskControl>] {
        &self.disks
    }

    /// The network cards, in the order of their flags.
    pub fn nets(&self) -> impl Iterator<Item = (&NetConfig, &NetCounters)> {
        self.config.linux.nets.iter().zip(self.nets.iter().map(|counters| &**counters))
    }

    /// The devices, as vCPUs reach them.
    #[must_use]
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// What the guest may hold, in bytes: by the monitor's residency R, or by the device's accounting.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.elastic.limit()
    }

    /// The doorbell, which counts the guest's calls.
    #[must_use]
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// The vCPUs, with their counters and orders.
    #[must_use]
    pub fn vcpus(&self) -> &[Arc<VcpuHandle>] {
        &self.vcpus
    }

    /// Whether the guest is seen when it touches memory that it does not have.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        self.monitor.supply().userfault().is_some()
    }

    /// The time since the launch began.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Readable once the guest has ended.
    #[must_use]
    pub fn end_event(&self) -> &EventFd {
        &self.exit_notifier.event
    }

    /// Why the guest ended, if it did: the final word once it was [stopped](Self::stop).
    #[must_use]
    pub fn ended(&self) -> Option<ExitReason> {
        self.exit_notifier.end.reason()
    }

    /// Has the guest's agent carry out a command, on all vCPUs. A command that a pause interrupts goes on
    /// after the resume, but its `timeout` keeps running during the pause.
    ///
    /// # Errors
    /// If the VM is paused, or if the guest does not answer within `timeout` or has ended.
    pub fn command(&self, command: Command, timeout: Duration) -> Result<Report, VmError> {
        self.command_while(command, timeout, &|| true)
    }

    fn command_while(&self, command: Command, timeout: Duration, wanted: &dyn Fn() -> bool) -> Result<Report, VmError> {
        if self.is_paused() && !self.is_over() {
            return Err(VmError::Paused);
        }
        match (self.guest.run(command, timeout, wanted), self.ended()) {
            (Ok(report), _) => Ok(report),
            (Err(_), Some(end)) => Err(end.into()),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// A seed that no command of this VM has used before, so that stale contents never look right.
    #[must_use]
    pub fn next_seed(&self) -> u64 {
        u64::from(self.next_seed.fetch_add(1, Ordering::Relaxed))
    }

    /// Lowers the limit to `target` bytes. Takes what is free at once; if that is not enough, asks
    /// the guest to give up its caches, tries again, and goes on while `keep_waiting` says so, given
    /// the time since the start.
    ///
    /// # Errors
    /// A size out of range, or a discard that the kernel refused. Falling short is not an error, even
    /// if the VM ends in the meantime.
    pub fn shrink(&self, target: u64, keep_waiting: impl Fn(Duration) -> bool) -> Result<Resize, VmError> {
        self.check_shrink(target)?;
        let go_on = |elapsed| !self.is_over() && keep_waiting(elapsed);
        let resize = self.elastic.resize(Direction::Shrink, target, &go_on)?;
        self.settle_cgroup();
        Ok(resize)
    }

    /// The same, even if that takes what the guest asks to be left.
    ///
    /// # Errors
    /// As [`shrink`](Self::shrink).
    pub fn shrink_by_force(&self, target: u64, keep_waiting: impl Fn(Duration) -> bool) -> Result<Resize, VmError> {
        self.check_shrink(target)?;
        let go_on = |elapsed| !self.is_over() && keep_waiting(elapsed);
        let resize = self.elastic.shrink_by_force(target, &go_on)?;
        self.settle_cgroup();
        Ok(resize)
    }

    fn check_shrink(&self, target: u64) -> Result<(), VmError> {
        self.check_size(target)?;
        if target > self.limit() {
            let limit = Bytes(self.limit());
            return Err(LimitError::ShrinkAboveLimit { target: Bytes(target), limit }.into());
        }
        Ok(())
    }

    /// Raises the limit to `target` bytes.
    ///
    /// # Errors
    /// A size out of range, a VM whose memory stays as it is, or a cgroup that does not make room.
    pub fn grow(&self, target: u64) -> Result<Resize, VmError> {
        self.grow_while(target, || true)
    }

    /// The same, but only while `wanted` says so.
    ///
    /// # Errors
    /// As [`grow`](Self::grow). Falling short is not an error.
    pub fn grow_while(&self, target: u64, wanted: impl Fn() -> bool) -> Result<Resize, VmError> {
        self.check_size(target)?;
        if target < self.limit() {
            let limit = Bytes(self.limit());
            return Err(LimitError::GrowBelowLimit { target: Bytes(target), limit }.into());
        }
        if let Some(cgroup) = self.cgroup() {
            cgroup.raise(target)?;
        }
        let go_on = |elapsed| !self.is_over() && self.is_moving(elapsed) && wanted();
        Ok(self.elastic.resize(Direction::Grow, target, &go_on)?)
    }

    /// Whether a resize without a deadline that began `elapsed` ago should go on: its driver makes progress,
    /// and has not had [`LONGEST_RESIZE`] for it. False while the VM is paused, as the driver is, too.
    #[must_use]
    pub fn is_moving(&self, elapsed: Duration) -> bool {
        elapsed < LONGEST_RESIZE && !self.is_paused() && self.elastic.is_moving(elapsed)
    }

    fn is_over(&self) -> bool {
        self.life.is_stopped() || self.ended().is_some()
    }

    fn check_size(&self, bytes: u64) -> Result<(), VmError> {
        if !bytes.is_multiple_of(HUGE_SIZE) {
            return Err(LimitError::NotAMultiple { bytes }.into());
        }
        if bytes > self.config.memory.0 {
            return Err(LimitError::AboveMemory { target: Bytes(bytes), memory: self.config.memory }.into());
        }
        Ok(())
    }

    /// Waits until the guest ends, for at most `timeout`.
    #[must_use]
    pub fn wait_for_end(&self, timeout: Duration) -> Option<ExitReason> {
        self.exit_notifier.end.wait(timeout)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}
