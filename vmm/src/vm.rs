//! One virtual machine: its parts put together, started, reported on and stopped.
//!
//! [`Vm::launch`] builds KVM's VM around guest RAM and the platform region above it, loads the guest
//! and starts a thread a vCPU. From then on the monitor owns the memory, and the agents' seats (or
//! the agent in a Linux guest) carry commands. Dropping a `Vm` stops it.
//!
//! | file | what lives there |
//! |---|---|
//! | `config`, `error` | what to launch, and why it failed |
//! | `launch` | the steps of a launch |
//! | `life` | pause, resume, stop |
//! | `linux` | those that only Linux guests need |
//! | `devices` | notifications, interrupts, and resizes by a device |

mod config;
mod devices;
mod error;
mod launch;
mod life;
mod linux;

pub use config::{LinuxConfig, VmConfig};
pub use error::{LaunchError, VmError};
pub use life::{LifeChange, PAUSE, PauseError};

use crate::agent::linux::LinuxAgent;
use crate::agent::{self, Agents};
use crate::boot::Platform;
use crate::cgroup::Cgroup;
use crate::devices::Devices;
use crate::devices::blk::DiskControl;
use crate::devices::net::{NetConfig, NetCounters};
use crate::devices::serial::Serial;
use crate::devices::worker::Worker;
use crate::doorbell::Doorbell;
use crate::elastic::{Elastic, ElasticDevice};
use crate::exit::ExitReason;
use crate::vcpu::VcpuHandle;
use kvm_ioctls::VmFd;
use llfree_base::units::Bytes;
use llfree_base::{faults, kernel_stats};
use llfree_monitor::auto::AutoReclaim;
use llfree_monitor::memory::Backing;
use llfree_monitor::{Monitor, Pass, Violations};
use shared_layout::HUGE_SIZE;
use shared_layout::agent::{Command, Report};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// How long an idle vCPU may take to give its cached frames back during a shrink.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
/// Pause between two looks at a guest that is to give memory up.
const SHRINK_POLL: Duration = Duration::from_millis(5);

/// How a resize went; sizes in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resize {
    /// The limit asked for.
    pub target: u64,
    /// The limit reached.
    pub actual: u64,
    /// What was done.
    pub pass: Pass,
    /// Spent at it: the passes that moved frames.
    pub duration: Duration,
    /// Spent otherwise: on a guest that had nothing to give.
    pub waited: Duration,
}

/// The guest's end, when it comes, and who waits for it.
#[derive(Default)]
struct End {
    reason: Mutex<Option<ExitReason>>,
    changed: Condvar,
}

/// Tells everybody that the guest has ended.
#[derive(Clone)]
struct ExitNotifier {
    end: Arc<End>,
    event: Arc<EventFd>,
    agents: Arc<Agents>,
    linux_agent: Option<Arc<LinuxAgent>>,
}

impl ExitNotifier {
    fn notify(&self, reason: ExitReason) {
        // The first reason is the cause, later ones are its consequences.
        self.end.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.end.changed.notify_all();
        self.agents.stop();
        if let Some(agent) = &self.linux_agent {
            agent.stop();
        }
        if let Err(error) = faults::point(faults::EVENTFD).and_then(|()| self.event.write(1)) {
            log::error!("the guest's end could not be announced: {error}");
        }
    }
}

/// A running virtual machine.
pub struct Vm {
    /// Keeps the memslots; nothing is asked of it after the launch. First, so that KVM lets go of
    /// the memory before the fields below unmap it: `drop` has ended the vCPUs by then, and one that
    /// it left behind shares their ownership.
    _vm: Arc<VmFd>,
    /// What only a Linux guest has; its ports share the VM.
    linux: Option<linux::Parts>,
    config: VmConfig,
    platform: Arc<Platform>,
    monitor: Arc<Monitor>,
    auto_reclaim: AutoReclaim,
    agents: Arc<Agents>,
    doorbell: Arc<Doorbell>,
    devices: Arc<Devices>,
    elastic: Option<ElasticDevice>,
    /// The devices' threads.
    workers: Mutex<Vec<Worker>>,
    vcpus: Vec<Arc<VcpuHandle>>,
    /// `None` where nothing sees them.
    violations: Option<Violations>,
    life: life::Life,
    exit_notifier: ExitNotifier,
    started: Instant,
    next_seed: AtomicU32,
    cgroup: OnceLock<Arc<Cgroup>>,
}

impl Vm {
    /// What was launched; of Linux without the images, which are in guest memory.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The owner of the guest's memory.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Reclaim without being asked: off until it is switched on.
    #[must_use]
    pub fn auto_reclaim(&self) -> &AutoReclaim {
        &self.auto_reclaim
    }

    /// The region shared with the guest, and what the VMM keeps beside it.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Whether the guest shares its allocator's table with us; a Linux guest does not.
    #[must_use]
    pub fn has_table(&self) -> bool {
        self.linux.is_none()
    }

    /// A Linux guest's console.
    #[must_use]
    pub fn serial(&self) -> Option<&Arc<Serial>> {
        self.linux.as_ref().map(|linux| linux.pc.serial())
    }

    /// Lets the maximum of this cgroup, which the process is in, follow the limit from now on. Only
    /// the first one counts.
    pub fn follow_with(&self, cgroup: Arc<Cgroup>) {
        let _ = self.cgroup.set(cgroup);
    }

    /// The cgroup that follows the limit.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.get().map(|cgroup| &**cgroup)
    }

    /// Lowers the cgroup's maximum to what the limit needs, as soon as that can be.
    pub fn settle_cgroup(&self) {
        // Such a guest may have all of it back at any time, and must not be killed for that.
        if self.config.elastic.grows_unasked() {
            return;
        }
        if let Some(Err(error)) = self.cgroup().map(|cgroup| cgroup.lower(self.limit())) {
            log::debug!("the cgroup's maximum stays for now: {}", llfree_base::error_line(&error));
        }
    }

    /// The device by which memory is made smaller and larger, if it is one.
    #[must_use]
    pub fn elastic(&self) -> Option<&ElasticDevice> {
        self.elastic.as_ref()
    }

    /// Its disks, in the order of their flags.
    #[must_use]
    pub fn disks(&self) -> &[Arc<DiskControl>] {
        self.linux.as_ref().map_or(&[], |linux| &linux.disks)
    }

    /// Its network cards, in the order of their flags.
    pub fn nets(&self) -> impl Iterator<Item = (&NetConfig, &NetCounters)> {
        let counters = self.linux.iter().flat_map(|linux| &linux.nets);
        self.config.linux.nets.iter().zip(counters.map(|counters| &**counters))
    }

    /// The agent in a Linux guest.
    #[must_use]
    pub fn linux_agent(&self) -> Option<&LinuxAgent> {
        self.linux.as_ref().map(|linux| &*linux.agent)
    }

    /// The devices, as vCPUs reach them.
    #[must_use]
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// What the guest may hold, in bytes: by R, or by the device's books.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.elastic.as_ref().map_or_else(|| u64::from(self.monitor.limit()) * HUGE_SIZE, ElasticDevice::limit)
    }

    /// The calls' side of the story.
    #[must_use]
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Each vCPU: what it did, and whether it is parked.
    #[must_use]
    pub fn vcpus(&self) -> &[Arc<VcpuHandle>] {
        &self.vcpus
    }

    /// Whether something sees the guest touch what it does not have.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        self.monitor.supply().userfault().is_some()
    }

    /// Since the launch began.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Readable once the guest has ended.
    #[must_use]
    pub fn end_event(&self) -> &EventFd {
        &self.exit_notifier.event
    }

    /// Why the guest ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<ExitReason> {
        self.exit_notifier.end.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All resident memory of the VM in bytes, guest RAM and the VMM's own, by the kernel's
    /// accounting.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn resident_bytes(&self) -> std::io::Result<u64> {
        let process = kernel_stats::process_resident_bytes()?;
        if self.config.backing == Backing::Hugetlb {
            // Pages of hugetlbfs are not in a process's Rss.
            let ram = self.monitor.ram().residency().map_err(std::io::Error::other)?;
            return Ok(process + ram.resident_bytes);
        }
        Ok(process)
    }

    /// Runs a command on all vCPUs. One that a pause comes into goes on after it, and its `timeout` runs on.
    ///
    /// # Errors
    /// If the VM is paused, or if the guest does not answer within `timeout` or has ended.
    pub fn guest(&self, command: Command, timeout: Duration) -> Result<Report, VmError> {
        if self.is_paused() {
            return Err(VmError::Paused);
        }
        let report = match &self.linux {
            Some(linux) => linux.agent.run(command, timeout),
            None => self.agents.run(command, timeout).map(|reports| agent::total(&reports)),
        };
        match (report, self.ended()) {
            (Ok(report), _) => Ok(report),
            (Err(_), Some(end)) => Err(end.into()),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// A seed that no command of this VM had before: stale contents never look right.
    #[must_use]
    pub fn next_seed(&self) -> u64 {
        u64::from(self.next_seed.fetch_add(1, Ordering::Relaxed))
    }

    /// Lowers the limit to `target` bytes. Takes what is free at once; if that is not enough, asks
    /// the guest to give caches up, looks again, and goes on while `keep_waiting` says so, given
    /// the time since the start.
    ///
    /// # Errors
    /// A size out of range, or a discard that the kernel refused. Falling short is no error, also
    /// when the VM ends meanwhile.
    pub fn shrink(&self, target: u64, keep_waiting: impl Fn(Duration) -> bool) -> Result<Resize, VmError> {
        let frames = self.frames_of(target)?;
        let start = Instant::now();
        if target > self.limit() {
            return Err(VmError::Size(format!(
                "cannot shrink to {}: the limit is {} already; use grow to raise it",
                Bytes(target),
                Bytes(self.limit())
            )));
        }
        if self.config.elastic != Elastic::Llfree {
            let resize = self.resize_by_device(target, keep_waiting);
            self.settle_cgroup();
            return resize;
        }
        let mut pass = self.monitor.shrink(frames)?;
        // The first pass counts whatever it found; later ones if they took something.
        let mut duration = start.elapsed();
        if self.monitor.limit() > frames {
            // Busy vCPUs see `wanted` by themselves; idle ones hold only what they cached.
            self.agents.drain_if_idle(DRAIN_TIMEOUT);
            loop {
                let begin = Instant::now();
                let more = self.monitor.shrink(frames)?;
                if more.frames > 0 {
                    duration += begin.elapsed();
                }
                pass += more;
                let over = self.life.is_stopped() || self.ended().is_some();
                if self.monitor.limit() <= frames || over || !keep_waiting(start.elapsed()) {
                    break;
                }
                std::thread::sleep(SHRINK_POLL);
            }
        }
        let waited = start.elapsed().saturating_sub(duration);
        self.settle_cgroup();
        Ok(Resize { target, actual: u64::from(self.monitor.limit()) * HUGE_SIZE, pass, duration, waited })
    }

    /// Raises the limit to `target` bytes.
    ///
    /// # Errors
    /// A size out of range, a VM whose memory stays as it is, or a cgroup that does not make room.
    pub fn grow(&self, target: u64) -> Result<Resize, VmError> {
        let frames = self.frames_of(target)?;
        if target < self.limit() {
            return Err(VmError::Size(format!(
                "cannot grow to {}: the limit is {} already; use shrink to lower it",
                Bytes(target),
                Bytes(self.limit())
            )));
        }
        if let Some(cgroup) = self.cgroup() {
            cgroup.raise(target)?;
        }
        if self.config.elastic != Elastic::Llfree {
            return self.resize_by_device(target, |elapsed| self.is_device_moving(elapsed));
        }
        let start = Instant::now();
        let pass = self.monitor.grow(frames);
        let duration = start.elapsed();
        let actual = u64::from(self.monitor.limit()) * HUGE_SIZE;
        Ok(Resize { target, actual, pass, duration, waited: Duration::ZERO })
    }

    fn frames_of(&self, bytes: u64) -> Result<u32, VmError> {
        if !bytes.is_multiple_of(HUGE_SIZE) {
            let below = bytes - bytes % HUGE_SIZE;
            return Err(VmError::Size(format!(
                "{bytes} bytes is no multiple of 2 MiB; {} or {} would do",
                Bytes(below),
                Bytes(below.saturating_add(HUGE_SIZE))
            )));
        }
        match u32::try_from(bytes / HUGE_SIZE) {
            Ok(frames) if frames <= self.monitor.huge_frames() => Ok(frames),
            _ => Err(VmError::Size(format!("{} is more than the VM's memory, {}", Bytes(bytes), self.config.memory))),
        }
    }

    /// Waits until the guest ends, at most for `timeout`.
    #[must_use]
    pub fn wait_for_end(&self, timeout: Duration) -> Option<ExitReason> {
        let end = &self.exit_notifier.end;
        let reason = end.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = end.changed.wait_timeout_while(reason, timeout, |reason| reason.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}
