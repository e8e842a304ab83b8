//! One virtual machine: its parts put together, started, reported on and stopped.
//!
//! [`Vm::launch`] builds KVM's VM around guest RAM (one memslot at address 0) and the platform
//! region (another above it), loads the guest and starts a thread a vCPU. From then on the monitor
//! owns the memory and the agents' seats carry commands. Dropping a `Vm` stops it.

mod devices;

use crate::agent::{self, AgentError, Agents};
use crate::boot::{self, BootError, Kernel, KernelError, Platform};
use crate::cgroup::{Cgroup, CgroupError};
use crate::devices::Devices;
use crate::devices::worker::Worker;
use crate::doorbell::{Doorbell, GuestEnd};
use crate::elastic::{DeviceError, Elastic, ElasticDevice, ResizeError};
use crate::harden::{self, Role};
use crate::install_config::{InstallConfig, InstallConfigError};
use crate::memory::{Backing, GuestRam, MemoryError, Supply};
use crate::monitor::auto::AutoReclaim;
use crate::monitor::{Monitor, MonitorError, Pass, Violations};
use crate::units::Bytes;
use crate::vcpu::{self, VcpuContext, VcpuCounters};
use crate::{faults, kernel_stats};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use shared_layout::HUGE_SIZE;
use shared_layout::agent::{Command, Report};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long an idle vCPU may take to give its cached frames back during a shrink.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
/// Pause between two looks at a guest that is to give memory up.
const SHRINK_POLL: Duration = Duration::from_millis(5);

/// What to launch.
#[derive(Clone, Default, Debug)]
pub struct VmConfig {
    /// RAM in bytes, a non-zero multiple of 2 MiB.
    pub memory: Bytes,
    /// vCPUs.
    pub cpus: u32,
    /// What is behind RAM.
    pub backing: Backing,
    /// An ELF to run instead of the embedded guest.
    pub kernel: Option<PathBuf>,
    /// Host cores for the vCPUs' threads, in turn; any if there are none.
    pub pin: Vec<u32>,
    /// How frames get their memory, and what holds the guest to its limit.
    pub install: InstallConfig,
    /// How memory is made smaller and larger.
    pub elastic: Elastic,
}

impl VmConfig {
    /// The built-in guest, with defaults for what is not named here.
    #[must_use]
    pub fn new(memory: Bytes, cpus: u32, backing: Backing) -> Self {
        Self { memory, cpus, backing, ..Self::default() }
    }
}

/// Why a VM was not launched; nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The machine or the platform region.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The guest's image.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The device for `--elastic`.
    #[error("--elastic")]
    Device(#[from] DeviceError),
    /// Not even the built-in guest's image fits.
    #[error("guest memory of {memory} is too small for the built-in guest; use --mem with at least {least}")]
    TooSmall {
        /// What was asked for.
        memory: Bytes,
        /// Where the image ends.
        least: Bytes,
    },
    /// More vCPUs than there can be.
    #[error("{asked} vCPUs asked for, this machine's KVM runs 1 to {limit}; use --cpus within that")]
    Cpus {
        /// What was asked for.
        asked: u32,
        /// KVM's maximum.
        limit: u32,
    },
    /// A core that is not there, or not ours.
    #[error("core {core} is not among those that this process may use, {allowed:?}; use --pin with some of them")]
    Pin {
        /// What was asked for.
        core: u32,
        /// What there is.
        allowed: Vec<u32>,
    },
    /// How frames get their memory.
    #[error(transparent)]
    Install(#[from] InstallConfigError),
    /// KVM refused guest memory.
    #[error("KVM could not map {memory} at guest address {gpa:#x} as one slot of guest memory; use less --mem")]
    Memslot {
        /// Where.
        gpa: u64,
        /// How much.
        memory: Bytes,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM refused a step.
    #[error("KVM could not {step}")]
    Kvm {
        /// What failed.
        step: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The host refused a thread or an event.
    #[error("the host could not {step}")]
    Host {
        /// What failed.
        step: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// Why a running VM did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The monitor had to stop a pass.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The guest's agent did not answer.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its cgroup did not make room for it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A size out of range.
    #[error("{0}")]
    Size(String),
    /// No thread for a part that was switched on.
    #[error("the host could not start a thread")]
    Thread(#[source] std::io::Error),
    /// A resize that this VM cannot do.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// The guest ended.
    #[error(transparent)]
    Ended(#[from] GuestEnd),
}

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
    reason: Mutex<Option<GuestEnd>>,
    changed: Condvar,
}

/// Tells everybody that the guest has ended.
#[derive(Clone)]
struct Announcer {
    end: Arc<End>,
    event: Arc<EventFd>,
    agents: Arc<Agents>,
}

impl Announcer {
    fn announce(&self, reason: GuestEnd) {
        // The first reason is the cause, later ones are its consequences.
        self.end.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.end.changed.notify_all();
        self.agents.stop();
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
    _vm: VmFd,
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
    vcpus: Vec<Arc<VcpuCounters>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// `None` where nothing sees them.
    violations: Option<Violations>,
    stop: Arc<AtomicBool>,
    announcer: Announcer,
    started: Instant,
    next_seed: AtomicU32,
    cgroup: OnceLock<Arc<Cgroup>>,
}

impl Vm {
    /// Builds and starts a VM.
    ///
    /// # Errors
    /// [`LaunchError`]. When a vCPU's thread cannot be started, those before it ran for an instant.
    pub fn launch(config: VmConfig) -> Result<Self, LaunchError> {
        let started = Instant::now();
        let kvm = boot::open_kvm()?;
        let limits = boot::limits(&kvm)?;
        if config.cpus == 0 || config.cpus > limits.max_vcpus {
            return Err(LaunchError::Cpus { asked: config.cpus, limit: limits.max_vcpus });
        }
        check_cores(&config.pin)?;
        let kernel = match &config.kernel {
            Some(path) => Kernel::open(path)?,
            None => Kernel::parse("the embedded guest", images::SHIM_ELF.to_vec())?,
        };
        let memory = config.memory.0;
        let least = Bytes(u64::from(kernel.huge_frames().end) * HUGE_SIZE);
        if config.kernel.is_none() && config.memory < least {
            return Err(LaunchError::TooSmall { memory: config.memory, least });
        }
        kernel.check_fits(memory)?;
        let platform = Arc::new(Platform::new(memory, config.cpus, limits.address_bits)?);
        let (pool, on_violation, use_userfaultfd) =
            config.install.resolve(config.memory, config.backing, config.elastic == Elastic::Llfree)?;
        let ram = Arc::new(GuestRam::new(memory, config.backing)?);
        let supply = Supply::new(ram.clone(), pool, use_userfaultfd)?;
        let image = kernel.huge_frames();
        let agents = Arc::new(Agents::new(config.cpus).with_tick(config.elastic.tick()));
        let elastic =
            ElasticDevice::new(&config.elastic, &ram, &image, devices::interrupt(platform.clone(), agents.clone()))?;
        let monitor = Arc::new(match config.elastic {
            Elastic::Llfree => Monitor::new(ram.clone(), supply, platform.clone(), image)?,
            _ => Monitor::untracked(ram.clone(), supply, platform.clone(), image, config.elastic.kept_back(memory))?,
        });
        // It writes to frames that are there: a fault would wait for a thread that is not.
        kernel.load(ram.guest_memory())?;
        let kernel = Arc::new(kernel);

        let vm = create_vm(&kvm).map_err(|source| LaunchError::Kvm { step: "create a VM", source })?;
        add_memslot(&vm, 0, 0, ram.host_address(), ram.bytes())?;
        let (gpa, host_address, bytes) = platform.memslot();
        add_memslot(&vm, 1, gpa, host_address, bytes)?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| LaunchError::Kvm { step: "tell which CPU features it supports", source })?;
        let mut fds = Vec::new();
        for index in 0..config.cpus {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(|source| LaunchError::Kvm { step: "create a vCPU", source })?;
            fd.set_cpuid2(&cpuid).map_err(|source| LaunchError::Kvm { step: "set a vCPU's features", source })?;
            if index == 0 {
                // An unknown frequency only costs the guest its clock.
                platform.set_tsc_khz(fd.get_tsc_khz().map_or(0, u64::from));
            }
            platform.enter(&fd, index, kernel.entry())?;
            fds.push(fd);
        }
        vcpu::prepare_kick()
            .map_err(|e| LaunchError::Host { step: "install the signal that stops vCPUs", source: e.into() })?;
        let end_event = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| LaunchError::Host { step: "make an event for the guest's end", source })?;

        let transports = elastic.iter().map(|device| device.transport().clone()).collect();
        let devices = Arc::new(Devices::new(platform.devices_gpa(), transports));
        if devices.count() > 0 {
            platform.set_devices(devices.count());
        }
        let workers = devices::start(&vm, &devices)?;
        let doorbell = Arc::new(Doorbell::new(platform.clone(), monitor.clone(), agents.clone()));
        let vcpus: Vec<_> = fds.iter().map(|_| Arc::new(VcpuCounters::default())).collect();
        let announcer = Announcer { end: Arc::new(End::default()), event: Arc::new(end_event), agents: agents.clone() };
        let on_end = announcer.clone();
        let violations =
            Violations::watch(monitor.clone(), vcpus.clone(), on_violation, move |reason| on_end.announce(reason))
                .map_err(|source| LaunchError::Host { step: "start the thread that sees violations", source })?;
        let machine = Self {
            _vm: vm,
            vcpus,
            config,
            platform,
            auto_reclaim: AutoReclaim::new(monitor.clone()),
            monitor,
            agents,
            doorbell,
            devices,
            elastic,
            workers: Mutex::new(workers),
            threads: Mutex::new(Vec::new()),
            violations,
            stop: Arc::new(AtomicBool::new(false)),
            announcer,
            started,
            next_seed: AtomicU32::new(1),
            cgroup: OnceLock::new(),
        };
        for (index, fd) in fds.into_iter().enumerate() {
            // A thread that cannot start drops the machine, which stops those that did.
            machine.start_vcpu(fd, index as u32, &kernel)?;
        }
        Ok(machine)
    }

    fn start_vcpu(&self, fd: VcpuFd, index: u32, kernel: &Arc<Kernel>) -> Result<(), LaunchError> {
        let context = VcpuContext {
            platform: self.platform.clone(),
            doorbell: self.doorbell.clone(),
            devices: self.devices.clone(),
            kernel: kernel.clone(),
            stop: self.stop.clone(),
            counters: self.vcpus[index as usize].clone(),
        };
        let core = self.config.pin.get(index as usize % self.config.pin.len().max(1)).copied();
        let announcer = self.announcer.clone();
        let refused = |source| LaunchError::Host { step: "start a vCPU's thread", source };
        faults::point(faults::THREAD_START).map_err(refused)?;
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                if let Some(core) = core
                    && let Err(error) = pin_to(core)
                {
                    log::warn!("vCPU {index} could not be pinned to core {core}: {error}");
                }
                harden::enter(Role::Vcpu);
                if let Some(reason) = vcpu::run(fd, index, &context) {
                    announcer.announce(reason);
                }
            })
            .map_err(refused)?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// What was launched.
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

    /// Whether the guest shares its allocator's table with us.
    #[must_use]
    pub fn has_table(&self) -> bool {
        true
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
        if let Some(Err(error)) = self.cgroup().map(|cgroup| cgroup.lower(self.limit())) {
            log::debug!("the cgroup's maximum stays for now: {}", crate::error_line(&error));
        }
    }

    /// The device by which memory is made smaller and larger, if it is one.
    #[must_use]
    pub fn elastic(&self) -> Option<&ElasticDevice> {
        self.elastic.as_ref()
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

    /// What each vCPU did.
    #[must_use]
    pub fn vcpus(&self) -> &[Arc<VcpuCounters>] {
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
        &self.announcer.event
    }

    /// Why the guest ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<GuestEnd> {
        self.announcer.end.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// Runs a command on all vCPUs.
    ///
    /// # Errors
    /// If the guest does not answer within `timeout`, or has ended.
    pub fn guest(&self, command: Command, timeout: Duration) -> Result<Report, VmError> {
        let reports = self.agents.run(command, timeout);
        match (reports, self.ended()) {
            (Ok(reports), _) => Ok(agent::total(&reports)),
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
                let over = self.stop.load(Ordering::Acquire) || self.ended().is_some();
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

    /// Stops the vCPUs and waits for them; the guest's memory stays until the `Vm` is dropped.
    /// Ends what others do for the guest at its next step: commands, waiting shrinks, passes.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.monitor.stop();
        self.auto_reclaim.stop();
        self.agents.stop();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let first_time = !threads.is_empty();
        if let Some(violations) = &self.violations {
            violations.release();
        }
        vcpu::kick(threads);
        // Behind the vCPUs, which notify them.
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        if let Some(violations) = &self.violations {
            violations.finish();
        }
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (all, held) = (count(&self.monitor.counters.violations), count(&self.monitor.counters.held_violations));
        if first_time && all > 0 {
            log::warn!("{all} times in all the guest touched memory that it did not have, {held} of them held frames");
        }
    }

    /// Waits until the guest ends, at most for `timeout`.
    #[must_use]
    pub fn wait_for_end(&self, timeout: Duration) -> Option<GuestEnd> {
        let end = &self.announcer.end;
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

fn check_cores(cores: &[u32]) -> Result<(), LaunchError> {
    if cores.is_empty() {
        return Ok(());
    }
    // Of the first thread, as the one that launches may sit on a core itself.
    let set = sched_getaffinity(Some(rustix::process::getpid()))
        .map_err(|e| LaunchError::Host { step: "tell which cores this process may use", source: e.into() })?;
    let allowed: Vec<u32> = (0..CpuSet::MAX_CPU as u32).filter(|core| set.is_set(*core as usize)).collect();
    match cores.iter().find(|core| !allowed.contains(core)) {
        Some(core) => Err(LaunchError::Pin { core: *core, allowed }),
        None => Ok(()),
    }
}

/// Keeps the calling thread on one core, which [`check_cores`] knows.
fn pin_to(core: u32) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core as usize);
    sched_setaffinity(None, &set)
}

/// KVM gives up on a new VM when a signal comes; the signal's own handler is what acts on it.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}

fn add_memslot(vm: &VmFd, slot: u32, gpa: u64, host_address: u64, bytes: u64) -> Result<(), LaunchError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: bytes,
        userspace_addr: host_address,
    };
    // SAFETY: the range is a mapping that outlives the VM's fd and those of its vCPUs: in `launch`
    // it was made before them, in `Vm` it is dropped after them, and a vCPU's thread owns a share of
    // it. Guest and host both expect the other to change it at any time.
    unsafe { vm.set_user_memory_region(region) }.map_err(|source| LaunchError::Memslot {
        gpa,
        memory: Bytes(bytes),
        source,
    })
}
